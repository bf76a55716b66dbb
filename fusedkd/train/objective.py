"""What a trainer minimises on the logits of one batch: which tokens count where, by which weights
at this moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd import (
    LMHead,
    SparseTeacher,
    sampled_kd_loss,
    sampled_kd_loss_and_metrics,
    token_log_probs,
)
from fusedkd.train.across import across
from fusedkd.train.ahead import compiles, other_kernels
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.meter import Measured, measured
from fusedkd.train.targets import Count, Targets, nothing

Side = Tensor | LMHead | SparseTeacher
_NEED_LABELS = ("ce", "student_accuracy", "teacher_accuracy")


class Objective:
    """The divergence and the cross-entropy of :class:`DistillationArguments`.

    Args:
        args: with checked schedules.
        keywords: of :func:`fusedkd.kd_loss`, those that no schedule changes.
    """

    def __init__(self, args: DistillationArguments, keywords: dict[str, Any]) -> None:
        self.args, self.keywords = args, keywords
        self._starts, self._schedules = args.scheduled(), args.parsed_schedules()
        self._begun = False

    def numbers(self, done: float) -> dict[str, float]:
        """Every weight and temperature at this moment, by name; those of terms too."""
        now = {
            name: schedule(self._starts[name], done) for name, schedule in self._schedules.items()
        }
        return self._starts | now

    def __call__(self, student: Any, teacher: Any, targets: Targets) -> tuple[Tensor, Measured]:
        """The loss, and what was measured on the way: nothing where ``targets`` does not ask.

        The first one for training is also computed as the schedules will have it later, for the
        kernels' sake (:mod:`fusedkd.train.ahead`).
        """
        if targets.training and targets.steps and not self._begun:
            self._begun = True
            if self._schedules and compiles(student, self.keywords["backend"]):
                for done in other_kernels(self.numbers, targets.done, targets.steps):
                    self._loss(student, teacher, targets._replace(done=done))
        return self._loss(student, teacher, targets)

    def _loss(self, student: Any, teacher: Any, targets: Targets) -> tuple[Tensor, Measured]:
        numbers = self.numbers(targets.done)
        keywords = self.keywords | {k: v for k, v in numbers.items() if k in self.keywords}
        if targets.training:
            keywords["label_smoothing"] = self.args.label_smoothing_factor
            keywords["z_loss_weight"] = numbers.get("z_loss_weight", 0.0)
            weights = ("kd_weight", "ce_weight", "z_loss_weight", "alm_weight")
            if not any(numbers.get(name) for name in weights):
                return nothing(student), {}
        if targets.training and self.args.objective == "sampled":
            return _drawn(student, teacher, targets, keywords, self.args.loss_type)
        if self.args.cross_tokenizer is not None:
            return across(student, teacher, targets, *self.args.across(keywords, numbers))
        if targets.everywhere:
            return _apart(student, teacher, targets, keywords)
        keywords["normalizer"] = targets.num_items
        return targets.compare(targets.measured, student, teacher, targets.labels, **keywords)


def _drawn(
    student: Any, teacher: Any, targets: Targets, keywords: Any, loss_type: str
) -> tuple[Tensor, Measured]:
    """The loss of the tokens that the student wrote, which are its labels."""
    shared = {name: keywords[name] for name in ("vocab_size", "chunk_bytes", "backend")}
    heat = keywords["temperature"]
    theirs = keywords["teacher_temperature"] or heat
    with torch.no_grad():
        read = token_log_probs(teacher, targets.labels, temperature=theirs, **shared)
    weight = keywords["kd_weight"] * (heat**2 if keywords["scale_by_t2"] else 1.0)
    shared |= {"loss_type": loss_type, "temperature": heat, "normalizer": targets.num_items}
    given = (student, read.log_probs, targets.labels)
    if not targets.measured:
        return weight * sampled_kd_loss(*given, **shared), {}
    loss, metrics = sampled_kd_loss_and_metrics(*given, **shared)
    return weight * loss, measured(metrics)


def _apart(student: Any, teacher: Side, targets: Targets, keywords: Any) -> tuple[Tensor, Measured]:
    """The divergence over every real token, cross-entropy and z-loss over those with a label."""
    assert targets.tokens is not None
    compare, measured = targets.compare, targets.measured
    everywhere = {"token_weights": targets.tokens.float(), "normalizer": targets.num_tokens}
    alone = {**keywords, "ce_weight": 0.0, "z_loss_weight": 0.0, **everywhere}
    loss, metrics = compare(measured, student, teacher, **alone)
    seen = {k: v for k, v in metrics.items() if k not in _NEED_LABELS}
    if targets.training and not (keywords["ce_weight"] or keywords["z_loss_weight"]):
        return loss, seen
    labelled = {"kd_weight": 0.0, "normalizer": _at_least_one(targets.num_items)}
    ce, metrics = compare(measured, student, teacher, targets.labels, **{**keywords, **labelled})
    return loss + ce, seen | {k: v for k, v in metrics.items() if k in _NEED_LABELS}


def _at_least_one(count: Count) -> Count:
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else count
