"""``manifest.json``: what a cache holds, from what it was made, and the checksums of its files.

A cache is a folder of

* ``manifest.json``: :class:`Manifest` as JSON, with the SHA-256 of everything else in it;
* ``index.arrow``: one column ``sequence`` (16 bytes each, :func:`~fusedkd.cache.keys.sequence_key`)
  and one ``tokens`` (int32): sequence n of the cache is row ``n % per_shard`` of shard
  ``n // per_shard``;
* ``shard-00000.arrow``, ...: one row per sequence with ``sequence``, ``tokens`` and the byte
  strings that :mod:`fusedkd.cache.layout` describes, as binary columns.

The ``.arrow`` files are Arrow IPC files of one record batch, not compressed, so that a memory map
is enough to read a row. ``shards`` in the manifest grows as they are written, in order.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedkd.cache.errors import CacheError, Damaged
from fusedkd.cache.keys import sha256
from fusedkd.cache.layout import Layout
from fusedkd.cache.policy import Policy

__all__ = ["FileSum", "Manifest", "replace_file"]

SCHEMA = 2
NAME = "manifest.json"


@dataclass(frozen=True)
class FileSum:
    """A file of the cache, as it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything but the sequences. ``teacher_hash`` is None for a teacher that was not seen."""

    teacher: str
    teacher_hash: str | None
    tokenizer_hash: str
    vocab_size: int  # true: entries with an id
    padded_vocab_size: int  # columns of the teacher's logits
    temperatures: tuple[float, ...]
    policy: Policy
    source: str  # how the answers came about: dtype and batch size, or the kind of import
    sequences: int
    tokens: int
    per_shard: int
    index: FileSum
    shards: tuple[FileSum, ...] = ()

    @property
    def layout(self) -> Layout:
        """How its rows are read."""
        return Layout(self.policy, self.vocab_size, self.temperatures)

    @property
    def number_of_shards(self) -> int:
        """How many shards the complete cache has."""
        return -(-self.sequences // self.per_shard)

    @property
    def complete(self) -> bool:
        """Whether every shard has been written."""
        return len(self.shards) == self.number_of_shards

    def save(self, folder: Path) -> None:
        """Write it to ``folder``, at once."""
        replace_file(folder / NAME, _render(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check it.

        Raises:
            CacheError: no cache there, or one of another schema.
            Damaged: it is not what was written.
        """
        path = folder / NAME
        if not path.is_file():
            raise CacheError(
                f"{folder}: no teacher cache there, for it has no {NAME}. `fusedkd cache` makes it."
            )
        raw = path.read_bytes()
        try:
            content = json.loads(raw)
            found = content.pop("sha256")
            schema = content.pop("schema")
            intact = _render(content, schema) == raw and isinstance(found, str)
        except (ValueError, AttributeError, KeyError, TypeError):
            intact = False
        if not intact:
            raise Damaged(
                f"{path} is damaged: its checksum differs. The cache has to be made anew."
            )
        if schema != SCHEMA:
            raise CacheError(
                f"{path}: schema {schema}, but this version of fusedkd reads {SCHEMA}. Make the "
                "cache anew, in another folder, or read it with the version that made it."
            )
        return _parsed(content)


def _parsed(content: dict[str, Any]) -> Manifest:
    content["policy"] = Policy(**content["policy"])
    content["temperatures"] = tuple(content["temperatures"])
    content["index"] = FileSum(**content["index"])
    content["shards"] = tuple(FileSum(**shard) for shard in content["shards"])
    return Manifest(**content)


def _render(content: dict[str, Any], schema: int = SCHEMA) -> bytes:
    """The only bytes that stand for this content, so that any other bytes are damage."""
    body = {"schema": schema, **content}
    checksum = sha256(json.dumps(body, sort_keys=True).encode())
    return (json.dumps({**body, "sha256": checksum}, indent=1) + "\n").encode()


def replace_file(path: Path, data: Any) -> None:
    """Write a file so that, whenever the power goes, there is the old one or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in it last."""
    if os.name == "nt":  # has no handles of folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
