"""Log-likelihood of a diagonal Gaussian."""

import torch

from fastelbo import _checks, _library, backends, distributed, reference
from fastelbo.ops.gaussian_rsample import clamp_before_broadcast
from fastelbo.reference.gaussian_kl import event_sum
from fastelbo.reference.scale import arithmetic, arithmetic_dtype, log_std_and_std
from fastelbo.scale import Scale, as_scale, numbers, of_numbers


def gaussian_log_prob(
    x: "torch.Tensor | float",
    mean: "torch.Tensor | float",
    s: "torch.Tensor | float",
    *,
    scale: "str | Scale" = "logvar",
    event_ndim: "int | None" = None,
    reduction: str = "none",
    mask: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""Log-density of x under a diagonal Gaussian.

    .. math:: \ln N(x; \mu, \sigma^2) = -\tfrac{1}{2} \left(\tfrac{x - \mu}{\sigma}\right)^2 - \ln\sigma
              - \tfrac{1}{2} \ln 2\pi

    summed over each event.

    Args:
        x: float32, float64, bfloat16 or float16, any shape and strides; or a number.
        mean, s: mean and raw scale, broadcast with x, or numbers. A 0-d s is one sigma for all, a number a fixed one.
        scale: a Scale or one of its kinds; how s becomes a standard deviation.
        event_ndim: how many trailing dimensions are one event and are summed; all but the first where None, none
            where 0.
        reduction: "none", or "sum" or "mean" over the dimensions that remain.
        mask: bool, broadcasts to the shape of x, mean and s: True where an element counts. One that does not adds 0 and
            receives gradient 0, even where it is NaN. A mean is over the events that have an element that counts (NaN
            where none has, as in torch's losses).
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
    return log_prob(x, mean, s, scale, event_ndim, reduction, mask, backend, negative=False)


def gaussian_nll(
    x: "torch.Tensor | float",
    mean: "torch.Tensor | float",
    s: "torch.Tensor | float",
    *,
    scale: "str | Scale" = "logvar",
    event_ndim: "int | None" = None,
    reduction: str = "none",
    mask: "torch.Tensor | None" = None,
    beta_nll: float = 0.0,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""Negative log-likelihood of x under a diagonal Gaussian: the negative of gaussian_log_prob, constant included.

    .. math:: -\sigma^{2 \beta} \ln N(x; \mu, \sigma^2)

    summed over each event.

    Args:
        x, mean, s, scale, event_ndim, reduction, mask, backend: as in gaussian_log_prob.
        beta_nll: :math:`\beta`, between 0 and 1; the weight :math:`\sigma^{2\beta}` of each element is held for the
            gradient. 0 is the likelihood; 1 gives the mean the gradient of the squared error.

    Returns:
        As gaussian_log_prob, negated.

    Raises:
        ValueError, TypeError, NotImplementedError: as gaussian_log_prob, and for a beta_nll out of range.

    Source:
        The density of the normal distribution. beta-NLL: Seitzer et al. 2022, "On the Pitfalls of Heteroscedastic
        Uncertainty Estimation with Probabilistic Neural Networks".

    Example:
        >>> fastelbo.gaussian_nll(torch.zeros(2, 3), 0.0, 0.0)
        tensor([2.7568, 2.7568])
        >>> fastelbo.gaussian_nll(torch.zeros(2, 3), 0.0, 4.0, scale="var", beta_nll=0.5)
        tensor([9.6725, 9.6725])
    """
    _checks.check_fraction("beta_nll", beta_nll)
    if beta_nll == 0:
        return log_prob(x, mean, s, scale, event_ndim, reduction, mask, backend, negative=True)
    scale = as_scale(scale)
    (x, mean, s), shape, _ = _checks.operands(event_ndim, x=x, mean=mean, s=s)
    event_ndim = _checks.check_event_ndim(event_ndim, shape)
    _checks.check_reduction(reduction)
    nll = log_prob(x, mean, s, scale, 0, "none", mask, backend, negative=True)
    weight = (2 * beta_nll * log_std_and_std(arithmetic(s.detach())[0], scale)[0]).exp()
    if mask is not None:
        weight = torch.where(mask, weight, 0.0)
    return _library.reduce(event_sum(weight * nll, event_ndim), reduction, shape, event_ndim, mask)


def log_prob(x, mean, s, scale, event_ndim, reduction, mask, backend, negative, full=True):
    """The log-density, or its negative; without ln(2 pi) / 2, unless it is to be in full."""
    scale = as_scale(scale)
    (x, mean, s), shape, dtype = _checks.operands(event_ndim, x=x, mean=mean, s=s)
    event_ndim = _checks.check_event_ndim(event_ndim, shape)
    _checks.check_reduction(reduction)
    if mask is not None:
        _checks.check_mask(mask, shape, x.device)
    backend = backends.choose(x.device, backend, backends.only_reference())
    s, scale = clamp_before_broadcast(s, shape, scale, dtype)
    kernel_ndim = _library.kernel_event_ndim(event_ndim, reduction, shape)
    options = scale, kernel_ndim, negative, full, backend
    if distributed.sharded(x, mean, s, mask):
        layout = distributed.Gaussian(shape, x=x, mean=mean, s=s, mask=mask)
        out = layout.terms(_terms(*layout.shards(), *options), kernel_ndim)
    else:
        out = _terms(x, mean, s, mask, *options)
    return _library.reduce(out, reduction, shape, event_ndim, mask)


def _terms(x, mean, s, mask, scale, event_ndim, negative, full, backend):
    inputs = _library.distinct(x, mean, s)
    if backend == "reference":
        function = reference.gaussian_nll if negative else reference.gaussian_log_prob
        return function(*inputs, scale=scale, event_ndim=event_ndim, mask=mask, full=full)
    if torch.compiler.is_exporting():  # a Function would leave no more in the program than its forward
        return _library.by_name(_FWD[backend])(*inputs, numbers(scale), event_ndim, negative, mask, full)
    return _GaussianLogProb.apply(*inputs, mask, scale, event_ndim, negative, full, backend)


class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mean, s, mask, scale, event_ndim, negative, full, backend):
        ctx.save_for_backward(x, mean, s, mask)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.event_ndim, ctx.negative, ctx.backend = scale, event_ndim, negative, backend
        return _FWD[backend](x, mean, s, numbers(scale), event_ndim, negative, mask, full)

    @staticmethod
    def backward(ctx, d_out):
        if d_out is None:
            return (None,) * 9
        *inputs, mask = ctx.saved_tensors
        if _library.differentiable_backward():
            function = reference.gaussian_nll if ctx.negative else reference.gaussian_log_prob

            def log_prob(*inputs):
                return function(*inputs, scale=ctx.scale, event_ndim=ctx.event_ndim, mask=mask)

            grads = _library.reference_gradients(log_prob, inputs, ctx.needs_input_grad[:3], (d_out,))
        else:
            grads = _BWD[ctx.backend](
                d_out, *inputs, numbers(ctx.scale), ctx.event_ndim, ctx.negative, mask, ctx.needs_input_grad[0]
            )
            grads = _library.input_gradients(grads, inputs, ctx.needs_input_grad)
        return *grads, None, None, None, None, None, None


def _differentiable(backend, x, mean, s, scale, event_ndim, negative, mask, full=True):
    return _GaussianLogProb.apply(x, mean, s, mask, of_numbers(scale), event_ndim, negative, full, backend)


def _fwd_check(x, mean, s, scale, event_ndim, negative, mask, full=True):
    _checks.check_scale_numbers(scale)
    shape = _checks.operands(x=x, mean=mean, s=s)[1]
    _checks.check_raw_event(event_ndim, mask, shape, x.device)


def _bwd_check(d_out, x, mean, s, scale, event_ndim, negative, mask, x_grad):
    _checks.check_scale_numbers(scale)
    shape = _checks.operands(x=x, mean=mean, s=s)[1]
    _checks.check_raw_event(event_ndim, mask, shape, x.device)
    _checks.check_upstream("d_out", d_out, shape[: len(shape) - event_ndim], x.device)


def _fwd_fake(x, mean, s, scale, event_ndim, negative, mask, full=True):
    shape = torch.broadcast_shapes(x.shape, mean.shape, s.shape)
    return _library.empty_terms(shape, event_ndim, mean, (x, mean, s))


def _bwd_fake(d_out, x, mean, s, scale, event_ndim, negative, mask, x_grad):
    shape = torch.broadcast_shapes(x.shape, mean.shape, s.shape)
    inputs = x, mean, s
    d_x = _library.empty_gradient(shape, x, *inputs) if x_grad else x.new_empty((0,), dtype=torch.float32)
    if s.numel() == 1:
        d_s = s.new_empty(s.shape, dtype=arithmetic_dtype(*inputs))
    else:
        d_s = _library.empty_gradient(shape, s, *inputs)
    return d_x, _library.empty_gradient(shape, mean, *inputs), d_s


_FWD = _library.define(
    "gaussian_log_prob_fwd",
    "(Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative, Tensor? mask,"
    " bool full=True) -> Tensor",
    _fwd_fake,
    _fwd_check,
    _differentiable,
)
_BWD = _library.define(
    "gaussian_log_prob_bwd",
    "(Tensor d_out, Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative, Tensor? mask,"
    " bool x_grad) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_check,
)
