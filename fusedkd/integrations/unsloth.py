"""Unsloth's chunked GKD loss (written for unsloth and unsloth_zoo 2026.10.9), from heads::

    import unsloth
    from fusedkd.integrations import unsloth as stand_ins
    stand_ins.register()            # after the import, before training

Unsloth's ``GKDTrainer`` finds these functions in ``unsloth_zoo`` and in
modules that Unsloth writes; all that are loaded are replaced. The values are TRL's. A ``scaler``
has no effect: our gradients wait in fp32 for the upstream one, which has its scale.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from fusedkd.integrations.conventions import theirs_of
from fusedkd.integrations.trl.losses import chunked_divergence_loss

__all__ = ["distillation_chunked_jsd", "fused_linear_jsd", "register"]


def distillation_chunked_jsd(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head: Tensor,
    teacher_lm_head: Tensor,
    completion_mask: Tensor,
    beta: float = 0.5,
    chunk_size: int = 256,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float = 0.0,
    teacher_final_logit_softcapping: float = 0.0,
    temperature: float = 1.0,
    scaler: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``unsloth_zoo.rl_replacements.distillation_chunked_jsd``: the loss, the sum of the student's
    entropies (nats) and the number of tokens. ``chunk_size`` has no effect."""
    return chunked_divergence_loss(
        student_hidden_states,
        teacher_hidden_states,
        student_lm_head,
        teacher_lm_head,
        completion_mask,
        beta,
        num_items_in_batch,
        student_lm_head_bias,
        teacher_lm_head_bias,
        student_logit_scale=student_logit_scale or 1.0,
        teacher_logit_scale=teacher_logit_scale or 1.0,
        student_final_logit_softcapping=student_final_logit_softcapping or None,
        teacher_final_logit_softcapping=teacher_final_logit_softcapping or None,
        temperature=temperature,
    )


def fused_linear_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_logit_softcapping: float = 0.0,
    teacher_logit_scale: float = 1.0,
    teacher_logit_softcapping: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    scaling: Any = None,
    rows_per_chunk: int | None = None,
) -> Tensor:
    """``unsloth_zoo.fused_losses.fused_linear.fused_linear_jsd``: the loss. ``rows_per_chunk`` has
    no effect."""
    counts = torch.ones_like(student_hidden[..., 0], dtype=torch.bool)
    if mask is not None:
        counts = counts & (mask != 0)
    if labels is not None:
        counts = counts & (labels != ignore_index)
    if num_items_in_batch is not None:
        items = torch.as_tensor(num_items_in_batch, device=counts.device).reshape(-1)[0]
        num_items_in_batch = torch.where(items == 0, 1, items)
    return distillation_chunked_jsd(
        *(student_hidden, teacher_hidden, student_weight, teacher_weight, counts),
        beta=beta,
        num_items_in_batch=num_items_in_batch,
        student_lm_head_bias=student_bias,
        teacher_lm_head_bias=teacher_bias,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_final_logit_softcapping=student_logit_softcapping,
        teacher_final_logit_softcapping=teacher_logit_softcapping,
        temperature=temperature,
    )[0]


def register() -> None:
    """Replace both functions, in each loaded module that holds them.

    Raises:
        ImportError: Unsloth is not installed, or a function is another version's: nothing has been
            replaced then.
    """
    hosts = (
        ("unsloth_zoo.rl_replacements", distillation_chunked_jsd),
        ("unsloth_zoo.fused_losses.fused_linear", fused_linear_jsd),
    )
    pairs = [
        (theirs_of(importlib.import_module(where), ours.__name__, ours), ours)
        for where, ours in hosts
    ]
    for theirs, ours in pairs:
        for module in list(sys.modules.values()):
            for key, value in list(getattr(module, "__dict__", {}).items()):
                if value is theirs:
                    setattr(module, key, ours)
