"""The sweeps over the student of a row whose teacher has K entries.

Those of sweeps.py for one side. In the first two the row's ids are covered with -inf, so that what
the student has outside them is summed as it is, not as a small difference. They are sorted, so a
cursor walks along with the tiles: a tile without ids costs one comparison, each id one more pass
over its tile's registers. The third sweep writes anything over the ids; sparse.py writes their
gradients when it is done.
"""

import triton
import triton.language as tl

from .numerics import LOG2E, lowest, rounded
from .row import INFINITY, NO_COLUMN
from .sparse_walk import (
    _add,
    _at_one,
    _edge_columns,
    _first,
    _load,
    _log_prob,
    _offsets,
    _shifted,
    _tile,
    _total,
)

BLOCK = tl.constexpr(128)

# --------------------------------------------------------------------------------------------------
# ids among columns; ``known`` is (their pointer, how many slots)


@triton.jit
def _rank(known, column):
    """How many ids come before a column."""
    ids, entries = known
    count = tl.full([], 0, tl.int32)
    for start in range(0, entries, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        id = tl.load(ids + slot, mask=slot < entries, other=NO_COLUMN)
        count += tl.sum((id < column).to(tl.int32), axis=0)
    return count


@triton.jit
def _cover(z, at, stop, known, cursor):
    """(z with -inf over the ids from the cursor on that lie before ``stop``, the cursor then)"""
    ids, entries = known
    id = tl.load(ids + cursor, mask=cursor < entries, other=NO_COLUMN)
    while id < stop:
        z = tl.where(at == id, -INFINITY, z)
        cursor += 1
        id = tl.load(ids + cursor, mask=cursor < entries, other=NO_COLUMN)
    return z, cursor


@triton.jit
def _cover_edges(z, at, shape, known, plan: tl.constexpr):
    head, tiles, _ = shape
    z, _ = _cover(z, at, head, known, tl.full([], 0, tl.int32))
    behind = _rank(known, head + tiles * (plan.lanes * plan.width))
    z, _ = _cover(z, at, NO_COLUMN, known, behind)
    return z


# --------------------------------------------------------------------------------------------------
# statistics of the student: outside the ids, with a = (z - top) log2(e) / T,
#   top  largest logit    total  sum 2^a    one  sum e^(z - top)    own  sum 2^a a
# and of all entries
#   mean  sum z / V       best  largest logit, ``at`` its first column


@triton.jit
def _move(state, new, k):
    top, total, one, own, mean, best, at = state
    by = (top - new) * k
    keep = tl.exp2(by)
    own = _shifted(own, keep, by, total)
    return new, total * keep, one * tl.exp2((top - new) * LOG2E), own, mean, best, at


@triton.jit
def _observe(state, z, rest, columns, mask, numbers, plan: tl.constexpr):
    """Take a tile into the statistics; ``rest`` is z with the ids covered."""
    k, share, power = numbers
    here = tl.max(z, axis=1)
    state = _move(state, tl.maximum(state[0], tl.max(rest, axis=1)), k)
    top, total, one, own, mean, best, at = state
    below = rest - top[:, None]
    a = below * k
    e = tl.exp2(a)
    total += tl.sum(e, axis=1)
    if plan.ce:
        one += tl.sum(_at_one(e, below, power), axis=1)
        mean += _total(z * share, mask)
    if plan.metrics:
        own += tl.sum(tl.where(e == 0, 0.0, e * a), axis=1)
        at = _first(z, here, best, at, columns)
    return top, total, one, own, mean, tl.maximum(best, here), at


@triton.jit
def _merge(state, k):
    """Statistics of (pieces,) -> of the whole, the sums among them in fp64."""
    best = tl.max(state[5], axis=0)
    at = tl.min(tl.where(state[5] == best, state[6], NO_COLUMN), axis=0)
    top, total, one, own, mean, _, _ = _move(state, tl.max(state[0], axis=0), k)
    return top, _add(total), _add(one), _add(own), _add(mean), best, at


@triton.jit
def _statistics(student, known, shape, span, bend, numbers, plan: tl.constexpr):
    first, last, edges = span
    size: tl.constexpr = plan.lanes * plan.width
    zero = tl.full([plan.lanes], 0, plan.acc)
    low = zero + lowest(plan.acc)
    state = (low, zero, zero, zero, zero, low, tl.full([plan.lanes], 0, tl.int32))
    cursor = _rank(known, shape[0] + first * size)
    for tile in range(first, last):
        start = shape[0] + tile * size
        at = start + _offsets(plan)
        pointers = _tile(student, shape[0], tile, plan)
        z, _ = _load(pointers, None, bend, plan.acc, plan.transformed_s, "evict_last")
        rest, cursor = _cover(z, at, start + size, known, cursor)
        state = _observe(state, z, rest, at, None, numbers, plan)
    for start in range(0, edges, size):
        at, mask = _edge_columns(start, shape, plan)
        z, _ = _load(student + at, mask, bend, plan.acc, plan.transformed_s, "")
        rest = _cover_edges(z, at, shape, known, plan)
        state = _observe(state, z, rest, at, mask, numbers, plan)
    return _merge(state, numbers[0])


# --------------------------------------------------------------------------------------------------
# the other two sweeps


@triton.jit
def _without(z, norm, a_b, DIVERGENCE: tl.constexpr, plan: tl.constexpr):
    """The divergence where the teacher has nothing."""
    lq = _log_prob(z, z - norm[0], norm[1], norm[2], plan)
    nothing = tl.zeros_like(lq)
    value, grad = DIVERGENCE(nothing - INFINITY, lq, nothing - INFINITY, nothing, tl.exp(lq), *a_b)
    absent = z == -INFINITY
    return tl.where(absent, 0.0, value), tl.where(absent, 0.0, grad)


@triton.jit
def _middle(
    student, known, shape, span, bend, norm, a_b, DIVERGENCE: tl.constexpr, plan: tl.constexpr
):
    """(value, sum of grad) outside the ids."""
    first, last, edges = span
    size: tl.constexpr = plan.lanes * plan.width
    value = tl.full([plan.lanes], 0, plan.acc)
    slope = value
    cursor = _rank(known, shape[0] + first * size)
    for tile in range(first, last):
        start = shape[0] + tile * size
        pointers = _tile(student, shape[0], tile, plan)
        z, _ = _load(pointers, None, bend, plan.acc, plan.transformed_s, "evict_last")
        z, cursor = _cover(z, start + _offsets(plan), start + size, known, cursor)
        v, g = _without(z, norm, a_b, DIVERGENCE, plan)
        value += tl.sum(v, axis=1)
        slope += tl.sum(g, axis=1)
    for start in range(0, edges, size):
        at, mask = _edge_columns(start, shape, plan)
        z, _ = _load(student + at, mask, bend, plan.acc, plan.transformed_s, "")
        v, g = _without(_cover_edges(z, at, shape, known, plan), norm, a_b, DIVERGENCE, plan)
        value += tl.sum(v, axis=1)
        slope += tl.sum(g, axis=1)
    return _add(value), _add(slope)


@triton.jit
def _slope(
    z, bent, at, start, top, norm, pull, a_b,
    DIVERGENCE: tl.constexpr, OUTSIDE: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile, right outside the ids."""
    soft, kd, one = pull[0], pull[1], pull[3]
    smooth, hot, label, power = pull[5], pull[6], pull[7], pull[8]
    below = z - top
    e = tl.exp2(below * norm[1] * LOG2E)
    g = e * soft
    if OUTSIDE:  # noqa: SIM102 - known when compiled, the other is not
        if kd != 0:
            _, own = _without(z, norm, a_b, DIVERGENCE, plan)
            g += own * kd
    if plan.ce:
        g += _at_one(e, below, power) * one - smooth
        if (label >= start) & (label - start < plan.lanes * plan.width):  # uniform
            g = tl.where(at == label, g - hot, g)
    if plan.transformed_s:
        g *= bent
    return tl.where(z == -INFINITY, 0.0, g)


@triton.jit
def _gradient(
    student, grad, shape, span, bend, top, norm, pull, a_b,
    DIVERGENCE: tl.constexpr, OUTSIDE: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    first, last, edges = span
    size: tl.constexpr = plan.lanes * plan.width
    for step in range(first, last):
        tile = last - 1 - (step - first)  # backwards: what was read last is still in L2
        start = shape[0] + tile * size
        pointers = _tile(student, shape[0], tile, plan)
        z, bent = _load(pointers, None, bend, plan.acc, plan.transformed_s, "evict_first")
        g = _slope(z, bent, start + _offsets(plan), start, top, norm, pull, a_b, DIVERGENCE,
                   OUTSIDE, plan)  # fmt: skip
        out = _tile(grad, shape[0], tile, plan)
        tl.store(out, rounded(g, grad.dtype.element_ty), eviction_policy="evict_first")
    for begin in range(0, edges, size):
        at, mask = _edge_columns(begin, shape, plan)
        z, bent = _load(student + at, mask, bend, plan.acc, plan.transformed_s, "")
        g = _slope(z, bent, at, pull[7], top, norm, pull, a_b, DIVERGENCE, OUTSIDE, plan)
        tl.store(grad + at, rounded(g, grad.dtype.element_ty), mask=mask)
