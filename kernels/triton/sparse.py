"""Rows against a teacher of K entries: statistics -> [middle sweep] -> gradient, over the student
(sparse_sweeps.py), then over the entries.

The K entries are walked in blocks, and always from ``id_logits``, a copy of their raw logits and
the label's: the gradient may be written over the logits, by other programs of the row too. What the
gradient's sweep wrote over the ids is written over in turn (barriers keep the order within a
program).

What is outside the ids is, by TAIL, "absent" (the teacher has nothing there), the "bucket", one
category, or of no account: "generalized" compares two measures on the ids, "conditional" two
distributions given that it is one of them.

Stages as in programs.py; of whole rows "middle" exists only where entries outside the ids have a
say of their own (``plan.outside``): where the teacher is absent, and what the divergence makes of
that is not in proportion to q (pointwise.HOMOGENEOUS). Of a part of a row (``plan.part``) it
compares the ids that lie there, and keeps their logits for the gradient's; all else that the ids
and the tail say comes after the parts' sums are added.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .named import COLUMNS, Inside, leave_named, leave_nothing, named_apart, recall_named
from .numerics import LN2, LOG2E, exp_wide, log_sum, log_wide, lowest, reciprocal, rounded, scalar
from .programs import (
    Weights,
    drop,
    leave,
    leave_sums,
    left,
    of_unit,
    parameters,
    pieces,
    ruled,
    seven,
)
from .row import (
    INFINITY,
    NO_COLUMN,
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
from .sparse_sweeps import (
    BLOCK,
    Absent,
    Ids,
    Outside,
    Seen,
    absent,
    columns_of,
    merged_seen,
    rank,
    seen_by,
    slope_outside,
    write_outside,
)
from .stats import Scales, Side, Softmax, Statistics, added

POINTERS = (
    *("student", "grad", "indices", "log_probs", "labels", "row_scale"),
    *("loss", "metrics", "id_logits", "partial", "sums"),
)
SIZES = (
    *("entries", "length", "s_b", "s_t", "g_b", "g_t"),
    *("vocab", "columns", "offset", "total"),
)


class Entries(NamedTuple):
    """A row's: slots 0 to K - 1 are ids, slot K is the tail (of the logits: the label)."""

    ids: Ids
    log_probs: Any  # pointers
    logits: Any
    transform: Transform
    own: Any  # the divergence's numbers
    own_wide: Any  # in fp64


class Normaliser(NamedTuple):
    """From the student's logits to probabilities."""

    softmax: Softmax  # of all entries
    log_wide: Any  # its log_sum in fp64
    log_unit: Any  # the same at T = 1
    over_unit: Any
    shift: Any  # how much lower the largest logit outside the ids is
    log_tail: Any  # log of what is outside the ids, fp64
    log_base: Any  # of what the ids are shares of, fp64
    mass: Any  # of the ids


class Found(NamedTuple):
    """Sums over the slots, fp64."""

    value: Any
    sum_grad: Any
    of_tail: Any  # the tail's part of that
    own_t: Any  # sum p log p
    own_s: Any  # the ids' sum q log q; of a row in parts everything's
    top: Any  # the teacher's first choice
    most: Any  # and its log p


class Tail(NamedTuple):
    """What is outside the ids, fp64."""

    value: Any
    sum_grad: Any
    rate: Any  # grad over q, where that is one number


@triton.jit
def _id_block(entries, start, plan: tl.constexpr):
    """(ids, logits after the transform or -inf at padding, d of that / d raw) of a block."""
    slot = start + tl.arange(0, BLOCK)
    id = columns_of(entries.ids, slot, plan)
    known = id != NO_COLUMN
    raw = tl.load(entries.logits + slot, mask=known, other=0.0).to(plan.acc)
    z, slope = through(raw, known, entries.transform, plan.transformed_s)
    return id, z, slope


@triton.jit
def _here(entries, offset, columns, plan: tl.constexpr):
    """Those that lie in a part, without the tail."""
    first = rank(entries.ids, offset, plan)
    count = rank(entries.ids, offset + columns, plan) - first
    ids = Ids(entries.ids.at + first, count, offset)
    return Entries(ids, entries.log_probs + first, entries.logits, entries.transform, entries.own,
                   entries.own_wide)  # fmt: skip


@triton.jit
def _keep_logits(student, entries, label, plan: tl.constexpr):
    """Copy the ids' raw logits, and behind them the label's."""
    for start in range(0, entries.ids.count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        id = columns_of(entries.ids, slot, plan)
        z = tl.load(student + id, mask=id != NO_COLUMN, other=0.0)
        tl.store(entries.logits + slot, z, mask=id != NO_COLUMN)
    if label >= 0:
        tl.store(entries.logits + entries.ids.count, tl.load(student + label))


@triton.jit
def _label_logit(entries, plan: tl.constexpr):
    raw = tl.load(entries.logits + entries.ids.count).to(plan.acc)
    z, _ = through(raw, None, entries.transform, plan.transformed_s)
    return z


@triton.jit
def _normaliser(seen, entries, inverse, TAIL: tl.constexpr, plan: tl.constexpr):
    """The ids' exponentials are in fp64, as :func:`_points` has them, so that those and the tail
    sum to 1: where p and q are close, the loss is as small as what would be missing.
    """
    top, count = seen.of.student.max, entries.ids.count
    best = tl.full([], lowest(plan.acc), plan.acc)
    for start in range(0, count, BLOCK):
        _, z, _ = _id_block(entries, start, plan)
        best = tl.maximum(best, tl.max(z, axis=0))
    # relative to their own largest: they may hardly have anything
    of_ids, best = best.to(tl.float64), tl.maximum(best, top)
    shift, wide = top - best, inverse.to(tl.float64)
    rest = seen.of.student.sum * exp_wide(shift.to(tl.float64) * wide)
    inside, unit = tl.full([], 0, tl.float64), seen.of.unit * tl.exp2(shift * LOG2E)
    for start in range(0, count, BLOCK):
        _, z, _ = _id_block(entries, start, plan)
        below = z.to(tl.float64) - of_ids
        e = exp_wide(below * wide) + (below - below)  # NaN where a logit is
        inside += tl.sum(tl.where(z == -INFINITY, 0.0, e), axis=0)
        if plan.unit:
            unit += added(tl.exp2((z - best) * LOG2E))
    of_all = (of_ids - best.to(tl.float64)) * wide
    outside = seen.of.student.sum
    return _normalised(best, shift, rest, outside, inside, of_all, unit, inverse, TAIL, plan)


@triton.jit
def _normalised(
    best, shift, rest, outside_sum, inside, of_all, unit, inverse,
    TAIL: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """From what is outside the ids, relative to its own largest logit and, as ``rest``, to the
    best of all, and what is inside, e^of_all times as large."""
    wide = inverse.to(tl.float64)
    sum = rest + inside * exp_wide(of_all)
    log_all, over = log_wide(sum), reciprocal(sum).to(plan.acc)
    softmax = Softmax(best, inverse * LOG2E, inverse, log_all.to(plan.acc), over)
    outside = shift.to(tl.float64) * wide + log_wide(outside_sum) - log_all
    log_tail = tl.where(outside_sum == 0, -INFINITY, outside)
    log_inside = tl.where(inside == 0, -INFINITY, of_all + log_wide(inside))
    log_base, mass = log_all, tl.exp((log_inside - log_all).to(plan.acc))
    if TAIL == "conditional":
        log_base = log_inside + (log_all - log_all)  # NaN where a logit is, wherever
    log_unit, over_unit = log_all.to(plan.acc), over
    if plan.unit:
        log_unit, over_unit = log_sum(unit, plan.acc), reciprocal(unit).to(plan.acc)
    return Normaliser(softmax, log_all, log_unit, over_unit, shift, log_tail, log_base, mass)


@triton.jit
def _points(start, entries, norm, tail_floor, TAIL: tl.constexpr, plan: tl.constexpr):
    """A block of slots: (id, z, slope, lp, q, value, grad), nothing at padding."""
    id, z, slope = _id_block(entries, start, plan)
    slot = start + tl.arange(0, BLOCK)
    if plan.part:
        mask = slot < entries.ids.count
        lp_wide = tl.load(entries.log_probs + slot, mask=mask, other=-INFINITY)
    else:
        lp_wide = _log_probs(entries, slot, tail_floor, TAIL, plan)
    softmax = norm.softmax
    below = z.to(tl.float64) - softmax.max.to(tl.float64)
    # a finite mask may overflow; only a true -inf may mean q = 0
    least = lowest(plan.acc).to(tl.float64)
    lq_wide = tl.maximum(below * softmax.inverse_t.to(tl.float64) - norm.log_base, least)
    lq_wide = tl.where(z == -INFINITY, -INFINITY, lq_wide)
    if TAIL == "bucket" and not plan.part:
        lq_wide = tl.where(slot == entries.ids.count, norm.log_tail, lq_wide)
    lp, q, value, grad = _pointwise(lp_wide, lq_wide, entries, TAIL, plan)
    return id, z, slope, lp, q, value, grad


@triton.jit
def _log_probs(entries, slot, tail_floor, TAIL: tl.constexpr, plan: tl.constexpr):
    """The teacher's, and behind them the tail's."""
    count = entries.ids.count
    lp = tl.load(entries.log_probs + slot, mask=slot <= count, other=-INFINITY)
    if TAIL == "bucket":
        small = tl.exp(lp.to(plan.acc)) <= tail_floor
        lp = tl.where((slot == count) & small, -INFINITY, lp)
    return lp


@triton.jit
def _pointwise(lp_wide, lq_wide, entries, TAIL: tl.constexpr, plan: tl.constexpr):
    """(lp, q, value, grad)"""
    lp, lq = lp_wide.to(plan.acc), lq_wide.to(plan.acc)
    nothing = (lp == -INFINITY) & (lq == -INFINITY)
    gap = tl.where(nothing, 0.0, lp_wide - lq_wide)
    q = tl.exp(lq)
    if plan.mixes or TAIL == "generalized":
        p_wide, q_wide = tl.exp(lp_wide), tl.exp(lq_wide)
        value, grad = plan.careful(lp_wide, lq_wide, gap, p_wide, q_wide, entries.own_wide)
        if TAIL == "generalized":  # c (q - p) makes of it one of measures; divergences.measure_term
            zero = tl.zeros_like(p_wide)
            _, flat = plan.careful(zero, zero, zero, zero + 1.0, zero + 1.0, entries.own_wide)
            value += flat * (p_wide - q_wide)
            grad -= flat * q_wide
        grad = grad.to(plan.acc)
    else:
        value, grad = plan.careful(lp, lq, gap.to(plan.acc), tl.exp(lp), q, entries.own)
    value, grad = tl.where(nothing, 0.0, value), tl.where(nothing, 0.0, grad)
    # No normaliser carries a NaN of the teacher's to the row, and a divergence may swallow it.
    unknown = lp != lp
    value, grad = tl.where(unknown, lp, value), tl.where(unknown, lp, grad)
    return lp, q, value, grad


@triton.jit
def _weighted(lp):
    """sum p log p"""
    return added(tl.where(lp == -INFINITY, 0.0, tl.exp(lp) * lp))


@triton.jit
def _compare(entries, norm, tail_floor, TAIL: tl.constexpr, plan: tl.constexpr):
    value = tl.full([], 0, tl.float64)
    sum_grad, of_tail, own_t, own_s = value, value, value, value
    most, top = tl.full([], -INFINITY, plan.acc), tl.full([], -1, tl.int32)
    for start in range(0, entries.ids.count + 1, BLOCK):
        id, z, _, lp, _, v, g = _points(start, entries, norm, tail_floor, TAIL, plan)
        value += added(v)
        sum_grad += added(g)
        last = start + tl.arange(0, BLOCK) == entries.ids.count
        of_tail += added(tl.where(last, g, 0.0))
        if plan.metrics and not plan.part:  # of all entries; _found
            own_t += _weighted(lp)
            lq = (z - norm.softmax.max) * norm.softmax.inverse_t - norm.softmax.log_sum
            own_s += _weighted(lq)
            top, most = _first(top, most, id, tl.where(last, -INFINITY, lp))
    return Found(value, sum_grad, of_tail, own_t, own_s, top, most)


@triton.jit
def _first(top, most, id, lp):
    """The most probable id, the first of several, with those of a block."""
    here = tl.max(lp, axis=0)
    first = tl.min(tl.where(lp == here, id, NO_COLUMN), axis=0)
    return tl.where(here > most, first, top), tl.maximum(here, most)


@triton.jit
def _scatter(
    entries, norm, tail_floor, sum_grad, span, label, hot, over_unit, by,
    TAIL: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """The gradients of those ids that lie in the span."""
    for start in range(0, entries.ids.count, BLOCK):
        id, z, slope, _, q, _, g = _points(start, entries, norm, tail_floor, TAIL, plan)
        g = (g - q * sum_grad) * by.kd if plan.kd else tl.zeros_like(g)
        if plan.unit:
            g += tl.exp2((z - norm.softmax.max) * LOG2E) * over_unit
        if plan.ce:
            if plan.smoothing:
                g -= by.smooth
            g = tl.where(id == label, g - hot, g)
        if plan.transformed_s:
            g *= slope
        g = tl.where(z == -INFINITY, 0.0, g)
        mine = (id != NO_COLUMN) & within(id, span, by.shape, plan)
        tl.store(by.grad + id, rounded(g, by.grad.dtype.element_ty), mask=mine)


# --------------------------------------------------------------------------------------------------
# a row in parts


@triton.jit
def _inside(entries, span, shape, inverse, plan: tl.constexpr):
    """Of the ids in a span; in fp64, for the reason that _normaliser has."""
    zero, wide = tl.full([], 0, tl.float64), inverse.to(tl.float64)
    sum, own, unit, best = zero, zero, zero, lowest(plan.acc)
    for start in range(0, entries.ids.count, BLOCK):
        id, z, _ = _id_block(entries, start, plan)
        z = tl.where(within(id, span, shape, plan), z, -INFINITY)
        best = tl.maximum(best, tl.max(z, axis=0))
    for start in range(0, entries.ids.count, BLOCK):
        id, z, _ = _id_block(entries, start, plan)
        below = z.to(tl.float64) - best.to(tl.float64)
        there = within(id, span, shape, plan) & (z != -INFINITY)
        e = exp_wide(below * wide) + (below - below)  # NaN where a logit is
        sum += tl.sum(tl.where(there, e, 0.0), axis=0)
        own += tl.sum(tl.where(there, e * below, 0.0), axis=0)
        if plan.unit:
            unit += tl.sum(tl.where(there, exp_wide(below), 0.0), axis=0)
    return Inside(best.to(tl.float64), sum, own, unit)


@triton.jit
def _recalled(fields, total, inverse, TAIL: tl.constexpr, plan: tl.constexpr):
    """(Seen, Normaliser) of whole rows, from their named statistics."""
    low, wide = lowest(plan.acc).to(tl.float64), inverse.to(tl.float64)
    best, most = tl.maximum(fields.student_max, low), tl.maximum(fields.outside_max, low)
    shift, outside = (most - best).to(plan.acc), fields.outside_sum
    rest = outside * exp_wide(shift.to(tl.float64) * wide)
    of_all = fields.inside_exponent * LN2 - best * wide
    norm = _normalised(best.to(plan.acc), shift, rest, outside, fields.inside_sum, of_all,
                       fields.unit_sum, inverse, TAIL, plan)  # fmt: skip
    zero = tl.full([], 0, tl.float64)
    student = Side(most.to(plan.acc), outside, zero, zero, zero)
    of = Statistics(student, student, fields.unit_sum, fields.mean * total, zero, zero, zero)
    return Seen(of, best.to(plan.acc), fields.student_top.to(tl.int32), 0), norm


@triton.jit
def _of_part(entries, norm, tail, leader, TAIL: tl.constexpr, plan: tl.constexpr):
    """(value, sum of grad) of a program's piece, and one program's of the ids. What is in
    proportion to q outside them is added where the parts' sums are, and so is the bucket."""
    zero = tl.full([], 0, tl.float64)
    value, sum_grad = zero, zero
    if plan.outside:
        value, sum_grad = tail.value, tail.sum_grad
    if leader:
        found = _compare(entries, norm, scalar(0.0, plan.acc), TAIL, plan)
        value, sum_grad = value + found.value, sum_grad + found.sum_grad
    return value, sum_grad


@triton.jit
def _found(sums, n, fields, entries, norm, tail_floor, TAIL: tl.constexpr, plan: tl.constexpr):
    """What the parts' sums say, the tail, and what is the teacher's alone."""
    value, sum_grad = tl.load(sums + n.to(tl.int64) * 2), tl.load(sums + n.to(tl.int64) * 2 + 1)
    zero = tl.full([], 0, tl.float64)
    of_tail, own_t, own_s = zero, zero, zero
    most, top = tl.full([], -INFINITY, plan.acc), tl.full([], -1, tl.int32)
    if TAIL == "bucket":
        lp_tail = _log_probs(entries, entries.ids.count, tail_floor, TAIL, plan)
        _, _, of_value, of_tail = _pointwise(lp_tail, norm.log_tail, entries, TAIL, plan)
        of_tail = of_tail.to(tl.float64)
        value, sum_grad = value + of_value, sum_grad + of_tail
    if plan.metrics:
        for start in range(0, entries.ids.count + 1, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            lp = _log_probs(entries, slot, tail_floor, TAIL, plan).to(plan.acc)
            own_t += _weighted(lp)
            lp = tl.where(slot == entries.ids.count, -INFINITY, lp)
            top, most = _first(top, most, columns_of(entries.ids, slot, plan), lp)
        below = fields.student_expected - norm.softmax.max.to(tl.float64)
        own_s = below * norm.softmax.inverse_t.to(tl.float64) - norm.log_wide
    return Found(value, sum_grad, of_tail, own_t, own_s, top, most)


# --------------------------------------------------------------------------------------------------
# the kernel


@triton.jit
def _cross_entropy(seen, norm, z, weights, total, plan: tl.constexpr):
    ce = (norm.softmax.max - z) + norm.log_unit
    if plan.smoothing:
        mean = (seen.of.mean / total.to(tl.float32)).to(plan.acc)
        soft = (norm.softmax.max - mean) + norm.log_unit
        ce = (1.0 - weights.smoothing) * ce + weights.smoothing * soft
    return ce


@triton.jit
def _entropy(seen, norm, own_s, plan: tl.constexpr):
    """Of the student: outside the ids q = 2^a share, log q = a ln 2 + log share."""
    softmax, of = norm.softmax, seen.of.student
    share = tl.exp2(norm.shift * softmax.scale) * softmax.over_sum
    log_share = norm.shift * softmax.inverse_t - softmax.log_sum
    tail = share * (of.own * LN2 + of.sum * log_share)
    if not plan.part:
        own_s += tl.where(of.sum == 0, 0.0, tail)
    return -own_s.to(plan.acc)


@triton.jit
def _report(
    loss, metrics, n, seen, norm, found, value, z, label, weights, total, plan: tl.constexpr
):
    terms, ce = scalar(0.0, plan.acc), scalar(float("nan"), plan.acc)
    if plan.kd:
        terms += tl.where(weights.kd == 0, 0.0, weights.kd * value)
    if plan.ce:
        ce = _cross_entropy(seen, norm, z, weights, total, plan)
        terms += tl.where(weights.ce == 0, 0.0, weights.ce * ce)
    if plan.z:
        lse = norm.softmax.max + norm.log_unit
        terms += weights.z * lse * lse
    tl.store(loss + n, weights.row * terms)
    if plan.metrics:
        out, unknown = metrics + n.to(tl.int64) * 8, scalar(float("nan"), plan.acc)
        tl.store(out, value)
        tl.store(out + 1, ce)
        tl.store(out + 2, (-found.own_t).to(plan.acc))
        tl.store(out + 3, _entropy(seen, norm, found.own_s, plan))
        tl.store(out + 4, (seen.at == found.top).to(plan.acc))
        tl.store(out + 5, (seen.at == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 6, (found.top == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 7, norm.mass)


@triton.jit
def _ruled(weights, seen, norm, found, value, z, by, plan: tl.constexpr):
    log_q = scalar(0.0, plan.acc)
    if plan.ce:
        log_q = (z - norm.softmax.max) * norm.softmax.inverse_t - norm.softmax.log_sum
    entropy_t, entropy_s = (-found.own_t).to(plan.acc), _entropy(seen, norm, found.own_s, plan)
    top_t, top_s = tl.exp(found.most), norm.softmax.over_sum
    return ruled(weights, value, entropy_t, entropy_s, log_q, top_t, top_s, by, plan)


@triton.jit
def _outside(
    grad, shape, seen, norm, found, tail, weights, total, own,
    TAIL: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    by_unit = of_unit(weights, norm.softmax.max + norm.log_unit, plan)
    share = tl.exp2(norm.shift * norm.softmax.scale) * norm.softmax.over_sum
    soft, kd = scalar(0.0, tl.float64), weights.row * weights.kd * norm.softmax.inverse_t
    if plan.kd and TAIL != "conditional":
        soft += (tail.rate - (tail.sum_grad + found.sum_grad)) * share
        if TAIL == "bucket":  # the tail's derivative goes to its entries in proportion to 2^a
            of_tail = found.of_tail * reciprocal(seen.of.student.sum)
            soft += tl.where(seen.of.student.sum == 0, 0.0, of_tail)
        soft *= kd
    unit = by_unit * norm.over_unit * tl.exp2(norm.shift * LOG2E)
    smooth = weights.row * weights.ce * weights.smoothing / total.to(plan.acc)
    return Outside(grad, shape, seen.of.student.max, norm.softmax, soft.to(plan.acc), kd, unit,
                   smooth, own)  # fmt: skip


@triton.jit
def _gradient(
    sides, entries, label, norm, tail_floor, sum_grad, span, weights, by,
    TAIL: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    none = tl.full([], 0, tl.int32)
    unroll: tl.constexpr = 1 if plan.outside else plan.unroll
    sweep(write_outside, none, sides, by.shape, span, by, True, "evict_first", unroll, plan)
    hot = weights.row * weights.ce * (1.0 - weights.smoothing)
    tl.debug_barrier()  # the label's gradient and the ids' go over what the sweep wrote
    if plan.ce:
        if (label >= 0) & within(label, span, by.shape, plan):
            raw = tl.load(entries.logits + entries.ids.count).to(plan.acc)
            z, slope = through(raw, None, entries.transform, plan.transformed_s)
            g = (slope_outside(z, by, plan) - hot) * (slope if plan.transformed_s else 1.0)
            g = tl.where(z == -INFINITY, 0.0, g)
            tl.store(by.grad + label, rounded(g, by.grad.dtype.element_ty))
        tl.debug_barrier()
    by_unit = of_unit(weights, norm.softmax.max + norm.log_unit, plan)
    _scatter(entries, norm, tail_floor, sum_grad, span, label, hot, by_unit * norm.over_unit, by,
             TAIL, plan)  # fmt: skip


@triton.jit
def _swept(sides, of, norm, sums, n, piece, shape, span, plan: tl.constexpr):
    """(value, sum of grad) outside the ids; in the stage "middle" of its piece."""
    if plan.stage == "gradient":
        value = tl.sum(pieces(sums, n, 0, 2, plan), axis=0)
        sum_grad = tl.sum(pieces(sums, n, 1, 2, plan), axis=0)
    else:
        by = Absent(of.ids, shape, norm.softmax, of.own)
        value, sum_grad = absent(sides, shape, span, by, plan)
    return value, sum_grad


@triton.jit
def _absent(sides, of, norm, sums, n, piece, shape, span, TAIL: tl.constexpr, plan: tl.constexpr):
    zero = tl.full([], 0, tl.float64)
    value, sum_grad, rate = zero, zero, zero
    if plan.outside and plan.part and plan.stage == "gradient":
        pass  # among the parts' sums
    elif plan.outside:
        value, sum_grad = _swept(sides, of, norm, sums, n, piece, shape, span, plan)
    elif TAIL == "absent":
        none = zero - INFINITY
        each, rate = plan.careful(none, zero, none, zero, zero + 1.0, of.own_wide)
        q = tl.exp(norm.log_tail)
        value, sum_grad = each * q, rate * q
    return Tail(value, sum_grad, rate)


@triton.jit
def _flat(seen):
    of = seen.of
    return of.student.max, of.student.sum, of.student.own, of.unit, of.mean, seen.best, seen.at


@triton.jit
def _recall(partial, n, plan: tl.constexpr):
    most = pieces(partial, n, 0, 7, plan).to(plan.acc)
    student = Side(most, pieces(partial, n, 1, 7, plan), most, pieces(partial, n, 2, 7, plan), most)
    unit, mean = pieces(partial, n, 3, 7, plan), pieces(partial, n, 4, 7, plan)
    best, at = pieces(partial, n, 5, 7, plan).to(plan.acc), pieces(partial, n, 6, 7, plan)
    return Seen(Statistics(student, student, unit, mean, 0.0, 0.0, 0.0), best, at.to(tl.int32), 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def sparse_kernel(
    student, grad,  # (B, T, C), the same or None
    indices, log_probs,  # (N, K) int32, (N, K + 1) fp64; N = B T
    labels, row_scale, loss, metrics,  # (N,) or None, (N,), (N,), (N, 8) or None
    id_logits,  # (N, K + 1) of the student's dtype: scratch
    # fp64 (N, 7, pieces), (N, 2, pieces), or None in the stage "whole"; of a part of a row named
    # statistics, (pieces, N, COLUMNS) that are left, (N, COLUMNS) and (N, 2) that are found
    partial, sums,
    entries: tl.int32, rounding: tl.float64,
    length: tl.int32, s_b: tl.int64, s_t: tl.int64, g_b: tl.int64, g_t: tl.int64,
    vocab: tl.int32, columns: tl.int32,
    offset: tl.int32, total: tl.int32,  # the first column's id, and the whole rows' vocab
    inverse_s: tl.float64, s_scale: tl.float64, s_cap: tl.float64,
    kd_scale: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    z_weight: tl.float64,
    a: tl.float64, b: tl.float64,
    own_0: tl.float64, own_1: tl.float64, own_2: tl.float64, own_3: tl.float64,
    own_4: tl.float64, own_5: tl.float64, own_6: tl.float64,
    rule_0: tl.float64, rule_1: tl.float64, rule_2: tl.float64, rule_3: tl.float64,
    rule_4: tl.float64, rule_5: tl.float64, rule_6: tl.float64,
    TAIL: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces). See programs.row_kernel."""
    acc: tl.constexpr = plan.acc
    n, piece = tl.program_id(0), tl.program_id(1)
    row = row_start(student, n, length, s_b, s_t)
    if grad is not None:
        grad = row_start(grad, n, length, g_b, g_t)
    shape = cut(row if plan.aligned_to == "student" else grad, vocab, plan)
    if plan.stage == "whole":
        span, leader = whole(shape), True
    else:
        span, leader = share(shape, piece, plan), piece == 0
    scale = tl.load(row_scale + n)
    if scale == 0:
        if plan.part and plan.stage == "statistics":
            leave_nothing(left(partial, n, piece))
        if plan.stage == "whole" or plan.stage == "gradient":
            drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan)
    else:
        inverse = scalar(inverse_s, acc)
        scales = Scales(inverse * LOG2E, inverse * LOG2E, inverse, 0.0, 0.0)
        transform = Transform(scalar(s_scale, acc), scalar(s_cap, acc))
        sides = Sides(row, row, transform, transform)
        first = n.to(tl.int64) * (entries + 1)
        ids = Ids(indices + n.to(tl.int64) * entries, entries, 0)
        own = parameters(a, b, own_0, own_1, own_2, own_3, own_4, own_5, own_6, acc, plan)
        own_wide = parameters(
            a, b, own_0, own_1, own_2, own_3, own_4, own_5, own_6, tl.float64, plan
        )
        of = Entries(ids, log_probs + first, id_logits + first, transform, own, own_wide)
        label = tl.full([], -1, tl.int32)
        if plan.ce:
            label = tl.load(labels + n).to(tl.int32)
        here, column = of, label
        if plan.part:
            here, column = _here(of, offset, vocab, plan), label - offset
            column = tl.where((column >= 0) & (column < vocab), column, -1)
        if plan.part and plan.stage != "gradient":  # what all programs of the row keep is the same
            _keep_logits(row, here, column, plan)
        if plan.stage == "whole" or plan.stage == "statistics":
            if leader and not plan.part:
                _keep_logits(row, of, label, plan)
            seen = seen_by(sides, here.ids, shape, span, scales, plan)
        elif not plan.part:
            seen = merged_seen(_recall(partial, n, plan), scales, plan)
        if not plan.part and plan.stage == "statistics":
            leave(partial, n, piece, _flat(seen), plan)
        elif plan.stage == "statistics":
            tl.debug_barrier()  # as below
            z = scalar(0.0, acc)
            if plan.ce:
                z = tl.where((column >= 0) & leader, _label_logit(here, plan), 0.0)
            ids_seen = _inside(here, span, shape, inverse, plan)
            fields = named_apart(seen.of, ids_seen, seen.at, z, offset, total, inverse, plan)
            leave_named(left(partial, n, piece), fields)
        else:
            tl.debug_barrier()  # what is kept was written by other threads
            if plan.part:
                fields = recall_named(partial + n.to(tl.int64) * COLUMNS)
                seen, norm = _recalled(fields, total, inverse, TAIL, plan)
            else:
                norm = _normaliser(seen, of, inverse, TAIL, plan)
            tail = _absent(sides, here, norm, sums, n, piece, shape, span, TAIL, plan)
            if plan.stage == "middle":
                value, sum_grad = tail.value, tail.sum_grad
                if plan.part:
                    value, sum_grad = _of_part(here, norm, tail, leader, TAIL, plan)
                leave_sums(sums, n, piece, value, sum_grad, plan)
            else:
                # what counts as nothing of the teacher where the student has nothing
                tail_floor = tl.where(norm.log_tail == -INFINITY, scalar(rounding, acc), 0.0)
                if plan.part:
                    found = _found(sums, n, fields, of, norm, tail_floor, TAIL, plan)
                else:
                    found = _compare(of, norm, tail_floor, TAIL, plan)
                value = (tail.value + found.value).to(acc)
                sum_grad = tail.sum_grad + found.sum_grad
                if TAIL == "conditional":  # on nothing: no number
                    value += (norm.log_base - norm.log_base).to(acc)
                if TAIL == "generalized":  # rounding
                    value = tl.where(value < 0, 0.0, value)
                weights = Weights(scale, scalar(kd_scale, acc), scalar(ce_weight, acc),
                                  scalar(smoothing, acc), scalar(z_weight, acc))  # fmt: skip
                z = scalar(0.0, acc)
                if plan.part:
                    z = fields.label.to(acc)
                elif plan.ce:
                    z = _label_logit(of, plan)
                if plan.rule is not None:
                    rule = seven(rule_0, rule_1, rule_2, rule_3, rule_4, rule_5, rule_6, acc)
                    weights = _ruled(weights, seen, norm, found, value, z, rule, plan)
                if leader:
                    _report(loss, metrics, n, seen, norm, found, value, z, label, weights, total,
                            plan)  # fmt: skip
                if grad is not None:
                    by = _outside(
                        grad, shape, seen, norm, found, tail, weights, total, own, TAIL, plan
                    )
                    _gradient(sides, here, column, norm, tail_floor, sum_grad.to(acc), span,
                              weights, by, TAIL, plan)  # fmt: skip
                    beyond = vocab if leader else columns
                    zeros(grad, shape, Span(0, 0, 0, 0), beyond, columns, plan)
