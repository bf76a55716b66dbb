"""Liger-Kernel's cross-entropy of a head, with a z-loss, and its cross-entropy beside total
variation. See :mod:`fusedkd.integrations.liger`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, kd_loss
from fusedkd.integrations.liger.functions import as_function


@dataclass
class CrossEntropyOutput:
    """What :func:`liger_fused_linear_cross_entropy` returns with ``return_z_loss``; the rest is
    None."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Any:
    """Cross-entropy of a head whose logits never exist in full, plus ``lse_square_scale`` times the
    square of the logsumexp, :func:`fusedkd.kd_loss`'s ``z_loss_weight``.

    Args:
        input: (BT, H) hidden states; ``weight`` (V, H) and ``bias`` (V,) the head's.
        target: (BT,).
        return_z_loss: a :class:`CrossEntropyOutput` whose ``z_loss``, part of the loss, has no
            graph, as Liger's has no gradient. One product more.
        accum_dtype, chunk_mem_const: have no effect.

    Raises:
        ValueError: weights of classes, scaling by a token's probability, or other outputs than the
            z-loss, which are not to be had.
    """
    refused = {
        "ce_weight": ce_weight,
        "use_token_scaling": use_token_scaling,
        "return_token_accuracy": return_token_accuracy,
        "return_predicted_tokens": return_predicted_tokens,
    }
    for name, value in refused.items():
        if value is not None and value is not False:
            raise ValueError(
                f"{name} is not to be had here: expected None or False. kd_loss has token_weights, "
                "kd_loss_and_metrics the student_accuracy, top_k the most probable ids."
            )
    head = LMHead(input, weight, bias, softcap=softcap)
    options: dict[str, Any] = {
        "kd_weight": 0.0,
        "z_loss_weight": lse_square_scale,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "reduction": reduction,
    }
    loss = kd_loss(head, None, target, ce_weight=1.0, **options)
    if not return_z_loss:
        return loss
    with torch.no_grad():
        return CrossEntropyOutput(loss, kd_loss(head, None, target, **options))


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """:func:`liger_fused_linear_cross_entropy`, whose arguments from ``ce_weight`` on it takes."""

    def __init__(
        self,
        ce_weight: None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.options = (
            *(ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap),
            *(return_z_loss, accum_dtype, use_token_scaling),
            *(return_token_accuracy, return_predicted_tokens),
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Any:
        """(V, H), (BT, H), (BT,), (V,)."""
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, *self.options)


# ----------------------------------------------------------------------------------------------


def _ce_tvd(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy, and half the sum of abs(p - q) to the teacher: (BT,) each, both
    with a gradient, 0 where the target is ``ignore_index``. From (BT, V) logits of both."""
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "none"}
    ce = kd_loss(student_logits, None, target, kd_weight=0.0, ce_weight=1.0, **options)
    teacher = teacher_logits.detach()
    tvd = kd_loss(student_logits, teacher, target, divergence="total_variation", **options)
    return ce, tvd


LigerFusedCETVDFunction = as_function("LigerFusedCETVDFunction", _ce_tvd, graded=2)


class LigerFusedCETVDLoss(nn.Module):
    """Cross-entropy and total variation of each token, (BT,) each and both with a gradient, for a
    caller who weighs and reduces them. Where one sum of the two is wanted,
    ``kd_loss(..., divergence="total_variation", ce_weight=...)`` takes half the memory: here each
    keeps a gradient of its own."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(BT, V) logits of both and (BT,) targets to (cross-entropy, total variation)."""
        return _ce_tvd(student_logits, teacher_logits, target, self.ignore_index)
