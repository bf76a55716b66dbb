"""Which backend computes the rows: by device, or as asked. An explicit choice never falls back to
another.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import Any

import torch

NAMES = ("triton", "cpu", "reference")


class CustomRows:
    """Base of a backend that computes its own rows; all else is done by another backend.

    An instance may stand wherever a backend's name may. Subclasses define ``rows`` as
    :mod:`fusedkd.kernels` describes it, and inherit the loop over chunks, the products, the
    reductions and autograd.
    """

    def __init__(self, name: str | None, device: torch.device) -> None:
        self.inner = resolve(name, device)

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "inner":  # not there yet: a copy in the making
            raise AttributeError(attribute)
        return getattr(self.inner, attribute)


def resolve(name: str | CustomRows | None, device: torch.device) -> Any:
    """The backend module called ``name``, or the one for ``device`` when it is None.

    Raises:
        ValueError: unknown name, or a backend that cannot serve this device.
        RuntimeError: the backend asked for (or the only fast one for a GPU) does not work here;
        says why.
    """
    if isinstance(name, CustomRows):
        return name
    if name is None:
        return _for_device(device.type)
    check_name(name)
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"backend='cpu' but the tensors are on {device}: move them, or leave backend=None."
        )
    return _working(name)


def check_name(name: str | CustomRows | None) -> None:
    """Raise unless there is a backend called ``name``; None goes by device."""
    if name is None or isinstance(name, CustomRows):
        return
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(
            f"backend={name!r}: expected one of {', '.join(map(repr, NAMES))}, or None to go by "
            "device."
        )


@functools.cache
def _for_device(device_type: str) -> Any:
    if device_type == "cuda":  # torch's name for AMD GPUs too
        return _working("triton")
    if device_type != "cpu":
        return load("reference")
    backend = load("cpu")
    if reason := backend.unavailable():
        warnings.warn(
            f"fusedkd: the CPU extension is not usable ({reason}), so the slow fp64 reference runs "
            "instead. To build it: install a C++ compiler, then `pip install --no-build-isolation "
            "--force-reinstall --no-deps fusedkd` (`make setup` in a checkout).",
            RuntimeWarning,
            stacklevel=4,
        )
        return load("reference")
    return backend


@functools.cache
def _working(name: str) -> Any:
    backend = load(name)
    if reason := backend.unavailable():
        raise RuntimeError(
            f"backend={name!r} cannot run here: {reason}. `fusedkd doctor` shows which can."
        )
    return backend


def load(name: str) -> Any:
    """Import the backend's module, whether or not it can run here."""
    return importlib.import_module(f".kernels.{name}", __package__)
