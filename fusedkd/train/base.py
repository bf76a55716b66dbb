"""What subclasses of ``transformers.Trainer`` share whose loss is made from the student's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fusedkd.models.columns import columns
from fusedkd.models.heads import loss_in_forward
from fusedkd.models.kinds import HeadOf, bare, router_loss
from fusedkd.train.tasks import Task, task_between
from fusedkd.train.tasks.language import Causal


class FromHeads:
    """To be named before a subclass of ``transformers.Trainer``, for its ``compute_loss``: labels
    in, a micro-batch's share of an optimizer step out."""

    # what the Trainer has
    accelerator: Any
    args: Any
    compute_loss_func: Any
    current_gradient_accumulation_steps: int = 1  # before there are any
    get_tp_size: Any
    loss_is_scaled_for_ga: bool | None
    model: Any

    _student_head: HeadOf
    _task: Task = Causal()
    _loss_shifts_labels: bool  # the Trainer counts a step's tokens in the alignment used here
    _signature_columns: Any

    def _learn(self, teacher: Any, task: str | None) -> None:
        """Find out what the student is distilled to do, and have the Trainer count the labels of a
        step as they are aligned here: the loss divides by their number.

        Raises:
            ValueError: from :func:`fusedkd.train.tasks.task_between`.
        """
        student = bare(self.model)
        self._task = task_between(student, teacher, task)
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, self._task.causal
        self._student_head = HeadOf("student", wanted=self._task.over_tokens)
        self._student_head.look(self.model)

    def _keep_columns_of(self, teacher: Any) -> None:
        """Data sets keep the columns that only the teacher reads."""
        if isinstance(teacher, nn.Module):
            host: Any = self
            host._set_signature_columns_if_needed()
            kept = self._signature_columns or []
            self._signature_columns = [*kept, *sorted(columns(teacher) - set(kept))]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        host: Any = super()
        return host._get_num_items_in_batch(list(map(self._task.counted, batch_samples)), device)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the new model's head is looked up before anything wraps it."""
        host: Any = super()
        model = host.call_model_init(trial)
        if getattr(self, "_student_head", None) is not None:
            self._student_head.look(model)
        return model

    def _refuse_other_losses(self) -> None:
        """Raises ValueError if the Trainer was given a loss that nothing would call."""
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func={self.compute_loss_func}: distillation has a loss of its own, "
                "which would take its place: expected None. To add to the loss, override "
                "compute_loss in a subclass."
            )

    def _sides(
        self, teacher: Any, inputs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """A batch as labels, aligned with the logits, and what each model reads of the rest; a
        teacher that is not a model gets all.

        Raises:
            ValueError: there are no labels.
        """
        rest, student = dict(inputs), bare(self.model)
        labels = self._task.labels(rest)
        if not isinstance(teacher, nn.Module):
            return labels, self._task.inputs(student, None, rest, labels), rest
        ours = self._task.inputs(student, teacher, rest, labels)
        return labels, ours, self._task.inputs(teacher, student, rest, labels)

    def _aligned_labels(self, inputs: dict[str, Any]) -> Tensor:
        """Take the labels out of ``inputs``, aligned with the logits.

        Raises:
            ValueError: there are none.
        """
        return self._task.labels(inputs)

    def _in_forward(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        compute: Callable[[Any], tuple[Tensor, Any]],
        dense: bool,
    ) -> tuple[Tensor, Any, Any]:
        """:func:`fusedkd.models.heads.loss_in_forward` of the student's head, or of its logits
        where ``dense``."""
        head = None if dense else self._student_head.of(model, inputs)
        return loss_in_forward(model, bare(model), head, inputs, compute, self._task.logits)

    def _in_step(self, loss: Tensor, num_items: Any, model: nn.Module, outputs: Any) -> Tensor:
        """The micro-batch's part of the step's loss: gradients are averaged over processes, all of
        whose tokens ``num_items`` counts, and losses are added up over micro-batches, or averaged
        where there is no ``num_items``. A mixture of experts' routers are in it."""
        self.loss_is_scaled_for_ga = num_items is not None
        if num_items is not None and self.args.average_tokens_across_devices:
            # tp ranks share one batch
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        routers = router_loss(bare(model), outputs)
        if not isinstance(routers, Tensor):
            return loss
        summed = model.training and num_items is not None
        steps = self.current_gradient_accumulation_steps if summed else 1
        return loss + routers.to(loss.device) / steps
