"""Numbers of the loss that change while a student is trained. They are run-time values to every
kernel, so nothing is compiled again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

# From 0 at the start to 1 at the end, by how much of the training is done.
_SHAPES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda done, at: 0.0,
    "linear": lambda done, at: min(done / at, 1.0),
    "cosine": lambda done, at: (1 - math.cos(math.pi * min(done / at, 1.0))) / 2,
    "step": lambda done, at: float(done >= at),
}


@dataclass(frozen=True)
class Schedule:
    """From wherever a number starts to ``end``, which it has from the share ``at`` of the training
    on."""

    shape: str
    end: float = 0.0
    at: float = 1.0

    def __call__(self, start: float, done: float) -> float:
        """The number when a share ``done`` (0 to 1) of the training is over."""
        return start + (self.end - start) * _SHAPES[self.shape](done, self.at)


def parse_schedules(texts: Iterable[str], starts: Mapping[str, float]) -> dict[str, Schedule]:
    """``["temperature=cosine:1", "hidden_mse=step:0:0.8"]`` by name.

    Args:
        texts: ``NAME=SHAPE:END`` or ``NAME=SHAPE:END:AT``; SHAPE is constant, linear, cosine or
            step, END the number it comes to, AT the share of the training after which it is there
            (default 1: at the end).
        starts: the numbers that can have a schedule, and what they start from.

    Raises:
        ValueError: not of this form, an unknown or repeated name, or a number out of range.
    """
    found: dict[str, Schedule] = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition("="))
        if name not in starts or name in found:
            raise ValueError(
                f"schedules: {text!r}: expected one entry for each of {', '.join(starts)} at most, "
                "such as temperature=cosine:1."
            )
        found[name] = _parse(text, rest)
        if name.endswith("temperature") and found[name].end <= 0 and rest != "constant":
            raise ValueError(f"schedules: {text!r}: expected a temperature above 0.")
    return found


def _parse(text: str, rest: str) -> Schedule:
    shape, *numbers = rest.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    right = shape in _SHAPES and (not values if shape == "constant" else 1 <= len(values) <= 2)
    if (
        not right
        or not all(0 <= v < math.inf for v in values)
        or not all(0 < v <= 1 for v in values[1:])
    ):
        raise ValueError(
            f"schedules: {text!r}: expected NAME=constant, or NAME=SHAPE:END or NAME=SHAPE:END:AT "
            f"with SHAPE one of {', '.join(list(_SHAPES)[1:])}, END at least 0 and AT above 0 and "
            "at most 1."
        )
    return Schedule(shape, *values)
