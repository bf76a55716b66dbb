"""What the loss of a batch is held against."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import LMHead, kd_loss
from fusedkd.train.compare import Compare

Count = Tensor | int | None


class Targets(NamedTuple):
    """What a batch's distributions are held against.

    ``num_items`` and ``num_tokens`` are the labels and the real tokens of the whole optimizer step;
    None: of this batch.
    """

    compare: Compare
    labels: Tensor  # (...,) aligned with the logits, -100 where there is none
    tokens: Tensor | None  # (B, L) bool, False at padding; where somebody asks for it
    everywhere: bool  # whether the divergence counts at all of them
    num_items: Count
    num_tokens: Count
    training: bool
    measured: bool  # whether anybody wants metrics
    done: float  # share of the training that is over
    steps: int  # of all of it


def nothing(student: Any) -> Tensor:
    """0 with a graph, so that DDP finds every parameter used, and nothing multiplied."""
    states = student.hidden if isinstance(student, LMHead) else student
    weights = torch.zeros(states.shape[:-1], device=states.device)
    return kd_loss(student, None, kd_weight=0.0, token_weights=weights)
