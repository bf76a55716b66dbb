"""TRL's loss functions, on tensors. See :mod:`fusedkd.integrations.trl`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss, kd_loss_and_metrics
from fusedkd.integrations.conventions import generalized_jsd


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    logits_are_probs: bool = False,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """``GKDTrainer.generalized_jsd_loss`` and ``GOLDTrainer``'s, which also takes probabilities.

    Args:
        student_logits, teacher_logits: (B, L, V); no gradient flows to the teacher.
        labels: (B, L), -100 where a token does not count.
        reduction: "batchmean" divides the sum by the tokens that count (by B without labels, as TRL
            does), "sum" by nothing, "mean" by entries; "none" gives the entries, of the tokens that
            count where there are labels.
        num_items_in_batch: divide the sum by this, whatever the reduction.
    """
    teacher_logits = teacher_logits.detach()
    if logits_are_probs or (reduction == "none" and num_items_in_batch is None):
        entries = _entries(student_logits, teacher_logits, beta, temperature, logits_are_probs)
        entries = entries if labels is None else entries[labels != -100]
        loss, counted = entries.sum(), torch.tensor(entries.shape[:-1].numel())
    else:
        entries = None
        loss = kd_loss(
            *(student_logits, teacher_logits, labels),
            divergence=generalized_jsd(beta),
            temperature=temperature,
            scale_by_t2=False,
            reduction="sum",
        )
        tokens = torch.tensor(student_logits.shape[:-1].numel())
        counted = tokens if labels is None else (labels != -100).sum()
    if num_items_in_batch is not None:
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device)
    if entries is not None and reduction == "none":
        return entries
    divisors = {
        "batchmean": torch.tensor(student_logits.shape[0]) if labels is None else counted,
        "mean": counted * student_logits.shape[-1],
        "sum": torch.tensor(1),
    }
    return loss / divisors[reduction].clamp(min=1).to(loss.device)


def _entries(s: Tensor, t: Tensor, beta: float, temperature: float, probabilities: bool) -> Tensor:
    """The divergence entry by entry."""
    if probabilities:
        lq, lp = (x.float().clamp(min=1e-8).log() for x in (s, t))
    else:
        lq, lp = (F.log_softmax(x.float() / temperature, dim=-1) for x in (s, t))
    return generalized_jsd(beta).value(lp, lq)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``trl.trainer.distillation_trainer._chunked_divergence_loss``. A weight that is a master copy
    takes the hidden states' dtype; an fp32 bias is not rounded to theirs.

    Returns:
        The loss, the sum of the student's entropies (nats) and the number of tokens that count.

    Raises:
        TypeError: a weight is quantised.
    """
    s, t = student_hidden_states, teacher_hidden_states.detach()
    # An fp32 bias beside half-precision states is what autocast allows, and need not be rounded.
    mixed = s.dtype == t.dtype and s.dtype in (torch.bfloat16, torch.float16)
    weight = _whole(student_lm_head_weight, s.dtype)
    bias = _whole(student_lm_head_bias, None if mixed else s.dtype)
    student = LMHead(s, weight, bias, student_logit_scale, student_final_logit_softcapping)
    weight = _whole(teacher_lm_head_weight, t.dtype)
    bias = _whole(teacher_lm_head_bias, None if mixed else t.dtype)
    teacher = LMHead(t, weight, bias, teacher_logit_scale, teacher_final_logit_softcapping)
    with torch.autocast(s.device.type, s.dtype) if mixed else nullcontext():
        loss, means = kd_loss_and_metrics(
            *(student, teacher),
            token_weights=completion_mask != 0,
            divergence=generalized_jsd(beta),
            temperature=temperature,
            scale_by_t2=False,
            normalizer=num_items_in_batch,
        )
    return loss, means.student_entropy * means.num_tokens, means.num_tokens


def _whole(parameter: Tensor | None, dtype: torch.dtype | None) -> Any:
    """A sharded parameter is gathered, once, and takes the dtype if there is one."""
    if parameter is not None and not parameter.is_floating_point():
        raise TypeError(
            f"an lm_head's parameter is {parameter.dtype}, so it is quantised and its numbers mean "
            "nothing by themselves: expected a floating-point one. Leave the lm_head out of the "
            "quantisation (llm_int8_skip_modules in bitsandbytes), as is the default."
        )
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole if whole is None or dtype is None else whole.to(dtype)
