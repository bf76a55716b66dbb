"""A draft model for speculative decoding: one layer that reads the target's last hidden states and
guesses, over a quarter of its vocabulary, what the target would say next. Trained on acceptance.

python examples/draft_model.py
"""

from __future__ import annotations

import tiny
import torch
from torch import nn

from fusedkd import LMHead, drafts

DRAFT_VOCABULARY = 128


def main(steps: int = 60) -> list[float]:
    torch.manual_seed(0)
    _, target = tiny.models()
    size = target.config.hidden_size
    draft = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
    head = nn.Linear(size, DRAFT_VOCABULARY, bias=False)
    # which tokens the draft can say, as a draft checkpoint keeps them: offsets to the target's ids
    d2t = 3 * torch.arange(DRAFT_VOCABULARY)
    ids = drafts.target_ids(d2t)

    batch = next(tiny.batches())
    with torch.no_grad():
        hidden = target.model(batch["input_ids"]).last_hidden_state
    teacher = LMHead(hidden, target.lm_head.weight, ids=ids)  # no copy of the rows, no logits

    optimizer = torch.optim.AdamW([*draft.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(steps):
        student = LMHead(draft(hidden), head.weight)
        loss = drafts.lk_hybrid(student, teacher)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(1 - drafts.acceptance_rate(student, teacher).item())
    print(f"accepted: {1 - losses[0]:.2f} of the tokens at first, {1 - losses[-1]:.2f} at last")
    return losses


if __name__ == "__main__":
    main()
