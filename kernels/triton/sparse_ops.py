"""The launcher of sparse.py. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusedkd.distributions.sparse import SparseRows
from fusedkd.spec import IDENTITY, METRIC_COLUMNS, LossSpec

from . import config, ops, pointwise, sparse

# What a one-sided kernel has no use for.
TEACHERS = ("t_b", "t_t", "inverse_t", "t_scale", "t_cap")


def sparse_rows(
    student: Tensor,  # (B, T, C)
    teacher: SparseRows,
    labels: Tensor | None,  # (N,) int64
    row_scale: Tensor,  # (N,)
    spec: LossSpec,
    grad: Tensor | None,  # (B, T, C)
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    ops._check_device(student)
    n, entries = teacher.indices.shape
    loss = torch.empty_like(row_scale)
    metric_rows = row_scale.new_empty(n, len(METRIC_COLUMNS)) if metrics else None
    if n == 0:
        return loss, metric_rows
    launch = config.choose(n, spec.vocab_size, ops._processors(student.device))
    variant = _variant(student, labels, row_scale, spec, grad, metrics)
    scratch = functools.partial(row_scale.new_empty, dtype=torch.float64)
    split = launch.pieces > 1
    arguments = {
        "student": student,
        "grad": grad,
        "indices": teacher.indices,
        "log_probs": teacher.log_probs,
        "labels": labels if variant.ce else None,
        "row_scale": row_scale,
        "loss": loss,
        "metrics": metric_rows,
        "held": student.new_empty(n, entries + 1),
        "partial": scratch(n, 7, launch.pieces) if split else None,
        "sums": scratch(n, 2, launch.pieces) if split else None,
        "entries": entries,
        "rounding": teacher.rounding,
        **_numbers(student, student if grad is None else grad, spec),
    }
    with ops._device(student):
        for stage in stages(variant, launch, teacher.tail == "bucket"):
            known = _constants(variant, launch, stage, teacher.tail == "bucket")
            # Without a gradient the last stage is left with one loss per row.
            programs = 1 if stage == "gradient" and grad is None else launch.pieces
            sparse.sparse_kernel[n, programs](
                **arguments, **known, **config.options(launch, ops.TARGET)
            )
    return loss, metric_rows


def stages(variant: config.Variant, launch: config.Launch, bucket: bool) -> tuple[str, ...]:
    """The launches of one call, in order: "middle" only where what is outside the ids has a say of
    its own."""
    skipped = "middle" if bucket or variant.divergence in pointwise.CLOSED else ""
    return tuple(stage for stage in config.stages(variant, launch) if stage != skipped)


def _numbers(student: Tensor, out: Tensor, spec: LossSpec) -> dict[str, float | int]:
    numbers = ops._layout(student, student, out) | ops._numbers(spec)
    return {name: x for name, x in numbers.items() if name not in TEACHERS}


def _variant(
    student: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> config.Variant:
    wide = row_scale.dtype == torch.float64
    return config.Variant(
        student=student.dtype,
        teacher=torch.float64 if wide else student.dtype,  # decides the accumulation type only
        grad=None if grad is None else grad.dtype,
        divergence=spec.divergence.name,
        aligned=config.aligned([student] if grad is None else [student, grad]),
        ce=labels is not None and (spec.ce_weight != 0 or metrics),
        metrics=metrics,
        bent_s=spec.student_transform != IDENTITY,
    )


@functools.cache
def _constants(
    variant: config.Variant, launch: config.Launch, stage: str, bucket: bool
) -> dict[str, Any]:
    return constants(variant, launch, stage, bucket, ops.TARGET)


def constants(
    variant: config.Variant, launch: config.Launch, stage: str, bucket: bool, target: str
) -> dict[str, Any]:
    """The constexpr arguments of ``sparse_kernel`` on "cuda" or "hip"."""
    return {
        "DIVERGENCE": config.function(variant.divergence),
        "BUCKET": bucket,
        "plan": config.plan(variant, launch, stage, target),
    }
