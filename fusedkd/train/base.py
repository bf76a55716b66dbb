"""How a student's loss is made of its head within its forward: what the trainer, the hosts' and
:mod:`fusedkd.hf` share, and what subclasses of ``transformers.Trainer`` need beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from fusedkd.models.columns import columns
from fusedkd.models.heads import loss_in_forward
from fusedkd.models.kinds import HeadOf, bare, router_loss
from fusedkd.train.meter import Measured
from fusedkd.train.tasks import Task
from fusedkd.train.tasks.language import Causal


class HeadLoss:
    """The loss of a student's head, or of its logits where it has no plain one, computed within its
    wrapped forward.

    Args:
        task: what the student is distilled to do.
        context: what the loss is computed in, such as ``accelerator.autocast``: a head's hidden
            states and weight may differ in dtype.
    """

    def __init__(
        self, task: Task, context: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self.task, self.context = task, context
        self.head = HeadOf("student", wanted=task.over_tokens)

    def __call__(
        self,
        model: nn.Module,
        teacher: Any,
        answer: Callable[[dict[str, Any]], Any],
        batch: Mapping[str, Any],
        *,
        own: Mapping[str, Any] | None = None,
        metrics: bool = False,
        dense: bool = False,
        **keywords: Any,
    ) -> tuple[Tensor, Measured, Any]:
        """The loss of one batch, what was measured if ``metrics``, and the student's outputs, which
        hold logits if ``dense``.

        Args:
            model: the student, as it is wrapped.
            teacher, answer: a model, or what is none, and what gives its answers for a batch.
            batch: with labels, as transformers' models take them.
            own: inputs of the student alone.
            **keywords: of :func:`fusedkd.kd_loss`.
        """
        labels, ours, theirs = self.sides(model, teacher, batch)
        given = self.task.trimmed(teacher, answer(theirs), labels)
        compare = self.task.compare(bare(model), teacher, labels)

        def compute(student: Any) -> tuple[Tensor, Measured]:
            student = self.task.trimmed(model, student, labels)
            with self.context():
                return compare(metrics, student, given, labels, **keywords)

        return self.in_forward(model, {**ours, **(own or {})}, compute, dense)

    def sides(
        self, student: nn.Module, teacher: Any, batch: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        """A batch as labels, aligned with the logits, and what each model reads of the rest; a
        teacher that is not a model gets all.

        Raises:
            ValueError: there are no labels.
        """
        rest, inner = dict(batch), bare(student)
        labels = self.task.labels(rest)
        if not isinstance(teacher, nn.Module):
            return labels, self.task.inputs(inner, None, rest, labels), rest
        ours = self.task.inputs(inner, teacher, rest, labels)
        return labels, ours, self.task.inputs(teacher, inner, rest, labels)

    def in_forward(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        compute: Callable[[Any], tuple[Tensor, Any]],
        dense: bool = False,
    ) -> tuple[Tensor, Any, Any]:
        """:func:`fusedkd.models.heads.loss_in_forward` of the student's head, or of its logits
        where ``dense``."""
        head = None if dense else self.head.of(model, inputs)
        return loss_in_forward(model, bare(model), head, inputs, compute, self.task.logits)


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

    _head_loss: HeadLoss  # once there is a distillation
    _loss_shifts_labels: bool  # the Trainer counts a step's tokens in the alignment used here
    _signature_columns: Any

    @property
    def _task(self) -> Task:
        return self._head_loss.task if hasattr(self, "_head_loss") else Causal()

    @property
    def _student_head(self) -> HeadOf:
        return self._head_loss.head

    def _compute_from_heads(self, task: Task) -> None:
        """From now on; the Trainer counts the labels of a step as they are aligned here, for the
        loss divides by their number."""
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, task.causal
        self._head_loss = HeadLoss(task, self.accelerator.autocast)
        self._student_head.look(self.model)

    def _keep_columns_of(self, *teachers: Any) -> None:
        """Data sets keep the columns that only the teachers read."""
        host: Any = self
        host._set_signature_columns_if_needed()
        for teacher in teachers:
            if isinstance(teacher, nn.Module):
                kept = self._signature_columns or []
                self._signature_columns = [*kept, *sorted(columns(teacher) - set(kept))]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        host: Any = super()
        return host._get_num_items_in_batch(list(map(self._task.counted, batch_samples)), device)

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the new model's head is looked up before anything wraps it."""
        host: Any = super()
        model = host.call_model_init(trial)
        if hasattr(self, "_head_loss"):
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

    def _processes(self) -> int:
        """Over how many gradients are averaged: tensor-parallel ranks share one batch."""
        return int(self.accelerator.num_processes // self.get_tp_size())

    def _in_step(self, loss: Tensor, num_items: Any, model: nn.Module, outputs: Any) -> Tensor:
        """The micro-batch's part of the step's loss: gradients are averaged over processes, all of
        whose tokens ``num_items`` counts, and losses are added up over micro-batches, or averaged
        where there is no ``num_items``. A mixture of experts' routers are in it."""
        self.loss_is_scaled_for_ga = num_items is not None
        if num_items is not None and self.args.average_tokens_across_devices:
            loss = loss * self._processes()
        routers = router_loss(bare(model), outputs)
        if not isinstance(routers, Tensor):
            return loss
        summed = model.training and num_items is not None
        steps = self.current_gradient_accumulation_steps if summed else 1
        return loss + routers.to(loss.device) / steps
