"""What a schedule will ask of a GPU later, asked before the first step: a kernel takes seconds to
compile, and in the middle of a training all processes would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusedkd import LMHead
from fusedkd.spec import temperature_class


def compiles(student: Any, backend: str | None) -> bool:
    """Whether a loss of this side has kernels that are compiled when they are first met."""
    states = student.hidden if isinstance(student, LMHead) else student
    return states.device.type == "cuda" and backend in (None, "triton")


def other_kernels(
    numbers: Callable[[float], Mapping[str, float]], done: float, steps: int
) -> list[float]:
    """When, as a share of ``steps``, each kind of loss comes up first that is not the one at
    ``done``. ``numbers`` gives the weights and temperatures of a share."""
    found = {_kind(numbers(done)): done}
    for step in range(round(done * steps), steps):
        found.setdefault(_kind(numbers(step / steps)), step / steps)
    return list(found.values())[1:]


def _kind(numbers: Mapping[str, float]) -> tuple[int | bool, ...]:
    """All that a schedule moves and a kernel knows when it is compiled."""
    weights = [numbers.get(name, 0) != 0 for name in ("kd_weight", "ce_weight", "z_loss_weight")]
    return temperature_class(numbers["temperature"]), *weights
