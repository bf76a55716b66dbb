"""Losses between what two models hold inside: hidden states, attention scores, relations.

Plain torch, except that a divergence between attention distributions is :func:`fusedkd.kd_loss`
with the sequence as its vocabulary. Every loss is a mean over tokens, from a number per token:
padding has no effect, and with ``normalizer`` (the tokens of all micro-batches and devices) it does
not matter how a batch is cut up.

Shapes: B sequences of L tokens, H heads of d entries, D = H d, and ``tokens`` (B, L) bool, True
where a token is real (None: all are). The teacher's side is a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    _same("hidden states", student, teacher, "a projection, or hidden_mse with one")
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
    _same("hidden states", student, teacher, "a learned projection of the student's")
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
    _same_heads(student, teacher)
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
    _same_heads(student, teacher)
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
    if not relations or set(relations) - RELATIONS.keys():
        raise ValueError(f"relations={relations!r}: expected letters of 'qkv'.")
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


def _same(what: str, student: Tensor, teacher: Tensor, remedy: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's {what} have shape {tuple(student.shape)}, the teacher's "
            f"{tuple(teacher.shape)}: expected one shape; use {remedy}."
        )


def _same_heads(student: AttentionStates, teacher: AttentionStates) -> None:
    ours, theirs = (states.query.shape[:3] for states in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"the student's attention has (B, H, L) = {tuple(ours)}, the teacher's "
            f"{tuple(theirs)}: expected as many heads; with other numbers use relation_kl."
        )
