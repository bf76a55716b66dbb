"""What a call works on: its tensors, what is wanted of them, and one piece of both."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

from torch import Tensor

__all__ = ["Chunk", "Inputs", "Side", "Wanted"]


class Wanted(NamedTuple):
    """Which results the caller needs; the rest is not computed."""

    hidden: bool  # or the dense logits' gradient
    weight: bool
    bias: bool
    metrics: bool

    @property
    def any_gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class Inputs(NamedTuple):
    """The tensors of one call: (..., V) logits where the weight is None, else (..., H) hidden. A
    teacher with indices is (..., K) log-probabilities; no teacher: only the cross-entropy counts.
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_indices: Tensor | None
    labels: Tensor | None


class Chunk(NamedTuple):
    """Some of the tokens: what one round of the loop computes."""

    b: int
    rows: slice  # within b
    flat: slice  # the same rows of N
    whole: bool  # all there are: what slicing would cost, a small call feels

    def of(self, x: Tensor) -> Tensor:
        """Its rows of (B, T, ...), as (1, T', ...)."""
        return x if self.whole else x[self.b : self.b + 1, self.rows]

    def of_flat(self, x: Tensor) -> Tensor:
        """Its rows of (N, ...)."""
        return x if self.whole else x[self.flat]


class Side(NamedTuple):
    """One side as the chunk loop reads it."""

    rows: Tensor  # (B, T, V) logits or (1, N, H) hidden states
    weight: Tensor | None
    bias: Tensor | None

    def logits(self, backend: ModuleType, part: Chunk) -> Tensor:
        chunk = part.of(self.rows)
        if self.weight is None:
            return chunk
        dtype = backend.head_dtypes(chunk.dtype)[0]
        out = backend.empty(
            (1, chunk.shape[1], self.weight.shape[0]), dtype=dtype, device=chunk.device
        )
        backend.mm_(out[0], chunk[0], self.weight.T)
        return out if self.bias is None else out.add_(self.bias)

    def bytes_per_row(self, backend: ModuleType) -> int:
        """What one token's logits take when they are made here."""
        if self.weight is None:
            return 0
        return self.weight.shape[0] * backend.head_dtypes(self.rows.dtype)[0].itemsize
