"""What a divergence of one's own may be made of, beside Triton's own functions: any argument, and
at infinities, 0 and NaN what torch answers.
"""

import triton
import triton.language as tl

from .numerics import LN2, LOG2E, expm1_small, reciprocal_near

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def like(x, y):
    """x, a number or a block, in the type and shape of y."""
    return tl.zeros_like(y) + x


@triton.jit
def finite(x):
    """x, and 0 where it is infinite."""
    return tl.where(tl.abs(x) == INFINITY, 0.0, x)


@triton.jit
def sqrt(x):
    if x.dtype == tl.float32:  # noqa: SIM108
        y = tl.sqrt_rn(x)
    else:
        y = tl.sqrt(x)
    return y


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0)).to(x.dtype)


@triton.jit
def log1p(x):
    y = 1.0 + x
    plain = tl.log(y)
    return tl.where((y > 0) & (y < INFINITY), plain + (x - (y - 1.0)) / y, plain)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < 0.5, expm1_small(x), tl.exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    t = expm1(-2.0 * tl.abs(x))
    size = -t / (2.0 + t)
    return tl.where(x < 0, -size, size)


@triton.jit
def logaddexp(x, y):
    total = tl.maximum(x, y) + log1p(tl.exp(-tl.abs(x - y)))
    return tl.where(x == y, x + LN2, tl.where((x == x) & (y == y), total, x + y))


@triton.jit
def power(x, y):
    """x ** y; of negative x where y is whole."""
    size = tl.exp(y * tl.log(tl.abs(x)))
    size = tl.where(y == 0, 1.0, size)
    whole, half = tl.floor(y) == y, y * 0.5
    signed = tl.where(whole, tl.where(tl.floor(half) == half, size, -size), float("nan"))
    return tl.where(x < 0, signed, size).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# of the lean forms


@triton.jit
def relative(at, pair, of_s, of_t):
    """(lp, lq, gap, p, q, larger): the first five relative to the larger of p and q, so that one of
    those is 1, and to base 2; ``larger`` as it is, times the factors of the exponentials."""
    gap = at.x * pair.student.scale + pair.log_ratio * LOG2E
    p_larger = gap > 0
    ratio = tl.exp2(-tl.abs(gap))
    p, q = tl.where(p_larger, 1.0, ratio), tl.where(p_larger, ratio, 1.0)
    larger = tl.where(p_larger, at.e_t * of_t, at.e_s * of_s)
    return tl.minimum(gap, 0.0), tl.minimum(-gap, 0.0), gap, p, q, larger


@triton.jit
def absolute(at, pair, of_s, of_t):
    """The same as they are, and natural logarithms."""
    s, t = pair.student, pair.teacher
    gap = at.x * s.inverse_t + pair.log_ratio
    lp, lq = at.a_t * LN2 - t.log_sum, at.a_s * LN2 - s.log_sum
    return lp, lq, gap, at.e_t * t.over_sum, at.e_s * s.over_sum, 1.0


@triton.jit
def present(at, g):
    """A gradient, but of an entry that is masked."""
    return tl.where(at.a_s == -INFINITY, 0.0, g)


@triton.jit
def exp_near(x):
    """0 where fp32 has no normal number."""
    return tl.exp2(x * LOG2E)


@triton.jit
def divided(x, y, plan: tl.constexpr):
    return x * reciprocal_near(y, plan)
