"""The divergences, one entry at a time: sister of ``fusedkd/divergences.py``, ``cpu/pointwise.h``.

A divergence is one function here, called as there:

    (lp, lq, gap, p, q, by) -> (value, grad)

for log p, log q, their difference (known to more digits than the two), p, q, and the run-time
parameters, a tuple of two (0 where there are fewer). ``grad`` is d value / d lq. The kernels take
the function as a ``tl.constexpr`` and inline it, so it needs no other registration. Edge semantics
are those of ``fusedkd.divergences``: a zero weight silences whatever it multiplies, an infinite
value comes with a finite gradient. A NaN logit need not come through: its row's normaliser is NaN,
and with that the kernels poison the row.

These are the careful ones, for what they are called with one by one; whole rows that hold nothing
special go by lean.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import expm1_small

# The smallest x with exp(x) > 0 in fp64. "p > 0" is decided on log p with this number, so that
# fp32, where p is 0 long before, finds the same infinities as the fp64 reference.
UNDERFLOW = tl.constexpr(-745.1332191019411)
INFINITY = tl.constexpr(float("inf"))
# A gap of log-probabilities whose exponential is 0 in fp64 too, and whose products are finite.
FAR = tl.constexpr(1e4)


@triton.jit
def _times(weight, factor):
    """weight * factor, and 0 where weight is 0 whatever the factor (a NaN weight stays NaN)."""
    return tl.where(weight == 0, 0.0, weight * factor)


@triton.jit
def _mixture(lp, lq, gap, of_p, of_q):
    """For m = of_p p + of_q q: p, q, log p - log m, log q - log m, and p q / m.

    Everything is seen from the larger of the two: nothing overflows, and near p = q, where the
    terms of a divergence cancel to second order in the gap, they all see the same gap. All but p
    and q are finite, so that a product with a p or q of 0 is 0 without a look at either.
    """
    p_larger = gap > 0
    larger = tl.exp(tl.where(p_larger, lp, lq))
    size = tl.abs(gap)
    size = tl.where(size < FAR, size, FAR)  # infinite: one is masked; NaN: both are
    u = tl.exp(-size)
    smaller = larger * u
    mixture = tl.where(p_larger, of_p, of_q) + tl.where(p_larger, of_q, of_p) * u
    log_m = tl.log(mixture)
    p, q = tl.where(p_larger, larger, smaller), tl.where(p_larger, smaller, larger)
    over_p, over_q = tl.where(p_larger, 0.0, -size) - log_m, tl.where(p_larger, -size, 0.0) - log_m
    return p, q, over_p, over_q, smaller / mixture


@triton.jit
def forward_kl(lp, lq, gap, p, q, by):
    value = tl.where((lq == -INFINITY) & (lp >= UNDERFLOW), INFINITY, _times(p, gap))
    return value, -p


@triton.jit
def reverse_kl(lp, lq, gap, p, q, by):
    absent = lp == -INFINITY
    finite = _times(q, tl.where(absent, 0.0, -gap))
    return tl.where(absent & (lq >= UNDERFLOW), INFINITY, finite), finite + q


@triton.jit
def mixed_kl(lp, lq, gap, p, q, by):
    forward, forward_grad = forward_kl(lp, lq, gap, p, q, by)
    reverse, reverse_grad = reverse_kl(lp, lq, gap, p, q, by)
    a = by[0]
    return a * forward + (1.0 - a) * reverse, a * forward_grad + (1.0 - a) * reverse_grad


@triton.jit
def jsd(lp, lq, gap, p, q, by):
    a = by[0]
    p, q, over_p, over_q, _ = _mixture(lp, lq, gap, a, 1.0 - a)
    grad = (1.0 - a) * (q * over_q)
    return a * (p * over_p) + grad, grad


jsd_half = jsd  # of a = 1/2, which lean.py knows at compile time


@triton.jit
def skew_forward_kl(lp, lq, gap, p, q, by):
    a = by[0]
    p, _, over_p, _, product = _mixture(lp, lq, gap, a, 1.0 - a)
    return p * over_p, -(1.0 - a) * product


@triton.jit
def skew_reverse_kl(lp, lq, gap, p, q, by):
    a = by[0]
    _, q, _, over_q, product = _mixture(lp, lq, gap, 1.0 - a, a)
    value = q * over_q
    return value, value + (1.0 - a) * product


@triton.jit
def total_variation(lp, lq, gap, p, q, by):
    difference = p - q
    half_q = 0.5 * q
    grad = tl.where(difference > 0, -half_q, tl.where(difference < 0, half_q, difference))
    return 0.5 * tl.abs(difference), grad


@triton.jit
def _exp(x):
    """exp(x), and where it is infinite; there it is 0 instead, to keep the gradient finite."""
    y = tl.exp(x)
    infinite = y == INFINITY
    return tl.where(infinite, 0.0, y), infinite


@triton.jit
def _alpha_beta(lp, lq, gap, a, b, s):
    """See :func:`fusedkd.divergences.alpha_beta`; s = a + b.

    Near p = q the three terms cancel to second order in the gap (at T = 1000 everywhere), so there
    they are taken relative to the larger entry's and lose their leading 1 before they are rounded.
    """
    p_larger = gap > 0
    larger = tl.where(p_larger, lp, lq)
    neither = larger == -INFINITY
    size = tl.abs(gap)
    of_smaller = tl.where(p_larger, b, a)
    # a lp + b lq, from the larger: with two masked entries the plain sum may be inf - inf
    cross, over = _exp(tl.where(neither, -INFINITY, s * larger - of_smaller * size))
    power_p, over_p = _exp(tl.where(neither, -INFINITY, s * lp))
    power_q, over_q = _exp(tl.where(neither, -INFINITY, s * lq))
    value = a / s * power_p + b / s * power_q - cross
    grad = power_q - cross
    near = size * tl.maximum(tl.abs(s), tl.maximum(tl.abs(a), tl.abs(b))) <= 0.5
    lost = of_smaller / s * expm1_small(-s * size) - expm1_small(-of_smaller * size)
    value = tl.where(near, tl.where(p_larger, power_p, power_q) * lost, value)
    grad = tl.where(near, -power_q * expm1_small(a * gap), grad)
    return tl.where(over | over_p | over_q, INFINITY, value / (a * b)), grad / a


@triton.jit
def alpha(lp, lq, gap, p, q, by):
    return _alpha_beta(lp, lq, gap, by[0], 1.0 - by[0], by[0] * 0.0 + 1.0)


@triton.jit
def alpha_beta(lp, lq, gap, p, q, by):
    return _alpha_beta(lp, lq, gap, by[0], by[1], by[0] + by[1])


# Near p = q the logarithm of the mixture cancels. Full rows make up for it by the number of their
# entries, the few of a sparse teacher are computed in fp64 (sparse.py).
MIXTURES = ("jsd", "jsd_half", "skew_forward_kl", "skew_reverse_kl")

# Mixes of KL(p || q) and KL(q || p): infinite where q = 0 < p or p = 0 < q, so these tell a huge
# gap from an infinite one.
KLS = ("forward_kl", "reverse_kl", "mixed_kl")

# Where p = 0 these, value and grad, are q times what they are at q = 1.
HOMOGENEOUS = (*KLS, *MIXTURES, "total_variation", "alpha")
