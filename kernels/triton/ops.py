"""The launcher: tensors and a LossSpec in, kernels out. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy
import torch
import triton
from torch import Tensor

from fusedkd.spec import IDENTITY, METRIC_COLUMNS, LossSpec

from . import config, programs

INTERPRETED = not isinstance(programs.row_kernel, triton.JITFunction)
HALF = (torch.bfloat16, torch.float16)
TARGET = "hip" if torch.version.hip else "cuda"


def rows(
    student: Tensor,  # (B, T, C)
    teacher: Tensor,  # (B, T, C')
    labels: Tensor | None,  # (N,) int64
    row_scale: Tensor,  # (N,)
    spec: LossSpec,
    grad: Tensor | None,  # (B, T, C)
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :mod:`fusedkd.kernels`."""
    _check_device(student)
    n = row_scale.numel()
    loss = torch.empty_like(row_scale)
    metric_rows = row_scale.new_empty(n, len(METRIC_COLUMNS)) if metrics else None
    if n == 0:
        return loss, metric_rows
    launch = config.choose(n, spec.vocab_size, _processors(student.device))
    variant = _variant(student, teacher, labels, spec, grad, metrics)
    split = launch.pieces > 1
    arguments = {
        "student": student,
        "teacher": teacher,
        "grad": grad,
        "labels": labels if variant.ce else None,
        "row_scale": row_scale,
        "loss": loss,
        "metrics": metric_rows,
        "partial": row_scale.new_empty(n, 13, launch.pieces, dtype=torch.float64)
        if split
        else None,
        "sums": row_scale.new_empty(n, 2, launch.pieces, dtype=torch.float64) if split else None,
        **_layout(student, teacher, grad),
        **_numbers(spec),
    }
    with _device(student):
        for stage in config.stages(variant, launch):
            # Without a gradient the last stage is left with one loss per row.
            programs_per_row = 1 if stage == "gradient" and grad is None else launch.pieces
            constants = _constants(variant, launch, stage)
            programs.row_kernel[n, programs_per_row](
                **arguments, **constants, **config.options(launch, TARGET, constants["plan"])
            )
    return loss, metric_rows


def _variant(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    spec: LossSpec,
    grad: Tensor | None,
    metrics: bool,
) -> config.Variant:
    return config.Variant(
        student=student.dtype,
        teacher=teacher.dtype,
        grad=None if grad is None else grad.dtype,
        divergence=spec.divergence.name,
        aligned=config.aligned([student, teacher] if grad is None else [student, teacher, grad]),
        ce=labels is not None and (spec.ce_weight != 0 or metrics),
        metrics=metrics,
        bent_s=spec.student_transform != IDENTITY,
        bent_t=spec.teacher_transform != IDENTITY,
    )


@functools.cache
def _constants(variant: config.Variant, launch: config.Launch, stage: str) -> dict[str, Any]:
    return config.constants(variant.divergence, config.plan(variant, launch, stage, TARGET))


def _layout(student: Tensor, teacher: Tensor, grad: Tensor | None) -> dict[str, int]:
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


def _numbers(spec: LossSpec) -> dict[str, float | int]:
    a, b = (*map(float, spec.divergence.params), 0.0, 0.0)[:2]
    return {
        "vocab": spec.vocab_size,
        "inverse_s": 1.0 / spec.temperature,
        "inverse_t": 1.0 / spec.teacher_temperature,
        "s_scale": float(spec.student_transform.scale),
        "s_cap": float(spec.student_transform.softcap),
        "t_scale": float(spec.teacher_transform.scale),
        "t_cap": float(spec.teacher_transform.softcap),
        "kd_scale": float(spec.kd_scale),
        "ce_weight": float(spec.ce_weight),
        "smoothing": float(spec.label_smoothing),
        "a": a,
        "b": b,
        # Temperatures at which the cross-entropy needs no exponential of its own (sweeps._at_one).
        "power": int(spec.temperature) if spec.temperature in (1, 2) else 0,
    }


def scale_(grad: Tensor, factor: Tensor, out: Tensor | None = None) -> None:
    """See :mod:`fusedkd.kernels`."""
    _check_device(grad)
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
    per_row = min(per_row, triton.cdiv(8 * _processors(grad.device), n))
    with _device(grad):
        programs.scale_kernel[n, per_row](
            grad,
            factor,
            length=grad.shape[1],
            x_b=grad.stride(0),
            x_t=grad.stride(1),
            columns=columns,
            factor_step=1 if factor.dim() else 0,
            plan=plan,
            **config.options(config.SCALE, TARGET),
        )


@functools.cache
def _scale_plan(dtype: torch.dtype) -> config.Tiling:
    return config.scale_plan(dtype, TARGET)


def head_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """See :mod:`fusedkd.kernels`. Half-precision heads have fp32 logits: rounding them first costs
    the JSD's gradient 4 to 23 %."""
    return (torch.float32 if dtype in HALF else dtype), dtype


def mm_(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """See :mod:`fusedkd.kernels`. The vendor's library; its products are summed in fp32."""
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


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if INTERPRETED:
        return _interpreter_unavailable()
    if torch.cuda.is_available():
        return None
    return (
        "there is no GPU that this torch can use. To run the kernels slowly on a CPU, in Triton's "
        "interpreter, set TRITON_INTERPRET=1 in the environment before triton is first imported"
    )


def _interpreter_unavailable() -> str | None:
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):  # int() of an array of one
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: "
            "install numpy<2.4, or Triton 3.7"
        )
    return None


def _release(package: Any) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


def _check_device(x: Tensor) -> None:
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "backend='triton' got tensors on the CPU: move them to the GPU, leave backend=None, or "
            "set TRITON_INTERPRET=1 before triton is first imported to interpret the kernels."
        )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 132  # the interpreter walks the same paths as an H200
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if INTERPRETED:  # as silent as a GPU about infinities that the kernels expect
        return numpy.errstate(all="ignore")
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
