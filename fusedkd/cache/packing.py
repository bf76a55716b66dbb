"""Small integers at a fixed number of bits each.

The layout is that of Parquet's bit-packed runs: bit ``i`` of value ``v`` is bit ``v * bits + i`` of
the stream, and bit ``b`` of the stream is bit ``b % 8`` of byte ``b // 8``, counted from the least
significant. The last byte is filled up with zeros. Eight values always take ``bits`` whole bytes,
so eight columns of a matrix with ``bits`` columns of bytes are all that has to be looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["bits_for", "pack", "packed_size", "unpack"]

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
