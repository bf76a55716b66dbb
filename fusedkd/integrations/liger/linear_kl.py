"""Liger-Kernel's forward KL of a head against probabilities that are given as data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, kd_loss
from fusedkd.divergences import forward_kl
from fusedkd.integrations.liger.functions import as_function


class LigerFusedLinearKLDivLoss(nn.Module):
    """``KL(target || softmax(student_input @ student_weight.T / temperature))``, without logits.

    Rows of the target are taken as distributions: they are scaled to sum to 1, which changes
    nothing for probabilities but their rounding, and entries below ``eps`` count as ``eps``. Their
    logarithm is a second tensor of the target's shape, in fp32. ``accum_dtype`` has no effect:
    weight gradients add up in fp32.

    Args:
        reduction: "batchmean" over the tokens that count, "mean" over their entries, or "sum".

    Raises:
        ValueError: another reduction.
    """

    def __init__(
        self,
        reduction: str | None = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert temperature != 0, "temperature cannot be 0."
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature
        self.eps, self.accum_dtype = eps, accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        target: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """(BT, H), (V, H), (BT, V), (BT,) to a 0-d loss."""
        if self.reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(
                f"reduction must be one of batchmean, mean, sum; got {self.reduction!r}. Entries "
                '("none") do not exist without logits: take LigerKLDIVLoss.'
            )
        wide = torch.promote_types(target.dtype, torch.float32)
        logits = target.detach().to(wide).clamp(min=self.eps).log().mul_(self.temperature)
        loss = kd_loss(
            LMHead(student_input.reshape(-1, student_input.shape[-1]), student_weight),
            logits.reshape(-1, logits.shape[-1]),
            None if shift_labels is None else shift_labels.reshape(-1),
            divergence=forward_kl(),
            temperature=self.temperature,
            scale_by_t2=False,
            ignore_index=self.ignore_index,
            reduction="sum" if self.reduction == "sum" else "mean",
        )
        return loss / target.shape[-1] if self.reduction == "mean" else loss


def liger_fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    """See :class:`LigerFusedLinearKLDivLoss`, whose arguments follow in their order."""
    loss: Tensor = LigerFusedLinearKLDivLoss(*options, **named)(
        student_input, student_weight, target, shift_labels
    )
    return loss


LigerFusedLinearKLDivFunction = as_function(
    "LigerFusedLinearKLDivFunction", liger_fused_linear_kl_div
)
