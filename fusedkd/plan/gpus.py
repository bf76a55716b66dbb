"""What makers say of their GPUs."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from fusedkd.errors import UserError
from fusedkd.plan.watch import Array

# What the driver, CUDA's context, the libraries' workspaces and the allocator's rounding take of a
# GPU: an assumption, not measured here.
RESERVED = 1 << 30


class Gpu(NamedTuple):
    """Peaks from the data sheets: dense products in bf16 and fp32 (without TF32), memory traffic.
    Memory as nvidia-smi tells it."""

    name: str
    memory: int
    half: float = 0.0  # flop / s
    single: float = 0.0
    bandwidth: float = 0.0  # bytes / s

    def seconds(self, table: Array, itemsize: int) -> float:
        """No operation is faster than its products and its bytes are: the sum over a table's."""
        peak = self.half if itemsize == 2 else self.single
        return float(np.maximum(table[:, 1] / peak, table[:, 2] / self.bandwidth).sum())


MIB = 1 << 20
GPUS = {
    "h100": Gpu("H100 SXM", 81559 * MIB, 989e12, 67e12, 3.35e12),
    "h200": Gpu("H200", 143771 * MIB, 989e12, 67e12, 4.8e12),
    "a100": Gpu("A100 SXM 80 GB", 81920 * MIB, 312e12, 19.5e12, 2.04e12),
    "rtx4090": Gpu("RTX 4090", 24564 * MIB, 165e12, 82.6e12, 1.008e12),
}
UNITS = {"GIB": 1 << 30, "GB": 10**9, "MIB": 1 << 20, "MB": 10**6}


def gpu_of(name: str | None, memory: str | None) -> Gpu | None:
    """The one that is meant; None where nothing is given.

    Raises:
        UserError: one that is not known, or no amount of memory.
    """
    if name is not None and name.lower() not in GPUS:
        raise UserError(
            f"--gpu {name}: not known; expected one of {', '.join(GPUS)}. For any other say how "
            "much memory it has: --memory 24GiB."
        )
    gpu = None if name is None else GPUS[name.lower()]
    if memory is None:
        return gpu
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([GM]i?B)", memory, re.I)
    size = float(found[1]) * UNITS[found[2].upper()] if found else 0
    if size < 1:
        raise UserError(f"--memory {memory}: expected an amount such as 24GiB, 80GB or 500MiB.")
    return Gpu(memory, int(size)) if gpu is None else gpu._replace(memory=int(size))
