"""The oracle: the loss in plain torch at fp64, differentiated by autograd. Slow, and meant to be
read.

Shares no code with the other backends. It is also what a CPU without a compiler runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, empty
from torch.nn import functional as F

from fusedkd.distributions.sparse import SparseRows
from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

__all__ = ["empty", "head_dtypes", "mm_", "rows", "scale_", "sparse_rows", "unavailable"]


def unavailable() -> str | None:
    return None


def rows(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    logits = _true_vocabulary(teacher, spec)[row_scale != 0].double()
    t = _transform(logits, spec.teacher_transform)
    lp = F.log_softmax(t / spec.teacher_temperature, dim=-1)

    def compare(lq: Tensor) -> tuple[Tensor, Tensor]:
        return lp, lq

    return _rows(student, compare, t.argmax(-1), labels, row_scale, spec, grad, metrics)


def sparse_rows(
    student: Tensor,
    teacher: SparseRows,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`. Unlike the kernels it spreads the entries over the vocabulary."""
    counted = row_scale != 0
    ids, lp = teacher.indices[counted].long(), teacher.log_probs[counted].double()
    columns = ids.clamp(max=spec.vocab_size)  # padding has a column of its own, behind the others
    nothing = lp.new_full((len(ids), spec.vocab_size + 1), -math.inf)
    spread = nothing.scatter(-1, columns, lp[:, :-1])[:, :-1]
    inside = nothing.scatter(-1, columns, 0.0)[:, :-1] == 0

    def compare(lq: Tensor) -> tuple[Tensor, Tensor]:
        if teacher.tail != "bucket":
            return spread, lq
        known = torch.cat([lq, nothing[:, :1]], -1).gather(-1, columns)
        rest = torch.where(inside, -math.inf, lq)
        empty = (rest == -math.inf).all(-1, keepdim=True)  # where logsumexp has no derivative
        tail = torch.where(empty, -math.inf, torch.where(empty, lq, rest).logsumexp(-1, True))
        noise = empty & (lp[:, -1:].exp() <= teacher.rounding)
        last = torch.where(noise, -math.inf, lp[:, -1:])
        return torch.cat([lp[:, :-1], last], -1), torch.cat([known, tail], -1)

    top = torch.where((spread > -math.inf).any(-1), spread.argmax(-1), -1)
    return _rows(student, compare, top, labels, row_scale, spec, grad, metrics)


def _rows(
    student: Tensor,
    compare: Callable[[Tensor], tuple[Tensor, Tensor]],  # log q -> the categories' log p, log q
    teacher_top: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    counted = row_scale != 0
    y = None if labels is None else labels[counted]
    with torch.inference_mode(False), torch.enable_grad():
        raw = _true_vocabulary(student, spec)[counted].double().requires_grad_(grad is not None)
        s = _transform(raw, spec.student_transform)
        s = torch.where(s == -math.inf, s.detach(), s)  # a masked entry gets no gradient
        lq = F.log_softmax(s / spec.temperature, dim=-1)
        lp, known = compare(lq)
        kd = spec.divergence.value(lp, known).sum(-1)
        ce = _cross_entropy(s, y, spec)
        loss = torch.zeros_like(kd)
        if spec.kd_scale:
            loss = loss + spec.kd_scale * kd
        if spec.ce_weight:
            loss = loss + spec.ce_weight * ce
        loss = loss * row_scale[counted]
        if grad is not None:
            _write_gradient(grad, loss, raw, counted)
    loss_rows = torch.zeros_like(row_scale)
    loss_rows[counted] = loss.detach().to(row_scale.dtype)
    if not metrics:
        return loss_rows, None
    columns = _metrics(kd, ce, _entropy(lp), _entropy(lq), s.argmax(-1), teacher_top, y)
    metric_rows = row_scale.new_zeros(counted.numel(), len(METRIC_COLUMNS))
    metric_rows[counted] = columns.detach().to(row_scale.dtype)
    return loss_rows, metric_rows


def _write_gradient(grad: Tensor, loss: Tensor, raw: Tensor, counted: Tensor) -> None:
    full = raw.new_zeros(counted.numel(), grad.shape[-1])
    if loss.requires_grad:
        full[counted, : raw.shape[-1]] = torch.autograd.grad(loss.sum(), raw)[0]
    grad.copy_(full.view(grad.shape))


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """See :mod:`fusedkd.kernels`."""
    product = grad * (factor.view(*grad.shape[: grad.dim() - 1], 1) if factor.dim() else factor)
    (grad if out is None else out).copy_(product)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """See :mod:`fusedkd.kernels`."""
    return torch.float64, torch.float64


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """See :mod:`fusedkd.kernels`."""
    product = a.double() @ b.double()
    out.copy_(out + product if accumulate else product)


def _true_vocabulary(logits: Tensor, spec: LossSpec) -> Tensor:
    return logits.detach().reshape(-1, logits.shape[-1])[:, : spec.vocab_size]


def _transform(logits: Tensor, transform: Transform) -> Tensor:
    scaled = logits * transform.scale
    return (
        transform.softcap * torch.tanh(scaled / transform.softcap) if transform.softcap else scaled
    )


def _cross_entropy(s: Tensor, labels: Tensor | None, spec: LossSpec) -> Tensor:
    if labels is None:
        return s.new_full(s.shape[:1], math.nan)
    return F.cross_entropy(s, labels, reduction="none", label_smoothing=spec.label_smoothing)


def _metrics(
    kd: Tensor,
    ce: Tensor,
    teacher_entropy: Tensor,
    student_entropy: Tensor,
    top_s: Tensor,
    top_t: Tensor,
    labels: Tensor | None,
) -> Tensor:
    unknown = torch.full_like(kd, math.nan)
    right = (
        [unknown, unknown]
        if labels is None
        else [(top == labels).to(kd.dtype) for top in (top_s, top_t)]
    )
    agreement = (top_t == top_s).to(kd.dtype)
    return torch.stack([kd, ce, teacher_entropy, student_entropy, agreement, *right], dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs == -math.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
