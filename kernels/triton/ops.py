"""The launcher: tensors and a LossSpec in, kernels out. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from fusedkd import debug
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import IDENTITY, LossSpec

from . import config, device, programs

HALF = (torch.bfloat16, torch.float16)


def rows(call: RowCall) -> Rows:
    device.check(call.student)
    results, n = call.results(), call.row_scale.numel()
    if n == 0:
        return results
    launch = config.choose(n, call.spec.vocab_size, device.processors(call.student.device))
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    variant = _variant(call)
    arguments = {
        "student": call.student,
        "teacher": call.teacher_logits,
        "grad": call.grad,
        "labels": call.labels if variant.ce else None,
        "row_scale": call.row_scale,
        "loss": results.loss,
        "metrics": results.metrics,
        **scratch(call, launch, config.PARTIALS),
        **layout(call.student, call.teacher_logits, call.grad),
        **numbers(call.spec),
    }
    with device.guard(call.student):
        for stage in config.stages(variant, launch):
            # Without a gradient the last stage is left with one loss per row.
            pieces = 1 if stage == "gradient" and call.grad is None else launch.pieces
            plan = _plan(variant, launch, stage)
            options = config.options(launch, device.TARGET, plan)
            programs.row_kernel[n, pieces](**arguments, plan=plan, **options)
    return results


def scratch(call: RowCall, launch: config.Launch, partials: int) -> dict[str, Tensor | None]:
    """Where the programs that share a row leave their statistics and sums, if any do."""
    empty = functools.partial(call.row_scale.new_empty, dtype=torch.float64)
    n, pieces = call.row_scale.numel(), launch.pieces
    return {
        "partial": empty(n, partials, pieces) if pieces > 1 else None,
        "sums": empty(n, config.SUMS, pieces) if pieces > 1 else None,
    }


def _variant(call: RowCall) -> config.Variant:
    sides, spec = [call.student, call.teacher_logits], call.spec
    ce = call.labels is not None and (spec.ce_weight != 0 or call.metrics)
    return config.Variant(
        student=call.student.dtype,
        teacher=call.teacher_logits.dtype,
        grad=None if call.grad is None else call.grad.dtype,
        divergence=spec.divergence.name,
        aligned=config.aligned(sides if call.grad is None else [*sides, call.grad]),
        kd=spec.kd_scale != 0,
        ce=ce,
        power=power(spec) if ce else 1,
        smoothing=ce and spec.label_smoothing != 0,
        metrics=call.metrics,
        transformed_s=spec.student_transform != IDENTITY,
        transformed_t=spec.teacher_transform != IDENTITY,
    )


@functools.cache
def _plan(variant: config.Variant, launch: config.Launch, stage: str) -> config.Plan:
    return config.plan(variant, launch, stage, device.TARGET)


def layout(student: Tensor, teacher: Tensor, grad: Tensor | None) -> dict[str, int]:
    out = student if grad is None else grad
    return {
        "length": student.shape[1],
        "s_b": student.stride(0),
        "s_t": student.stride(1),
        "t_b": teacher.stride(0),
        "t_t": teacher.stride(1),
        "g_b": out.stride(0),
        "g_t": out.stride(1),
        "columns": student.shape[2],
    }


def numbers(spec: LossSpec) -> dict[str, float | int]:
    a, b = (*map(float, spec.divergence.params), 0.0, 0.0)[:2]
    if spec.divergence.name == "alpha":  # alpha_beta of a sum of 1
        b = 1.0 - a
    return {
        "vocab": spec.vocab_size,
        "inverse_s": 1.0 / spec.temperature,
        "inverse_t": 1.0 / spec.teacher_temperature,
        "ratio": spec.temperature / spec.teacher_temperature,
        "s_scale": float(spec.student_transform.scale),
        "s_cap": float(spec.student_transform.softcap),
        "t_scale": float(spec.teacher_transform.scale),
        "t_cap": float(spec.teacher_transform.softcap),
        "kd_scale": float(spec.kd_scale),
        "ce_weight": float(spec.ce_weight),
        "smoothing": float(spec.label_smoothing),
        "a": a,
        "b": b,
    }


def power(spec: LossSpec) -> int:
    """Temperatures at which the cross-entropy needs no exponential of its own (stats.at_unit)."""
    return int(spec.temperature) if spec.temperature in (1, 2) else 0


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    device.check(grad)
    if grad.numel() == 0:
        return
    if out is not None:  # one kernel of torch's, which converts as it writes
        torch.mul(grad, factor.view(*grad.shape[:-1], 1) if factor.dim() else factor, out=out)
        return
    if factor.dim() == 0 and grad.is_contiguous():
        grad = grad.view(1, 1, -1)
    while grad.dim() < 3:
        grad = grad.unsqueeze(0)
    n, columns = grad.shape[0] * grad.shape[1], grad.shape[2]
    plan = _scale_plan(grad.dtype)
    # Programs enough to fill the GPU eight times over, each with more than one tile where possible;
    # when the factor is 1 all that they do is find that out.
    per_row = min(triton.cdiv(columns, plan.lanes * plan.width), 65535)
    per_row = min(per_row, triton.cdiv(8 * device.processors(grad.device), n))
    with device.guard(grad):
        programs.scale_kernel[n, per_row](
            grad,
            factor,
            length=grad.shape[1],
            x_b=grad.stride(0),
            x_t=grad.stride(1),
            columns=columns,
            factor_step=1 if factor.dim() else 0,
            plan=plan,
            **config.options(config.SCALE, device.TARGET),
        )


@functools.cache
def _scale_plan(dtype: torch.dtype) -> config.Tiling:
    return config.scale_plan(dtype, device.TARGET)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Half-precision heads have fp32 logits: rounding them first costs
    the JSD's gradient 4 to 23 %."""
    return (torch.float32 if dtype in HALF else dtype), dtype


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """The vendor's library; its products are summed in fp32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and torch.version.hip is None:
        wide: Any = {"out_dtype": out.dtype, "out": out}
        torch.addmm(out, a, b, **wide) if accumulate else torch.mm(a, b, **wide)
    else:  # torch has no widening product there
        _mm_widened(out, a, b, accumulate)


def _mm_widened(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """Both operands in out's dtype, as many columns of b at a time as take 64 MiB."""
    a = a.to(out.dtype)
    step = max(1, (64 << 20) // (max(1, b.shape[0]) * out.element_size()))
    for start in range(0, b.shape[1], step):
        columns = slice(start, start + step)
        product = a @ b[:, columns].to(out.dtype)
        out[:, columns].add_(product) if accumulate else out[:, columns].copy_(product)
