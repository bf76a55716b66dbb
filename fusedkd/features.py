"""Losses between what two models hold inside: hidden states, attention scores, relations.

Plain torch, except that a divergence between attention distributions is :func:`fusedkd.kd_loss`
with the sequence as its vocabulary. Every loss is a mean over tokens, from a number per token:
padding has no effect, and with ``normalizer`` (the tokens of all micro-batches and devices) it does
not matter how a batch is cut up.

Shapes: B sequences of L tokens, H heads of d entries, D = H d, and ``tokens`` (B, L) bool, True
where a token is real (None: all are). The teacher's side is a constant. All tensors are fp64, fp32,
bf16 or fp16 and on one device; anything else is a TypeError or ValueError that names the argument.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedkd.checks import (
    check_device,
    check_logits,
    check_normalizer,
    check_tensor,
    check_whole,
    is_finite,
)
from fusedkd.loss import kd_loss

__all__ = [
    "AttentionStates",
    "attention_kl",
    "attention_score_mse",
    "cosine_loss",
    "hidden_mse",
    "relation_kl",
]

RELATIONS = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True, eq=False)
class AttentionStates:
    """What one layer of attention computed from.

    Args:
        query: (B, H, L, d), after any rotation by position.
        key, value: (B, H_kv, L, d); each of the H_kv heads serves H / H_kv heads of queries.
        scaling: factor on ``query @ key``; None: d ** -0.5.
        mask: (B or 1, 1 or H, L, L), True or 0 where a query sees a key; other numbers are added to
            the scores, and large negative ones hide. None: every key is seen.
        causal: without a mask, queries see no later keys.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None = None
    mask: Tensor | None = None
    causal: bool = False

    def pairs(self) -> Tensor:
        """(B or 1, 1 or H, L, L) bool: which queries see which keys."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        if self.mask is None:
            seen = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device)
            return (seen.tril() if self.causal else seen)[None, None]
        mask = self.mask[..., :keys]
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2

    def scores(self) -> Tensor:
        """(B, H, L, L) fp32 (fp64) attention scores before the softmax; of pairs that do not see
        each other, too."""
        scaling = self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = _wide(self.query @ self.repeated("key").transpose(-1, -2)) * scaling
        if self.mask is None or self.mask.dtype == torch.bool:
            return scores
        return scores + self.mask[..., : scores.shape[-1]].where(self.pairs(), 0.0)

    def repeated(self, name: str) -> Tensor:
        """``query``, ``key`` or ``value`` with H heads: (B, H, L, d)."""
        states: Tensor = getattr(self, name)
        return states.repeat_interleave(self.query.shape[1] // states.shape[1], dim=1)


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
    rows = 1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1)
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
    rows = (_wide(student) - _wide(teacher.detach())).square().mean(-1)
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
    seen = student.pairs() & teacher.pairs()
    gap = (student.scores() - teacher.scores().detach()).where(seen, 0.0)
    count = seen.sum(-1).clamp(min=1)
    if center:
        gap = (gap - (gap.sum(-1) / count)[..., None]).where(seen, 0.0)
    return _mean((gap.square().sum(-1) / count).mean(1), tokens, normalizer)


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
    seen = student.pairs() & teacher.pairs()
    return _kl(student.scores(), teacher.scores(), seen, tokens, normalizer)


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
    seen = student.pairs()[:, :1] & teacher.pairs()[:, :1]
    parts = [
        _kl(
            _relation("student", student.repeated(name), heads),
            _relation("teacher", teacher.repeated(name), heads),
            seen,
            tokens,
            normalizer,
        )
        for name in (RELATIONS[letter] for letter in relations)
    ]
    return torch.stack(parts).sum()


# ----------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(rows: Tensor, tokens: Tensor | None, normalizer: float | Tensor | None) -> Tensor:
    """The mean of (B, L) numbers over real tokens; 0 with a graph where there are none."""
    _check_tokens(rows, tokens, normalizer)
    if tokens is None:
        return rows.sum() / (max(rows.numel(), 1) if normalizer is None else normalizer)
    count = tokens.sum().clamp(min=1) if normalizer is None else normalizer
    return rows.where(tokens.bool(), 0.0).sum() / count


def _kl(
    student: Tensor,
    teacher: Tensor,
    seen: Tensor,
    tokens: Tensor | None,
    normalizer: float | Tensor | None,
) -> Tensor:
    """KL of (B, H, L, L) scores over the keys that are seen; mean over heads and real tokens."""
    b, heads, length, _ = student.shape
    _check_tokens(student[:, 0, :, 0], tokens, normalizer)
    real = student.new_ones(b, length) if tokens is None else tokens.to(student.dtype)
    count = real.sum().clamp(min=1) if normalizer is None else normalizer
    return kd_loss(
        student.masked_fill(~seen, -torch.inf),
        teacher.detach().masked_fill(~seen, -torch.inf),
        token_weights=real[:, None].expand(b, heads, length),
        normalizer=count * heads,
    )


def _relation(side: str, states: Tensor, heads: int) -> Tensor:
    b, h, length, d = states.shape
    if (h * d) % heads:
        raise ValueError(
            f"heads={heads} does not divide the {side}'s {h} x {d} entries: expected a number that "
            "divides both sides' widths."
        )
    split = states.transpose(1, 2).reshape(b, length, heads, h * d // heads).transpose(1, 2)
    return _wide(split @ split.transpose(-1, -2)) * split.shape[-1] ** -0.5


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


def _check_tokens(rows: Tensor, tokens: Tensor | None, normalizer: float | Tensor | None) -> None:
    """Against one number per token, (B, L)."""
    if normalizer is not None:
        check_normalizer(normalizer)
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
