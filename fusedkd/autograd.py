"""The autograd function, and the custom op that stands for its work when a graph is traced.

The gradient is made in the forward, while logits are at hand, so a head costs four matrix products
(two forward, two for the gradients) and never keeps a logit. The backward only multiplies by the
upstream gradient. Two cases differ:

* ``reduction="none"`` with a student head: the upstream gradient is per token, and enters the
  weight gradient's sum over tokens, so the chunks are computed again in the backward (6 products);
* fp16: the stored gradient is that of tokens that weigh 1 at most, and what a head adds up over
  tokens stays in fp32, until the backward multiplies and rounds. 1e-4 * (q - p) is below what fp16
  can hold, where loss scaling comes too late to save it; the sum over 20,000 tokens is above.

There is no mode that computes everything again to save memory, for it would save none: the backward
begins where the forward ended, with every activation alive, and would hold there what the forward
holds here. What makes a head's call smaller is ``chunk_bytes``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fusedkd import backends
from fusedkd.chunks import Inputs, Wanted, as_rows, in_place, run, stored_dtype
from fusedkd.divergences import make
from fusedkd.spec import METRIC_COLUMNS, LossSpec, Transform

__all__ = ["fused_loss"]


def fused_loss(
    inputs: tuple[Tensor | None, ...],
    labels: Tensor | None,
    weights: Tensor,
    divisor: Tensor | None,
    spec: LossSpec,
    metrics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, with a graph, and the (N, 7) metric rows if wanted.

    Args:
        inputs: student, its head's weight and bias, teacher, its head's weight and bias, the ids
            that a sparse teacher's log-probabilities belong to.
        labels: (N,) or None.
        weights: (N,) in the accumulation type, 0 where the token does not count.
        divisor: 0-d, what the weighted sum is divided by, or None.
    """
    student = inputs[0]
    assert student is not None
    if spec.inplace and _traced():
        spec = dataclasses.replace(spec, inplace=False)
    grad = torch.is_grad_enabled()
    hidden, weight, bias = (grad and t is not None and t.requires_grad for t in inputs[:3])
    wanted = Wanted(hidden, weight, bias, metrics)
    row_scale, post = weights, None
    if divisor is not None:
        if torch.float16 in (student.dtype, spec.autocast) and weights.numel():
            largest = weights.abs().amax()
            post = torch.where(largest != 0, largest / divisor, 0.0)
            row_scale = torch.where(weights != 0, weights / largest, 0.0)
        else:
            row_scale = torch.where(weights != 0, weights / divisor, 0.0)
    function = _FusedLoss if _traced() else _EagerLoss
    loss, *rest = function.apply(*inputs, labels, row_scale, post, spec, wanted)
    return loss, rest[0] if metrics else None


class _FusedLoss(torch.autograd.Function):
    """Inputs: the fields of Inputs, row_scale, post, spec, wanted. Outputs: the loss, metric rows
    if wanted, then the gradients made in the forward, which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
        student: Tensor,
        student_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        teacher_indices: Tensor | None,
        labels: Tensor | None,
        row_scale: Tensor,
        post: Tensor | None,
        spec: LossSpec,
        wanted: Wanted,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(
            student,
            student_weight,
            student_bias,
            teacher,
            teacher_weight,
            teacher_bias,
            teacher_indices,
            labels,
        )
        if _deferred(inputs, spec):
            wanted = Wanted(False, False, False, wanted.metrics)
        loss, *rest = _dispatch(inputs, row_scale, spec, wanted)
        if spec.reduction != "none":
            loss = loss.sum(dtype=torch.float64).to(row_scale.dtype)
            loss = loss if post is None else loss * post
        return loss, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, row_scale, post, spec, wanted = inputs
        ctx.spec, ctx.wanted = spec, wanted
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.deferred = _deferred(Inputs(*tensors), spec)
        if not wanted.any_gradient:
            return
        if ctx.deferred:
            ctx.save_for_backward(*tensors, row_scale)
        elif in_place(Inputs(*tensors), spec, wanted):
            ctx.save_for_backward(tensors[0], post)  # holds its gradient by now
        else:
            ctx.save_for_backward(*output[1 + wanted.metrics :], post)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        arguments = len(ctx.needs_input_grad)
        if upstream is None:
            return (None,) * arguments
        if ctx.deferred:
            *tensors, row_scale = ctx.saved_tensors
            scale = torch.where(row_scale != 0, row_scale * upstream.to(row_scale.dtype), 0.0)
            wanted = ctx.wanted._replace(metrics=False)
            grads = iter(_dispatch(Inputs(*tensors), scale, ctx.spec, wanted)[1:])
        else:
            *saved, post = ctx.saved_tensors
            factor = upstream if post is None else upstream * post
            grads = iter([_scaled(grad.detach(), factor, ctx.spec) for grad in saved])
        kept = zip(ctx.dtypes, ctx.wanted[:3], strict=True)
        made = [next(grads).to(dtype) if want else None for dtype, want in kept]
        return *made, *(None,) * (arguments - len(made))


class _EagerLoss(torch.autograd.Function):
    """The same in the form that torch.func cannot take: it spares each call the binding of its
    arguments, 23 us (of 300 at 8 x 1,000, 2026-11-24)."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = _FusedLoss.forward(*arguments)
        _FusedLoss.setup_context(ctx, arguments, output)
        return output

    backward = _FusedLoss.backward  # type: ignore[assignment]


def _deferred(inputs: Inputs, spec: LossSpec) -> bool:
    return spec.reduction == "none" and inputs.student_weight is not None


def _traced() -> bool:
    """Whether tensors may be stand-ins without memory: dynamo's, or torch.func's wrappers."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _scaled(grad: Tensor, factor: Tensor, spec: LossSpec) -> Tensor:
    """grad * factor: in grad's own memory when this is the graph's last backward."""
    if _traced():
        rowwise = factor.view(*grad.shape[:-1], 1) if factor.dim() else factor
        return (grad * rowwise).to(grad.dtype)
    # Kept graphs may run backward again, and the caller may still hold what we return.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()
    if grad.numel():
        # The upstream gradient of a sum is one number, expanded to every token.
        factor = factor.reshape(-1).contiguous() if factor.dim() else factor
        backends.resolve(spec.backend, grad.device).scale_(as_rows(grad), factor)
    return grad


# ----------------------------------------------------------------------------------------------
# The same as a custom op, for tracing: tensors and plain numbers in, tensors out.


@torch.library.custom_op("fusedkd::forward", mutates_args=())
def _op(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
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
    *tensors, row_scale, _names, _numbers, _integers, flags = arguments
    inputs, wanted = Inputs(*tensors), Wanted(*flags)
    result = [torch.empty_like(row_scale)]
    if wanted.metrics:
        result.append(row_scale.new_empty(row_scale.numel(), len(METRIC_COLUMNS)))
    return result + [
        x.new_empty(x.shape, dtype=stored_dtype(x, i == 0))
        for i, (x, want) in enumerate(zip(inputs[:3], wanted[:3], strict=True))
        if want and x is not None
    ]


def _dispatch(inputs: Inputs, row_scale: Tensor, spec: LossSpec, wanted: Wanted) -> list[Tensor]:
    if _traced():
        return torch.ops.fusedkd.forward(*inputs, row_scale, *_pack(spec), list(wanted))
    if spec.autocast is None:
        return run(inputs, row_scale, spec, wanted)
    with torch.autocast(row_scale.device.type, enabled=False):  # casts are made explicitly
        return run(inputs, row_scale, spec, wanted)


def _pack(spec: LossSpec) -> tuple[str, Tensor, list[int]]:
    s, t = spec.student_transform, spec.teacher_transform
    autocast = "none" if spec.autocast is None else str(spec.autocast).removeprefix("torch.")
    named = (spec.divergence.name, spec.reduction, spec.backend, autocast, spec.tail)
    names = " ".join(name or "none" for name in named)
    numbers = [spec.temperature, spec.teacher_temperature, spec.kd_weight, spec.ce_weight]
    numbers += [spec.label_smoothing, s.scale, s.softcap, t.scale, t.softcap]
    integers = [spec.vocab_size, int(spec.scale_by_t2), spec.ignore_index, spec.chunk_bytes or 0]
    # A product with a tensor is what dynamo keeps symbolic: a number passed as such, or in a list,
    # is burnt into the graph, and a schedule of temperatures recompiles until dynamo gives up.
    one = torch.ones((), dtype=torch.float64)
    return names, torch.stack([one * x for x in (*numbers, *spec.divergence.params)]), integers


def _unpack(names: str, numbers: Tensor, integers: list[int]) -> LossSpec:
    name, reduction, backend, autocast, tail = names.split()
    vocab_size, t2, ignore_index, chunk_bytes = integers
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
        backend=None if backend == "none" else backend,
        autocast=None if autocast == "none" else getattr(torch, autocast),
    )
