"""The Arrow files of a cache: writing one to bytes, opening one through a memory map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from fusedkd.cache.errors import Damaged
from fusedkd.cache.keys import KEY_BYTES, sha256
from fusedkd.cache.manifest import FileSum

__all__ = ["index_bytes", "open_checked", "shard_bytes", "shard_name"]

_SEQUENCE = pa.field("sequence", pa.binary(KEY_BYTES), nullable=False)
_TOKENS = pa.field("tokens", pa.int32(), nullable=False)


def shard_name(number: int) -> str:
    """Of the file."""
    return f"shard-{number:05d}.arrow"


def index_bytes(keys: Sequence[bytes], lengths: Sequence[int]) -> pa.Buffer:
    """``index.arrow``: which sequences there are, in order."""
    return _file([_SEQUENCE, _TOKENS], [keys, lengths])


def shard_bytes(
    keys: Sequence[bytes],
    lengths: Sequence[int],
    columns: Sequence[str],
    rows: Sequence[Mapping[str, bytes]],
) -> pa.Buffer:
    """One shard, from its sequences' byte strings."""
    fields = [pa.field(name, pa.binary(), nullable=False) for name in columns]
    values = [[row[name] for row in rows] for name in columns]
    return _file([_SEQUENCE, _TOKENS, *fields], [keys, lengths, *values])


def _file(fields: list[pa.Field], values: list[Sequence[Any]]) -> pa.Buffer:
    schema = pa.schema(fields)
    arrays = [pa.array(v, type=field.type) for v, field in zip(values, fields, strict=True)]
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue()


def open_checked(folder: Path, expected: FileSum) -> pa.RecordBatch:
    """Map a file of the cache into memory, compare its checksum, give its rows.

    Raises:
        Damaged: it is missing, or is not what was written.
    """
    path = folder / expected.name
    if not path.is_file():
        raise Damaged(f"{path} is missing. {REMEDY}")
    found = path.stat().st_size
    if found != expected.bytes:
        raise Damaged(f"{path} is damaged: {found:,} bytes, not {expected.bytes:,}. {REMEDY}")
    with pa.memory_map(str(path)) as source:
        data = source.read_buffer()
    if sha256(data) != expected.sha256:
        raise Damaged(f"{path} is damaged: its checksum differs. {REMEDY}")
    return ipc.open_file(pa.BufferReader(data)).get_batch(0)


REMEDY = "Run the `fusedkd cache` command that made it again: it makes what is damaged anew."
