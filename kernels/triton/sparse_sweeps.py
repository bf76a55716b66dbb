"""What the sweeps do with a tile of a row whose teacher has K entries; steps of row.sweep, over the
student alone.

In the first two the row's ids are covered with -inf, so that what the student has outside them is
summed as it is, not as a small difference. They are sorted, so a cursor walks along with the tiles:
a tile without ids costs one comparison, each id one more pass over its tile's registers. The third
sweep writes anything over the ids; sparse.py writes their gradients when it is done.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .row import INFINITY, NO_COLUMN, Tile, sweep
from .stats import (
    Side,
    Statistics,
    added,
    at_unit,
    first_columns,
    lane_max,
    lane_sum,
    moved,
    nothing_seen,
    observe,
)
from .sweeps import log_prob, store

BLOCK = tl.constexpr(128)


class Ids(NamedTuple):
    """Of a row, ascending; padding behind them."""

    at: Any  # pointer
    count: Any  # slots
    offset: Any  # the id of the first column, and of a part's there are those alone that lie in it


class Seen(NamedTuple):
    """Of the student: (lanes,) while it is walked."""

    of: Statistics  # of what is no id; but the mean is that of all entries
    best: Any  # for the metrics, the largest logit of all entries
    at: Any  # and where that is first
    cursor: Any  # the next of the ids


class Walking(NamedTuple):
    value: Any
    grad: Any
    cursor: Any


class Watching(NamedTuple):
    ids: Any
    shape: Any
    scales: Any


class Absent(NamedTuple):
    """What the sweep between statistics and gradient wants, where the teacher has nothing."""

    ids: Any
    shape: Any
    softmax: Any
    own: Any  # the divergence's numbers


class Outside(NamedTuple):
    """What the last sweep wants; without the ids the gradient is soft 2^a + unit e^(z - max)."""

    grad: Any  # where the row's gradient goes
    shape: Any
    max: Any  # outside the ids
    softmax: Any
    soft: Any
    kd: Any
    unit: Any
    smooth: Any
    own: Any


# --------------------------------------------------------------------------------------------------
# ids among columns


@triton.jit
def columns_of(ids, slot, plan: tl.constexpr):
    """Of ids, NO_COLUMN behind the last one."""
    id = tl.load(ids.at + slot, mask=slot < ids.count, other=NO_COLUMN)
    if plan.part:
        id = tl.where(id == NO_COLUMN, id, id - ids.offset)
    return id


@triton.jit
def rank(ids, column, plan: tl.constexpr):
    """How many ids come before a column."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, ids.count, BLOCK):
        id = columns_of(ids, start + tl.arange(0, BLOCK), plan)
        count += tl.sum((id < column).to(tl.int32), axis=0)
    return count


@triton.jit
def _cover(z, columns, stop, ids, cursor, plan: tl.constexpr):
    """(z with -inf over the ids from the cursor on that lie before ``stop``, the cursor then)"""
    id = columns_of(ids, cursor, plan)
    while id < stop:
        z = tl.where(columns == id, -INFINITY, z)
        cursor += 1
        id = columns_of(ids, cursor, plan)
    return z, cursor


@triton.jit
def _covered(tile, cursor, ids, shape, plan: tl.constexpr):
    """The student's logits without the ids, and the cursor behind them."""
    if tile.columns is not None:  # edges, which lie on both sides of all tiles
        start = tl.full([], 0, tl.int32)
        z, _ = _cover(tile.student, tile.columns, shape.head, ids, start, plan)
        z, _ = _cover(z, tile.columns, NO_COLUMN, ids, rank(ids, shape.end, plan), plan)
    else:
        unroll: tl.constexpr = tile.student.shape[0]
        size: tl.constexpr = unroll * plan.lanes * plan.width
        start = shape.head + tile.place * size
        stop = tl.minimum(start + size, shape.end)
        line = tl.arange(0, unroll)[:, None, None] * plan.lanes
        line += tl.arange(0, plan.lanes)[None, :, None]
        columns = start + line * plan.width + tl.arange(0, plan.width)[None, None, :]
        z, cursor = _cover(tile.student, columns, stop, ids, cursor, plan)
    return z, cursor


# --------------------------------------------------------------------------------------------------
# statistics


@triton.jit
def _see(seen, tile, context, plan: tl.constexpr):
    z, cursor = _covered(tile, seen.cursor, context.ids, context.shape, plan)
    rest = Tile(z, z, tile.slope, tile.columns, tile.mask, tile.place)
    of = observe(seen.of, rest, context.scales, plan)
    mean, best, at = seen.of.mean, seen.best, seen.at
    if plan.smoothing:
        mean += lane_sum(tile.student, tile.mask)
    if plan.metrics:
        here = lane_max(tile.student)
        at = tl.where(here > best, tile.place, at)
        best = tl.maximum(here, best)
    of = Statistics(of.student, of.teacher, of.unit, mean, of.cross, of.power_s, of.power_t)
    return Seen(of, best, at, cursor)


@triton.jit
def seen_by(sides, ids, shape, span, scales, plan: tl.constexpr):
    """All of a span, merged."""
    size: tl.constexpr = plan.unroll * plan.lanes * plan.width
    of = nothing_seen(plan)
    first = rank(ids, shape.head + span.first * size, plan)
    seen = Seen(of, of.student.max, of.student.at, first)
    by = Watching(ids, shape, scales)
    seen = sweep(_see, seen, sides, shape, span, by, False, "evict_last", plan.unroll, plan)
    at = seen.at
    if plan.metrics:
        at = first_columns(sides.student, sides.of_student, shape, at, plan, plan.transformed_s)
    return merged_seen(Seen(seen.of, seen.best, at, seen.cursor), scales, plan)


@triton.jit
def merged_seen(seen, scales, plan: tl.constexpr):
    """Of (pieces,) -> of the whole, the sums among them in fp64."""
    of, best, at = seen.of, tl.max(seen.best, axis=0), tl.full([], 0, tl.int32)
    if plan.metrics:
        at = tl.min(tl.where(seen.best == best, seen.at, NO_COLUMN), axis=0)
    most = tl.max(of.student.max, axis=0)
    of = moved(of, most, most, scales, plan)
    student = Side(most, added(of.student.sum), 0.0, added(of.student.own), 0)
    of = Statistics(student, student, added(of.unit), added(of.mean), 0.0, 0.0, 0.0)
    return Seen(of, best, at, seen.cursor)


# --------------------------------------------------------------------------------------------------
# the other two sweeps


@triton.jit
def _without(z, by, plan: tl.constexpr):
    """The divergence where the teacher has nothing."""
    softmax = by.softmax
    lq = log_prob(z, z - softmax.max, softmax.inverse_t, softmax.log_sum, plan)
    nothing = tl.zeros_like(lq)
    value, grad = plan.careful(
        nothing - INFINITY, lq, nothing - INFINITY, nothing, tl.exp(lq), by.own
    )
    masked = z == -INFINITY
    return tl.where(masked, 0.0, value), tl.where(masked, 0.0, grad)


@triton.jit
def _add_absent(state, tile, by, plan: tl.constexpr):
    z, cursor = _covered(tile, state.cursor, by.ids, by.shape, plan)
    value, grad = _without(z, by, plan)
    value, grad = lane_sum(value, tile.mask), lane_sum(grad, tile.mask)
    return Walking(state.value + value, state.grad + grad, cursor)


@triton.jit
def absent(sides, shape, span, by, plan: tl.constexpr):
    """(value, sum of grad) outside the ids, where the teacher has nothing."""
    size: tl.constexpr = plan.unroll * plan.lanes * plan.width
    nothing = tl.full([plan.lanes], 0, plan.acc)
    state = Walking(nothing, nothing, rank(by.ids, shape.head + span.first * size, plan))
    state = sweep(_add_absent, state, sides, shape, span, by, False, "evict_last", 1, plan)
    return added(state.value), added(state.grad)


@triton.jit
def slope_outside(z, by, plan: tl.constexpr):
    """d loss / d logit of an entry that is no id, before the transform, and but for the label's."""
    below = z - by.max
    e = tl.exp2(below * by.softmax.scale)
    f, g = tl.zeros_like(e) + by.soft, 0.0
    if plan.unit and plan.power == 1:
        f += by.unit
    elif plan.unit and plan.power == 2:
        f += e * by.unit
    elif plan.unit:
        g += at_unit(e, below, plan) * by.unit
    g += e * f
    if plan.outside and plan.kd:
        _, own = _without(z, by, plan)
        g += own * by.kd
    if plan.ce and plan.smoothing:
        g = tl.where(z == -INFINITY, 0.0, g - by.smooth)
    return g


@triton.jit
def write_outside(none, tile, by, plan: tl.constexpr):
    """Right outside the ids."""
    store(slope_outside(tile.student, by, plan), tile, by, plan)
    return none
