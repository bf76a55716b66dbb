"""Step: memcheck and racecheck of compute-sanitizer over three small calls."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .journal import Item, Journal
from .orders import Orders, output_of, tool

DONE = "careful: done"


def run(journal: Journal, orders: Orders) -> None:
    names = ("memcheck", "racecheck") if orders.device == "cuda" else ("without a tool",)
    with ThreadPoolExecutor(2) as pool:
        checks = {name: pool.submit(_check, name, orders) for name in names}
        for name, check in checks.items():
            journal.item(name, check.result)


def _check(name: str, orders: Orders) -> Item:
    inner = orders.but(what="careful").command
    if orders.device == "cpu":
        code, text = output_of(inner, orders.left)
        return (
            {"ok": True} if code == 0 and DONE in text else {"ok": False, "wrong": f"code {code}"}
        )
    options = ["--tool", name, "--print-limit", "20"]
    options += ["--leak-check", "no"] if name == "memcheck" else []
    command = [tool("compute-sanitizer"), *options, *inner]
    _, text = output_of(command, min(80, orders.left), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = re.findall(r"=+ ?((?:ERROR|RACECHECK) SUMMARY.*|.*not supported.*|.*Internal.*)", text)
    ok = DONE in text and any(re.search(r"\b0 (errors|hazards)", line) for line in said)
    last = (said or text.strip().splitlines() or ["no output"])[-1][:160]
    return {"ok": ok, "said": last} | ({} if ok else {"wrong": last})


def careful(orders: Orders, card: Any) -> None:
    """In the process that is watched; inputs come from the host, so few kernels but ours run."""
    from . import plans
    from .calls import moved, problem_of, step_of
    from .card import Card

    for call in plans.careful():
        step_of(call, moved(problem_of(call, Card("cpu")), card))()
        card.wait()
    print(DONE)
