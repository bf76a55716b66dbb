"""TRL's log-probabilities from hidden states, on tensors. See :mod:`fusedkd.integrations.trl`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedkd import LMHead, token_log_probs, top_k

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class LogProbs(NamedTuple):
    """Each (N,), or None where it was not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class ChunkedLogProbFunction:
    """Stands in for ``trl.kernels.ChunkedLogProbFunction``, which every trainer with a fused head
    takes from one place (GRPO, RLOO, DPO, KTO, ..., TRL 1.16)::

        import trl.trainer.utils
        from fusedkd.integrations.trl import ChunkedLogProbFunction

        trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction

    Logits are fp32 where TRL's are rounded to the head's dtype. Log-probabilities and entropy have
    gradients; ``log_sum_sq_probs`` and ``is_top1`` take one product with the head's weight more
    each, ``mean_logits`` one with a ``softcap``.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> LogProbs:
        """As TRL's; ``chunk_size``, columns of a tile, has no use here."""
        head = LMHead(hidden, weight, bias, float(logit_scale), final_logit_softcapping)
        found = token_log_probs(
            head, targets, temperature=temperature, entropy="entropy" in outputs
        )
        with torch.no_grad():
            return LogProbs(
                *found,
                _log_sum_sq(head, targets, found.log_probs, temperature)
                if "log_sum_sq_probs" in outputs
                else None,
                _mean_logits(head) / temperature if "mean_logits" in outputs else None,
                top_k(head, 1).indices[..., 0] == targets if "is_top1" in outputs else None,
            )


def _log_sum_sq(head: LMHead, targets: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """log sum p^2: p^2 is the distribution at half the temperature, but for its normaliser, which
    any token's two log-probabilities tell."""
    return 2 * log_probs - token_log_probs(head, targets, temperature=temperature / 2).log_probs


def _mean_logits(head: LMHead) -> Tensor:
    """(N,) after scale and softcap, before the temperature."""
    if head.softcap is None:
        mean = head.hidden.float() @ head.weight.float().mean(0)
        mean = mean if head.bias is None else mean + head.bias.float().mean()
        return mean * head.logit_scale
    rows = []
    for part in head.hidden.split(256):
        raw = torch.nn.functional.linear(part, head.weight, head.bias).float() * head.logit_scale
        rows.append((head.softcap * torch.tanh(raw / head.softcap)).mean(-1))
    return torch.cat(rows)
