"""The forms in which a distribution can be handed to :func:`fusedkd.kd_loss`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["LMHead"]


@dataclass(frozen=True, eq=False)
class LMHead:
    """Hidden states and the output projection that turns them into logits, which then never exist
    in full.

    The logits are ``softcap * tanh(x / softcap)`` of ``x = logit_scale * (hidden @ weight.T +
    bias)``, without the tanh where ``softcap`` is None.

    Args:
        hidden: (..., H) last hidden states, after the final norm.
        weight: (V, H) the ``lm_head`` (or tied embedding) matrix.
        bias: (V,) or None.
        logit_scale: factor on the logits (Cohere's ``logit_scale``; 1 / Granite's
        ``logits_scaling``). softcap: Gemma 2's ``final_logit_softcapping``, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
