"""The launcher of sparse.py. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusedkd import debug
from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import IDENTITY

from . import config, device, ops, pointwise, sparse
from .launcher import Launcher

# What a one-sided kernel has no use for.
TEACHERS = ("t_b", "t_t", "inverse_t", "ratio", "t_scale", "t_cap")


def rows(call: RowCall) -> Rows:
    teacher, student = call.teacher, call.student
    assert isinstance(teacher, SparseRows)
    device.check(student)
    results, (n, entries) = call.results(), teacher.indices.shape
    if n == 0:
        return results
    launch = config.choose(n, call.spec.vocab_size, device.processors(student.device))
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    variant, bucket = _variant(call), teacher.tail == "bucket"
    arguments = {
        "student": student,
        "grad": call.grad,
        "indices": teacher.indices,
        "log_probs": teacher.log_probs,
        "labels": call.labels if variant.ce else None,
        "row_scale": call.row_scale,
        "loss": results.loss,
        "metrics": results.metrics,
        "held": student.new_empty(n, entries + 1),
        "entries": entries,
        "rounding": teacher.rounding,
        **ops.scratch(call, launch, config.SPARSE_PARTIALS),
        **_numbers(call),
    }
    with device.guard(student):
        for launcher, pieces in _launchers(variant, launch, bucket):
            launcher((n, pieces), arguments)
    return results


def stages(variant: config.Variant, launch: config.Launch, bucket: bool) -> tuple[str, ...]:
    """The launches of one call, in order: "middle" only where what is outside the ids has a say of
    its own."""
    skipped = "middle" if bucket or variant.divergence in pointwise.KLS else ""
    return tuple(stage for stage in config.stages(variant, launch) if stage != skipped)


def _numbers(call: RowCall) -> dict[str, float | int]:
    numbers = ops.layout(call.student, call.student, call.grad) | ops.numbers(call.spec)
    numbers["power"] = ops.power(call.spec)
    return {name: x for name, x in numbers.items() if name not in TEACHERS}


def _variant(call: RowCall) -> config.Variant:
    student, grad, wide = call.student, call.grad, call.row_scale.dtype == torch.float64
    return config.Variant(
        student=student.dtype,
        teacher=torch.float64 if wide else student.dtype,  # decides the accumulation type only
        grad=None if grad is None else grad.dtype,
        divergence=call.spec.divergence.key or call.spec.divergence.name,
        aligned=config.aligned([student] if grad is None else [student, grad]),
        ce=call.labels is not None and (call.spec.ce_weight != 0 or call.metrics),
        metrics=call.metrics,
        transformed_s=call.spec.student_transform != IDENTITY,
    )


@functools.cache
def _launchers(
    variant: config.Variant, launch: config.Launch, bucket: bool
) -> tuple[tuple[Launcher, int], ...]:
    made = []
    for stage in stages(variant, launch, bucket):
        launcher = Launcher(
            sparse.sparse_kernel,
            constants(variant, launch, stage, bucket, device.TARGET),
            config.options(launch, device.TARGET),
        )
        made.append((launcher, ops.programs_a_row(variant, launch, stage)))
    return tuple(made)


def constants(
    variant: config.Variant, launch: config.Launch, stage: str, bucket: bool, target: str
) -> dict[str, Any]:
    """The constexpr arguments of ``sparse_kernel`` on "cuda" or "hip"."""
    return {
        "DIVERGENCE": config.function(variant.divergence),
        "BUCKET": bucket,
        "plan": config.plan(variant, launch, stage, target),
    }
