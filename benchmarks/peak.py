"""Peak memory: the kernel's high-water mark of this process, or the allocator's of a GPU."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

SHARE = 0.8  # of the memory that is free: a peer that wants more is stopped, not the machine


def reset_peak(device: str = "cpu") -> int:
    """Forget the high-water mark; returns the bytes that are in use now. On a CPU without what was
    freed for the system to take (kernels/cpu/memory.h keeps blocks that way): used again, it counts
    again."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS") - free_to_take()


def peak(device: str = "cpu") -> int:
    """Bytes in use at most since :func:`reset_peak`."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, e.g. VmRSS (resident now) or VmHWM (resident at most)."""
    return _field("/proc/self/status", field)


def free_to_take() -> int:
    """Resident, but freed: what the system may take back without asking (LazyFree)."""
    return _field("/proc/self/smaps_rollup", "LazyFree")


def limit_address_space() -> int:
    """Allow no more than most of the memory that is free now; returns the allowance in bytes."""
    allowance = int(_field("/proc/meminfo", "MemAvailable") * SHARE)
    ceiling = status_bytes("VmSize") + allowance
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    return allowance


def _field(path: str, name: str) -> int:
    with Path(path).open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
