"""From raw values to standard deviations, as in csrc/math/scale.h; a SCALE is what plan.numbers() makes of one."""

import triton
import triton.language as tl

from fastelbo.kernels import elementary

_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
_LOGVAR: tl.constexpr = tl.constexpr(0)
_LOG_STD: tl.constexpr = tl.constexpr(1)
_STD: tl.constexpr = tl.constexpr(2)
_VAR: tl.constexpr = tl.constexpr(3)
_SOFTPLUS: tl.constexpr = tl.constexpr(4)


@triton.jit
def is_exponential(SCALE: tl.constexpr):
    """Whether ln sigma is a multiple of the limited raw value."""
    return SCALE[0] <= _LOG_STD and SCALE[5] == 0 and SCALE[6] == 0


@triton.jit
def _is_clamped(SCALE: tl.constexpr):
    return SCALE[2] > -_INFINITY or SCALE[3] < _INFINITY


@triton.jit
def _is_shifted(SCALE: tl.constexpr):
    """Whether something is added to the kind's own standard deviation."""
    return SCALE[5] > 0 or SCALE[6] > 0


@triton.jit
def _clamped(s, SCALE: tl.constexpr):
    t = s
    if SCALE[2] > -_INFINITY:
        t = elementary.at_least(t, SCALE[2])
    if SCALE[3] < _INFINITY:
        t = elementary.at_most(t, SCALE[3])
    return t


@triton.jit
def _soften(t, SCALE: tl.constexpr):
    """c tanh(t / c) of a clamped raw value for a soft clamp c, and its slope."""
    if SCALE[4] > 0:
        x = t / SCALE[4]
        tail = elementary.exp(-2.0 * tl.abs(x))
        # 1 - tanh^2 would have no digits left where that is near 1
        return elementary.tanh(x) * SCALE[4], 4.0 * tail / ((1.0 + tail) * (1.0 + tail))
    else:
        return t, tl.full(t.shape, 1.0, t.dtype)


@triton.jit
def _tails(x):
    """Where softplus(x) is exp(x), to the last digit of its logarithm."""
    if x.dtype == tl.float64:
        return x < -37
    else:
        return x < -17


@triton.jit
def _own(t, SCALE: tl.constexpr):
    """Of limited raw values the kind's own sigma, its slope, and its logarithm."""
    if SCALE[0] == _LOGVAR:
        log_own = 0.5 * t
        own = elementary.exp(log_own)
        return own, 0.5 * own, log_own
    elif SCALE[0] == _LOG_STD:
        own = elementary.exp(t)
        return own, own, t
    elif SCALE[0] == _STD:
        return t, tl.full(t.shape, 1.0, t.dtype), elementary.log(t)
    elif SCALE[0] == _VAR:
        own = elementary.sqrt(t)
        return own, 0.5 / own, 0.5 * elementary.log(t)
    else:
        tl.static_assert(SCALE[0] == _SOFTPLUS)
        x = t * SCALE[7]
        tail = elementary.exp(-tl.abs(x))
        own = (elementary.at_least(x, 0.0) + elementary.log1p(tail)) / SCALE[7]
        # far below zero softplus(x) is exp(x), and its logarithm is x long after exp(x) has become 0
        log_own = tl.where(_tails(x), x - elementary.log(tl.full(x.shape, SCALE[7], x.dtype)), elementary.log(own))
        return own, tl.where(x < 0, tail, 1.0) / (1.0 + tail), log_own


@triton.jit
def spread(s, SCALE: tl.constexpr, ALONE: tl.constexpr = False):
    """sigma, ln sigma, d sigma / d s and d ln sigma^2 / d s of raw values.

    ALONE, against the standard normal, ln sigma keeps its digits near 0.
    """
    clamped = _clamped(s, SCALE)
    t, slope = _soften(clamped, SCALE)
    own, d_own, log_std = _own(t, SCALE)
    if is_exponential(SCALE):
        return own, log_std, d_own * slope, (2.0 if SCALE[0] == _LOG_STD else 1.0) * slope
    else:
        std = own
        d_std = d_own
        if _is_shifted(SCALE):
            std += SCALE[5]
            if SCALE[6] > 0:
                shifted = std
                std = elementary.sqrt(tl.fma(shifted, shifted, tl.full(s.shape, SCALE[6], s.dtype)))
                d_std *= shifted / std
            log_std = elementary.log(std)
        if ALONE and SCALE[8] < _INFINITY:  # through the distance to the unit, where sigma is 1
            high, low = _unit(s, SCALE)
            excess = difference(clamped, high, low, SCALE)
            if SCALE[6] > 0:
                rest: tl.constexpr = 1.0 - SCALE[6]
                excess *= (own + SCALE[5] + elementary.sqrt(tl.full(s.shape, rest, s.dtype))) / (1.0 + std)
            log_std = tl.where(tl.abs(excess) < 0.5, elementary.log1p(excess), log_std)
        d_std *= slope
        d_logvar = 2.0 * d_std / std
        if SCALE[0] == _SOFTPLUS and not _is_shifted(SCALE):
            d_logvar = tl.where(_tails(t * SCALE[7]), 2.0 * SCALE[7] * slope, d_logvar)
        return std, log_std, d_std, d_logvar


@triton.jit
def _unit(s, SCALE: tl.constexpr):
    """The unit as a sum, of s's type: a number that a function returns is float32."""
    if s.dtype == tl.float64:
        return tl.full(s.shape, SCALE[8], s.dtype), tl.full(s.shape, SCALE[9], s.dtype)
    else:
        return tl.full(s.shape, SCALE[10], s.dtype), tl.full(s.shape, SCALE[11], s.dtype)


@triton.jit
def difference(q, p, low, SCALE: tl.constexpr):
    """The kind's own sigma of q less that of p + low, clamped raw values, without cancellation."""
    apart = q - p - low
    if SCALE[4] > 0:
        # tanh(a) - tanh(b), also where both are near 1 or -1, and where they are close
        a = q / SCALE[4]
        b = p / SCALE[4]
        tail_a = elementary.exp(-2.0 * tl.abs(a))
        tail_b = elementary.exp(-2.0 * tl.abs(b))
        nearer = tl.where(a * b < 0, 1.0, tl.maximum(tail_a, tail_b))  # through 0 the tails' product is exp(-2 |apart|)
        step, _ = elementary.expm1_parts(-2.0 * tl.abs(apart / SCALE[4]))
        size = -2.0 * SCALE[4] * nearer * step / ((1.0 + tail_a) * (1.0 + tail_b))
        apart = tl.where(apart < 0, -size, size)
    if SCALE[0] == _STD:
        return apart
    t, _ = _soften(p, SCALE)
    if SCALE[0] == _SOFTPLUS:
        u = apart * SCALE[7]
        x = t * SCALE[7]
        tail = elementary.exp(-tl.abs(x))
        grown, _ = elementary.expm1_parts(elementary.at_most(tl.where(x < 0, u, -u), 60.0))
        grown = elementary.log1p(tail / (1.0 + tail) * grown)
        return tl.where(x < 0, grown, u + grown) / SCALE[7]
    else:
        own, _, _ = _own(t, SCALE)
        if SCALE[0] == _VAR:
            other, _ = _soften(q, SCALE)
            other, _, _ = _own(other, SCALE)
            return apart / (other + own)
        else:
            grown, _ = elementary.expm1_parts((0.5 if SCALE[0] == _LOGVAR else 1.0) * apart)
            return own * grown


@triton.jit
def divide(x, spread, SCALE: tl.constexpr):
    """x / sigma, finite wherever the quotient is."""
    if _is_shifted(SCALE) or SCALE[0] == _STD or SCALE[0] == _VAR:
        return x / spread[0]
    else:
        # 1 / sigma in two factors, each of them kept finite: a difference of 0 stays 0 however small sigma is
        if x.dtype == tl.float64:
            limit: tl.constexpr = 709.0
            lifted: tl.constexpr = 8.218407461554972e307
        else:
            limit: tl.constexpr = 88.0
            lifted: tl.constexpr = 1.6516362549940018e38
        exponent = -spread[1]
        beyond = exponent > limit
        inverse = elementary.exp(elementary.at_most(tl.where(beyond, exponent - limit, exponent), limit))
        by_log = x * inverse * tl.where(beyond, lifted, 1.0)
        if is_exponential(SCALE):
            return by_log
        else:
            return tl.where(spread[0] < 4 * elementary.smallest(x), by_log, x / spread[0])


@triton.jit
def log_ratio(s_q, q, s_p, p, SCALE: tl.constexpr, SCALE_P: tl.constexpr):
    """ln(sigma_q / sigma_p) of raw values and their spreads: where both lie close, through the difference of the
    standard deviations, which of one scale comes without cancellation."""
    far = q[1] - p[1]
    if not _same(SCALE, SCALE_P):
        if is_exponential(SCALE) or is_exponential(SCALE_P):
            return far
        relative = (q[0] - p[0]) / p[0]
        return tl.where(tl.abs(relative) < 0.5, elementary.log1p(relative), far)
    elif is_exponential(SCALE) and SCALE[4] == 0:
        return far
    else:
        t_q = _clamped(s_q, SCALE)
        t_p = _clamped(s_p, SCALE_P)
        apart = difference(t_q, t_p, 0.0, SCALE)
        if SCALE[6] > 0:
            own_q, _, _ = _own(_soften(t_q, SCALE)[0], SCALE)
            own_p, _, _ = _own(_soften(t_p, SCALE)[0], SCALE)
            apart *= (own_q + own_p + 2.0 * SCALE[5]) / (q[0] + p[0])
        relative = apart / p[0]
        near = (tl.abs(relative) < 0.5) & (p[0] > 4 * elementary.smallest(p[0]))
        h = tl.where(near, elementary.log1p(relative), far)
        if SCALE[0] == _SOFTPLUS and SCALE[4] == 0 and not _is_shifted(SCALE):
            h = tl.where(_tails(tl.maximum(t_q, t_p) * SCALE[7]), (t_q - t_p) * SCALE[7], h)
        return h


@triton.jit
def _same(SCALE: tl.constexpr, SCALE_P: tl.constexpr):
    """Whether two scales have all but the clamp in common."""
    return (
        SCALE[0] == SCALE_P[0]
        and SCALE[4] == SCALE_P[4]
        and SCALE[5] == SCALE_P[5]
        and SCALE[6] == SCALE_P[6]
        and SCALE[7] == SCALE_P[7]
    )


@triton.jit
def clamp_gradient(s, grad, SCALE: tl.constexpr):
    """The gradient that reaches the raw value when the limited value is owed `grad`."""
    if not _is_clamped(SCALE) or SCALE[1] == 1:  # straight through
        return grad
    else:
        # Triton 3.6 compares with numbers as float32
        below = s < tl.full(s.shape, SCALE[2], s.dtype)
        above = s > tl.full(s.shape, SCALE[3], s.dtype)
        if SCALE[1] == 2:  # inward: a descent step moves s against the gradient
            return tl.where((below & (grad > 0)) | (above & (grad < 0)), 0.0, grad)
        else:
            return tl.where(below | above, 0.0, grad)
