"""speculators' loss map (written for 0.9.0): KL, reverse KL, JSD, cross-entropy with the target's
argmax, total variation, and the two that aim at acceptance, of each token::

    from fusedkd.integrations import speculators
    speculators.register()          # before training: --loss-fn takes the same names as before

They get full logits, draft (1, L, V') and target (1, L, V'), and return (1, L) in fp32, on any
device; speculators' own fused losses are Triton's. SpecForge keeps its losses in the trainer's
forward, so there nothing is replaced: :mod:`fusedkd.drafts` has what it computes.

What differs: below an acceptance of 1e-5 speculators' ``nla`` is constant, without a gradient, and
this one goes on as its tangent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor

from fusedkd import kd_loss
from fusedkd.drafts import lk_hybrid, negative_log_acceptance
from fusedkd.integrations.conventions import check_signature

__all__ = [
    "LOSSES",
    "ce_loss",
    "js_div_loss",
    "kl_div_loss",
    "lk_hybrid_loss",
    "neg_log_acceptance_loss",
    "register",
    "reverse_kl_div_loss",
    "tv_loss",
]


def kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(p || q)."""
    return _tokens(logits, targets, "forward_kl")


def reverse_kl_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(q || p)."""
    return _tokens(logits, targets, "reverse_kl")


def js_div_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """JSD with equal weights."""
    return _tokens(logits, targets, "jsd")


def ce_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the target's most probable token."""
    labels = targets.argmax(-1)
    return kd_loss(logits, None, labels, kd_weight=0.0, ce_weight=1.0, reduction="none")


def tv_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - alpha."""
    return _tokens(logits, targets, "total_variation")


def neg_log_acceptance_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """:func:`fusedkd.drafts.negative_log_acceptance`."""
    return negative_log_acceptance(logits, targets.detach(), reduction="none")


def lk_hybrid_loss(logits: Tensor, targets: Tensor, eta: float = 3.0) -> Tensor:
    """:func:`fusedkd.drafts.lk_hybrid`."""
    return lk_hybrid(logits, targets.detach(), eta=eta, reduction="none")


def _tokens(logits: Tensor, targets: Tensor, divergence: str) -> Tensor:
    return kd_loss(logits, targets.detach(), divergence=divergence, reduction="none")


LOSSES: dict[str, Callable[..., Tensor]] = {  # by speculators' names
    "kl_div": kl_div_loss,
    "rkl": reverse_kl_div_loss,
    "jsd": js_div_loss,
    "ce": ce_loss,
    "tv": tv_loss,
    "nla": neg_log_acceptance_loss,
    "lk_hybrid": lk_hybrid_loss,
}


def register() -> None:
    """Replace the losses that speculators finds by name, of each of its implementations.

    Raises:
        ImportError: speculators is not installed, or its map is another version's: nothing has been
            replaced then.
    """
    host = importlib.import_module("speculators.losses.utils")
    maps = getattr(host, "_LOSS_FN_MAPS", {})
    for kind in ("fused", "eager"):
        where = f"speculators.losses.utils._LOSS_FN_MAPS[{kind!r}]"
        theirs = maps.get(kind, {})
        if theirs.keys() != LOSSES.keys():
            raise ImportError(
                f"{where} has {sorted(theirs)}, expected {sorted(LOSSES)}: this is not speculators "
                "0.9, which fusedkd.integrations.speculators was written for. Install that, or "
                "call fusedkd.kd_loss and fusedkd.drafts yourself."
            )
        for name, loss in LOSSES.items():
            check_signature(f"{where}[{name!r}]", theirs[name], loss)
    for theirs in maps.values():
        theirs.update(LOSSES)
