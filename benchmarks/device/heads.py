"""Step: heads against their four bare products, by ``chunk_bytes``."""

from __future__ import annotations

from typing import Any

from ..race.case import Case, Problem, make_problem
from ..race.provider import FLOOR
from ..race.providers import PROVIDERS
from . import plans
from .calls import Call
from .card import Card
from .journal import Item, Journal
from .peers import case_of, step_of
from .plans import Sizes


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    held: dict[Any, tuple[Problem, float]] = {}
    laps = max(2, sizes.laps - 4)

    def prepared(case: Case) -> tuple[Problem, float]:
        key = (case.n, case.hidden_student, case.hidden_teacher, case.mode, case.frozen)
        if key not in held:
            held.clear()
            card.free()
            problem = make_problem(case)
            held[key] = problem, card.lap(PROVIDERS[FLOOR].prepare(case, problem), laps)["ms"]
            card.free()
        return held[key]

    def measure(call: Call) -> Item:
        case = case_of(call, card)
        problem, floor = prepared(case)
        step = step_of("fusedkd", case, problem)
        lap = card.lap(step, laps, warm=1)
        ratio = round(lap["ms"] / floor, 3)
        return {**lap, "floor_ms": floor, "ratio": ratio, "bytes": card.peak(step)}

    for call in plans.through_heads(sizes):
        journal.item(call.label, measure, call)
