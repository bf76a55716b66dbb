"""What a call works on: its tensors, what is wanted of them and how, and one piece of them."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd.checks import check_whole

# What is held of a head's weight, or of its gradient, where it is taken a piece at a time. dW,
# rounded at once: with all of it in fp32 16, 512 and 1,024 tokens x 50,304 in bf16 took 1.61, 1.04
# and 1.11 times the bare products, in pieces of 8 MiB 1.39, 1.01 and 1.04, of 32 MiB 1.51, 0.98 and
# 0.96 (H = 896, 1 core of Zen 5, busy, 2026-11-28). On a GPU: not measured.
PIECE_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}


class Wanted(NamedTuple):
    """Which results the caller needs; the rest is not computed."""

    hidden: bool  # or the dense logits' gradient
    weight: bool
    bias: bool
    metrics: bool

    @property
    def any_gradient(self) -> bool:
        return self.hidden or self.weight or self.bias


class Plan(NamedTuple):
    """How a call is computed: what a kernel does not read."""

    wanted: Wanted
    backend: Any = None  # as fusedkd.backends.resolve takes it
    tail: str | None = None  # what a SparseTeacher's remaining mass becomes; None: another teacher
    inplace: bool = False
    late: bool = False  # the backward may make dW of the gradient of the logits
    chunk_bytes: int | None = None
    chunk_columns: int | None = None  # that a chunk's bytes are counted with; None: what is here
    num_counted: int | None = None  # tokens that count, where the caller knows
    autocast: torch.dtype | None = None  # heads: the dtype to multiply in, where autocast is on

    def checked(self) -> Plan:
        """Itself.

        Raises:
            ValueError, TypeError: one of the caller's numbers is none, naming it.
        """
        if not isinstance(self.inplace, bool):
            raise TypeError(f"inplace={self.inplace!r}: expected True or False.")
        for name, value, least in (
            ("chunk_bytes", self.chunk_bytes, 1),
            ("num_counted", self.num_counted, 0),
        ):
            if value is not None:
                check_whole(name, value, least, "or None")
        return self


class Inputs(NamedTuple):
    """The tensors of one call: (..., V) logits where the weight is None, else (..., H) hidden. A
    teacher with indices is (..., K) log-probabilities; no teacher: only the cross-entropy counts.
    This is the one list of them, from the checks through autograd and the custom op to the chunks.
    """

    student: Tensor
    student_weight: Tensor | None
    student_bias: Tensor | None
    teacher: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_indices: Tensor | None
    student_ids: Tensor | None  # of the weight's rows that are the vocabulary; None: all
    teacher_ids: Tensor | None
    labels: Tensor | None  # (N,) int64
    row_scale: Tensor  # (N,) weight over normaliser, 0 where the token does not count


class Chunk(NamedTuple):
    """Some of the tokens that count: what one round of the loop computes.

    They are either neighbours in one of the B sequences, or, where some tokens do not count or
    those that do have no common stride, the ``tokens`` of all N.
    """

    b: int
    rows: slice  # within b
    flat: slice  # the same among the tokens that are computed
    whole: bool  # all there are: what slicing would cost, a small call feels
    tokens: Tensor | None = None  # (n,) int64

    def parts(self, rows: int) -> Iterator[tuple[Chunk, slice]]:
        """The same tokens, at most so many at a time; with each part where it lies in the whole."""
        start, stop = self.flat.start, self.flat.stop
        if stop - start <= rows:
            yield self, slice(None)
            return
        for a in range(0, stop - start, rows):
            b = min(a + rows, stop - start)
            yield (
                Chunk(
                    self.b,
                    slice(self.rows.start + a, self.rows.start + b),
                    slice(start + a, start + b),
                    False,
                    None if self.tokens is None else self.tokens[a:b],
                ),
                slice(a, b),
            )

    def of(self, x: Tensor) -> Tensor:
        """Its rows of (B, T, ...), as (1, n, ...): a view, or of chosen tokens a copy."""
        if self.tokens is None:
            return x if self.whole else x[self.b : self.b + 1, self.rows]
        if x.shape[0] == 1:
            return x.index_select(1, self.tokens)
        return x[self.tokens // x.shape[1], self.tokens % x.shape[1]][None]

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write (1, n, ...) to its rows of (B, T, ...), rounded to their dtype."""
        if self.tokens is None:
            self.of(x).copy_(rows)
        elif x.shape[0] == 1:
            x.index_copy_(1, self.tokens, rows.to(x.dtype))
        else:
            x[self.tokens // x.shape[1], self.tokens % x.shape[1]] = rows[0].to(x.dtype)

    def of_flat(self, x: Tensor) -> Tensor:
        """Its rows of what there is one per computed token."""
        return x if self.whole else x[self.flat]


class Side(NamedTuple):
    """One side as the chunk loop reads it."""

    rows: Tensor  # (B, T, V) logits or (B, T, H) hidden states
    weight: Tensor | None
    bias: Tensor | None  # of the vocabulary
    dtype: torch.dtype  # in which a head multiplies
    ids: Tensor | None = None  # of the weight's rows that are the vocabulary; None: all

    def states(self, part: Chunk) -> Tensor:
        """A chunk's logits (1, n, V) or hidden states (1, n, H), the latter as they are
        multiplied."""
        return part.of(self.rows).to(self.dtype)

    def logits(self, backend: ModuleType, states: Tensor, out: Tensor | None = None) -> Tensor:
        """(1, n, V) logits of such a chunk, in ``out`` or memory of their own."""
        if self.weight is None:
            return states
        if out is None:
            shape = (1, states.shape[1], self.columns)
            dtype = backend.head_dtypes(self.dtype)[0]
            out = backend.empty(shape, dtype=dtype, device=states.device)
        for columns, rows in self.pieces():
            backend.mm_(out[0, :, columns], states[0], rows.T)
        return out if self.bias is None else out.add_(self.bias)

    def back(self, backend: ModuleType, grad: Tensor, out: Tensor) -> None:
        """From the gradient (n, V) of logits that of their states (n, H)."""
        for columns, rows in self.pieces():
            first = columns.start in (None, 0)
            backend.mm_(out, grad[:, columns], rows, accumulate=not first)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """A head's columns, and the weight's rows (columns, H) that make them: at once where they
        are all there are, else gathered a few MiB at a time."""
        assert self.weight is not None
        if self.ids is None:
            yield slice(None), self.weight
            return
        most = PIECE_BYTES.get(self.rows.device.type, PIECE_BYTES["cpu"])
        step = max(64, most // (self.weight.shape[1] * self.dtype.itemsize) // 64 * 64)
        for start in range(0, self.columns, step):
            columns = slice(start, start + step)
            yield columns, self.weight.index_select(0, self.ids[columns]).to(self.dtype)

    @property
    def columns(self) -> int:
        """V, or what of it is here."""
        if self.ids is not None:
            return self.ids.numel()
        return int(self.rows.shape[-1] if self.weight is None else self.weight.shape[0])

    def bytes_per_entry(self, backend: ModuleType) -> int:
        """What a logit takes where they are made, or copied, chunk by chunk."""
        dtype = self.dtype if self.weight is None else backend.head_dtypes(self.dtype)[0]
        return int(dtype.itemsize)
