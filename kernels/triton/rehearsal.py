"""A GPU that need not be there: kernels are compiled for it, by Triton's own compiler and into
Triton's own cache, and a launch does nothing. For compiling ahead, and for measuring the host.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as drivers

from . import device


class Rehearsal:
    """As much of a driver as Triton's launches need; it is its own ``utils``."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, self
        self.launched = 0
        self.compiled: list[float] = []  # seconds, of kernels that no cache had
        self.device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, *arguments: Any) -> None:
        self.launched += 1

    def begin(self, processors: int) -> None:
        """From now on, in this process, ``backend="triton"`` takes tensors on the CPU, and writes
        nothing to its results."""
        drivers.set_active(self)
        knobs.compilation.listener = self._listen
        device.TARGET = self.target.backend
        device.PREBUILT = device.PREBUILT and device.TARGET == "cuda"
        device.check = lambda x: None
        device.guard = lambda x: contextlib.nullcontext()
        device.processors = functools.cache(lambda of: processors)
        device.unavailable = lambda: None
        true, holds = torch.ones(()), device.holds
        device.holds = lambda right, message: holds(true, message)  # nobody writes what is right

    def _listen(self, *, times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            self.compiled.append(times.total / 1e6)


def target_of(name: str) -> GPUTarget:
    """An NVIDIA GPU's, as ``sm_90``, or an AMD one's, as ``gfx942``.

    Raises:
        ValueError: it is neither.
    """
    if name.startswith("sm_") and name[3:].isdigit():
        return GPUTarget("cuda", int(name[3:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    raise ValueError(f"{name!r}: expected sm_80, sm_90, sm_100, ... or gfx942, ...")


def name_of_gpu() -> str:
    """Of the current device, as ``target_of`` takes it."""
    target = drivers.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
