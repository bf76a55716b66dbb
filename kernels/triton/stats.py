"""The statistics of a row: a monoid, whose pieces are lanes, programs or ranks.

A lane keeps its own running maxima and sums relative to them; :func:`moved` brings sums to other
maxima, then addition merges. A maximum starts at the lowest finite number, not at -inf: what is
masked then needs no special case.

Why a maximum that moves, and none that is fixed at a row's first tile: a peak that comes d log2
units above a fixed one has an exponential that is off by d 2^-25, so with d = 20 (14 logits, an
ordinary row) the normaliser would be off by 6e-7, where eager PyTorch is off by 1e-8. A lane has
``unroll`` lines per move, which is 0.8 instructions an entry (sm_90, 2026-11-28).

Optimism: sums of weighted gaps are formed without looking for masked entries. Where there is one
(0 * inf), or an overflow, the sum comes out NaN or infinite, and that row alone goes the careful
way (sweeps.py). Others pay nothing for it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import LOG2E, log_ratio, log_sum, lowest, reciprocal
from .row import NO_COLUMN, offsets, through


class Side(NamedTuple):
    """Of one distribution, with a = (z - max) log2(e) / T. fp64 sums once lanes are merged."""

    max: Any  # largest logit
    sum: Any  # of 2^a
    gap: Any  # of 2^a x, with x = (t - teacher.max) T_s / T_t - (s - student.max)
    own: Any  # of 2^a a, for the entropy
    at: Any  # where the maximum is first: Tile.place, and once resolved the column


class Statistics(NamedTuple):
    student: Side
    teacher: Side
    unit: Any  # sum e^(s - max), T = 1
    mean: Any  # sum of s
    # Sums less the student's, entry by entry: at a sharp peak, where all are 1 and more, what is
    # more keeps its digits.
    cross: Any  # of 2^(a a_t + b a_s), a divergence's powers, or of the teacher's 2^a
    power_s: Any  # of 2^((a + b) a_s)
    power_t: Any  # of 2^((a + b) a_t), as it is


class Softmax(NamedTuple):
    """From logits to probabilities, of one side."""

    max: Any
    scale: Any  # log2(e) / T
    inverse_t: Any  # 1 / T
    log_sum: Any  # of the sum of e^((z - max) / T)
    over_sum: Any


class Pair(NamedTuple):
    student: Softmax
    teacher: Softmax
    ratio: Any  # T_s / T_t
    log_ratio: Any  # log of the student's sum over the teacher's: exactly 0 for p = q


class Scales(NamedTuple):
    """Temperatures and powers, in front of a logit."""

    student: Any  # log2(e) / T
    teacher: Any
    ratio: Any  # T_s / T_t
    a: Any  # parameters of the divergence
    b: Any


@triton.jit
def nothing_seen(plan: tl.constexpr):
    zero = tl.full([plan.lanes], 0, plan.acc)
    side = Side(zero + lowest(plan.acc), zero, zero, zero, tl.full([plan.lanes], 0, tl.int32))
    return Statistics(side, side, zero, zero, zero, zero, zero)


@triton.jit
def _shifted(total, factor, shift, weight):
    """sum 2^(a + d) (g + shift) from total = sum 2^a g, weight = sum 2^a."""
    return factor * (total + shift * weight)


@triton.jit
def _power(total, exponent):
    """A sum of powers, whose exponents may have either sign."""
    return tl.where(total == 0, total, total * tl.exp2(exponent))


@triton.jit
def _excess(less, factor, sum_s, keep_s):
    """A sum, less the student's, when either is multiplied by a factor of its own."""
    return tl.where(sum_s == 0, 0.0, factor * less + (factor - keep_s) * sum_s)


@triton.jit
def moved(of, max_s, max_t, scales, plan: tl.constexpr):
    """The same statistics relative to other, not smaller, maxima."""
    student, teacher = of.student, of.teacher
    # From the lowest number the way is too far: its sums are 0, and should not become 0 * inf.
    low_s = tl.maximum(student.max - max_s, -1e4 / scales.student)
    by_s = low_s * scales.student
    keep_s = tl.exp2(by_s)
    unit, sum_s, gap_s, own_s = of.unit, student.sum * keep_s, student.gap, student.own
    sum_t, gap_t, own_t = teacher.sum, teacher.gap, teacher.own
    cross, power_s, power_t = of.cross, of.power_s, of.power_t
    if plan.unit:
        unit = unit * at_unit(keep_s, low_s, plan)
    if plan.metrics:
        own_s = _shifted(own_s, keep_s, by_s, student.sum)
    if plan.teacher:
        low_t = tl.maximum(teacher.max - max_t, -1e4 / scales.teacher)
        by_t = low_t * scales.teacher
        keep_t, shift = tl.exp2(by_t), low_t * scales.ratio - low_s
        sum_t = sum_t * keep_t
        if plan.forward:
            gap_t = _shifted(gap_t, keep_t, shift, teacher.sum)
        if plan.reverse:
            gap_s = _shifted(gap_s, keep_s, shift, student.sum)
        if plan.metrics:
            own_t = _shifted(own_t, keep_t, by_t, teacher.sum)
        if plan.powers:
            factor = tl.exp2(scales.a * by_t + scales.b * by_s)
            cross = _excess(cross, factor, student.sum, keep_s)
            if plan.powers == 2:
                factor = tl.exp2((scales.a + scales.b) * by_s)
                power_s = _excess(power_s, factor, student.sum, keep_s)
                power_t = _power(power_t, (scales.a + scales.b) * by_t)
        elif plan.forward:
            cross = _excess(cross, keep_t, student.sum, keep_s)
    return Statistics(
        Side(max_s, sum_s, gap_s, own_s, student.at), Side(max_t, sum_t, gap_t, own_t, teacher.at),
        unit, of.mean, cross, power_s, power_t,
    )  # fmt: skip


@triton.jit
def at_unit(powered, below, plan: tl.constexpr):
    """2^(below log2 e) from powered = 2^(below log2(e) / T): no other exponential at T = 1, 2."""
    if plan.power == 1:
        unit = powered
    elif plan.power == 2:
        unit = powered * powered
    else:
        unit = tl.exp2(below * LOG2E)
    return unit


@triton.jit
def lane_max(x):
    return tl.max(tl.max(x, axis=2), axis=0)


@triton.jit
def lane_sum(x, mask):
    """Over a lane's entries; what is masked may be anything."""
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def observe(of, tile, scales, plan: tl.constexpr):
    """Take a tile into the statistics; a STEP of row.sweep."""
    here_s, here_t = lane_max(tile.student), lane_max(tile.teacher)
    old_s, old_t = of.student.max, of.teacher.max
    max_s, max_t = tl.maximum(old_s, here_s), tl.maximum(old_t, here_t)
    of = moved(of, max_s, max_t, scales, plan)
    sum_s, gap_s, own_s, at_s = of.student.sum, of.student.gap, of.student.own, of.student.at
    sum_t, gap_t, own_t, at_t = of.teacher.sum, of.teacher.gap, of.teacher.own, of.teacher.at
    unit, mean, cross, power_s, power_t = of.unit, of.mean, of.cross, of.power_s, of.power_t
    below_s = tile.student - max_s[None, :, None]
    a_s = below_s * scales.student
    e_s = tl.exp2(a_s)
    sum_s += lane_sum(e_s, None)
    if plan.unit:
        unit += lane_sum(at_unit(e_s, below_s, plan), None)
        if plan.smoothing:
            mean += lane_sum(tile.student, tile.mask)
    if plan.metrics:
        # 0 times minus infinity would be no number
        own_s += lane_sum(e_s * tl.maximum(a_s, -1e4), None)
        at_s = tl.where(here_s > old_s, tile.place, at_s)
    if plan.teacher:
        below_t = tile.teacher - max_t[None, :, None]
        a_t = below_t * scales.teacher
        e_t = tl.exp2(a_t)
        sum_t += lane_sum(e_t, None)
        x = below_t * scales.ratio - below_s
        if plan.forward:
            gap_t += lane_sum(e_t * x, tile.mask)
        if plan.reverse:
            gap_s += lane_sum(e_s * x, tile.mask)
        if plan.metrics:
            own_t += lane_sum(e_t * tl.maximum(a_t, -1e4), None)
            at_t = tl.where(here_t > old_t, tile.place, at_t)
        if plan.powers:
            cross += lane_sum(tl.exp2(scales.a * a_t + scales.b * a_s) - e_s, tile.mask)
            if plan.powers == 2:
                both = scales.a + scales.b
                power_s += lane_sum(tl.exp2(both * a_s) - e_s, tile.mask)
                power_t += lane_sum(tl.exp2(both * a_t), tile.mask)
        elif plan.forward:
            cross += lane_sum(e_t - e_s, tile.mask)
    return Statistics(
        Side(max_s, sum_s, gap_s, own_s, at_s), Side(max_t, sum_t, gap_t, own_t, at_t),
        unit, mean, cross, power_s, power_t,
    )  # fmt: skip


@triton.jit
def first_columns(base, by, shape, at, plan: tl.constexpr, transformed: tl.constexpr):
    """The column of each lane's maximum, the first of several, given its tile: read again."""
    columns = shape.head + at[None, :, None] * (plan.unroll * plan.lanes * plan.width)
    columns += offsets(plan)
    mask = (at[None, :, None] >= 0) & (columns < shape.end)
    raw = tl.load(base + columns, mask=mask, other=0.0).to(plan.acc)
    z, _ = through(raw, mask, by, transformed)
    most = lane_max(z)[None, :, None]
    first = tl.where(mask & (z == most), columns, NO_COLUMN)
    return tl.where(at < 0, -1 - at, tl.min(tl.min(first, axis=2), axis=0))


@triton.jit
def resolved(of, sides, shape, plan: tl.constexpr):
    """With columns in place of tiles."""
    student, teacher = of.student, of.teacher
    at_s, at_t = student.at, teacher.at
    if plan.metrics:
        at_s = first_columns(sides.student, sides.of_student, shape, at_s, plan, plan.transformed_s)
        at_t = first_columns(sides.teacher, sides.of_teacher, shape, at_t, plan, plan.transformed_t)
    return Statistics(
        Side(student.max, student.sum, student.gap, student.own, at_s),
        Side(teacher.max, teacher.sum, teacher.gap, teacher.own, at_t),
        of.unit, of.mean, of.cross, of.power_s, of.power_t,
    )  # fmt: skip


@triton.jit
def added(pieces):
    """Their sum in fp64: once per row it costs nothing, and the normalisers are everybody's."""
    return tl.sum(pieces.to(tl.float64), axis=0)


@triton.jit
def merged(of, scales, plan: tl.constexpr):
    """Statistics of (pieces,) -> of the whole, the sums among them in fp64."""
    max_s, max_t = tl.max(of.student.max, axis=0), tl.max(of.teacher.max, axis=0)
    at_s = tl.min(tl.where(of.student.max == max_s, of.student.at, NO_COLUMN), axis=0)
    at_t = tl.min(tl.where(of.teacher.max == max_t, of.teacher.at, NO_COLUMN), axis=0)
    of = moved(of, max_s, max_t, scales, plan)
    student, teacher = of.student, of.teacher
    return Statistics(
        Side(max_s, added(student.sum), added(student.gap), added(student.own), at_s),
        Side(max_t, added(teacher.sum), added(teacher.gap), added(teacher.own), at_t),
        added(of.unit), added(of.mean), added(of.cross), added(of.power_s), added(of.power_t),
    )  # fmt: skip


@triton.jit
def paired(of, inverse_s, inverse_t, ratio, plan: tl.constexpr):
    """What turns logits into probabilities."""
    over_s, over_t = (
        reciprocal(of.student.sum).to(plan.acc),
        reciprocal(of.teacher.sum).to(plan.acc),
    )
    log_s, log_t = log_sum(of.student.sum, plan.acc), log_sum(of.teacher.sum, plan.acc)
    return Pair(
        Softmax(of.student.max, inverse_s * LOG2E, inverse_s, log_s, over_s),
        Softmax(of.teacher.max, inverse_t * LOG2E, inverse_t, log_t, over_t),
        ratio,
        log_ratio(of.student.sum, of.teacher.sum, plan.acc),
    )
