"""Plots for a README, from a saved report alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusedkd.files import write_figure

from .provider import FLOOR, OURS
from .results import Report, Row

COLOURS = {
    OURS: "#d1495b",
    FLOOR: "#8d99ae",
    "eager": "#30638e",
    "compile": "#edae49",
    "torchtune": "#66a182",
    "gkd": "#6d597a",
    "liger": "#00798c",
    "liger-triton": "#2a9d8f",
    "trl": "#b56576",
    "cce": "#4d908e",
    "torch-lce": "#577590",
}


# Growth: the plot's name, the field of `Case`, its label, what is drawn and its label.
LINES: tuple[tuple[str, str, str, Callable[[Row], float | None], str], ...] = (
    ("time_vs_vocab", "vocab", "vocabulary", lambda r: r.total_ms, "forward + backward, ms"),
    (
        *("memory_vs_n", "n", "tokens"),
        *(lambda r: r.peak_bytes / 2**30 if r.peak_bytes else None, "peak extra memory, GiB"),
    ),
)


def plot_all(report: Report, folder: Path) -> list[Path]:
    """Every plot that the report has data for."""
    figures = {"speed": _speed(report)}
    for name, axis, label, value, quantity in LINES:
        figures[name] = figure = _lines(report, axis, value)
        if figure is not None:
            figure.axes[0].set(xlabel=label, ylabel=quantity)
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawn.items():
        write_figure(path, figure, dpi=150)
    return list(drawn)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _caption(figure: Any, report: Report) -> None:
    m = report.machine
    where = m.get("gpu") or f"{m['cpu']}, {m['threads']} threads"
    text = f"{where}; torch {m['versions']['torch']}; commit {m['commit']}; {m['date'][:10]}"
    figure.supxlabel(text, fontsize=7, color="#666666", x=0.99, ha="right")


# ----------------------------------------------------------------------------------------------


def _speed(report: Report) -> Any:
    """How much slower than the floor each provider is, in every race with a floor and peers."""
    races = []
    for group in report.groups:
        rows = [r for r in group.rows if r.total_ms and r.floor_ms and r.provider != FLOOR]
        if len({r.label for r in rows}) == 1 and OURS in {r.provider for r in rows}:
            races.append((group.title, rows))
    if not races:
        return None
    bars = sum(len(rows) for _, rows in races)
    figure, axes = _figure(8, 1.2 + 0.22 * (bars + len(races)))
    y, ticks = 0.0, []
    for title, rows in races:
        begin = y
        for row in rows:
            _one_bar(axes, y, row)
            y += 1
        ticks.append(((begin + y - 1) / 2, title))
        y += 1
    axes.axvline(1, color=COLOURS[FLOOR], linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks([t for t, _ in ticks], [title for _, title in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / floor (the bytes or matrix products alone), shorter is better")
    _caption(figure, report)
    return figure


def _one_bar(axes: Any, y: float, row: Row) -> None:
    assert row.total_ms and row.floor_ms
    times = row.total_ms / row.floor_ms
    axes.barh(y, times, color=COLOURS.get(row.provider, "#999999"))
    flag = "" if row.verdict in ("ok", None) else f", {row.verdict}"
    size = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    axes.text(times * 1.03, y, f"{row.provider} {size}x{flag}", va="center", fontsize=7)


def _lines(report: Report, axis: str, value: Callable[[Row], float | None]) -> Any:
    """One line per provider, over the group with the most lines of three or more points."""
    best = max((_series(g.rows, axis, value) for g in report.groups), key=len, default={})
    if not best:
        return None
    figure, axes = _figure(6, 4)
    for provider, points in best.items():
        xs, ys = zip(*sorted(points), strict=True)
        style = "--" if provider == FLOOR else "o-"
        axes.plot(xs, ys, style, color=COLOURS.get(provider, "#999999"), label=provider)
    ticks = sorted({x for points in best.values() for x, _ in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=8, rotation=30, ha="right")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    _caption(figure, report)
    return figure


def _series(
    rows: Sequence[Row], axis: str, value: Callable[[Row], float | None]
) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        y = value(row)
        if y:
            lines[row.provider].append((row.case[axis], y))
    return {k: points for k, points in lines.items() if len({x for x, _ in points}) >= 3}
