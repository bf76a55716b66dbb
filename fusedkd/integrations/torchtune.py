"""torchtune's distillation losses, by its names, signatures, values and gradients.

torchtune need not be installed. ``labels`` are aligned with the logits, as its recipes hand them
over. Values are torchtune's: its forward KL is the cross-entropy with the teacher, ``-(p log q)``
summed, which is the divergence and the teacher's entropy (a constant: gradients are the same). One
thing differs: a batch without a token that counts gives 0 *with* a graph, so that DDP does not wait
for this rank.

Instead of logits both sides may be :class:`fusedkd.LMHead`, which torchtune has not: then logits
never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, divergences, kd_loss, kd_loss_and_metrics
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
    """A divergence at T = 1 over the tokens whose label is not ``ignore_index``, and ``entropy``
    times the teacher's entropy."""

    def __init__(self, divergence: Divergence, entropy: float, ignore_index: int) -> None:
        super().__init__()
        self.divergence, self.entropy, self.ignore_index = divergence, entropy, ignore_index

    def forward(
        self,
        student_logits: Side,
        teacher_logits: Side,
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """(..., V), (..., V), (...,): the mean over tokens that count, or their sum where
        ``normalize`` is False."""
        return self._reduced(self._sum(student_logits, teacher_logits, labels), labels, normalize)

    def _sum(self, student: Side, teacher: Side, labels: Tensor) -> Tensor:
        if isinstance(teacher, Tensor):
            teacher = teacher.detach()
        keywords: dict[str, Any] = {
            "divergence": self.divergence,
            "ignore_index": self.ignore_index,
            "reduction": "sum",
        }
        if not self.entropy:
            return kd_loss(student, teacher, labels, **keywords)
        total, means = kd_loss_and_metrics(student, teacher, labels, **keywords)
        return total + self.entropy * means.teacher_entropy * means.num_tokens

    def _reduced(self, total: Tensor, labels: Tensor, normalize: bool) -> Tensor:
        return total / (labels != self.ignore_index).sum().clamp(min=1) if normalize else total


class ForwardKLLoss(_Loss):
    """KL(teacher || student), and the teacher's entropy."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(divergences.forward_kl(), 1.0, ignore_index)


class ReverseKLLoss(_Loss):
    """KL(student || teacher)."""

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__(divergences.reverse_kl(), 0.0, ignore_index)


class SymmetricKLLoss(_Loss):
    """``sym_kd_ratio`` times :class:`ForwardKLLoss`, the rest :class:`ReverseKLLoss`."""

    def __init__(self, sym_kd_ratio: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__(divergences.mixed_kl(sym_kd_ratio), sym_kd_ratio, ignore_index)
        self.sym_kd_ratio = sym_kd_ratio


class _Chunked(_Loss):
    """torchtune's form for models that return their logits as a list of chunks of tokens. Labels
    are cut as the logits are, however many chunks of whatever size there be."""

    num_output_chunks: int

    def forward(  # type: ignore[override]
        self,
        student_logits: Sequence[Side],
        teacher_logits: Sequence[Side],
        labels: Tensor,
        normalize: bool = True,
    ) -> Tensor:
        """Chunks of (B, L, V), adding up to all tokens, and (B, tokens): the mean over tokens that
        count, or the sum.

        Raises:
            ValueError: student's, teacher's and labels' tokens do not fit.
        """
        ours, theirs = ([_length(x) for x in side] for side in (student_logits, teacher_logits))
        if ours != theirs or sum(ours) != labels.shape[1]:
            raise ValueError(
                f"student_logits has chunks of {ours} tokens, teacher_logits of {theirs}, labels "
                f"has shape {tuple(labels.shape)}: expected (B, tokens), and both cut alike into "
                "chunks (B, L, V) that add up to all tokens."
            )
        parts = zip(student_logits, teacher_logits, labels.split(ours, dim=1), strict=True)
        total = torch.stack([self._sum(*part) for part in parts]).sum()
        return self._reduced(total, labels, normalize)


def _length(chunk: Side) -> int:
    return (chunk.hidden if isinstance(chunk, LMHead) else chunk).shape[1]


class ForwardKLWithChunkedOutputLoss(_Chunked):
    """:class:`ForwardKLLoss` of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(divergences.forward_kl(), 1.0, ignore_index)
        self.num_output_chunks = num_output_chunks


class ReverseKLWithChunkedOutputLoss(_Chunked):
    """:class:`ReverseKLLoss` of chunks."""

    def __init__(self, num_output_chunks: int = 8, ignore_index: int = -100) -> None:
        super().__init__(divergences.reverse_kl(), 0.0, ignore_index)
        self.num_output_chunks = num_output_chunks


class SymmetricKLWithChunkedOutputLoss(_Chunked):
    """:class:`SymmetricKLLoss` of chunks."""

    def __init__(
        self, num_output_chunks: int = 8, sym_kd_ratio: float = 0.5, ignore_index: int = -100
    ) -> None:
        super().__init__(divergences.mixed_kl(sym_kd_ratio), sym_kd_ratio, ignore_index)
        self.num_output_chunks, self.sym_kd_ratio = num_output_chunks, sym_kd_ratio
