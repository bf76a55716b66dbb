"""Interleaved rounds: A B C A B C, so that a machine that slows down slows down everybody."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .case import Case, Problem
from .check import gradients
from .provider import Forward

MIN_SAMPLE = 2e-3  # seconds: shorter steps are repeated within one sample
MIN_ROUNDS = 3
FLUSH_BYTES = 256 << 20  # five times the L2 of an H100; the caches start cold, as in training


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one step: until the loss, until the gradients, and of the host alone."""

    forward: float
    total: float
    host: float


@dataclass
class Contestant:
    """One provider on one case, ready to run."""

    case: Case
    problem: Problem
    forward: Forward
    floor: bool = False
    samples: list[Sample] = field(default_factory=list)
    inner: int = 1
    spent: float = 0.0
    failed: str | None = None


def race(
    contestants: list[Contestant], rounds: int, budget: float, tick: Callable[[], None]
) -> None:
    """Fill ``samples``. After ``budget`` seconds a slow one sits out, but not before three rounds:
    a ratio needs no more, and eager must not eat the hour."""
    for c in contestants:
        _guarded(c, _warm_up)
        tick()
    gc.collect()
    gc.disable()
    try:
        for _ in range(max(rounds, MIN_ROUNDS)):
            for c in contestants:
                if not c.failed and (c.spent < budget or len(c.samples) < MIN_ROUNDS):
                    _guarded(c, _sample)
                tick()
    finally:
        gc.enable()


def _guarded(c: Contestant, run: Callable[[Contestant], None]) -> None:
    """A provider that runs out of memory or crashes loses its row, not everybody's."""
    begin = time.perf_counter()
    try:
        if c.case.threads:
            torch.set_num_threads(c.case.threads)
        run(c)
    except torch.OutOfMemoryError:
        c.failed = "out of memory"
    except Exception as error:
        c.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    c.spent += time.perf_counter() - begin


def _warm_up(c: Contestant) -> None:
    _step(c)  # compiles, autotunes, allocates
    first = _step(c)
    c.inner = 1
    if c.case.device == "cpu" and first.total < MIN_SAMPLE * 1e3:
        for _ in range(20):
            first = _step(c)
        c.inner = max(1, math.ceil(MIN_SAMPLE * 1e3 / max(first.total, 1e-4)))
    c.spent = 0.0


def _sample(c: Contestant) -> None:
    steps = [_step(c) for _ in range(c.inner)]
    c.samples.append(
        Sample(*(sum(getattr(s, f) for s in steps) / c.inner for f in ("forward", "total", "host")))
    )


def _step(c: Contestant) -> Sample:
    return _step_cuda(c) if c.case.device == "cuda" else _step_cpu(c)


def _step_cpu(c: Contestant) -> Sample:
    laps: list[float] = []
    begin = time.perf_counter()
    _work(c, lambda: laps.append(time.perf_counter()))
    end = time.perf_counter()
    middle = laps[0] if laps else end
    return Sample((middle - begin) * 1e3, (end - begin) * 1e3, (end - begin) * 1e3)


def _step_cuda(c: Contestant) -> Sample:
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda").zero_()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    start.record()
    middle.record()
    _work(c, middle.record)  # recorded again when the loss is there
    end.record()
    host = time.perf_counter() - begin
    end.synchronize()
    total = start.elapsed_time(end)
    trains = c.case.mode == "train" and not c.floor
    return Sample(start.elapsed_time(middle) if trains else total, total, host * 1e3)


def _work(c: Contestant, lap: Callable[[], None]) -> None:
    """One step; ``lap`` is called when the loss is there."""
    if c.floor:
        c.forward()
    elif c.case.mode == "eval":
        with torch.no_grad():
            c.forward()
    else:

        def forward() -> torch.Tensor | None:
            loss = c.forward()
            lap()
            return loss

        gradients(forward, c.problem, c.case)


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the 10th and 90th percentile (nearest rank: no value that was not seen)."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)]
