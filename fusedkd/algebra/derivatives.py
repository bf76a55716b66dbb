"""Derivatives, shorter."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from fusedkd.algebra.products import (
    ONE,
    Product,
    Sum,
    scaled,
)
from fusedkd.algebra.sums import Degree, Sums
from fusedkd.tape import OPERATIONS, Builder, Tape, pruned


def shortened(tape: Tape) -> Tape:
    """With the derivative as a sum of products, if that takes fewer operations of an entry."""
    sums = Sums(tape.nodes)
    found = sums.of[tape.grad]
    if found is None or not found:
        return tape
    found = sums.divided(found)
    builder = Builder()
    places = [builder.node(node.op, *node.inputs, number=node.number) for node in tape.nodes]
    grad = _found(sums, found, tape.value)
    if grad is None and (grad := _found(sums, scaled(found, Fraction(-1)), tape.value)) is not None:
        grad = builder("neg", grad)
    if grad is None:
        grad = _made(builder, sums, found, places)
    made = pruned(builder.nodes, tape.value, grad)
    return made if _cost(made) < _cost(tape) else tape


def _found(sums: Sums, x: Sum, before: int) -> int | None:
    """A node of the value that is that sum."""
    return next((i for i in range(before) if sums.of[i] == x), None)


def _cost(tape: Tape) -> int:
    """Of the derivative."""
    return operations(pruned(tape.nodes, tape.grad, tape.grad))


def operations(tape: Tape) -> int:
    """How many there are of an entry, beside log p, log q, p and q; costly ones count for more."""
    costly = {"div": 4, "log": 4, "sqrt": 4, "where": 2, "expm1": 8, "sigmoid": 8}
    costly |= dict.fromkeys(("pow", "tanh", "log1p", "logaddexp"), 12)
    return sum(
        costly.get(node.op, 1)
        for node, number in zip(tape.nodes, tape.numeric(), strict=True)
        if node.op in OPERATIONS and not number and tape.entry(node) is None
    )


def _made(b: Builder, sums: Sums, x: Sum, places: Sequence[int]) -> int:
    """Operations for a sum: what is of the entry, times numbers."""
    total: int | None = None
    for entry, number in sums.by_entry(x).items():
        term = _product(b, sums, entry, places)
        factor = _number(b, sums, number, places)
        term = factor if entry == ONE else b("mul", term, factor)
        total = term if total is None else b("add", total, term)
    return b.constant(0) if total is None else total


def _number(b: Builder, sums: Sums, x: Sum, places: Sequence[int]) -> int:
    total = b.constant(0)
    for product, factor in x.items():
        made = b("mul", b.constant(float(factor)), _product(b, sums, product, places))
        total = b("add", total, made)
    return total


def _product(b: Builder, sums: Sums, x: Product, places: Sequence[int]) -> int:
    above, below = b.constant(1), b.constant(1)
    lp, lq = b.node("lp"), b.node("lq")
    if x.p or x.q:
        exponents = (b("mul", log, _number(b, sums, dict(of), places)) if of else None
                     for log, of in ((lp, x.p), (lq, x.q)))  # fmt: skip
        parts = [part for part in exponents if part is not None]
        above = b("exp", parts[0] if len(parts) == 1 else b("add", *parts))
    for (kind, at), exponent in x.powers:
        if kind == "parameter":
            made = b.node("parameter", number=at)
        elif kind in ("gap", "lq"):
            made = b("sub", lp, lq) if kind == "gap" else lq
        else:
            made = places[at]
        if kind == "relative":
            degree = sums.degrees[at]
            assert isinstance(degree, Degree)
            made = b("sub", made, b("mul", lq, _number(b, sums, degree.by, places)))
        for _ in range(abs(exponent)):
            if exponent > 0:
                above = b("mul", above, made)
            else:
                below = b("mul", below, made)
    return b("div", above, below)
