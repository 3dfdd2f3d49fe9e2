"""KL divergence of diagonal Gaussians."""

from typing import Any

import torch

from fastelbo import _checks, _library, backends, distributed, reference
from fastelbo.ops.gaussian_rsample import clamp_before_broadcast
from fastelbo.reference.gaussian_kl import event_sum
from fastelbo.scale import Scale, as_scale, numbers, of_numbers


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
    scale = as_scale(scale)
    _checks.check_prior(mean_p, s_p, scale_p)
    scale_p = prior_scale(scale, mean_p, scale_p)
    (mean_q, s_q, mean_p, s_p), shape, dtype = _checks.operands(
        event_ndim, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p
    )
    event_ndim = _checks.check_event_ndim(event_ndim, shape)
    _checks.check_reduction(reduction)
    if free_bits is not None or balance is not None or mask is not None or free_bits_per != "dim":
        _checks.check_kl_objective(free_bits, free_bits_per, balance, mask, shape, event_ndim, mean_q.device, mean_p)
    backend = backends.choose(mean_q.device, backend, backends.only_reference())
    s_q, scale = clamp_before_broadcast(s_q, shape, scale, dtype)
    if s_p is not None and scale_p is not None:
        s_p, scale_p = clamp_before_broadcast(s_p, shape, scale_p, dtype)
    inputs = mean_q, s_q, mean_p, s_p
    kernel_ndim = computed_event_ndim(event_ndim, reduction, shape, free_bits, free_bits_per)
    options: tuple[Any, ...] = scale, scale_p, balance, kernel_ndim, backend
    if distributed.sharded(*inputs, mask):
        layout = distributed.Gaussian(shape, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p, mask=mask)
        kl = layout.terms(_kl(*layout.shards(), *options), kernel_ndim)
    else:
        kl = _kl(*inputs, mask, *options)
    if free_bits is not None:
        kl = floored(kl, shape, event_ndim, free_bits, free_bits_per, mask)
    return _library.reduce(kl, reduction, shape, event_ndim, mask)


def _kl(mean_q, s_q, mean_p, s_p, mask, scale, scale_p, balance, event_ndim, backend):
    inputs = _library.distinct(mean_q, s_q, mean_p, s_p)
    if backend == "reference":
        options = {"scale": scale, "scale_p": scale_p, "event_ndim": event_ndim, "balance": balance, "mask": mask}
        return reference.gaussian_kl(*inputs, **options)
    if torch.compiler.is_exporting():  # a Function would leave no more in the program than its forward
        return _library.by_name(_FWD[backend])(*inputs, numbers(scale), numbers(scale_p), event_ndim, mask, balance)
    return _GaussianKL.apply(*inputs, mask, scale, scale_p, balance, event_ndim, backend)


def computed_event_ndim(event_ndim, reduction, shape, free_bits, free_bits_per):
    """How many dimensions are summed before the floor of free bits."""
    if free_bits is None:
        return _library.kernel_event_ndim(event_ndim, reduction, shape)
    return 0 if free_bits_per == "dim" else event_ndim


def floored(kl, shape, event_ndim, free_bits, free_bits_per, mask):
    """The KL of each event with the floor of free bits.

    Args:
        kl: summed over the dimensions that computed_event_ndim says.
        shape, event_ndim: of the elementwise KL.
    """
    counted = mask
    if mask is not None and free_bits_per != "dim":
        counted = _library.counted_events(mask, shape, event_ndim)
    judged = kl.detach()
    if free_bits_per != "example":
        batch_dims = tuple(range(len(shape) - event_ndim + 1))
        judged = judged[None]  # a mean over no dimensions would be one over all
        if counted is None:
            judged = judged.mean(dim=batch_dims)
        else:
            judged = judged.sum(dim=batch_dims) / counted.expand(kl.shape)[None].sum(dim=batch_dims)
    free_bits = free_bits.to(kl.dtype) if isinstance(free_bits, torch.Tensor) else float(free_bits)
    kl = torch.where(judged <= free_bits, free_bits, kl)  # a NaN is not at the floor
    if counted is not None:
        kl = torch.where(counted, kl, 0.0)
    return event_sum(kl, event_ndim) if free_bits_per == "dim" else kl


def prior_scale(scale: Scale, mean_p: Any, scale_p: "str | Scale | None") -> "Scale | None":
    """The Scale of the prior; None for the standard normal."""
    if mean_p is None:
        return None
    return scale if scale_p is None else as_scale(scale_p, "scale_p")


class _GaussianKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean_q, s_q, mean_p, s_p, mask, scale, scale_p, balance, event_ndim, backend):
        ctx.save_for_backward(mean_q, s_q, mean_p, s_p, mask)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.scale_p, ctx.balance = scale, scale_p, balance
        ctx.event_ndim, ctx.backend = event_ndim, backend
        return _FWD[backend](mean_q, s_q, mean_p, s_p, numbers(scale), numbers(scale_p), event_ndim, mask, balance)

    @staticmethod
    def backward(ctx, d_kl):
        if d_kl is None:
            return (None,) * 10
        *inputs, mask = ctx.saved_tensors
        if _library.differentiable_backward():

            def kl(*inputs):
                options = {"event_ndim": ctx.event_ndim, "balance": ctx.balance, "mask": mask}
                return reference.gaussian_kl(*inputs, scale=ctx.scale, scale_p=ctx.scale_p, **options)

            grads = _library.reference_gradients(kl, inputs, ctx.needs_input_grad[:4], (d_kl,))
        else:
            prior_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
            scales = numbers(ctx.scale), numbers(ctx.scale_p)
            grads = _BWD[ctx.backend](d_kl, *inputs, *scales, ctx.event_ndim, ctx.balance, mask, prior_grad)
            grads = _library.input_gradients(grads, inputs, ctx.needs_input_grad)
        return *grads, None, None, None, None, None, None


def prior_shape(mean_q, s_q, mean_p, s_p):
    """The shape to which q and p broadcast."""
    if mean_p is None:
        return torch.broadcast_shapes(mean_q.shape, s_q.shape)
    return torch.broadcast_shapes(mean_q.shape, s_q.shape, mean_p.shape, s_p.shape)


def gradients_fake(shape, mean_q, s_q, mean_p, s_p, prior_grad):
    """The fake gradients of q and p."""
    inputs = mean_q, s_q, mean_p, s_p
    grads = tuple(_library.empty_gradient(shape, of, *inputs) for of in (inputs if prior_grad else inputs[:2]))
    if prior_grad:
        return grads
    return *grads, mean_q.new_empty((0,), dtype=torch.float32), mean_q.new_empty((0,), dtype=torch.float32)


def _differentiable(backend, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, balance=None):
    scales = of_numbers(scale), of_numbers(scale_p)
    return _GaussianKL.apply(mean_q, s_q, mean_p, s_p, mask, *scales, balance, event_ndim, backend)


def _fwd_check(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, balance=None):
    _checks.check_raw_prior(mean_p, s_p, scale, scale_p, balance=balance)
    shape = _checks.operands(mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p)[1]
    _checks.check_raw_event(event_ndim, mask, shape, mean_q.device)


def _bwd_check(d_kl, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, balance, mask, prior_grad):
    _checks.check_raw_prior(mean_p, s_p, scale, scale_p, prior_grad, balance)
    shape = _checks.operands(mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p)[1]
    _checks.check_raw_event(event_ndim, mask, shape, mean_q.device)
    _checks.check_upstream("d_kl", d_kl, shape[: len(shape) - event_ndim], mean_q.device)


def _fwd_fake(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, balance=None):
    shape = prior_shape(mean_q, s_q, mean_p, s_p)
    return _library.empty_terms(shape, event_ndim, mean_q, (mean_q, s_q, mean_p, s_p))


def _bwd_fake(d_kl, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, balance, mask, prior_grad):
    return gradients_fake(prior_shape(mean_q, s_q, mean_p, s_p), mean_q, s_q, mean_p, s_p, prior_grad)


# balance is what the backward alone takes.
_FWD = _library.define(
    "gaussian_kl_fwd",
    "(Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p, int event_ndim,"
    " Tensor? mask, float? balance=None) -> Tensor",
    _fwd_fake,
    _fwd_check,
    _differentiable,
)
_BWD = _library.define(
    "gaussian_kl_bwd",
    "(Tensor d_kl, Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, float[] scale, float[]? scale_p,"
    " int event_ndim, float? balance, Tensor? mask, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _bwd_check,
)
