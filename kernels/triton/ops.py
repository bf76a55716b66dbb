"""The launcher: tensors and a LossSpec in, kernels out. Contract: :mod:`fusedkd.kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fusedkd import debug
from fusedkd.algebra import simplified
from fusedkd.divergences import Divergence
from fusedkd.formulas import MOST_PARAMETERS
from fusedkd.kernels import RowCall, Rows
from fusedkd.spec import IDENTITY, LossSpec, temperature_class

from . import config, device, programs
from .launcher import Launcher

HALF = (torch.bfloat16, torch.float16)


def rows(call: RowCall) -> Rows:
    device.check(call.student)
    if rule_of(call.spec) is not None and not call.metrics:  # which are what it reads
        return Rows(rows(call._replace(metrics=True)).loss, None)
    results, n = call.results(), call.row_scale.numel()
    if n == 0:
        return results
    launch = config.choose(n, call.spec.vocab_size, device.processors(call.student.device))
    if debug.ENABLED:
        debug.note(f"{n:,} rows by {launch}")
    variant = variant_of(call)
    arguments = {
        **inputs(call, variant),
        "loss": results.loss,
        "metrics": results.metrics,
        **scratch(call, launch, config.PARTIALS),
        "arrived": _arrived(call, config.stages(variant, launch)),
    }
    with device.guard(call.student):
        for launcher, per_row, pieces in _launchers(variant, launch):
            launcher((n * per_row, pieces), arguments)
    return results


def inputs(call: RowCall, variant: config.Variant) -> dict[str, Any]:
    """What a kernel reads of a call, and where its gradient goes."""
    return {
        "student": call.student,
        "teacher": call.teacher_logits,
        "grad": call.grad,
        "labels": call.labels if variant.ce else None,
        "row_scale": call.row_scale,
        **layout(call.student, call.teacher_logits, call.grad),
        **numbers(call.spec),
    }


def scratch(call: RowCall, launch: config.Launch, partials: int) -> dict[str, Tensor | None]:
    """Where the programs that share a row leave their statistics and sums, if any do."""
    empty = functools.partial(call.row_scale.new_empty, dtype=torch.float64)
    n, pieces = call.row_scale.numel(), launch.pieces
    return {
        "partial": empty(n, partials, pieces) if pieces > 1 else None,
        "sums": empty(n, config.SUMS, pieces) if pieces > 1 else None,
    }


def _arrived(call: RowCall, stages: tuple[str, ...]) -> Tensor | None:
    """Counters of programs that wait for one another, if any do."""
    n = call.row_scale.numel()
    joint = "joint" in stages
    return call.row_scale.new_zeros(n, 2, dtype=torch.int32) if joint else None


def variant_of(call: RowCall) -> config.Variant:
    teacher, spec = call.teacher_logits, call.spec
    sides = [call.student, teacher]
    # without a teacher in it a call may yet be one in fp64: cross-entropy beside one's weight of 0
    wide = call.teacher is None and call.row_scale.dtype == torch.float64
    ce = call.labels is not None and (spec.ce_weight != 0 or call.metrics)
    return config.Variant(
        student=call.student.dtype,
        teacher=torch.float64 if wide else teacher.dtype,
        grad=None if call.grad is None else call.grad.dtype,
        divergence=dense_name(spec.divergence),
        aligned=config.aligned(sides if call.grad is None else [*sides, call.grad]),
        kd=spec.kd_scale != 0,
        ce=ce,
        z=spec.z_loss_weight != 0,
        power=temperature_class(spec.temperature) if ce or spec.z_loss_weight else 1,
        smoothing=ce and spec.label_smoothing != 0,
        metrics=call.metrics,
        transformed_s=spec.student_transform != IDENTITY,
        transformed_t=spec.teacher_transform != IDENTITY,
        part=call.part is not None,
        rule=rule_of(spec),
    )


@functools.cache
def _launchers(
    variant: config.Variant, launch: config.Launch
) -> tuple[tuple[Launcher, int, int], ...]:
    """The kernels of a call, in order, each with its programs a row, on the grid's axes."""
    made = []
    for stage in config.stages(variant, launch):
        launcher = stage_launcher(variant, launch, stage)
        count = programs_a_row(variant, launch, stage)
        made.append((launcher, *((count, 1) if stage == "joint" else (1, count))))
    return tuple(made)


def stage_launcher(variant: config.Variant, launch: config.Launch, stage: str) -> Launcher:
    plan = config.plan(variant, launch, stage, device.TARGET)
    options = config.options(launch, device.TARGET, plan)
    return Launcher(programs.row_kernel, {"plan": plan}, options)


def programs_a_row(variant: config.Variant, launch: config.Launch, stage: str) -> int:
    # Without a gradient the last stage is left with one loss per row.
    return 1 if stage == "gradient" and variant.grad is None else launch.pieces


def layout(student: Tensor, teacher: Tensor, grad: Tensor | None) -> dict[str, int]:
    _, length, columns = student.shape
    (s_b, s_t, _), (t_b, t_t, _) = student.stride(), teacher.stride()
    g_b, g_t = (s_b, s_t) if grad is None else grad.stride()[:2]
    return {
        "length": length,
        "s_b": s_b,
        "s_t": s_t,
        "t_b": t_b,
        "t_t": t_t,
        "g_b": g_b,
        "g_t": g_t,
        "columns": columns,
    }


@functools.lru_cache(maxsize=64)
def numbers(spec: LossSpec) -> dict[str, float | int]:
    """What a kernel is told of the hyper-parameters; a training repeats them."""
    own = _seven(spec.divergence.params)
    a, b, weight, constant = *own[:2], 1.0, 0.0
    if spec.divergence.name in ("alpha", "mixed_kl"):  # of a sum of 1
        b = 1.0 - a
    tape = spec.divergence.tape
    if tape is not None and (known := simplified(tape).known):
        a, b, weight, constant = known.numbers(own)
    of_rule = () if spec.row_rule is None else spec.row_rule.params
    return {
        "vocab": spec.vocab_size,
        "offset": 0,
        "total": spec.vocab_size,
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
        "z_weight": float(spec.z_loss_weight),
        "a": a,
        "b": b,
        "weight": weight,
        "constant": constant,
        **{f"own_{i}": number for i, number in enumerate(own)},
        **{f"rule_{i}": number for i, number in enumerate(_seven(of_rule))},
    }


def _seven(parameters: tuple[float, ...]) -> tuple[float, ...]:
    return (*map(float, parameters), *[0.0] * MOST_PARAMETERS)[:MOST_PARAMETERS]


def name_of(divergence: Divergence) -> str:
    """What its functions are found by."""
    return divergence.key or divergence.name


def dense_name(divergence: Divergence) -> str:
    """The same for dense rows, of which the default JSD has a kernel of its own."""
    name = name_of(divergence)
    return "jsd_half" if name == "jsd" and divergence.params == (0.5,) else name


def rule_of(spec: LossSpec) -> str | None:
    """The key of a row rule that has a say."""
    return spec.row_rule.key if spec.row_rule is not None and spec.kd_scale else None


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
    batch, length, columns = grad.shape
    launcher, tile = _scale_launcher(grad.dtype)
    # Programs enough to fill the GPU eight times over, each with more than one tile where possible;
    # when the factor is 1 all that they do is find that out.
    most = min(-(-columns // tile), 65535)
    per_row = min(most, -(-8 * device.processors(grad.device) // (batch * length)))
    arguments = {
        "x": grad,
        "factor": factor,
        "length": length,
        "x_b": grad.stride(0),
        "x_t": grad.stride(1),
        "columns": columns,
        "factor_step": 1 if factor.dim() else 0,
    }
    with device.guard(grad):
        launcher((batch * length, per_row), arguments)


@functools.cache
def _scale_launcher(dtype: torch.dtype) -> tuple[Launcher, int]:
    """And the columns of a tile."""
    plan = config.scale_plan(dtype, device.TARGET)
    options = config.options(config.SCALE, device.TARGET)
    return Launcher(programs.scale_kernel, {"plan": plan}, options), plan.lanes * plan.width


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
