"""Liger-Kernel's losses whose inputs are probabilities or their logarithms.

Their derivative by the student's (log-)probabilities is not that by logits, so the kernels of
:func:`fusedkd.kd_loss` do not apply. Here autograd differentiates the formula, some rows at a time,
so that beside the inputs only the gradient is as large as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import divergences
from fusedkd.autograd import once_differentiable, roots
from fusedkd.integrations.conventions import generalized_jsd
from fusedkd.integrations.liger.functions import as_function

Formula = Callable[[Tensor, Tensor], Tensor]
REDUCTIONS = ("none", "sum", "mean", "batchmean")

# Entries that a piece may have, some ten times over while it is worked on. Smaller ones spend
# their time on dispatch: 256 x 32,000 in fp32, forward and backward, took 1.7 s at 2^17, 1.0 at
# 2^20 and 0.6 as one piece (2 busy cores, November 2026).
PIECE = {"cpu": 1 << 20, "cuda": 1 << 25}


def pieces(rows: Tensor) -> Iterator[slice]:
    """Runs of the rows of an (N, V) tensor that are worked on at a time."""
    size = PIECE.get(rows.device.type, PIECE["cpu"])
    step = max(1, size // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def elementwise_loss(
    formula: Formula,
    student: Tensor,
    target: Tensor,
    reduction: str,
    labels: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The sum of ``formula(student, target)`` over entries, in fp32 (fp64 for fp64 inputs).

    Args:
        formula: elementwise, of two fp32 tensors of one shape; differentiated by the first.
        student, target: (..., V). No gradient flows to the target.
        reduction: "none", "sum", "mean" over the entries or "batchmean" over the rows that count.
        labels: (...,) or None; rows where they are ``ignore_index`` do not count.

    Raises:
        ValueError: unknown reduction, or shapes that do not fit.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}.")
    if student.shape != target.shape or student.dim() < 1:
        raise ValueError(
            f"student has shape {tuple(student.shape)}, target {tuple(target.shape)}: expected "
            "(..., V), the same for both."
        )
    if labels is not None and labels.numel() != student.shape[:-1].numel():
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: expected {tuple(student.shape[:-1])}, one "
            "per row."
        )
    s, t = (x.reshape(-1, x.shape[-1]) for x in (student, target.detach()))
    counts = s.new_ones(len(s), dtype=torch.bool)
    if labels is not None:
        counts = labels.reshape(-1) != ignore_index
    if reduction == "none":
        return _entries(formula, s, t, counts).reshape(student.shape)
    loss = _Sum.apply(s, t, counts, formula)
    if reduction == "sum":
        return loss
    columns = s.shape[1] if reduction == "mean" else 1
    return loss / (counts.sum().clamp(min=1) * columns)


def _entries(formula: Formula, s: Tensor, t: Tensor, counts: Tensor) -> Tensor:
    """A row that does not count has neither value nor gradient, whatever is in it."""
    dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    s, t = (torch.where(counts[:, None], x.to(dtype), 0.0) for x in (s, t))
    return torch.where(counts[:, None], formula(s, t), 0.0)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, counts: Tensor, formula: Formula) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        grad = torch.empty_like(s) if wanted else None
        total = s.new_zeros((), dtype=torch.float64)
        for rows in pieces(s):
            with torch.enable_grad():
                part = s[rows].detach().requires_grad_(wanted)
                value = _entries(formula, part, t[rows], counts[rows]).sum()
            total += value.detach()
            if grad is not None:
                grad[rows] = torch.autograd.grad(value, part)[0]
        ctx.save_for_backward(grad)
        ctx.roots = roots(s)
        wide = torch.float64 in (s.dtype, t.dtype)
        return total if wide else total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad * upstream).to(grad.dtype), None, None, None


# ----------------------------------------------------------------------------------------------
# By Liger's names


class LigerJSD(nn.Module):
    """JSD of log-probabilities: the student's ``log_q`` (BT, V), which has the gradient, and the
    teacher's ``log_p``. The mean over the tokens that count, in the dtype of ``log_q``."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        value = generalized_jsd(self.beta).value
        loss = elementwise_loss(
            *(lambda lq, lp: value(lp, lq), log_q, log_p),
            *("batchmean", shift_labels, self.ignore_index),
        )
        return loss.to(log_q.dtype)


class LigerKLDIVLoss(nn.KLDivLoss):
    """``torch.nn.KLDivLoss`` of log-probabilities and a target (BT, V), whose logarithm is taken of
    ``eps`` at least."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return elementwise_loss(self._entries, y_pred, y_true, self.reduction)

    def _entries(self, y: Tensor, target: Tensor) -> Tensor:
        if self.log_target:
            return divergences.forward_kl().value(target, y)
        return target * torch.where(target == 0, 0.0, target.clamp(min=self.eps).log() - y)


class LigerTVDLoss(nn.Module):
    """Half the sum of abs(p - q) of two tensors of probabilities (BT, V); p has the gradient."""

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100) -> None:
        super().__init__()
        self.reduction, self.ignore_index = reduction, ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        labels = (shift_labels, self.ignore_index)
        return elementwise_loss(lambda p, q: (p - q).abs() / 2, p, q, self.reduction, *labels)


def liger_jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
    *_: Any,
) -> Tensor:
    """See :class:`LigerJSD`."""
    return LigerJSD(beta, ignore_index)(input, target, shift_labels)


def liger_kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool = True,
    reduce: bool = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    """See :class:`LigerKLDIVLoss`; ``size_average`` and ``reduce`` have no effect."""
    return LigerKLDIVLoss(eps, reduction=reduction, log_target=log_target)(input, target)


def liger_tvd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """See :class:`LigerTVDLoss`."""
    return LigerTVDLoss(reduction, ignore_index)(input, target, shift_labels)


def _kl_div(
    input: Tensor,
    target: Tensor,
    reduction: str = "batchmean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> Tensor:
    return liger_kl_div(input, target, reduction=reduction, log_target=log_target, eps=eps)


def _tvd(p: Tensor, q: Tensor, labels: Any = None, how: str = "batchmean", *rest: Any) -> Tensor:
    return liger_tvd(p, q, labels, how, *rest)


LigerJSDFunction = as_function("LigerJSDFunction", liger_jsd)
LigerKLDivLossFunction = as_function("LigerKLDivLossFunction", _kl_div)
LigerTVDLossFunction = as_function("LigerTVDLossFunction", _tvd)
