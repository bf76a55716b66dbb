"""The kernels of :mod:`fusedkd.kernels.tokens`: one sweep for a row's normaliser, and its entropy's
moment; and one that writes the gradient.

The tokens' logits are fetched by their addresses, and their gradient goes over what the sweep wrote
there, so no entry of the row is compared with an id. What is one number a row or a token is fp64:
where q is near 1, the two parts of a token's gradient cancel.

A row in pieces has statistics of each, which the launcher merges as it does those of ranks.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import LN2, LOG2E, exp_wide, reciprocal, rounded, scalar
from .row import (
    INFINITY,
    Sides,
    Span,
    Transform,
    cut,
    row_start,
    share,
    sweep,
    through,
    whole,
    within,
    zeros,
)
from .stats import Scales, merged, nothing_seen, observe
from .sweeps import store

POINTERS = (*("logits", "tokens", "counts", "statistics", "grad", "factors", "constant", "linear"),)
SIZES = ("length", "z_b", "z_t", "g_b", "g_t", "columns", "padded", "offset", "k")


class Tokens(NamedTuple):
    """Of a row."""

    ids: Any  # where they are, int64; -1: none
    count: Any
    offset: Any  # the id of the first column here


class Observed(NamedTuple):
    """A row, or a piece of one, after the first sweep."""

    shape: Any
    sides: Any
    span: Any
    scales: Any
    lanes: Any  # the largest logit of each
    student: Any  # stats.Side
    max: Any  # fp64, over T; -inf where there is nothing


class Writing(NamedTuple):
    """What the gradient's sweep wants: it is 2^a (base + per_log a), a = (z - max) log2(e) / T."""

    grad: Any  # where the row's gradient goes
    shape: Any
    max: Any
    scale: Any  # log2(e) / T
    base: Any
    per_log: Any


@triton.jit
def span_of(shape, piece, plan: tl.constexpr):
    return whole(shape) if plan.pieces == 1 else share(shape, piece, plan)


@triton.jit
def _columns(tokens, start, columns, plan: tl.constexpr):
    """(which tokens, their ids, their columns, whether they are among those here), (lanes,)."""
    at = start + tl.arange(0, plan.lanes)
    ids = tl.load(tokens.ids + at, mask=at < tokens.count, other=-1)
    column = ids - tokens.offset
    inside = (ids >= 0) & (column >= 0) & (column < columns)
    return at, ids, tl.where(inside, column, 0).to(tl.int32), inside


@triton.jit
def keep(row, tokens, columns, by, out, inverse_t, here, plan: tl.constexpr):
    """z / T at the tokens, 0 where they lie elsewhere."""
    for start in range(0, tokens.count, plan.lanes):
        at, _, column, inside = _columns(tokens, start, columns, plan)
        inside = inside & here
        raw = tl.load(row + column, mask=inside, other=0).to(plan.acc)
        z, _ = through(raw, None, by, plan.transformed_s)
        value = tl.where(inside, z.to(tl.float64) * inverse_t, 0.0)
        tl.store(out + at, value, mask=at < tokens.count)


@triton.jit
def observed(row, by, columns, piece, inverse_t, policy: tl.constexpr, plan: tl.constexpr):
    shape = cut(row, columns, plan)
    over = scalar(inverse_t, plan.acc)
    scales = Scales(over * LOG2E, over * LOG2E, over, over, over)
    sides, span, start = Sides(row, row, by, by), span_of(shape, piece, plan), nothing_seen(plan)
    seen = sweep(observe, start, sides, shape, span, scales, False, policy, plan.unroll, plan)
    student = merged(seen, scales, plan).student
    most = tl.where(student.sum == 0, -INFINITY, student.max.to(tl.float64) * inverse_t)
    return Observed(shape, sides, span, scales, seen.student.max, student, most)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def statistics_kernel(
    logits,  # (B, T, C)
    tokens, counts,  # (N, K) int64, (N,) uint8; N = B T
    statistics,  # fp64 (pieces, N, 3 + K)
    length: tl.int32, z_b: tl.int64, z_t: tl.int64,
    columns: tl.int32, offset: tl.int64, k: tl.int32,
    inverse_t: tl.float64,  # 1 / temperature
    scale: tl.float64, cap: tl.float64,
    plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces)."""
    n, piece = tl.program_id(0), tl.program_id(1)
    row = row_start(logits, n, length, z_b, z_t)
    of = Tokens(tokens + n.to(tl.int64) * k, k, offset)
    place = piece.to(tl.int64) * tl.num_programs(0) + n
    out = statistics + place * (3 + k)
    counted = tl.load(counts + n) != 0
    by = Transform(scalar(scale, plan.acc), scalar(cap, plan.acc))
    keep(row, of, columns, by, out + 3, inverse_t, counted & (piece == 0), plan)
    most, total, gap = (tl.full([], 0, tl.float64),) * 3
    if counted:
        seen = observed(row, by, columns, piece, inverse_t, "", plan)
        most, total = seen.max, seen.student.sum
        if plan.metrics:
            gap = tl.where(total == 0, 0.0, seen.student.own * reciprocal(total) * LN2)
    tl.store(out, most)
    tl.store(out + 1, total)
    tl.store(out + 2, gap)


@triton.jit
def write(nothing, tile, by, plan: tl.constexpr):
    """A STEP of row.sweep."""
    a, factor = (tile.student - by.max) * by.scale, by.base
    if plan.metrics:
        a = tl.maximum(a, -1e4)  # 0 times minus infinity would be no number
        factor = by.base + by.per_log * a
    store(tl.exp2(a) * factor, tile, by, plan)
    return nothing


@triton.jit
def _times_named(ids, tokens, factors):
    """The factors of each token, all of them where a row names it several times."""
    total = tl.zeros_like(ids).to(tl.float64)
    for j in range(tokens.count):
        total += tl.where(ids == tl.load(tokens.ids + j), tl.load(factors + j), 0.0)
    return total


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def gradient_kernel(
    logits, grad,  # (B, T, C), perhaps the same
    tokens, counts,  # (N, K) int64, (N,) uint8; N = B T
    statistics, factors,  # fp64 (N, 3 + K) of whole rows, (N, K)
    constant, linear,  # fp64 (N,), tokens.row_factors; linear None without the entropy
    length: tl.int32, z_b: tl.int64, z_t: tl.int64, g_b: tl.int64, g_t: tl.int64,
    columns: tl.int32, padded: tl.int32, offset: tl.int64, k: tl.int32,
    temperature: tl.float64, inverse_t: tl.float64, scale: tl.float64, cap: tl.float64,
    per_cap: tl.float64,  # T / cap, or 0
    plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces)."""
    n, piece = tl.program_id(0), tl.program_id(1)
    row = row_start(logits, n, length, z_b, z_t)
    grad = row_start(grad, n, length, g_b, g_t)
    shape = cut(row if plan.aligned_to == "student" else grad, columns, plan)
    span = span_of(shape, piece, plan)
    beyond = tl.where(piece == 0, columns, padded)
    first = statistics + n.to(tl.int64) * (3 + k)
    most, total, gap = tl.load(first), tl.load(first + 1), tl.load(first + 2)
    if (tl.load(counts + n) == 0) | (total == 0):
        zeros(grad, shape, span, beyond, padded, plan)
    else:
        over, alike = reciprocal(total), tl.load(constant + n)
        skewed = tl.full([], 0, tl.float64)
        if plan.metrics:
            skewed = tl.load(linear + n)
        base = (alike - skewed * gap) * over
        by = Writing(
            grad, shape, (most * temperature).to(plan.acc), scalar(inverse_t, plan.acc) * LOG2E,
            base.to(plan.acc), (skewed * over * LN2).to(plan.acc),
        )  # fmt: skip
        transform = Transform(scalar(scale, plan.acc), scalar(cap, plan.acc))
        sides, none = Sides(row, row, transform, transform), tl.full([], 0, tl.int32)
        sweep(write, none, sides, shape, span, by, True, "evict_first", plan.unroll, plan)
        tl.debug_barrier()  # the tokens' gradient goes over what the sweep wrote
        of = Tokens(tokens + n.to(tl.int64) * k, k, offset)
        for start in range(0, k, plan.lanes):
            j, ids, column, inside = _columns(of, start, columns, plan)
            inside = inside & within(column, span, shape, plan)
            z = tl.load(first + 3 + j, mask=inside, other=0.0)
            q = exp_wide(z - most) * over
            g = _times_named(ids, of, factors + n.to(tl.int64) * k) * inverse_t
            g += q * (alike + skewed * (z - most - gap))
            bent = z * per_cap
            g = tl.where(z == -INFINITY, 0.0, g * (scale * (1.0 - bent * bent)))
            g = g.to(plan.acc)  # and from there as the sweep does
            tl.store(grad + column, rounded(g, grad.dtype.element_ty), mask=inside)
        zeros(grad, shape, Span(0, 0, 0, 0), beyond, padded, plan)
