"""Where the time of the steps goes, measured without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up seconds by name. On a GPU they are read from events that lie in its queue."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if not self._events:
            began = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - began
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self._open.append((name, start, end))

    def read(self) -> dict[str, float]:
        """Seconds so far, of what the device has done."""
        waiting = []
        for name, start, end in self._open:
            if end.query():
                self._seconds[name] += start.elapsed_time(end) / 1000
            else:
                waiting.append((name, start, end))
        self._open = waiting
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Of forward and backward: the teacher's, the loss's, and the student's, which is the
        rest; the loss makes its gradient in its forward, where it can."""
        seconds = self.read()
        step = seconds.get("step", 0.0)
        if not step:
            return {}
        parts = {name: seconds.get(name, 0.0) / step for name in ("teacher", "loss")}
        return {**parts, "student": max(0.0, 1.0 - sum(parts.values()))}
