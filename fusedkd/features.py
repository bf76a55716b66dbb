"""Losses between what two models hold inside: hidden states, attention scores, relations.

Hidden states in plain torch; attention scores and relations a chunk at a time
(:mod:`fusedkd.attention`), for all of them would be B x H x L^2. Every loss is a mean over tokens,
from a number per token: padding has no effect, and with ``normalizer`` (the tokens of all
micro-batches and devices) it does not matter how a batch is cut up.

Shapes: B sequences of L tokens, H heads of d entries, D = H d, and ``tokens`` (B, L) bool, True
where a token is real (None: all are). The teacher's side is a constant. All tensors are fp64, fp32,
bf16 or fp16 and on one device; anything else is a TypeError or ValueError that names the argument.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd.attention import AttentionStates, score_loss, wide
from fusedkd.call import divisor
from fusedkd.checks import (
    check_device,
    check_logits,
    check_tensor,
    check_whole,
    is_finite,
)

__all__ = [
    "AttentionStates",
    "attention_kl",
    "attention_score_mse",
    "cosine_loss",
    "hidden_mse",
    "relation_kl",
]

RELATIONS = {"q": "query", "k": "key", "v": "value"}


def cosine_loss(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean of 1 - cos(student, teacher) over tokens, DistilBERT's (Sanh et al. 2019, section 3).

    Args:
        student, teacher: hidden states (B, L, D), of one width.

    Raises:
        ValueError: of different widths.
    """
    _check_hidden(student, teacher, "a projection, or hidden_mse with one")
    rows = 1 - F.cosine_similarity(wide(student), wide(teacher.detach()), dim=-1)
    return _mean(rows, tokens, normalizer)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """Mean squared difference of hidden states or embeddings, TinyBERT's (Jiao et al. 2020, arXiv
    1909.10351, equations 8 and 9), where ``student`` has been projected.

    Args:
        student, teacher: (B, L, D), of one width.

    Raises:
        ValueError: of different widths.
    """
    _check_hidden(student, teacher, "a learned projection of the student's")
    rows = (wide(student) - wide(teacher.detach())).square().mean(-1)
    return _mean(rows, tokens, normalizer)


def attention_score_mse(
    student: AttentionStates,
    teacher: AttentionStates,
    tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    center: bool = True,
) -> Tensor:
    """Mean squared difference of the scores before the softmax, TinyBERT's (equation 7), in each
    row over the keys that it sees, then over heads.

    Args:
        center: a softmax does not see a constant that is added to its row, so scores are compared
            less their row's mean. False: as they are, which is what TinyBERT does.

    Raises:
        ValueError: of different numbers of heads.
    """
    _check_attention(student, teacher, heads=True)
    scale = _row_scale(student, teacher, tokens, normalizer, student.query.shape[1])
    return score_loss("centered_mse" if center else "mse", student, teacher, scale)


def attention_kl(
    student: AttentionStates,
    teacher: AttentionStates,
    tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """KL of the attention distributions, mean over heads (MiniLM, Wang et al. 2020, arXiv
    2002.10957, equation 3). Of the softmax itself: no dropout is in it.

    Raises:
        ValueError: of different numbers of heads.
    """
    _check_attention(student, teacher, heads=True)
    scale = _row_scale(student, teacher, tokens, normalizer, student.query.shape[1])
    return score_loss("kl", student, teacher, scale)


def relation_kl(
    student: AttentionStates,
    teacher: AttentionStates,
    tokens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    heads: int = 12,
    relations: str = "qkv",
) -> Tensor:
    """MiniLM v2's relations (Wang et al. 2021, arXiv 2012.15828, equations 4 to 6): the KL of
    softmax(Q Q^T / sqrt(d)), likewise of K and V, each summed over ``relations`` and averaged over
    relation heads. No projection, and the two may differ in heads and width.

    Args:
        heads: into how many relation heads both sides' D entries are split again.
        relations: which of q, k and v; ``"v"`` with :func:`attention_kl` is the first MiniLM.

    Raises:
        ValueError: a width that ``heads`` does not divide, or another letter.
    """
    _check_attention(student, teacher, heads=False)
    if not isinstance(relations, str) or not relations or set(relations) - RELATIONS.keys():
        raise ValueError(f"relations={relations!r}: expected letters of 'qkv'.")
    check_whole("heads", heads, 1)
    scale = _row_scale(student, teacher, tokens, normalizer, heads)
    losses = []
    for name in (RELATIONS[letter] for letter in relations):
        ours, theirs = (
            _relation(side, states, name, heads)
            for side, states in (("student", student), ("teacher", teacher))
        )
        losses.append(score_loss("kl", ours, theirs, scale, biased=False))
    return torch.stack(losses).sum()


# ----------------------------------------------------------------------------------------------


def _mean(rows: Tensor, tokens: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """The mean of (B, L) numbers over real tokens; 0 with a graph where there are none."""
    count = _count(rows, tokens, normalizer)
    return (rows if tokens is None else rows.where(tokens.bool(), 0.0)).sum() / count


def _row_scale(
    student: AttentionStates,
    teacher: AttentionStates,
    tokens: Tensor | None,
    normalizer: float | Tensor | None,
    heads: int,
) -> Tensor:
    """(B, L) what makes a sum over heads and tokens that mean."""
    wider = torch.promote_types(student.query.dtype, teacher.query.dtype)
    b, _, length, _ = student.query.shape
    rows = student.query.new_ones(b, length, dtype=torch.promote_types(wider, torch.float32))
    scale = rows / (_count(rows, tokens, normalizer) * heads)
    return scale if tokens is None else scale.where(tokens.bool(), 0.0)


def _count(rows: Tensor, tokens: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """What a sum over (B, L) numbers is divided by."""
    _check_tokens(rows, tokens)
    if normalizer is not None:
        return divisor(rows, normalizer)
    count = torch.ones_like(rows) if tokens is None else tokens.bool()
    return count.sum().clamp(min=1).to(rows.dtype)


def _relation(side: str, states: AttentionStates, name: str, heads: int) -> AttentionStates:
    """Relation heads of queries, keys or values, as attention to themselves."""
    parts = states.repeated(name)
    b, h, length, d = parts.shape
    if (h * d) % heads:
        raise ValueError(
            f"heads={heads} does not divide the {side}'s {h} x {d} entries: expected a number that "
            "divides both sides' widths."
        )
    split = parts.transpose(1, 2).reshape(b, length, heads, h * d // heads).transpose(1, 2)
    mask = None if states.mask is None else states.mask[:, :1]
    return AttentionStates(split, split, split, None, mask, states.causal)


# ----------------------------------------------------------------------------------------------
# what a caller may get wrong


def _check_hidden(student: Tensor, teacher: Tensor, remedy: str) -> None:
    for name, states in (("student", student), ("teacher", teacher)):
        check_logits(name, states)
    check_device("teacher", teacher, "student", student)
    if student.dim() != 3:
        raise ValueError(f"student has shape {tuple(student.shape)}: expected (B, L, D).")
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's hidden states have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}: expected one shape; use {remedy}."
        )


def _check_tokens(rows: Tensor, tokens: Tensor | None) -> None:
    """Against one number per token, (B, L)."""
    if tokens is None:
        return
    check_tensor("tokens", tokens)
    check_device("tokens", tokens, "student", rows)
    if tokens.shape != rows.shape or tokens.is_complex():
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)} and is {tokens.dtype}: expected "
            f"{tuple(rows.shape)}, one per token of the student, True where it is real."
        )


def _check_attention(student: AttentionStates, teacher: AttentionStates, heads: bool) -> None:
    for side, states in (("student", student), ("teacher", teacher)):
        _check_states(side, states)
    check_device("teacher.query", teacher.query, "student.query", student.query)
    ours, theirs = (states.query.shape[:3] for states in (student, teacher))
    if heads and ours != theirs:
        raise ValueError(
            f"the student's attention has (B, H, L) = {tuple(ours)}, the teacher's "
            f"{tuple(theirs)}: expected as many heads; with other numbers use relation_kl."
        )
    keys = [states.key.shape[2] for states in (student, teacher)]
    if ours[0] != theirs[0] or ours[2] != theirs[2] or keys[0] != keys[1]:
        raise ValueError(
            f"the student has {ours[0]} x {ours[2]} queries of {keys[0]} keys, the teacher "
            f"{theirs[0]} x {theirs[2]} of {keys[1]}: expected the same tokens on both sides."
        )


def _check_states(side: str, states: AttentionStates) -> None:
    if not isinstance(states, AttentionStates):
        raise TypeError(f"{side} is a {type(states).__name__}: expected AttentionStates.")
    for name in ("query", "key", "value"):
        part = getattr(states, name)
        check_logits(f"{side}.{name}", part)
        check_device(f"{side}.{name}", part, f"{side}.query", states.query)
        if part.dim() != 4:
            raise ValueError(
                f"{side}.{name} has shape {tuple(part.shape)}: expected (B, heads, L, d)."
            )
    query, key, value = states.query.shape, states.key.shape, states.value.shape
    fits = key[:3] == value[:3] and (key[0], key[3]) == (query[0], query[3])
    if not fits or not key[1] or query[1] % key[1]:
        raise ValueError(
            f"{side}: query has shape {tuple(query)}, key {tuple(key)}, value {tuple(value)}: "
            "expected (B, H, L, d) and twice (B, H_kv, L, d), with H a multiple of H_kv."
        )
    if states.scaling is not None and not is_finite(states.scaling):
        raise ValueError(f"{side}.scaling={states.scaling!r}: expected a finite Python number.")
    if states.mask is not None:
        _check_mask(f"{side}.mask", states.mask, states.query, key[2])


def _check_mask(name: str, mask: Tensor, query: Tensor, keys: int) -> None:
    check_tensor(name, mask)
    check_device(name, mask, "the query", query)
    b, heads, length = query.shape[:3]
    shape = tuple(mask.shape)
    fits = mask.dim() == 4 and shape[0] in (1, b) and shape[1] in (1, heads)
    if not fits or shape[2] not in (1, length) or shape[3] < keys or mask.is_complex():
        raise ValueError(
            f"{name} has shape {shape} and is {mask.dtype}: expected ({b} or 1, {heads} or 1, "
            f"{length}, {keys}), bool or numbers that are added to the scores."
        )
