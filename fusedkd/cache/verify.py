"""Reading every byte of a cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import Damaged
from fusedkd.cache.head import open_head
from fusedkd.cache.manifest import Manifest
from fusedkd.cache.reader import TeacherCache
from fusedkd.cache.shard import REMEDY, open_index, open_shard
from fusedkd.cache.sums import known


def verify(folder: str | Path) -> tuple[Manifest | None, list[str]]:
    """Read every byte of a cache, and every answer in it.

    Returns:
        The manifest, unless it is itself damaged, and what is wrong, one line each.

    Raises:
        CacheError: no cache there.
    """
    folder = Path(folder)
    try:
        manifest = Manifest.load(folder)
    except Damaged as error:
        return None, [str(error)]
    wrong: list[str] = []
    index = _tried(wrong, open_index, folder, manifest)
    shards = known(folder, manifest)
    for number, file in shards.items():
        _tried(wrong, open_shard, folder, manifest, number, file, index)
    if (head := manifest.head) is not None:
        _tried(wrong, open_head, folder, head, manifest.padded_vocab_size, manifest.layout.k)
    if not manifest.complete:
        expected = manifest.number_of_shards
        wrong.append(f"{folder}: {len(shards)} of {expected} shards are there. {REMEDY}")
    if not wrong:
        _tried(wrong, TeacherCache(folder).check_answers)
    return manifest, wrong


def _tried(wrong: list[str], check: Callable[..., Any], *args: Any) -> Any:
    """What ``check`` returns, or None and a line in ``wrong``."""
    try:
        return check(*args)
    except Damaged as error:
        wrong.append(str(error))
        return None
