"""torchtune's distillation losses, by its names, signatures and gradients.

torchtune need not be installed. ``labels`` are aligned with the logits, as its recipes hand them
over. Two things differ: forward KL is the divergence itself, where torchtune leaves the teacher's
entropy out (the gradient is the same, the number is not); and a batch without a token that counts
gives 0 *with* a graph, so that DDP does not wait for this rank.

Instead of logits both sides may be :class:`fusedkd.LMHead`, which torchtune has not: then logits
never exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, divergences, kd_loss
from fusedkd.divergences import Divergence

__all__ = [
    "ForwardKLLoss",
    "ForwardKLWithChunkedOutputLoss",
    "ReverseKLLoss",
    "ReverseKLWithChunkedOutputLoss",
    "SymmetricKLLoss",
    "SymmetricKLWithChunkedOutputLoss",
]

Side = Tensor | LMHead


class _Loss(nn.Module):
    """A divergence at T = 1 over the tokens whose label is not ``ignore_index``."""

    def __init__(self, divergence: Divergence, ignore_index: int) -> None:
        super().__init__()
        self.divergence, self.ignore_index = divergence, ignore_index

    def forward(
        self,
        student_logits: Side,
        teacher_logits: Side,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """(..., V), (..., V), (...,): the mean over tokens that count, or their sum where
        ``normalize`` is False."""
        return self._sum(student_logits, teacher_logits, labels, "mean" if normalize else "sum")

    def _sum(self, student: Side, teacher: Side, labels: Tensor, reduction: str) -> Tensor:
        if isinstance(teacher, Tensor):
            teacher = teacher.detach()
        return kd_loss(
            *(student, teacher, labels),
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction=reduction,
        )


class ForwardKLLoss(_Loss):
    """KL(teacher || student)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(divergences.forward_kl(), ignore_index)


class ReverseKLLoss(_Loss):
    """KL(student || teacher)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(divergences.reverse_kl(), ignore_index)


class SymmetricKLLoss(_Loss):
    """``sym_kd_ratio`` * forward KL + (1 - ``sym_kd_ratio``) * reverse KL."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(divergences.mixed_kl(sym_kd_ratio), ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _Chunked(_Loss):
    """torchtune's form for models that return their logits as a list of chunks of tokens."""

    def __init__(self, divergence: Divergence, num_output_chunks: int, ignore_index: int) -> None:
        super().__init__(divergence, ignore_index)
        self.num_output_chunks = num_output_chunks

    def forward(  # type: ignore[override]
        self,
        student_logits: list[Tensor],
        teacher_logits: list[Tensor],
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """Lists of (B, L / chunks, V), and (B, L): the mean over tokens that count, or the sum."""
        parts: Any = zip(
            *(student_logits, teacher_logits, labels.chunk(len(student_logits), dim=1)), strict=True
        )
        total = torch.stack([self._sum(s, t, y, "sum") for s, t, y in parts]).sum()
        return total / (labels != self.ignore_index).sum().clamp(min=1) if normalize else total


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """KL(teacher || student) of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(divergences.forward_kl(), num_output_chunks, ignore_index)


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """KL(student || teacher) of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(divergences.reverse_kl(), num_output_chunks, ignore_index)


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """The mix of both, of chunks."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(divergences.mixed_kl(sym_kd_ratio), num_output_chunks, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio
