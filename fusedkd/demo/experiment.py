"""Trainings of small models on one text, judged on one set of held-out blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from fusedkd.demo.watch import Watch
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.report.card import make_card
from fusedkd.train.trainer import DistillationTrainer

# of TrainingArguments: one schedule, and nothing written or shown
QUIET: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


@dataclass(frozen=True)
class Experiment:
    """What its trainings share: ``batch`` rows a step, ``options`` of TrainingArguments."""

    work: Path
    console: Console
    held_out: Dataset
    batch: int
    options: dict[str, Any] = field(default_factory=dict)
    collator: Callable[[list[Any]], Any] = default_data_collator
    tokenizers: dict[str, Any] = field(default_factory=dict)  # of DistillationTrainer, if it asks

    def train(
        self, name: str, model: Any, data: Dataset, steps: int, *, teacher: Any = None,
        loss: dict[str, Any] | None = None, evaluations: int = 0,
    ) -> Watch:  # fmt: skip
        """Train for ``steps``, evaluating about ``evaluations`` times, the last time at the end.

        Args:
            loss: arguments of DistillationTrainer, which distils from ``teacher``. None: what the
                model's forward calls loss, by transformers' own Trainer, so that it pays for
                nothing that it does not use.

        Returns:
            The clock and curve, and of a distillation with evaluations its report card.
        """
        watch = Watch(name, self.console)
        every = -(-steps // max(evaluations, 1))
        schedule = {"eval_strategy": "steps" if evaluations else "no", "eval_steps": every}
        options = {**self._options(), **schedule, "max_steps": steps}
        data_and_clock: dict[str, Any] = {
            "train_dataset": data,
            "eval_dataset": self.held_out if evaluations else None,
            "data_collator": self.collator,
            "callbacks": [watch],
        }
        if loss is None:
            trainer = Trainer(model, TrainingArguments(**options), **data_and_clock)
        else:
            # as ``fusedkd distill`` does
            started: dict[str, Any] = {"eval_on_start": bool(evaluations)}
            arguments = DistillationArguments(**options, **started, **loss)
            given = data_and_clock | self.tokenizers
            trainer = DistillationTrainer(model, teacher, arguments, **given)
        trainer.remove_callback(PrinterCallback)  # Watch shows the same, and does not scroll
        metrics = trainer.train().metrics
        if loss is not None and evaluations:
            watch.history = trainer.state.log_history
            last = next(log for log in reversed(watch.history) if "eval_loss" in log)
            watch.card = make_card(trainer, metrics | last, {})
        return watch

    def judge(self, model: Any, teacher: Any) -> dict[str, float]:
        """Held-out metrics of ``model`` beside ``teacher``, which may be the same."""
        teacher = copy.deepcopy(teacher) if teacher is model else teacher
        arguments = DistillationArguments(**self._options())
        trainer = DistillationTrainer(
            model, teacher, arguments, data_collator=self.collator, eval_dataset=self.held_out
        )
        trainer.remove_callback(PrinterCallback)
        metrics: dict[str, float] = trainer.evaluate()
        return metrics

    def _options(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.work),
            "per_device_train_batch_size": self.batch,
            "per_device_eval_batch_size": 4 * self.batch,
            **QUIET,
            **self.options,
        }
