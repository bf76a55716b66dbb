"""The statistics of columns as all backends name them, :class:`fusedkd.kernels.Statistics`: what a
row of which this process has only some columns is made of.

A sum of 2^a, with a = (z - max) log2(e) / T, is named in units of 2^exponent, exponent = max
log2(e) / T with the factor as the kernels round it, so that a merge shifts it just as they do. Gaps
are named as they are, t T_s / T_t - s, not from the maxima.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fusedkd.kernels import Statistics as Named

from .numerics import LOG2E, exp_wide, lowest, reciprocal, scalar
from .row import through, within
from .stats import Side, Statistics

INFINITY = tl.constexpr(float("inf"))
COLUMNS = tl.constexpr(len(Named._fields))
# The student's sum is as good as the teacher's less their difference, entry by entry, where that is
# less than this share of it; and at a sharp peak of both the difference keeps the digits of all
# that is not the peak.
NEAR = tl.constexpr(0.0625)


class Label(NamedTuple):
    column: Any  # -1: none, or elsewhere
    id: Any  # the vocabulary's
    logit: Any  # the student's after the transform, 0 if it is elsewhere
    student: Any  # raw logits there, read before any gradient is written: that may go over them
    teacher: Any


class Inside(NamedTuple):
    """Of the student's logits at a sparse teacher's ids; fp64."""

    max: Any  # the largest; the lowest finite number if there is none
    sum: Any  # of e^((z - max) / T)
    own: Any  # of the same times (z - max), for the entropy
    unit: Any  # of e^(z - max)


@triton.jit
def no_label(plan: tl.constexpr):
    zero, none = scalar(0.0, plan.acc), tl.full([], -1, tl.int32)
    return Label(none, none, zero, zero, zero)


@triton.jit
def label_here(sides, labels, n, offset, span, shape, plan: tl.constexpr):
    """The row's label, for the one program that has its column."""
    found = no_label(plan)
    if plan.ce:
        number = tl.load(labels + n).to(tl.int32)
        column = number - offset
        here = (column >= 0) & (column < shape.columns) & within(column, span, shape, plan)
        student = tl.load(sides.student + column, mask=here, other=0.0).to(plan.acc)
        teacher = student
        if plan.teacher:
            teacher = tl.load(sides.teacher + column, mask=here, other=0.0).to(plan.acc)
        logit, _ = through(student, None, sides.of_student, plan.transformed_s)
        found = Label(
            tl.where(here, column, -1), number, tl.where(here, logit, 0.0), student, teacher
        )
    return found


@triton.jit
def _unit_scale(scales, plan: tl.constexpr):
    """log2(e) as stats.at_unit has it."""
    if plan.power == 0:
        scale = scalar(LOG2E, plan.acc).to(tl.float64)
    else:
        scale = scales.student.to(tl.float64) * plan.power
    return scale


@triton.jit
def _shift(student_max, teacher_max, scales):
    """The gap between the maxima, from which those of the kernels are counted."""
    return teacher_max * scales.ratio.to(tl.float64) - student_max


@triton.jit
def _times(sum, factor):
    """0 for a sum of nothing, whose maximum is no number."""
    return tl.where(sum == 0, 0.0, sum * factor)


@triton.jit
def _exponent(sum, exponent):
    return tl.where(sum == 0, -INFINITY, exponent)


@triton.jit
def named(of, label, offset, total, scales, plan: tl.constexpr):
    """Of merged statistics; all fp64 scalars."""
    s, t, zero = of.student, of.teacher, tl.full([], 0, tl.float64)
    scale_s, scale_t = scales.student.to(tl.float64), scales.teacher.to(tl.float64)
    max_s, max_t = s.max.to(tl.float64), t.max.to(tl.float64)
    sum_s, forward, reverse = s.sum, zero, zero
    if plan.forward:
        sum_s = tl.where(tl.abs(of.cross) < s.sum * NEAR, t.sum - of.cross, s.sum)
        forward = t.gap + _times(t.sum, _shift(max_s, max_t, scales))
    if plan.reverse:
        # the gradient wants the mean gap to the last digit, with the rounding of both sums
        mean_gap = s.gap * reciprocal(s.sum) + _shift(max_s, max_t, scales)
        reverse = tl.where(s.sum == 0, s.gap, mean_gap * sum_s)
    expected_s, expected_t = zero, zero
    if plan.metrics:
        expected_s = max_s + s.own * reciprocal(s.sum) * reciprocal(scale_s)
        expected_t = max_t + t.own * reciprocal(t.sum) * reciprocal(scale_t)
    mean = zero
    if plan.smoothing:
        mean = of.mean * reciprocal(total.to(tl.float64))
    return Named(
        student_max=_exponent(s.sum, max_s),
        student_exponent=_exponent(s.sum, max_s * scale_s),
        student_sum=sum_s,
        unit_exponent=_exponent(s.sum, max_s * _unit_scale(scales, plan)),
        unit_sum=of.unit,
        teacher_max=_exponent(t.sum, max_t),
        teacher_exponent=_exponent(t.sum, max_t * scale_t),
        teacher_sum=t.sum,
        outside_max=zero,
        outside_exponent=zero,
        outside_sum=zero,
        inside_exponent=zero,
        inside_sum=zero,
        forward=forward,
        reverse=reverse,
        teacher_absent=zero,
        student_absent=zero,
        only_teacher=zero,
        only_student=zero,
        student_expected=tl.where(s.sum == 0, 0.0, expected_s),
        teacher_expected=tl.where(t.sum == 0, 0.0, expected_t),
        mean=mean,
        label=label.logit.to(tl.float64),
        student_top=s.at.to(tl.float64) + offset,
        teacher_top=t.at.to(tl.float64) + offset,
        teacher_at_top=zero,
        student_min=zero,
        teacher_min=zero,
    )


@triton.jit
def named_apart(of, ids, at, logit, offset, total, inverse, plan: tl.constexpr):
    """Of columns of which a sparse teacher has some: ``of`` all others, and ``ids``. The units are
    as exact as the ids' exponentials, in fp64."""
    out, zero = of.student, tl.full([], 0, tl.float64)
    wide, max_out = inverse.to(tl.float64), out.max.to(tl.float64)
    scale, largest = wide * LOG2E, tl.maximum(max_out, ids.max)
    low_out, low_ids = max_out - largest, ids.max - largest
    keep_out, keep_ids = exp_wide(low_out * wide), exp_wide(low_ids * wide)
    sum_out, sum_ids = out.sum * keep_out, ids.sum * keep_ids
    sum = sum_out + sum_ids
    unit, expected, mean = zero, zero, zero
    if plan.unit:
        unit = of.unit * exp_wide(low_out) + ids.unit * exp_wide(low_ids)
    if plan.metrics:
        own = out.own * keep_out * reciprocal(scale) + ids.own * keep_ids
        own += _times(sum_out, low_out) + _times(sum_ids, low_ids)
        expected = tl.where(sum == 0, 0.0, largest + own * reciprocal(sum))
    if plan.smoothing:
        mean = of.mean * reciprocal(total.to(tl.float64))
    return Named(
        student_max=_exponent(sum, largest),
        student_exponent=_exponent(sum, largest * scale),
        student_sum=sum,
        unit_exponent=_exponent(sum, largest * LOG2E),
        unit_sum=unit,
        teacher_max=zero,
        teacher_exponent=zero,
        teacher_sum=zero,
        outside_max=_exponent(out.sum, max_out),
        outside_exponent=_exponent(out.sum, max_out * scale),
        outside_sum=out.sum,
        inside_exponent=_exponent(ids.sum, ids.max * scale),
        inside_sum=ids.sum,
        forward=zero,
        reverse=zero,
        teacher_absent=zero,
        student_absent=zero,
        only_teacher=zero,
        only_student=zero,
        student_expected=expected,
        teacher_expected=zero,
        mean=mean,
        label=logit.to(tl.float64),
        student_top=at.to(tl.float64) + offset,
        teacher_top=zero,
        teacher_at_top=zero,
        student_min=zero,
        teacher_min=zero,
    )


@triton.jit
def leave_named(at, fields):
    for i in tl.static_range(len(fields)):
        tl.store(at + i, fields[i])


@triton.jit
def leave_nothing(at):
    """Of a row that does not count."""
    column = tl.arange(0, 32)
    tl.store(at + column, tl.full([32], 0, tl.float64), mask=column < COLUMNS)


@triton.jit
def recall_named(at):
    return Named(
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4),
        tl.load(at + 5), tl.load(at + 6), tl.load(at + 7), tl.load(at + 8), tl.load(at + 9),
        tl.load(at + 10), tl.load(at + 11), tl.load(at + 12), tl.load(at + 13), tl.load(at + 14),
        tl.load(at + 15), tl.load(at + 16), tl.load(at + 17), tl.load(at + 18), tl.load(at + 19),
        tl.load(at + 20), tl.load(at + 21), tl.load(at + 22), tl.load(at + 23), tl.load(at + 24),
        tl.load(at + 25), tl.load(at + 26), tl.load(at + 27),
    )  # fmt: skip


@triton.jit
def _own(sum, expected, max, scale):
    return _times(sum, (expected - max) * scale.to(tl.float64))


@triton.jit
def unnamed(of, total, scales, plan: tl.constexpr):
    """What :func:`named` was of, of whole rows."""
    low = lowest(plan.acc).to(tl.float64)
    max_s, max_t = tl.maximum(of.student_max, low), tl.maximum(of.teacher_max, low)
    shift, zero = _shift(max_s, max_t, scales), tl.full([], 0, tl.float64)
    own_s, own_t = zero, zero
    if plan.metrics:
        own_s = _own(of.student_sum, of.student_expected, max_s, scales.student)
        own_t = _own(of.teacher_sum, of.teacher_expected, max_t, scales.teacher)
    return Statistics(
        Side(max_s.to(plan.acc), of.student_sum, of.reverse - _times(of.student_sum, shift), own_s,
             of.student_top.to(tl.int32)),
        Side(max_t.to(plan.acc), of.teacher_sum, of.forward - _times(of.teacher_sum, shift), own_t,
             of.teacher_top.to(tl.int32)),
        of.unit_sum, of.mean * total, of.teacher_sum - of.student_sum, zero, zero,
    )  # fmt: skip
