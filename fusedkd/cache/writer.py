"""Writing a cache shard by shard, so that being killed costs no more than the open shard."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.cache.keys import sha256
from fusedkd.cache.manifest import NAME, FileSum, Manifest, replace_file
from fusedkd.cache.shard import index_bytes, open_checked, shard_bytes, shard_name

__all__ = ["Plan", "Writer", "per_shard"]

INDEX = "index.arrow"
SHARD_BYTES = 64 << 20  # what is lost at most; a checksum over it takes about 50 ms


@dataclass(frozen=True)
class Plan:
    """The sequences of a cache in the order in which they are written: ``keys`` without repeats."""

    keys: Sequence[bytes]
    lengths: Sequence[int]


def per_shard(
    plan: Plan, bytes_per_token: float, shard_bytes: int = SHARD_BYTES, of: int = 1
) -> int:
    """How many sequences make a shard of about ``shard_bytes``: a multiple of ``of``, so that
    batches end where shards do."""
    longest = max(plan.lengths)
    return max(1, int(shard_bytes / (bytes_per_token * longest)) // of) * of


class Writer:
    """A cache that is being written: a new one, or one that is gone on with.

    Shards hold the plan's sequences in order, ``manifest.per_shard`` each. What they contain must
    depend on their number alone, so that a run that was killed and one that was not leave the same
    bytes.

    Args:
        folder: made where it is missing.
        plan: all the sequences.
        facts: the manifest's fields but the counts, the index and the shards.

    Raises:
        CacheError: the folder holds a cache made with other settings or data, or other files.
    """

    def __init__(self, folder: Path, plan: Plan, facts: Mapping[str, Any]) -> None:
        self.folder, self.plan = folder, plan
        index = index_bytes(plan.keys, plan.lengths)
        self.manifest = Manifest(
            **facts,
            sequences=len(plan.keys),
            tokens=sum(plan.lengths),
            index=FileSum(INDEX, index.size, sha256(index)),
        )
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).exists():
            self._go_on()
        else:
            self._check_empty()
            replace_file(folder / INDEX, index)
            self.manifest.save(folder)
        self._restore(index)

    def _check_empty(self) -> None:
        known = {INDEX, f"{INDEX}.tmp", f"{NAME}.tmp"}  # of a run killed before its manifest
        if foreign := sorted({path.name for path in self.folder.iterdir()} - known):
            raise CacheError(
                f"--output {self.folder}: there is {foreign[0]} but no cache; expected a new or "
                "empty folder."
            )

    def _go_on(self) -> None:
        found = Manifest.load(self.folder)
        for field in fields(Manifest):
            was, now = getattr(found, field.name), getattr(self.manifest, field.name)
            if field.name != "shards" and was != now:
                what = "the data" if field.name in ("index", "sequences", "tokens") else field.name
                raise CacheError(
                    f"--output {self.folder}: the cache there was begun with another {what} "
                    f"({_short(was)}, now {_short(now)}). Give the same command to go on with it, "
                    "or another folder."
                )
        self.manifest = found

    def _restore(self, index: Any) -> None:
        for left in self.folder.glob("*.tmp"):
            left.unlink()
        try:
            open_checked(self.folder, self.manifest.index)
        except Damaged:
            replace_file(self.folder / INDEX, index)

    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be written, or are damaged."""
        return [n for n in range(self.manifest.number_of_shards) if not self._is_there(n)]

    def _is_there(self, number: int) -> bool:
        if number >= len(self.manifest.shards):
            return False
        try:
            open_checked(self.folder, self.manifest.shards[number])
        except Damaged:
            return False
        return True

    def sequences_of(self, number: int) -> range:
        """Which of the plan's sequences a shard holds."""
        start = number * self.manifest.per_shard
        return range(start, min(start + self.manifest.per_shard, self.manifest.sequences))

    def write(self, number: int, rows: Iterable[Mapping[str, bytes]]) -> None:
        """Write one shard, from its sequences' columns in order; it is on the disk on return."""
        span = self.sequences_of(number)
        data = shard_bytes(
            self.plan.keys[span.start : span.stop],
            self.plan.lengths[span.start : span.stop],
            self.manifest.layout.columns,
            list(rows),
        )
        replace_file(self.folder / shard_name(number), data)
        shards = list(self.manifest.shards)
        shards[number : number + 1] = [FileSum(shard_name(number), data.size, sha256(data))]
        self.manifest = replace(self.manifest, shards=tuple(shards))
        self.manifest.save(self.folder)


def _short(value: Any) -> str:
    text = str(value.sha256 if isinstance(value, FileSum) else value)
    return text if len(text) <= 40 else text[:12] + "..."


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder, so that no second process writes to it.

    Raises:
        CacheError: another one does.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"--output {folder}: another process is writing to it.") from None
        yield
    finally:
        os.close(handle)
