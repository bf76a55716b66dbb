"""Row rules as a user would write them for ``@row_rules.custom``."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedkd import row_rules


@row_rules.custom
def entropy_gate(teacher_entropy: Tensor, *, threshold: float = 2.0) -> Tensor:
    return teacher_entropy < threshold


@row_rules.custom
def token_clip(divergence: Tensor, *, most: float = 1.0) -> Tensor:
    return torch.clamp(most / divergence, max=1.0)


@row_rules.custom
def of_everything(
    divergence: Tensor,
    student_top1: Tensor,
    label_log_prob: Tensor,
    teacher_entropy: Tensor,
    student_entropy: Tensor,
    teacher_top1: Tensor,
    *,
    shift: float = 1.0,
    slope: float = 0.5,
) -> Tensor:
    """In another order than the backends have them."""
    gates = torch.sigmoid(slope * (teacher_entropy - shift)) + torch.exp(-slope * student_entropy)
    tops = torch.where(teacher_top1 > 0.2, teacher_top1, 0.1) * torch.sqrt(student_top1)
    return gates + tops + torch.exp(slope * label_log_prob) + 1 / (1 + divergence)


RULES = {rule.__name__: rule for rule in (entropy_gate, token_clip, of_everything)}
