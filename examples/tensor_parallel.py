"""Heads whose vocabulary is spread over the ranks: DTensors go into ``kd_loss`` as they are.

torchrun --nproc_per_node 2 examples/tensor_parallel.py
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import tiny
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fusedkd import LMHead, kd_loss


def spread(head: nn.Linear, mesh: Any) -> None:
    """Each rank keeps its share of the rows of the weight."""
    weight = distribute_tensor(head.weight.detach(), mesh, [Shard(0)])
    head.weight = nn.Parameter(weight, requires_grad=head.weight.requires_grad)


def main(steps: int = 8, device: str = "cpu") -> list[float]:
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    student, teacher = tiny.models()
    for model in (student, teacher):
        spread(model.lm_head.to(device), mesh)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, foreach=False)
    losses = []
    for batch in itertools.islice(itertools.cycle(tiny.batches()), steps):
        ids, labels = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
        hidden = student.model(ids).last_hidden_state[:, :-1]
        with torch.no_grad():
            answer = teacher.model(ids).last_hidden_state[:, :-1]
        loss = kd_loss(
            LMHead(hidden, student.lm_head.weight),
            LMHead(answer, teacher.lm_head.weight),
            labels,
            divergence="jsd",
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(f"JSD: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    return losses


if __name__ == "__main__":
    main(device="cuda" if torch.cuda.is_available() else "cpu")
    dist.barrier()
    dist.destroy_process_group()
