"""A plain training loop: hidden states and head weights in, no logits anywhere.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import tiny
import torch

from fusedkd import LMHead, kd_loss_and_metrics


def main(epochs: int = 3) -> list[float]:
    student, teacher = tiny.models()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(epochs):
        for batch in tiny.batches():
            ids, labels = batch["input_ids"], batch["labels"][:, 1:]
            # position n predicts token n + 1: the last hidden state has nothing to predict
            hidden = student.model(ids).last_hidden_state[:, :-1]
            with torch.no_grad():
                answer = teacher.model(ids).last_hidden_state[:, :-1]
            loss, metrics = kd_loss_and_metrics(
                LMHead(hidden, student.lm_head.weight),
                LMHead(answer, teacher.lm_head.weight),
                labels,
                divergence="forward_kl",
                temperature=2.0,
                kd_weight=0.5,
                ce_weight=0.5,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(metrics.kd.item())
    print(f"divergence: {losses[0]:.3f} nats per token at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    main()
