"""Step: wrong labels and ids must end in an error of ours: on a GPU a device-side assertion."""

from __future__ import annotations

import os
from typing import Any

from .journal import Item, Journal, one_line
from .orders import Orders, output_of


def run(journal: Journal, orders: Orders) -> None:
    names = ("label", "id twice", "id outside")
    for name in names[: 1 if orders.device == "cpu" else 3]:
        journal.item(name, _check, name, orders)


def _check(name: str, orders: Orders) -> Item:
    code, text = output_of(orders.but(what="bad", part=name).command, min(35, orders.left))
    lines = text.strip().splitlines() or ["no output"]
    told = next((line for line in lines if "bad: " in line), lines[-1])[:160]
    expected = "bad: raised" if orders.device == "cpu" else "device-side assert"
    if code != 0 and expected in text:
        return {"ok": True, "said": told}
    return {"ok": False, "wrong": f"no error of ours: {told}"}


def bad(orders: Orders, card: Any) -> None:
    """In the process that it ends."""
    from .calls import Call, problem_of, step_of

    call = Call(rows=4, vocab=300, form="dense" if orders.part == "label" else "bucket")
    problem = problem_of(call, card)
    if orders.part == "label":
        problem.labels[1] = 300  # type: ignore[index]
    else:
        ids = problem.teacher.indices  # type: ignore[union-attr]
        ids[1, 0] = ids[1, 1] if orders.part == "id twice" else 300
    try:
        step_of(call, problem)()
        card.wait()
    except Exception as error:
        print(f"bad: raised {one_line(error)}", flush=True)
        os._exit(3)
    print("bad: passed")
