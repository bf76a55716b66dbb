"""A kernel that is launched without Triton's front door.

``kernel[grid](...)`` binds each argument, and asks at every launch what to specialise on: of 34
arguments that takes 15 us. Here only the first launch goes that way; from the second on, what was
compiled for it is launched as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton import knobs
from triton.runtime import driver

from . import device


class Launcher:
    """``kernel`` with its compile-time arguments and options.

    What is compiled depends on nothing else but the device and the dtypes of the tensors, None
    among them: the kernels specialise on no number and no address (programs.py). Where that is not
    so (device.PREBUILT), and for a profiler that wants to know of each launch, Triton's front door
    is taken every time.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], options: dict[str, int]) -> None:
        self.kernel, self.constants, self.options = kernel, tuple(constants.values()), options
        parameters = inspect.signature(kernel.fn).parameters
        assert tuple(parameters)[-len(constants) :] == tuple(constants)  # last, and in their order
        self.names = tuple(parameters)[: -len(constants)]
        # a tensor is a parameter without a type
        self.tensors = [
            x for x in self.names if parameters[x].annotation is inspect.Parameter.empty
        ]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
        """Launch on the current device, in its current stream."""
        values = [arguments[name] for name in self.names]
        runtime = knobs.runtime
        if not device.PREBUILT or _calls(runtime.launch_enter_hook, runtime.launch_exit_hook):
            self.kernel[grid](*values, *self.constants, **self.options)
            return
        current = driver.active.get_current_device()
        dtypes = [None if (x := arguments[name]) is None else x.dtype for name in self.tensors]
        key = (current, *dtypes)
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*values, *self.constants, **self.options)
            return
        stream = driver.active.get_current_stream(current)
        kernel = compiled.function, compiled.packed_metadata
        hooks = None, None, None  # and what they would be told
        compiled.run(*grid, 1, stream, *kernel, *hooks, *values, *self.constants)


def _calls(*hooks: Any) -> bool:
    """Whether anybody is told of launches."""
    return any(getattr(hook, "calls", hook) for hook in hooks)
