"""Liger-Kernel's losses of two heads: ``liger_kernel.chunked_loss``, and ``LigerFusedLinearJSD`` of
``liger_kernel.transformers``. See :mod:`fusedkd.integrations.liger`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd import LMHead, kd_loss, kd_loss_and_metrics
from fusedkd.integrations.conventions import generalized_jsd
from fusedkd.integrations.liger.cosine import CosineRows
from fusedkd.integrations.liger.functions import DistillationFunction, counted


class _ChunkedLoss(nn.Module):
    """Constructor and call of Liger's chunked losses, and ``vocab_size``: how many columns are
    real where one side is padded further."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        assert temperature != 0, "Temperature cannot be 0."
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size = compiled, chunk_size
        self.return_soft_hard_loss, self.vocab_size = return_soft_hard_loss, vocab_size

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | None,
        teacher_weight: Tensor | None,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """(BT, H), (V, H), (BT, H'), (V, H'), (BT,), (V,), (V,) to a 0-d loss, or to (loss, soft,
        hard) where ``return_soft_hard_loss``, the last two without a graph.

        With ``weight_soft_loss=0`` no teacher is run, and there need be none: its input and weight
        may be None, and ``soft`` is NaN then.

        Raises:
            ValueError: there is no teacher, and ``weight_soft_loss`` is not 0.
        """
        student, teacher = LMHead(student_input, student_weight, student_bias), None
        if teacher_input is not None and teacher_weight is not None:
            teacher = LMHead(teacher_input, teacher_weight, teacher_bias)
        elif self.weight_soft_loss:
            raise ValueError(
                f"teacher_input or teacher_weight is None with weight_soft_loss="
                f"{self.weight_soft_loss}: expected tensors (BT, H') and (V, H'), or "
                "weight_soft_loss=0, which is cross-entropy alone."
            )
        return self._loss(student, teacher, true_labels)

    def _loss(self, student: LMHead, teacher: LMHead | None, labels: Tensor) -> Any:
        raise NotImplementedError

    def _run(
        self, student: LMHead, teacher: LMHead | None, labels: Tensor, weight: float, **soft: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the means of the soft and the hard term if they are wanted."""
        if not weight and not self.return_soft_hard_loss:
            teacher = None  # nothing asks for it
        keywords = {
            "kd_weight": weight,
            "ce_weight": self.weight_hard_loss,
            "ignore_index": self.ignore_index,
            "vocab_size": self.vocab_size,
            **(soft if teacher is not None else {}),
        }
        arguments = _rows(student, teacher, labels)
        if not self.return_soft_hard_loss:
            loss = kd_loss(*arguments, scale_by_t2=False, **keywords)
            return loss, loss, loss
        loss, means = kd_loss_and_metrics(*arguments, scale_by_t2=False, **keywords)
        return loss, means.kd, means.ce


class LigerFusedLinearJSDLoss(_ChunkedLoss):
    """``weight_soft_loss * JSD_beta + weight_hard_loss * CE`` of two heads, mean over the tokens
    whose label is not ``ignore_index``. The temperature is the divergence's alone."""

    def _loss(self, student: LMHead, teacher: LMHead | None, labels: Tensor) -> Any:
        soft = {"divergence": generalized_jsd(self.beta), "temperature": self.temperature}
        parts = self._run(student, teacher, labels, self.weight_soft_loss, **soft)
        return parts if self.return_soft_hard_loss else parts[0]


class LigerFusedLinearCosineSimilarityLoss(_ChunkedLoss):
    """``weight_soft_loss * beta * (1 - cosine) + weight_hard_loss * CE`` of two heads' logits, mean
    over the tokens whose label is not ``ignore_index``. Temperatures cancel in the cosine."""

    @torch._disable_dynamo
    def _loss(self, student: LMHead, teacher: LMHead | None, labels: Tensor) -> Any:
        weight = self.weight_soft_loss * self.beta
        rows = CosineRows(None, student.hidden.device)
        loss, soft, hard = self._run(student, teacher, labels, weight, backend=rows)
        return (loss, self.beta * soft, hard) if self.return_soft_hard_loss else loss


class LigerFusedLinearJSD(nn.Module):
    """JSD of two heads, mean over the tokens whose label is not ``ignore_index``, or over all."""

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
    ) -> None:
        super().__init__()
        assert temperature != 0, "temperature cannot be 0."
        self.jsd_beta, self.ignore_index, self.temperature = jsd_beta, ignore_index, temperature
        self.accum_dtype, self.vocab_size = accum_dtype, vocab_size

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """(BT, H), (V, H), (BT, H'), (V, H'), (BT,) to a 0-d loss."""
        heads = LMHead(student_input, student_weight), LMHead(teacher_input, teacher_weight)
        return kd_loss(
            *_rows(*heads, shift_labels),
            divergence=generalized_jsd(self.jsd_beta),
            temperature=self.temperature,
            scale_by_t2=False,
            ignore_index=self.ignore_index,
            vocab_size=self.vocab_size,
        )


def _rows(student: LMHead, teacher: LMHead | None, labels: Tensor | None) -> tuple[Any, ...]:
    """The same with one leading dimension and a teacher without gradient."""

    def flat(head: LMHead, hidden: Tensor) -> LMHead:
        return LMHead(hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias)

    return (
        flat(student, student.hidden),
        None if teacher is None else flat(teacher, teacher.hidden.detach()),
        None if labels is None else labels.reshape(-1),
    )


# ----------------------------------------------------------------------------------------------
# The function forms: tensors, then the constructors' arguments in their order


def liger_fused_linear_jsd(*args: Any, **kwargs: Any) -> Any:
    """Both of Liger's functions of this name: ``liger_kernel.transformers.functional``'s with
    (student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5,
    ignore_index=-100, temperature=1.0, accum_dtype=None), and ``liger_kernel.chunked_loss``'s,
    whose sixth argument is the student's bias or None.
    """
    if len(args) > 5 and (args[5] is None or isinstance(args[5], Tensor)):
        return LigerFusedLinearJSDLoss(*args[7:])(*args[:7])
    return _fused_linear_jsd(*args, **kwargs)


def _fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Tensor:
    loss = LigerFusedLinearJSD(*options[:4], **named)
    return loss(student_input, student_weight, teacher_input, teacher_weight, shift_labels)


def liger_fused_linear_cosine(*args: Any) -> Any:
    """Student's input and weight, teacher's, labels, the two biases, and the arguments of
    :class:`LigerFusedLinearCosineSimilarityLoss`."""
    return LigerFusedLinearCosineSimilarityLoss(*args[7:])(*args[:7])


class LigerFusedLinearJSDFunction(DistillationFunction):
    """:func:`liger_fused_linear_jsd`, so both of Liger's classes of this name."""

    fused = staticmethod(liger_fused_linear_jsd)

    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor,
        teacher_logits: Tensor,
        beta: float = 0.5,
        target: Tensor | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """The sum of JSD over rows that count."""
        lq, lp = (x.log_softmax(-1) for x in (student_logits, teacher_logits))
        return counted(generalized_jsd(beta).value(lp, lq).sum(-1), target, ignore_index).sum()


class LigerFusedLinearCosineSimilarityFunction(DistillationFunction):
    """:func:`liger_fused_linear_cosine`."""

    fused = staticmethod(liger_fused_linear_cosine)

    @staticmethod
    def distillation_loss_fn(
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        ignore_index: int | None = None,
        beta: float = 1.0,
    ) -> Tensor:
        """The sum of ``beta * (1 - cosine)`` over rows that count."""
        cosine = F.cosine_similarity(student_logits, teacher_logits, dim=-1)
        return counted(beta * (1 - cosine), target, ignore_index).sum()
