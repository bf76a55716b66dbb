"""A tape as a sum of products, where it is one.

What a backend learns of a divergence from it: whether it is homogeneous, f(c p, c q) = c f(p, q),
so that p and q may be taken relative to the larger of them; a derivative in which what cancels is
gone; whether its sum over the vocabulary is made of sums that a built-in divergence has.

With p = e^lp, q = e^lq and gap = lp - lq, an entry's products are of p^a q^b, of gap and of
operations that stay whole (a logarithm, tanh, where), all of them relative to q where they move
along with log q. Exponents and coefficients are sums of products themselves, of the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch

from fusedkd.tape import OPERATIONS, Builder, Node, Tape, pruned

MOST = 64  # products of a sum; what is longer stays whole
Powers = tuple[tuple[tuple[str, int], int], ...]  # (atom, exponent), sorted
Frozen = tuple[tuple["Product", Fraction], ...]  # a sum, to be compared


class Product(NamedTuple):
    """Atoms: ("parameter", number), ("gap", 0), ("lq", 0), ("node", position): of the tape, and
    ("relative", position): that less its degree times lq."""

    powers: Powers = ()
    p: Frozen = ()  # the exponents
    q: Frozen = ()


Sum = dict[Product, Fraction]
ONE = Product()


def _sum(terms: Iterable[tuple[Product, Fraction]]) -> Sum:
    found: Sum = {}
    for product, factor in terms:
        found[product] = found.get(product, Fraction(0)) + factor
    return {product: factor for product, factor in found.items() if factor}


def _frozen(x: Sum) -> Frozen:
    return tuple(sorted(x.items()))


def _added(x: Frozen, y: Frozen) -> Frozen:
    return _frozen(_sum((*x, *y)))


def _scaled(x: Sum, factor: Fraction) -> Sum:
    return {product: value * factor for product, value in x.items()}


def _joined(x: Product, y: Product) -> Product:
    powers = dict(x.powers)
    for atom, exponent in y.powers:
        powers[atom] = powers.get(atom, 0) + exponent
    kept = tuple(sorted((atom, exponent) for atom, exponent in powers.items() if exponent))
    return Product(kept, _added(x.p, y.p), _added(x.q, y.q))


def _multiplied(x: Sum, y: Sum) -> Sum:
    return _sum((_joined(a, b), f * g) for a, f in x.items() for b, g in y.items())


def _inverted(x: Product) -> Product:
    powers = tuple((atom, -exponent) for atom, exponent in x.powers)
    return Product(powers, *(_frozen(_scaled(dict(e), Fraction(-1))) for e in (x.p, x.q)))


def _constant(number: float) -> Sum:
    return {ONE: Fraction(number)} if number else {}


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
            return _constant(node.number) if node.number - node.number == 0 else None
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
        return _sum((*x.items(), *y.items()))

    def _sub(self, node: Node, x: Sum, y: Sum) -> Sum:
        return self._add(node, x, _scaled(y, Fraction(-1)))

    def _neg(self, node: Node, x: Sum) -> Sum:
        return _scaled(x, Fraction(-1))

    def _detach(self, node: Node, x: Sum) -> Sum:
        return x

    def _mul(self, node: Node, x: Sum, y: Sum) -> Sum | None:
        return _multiplied(x, y) if len(x) * len(y) <= 4 * MOST else None

    def _div(self, node: Node, x: Sum, y: Sum) -> Sum | None:
        if len(y) == 1:
            ((product, factor),) = y.items()
            return _multiplied(x, {_inverted(product): 1 / factor})
        position = self.whole.setdefault(_frozen(y), node.inputs[1])
        by = _inverted(Product(((("node", position), 1),)))
        return _multiplied(x, {by: Fraction(1)}) if y else None

    def _exp(self, node: Node, x: Sum) -> Sum | None:
        """p^a q^b, of a lp + b lq."""
        gap, lq = self.linear(x, GAP), self.linear(x, LQ)
        rest = _sum((*_multiplied(gap, {GAP: Fraction(-1)}).items(), *x.items()))
        rest = _sum((*_multiplied(lq, {LQ: Fraction(-1)}).items(), *rest.items()))
        if rest or not x:
            return {ONE: Fraction(1)} if not x else None
        of_q = _sum((*lq.items(), *_scaled(gap, Fraction(-1)).items()))
        return {Product((), _frozen(gap), _frozen(of_q)): Fraction(1)}

    def linear(self, x: Sum, atom: Product) -> Sum:
        """The numbers in front of an atom that stands alone."""
        by = _inverted(atom)
        cut = ((_joined(product, by), factor) for product, factor in x.items())
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
        rest = _sum((*_multiplied(lq, {LQ: Fraction(-1)}).items(), *x.items()))
        found = [self._degree_of(product) for product in rest]
        if None in found or any(degree != found[0] for degree in found):
            return None
        degree = dict(found[0] or ()) if found else {}
        if not lq:
            return Degree(degree)
        return Degree(lq, adds=True) if not degree else None

    def _degree_of(self, product: Product) -> Frozen | None:
        total = _sum((*product.p, *product.q))
        for (kind, at), exponent in product.powers:
            if kind == "lq":
                return None
            if kind == "node" and not self.numeric[at]:
                degree = self.degrees[at]
                if not isinstance(degree, Degree) or degree.adds:
                    return None
                total = _sum((*total.items(), *_scaled(degree.by, Fraction(exponent)).items()))
        return _frozen(total)

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
            return None if adds else Degree(_scaled(by, Fraction(1, 2)))
        if node.op == "pow" and self.numeric[node.inputs[1]]:
            exponent = self.of[node.inputs[1]]
            return None if adds or exponent is None else Degree(_multiplied(by, exponent))
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
            quotient = _quotient(_multiplied(over, {by: Fraction(1)}), dict(divisor))
            if over and quotient is not None:
                rest = ((product, factor) for product, factor in x.items() if product not in over)
                x = _sum((*rest, *quotient.items()))
        return x

    def _atom(self, position: int, degree: Degree | str | None) -> Sum:
        if isinstance(degree, Degree) and degree.adds and degree.by:
            relative = {Product(((("relative", position), 1),)): Fraction(1)}
            return _sum((*relative.items(), *_multiplied(degree.by, {LQ: Fraction(1)}).items()))
        return {Product(((("node", position), 1),)): Fraction(1)}

    def _log(self, node: Node, x: Sum) -> Sum | None:
        """Of p^a q^b alone: a lp + b lq."""
        if len(x) != 1:
            return None
        ((product, factor),) = x.items()
        if factor != 1 or product.powers:
            return None
        of_lq = _multiplied(_sum((*product.p, *product.q)), {LQ: Fraction(1)})
        of_gap = _multiplied(dict(product.p), {GAP: Fraction(1)})
        return _sum((*of_lq.items(), *of_gap.items()))


GAP = Product(((("gap", 0), 1),))
LQ = Product(((("lq", 0), 1),))


def _quotient(x: Sum, y: Sum) -> Sum | None:
    """x / y, if that is a sum of a few products."""
    found: Sum = {}
    lead = max(y, key=_order)
    while x and len(found) < 8:
        most = max(x, key=_order)
        term = {_joined(most, _inverted(lead)): x[most] / y[lead]}
        found = _sum((*found.items(), *term.items()))
        x = _sum((*x.items(), *_scaled(_multiplied(term, y), Fraction(-1)).items()))
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


# --------------------------------------------------------------------------------------------------
# guards

PASSING = ("add", "sub", "mul", "neg", "detach")  # what takes a NaN or an infinity to its result


def unguarded(tape: Tape) -> Tape | None:
    """The same where all that is guarded is positive, and else the same or not finite: without
    ``where(p > 0, p * x, 0)`` and ``log(where(m > 0, m, 1))``, whose result is not looked at again.
    """
    builder = Builder()
    places: dict[int, int] = {}
    replaced = _guards(tape)
    for position, node in enumerate(tape.nodes[: tape.value + 1]):
        if position in replaced:
            places[position] = places[replaced[position]]
        elif node.op in OPERATIONS:
            places[position] = builder(node.op, *(places[i] for i in node.inputs))
        else:
            places[position] = builder.node(node.op, *node.inputs, number=node.number)
    return builder.tape(places[tape.value])


def _guards(tape: Tape) -> dict[int, int]:
    """Guards that may go, and what they guard."""
    users: dict[int, list[int]] = {}
    found: dict[int, int] = {}
    seen = {tape.value}
    passing: dict[int, bool] = {}
    for position in range(tape.value, -1, -1):
        if position not in seen:
            continue
        node, of = tape.nodes[position], users.get(position, [])
        passing[position] = all(_passes(tape, user, position, passing, found) for user in of)
        if node.op == "where":
            guarded, live = _guarded(tape, node)
            other = tape.nodes[node.inputs[3 - live]]
            inside = node.inputs[live]
            if passing[position] and other == ZERO_NODE and _has_factors(tape, inside, guarded):
                found[position] = inside
            logs = [user for user in of if tape.nodes[user].op == "log" and passing[user]]
            if of and len(logs) == len(of) and guarded == [inside]:
                found[position] = inside
        for i in node.inputs:
            if position not in found or i == found[position]:
                users.setdefault(i, []).append(position)
                seen.add(i)
    return found


ZERO_NODE = Node("constant", (), 0.0)


def _passes(
    tape: Tape, user: int, position: int, passing: dict[int, bool], found: dict[int, int]
) -> bool:
    node = tape.nodes[user]
    if not passing[user]:
        return False
    if node.op == "div":
        return node.inputs[1] != position
    return node.op in PASSING or user in found


def _guarded(tape: Tape, node: Node) -> tuple[list[int], int]:
    """What is positive where a branch of a ``where`` counts, and which."""
    found, live = _positive(tape, node.inputs[0]), 1
    if not found:
        found, live = _positive(tape, node.inputs[0], False), 2
    return found, live


def _positive(tape: Tape, mask: int, holds: bool = True) -> list[int]:
    """What is positive, or more than minus infinity, if and only if a mask holds; or does not."""
    node = tape.nodes[mask]
    if node.op == "not":
        return _positive(tape, node.inputs[0], not holds)
    if node.op == ("and" if holds else "or"):
        parts = [_positive(tape, i, holds) for i in node.inputs]
        return [x for part in parts for x in part] if all(parts) else []
    if node.op not in ("lt", "le", "eq"):
        return []
    numbers = [
        tape.nodes[i].number if tape.nodes[i].op == "constant" else None for i in node.inputs
    ]
    ends = (0.0, -float("inf"))
    if holds and node.op == "lt" and numbers[0] in ends:
        return [node.inputs[1]]
    if not holds and node.op in ("le", "eq") and numbers[1] in ends:
        return [node.inputs[0]]
    if not holds and node.op == "eq" and numbers[0] in ends:
        return [node.inputs[1]]
    return []


def _has_factors(tape: Tape, position: int, wanted: list[int]) -> bool:
    """Whether a product has them all, or their exponentials."""
    factors, open_ones = set(), [position]
    while open_ones:
        node = tape.nodes[at := open_ones.pop()]
        factors.add(at)
        if node.op == "exp":
            factors.add(node.inputs[0])
        if node.op in ("mul", "neg", "detach"):
            open_ones += node.inputs
        elif node.op == "div":
            open_ones.append(node.inputs[0])
    return bool(wanted) and factors.issuperset(wanted)


# --------------------------------------------------------------------------------------------------
# derivatives, shorter


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
    if (
        grad is None
        and (grad := _found(sums, _scaled(found, Fraction(-1)), tape.value)) is not None
    ):
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


# --------------------------------------------------------------------------------------------------
# sums that a built-in divergence has


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
    of_one = _frozen(one)
    constant = _sum((*entries.pop(Product((), of_one), {}).items(),
                     *entries.pop(Product((), (), of_one), {}).items()))  # fmt: skip
    forward = entries.pop(Product(GAP.powers, of_one), {})
    reverse = _scaled(entries.pop(Product(GAP.powers, (), of_one), {}), Fraction(-1))
    if not entries and forward and reverse:
        return Known("mixed_kl", forward, reverse, one, constant, tape.nodes)
    if not entries and (forward or reverse):
        name = "forward_kl" if forward else "reverse_kl"
        return Known(name, {}, {}, forward or reverse, constant, tape.nodes)
    if len(entries) != 1 or forward or reverse:
        return None
    ((product, number),) = entries.items()
    a, b = dict(product.p), dict(product.q)
    if product.powers or not a or not b or _added(product.p, product.q) != of_one:
        return None
    weight = _scaled(_multiplied(number, _multiplied(a, b)), Fraction(-1))
    constant = _sum((*constant.items(), *number.items()))
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


# --------------------------------------------------------------------------------------------------


class Simplified(NamedTuple):
    """``tape`` where what it gives is finite; and ``known``, if it is a built-in divergence."""

    tape: Tape
    homogeneous: bool
    known: Known | None


@functools.cache
def simplified(tape: Tape) -> Simplified:
    """Without guards, and with a short derivative, if the tape is homogeneous; else as it is."""
    bare = unguarded(tape)
    if bare is not None:
        sums = Sums(bare.nodes)
        if sums.degrees[bare.value] == Degree({ONE: Fraction(1)}):
            short = shortened(bare)
            if Sums(short.nodes).degrees[short.grad] in (Degree({ONE: Fraction(1)}), ZERO):
                return Simplified(short, True, known(bare))
    return Simplified(tape, False, None)
