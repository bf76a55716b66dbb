"""Step: every form against fp64, within the tests' own budgets; and what must not change a bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedkd import kd_loss

from . import place, plans
from .calls import Call, problem_of, step_of
from .card import Card
from .journal import Item, Journal, Skip
from .plans import Sizes

FACTOR = 2.0**-8  # a rounding to bf16
ABSENT = -300.0  # as a logit at T = 1


def run(journal: Journal, card: Card, sizes: Sizes) -> None:
    check = judge()
    for call in plans.judged(sizes):
        journal.item(call.label, check, call, card)
        card.free() if call.rows * call.vocab > 1 << 24 else None
    odd = Call(rows=sizes.smoke, vocab=sizes.odd, divergence="mixed_kl")
    few = odd.but(rows=sizes.pieces[0], vocab=sizes.pieces[1], divergence="jsd")
    head = plans.chunked(odd.but(form="head", hidden=sizes.width))
    for call in (odd, head, odd.but(form="bucket"), *([] if sizes.tiny else [few])):
        journal.item(f"repeats bitwise: {call.label}", _repeats, call, card)
    rows, vocab = sizes.beyond
    journal.item("N V > 2^31", _beyond, odd.but(rows=rows, vocab=vocab, divergence="jsd"), card)
    for name, work in SAME.items():
        journal.item(name, work, odd, card)


def judge() -> Callable[[Call, Card], Item]:
    """The tests' own oracle and budgets, which lie in the checkout."""
    root = place.checkout()
    support = root / "tests/support" if root else Path("nowhere")
    if not support.is_dir():

        def skip(call: Call, card: Card) -> Item:
            raise Skip("tests/support is not there: not a checkout")

        return skip
    sys.path.append(str(support))
    import budget
    import oracle

    def check(call: Call, card: Card) -> Item:
        student, teacher, labels, keywords, leaves = problem_of(call, card)
        keywords = {"reduction": "mean", **keywords}
        backend = keywords.pop("backend", None)
        case = oracle.Case(student, teacher, labels, keywords, None, list(leaves))
        seen = case  # by the oracle, for whom minus infinity is a number that nothing is left of
        if call.look == "masked":
            sides = (x.detach().clamp(min=ABSENT) for x in (student, teacher))
            seen = oracle.Case(*sides, labels, keywords, None, list(leaves))
        try:
            return {"ok": True, "score": budget.check(case, backend, call.mode == "metrics", seen)}
        except AssertionError as error:
            return {"ok": False, "wrong": " ".join(str(error).split("\n")[0].split())[:200]}

    return check


def _same(a: Any, b: Any, otherwise: str) -> Item:
    equal = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return {"ok": True} if equal else {"ok": False, "wrong": otherwise}


def _repeats(call: Call, card: Card) -> Item:
    step = step_of(call, problem_of(call, card))
    return _same(step(), step(), "the second run differs")


def _twice(call: Call, card: Card) -> Item:
    student, teacher, labels, keywords, leaves = problem_of(call, card)
    loss = kd_loss(student, teacher, labels, **keywords)
    first = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, 2.0))
    return _same(
        [2 * x for x in kept], second, "twice the upstream gradient is not twice as much"
    ) | (
        {} if all(map(torch.equal, first, kept)) else {"ok": False, "wrong": "it changed the first"}
    )


def _no_grad(call: Call, card: Card) -> Item:
    evaluation = call.but(mode="eval")
    want = step_of(call, problem_of(call, card))()[:1]
    return _same(want, step_of(evaluation, problem_of(evaluation, card))(), "the loss differs")


def _in_place(call: Call, card: Card) -> Item:
    inplace = call.but(more=(("inplace", True),))
    want = step_of(call, problem_of(call, card))()
    return _same(want, step_of(inplace, problem_of(inplace, card))(), "the result differs")


def _traced(call: Call, card: Card) -> Item:
    student, teacher, labels, keywords, leaves = problem_of(call, card)

    def loss(s: Any, t: Any, y: Any) -> Any:
        return kd_loss(s, t, y, **keywords) * 1.0

    backend = "inductor" if card.cuda else "aot_eager"
    values = []
    for function in (loss, torch.compile(loss, backend=backend, dynamic=False, fullgraph=True)):
        value = function(student, teacher, labels)
        values.append((value.detach(), *torch.autograd.grad(value, list(leaves.values()))))
    return _same(*values, "it changes the result")


SAME: dict[str, Callable[[Call, Card], Item]] = {
    "backward twice": _twice,
    "without a graph": _no_grad,
    "in place": _in_place,
    "under torch.compile": _traced,
}


def _beyond(call: Call, card: Card) -> Item:
    """Rows on both sides of 2^31 entries, against the reference on these rows alone."""
    problem = problem_of(call.but(more=(("reduction", "sum"),)), card)
    loss, grad = step_of(call, problem)()
    edge = min(2**31 // call.vocab, call.rows - 2)
    rows = torch.tensor([0, edge - 1, edge, edge + 1, call.rows - 1], device=card.device)
    student, teacher = (x.detach()[rows] for x in (problem.student, problem.teacher))  # type: ignore[union-attr]
    student = student.double().requires_grad_()
    keywords = {**problem.keywords, "backend": "reference"}
    assert problem.labels is not None
    truth = kd_loss(student, teacher, problem.labels[rows], **keywords)
    (exact,) = torch.autograd.grad(truth, student)
    score = float((grad[rows].double() - exact).norm() / exact.norm()) / FACTOR
    ok = score < 1 and bool(loss.isfinite())
    return {"ok": ok, "score": score} | ({} if ok else {"wrong": f"{score:.3g} roundings"})
