r"""From a raw value s to ln sigma and sigma (fastelbo.Scale has the formulas).

``scale`` is a fastelbo.Scale.
"""

import math

import torch


def arithmetic_dtype(*tensors):
    """The precision that ops compute in, and return KL and log-densities in: float64 if a tensor is, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def arithmetic(*tensors):
    """The tensors in the precision of the arithmetic."""
    dtype = arithmetic_dtype(*tensors)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class ClampInward(torch.autograd.Function):
    """clamp whose gradient passes where the value is inside, and outside only if descent moves it back inside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s, lo, hi):
        return s.clamp(lo, hi)

    @staticmethod
    def setup_context(ctx, inputs, output):
        s, ctx.lo, ctx.hi = inputs
        ctx.save_for_backward(s)
        ctx.save_for_forward(s)

    @staticmethod
    def backward(ctx, grad):
        (s,) = ctx.saved_tensors
        stopped = ((s < ctx.lo) & (grad > 0)) | ((s > ctx.hi) & (grad < 0))
        return torch.where(stopped, 0.0, grad), None, None


class _ClampInwardWithTangent(ClampInward):
    """Apart, because torch.compile traces no Function that has a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent, _lo, _hi):
        # A tangent has no descent direction: outside the limits the value does not move.
        (s,) = ctx.saved_tensors
        return torch.where((s < ctx.lo) | (s > ctx.hi), 0.0, tangent)


def clamp(s, scale):
    """The raw value within the limits of ``scale.clamp``, with the gradient that ``scale.clamp_grad`` asks for."""
    if scale.clamp is None:
        return s
    lo, hi = scale.clamp
    if scale.clamp_grad == "inward":
        function = ClampInward if torch.compiler.is_compiling() else _ClampInwardWithTangent
        return function.apply(s, lo, hi)
    if scale.clamp_grad == "straight_through":
        # s + (clamp(s) - s) would round; select the value, add a zero that carries the gradient
        return s.detach().clamp(lo, hi) + torch.where(s.isfinite(), s - s.detach(), 0.0)
    return s.clamp(lo, hi)


def tails(x):
    """Where softplus(x) is exp(x), to the last digit of its logarithm."""
    return x < (-37 if x.dtype == torch.float64 else -17)


def log_std_and_std(s, scale):
    """ln sigma and sigma of the raw value, both accurate: the former relatively, too, where sigma is near 1."""
    s = clamp(s, scale)
    own = own_std(s, scale)
    t = soften(s, scale)
    if is_shifted(scale):
        std = own + scale.min_std
        if scale.var_eps > 0:
            std = torch.sqrt(std * std + scale.var_eps)
        log_std = torch.log(std)
    elif scale.kind in ("logvar", "log_std"):
        log_std, std = _factor(scale) * t, own
    elif scale.kind == "softplus":
        x, std = scale.beta * t, own
        small = tails(x)
        log_std = torch.where(small, x - math.log(scale.beta), torch.log(torch.where(small, torch.ones_like(own), own)))
    else:
        log_std, std = _factor(scale) * torch.log(t), own
    if scale.unit is not None:
        high, low = split(scale.unit, s.dtype)
        one = torch.ones((), dtype=s.dtype, device=s.device)
        excess = difference(s, high * one, scale, low)
        if scale.var_eps > 0:
            excess = excess * ((own + scale.min_std + math.sqrt(1 - scale.var_eps)) / (1 + std))
        near = excess.abs() < 0.5
        log_std = torch.where(near, torch.log1p(torch.where(near, excess, 0.0)), log_std)
    return log_std, std


def _factor(scale):
    """Of the (limited) raw value, or its logarithm, in ln sigma."""
    return 0.5 if scale.kind in ("logvar", "var") else 1.0


def is_shifted(scale):
    """Whether something is added to the kind's own standard deviation."""
    return scale.min_std > 0 or scale.var_eps > 0


def soften(s, scale):
    """c tanh(s / c) for a soft_clamp c."""
    if scale.soft_clamp is None:
        return s
    x = s / scale.soft_clamp
    tail = torch.exp(-2 * x.abs())  # torch's gradient of tanh, 1 - tanh^2, has no digits left where that is near 1
    return scale.soft_clamp * torch.where(x.abs() < 1, torch.tanh(x), x.sign() * (1 - tail) / (1 + tail))


def own_std(s, scale):
    """The standard deviation of the clamped raw value before min_std and var_eps."""
    s = soften(s, scale)
    if scale.kind in ("logvar", "log_std"):
        return torch.exp(_factor(scale) * s)
    if scale.kind == "std":
        return s
    if scale.kind == "var":
        return torch.sqrt(s)
    # logaddexp(x, 0) is softplus without overflow
    x = scale.beta * s
    return torch.logaddexp(x, torch.zeros_like(x)) / scale.beta


def split(unit, dtype):
    """A number that comes as the sum of two in float64 as such a sum in dtype."""
    high, low = unit
    if dtype == torch.float64:
        return unit
    mantissa, exponent = math.frexp(high)
    rounded = math.ldexp(round(mantissa * 2**24), exponent - 24)
    return rounded, high - rounded + low


def difference(s_q, s_p, scale, low=0.0):
    """own_std(s_q) - own_std(s_p + low) of clamped raw values, without cancellation."""
    apart = s_q - s_p - low
    if scale.soft_clamp is not None:
        apart = _soft_difference(s_q / scale.soft_clamp, s_p / scale.soft_clamp, apart / scale.soft_clamp)
        apart = scale.soft_clamp * apart
    if scale.kind == "std":
        return apart
    if scale.kind == "var":
        return apart / (own_std(s_q, scale) + own_std(s_p, scale))
    # exponents are limited: what they would overflow in is not close, and its gradient must not be NaN
    if scale.kind in ("logvar", "log_std"):
        return own_std(s_p, scale) * torch.expm1((_factor(scale) * apart).clamp(max=60.0))
    u, x_p = scale.beta * apart, scale.beta * soften(s_p, scale)
    share, left = torch.sigmoid(-x_p.abs()), x_p < 0
    grown = torch.log1p(share * torch.expm1(torch.where(left, u, -u).clamp(max=60.0)))
    return torch.where(left, grown, u + grown) / scale.beta


def _soft_difference(a, b, apart):
    """tanh(a) - tanh(b), apart = a - b: also where both are near 1 or -1."""
    tail_a, tail_b = torch.exp(-2 * a.abs()), torch.exp(-2 * b.abs())
    inner, step = torch.maximum(tail_a, tail_b), -torch.expm1(-2 * apart.abs())
    same = 2 * inner * step * torch.sign(apart) / ((1 + tail_a) * (1 + tail_b))
    return torch.where(a.sign() * b.sign() < 0, torch.tanh(a) - torch.tanh(b), same)


def is_exponential(scale):
    """Whether ln sigma is a multiple of the limited raw value, so that 1 / sigma can be had without overflow."""
    return scale.kind in ("logvar", "log_std") and scale.min_std == 0 and scale.var_eps == 0


def standardise(delta, log_std, std, scale):
    """delta / sigma: of a difference of 0 that is 0 however small sigma is, and finite wherever the quotient is."""
    if is_shifted(scale) or scale.kind in ("std", "var"):
        return delta / std
    # 1 / sigma in two factors, each of them kept finite
    limit = math.floor(math.log(torch.finfo(std.dtype).max))
    beyond = -log_std > limit
    inverse = torch.exp((-log_std - torch.where(beyond, torch.full_like(std, limit), 0.0)).clamp(max=limit))
    by_log = delta * inverse * torch.where(beyond, torch.full_like(std, math.exp(limit)), 1.0)
    if is_exponential(scale):
        return by_log
    tiny = std < 4 * torch.finfo(std.dtype).tiny
    return torch.where(tiny, by_log, delta / torch.where(tiny, 1.0, std))
