"""The work of a call, and the custom op that stands for it when a graph is traced: tensors and
plain numbers in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd.chunks import run
from fusedkd.divergences import make
from fusedkd.gradients import stored_dtype
from fusedkd.inputs import Inputs, Wanted
from fusedkd.modes import stand_in
from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

__all__ = ["dispatch"]


@torch.library.custom_op("fusedkd::forward", mutates_args=())
def _op(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_indices: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    names: str,
    numbers: Tensor,
    integers: list[int],
    wanted: list[bool],
) -> list[Tensor]:
    inputs = Inputs(
        *(student, student_weight, student_bias),
        *(teacher, teacher_weight, teacher_bias),
        *(teacher_indices, labels),
    )
    return run(inputs, row_scale, _unpack(names, numbers, integers), Wanted(*wanted))


@_op.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *tensors, row_scale, names, _numbers, _integers, flags = arguments
    inputs, wanted = Inputs(*tensors), Wanted(*flags)
    none = "none" in names.split()[1:2]
    result = [torch.empty_like(row_scale) if none else row_scale.new_empty(())]
    if wanted.metrics:
        result.append(row_scale.new_empty(len(METRIC_COLUMNS)))
    head = inputs.student_weight is not None
    result += [
        x.new_empty(x.shape, dtype=stored_dtype(x, head))
        for x, want in zip(inputs[:3], wanted[:3], strict=True)
        if want and x is not None
    ]
    if wanted.hidden and not head and inputs.student.dtype == torch.float16:
        result.append(row_scale.new_empty(row_scale.numel(), dtype=torch.float32))
    return result


def dispatch(inputs: Inputs, row_scale: Tensor, spec: LossSpec, wanted: Wanted) -> list[Tensor]:
    if stand_in(*inputs):
        return torch.ops.fusedkd.forward(*inputs, row_scale, *_pack(spec, row_scale), list(wanted))
    if spec.autocast is None:
        return run(inputs, row_scale, spec, wanted)
    with torch.autocast(row_scale.device.type, enabled=False):  # casts are made explicitly
        return run(inputs, row_scale, spec, wanted)


def _pack(spec: LossSpec, like: Tensor) -> tuple[str, Tensor, list[int]]:
    s, t = spec.student_transform, spec.teacher_transform
    autocast = "none" if spec.autocast is None else str(spec.autocast).removeprefix("torch.")
    if not spec.divergence.builtin:
        raise ValueError(
            f"divergence={spec.divergence!r} is your own, and cannot be traced: expected one of "
            "fusedkd.divergences under torch.compile, torch.func, torch.fx and fake tensors."
        )
    named = (spec.divergence.name, spec.reduction, spec.backend, autocast, spec.tail)
    names = " ".join(name or "none" for name in named)
    numbers = [spec.temperature, spec.teacher_temperature, spec.kd_weight, spec.ce_weight]
    numbers += [spec.label_smoothing, s.scale, s.softcap, t.scale, t.softcap]
    integers = [spec.vocab_size, int(spec.scale_by_t2), spec.ignore_index, spec.chunk_bytes or 0]
    integers.append(-1 if spec.num_counted is None else spec.num_counted)
    # A product with a tensor is what dynamo keeps symbolic: a number passed as such, or in a list,
    # is burnt into the graph, and a schedule of temperatures recompiles until dynamo gives up.
    one = like.new_ones((), dtype=torch.float64, device="cpu")
    return names, torch.stack([one * x for x in (*numbers, *spec.divergence.params)]), integers


def _unpack(names: str, numbers: Tensor, integers: list[int]) -> LossSpec:
    name, reduction, backend, autocast, tail = names.split()
    vocab_size, t2, ignore_index, chunk_bytes, num_counted = integers
    plain = numbers.tolist()  # in the host's memory on every device: nothing waits
    temperature, teacher_temperature, kd_weight, ce_weight, smoothing, *transforms = plain[:9]
    return LossSpec(
        make(name, *plain[9:]),
        vocab_size,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        scale_by_t2=bool(t2),
        ignore_index=ignore_index,
        label_smoothing=smoothing,
        reduction=reduction,
        student_transform=Transform(*transforms[:2]),
        teacher_transform=Transform(*transforms[2:]),
        tail=None if tail == "none" else tail,
        chunk_bytes=chunk_bytes or None,
        num_counted=None if num_counted < 0 else num_counted,
        backend=None if backend == "none" else backend,
        autocast=None if autocast == "none" else getattr(torch, autocast),
    )
