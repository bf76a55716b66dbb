"""Gradients in fp16 without what its range would take away.

A loss scale comes after the gradient has been stored, too late for what fp16 cannot hold: q - p is
1e-6 and less where the vocabulary is large. So gradients are made in fp32, and stored times a power
of two that fills fp16's range; whoever multiplies them next takes it out again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# fp32 rows that dense gradients are made in: small beside any gradient, large enough for a GPU to
# be busy with.
SCRATCH_BYTES = {"cuda": 128 << 20, "cpu": 16 << 20}
_TOP = 15  # exponents of fp16 end there
_MOST = 100  # exponents of a power that fp32 holds, and its inverse


def powers(rows: Tensor) -> Tensor:
    """(n,) powers of two, fp32, that bring the largest entry of each row of (n, C) near fp16's
    largest; the largest power there is where a row is 0, and 1 where it is not finite."""
    largest = torch.linalg.vector_norm(rows, math.inf, dim=-1).float()
    exponents = (_TOP - torch.frexp(largest).exponent).clamp(-_MOST, _MOST)
    exponents = exponents.masked_fill(largest == 0, _MOST).masked_fill(~largest.isfinite(), 0)
    return torch.ldexp(torch.ones_like(largest), exponents)
