"""How the rows of a call with heads are cut: logits and gradients each have a size of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd.inputs import Chunk

CHUNK_BYTES = {"cuda": 1 << 30, "cpu": 512 << 20}


def chunk_budget(chunk_bytes: int | None, device: torch.device) -> int:
    """``chunk_bytes`` as given, or the default of the device."""
    return chunk_bytes or CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"])


# Rows of logits at which a product is no longer bound by reading the weights.
ROWS = 512
# Whole tiles of the matrix products.
TILES = (128, 64, 16)


class Cut(NamedTuple):
    """Rows that are held at a time."""

    logits: int  # of either side
    gradient: int  # of the student's logits: each of dh and dW is one product for all of them
    bytes: int = 0  # that both take

    @classmethod
    def of(cls, length: int, budget: int, logits: int, gradient: int) -> Cut:
        """At most ``budget`` bytes, of which a row of logits takes so many, and of the gradient."""
        length = max(length, 1)
        rows = most = length
        if logits and gradient:
            rows = max(1, budget // (4 * logits), min(ROWS, budget // (2 * logits)))
            most = max(1, (budget - min(rows, length) * logits) // gradient)
        elif logits or gradient:
            most = max(1, budget // (logits + gradient))
        whole = _even(length, most)
        rows = _even(whole, rows)
        return cls(rows, whole, rows * logits + whole * gradient)

    def blocks(self, batch: int, length: int, tokens: Tensor | None) -> Iterator[Chunk]:
        """Of the gradient: all tokens that are computed. None at all are one empty block."""
        for b in range(batch):
            for start in range(0, max(length, 1), self.gradient):
                stop = min(start + self.gradient, length)
                flat = slice(b * length + start, b * length + stop)
                whole = stop - start == batch * length
                of = None if tokens is None else tokens[start:stop]
                yield Chunk(b, slice(start, stop), flat, whole, of)


def _even(length: int, most: int) -> int:
    """Rows of each piece: as few pieces as ``most`` allows, for each one passes over the weights
    or their gradient, and of one size, in whole tiles of the matrix products.
    """
    if length <= most:
        return length
    tile = next((tile for tile in TILES if 2 * tile <= most), 1)
    pieces = -(-length // (most // tile * tile))
    return -(-length // (pieces * tile)) * tile
