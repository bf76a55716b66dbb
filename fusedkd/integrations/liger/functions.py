"""Losses as subclasses of ``torch.autograd.Function``, for code that calls ``SomeFunction.apply``
or derives from one, as code around Liger-Kernel does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fusedkd.autograd import once_differentiable, roots


class LossFunction(torch.autograd.Function):
    """``loss`` with ``apply``, ``forward`` and ``backward``: a function of tensors and numbers that
    autograd differentiates, to a tensor, or to several of which the first ``graded`` have a
    gradient."""

    loss: Any
    graded = 1

    @classmethod
    def forward(cls, ctx: Any, *args: Any) -> Any:
        """The loss; the graph is kept for :meth:`backward`."""
        ctx.given = [
            x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args
        ]
        with torch.enable_grad():
            found = cls.loss(*ctx.given)
        ctx.roots = roots(*(x for x in args if isinstance(x, Tensor)))
        found = found if isinstance(found, tuple) else (found,)
        ctx.found, rest = found[: cls.graded], found[cls.graded :]
        ctx.mark_non_differentiable(*rest)
        values = (*(x.detach() for x in ctx.found), *rest)
        return values if len(values) > 1 else values[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:
        """A gradient, or None, for each argument of :meth:`forward`."""
        wanted = [isinstance(x, Tensor) and x.requires_grad for x in ctx.given]
        inputs = [x for x, want in zip(ctx.given, wanted, strict=True) if want]
        found, given = ctx.found, upstream[: len(ctx.found)]
        grads = iter(
            torch.autograd.grad(found, inputs, given, retain_graph=True, allow_unused=True)
        )
        return tuple(next(grads) if want else None for want in wanted)


def as_function(name: str, loss: Callable[..., Any], graded: int = 1) -> type[LossFunction]:
    """The :class:`LossFunction` of a loss."""
    members = {"loss": staticmethod(loss), "graded": graded, "__doc__": loss.__doc__}
    return type(name, (LossFunction,), members)


class DistillationFunction(LossFunction):
    """Liger's ``LigerFusedLinearDistillationBase``: a subclass may put another divergence of logits
    into ``distillation_loss_fn``. It is then called for a chunk of rows after the other."""

    fused: Callable[..., Any]  # the loss where nobody put another
    # (L, V) logits of both, divided by the temperature; beta, target and ignore_index by name: to
    # the sum over rows that count
    distillation_loss_fn: Callable[..., Tensor]

    @classmethod
    def loss(cls, *args: Any) -> Any:
        """Liger's arguments, in their order."""
        own = next(c for c in cls.__mro__ if "distillation_loss_fn" in vars(c))
        return cls.fused(*args) if "fused" in vars(own) else _in_chunks(cls, *args)


def counted(rows: Tensor, target: Tensor | None, ignore_index: int | None) -> Tensor:
    """(L,) with 0 where the target is ``ignore_index``."""
    if target is None or ignore_index is None:
        return rows
    return rows.masked_fill(target == ignore_index, 0.0)


def _in_chunks(
    function: type[DistillationFunction],
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Any:
    """Logits of ``chunk_size`` rows at a time, made once more in the backward."""
    hardly = weight_hard_loss or return_soft_hard_loss

    def chunk(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        s = F.linear(s, student_weight, student_bias)
        t = F.linear(t, teacher_weight, teacher_bias).detach()
        options = {"target": y, "ignore_index": ignore_index, "beta": beta}
        soft = function.distillation_loss_fn(s / temperature, t / temperature, **options)
        if not hardly:
            return torch.stack([soft, soft.new_zeros(())])
        hard = F.cross_entropy(s.float(), y, reduction="sum", ignore_index=ignore_index)
        return torch.stack([soft.to(hard.dtype), hard])

    rows = (student_input, teacher_input, true_labels)
    chunks = zip(*(x.chunk(max(1, len(x) // chunk_size)) for x in rows), strict=True)
    sums = torch.stack([checkpoint(chunk, *part, use_reentrant=False) for part in chunks]).sum(0)
    soft, hard = sums / (true_labels != ignore_index).sum().clamp(min=1)
    loss = weight_soft_loss * soft + weight_hard_loss * hard
    return (loss, soft.detach(), hard.detach()) if return_soft_hard_loss else loss
