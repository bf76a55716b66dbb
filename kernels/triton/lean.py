"""The divergences once more, for the loops over whole rows: few instructions, and right where rows
are ordinary. What is not finite here goes the careful way, by pointwise.py.

A dense row of 151,936 bf16 entries leaves 47 instructions an entry for all sweeps together if an
H200 is to be bound by memory (launches.py), so each form is written around what the statistics
already give. In log2 units, relative to either side's largest logit:

    e_s, e_t   2^a_s and 2^a_t, with q = e_s over_s
    x          (t - max_t) T_s / T_t - (s - max_s): exact for bf16 logits and equal temperatures, so
               that ties are ties
    d          log2 p - log2 q = x k_s + log2 of the sums' ratio

A form is at most five functions (:class:`Lean`). ``slope`` gives d D / d s of an entry, times T and
the row's factors, as (f, r): it is e_s f + r, since cross-entropy adds to f.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import (
    LN2,
    LOG2E,
    at_most,
    exp_wide,
    log2_near,
    log_wide,
    reciprocal,
    reciprocal_near,
)

INFINITY = tl.constexpr(float("inf"))
# In log2 units: below it a mixture's logarithm is a polynomial, above it the unit's own error of
# 2^-22 is less than what eager PyTorch loses.
NEAR = tl.constexpr(0.25)
FAR = tl.constexpr(256.0)  # 2^-FAR is 0, and FAR times it too


class Entry(NamedTuple):
    a_s: Any
    a_t: Any
    e_s: Any
    e_t: Any
    x: Any


@triton.jit
def entry(z_s, z_t, pair):
    below_s, below_t = z_s - pair.student.max, z_t - pair.teacher.max
    a_s, a_t = below_s * pair.student.scale, below_t * pair.teacher.scale
    return Entry(a_s, a_t, tl.exp2(a_s), tl.exp2(a_t), below_t * pair.ratio - below_s)


@dataclass(frozen=True, repr=False)
class Lean:
    """How a divergence is computed where rows are whole and ordinary."""

    factors: triton.JITFunction  # (of, pair, sum of grad, kd, a, b, plan) -> constants of
    slope: triton.JITFunction  # (entry, constants, pair, plan) -> (f, r)
    # From the statistics alone, (of, pair, a, b, plan) -> (value, sum of grad); not finite where a
    # row is not ordinary
    closed: triton.JITFunction | None = None
    constants: triton.JITFunction | None = None  # (of, pair, a, b, plan) -> constants of
    terms: triton.JITFunction | None = None  # (entry, constants, pair, plan) -> two numbers, and
    # (their sums, sum of grad so far, a, b) -> (value, sum of grad)
    summed: triton.JITFunction | None = None
    # (entry, constants, those of ``terms``, pair, plan) -> (f, r) in rows of one sharp peak
    sharp: triton.JITFunction | None = None
    forward: bool = False  # the statistics that it reads: gaps weighted by p
    reverse: bool = False  # ... by q
    powers: int = 0  # 1: p^a q^b; 2: p^(a + b) and q^(a + b) too
    rest: bool = False  # whether r is not 0
    heavy: bool = False  # ``terms`` wants the registers of a second line
    # made of somebody's own (emit.py): ``a`` is a tuple of its parameters, and
    emitted: bool = False
    large: bool = False  # of many operations
    doubted: bool = False  # sums that are not finite say that the row is not ordinary

    @property
    def cache_key(self) -> str:  # part of Triton's, so that an edited form is compiled anew
        values = (getattr(self, f.name) for f in fields(self))
        return " ".join(getattr(x, "cache_key", str(x)) for x in values)

    def __repr__(self) -> str:
        """Of all that it is made of: in a process Triton tells kernels apart by this text."""
        values = (getattr(self, f.name) for f in fields(self))
        of = (f"{x.__module__}.{x.__name__}" if hasattr(x, "__name__") else str(x) for x in values)
        return f"Lean({', '.join(of)})"


# --------------------------------------------------------------------------------------------------
# mixes of KL(p || q) and KL(q || p): the statistics say all


@triton.jit
def _gap(side, pair, plan: tl.constexpr):
    """The mean of x / T_s under a side's probabilities."""
    return (side.gap * reciprocal(side.sum)).to(plan.acc) * pair.student.inverse_t


@triton.jit
def _forward_closed(of, pair, a, b, plan: tl.constexpr):
    value = _gap(of.teacher, pair, plan) + pair.log_ratio
    return value, tl.zeros_like(value) - 1.0


@triton.jit
def _reverse_closed(of, pair, a, b, plan: tl.constexpr):
    value = -(_gap(of.student, pair, plan) + pair.log_ratio)
    return value, value + 1.0


@triton.jit
def _mixed_closed(of, pair, a, b, plan: tl.constexpr):
    forward, _ = _forward_closed(of, pair, a, b, plan)
    reverse, _ = _reverse_closed(of, pair, a, b, plan)
    return a * forward + b * reverse, b * (reverse + 1.0) - a


@triton.jit
def _forward_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    # 1 - (student's sum / teacher's), without the rounding of either
    less = of.cross * reciprocal(of.teacher.sum)
    return kd * pair.student.over_sum, less.to(plan.acc)


@triton.jit
def _forward_slope(at, by, pair, plan: tl.constexpr):
    """q - p, whose digits are those of the difference where one entry has nearly all of both."""
    return 0.0, ((at.e_s - at.e_t) + at.e_t * by[1]) * by[0]


@triton.jit
def _reverse_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    """The mean gap is that of the gaps as ``slope`` sees them: q (gap - mean) is then a small
    difference of numbers with the same rounding errors, and both normalisers cancel."""
    q = kd * pair.student.over_sum
    return q * pair.student.inverse_t, q * _gap(of.student, pair, plan)


@triton.jit
def _reverse_slope(at, by, pair, plan: tl.constexpr):
    """q (mean - x)"""
    return by[1] - at.x * by[0], 0.0


@triton.jit
def _mixed_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    forward = _forward_factors(of, pair, sum_grad, a * kd, a, b, plan)
    reverse = _reverse_factors(of, pair, sum_grad, b * kd, a, b, plan)
    return forward[0], forward[1], reverse[0], reverse[1]


@triton.jit
def _mixed_slope(at, by, pair, plan: tl.constexpr):
    _, rest = _forward_slope(at, by, pair, plan)
    return by[3] - at.x * by[2], rest


# --------------------------------------------------------------------------------------------------
# mixtures m = w p + (1 - w) q


class Mixture(NamedTuple):
    """Seen from the larger of p and q: nothing overflows, and near p = q, where the terms of a
    divergence cancel to second order in the gap, they all see the same gap. What is to be summed
    is ``larger`` times something, one FFMA."""

    larger: Any
    ratio: Any  # the smaller one over it
    size: Any  # |d|, at most FAR
    beyond: Any  # d where p is larger, else 0
    p_larger: Any
    of_smaller: Any  # its weight, times the ratio
    over: Any  # m / larger
    log: Any  # log2 of that


@triton.jit
def _polynomial(w, pair):
    """Constants: the weight of p, d at x = 0, log2(w 2^d + 1 - w) up to d^4 (cumulants), and the
    normalisers."""
    v = w * (1.0 - w)
    third, fourth = (
        v * (1.0 - 2.0 * w) * (LN2 * LN2 / 6),
        v * (1.0 - 6.0 * v) * (LN2 * LN2 * LN2 / 24),
    )
    log_s, log_t = pair.student.log_sum * LOG2E, pair.teacher.log_sum * LOG2E
    return w, pair.log_ratio * LOG2E, v * (LN2 / 2), third, fourth, log_s, log_t


@triton.jit
def _mixture(at, by, pair, plan: tl.constexpr):
    w, shift, second, third, fourth, log_s, log_t = by
    d = at.x * pair.student.scale + shift
    p_larger = d > 0
    size = at_most(tl.abs(d), FAR)  # infinite where one is masked, NaN where both are
    ratio = tl.exp2(-size)
    larger = tl.exp2(tl.maximum(at.a_t - log_t, at.a_s - log_s))
    weight = tl.where(p_larger, 1.0 - w, w)
    of_smaller = weight * ratio
    over = (1.0 - weight) + of_smaller
    beyond = tl.where(p_larger, size, 0.0)
    near = d * (w + d * (second + d * (third + d * fourth))) - beyond
    log = tl.where(size < NEAR, near, log2_near(over, plan))
    return Mixture(larger, ratio, size, beyond, p_larger, of_smaller, over, log)


@triton.jit
def _weight_a(of, pair, a, b, plan: tl.constexpr):
    return _polynomial(a, pair)


@triton.jit
def _weight_rest(of, pair, a, b, plan: tl.constexpr):
    return _polynomial(1.0 - a, pair)


@triton.jit
def _over_q(at, by, pair, plan: tl.constexpr):
    """(p / q, m / q), p / q up to 2^64: where it is more q does not count."""
    ratio = tl.exp2(at_most(at.x * pair.student.scale + by[3], 64.0))
    return ratio, ratio * by[2] + (1.0 - by[2])


@triton.jit
def _jsd_terms(at, by, pair, plan: tl.constexpr):
    """-w p log2(p / m) - (1 - w) q log2(q / m), and q log2(m / q)"""
    m = _mixture(at, by, pair, plan)
    value = m.larger * (m.over * m.log + m.of_smaller * m.size)
    return value, m.larger * (tl.where(m.p_larger, m.ratio, 1.0) * (m.beyond + m.log))


@triton.jit
def _jsd_summed(first, second, sum_grad, a, b):
    return first * -LN2, (1.0 - a) * second * -LN2


@triton.jit
def _jsd_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    q = kd * pair.student.over_sum
    return q * ((1.0 - a) * LN2), q * sum_grad, a, pair.log_ratio * LOG2E


@triton.jit
def _jsd_slope(at, by, pair, plan: tl.constexpr):
    _, over = _over_q(at, by, pair, plan)
    return -(log2_near(over, plan) * by[0]) - by[1], 0.0


@triton.jit
def _jsd_sharp(at, by, terms, pair, plan: tl.constexpr):
    """The same with the logarithm that ``terms`` has: at a peak q log(m / q) and q times the sum of
    those are nearly equal, and the unit's error would be all that is left."""
    m = _mixture(at, terms, pair, plan)
    return -((m.beyond + m.log) * by[0]) - by[1], 0.0


class Halves(NamedTuple):
    """A mixture of w = 1/2, the default: nothing of it hangs on which of p and q is larger."""

    larger: Any
    p_larger: Any
    of_larger: Any  # log2(m / larger)
    log_smaller: Any  # log2(m / smaller)
    of_smaller: Any  # that, times the smaller over the larger


@triton.jit
def _half_constants(of, pair, a, b, plan: tl.constexpr):
    _, shift, second, _, fourth, log_s, log_t = _polynomial(a, pair)
    return shift, second, fourth, log_s, log_t  # the third is 0


@triton.jit
def _halves(at, by, pair, plan: tl.constexpr):
    shift, second, fourth, log_s, log_t = by
    d = at.x * pair.student.scale + shift
    size = at_most(tl.abs(d), FAR)  # infinite where one is masked, NaN where both are
    ratio = tl.exp2(-size)
    larger = tl.exp2(tl.maximum(at.a_t - log_t, at.a_s - log_s))
    near = size * (size * (second + size * size * fourth) - 0.5)
    log = tl.where(size < NEAR, near, log2_near(0.5 * ratio + 0.5, plan))
    return Halves(larger, d > 0, log, log + size, ratio * (log + size))


@triton.jit
def _half_jsd_terms(at, by, pair, plan: tl.constexpr):
    """-p log2(p / m) - q log2(q / m), and q log2(m / q)"""
    m = _halves(at, by, pair, plan)
    of_q = tl.where(m.p_larger, m.of_smaller, m.of_larger)
    return m.larger * (m.of_larger + m.of_smaller), m.larger * of_q


@triton.jit
def _half_jsd_summed(first, second, sum_grad, a, b):
    return first * (-0.5 * LN2), second * (-0.5 * LN2)


@triton.jit
def _half_jsd_sharp(at, by, terms, pair, plan: tl.constexpr):
    m = _halves(at, terms, pair, plan)
    return -(tl.where(m.p_larger, m.log_smaller, m.of_larger) * by[0]) - by[1], 0.0


@triton.jit
def _skew_forward_terms(at, by, pair, plan: tl.constexpr):
    """p log2(p / m), and p q / m"""
    m = _mixture(at, by, pair, plan)
    p = tl.where(m.p_larger, 1.0, m.ratio)
    product = m.ratio * reciprocal_near(m.over, plan)
    return m.larger * (p * ((m.beyond - m.size) - m.log)), m.larger * product


@triton.jit
def _skew_forward_summed(first, second, sum_grad, a, b):
    return first * LN2, (a - 1.0) * second


@triton.jit
def _skew_forward_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    q = kd * pair.student.over_sum
    return q * (1.0 - a), q * sum_grad, a, pair.log_ratio * LOG2E


@triton.jit
def _skew_forward_slope(at, by, pair, plan: tl.constexpr):
    ratio, over = _over_q(at, by, pair, plan)
    return -(ratio * reciprocal_near(over, plan) * by[0]) - by[1], 0.0


@triton.jit
def _skew_reverse_terms(at, by, pair, plan: tl.constexpr):
    """q log2(m / q), and p q / m"""
    m = _mixture(at, by, pair, plan)
    q = tl.where(m.p_larger, m.ratio, 1.0)
    product = m.ratio * reciprocal_near(m.over, plan)
    return m.larger * (q * (m.beyond + m.log)), m.larger * product


@triton.jit
def _skew_reverse_summed(first, second, sum_grad, a, b):
    value = first * -LN2
    return value, value + (1.0 - a) * second


@triton.jit
def _skew_reverse_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    q = kd * pair.student.over_sum
    return q * (1.0 - a), q * sum_grad, 1.0 - a, pair.log_ratio * LOG2E, q * LN2


@triton.jit
def _skew_reverse_slope(at, by, pair, plan: tl.constexpr):
    ratio, over = _over_q(at, by, pair, plan)
    p_share = ratio * reciprocal_near(over, plan) * by[0]
    return (p_share - by[1]) - log2_near(over, plan) * by[4], 0.0


# --------------------------------------------------------------------------------------------------
# total variation


@triton.jit
def _by_sign(at, shift, pair, plus, minus, tie):
    d = at.x * pair.student.scale + shift
    return tl.where(d > 0, plus, tl.where(d < 0, minus, tie))


@triton.jit
def _variation_constants(of, pair, a, b, plan: tl.constexpr):
    return (pair.log_ratio * LOG2E,)


@triton.jit
def _variation_terms(at, by, pair, plan: tl.constexpr):
    """|p - q|, and -q sign(p - q)"""
    p, q = at.e_t * pair.teacher.over_sum, at.e_s * pair.student.over_sum
    return tl.abs(p - q), _by_sign(at, by[0], pair, -q, q, 0.0)


@triton.jit
def _variation_summed(first, second, sum_grad, a, b):
    return 0.5 * first, 0.5 * second


@triton.jit
def _variation_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    q = kd * pair.student.over_sum
    return q * (-0.5 - sum_grad), q * (0.5 - sum_grad), -(q * sum_grad), pair.log_ratio * LOG2E


@triton.jit
def _variation_slope(at, by, pair, plan: tl.constexpr):
    return _by_sign(at, by[3], pair, by[0], by[1], by[2]), 0.0


# --------------------------------------------------------------------------------------------------
# powers p^a q^b: their sum is one more statistic. That is all that the gradient wants; the value it
# says is off by some 5e-7, so that is summed again, along with the gradient, and where the terms
# cancel they are a polynomial in d.


@triton.jit
def _sum_of_powers(of, a, b, plan: tl.constexpr):
    """(sum of p^a q^b, of q^s, of p^s, what turns their exponentials into them), s = a + b, fp64"""
    log_s, log_t = log_wide(of.student.sum), log_wide(of.teacher.sum)
    a, b = a.to(tl.float64), b.to(tl.float64)
    of_cross = exp_wide(-(a * log_t + b * log_s))
    if plan.powers == 2:
        of_s, of_t = exp_wide(-(a + b) * log_s), exp_wide(-(a + b) * log_t)
        cross, power_s = of.cross + of.student.sum, of.power_s + of.student.sum
        return cross * of_cross, power_s * of_s, of.power_t * of_t, of_cross, of_s, of_t
    else:
        one = tl.full([], 1.0, tl.float64)
        of_s, of_t = reciprocal(of.student.sum), reciprocal(of.teacher.sum)
        return (of.cross + of.student.sum) * of_cross, one, one, of_cross, of_s, of_t


@triton.jit
def _power_closed(of, pair, a, b, plan: tl.constexpr):
    cross, power_s, power_t, _, _, _ = _sum_of_powers(of, a, b, plan)
    a, b = a.to(tl.float64), b.to(tl.float64)
    over_s = reciprocal(a + b)
    scaled = (a * over_s * power_t + b * over_s * power_s) - cross
    sum_grad = (power_s - cross) * reciprocal(a)
    value = (scaled * reciprocal(a * b)).to(plan.acc)
    return value, sum_grad.to(plan.acc)


@triton.jit
def _power_constants(of, pair, a, b, plan: tl.constexpr):
    _, _, _, of_cross, of_s, of_t = _sum_of_powers(of, a, b, plan)
    s = a + b
    most = tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(s), 1.0))
    # a / s e^(s d) + b / s - e^(a d), from d^2 on
    c2 = a * (s - a) * (LN2 * LN2 / 2)
    c3 = a * (s * s - a * a) * (LN2 * LN2 * LN2 / 6)
    s3, a3 = s * s * s, a * a * a
    c4 = a * (s3 - a3) * (LN2 * LN2 * LN2 * LN2 / 24)
    c5 = a * (s3 * s - a3 * a) * (LN2 * LN2 * LN2 * LN2 * LN2 / 120)
    c6 = a * (s3 * s * s - a3 * a * a) * (LN2 * LN2 * LN2 * LN2 * LN2 * LN2 / 720)
    c7 = a * (s3 * s3 - a3 * a3) * (LN2 * LN2 * LN2 * LN2 * LN2 * LN2 * LN2 / 5040)
    return (
        (c2, c3, c4, c5, c6, c7), (0.5 / most) * LOG2E, pair.log_ratio * LOG2E, a, b,
        of_cross.to(plan.acc), of_s.to(plan.acc), (b / s * of_s).to(plan.acc),
        (a / s * of_t).to(plan.acc),
    )  # fmt: skip


@triton.jit
def _power_terms(at, by, pair, plan: tl.constexpr):
    c, bound, shift, a, b, of_cross, of_s, of_q, of_p = by
    d = at.x * pair.student.scale + shift
    e_s, e_t = at.e_s, at.e_t
    if plan.powers == 2:
        e_s, e_t = tl.exp2((a + b) * at.a_s), tl.exp2((a + b) * at.a_t)
    far = (e_t * of_p + e_s * of_q) - tl.exp2(a * at.a_t + b * at.a_s) * of_cross
    series = c[0] + d * (c[1] + d * (c[2] + d * (c[3] + d * (c[4] + d * c[5]))))
    return tl.where(tl.abs(d) < bound, (e_s * of_s) * ((d * d) * series), far), tl.zeros_like(d)


@triton.jit
def _power_summed(first, second, sum_grad, a, b):
    return first / (a * b), sum_grad


@triton.jit
def _power_factors(of, pair, sum_grad, kd, a, b, plan: tl.constexpr):
    """The gradient is (q^s - p^a q^b) - q (their sums), over a; both powers less e_s, so that what
    cancels at a peak is exactly 0 and not the rounding of two factors."""
    _, _, _, of_cross, of_s, _ = _sum_of_powers(of, a, b, plan)
    over = reciprocal(of.student.sum)
    kd_a = (kd / a).to(tl.float64)
    constant = of.cross * over * of_cross
    if plan.powers == 2:
        constant -= of.power_s * over * of_s
    return (
        (kd_a * constant).to(plan.acc), (kd_a * of_cross).to(plan.acc), (kd_a * of_s).to(plan.acc),
        a, b,
    )  # fmt: skip


@triton.jit
def _power_slope(at, by, pair, plan: tl.constexpr):
    rest = (at.e_s - tl.exp2(by[3] * at.a_t + by[4] * at.a_s)) * by[1]
    if plan.powers == 2:
        rest += (tl.exp2((by[3] + by[4]) * at.a_s) - at.e_s) * by[2]
    return by[0], rest


_POWERS = Lean(
    _power_factors,
    _power_slope,
    _power_closed,
    _power_constants,
    _power_terms,
    _power_summed,
    powers=1,
    rest=True,
)
FORMS = {
    "forward_kl": Lean(_forward_factors, _forward_slope, _forward_closed, forward=True, rest=True),
    "reverse_kl": Lean(_reverse_factors, _reverse_slope, _reverse_closed, reverse=True),
    "mixed_kl": Lean(
        _mixed_factors, _mixed_slope, _mixed_closed, forward=True, reverse=True, rest=True
    ),
    "jsd": Lean(_jsd_factors, _jsd_slope, None, _weight_a, _jsd_terms, _jsd_summed, _jsd_sharp),
    "jsd_half": Lean(
        _jsd_factors,
        _jsd_slope,
        None,
        _half_constants,
        _half_jsd_terms,
        _half_jsd_summed,
        _half_jsd_sharp,
    ),
    "skew_forward_kl": Lean(
        _skew_forward_factors,
        _skew_forward_slope,
        None,
        _weight_a,
        _skew_forward_terms,
        _skew_forward_summed,
        heavy=True,
    ),
    "skew_reverse_kl": Lean(
        _skew_reverse_factors,
        _skew_reverse_slope,
        None,
        _weight_rest,
        _skew_reverse_terms,
        _skew_reverse_summed,
        heavy=True,
    ),
    "total_variation": Lean(
        _variation_factors,
        _variation_slope,
        None,
        _variation_constants,
        _variation_terms,
        _variation_summed,
    ),
    "alpha": _POWERS,
    "alpha_beta": replace(_POWERS, powers=2),
}
