"""The log of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedkd.files import write_figure

_PANELS = (
    ("training", {"loss": "loss", "kd": "divergence", "ce": "cross-entropy"}),
    ("held out", {"eval_loss": "student's cross-entropy", "eval_kd": "divergence"}),
)


def write_curves(path: Path, history: list[Any], teacher: float | None) -> None:
    """Losses by step, in training and held out; the teacher's own as a line."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, curves) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for name, label in curves.items():
            points = [(log["step"], log[name]) for log in history if name in log]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=label)
        if title == "held out" and teacher is not None:
            axis.axhline(teacher, color="grey", linestyle=":", label="teacher's cross-entropy")
        axis.set(title=title, xlabel="steps", ylabel="nats per token")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    write_figure(path, figure)
