"""Draft models for speculative decoding: how much of a draft is accepted, and losses on that.

The target keeps a token that the draft drew from q with probability min(1, p / q) (Leviathan et al.
2023, arXiv 2211.17192, sec. 2.3). Over draws that is

    alpha = sum_v min(p_v, q_v) = 1 - TV(p, q)                                 (their corollary 3.6)

at T = 1, which the losses of Samarin et al. 2026 (arXiv 2602.23881) put in the place of the KL:

    negative log acceptance   -log alpha,                        gradient  grad TV / alpha
    hybrid                    w KL(p || q) + (1 - w) TV(p, q),   w = exp(-eta sg[alpha])

A draft whose vocabulary is some of the target's has the same rows of the target's head for its
teacher, ``LMHead(hidden, weight, ids=target_ids(d2t))``: p is then the target's distribution given
that the token is one of them, as speculators and SpecForge train, and alpha the rate given that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedkd.call import divisor
from fusedkd.checks import check_divides, check_tensor
from fusedkd.distributions import LMHead
from fusedkd.loss import kd_loss

# Below, -log goes on as its tangent: alpha is 1 - TV, of which fp32 leaves nothing smaller than
# 6e-8, and a draft that starts there still needs a gradient.
FLOOR = 1e-5


def target_ids(d2t: Tensor) -> Tensor:
    """(V',) ids in the target's vocabulary from the offsets that EAGLE-3's checkpoints, speculators
    and SpecForge keep as ``d2t``: id = draft id + d2t[draft id].

    Raises:
        TypeError: not int64 or int32.
        ValueError: not 1-D, or two draft ids with one target id: such a table holds the ids
            themselves, or is not filled (speculators' is zeros until ``load_vocab_mappings``,
            which are the target's first ids).
    """
    check_tensor("d2t", d2t)
    if d2t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"d2t is {d2t.dtype}: expected torch.int64 or torch.int32 offsets.")
    if d2t.dim() != 1:
        raise ValueError(f"d2t has shape {tuple(d2t.shape)}: expected (V',), an offset a draft id.")
    ids = d2t.long() + torch.arange(d2t.numel(), device=d2t.device)
    if ids.unique().numel() != ids.numel():
        raise ValueError(
            "d2t gives two draft ids one target id: expected offsets, target id = draft id + "
            "d2t[draft id]. Where the table holds the ids themselves, use it as LMHead's ids."
        )
    return ids


def acceptance_rate(
    draft: Tensor | LMHead,
    target: Tensor | LMHead,
    *,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The probability alpha that the target keeps the draft's token, at T = 1. A metric: no graph.

    Args:
        draft: logits (..., V') or a head.
        target: logits (..., V') or a head, of the same tokens in the same order.
        token_weights: (...,) of each token in the mean; 0 drops it.
        reduction: "mean" over tokens that count, "sum", or "none" (..., with 0 where dropped).
        normalizer: divide the sum by this instead of by the weights.
        options: :func:`fusedkd.kd_loss`'s ``vocab_size``, ``chunk_bytes``, ``group``, ``backend``.
    """
    with torch.no_grad():
        alpha = 1 - _tokens("total_variation", draft, target, token_weights, options)
    return _reduced(alpha, token_weights, reduction, normalizer)


def negative_log_acceptance(
    draft: Tensor | LMHead,
    target: Tensor | LMHead,
    *,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """-log alpha of each token (arXiv 2602.23881), in nats; arguments as :func:`acceptance_rate`.

    Where the target is certain of one token it is the cross-entropy with that token. Below alpha =
    1e-5 the loss goes on as its tangent.
    """
    alpha = 1 - _tokens("total_variation", draft, target, token_weights, options)
    kept = alpha.clamp(min=FLOOR)
    loss = torch.where(alpha < FLOOR, 1 - alpha / FLOOR, 0) - kept.log()
    return _reduced(loss, token_weights, reduction, normalizer)


def lk_hybrid(
    draft: Tensor | LMHead,
    target: Tensor | LMHead,
    *,
    eta: float = 3.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """w KL + (1 - w) TV of each token, w = exp(-eta alpha) a constant (arXiv 2602.23881): the KL
    while little is accepted, what is accepted afterwards. Arguments as :func:`acceptance_rate`.

    Raises:
        ValueError: ``eta`` is negative, so that w would exceed 1.
    """
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta={eta}: expected a finite number >= 0, such as the paper's 3.")
    kl, tv = (
        _tokens(divergence, draft, target, token_weights, options)
        for divergence in ("forward_kl", "total_variation")
    )
    w = torch.exp(-eta * (1 - tv.detach()))
    return _reduced(w * kl + (1 - w) * tv, token_weights, reduction, normalizer)


def _tokens(
    divergence: str,
    draft: Tensor | LMHead,
    target: Tensor | LMHead,
    weights: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """(...,) of each token, unweighted; 0 of one that does not count."""
    unknown = options.keys() - {"vocab_size", "chunk_bytes", "group", "backend"}
    if unknown:
        raise TypeError(
            f"{min(unknown)!r} is no argument of a draft's losses, which are at T = 1 and without "
            "labels: expected token_weights, reduction, normalizer, vocab_size, chunk_bytes, group "
            "or backend."
        )
    # kd_loss checks the weights; here they only say who counts, for -log is not linear in them
    counts = None if weights is None else torch.where(weights > 0, weights / weights, weights)
    return kd_loss(
        *(draft, target),
        divergence=divergence,
        token_weights=counts,
        reduction="none",
        **options,
    )


def _reduced(
    loss: Tensor, weights: Tensor | None, reduction: str, normalizer: float | Tensor | None
) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'.")
    check_divides(normalizer, reduction)
    total: Any = loss.numel()
    if weights is not None:
        weights = weights.to(loss.dtype)
        loss, total = loss * weights, weights.sum()
    if reduction == "none":
        return loss
    if normalizer is None and reduction == "sum":
        return loss.sum()
    by = divisor(loss, total if normalizer is None else normalizer)
    return loss.sum() / torch.where(by == 0, 1, by)
