"""The oracle: the loss in plain torch at fp64, differentiated by autograd. Slow, and meant to be
read.

Shares no code with the other backends. It is also what a CPU without a compiler runs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor, empty
from torch.nn import functional as F

from fusedkd.distributions.sparse import SparseRows
from fusedkd.divergences import measure_term
from fusedkd.kernels import RowCall, Rows, tokens
from fusedkd.kernels.pieces import (
    block_rows,
    compare,
    finish,
    merge,
    metric_rows,
    observe,
    transform,
)
from fusedkd.spec import LossSpec

__all__ = [
    "block_rows",
    "compare",
    "empty",
    "finish",
    "head_dtypes",
    "merge",
    "mm_",
    "observe",
    "rows",
    "scale_",
    "token_gradient",
    "token_statistics",
    "top",
    "unavailable",
]

token_statistics = functools.partial(tokens.token_statistics, dtype=torch.float64)
top = functools.partial(tokens.top, dtype=torch.float64)
token_gradient = functools.partial(tokens.token_gradient, dtype=torch.float64)


def unavailable() -> str | None:
    return None


def rows(call: RowCall) -> Rows:
    counted, spec = call.row_scale != 0, call.spec
    labels = None if call.labels is None else call.labels[counted]
    with torch.inference_mode(False), torch.enable_grad():
        raw = _true_vocabulary(call.student, spec)[counted].double()
        raw.requires_grad_(call.grad is not None)
        s = transform(raw, spec.student_transform)
        s = torch.where(s == -math.inf, s.detach(), s)  # a masked entry gets no gradient
        scaled = s / spec.temperature
        log_q = F.log_softmax(scaled, dim=-1)
        sparse = isinstance(call.teacher, SparseRows)
        pair = _sparse(call, counted, scaled) if sparse else _dense(call, counted, log_q)
        kd = spec.divergence.value(pair.log_p, pair.log_q).sum(-1)
        if pair.measures:
            excess = (pair.log_q.exp() - pair.log_p.exp()).sum(-1)
            kd = kd + measure_term(spec.divergence) * excess
            kd = kd - kd.detach().clamp(max=0)  # rounding
        ce = _cross_entropy(s, labels, spec)
        tops, entropies = (s.argmax(-1), pair.teacher_top), (_entropy(pair.log_p), _entropy(log_q))
        loss = torch.zeros_like(kd)
        if spec.kd_scale:
            loss = loss + spec.kd_scale * _ruled(kd, entropies, log_q, pair, labels, spec)
        if spec.ce_weight:
            loss = loss + spec.ce_weight * ce
        if spec.z_loss_weight:
            loss = loss + spec.z_loss_weight * s.logsumexp(-1) ** 2
        loss = loss * call.row_scale[counted]
        if call.grad is not None:
            _write_gradient(call.grad, loss, raw, counted)
    results = call.results()
    results.loss.zero_()[counted] = loss.detach().to(results.loss.dtype)
    if results.metrics is not None:
        columns = metric_rows(kd, ce, entropies, tops, pair.student_mass, labels)
        results.metrics.zero_()[counted] = columns.detach().to(results.loss.dtype)
    return results


def _ruled(
    kd: Tensor,
    entropies: tuple[Tensor, Tensor],
    log_q: Tensor,
    pair: _Pair,
    labels: Tensor | None,
    spec: LossSpec,
) -> Tensor:
    """D times the row rule's factor, a constant."""
    if spec.row_rule is None:
        return kd
    ids = pair.log_p[:, :-1] if pair.rest else pair.log_p
    known = {
        "divergence": kd,
        "teacher_entropy": entropies[0],
        "student_entropy": entropies[1],
        "teacher_top1": F.pad(ids, (1, 0), value=-math.inf).amax(-1).exp(),  # there may be none
        "student_top1": log_q.amax(-1).exp(),
    }
    if labels is not None:
        known["label_log_prob"] = log_q.gather(-1, labels[:, None])[:, 0]
    factor = spec.row_rule.factor({name: x.detach() for name, x in known.items()})
    return torch.where(factor == 0, 0.0, factor * kd)


class _Pair(NamedTuple):
    """What a divergence compares in the n rows that count: categories, the vocabulary or fewer."""

    log_p: Tensor  # (n, categories)
    log_q: Tensor
    teacher_top: Tensor  # (n,) the teacher's most probable id, -1: none
    student_mass: Tensor | None = None  # (n,) of a sparse teacher's ids
    measures: bool = False  # which need not sum to 1
    rest: bool = False  # whether the last category is all that is no id


def _dense(call: RowCall, counted: Tensor, log_q: Tensor) -> _Pair:
    logits = _true_vocabulary(call.teacher_logits, call.spec)[counted].double()
    t = transform(logits, call.spec.teacher_transform)
    return _Pair(F.log_softmax(t / call.spec.teacher_temperature, dim=-1), log_q, t.argmax(-1))


def _sparse(call: RowCall, counted: Tensor, scaled: Tensor) -> _Pair:
    """Unlike the kernels it spreads the entries over the vocabulary."""
    teacher, vocabulary = call.teacher, call.spec.vocab_size
    assert isinstance(teacher, SparseRows)
    ids, lp = teacher.indices[counted].long(), teacher.log_probs[counted].double()
    columns = ids.clamp(max=vocabulary)  # padding has a column of its own, behind the others
    nothing = lp.new_full((len(ids), vocabulary + 1), -math.inf)
    spread = nothing.scatter(-1, columns, lp[:, :-1])[:, :-1]
    inside = nothing.scatter(-1, columns, 0.0)[:, :-1] == 0
    top = torch.where((spread > -math.inf).any(-1), spread.argmax(-1), -1)
    log_q = F.log_softmax(scaled, dim=-1)
    mass = torch.where(inside, log_q.detach(), -math.inf).logsumexp(-1).exp()
    if teacher.tail in ("drop", "renormalize"):
        return _Pair(spread, log_q, top, mass)
    if teacher.tail == "conditional":  # a NaN elsewhere is one here too
        known = torch.cat([scaled, nothing[:, :1]], -1).gather(-1, columns)
        known = (known * (1 + mass - mass)[:, None]).log_softmax(-1)
        return _Pair(lp[:, :-1], known, top, mass)
    known = torch.cat([log_q, nothing[:, :1]], -1).gather(-1, columns)
    if teacher.tail == "generalized":
        return _Pair(lp[:, :-1], known, top, mass, measures=True)
    rest = torch.where(inside, -math.inf, log_q)
    empty = (rest == -math.inf).all(-1, keepdim=True)  # where logsumexp has no derivative
    tail = torch.where(empty, -math.inf, torch.where(empty, log_q, rest).logsumexp(-1, True))
    noise = empty & (lp[:, -1:].exp() <= teacher.rounding)
    last = torch.where(noise, -math.inf, lp[:, -1:])
    log_p, log_q = torch.cat([lp[:, :-1], last], -1), torch.cat([known, tail], -1)
    return _Pair(log_p, log_q, top, mass, rest=True)


def _write_gradient(grad: Tensor, loss: Tensor, raw: Tensor, counted: Tensor) -> None:
    full = raw.new_zeros(counted.numel(), grad.shape[-1])
    if loss.requires_grad:
        full[counted, : raw.shape[-1]] = torch.autograd.grad(loss.sum(), raw)[0]
    grad.copy_(full.view(grad.shape))


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    product = grad * (factor.view(*grad.shape[: grad.dim() - 1], 1) if factor.dim() else factor)
    (grad if out is None else out).copy_(product)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return torch.float64, torch.float64


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    product = a.double() @ b.double()
    out.copy_(out + product if accumulate else product)


def _true_vocabulary(logits: Tensor, spec: LossSpec) -> Tensor:
    return logits.detach().reshape(-1, logits.shape[-1])[:, : spec.vocab_size]


def _cross_entropy(s: Tensor, labels: Tensor | None, spec: LossSpec) -> Tensor:
    if labels is None:
        return s.new_full(s.shape[:1], math.nan)
    return F.cross_entropy(s, labels, reduction="none", label_smoothing=spec.label_smoothing)


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs == -math.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
