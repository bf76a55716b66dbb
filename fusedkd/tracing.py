"""The work of a call, and the custom op that stands for it when a graph is traced: tensors and
plain numbers in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd.chunks import run
from fusedkd.divergences import make
from fusedkd.gradients import stored_dtype
from fusedkd.inputs import Inputs, Plan, Wanted
from fusedkd.modes import stand_in
from fusedkd.row_rules import by_key
from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

# What reaches the op in one tensor; the transforms, the divergence's parameters and the row rule's
# follow.
NUMBERS = (
    *("temperature", "teacher_temperature", "kd_weight", "ce_weight", "label_smoothing"),
    "z_loss_weight",
)
# What reaches it by name, and is part of the graph.
SPEC = ("vocab_size", "scale_by_t2", "ignore_index", "reduction")
PLAN = ("backend", "tail", "chunk_bytes", "num_counted", "autocast")
REST = ("divergence", "row_rule", "numbers", "wanted", *SPEC, *PLAN)  # after the tensors


@torch.library.custom_op("fusedkd::forward", mutates_args=())
def _op(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_indices: Tensor | None,
    student_ids: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    divergence: str,
    row_rule: str | None,
    numbers: Tensor,
    wanted: list[bool],
    vocab_size: int,
    scale_by_t2: bool,
    ignore_index: int,
    reduction: str,
    backend: str | None,
    tail: str | None,
    chunk_bytes: int | None,
    num_counted: int | None,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    inputs = Inputs(
        *(student, student_weight, student_bias),
        *(teacher, teacher_weight, teacher_bias),
        *(teacher_indices, student_ids, teacher_ids, labels),
        row_scale,
    )
    plain = numbers.tolist()  # in the host's memory on every device: nothing waits
    named = dict(zip(NUMBERS, plain, strict=False))
    s_scale, s_softcap, t_scale, t_softcap, *parameters = plain[len(NUMBERS) :]
    rule = None if row_rule is None else by_key(row_rule, parameters)
    if rule is not None:
        parameters = parameters[: len(parameters) - len(rule.params)]
    spec = LossSpec(
        make(divergence, *parameters),
        vocab_size,
        **named,
        scale_by_t2=scale_by_t2,
        ignore_index=ignore_index,
        reduction=reduction,
        student_transform=Transform(s_scale, s_softcap),
        teacher_transform=Transform(t_scale, t_softcap),
        row_rule=rule,
    )
    plan = Plan(
        Wanted(*wanted),
        backend=backend,
        tail=tail,
        chunk_bytes=chunk_bytes,
        num_counted=num_counted,
        autocast=autocast,
    )
    return run(inputs, spec, plan)


@_op.register_fake
def _(*arguments: Any, **named: Any) -> list[Tensor]:
    tensors, rest = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    named |= dict(zip(REST, rest, strict=False))
    inputs, want = Inputs(*tensors), Wanted(*named["wanted"])
    row_scale = inputs.row_scale
    none = named["reduction"] == "none"
    result = [torch.empty_like(row_scale) if none else row_scale.new_empty(())]
    if want.metrics:
        result.append(row_scale.new_empty(len(METRIC_COLUMNS)))
    head = inputs.student_weight is not None
    result += [
        x.new_empty(x.shape, dtype=stored_dtype(x, head))
        for x, made in zip(inputs[:3], want[:3], strict=True)
        if made and x is not None
    ]
    if want.hidden and not head and inputs.student.dtype == torch.float16:
        result.append(row_scale.new_empty(row_scale.numel(), dtype=torch.float32))
    return result


def dispatch(inputs: Inputs, spec: LossSpec, plan: Plan) -> list[Tensor]:
    """The work of a call (see :func:`fusedkd.chunks.run`), or the op in its place."""
    if stand_in(*inputs):
        if spec.divergence.key is None:
            raise ValueError(
                f"divergence={spec.divergence!r} is made by hand, and cannot be traced: expected "
                "one of fusedkd.divergences, or one that @divergences.custom made, under "
                "torch.compile, torch.func, torch.fx and fake tensors."
            )
        return torch.ops.fusedkd.forward(
            *inputs,
            divergence=spec.divergence.key,
            row_rule=None if spec.row_rule is None else spec.row_rule.key,
            numbers=_packed(spec, inputs.row_scale),
            wanted=list(plan.wanted),
            **{name: getattr(spec, name) for name in SPEC},
            **{name: getattr(plan, name) for name in PLAN},
        )
    return run(inputs, spec, plan)


def _packed(spec: LossSpec, like: Tensor) -> Tensor:
    """(10 + all parameters,) fp64 in the host's memory. A product with a tensor is what dynamo
    keeps symbolic: a number passed as such, or in a list, is burnt into the graph, and a schedule
    of temperatures recompiles until dynamo gives up."""
    numbers = [getattr(spec, name) for name in NUMBERS]
    numbers += [*spec.student_transform, *spec.teacher_transform, *spec.divergence.params]
    numbers += () if spec.row_rule is None else spec.row_rule.params
    one = like.new_ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * x for x in numbers])
