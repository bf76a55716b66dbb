"""Elementary functions that must be right to the last digits, built from exp2 and arithmetic.

libdevice is there neither in the interpreter nor on AMD, and ``lg2.approx`` is not accurate enough
for a row's normaliser: its error is relative, so log A = 12 would be off by up to 3e-6 where eager
PyTorch is off by 5e-7.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def scalar(x, ACC: tl.constexpr):
    """A hyper-parameter in the accumulation type. In the interpreter it is a Python float."""
    return tl.full([], x, ACC)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in a narrower type, to nearest, ties to even; bf16 from fp64 by way of fp32."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        if INTERPRETED:  # its own conversion cuts the digits off (Triton 3.7)
            bits = x.to(tl.int32, bitcast=True)
            even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def lowest(ACC: tl.constexpr):
    """The most negative finite number."""
    if ACC.primitive_bitwidth == 64:
        low = tl.full([], -1.7976931348623157e308, tl.float64)
    else:
        low = tl.full([], -3.4028234663852886e38, tl.float32)
    return low


@triton.jit
def reciprocal(x):
    """1 / x for fp64 x in fp32's range, by two Newton steps: fp64's own division is a call."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y += y * (1.0 - x * y)
    return y + y * (1.0 - x * y)


@triton.jit
def log_sum(x, ACC: tl.constexpr):
    """log x for positive fp64 x, to about one unit in ACC's last place; NaN for 0 and infinity."""
    if ACC.primitive_bitwidth == 64:
        y = tl.log(x)
    else:
        high = x.to(tl.float32)
        low = (x - high.to(tl.float64)).to(tl.float32)
        # high = 2^k f with f in [sqrt(1/2), sqrt(2)): near 1, k is 0 and nothing cancels
        bits = high.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(tl.float32, bitcast=True)
        s = (f - 1.0) / (f + 1.0)
        z = s * s  # at most 0.0295; the series of 2 atanh(s) is cut below 1e-9
        tail = z * (
            0.6666666667 + z * (0.4 + z * (0.2857142857 + z * (0.2222222222 + z * 0.1818181818)))
        )
        e = k.to(tl.float32)
        # ln 2 in two parts, the first with trailing zeros: k times it is exact (fdlibm, e_logf.c).
        small = s * tail + (low / high + e * 1.4286068203094172e-06)
        y = e * 0.693145751953125 + (2.0 * s + small)
    return y + ((x - x) * reciprocal(x)).to(ACC)


@triton.jit
def log_ratio(x, y, ACC: tl.constexpr):
    """log(x / y), exactly 0 for x = y."""
    return log_sum(1.0 + (x - y) * reciprocal(y), ACC)


@triton.jit
def exp_wide(x):
    """e^x for fp64 x within 700 of 0, to about one unit in its last place."""
    x = tl.minimum(tl.maximum(x, -700.0), 700.0)
    k = (x * LOG2E + tl.where(x < 0, -0.5, 0.5)).to(tl.int32)
    whole = k.to(tl.float64)
    # ln 2 in two parts, the first with trailing zeros: |r| <= ln 2 / 2, Taylor to 2^-58
    r = (x - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10
    y = r * 1.6059043836821613e-10 + 2.08767569878681e-9
    y = y * r + 2.505210838544172e-8
    y = y * r + 2.755731922398589e-7
    y = y * r + 2.7557319223985893e-6
    y = y * r + 2.48015873015873e-5
    y = y * r + 1.984126984126984e-4
    y = y * r + 1.388888888888889e-3
    y = y * r + 8.333333333333333e-3
    y = y * r + 4.1666666666666664e-2
    y = y * r + 0.16666666666666666
    y = (y * r + 0.5) * r * r + r + 1.0
    return y * ((k + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def log_wide(x):
    """log x for positive fp64 x in fp32's range, to about one unit of fp64: log_sum, and a Newton
    step."""
    y = log_sum(x, tl.float32).to(tl.float64)
    d = x * exp_wide(-y) - 1.0
    return y + (d - 0.5 * d * d)


@triton.jit
def expm1_small(x):
    """exp(x) - 1 for |x| <= 1/2, where fp32 would lose the small difference."""
    if x.dtype == tl.float64:
        y = tl.exp(x) - 1.0
    else:
        # Taylor; at 1/2 the first term left out is 2e-7 / 8 of the result
        y = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334
                 + x * (0.0013888889 + x * 1.984127e-4))))))  # fmt: skip
    return y


@triton.jit
def at_most(x, bound):
    """min(x, bound), and the bound where x is NaN."""
    if INTERPRETED:  # noqa: SIM108 - its minimum is NumPy's, which keeps a NaN
        y = tl.where(x < bound, x, bound)
    else:
        y = tl.minimum(x, bound)
    return y


@triton.jit
def log2_near(x, plan: tl.constexpr):
    """log2 x, off by up to 2^-22, absolutely near 1 and relatively elsewhere: one instruction where
    libdevice takes twenty."""
    if plan.nvidia:
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def reciprocal_near(x, plan: tl.constexpr):
    """1 / x to about one unit in the last place."""
    if plan.nvidia:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / x
    return y


@triton.jit
def transform(x, scale, cap):
    """(z, dz / dx) for z = cap tanh(scale x / cap), or scale x where cap is 0.

    With w = exp(-2 |y|) - 1: tanh |y| = -w / (2 + w), which keeps its digits as y -> 0, and
    1 - tanh^2 = 4 (1 + w) / (2 + w)^2, which keeps its digits as |y| grows.
    """
    z = x * scale
    slope = tl.zeros_like(x) + scale
    if cap != 0:
        y = z / cap
        v = -2.0 * tl.abs(y)
        w = tl.where(v > -0.5, expm1_small(v), tl.exp(v) - 1.0)
        size = -w / (2.0 + w)
        z = tl.where(y < 0, -cap, cap) * size
        slope = scale * (4.0 * (1.0 + w) / ((2.0 + w) * (2.0 + w)))
    return z, slope
