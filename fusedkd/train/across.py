"""What is minimised between two models whose tokenizers differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedkd import LMHead, token_log_probs
from fusedkd.alignment import alm_loss
from fusedkd.alignment.likelihood import span_sums
from fusedkd.teachers.aligned import Aligned
from fusedkd.train.compare import distributions
from fusedkd.train.meter import Mean, Measured
from fusedkd.train.targets import Targets, nothing

_NEED_LABELS = ("ce", "student_accuracy", "teacher_accuracy")


def across(
    student: Tensor | LMHead, teacher: Aligned, targets: Targets, keywords: Any, alm: dict[str, Any]
) -> tuple[Tensor, Measured]:
    """The loss, every part of which is a sum over the labels of the step, or over spans all of
    whose tokens have one, by the number of these labels.

    Args:
        teacher: see there.
        targets: see there.
        keywords: of :func:`fusedkd.kd_loss`; ``kd_weight`` 0 where there is no divergence.
        alm: ``weight``, and what :func:`fusedkd.alignment.alm_loss` takes.
    """
    counts = targets.labels != -100
    count = targets.num_items if targets.num_items is not None else counts.sum().clamp(min=1)
    uncounted = span_sums((~counts).float(), teacher.student_spans) > 0
    there = (teacher.student_spans[..., 0] >= 0) & ~uncounted
    spans = [
        x.masked_fill(~there[..., None], -1) for x in (teacher.student_spans, teacher.teacher_spans)
    ]
    parts: list[Tensor] = []
    found: dict[str, Mean] = {}
    weight = alm["weight"]
    shared = {name: keywords[name] for name in ("chunk_bytes", "backend")}
    if weight or keywords["ce_weight"] or targets.measured:
        own = token_log_probs(student, targets.labels, **shared).log_probs
        if keywords["ce_weight"]:
            parts.append(keywords["ce_weight"] * (-own.sum() / count))
        found["ce"] = _mean(-own.sum(), counts.sum())
    if weight:
        theirs = teacher.log_probs
        if theirs is None:
            assert teacher.side is not None
            with torch.no_grad():
                theirs = token_log_probs(teacher.side, teacher.labels, **shared).log_probs
        settings = {name: value for name, value in alm.items() if name != "weight"}
        loss = alm_loss(own, theirs, *spans, normalizer=count, **settings)
        parts.append(weight * loss)
        found["alm"] = _mean(loss * count, there.sum())
    if keywords["kd_weight"]:
        assert teacher.side is not None  # where it has none, alm alone is let in
        sides = [
            _rows(side, span[..., 0].clamp(min=0), ids)
            for side, span, ids in (
                (student, spans[0], teacher.student_ids),
                (teacher.side, spans[1], teacher.teacher_ids),
            )
        ]
        rows = {"token_weights": there.float(), "normalizer": count, "ce_weight": 0.0}
        loss, metrics = distributions(targets.measured, *sides, **{**keywords, **rows})
        parts.append(loss)
        found |= {name: x for name, x in metrics.items() if name not in _NEED_LABELS}
    return sum(parts[1:], parts[0] if parts else nothing(student)), (
        found if targets.measured else {}
    )


def _mean(total: Tensor, count: Tensor) -> Mean:
    return Mean(total.detach() / count.clamp(min=1), count)


def _rows(side: Tensor | LMHead, at: Tensor, ids: Tensor | None) -> Tensor | LMHead:
    """A side's answers (B, M, ...) at some positions (B, M), over a part of its vocabulary."""
    states = side.hidden if isinstance(side, LMHead) else side
    found = states.gather(1, at[..., None].expand(*at.shape, states.shape[-1]))
    if isinstance(side, LMHead):
        return replace(side, hidden=found, ids=ids)
    return found if ids is None else found[..., ids]
