"""Step: what a call keeps the host; and that it never waits, fits into graphs and side streams."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..race.formulas import plain_loss
from . import plans
from .calls import Call, Problem, problem_of, step_of
from .card import Card
from .journal import Item, Journal
from .peers import case_of
from .plans import Sizes


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    calls = plans.of_the_host(sizes)
    costs = {name: call for name, call in calls.items() if call.rows == 8 and call.vocab <= 1000}
    costs["dense eval"] = calls["dense"].but(mode="eval")
    for name, call in costs.items():
        journal.item(f"call {name}", _cost, _step, call, card, sizes)
    journal.item("call eager", _cost, _eager, calls["dense"], card, sizes)
    journal.item("profile", _profile, calls["dense"], card, sizes)
    for name, call in calls.items():
        if name != "jsd":
            journal.item(f"no synchronisation: {name}", _never_waits, call, card)
            journal.item(f"graph: {name}", _graph, call, card)
    journal.item("side stream", _side_stream, next(reversed(calls.values())), card)


def _step(call: Call, card: Card) -> Callable[[], Any]:
    return step_of(call, problem_of(call, card))


def _eager(call: Call, card: Card) -> Callable[[], Any]:
    student, teacher, labels, _, leaves = problem_of(call, card)
    case = case_of(call, card)

    def step() -> Any:
        loss = plain_loss(student, teacher, labels, case, torch.float32)  # type: ignore[arg-type]
        return torch.autograd.grad(loss, list(leaves.values()))

    return step


def _cost(made: Callable[..., Any], call: Call, card: Card, sizes: Sizes) -> Item:
    """Microseconds of a call, the GPU never being waited for."""
    step = made(call, card)
    step()
    card.wait()
    rounds = []
    for _ in range(sizes.rounds):
        start = time.perf_counter()
        for _ in range(sizes.calls):
            step()
        rounds.append(round((time.perf_counter() - start) / sizes.calls * 1e6, 1))
        card.wait()
    return {"us": min(rounds), "rounds": rounds}


def _profile(call: Call, card: Card, sizes: Sizes) -> Item:
    step = _step(call, card)
    step()
    watch = cProfile.Profile()
    watch.enable()
    for _ in range(sizes.calls):
        step()
    watch.disable()
    stats: Any = pstats.Stats(watch)
    longest = sorted(stats.stats.items(), key=lambda pair: -pair[1][2])[:12]
    top = [
        {"what": f"{Path(at[0]).name}:{at[1]} {at[2]}", "us": round(s[2] / sizes.calls * 1e6, 1)}
        for at, s in longest
    ]
    return {"top": top, "python_calls": stats.total_calls / sizes.calls}


def _never_waits(call: Call, card: Card) -> Item:
    card.needed()
    step = _step(call, card)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def _aside(step: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = step()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def _graph(call: Call, card: Card) -> Item:
    """Captured, replayed, and replayed on other numbers: bitwise what a plain call gives."""
    card.needed()
    problem, other = problem_of(call, card), problem_of(call, card, seed=1)
    step = step_of(call, problem)
    want = [x.clone() for x in step()]
    _aside(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    if not all(map(torch.equal, captured, want)):
        return {"ok": False, "wrong": "the replay differs"}
    _copy(problem, other)
    graph.replay()
    got = [x.clone() for x in captured]
    same = all(map(torch.equal, got, step()))
    return {"ok": True} if same else {"ok": False, "wrong": "the replay on new numbers differs"}


@torch.no_grad()
def _copy(problem: Problem, other: Problem) -> None:
    for name, leaf in problem.leaves.items():
        leaf.copy_(other.leaves[name])
    assert problem.labels is not None and other.labels is not None
    problem.labels.copy_(other.labels)


def _side_stream(call: Call, card: Card) -> Item:
    card.needed()
    step = _step(call, card)
    want = step()
    same = all(map(torch.equal, _aside(step), want))
    return {"ok": True} if same else {"ok": False, "wrong": "a side stream changes the result"}
