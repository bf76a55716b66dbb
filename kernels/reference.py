"""The oracle: the loss in plain torch at fp64, differentiated by autograd. Slow, and meant to be
read.

Shares no code with the other backends. It is also what a CPU without a compiler runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

__all__ = ["head_dtypes", "mm_", "rows", "scale_", "unavailable"]


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
    counted = row_scale != 0
    with torch.inference_mode(False), torch.enable_grad():
        raw = _true_vocabulary(student, spec)[counted].double().requires_grad_(grad is not None)
        t = _transform(_true_vocabulary(teacher, spec)[counted].double(), spec.teacher_transform)
        s = _transform(raw, spec.student_transform)
        s = torch.where(s == -math.inf, s.detach(), s)  # a masked entry gets no gradient
        kd, ce, lp, lq = _terms(s, t, labels[counted] if labels is not None else None, spec)
        loss = torch.zeros_like(kd)
        if spec.kd_scale:
            loss = loss + spec.kd_scale * kd
        if spec.ce_weight:
            loss = loss + spec.ce_weight * ce
        loss = loss * row_scale[counted]
        if grad is not None:
            d_raw = (
                torch.autograd.grad(loss.sum(), raw)[0]
                if loss.requires_grad
                else torch.zeros_like(raw)
            )
            full = torch.zeros(
                counted.numel(), student.shape[-1], dtype=torch.float64, device=student.device
            )
            full[counted, : spec.vocab_size] = d_raw
            grad.copy_(full.view(grad.shape))
    loss_rows = torch.zeros_like(row_scale)
    loss_rows[counted] = loss.detach().to(row_scale.dtype)
    if not metrics:
        return loss_rows, None
    columns = _metrics(kd, ce, lp, lq, s, t, labels[counted] if labels is not None else None)
    metric_rows = row_scale.new_zeros(counted.numel(), len(METRIC_COLUMNS))
    metric_rows[counted] = columns.detach().to(row_scale.dtype)
    return loss_rows, metric_rows


def scale_(grad: Tensor, factor: Tensor) -> None:
    """See :mod:`fusedkd.kernels`."""
    grad.mul_(factor.view(*grad.shape[: grad.dim() - 1], 1) if factor.dim() else factor)


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


def _terms(
    s: Tensor, t: Tensor, labels: Tensor | None, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw divergence and cross-entropy per row, and the two log-distributions they compare."""
    lp = F.log_softmax(t / spec.teacher_temperature, dim=-1)
    lq = F.log_softmax(s / spec.temperature, dim=-1)
    kd = spec.divergence.value(lp, lq).sum(-1)
    if labels is None:
        return kd, torch.full_like(kd, math.nan), lp, lq
    return (
        kd,
        F.cross_entropy(s, labels, reduction="none", label_smoothing=spec.label_smoothing),
        lp,
        lq,
    )


def _metrics(
    kd: Tensor, ce: Tensor, lp: Tensor, lq: Tensor, s: Tensor, t: Tensor, labels: Tensor | None
) -> Tensor:
    top_t, top_s = t.argmax(-1), s.argmax(-1)
    unknown = torch.full_like(kd, math.nan)
    right = (
        [unknown, unknown]
        if labels is None
        else [(top == labels).to(kd.dtype) for top in (top_s, top_t)]
    )
    agreement = (top_t == top_s).to(kd.dtype)
    return torch.stack([kd, ce, _entropy(lp), _entropy(lq), agreement, *right], dim=-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return -torch.where(log_probs == -math.inf, 0.0, log_probs.exp() * log_probs).sum(-1)
