"""The trainers of :mod:`fusedkd.integrations.trl`, which subclass TRL's. Importing needs TRL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from trl import DistillationTrainer as _DistillationTrainer
from trl.experimental.gkd import GKDTrainer as _GKDTrainer
from trl.experimental.gold import GOLDTrainer as _GOLDTrainer
from trl.trainer import distillation_trainer

from fusedkd.integrations.conventions import generalized_jsd
from fusedkd.integrations.trl.losses import chunked_divergence_loss, generalized_jsd_loss
from fusedkd.models.heads import next_labels
from fusedkd.teachers import LiveTeacher
from fusedkd.train.base import FromHeads
from fusedkd.train.tasks.language import Causal


class _FromHeads(FromHeads):
    """The loss of GKD and GOLD: ``compute_loss`` from heads, within the wrapped forward."""

    # what the host trainer has
    beta: float
    lmbda: float
    seq_kd: bool
    teacher_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compute_from_heads(Causal())
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        self._teacher_side = LiveTeacher(teacher, self.accelerator.autocast)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As TRL's; with ``return_outputs`` the outputs hold dense logits."""
        batch = self._forward_inputs(inputs) | {"labels": inputs["labels"]}
        self.teacher_model.eval()
        loss, _, outputs = self._head_loss(
            *(model, self._teacher_side.model, self._teacher_side, batch),
            dense=return_outputs,
            divergence=generalized_jsd(self.beta),
            temperature=self._divergence_temperature(),
            scale_by_t2=False,
            normalizer=self._divisor(model, next_labels(inputs["labels"]), num_items_in_batch),
        )
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, model: nn.Module, labels: Tensor, num_items: Any) -> Tensor | None:
        """What a sum over this micro-batch's tokens is divided by, for a gradient that is averaged
        over processes and a loss that is summed over micro-batches, or averaged where
        ``loss_is_scaled_for_ga`` is False."""
        self.loss_is_scaled_for_ga = num_items is not None
        generated = self._generated_tokens(labels) if model.training else None
        if generated is not None:
            counted, self.loss_is_scaled_for_ga = generated
            num_items = self.accelerator.gather(counted.reshape(1)).sum() / self.get_tp_size()
        if num_items is None:
            return None
        processes = 1
        if generated is not None or self.args.average_tokens_across_devices:
            processes = self._processes()
        return torch.as_tensor(num_items, device=labels.device) / processes

    def _generated_tokens(self, labels: Tensor) -> tuple[Tensor, bool] | None:
        """The tokens of this process where the Trainer counted others, and whether they are those
        of all micro-batches."""
        raise NotImplementedError

    def _divergence_temperature(self) -> float:
        return 1.0

    def _forward_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}


class GKDTrainer(_FromHeads, _GKDTrainer):  # type: ignore[misc]
    """TRL's, with its loss from heads; see :mod:`fusedkd.integrations.trl`."""

    generalized_jsd_loss: Any = staticmethod(generalized_jsd_loss)

    def _generated_tokens(self, labels: Tensor) -> tuple[Tensor, bool] | None:
        generates = self.lmbda > 0 or self.seq_kd
        return ((labels != -100).sum(), False) if generates else None


class GOLDTrainer(_FromHeads, _GOLDTrainer):  # type: ignore[misc]
    """TRL's, with the loss of ``use_uld_loss=False`` from heads. ULD is TRL's, a mean over rows,
    averaged over a step's micro-batches (of as many rows each) where TRL adds them up."""

    generalized_jsd_loss: Any = staticmethod(generalized_jsd_loss)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's."""
        if not self.use_uld_loss:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.loss_is_scaled_for_ga = False
        parts = "_matched_sum", "_unmatched_sum"  # for the log, which divides by steps
        before = [getattr(self, part) for part in parts]
        loss = _GOLDTrainer.compute_loss(self, model, inputs, *args, **kwargs)
        for part, old in zip(parts, before, strict=True):
            added = getattr(self, part) - old
            setattr(self, part, old + added / self.args.gradient_accumulation_steps)
        return loss

    def _generated_tokens(self, labels: Tensor) -> tuple[Tensor, bool] | None:
        # A step's micro-batches are made together, and the Trainer counted each of them as often
        # as there are. Lazily made ones (images) are not there yet.
        batches: list[dict[str, Any]] = self._buffered_inputs or []
        if batches and all("labels" in batch for batch in batches):
            counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
            return torch.stack(counts).sum(), True
        return (labels != -100).sum(), False

    def _divergence_temperature(self) -> float:
        return self.temperature

    def _forward_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return super()._forward_inputs(inputs) | self._get_model_forward_kwargs(inputs)


class DistillationTrainer(_DistillationTrainer):  # type: ignore[misc]
    """TRL's, with :func:`fusedkd.integrations.trl.chunked_divergence_loss` in its function's
    place."""

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # TRL reads its loss from its module, and has no hook: it is ours while this runs
        name = "_chunked_divergence_loss"
        theirs = getattr(distillation_trainer, name)  # an error, should TRL have moved it
        setattr(distillation_trainer, name, chunked_divergence_loss)
        try:
            return super()._compute_loss(*args, **kwargs)
        finally:
            setattr(distillation_trainer, name, theirs)
