"""The kernel of the most probable tokens: two sweeps, no sort of a row.

The first sweep is that of the statistics. Each lane has seen the largest of its entries: the k-th
largest of those is a threshold that at least k entries reach, and in a row in no order hardly more
(of 512 lanes, k = 64: 68). The second sweep sums up what is below, and notes the columns of what is
not; they are put in order afterwards, each by the number of those before it. An entry's key is its
logit's bits above its column's, so all differ, and of equal logits the smallest column comes first.

8 + 41 instructions an entry (sm_90, bf16, 2026-11-28), of which the places of what is noted take
most: with a second line of a lane it spills.

Where more reach the threshold than there is room for (equal entries, or an order that one lane has
all the large ones of), it is bisected among the keys, a sweep a step; such rows hardly ever come.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import lowest, scalar
from .row import INFINITY, Shape, Transform, offsets, row_start, sweep, through
from .stats import added
from .tokens import Tokens, keep, observed

LAST = tl.constexpr(0x7FFFFFFF)
POINTERS = (
    *("logits", "tokens", "counts", "values", "ids", "statistics"),
    *("columns_found", "keys"),
)
SIZES = ("length", "z_b", "z_t", "columns", "offset", "k", "wanted")


class Collecting(NamedTuple):
    """What the second sweep wants."""

    shape: Shape
    max: Any
    scale: Any  # log2(e) / T
    least: Any  # of a key
    columns: Any  # where they are noted
    tokens: Tokens  # those that are no part of the sum either


class Collected(NamedTuple):
    reached: Any  # how many columns have been noted, or would have been with more room
    below: Any  # (lanes,) sums of the exponentials of the others


@triton.jit
def key(z, column):
    """int64, in the order of (z, -column)."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    bits = bits ^ ((bits >> 31) & LAST)
    return (bits.to(tl.int64) << 32) | (-column + LAST).to(tl.int64)


@triton.jit
def _reaches(z, columns, least):
    """Whether the key is at least that, without making it."""
    high = (least >> 32).to(tl.int32)
    bound = (-(least & 0xFFFFFFFF) + LAST).to(tl.int32)
    above = (high ^ ((high >> 31) & LAST)).to(tl.float32, bitcast=True)
    return (z > above) | ((z == above) & (columns <= bound))


@triton.jit
def _columns(tile, shape, plan: tl.constexpr):
    columns = tile.columns
    if columns is None:
        columns = shape.head + tile.place * (plan.unroll * plan.lanes * plan.width) + offsets(plan)
    return columns


@triton.jit
def collect(seen, tile, by, plan: tl.constexpr):
    """A STEP of row.sweep. Each entry that reaches the key gets the next place: no atomics, so the
    order is the same each time."""
    columns = _columns(tile, by.shape, plan)
    hit = _reaches(tile.student, columns, by.least)
    hits = hit.to(tl.int32)
    lines = tl.sum(hits, axis=2)
    lanes = tl.sum(lines, axis=0)
    before = (tl.cumsum(lines, axis=0) - lines) + (tl.cumsum(lanes, axis=0) - lanes)[None, :]
    at = seen.reached + before[:, :, None] + tl.cumsum(hits, axis=2) - 1
    tl.store(by.columns + at, columns, mask=hit & (at < plan.room))
    e = tl.exp2((tile.student - by.max) * by.scale)
    e = tl.where(hit, 0.0, e)
    for j in range(by.tokens.count):
        column = (tl.load(by.tokens.ids + j) - by.tokens.offset).to(tl.int32)
        e = tl.where(columns == column, 0.0, e)
    below = seen.below + tl.sum(tl.sum(e, axis=2), axis=0)
    return Collected(seen.reached + tl.sum(lanes, axis=0), below)


@triton.jit
def count(sums, tile, by, plan: tl.constexpr):
    """A STEP of row.sweep: (lanes,) how many reach the key."""
    hit = _reaches(tile.student, _columns(tile, by.shape, plan), by.least)
    return sums + tl.sum(tl.sum(hit.to(tl.int32), axis=2), axis=0)


@triton.jit
def _bisected(low, high, wanted, sides, shape, span, by, plan: tl.constexpr):
    """A key that at least ``wanted`` reach, and no more than there is room for. More reach the
    ``low`` one, fewer the ``high`` one."""
    middle, reached = low, plan.room + 1
    while (reached > plan.room) | (reached < wanted):
        middle = low + ((high - low) >> 1)
        again = Collecting(by.shape, by.max, by.scale, middle, by.columns, by.tokens)
        none = tl.full([plan.lanes], 0, tl.int32)
        each = sweep(count, none, sides, shape, span, again, False, "", plan.unroll, plan)
        reached = tl.sum(each, axis=0)
        low = tl.where(reached > plan.room, middle, low)
        high = tl.where(reached < wanted, middle, high)
    return middle


@triton.jit
def _collected(least, sides, shape, span, by, plan: tl.constexpr):
    """(how many reach the key, the others' sum)."""
    now = Collecting(by.shape, by.max, by.scale, least, by.columns, by.tokens)
    start = Collected(tl.full([], 0, tl.int32), tl.full([plan.lanes], 0, plan.acc))
    found = sweep(collect, start, sides, shape, span, now, True, "", plan.unroll, plan)
    tl.debug_barrier()  # what is noted was written by other threads
    return found.reached, added(found.below)


@triton.jit
def _ordered(row, transform, keys, reached, wanted, by, out_values, out_ids, inverse_t,
             plan: tl.constexpr):  # fmt: skip
    """Write the first of what has been collected; the sum of the others."""
    at = tl.arange(0, plan.room)
    there = at < reached
    columns = tl.load(by.columns + at, mask=there, other=0)
    raw = tl.load(row + columns, mask=there, other=0).to(plan.acc)
    z, _ = through(raw, None, transform, plan.transformed_s)
    own = key(z, columns)
    tl.store(keys + at, own, mask=there)
    tl.debug_barrier()
    rank = tl.zeros_like(at)
    for j in range(reached):
        rank += (tl.load(keys + j) > own).to(tl.int32)
    first = there & (rank < wanted)
    tl.store(out_values + rank, z.to(tl.float64) * inverse_t, mask=first)
    tl.store(out_ids + rank, columns.to(tl.int64) + by.tokens.offset, mask=first)
    others = there & (rank >= wanted)
    for j in range(by.tokens.count):
        others = others & (columns != (tl.load(by.tokens.ids + j) - by.tokens.offset).to(tl.int32))
    return added(tl.where(others, tl.exp2((z - by.max) * by.scale), 0.0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def top_kernel(
    logits,  # (B, T, C)
    tokens, counts,  # (N, K) int64, (N,) uint8; N = B T
    values, ids,  # (pieces, N, wanted) fp64 and int64
    statistics,  # fp64 (pieces, N, 3 + K)
    columns_found, keys,  # (pieces, N, room) int32 and int64: scratch
    length: tl.int32, z_b: tl.int64, z_t: tl.int64,
    columns: tl.int32, offset: tl.int64, k: tl.int32, wanted: tl.int32,
    inverse_t: tl.float64,  # 1 / temperature
    scale: tl.float64, cap: tl.float64,
    plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces)."""
    n, piece = tl.program_id(0), tl.program_id(1)
    row = row_start(logits, n, length, z_b, z_t)
    of = Tokens(tokens + n.to(tl.int64) * k, k, offset)
    place = piece.to(tl.int64) * tl.num_programs(0) + n
    out, out_values, out_ids = statistics + place * (3 + k), values + place * wanted, ids
    out_ids += place * wanted
    counted = tl.load(counts + n) != 0
    transform = Transform(scalar(scale, plan.acc), scalar(cap, plan.acc))
    keep(row, of, columns, transform, out + 3, inverse_t, counted & (piece == 0), plan)
    most, total, outside = (tl.full([], 0, tl.float64),) * 3
    reached, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.float64)
    if counted:
        seen = observed(row, transform, columns, piece, inverse_t, "evict_last", plan)
        shape, sides, span, student = seen.shape, seen.sides, seen.span, seen.student
        most, total, nothing = seen.max, student.sum, nothing - INFINITY
        ordered = tl.sort(seen.lanes, descending=True)
        lane = tl.arange(0, plan.lanes)
        threshold = tl.max(tl.where(lane == wanted - 1, ordered, lowest(plan.acc)), axis=0)
        first = tl.full([], 0, tl.int32)
        least = key(threshold, first + LAST)
        noted = columns_found + place * plan.room
        by = Collecting(shape, student.max, seen.scales.student, least, noted, of)
        reached, outside = _collected(least, sides, shape, span, by, plan)
        if reached > plan.room:
            least = _bisected(
                least, key(student.max, first) + 1, wanted, sides, shape, span, by, plan
            )
            reached, outside = _collected(least, sides, shape, span, by, plan)
        outside += _ordered(row, transform, keys + place * plan.room, reached, wanted, by,
                            out_values, out_ids, inverse_t, plan)  # fmt: skip
    at = tl.arange(0, plan.lanes)
    missing = (at >= reached) & (at < wanted)
    tl.store(out_values + at, nothing, mask=missing)
    tl.store(out_ids + at, tl.full([plan.lanes], -1, tl.int64), mask=missing)
    tl.store(out, most)
    tl.store(out + 1, total)
    tl.store(out + 2, outside)
