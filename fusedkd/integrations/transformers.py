"""Distillation for people who keep their own subclass of ``transformers.Trainer``.

One base class turns its ``compute_loss`` into :func:`fusedkd.kd_loss` from heads::

    class MyTrainer(DistillationMixin, Trainer):  # or SFTTrainer, or any other subclass
        pass

    trainer = MyTrainer(model, args, train_dataset=data)
    trainer.distil_from(teacher, divergence="jsd", temperature=2.0, ce_weight=0.5)
    trainer.train()

Everything else stays the host's: data, logging, evaluation of its own metrics, saving. The loss is
computed within the wrapped model's forward and normalised by the tokens of the whole optimizer
step, over micro-batches and processes. ``label_smoothing_factor`` smooths the cross-entropy,
``shift_labels`` are the labels where a batch has them, and the routers of a mixture of experts with
``output_router_logits`` are trained as they are without distillation.
:class:`fusedkd.train.DistillationTrainer` does more (metrics, caches of teachers, evaluation).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedkd.models.kinds import bare, frozen, true_vocabulary
from fusedkd.teachers import LiveTeacher
from fusedkd.train.base import FromHeads
from fusedkd.train.tasks import task_between

__all__ = ["DistillationMixin"]


class DistillationMixin(FromHeads):
    """To be named before a subclass of ``transformers.Trainer``. Without :meth:`distil_from` it
    changes nothing."""

    # what the host has
    aux_loss_enabled: bool = False  # SFTTrainer's: whether it asks for the routers' loss
    processing_class: Any

    _teacher_side: LiveTeacher | None = None
    _loss_keywords: dict[str, Any]
    _logits_are_seen = True

    def distil_from(self, teacher: nn.Module, task: str | None = None, **keywords: Any) -> None:
        """Train towards ``teacher`` from now on.

        Args:
            teacher: a transformers model with the student's vocabulary (padding aside). Switched to
                ``eval()`` and ``requires_grad_(False)`` and moved to the device.
            task: as :class:`fusedkd.train.DistillationArguments` has it (default: by the class).
            **keywords: of :func:`fusedkd.kd_loss`.

        Raises:
            ValueError: teacher and student share parameters, their vocabularies differ, or the
                Trainer has settings for a loss that is not computed now.
        """
        student = bare(self.model)
        self._refuse_other_losses()
        smoothing = keywords.setdefault("label_smoothing", self.args.label_smoothing_factor)
        if smoothing and not keywords.get("ce_weight"):
            raise ValueError(
                f"label_smoothing_factor={smoothing} smooths the cross-entropy, but that has no "
                "weight: expected ce_weight above 0, or label_smoothing_factor=0."
            )
        if (loss := getattr(self.args, "loss_type", "nll")) == "dft":
            raise ValueError(
                f"loss_type={loss!r}: distillation has a loss of its own: expected 'nll'."
            )
        teacher = frozen(teacher, student, self.args.device)
        self._loss_keywords = {"vocab_size": None, **keywords}
        self._compute_from_heads(task_between(student, teacher, task))
        self._keep_columns_of(teacher)
        self._vocabulary(student, teacher)
        self._teacher_side = LiveTeacher(
            teacher, self.accelerator.autocast, self._task.logits, self._task.over_tokens
        )

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
        given = self._teacher_side.model
        keywords = self._loss_keywords | {
            "vocab_size": self._vocabulary(bare(model), given),
            "normalizer": num_items_in_batch,
        }
        if self.aux_loss_enabled:  # which vision-language models read nowhere else
            keywords["own"] = {"output_router_logits": True}
        dense = return_outputs and self._logits_are_seen
        loss, _, outputs = self._head_loss(
            model, given, self._teacher_side, inputs, dense=dense, **keywords
        )
        loss = self._in_step(loss, num_items_in_batch, model, outputs)
        return (loss, outputs) if return_outputs else loss

    def _vocabulary(self, student: Any, teacher: Any) -> int | None:
        """How many columns are real now: embeddings may have been resized."""
        given = self._loss_keywords["vocab_size"]
        if not self._task.over_tokens:
            return None
        return true_vocabulary(student, teacher, given, self.processing_class)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As the host's, without logits where only the loss is looked at."""
        host: Any = super()
        self._logits_are_seen = not prediction_loss_only
        try:
            return host.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._logits_are_seen = True
