"""One run of the benchmark: measure, show, save."""

from __future__ import annotations

import itertools
import shlex
from argparse import Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..machine import machine
from . import suites
from .case import Case
from .check import Wrong
from .options import AXES
from .plots import plot_all
from .provider import EMPTY
from .providers import PROVIDERS
from .results import Report, file_name, load
from .runner import Effort, Group, restricted, run_group, ticks
from .table import print_group, print_machine, print_summary

RESULTS = Path(__file__).resolve().parents[1] / "results"


def replot(options: Namespace) -> int:
    """Draw the plots of an earlier run again."""
    path = Path(options.replot)
    folder = path.parent if options.output == "outputs/bench" else Path(options.output)
    for plot in plot_all(load(path), folder):
        print(plot)
    return 0


def run(options: Namespace, arguments: list[str]) -> int:
    """The exit code: 1 where fusedkd's own answer is wrong.

    Raises:
        ValueError: axes that no case has, or no GPU where one was asked for.
        UserError: the results cannot be written.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no GPU here (torch.cuda.is_available() is False). Expected "
            "a machine with one and a CUDA or ROCm build of torch; or leave --device cpu."
        )
    groups = _groups(options)  # before anything is printed: bad axes are errors
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a log: nothing to wrap for
    report = Report(machine(options.device), shlex.join(["fusedkd", "bench", *arguments]))
    print_machine(console, report)
    try:
        if options.end_to_end:
            from .. import end_to_end  # and transformers with it

            report.end_to_end = end_to_end.run(options, console)
            end_to_end.print_steps(console, report.end_to_end, options.memory_limit)
        else:
            _measure(console, options, groups, report)
    except Wrong as error:
        console.print(f"[bold red]{error}", highlight=False)
        return 1
    print_summary(console, report)
    _save(console, options, report)
    return 0


def _groups(options: Namespace) -> list[Group]:
    axes = {axis: getattr(options, axis) for axis in AXES if getattr(options, axis) is not None}
    if axes or options.memory:
        groups = _custom(options, axes)
    else:
        groups = (suites.quick if options.quick else suites.headline)(options.device)
    return restricted(groups, options.providers)


def _custom(options: Namespace, axes: dict[str, list[object]]) -> list[Group]:
    """One group per combination; but one group for all sizes, so that growth can be plotted."""
    sizes = {axis: axes.get(axis, [getattr(Case(), axis)]) for axis in ("n", "vocab")}
    others = {axis: values for axis, values in axes.items() if axis not in sizes}
    names = tuple(options.providers or (name for name in PROVIDERS if name != EMPTY))
    groups = []
    for chosen in itertools.product(*others.values()):
        base = Case(device=options.device, **dict(zip(others, chosen, strict=True)))  # type: ignore[arg-type]
        cases = tuple(
            base.but(**dict(zip(sizes, point, strict=True)))
            for point in itertools.product(*sizes.values())
        )
        title = cases[0].label if len(cases) == 1 else f"{base.form}, {base.divergence}"
        groups.append(Group(title, cases, names, memory=options.memory))
    return groups


def _measure(console: Console, options: Namespace, groups: list[Group], report: Report) -> None:
    effort = Effort(options.repeats, 4.0 if options.quick else options.budget)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(ticks(group, effort) for group in groups))
        done = 0
        for group in groups:
            progress.update(task, description=group.title)
            result = run_group(group, effort, lambda: progress.advance(task))
            report.groups.append(result)
            done += ticks(group, effort)  # a provider that was skipped ticked less
            progress.update(task, completed=done)
            print_group(console, result)


def _save(console: Console, options: Namespace, report: Report) -> None:
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "results.json", folder / "results.csv"]
    if options.save:
        paths.append(RESULTS / file_name(report.machine, end_to_end=not report.groups))
    for path in paths:
        (report.save_csv if path.suffix == ".csv" else report.save_json)(path)
    written = ", ".join(map(str, [*paths, *plot_all(report, folder)]))
    console.print(f"\nWritten: {written}", highlight=False, soft_wrap=True)
