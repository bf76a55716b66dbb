"""The report card of a run: its numbers, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from fusedkd.files import replace_file, write_json
from fusedkd.train.report.curves import write_curves
from fusedkd.train.report.peak import peak_bytes

Card = dict[str, Any]
Losses = Mapping[str, float]

MARKER = "<!-- written by fusedkd -->"
_LEAST = 1e-3  # of a number: less than that is no progress
_ROWS = {  # of an evaluation
    "eval_loss": ("cross-entropy, nats per token", ".4f"),
    "eval_perplexity": ("perplexity", ",.2f"),
    "eval_kd": ("divergence from the teacher", ".4f"),
    "eval_top1_agreement": ("agreement with the teacher", ".2%"),
    "eval_student_accuracy": ("accuracy", ".2%"),
    "eval_student_entropy": ("entropy of its answers, nats", ".4f"),
}
_TEACHER = {
    "eval_loss": "eval_teacher_loss",
    "eval_student_accuracy": "eval_teacher_accuracy",
    "eval_student_entropy": "eval_teacher_entropy",
}


def make_card(trainer: Any, metrics: Losses, samples: Mapping[str, Any]) -> Card:
    """The numbers of a run that is over.

    Args:
        trainer: with the log of the whole run, as a checkpoint keeps it.
        metrics: of its training and of its last evaluation.
        samples: texts by who wrote them.
    """
    history = trainer.state.log_history
    begun: list[Any] = [log for log in history if log["step"] == 0 and "eval_loss" in log]
    before = begun[0] if begun else {}
    teacher = next((x for log in history if (x := log.get("eval_teacher_loss")) is not None), None)
    return {
        **metrics,
        "measure": trainer.measure,
        "steps": trainer.state.global_step,
        "before": dict(before),
        "eval_teacher_loss": teacher,
        "gap_closed": gap_closed(before.get("eval_loss"), metrics.get("eval_loss"), teacher),
        "verdict": verdict(history, before, metrics, teacher),
        "speed": _speed(trainer, metrics),
        "samples": samples,
    }


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """(before - after) / (before - teacher) of held-out losses; None without a gap to close."""
    if before is None or after is None or teacher is None or not before > teacher:
        return None
    return (before - after) / (before - teacher)


def verdict(history: list[Any], before: Losses, after: Losses, teacher: float | None) -> str:
    """One paragraph; "Nothing was learned" where neither held-out number got better."""
    if not before or "eval_loss" not in after:
        return _by_training_loss(history)
    names = {"eval_loss": "cross-entropy", "eval_kd": "divergence from the teacher"}
    pairs = {n: (before[n], after[n]) for n in names if n in before and n in after}
    if broken := [names[name] for name, pair in pairs.items() if not all(map(math.isfinite, pair))]:
        return f"The held-out {' and '.join(broken)} is not a finite number: this run is broken."
    better = [name for name, (old, new) in pairs.items() if new < old - _LEAST * abs(old)]
    moved = ", ".join(f"{names[n]} {old:.4f} -> {new:.4f}" for n, (old, new) in pairs.items())
    if not better:
        return f"Nothing was learned: held-out {moved}. See fusedkd doctor --run."
    closed = gap_closed(before.get("eval_loss"), after.get("eval_loss"), teacher)
    gap = "" if closed is None else f", {closed:.0%} of the way from the start to the teacher"
    if "eval_loss" in better:
        return f"The student learned: held-out {moved}{gap}."
    return f"The student came closer to its teacher, but predicts no better: held-out {moved}."


def _by_training_loss(history: list[Any]) -> str:
    losses = [log["loss"] for log in history if "loss" in log]
    if len(losses) < 2:
        return "Whether the student learned is not known: there were no held-out data."
    moved = f"the training loss went from {losses[0]:.4f} to {losses[-1]:.4f}"
    if losses[-1] < losses[0] - _LEAST * abs(losses[0]):
        return f"Nothing was held out; {moved}."
    return f"Nothing was learned: {moved}. See fusedkd doctor --run."


def _speed(trainer: Any, metrics: Losses) -> dict[str, float]:
    """Of this session: one that was resumed does not know about those before."""
    evaluating = trainer.clock.read().get("evaluation", 0.0)
    seconds = max(metrics.get("train_runtime", 0.0) - evaluating, 1e-9)
    found = {f"{name}_share": share for name, share in trainer.clock.shares().items()}
    return {
        "labels_per_second": float(trainer.labels_seen) / seconds,
        "peak_bytes": peak_bytes(trainer.args.device),
        **found,
    }


# ---- for people --------------------------------------------------------------------------------


def write_card(folder: Path, card: Card, history: list[Any], about: Mapping[str, str]) -> None:
    """``distillation.json``, ``report.md``, ``curves.png`` and, unless somebody wrote one, the
    model card ``README.md``.

    Args:
        about: what was distilled, by whom, and how, in words.
    """
    write_json(folder / "distillation.json", card)
    write_curves(folder / "curves.png", history, card["eval_teacher_loss"])
    text = markdown(card, about)
    replace_file(folder / "report.md", f"# Distillation report\n\n{text}")
    readme = folder / "README.md"
    if not readme.exists() or MARKER in readme.read_text(errors="replace"):
        replace_file(readme, model_card(text, about))


def model_card(text: str, about: Mapping[str, str]) -> str:
    """The Hub's README.md: metadata, then the report."""
    named = about["student"]
    on_hub = not Path(named).exists() and named.count("/") == 1 and named[0] not in "./~"
    data = ModelCardData(
        library_name="transformers",
        base_model=named if on_hub else None,
        tags=["distillation", "fusedkd"],
    )
    head = f"---\n{data.to_yaml()}\n---\n{MARKER}\n\n"
    return f"{head}# {Path(named).name}, distilled from {Path(about['teacher']).name}\n\n{text}"


def markdown(card: Card, about: Mapping[str, str]) -> str:
    """The report, without a title."""
    parts = [card["verdict"], _table(card)]
    parts += ["![loss and held-out loss by step](curves.png)", _list(card, about)]
    parts += [_examples(card["samples"])] if card["samples"].get("after") else []
    return "\n\n".join(parts) + "\n"


def _table(card: Card) -> str:
    rows = ["| held-out | before | after | teacher |", "|---|---|---|---|"]
    for name, (label, form) in _ROWS.items():
        theirs = card.get(_TEACHER.get(name, ""))
        cells = [card["before"].get(name), card.get(name), theirs]
        if cells[1] is not None:
            texts = ["" if cell is None else format(cell, form) for cell in cells]
            label = label.replace("cross-entropy, nats per token", card["measure"])
            rows.append(f"| {label} | {' | '.join(texts)} |")
    return "\n".join(rows) if len(rows) > 2 else "Nothing was held out."


def _list(card: Card, about: Mapping[str, str]) -> str:
    speed = card["speed"]
    lines = {name: text for name, text in about.items() if text}
    lines["steps"] = f"{card['steps']:,} in {card.get('train_runtime', 0):,.0f} s"
    lines["labels per second"] = f"{speed['labels_per_second']:,.0f}"
    lines["peak memory"] = f"{speed['peak_bytes'] / 2**30:.2f} GiB"
    shares = [f"{n} {speed[f'{n}_share']:.0%}" for n in ("teacher", "student", "loss")
              if f"{n}_share" in speed]  # fmt: skip
    lines["forward and backward"] = ", ".join(shares)
    lines |= {f"lm-eval, {task}": text for task, text in card.get("eval_tasks", {}).items()}
    return "\n".join(f"- {name}: {text}" for name, text in lines.items() if text)


def _examples(samples: Mapping[str, Any]) -> str:
    parts = ["What they write, greedily:"]
    for n, prompt in enumerate(samples["prompt"]):
        rows = [f"> {_line(prompt)}", ""]
        names = [name for name in ("teacher", "before", "after") if name in samples]
        rows += [f"- {name}: {_line(samples[name][n])}" for name in names]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _line(text: str) -> str:
    """Text of models in one line, as code, so that nothing in it is obeyed."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return f"`{shown[-300:].replace('`', chr(39))}`"
