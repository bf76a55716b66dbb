"""A model that a group of processes holds together, by transformers' tensor-parallel plan: each has
a part of every weight, so all of them have to run the same batch at the same time."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedkd import LMHead
from fusedkd.models.live import LiveTeacher


def is_spread(model: nn.Module) -> bool:
    """Whether a model is one that several processes hold together."""
    return (getattr(model, "tp_size", None) or 1) > 1


class _Whole(LiveTeacher):
    """Its head's weight is gathered once."""

    def _here(self, head: LMHead, device: torch.device) -> LMHead:
        if self._copies is None:
            bias = None if head.bias is None else _gathered(head.bias).to(device)
            self._copies = _gathered(head.weight).to(device), bias
        return LMHead(head.hidden.to(device), *self._copies, head.logit_scale, head.softcap)


class SpreadTeacher(_Whole):
    """:class:`LiveTeacher` of such a model, for processes that have batches of their own: each
    batch is run by all of them, one after the other."""

    def __call__(self, inputs: dict[str, Any]) -> Tensor | LMHead:
        """As the live teacher's; every process has to call this equally often."""
        mine: Any = None
        for rank in range(dist.get_world_size()):
            given = _sent(inputs, rank)
            assert given is not None
            answer = super().__call__(_on(given, self.model))
            mine = answer if rank == dist.get_rank() else mine
        return mine


class LedTeacher(_Whole):
    """:class:`LiveTeacher` of such a model, for a command that the first process does alone: the
    others :meth:`follow` it, until it is :meth:`done`."""

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return dist.get_rank() == 0

    def __call__(self, inputs: dict[str, Any]) -> Tensor | LMHead:
        """As the live teacher's, in the first process."""
        return super().__call__(_on(_sent(inputs, 0) or {}, self.model))

    def follow(self) -> None:
        """Run what the first process runs."""
        while (inputs := _sent(None, 0)) is not None:
            super().__call__(_on(inputs, self.model))

    def done(self) -> None:
        """Let the others go."""
        _sent(None, 0)


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sent(inputs: dict[str, Any] | None, rank: int) -> dict[str, Tensor] | None:
    """What one process has, in all of them."""
    if inputs is not None and rank == dist.get_rank():
        inputs = {name: x.cpu() for name, x in inputs.items() if isinstance(x, Tensor)}
    box = [inputs]
    dist.broadcast_object_list(box, src=rank)
    return box[0]


def _on(inputs: dict[str, Tensor], model: Any) -> dict[str, Any]:
    return {name: x.to(model.device) for name, x in inputs.items()}
