"""ms-swift's GKD loss (written for ms-swift 4.6.0), in its trainer for Hugging Face models::

    from fusedkd.integrations import swift
    swift.register()                # before training

Full logits come in, of both sides, or the teacher's top-k; what is saved is what ms-swift makes of
them. The values are ms-swift's: no T^2, beta 0 forward KL and 1 reverse KL; a top-k teacher is
compared among its k tokens, both sides normalised there. Its Megatron and Ray trainers hand in
operations for sharded vocabularies and are not replaced; ``use_liger_kernel`` takes another way.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fusedkd import SparseTeacher, kd_loss
from fusedkd.integrations.conventions import generalized_jsd, stand_in

__all__ = ["gkd_loss", "register"]


def gkd_loss(
    student_logits: Tensor,
    teacher_output: Any,
    labels: Tensor,
    beta: float,
    temperature: float,
    gather_fn: Any = None,
    log_softmax_fn: Any = None,
    kl_div_fn: Any = None,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """``swift.rlhf_trainers.gkd_loss.gkd_loss``: the sum over tokens that count, and their number.

    Args:
        student_logits: (B, L, V).
        teacher_output: ms-swift's ``TeacherOutput``: ``full_logits`` (B, L', V), or
            ``topk_logprobs`` and ``topk_indices`` (B, L', K), with ``labels`` (B, L').
        labels: (B, L), shifted, -100 where a token does not count.
        chunk_size: has no effect.

    Raises:
        NotImplementedError: one of ms-swift's operations on sharded vocabularies is given.
        ValueError: the sides count different numbers of tokens, or the student's vocabulary is the
            larger one (ms-swift lets a gradient flow through the teacher's padding there).
    """
    if any(f is not None for f in (gather_fn, log_softmax_fn, kl_div_fn)):
        raise NotImplementedError(
            "gkd_loss got gather_fn, log_softmax_fn or kl_div_fn, which Megatron's sharded "
            "vocabularies need: expected none. Call fusedkd.kd_loss(..., group=...) instead."
        )
    teacher_output.validate()
    counts = labels != -100
    theirs = teacher_output.labels
    theirs = counts if theirs is None else theirs != -100
    if theirs.shape != counts.shape or not torch.equal(theirs, counts):
        # the teacher read another prompt: its answer lies elsewhere
        if theirs.sum() != counts.sum():
            raise ValueError(
                f"the teacher's labels count {int(theirs.sum())} tokens and the student's "
                f"{int(counts.sum())}: expected the same answer on both sides."
            )
        student_logits, teacher_output = student_logits[counts], teacher_output.select(theirs)
        counts = torch.ones_like(student_logits[..., 0], dtype=torch.bool)
    if teacher_output.is_topk_mode:
        counts = counts & ~torch.isinf(teacher_output.topk_logprobs).all(-1)
        # tokens that nobody scored hold -inf alone, and do not count
        kept = teacher_output.topk_logprobs.detach().masked_fill(~counts[..., None], 0)
        log_probs = (kept.float() / temperature).log_softmax(-1)
        teacher: Any = SparseTeacher(teacher_output.topk_indices, log_probs, tail="conditional")
    else:
        teacher = teacher_output.full_logits.detach()
        student_logits = _padded(student_logits, teacher)
    total = kd_loss(
        *(student_logits, teacher),
        token_weights=counts.float(),
        divergence=generalized_jsd(beta),
        temperature=temperature,
        scale_by_t2=False,
        reduction="sum",
    )
    return total, counts.sum()


def _padded(student: Tensor, teacher: Tensor) -> Tensor:
    """As ms-swift: a smaller student has the teacher's own logits beyond its vocabulary."""
    ours, theirs = student.shape[-1], teacher.shape[-1]
    if ours > theirs:
        raise ValueError(
            f"the student has {ours} logits and the teacher {theirs}: expected no more than the "
            "teacher's. Resize the student's embeddings (model.resize_token_embeddings)."
        )
    return student if ours == theirs else torch.cat([student, teacher[..., ours:]], -1)


def register() -> None:
    """Replace the loss in ms-swift's ``GKDTrainer``.

    Raises:
        ImportError: ms-swift is not installed, or its function is another version's.
    """
    stand_in(importlib.import_module("swift.rlhf_trainers.gkd_trainer"), "gkd_loss", gkd_loss)
