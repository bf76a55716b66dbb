"""Step: the race's providers on a GPU; those that are installed, or lie as wheels in ``.whl/``."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..race.case import Case, Problem, make_problem
from ..race.check import gradients
from ..race.provider import OURS
from ..race.providers import PROVIDERS
from . import lone_trl
from .calls import Call
from .card import Card
from .journal import Item, Journal, Skip
from .plans import Sizes

SECONDS = 3.0  # of laps, at most


def case_of(call: Call, card: Card) -> Case:
    """The same as the race has it."""
    head = (
        {"hidden_student": call.hidden[0], "hidden_teacher": call.hidden[1]}
        if call.form == "head"
        else {}
    )
    return Case(
        form=call.form, divergence=call.divergence, n=call.rows, vocab=call.vocab, dtype=call.dtype,
        temperature=call.temperature, ce_weight=call.ce, frozen=call.mode == "frozen",
        mode="eval" if call.mode == "eval" else "train", device=card.device.type,
        **dict(call.more), **head,
    )  # fmt: skip


def races(card: Card, sizes: Sizes) -> list[tuple[str, Case]]:
    """(provider, case), ours first in each."""
    dense = case_of(Call(rows=sizes.raced, vocab=sizes.vocab), card)
    hidden = sizes.heads[0][1:]
    wide = Call("head", rows=sizes.raced, vocab=sizes.vocab, hidden=(hidden[0], hidden[1]))
    head = case_of(wide, card)
    kl, jsd = dense, dense.but(divergence="jsd")
    pairs: list[tuple[Case, tuple[str, ...]]] = [
        (kl, ("eager", "compile", "torchtune")),
        (jsd, ("eager", "compile", "gkd")),
        (head, ("eager", "compile", "liger")),
        (head.but(divergence="jsd"), ("eager", "liger")),
        (head.but(ce_weight=0.0), ("trl",)),
        (head.but(divergence="jsd", ce_weight=0.0), ("trl", "liger-triton")),
        (head.but(kd_weight=0.0), ("cce",)),
    ]
    if sizes.tiny:  # what compiles with inductor takes a minute each
        pairs = [(kl, ("eager", "torchtune")), (head, ("eager",))]
    return [(name, case) for case, names in pairs for name in (OURS, *names)]


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    lone_trl.prepare()
    for name, case in races(card, sizes):
        journal.item(f"{name}: {case.label}", _measure, name, case, card, sizes)


def _measure(name: str, case: Case, card: Card, sizes: Sizes) -> Item:
    if reason := PROVIDERS[name].reason_missing(case):
        raise Skip(reason)
    card.free()
    step = step_of(name, case, make_problem(case))
    start = time.perf_counter()
    step()
    card.wait()
    first = time.perf_counter() - start
    step()
    start = time.perf_counter()
    step()
    card.wait()
    laps = min(sizes.laps, max(2, int(SECONDS / (time.perf_counter() - start))))
    lap = card.lap(step, laps, warm=0)
    return {
        "peer": name,
        "case": case.label,
        **lap,
        "first_s": round(first, 2),
        "bytes": card.peak(step),
    }


def step(name: str, case: Case, card: Card) -> None:
    """One, to compile what it needs."""
    if PROVIDERS[name].reason_missing(case) is None:
        step_of(name, case, make_problem(case))()
        card.wait()
        card.free()


def step_of(name: str, case: Case, problem: Problem) -> Callable[[], Any]:
    """A step of the provider."""
    forward = PROVIDERS[name].prepare(case, problem)
    if case.mode == "eval":
        return torch.no_grad()(forward)
    return partial(gradients, forward, problem, case)
