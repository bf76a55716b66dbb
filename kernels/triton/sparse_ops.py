"""The launcher of sparse.py, and what part_ops.py launches of it. Contract:
:mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fusedkd import debug
from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import IDENTITY, temperature_class

from . import config, device, ops, pointwise, sparse
from .launcher import Launcher

# What a one-sided kernel has no use for.
UNUSED = ("t_b", "t_t", "inverse_t", "ratio", "t_scale", "t_cap", "weight", "constant")


def rows(call: RowCall) -> Rows:
    teacher, student = call.teacher, call.student
    assert isinstance(teacher, SparseRows)
    device.check(student)
    if ops.rule_of(call.spec) is not None and not call.metrics:
        return Rows(rows(call._replace(metrics=True)).loss, None)
    results, n = call.results(), call.row_scale.numel()
    if n == 0:
        return results
    launch = config.choose(n, call.spec.vocab_size, device.processors(student.device))
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    variant, tail = variant_of(call), tail_of(teacher.tail)
    arguments = {
        **inputs(call, variant, id_logits(call)),
        "loss": results.loss,
        "metrics": results.metrics,
        **ops.scratch(call, launch, config.SPARSE_PARTIALS),
    }
    with device.guard(student):
        for launcher, pieces in _launchers(variant, launch, tail):
            launcher((n, pieces), arguments)
    return results


def inputs(call: RowCall, variant: config.Variant, kept: Tensor) -> dict[str, Any]:
    """What the kernel reads of a call, where its gradient goes, and where the logits that it may go
    over are kept."""
    teacher = call.teacher
    assert isinstance(teacher, SparseRows)
    return {
        "student": call.student,
        "grad": call.grad,
        "indices": teacher.indices,
        "log_probs": teacher.log_probs,
        "labels": call.labels if variant.ce else None,
        "row_scale": call.row_scale,
        "id_logits": kept,
        "entries": teacher.indices.shape[1],
        "rounding": teacher.rounding,
        **_numbers(call),
    }


def id_logits(call: RowCall) -> Tensor:
    """Memory for them, and for the label's."""
    assert isinstance(call.teacher, SparseRows)
    return call.student.new_empty(call.teacher.log_probs.shape)


def tail_of(name: str) -> str:
    """Of a SparseTeacher, as the kernel distinguishes it."""
    return "absent" if name in ("drop", "renormalize") else name


def stages(variant: config.Variant, launch: config.Launch, tail: str) -> tuple[str, ...]:
    """The launches of one call, in order: of a whole row "middle" only where what is outside the
    ids has a say of its own."""
    every, middle = config.stages(variant, launch), variant.part or outside(variant, tail)
    return tuple(stage for stage in every if stage != "middle" or middle)


def outside(variant: config.Variant, tail: str) -> bool:
    """Whether what is outside the ids has a say of its own."""
    return tail == "absent" and variant.divergence not in pointwise.HOMOGENEOUS


def _numbers(call: RowCall) -> dict[str, float | int]:
    numbers = ops.layout(call.student, call.student, call.grad) | ops.numbers(call.spec)
    return {name: x for name, x in numbers.items() if name not in UNUSED}


def variant_of(call: RowCall) -> config.Variant:
    student, grad, spec = call.student, call.grad, call.spec
    wide = call.row_scale.dtype == torch.float64
    ce = call.labels is not None and (spec.ce_weight != 0 or call.metrics)
    return config.Variant(
        student=student.dtype,
        teacher=torch.float64 if wide else student.dtype,  # decides the accumulation type only
        grad=None if grad is None else grad.dtype,
        divergence=ops.name_of(spec.divergence),
        aligned=config.aligned([student] if grad is None else [student, grad]),
        kd=spec.kd_scale != 0,
        ce=ce,
        z=spec.z_loss_weight != 0,
        power=temperature_class(spec.temperature) if ce or spec.z_loss_weight else 1,
        smoothing=ce and spec.label_smoothing != 0,
        metrics=call.metrics,
        transformed_s=spec.student_transform != IDENTITY,
        part=call.part is not None,
        rule=ops.rule_of(spec),
    )


@functools.cache
def _launchers(
    variant: config.Variant, launch: config.Launch, tail: str
) -> tuple[tuple[Launcher, int], ...]:
    return tuple(
        stage_launcher(variant, launch, stage, tail) for stage in stages(variant, launch, tail)
    )


def stage_launcher(
    variant: config.Variant, launch: config.Launch, stage: str, tail: str
) -> tuple[Launcher, int]:
    """And its programs a row."""
    of = constants(variant, launch, stage, tail, device.TARGET)
    options = config.options(launch, device.TARGET, of["plan"])
    alone = stage == "middle" and not outside(variant, tail)  # with the ids
    count = 1 if alone else ops.programs_a_row(variant, launch, stage)
    return Launcher(sparse.sparse_kernel, of, options), count


def constants(
    variant: config.Variant, launch: config.Launch, stage: str, tail: str, target: str
) -> dict[str, Any]:
    """The constexpr arguments of ``sparse_kernel`` on "cuda" or "hip"."""
    plan = config.plan(variant, launch, stage, target)
    values = {f.name: getattr(plan, f.name) for f in fields(plan)} | {"teacher": False}
    return {"TAIL": tail, "plan": config.SparsePlan(**values, outside=outside(variant, tail))}
