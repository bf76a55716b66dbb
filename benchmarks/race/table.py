"""The terminal's view of the results."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .provider import FLOOR, OURS
from .results import BarResult, GroupResult, Report, Row


def print_machine(console: Console, report: Report) -> None:
    m = report.machine
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items() if v)
    memory = f"{m['memory_gib']} GiB" if m["memory_gib"] else "memory unknown"
    where = f"{m['gpu']}, {m['gpu_memory_gib']} GiB; " if "gpu" in m else ""
    console.print(
        f"{where}{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {memory}, "
        f"{m['instruction_set']}; commit {m['commit']}; {versions}",
        highlight=False,
    )
    if m["load_at_start"] and m["load_at_start"] > 1:
        console.print(
            f"[yellow]The machine is busy (load {m['load_at_start']}): trust ratios, not times."
        )


def print_group(console: Console, group: GroupResult) -> None:
    rows = [row for row in group.rows if row.total_ms or row.peak_bytes is not None]
    console.print()
    if rows:
        console.print(_table(group.title, rows))
    else:
        console.print(f"[bold]{group.title}[/bold]: nothing could be measured")
    for bar in group.bars:
        console.print(_styled(bar), highlight=False)
    for note in _notes(group):
        console.print(f"  [dim]{note}[/dim]", highlight=False)


def _table(title: str, rows: list[Row]) -> Table:
    labels = list(dict.fromkeys(row.label for row in rows))
    one = len(labels) == 1
    table = Table(title=title, caption=labels[0] if one else None, title_justify="left")
    short = _what_differs(labels)
    columns = [] if one else [("case", [short[row.label] for row in rows])]
    columns.append(("provider", [row.provider for row in rows]))
    if any(row.total_ms for row in rows):
        columns += [
            ("forward ms", [_number(row.forward_ms) for row in rows]),
            ("total ms", [_number(row.total_ms) for row in rows]),
            ("10-90 %", [_range(row) for row in rows]),
            ("vs ours", [_against_ours(row, rows) for row in rows]),
            ("of floor", [_of_floor(row) for row in rows]),
            ("error", [_errors(row) for row in rows]),
        ]
    if any(row.peak_bytes is not None for row in rows):
        columns.append(("memory", [_memory(row) for row in rows]))
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("case", "provider") else "right")
    for row, cells in zip(rows, zip(*(cells for _, cells in columns), strict=True), strict=True):
        table.add_row(*cells, style="bold" if row.provider == OURS else None)
    return table


def _what_differs(labels: list[str]) -> dict[str, str]:
    """Labels without the parts that all of them share."""
    parts = {label: label.split(", ") for label in labels}
    shared = set.intersection(*(set(p) for p in parts.values()))
    return {label: ", ".join(p for p in ps if p not in shared) for label, ps in parts.items()}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _range(row: Row) -> str:
    return "" if row.p10_ms is None else f"{_number(row.p10_ms)}-{_number(row.p90_ms)}"


def _against_ours(row: Row, rows: list[Row]) -> str:
    time = next((r.total_ms for r in rows if r.provider == OURS and r.label == row.label), None)
    return f"{row.total_ms / time:.2f}x" if row.total_ms and time else ""


def _of_floor(row: Row) -> str:
    """How many times the floor's time, and so what fraction of the possible speed."""
    if not row.total_ms or not row.floor_ms or row.provider == FLOOR:
        return ""
    return f"{row.total_ms / row.floor_ms:.2f}x ({row.floor_ms / row.total_ms:.0%})"


def _errors(row: Row) -> str:
    """Relative errors of the loss and of the gradient, in colour where they are too large."""
    values = [f"{e:.0e}" for e in (row.loss_error, row.grad_error) if e is not None]
    style = {"imprecise": "[yellow]", "WRONG": "[bold red]"}.get(row.verdict or "", "")
    return style + " ".join(values)


def _memory(row: Row) -> str:
    return row.memory_reason or (
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f} MiB"
    )


def bar_line(bar: BarResult) -> str:
    word = {None: "not measured", True: "pass", False: "FAIL"}[bar.passed]
    got = (
        "" if bar.value is None else f"{bar.value:.3g}" if bar.value < 1000 else f"{bar.value:,.0f}"
    )
    limit = f"{bar.limit:.3g}" if bar.limit < 1000 else f"{bar.limit:,.0f}"
    sign = "<=" if bar.at_most else ">="
    return f"{word}: {bar.label}: {got}{bar.unit} (bar {sign} {limit}{bar.unit})"


def _styled(bar: BarResult) -> str:
    return f"  [{ {None: 'yellow', True: 'green', False: 'red'}[bar.passed] }]{bar_line(bar)}"


def _notes(group: GroupResult) -> list[str]:
    """Who is missing and why, and whose answer is off: once each."""
    notes = [f"{r.provider}: {r.reason}" for r in group.rows if r.reason]
    notes += [f"{r.provider}: memory: {r.memory_reason}" for r in group.rows if r.memory_reason]
    notes += [row.note for row in group.rows if row.note]
    for row in group.rows:
        if row.verdict and row.verdict != "ok":
            worst = max(row.loss_error or 0.0, row.grad_error or 0.0)
            notes.append(f"{row.provider} is {row.verdict}: relative error {worst:.1e}")
    return list(dict.fromkeys(notes))


def print_summary(console: Console, report: Report) -> None:
    bars = [(group.title, bar) for group in report.groups for bar in group.bars]
    if not bars:
        return
    met = sum(bar.passed is True for _, bar in bars)
    console.print(f"\n[bold]{met} of {len(bars)} bars met[/bold]", highlight=False)
    for title, bar in bars:
        if not bar.passed:
            console.print(f"  {title}: {bar_line(bar)}", highlight=False, markup=False)
