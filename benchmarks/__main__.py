"""`fusedkd bench`: parse, measure, show, save."""

from __future__ import annotations

import itertools
import shlex
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .options import AXES, parse

if TYPE_CHECKING:  # torch is loaded after the arguments are known to be good
    from rich.console import Console

    from .results import Report
    from .runner import Group

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 where fusedkd's own answer is wrong; 2 for arguments that cannot be."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
    except SystemExit as done:
        return int(done.code or 0)
    try:
        return _replot(options) if options.replot else _run(options, arguments)
    except ValueError as error:
        print(f"fusedkd bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fusedkd bench: interrupted; nothing was saved.", file=sys.stderr)
        return 130


def _replot(options: Namespace) -> int:
    from .plots import plot_all
    from .results import load

    path = Path(options.replot)
    folder = path.parent if options.output == "outputs/bench" else Path(options.output)
    for plot in plot_all(load(path), folder):
        print(plot)
    return 0


def _run(options: Namespace, arguments: list[str]) -> int:
    import torch
    from rich.console import Console

    from .check import Wrong
    from .results import Report, machine
    from .table import print_machine, print_summary

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch sees no GPU here (torch.cuda.is_available() is False). Expected "
            "a machine with one and a CUDA or ROCm build of torch; or leave --device cpu."
        )
    groups = _groups(options)  # before anything is printed: bad axes are errors
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a log: nothing to wrap for
    command = shlex.join(["fusedkd", "bench", *arguments])
    report = Report(machine(options.device, None), command)
    print_machine(console, report)
    try:
        if options.end_to_end:
            _end_to_end(console, options, report)
        else:
            _measure(console, options, groups, report)
    except Wrong as error:
        console.print(f"[bold red]{error}", highlight=False)
        return 1
    print_summary(console, report)
    _save(console, options, report)
    return 0


def _groups(options: Namespace) -> list[Group]:
    from . import suites
    from .runner import restricted

    given = {axis: getattr(options, axis) for axis in AXES if getattr(options, axis) is not None}
    if given or options.memory:
        groups = _custom(options, given)
    else:
        groups = (suites.quick if options.quick else suites.headline)(options.device)
    return restricted(groups, options.providers)


def _custom(options: Namespace, given: dict[str, list[object]]) -> list[Group]:
    """One group per combination; but one group for all sizes, so that growth can be plotted."""
    from .cases import Case
    from .providers import providers
    from .runner import Group

    sizes = {axis: given.get(axis, [getattr(Case(), axis)]) for axis in ("n", "vocab")}
    others = {axis: values for axis, values in given.items() if axis not in sizes}
    groups = []
    for chosen in itertools.product(*others.values()):
        base = Case(device=options.device, **dict(zip(others, chosen, strict=True)))  # type: ignore[arg-type]
        cases = tuple(
            base.but(**dict(zip(sizes, point, strict=True)))
            for point in itertools.product(*sizes.values())
        )
        title = cases[0].label if len(cases) == 1 else f"{base.form}, {base.divergence}"
        groups.append(Group(title, cases, tuple(providers()), memory=options.memory))
    return groups


def _measure(console: Console, options: Namespace, groups: list[Group], report: Report) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .runner import Effort, run_group, ticks
    from .table import print_group

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


def _end_to_end(console: Console, options: Namespace, report: Report) -> None:
    from .end_to_end import print_steps, run

    report.end_to_end = run(options, console)
    print_steps(console, report.end_to_end, options.memory_limit)


def _save(console: Console, options: Namespace, report: Report) -> None:
    from .plots import plot_all
    from .results import file_name

    folder = Path(options.output)
    report.save_json(folder / "results.json")
    report.save_csv(folder / "results.csv")
    written = [folder / "results.json", folder / "results.csv", *plot_all(report, folder)]
    if options.save:
        name = file_name(report.machine, end_to_end=not report.groups)
        written.append(Path(__file__).parent / "results" / name)
        report.save_json(written[-1])
    console.print("\nWritten: " + ", ".join(map(str, written)), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
