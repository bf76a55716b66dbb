"""Rows against a teacher of K entries: statistics -> [middle sweep] -> gradient, over the student
(sparse_sweeps.py), then over the entries.

The K entries are walked in blocks, and always from ``held``, a copy of their raw logits and the
label's: the gradient may be written over the logits, by other programs of the row too. What the
gradient's sweep wrote over the ids is written over in turn (barriers keep the order within a
program).

Stages as in programs.py; "middle" exists only where entries outside the ids have a say: without
the bucket, for divergences that are no mix of KLs (of those only forward KL is finite there, and
it is 0).
"""

import triton
import triton.language as tl

from .numerics import (
    LN2,
    LOG2E,
    exp_wide,
    log_sum,
    log_wide,
    lowest,
    reciprocal,
    rounded,
    scalar,
)
from .row import INFINITY, NO_COLUMN
from .sparse_sweeps import BLOCK, _gradient, _merge, _middle, _statistics
from .sparse_walk import _add, _drop, _geometry, _load, _pieces, _row, _span, zeros

POINTERS = (
    *("student", "grad", "indices", "log_probs", "labels", "row_scale"),
    *("loss", "metrics", "held", "partial", "sums"),
)
SIZES = ("entries", "length", "s_b", "s_t", "g_b", "g_t", "vocab", "columns", "power")


@triton.jit
def _leave(partial, n, piece, state, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (7 * plan.pieces) + piece
    for field in tl.static_range(7):
        tl.store(at + field * plan.pieces, state[field].to(tl.float64))


@triton.jit
def _recall(partial, n, plan: tl.constexpr):
    return (
        _pieces(partial, n, 0, 7, plan).to(plan.acc), _pieces(partial, n, 1, 7, plan),
        _pieces(partial, n, 2, 7, plan), _pieces(partial, n, 3, 7, plan),
        _pieces(partial, n, 4, 7, plan), _pieces(partial, n, 5, 7, plan).to(plan.acc),
        _pieces(partial, n, 6, 7, plan).to(tl.int32),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# the entries: slots 0 to K - 1 are ids, slot K is the tail


@triton.jit
def _hold(student, held, known, label):
    """Copy the ids' raw logits to ``held``, and behind them the label's."""
    ids, entries = known
    for start in range(0, entries, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        id = tl.load(ids + slot, mask=slot < entries, other=NO_COLUMN)
        z = tl.load(student + id, mask=id != NO_COLUMN, other=0.0)
        tl.store(held + slot, z, mask=id != NO_COLUMN)
    if label >= 0:
        tl.store(held + entries, tl.load(student + label))


@triton.jit
def _held(held, known, start, bend, plan: tl.constexpr):
    """(ids, logits after the transform or -inf at padding, d of that / d raw) of a block."""
    ids, entries = known
    slot = start + tl.arange(0, BLOCK)
    id = tl.load(ids + slot, mask=slot < entries, other=NO_COLUMN)
    z, slope = _load(held + slot, id != NO_COLUMN, bend, plan.acc, plan.transformed_s, "")
    return id, z, slope


@triton.jit
def _norm(state, held, known, bend, inverse, plan: tl.constexpr):
    """(largest logit, 1 / T, log and 1 / of its sum over all entries at T, the same at T = 1), how
    much lower the largest one outside the ids is, and the first log in fp64.

    The ids' exponentials are in fp64, as :func:`_points` has them, so that those and the tail sum
    to 1: where p and q are close, the loss is as small as what would be missing.
    """
    best = state[5]
    shift = state[0] - best
    wide = inverse.to(tl.float64)
    total = state[1] * exp_wide(shift.to(tl.float64) * wide)
    one = state[2] * tl.exp2(shift * LOG2E)
    for start in range(0, known[1], BLOCK):
        _, z, _ = _held(held, known, start, bend, plan)
        below = z.to(tl.float64) - best.to(tl.float64)
        total += tl.sum(tl.where(z == -INFINITY, 0.0, exp_wide(below * wide)), axis=0)
        if plan.ce:
            one += _add(tl.exp2((z - best) * LOG2E))
    over, over_one = reciprocal(total).to(plan.acc), reciprocal(one).to(plan.acc)
    log_one, log_total = log_sum(one, plan.acc), log_wide(total)
    return best, inverse, log_total.to(plan.acc), over, log_one, over_one, shift, log_total


@triton.jit
def _log_tail(state, norm):
    """log of what the student has outside the ids, in fp64."""
    shift = norm[6].to(tl.float64) * norm[1].to(tl.float64)
    return tl.where(state[1] == 0, -INFINITY, shift + log_wide(state[1]) - norm[7])


@triton.jit
def _points(
    start, log_probs, log_tail, held, known, bend, norm, a_b, least,
    DIVERGENCE: tl.constexpr, BUCKET: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """A block of slots: (id, z, slope, lp, lq, q, value, grad), nothing at padding."""
    id, z, slope = _held(held, known, start, bend, plan)
    slot = start + tl.arange(0, BLOCK)
    last = slot == known[1]
    lp_wide = tl.load(log_probs + slot, mask=slot <= known[1], other=-INFINITY)
    if BUCKET:
        lp_wide = tl.where(last & (tl.exp(lp_wide.to(plan.acc)) <= least), -INFINITY, lp_wide)
    below = z.to(tl.float64) - norm[0].to(tl.float64)
    # a finite mask may overflow; only a true -inf may mean q = 0
    lq_wide = tl.maximum(below * norm[1].to(tl.float64) - norm[7], lowest(plan.acc).to(tl.float64))
    lq_wide = tl.where(z == -INFINITY, -INFINITY, lq_wide)
    if BUCKET:
        lq_wide = tl.where(last, log_tail, lq_wide)
    lp, lq = lp_wide.to(plan.acc), lq_wide.to(plan.acc)
    absent = (lp == -INFINITY) & (lq == -INFINITY)
    gap = tl.where(absent, 0.0, lp_wide - lq_wide)
    q = tl.exp(lq)
    if plan.mixes:
        a, b = a_b[0].to(tl.float64), a_b[1].to(tl.float64)
        value, grad = DIVERGENCE(lp_wide, lq_wide, gap, tl.exp(lp_wide), tl.exp(lq_wide), a, b)
        grad = grad.to(plan.acc)
    else:
        value, grad = DIVERGENCE(lp, lq, gap.to(plan.acc), tl.exp(lp), q, *a_b)
    value, grad = tl.where(absent, 0.0, value), tl.where(absent, 0.0, grad)
    # No normaliser carries a NaN of the teacher's to the row, and a divergence may swallow it.
    unknown = lp != lp
    value, grad = tl.where(unknown, lp, value), tl.where(unknown, lp, grad)
    return id, z, slope, lp, lq, q, value, grad


@triton.jit
def _weighted(lp):
    """sum p log p"""
    return _add(tl.where(lp == -INFINITY, 0.0, tl.exp(lp) * lp))


@triton.jit
def _compare(
    log_probs, log_tail, held, known, bend, norm, a_b, least,
    DIVERGENCE: tl.constexpr, BUCKET: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """Over all slots: value, sum of grad, the tail's grad, sum p log p, the ids' sum q log q, the
    teacher's first choice, and the ids' sum q; the sums in fp64."""
    value = tl.full([], 0, tl.float64)
    slope, of_tail, own_t, own_s, mass = value, value, value, value, value
    most, top = tl.full([], -INFINITY, plan.acc), tl.full([], -1, tl.int32)
    for start in range(0, known[1] + 1, BLOCK):
        id, _, _, lp, lq, q, v, g = _points(start, log_probs, log_tail, held, known, bend, norm,
                                            a_b, least, DIVERGENCE, BUCKET, plan)  # fmt: skip
        value += _add(v)
        slope += _add(g)
        last = start + tl.arange(0, BLOCK) == known[1]
        of_tail += _add(tl.where(last, g, 0.0))
        if plan.metrics:
            own_t += _weighted(lp)
            own_s += _weighted(tl.where(last, -INFINITY, lq))
            mass += _add(tl.where(last, 0.0, q))
            lp = tl.where(last, -INFINITY, lp)
            here = tl.max(lp, axis=0)
            first = tl.min(tl.where(lp == here, id, NO_COLUMN), axis=0)
            top = tl.where(here > most, first, top)
            most = tl.maximum(here, most)
    return value, slope, of_tail, own_t, own_s, top, mass


@triton.jit
def _scatter(
    grad, shape, span, log_probs, log_tail, held, known, bend, norm, pull, a_b, least,
    DIVERGENCE: tl.constexpr, BUCKET: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """The gradients of those ids that lie in the span."""
    kd, sum_grad, one, smooth, hot, label = pull[1], pull[2], pull[4], pull[5], pull[6], pull[7]
    head, tiles = shape[0], shape[1]
    first, last, edges = span
    size: tl.constexpr = plan.lanes * plan.width
    for start in range(0, known[1], BLOCK):
        id, z, bent, _, _, q, _, g = _points(start, log_probs, log_tail, held, known, bend, norm,
                                             a_b, least, DIVERGENCE, BUCKET, plan)  # fmt: skip
        g = (g - q * sum_grad) * kd
        if kd == 0:  # left out, so that a NaN teacher has no say
            g = tl.zeros_like(g)
        if plan.ce:
            g += tl.exp2((z - norm[0]) * LOG2E) * one - smooth
            g = tl.where(id == label, g - hot, g)
        if plan.transformed_s:
            g *= bent
        g = tl.where(z == -INFINITY, 0.0, g)
        inside = (id >= head + first * size) & (id < head + last * size)
        edge = (id < head) | (id >= head + tiles * size)
        mine = (id != NO_COLUMN) & (inside | (edge & (edges > 0)))
        tl.store(grad + id, rounded(g, grad.dtype.element_ty), mask=mine)


# --------------------------------------------------------------------------------------------------
# the kernel


@triton.jit
def _cross_entropy(state, norm, held, known, bend, smoothing, plan: tl.constexpr):
    z, _ = _load(held + known[1], None, bend, plan.acc, plan.transformed_s, "")
    hard, soft = (norm[0] - z) + norm[4], (norm[0] - state[4].to(plan.acc)) + norm[4]
    # Without smoothing the mean plays no part: it is -inf in a row with a masked entry.
    return tl.where(smoothing == 0, hard, (1.0 - smoothing) * hard + smoothing * soft)


@triton.jit
def _write(loss, metrics, n, state, norm, found, value, ce, label, weights, plan: tl.constexpr):
    scale, kd_scale, ce_weight, _ = weights
    kd_term = tl.where(kd_scale == 0, 0.0, kd_scale * value)
    ce_term = tl.where(ce_weight == 0, 0.0, ce_weight * ce)
    tl.store(loss + n, scale * (kd_term + ce_term))
    if metrics is not None:
        out = metrics + n.to(tl.int64) * 8
        # sum q log q outside the ids: q = 2^a share, log q = a ln 2 + log share
        share = tl.exp2(norm[6] * norm[1] * LOG2E) * norm[3]
        log_share = norm[6] * norm[1] - norm[2]
        tail = share * (state[3] * LN2 + state[1] * log_share)
        own_s = found[4] + tl.where(state[1] == 0, 0.0, tail)
        tl.store(out, value)
        tl.store(out + 1, ce)
        tl.store(out + 2, (-found[3]).to(plan.acc))
        tl.store(out + 3, (-own_s).to(plan.acc))
        tl.store(out + 4, (state[6] == found[5]).to(plan.acc))
        unknown = scalar(float("nan"), plan.acc)
        tl.store(out + 5, (state[6] == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 6, (found[5] == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 7, found[6].to(plan.acc))


@triton.jit
def _pull(state, norm, found, slope, label, weights, vocab, power, BUCKET: tl.constexpr,
          plan: tl.constexpr):  # fmt: skip
    """The factors of the gradient: outside the ids it is soft 2^a + one e^(z - top) + ..."""
    scale, kd_scale, ce_weight, smoothing = weights
    kd = scale * kd_scale * norm[1]
    share = tl.exp2(norm[6] * norm[1] * LOG2E) * norm[3]
    soft = -(slope * share)
    if BUCKET:  # the tail's derivative goes to its entries in proportion to 2^a
        soft += tl.where(state[1] == 0, 0.0, found[2] * reciprocal(state[1]))
    soft = tl.where(kd == 0, 0.0, soft * kd).to(plan.acc)
    one = scale * ce_weight * norm[5]
    outside = one * tl.exp2(norm[6] * LOG2E)
    smooth = scale * ce_weight * smoothing / vocab.to(plan.acc)
    hot = scale * ce_weight * (1.0 - smoothing)
    return soft, kd, slope.to(plan.acc), outside, one, smooth, hot, label, power


@triton.jit
def _outside(student, known, sums, n, piece, shape, span, bend, norm, a_b,
             DIVERGENCE: tl.constexpr, plan: tl.constexpr):  # fmt: skip
    """(value, sum of grad) outside the ids; the stage "middle" leaves those of its piece."""
    if plan.stage == "gradient":
        value = tl.sum(_pieces(sums, n, 0, 2, plan), axis=0)
        slope = tl.sum(_pieces(sums, n, 1, 2, plan), axis=0)
    else:
        value, slope = _middle(student, known, shape, span, bend, norm, a_b, DIVERGENCE, plan)
    if plan.stage == "middle":
        at = sums + n.to(tl.int64) * (2 * plan.pieces) + piece
        tl.store(at, value)
        tl.store(at + plan.pieces, slope)
    return value, slope


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def sparse_kernel(
    student, grad,  # (B, T, C), the same or None
    indices, log_probs,  # (N, K) int32, (N, K + 1) fp64; N = B T
    labels, row_scale, loss, metrics,  # (N,) or None, (N,), (N,), (N, 8) or None
    held,  # (N, K + 1) of the student's dtype: scratch
    partial, sums,  # fp64 (N, 7, pieces), (N, 2, pieces), or None in the stage "whole"
    entries: tl.int32, rounding: tl.float64,
    length: tl.int32, s_b: tl.int64, s_t: tl.int64, g_b: tl.int64, g_t: tl.int64,
    vocab: tl.int32, columns: tl.int32,
    inverse_s: tl.float64, s_scale: tl.float64, s_cap: tl.float64,
    kd_scale: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    a: tl.float64, b: tl.float64, power: tl.int32,
    DIVERGENCE: tl.constexpr, BUCKET: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces). See programs.row_kernel."""
    acc: tl.constexpr = plan.acc
    OUTSIDE: tl.constexpr = not (BUCKET or plan.kls)
    n, piece = tl.program_id(0), tl.program_id(1)
    row = _row(student, n, length, s_b, s_t)
    if grad is not None:
        grad = _row(grad, n, length, g_b, g_t)
    lead = row if plan.aligned_to == "student" else grad
    shape = _geometry(lead, vocab, plan)
    if plan.stage == "whole":
        span, leader = (0, shape[1], shape[2]), True
    else:
        span, leader = _span(shape, piece, plan), piece == 0
    scale = tl.load(row_scale + n)
    if scale == 0:
        if plan.stage == "whole" or plan.stage == "gradient":
            _drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan)
    else:
        a_b = scalar(a, acc), scalar(b, acc)
        inverse = scalar(inverse_s, acc)
        bend = scalar(s_scale, acc), scalar(s_cap, acc)
        known = indices + n.to(tl.int64) * entries, entries
        held += n.to(tl.int64) * (entries + 1)
        log_probs += n.to(tl.int64) * (entries + 1)
        label = tl.full([], -1, tl.int32)
        if plan.ce:
            label = tl.load(labels + n).to(tl.int32)
        if plan.stage == "whole" or plan.stage == "statistics":
            if leader:
                _hold(row, held, known, label)
            numbers = inverse * LOG2E, 1.0 / vocab.to(acc), power
            state = _statistics(row, known, shape, span, bend, numbers, plan)
        else:
            state = _merge(_recall(partial, n, plan), inverse * LOG2E)
        if plan.stage == "statistics":
            _leave(partial, n, piece, state, plan)
        else:
            tl.debug_barrier()  # what is held was written by other threads
            norm = _norm(state, held, known, bend, inverse, plan)
            value, slope = tl.full([], 0, tl.float64), tl.full([], 0, tl.float64)
            if OUTSIDE:
                value, slope = _outside(row, known, sums, n, piece, shape, span, bend, norm, a_b,
                                        DIVERGENCE, plan)  # fmt: skip
            if plan.stage != "middle":
                log_tail = _log_tail(state, norm)
                # what counts as nothing of the teacher where the student has nothing
                least = tl.where(log_tail == -INFINITY, scalar(rounding, acc), 0.0)
                found = _compare(log_probs, log_tail, held, known, bend, norm, a_b, least,
                                 DIVERGENCE, BUCKET, plan)  # fmt: skip
                value, slope = (value + found[0]).to(acc), slope + found[1]
                weights = (scale, scalar(kd_scale, acc), scalar(ce_weight, acc),
                           scalar(smoothing, acc))  # fmt: skip
                if leader:
                    ce = scalar(float("nan"), acc)
                    if plan.ce:
                        ce = _cross_entropy(state, norm, held, known, bend, weights[3], plan)
                    _write(loss, metrics, n, state, norm, found, value, ce, label, weights, plan)
                if grad is not None:
                    pull = _pull(state, norm, found, slope, label, weights, vocab, power, BUCKET,
                                 plan)  # fmt: skip
                    _gradient(row, grad, shape, span, bend, state[0], norm, pull, a_b, DIVERGENCE,
                              OUTSIDE, plan)  # fmt: skip
                    tl.debug_barrier()  # the ids' gradients go over what the sweep wrote
                    _scatter(grad, shape, span, log_probs, log_tail, held, known, bend, norm, pull,
                             a_b, least, DIVERGENCE, BUCKET, plan)  # fmt: skip
                    beyond = vocab if leader else columns
                    zeros(grad, shape, (0, 0, 0), beyond, columns, plan)
