"""Sums that a built-in divergence has."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from fusedkd.algebra.products import (
    ONE,
    Product,
    Sum,
    added,
    frozen,
    multiplied,
    scaled,
    summed,
)
from fusedkd.algebra.sums import GAP, Sums
from fusedkd.tape import OPERATIONS, Node, Tape


class Known(NamedTuple):
    """A divergence that is ``weight`` times a built-in one, with its parameters ``a`` and ``b``,
    plus ``constant``; that of mixed KL is a KL(p || q) + b KL(q || p)."""

    name: str
    a: Sum
    b: Sum
    weight: Sum
    constant: Sum
    nodes: tuple[Node, ...]  # that the atoms of these are of

    def numbers(self, parameters: Sequence[float]) -> tuple[float, float, float, float]:
        """(a, b, weight, constant); NaN where they do not exist."""
        sums = (self.a, self.b, self.weight, self.constant)
        kinds = {kind for x in sums for product in x for (kind, _), _ in product.powers}
        values = _numbers(self.nodes, parameters) if "node" in kinds else []
        a, b, weight, constant = (_value(x, values, parameters) for x in sums)
        return a, b, weight, constant


def known(tape: Tape) -> Known | None:
    """What a tape without guards is, if it is that."""
    sums = Sums(tape.nodes)
    found = sums.of[tape.value]
    if found is None:
        return None
    one, entries = {ONE: Fraction(1)}, sums.by_entry(found)
    of_one = frozen(one)
    constant = summed((*entries.pop(Product((), of_one), {}).items(),
                     *entries.pop(Product((), (), of_one), {}).items()))  # fmt: skip
    forward = entries.pop(Product(GAP.powers, of_one), {})
    reverse = scaled(entries.pop(Product(GAP.powers, (), of_one), {}), Fraction(-1))
    if not entries and forward and reverse:
        return Known("mixed_kl", forward, reverse, one, constant, tape.nodes)
    if not entries and (forward or reverse):
        name = "forward_kl" if forward else "reverse_kl"
        return Known(name, {}, {}, forward or reverse, constant, tape.nodes)
    if len(entries) != 1 or forward or reverse:
        return None
    ((product, number),) = entries.items()
    a, b = dict(product.p), dict(product.q)
    if product.powers or not a or not b or added(product.p, product.q) != of_one:
        return None
    weight = scaled(multiplied(number, multiplied(a, b)), Fraction(-1))
    constant = summed((*constant.items(), *number.items()))
    return Known("alpha", a, b, weight, constant, tape.nodes)


def _numbers(nodes: Sequence[Node], parameters: Sequence[float]) -> list[float]:
    """Of each node that is one for all entries."""
    found: list[float] = []
    for node, numeric in zip(nodes, Tape(tuple(nodes), 0, 0).numeric(), strict=True):
        value = node.number
        if node.op == "parameter":
            value = parameters[int(node.number)]
        elif numeric and node.op in OPERATIONS:
            inputs = [torch.tensor(found[i], dtype=torch.float64) for i in node.inputs]
            if node.op == "where":
                inputs[0] = inputs[0] != 0
            value = float(OPERATIONS[node.op].torch(*inputs))
        found.append(value)
    return found


def _value(x: Sum, values: Sequence[float], parameters: Sequence[float]) -> float:
    total = 0.0
    try:
        for product, factor in x.items():
            term = float(factor)
            for (kind, at), exponent in product.powers:
                term *= (parameters[at] if kind == "parameter" else values[at]) ** exponent
            total += term
    except (ZeroDivisionError, OverflowError):
        return float("nan")
    return total
