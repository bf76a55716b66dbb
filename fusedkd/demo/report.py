"""What the demo leaves behind: a student, a report for machines, one for people, a plot."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fusedkd.files import replace_file, replacing_folder, write_figure, write_json
from fusedkd.train.report.card import gap_closed

LABELS = {
    "teacher": "teacher",
    "plain": "student, no distillation",
    "kd": "student, Hinton's mix: 0.8 KL at T = 2, 0.2 CE",
    "skew": "student, skew KL (DistiLLM), no CE",
    "plain_equal_time": "student, no distillation, as long as Hinton's mix",
}
HEADINGS = ("run", "CE", "best CE", "bits/byte", "agreement", "parameters", "steps", "seconds")


@dataclass
class Run:
    """One training: what it ended with, and how it got there."""

    eval_loss: float  # held-out cross-entropy, nats per token, at the end
    # share of the held-out tokens on which it and the teacher have one favourite
    agreement: float | None
    parameters: int
    train_seconds: float  # evaluations apart
    steps: int
    tokens: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, CE

    @property
    def best_eval_loss(self) -> float:
        """With the checkpoint chosen by hindsight, which flatters a run that overfits."""
        return min([self.eval_loss, *(loss for _, _, loss in self.curve)])


def write_report(
    output: Path, results: Mapping[str, Run], facts: Mapping[str, Any], console: Console
) -> None:
    """Write ``report.json``, ``report.md`` and ``curves.png``; show the same as a table."""
    report = _report(results, facts)
    write_json(output / "report.json", report)
    replace_file(output / "report.md", _markdown(report))
    _plot(output / "curves.png", results)
    table = Table(*HEADINGS, title="Held-out text")
    for name, (_, *row) in zip(LABELS, _rows(report), strict=True):
        table.add_row(name, *row)
    console.print(table)
    console.print(_verdict(report))
    console.print(f"Report, plot and student are in {output}, after {facts['total_seconds']} s")


def save_student(folder: Path, model: Any, tokenizer: Any) -> None:
    """All of it, or nothing."""
    with replacing_folder(folder) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As GitHub shows it."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _report(results: Mapping[str, Run], facts: Mapping[str, Any]) -> dict[str, Any]:
    to_bits = 1 / math.log(2) / facts["bytes_per_token"]
    runs = {
        name: {
            **asdict(run),
            "bits_per_byte": run.eval_loss * to_bits,
            "perplexity": math.exp(min(run.eval_loss, 700.0)),
            "best_eval_loss": run.best_eval_loss,
        }
        for name, run in results.items()
    }
    return {
        **runs,
        "gap_closed": _closed(results, "plain", "eval_loss"),
        "gap_closed_of_best": _closed(results, "plain", "best_eval_loss"),
        "gap_closed_at_equal_time": _closed(results, "plain_equal_time", "eval_loss"),
        "agreement": results["kd"].agreement,
        **facts,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("fusedkd", "torch", "transformers")},
        },
    }


def _closed(results: Mapping[str, Run], plain: str, what: str) -> float | None:
    return gap_closed(*(getattr(results[name], what) for name in (plain, "kd", "teacher")))


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, label in LABELS.items():
        run = report[name]
        losses = [f"{run[key]:.3f}" for key in ("eval_loss", "best_eval_loss", "bits_per_byte")]
        agreement = "" if run["agreement"] is None else f"{run['agreement']:.1%}"
        sizes = [f"{run['parameters']:,}", f"{run['steps']:,}", f"{run['train_seconds']:.0f}"]
        rows.append([label, *losses, agreement, *sizes])
    return rows


def _verdict(report: Mapping[str, Any]) -> str:
    gain = report["plain"]["eval_loss"] - report["kd"]["eval_loss"]
    if gain <= 0:
        return f"Distillation did NOT help here: {-gain:.3f} nats per token worse than without."
    if report["gap_closed"] is None:
        return f"{gain:.3f} nats per token better than without distillation."
    return (
        f"With Hinton's mix (kd) the student is {gain:.3f} nats per token better than without "
        "distillation (plain), at equal steps and from the same initialisation: "
        f"{report['gap_closed']:.0%} of the way from there to the teacher."
    )


def _markdown(report: Mapping[str, Any]) -> str:
    epochs = report["plain"]["tokens"] / report["transfer_tokens"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    equal_time = report["plain_equal_time"]["eval_loss"] - report["kd"]["eval_loss"]
    short = (
        "\nThe machine was slow or busy: there were fewer steps than planned, to end in time.\n"
        if report["shortened"]
        else ""
    )
    return f"""# A distillation on real text

{_verdict(report)}

{markdown_table(HEADINGS, _rows(report))}

![held-out cross-entropy by steps and by seconds](curves.png)

**The setting** is the one in which distillation pays in practice. The teacher has read much text:
{report["teacher"]["tokens"]:,} tokens, none of them twice. The student gets a small transfer set of
{report["transfer_tokens"]:,} tokens and passes over it {epochs:.1f} times. With text to burn it is
otherwise: plain training then spends the time of the teacher's forward passes on fresh text, and
catches up. All text is the Python standard library's sources, split by file, with a byte-level BPE
of {report["vocabulary"]:,} entries trained on the training files only.

**Equal steps and equal time.** The first three students have the same initialisation, batches,
steps and schedule. A distilled step costs more, so the last row trains without distillation for as
long as Hinton's mix took: it ends {abs(equal_time):.3f} nats
{"behind" if equal_time > 0 else "ahead"}.

**Reading the table.** CE is the cross-entropy in nats per token on {report["held_out_tokens"]:,}
tokens of files that nobody trained on, at the end of training; best CE is that of the best of the
evaluations on the way, chosen by hindsight, which is kind to runs that overfit. Agreement is the
share of those tokens for which student and teacher have the same favourite. Seconds are of
training, evaluations apart.

**What this does not show.** One seed and models of about a million parameters: that everything
works together, not how much you will gain.
{short}
Seed {report["seed"]}; {report["total_seconds"]} s in all on {report["machine"]}; {versions}.
"""


def _plot(path: Path, results: Mapping[str, Run]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, column, label in zip(axes, (0, 1), ("steps", "seconds of training"), strict=True):
        for name, run in results.items():
            if name != "teacher":
                points = [(point[column], point[2]) for point in run.curve]
                style = "--" if name == "plain_equal_time" else "-"
                axis.plot(*zip(*points, strict=True), style, marker=".", label=name)
        axis.axhline(results["teacher"].eval_loss, color="grey", linestyle=":", label="teacher")
        axis.set_xlabel(label)
    axes[0].set_ylabel("held-out cross-entropy, nats per token")
    axes[1].legend()
    write_figure(path, figure)
