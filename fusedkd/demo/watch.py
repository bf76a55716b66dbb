"""A progress bar for one training, with its clock and its curve."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from fusedkd.train.report.card import Card

WARM_UP = 2  # steps that pay for threads and caches, left out of seconds_per_step


class Watch(TrainerCallback):
    """Shows a bar; counts the time spent in steps, and not in evaluations between them.

    ``curve`` has (step, seconds of training until then, ``eval_loss``) per evaluation; there is
    one at the last step if there is any.
    """

    def __init__(self, name: str, console: Console) -> None:
        self.name, self.seconds, self.curve = name, 0.0, list[tuple[int, float, float]]()
        self.card: Card | None = None
        self.history: list[Any] = []
        self._times: list[float] = []
        self._bar = Progress(
            TextColumn("  {task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[loss]}"),
            console=console,
        )

    @property
    def seconds_per_step(self) -> float:
        """The mean, without the first steps."""
        times = self._times[WARM_UP:] or self._times
        return sum(times) / len(times)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task = self._bar.add_task(self.name, total=state.max_steps, loss="")
        self._bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._times.append(time.perf_counter() - self._started)
        self.seconds += self._times[-1]
        self._bar.update(self._task, completed=state.global_step)
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not self._times:  # an evaluation without a training
            return
        loss = metrics["eval_loss"]
        self.curve.append((state.global_step, self.seconds, loss))
        self._bar.update(self._task, loss=f"held-out {loss:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.stop()
