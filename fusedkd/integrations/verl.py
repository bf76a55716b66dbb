"""verl's distillation losses (written for verl 0.9.1) under names of ours.

``register()`` before the trainer is made, then ``distillation.distillation_loss.loss_mode``:

* ``fusedkd_k2``, ``fusedkd_k3``: :func:`fusedkd.sampled_kd_loss`'s formulas of the
  log-probabilities that verl has at hand (its own k3 is cut at +-10, and its gradient with it);
* ``fusedkd_forward_kl_topk``: forward KL of the two measures on the teacher's ids (the tail
  "generalized"), which is never negative, so nothing is clamped: verl's sum of p log(p / q) may be,
  and is then set to 0 with its gradient;
* ``fusedkd_forward_kl_bucket``: the whole vocabulary, all that is no id as one entry.

The last two get the student's logits where verl's own does, in the logits processor of the FSDP
strategies; Megatron's has another one, and they are an error there. There is none of the teacher's
full distribution: verl hands over no more of it than its top k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd import SparseTeacher, kd_loss, token_log_probs, top_k

ESTIMATORS = ("fusedkd_k2", "fusedkd_k3")
TAILS = {"fusedkd_forward_kl_topk": "generalized", "fusedkd_forward_kl_bucket": "bucket"}


def register() -> None:
    """Make the losses known to verl; a second call does nothing.

    Raises:
        ImportError: there is no verl, or one without ``verl.trainer.distillation``.
    """
    from verl.trainer.distillation import losses
    from verl.trainer.distillation.fsdp import losses as processors

    if ESTIMATORS[0] in losses.DISTILLATION_LOSS_REGISTRY:
        return
    estimators = losses.DistillationLossSettings(names=list(ESTIMATORS), use_estimator=True)
    losses.register_distillation_loss(estimators)(_estimated)
    entries = losses.DistillationLossSettings(names=list(TAILS), use_topk=True)
    losses.register_distillation_loss(entries)(_of_entries)
    theirs = processors.compute_forward_kl_topk

    def compute_forward_kl_topk(
        student_logits: Tensor,
        teacher_topk_log_probs: Tensor,
        teacher_topk_ids: Tensor,
        config: Any,
        data_format: str,
    ) -> Any:
        """verl's, or ours where the loss's name is one of ours."""
        name = config.distillation_loss.loss_mode
        if name not in TAILS:
            return theirs(
                student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format
            )
        ids, log_probs = (_here(x) for x in (teacher_topk_ids, teacher_topk_log_probs))
        return entries_loss(student_logits, log_probs, ids, TAILS[name])

    processors.compute_forward_kl_topk = compute_forward_kl_topk


def entries_loss(
    logits: Tensor, log_probs: Tensor, ids: Tensor, tail: str = "generalized"
) -> dict[str, Tensor]:
    """What verl's logits processor gives of each token: the loss, the mass of both sides on the
    teacher's ids, how many of these are among the student's top k, and their mean advantage
    (arXiv 2604.13016).

    Args:
        logits: (B, L, V), has the gradient.
        log_probs, ids: (B, L, K), the teacher's.
    """
    teacher = SparseTeacher(ids, log_probs, tail)
    loss = kd_loss(logits, teacher, divergence="forward_kl", reduction="none")
    with torch.no_grad():
        known = ids >= 0
        own = token_log_probs(logits, ids, ignore_index=-1).log_probs
        q, p = (x.exp().masked_fill(~known, 0.0) for x in (own, log_probs.to(own.dtype)))
        best = top_k(logits, ids.shape[-1]).indices
        shared = (ids[..., :, None] == best[..., None, :]).any(-1) & known
        count = shared.sum(-1)
        gain = torch.where(shared, p * (own - log_probs), 0.0).sum(-1) / count.clamp(min=1)
    return {
        "distillation_losses": loss,
        "student_mass": q.sum(-1),
        "teacher_mass": p.sum(-1),
        "overlap_count": count,
        "overlap_token_advantage": gain,
    }


def _here(entries: Tensor) -> Tensor:
    """(1, tokens, K) of this rank's part of a sequence-parallel group."""
    from verl.utils import ulysses

    flat = entries.values().unsqueeze(0)
    if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
        flat = ulysses.slice_input_tensor(flat, dim=1)
    return flat


def _estimated(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    s = no_padding_2_padding(model_output["log_probs"], data)
    t = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    if distillation_config.distillation_loss.loss_mode == "fusedkd_k2":
        rows = (s - t) ** 2 / 2
    else:
        rows = torch.expm1(t - s) - (t - s)
    size = rows.detach()[_mask(data)].abs().mean()
    return rows, {"distillation/abs_loss": Metric(AggregationType.MEAN, size)}


def _of_entries(
    config: Any, distillation_config: Any, model_output: Any, data: Any
) -> tuple[Tensor, dict[str, Any]]:
    from verl.utils.metric import AggregationType, Metric
    from verl.workers.utils.padding import no_padding_2_padding

    name = distillation_config.distillation_loss.loss_mode
    if getattr(config, "strategy", "fsdp") == "megatron":  # whose processor has run verl's own loss
        raise NotImplementedError(
            f"loss_mode={name!r} with strategy='megatron': expected fsdp, fsdp2 or veomni, or one "
            f"of {', '.join(map(repr, ESTIMATORS))}, which go with every strategy."
        )
    names = ("distillation_losses", "student_mass", "teacher_mass", "overlap_count")
    columns = {name: no_padding_2_padding(model_output[name], data) for name in names}
    mask, metrics = _mask(data), {}
    for name in names[1:3]:
        found = columns[name][mask]
        metrics[f"distillation/{name}"] = found.mean().item()
        metrics[f"distillation/{name}_min"] = Metric(AggregationType.MIN, found.min())
        metrics[f"distillation/{name}_max"] = Metric(AggregationType.MAX, found.max())
    share = columns["overlap_count"][mask].float().mean()
    k = distillation_config.distillation_loss.topk
    return columns["distillation_losses"], metrics | {
        "distillation/overlap_ratio": (share / k).item()
    }


def _mask(data: Any) -> Tensor:
    mask: Tensor = data["response_mask"].bool()
    return mask.to_padded_tensor(False) if mask.is_nested else mask
