"""transformers' Trainer with a distillation loss. Everything that is not the loss is the
Trainer's."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from fusedkd import LMHead, Routed, SparseTeacher
from fusedkd.cache.reader import TeacherCache
from fusedkd.data.two_templates import CONVERSATION
from fusedkd.models.kinds import bare, frozen, is_compiled, true_vocabulary
from fusedkd.models.tokenizers import check_same
from fusedkd.teachers import CachedTeacher, LiveTeacher, RoutedTeachers, ServedTeacher
from fusedkd.teachers.aligned import Aligned, AlignedTeacher
from fusedkd.teachers.routed import RoutedSide, Side
from fusedkd.teachers.spread import SpreadTeacher, is_spread
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.base import FromHeads
from fusedkd.train.checkpoints import staged
from fusedkd.train.finite import Finite, check_weights, finite_rows
from fusedkd.train.meter import Measured, Meter, without_repeats
from fusedkd.train.objective import Objective
from fusedkd.train.report.clock import Clock
from fusedkd.train.targets import Targets
from fusedkd.train.tasks import task_between
from fusedkd.train.term_set import TermSet, as_labels, real_tokens

logger = logging.getLogger(__name__)

_HELD_OUT = ("ce", "mse")  # what a student is judged by, whatever it is trained on

Inputs = dict[str, Any]
Teacher = Tensor | LMHead | SparseTeacher | Routed | Aligned
Teachers = nn.Module | TeacherCache | ServedTeacher | RoutedTeachers


class DistillationTrainer(FromHeads, Trainer):
    """Train ``model`` to match ``teacher``, with the loss of :func:`fusedkd.kd_loss`.

    Logits never exist: both models' output projections are entered with no rows, and the loss is
    computed from their inputs (:mod:`fusedkd.models.heads`). That happens **inside the wrapped
    model's forward**, and the loss leaves it as ``outputs["loss"]``: DDP, FSDP and ZeRO therefore
    see an ordinary model that returns an ordinary loss, gather the weights when it needs them and
    synchronise every gradient. A model without a plain head is run as it is and its dense logits
    are compared; a warning says so once.

    Labels are shifted for causal models and not for masked ones, and only tokens whose label is
    not -100 count, in the divergence too unless ``kd_tokens="all"``. The loss is the sum over the
    tokens of an optimizer step divided by their number, over all micro-batches and processes, so
    that it does not depend on how the step is cut up. That holds for ``args.terms`` as well, which
    are means over the tokens that are not padding. Sequence classifiers are compared class by
    class.

    Logged beside ``loss``: ``kd`` (the raw divergence), ``ce``, ``teacher_entropy``,
    ``student_entropy`` (nats per token), ``top1_agreement``, ``student_accuracy`` and
    ``teacher_accuracy``, token-weighted means since the last log, over the steps that
    ``args.metrics`` says; with a cache also ``student_mass`` and ``teacher_mass``, the probability
    of its entries. Evaluation reports the student's cross-entropy as ``eval_loss``,
    ``eval_perplexity``, and the same metrics.

    Args:
        model: the student, a transformers model with a language-modelling head.
        teacher: same vocabulary (padding aside). Switched to ``eval()`` and
            ``requires_grad_(False)`` and moved to the device; never wrapped, trained or saved. Its
            dtype is left alone. Or a :class:`fusedkd.cache.TeacherCache` that holds the answers to
            every sequence of the data, or a :class:`fusedkd.teachers.ServedTeacher` that asks a
            server for them; there is then no model, and ``args.teacher_tail`` counts. Or several
            of all these, :class:`fusedkd.teachers.RoutedTeachers`.
        args: see :class:`DistillationArguments`.
        teacher_processing_class: the teacher's tokenizer. With ``args.cross_tokenizer`` it may be
            another than ``processing_class``: each batch's text is then read to both, and what is
            compared is said in :mod:`fusedkd.train.across`; a data set's column ``conversation``
            tells it what a row was made from (:mod:`fusedkd.data.two_templates`). Without, they are
            checked to be one.
        **kwargs: as for :class:`transformers.Trainer` (datasets, collator, ``processing_class``,
            callbacks, ...).

    Raises:
        UserError: the two tokenizers differ, and there is no ``args.cross_tokenizer``.
        ValueError: teacher and student share parameters, their vocabularies or classes differ, a
            term does not fit them, or there is a ``compute_loss_func``.
        CacheError: a cache of another tokenizer, without the temperature, not for this divergence,
            or without some sequence of a data set.
    """

    args: DistillationArguments
    model: Any  # a PreTrainedModel, or what wraps one

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        teacher: PreTrainedModel | Teachers | None = None,
        args: DistillationArguments | None = None,
        teacher_processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(teacher, Teachers):
            raise TypeError(
                f"teacher={teacher!r}: expected a model, such as AutoModelForCausalLM returns, a "
                "TeacherCache, a ServedTeacher or RoutedTeachers."
            )
        args = DistillationArguments() if args is None else args
        if args.n_gpu > 1:  # hooks and DataParallel's replicas in threads do not go together
            logger.warning(
                "torch.nn.DataParallel is not supported: using one GPU. torchrun uses them all."
            )
            args._n_gpu = 1
        self.teacher, self.terms = teacher, TermSet(args.terms)
        self._counts_tokens = bool(self.terms) or args.kd_tokens == "all"
        if model is not None:
            self.terms.attach(model, teacher)
        super().__init__(model, args, **kwargs)
        self._refuse_other_losses()
        self._refuse_compiled_terms(self.model)
        parts, column = RoutedTeachers.parts(teacher)
        for part in parts.values():
            task = task_between(bare(self.model), part, args.task)
        self._compute_from_heads(task)
        self._keep_columns_of(*parts.values())
        if column is not None:
            self._signature_columns = [*(self._signature_columns or ()), column]
        if args.cross_tokenizer is not None:
            self._signature_columns = [*(self._signature_columns or ()), CONVERSATION]
        self._loss_keywords = args.loss_keywords()
        self._teacher_tokenizer = teacher_processing_class
        self._teach(teacher)
        if args.on_policy_share and not self._task.writes:
            raise ValueError("on_policy_share: expected a decoder, which can write.")
        if args.kd_tokens == "all" and self._task.over_tokens and not self._task.per_token:
            raise ValueError(
                "kd_tokens='all': the answers of an encoder-decoder are at its labels, not at its "
                "input's tokens: expected 'labels'."
            )
        self._meters = {True: Meter(), False: Meter()}  # by model.training
        self._objective = Objective(args, self._loss_keywords)
        self._finite = Finite()
        self._teacher_loss_known = False
        self.clock = Clock(self.args.device)
        self.labels_seen: Tensor | int = 0  # in this session, by all processes
        self._step_tokens: Tensor | int | None = None

    def _teach(self, teacher: Teachers) -> None:
        """Make the teacher's side of the loss, and have batches come with what it needs."""
        parts, column = RoutedTeachers.parts(teacher)
        self._check_tokenizers(teacher)
        sides: dict[str, Any] = {name: self._side(part) for name, part in parts.items()}
        side: Any = sides[""] if column is None else RoutedSide(column, sides)
        self._teacher_side = side
        self._loss_keywords["vocab_size"] = self._vocabulary(bare(self.model))
        if isinstance(side, LiveTeacher | AlignedTeacher) and side.model is not None:
            self.teacher = side.model
        if isinstance(side, LiveTeacher):
            return
        side.check(self.processing_class, training=self.train_dataset, evaluation=self.eval_dataset)
        if self.args.on_policy_share and column is not None:
            raise ValueError("on_policy_share: what the student writes has no teacher's name.")
        if self.args.on_policy_share:  # what the student will write is asked for when it is there
            return
        self.data_collator = side.collator(self.data_collator)
        ahead = [x.service.ahead for x in parts.values() if isinstance(x, ServedTeacher)]
        if any(ahead):
            # they wait for the server, and need no core of their own
            warnings.filterwarnings("ignore", "This DataLoader will create")
            workers = max(self.args.dataloader_num_workers, *ahead)
            self.args.dataloader_num_workers = workers

    def _check_tokenizers(self, teacher: Teachers) -> None:
        kind, ours, theirs = (
            self.args.cross_tokenizer,
            self.processing_class,
            self._teacher_tokenizer,
        )
        if kind is None:
            if ours is not None and theirs is not None:
                check_same(ours, theirs, {"student": "the student's", "teacher": "the teacher's"})
            return
        one = not isinstance(teacher, RoutedTeachers)
        if not one or not self._task.writes or not self._task.causal:
            raise ValueError(f"cross_tokenizer={kind!r}: expected decoders, and one teacher.")
        if ours is None or theirs is None:
            raise ValueError(
                f"cross_tokenizer={kind!r}: expected both tokenizers, the student's as "
                "processing_class, the teacher's as teacher_processing_class."
            )

    def _side(self, teacher: nn.Module | TeacherCache | ServedTeacher) -> Side | AlignedTeacher:
        if isinstance(teacher, nn.Module):
            model = frozen(teacher, self.model, self.args.device)
            task = self._task
            kind = SpreadTeacher if is_spread(model) else LiveTeacher
            if self.terms and kind is SpreadTeacher:
                raise ValueError(
                    "terms: a teacher that is split over processes runs their batches one after "
                    "the other, whose states would be mixed: expected none."
                )
            live = kind(model, self.accelerator.autocast, task.logits, task.over_tokens)
            if self.args.cross_tokenizer is None:
                return live
            if kind is SpreadTeacher:
                raise ValueError(
                    "cross_tokenizer: expected a teacher that is whole in each process, not one "
                    "that is split over them."
                )
            return self._aligned(live)
        self.args.check_for_cache(asks=isinstance(teacher, ServedTeacher))
        if self._task.no_cache:
            raise ValueError(self._task.no_cache)
        if self.args.cross_tokenizer is not None:
            return self._aligned(teacher)
        return CachedTeacher(
            teacher,
            self._loss_keywords["divergence"],
            self.args.teacher_temperature or self.args.temperature,
            self.args.teacher_tail,
        )

    def _aligned(self, teacher: LiveTeacher | TeacherCache | ServedTeacher) -> AlignedTeacher:
        kind = self.args.cross_tokenizer
        assert kind is not None
        tokenizers = self.processing_class, self._teacher_tokenizer
        return AlignedTeacher(teacher, bare(self.model), *tokenizers, kind)

    def _vocabulary(self, student: Any) -> int | None:
        """How many columns are real now: embeddings may have been resized."""
        given, tokenizer = self.args.vocab_size, self.processing_class
        if not self._task.over_tokens or self.args.cross_tokenizer is not None:
            return None

        def of(side: Side) -> int | None:
            if isinstance(side, CachedTeacher):
                return side.vocabulary(student, given)
            return true_vocabulary(student, side.model, given, tokenizer)

        side = self._teacher_side
        return side.vocabulary(of) if isinstance(side, RoutedSide) else of(side)

    def _refuse_compiled_terms(self, model: nn.Module) -> None:
        compiles = self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO
        if self.terms and (compiles or is_compiled(model)):
            raise ValueError(f"terms={self.args.terms}: torch_compile traces past their hooks.")

    @property
    def measure(self) -> str:
        """What ``eval_loss`` is, for people."""
        return self._task.measure(bare(self.model))

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; terms are bound to the new model."""
        model: Any = super().call_model_init(trial)
        self.terms.attach(model, self.teacher)
        return model

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of one micro-batch; with ``return_outputs`` the outputs hold dense
        logits."""
        loss, _, outputs = self._distill(model, inputs, num_items_in_batch, dense=return_outputs)
        loss = self._in_step(loss, num_items_in_batch, model, outputs)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the Trainer's. The student may write some of the batches; the real tokens of the step
        are counted, too, for what is a mean over them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.on_policy_share:
            inner, write = self.accelerator.unwrap_model(self.model), self.args.on_policy()
            first = (2**24 * self.args.seed + self.state.global_step) * 2**12
            batches = [write(inner, batch, first + i) for i, batch in enumerate(batches)]
            items = self._get_num_items_in_batch(batches, device)
        self.labels_seen = self.labels_seen + (0 if items is None else items)
        if self._counts_tokens:
            self._step_tokens = self._get_num_items_in_batch(list(map(as_labels, batches)), device)
        return batches, items

    def _distill(
        self, model: nn.Module, inputs: Inputs, num_items: Tensor | int | None, dense: bool = False
    ) -> tuple[Tensor, Measured, Any]:
        self._refuse_compiled_terms(model)
        side = self._teacher_side
        if isinstance(side, AlignedTeacher):
            inputs, read = side.take(inputs)
            labels, ours, _ = self._head_loss.sides(self.model, None, inputs)
            theirs = read
        else:
            labels, ours, theirs = self._head_loss.sides(self.model, self.teacher, inputs)
        tokens = real_tokens(inputs) if self._counts_tokens else None
        num_tokens = None if num_items is None else self._step_tokens
        done = self.state.global_step / max(self.state.max_steps, 1)
        measured = not model.training or self._measures_this_step()
        inner = bare(model)
        targets = Targets(
            compare=self._task.compare(inner, self.teacher, labels),
            labels=labels,
            tokens=tokens,
            everywhere=self.args.kd_tokens == "all" and self._task.per_token,
            num_items=num_items,
            num_tokens=num_tokens,
            training=model.training,
            measured=measured,
            done=done,
            steps=self.state.max_steps,
        )
        with self.terms.watch(self.teacher) as states, self._timed("teacher"):
            teacher = self._teacher_side(theirs)
            teacher = self._task.trimmed(self.teacher, teacher, labels)
        self._loss_keywords["vocab_size"] = self._vocabulary(inner)
        weights = self._objective.numbers(done)
        with self.terms.in_forward(inner, states, tokens, num_tokens, weights) as extra:
            loss, (metrics, rows), outputs = self._head_loss.in_forward(
                *(model, ours, lambda student: self._loss(student, teacher, targets), dense)
            )
        if dense or self._student_head.found is None:  # the terms were there before the loss
            loss = loss + extra.loss
        if measured:
            metrics = {**metrics, **extra.measured(tokens, num_tokens)}
        self._meters[model.training].add(metrics)
        self._finite.see(self, model.training, loss.detach(), rows, ours)
        return loss, metrics, outputs

    def _measures_this_step(self) -> bool:
        """Whether this training step's metrics are wanted: of those that are logged, or of all."""
        if self.args.metrics != "logging_steps" or self.args.logging_strategy != "steps":
            return self.args.metrics != "none"
        step = self.state.global_step + 1
        first = step == 1 and self.args.logging_first_step
        return first or step % max(self.state.logging_steps, 1) == 0

    def _loss(
        self, student: Tensor | LMHead, teacher: Teacher, targets: Targets
    ) -> tuple[Tensor, tuple[Measured, Callable[[], dict[str, Tensor | None]]]]:
        """The loss, what was measured, and what tells which rows of either side are finite."""
        student = self._task.trimmed(self.model, student, targets.labels)
        counted = targets.tokens if targets.everywhere else targets.labels != -100
        side = teacher.side if isinstance(teacher, Aligned) else teacher
        sides = {"teacher": side, "student": student}
        # a head's hidden states and weight may differ in dtype
        with self.accelerator.autocast(), self._timed("loss"):
            loss, metrics = self._objective(student, teacher, targets)
            if not targets.training and not self._teacher_loss_known:
                metrics = {**metrics, **self._teacher_loss(teacher, targets)}
        return loss, (metrics, lambda: {n: finite_rows(side, counted) for n, side in sides.items()})

    def _teacher_loss(self, teacher: Teacher, targets: Targets) -> Measured:
        """The teacher's own cross-entropy, as if it were the student."""
        if not isinstance(self.teacher, nn.Module) or self.args.cross_tokenizer is not None:
            return {}
        alone = {**self._loss_keywords, "kd_weight": 0.0, "ce_weight": 1.0}
        _, metrics = targets.compare(True, teacher, teacher, targets.labels, **alone)
        return {f"teacher_{name}": metrics[name] for name in _HELD_OUT if name in metrics}

    def _timed(self, name: str) -> AbstractContextManager[None]:
        return self.clock(name if self.model.training else f"{name}, evaluation")

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, timed."""
        with self.clock("step"):
            return super().training_step(*args, **kwargs)

    @property
    def writes(self) -> bool:
        """Whether the student is one that can continue text."""
        return self._task.writes

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but no model with NaN in it: what was saved before stays. Files in
        ``args.output_dir`` itself are replaced when all of them are written.

        Raises:
            NotFinite: some weight is.
        """
        self._finite.check(self, wait=True)
        check_weights(self)
        with staged(self, output_dir) as folder:
            super().save_model(folder, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:  # now that it is there
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.terms.save(self.accelerator.unwrap_model(self.model), output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.terms.load(self.accelerator.unwrap_model(self.model), checkpoint)

    # ---- logging and evaluation ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a training log also gets the means of the metrics since the last
        one."""
        self.clock.read()
        if "loss" in logs:
            self._finite.check(self, wait=True)  # the Trainer has just waited for the loss
            logs.update(self._meters[True].means())
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The student's cross-entropy, without logits unless ``compute_metrics`` needs them."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = dict(without_repeats(inputs, self.accelerator))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics, _ = self._distill(model, self._prepare_inputs(inputs), None)
        found = next((metrics[name][0] for name in _HELD_OUT if name in metrics), loss.detach())
        return found, None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with token-weighted means: ``eval_loss`` (cross-entropy),
        ``eval_perplexity``, ...; the first time also the teacher's own, ``eval_teacher_loss``."""
        meter = self._meters[False]
        meter.reset()
        with self.clock("evaluation"):
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._finite.check(self, wait=True)
        means = meter.means()
        if output.metrics is not None:
            held_out = next((means[name] for name in _HELD_OUT if name in means), None)
            if held_out is not None:
                means["loss"] = held_out
            for name in _HELD_OUT:
                if (theirs := means.pop(f"teacher_{name}", None)) is not None:
                    means["teacher_loss"], self._teacher_loss_known = theirs, True
            if (ce := means.pop("ce", None)) is not None and self._task.over_tokens:
                means["perplexity"] = math.exp(ce) if ce < 700 else math.inf
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
            )
        return output
