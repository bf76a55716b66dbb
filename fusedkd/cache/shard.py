"""The Arrow files of a cache: writing one to bytes, opening one that anybody may have written."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from fusedkd.cache.errors import Damaged
from fusedkd.cache.files import check_plain
from fusedkd.cache.keys import KEY_BYTES, sha256
from fusedkd.cache.manifest import FileSum, Manifest

REMEDY = "Run the `fusedkd cache` command that made it again: it makes what is damaged anew."
_SEQUENCE = pa.field("sequence", pa.binary(KEY_BYTES), nullable=False)
_TOKENS = pa.field("tokens", pa.int32(), nullable=False)
_MAGIC = 8  # bytes before the first message


class Index(NamedTuple):
    """Which sequences there are, in order: their keys (S16) and their numbers of tokens (int32)."""

    keys: NDArray[Any]
    tokens: NDArray[Any]


# ---- writing ----


def index_bytes(keys: Sequence[bytes], lengths: Sequence[int]) -> pa.Buffer:
    """``index.arrow``: which sequences there are, in order."""
    return _file(_fields(()), [keys, lengths])


def shard_bytes(
    keys: Sequence[bytes],
    lengths: Sequence[int],
    columns: Sequence[str],
    rows: Sequence[Mapping[str, bytes]],
) -> pa.Buffer:
    """One shard, from its sequences' byte strings."""
    return _file(_fields(columns), [keys, lengths, *([row[c] for row in rows] for c in columns)])


def _fields(columns: Sequence[str]) -> list[pa.Field]:
    return [_SEQUENCE, _TOKENS, *(pa.field(name, pa.binary(), nullable=False) for name in columns)]


def _file(fields: list[pa.Field], values: list[Sequence[Any]]) -> pa.Buffer:
    schema = pa.schema(fields)
    arrays = [pa.array(v, type=field.type) for v, field in zip(values, fields, strict=True)]
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return sink.getvalue()


# ---- opening ----


def open_index(folder: Path, manifest: Manifest) -> Index:
    """The sequences of a cache.

    Raises:
        Damaged: the file is missing, not what was written, or not what is written.
    """
    batch = _open(folder / manifest.index.name, manifest.index, (), manifest.sequences)
    keys, tokens = found = _index(batch)
    ordered = np.sort(keys)
    total = tokens.sum(dtype=np.int64)
    if (ordered[1:] == ordered[:-1]).any():
        wrong = "a sequence is there twice"
    elif total != manifest.tokens or tokens.min() < 0:
        wrong = f"{total:,} tokens, not {manifest.tokens:,}"
    else:
        return found
    raise Damaged(f"{folder / manifest.index.name} is damaged: {wrong}. {REMEDY}")


def open_shard(
    folder: Path, manifest: Manifest, number: int, expected: FileSum, index: Index | None
) -> pa.RecordBatch:
    """The rows of a shard, in a memory map. Without an index, they may be of any sequences.

    Raises:
        Damaged: the file is missing, not what was written, or not what is written.
    """
    span = manifest.sequences_of(number)
    batch = _open(folder / expected.name, expected, manifest.layout.columns, len(span))
    for found, wanted in zip(_index(batch), index or (), strict=index is not None):
        if not np.array_equal(found, wanted[span.start : span.stop]):
            raise Damaged(
                f"{folder / expected.name} is damaged: other sequences than in the index. {REMEDY}"
            )
    return batch


def _index(batch: pa.RecordBatch) -> Index:
    keys, tokens = (batch[field.name].buffers()[1] for field in (_SEQUENCE, _TOKENS))
    size = len(batch)
    return Index(np.frombuffer(keys, f"S{KEY_BYTES}")[:size], np.frombuffer(tokens, "<i4")[:size])


def _open(path: Path, expected: FileSum, columns: Sequence[str], rows: int) -> pa.RecordBatch:
    """Map a file into memory, compare its checksum, and look at all that Arrow reads of it."""
    found = check_plain(path, REMEDY)
    if found != expected.bytes:
        raise Damaged(f"{path} is damaged: {found:,} bytes, not {expected.bytes:,}. {REMEDY}")
    try:
        with pa.memory_map(str(path)) as source:
            data = source.read_buffer()
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error}. {REMEDY}") from None
    try:
        if sha256(data) != expected.sha256:
            raise ValueError("its checksum differs")
        return _batch(data, pa.schema(_fields(columns)), rows)
    except Exception as error:  # Arrow raises one of many things about foreign bytes
        said = ascii(str(error).split("\n")[0].rstrip(".") or type(error).__name__)[1:-1]
        raise Damaged(f"{path} is damaged: {said}. {REMEDY}") from None


def _batch(data: pa.Buffer, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    """The one batch of an Arrow file. Offsets are trusted by everything that reads a batch, so they
    are looked at here, all of them, once.

    Raises:
        ValueError: or what Arrow raises.
    """
    file = ipc.open_file(pa.BufferReader(data))  # reads no batch
    messages = ipc.MessageReader.open_stream(pa.BufferReader(data.slice(_MAGIC)))
    stream = ipc.read_schema(messages.read_next_message())
    if file.num_record_batches != 1:
        raise ValueError(f"{file.num_record_batches} batches, not one")
    for found in (file.schema, stream):
        if not found.equals(schema, check_metadata=True):
            raise ValueError(f"columns {_spelt(found)}: expected {_spelt(schema)}")
    message = messages.read_next_message()
    if message.type != "record batch":
        raise ValueError(f"a {message.type} where the rows should be")
    if _is_compressed(message.metadata):  # a few bytes could become any number
        raise ValueError("it is compressed, which a cache never is")
    batch = ipc.read_record_batch(message, schema)
    if len(batch) != rows:
        raise ValueError(f"{len(batch):,} rows, not {rows:,}")
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("there is a row without a value")
    return batch


def _spelt(schema: pa.Schema) -> str:
    text = ", ".join(f"{field.name} {field.type}" for field in schema)
    return text if len(text) < 200 else text[:200] + "..."


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether an Arrow message's record batch has a codec, from its flatbuffer (Message.fbs): the
    table in field 2 of the message, whose field 3 is ``compression``. pyarrow, which has checked
    the flatbuffer, tells only after inflating."""
    raw = metadata.to_pybytes()
    header = _field(raw, _number("<I", raw, 0), 2)
    return header != 0 and _field(raw, header + _number("<I", raw, header), 3) != 0


def _field(raw: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table is; 0 if it is not there."""
    fields = table - _number("<i", raw, table)
    place = 4 + 2 * number  # after the table's two sizes
    if place >= _number("<H", raw, fields):
        return 0
    offset = _number("<H", raw, fields + place)
    return table + offset if offset else 0


def _number(kind: str, raw: bytes, place: int) -> int:
    return int(struct.unpack_from(kind, raw, place)[0])
