"""All that the launchers ask the machine."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy
import torch
import triton
from torch import Tensor

from . import programs

INTERPRETED = not isinstance(programs.row_kernel, triton.JITFunction)
TARGET = "hip" if torch.version.hip else "cuda"


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if INTERPRETED:
        return _interpreter_unavailable()
    if torch.cuda.is_available():
        return None
    return (
        "there is no GPU that this torch can use. To run the kernels slowly on a CPU, in Triton's "
        "interpreter, set TRITON_INTERPRET=1 in the environment before triton is first imported"
    )


def _interpreter_unavailable() -> str | None:
    if _release(triton) < (3, 7) and _release(numpy) >= (2, 4):  # int() of an array of one
        return (
            f"the interpreter of Triton {triton.__version__} fails with NumPy {numpy.__version__}: "
            "install numpy<2.4, or Triton 3.7"
        )
    return None


def _release(package: Any) -> tuple[int, ...]:
    return tuple(map(int, package.__version__.split(".")[:2]))


# Whether a compiled kernel may be launched again as it is (launcher.py). AMD's compiler is told
# whether a tensor has 2 GiB; of Triton, the launches of these two have been read.
PREBUILT = TARGET == "cuda" and not INTERPRETED and _release(triton) in ((3, 6), (3, 7))


def check(x: Tensor) -> None:
    if x.device.type == "cpu" and not INTERPRETED:
        raise ValueError(
            "backend='triton' got tensors on the CPU: move them to the GPU, leave backend=None, or "
            "set TRITON_INTERPRET=1 before triton is first imported to interpret the kernels."
        )


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 132  # the interpreter walks the same paths as an H200
    return torch.cuda.get_device_properties(device).multi_processor_count


def guard(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if INTERPRETED:  # as silent as a GPU about infinities that the kernels expect
        return numpy.errstate(all="ignore")
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def holds(right: Tensor, message: str) -> bool:
    """Whether a number is not 0. A GPU is not waited for: there it is asserted, and this True."""
    if INTERPRETED:
        return bool(right)
    torch._assert_async(right, message)
    return True
