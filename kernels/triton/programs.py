"""The kernels that are launched, made of the sweeps in sweeps.py.

``row_kernel`` comes in two structures:

* stage "whole": one program per row, everything in one launch. For many rows.
* stages "statistics", ["middle",] "gradient": several programs per row, for few rows of a large
  vocabulary. Each leaves the statistics of its piece in a scratch row; whoever needs the whole
  merges the pieces itself, in a fixed order. No atomics and no waiting for one another, so the
  order of the launches is the only order there is.

No argument is specialised on: neither a size of 1, nor a multiple of 16, nor where a pointer lies
compiles a kernel anew. (An annotation alone does not stop Triton from specialising an integer.) So
what is compiled ahead of time in benchmarks/resources.py is what is launched. Hyper-parameters
travel as fp64 and are rounded once, to the accumulation type.
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E, log_ratio, log_sum, reciprocal, rounded, scalar, transform
from .sweeps import (
    INFINITY,
    _edge_columns,
    _geometry,
    _merge,
    _row,
    _tile,
    gradient,
    middle,
    statistics,
    zeros,
)

POINTERS = (
    *("student", "teacher", "grad", "labels", "row_scale"),
    *("loss", "metrics", "partial", "sums"),
)
SIZES = ("length", "s_b", "s_t", "t_b", "t_t", "g_b", "g_t", "vocab", "columns", "power")


@triton.jit
def _shape(row, grad, columns, plan: tl.constexpr):
    """The geometry, by the tensor with the smallest items: its boundaries are everybody's."""
    if plan.lead == "student":
        shape = _geometry(row[0], columns, plan)
    elif plan.lead == "teacher":
        shape = _geometry(row[1], columns, plan)
    else:
        shape = _geometry(grad, columns, plan)
    return shape


@triton.jit
def _norm(state, inverse_s, inverse_t, plan: tl.constexpr):
    """What turns a logit into a probability (sweeps._pair)."""
    log_s, log_t = log_sum(state[2], plan.acc), log_sum(state[3], plan.acc)
    over_s, over_t = reciprocal(state[2]).to(plan.acc), reciprocal(state[3]).to(plan.acc)
    k_s, k_t = inverse_s * LOG2E, inverse_t * LOG2E
    ratio = log_ratio(state[2], state[3], plan.acc)
    return (state[0], state[1], k_s, k_t, inverse_s, inverse_t, log_s, log_t, over_s, over_t,
            ratio)  # fmt: skip


@triton.jit
def _mean(total, weight, plan: tl.constexpr):
    """total / weight, from units of log2 to nats."""
    return (total * reciprocal(weight) * LN2).to(plan.acc)


@triton.jit
def _closed(state, norm, a_b, COMBINE: tl.constexpr, plan: tl.constexpr):
    """(value, sum of grad, whether they hold).

    The value takes log(A / B), not log A - log B: exactly 0 for p = q. The sum of grad belongs to
    the gaps as the gradient sweep will see them, with both logs rounded: else grad - q sum grad
    keeps their rounding errors, which should cancel.
    """
    forward, reverse = _mean(state[6], state[3], plan), _mean(state[7], state[2], plan)
    exact, seen = norm[10], norm[6] - norm[7]
    value, _ = COMBINE(forward + exact, reverse - exact, a_b[0], a_b[1])
    _, slope = COMBINE(forward + seen, reverse - seen, a_b[0], a_b[1])
    return value, slope, tl.abs(value) < INFINITY


@triton.jit
def _at_label(student, labels, n, bend, plan: tl.constexpr):
    """The student's logit at the label, read before any gradient is written: that may go over the
    logits, by another program of the row, or by a warp that is ahead (the statistics' barriers lie
    between this and that)."""
    z = scalar(0.0, plan.acc)
    if plan.ce:
        z = tl.load(student + tl.load(labels + n)).to(plan.acc)
        if plan.bent_s:
            z, _ = transform(z, bend[0], bend[1])
    return z


@triton.jit
def _cross_entropy(state, z, smoothing, plan: tl.constexpr):
    log_one = log_sum(state[4], plan.acc)
    hard, soft = (state[0] - z) + log_one, (state[0] - state[5].to(plan.acc)) + log_one
    # Without smoothing the mean plays no part: it is -inf in a row with a masked entry.
    return tl.where(smoothing == 0, hard, (1.0 - smoothing) * hard + smoothing * soft)


@triton.jit
def _write(loss, metrics, n, state, norm, value, ce, label, weights, plan: tl.constexpr):
    """The row's loss, and its metrics in the order of spec.METRIC_COLUMNS."""
    scale, kd_scale, ce_weight, _ = weights
    kd_term = tl.where(kd_scale == 0, 0.0, kd_scale * value)
    ce_term = tl.where(ce_weight == 0, 0.0, ce_weight * ce)
    tl.store(loss + n, scale * (kd_term + ce_term))
    if metrics is not None:
        out = metrics + n.to(tl.int64) * 8
        tl.store(out, value)
        tl.store(out + 1, ce)
        tl.store(out + 2, norm[7] - _mean(state[8], state[3], plan))
        tl.store(out + 3, norm[6] - _mean(state[9], state[2], plan))
        tl.store(out + 4, (state[10] == state[11]).to(plan.acc))
        unknown = scalar(float("nan"), plan.acc)
        tl.store(out + 5, (state[10] == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 6, (state[11] == label).to(plan.acc) if plan.ce else unknown)
        tl.store(out + 7, unknown)


@triton.jit
def _drop(grad, loss, metrics, n, shape, span, vocab, columns, leader, plan: tl.constexpr):
    """A row that does not count."""
    if leader:
        tl.store(loss + n, scalar(0.0, plan.acc))
        if metrics is not None:
            field = tl.arange(0, 8)
            nothing = tl.full([8], 0, plan.acc)
            tl.store(metrics + n.to(tl.int64) * 8 + field, nothing)
    if grad is not None:
        zeros(grad, shape, span, vocab if leader else columns, columns, plan)


@triton.jit
def _finish(
    row, grad, labels, loss, metrics, n, shape, span, bend, state, at_label, norm, sums,
    weights, vocab, columns, power, a_b, leader,
    DIVERGENCE: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """Write the loss (the leader does), then the gradient over the span."""
    scale, kd_scale, ce_weight, smoothing = weights
    label, ce = -1, scalar(float("nan"), plan.acc)
    one, smooth, hot = scale, scale, scale
    if plan.ce:
        label = tl.load(labels + n).to(tl.int32)
        ce = _cross_entropy(state, at_label, smoothing, plan)
        one = scale * ce_weight * reciprocal(state[4]).to(plan.acc)
        if not plan.closed:  # there powered is q = 2^a / sum, not 2^a
            total = state[2].to(plan.acc)
            over = tl.where(power == 2, total * total, total)
            one *= tl.where(power == 0, 1.0, over)
        smooth = scale * ce_weight * smoothing / vocab.to(plan.acc)
        hot = scale * ce_weight * (1.0 - smoothing)
    if leader:
        _write(loss, metrics, n, state, norm, sums[0], ce, label, weights, plan)
    if grad is not None:
        pull = (sums[1], scale * kd_scale * norm[4], one, smooth, hot, label, power)
        gradient(row, grad, shape, span, bend, norm, pull, a_b, DIVERGENCE, plan)
        beyond = vocab if leader else columns
        zeros(grad, shape, (0, 0, 0), beyond, columns, plan)


# --------------------------------------------------------------------------------------------------
# a row in pieces: what one launch leaves for the next, (13, pieces) statistics (the last one is the
# logit at the label, the same in all) and (2, pieces) sums


@triton.jit
def _leave(partial, n, piece, state, at_label, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (13 * plan.pieces) + piece
    for field in tl.static_range(12):
        tl.store(at + field * plan.pieces, state[field].to(tl.float64))
    tl.store(at + 12 * plan.pieces, at_label.to(tl.float64))


@triton.jit
def _pieces(partial, n, field: tl.constexpr, of: tl.constexpr, plan: tl.constexpr):
    at = partial + n.to(tl.int64) * (of * plan.pieces) + field * plan.pieces
    return tl.load(at + tl.arange(0, plan.pieces))


@triton.jit
def _recall(partial, n, plan: tl.constexpr):
    top_s, top_t = _pieces(partial, n, 0, 13, plan), _pieces(partial, n, 1, 13, plan)
    at_s, at_t = _pieces(partial, n, 10, 13, plan), _pieces(partial, n, 11, 13, plan)
    return (
        top_s.to(plan.acc), top_t.to(plan.acc),
        _pieces(partial, n, 2, 13, plan), _pieces(partial, n, 3, 13, plan),
        _pieces(partial, n, 4, 13, plan), _pieces(partial, n, 5, 13, plan),
        _pieces(partial, n, 6, 13, plan), _pieces(partial, n, 7, 13, plan),
        _pieces(partial, n, 8, 13, plan), _pieces(partial, n, 9, 13, plan),
        at_s.to(tl.int32), at_t.to(tl.int32),
    )  # fmt: skip


@triton.jit
def _span(shape, piece, plan: tl.constexpr):
    """(first tile, last tile, edges) of a piece; the edges belong to the last piece."""
    _, tiles, edges = shape
    share = tl.cdiv(tiles, plan.pieces)
    first = tl.minimum(piece * share, tiles)
    last = tl.minimum(first + share, tiles)
    return first, last, tl.where(piece == plan.pieces - 1, edges, 0)


@triton.jit
def _sums(partial, sums, n, piece, row, shape, span, bend, state, norm, a_b,
          DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, plan: tl.constexpr):  # fmt: skip
    """(value, sum of grad) of the row; the stage "middle" leaves those of its piece instead."""
    if plan.closed:
        value, sum_grad, holds = _closed(state, norm, a_b, COMBINE, plan)
    else:
        value, sum_grad, holds = norm[0], norm[0], False
    if not holds:
        if plan.stage == "gradient":
            value = tl.sum(_pieces(sums, n, 0, 2, plan), axis=0).to(plan.acc)
            sum_grad = tl.sum(_pieces(sums, n, 1, 2, plan), axis=0).to(plan.acc)
        else:
            value, sum_grad = middle(row, shape, span, bend, norm, a_b, DIVERGENCE, plan)
        if plan.stage == "middle":
            at = sums + n.to(tl.int64) * (2 * plan.pieces) + piece
            tl.store(at, value.to(tl.float64))
            tl.store(at + plan.pieces, sum_grad.to(tl.float64))
    unsound = (norm[6] - norm[6]) + (norm[7] - norm[7])  # 0, or NaN where a logit was
    return value + unsound, sum_grad + unsound


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def row_kernel(
    student, teacher, grad,  # (B, T, C), (B, T, C'), (B, T, C) or None
    labels, row_scale, loss, metrics,  # (N,) or None, (N,), (N,), (N, 8) or None; N = B T
    partial, sums,  # fp64 (N, 13, pieces), (N, 2, pieces), or None in the stage "whole"
    length: tl.int32, s_b: tl.int64, s_t: tl.int64, t_b: tl.int64, t_t: tl.int64,
    g_b: tl.int64, g_t: tl.int64, vocab: tl.int32, columns: tl.int32,
    inverse_s: tl.float64, inverse_t: tl.float64,  # 1 / temperature
    s_scale: tl.float64, s_cap: tl.float64, t_scale: tl.float64, t_cap: tl.float64,
    kd_scale: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    a: tl.float64, b: tl.float64,  # parameters of the divergence
    power: tl.int32,  # the student's temperature if it is 1 or 2, else 0
    DIVERGENCE: tl.constexpr, COMBINE: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    """One row, or a piece of one; grid (N, pieces)."""
    acc: tl.constexpr = plan.acc
    n, piece = tl.program_id(0), tl.program_id(1)
    row = _row(student, n, length, s_b, s_t), _row(teacher, n, length, t_b, t_t)
    if grad is not None:
        grad = _row(grad, n, length, g_b, g_t)
    shape = _shape(row, grad, vocab, plan)
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
        over_s, over_t = scalar(inverse_s, acc), scalar(inverse_t, acc)
        bend_s = scalar(s_scale, acc), scalar(s_cap, acc)
        bend_t = scalar(t_scale, acc), scalar(t_cap, acc)
        bend = bend_s, bend_t
        numbers = over_s * LOG2E, over_t * LOG2E, 1.0 / vocab.to(acc), power
        if plan.stage == "whole" or plan.stage == "statistics":
            at_label = _at_label(row[0], labels, n, bend_s, plan)
            state = statistics(row, shape, span, bend, numbers, plan)
        else:
            state = _merge(_recall(partial, n, plan), numbers[0], numbers[1])
            left = tl.load(partial + n.to(tl.int64) * (13 * plan.pieces) + 12 * plan.pieces)
            at_label = left.to(acc)
        if plan.stage == "statistics":
            _leave(partial, n, piece, state, at_label, plan)
        else:
            norm = _norm(state, over_s, over_t, plan)
            found = _sums(partial, sums, n, piece, row, shape, span, bend, state, norm, a_b,
                          DIVERGENCE, COMBINE, plan)  # fmt: skip
            if plan.stage != "middle":
                weights = (scale, scalar(kd_scale, acc), scalar(ce_weight, acc),
                           scalar(smoothing, acc))  # fmt: skip
                _finish(row, grad, labels, loss, metrics, n, shape, span, bend, state, at_label,
                        norm, found, weights, vocab, columns, power, a_b, leader,
                        DIVERGENCE, plan)  # fmt: skip


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
        row = _row(x, n, length, x_b, x_t)
        head, tiles, edges = _geometry(row, columns, plan)
        # int32, as in the other sweeps: with an int64 tile Triton sees no 16-byte access.
        size = tl.full([], plan.lanes * plan.width, tl.int64)
        for tile in range(first, tl.cast(tiles, tl.int32), tl.num_programs(1)):
            at = _tile(row + tile * size, head, 0, plan)
            tl.store(at, rounded(tl.load(at).to(plan.acc) * by, x.dtype.element_ty))
        for start in range(0, tl.where(first == 0, edges, 0), plan.lanes * plan.width):
            column, mask = _edge_columns(start, (head, tiles, edges), plan)
            value = tl.load(row + column, mask=mask).to(plan.acc) * by
            tl.store(row + column, rounded(value, x.dtype.element_ty), mask=mask)
