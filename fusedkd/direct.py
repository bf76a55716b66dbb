"""Plain logits in one operation of the backend, where it has one: what a small call costs is its
steps (8 x 1,000 on a CPU: 43 us, of which an empty autograd function takes 17, for 160 the general
way; on the host of a GPU whose driver launches nothing 67 for 150; AMD Zen 5, 2026-11-28).

Whatever is out of the ordinary, mistakes among it, takes the general way, and is told there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedkd import backends, debug
from fusedkd.autograd import once_differentiable, roots, scaled
from fusedkd.call import NO_GRADIENT, Arguments
from fusedkd.checks import DTYPES, LARGEST_TEMPERATURE, SMALLEST_TEMPERATURE
from fusedkd.modes import stand_in
from fusedkd.spec import IDENTITY

Reduced = Callable[[Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None] | None]


def direct_loss(given: Arguments) -> Tensor | None:
    """The loss, with a graph, of a call that is all plain; None for any other."""
    student, teacher, labels = given.student, given.teacher, given.labels
    if (
        stand_in(student, teacher, labels)  # type: ignore[arg-type]  # which a head is, too
        or not isinstance(student, Tensor)
        or not isinstance(teacher, Tensor)
        or not _plain_logits(student, teacher)
        or not (_plain_labels(student, labels) if labels is not None else not given.ce_weight)
        or not (given.token_weights is given.normalizer is given.num_counted is given.group is None)
        or given.row_rule is not None
        or debug.ENABLED
    ):
        return None
    try:
        reduced = _reduced(student.device, *given[3:])
    except (TypeError, ValueError):  # not to be remembered, or not to be had
        return None
    wanted = torch.is_grad_enabled() and student.requires_grad
    made = reduced(student.detach(), teacher, labels, wanted) if reduced else None
    if made is None or not wanted:
        return made and made[0]
    loss: Tensor = _Direct.apply(student, made, given.backend)
    return loss


def _plain_logits(student: Tensor, teacher: Tensor) -> bool:
    return (
        _is_plain(student, student.device)
        and _is_plain(teacher, student.device)
        and student.dtype in DTYPES
        and teacher.dtype in DTYPES
        and student.dtype is not torch.float16  # whose gradients have powers of their own
        and student.shape == teacher.shape
        and student.dim() > 0 < student.numel()
        and not teacher.requires_grad
        and forward_ad._current_level < 0
    )


def _plain_labels(student: Tensor, labels: Tensor) -> bool:
    right = labels.dtype is torch.int64 and labels.shape == student.shape[:-1]
    return right and _is_plain(labels, student.device)


def _is_plain(x: Tensor, device: torch.device) -> bool:
    """Whether its numbers lie in the device's memory, in order."""
    return (
        (x.is_cpu or x.is_cuda)
        and x.device == device
        and x.layout is torch.strided
        and not x.is_nested
        and x.is_contiguous()
    )


@functools.lru_cache(maxsize=64, typed=True)  # of each argument: True is no 1
def _reduced(device: torch.device, *rest: Any) -> Reduced | None:
    """The operation for all that is given beside the tensors, once that is checked.

    Raises:
        ValueError, TypeError: something that the general way refuses.
    """
    given = Arguments(torch.empty(0), None, None, *rest)
    spec, plan = given.spec(1, IDENTITY, IDENTITY), given.plan(NO_GRADIENT)
    usual = (
        given.vocab_size is None
        and not plan.inplace
        and not isinstance(plan.backend, backends.CustomRows)
        and spec.divergence.key is not None
        and spec.reduction != "none"
        and spec.kd_scale > 0
        and all(
            SMALLEST_TEMPERATURE <= heat <= LARGEST_TEMPERATURE[torch.float32]
            for heat in (spec.temperature, spec.teacher_temperature)
        )
    )
    backend = backends.resolve(plan.backend, device)
    has: Callable[[Any], Reduced] | None = getattr(backend, "reduced", None)
    return has(spec) if has and usual else None


class _Direct(torch.autograd.Function):
    """Of the student's logits, and of the loss and the gradient that were made of them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, made: tuple[Tensor, Tensor], backend: Any) -> Tensor:
        loss, grad = made
        ctx.backend = backend
        ctx.roots = roots(student)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return scaled(grad, upstream, grad.dtype, ctx.backend), None, None
