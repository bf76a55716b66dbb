"""Step: which machine, which versions, and what is there."""

from __future__ import annotations

import torch

from ..machine import machine
from . import place
from .card import Card
from .journal import Item, Journal, Skip
from .orders import tool
from .plans import Sizes


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    journal.item("machine", lambda: machine("cuda" if card.cuda else "cpu"))
    journal.item("card", _card, card)
    journal.item("package", _package)
    for name in ("compute-sanitizer", "ncu", "pytest"):
        journal.item(name, _there, name)


def _card(card: Card) -> Item:
    card.needed()
    properties = torch.cuda.get_device_properties(0)
    fields = (
        *("name", "multi_processor_count", "L2_cache_size", "total_memory"),
        *("shared_memory_per_multiprocessor", "regs_per_multiprocessor"),
    )
    clocks = place.smi("driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu")
    known = {field: getattr(properties, field, None) for field in fields}
    return {"gpu": known.pop("name"), **known, "smi": clocks}


def _package() -> Item:
    """What ``fusedkd doctor`` says first."""
    import numpy

    from fusedkd import backends

    reasons = {name: backends.load(name).unavailable() for name in ("triton", "cpu")}
    item: Item = {"numpy": numpy.__version__, **{k: why or "can run" for k, why in reasons.items()}}
    return {**item, "error": reasons["triton"]} if reasons["triton"] else item


def _there(name: str) -> Item:
    if name != "pytest":
        return {"at": tool(name)}
    try:
        import pytest
    except ImportError:
        raise Skip("pytest is not there") from None
    return {"at": pytest.__version__}
