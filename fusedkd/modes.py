"""What tensors are in the mode that a call runs in: numbers in memory, or stand-ins for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))

in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active


def is_watched() -> bool:
    """Whether a call does its own work on tensors without memory, for a mode that adds up what it
    would take (:class:`fusedkd.plan.watch.Watch`)."""
    if torch.compiler.is_compiling():  # whose graphs cannot hold the question
        return False
    return bool(getattr(_get_current_dispatch_mode(), "as_if_real", False))


def stand_in(*tensors: Tensor | None) -> bool:
    """Whether tensors may be stand-ins without memory: dynamo's, torch.func's wrappers, fake ones;
    or whether somebody wants to see every operation (torch.fx, memory estimators); but see
    :func:`is_watched`."""
    if torch.compiler.is_compiling() or in_functorch() or torch._C._len_torch_dispatch_stack():
        return not is_watched()
    for x in tensors:  # noqa: SIM110 - a generator would cost a small call 2 us
        if type(x) not in _PLAIN:
            return True
    return False
