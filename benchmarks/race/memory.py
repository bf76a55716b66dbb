"""Peak extra memory of one step: in a fresh process on the CPU, from the allocator on a GPU.

The process makes the inputs, warms the runtime up with few rows of the same problem, hands free
memory back, resets the high-water mark and takes one step. What counts is the peak minus what was
in use before.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ..child import ChildFailed, in_child
from ..peak import limit_address_space, peak, reset_peak
from .case import Case, Problem, make_problem
from .check import CHECK_ROWS, gradients
from .provider import FLOOR, Provider
from .providers import PROVIDERS

TIMEOUT = 300  # seconds


def peak_extra(case: Case, provider: str) -> tuple[int | None, str | None]:
    """Bytes, or None and the reason."""
    try:
        if case.device == "cuda":
            return _peak(case, PROVIDERS[provider]), None
        size, reason = in_child(measure, dataclasses.asdict(case), provider, timeout=TIMEOUT)
        return size, reason
    except torch.OutOfMemoryError:
        return None, "out of memory"
    except ChildFailed as error:
        return None, str(error)


def measure(case: dict[str, Any], provider: str) -> tuple[int | None, str | None]:
    """As :func:`peak_extra`, in the process that is measured."""
    if not Path("/proc/self/clear_refs").exists():
        return None, "peak memory is measured on Linux only"
    if case["threads"]:
        torch.set_num_threads(case["threads"])
    allowance = limit_address_space()
    try:
        return _peak(Case(**case), PROVIDERS[provider]), None
    except (RuntimeError, MemoryError) as error:
        if "allocate memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        return None, f"does not fit in {allowance / 2**30:.1f} GiB"


def _peak(case: Case, provider: Provider) -> int:
    problem = make_problem(case)
    # What compiles per shape must have compiled, or the compiler's memory would count.
    compiles = case.device == "cpu" and provider.name in ("compile", "liger", "cce")
    _step(provider, case if compiles else case.but(n=min(case.n, CHECK_ROWS)), problem)
    before = reset_peak(case.device)
    _step(provider, case, problem)
    return max(0, peak(case.device) - before)


def _step(provider: Provider, case: Case, problem: Problem) -> None:
    problem = problem.with_case(case)
    forward = provider.prepare(case, problem)
    if case.mode == "eval" or provider.name == FLOOR:
        with torch.no_grad():
            forward()
    else:
        gradients(forward, problem, case)
