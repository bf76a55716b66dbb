"""A loop with `accelerate`: several processes, several micro-batches to a step, one normaliser.

accelerate launch --config_file examples/configs/ddp.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from fusedkd import kd_loss
from fusedkd.models.heads import loss_in_forward, plain_head, tap


def main(steps: int = 6, micro_batches: int = 2, cpu: bool = False) -> list[float]:
    # Here the losses of a step are divided by its tokens, so accelerate must not divide them too:
    # its own gradient_accumulation_steps stays 1.
    accelerator = Accelerator(cpu=cpu)
    student, teacher = tiny.models()
    head, teacher_head = plain_head(student), plain_head(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    data = torch.utils.data.DataLoader(tiny.rows(64), batch_size=4)
    model, optimizer, data = accelerator.prepare(student, optimizer, data)
    teacher.to(accelerator.device)
    endless = (batch for _ in iter(int, 1) for batch in data)
    losses = []
    for _ in range(steps):
        batches = [next(endless) for _ in range(micro_batches)]
        labels = [F.pad(batch.pop("labels"), (0, 1), value=-100)[:, 1:] for batch in batches]
        counted = torch.stack([(y != -100).sum() for y in labels]).sum()
        # of all processes; over their number, because DDP averages gradients
        tokens = accelerator.reduce(counted, reduction="sum") / accelerator.num_processes
        total = torch.zeros((), device=accelerator.device)
        for i, (batch, y) in enumerate(zip(batches, labels, strict=True)):
            hidden: list[torch.Tensor] = []
            with torch.no_grad(), tap(teacher_head, hidden.append):
                teacher(**batch)
            answer = teacher_head.of(hidden[0])

            def compute(student_head, y=y, answer=answer, tokens=tokens):
                return kd_loss(student_head, answer, y, divergence="jsd", normalizer=tokens), None

            synchronise = i == micro_batches - 1
            with accelerator.no_sync(model) if not synchronise else torch.enable_grad():
                loss = loss_in_forward(model, student, head, batch, compute)[0]
                accelerator.backward(loss)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, reduction="mean").item())
    accelerator.print(f"JSD: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # else processes may abort at their exit
    return losses


if __name__ == "__main__":
    main()
