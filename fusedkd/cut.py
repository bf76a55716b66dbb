"""How the rows of a call with heads are cut: logits and their gradient each to a size of its own.

A chunk of logits passes over the weights of both sides, a block of the gradient over the student's
and over dW: small pieces cost time, large ones memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.inputs import Chunk

# What a head holds at a time, logits and gradient together. On a CPU 512 tokens x 151,936 in bf16
# took 1.39, 1.23 and 1.07 times the bare products with 256 MiB, 512 MiB and 1 GiB where both were
# cut alike, 4,096 took 1.23, 1.08 and 1.09 (2 cores with AMX, Granite Rapids, 2026-11-26).
CHUNK_BYTES = {"cuda": 2 << 30, "cpu": 512 << 20}
# Rows of logits at which a GPU's product no longer waits for the weights (by count: no GPU was at
# hand, 2026-11-28). More of them only where a quarter of the bytes holds more.
ROWS = 512
TILES = (128, 64, 16)  # rows of the matrix products


def chunk_budget(chunk_bytes: int | None, device: torch.device, shared: bool = False) -> int:
    """``chunk_bytes`` as given, or the default: one number for a device, whatever of its memory is
    free, so that two calls give the same bits. ``shared``: with ranks that have other devices."""
    if chunk_bytes is not None:
        return chunk_bytes
    if device.type != "cuda":
        return CHUNK_BYTES["cpu"]
    if shared:
        return CHUNK_BYTES["cuda"] // 2
    return gpu_budget(torch.cuda.get_device_properties(device).total_memory)


def gpu_budget(memory: int) -> int:
    """The default on a GPU with so many bytes."""
    return min(CHUNK_BYTES["cuda"], memory // 32)


class Cut(NamedTuple):
    """Rows that are held at a time."""

    logits: int  # of either side
    gradient: int  # of the student's logits: each of dh and dW is one product for all of them
    bytes: int  # of both

    @classmethod
    def of(cls, length: int, budget: int, logits: int, gradient: int) -> Cut:
        """``length`` rows in at most ``budget`` bytes, or one at a time; a row of logits takes
        ``logits`` bytes, and of the gradient ``gradient``; 0: nothing.

        Half for each is about the least traffic: 512 rows x 50,304 in bf16 took 1.12, 1.05 and 1.10
        times the bare products with 256 / 256, 256 / 512 and 128 / 512 rows of logits / gradient,
        4,096 took 0.87, 0.81 and 0.88 with 352 / 352, 256 / 704 and 128 / 1,216 (1 core, Zen 5,
        2026-11-28).
        """
        length = max(1, length)
        most = max(ROWS, budget // max(1, 4 * logits))
        first = max(1, min(length, most, budget // (2 * logits))) if logits else 0
        block = _even(length, (budget - first * logits) // gradient) if gradient else length
        rows = min(most, (budget - block * gradient) // logits) if logits else block
        rows = _even(block, rows)
        block = block if gradient else rows
        return cls(rows, block, rows * logits + block * gradient)

    def blocks(self, batch: int, length: int, tokens: Tensor | None) -> Iterator[Chunk]:
        """All tokens that are computed, cut as the gradient is; none at all are an empty block."""
        for b in range(batch):
            for start in range(0, max(length, 1), self.gradient):
                stop = min(start + self.gradient, length)
                flat = slice(b * length + start, b * length + stop)
                whole = stop - start == batch * length
                of = None if tokens is None else tokens[start:stop]
                yield Chunk(b, slice(start, stop), flat, whole, of)


def _even(length: int, most: int) -> int:
    """Rows of each piece: as few pieces as ``most`` allows and of one size, in whole tiles of the
    matrix products; one row where ``most`` allows none."""
    if length <= most:
        return length
    most = max(1, most)
    tile = next((tile for tile in TILES if 2 * tile <= most), 1)
    pieces = -(-length // (most // tile * tile))
    return -(-length // (pieces * tile)) * tile
