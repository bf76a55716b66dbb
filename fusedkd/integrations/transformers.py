"""Distillation for people who keep their own subclass of ``transformers.Trainer``.

One base class turns its ``compute_loss`` into :func:`fusedkd.kd_loss` from heads::

    class MyTrainer(DistillationMixin, Trainer):  # or SFTTrainer, or any other subclass
        pass

    trainer = MyTrainer(model, args, train_dataset=data)
    trainer.distil_from(teacher, divergence="jsd", temperature=2.0, ce_weight=0.5)
    trainer.train()

Everything else stays the host's: data, logging, evaluation of its own metrics, saving. The loss is
computed within the wrapped model's forward and normalised by the tokens of the whole optimizer
step, over micro-batches and processes. :class:`fusedkd.train.DistillationTrainer` does more
(metrics, caches of teachers, evaluation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, kd_loss
from fusedkd.train.heads import loss_in_forward, next_labels
from fusedkd.train.models import StudentHead, frozen, is_causal, true_vocabulary
from fusedkd.train.teachers import LiveTeacher

__all__ = ["DistillationMixin"]


class DistillationMixin:
    """To be named before a subclass of ``transformers.Trainer``. Without :meth:`distil_from` it
    changes nothing."""

    # what the host has
    accelerator: Any
    args: Any
    model: Any
    processing_class: Any
    get_tp_size: Any

    _teacher_side: LiveTeacher | None = None
    _student_head: StudentHead
    _loss_keywords: dict[str, Any]

    def distil_from(self, teacher: nn.Module, **keywords: Any) -> None:
        """Train towards ``teacher`` from now on.

        Args:
            teacher: a transformers model with the student's vocabulary (padding aside). Switched to
                ``eval()`` and ``requires_grad_(False)`` and moved to the device.
            **keywords: of :func:`fusedkd.kd_loss`.

        Raises:
            ValueError: teacher and student share parameters, or their vocabularies differ.
        """
        student = self.accelerator.unwrap_model(self.model)
        teacher = frozen(teacher, student, self.args.device)
        keywords["vocab_size"] = true_vocabulary(
            student, teacher, keywords.get("vocab_size"), self.processing_class
        )
        self._loss_keywords = keywords
        self._causal = is_causal(student)
        # the Trainer is to count a step's tokens, aligned as they are here
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, self._causal
        self._student_head = StudentHead(student)
        self._teacher_side = LiveTeacher(teacher, self.accelerator.autocast)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's; with ``return_outputs`` the outputs hold dense logits."""
        if self._teacher_side is None:
            host: Any = super()
            return host.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        labels = next_labels(labels) if self._causal else labels
        teacher = self._teacher_side(inputs)
        divisor = self._divisor(num_items_in_batch)

        def compute(student: Tensor | LMHead) -> tuple[Tensor, None]:
            with self.accelerator.autocast():
                loss = kd_loss(student, teacher, labels, **self._loss_keywords, normalizer=divisor)
            return loss, None

        inner = self.accelerator.unwrap_model(model)
        head = None if return_outputs else self._student_head.of(inner)
        loss, _, outputs = loss_in_forward(model, inner, head, inputs, compute)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, num_items: Tensor | int | None) -> Tensor | None:
        """Gradients are averaged over processes, so each divides by its share of the tokens."""
        self.loss_is_scaled_for_ga = num_items is not None
        if num_items is None:
            return None
        averaged = self.args.average_tokens_across_devices
        processes = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        return torch.as_tensor(num_items, device=self.args.device) / processes
