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
from fractions import Fraction
from typing import NamedTuple

from fusedkd.algebra.builtin import Known, known
from fusedkd.algebra.derivatives import shortened
from fusedkd.algebra.guards import unguarded
from fusedkd.algebra.products import ONE
from fusedkd.algebra.sums import ZERO, Degree, Sums
from fusedkd.tape import Tape


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
