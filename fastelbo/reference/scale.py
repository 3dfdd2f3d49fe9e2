r"""From a raw value s to ln sigma and sigma (fastelbo.Scale has the formulas).

``scale`` is anything with the attributes kind, clamp, clamp_grad, soft_clamp, min_std, var_eps and beta.
"""

import math

import torch


def arithmetic(*tensors):
    """The tensors in the precision of the arithmetic: float64 if any is float64, else float32."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    dtype = torch.float64 if double else torch.float32
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _ClampInward(torch.autograd.Function):
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


class _ClampInwardWithTangent(_ClampInward):
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
        function = _ClampInward if torch.compiler.is_compiling() else _ClampInwardWithTangent
        return function.apply(s, lo, hi)
    if scale.clamp_grad == "straight_through":
        # s + (clamp(s) - s) would round; select the value, add a zero that carries the gradient
        return s.detach().clamp(lo, hi) + torch.where(s.isfinite(), s - s.detach(), 0.0)
    return s.clamp(lo, hi)


def log_std_and_std(s, scale):
    """ln sigma and sigma of the raw value, both accurate."""
    s = clamp(s, scale)
    if scale.soft_clamp is not None:
        s = scale.soft_clamp * torch.tanh(s / scale.soft_clamp)
    if scale.kind == "logvar":
        log_std, std = 0.5 * s, torch.exp(0.5 * s)
    elif scale.kind == "log_std":
        log_std, std = s, torch.exp(s)
    elif scale.kind == "std":
        log_std, std = torch.log(s), s
    elif scale.kind == "var":
        log_std, std = 0.5 * torch.log(s), torch.sqrt(s)
    else:
        x = scale.beta * s
        # logaddexp(x, 0) is softplus without overflow; far below zero ln softplus(x) is x
        std = torch.logaddexp(x, torch.zeros_like(x)) / scale.beta
        small = x < -17
        log_std = torch.where(small, x - math.log(scale.beta), torch.log(torch.where(small, torch.ones_like(std), std)))
    if scale.min_std > 0 or scale.var_eps > 0:
        std = std + scale.min_std
        if scale.var_eps > 0:
            std = torch.sqrt(std * std + scale.var_eps)
        log_std = torch.log(std)
    return log_std, std


def is_exponential(scale):
    """Whether ln sigma is a multiple of the limited raw value, so that 1 / sigma can be had without overflow."""
    return scale.kind in ("logvar", "log_std") and scale.min_std == 0 and scale.var_eps == 0


def standardise(delta, log_std, std, scale):
    """delta / sigma; a difference of 0 stays 0 however small sigma is."""
    if is_exponential(scale):
        return delta * torch.exp((-log_std).clamp(max=math.floor(math.log(torch.finfo(std.dtype).max))))
    return delta / std
