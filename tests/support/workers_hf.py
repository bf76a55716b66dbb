"""One optimizer step of a loop of one's own, however it is cut up and wrapped. Run by
test_hf.py."""

from __future__ import annotations

import warnings
from typing import Any

import families as tiny
import processes
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fusedkd import LMHead, hf, kd_loss

LOSS = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.3}


def step(model: nn.Module, teacher: nn.Module, cuts: list[slice], counted: bool) -> Any:
    """Loss, gradients and metrics of the rows in ``cuts``, as every process knows them."""
    meter = hf.Meter()
    batches = [tiny.batch(tiny.rows()[cut]) for cut in cuts]
    normalizer = hf.normalizer(model, batches) if counted else None
    total = torch.zeros(())
    for i, batch in enumerate(batches):
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = i == len(batches) - 1
        loss, metrics = hf.distill(model, teacher, batch, normalizer=normalizer, **LOSS)
        loss.backward()
        total += loss.detach()
        meter.add(metrics)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    grads = {name.removeprefix("module."): whole(x.grad) for name, x in model.named_parameters()}
    return total, grads, meter.means()


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: nn.Module, layers: bool = False) -> nn.Module:
    for part in (*model.model.layers, model.lm_head) if layers else ():
        fully_shard(part)
    return fully_shard(model)


def fsdp2_layers(model: nn.Module) -> nn.Module:
    return fsdp2(model, layers=True)


WRAPS: dict[str, Any] = {f.__name__: f for f in (ddp, fsdp2, fsdp2_layers)}


def together(rank: int) -> Any:
    found: dict[str, Any] = {}
    mine = slice(2 * rank, 2 * rank + 2)
    one_by_one = [slice(2 * rank, 2 * rank + 1), slice(2 * rank + 1, 2 * rank + 2)]
    for name, wrap in WRAPS.items():
        teacher = tiny.build("llama", 2)
        for how, cuts in (("whole", [mine]), ("cut", one_by_one)):
            model = wrap(tiny.build("llama", 1))
            found[name, how] = step(model, teacher, cuts, counted=how == "cut")
            heads = model.__dict__, getattr(model, "module", model).__dict__
            assert any(x.get("_fusedkd") and x["_fusedkd"].head.found for x in heads), name
    found["inside"] = inside()
    return found


def inside() -> str:
    """What is said of a module that DDP holds."""
    wrapped = DistributedDataParallel(tiny.build("llama", 1))
    try:
        hf.distill(wrapped.module, tiny.build("llama", 2), tiny.batch(tiny.rows()))
    except ValueError as error:
        return str(error)
    return "nothing"


class Step(nn.Module):
    """A training step that DDP wraps as a whole, as Lightning's are."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.model, self.teacher = model, (teacher,)

    def forward(self, batch: Any) -> Tensor:
        return hf.distill(self.model, *self.teacher, batch, **LOSS)[0]


def around(rank: int) -> Any:
    model = tiny.build("llama", 1)
    step = ddp(Step(model, tiny.build("llama", 2)))  # which has to outlive the backward
    step(tiny.batch(tiny.rows()[2 * rank : 2 * rank + 2])).backward()
    return {name: x.grad for name, x in model.named_parameters()}


def past_ddp(rank: int, inside: bool) -> list[str]:
    """What is said in two steps whose loss is made of ``kd_loss`` outside of DDP, from hidden
    states of DDP's forward, or of its module's."""
    model: Any = tiny.build("llama", 1)
    wrapped = ddp(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = tiny.batch(tiny.rows())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            run = model if inside else wrapped
            outputs = run(batch["input_ids"], output_hidden_states=True)
            head = LMHead(outputs.hidden_states[-1], model.lm_head.weight)
            kd_loss(head, torch.zeros(*head.hidden.shape[:-1], len(head.weight))).backward()
            optimizer.step()
    return [str(x.message) for x in said if "DistributedDataParallel" in str(x.message)]


def unheard(rank: int) -> dict[str, float]:
    """Means where one process has measured nothing."""
    meter = hf.Meter()
    if rank == 0:
        meter.add({"kd": hf.Mean(torch.tensor(3.0), torch.tensor(2))})
    return meter.means()


def everything(rank: int) -> Any:
    past = [past_ddp(rank, inside) for inside in (False, True)]
    return together(rank) | {"unheard": unheard(rank), "around": around(rank), "past": past}


if __name__ == "__main__":
    processes.main({"everything": everything})
