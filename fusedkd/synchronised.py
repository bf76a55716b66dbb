"""Whether the gradient of a head is averaged over the processes of the DDP that its model is in."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class _Watch:
    """A weight in DDP: what it was at the last call, and whether DDP's forward has run since."""

    version: int
    ran: bool = False


_watches = WeakIdKeyDictionary()  # weights: a watch, or None where no DDP has them


def check_synchronised(weight: Tensor) -> None:
    """Warn if DDP has the weight, and a step was taken with a loss that was made past it.

    DDP averages the gradients of what its own forward has announced, and says nothing of others.
    That a second step came without that forward is certain; one alone says nothing.
    """
    if torch.compiler.is_compiling() or not isinstance(weight, nn.Parameter):
        return
    if not (weight.requires_grad and torch.is_grad_enabled() and several_processes()):
        return
    if in_ddp():
        return
    if weight not in _watches:
        _watches[weight] = _watched(weight)
    watch = _watches[weight]
    if watch is None or watch.version == weight._version:
        return
    if not watch.ran:
        warnings.warn(
            f"student.weight {tuple(weight.shape)} is a parameter in DistributedDataParallel, "
            "whose forward has not run since the last step: gradients are not averaged over "
            "processes. Call fusedkd.hf.distill(ddp_model, ...), or make the loss of what "
            "ddp_model(...) returns.",
            stacklevel=2,
        )
    watch.version, watch.ran = weight._version, False


def in_ddp() -> bool:
    """Whether a DDP's forward is what calls this."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def ddp_wrappers() -> list[DistributedDataParallel]:
    """Every one that there is. Nothing in a module or a parameter says that DDP has it, so all
    objects are looked through: 0.1 s of a million."""
    return [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]


def several_processes() -> bool:
    """Whether there is a default group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _watched(weight: Tensor) -> _Watch | None:
    """Looked for once a weight."""
    having = [x for x in ddp_wrappers() if any(p is weight for p in x.parameters())]
    if not having:
        return None
    watch = _Watch(weight._version)

    def ran(*_: object) -> None:
        watch.ran = True

    for wrapper in having:
        wrapper.register_forward_pre_hook(ran)
    return watch
