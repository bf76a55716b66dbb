"""What the sweeps after the statistics do with a tile, each a STEP of row.sweep: the lean way where
a row is ordinary (lean.py), and the careful one, entry by entry with pointwise.py, in fp64 and in
rows with masked entries or overflows that a divergence's statistics cannot carry."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .lean import entry
from .numerics import lowest, rounded
from .row import INFINITY, pointers
from .stats import at_unit, lane_sum


class Sums(NamedTuple):
    """Of what a divergence says of the entries; (lanes,) while they are walked."""

    first: Any
    second: Any


class Numbers(NamedTuple):
    """Parameters of the divergence."""

    a: Any  # as the lean form takes them
    b: Any
    own: Any  # as the careful function does
    weight: Any  # of the lean form, and what is added to it (plan.weighted)
    constant: Any


class Comparing(NamedTuple):
    """What the sweep between statistics and gradient wants."""

    pair: Any
    constants: Any  # of the lean form's terms
    numbers: Numbers


class Gradient(NamedTuple):
    """What the last sweep wants; all factors hold the row's scale."""

    grad: Any  # where the row's gradient goes
    shape: Any
    pair: Any
    constants: Any  # of the lean form's slope
    terms: Any  # and of its terms, if they are summed here
    sum_grad: Any  # of the divergence, for the careful way
    kd: Any
    unit: Any  # cross-entropy's and z-loss's, of e^(s - max)
    smooth: Any  # label smoothing's, of every entry
    hot: Any  # the label's
    numbers: Numbers


@triton.jit
def nothing_summed(plan: tl.constexpr):
    zero = tl.full([plan.lanes], 0, plan.acc)
    return Sums(zero, zero)


# --------------------------------------------------------------------------------------------------
# entries, the careful way


@triton.jit
def log_prob(z, below, inverse_t, log_sum, plan: tl.constexpr):
    """log p. With T < 1 a finite mask (finfo.min) overflows; only a true -inf may mean p = 0."""
    lp = below * inverse_t - log_sum
    if plan.kls:  # the ones that tell a huge gap from an infinite one
        lp = tl.where((lp == -INFINITY) & (z != -INFINITY), lowest(plan.acc), lp)
    return lp


@triton.jit
def careful(z_s, z_t, pair, plan: tl.constexpr):
    """(lp, lq, lp - lq, p, q, what sums to the normaliser, s - max).

    KLs take p = 2^a / sum: next to the peak it is nearly exact. The others cancel p against log p,
    so there p is exp(log p), and the gap is made of the logits: its rounding error is in proportion
    to itself, not to log p, which is what counts at T = 1000.
    """
    s, t = pair.student, pair.teacher
    below_s, below_t = z_s - s.max, z_t - t.max
    lq = log_prob(z_s, below_s, s.inverse_t, s.log_sum, plan)
    lp = log_prob(z_t, below_t, t.inverse_t, t.log_sum, plan)
    e_s = tl.exp2(below_s * s.scale)
    if plan.kls:
        p, q, gap = tl.exp2(below_t * t.scale) * t.over_sum, e_s * s.over_sum, lp - lq
    else:
        p, q = tl.exp(lp), tl.exp(lq)
        gap = (below_t * t.inverse_t - below_s * s.inverse_t) + pair.log_ratio
    return lp, lq, gap, p, q, e_s, below_s


# --------------------------------------------------------------------------------------------------
# steps


@triton.jit
def compare(sums, tile, context, plan: tl.constexpr):
    """The lean sums."""
    at = entry(tile.student, tile.teacher, context.pair)
    first, second = plan.form.terms(at, context.constants, context.pair, plan)
    return Sums(sums.first + lane_sum(first, tile.mask), sums.second + lane_sum(second, tile.mask))


@triton.jit
def compare_carefully(sums, tile, context, plan: tl.constexpr):
    """(value, sum of grad) of a divergence that the statistics do not give, or not at its edges."""
    lp, lq, gap, p, q, _, _ = careful(tile.student, tile.teacher, context.pair, plan)
    value, grad = plan.careful(lp, lq, gap, p, q, context.numbers.own)
    return Sums(sums.first + lane_sum(value, tile.mask), sums.second + lane_sum(grad, tile.mask))


@triton.jit
def _with_unit(f, rest, at, z_s, by, plan: tl.constexpr):
    """d loss / d logit, before the transform, and but for what is the label's."""
    if plan.unit and plan.power == 1:
        f += by.unit
    elif plan.unit and plan.power == 2:
        f += at.e_s * by.unit
    elif plan.unit:
        rest += at_unit(at.e_s, z_s - by.pair.student.max, plan) * by.unit
    g = at.e_s * f
    if plan.form.rest or plan.power == 0:
        g += rest
    if plan.ce and plan.smoothing:
        g = tl.where(z_s == -INFINITY, 0.0, g - by.smooth)
    return g


@triton.jit
def slope(z_s, z_t, by, plan: tl.constexpr):
    at = entry(z_s, z_t, by.pair)
    f, rest = tl.zeros_like(at.e_s), 0.0
    if plan.kd:
        f, rest = plan.form.slope(at, by.constants, by.pair, plan)
    return _with_unit(f, rest, at, z_s, by, plan)


@triton.jit
def slope_sharply(z_s, z_t, by, plan: tl.constexpr):
    at = entry(z_s, z_t, by.pair)
    f, rest = plan.form.sharp(at, by.constants, by.terms, by.pair, plan)
    return _with_unit(f, rest, at, z_s, by, plan)


@triton.jit
def slope_carefully(z_s, z_t, by, plan: tl.constexpr):
    lp, lq, gap, p, q, e_s, below = careful(z_s, z_t, by.pair, plan)
    g = tl.zeros_like(e_s)
    if plan.kd:
        _, grad = plan.careful(lp, lq, gap, p, q, by.numbers.own)
        g += (grad - q * by.sum_grad) * by.kd
    if plan.unit:
        g += at_unit(e_s, below, plan) * by.unit
    if plan.ce and plan.smoothing:
        g -= by.smooth
    return tl.where(z_s == -INFINITY, 0.0, g)


@triton.jit
def store(g, tile, by, plan: tl.constexpr):
    if plan.transformed_s:
        g *= tile.slope
    g = rounded(g, by.grad.dtype.element_ty)
    if tile.columns is not None:
        tl.store(by.grad + tile.columns, g, mask=tile.mask)
    elif tile.mask is not None:
        at = pointers(by.grad, by.shape, tile.place, g.shape[0], plan)
        tl.store(at, g, mask=tile.mask)
    else:
        at = pointers(by.grad, by.shape, tile.place, g.shape[0], plan)
        tl.store(at, g, eviction_policy="evict_first")


@triton.jit
def write(sums, tile, by, plan: tl.constexpr):
    store(slope(tile.student, tile.teacher, by, plan), tile, by, plan)
    if plan.late:
        sums = compare(sums, tile, Comparing(by.pair, by.terms, by.numbers), plan)
    return sums


@triton.jit
def write_sharply(sums, tile, by, plan: tl.constexpr):
    store(slope_sharply(tile.student, tile.teacher, by, plan), tile, by, plan)
    return sums


@triton.jit
def write_carefully(sums, tile, by, plan: tl.constexpr):
    store(slope_carefully(tile.student, tile.teacher, by, plan), tile, by, plan)
    return sums
