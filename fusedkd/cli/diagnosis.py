"""``fusedkd doctor --run``: what a run's log says is wrong, in a sentence and a remedy each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusedkd.errors import UserError
from fusedkd.files import read_json


class Run(NamedTuple):
    """What is known about a run."""

    train: list[dict[str, Any]]  # logs of training
    evals: list[dict[str, Any]]
    card: dict[str, Any]  # distillation.json; empty while the run goes on
    stopped: str = ""  # why

    def last(self, name: str) -> float | None:
        """The newest value that was logged in training."""
        return next((log[name] for log in reversed(self.train) if name in log), None)

    def ends(self, name: str) -> tuple[float, float] | None:
        """The first and the last held-out value."""
        found = [log[name] for log in self.evals if log.get(name) is not None]
        return (found[0], found[-1]) if len(found) > 1 else None

    @property
    def teacher_loss(self) -> float | None:
        """The teacher's own, held out."""
        found = [log["eval_teacher_loss"] for log in self.evals if log.get("eval_teacher_loss")]
        return found[0] if found else None


def report_on(folder: Path) -> int:
    """Print what is wrong with the run in ``folder``; 1 if anything is.

    Raises:
        UserError: there is no run.
    """
    run = read_run(folder)
    found = diagnose(run)
    for sentence in found:
        print(f"- {sentence}")
    if not found:
        steps = run.train[-1]["step"] if run.train else 0
        print(f"{folder}: nothing wrong in the log of {steps:,} steps.")
    if verdict := run.card.get("verdict"):
        print(verdict)
    return int(bool(found))


def read_run(folder: Path) -> Run:
    """The log of a run that is over, or of its newest checkpoint.

    Raises:
        UserError: there is none.
    """
    places = [folder, *sorted(folder.glob("checkpoint-*"), key=_step, reverse=True)]
    states = (read_json(place / "trainer_state.json") for place in places)
    state = next((found for found in states if found is not None), None)
    if state is None or not isinstance(state.get("log_history"), list):
        raise UserError(
            f"--run {folder}: no trainer_state.json in it or in a checkpoint: expected the "
            "--output_dir of a run that has saved something."
        )
    logs = [log for log in state["log_history"] if isinstance(log, dict) and "step" in log]
    return Run(
        [log for log in logs if "loss" in log],
        [log for log in logs if "eval_loss" in log],
        read_json(folder / "distillation.json") or {},
        next((str(log["stopped"]) for log in logs if "stopped" in log), ""),
    )


def _step(path: Path) -> int:
    digits = path.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def diagnose(run: Run) -> list[str]:
    """All that is wrong, the worst first."""
    return [sentence for check in CHECKS for sentence in check(run)]


def _stopped(run: Run) -> Iterator[str]:
    if run.stopped:
        yield f"The run was stopped at {run.stopped}"


def _not_finite(run: Run) -> Iterator[str]:
    for log in (*run.train, *run.evals):
        bad = [k for k, v in log.items() if isinstance(v, float) and not math.isfinite(v)]
        bad = [name for name in bad if name not in ("grad_norm", "eval_perplexity")]
        if bad:
            yield (
                f"At step {log['step']} {', '.join(bad)} was NaN or infinite: load the teacher in "
                "another type (--teacher_dtype bfloat16 or float32), or train at a lower "
                "--learning_rate."
            )
            return


def _nothing_logged(run: Run) -> Iterator[str]:
    if not run.train and not run.evals and not run.stopped:
        yield "Nothing was logged: pass a smaller --logging_steps, or --max_steps."


def _no_labels(run: Run) -> Iterator[str]:
    losses = [log["loss"] for log in run.train]
    speed = run.card.get("speed", {})
    if speed.get("labels_per_second") == 0 or (losses and not any(losses)):
        yield (
            "The loss was 0 in every step, as where no token carries a label: see what the models "
            "get (fusedkd data ...), and --train_on, --max_length."
        )


def _no_rate(run: Run) -> Iterator[str]:
    rates = [log["learning_rate"] for log in run.train if "learning_rate" in log]
    if len(rates) > 1 and not any(rates[:-1]):
        yield "The learning rate was 0: pass --learning_rate, and look at --lr_scheduler_type."


def _gradients(run: Run) -> Iterator[str]:
    norms = [log["grad_norm"] for log in run.train if isinstance(log.get("grad_norm"), float)]
    broken = [norm for norm in norms if not math.isfinite(norm)]
    finite = [norm for norm in norms if math.isfinite(norm)]
    if len(broken) > max(2, len(norms) // 5):
        yield (
            f"{len(broken)} of {len(norms)} logged gradient norms were NaN or infinite: use bf16 "
            "instead of fp16, or a lower --learning_rate."
        )
    if len(finite) < 4:
        return
    start = sorted(finite[: max(3, len(finite) // 4)])
    usual, latest = start[len(start) // 2], max(finite[-max(1, len(finite) // 4) :])
    if latest > 20 * max(usual, 1e-12) and latest > 1:
        yield (
            f"Gradient norms grew from {usual:.3g} to {latest:.3g}: the training is about to "
            "diverge; lower --learning_rate, add --warmup_steps, set --max_grad_norm 1."
        )


def _loss_rises(run: Run) -> Iterator[str]:
    losses = [log["loss"] for log in run.train if math.isfinite(log["loss"])]
    part = len(losses) // 4
    if part < 1:
        return
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if last > 1.1 * first and first > 0:
        yield (
            f"The training loss rose from {first:.4g} to {last:.4g}: lower --learning_rate, or add "
            "--warmup_steps."
        )


def _entropy(run: Run) -> Iterator[str]:
    for logs, prefix in ((run.train, ""), (run.evals, "eval_")):
        pairs = [(log.get(f"{prefix}student_entropy"), log.get(f"{prefix}teacher_entropy"))
                 for log in logs]  # fmt: skip
        known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs]
        if not known or len(logs) < 2:
            continue
        ours, theirs = known[-1]
        if theirs > 0.05 and ours < 0.2 * theirs:
            yield (
                f"The student's entropy collapsed to {ours:.3g} nats, the teacher's is "
                f"{theirs:.3g}: it puts all on one token. Use --divergence forward_kl or "
                "'jsd(beta=0.5)' instead of reverse KL, or a smaller --on_policy_share."
            )
        elif ours > 1.5 * theirs + 0.5 and _not_far(run):
            yield (
                f"The student's entropy is {ours:.3g} nats, the teacher's {theirs:.3g}: it has "
                "not become sure of anything. Train for longer, or at a higher --learning_rate."
            )
        return


def _not_far(run: Run) -> bool:
    """Whether the held-out divergence has hardly fallen."""
    ends = run.ends("eval_kd")
    return ends is not None and ends[1] > 0.8 * ends[0]


def _teacher(run: Run) -> Iterator[str]:
    theirs, begun = run.teacher_loss, run.ends("eval_loss")
    if theirs is not None and begun is not None and theirs >= begun[0]:
        yield (
            f"The teacher is no better than the student was before: held-out losses {theirs:.4f} "
            f"and {begun[0]:.4f}. Take a better teacher, or data that it knows."
        )


def _gap(run: Run) -> Iterator[str]:
    loss, kd, theirs = run.ends("eval_loss"), run.ends("eval_kd"), run.teacher_loss
    if loss is None:
        return
    gained = loss[1] < loss[0] * (1 - 1e-3) or (kd is not None and kd[1] < kd[0] * (1 - 1e-3))
    if not gained:
        yield (
            f"The student is no better than before: held-out loss {loss[0]:.4f} -> {loss[1]:.4f}. "
            "Raise --learning_rate tenfold, train for longer, and see what the data look like "
            "(fusedkd data ...)."
        )
    elif theirs is not None and loss[0] > theirs and loss[1] > loss[0] - 0.05 * (loss[0] - theirs):
        share = (loss[0] - loss[1]) / (loss[0] - theirs)
        yield (
            f"The gap to the teacher is not closing: {share:.0%} of it so far. Train for longer, "
            "at a higher --learning_rate, or with --ce_weight above 0."
        )


def _overfits(run: Run) -> Iterator[str]:
    losses = [log["eval_loss"] for log in run.evals if math.isfinite(log["eval_loss"])]
    best = min(losses, default=0.0)
    if len(losses) > 2 and losses[-1] > 1.05 * best and losses[0] > best:
        step = run.evals[[log["eval_loss"] for log in run.evals].index(best)]["step"]
        yield (
            f"The held-out loss was lowest at step {step} ({best:.4f}) and rose to "
            f"{losses[-1]:.4f}: use more data, fewer epochs, or --load_best_model_at_end."
        )


CHECKS: tuple[Callable[[Run], Iterator[str]], ...] = (
    _stopped, _nothing_logged, _not_finite, _no_labels, _no_rate, _gradients, _loss_rises, _entropy,
    _teacher, _gap, _overfits,
)  # fmt: skip
