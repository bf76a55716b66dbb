"""What a trainer minimises on the logits of one batch: which tokens count where, by which weights
at this moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import LMHead, SparseTeacher, kd_loss, kd_loss_and_metrics
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
    measured: bool  # whether anybody wants metrics
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
        """The loss, and what was measured on the way: nothing where ``targets`` does not ask."""
        numbers = self.numbers(targets.done)
        keywords = self.keywords | {k: v for k, v in numbers.items() if k in self.keywords}
        if targets.training:
            keywords["label_smoothing"] = self.args.label_smoothing_factor
            if not keywords["kd_weight"] and not keywords["ce_weight"]:
                return _nothing(student), {}
        if self.args.kd_tokens == "all" and targets.labels.dim() > 1:  # no classifier
            return _apart(student, teacher, targets, keywords)
        keywords["normalizer"] = targets.num_items
        return _loss(targets, student, teacher, targets.labels, **keywords)


def _loss(targets: Targets, *sides: Any, **keywords: Any) -> tuple[Tensor, Measured]:
    if not targets.measured:
        return kd_loss(*sides, **keywords), {}
    loss, metrics = kd_loss_and_metrics(*sides, **keywords)
    return loss, measured(metrics)


def _nothing(student: Any) -> Tensor:
    """0 with a graph, so that DDP finds every parameter used, and nothing multiplied."""
    states = student.hidden if isinstance(student, LMHead) else student
    weights = torch.zeros(states.shape[:-1], device=states.device)
    return kd_loss(student, None, kd_weight=0.0, token_weights=weights)


def _apart(student: Any, teacher: Side, targets: Targets, keywords: Any) -> tuple[Tensor, Measured]:
    """The divergence over every real token, the cross-entropy over those with a label."""
    assert targets.tokens is not None
    if targets.tokens.shape != targets.labels.shape:
        raise ValueError(
            f"kd_tokens='all': the batch has tokens {tuple(targets.tokens.shape)} and labels "
            f"{tuple(targets.labels.shape)}, as of an encoder-decoder: expected kd_tokens='labels'."
        )
    everywhere = {"token_weights": targets.tokens.float(), "normalizer": targets.num_tokens}
    loss, metrics = _loss(targets, student, teacher, **{**keywords, "ce_weight": 0.0, **everywhere})
    seen = {k: v for k, v in metrics.items() if k not in _NEED_LABELS}
    if targets.training and not keywords["ce_weight"]:
        return loss, seen
    labelled = {"kd_weight": 0.0, "normalizer": _at_least_one(targets.num_items)}
    ce, metrics = _loss(targets, student, teacher, targets.labels, **{**keywords, **labelled})
    return loss + ce, seen | {k: v for k, v in metrics.items() if k in _NEED_LABELS}


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else count
