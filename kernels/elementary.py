"""Elementary functions to about 1 ulp in float32, by the polynomials of csrc/math; float64 takes Triton's own.

Triton's float32 exp is an approximation whose error grows with the argument, and its libdevice functions do not run in
the interpreter.
"""

import triton
import triton.language as tl

_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # 9 bits: n * high is exact
_LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)
_LARGEST: tl.constexpr = tl.constexpr(88.37)
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer


@triton.jit
def smallest(x):
    """The least normal number of a type."""
    if x.dtype == tl.float64:
        return 2.2250738585072014e-308
    else:
        return 1.1754943508222875e-38


@triton.jit
def at_most(x, limit):
    """min(x, limit) that keeps NaN."""
    return tl.minimum(x, tl.full(x.shape, limit, x.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_least(x, limit):
    """max(x, limit) that keeps NaN."""
    return tl.maximum(x, tl.full(x.shape, limit, x.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _reduce(x):
    """x = n ln2 + r, |r| <= ln2 / 2: returns x, r, exp(r) - 1 - r and 2^n, which is 0 below the normal numbers.

    From _LARGEST on, where n would be 128, all are those of _LARGEST.
    """
    limited = at_most(x, _LARGEST)
    x = at_least(limited, -88.0)
    # n lands in the low bits, with the exponent's bias on it
    shifted = tl.fma(x, _LOG2E, _MAGIC + 127.0)
    n = shifted - (_MAGIC + 127.0)
    power = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    r = tl.fma(n, -_LN2_HIGH, x)
    r = tl.fma(n, -_LN2_LOW, r)
    q = tl.fma(r, 0.001392692677, 0.008363774046)
    q = tl.fma(q, r, 0.0416665487)
    q = tl.fma(q, r, 0.1666657329)
    q = tl.fma(q, r, 0.5)
    return limited, r, r * r * q, power


@triton.jit
def exp(x):
    """exp(x); 0 from -87.7 down and inf from 88.37 up, half an octave before float32 runs out of normal numbers."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        _, r, rest, power = _reduce(x)
        return tl.where(x > _LARGEST, float("inf"), tl.fma(r + rest, power, power))


@triton.jit
def expm1_parts(x):
    """exp(x) - 1, and exp(x) - 1 - x without cancellation near 0; shares its reduction with exp(x).

    Above 88.37 both stay what they are there: the square of the first, which all callers want, is inf all the same.
    """
    if x.dtype == tl.float64:
        series = tl.full(x.shape, 1.0, x.dtype)
        for k in tl.static_range(15, 2, -1):
            series = 1.0 + series * x * (1.0 / k)
        near = 0.5 * x * x * series
        far = tl.exp(x) - 1.0
        small = tl.abs(x) < 0.34375  # which float32 has: Triton 3.6 compares with no other numbers
        return tl.where(small, near + x, far), tl.where(small, near, far - x)
    else:
        limited, r, rest, power = _reduce(x)
        e = tl.fma(r + rest, power, power - 1.0)
        return e, tl.where(tl.abs(x) < 0.34375, rest, e - limited)


@triton.jit
def sqrt(x):
    """The square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def log(x):
    """ln x."""
    return tl.log(x)


@triton.jit
def log1p(x):
    """ln(1 + x) for x > -1."""
    u = 1.0 + x
    return log(u) + (x - (u - 1.0)) / u


@triton.jit
def tanh(x):
    """tanh x."""
    t, _ = expm1_parts(-2.0 * tl.abs(x))  # in [-1, 0]
    y = -t / (t + 2.0)
    return tl.where(x < 0, -y, y)
