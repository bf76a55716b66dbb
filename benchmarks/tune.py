"""Which launches a GPU likes best: searches around each line of the launch table.

    python -m fusedkd.benchmarks.tune                     # what it would change, and what it gains
    python -m fusedkd.benchmarks.tune --write             # ... into kernels/triton/launches.py
    python -m fusedkd.benchmarks.tune --entry 3 --divergences jsd

Needs a GPU. Nothing of this happens at run time: launches come from the table alone, so that two
runs do the same. A candidate that spills, or whose loads are not 16 bytes wide, is never timed.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fusedkd import divergences, kd_loss
from fusedkd.files import replace_file
from fusedkd.kernels.triton import config, device, launches
from fusedkd.kernels.triton.launches import Entry

from . import resources

WARPS, UNROLLS, STAGES, PIECES = (4, 8, 16), (1, 2), (1, 2, 3), (4096, 8192, 16384)
GAIN = 0.03  # less is noise, and no reason to change a line that has one
ENTRIES = 1 << 27  # logits of one call: 256 MB in bf16, beyond every L2

Timer = Callable[[Callable[[], Any]], float]


def neighbours(entry: Entry) -> Iterator[Entry]:
    """The line itself, then every other setting of it."""
    yield entry
    pieces = PIECES if entry.piece else (0,)
    for warps, unroll, stages, piece in itertools.product(WARPS, UNROLLS, STAGES, pieces):
        other = replace(entry, warps=warps, unroll=unroll, stages=stages, piece=piece)
        if other != entry:
            yield other


def call_for(entry: Entry) -> tuple[int, int]:
    """Rows and vocabulary of a call that the line serves."""
    vocab = 151936 if entry.below is None else entry.below * 15 // 16
    return (32, 262144) if entry.few else (ENTRIES // vocab, vocab)


def flaws(entry: Entry, call: tuple[int, int], names: Sequence[str], target: str) -> list[str]:
    """What the compiler says against it, on a target of benchmarks/resources.py."""
    launch, reasons = entry.launch(*call, processors=132), []
    for name in names:
        variant = config.Variant(*resources.DTYPES["bf16"], name)
        for stage in config.stages(variant, launch):
            job = resources.Job(target, "bf16", name, launch, stage)
            reasons += resources.problems(resources.compile_(job))
    return reasons


def time_of(
    index: int, entry: Entry, step: Callable[[str], None], names: Sequence[str], timer: Timer
) -> float:
    """Milliseconds of a step (see step_of) with ``entry`` as line ``index``: the geometric mean
    over the divergences."""
    table = (*launches.TABLE[:index], entry, *launches.TABLE[index + 1 :])
    logs = []
    with mock.patch.object(launches, "TABLE", table):
        for name in names:
            step(name)
            logs.append(math.log(timer(partial(step, name))))
    return math.exp(sum(logs) / len(logs))


def step_of(rows: int, vocab: int) -> Callable[[str], None]:
    """Loss and gradient of a call, given a divergence."""
    where = "cpu" if device.INTERPRETED else "cuda"
    student, teacher = (torch.randn(rows, vocab, device=where).bfloat16() for _ in range(2))
    labels = torch.randint(vocab, (rows,), device=where)
    student.requires_grad_()

    def step(name: str) -> None:
        student.grad = None
        loss = kd_loss(
            student, teacher, labels=labels, divergence=name, temperature=2.0, backend="triton"
        )
        loss.backward()

    return step


def rewritten(source: str, index: int, entry: Entry) -> str:
    """launches.py with line ``index`` of its table replaced; the rest stays as it is, letter by
    letter."""
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if [ast.unparse(target) for target in targets] == ["TABLE"]:
            old = node.value.elts[index]  # type: ignore[attr-defined]
            break
    else:
        raise ValueError("launches.py has no TABLE = (...)")
    fields = "".join(f"        {name}={value!r},\n" for name, value in asdict(entry).items())
    lines = source.splitlines(keepends=True)
    lines[old.lineno - 1 : old.end_lineno] = [f"    Entry(\n{fields}    ),\n"]
    return "".join(lines)


def search(
    index: int, names: Sequence[str], target: str, timer: Timer, console: Console
) -> tuple[Entry, float]:
    """The best line for the place of line ``index``, and how many times faster than it."""
    entry = launches.TABLE[index]
    call, times = call_for(entry), {}
    step = step_of(*call)
    candidates = list(neighbours(entry))
    for candidate in track(candidates, f"line {index}: {call[0]:,} x {call[1]:,}", console=console):
        if candidate == entry or not flaws(candidate, call, names, target):
            times[candidate] = time_of(index, candidate, step, names, timer)
    best = min(times, key=lambda each: times[each])
    gain = times[entry] / times[best]
    return (best, gain) if gain > 1 + GAIN else (entry, 1.0)


def main() -> None:
    """Search, report, and with ``--write`` rewrite the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite kernels/triton/launches.py")
    parser.add_argument(
        "--entry", type=int, nargs="+", choices=range(len(launches.TABLE)), help="these lines alone"
    )
    parser.add_argument(
        "--divergences", nargs="+", default=["forward_kl", "jsd"], choices=divergences.names()
    )
    args = parser.parse_args()
    if not torch.cuda.is_available() or torch.version.hip:
        parser.error("needs an NVIDIA GPU that this torch can use; `fusedkd doctor` says more.")
    gpu, target = (
        torch.cuda.get_device_name(),
        "sm_{}{}".format(*torch.cuda.get_device_capability()),
    )
    if target not in resources.TARGETS:
        parser.error(f"this is a {target}; benchmarks/resources.py knows {[*resources.TARGETS]}.")
    console = Console()
    shown = Table("line", "from", "to", "times faster", title=f"{gpu}, triton {triton.__version__}")
    path = Path(launches.__file__)
    for index in args.entry or range(len(launches.TABLE)):
        best, gain = search(index, args.divergences, target, _bench, console)
        old = launches.TABLE[index]
        shown.add_row(str(index), _setting(old), _setting(best), f"{gain:.3f}")
        if args.write and best != old:
            today = datetime.date.today().isoformat()
            why = (
                f"{gain:.2f}x as fast as {_setting(old)} on {gpu} at {call_for(old)}, "
                f"{' and '.join(args.divergences)}, bf16, {today} (benchmarks/tune.py). {old.why}"
            )
            text = rewritten(path.read_text(), index, replace(best, why=why))
            replace_file(path, text)
    console.print(shown)
    if args.write:
        console.print("Now: make test (resources, interpreter), ruff format, and read the reasons.")


def _bench(step: Callable[[], None]) -> float:
    return float(triton.testing.do_bench(step, return_mode="median"))


def _setting(entry: Entry) -> str:
    piece = f", pieces of {entry.piece}" if entry.piece else ""
    return f"{entry.warps} warps x {entry.unroll}, {entry.stages} stages{piece}"


if __name__ == "__main__":
    main()
