"""Approximate likelihood matching: how probable two models think the same bytes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedkd.checks import (
    check_device,
    check_divides,
    check_logits,
    check_normalizer,
    check_temperature,
    check_tensor,
)
from fusedkd.modes import stand_in

FORMS = ("kl", "tv")
REDUCTIONS = ("mean", "sum", "none")


def alm_loss(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    student_spans: Tensor,
    teacher_spans: Tensor,
    *,
    threshold_temperature: float = 1.0,
    form: str = "kl",
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Divergence of "these bytes follow" between two models whose tokens differ (Minixhofer, Vulić
    and Ponti 2025, arXiv 2503.20083).

    With p and q the teacher's and the student's probability of a span, the product of its tokens'
    to the power 1 / ``threshold_temperature``, and of what else might follow 1 - p and 1 - q, the
    loss of a span is the KL of the two, ``p log(p / q) + (1 - p) log((1 - p) / (1 - q))``, or their
    total variation ``|p - q|``. A q that rounds to 1 counts as the number below 1: the loss is
    finite there, and infinite only where q = 0 and p is not.

    Args:
        student_log_probs: (L,) or (B, L), nats, of each token given those before it
            (:func:`fusedkd.token_log_probs` at the tokens themselves), where it was chosen.
        teacher_log_probs: (L',) or (B, L'), likewise; a constant.
        student_spans, teacher_spans: (M, 2) or (B, M, 2) int64 ranges of tokens that cover the same
            bytes (:func:`align`, :func:`pad_spans`); -1 where there is none. Each of their tokens
            must have a log-probability: the first of a sequence without BOS has none.
        threshold_temperature: above 1 it makes long spans, whose probabilities are small, count.
        form: "kl" or "tv".
        reduction: "mean" over the spans that are there, "sum", or "none": (M,) or (B, M).
        normalizer: divide the sum by this instead, as :func:`fusedkd.kd_loss`.

    Returns:
        0-d fp32 (fp64 for fp64 inputs), nats a span; without any span 0, with a graph.

    Raises:
        ValueError, TypeError: shapes, devices, kinds of numbers or names that do not fit, or a
            teacher that requires grad; spans outside of their sequence, on a GPU asynchronously.
    """
    _check(student_log_probs, teacher_log_probs, student_spans, teacher_spans)
    check_temperature("threshold_temperature", threshold_temperature)
    if form not in FORMS:
        raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}.")
    check_divides(normalizer, reduction)
    if normalizer is not None:
        check_normalizer(normalizer)
    q = span_sums(student_log_probs, student_spans) / threshold_temperature
    p = (span_sums(teacher_log_probs, teacher_spans) / threshold_temperature).to(q.dtype)
    rows = _bernoulli_kl(p, q) if form == "kl" else (p.exp() - q.exp()).abs()
    there = student_spans[..., 0] >= 0
    rows = rows.where(there, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if normalizer is not None:
        return total / normalizer
    return total if reduction == "sum" else total / there.sum().clamp(min=1)


def span_sums(log_probs: Tensor, spans: Tensor) -> Tensor:
    """(..., M) sums over ranges of the last dimension, each put together of runs of 1, 2, 4, ...
    tokens as its length says: no differences of long sums, which would lose digits and make NaN of
    -inf, no atomics, and no waiting for the longest. A range of -1 gives 0."""
    runs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    length = runs.shape[-1]
    at, rest = spans[..., 0].clamp(min=0), (spans[..., 1] - spans[..., 0]).clamp(min=0)
    total = runs[..., :0].sum(-1, keepdim=True).expand(at.shape)  # 0, with a graph
    for bit in range(length.bit_length()):
        has = (rest >> bit) & 1 == 1
        total = torch.where(has, total + runs.gather(-1, at.where(has, 0)), total)
        at = at + (has.long() << bit)
        run = 1 << bit
        runs = runs[..., :-run] + runs[..., run:]
    return total


def _bernoulli_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two coins, of the logarithms of their probabilities; p is a constant."""
    p_yes = p.exp()
    yes = torch.where(p_yes > 0, p_yes * (p - q), 0.0)
    p_not = -p.expm1()
    no = torch.where(p_not > 0, p_not * (_log1mexp(p) - _log1mexp(q)), 0.0)
    return yes + no


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0; 0, to which logarithms are rounded, counts as that of the number
    below 1."""
    x = x.masked_fill(x >= 0, -torch.finfo(x.dtype).eps / 2)
    near = (-x.clamp(min=-1.0).expm1()).log()
    far = (-x.clamp(max=-0.5).exp()).log1p()
    return torch.where(x > -math.log(2), near, far)


# ----------------------------------------------------------------------------------------------
# what a caller may get wrong


def _check(student: Tensor, teacher: Tensor, student_spans: Tensor, teacher_spans: Tensor) -> None:
    for side, log_probs, spans in (
        ("student", student, student_spans),
        ("teacher", teacher, teacher_spans),
    ):
        check_logits(f"{side}_log_probs", log_probs)
        check_tensor(f"{side}_spans", spans)
        for name, tensor in ((f"{side}_log_probs", log_probs), (f"{side}_spans", spans)):
            check_device(name, tensor, "student_log_probs", student)
        if spans.dtype != torch.int64:
            raise TypeError(f"{side}_spans is {spans.dtype}: expected int64.")
        shape, ranges = tuple(log_probs.shape), tuple(spans.shape)
        fits = len(ranges) == len(shape) + 1 and ranges[-1] == 2 and ranges[:-2] == shape[:-1]
        if len(shape) not in (1, 2) or not fits:
            raise ValueError(
                f"{side}_log_probs has shape {shape}, {side}_spans {ranges}: expected (L,) and "
                "(M, 2), or (B, L) and (B, M, 2)."
            )
        _check_ranges(f"{side}_spans", spans, shape[-1])
    if student_spans.shape != teacher_spans.shape:
        raise ValueError(
            f"student_spans has shape {tuple(student_spans.shape)}, teacher_spans "
            f"{tuple(teacher_spans.shape)}: expected as many on both sides, as align makes them."
        )
    there = (student_spans[..., 0] >= 0) == (teacher_spans[..., 0] >= 0)
    _check_all(there, "student_spans, teacher_spans: expected -1 at the same places of both")
    if teacher.requires_grad:
        raise ValueError(
            "teacher_log_probs requires grad, but it is a constant here, and would get none: "
            "expected teacher_log_probs.detach(), or to be made under torch.no_grad()."
        )


def _check_ranges(name: str, spans: Tensor, length: int) -> None:
    first, last = spans.unbind(-1)
    none = (first == -1) & (last == -1)
    _check_all(
        none | ((first >= 0) & (first < last) & (last <= length)),
        f"{name}: expected 0 <= first < last <= {length:,}, the tokens of the sequence, or -1, -1",
    )


def _check_all(fine: Tensor, expected: str) -> None:
    """On a GPU a device-side assertion: no waiting."""
    if fine.device.type != "cpu" or stand_in(fine):
        torch._assert_async(fine.all(), expected)
    elif not fine.all():
        place = (~fine).nonzero()[0].tolist()
        raise ValueError(f"{expected}; the first that is not is span {place}.")
