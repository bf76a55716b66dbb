"""The work of a call about single tokens, in chunks of rows: logits, statistics, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import backends, fp16
from fusedkd.chunks import cut_rows, side_of
from fusedkd.counted import chosen, counted
from fusedkd.gradients import Gradients
from fusedkd.inputs import Inputs, Plan, Wanted
from fusedkd.kernels import Part
from fusedkd.kernels.tokens import FIELDS, Factors, TokenCall, Top, log_probs
from fusedkd.spec import IDENTITY, Transform

Rows = Tensor | slice  # some of all N


class TokenInputs(NamedTuple):
    """The tensors of a call: (..., V) logits where there is no weight, else (..., H) hidden."""

    student: Tensor
    weight: Tensor | None
    bias: Tensor | None
    tokens: Tensor  # (N, K) int64 contiguous; -1: none
    counts: Tensor  # (N,) bool: at least one is there
    ids: Tensor | None = None  # of the weight's rows that are the vocabulary; None: all


class Judged(NamedTuple):
    """What tokens that were drawn are judged by, and how: see :func:`fusedkd.sampled_kd_loss`."""

    scale: Tensor  # (N,) fp64: weight over normaliser, 0 where the token does not count
    teacher: Tensor | None  # (N,) log-probabilities
    old: Tensor | None
    advantages: Tensor | None
    loss_type: str
    clip: tuple[float, float] | None

    def __call__(self, log_probs: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Of some rows the loss and its derivative by the log-probabilities (n,), fp64, both
        weighted. Where the student cannot have drawn the token it gets no gradient."""
        s, scale = log_probs.double(), self.scale[rows]
        value, slope = self._scored(s, rows)
        none = scale == 0
        slope = (scale * slope).masked_fill(none | (s == -math.inf), 0.0)
        return (scale * value).masked_fill(none, 0.0), slope

    def clipped(self, s: Tensor) -> Tensor:
        """(N,) 1 where the ratio's bounds take the gradient away."""
        if self.clip is None:
            return torch.zeros_like(s)
        return (self._scored(s, slice(None))[1] == 0).to(s.dtype)

    def _scored(self, s: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        t, o, a = (
            None if x is None else x[rows].double()
            for x in (self.teacher, self.old, self.advantages)
        )
        if self.loss_type != "policy":
            assert t is not None
            if self.loss_type == "k2":
                return (s - t) ** 2 / 2, s - t
            return torch.expm1(t - s) - (t - s), -torch.expm1(t - s)
        if a is None:
            assert t is not None
            a = t - s
        gain = a if o is None else (s - o).exp() * a
        if o is None or self.clip is None:
            return -gain, -gain
        bounded = (s - o).exp().clamp(*self.clip) * a
        return -torch.minimum(gain, bounded), -gain.masked_fill(bounded < gain, 0.0)


class TokenSpec(NamedTuple):
    """What of a call is no tensor."""

    vocab_size: int
    temperature: float = 1.0
    how: Transform = IDENTITY
    entropy: bool = False  # whether it, or its gradient, is wanted
    backend: Any = None
    chunk_bytes: int | None = None
    chunk_columns: int | None = None
    autocast: torch.dtype | None = None

    def plan(self, wanted: Wanted) -> Plan:
        return Plan(
            wanted,
            backend=self.backend,
            chunk_bytes=self.chunk_bytes,
            chunk_columns=self.chunk_columns,
            autocast=self.autocast,
        )


def statistics(inputs: TokenInputs, spec: TokenSpec, keep: int) -> list[Tensor]:
    """Of all rows, (N, len(FIELDS) + K) fp64; and of a head the first ``keep`` of d log_prob /
    d hidden and d entropy / d hidden of each row."""
    visit = _Rows(inputs, spec, Wanted(keep > 0, False, False, False))
    if keep != 1:
        return visit.observed(keep)
    known, one = visit.nothing(), (inputs.tokens >= 0).double()
    return [known, *visit.visited(known, lambda _, rows: Factors(one[rows], None), observe=True)]


def gradients(
    inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, known: Tensor, factors: Factors
) -> list[Tensor]:
    """Those that are wanted, in the inputs' order; of logits in their dtype, of a head in fp32 at
    least. ``known``: the statistics of all rows."""
    rows = _Rows(inputs, spec, wanted)
    if inputs.weight is None:
        return [rows.of_logits(known, factors)]
    return rows.visited(known, lambda _, at: _some(factors, at))


def judged(inputs: TokenInputs, spec: TokenSpec, wanted: Wanted, judge: Judged) -> list[Tensor]:
    """The statistics of all rows, and the gradients of a head with them: the logits are made once.
    ``judge`` gets log-probabilities as the caller sees them, rounded: of equal ones the ratio is
    1."""
    visit = _Rows(inputs, spec, wanted)
    dtype = torch.float64 if inputs.student.dtype == torch.float64 else torch.float32

    def upstream(known: Tensor, rows: Rows) -> Factors:
        return Factors(judge(log_probs(known)[:, 0].to(dtype), rows)[1][:, None], None)

    known = visit.nothing()
    return [known, *visit.visited(known, upstream, observe=True)]


def top(inputs: TokenInputs, spec: TokenSpec, k: int) -> Top:
    """Of all rows; their tokens are to be among the columns."""
    return _Rows(inputs, spec, Wanted(False, False, False, False)).top(k)


def _some(factors: Factors, rows: Rows) -> Factors:
    entropy = None if factors.entropy is None else factors.entropy[rows]
    return Factors(factors.tokens[rows], entropy)


class _Rows:
    """One round over the rows of a call."""

    def __init__(self, inputs: TokenInputs, spec: TokenSpec, wanted: Wanted) -> None:
        scale = inputs.counts.to(torch.float32)
        self.inputs, self.spec, self.wanted = inputs, spec, wanted
        self.backend: ModuleType = backends.resolve(spec.backend, scale.device)
        self.plan = spec.plan(wanted)
        self.full = Inputs(
            *inputs[:3],
            *(None, None, None, None),  # no teacher
            student_ids=inputs.ids,
            teacher_ids=None,
            labels=None,
            row_scale=scale,
        )
        self.index = counted(self.full, self.plan)
        self.side = side_of(*inputs[:3], inputs.ids, None, spec.autocast)
        self.some = self.index is not None and self.index.numel() < scale.numel()
        self.masked = scale if self.side.weight is not None and not chosen(scale) else None

    def nothing(self) -> Tensor:
        """Memory for the statistics."""
        n, k = self.inputs.tokens.shape
        return self.inputs.student.new_zeros((n, len(FIELDS) + k), dtype=torch.float64)

    def call(self, logits: Tensor, rows: Rows) -> TokenCall:
        """Of the logits (1, n, V) of some rows."""
        tokens, counts, spec = self.inputs.tokens[rows], self.inputs.counts[rows], self.spec
        part = Part(0, spec.vocab_size)
        return TokenCall(logits, tokens, counts, spec.temperature, spec.how, part, spec.entropy)

    def observed(self, keep: int) -> list[Tensor]:
        if self.side.weight is None:
            return [self.backend.token_statistics(self.call(self.side.rows, slice(None)))]
        known, kept = self.nothing(), self._memory(keep)
        for rows, logits, _ in self._chunks(None):
            call = self.call(logits, rows)
            known[rows] = found = self.backend.token_statistics(call)
            one = torch.where(call.tokens >= 0, 1.0, 0.0).double()
            units = [Factors(one, None), Factors(0 * one, one[:, 0])]
            for i, memory in enumerate(kept):
                memory[rows] = self._of_states(call, found, units[i], over=i + 1 == keep)
        shape = self.inputs.student.shape
        return [known, *(x.view(shape) for x in kept)]

    def top(self, k: int) -> Top:
        if self.side.weight is None:
            found: Top = self.backend.top(self.call(self.side.rows, slice(None)), k)
            return found
        known = self.nothing()
        values = known.new_zeros((len(known), k))
        whole = Top(values, torch.full_like(values, -1, dtype=torch.int64), known)
        for rows, logits, _ in self._chunks(None):
            for field, part in zip(
                whole, self.backend.top(self.call(logits, rows), k), strict=True
            ):
                field[rows] = part
        return whole

    def of_logits(self, known: Tensor, factors: Factors) -> Tensor:
        out: Tensor = self.backend.empty(
            self.side.rows.shape, dtype=self.side.rows.dtype, device=self.side.rows.device
        )
        call = self.call(self.side.rows, slice(None))
        self.backend.token_gradient(call, known, factors, out)
        return out.view(self.inputs.student.shape)

    def visited(
        self, known: Tensor, upstream: Callable[[Tensor, Rows], Factors], observe: bool = False
    ) -> list[Tensor]:
        """The gradients of a head; ``observe``: and ``known`` filled."""
        grads = Gradients(self.full, self.side, self.backend, self.wanted, self.some)
        for rows, logits, grad in self._chunks(grads):
            call = self.call(logits, rows)
            if observe:
                known[rows] = self.backend.token_statistics(call)
            if grad is not None:
                found = known[rows]
                self.backend.token_gradient(call, found, upstream(found, rows), grad)
        return grads.results()

    def _chunks(self, grads: Gradients | None) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        """Of each chunk: its rows among all N, their logits (1, n, V), and where their gradient is
        to be written, if it is wanted, before the next one is asked for."""
        index, masked = self.index, self.masked
        grads = grads or Gradients(
            self.full, self.side, self.backend, Wanted(False, False, False, False), self.some
        )
        # cut as where there are gradients, whether there are or not: the logits are the same bits
        cut, blocks = cut_rows(self.side, None, grads, self.plan, index, any_gradient=True)
        if masked is not None and index is not None:
            masked = masked[index]
        for part, logits, grad in grads.chunks(cut, blocks, masked):
            yield part.flat if part.tokens is None else part.tokens, logits, grad
            del logits, grad

    def _memory(self, outputs: int) -> list[Tensor]:
        """(N, H) for each."""
        shape = (self.inputs.counts.numel(), self.side.rows.shape[-1])
        dtype = torch.promote_types(self.backend.head_dtypes(self.side.dtype)[0], torch.float32)
        return [self.side.rows.new_zeros(shape, dtype=dtype) for _ in range(outputs)]

    def _of_states(self, call: TokenCall, known: Tensor, factors: Factors, over: bool) -> Tensor:
        """(n, H) the gradient of a chunk's hidden states; ``over``: perhaps over its logits."""
        wide, dtype = self.backend.head_dtypes(self.side.dtype)
        narrows = dtype == torch.float16 != wide
        grad, device = call.logits, call.logits.device
        if not over or not (narrows or dtype == wide):
            made = wide if narrows else dtype
            grad = self.backend.empty(grad.shape, dtype=made, device=device)
        self.backend.token_gradient(call, known, factors, grad)
        power = None
        if narrows:
            power = fp16.powers(grad[0])[:, None]
            grad = grad.mul_(power).to(dtype)
        size = (grad.shape[1], self.side.rows.shape[-1])
        accumulate = torch.promote_types(wide, torch.float32)
        out: Tensor = self.backend.empty(size, dtype=accumulate, device=device)
        self.side.back(self.backend, grad[0], out)
        return out if power is None else out.div_(power)
