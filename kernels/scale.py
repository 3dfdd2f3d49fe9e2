"""From raw values to standard deviations, as in csrc/common/scale.h; a SCALE is what plan.numbers() makes of one."""

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
def _limit(s, SCALE: tl.constexpr):
    """The raw value within its limits, and the slope of that inside the clamp."""
    t = s
    if SCALE[2] > -_INFINITY:
        t = elementary.at_least(t, SCALE[2])
    if SCALE[3] < _INFINITY:
        t = elementary.at_most(t, SCALE[3])
    if SCALE[4] > 0:
        ratio = elementary.tanh(t / SCALE[4])
        return ratio * SCALE[4], 1.0 - ratio * ratio
    else:
        return t, tl.full(s.shape, 1.0, s.dtype)


@triton.jit
def spread(s, SCALE: tl.constexpr):
    """sigma, ln sigma, d sigma / d s and d ln sigma^2 / d s of raw values."""
    t, slope = _limit(s, SCALE)
    if SCALE[0] == _LOGVAR:
        log_std = 0.5 * t
        std = elementary.exp(log_std)
        d_std = 0.5 * std
    elif SCALE[0] == _LOG_STD:
        log_std = t
        std = elementary.exp(t)
        d_std = std
    elif SCALE[0] == _STD:
        log_std = elementary.log(t)
        std = t
        d_std = tl.full(s.shape, 1.0, s.dtype)
    elif SCALE[0] == _VAR:
        log_std = 0.5 * elementary.log(t)
        std = elementary.sqrt(t)
        d_std = 0.5 / std
    else:
        tl.static_assert(SCALE[0] == _SOFTPLUS)
        x = t * SCALE[7]
        tail = elementary.exp(-tl.abs(x))
        std = (elementary.at_least(x, 0.0) + elementary.log1p(tail)) / SCALE[7]
        d_std = tl.where(x < 0, tail, 1.0) / (1.0 + tail)
        # far below zero softplus(x) is exp(x), and its logarithm is x long after exp(x) has become 0
        log_std = tl.where(x < -17, x - elementary.log(tl.full(x.shape, SCALE[7], x.dtype)), elementary.log(std))
    if is_exponential(SCALE):
        return std, log_std, d_std * slope, (2.0 if SCALE[0] == _LOG_STD else 1.0) * slope
    else:
        if SCALE[5] > 0 or SCALE[6] > 0:
            std += SCALE[5]
            if SCALE[6] > 0:
                shifted = std
                std = elementary.sqrt(tl.fma(shifted, shifted, tl.full(s.shape, SCALE[6], s.dtype)))
                d_std *= shifted / std
            log_std = elementary.log(std)
        d_std *= slope
        d_logvar = 2.0 * d_std / std
        if SCALE[0] == _SOFTPLUS and SCALE[5] == 0 and SCALE[6] == 0:
            d_logvar = tl.where(t * SCALE[7] < -17, 2.0 * SCALE[7] * slope, d_logvar)
        return std, log_std, d_std, d_logvar


@triton.jit
def divide(x, spread, SCALE: tl.constexpr):
    """x / sigma, finite wherever the quotient is."""
    if is_exponential(SCALE):
        # 1 / sigma is kept finite: a difference of 0 stays 0 however small sigma is
        if x.dtype == tl.float64:
            return x * elementary.exp(elementary.at_most(-spread[1], 709.0))
        else:
            return x * elementary.exp(elementary.at_most(-spread[1], 88.0))
    else:
        return x / spread[0]


@triton.jit
def log_ratio(q, p, SCALE: tl.constexpr, SCALE_P: tl.constexpr):
    """ln(sigma_q / sigma_p). Where both come as standard deviations and lie close, through their exact difference."""
    difference = q[1] - p[1]
    if is_exponential(SCALE) or is_exponential(SCALE_P):
        return difference
    else:
        relative = (q[0] - p[0]) / p[0]
        return tl.where(tl.abs(relative) < 0.5, elementary.log1p(relative), difference)


@triton.jit
def clamp_gradient(s, grad, SCALE: tl.constexpr):
    """The gradient that reaches the raw value when the limited value is owed `grad`."""
    if not _is_clamped(SCALE) or SCALE[1] == 1:  # straight through
        return grad
    elif SCALE[1] == 2:  # inward: a descent step moves s against the gradient
        stopped = ((s < SCALE[2]) & (grad > 0)) | ((s > SCALE[3]) & (grad < 0))
        return tl.where(stopped, 0.0, grad)
    else:
        return tl.where((s < SCALE[2]) | (s > SCALE[3]), 0.0, grad)
