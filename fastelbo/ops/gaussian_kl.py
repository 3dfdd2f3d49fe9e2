"""KL divergence of diagonal Gaussians."""

import torch

from fastelbo import _checks, _library, backends, reference
from fastelbo.ops.gaussian_rsample import clamp_before_broadcast
from fastelbo.scale import as_scale


def gaussian_kl(
    mean_q,
    s_q,
    mean_p=None,
    s_p=None,
    *,
    scale="logvar",
    scale_p=None,
    event_ndim=None,
    reduction="none",
    free_bits=None,
    free_bits_per="dim",
    balance=None,
    mask=None,
    backend=None,
):
    r"""KL divergence of a diagonal Gaussian q from a diagonal Gaussian p, or from the standard normal.

    .. math:: KL(q \| p) = \tfrac12 \left(\tfrac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} - 1\right)
              - \ln\tfrac{\sigma_q}{\sigma_p}

    summed over each event; computed without cancellation, so never negative and right to the last digits for posteriors
    that lie close to their prior (docs/numerics.md).

    Args:
        mean_q: float32, float64, bfloat16 or float16, any shape and strides; or a number.
        s_q: the raw scale of q, broadcast with mean_q, or a number.
        mean_p, s_p: the same for p, tensors or numbers; the standard normal where both are None.
        scale: a Scale or one of its kinds; how s_q becomes a standard deviation.
        scale_p: the same for s_p; scale where None.
        event_ndim: how many trailing dimensions are one event and are summed; all but the first where None, none
            where 0.
        reduction: "none", or "sum" or "mean" over the dimensions that remain.
        free_bits, free_bits_per, balance, mask: not implemented yet.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        KL in nats, float32 (float64 for float64 inputs), of the broadcast shape less the event's dimensions, or 0-d
        after a reduction.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, event_ndim out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", appendix B.

    Example:
        >>> fastelbo.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    if free_bits is not None or balance is not None or mask is not None:
        _checks.later(free_bits=free_bits, balance=balance, mask=mask)
    scale = as_scale(scale)
    _checks.prior(mean_p, s_p, scale_p)
    scale_p = prior_scale(scale, mean_p, scale_p)
    (mean_q, s_q, mean_p, s_p), shape, _ = _checks.operands(mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p)
    event_ndim = _checks.event_ndim(event_ndim, shape)
    _checks.reduction(reduction)
    backend = backends.choose(mean_q.device, backend, backends.only_reference())
    if backend == "reference":
        return reference.gaussian_kl(
            mean_q, s_q, mean_p, s_p, scale=scale, scale_p=scale_p, event_ndim=event_ndim, reduction=reduction
        )
    s_q, scale = clamp_before_broadcast(s_q, shape, scale)
    if s_p is not None:
        s_p, scale_p = clamp_before_broadcast(s_p, shape, scale_p)
    kernel_ndim = _library.kernel_event_ndim(event_ndim, reduction, shape)
    kl = _GaussianKL.apply(*_library.distinct(mean_q, s_q, mean_p, s_p), scale, scale_p, kernel_ndim, backend)
    return _library.reduce(kl, reduction, shape, event_ndim)


def prior_scale(scale, mean_p, scale_p):
    """The Scale of the prior; None for the standard normal."""
    if mean_p is None:
        return None
    return scale if scale_p is None else as_scale(scale_p)


def numbers(scale):
    """A Scale or None as the compiled ops take it."""
    return None if scale is None else scale.numbers


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, backend):
        ctx.save_for_backward(mean_q, s_q, mean_p, s_p)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.scale_p, ctx.event_ndim, ctx.backend = scale, scale_p, event_ndim, backend
        return _FWD[backend](mean_q, s_q, mean_p, s_p, scale.numbers, numbers(scale_p), event_ndim)

    @staticmethod
    def backward(ctx, d_kl):
        if d_kl is None:
            return (None,) * 8
        inputs = ctx.saved_tensors
        if _library.differentiable_backward():

            def kl(*inputs):
                return reference.gaussian_kl(*inputs, scale=ctx.scale, scale_p=ctx.scale_p, event_ndim=ctx.event_ndim)

            grads = _library.reference_gradients(kl, inputs, ctx.needs_input_grad[:4], (d_kl,))
        else:
            prior_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            grads = _BWD[ctx.backend](
                d_kl, *inputs, ctx.scale.numbers, numbers(ctx.scale_p), ctx.event_ndim, prior_grad
            )
            grads = _library.input_gradients(grads, inputs, ctx.needs_input_grad)
        return *grads, None, None, None, None


def prior_shape(mean_q, s_q, mean_p, s_p):
    """The shape to which q and p broadcast."""
    if mean_p is None:
        return torch.broadcast_shapes(mean_q.shape, s_q.shape)
    return torch.broadcast_shapes(mean_q.shape, s_q.shape, mean_p.shape, s_p.shape)


def gradients_fake(shape, mean_q, s_q, mean_p, s_p, prior_grad):
    """The fake gradients of q and p."""
    q = _library.empty(shape, mean_q.dtype, mean_q), _library.empty(shape, s_q.dtype, s_q)
    if prior_grad:
        return *q, _library.empty(shape, mean_p.dtype, mean_p), _library.empty(shape, s_p.dtype, s_p)
    return *q, mean_q.new_empty((0,), dtype=torch.float32), mean_q.new_empty((0,), dtype=torch.float32)


def _fwd_fake(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim):
    shape = prior_shape(mean_q, s_q, mean_p, s_p)
    return _library.empty_terms(shape, event_ndim, mean_q, (mean_q, s_q, mean_p, s_p))


def _bwd_fake(d_kl, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, prior_grad):
    return gradients_fake(prior_shape(mean_q, s_q, mean_p, s_p), mean_q, s_q, mean_p, s_p, prior_grad)


_FWD = _library.define(
    "gaussian_kl_fwd",
    "(Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p, int event_ndim)"
    " -> Tensor",
    _fwd_fake,
)
_BWD = _library.define(
    "gaussian_kl_bwd",
    "(Tensor d_kl, Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p,"
    " int event_ndim, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)
