"""How a student's answers to one batch are compared with a teacher's and with the labels: as
distributions, as many yes-or-no questions, or as numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedkd import Routed, kd_loss, kd_loss_and_metrics
from fusedkd.divergences import Divergence, forward_kl
from fusedkd.loss import losses_by_teacher
from fusedkd.routed import together
from fusedkd.row_rules import RowRule
from fusedkd.train.meter import Mean, Measured, measured

OF_EACH = ("kd", "ce", "top1_agreement")  # teacher, where there are several
# (whether metrics are wanted, student, teacher, labels or None, **keywords of kd_loss)
Compare = Callable[..., tuple[Tensor, Measured]]


def distributions(metrics: bool, *sides: Any, **keywords: Any) -> tuple[Tensor, Measured]:
    """Softmaxes over the last dimension: :func:`fusedkd.kd_loss`. Of several teachers, some metrics
    are also known for each."""
    if metrics and isinstance(sides[1], Routed):
        loss, by_name = losses_by_teacher(*sides, **keywords)
        every = measured(together(list(by_name.values())))
        for name, found in by_name.items():
            own = measured(found)
            every |= {f"{metric}_{name}": own[metric] for metric in OF_EACH}
        return loss, every
    if not metrics:
        return kd_loss(*sides, **keywords), {}
    loss, found = kd_loss_and_metrics(*sides, **keywords)
    return loss, measured(found)


def bernoulli(
    metrics: bool, student: Tensor, teacher: Tensor, labels: Tensor, **keywords: Any
) -> tuple[Tensor, Measured]:
    """A sigmoid for each of C labels (B, C), which is a softmax over (0, logit): means over B C.

    Raises:
        ValueError: a label is neither 0, 1 nor -100, or there is a z-loss.
    """
    if keywords.get("z_loss_weight"):
        raise ValueError(
            f"z_loss_weight={keywords['z_loss_weight']:g} with sigmoids, which no sum normalises: "
            "expected 0."
        )
    if not torch.isin(labels, torch.tensor([0, 1, -100], device=labels.device)).all():
        raise ValueError("labels: expected 0 or 1 for each class, as of a multi-label classifier.")
    return distributions(metrics, _two(student), _two(teacher), labels.long(), **keywords)


def _two(logits: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(logits), logits], -1)


def squared_error(
    metrics: bool,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    normalizer: Any = None,
    divergence: Divergence | None = None,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    row_rule: RowRule | None = None,
    **rest: Any,
) -> tuple[Tensor, Measured]:
    """Mean squared distances of numbers (B,) or (B, C): to the teacher, and to the labels.

    A temperature would cancel, for the loss is multiplied by its square.

    Raises:
        ValueError: shapes differ, or there is a setting that means nothing here.
    """
    other = label_smoothing or z_loss_weight or row_rule is not None
    if divergence not in (None, forward_kl()) or other:
        raise ValueError(
            f"divergence={divergence}, label_smoothing={label_smoothing}, z_loss_weight="
            f"{z_loss_weight:g}, row_rule={row_rule}: a regression head is compared by the mean "
            "squared error: expected the default divergence, no smoothing, z-loss or rule."
        )
    student, teacher = (x.flatten() if x.shape[-1] == 1 else x for x in (student, teacher))
    labels = labels.flatten() if labels.shape[-1:] == (1,) else labels
    if not student.shape == teacher.shape == labels.shape:
        raise ValueError(
            f"regression: the student has {tuple(student.shape)} numbers, the teacher "
            f"{tuple(teacher.shape)}, the labels {tuple(labels.shape)}: expected one shape."
        )
    precise = torch.promote_types(student.dtype, torch.float32)
    numbers = student.to(precise)
    kd, mse = ((numbers - x.to(precise)).square().sum() for x in (teacher, labels))
    loss = (kd_weight * kd + ce_weight * mse) / (
        labels.numel() if normalizer is None else normalizer
    )
    if not metrics:
        return loss, {}
    count = torch.tensor(labels.numel(), device=labels.device)
    return loss, {name: Mean(x.detach() / count, count) for name, x in (("kd", kd), ("mse", mse))}
