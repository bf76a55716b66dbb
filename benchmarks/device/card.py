"""The GPU, or the CPU of a dry run: all in which they differ."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .journal import Item, Skip

GB, GIB = 10**9, 1 << 30


class Card:
    def __init__(self, kind: str) -> None:
        self.cuda, self.device = kind == "cuda", torch.device(kind)
        self.backend = None if self.cuda else "triton"  # the interpreter has to be asked for
        self.processors = 4
        if self.cuda:
            self.processors = torch.cuda.get_device_properties(0).multi_processor_count
        self.flushed: Tensor | None = None

    def needed(self) -> None:
        """For items that a dry run cannot have."""
        if not self.cuda:
            raise Skip("a GPU's")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        self.flushed = None
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def flush(self) -> None:
        """Empties L2, and keeps the GPU busy while the host runs ahead: a lap holds no launch."""
        if self.cuda:
            if self.flushed is None:
                self.flushed = torch.empty(GIB, dtype=torch.int8, device=self.device)
            self.flushed.zero_()
            self.flushed.zero_()

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, step: Callable[[], Any], laps: int, warm: int = 2) -> Item:
        """Median, least and most milliseconds of a step on the device."""
        for _ in range(warm):
            step()
        times = []
        for _ in range(laps):
            self.flush()
            start = self._mark()
            step()
            stop = self._mark()
            self.wait()
            times.append(float(start.elapsed_time(stop) if self.cuda else stop - start))
        ms = {"ms": statistics.median(times), "least": min(times), "most": max(times)}
        return {name: round(value, 5) for name, value in ms.items()}

    def peak(self, step: Callable[[], Any]) -> int | None:
        """Bytes of the allocator beyond what was there before; a dry run has none."""
        gc.collect()
        if not self.cuda:
            step()
            return None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        self.wait()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def copy(self, gigabytes: float, laps: int) -> Item:
        """Of memory to memory, each byte counted twice."""
        source = torch.ones(int(gigabytes * GB), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return rate(self.lap(lambda: target.copy_(source), laps), 2 * source.numel())


def rate(lap: Item, size: int) -> Item:
    """A lap that moved ``size`` bytes."""
    return {**lap, "gb_s": round(size / lap["ms"] / 1e6, 1)}
