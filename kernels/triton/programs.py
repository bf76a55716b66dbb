"""The kernels that are launched, made of sweeps (row.py) and steps (stats.py, sweeps.py).

``row_kernel`` comes in three structures:

* stage "whole": one program per row, everything in one launch. For many rows.
* stages "statistics", ["middle",] "gradient": several programs per row, for few rows of a large
  vocabulary. Each leaves the statistics of its piece in a scratch row; whoever needs the whole
  merges the pieces itself, in a fixed order. No atomics and no waiting for one another, so the
  order of the launches is the only order there is.
* stage "joint": those programs in one launch, which wait for one another at a counter of their row.
  Programs start in the order of their ids, so of all rows that have begun only the last can be
  incomplete: the others' programs end and make room. It wants room for ``pieces`` programs.

Where a row's columns lie on the ranks of a group (plan.part) the three stages are what one of them
does of it, and what they leave and find are the statistics that all backends name (named.py).

No argument is specialised on: neither a size of 1, nor a multiple of 16, nor where a pointer lies
compiles a kernel anew. (An annotation alone does not stop Triton from specialising an integer.) So
what is compiled ahead of time in benchmarks/resources.py is what is launched. Hyper-parameters
travel as fp64 and are rounded once, to the accumulation type.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .named import (
    COLUMNS,
    Label,
    label_here,
    leave_named,
    leave_nothing,
    named,
    no_label,
    recall_named,
    unnamed,
)
from .numerics import LN2, LOG2E, log_sum, reciprocal, rounded, scalar
from .row import (
    INFINITY,
    Shape,
    Sides,
    Span,
    Transform,
    cut,
    edge_columns,
    lines_behind,
    pointers,
    row_start,
    share,
    sweep,
    sweep_columns,
    through,
    whole,
    within,
    zeros,
)
from .stats import Scales, Side, Statistics, added, merged, nothing_seen, observe, paired, resolved
from .sweeps import (
    Comparing,
    Gradient,
    Numbers,
    compare,
    compare_carefully,
    nothing_summed,
    slope,
    slope_carefully,
    slope_sharply,
    write,
    write_carefully,
    write_sharply,
)

POINTERS = (
    *("student", "teacher", "grad", "labels", "row_scale"),
    *("loss", "metrics", "partial", "sums", "arrived"),
)
SIZES = (
    *("length", "s_b", "s_t", "t_b", "t_t", "g_b", "g_t"),
    *("vocab", "columns", "offset", "total"),
)


class Weights(NamedTuple):
    """Of a row's terms."""

    row: Any
    kd: Any
    ce: Any
    smoothing: Any
    z: Any


class Shared(NamedTuple):
    """What the programs of a row tell one another."""

    partial: Any
    sums: Any
    arrived: Any  # two counters a row, 0 at the start


class Compared(NamedTuple):
    """What a row's divergence comes to."""

    value: Any
    sum_grad: Any
    ordinary: Any  # whether the lean way is right
    forwards: Any  # which way the last sweep goes: against the one before it


@triton.jit
def seven(n_0, n_1, n_2, n_3, n_4, n_5, n_6, ACC: tl.constexpr):
    return (scalar(n_0, ACC), scalar(n_1, ACC), scalar(n_2, ACC), scalar(n_3, ACC),
            scalar(n_4, ACC), scalar(n_5, ACC), scalar(n_6, ACC))  # fmt: skip


@triton.jit
def parameters(
    a, b, own_0, own_1, own_2, own_3, own_4, own_5, own_6, ACC: tl.constexpr, plan: tl.constexpr
):
    """What the divergence's function in pointwise.py takes, or one of one's own."""
    if plan.own:
        found = seven(own_0, own_1, own_2, own_3, own_4, own_5, own_6, ACC)
    else:
        found = (scalar(a, ACC), scalar(b, ACC))
    return found


@triton.jit
def _shape(sides, grad, columns, plan: tl.constexpr):
    """By the tensor with the smallest items: its boundaries are everybody's."""
    if plan.aligned_to == "student":
        shape = cut(sides.student, columns, plan)
    elif plan.aligned_to == "teacher":
        shape = cut(sides.teacher, columns, plan)
    else:
        shape = cut(grad, columns, plan)
    return shape


@triton.jit
def _label(sides, labels, n, plan: tl.constexpr):
    found = no_label(plan)
    if plan.ce:
        column = tl.load(labels + n).to(tl.int32)
        student = tl.load(sides.student + column).to(plan.acc)
        teacher = student
        if plan.teacher:
            teacher = tl.load(sides.teacher + column).to(plan.acc)
        found = Label(column, column, found.logit, student, teacher)
    return found


# --------------------------------------------------------------------------------------------------
# loss and metrics


@triton.jit
def _label_logit(label, sides, plan: tl.constexpr):
    if plan.part:
        z = label.logit
    else:
        z, _ = through(label.student, None, sides.of_student, plan.transformed_s)
    return z


@triton.jit
def _cross_entropy(of, label, sides, weights, total, plan: tl.constexpr):
    z = _label_logit(label, sides, plan)
    log_unit = log_sum(of.unit, plan.acc)
    ce = (of.student.max - z) + log_unit
    if plan.smoothing:
        mean = (of.mean / total.to(tl.float32)).to(plan.acc)
        soft = (of.student.max - mean) + log_unit
        ce = (1.0 - weights.smoothing) * ce + weights.smoothing * soft
    return ce


@triton.jit
def of_unit(weights, log_sum, plan: tl.constexpr):
    """What the softmax at T = 1 is multiplied with in the gradient; ``log_sum`` is its own."""
    found = weights.row * weights.ce
    if plan.z:
        found += weights.row * (2.0 * weights.z * log_sum)
    return found


@triton.jit
def _log_sum(of, plan: tl.constexpr):
    """Of the student at T = 1."""
    return of.student.max + log_sum(of.unit, plan.acc)


@triton.jit
def _entropy(side, softmax, plan: tl.constexpr):
    return softmax.log_sum - (side.own * reciprocal(side.sum) * LN2).to(plan.acc)


@triton.jit
def _report(loss, metrics, n, of, pair, value, label, sides, weights, total, plan: tl.constexpr):
    """The row's loss, and its metrics in the order of spec.METRIC_COLUMNS."""
    ce = scalar(float("nan"), plan.acc)
    if plan.ce:
        ce = _cross_entropy(of, label, sides, weights, total, plan)
    sum_of_terms = scalar(0.0, plan.acc)
    if plan.kd:
        sum_of_terms += tl.where(weights.kd == 0, 0.0, weights.kd * value)
    if plan.ce:
        sum_of_terms += tl.where(weights.ce == 0, 0.0, weights.ce * ce)
    if plan.z:
        lse = _log_sum(of, plan)
        sum_of_terms += weights.z * lse * lse
    tl.store(loss + n, weights.row * sum_of_terms)
    if plan.metrics:
        out, unknown = metrics + n.to(tl.int64) * 8, scalar(float("nan"), plan.acc)
        tl.store(out, value)
        tl.store(out + 1, ce)
        tl.store(out + 2, _entropy(of.teacher, pair.teacher, plan))
        tl.store(out + 3, _entropy(of.student, pair.student, plan))
        at_s, at_t = of.student.at, of.teacher.at
        tl.store(out + 4, (at_s == at_t).to(plan.acc))
        tl.store(out + 5, (at_s == label.id).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 6, (at_t == label.id).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 7, unknown)


@triton.jit
def ruled(weights, value, entropy_t, entropy_s, label, top_t, top_s, by, plan: tl.constexpr):
    """With the row rule's factor on the divergence, NaN where that is. Rounding does not take its
    numbers out of their ranges."""
    zero, one = scalar(0.0, plan.acc), scalar(1.0, plan.acc)
    factor = plan.rule(
        tl.maximum(value, zero), tl.maximum(entropy_t, zero), tl.maximum(entropy_s, zero),
        tl.minimum(label, zero), tl.minimum(top_t, one), tl.minimum(top_s, one), by,
    )  # fmt: skip
    factor = tl.where(value != value, value, factor)
    return Weights(weights.row, weights.kd * factor, weights.ce, weights.smoothing, weights.z)


@triton.jit
def _ruled(weights, of, pair, value, label, sides, by, plan: tl.constexpr):
    s, t = pair.student, pair.teacher
    log_q = scalar(0.0, plan.acc)
    if plan.ce:
        z = _label_logit(label, sides, plan)
        log_q = (z - of.student.max) * s.inverse_t - s.log_sum
    entropy_t, entropy_s = _entropy(of.teacher, t, plan), _entropy(of.student, s, plan)
    return ruled(weights, value, entropy_t, entropy_s, log_q, t.over_sum, s.over_sum, by, plan)


@triton.jit
def drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan: tl.constexpr):
    """A row that does not count."""
    if leader:
        tl.store(loss + n, scalar(0.0, plan.acc))
        if metrics is not None:
            field = tl.arange(0, 8)
            nothing = tl.full([8], 0, plan.acc)
            tl.store(metrics + n.to(tl.int64) * 8 + field, nothing)
    if grad is not None:
        zeros(grad, shape, span, vocab if leader else columns, columns, plan)


# --------------------------------------------------------------------------------------------------
# a row in pieces: what one launch leaves for the next, statistics and the label's logits (the same
# in all) as (PARTIALS, pieces), and sums as (2, pieces); config.PARTIALS


@triton.jit
def _flat(of, label):
    s, t = of.student, of.teacher
    return (s.max, s.sum, s.gap, s.own, s.at, t.max, t.sum, t.gap, t.own, t.at,
            of.unit, of.mean, of.cross, of.power_s, of.power_t,
            label.student, label.teacher)  # fmt: skip


@triton.jit
def leave(partial, n, piece, fields, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (len(fields) * plan.pieces) + piece
    for i in tl.static_range(len(fields)):
        tl.store(at + i * plan.pieces, fields[i].to(tl.float64))


@triton.jit
def pieces(partial, n, field: tl.constexpr, of: tl.constexpr, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (of * plan.pieces) + field * plan.pieces
    return tl.load(at + tl.arange(0, plan.pieces))


@triton.jit
def left(partial, n, piece):
    """Where a program leaves the named statistics of its piece of a part."""
    return partial + (piece.to(tl.int64) * tl.num_programs(0) + n) * COLUMNS


@triton.jit
def _side(partial, n, first: tl.constexpr, plan: tl.constexpr):
    return Side(
        pieces(partial, n, first, 17, plan).to(plan.acc), pieces(partial, n, first + 1, 17, plan),
        pieces(partial, n, first + 2, 17, plan), pieces(partial, n, first + 3, 17, plan),
        pieces(partial, n, first + 4, 17, plan).to(tl.int32),
    )  # fmt: skip


@triton.jit
def _recall(partial, n, labels, plan: tl.constexpr):
    of = Statistics(
        _side(partial, n, 0, plan), _side(partial, n, 5, plan),
        pieces(partial, n, 10, 17, plan), pieces(partial, n, 11, 17, plan),
        pieces(partial, n, 12, 17, plan), pieces(partial, n, 13, 17, plan),
        pieces(partial, n, 14, 17, plan),
    )  # fmt: skip
    at = partial + n.to(tl.int64) * (17 * plan.pieces)
    column = tl.full([], -1, tl.int32)
    if plan.ce:
        column = tl.load(labels + n).to(tl.int32)
    student = tl.load(at + 15 * plan.pieces).to(plan.acc)
    teacher = tl.load(at + 16 * plan.pieces).to(plan.acc)
    return of, Label(column, column, student, student, teacher)


# --------------------------------------------------------------------------------------------------
# the divergence, and the gradient


@triton.jit
def _arrive(arrived):
    tl.debug_barrier()  # after all that the program's threads have written
    return tl.atomic_add(arrived, 1, sem="acq_rel") + 1


@triton.jit
def _meet(arrived, plan: tl.constexpr):
    """Wait until all pieces of a row have come here."""
    count = _arrive(arrived)
    while count < plan.pieces:
        count = tl.atomic_add(arrived, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def leave_sums(sums, n, piece, first, second, plan: tl.constexpr):
    at = sums + n.to(tl.int64) * (2 * plan.pieces) + piece
    tl.store(at, first)
    tl.store(at + plan.pieces, second)


@triton.jit
def _recall_sums(sums, n, plan: tl.constexpr):
    if plan.part:
        at = sums + n.to(tl.int64) * 2
        first, second = tl.load(at), tl.load(at + 1)
    else:
        first, second = pieces(sums, n, 0, 2, plan), pieces(sums, n, 1, 2, plan)
        first, second = tl.sum(first, axis=0), tl.sum(second, axis=0)
    return first, second


@triton.jit
def _swept(STEP: tl.constexpr, shared, n, piece, sides, shape, span, by, unroll: tl.constexpr,
           plan: tl.constexpr):  # fmt: skip
    """The sums of a row over a sweep of its own; the stage "middle" leaves those of its piece."""
    if plan.stage == "gradient":
        first, second = _recall_sums(shared.sums, n, plan)
    else:
        swept = nothing_summed(plan)
        if unroll:
            swept = sweep(STEP, swept, sides, shape, span, by, True, "evict_last", unroll, plan)
        else:
            swept = sweep_columns(STEP, swept, sides, shape, span, by, plan)
        first, second = added(swept.first), added(swept.second)
        if plan.stage != "whole":
            leave_sums(shared.sums, n, piece, first, second, plan)
        if plan.stage == "joint":
            _meet(shared.arrived + 2 * n + 1, plan)
            first, second = _recall_sums(shared.sums, n, plan)
    return first.to(plan.acc), second.to(plan.acc)


@triton.jit
def weighted(value, numbers, plan: tl.constexpr):
    """What a divergence's lean form says, as the divergence."""
    if plan.weighted:
        value = value * numbers.weight + numbers.constant
    return value


@triton.jit
def _compared(of, pair, shared, n, piece, sides, shape, span, numbers, plan: tl.constexpr):
    zero = scalar(0.0, plan.acc)
    value, sum_grad, ordinary, forwards = zero, zero, True, True
    careful: tl.constexpr = 0 if plan.powers or plan.doubted else 1
    a, b = numbers.a, numbers.b
    if plan.teacher and plan.closed:
        value, sum_grad = plan.form.closed(of, pair, a, b, plan)
        value = weighted(value, numbers, plan)
        ordinary = (tl.abs(value) < INFINITY) & (tl.abs(sum_grad) < INFINITY)
        if plan.terms and not plan.late:
            if ordinary:
                by = Comparing(pair, plan.form.constants(of, pair, a, b, plan), numbers)
                first, second = _swept(
                    compare, shared, n, piece, sides, shape, span, by, plan.unroll_terms, plan
                )
                value, sum_grad = plan.form.summed(first, second, sum_grad, a, b)
                value = weighted(value, numbers, plan)
        else:
            forwards = False
        if not ordinary:
            by = Comparing(pair, (pair.ratio,), numbers)
            value, sum_grad = _swept(
                compare_carefully, shared, n, piece, sides, shape, span, by, careful, plan
            )
    elif plan.teacher and plan.exact:
        by = Comparing(pair, (pair.ratio,), numbers)
        value, sum_grad = _swept(
            compare_carefully, shared, n, piece, sides, shape, span, by, 1, plan
        )
    elif plan.teacher:
        by = Comparing(pair, plan.form.constants(of, pair, a, b, plan), numbers)
        first, second = _swept(
            compare, shared, n, piece, sides, shape, span, by, plan.unroll_terms, plan
        )
        value, sum_grad = plan.form.summed(first, second, sum_grad, a, b)
        if plan.doubted:
            ordinary = (tl.abs(value) < INFINITY) & (tl.abs(sum_grad) < INFINITY)
            if not ordinary:
                again = Comparing(pair, (pair.ratio,), numbers)
                value, sum_grad = _swept(
                    compare_carefully, shared, n, piece, sides, shape, span, again, careful, plan
                )
    if plan.teacher:  # NaN where a logit was
        unsound = pair.student.log_sum - pair.student.log_sum
        unsound += pair.teacher.log_sum - pair.teacher.log_sum
        value, sum_grad = value + unsound, sum_grad + unsound
    return Compared(value, sum_grad, ordinary, forwards)


@triton.jit
def _factors(
    grad, shape, of, pair, compared, weights, total, numbers, plan: tl.constexpr
):  # fmt: skip
    kd = weights.row * weights.kd * pair.student.inverse_t
    unit, smooth, hot = weights.row, weights.row, weights.row
    if plan.unit:
        by_unit = of_unit(weights, _log_sum(of, plan) if plan.z else 0.0, plan)
        unit = by_unit * reciprocal(of.unit).to(plan.acc)
    if plan.ce:
        of_ce = weights.row * weights.ce
        smooth = of_ce * weights.smoothing / total.to(plan.acc)
        hot = of_ce * (1.0 - weights.smoothing)
    constants, terms = (kd,), (kd,)
    a, b = numbers.a, numbers.b
    if plan.kd and not plan.exact:
        weighted_kd = kd * numbers.weight if plan.weighted else kd
        constants = plan.form.factors(of, pair, compared.sum_grad, weighted_kd, a, b, plan)
    if plan.late or plan.sharp:
        terms = plan.form.constants(of, pair, a, b, plan)
    return Gradient(
        grad, shape, pair, constants, terms, compared.sum_grad, kd, unit, smooth, hot, numbers
    )


@triton.jit
def _write_label(label, sides, span, shape, by, SLOPE: tl.constexpr, plan: tl.constexpr):
    """The label's entry, over what the sweep wrote there without looking."""
    owned = label.column >= 0 if plan.part else within(label.column, span, shape, plan)
    if owned:
        z_s, raw = through(label.student, None, sides.of_student, plan.transformed_s)
        z_t, _ = through(label.teacher, None, sides.of_teacher, plan.transformed_t)
        g = (SLOPE(z_s, z_t, by, plan) - by.hot) * (raw if plan.transformed_s else 1.0)
        g = tl.where(z_s == -INFINITY, 0.0, g)
        tl.debug_barrier()
        tl.store(by.grad + label.column, rounded(g, by.grad.dtype.element_ty))


@triton.jit
def _gradient_leanly(label, shared, n, piece, sides, span, shape, by, compared, plan: tl.constexpr):
    """(value, whether this program knows it): the divergence's, if that is summed here."""
    value, back, known = compared.value, not compared.forwards, piece == 0
    if plan.late:
        swept = nothing_summed(plan)
        swept = sweep(
            write, swept, sides, shape, span, by, back, "evict_first", plan.unroll_slope, plan
        )
        first, second = added(swept.first), added(swept.second)
        if plan.stage == "joint":  # whoever comes last has them all
            leave_sums(shared.sums, n, piece, first, second, plan)
            known = _arrive(shared.arrived + 2 * n + 1) == plan.pieces
            tl.debug_barrier()
            if known:
                first, second = _recall_sums(shared.sums, n, plan)
        first, second = first.to(plan.acc), second.to(plan.acc)
        a, b = by.numbers.a, by.numbers.b
        value, _ = plan.form.summed(first, second, compared.sum_grad, a, b)
        value = weighted(value, by.numbers, plan)
        value += compared.sum_grad - compared.sum_grad
    else:
        nothing = tl.full([], 0, tl.int32)  # it carries nothing
        sweep(write, nothing, sides, shape, span, by, back, "evict_first", plan.unroll_slope, plan)
    if plan.ce:
        _write_label(label, sides, span, shape, by, slope, plan)
    return value, known


@triton.jit
def _gradient_otherwise(
    STEP: tl.constexpr, SLOPE: tl.constexpr, label, sides, span, shape, by, plan: tl.constexpr
):
    nothing = tl.full([], 0, tl.int32)
    if plan.powers == 0 and not plan.doubted:
        sweep(STEP, nothing, sides, shape, span, by, False, "evict_first", 1, plan)
    else:
        sweep_columns(STEP, nothing, sides, shape, span, by, plan)
    if plan.ce:
        _write_label(label, sides, span, shape, by, SLOPE, plan)


@triton.jit
def _gradient(label, shared, n, piece, sides, span, shape, by, compared, plan: tl.constexpr):
    value, known = compared.value, piece == 0
    if plan.exact:
        _gradient_otherwise(write_carefully, slope_carefully, label, sides, span, shape, by, plan)
    elif (plan.closed or plan.doubted) and plan.teacher:
        if compared.ordinary:
            value, known = _gradient_leanly(
                label, shared, n, piece, sides, span, shape, by, compared, plan
            )
        else:
            _gradient_otherwise(
                write_carefully, slope_carefully, label, sides, span, shape, by, plan
            )
    elif plan.sharp:
        if by.pair.student.over_sum > 0.5:  # the largest q
            _gradient_otherwise(write_sharply, slope_sharply, label, sides, span, shape, by, plan)
        else:
            value, known = _gradient_leanly(
                label, shared, n, piece, sides, span, shape, by, compared, plan
            )
    else:
        value, known = _gradient_leanly(
            label, shared, n, piece, sides, span, shape, by, compared, plan
        )
    return value, known


# --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def row_kernel(
    student, teacher, grad,  # (B, T, C), (B, T, C'), (B, T, C) or None
    labels, row_scale, loss, metrics,  # (N,) or None, (N,), (N,), (N, 8) or None; N = B T
    # fp64 (N, PARTIALS, pieces), (N, 2, pieces), or None in the stage "whole"; of a part of a row
    # named statistics, (pieces, N, COLUMNS) that are left, (N, COLUMNS) and (N, 2) that are found
    partial, sums,
    arrived,  # int32 (N, 2) of 0, or None but in the stage "joint"
    length: tl.int32, s_b: tl.int64, s_t: tl.int64, t_b: tl.int64, t_t: tl.int64,
    g_b: tl.int64, g_t: tl.int64, vocab: tl.int32, columns: tl.int32,
    offset: tl.int32, total: tl.int32,  # the first column's id, and the whole rows' vocab
    inverse_s: tl.float64, inverse_t: tl.float64,  # 1 / temperature
    ratio: tl.float64,  # the student's temperature over the teacher's
    s_scale: tl.float64, s_cap: tl.float64, t_scale: tl.float64, t_cap: tl.float64,
    kd_scale: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    z_weight: tl.float64,
    a: tl.float64, b: tl.float64,  # parameters of the divergence, ...
    weight: tl.float64, constant: tl.float64,  # ... which is that of a built-in one, and this more
    own_0: tl.float64, own_1: tl.float64, own_2: tl.float64, own_3: tl.float64,  # or of one's own
    own_4: tl.float64, own_5: tl.float64, own_6: tl.float64,
    rule_0: tl.float64, rule_1: tl.float64, rule_2: tl.float64, rule_3: tl.float64,  # of a row rule
    rule_4: tl.float64, rule_5: tl.float64, rule_6: tl.float64,
    plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces), and (N pieces,) in the stage "joint"."""
    acc: tl.constexpr = plan.acc
    n, piece = tl.program_id(0), tl.program_id(1)
    if plan.stage == "joint":
        n, piece = n // plan.pieces, n % plan.pieces
    shared = Shared(partial, sums, arrived)
    if grad is not None:
        grad = row_start(grad, n, length, g_b, g_t)
    sides = Sides(
        row_start(student, n, length, s_b, s_t),
        row_start(teacher, n, length, t_b, t_t),
        Transform(scalar(s_scale, acc), scalar(s_cap, acc)),
        Transform(scalar(t_scale, acc), scalar(t_cap, acc)),
    )
    shape = _shape(sides, grad, vocab, plan)
    if plan.stage == "whole":
        span, leader = whole(shape), True
    else:
        span, leader = share(shape, piece, plan), piece == 0
    scale = tl.load(row_scale + n)
    if scale == 0:
        if plan.part and plan.stage == "statistics":
            leave_nothing(left(partial, n, piece))
        if plan.stage != "statistics" and plan.stage != "middle":
            drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan)
    else:
        first, second = scalar(a, acc), scalar(b, acc)
        own = parameters(a, b, own_0, own_1, own_2, own_3, own_4, own_5, own_6, acc, plan)
        numbers = Numbers(first, second, own, scalar(weight, acc), scalar(constant, acc))
        if plan.emitted:
            numbers = Numbers(own, second, own, numbers.weight, numbers.constant)
        of_s, of_t, over = scalar(inverse_s, acc), scalar(inverse_t, acc), scalar(ratio, acc)
        scales = Scales(of_s * LOG2E, of_t * LOG2E, over, first, second)
        if plan.stage != "middle" and plan.stage != "gradient":
            if plan.part:
                label = label_here(sides, labels, n, offset, span, shape, plan)
            else:
                label = _label(sides, labels, n, plan)
            start = nothing_seen(plan)
            of = sweep(
                observe, start, sides, shape, span, scales, False, "evict_last", plan.unroll, plan
            )
            of = merged(resolved(of, sides, shape, plan), scales, plan)
            if plan.part:
                fields = named(of, label, offset, total, scales, plan)
                leave_named(left(partial, n, piece), fields)
            elif plan.stage != "whole":
                leave(partial, n, piece, _flat(of, label), plan)
            if plan.stage == "joint":
                _meet(arrived + 2 * n, plan)
        if plan.stage != "whole" and plan.stage != "statistics":
            if plan.part:
                fields = recall_named(partial + n.to(tl.int64) * COLUMNS)
                of = unnamed(fields, total, scales, plan)
                label = label_here(sides, labels, n, offset, span, shape, plan)
                # of all pieces; and nobody has begun to write
                logit = fields.label.to(acc)
                label = Label(label.column, label.id, logit, label.student, label.teacher)
                tl.debug_barrier()
            else:
                of, label = _recall(partial, n, labels, plan)
                of = merged(of, scales, plan)
        if plan.stage != "statistics":
            pair = paired(of, of_s, of_t, over, plan)
            compared = _compared(of, pair, shared, n, piece, sides, shape, span, numbers, plan)
            if plan.stage != "middle":
                weights = Weights(scale, scalar(kd_scale, acc), scalar(ce_weight, acc),
                                  scalar(smoothing, acc), scalar(z_weight, acc))  # fmt: skip
                if plan.rule is not None:
                    rule = seven(rule_0, rule_1, rule_2, rule_3, rule_4, rule_5, rule_6, acc)
                    weights = _ruled(weights, of, pair, compared.value, label, sides, rule, plan)
                if leader and not plan.late:
                    _report(loss, metrics, n, of, pair, compared.value, label, sides, weights,
                            total, plan)  # fmt: skip
                if grad is not None:
                    by = _factors(grad, shape, of, pair, compared, weights, total, numbers,
                                  plan)  # fmt: skip
                    value, known = _gradient(label, shared, n, piece, sides, span, shape, by,
                                             compared, plan)  # fmt: skip
                    if plan.late and known:
                        _report(loss, metrics, n, of, pair, value, label, sides, weights, total,
                                plan)  # fmt: skip
                    beyond = vocab if leader else columns
                    zeros(grad, shape, Span(0, 0, 0, 0), beyond, columns, plan)


@triton.jit(
    do_not_specialize=("length", "x_b", "x_t", "columns", "factor_step"),
    do_not_specialize_on_alignment=("x", "factor"),
)
def scale_kernel(
    x,  # (B, T, C)
    factor,  # 0-d or (N,)
    length: tl.int32, x_b: tl.int64, x_t: tl.int64, columns: tl.int64,
    factor_step: tl.int64,  # 0 or 1
    plan: tl.constexpr,
):  # fmt: skip
    """x *= factor; where that is 1 nothing is read but the factor. Grid (N, programs per row)."""
    n, first = tl.program_id(0), tl.program_id(1)
    by = tl.load(factor + n * factor_step).to(plan.acc)
    if by != 1:
        row = row_start(x, n, length, x_b, x_t)
        wide = cut(row, columns, plan)
        # int32, as in the other sweeps: with an int64 tile Triton sees no 16-byte access.
        size = tl.full([], plan.unroll * plan.lanes * plan.width, tl.int64)
        for tile in range(first, tl.cast(wide.tiles, tl.int32), tl.num_programs(1)):
            at = pointers(row + tile * size, wide, 0, plan.unroll, plan)
            tl.store(at, rounded(tl.load(at).to(plan.acc) * by, x.dtype.element_ty))
        if first == 0:
            behind = Shape(wide.head, 0, wide.lines, wide.end, columns)
            mask = lines_behind(behind, 0, plan.unroll, plan)
            at = pointers(row + wide.tiles * size, behind, 0, plan.unroll, plan)
            value = tl.load(at, mask=mask).to(plan.acc) * by
            tl.store(at, rounded(value, x.dtype.element_ty), mask=mask)
            at, mask = edge_columns(wide, columns - wide.end + wide.head, plan)
            value = tl.load(row + at, mask=mask).to(plan.acc) * by
            tl.store(row + at, rounded(value, x.dtype.element_ty), mask=mask)
