"""The autograd function.

The gradient is made in the forward, while logits are at hand, so a head costs four matrix products
(two forward, two for the gradients) and never keeps a logit. The backward only multiplies by the
upstream gradient, and rounds what a half-precision head has kept in fp32. Three cases differ:

* ``reduction="none"`` with a student head that is trained: the upstream gradient is per token, and
  enters the weight gradient's sum over tokens, so the chunks are computed again in the backward (6
  products). With a frozen head each token's gradient is only multiplied;
* a half-precision head whose logits' gradient is one block, and smaller than dW in fp32: it is kept
  instead, and dW is made in the backward, rounded piece by piece. The same four products;
* dense logits in fp16: each row's gradient is kept at a power of two of its own, which the backward
  takes out again (:mod:`fusedkd.fp16`).

There is no mode that computes everything again to save memory, for it would save none: the backward
begins where the forward ended, with every activation alive, and would hold there what the forward
holds here. What makes a head's call smaller is ``chunk_bytes``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _functions

from fusedkd import backends
from fusedkd.call import Call
from fusedkd.chunks import in_place, run
from fusedkd.gradients import weight_gradient
from fusedkd.inputs import Inputs, Plan, Wanted
from fusedkd.modes import in_functorch, stand_in
from fusedkd.spec import LossSpec
from fusedkd.strides import as_rows
from fusedkd.tracing import dispatch


def fused_loss(call: Call) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, with a graph, and the sums (7,) of the metrics if wanted."""
    function = _FusedLoss if call.traced else _EagerLoss
    loss, *rest = function.apply(*call.inputs, call.spec, call.plan)
    return loss, rest[0] if call.plan.wanted.metrics else None


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd function: its results cannot be differentiated, and say so
    under ``create_graph=True``. torch's own are constants where the upstream gradient is one, and
    second derivatives then 0 without a word. ``ctx.roots``, see :func:`roots`, is what they depend
    on. Under torch.func's transforms it is the gradients' own upstream gradients that tell.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Any) -> Any:
        if not torch.is_grad_enabled() or in_functorch():
            return backward(ctx, *upstream)
        with torch.no_grad():
            results = backward(ctx, *upstream)
        several = results if isinstance(results, tuple) else (results,)
        refusing = _functions.DelayedError(SECOND.encode(), len(several) + len(ctx.roots))
        return refusing(*several, *ctx.roots)[: len(several)]

    return wrapper


def roots(*inputs: Tensor | None) -> list[Tensor]:
    """Empty tensors that depend on those of the inputs that require grad, and keep no memory."""
    with torch.enable_grad():
        return [x.narrow_copy(0, 0, 0) for x in inputs if x is not None and x.requires_grad]


SECOND = (
    "fusedkd makes gradients in the forward, and they cannot be differentiated again "
    "(once_differentiable): expected first derivatives only. For second ones, write the formula in "
    "plain torch, on logits."
)


class _FusedLoss(torch.autograd.Function):
    """Inputs: the fields of Inputs, spec, plan. Outputs: the loss, the metrics if wanted, then what
    the backward needs of the gradients, which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
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
        spec: LossSpec,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        inputs = Inputs(
            student,
            student_weight,
            student_bias,
            teacher,
            teacher_weight,
            teacher_bias,
            teacher_indices,
            student_ids,
            teacher_ids,
            labels,
            row_scale,
        )
        return tuple(dispatch(inputs, spec, _in_forward(spec, plan)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, spec, plan = inputs
        wanted = plan.wanted
        ctx.spec, ctx.plan = spec, plan
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        nested = in_functorch()
        ctx.mark_non_differentiable(*output[1 : 1 + wanted.metrics if nested else None])
        ctx.set_materialize_grads(False)
        ctx.deferred = _deferred(spec, wanted)
        if not wanted.any_gradient:
            return
        ctx.roots = roots(*tensors[:3])
        if ctx.deferred:
            ctx.save_for_backward(*tensors)
            return
        made = output[1 + wanted.metrics :]
        if spec.reduction == "none":
            made = (*made, tensors[-1])
        if in_place(Inputs(*tensors), plan):
            made = (tensors[0], *made)  # holds its gradient by now
        ctx.save_for_backward(*made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *rest: Tensor | None) -> tuple[Any, ...]:
        if in_functorch() and any(x is not None for x in rest):
            raise RuntimeError(SECOND)
        arguments = len(ctx.needs_input_grad)
        if upstream is None:
            return (None,) * arguments
        wanted = ctx.plan.wanted
        kept = [x for x, want in zip(ctx.dtypes, wanted[:3], strict=True) if want]
        if ctx.deferred:
            *tensors, row_scale = ctx.saved_tensors
            scale = (row_scale * upstream.to(row_scale.dtype)).masked_fill(row_scale == 0, 0.0)
            again = _Again.apply if in_functorch() else _Again.forward
            # an upstream 0 counts no more
            plan = ctx.plan._replace(wanted=wanted._replace(metrics=False), num_counted=None)
            grads = again(*tensors, scale, ctx.spec, plan)
            results = [x.to(dtype) for x, dtype in zip(grads, kept, strict=True)]
        else:
            saved = list(ctx.saved_tensors)
            if ctx.spec.reduction == "none":  # what comes for tokens that do not count may be NaN
                upstream = upstream.masked_fill((saved.pop() == 0).view(upstream.shape), 0.0)
            grads, more = saved[: len(kept)], saved[len(kept) :]
            late = bool(more) and wanted.weight
            if more and not late:  # the powers of dense fp16 rows
                upstream = upstream / more[0].view(upstream.shape if upstream.dim() else (-1,))
            results = [
                _multiplied(x, more, upstream, dtype, ctx.plan.backend)
                if late and i == wanted.hidden
                else scaled(x, upstream, dtype, ctx.plan.backend)
                for i, (x, dtype) in enumerate(zip(grads, kept, strict=True))
            ]
        made = iter(results)
        grads_of = [next(made) if want else None for want in wanted[:3]]
        return *grads_of, *(None,) * (arguments - len(grads_of))


class _EagerLoss(torch.autograd.Function):
    """The same in the form that torch.func cannot take: it spares each call the binding of its
    arguments, 23 us (of 300 at 8 x 1,000, 2026-11-24), and outputs that nobody is given."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, spec, plan = arguments
        how = _in_forward(spec, plan)
        if how.wanted.weight:
            how = how._replace(late=True)
        output = tuple(run(Inputs(*tensors), spec, how))
        _FusedLoss.setup_context(ctx, arguments, output)
        return output[: 1 + plan.wanted.metrics]

    backward = _FusedLoss.backward  # type: ignore[assignment]


class _Again(torch.autograd.Function):
    """The gradients of a deferred call, made in the backward."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, spec, plan = arguments
        return tuple(dispatch(Inputs(*tensors), spec, plan)[1:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(SECOND)


def _in_forward(spec: LossSpec, plan: Plan) -> Plan:
    """Without the gradients that only the backward can make."""
    if not _deferred(spec, plan.wanted):
        return plan
    return plan._replace(wanted=Wanted(False, False, False, plan.wanted.metrics))


def _deferred(spec: LossSpec, wanted: Wanted) -> bool:
    """Whether a sum over tokens is wanted of which each has an upstream gradient of its own."""
    return spec.reduction == "none" and (wanted.weight or wanted.bias)


def _multiplied(
    grad: Tensor, rest: list[Tensor], factor: Tensor, dtype: torch.dtype, backend: Any
) -> Tensor:
    """dW of its factors (see :meth:`fusedkd.gradients.Gradients.results`), times ``factor``."""
    states, *powers = rest
    for power in powers:
        factor = factor / power
    if stand_in(grad, states, factor):
        return (grad.T.to(factor.dtype) @ states.to(factor.dtype) * factor).to(dtype)
    return weight_gradient(grad, states, factor, dtype, backends.resolve(backend, grad.device))


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype, backend: Any) -> Tensor:
    """grad * factor in ``dtype``: in grad's own memory where that is right and this is the graph's
    last backward."""
    if stand_in(grad, factor):  # which may be later than the forward
        rowwise = factor.view(*grad.shape[:-1], 1) if factor.dim() else factor
        return (grad * rowwise).to(dtype)
    # Kept graphs may run backward again, and the caller may still hold what we return.
    kept = torch._C._autograd._get_current_graph_task_keep_graph()
    kernels = backends.resolve(backend, grad.device)
    out = None
    if kept or dtype != grad.dtype:
        out = kernels.empty(grad.shape, dtype=dtype, device=grad.device)
    if grad.numel():
        # The upstream gradient of a sum is one number, expanded to every token.
        factor = factor.reshape(-1).contiguous() if factor.dim() else factor
        kernels.scale_(as_rows(grad), factor, None if out is None else as_rows(out))
    return grad if out is None else out
