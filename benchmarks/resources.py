"""What the Triton kernels take on each GPU, from ahead-of-time compilation: no GPU needed.

    python -m benchmarks.resources           # the table for sm_90, every divergence
    python -m benchmarks.resources --all     # every target, dtype and flag (two hours on 2 cores)
    python -m benchmarks.resources --all --targets gfx942 --dtypes head --workers 2

It compiles what the launcher would compile (``config.plan`` and ``config.constants`` are shared)
and reads registers, spills and access widths out of the machine code. ``problems`` is the verdict
that the tests hold every kernel to. Run it from a checkout; without the repository root on
sys.path, as ``.venv/bin/python benchmarks/resources.py``.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.compiler import ASTSource

# by absolute names: this file is also run as a script; what it does not use is asked for of it
from fusedkd.benchmarks import machine_code
from fusedkd.benchmarks.kernel_jobs import (
    DTYPES,
    FLAGS,
    LAUNCHES,  # noqa: F401
    TARGETS,
    Job,
    jobs,
    plan_of,
    sample,  # noqa: F401
    source,
    stages_of,
    sweeps,
)
from fusedkd.benchmarks.machine_code import narrowest
from fusedkd.kernels.triton import config


@dataclass(frozen=True)
class Report:
    """What came of it. Widths in bytes; the loops are those over a row, in the code's order."""

    job: Job
    registers: int
    budget: int  # per thread, for one program of that many warps to fit
    shared: int
    spilled: int
    calls: int
    loads: tuple[int, ...]  # narrowest global load of each loop, widest loops first
    stores: tuple[int, ...]
    cost: tuple[float, ...] = ()  # instructions per entry of the 16-byte loops
    special: tuple[float, ...] = ()  # of which on the special-function unit


def compile_(job: Job, kernel: ASTSource | None = None) -> Report:
    """Compile the job's kernel, or another one in its place, and read the result."""
    return read(compiled(job, kernel), job)


def compiled(job: Job, kernel: ASTSource | None = None) -> Any:
    """What Triton makes of it."""
    options = config.options(job.launch, job.backend, plan_of(job))
    return triton.compile(kernel or source(job), target=TARGETS[job.target], options=options)


def read(kernel: Any, job: Job) -> Report:
    """Registers, spills, calls and the width of the accesses in the loops of a compiled kernel."""
    hip = job.backend == "hip"
    code = machine_code.amd(kernel) if hip else machine_code.nvidia(kernel)
    loads = [loop.loads for loop in code.loops]
    if job.tail and not hip:
        loads = [_without_cursor(widths) for widths in loads]
    wide = [
        loop for loop, widths in zip(code.loops, loads, strict=True) if min(widths, default=0) == 16
    ]
    entries = _entries_per_thread(job)
    return Report(
        job=job,
        registers=code.registers,
        budget=_budget(job),
        shared=kernel.metadata.shared,
        spilled=code.spilled,
        calls=code.calls,
        loads=narrowest(loads),
        stores=narrowest([loop.stores for loop in code.loops]),
        cost=tuple(loop.instructions / entries for loop in wide),
        special=tuple(loop.special / entries for loop in wide),
    )


def _without_cursor(widths: list[int]) -> list[int]:
    """Without the one id that a tile is compared with: 4 bytes; on AMD a scalar load, which is none
    of these."""
    place = widths.index(4) if 4 in widths and 16 in widths else len(widths)
    return [*widths[:place], *widths[place + 1 :]]


def _budget(job: Job) -> int:
    """Registers of a thread, for one program of that many warps to fit."""
    plan = plan_of(job)
    warps = config.options(job.launch, job.backend, plan)["num_warps"]
    if job.backend == "hip":  # 4 SIMDs with 512 each
        return min(512, 512 // -(-warps // 4))
    return min(config.most_registers(plan), 65536 // (32 * warps))


def _entries_per_thread(job: Job) -> int:
    alone = job.stage in ("scale", "token statistics")
    items = DTYPES[job.dtype][:1] if alone else DTYPES[job.dtype]
    return 16 // min(dtype.itemsize for dtype in items) * job.launch.unroll


# --------------------------------------------------------------------------------------------------
# the verdict and the table


def problems(report: Report) -> list[str]:
    """What is wrong with a kernel; nothing for a good one."""
    stage, reasons = report.job.stage, []
    count = _sweeps(report.job) if stage in config.AT_ONCE else int(sweeps(report.job))
    if report.spilled:
        reasons.append(f"{report.spilled} bytes of registers spilled")
    if report.registers > report.budget:
        reasons.append(f"{report.registers} registers, {report.budget} fit")
    if report.calls:
        reasons.append(f"{report.calls} calls")
    if report.loads[:count] != (16,) * count:
        reasons.append(f"loads of {report.loads} bytes, expected {count} loops of 16 only")
    # One loop for the gradient, one or more (unrolled) for the zeros of a row that does not count.
    loops = {"whole": 2, "joint": 2, "gradient": 2, "token gradient": 2, "scale": 1}.get(stage, 0)
    if report.stores[:loops] != (16,) * loops:
        reasons.append(f"stores of {report.stores} bytes, expected {loops} loops of 16 only")
    return reasons


def _sweeps(job: Job) -> int:
    """Of a program that does a whole row: what would be launches if the row were split."""
    plan = plan_of(job)
    if plan is not None and plan.powers:
        return 2  # the divergence is summed along with the gradient
    split = replace(job.launch, pieces=2, joint=False)
    return len(stages_of(job.dtype, job.divergence, job.flags, split, job.tail))


def _line(report: Report) -> str:
    job, launch = report.job, report.job.launch
    cost = " ".join(f"{c:.0f}/{s:.1f}" for c, s in zip(report.cost, report.special, strict=True))
    return (
        f"{job.target:7s}{job.dtype:5s}{job.divergence:17s}{job.tail or 'dense':7s}"
        f"{job.stage:17s}{job.flags:6s}"
        f"{launch.warps:3d} x {launch.unroll}{report.registers:5d}/{report.budget:3d}"
        f"{report.shared:7d}{report.spilled:5d}{report.calls:4d}"
        f"  {report.loads[0] if report.loads else '-':>3}"
        f"{report.stores[0] if report.stores else '-':>5}   {cost:24s}{'; '.join(problems(report))}"
    )


HEADER = (
    "target dtype divergence      tail   stage           flags  warps regs/budget shared spill call"
    " load store instructions/special per entry, by sweep"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every target, dtype and flag")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, help="these alone")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="these alone")
    parser.add_argument("--flags", nargs="+", choices=FLAGS, help="these alone")
    parser.add_argument("--workers", type=int, default=1, help="processes to compile in")
    arguments = parser.parse_args()
    everything = (TARGETS, DTYPES, FLAGS) if arguments.all else (("sm_90",), ("bf16",), ("plain",))
    chosen = (arguments.targets, arguments.dtypes, arguments.flags)
    axes = [list(some or axis) for some, axis in zip(chosen, everything, strict=True)]
    bad = 0
    print(HEADER)
    with ProcessPoolExecutor(arguments.workers) as pool:
        for report in pool.map(compile_, jobs(*axes)):
            print(_line(report), flush=True)
            bad += bool(problems(report))
    print(f"{bad} of these break a bound." if bad else "All within bounds.")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
