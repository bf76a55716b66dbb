"""Small integers as bits: at a fixed number of bits each, as steps of a stair, as lengths of runs.

The first layout is that of Parquet's bit-packed runs: bit ``i`` of value ``v`` is bit
``v * bits + i`` of the stream, and bit ``b`` of the stream is bit ``b % 8`` of byte ``b // 8``,
counted from the least significant. The last byte is filled up with zeros. Eight values always take
``bits`` whole bytes, so eight columns of a matrix with ``bits`` columns of bytes are all that has
to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
_MOST = 32  # a value and its shift of up to 7 bits fit a 64-bit word


def bits_for(largest: int) -> int:
    """The number of bits that hold every integer from 0 to ``largest``; 0 for 0."""
    return int(largest).bit_length()


def packed_size(count: int, bits: int) -> int:
    """The bytes that ``count`` values of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(values: NDArray[Any], bits: int) -> Bytes:
    """The integers ``values`` (any shape, read in C order) at ``bits`` bits each, 0 to 32.

    Raises:
        ValueError: a value is negative or needs more bits.
    """
    _check_bits(bits)
    flat = np.ravel(values)
    if flat.size and (flat.min() < 0 or int(flat.max()) >> bits):
        raise ValueError(
            f"values from {flat.min()} to {flat.max()}: expected 0 to {(1 << bits) - 1}, which is "
            f"what {bits} bits hold."
        )
    groups = -(-flat.size // 8)
    lanes = np.zeros((8, groups), np.uint64)  # a lane is contiguous
    whole = flat.size // 8
    lanes[:, :whole] = flat[: 8 * whole].reshape(whole, 8).T
    lanes[: flat.size - 8 * whole, whole:] = flat[8 * whole :, None]
    packed = np.zeros((groups, bits), np.uint8)
    for lane, first, last, shift in _lanes(bits):
        word = lanes[lane] << np.uint64(shift)
        for byte in range(first, last):
            packed[:, byte] |= word.astype(np.uint8)  # keeps the low byte
            word >>= np.uint64(8)
    return packed.reshape(-1)[: packed_size(flat.size, bits)]


def unpack(packed: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    """The ``count`` integers that :func:`pack` put into ``packed``.

    Raises:
        ValueError: ``packed`` has not as many bytes as that takes.
    """
    _check_bits(bits)
    if packed.size != packed_size(count, bits):
        raise ValueError(
            f"{packed.size} bytes: expected {packed_size(count, bits)}, for {count} values of "
            f"{bits} bits."
        )
    groups = -(-count // 8)
    if packed.size != groups * bits:
        packed = np.concatenate([packed, np.zeros(groups * bits - packed.size, np.uint8)])
    columns = packed.reshape(groups, bits)
    narrow = bits + 7 <= 32
    kind: Any = np.uint32 if narrow else np.uint64
    values = np.zeros((groups, 8), np.int64)
    for lane, first, last, shift in _lanes(bits):
        word = columns[:, first].astype(kind)
        for place, byte in enumerate(range(first + 1, last), 1):
            word |= columns[:, byte].astype(kind) << kind(8 * place)
        values[:, lane] = (word >> kind(shift)) & kind((1 << bits) - 1)
    return values.reshape(-1)[:count]


def _lanes(bits: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the eight values of a group lie: (which, first byte, byte after the last, shift)."""
    if bits:
        for lane in range(8):
            first, shift = divmod(lane * bits, 8)
            yield lane, first, first + packed_size(1, shift + bits), shift


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= _MOST:
        raise ValueError(f"bits={bits}: expected 0 to {_MOST}.")


def pack_stairs(values: NDArray[Any], largest: int) -> bytes:
    """(L, k) integers from 0 to ``largest`` that never decrease along a row: k + largest bits per
    row, of which number ``value[i] + i`` are set."""
    rows, k = values.shape
    bits = np.zeros((rows, k + largest), np.uint8)
    np.put_along_axis(bits, values + np.arange(k), 1, axis=1)
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_stairs(packed: Bytes, rows: int, k: int, largest: int) -> Bytes:
    """The (rows, k) integers that :func:`pack_stairs` put into ``packed``; at most 255.

    Raises:
        ValueError: ``packed`` is nothing that :func:`pack_stairs` makes.
    """
    width = k + largest
    if packed.size != packed_size(rows * width, 1):
        raise ValueError(f"{packed.size} bytes: expected {packed_size(rows * width, 1)}.")
    steps = np.flatnonzero(np.unpackbits(packed, count=rows * width, bitorder="little"))
    if steps.size != rows * k:
        raise ValueError(f"{steps.size} steps: expected {rows * k}.")
    found, starts = steps.reshape(rows, k), np.arange(rows)[:, None] * width
    if (found[:, :1] < starts).any() or (found[:, -1:] >= starts + width).any():  # they ascend
        raise ValueError(f"a row does not have {k} steps.")
    return (found - (starts + np.arange(k))).astype(np.uint8)


def pack_runs(lengths: NDArray[Any], total: int) -> bytes:
    """Lengths of at least 1 that sum to ``total``: a bit for each of so many, set where a run
    begins."""
    bits = np.zeros(total, np.uint8)
    ends = lengths.astype(np.int64).cumsum()
    bits[ends - lengths.astype(np.int64)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def unpack_runs(packed: Bytes, rows: int, k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(the lengths that :func:`pack_runs` put into ``packed``, how many of them each row has) where
    the lengths of each of ``rows`` rows sum to ``k``.

    Raises:
        ValueError: ``packed`` is nothing that :func:`pack_runs` makes.
    """
    if packed.size != packed_size(rows * k, 1):
        raise ValueError(f"{packed.size} bytes: expected {packed_size(rows * k, 1)}.")
    bits = np.unpackbits(packed, count=rows * k, bitorder="little")
    if not bits[::k].all():
        raise ValueError("a row does not begin with the first draw of an id.")
    starts = np.flatnonzero(bits)
    return np.diff(starts, append=bits.size), bits.reshape(rows, k).sum(1, dtype=np.int64)
