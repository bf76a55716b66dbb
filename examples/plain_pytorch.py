"""A plain training loop: two models and a batch in, no logits anywhere.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import tiny
import torch

from fusedkd import hf


def main(epochs: int = 3) -> list[float]:
    student, teacher = tiny.models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(epochs):
        for batch in tiny.batches():
            loss, metrics = hf.distill(
                *(student, teacher, batch),
                divergence="forward_kl",
                temperature=2.0,
                kd_weight=0.5,
                ce_weight=0.5,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(metrics["kd"].item())
    print(f"divergence: {losses[0]:.3f} nats per token at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    main()
