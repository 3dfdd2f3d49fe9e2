"""Log-likelihood of a diagonal Gaussian."""

import torch

from fastelbo import _checks, _library, backends, reference
from fastelbo.ops.gaussian_rsample import clamp_before_broadcast
from fastelbo.scale import as_scale


def gaussian_log_prob(x, mean, s, *, scale="logvar", event_ndim=None, reduction="none", mask=None, backend=None):
    r"""Log-density of x under a diagonal Gaussian.

    .. math:: \ln N(x; \mu, \sigma^2) = -\tfrac12 \left(\tfrac{x - \mu}{\sigma}\right)^2 - \ln\sigma
              - \tfrac12 \ln 2\pi

    summed over each event.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides; or a number.
        mean, s: mean and raw scale, broadcast with x, or numbers. A 0-d s is one sigma for all, a number a fixed one.
        scale: a Scale or one of its kinds; how s becomes a standard deviation.
        event_ndim: how many trailing dimensions are one event and are summed; all but the first where None, none
            where 0.
        reduction: "none", or "sum" or "mean" over the dimensions that remain.
        mask: not implemented yet.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        Log-density in nats, float32 (float64 for float64 inputs), of the broadcast shape less the event's dimensions,
        or 0-d after a reduction.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, event_ndim out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        The density of the normal distribution.

    Example:
        >>> fastelbo.gaussian_log_prob(torch.zeros(2, 3), 0.0, 0.0)
        tensor([-2.7568, -2.7568])
    """
    _checks.later(mask=mask)
    return _log_prob(x, mean, s, scale, event_ndim, reduction, backend, negative=False)


def gaussian_nll(
    x, mean, s, *, scale="logvar", event_ndim=None, reduction="none", mask=None, beta_nll=0.0, backend=None
):
    r"""Negative log-likelihood of x under a diagonal Gaussian: the negative of gaussian_log_prob, constant included.

    Args:
        x, mean, s, scale, event_ndim, reduction, mask, backend: as in gaussian_log_prob.
        beta_nll: must be 0; other values are not implemented yet.

    Returns:
        As gaussian_log_prob, negated.

    Raises:
        As gaussian_log_prob.

    Source:
        The density of the normal distribution.

    Example:
        >>> fastelbo.gaussian_nll(torch.zeros(2, 3), 0.0, 0.0)
        tensor([2.7568, 2.7568])
    """
    _checks.later(mask=mask, beta_nll=beta_nll or None)
    return _log_prob(x, mean, s, scale, event_ndim, reduction, backend, negative=True)


def _log_prob(x, mean, s, scale, event_ndim, reduction, backend, negative):
    scale = as_scale(scale)
    (x, mean, s), shape, _ = _checks.operands(x=x, mean=mean, s=s)
    event_ndim = _checks.event_ndim(event_ndim, shape)
    _checks.reduction(reduction)
    backend = backends.choose(x.device, backend, backends.only_reference())
    if backend == "reference":
        function = reference.gaussian_nll if negative else reference.gaussian_log_prob
        return function(x, mean, s, scale=scale, event_ndim=event_ndim, reduction=reduction)
    s, scale = clamp_before_broadcast(s, shape, scale)
    kernel_ndim = _library.kernel_event_ndim(event_ndim, reduction, shape)
    out = _GaussianLogProb.apply(*_library.distinct(x, mean, s), scale, kernel_ndim, negative, backend)
    return _library.reduce(out, reduction, shape, event_ndim)


class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean, s, scale, event_ndim, negative, backend):
        ctx.save_for_backward(x, mean, s)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.event_ndim, ctx.negative, ctx.backend = scale, event_ndim, negative, backend
        return _FWD[backend](x, mean, s, scale.numbers, event_ndim, negative)

    @staticmethod
    def backward(ctx, d_out):
        if d_out is None:
            return (None,) * 7
        inputs = ctx.saved_tensors
        if _library.differentiable_backward():
            function = reference.gaussian_nll if ctx.negative else reference.gaussian_log_prob

            def log_prob(*inputs):
                return function(*inputs, scale=ctx.scale, event_ndim=ctx.event_ndim)

            grads = _library.reference_gradients(log_prob, inputs, ctx.needs_input_grad[:3], (d_out,))
        else:
            grads = _BWD[ctx.backend](
                d_out, *inputs, ctx.scale.numbers, ctx.event_ndim, ctx.negative, ctx.needs_input_grad[0]
            )
            grads = _library.input_gradients(grads, inputs, ctx.needs_input_grad)
        return *grads, None, None, None, None


def _fwd_fake(x, mean, s, scale, event_ndim, negative):
    shape = torch.broadcast_shapes(x.shape, mean.shape, s.shape)
    return _library.empty_terms(shape, event_ndim, mean, (x, mean, s))


def _bwd_fake(d_out, x, mean, s, scale, event_ndim, negative, x_grad):
    shape = torch.broadcast_shapes(x.shape, mean.shape, s.shape)
    d_x = _library.empty(shape, x.dtype, x) if x_grad else x.new_empty((0,), dtype=torch.float32)
    if s.numel() == 1:
        d_s = s.new_empty(s.shape, dtype=_library.arithmetic(x, mean, s))
    else:
        d_s = _library.empty(shape, s.dtype, s)
    return d_x, _library.empty(shape, mean.dtype, mean), d_s


_FWD = _library.define(
    "gaussian_log_prob_fwd",
    "(Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative) -> Tensor",
    _fwd_fake,
)
_BWD = _library.define(
    "gaussian_log_prob_bwd",
    "(Tensor d_out, Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative, bool x_grad)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
