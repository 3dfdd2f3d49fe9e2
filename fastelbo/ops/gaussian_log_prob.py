"""Log-likelihood of a diagonal Gaussian."""

from typing import NamedTuple

import torch

from fastelbo import _autograd, _checks, _library, _sharding, backends, reference
from fastelbo.ops import _gaussian
from fastelbo.reference.gaussian_kl import event_sum
from fastelbo.reference.gaussian_log_prob import HALF_LOG_TWO_PI
from fastelbo.reference.scale import arithmetic, arithmetic_dtype, log_std_and_std
from fastelbo.scale import Scale, as_scale, numbers


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
        x: float32, float64, bfloat16 or float16, any shape and strides; integers, as of images; or a number.
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
    beta_nll = _checks.check_fraction("beta_nll", beta_nll)
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
    return _gaussian.reduce(event_sum(weight * nll, event_ndim), reduction, shape, event_ndim, mask)


class Terms(NamedTuple):
    """What a negative log-likelihood has beside half the square: ln sigma, times a weight, and a constant."""

    log_weight: float = 1.0
    constant: float = HALF_LOG_TWO_PI


_DENSITY = list(Terms())  # which a call leaves out, for the dispatcher takes its time for every argument


def log_prob(x, mean, s, scale, event_ndim, reduction, mask, backend, negative, terms=Terms()):  # noqa: B008
    """The log-density, or its negative, with these terms."""
    given = x, mean, s, mask
    choices = scale, reduction, backend, negative, terms
    plan, kind = _KNOWN.find(mean, s, (x, mask), choices, event_ndim, type(event_ndim))
    if plan:
        options, backend, shape, event_ndim = plan
        out = _autograd.at_once(_GaussianLogProb, given, options, backend)
    else:
        scale = as_scale(scale)
        (x, mean, s), shape, dtype = _checks.operands(event_ndim, x=x, mean=mean, s=s)
        event_ndim = _checks.check_event_ndim(event_ndim, shape)
        _checks.check_reduction(reduction)
        if mask is not None:
            _checks.check_mask(mask, shape, x.device)
        backend = backends.choose(x.device, backend, backends.only_reference())
        s, scale = _gaussian.clamp_before_broadcast(s, shape, scale, dtype)
        tensors = x, mean, s, mask
        kernel_ndim = _gaussian.kernel_event_ndim(event_ndim, reduction, shape)
        options = scale, kernel_ndim, negative, *terms
        run = _local if len(shape) <= _gaussian.MAX_DIMS else _folded
        if _sharding.sharded(*tensors):
            layout = _sharding.Gaussian(shape, x=x, mean=mean, s=s, mask=mask)
            out = layout.terms(run(layout.shards(), options, backend), kernel_ndim)
        else:
            out = run(tensors, options, backend)
        if kind and run is _local and backend != "reference":
            _KNOWN.keep(kind, (options, backend, shape, event_ndim), given, tensors)
    return _gaussian.reduce(out, reduction, shape, event_ndim, mask)


_KNOWN = _gaussian.Known()


def _folded(tensors, options, backend):
    if backend == "reference":
        return _reference(*tensors, options)
    *operands, mask = tensors
    scale, event_ndim, *rest = options
    fold = _gaussian.Fold(operands, event_ndim, mask)
    return fold.terms(_local(fold.tensors, (scale, fold.event_ndim, *rest), backend))


def _reference(x, mean, s, mask, options):
    scale, event_ndim, negative, *terms = options
    function = reference.gaussian_nll if negative else reference.gaussian_log_prob
    return function(x, mean, s, scale=scale, event_ndim=event_ndim, mask=mask, **Terms(*terms)._asdict())


def _arguments(x, mean, s, mask, options):
    """As the forward's schema has them."""
    scale, event_ndim, negative, *terms = options
    given = x, mean, s, numbers(scale), event_ndim, negative
    return given if mask is None and terms == _DENSITY else (*given, mask, *terms)


@_autograd.recordable
class _GaussianLogProb(torch.autograd.Function):
    @staticmethod
    def compute(x, mean, s, mask, options, backend):
        return _FWD[backend](*_arguments(x, mean, s, mask, options))

    @staticmethod
    def forward(ctx, x, mean, s, mask, options, backend):
        ctx.save_for_backward(x, mean, s, mask)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return _GaussianLogProb.compute(x, mean, s, mask, options, backend)

    @staticmethod
    def backward(ctx, d_out):
        if d_out is None:
            return (None,) * 6
        *inputs, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if _autograd.differentiable_backward():
            grads = _autograd.reference_gradients(
                lambda *inputs: _reference(*inputs, mask, ctx.options), inputs, wanted, (d_out,)
            )
        else:
            scale, event_ndim, negative, log_weight, _ = ctx.options
            options = numbers(scale), event_ndim, negative, mask, wanted[0], log_weight
            grads = _autograd.input_gradients(_BWD[ctx.backend](d_out, *inputs, *options), inputs, wanted)
        return *grads, None, None, None


def _fwd_fake(x, mean, s, scale, event_ndim, *_):
    return _gaussian.empty_terms(_gaussian.joint_shape(x, mean, s), event_ndim, mean, (x, mean, s))


def _bwd_fake(d_out, x, mean, s, scale, event_ndim, negative, mask, x_grad, *_):
    inputs, shape = (x, mean, s), _gaussian.joint_shape(x, mean, s)
    d_x = _gaussian.empty_gradient(shape, x, inputs) if x_grad else x.new_empty((0,), dtype=torch.float32)
    if s.numel() == 1:
        d_s = s.new_empty(s.shape, dtype=arithmetic_dtype(*inputs))
    else:
        d_s = _gaussian.empty_gradient(shape, s, inputs)
    return d_x, _gaussian.empty_gradient(shape, mean, inputs), d_s


_FWD = _library.define(
    "gaussian_log_prob_fwd",
    "(Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative,"
    f" Tensor? mask=None, float log_weight=1, float constant={HALF_LOG_TWO_PI!r}) -> Tensor",
    _fwd_fake,
    _gaussian.check,
    _gaussian.differentiable(_GaussianLogProb),
)
_BWD = _library.define(
    "gaussian_log_prob_bwd",
    "(Tensor d_out, Tensor x, Tensor mean, Tensor s, float[] scale, int event_ndim, bool negative, Tensor? mask,"
    " bool x_grad, float log_weight=1) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
    _gaussian.check,
)

_local = _gaussian.local(_GaussianLogProb, _FWD, _reference, _arguments)
