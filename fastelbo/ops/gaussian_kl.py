"""KL divergence of diagonal Gaussians."""

import torch

from fastelbo import _autograd, _checks, _library, _sharding, backends, reference
from fastelbo.ops import _gaussian
from fastelbo.scale import Scale, as_scale, numbers


def gaussian_kl(
    mean_q: "torch.Tensor | float",
    s_q: "torch.Tensor | float",
    mean_p: "torch.Tensor | float | None" = None,
    s_p: "torch.Tensor | float | None" = None,
    *,
    scale: "str | Scale" = "logvar",
    scale_p: "str | Scale | None" = None,
    event_ndim: "int | None" = None,
    reduction: str = "none",
    free_bits: "torch.Tensor | float | None" = None,
    free_bits_per: str = "dim",
    balance: "float | None" = None,
    mask: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""KL divergence of a diagonal Gaussian q from a diagonal Gaussian p, or from the standard normal.

    .. math:: \mathrm{KL}(q \| p) = \tfrac{1}{2} \left(\tfrac{\sigma_q^2 + (\mu_q - \mu_p)^2}{\sigma_p^2} - 1\right)
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
        free_bits: a floor in nats, a number or a 0-d tensor. Where a KL lies at or below it the floor takes its place,
            and the gradient is exactly 0.
        free_bits_per: what has the floor: "dim", the mean of each element of an event over the batch (the dimensions
            that are no event's); "example", the KL of each event; "batch", its mean over the batch. Means are not what
            is returned: each event keeps its own KL, or its own elements', where their mean lies above the floor.
        balance: between 0 and 1; multiplies the gradient that reaches p, and 1 - balance the one that reaches q, as in
            balance * KL(q held || p) + (1 - balance) * KL(q || p held), whose value is the same KL.
        mask: bool, broadcasts to the shape of q and p: True where an element counts. One that does not adds 0 (not the
            floor either) and receives gradient 0, even where it is NaN. The means of reduction and of free_bits are
            over the events, and in "dim" the elements, that count: an event counts with any of its elements, and a
            mean over nothing is NaN, as in torch's losses.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        KL in nats, float32 (float64 for float64 inputs), of the broadcast shape less the event's dimensions, or 0-d
        after a reduction.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, a number out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", appendix B. Free bits: Kingma et al. 2016,
        "Improving Variational Inference with Inverse Autoregressive Flow" (dim); Hafner et al. 2020, "Dream to Control"
        (batch), and 2023, "Mastering Diverse Domains through World Models" (example). Balance: Hafner et al. 2021,
        "Mastering Atari with Discrete World Models".

    Example:
        >>> fastelbo.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
        >>> mean = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
        >>> fastelbo.gaussian_kl(mean, torch.zeros(2, 3), free_bits=0.25, mask=torch.tensor([True, True, False]))
        tensor([2.5000, 4.5000])
        >>> fastelbo.gaussian_kl(mean, torch.zeros(2, 3), free_bits=3.0, free_bits_per="example")
        tensor([3.0000, 4.5000])
    """
    given = mean_q, s_q, mean_p, s_p, mask
    others = None if mean_p is s_p is mask is None else given[2:]
    choices = scale, scale_p, reduction, free_bits_per, backend
    amounts = event_ndim, type(event_ndim), free_bits, type(free_bits), balance, type(balance)
    plan, kind = _KNOWN.find(mean_q, s_q, others, choices, amounts)
    if plan:
        options, backend, shape, event_ndim = plan
        kl = _autograd.at_once(_GaussianKL, given, options, backend)
    else:
        scale = as_scale(scale)
        _checks.check_prior(mean_p, s_p, scale_p)
        scale_p = _gaussian.prior_scale(scale, mean_p, scale_p)
        (mean_q, s_q, mean_p, s_p), shape, dtype = _checks.operands(
            event_ndim, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p
        )
        event_ndim = _checks.check_event_ndim(event_ndim, shape)
        _checks.check_reduction(reduction)
        if free_bits is not None or balance is not None or mask is not None or free_bits_per != "dim":
            free_bits, balance = _checks.check_kl_objective(
                free_bits, free_bits_per, balance, mask, shape, event_ndim, mean_q.device, mean_p
            )
        backend = backends.choose(mean_q.device, backend, backends.only_reference())
        s_q, scale = _gaussian.clamp_before_broadcast(s_q, shape, scale, dtype)
        s_p, scale_p = _gaussian.clamp_before_broadcast(s_p, shape, scale_p, dtype)
        tensors = mean_q, s_q, mean_p, s_p, mask
        kernel_ndim = _gaussian.kernel_event_ndim(event_ndim, reduction, shape, free_bits, free_bits_per)
        options = scale, scale_p, kernel_ndim, balance
        run = _local if len(shape) <= _gaussian.MAX_DIMS else _folded
        if _sharding.sharded(*tensors):
            layout = _sharding.Gaussian(shape, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p, mask=mask)
            kl = layout.terms(run(layout.shards(), options, backend), kernel_ndim)
        else:
            kl = run(tensors, options, backend)
        if kind and run is _local and backend != "reference":
            _KNOWN.keep(kind, (options, backend, shape, event_ndim), given, tensors)
    if free_bits is not None:
        kl = _gaussian.floored(kl, shape, event_ndim, free_bits, free_bits_per, mask)
    return _gaussian.reduce(kl, reduction, shape, event_ndim, mask)


_KNOWN = _gaussian.Known()


def _folded(tensors, options, backend):
    if backend == "reference":
        return _reference(*tensors, options)
    *operands, mask = tensors
    scale, scale_p, event_ndim, balance = options
    fold = _gaussian.Fold(operands, event_ndim, mask)
    return fold.terms(_local(fold.tensors, (scale, scale_p, fold.event_ndim, balance), backend))


def _reference(mean_q, s_q, mean_p, s_p, mask, options):
    scale, scale_p, event_ndim, balance = options
    keywords = {"scale": scale, "scale_p": scale_p, "event_ndim": event_ndim, "balance": balance, "mask": mask}
    return reference.gaussian_kl(mean_q, s_q, mean_p, s_p, **keywords)


def _arguments(mean_q, s_q, mean_p, s_p, mask, options):
    """As the forward's schema has them."""
    scale, scale_p, event_ndim, balance = options
    return mean_q, s_q, mean_p, s_p, numbers(scale), numbers(scale_p), event_ndim, mask, balance


@_autograd.recordable
class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def compute(mean_q, s_q, mean_p, s_p, mask, options, backend):
        return _FWD[backend](*_arguments(mean_q, s_q, mean_p, s_p, mask, options))

    @staticmethod
    def forward(ctx, mean_q, s_q, mean_p, s_p, mask, options, backend):
        ctx.save_for_backward(mean_q, s_q, mean_p, s_p, mask)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return _GaussianKL.compute(mean_q, s_q, mean_p, s_p, mask, options, backend)

    @staticmethod
    def backward(ctx, d_kl):
        if d_kl is None:
            return (None,) * 7
        *inputs, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if _autograd.differentiable_backward():
            grads = _autograd.reference_gradients(
                lambda *inputs: _reference(*inputs, mask, ctx.options), inputs, wanted, (d_kl,)
            )
        else:
            scale, scale_p, event_ndim, balance = ctx.options
            options = numbers(scale), numbers(scale_p), event_ndim, balance, mask, wanted[2] or wanted[3]
            grads = _autograd.input_gradients(_BWD[ctx.backend](d_kl, *inputs, *options), inputs, wanted)
        return *grads, None, None, None


def _fwd_fake(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, *_):
    inputs = mean_q, s_q, mean_p, s_p
    return _gaussian.empty_terms(_gaussian.joint_shape(*inputs), event_ndim, mean_q, inputs)


def _bwd_fake(d_kl, mean_q, s_q, mean_p, s_p, *options):
    return _gaussian.empty_prior_gradients(mean_q, s_q, mean_p, s_p, prior_grad=options[-1])


# balance is what the backward alone takes.
_FWD = _library.define(
    "gaussian_kl_fwd",
    "(Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p, int event_ndim,"
    " Tensor? mask, float? balance=None) -> Tensor",
    _fwd_fake,
    _gaussian.check,
    _gaussian.differentiable(_GaussianKL),
)
_BWD = _library.define(
    "gaussian_kl_bwd",
    "(Tensor d_kl, Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p,"
    " int event_ndim, float? balance, Tensor? mask, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _gaussian.check,
)

_local = _gaussian.local(_GaussianKL, _FWD, _reference, _arguments)
