"""Peak extra memory of one step: in a fresh process on the CPU, from the allocator on a GPU.

On the CPU the child makes the inputs, warms the runtime up with few rows of the same problem, hands
free memory back, resets the kernel's high-water mark and takes one step. What counts is the peak
resident set minus what was resident before. Run as a module it is that child.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from .cases import Case, make_problem
from .check import CHECK_ROWS, gradients
from .providers import FLOOR, Provider, providers

__all__ = ["child_command", "peak_extra"]

SHARE = 0.8  # of the memory that is free: a peer that wants more is stopped, not the machine
TIMEOUT = 300


def peak_extra(case: Case, provider: str) -> tuple[int | None, str | None]:
    """Bytes, or None and the reason."""
    if case.device == "cuda":
        return _peak_cuda(case, providers()[provider])
    arguments = json.dumps([dataclasses.asdict(case), provider])
    command, environment = child_command("memory", arguments)
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None, f"took more than {TIMEOUT} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return None, f"the child process ended with {done.returncode}: {tail[:160]}"
    answer = json.loads(lines[-1])
    return answer["bytes"], answer["reason"]


def child_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run ``module`` of this package in a fresh process."""
    environment = dict(os.environ)
    if __package__ == "benchmarks":
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, environment.get("PYTHONPATH")])
        )
    return [sys.executable, "-m", f"{__package__}.{module}", *arguments], environment


def _peak_cuda(case: Case, provider: Provider) -> tuple[int | None, str | None]:
    try:
        problem = make_problem(case)
        _step(provider, case, min(case.n, CHECK_ROWS), problem)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(provider, case, case.n, problem)
        return torch.cuda.max_memory_allocated() - before, None
    except torch.OutOfMemoryError:
        return None, "out of memory"


def _step(provider: Provider, case: Case, n: int, problem: object) -> None:
    case = case.but(n=n)
    own = problem.with_case(case)  # type: ignore[attr-defined]
    forward = provider.prepare(case, own)
    if case.mode == "eval" or provider.name == FLOOR:
        with torch.no_grad():
            forward()
    else:
        gradients(forward, own, case)


# ----------------------------------------------------------------------------------------------
# the child


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, e.g. VmRSS (resident now) or VmHWM (resident at most)."""
    return _field(Path("/proc/self/status"), field)


def _field(path: Path, name: str) -> int:
    with path.open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def free_to_take() -> int:
    """Resident, but freed: what the system may take back without asking (LazyFree)."""
    return _field(Path("/proc/self/smaps_rollup"), "LazyFree")


def reset_peak() -> int:
    """Forget the high-water mark; returns what is resident now, without what was freed for the
    system to take (kernels/cpu/memory.h keeps blocks that way): used again, it counts again."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS") - free_to_take()


def limit_address_space() -> int:
    """Allow no more than most of the memory that is free now; returns the allowance."""
    allowance = int(_field(Path("/proc/meminfo"), "MemAvailable") * SHARE)
    ceiling = status_bytes("VmSize") + allowance
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    return allowance


def _measure(case: Case, provider: Provider) -> dict[str, object]:
    if not Path("/proc/self/clear_refs").exists():
        return {"bytes": None, "reason": "peak memory is measured on Linux only"}
    if case.threads:
        torch.set_num_threads(case.threads)
    problem = make_problem(case)
    # What compiles per shape must have compiled, or the compiler's memory would count.
    compiles = provider.name in ("compile", "liger", "cce")
    allowance = limit_address_space()
    try:
        _step(provider, case, case.n if compiles else min(case.n, CHECK_ROWS), problem)
        before = reset_peak()
        _step(provider, case, case.n, problem)
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return {"bytes": None, "reason": f"does not fit in {allowance / 2**30:.1f} GiB"}
    return {"bytes": max(0, status_bytes("VmHWM") - before), "reason": None}


if __name__ == "__main__":
    fields, name = json.loads(sys.argv[1])
    print(json.dumps(_measure(Case(**fields), providers()[name])))
