"""A loop with `accelerate`: several processes, several micro-batches to a step, one normaliser.

accelerate launch --config_file examples/configs/ddp.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import tiny
import torch
from accelerate import Accelerator

from fusedkd import hf


def main(steps: int = 6, micro_batches: int = 2, cpu: bool = False) -> list[float]:
    # Here the losses of a step are divided by its tokens, so accelerate must not divide them too:
    # its own gradient_accumulation_steps stays 1.
    accelerator = Accelerator(cpu=cpu)
    student, teacher = tiny.models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    data = torch.utils.data.DataLoader(tiny.rows(64), batch_size=4)
    model, optimizer, data = accelerator.prepare(student, optimizer, data)
    teacher.to(accelerator.device)
    endless = (batch for _ in iter(int, 1) for batch in data)
    meter, losses = hf.Meter(), []
    for _ in range(steps):
        batches = [next(endless) for _ in range(micro_batches)]
        tokens = hf.normalizer(model, batches)
        for i, batch in enumerate(batches):
            synchronise = i == micro_batches - 1
            with accelerator.no_sync(model) if not synchronise else torch.enable_grad():
                loss, metrics = hf.distill(
                    model, teacher, batch, divergence="jsd", normalizer=tokens
                )
                accelerator.backward(loss)
            meter.add(metrics)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(meter.means()["kd"])
    accelerator.print(f"JSD: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # else processes may abort at their exit
    return losses


if __name__ == "__main__":
    main()
