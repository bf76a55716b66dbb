"""What a trainer minimises on the logits of one batch: which tokens count where, by which weights
at this moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, kd_loss_and_metrics
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.meter import Measured, measured

__all__ = ["Objective", "Targets"]

Side = Tensor | LMHead | SparseTeacher
Count = Tensor | int | None
_NEED_LABELS = ("ce", "student_accuracy", "teacher_accuracy")


class Targets(NamedTuple):
    """What a batch's distributions are held against.

    ``num_items`` and ``num_tokens`` are the labels and the real tokens of the whole optimizer step;
    None: of this batch.
    """

    labels: Tensor  # (...,) aligned with the logits, -100 where there is none
    tokens: Tensor | None  # (B, L) bool, False at padding; where somebody asks for it
    num_items: Count
    num_tokens: Count
    training: bool
    done: float  # share of the training that is over


class Objective:
    """The divergence and the cross-entropy of :class:`DistillationArguments`.

    Args:
        args: with checked schedules.
        keywords: of :func:`fusedkd.kd_loss`, those that no schedule changes.
    """

    def __init__(self, args: DistillationArguments, keywords: dict[str, Any]) -> None:
        self.args, self.keywords = args, keywords
        self._starts, self._schedules = args.scheduled(), args.parsed_schedules()

    def numbers(self, done: float) -> dict[str, float]:
        """Every weight and temperature at this moment, by name; those of terms too."""
        now = {
            name: schedule(self._starts[name], done) for name, schedule in self._schedules.items()
        }
        return self._starts | now

    def __call__(self, student: Any, teacher: Any, targets: Targets) -> tuple[Tensor, Measured]:
        """The loss, and what was measured on the way."""
        numbers = self.numbers(targets.done)
        keywords = self.keywords | {k: v for k, v in numbers.items() if k in self.keywords}
        if targets.training:
            keywords["label_smoothing"] = self.args.label_smoothing_factor
            if not keywords["kd_weight"] and not keywords["ce_weight"]:
                return _nothing(student, teacher, targets, keywords)
        if self.args.kd_tokens == "all":
            return _apart(student, teacher, targets, keywords)
        loss, metrics = kd_loss_and_metrics(
            student, teacher, targets.labels, **keywords, normalizer=targets.num_items
        )
        return loss, measured(metrics)


def _nothing(
    student: Any, teacher: Side, targets: Targets, keywords: Any
) -> tuple[Tensor, Measured]:
    """No row: 0 with a graph, so that DDP finds every parameter used, and nothing computed."""
    none = slice(0, 0)
    loss, _ = kd_loss_and_metrics(
        _rows(student, none), _rows(teacher, none), targets.labels[none], **keywords
    )
    return loss, {}


def _apart(student: Any, teacher: Side, targets: Targets, keywords: Any) -> tuple[Tensor, Measured]:
    """The divergence over every real token, the cross-entropy over those with a label."""
    assert targets.tokens is not None
    weights = targets.tokens.expand(targets.labels.shape).float()
    loss, metrics = kd_loss_and_metrics(
        student,
        teacher,
        **{**keywords, "ce_weight": 0.0},
        token_weights=weights,
        normalizer=targets.num_tokens,
    )
    seen = {k: v for k, v in measured(metrics).items() if k not in _NEED_LABELS}
    if targets.training and not keywords["ce_weight"]:
        return loss, seen
    # These are few (15 % in masked language modelling), so they are gathered; on a GPU that waits
    # once for their number, which costs less than a product with the vocabulary for all of them.
    chosen = targets.labels != -100
    ce, metrics = kd_loss_and_metrics(
        _rows(student, chosen),
        _rows(teacher, chosen),
        targets.labels[chosen],
        **{**keywords, "kd_weight": 0.0},
        normalizer=_at_least_one(targets.num_items),
    )
    return loss + ce, seen | {k: measured(metrics)[k] for k in _NEED_LABELS}


def _rows(side: Side, chosen: Any) -> Any:
    if isinstance(side, LMHead):
        return replace(side, hidden=side.hidden[chosen])
    if isinstance(side, SparseTeacher):
        return replace(side, indices=side.indices[chosen], log_probs=side.log_probs[chosen])
    return side[chosen]


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else count
