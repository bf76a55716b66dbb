"""A process of the visit: ``python -m fusedkd.benchmarks.device.child ORDERS``."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

from .journal import Journal, one_line
from .orders import Orders
from .steps import STEPS

# Functions that a step starts in further processes, each by (orders, card).
INNER = {
    "warm": "compile",
    "counted": "compile",
    "careful": "sanitizer",
    "watched": "counters",
    "bad": "badlabel",
}


def main(orders: Orders) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if orders.what in INNER:
        card = None if orders.what == "counted" else _card(orders)
        getattr(_module(INNER[orders.what]), orders.what)(orders, card)
        return
    journal = Journal(orders.journal, orders.deadline)
    try:
        if STEPS[orders.what].starts:
            _faults(journal, orders)
            _module(orders.what).run(journal, orders)
            return
        card = _card(orders)
        from .plans import sizes

        journal.free = card.free
        _faults(journal, orders)
        _module(orders.what).run(journal, card, sizes(orders.device))
    except Exception as error:  # between the items: no GPU, for example
        journal.write({"name": "the step itself", "error": one_line(error)})
        raise


def _module(step: str) -> Any:
    return importlib.import_module(f".{step}", __package__)


def _card(orders: Orders) -> Any:
    import torch

    from .card import Card

    torch.manual_seed(0)
    return Card(orders.device)


def _faults(journal: Journal, orders: Orders) -> None:
    """For trying the safety nets."""
    for fault in orders.faults:
        step, _, kind = fault.partition("=")
        if step == orders.what:
            journal.item(kind, _fault, kind)


def _fault(kind: str) -> None:
    if kind == "crash":
        os.abort()
    if kind == "hang":
        time.sleep(1e4)
    raise RuntimeError("CUDA error: tried out" if kind == "lost" else "tried out")


if __name__ == "__main__":
    main(Orders(**json.loads(sys.argv[1])))
