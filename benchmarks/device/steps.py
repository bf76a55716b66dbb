"""The steps of a visit, in their order, and how long each may take."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """Its module here has ``run(journal, card, sizes)``, or ``run(journal, orders)`` where it only
    starts other processes."""

    limit: float  # seconds in all
    item: float  # seconds that one item may take
    group: int  # steps of one number run side by side: none of them measures time
    starts: bool = False  # only starts other processes, and needs no torch itself


STEPS = {
    "facts": Step(60, 60, 0),
    "ceilings": Step(60, 30, 1),
    "compile": Step(110, 110, 2, starts=True),
    "smoke": Step(100, 40, 3),
    "sanitizer": Step(100, 100, 3, starts=True),
    "shares": Step(80, 25, 4),
    "heads": Step(80, 30, 5),
    "host": Step(60, 30, 6),
    "peers": Step(100, 60, 7),
    "profile": Step(50, 40, 8),
    "counters": Step(70, 60, 9, starts=True),
    "badlabel": Step(200, 60, 10, starts=True),  # ends in device-side assertions, so it comes late
    "tests": Step(120, 120, 11, starts=True),
}
