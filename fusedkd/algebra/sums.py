"""The operations of a tape as sums of products."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from fusedkd.algebra.products import (
    MOST,
    ONE,
    Frozen,
    Powers,
    Product,
    Sum,
    constant_sum,
    frozen,
    inverted,
    joined,
    multiplied,
    scaled,
    summed,
)
from fusedkd.tape import Node, Tape


class Degree(NamedTuple):
    """What c on both logarithms does to a number: times e^(c degree), or plus c degree."""

    by: Sum
    adds: bool = False


ZERO, INFINITE = "zero", "infinite"  # of any degree


class Sums:
    """Of each node of a tape: the sum of products and the degree, None where there is none."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = nodes
        self.numeric = Tape(tuple(nodes), 0, 0).numeric()
        self.of: list[Sum | None] = []
        self.degrees: list[Degree | str | None] = []
        self.whole: dict[Frozen, int] = {}  # positions of what stays whole, by their sums
        for position, node in enumerate(nodes):
            found = self._of(position, node)
            if found is not None and len(found) > MOST:
                found = None
            degree = self._degree(found) if found is not None else None
            if found is None:
                degree = self._whole_degree(node)
                found = self._atom(position, degree)
            self.of.append(found)
            self.degrees.append(degree)

    def _of(self, position: int, node: Node) -> Sum | None:
        if node.op == "constant":
            return constant_sum(node.number) if node.number - node.number == 0 else None
        if node.op == "parameter":
            return {Product(((("parameter", int(node.number)), 1),)): Fraction(1)}
        if node.op in ("lp", "lq"):
            lq = {LQ: Fraction(1)}
            return lq if node.op == "lq" else {GAP: Fraction(1), **lq}
        rule = getattr(self, f"_{node.op}", None)
        inner = [self.of[i] for i in node.inputs]
        if rule is None or None in inner:
            return None
        found: Sum | None = rule(node, *inner)
        return found

    def _add(self, node: Node, x: Sum, y: Sum) -> Sum:
        return summed((*x.items(), *y.items()))

    def _sub(self, node: Node, x: Sum, y: Sum) -> Sum:
        return self._add(node, x, scaled(y, Fraction(-1)))

    def _neg(self, node: Node, x: Sum) -> Sum:
        return scaled(x, Fraction(-1))

    def _detach(self, node: Node, x: Sum) -> Sum:
        return x

    def _mul(self, node: Node, x: Sum, y: Sum) -> Sum | None:
        return multiplied(x, y) if len(x) * len(y) <= 4 * MOST else None

    def _div(self, node: Node, x: Sum, y: Sum) -> Sum | None:
        if len(y) == 1:
            ((product, factor),) = y.items()
            return multiplied(x, {inverted(product): 1 / factor})
        position = self.whole.setdefault(frozen(y), node.inputs[1])
        by = inverted(Product(((("node", position), 1),)))
        return multiplied(x, {by: Fraction(1)}) if y else None

    def _exp(self, node: Node, x: Sum) -> Sum | None:
        """p^a q^b, of a lp + b lq."""
        gap, lq = self.linear(x, GAP), self.linear(x, LQ)
        rest = summed((*multiplied(gap, {GAP: Fraction(-1)}).items(), *x.items()))
        rest = summed((*multiplied(lq, {LQ: Fraction(-1)}).items(), *rest.items()))
        if rest or not x:
            return {ONE: Fraction(1)} if not x else None
        of_q = summed((*lq.items(), *scaled(gap, Fraction(-1)).items()))
        return {Product((), frozen(gap), frozen(of_q)): Fraction(1)}

    def linear(self, x: Sum, atom: Product) -> Sum:
        """The numbers in front of an atom that stands alone."""
        by = inverted(atom)
        cut = ((joined(product, by), factor) for product, factor in x.items())
        return {product: factor for product, factor in cut if self.is_number(product)}

    def is_number(self, product: Product) -> bool:
        """Whether it is one for all entries."""
        return not (product.p or product.q) and all(
            kind == "parameter" or (kind == "node" and self.numeric[at])
            for (kind, at), _ in product.powers
        )

    # ------------------------------------------------------------------------------------------

    def _degree(self, x: Sum) -> Degree | str | None:
        if not x:
            return ZERO
        lq = self.linear(x, LQ)
        rest = summed((*multiplied(lq, {LQ: Fraction(-1)}).items(), *x.items()))
        found = [self._degree_of(product) for product in rest]
        if None in found or any(degree != found[0] for degree in found):
            return None
        degree = dict(found[0] or ()) if found else {}
        if not lq:
            return Degree(degree)
        return Degree(lq, adds=True) if not degree else None

    def _degree_of(self, product: Product) -> Frozen | None:
        total = summed((*product.p, *product.q))
        for (kind, at), exponent in product.powers:
            if kind == "lq":
                return None
            if kind == "node" and not self.numeric[at]:
                degree = self.degrees[at]
                if not isinstance(degree, Degree) or degree.adds:
                    return None
                total = summed((*total.items(), *scaled(degree.by, Fraction(exponent)).items()))
        return frozen(total)

    def _whole_degree(self, node: Node) -> Degree | str | None:
        """Of an operation that stays whole; of a mask 0, if it is the same at every c."""
        inner = [self.degrees[i] for i in node.inputs]
        known = [degree for degree in inner if isinstance(degree, Degree)]
        if node.op == "constant":
            return INFINITE
        if not inner or None in inner:
            return None
        if node.op == "where":
            known = [degree for degree in known if degree is not inner[0]]
        if not known:
            return Degree({}) if node.op in ("eq", "lt", "le") else None
        by, adds = known[0]
        same = all(degree == known[0] for degree in known) and not (adds and ZERO in inner)
        if node.op in ("eq", "lt", "le", "sign"):
            return Degree({}) if same and (node.op != "sign" or not adds) else None
        if node.op in ("minimum", "maximum", "where", "logaddexp"):
            ok = same and (adds or node.op != "logaddexp")
            return known[0] if ok and (not adds or INFINITE not in inner) else None
        if node.op == "abs":
            return None if adds else known[0]
        if node.op == "log":
            return None if adds else Degree(by, adds=True)
        if node.op == "exp" and adds:
            return Degree(by)
        if node.op == "sqrt":
            return None if adds else Degree(scaled(by, Fraction(1, 2)))
        if node.op == "pow" and self.numeric[node.inputs[1]]:
            exponent = self.of[node.inputs[1]]
            return None if adds or exponent is None else Degree(multiplied(by, exponent))
        if node.op == "div":  # by 0
            return None
        flat = all(not degree.by for degree in known)
        return Degree({}) if flat else None

    def by_entry(self, x: Sum) -> dict[Product, Sum]:
        """The numbers in front of what differs from entry to entry."""
        found: dict[Product, Sum] = {}
        for product, factor in x.items():
            numbers = tuple(
                (atom, exponent)
                for atom, exponent in product.powers
                if self.is_number(Product(((atom, exponent),)))
            )
            entry = product._replace(powers=tuple(p for p in product.powers if p not in numbers))
            found.setdefault(entry, {})[Product(numbers)] = factor
        return found

    def divided(self, x: Sum) -> Sum:
        """Where a denominator divides what is over it, the quotient."""
        for divisor, position in self.whole.items():
            by = Product(((("node", position), 1),))
            over = {product: factor for product, factor in x.items()
                    if dict(product.powers).get(("node", position)) == -1}  # fmt: skip
            quotient = _quotient(multiplied(over, {by: Fraction(1)}), dict(divisor))
            if over and quotient is not None:
                rest = ((product, factor) for product, factor in x.items() if product not in over)
                x = summed((*rest, *quotient.items()))
        return x

    def _atom(self, position: int, degree: Degree | str | None) -> Sum:
        if isinstance(degree, Degree) and degree.adds and degree.by:
            relative = {Product(((("relative", position), 1),)): Fraction(1)}
            return summed((*relative.items(), *multiplied(degree.by, {LQ: Fraction(1)}).items()))
        return {Product(((("node", position), 1),)): Fraction(1)}

    def _log(self, node: Node, x: Sum) -> Sum | None:
        """Of p^a q^b alone: a lp + b lq."""
        if len(x) != 1:
            return None
        ((product, factor),) = x.items()
        if factor != 1 or product.powers:
            return None
        of_lq = multiplied(summed((*product.p, *product.q)), {LQ: Fraction(1)})
        of_gap = multiplied(dict(product.p), {GAP: Fraction(1)})
        return summed((*of_lq.items(), *of_gap.items()))


GAP = Product(((("gap", 0), 1),))
LQ = Product(((("lq", 0), 1),))


def _quotient(x: Sum, y: Sum) -> Sum | None:
    """x / y, if that is a sum of a few products."""
    found: Sum = {}
    lead = max(y, key=_order)
    while x and len(found) < 8:
        most = max(x, key=_order)
        term = {joined(most, inverted(lead)): x[most] / y[lead]}
        found = summed((*found.items(), *term.items()))
        x = summed((*x.items(), *scaled(multiplied(term, y), Fraction(-1)).items()))
    return None if x else found


def _order(x: Product) -> tuple[object, ...]:
    """Of a product and its multiples the same way: exponents one by one."""
    value = (float(sum(_generic(product) * factor for product, factor in of)) for of in (x.p, x.q))
    return *value, _Exponents(x.powers)


@functools.total_ordering
class _Exponents:
    """By the exponent of the first atom in which two differ."""

    def __init__(self, powers: Powers) -> None:
        self.powers = dict(powers)

    def __lt__(self, other: _Exponents) -> bool:
        for atom in sorted(self.powers.keys() | other.powers.keys()):
            mine, theirs = self.powers.get(atom, 0), other.powers.get(atom, 0)
            if mine != theirs:
                return mine < theirs
        return False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Exponents) and self.powers == other.powers


def _generic(x: Product) -> Fraction:
    """An exponent's value at parameters of no meaning."""
    value = Fraction(1)
    for (_, at), exponent in x.powers:
        value *= Fraction(1009 + 37 * at, 1013) ** exponent
    return value
