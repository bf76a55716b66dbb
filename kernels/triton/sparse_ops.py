"""The launcher of sparse.py. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch

from fusedkd import debug
from fusedkd.distributions.sparse import SparseRows
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import IDENTITY, temperature_class

from . import config, device, ops, pointwise, sparse
from .launcher import Launcher

# What a one-sided kernel has no use for.
UNUSED = (
    *("offset", "total", "t_b", "t_t", "inverse_t", "ratio", "t_scale", "t_cap"),
    *("weight", "constant"),
)


def rows(call: RowCall) -> Rows:
    teacher, student = call.teacher, call.student
    assert isinstance(teacher, SparseRows)
    device.check(student)
    if (rule := ops.rule_of(call.spec)) is not None and not call.metrics:
        return Rows(rows(call._replace(metrics=True)).loss, None)
    results, (n, entries) = call.results(), teacher.indices.shape
    if n == 0:
        return results
    launch = config.choose(n, call.spec.vocab_size, device.processors(student.device))
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    variant, tail = _variant(call)._replace(rule=rule), tail_of(teacher.tail)
    arguments = {
        "student": student,
        "grad": call.grad,
        "indices": teacher.indices,
        "log_probs": teacher.log_probs,
        "labels": call.labels if variant.ce else None,
        "row_scale": call.row_scale,
        "loss": results.loss,
        "metrics": results.metrics,
        "id_logits": student.new_empty(n, entries + 1),
        "entries": entries,
        "rounding": teacher.rounding,
        **ops.scratch(call, launch, config.SPARSE_PARTIALS),
        **_numbers(call),
    }
    with device.guard(student):
        for launcher, pieces in _launchers(variant, launch, tail):
            launcher((n, pieces), arguments)
    return results


def tail_of(name: str) -> str:
    """Of a SparseTeacher, as the kernel distinguishes it."""
    return "absent" if name in ("drop", "renormalize") else name


def stages(variant: config.Variant, launch: config.Launch, tail: str) -> tuple[str, ...]:
    """The launches of one call, in order: "middle" only where what is outside the ids has a say of
    its own."""
    every = config.stages(variant, launch)
    return tuple(stage for stage in every if stage != "middle" or _outside(variant, tail))


def _outside(variant: config.Variant, tail: str) -> bool:
    return tail == "absent" and variant.divergence not in pointwise.HOMOGENEOUS


def _numbers(call: RowCall) -> dict[str, float | int]:
    numbers = ops.layout(call.student, call.student, call.grad) | ops.numbers(call.spec)
    return {name: x for name, x in numbers.items() if name not in UNUSED}


def _variant(call: RowCall) -> config.Variant:
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
        power=temperature_class(spec.temperature) if ce else 1,
        smoothing=ce and spec.label_smoothing != 0,
        metrics=call.metrics,
        transformed_s=spec.student_transform != IDENTITY,
    )


@functools.cache
def _launchers(
    variant: config.Variant, launch: config.Launch, tail: str
) -> tuple[tuple[Launcher, int], ...]:
    made = []
    for stage in stages(variant, launch, tail):
        of = constants(variant, launch, stage, tail, device.TARGET)
        options = config.options(launch, device.TARGET, of["plan"])
        launcher = Launcher(sparse.sparse_kernel, of, options)
        made.append((launcher, ops.programs_a_row(variant, launch, stage)))
    return tuple(made)


def constants(
    variant: config.Variant, launch: config.Launch, stage: str, tail: str, target: str
) -> dict[str, Any]:
    """The constexpr arguments of ``sparse_kernel`` on "cuda" or "hip"."""
    plan = config.plan(variant, launch, stage, target)
    values = {f.name: getattr(plan, f.name) for f in fields(plan)} | {"teacher": False}
    return {"TAIL": tail, "plan": config.SparsePlan(**values, outside=_outside(variant, tail))}
