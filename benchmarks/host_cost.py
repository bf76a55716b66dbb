"""What a call costs on the host of a GPU: ``kd_loss`` and its backward at 8 x 1,000, with a driver
that launches nothing.

``python -m fusedkd.benchmarks.host_cost``. On any machine: tensors lie on the CPU, kernels are
compiled for sm_90, a launch only counts itself. What a GPU's driver takes for each launch comes on
top, so launches and torch's operations are counted: of the latter, here, CPU kernels run, which
take about as long as launching a GPU's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler_legacy

from fusedkd import SparseTeacher, kd_loss
from fusedkd.files import replace_file
from fusedkd.kernels.triton.rehearsal import Rehearsal, target_of

BAR = 100.0  # us
# rows and columns: one launch, and a row in pieces
CASES = {"one launch": (8, 1_000), "in pieces": (8, 151_936), "sparse": (8, 1_000)}


def measure(calls: int = 20, rounds: int = 250) -> dict[str, dict[str, float]]:
    """By case: us of the loss and its backward, of an autograd function that only saves a tensor,
    launches, torch's operations."""
    rehearsal = Rehearsal(target_of("sm_90"))
    rehearsal.begin(processors=132)
    results = {}
    for name in CASES:
        step, empty = _step(name), _empty(name)
        step()
        before = rehearsal.launched
        with profiler_legacy.profile() as profile:  # torch's other one writes on stderr
            step()
        launches = rehearsal.launched - before
        ours, floor = (min(x) for x in zip(*_rounds(calls, rounds, step, empty), strict=True))
        results[name] = {
            "us": 1e6 * ours,
            "empty_us": 1e6 * floor,
            "launches": launches,
            "operations": _operations(profile),
        }
    return results


def _rounds(calls: int, rounds: int, *steps: Callable[[], None]) -> list[list[float]]:
    """Seconds a call of each, in turns."""
    times: list[list[float]] = []
    for _ in range(rounds):
        times.append([])
        for step in steps:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            times[-1].append((time.perf_counter() - start) / calls)
    return times


def _student(name: str) -> Tensor:
    return torch.randn(*CASES[name], dtype=torch.bfloat16, requires_grad=True)


def _step(name: str) -> Callable[[], None]:
    student = _student(name)
    rows, columns = student.shape
    labels = torch.randint(0, columns, (rows,))
    teacher: Any = torch.randn_like(student)
    if name == "sparse":
        ids = torch.arange(64).expand(rows, 64).contiguous()
        teacher = SparseTeacher(ids, torch.full((rows, 64), -5.0))

    def step() -> None:
        kd_loss(
            student, teacher, labels, temperature=2.0, ce_weight=0.5, backend="triton"
        ).backward()
        student.grad = None

    return step


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _empty(name: str) -> Callable[[], None]:
    student = _student(name)

    def step() -> None:
        _Empty.apply(student).backward()
        student.grad = None

    return step


def _operations(profile: Any) -> int:
    """Those that compute or copy: what would be a launch each on a GPU."""
    views = ("view", "reshape", "detach", "as_strided", "empty", "expand", "item", "is_nonzero")
    every = (event for event in profile.function_events if event.name.startswith("aten::"))
    outer = (e for e in every if not (e.cpu_parent and e.cpu_parent.name.startswith("aten::")))
    return sum(not any(view in event.name for view in views) for event in outer)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the numbers there, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure()
    for name, numbers in results.items():
        print(
            f"{name:11s} {numbers['us']:6.1f} us ({numbers['us'] / numbers['empty_us']:.1f} x an "
            f"empty autograd function), {numbers['launches']:.0f} launches, "
            f"{numbers['operations']:.0f} operations of torch"
        )
    if args.output:
        replace_file(args.output, json.dumps(results, indent=1) + "\n")
    late = results["one launch"]["us"] > BAR
    print(f"bar: {BAR:g} us in one launch{', MISSED' if late else ''}")
    return int(late)


if __name__ == "__main__":
    raise SystemExit(main())
