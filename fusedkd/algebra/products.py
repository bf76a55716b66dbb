"""Sums of products, with exact coefficients."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

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


def summed(terms: Iterable[tuple[Product, Fraction]]) -> Sum:
    found: Sum = {}
    for product, factor in terms:
        found[product] = found.get(product, Fraction(0)) + factor
    return {product: factor for product, factor in found.items() if factor}


def frozen(x: Sum) -> Frozen:
    return tuple(sorted(x.items()))


def added(x: Frozen, y: Frozen) -> Frozen:
    return frozen(summed((*x, *y)))


def scaled(x: Sum, factor: Fraction) -> Sum:
    return {product: value * factor for product, value in x.items()}


def joined(x: Product, y: Product) -> Product:
    powers = dict(x.powers)
    for atom, exponent in y.powers:
        powers[atom] = powers.get(atom, 0) + exponent
    kept = tuple(sorted((atom, exponent) for atom, exponent in powers.items() if exponent))
    return Product(kept, added(x.p, y.p), added(x.q, y.q))


def multiplied(x: Sum, y: Sum) -> Sum:
    return summed((joined(a, b), f * g) for a, f in x.items() for b, g in y.items())


def inverted(x: Product) -> Product:
    powers = tuple((atom, -exponent) for atom, exponent in x.powers)
    return Product(powers, *(frozen(scaled(dict(e), Fraction(-1))) for e in (x.p, x.q)))


def constant_sum(number: float) -> Sum:
    return {ONE: Fraction(number)} if number else {}
