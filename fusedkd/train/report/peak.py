"""The most memory that a run had."""

from __future__ import annotations

import sys

import torch


def peak_bytes(device: torch.device) -> int:
    """Of the GPU; on a CPU of this process. 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
