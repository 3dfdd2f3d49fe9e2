"""A posterior sample and its KL divergence in one pass."""

import torch

from fastelbo import _autograd, _checks, _library, _seed, _sharding, backends, reference
from fastelbo.ops import _gaussian
from fastelbo.scale import Scale, as_scale, numbers


def gaussian_rsample_kl(
    mean_q: "torch.Tensor | float",
    s_q: "torch.Tensor | float",
    mean_p: "torch.Tensor | float | None" = None,
    s_p: "torch.Tensor | float | None" = None,
    *,
    scale: "str | Scale" = "logvar",
    scale_p: "str | Scale | None" = None,
    num_samples: "int | None" = None,
    temperature: float = 1.0,
    noise: "torch.Tensor | None" = None,
    seed: "int | torch.Tensor | None" = None,
    generator: "torch.Generator | None" = None,
    noise_offset: int = 0,
    out_dtype: "torch.dtype | None" = None,
    event_ndim: "int | None" = None,
    reduction: str = "none",
    free_bits: "torch.Tensor | float | None" = None,
    free_bits_per: str = "dim",
    balance: "float | None" = None,
    mask: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor]":
    r"""Draws from the posterior q and returns its KL divergence from the prior p: the bottleneck of a VAE in one pass
    over the data, and one in the backward.

    .. math:: z = \mu_q + T \, \sigma_q \, \epsilon, \qquad \mathrm{KL}(q \| p)

    The same numbers as gaussian_rsample and gaussian_kl with the same arguments; their docstrings have the formulas.

    Args:
        mean_q, s_q: mean and raw scale of q: float32, float64, bfloat16 or float16 tensors that broadcast, or numbers.
        mean_p, s_p: the same for p; the standard normal where both are None.
        scale, scale_p: a Scale or one of its kinds, for s_q and s_p; scale_p is scale where None.
        num_samples, temperature, noise, seed, generator, noise_offset, out_dtype: as in gaussian_rsample. The KL does
            not depend on them.
        event_ndim, reduction: as in gaussian_kl; they do not touch z.
        free_bits, free_bits_per, balance: as in gaussian_kl; they do not touch z.
        mask: as in gaussian_kl. Where an element does not count, z is 0 and passes no gradient on either.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        (z, kl): z of the shape to which all of q and p broadcast, with K in front where num_samples is given; kl in
        nats, float32 (float64 for float64 inputs), of that shape less the event's dimensions, or 0-d after a reduction.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, a number out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes"; gaussian_kl names those of its objectives.

    Example:
        >>> z, kl = fastelbo.gaussian_rsample_kl(torch.ones(2, 3), torch.zeros(2, 3), seed=0)
        >>> z.shape, kl
        (torch.Size([2, 3]), tensor([1.5000, 1.5000]))
    """
    plan = kind = None
    given = mean_q, s_q, mean_p, s_p, mask
    if noise is seed is generator is None:
        others = None if mean_p is s_p is mask is None else given[2:]
        choices = scale, scale_p, out_dtype, reduction, free_bits_per, backend
        draw = num_samples, type(num_samples), temperature, type(temperature), noise_offset, type(noise_offset)
        amounts = event_ndim, type(event_ndim), free_bits, type(free_bits), balance, type(balance)
        plan, kind = _KNOWN.find(mean_q, s_q, others, choices, draw, amounts)
    if plan:
        options, backend, shape, event_ndim = plan
        tensors = mean_q, s_q, mean_p, s_p, _seed.drawn(mean_q, backend), None, mask
        z, kl = _autograd.at_once(_GaussianRsampleKL, tensors, options, backend)
    else:
        scale = as_scale(scale)
        _checks.check_prior(mean_p, s_p, scale_p)
        scale_p = _gaussian.prior_scale(scale, mean_p, scale_p)
        (mean_q, s_q, mean_p, s_p), shape, dtype = _checks.operands(
            event_ndim, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p
        )
        device = mean_q.device
        noise_offset, num_samples, temperature = _checks.noise_arguments(
            noise, seed, generator, noise_offset, num_samples, temperature, shape, device
        )
        _checks.check_out_dtype(out_dtype)
        if out_dtype is None and (mean_p is not None or dtype != mean_q.dtype):
            out_dtype = _checks.promoted(mean_q, s_q)
        event_ndim = _checks.check_event_ndim(event_ndim, shape)
        _checks.check_reduction(reduction)
        if free_bits is not None or balance is not None or mask is not None or free_bits_per != "dim":
            free_bits, balance = _checks.check_kl_objective(
                free_bits, free_bits_per, balance, mask, shape, event_ndim, device, mean_p
            )
        backend = backends.choose(device, backend, backends.only_reference(noise))
        if noise is None:
            on_cpu = (
                backend == "cuda" and _seed.by_value(device) and not _sharding.sharded(mean_q, s_q, mean_p, s_p, mask)
            )
            seed = _seed.as_seed(seed, generator, device, on_cpu)
        s_q, scale = _gaussian.clamp_before_broadcast(s_q, shape, scale, dtype)
        s_p, scale_p = _gaussian.clamp_before_broadcast(s_p, shape, scale_p, dtype)
        kernel_ndim = _gaussian.kernel_event_ndim(event_ndim, reduction, shape, free_bits, free_bits_per)
        options = num_samples, temperature, scale, scale_p, kernel_ndim, out_dtype, balance
        run = _local if len(shape) <= _gaussian.MAX_DIMS else _folded
        if _sharding.sharded(mean_q, s_q, mean_p, s_p, noise, mask):
            layout = _sharding.Gaussian(shape, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p, mask=mask)
            seed, noise, noise_offset = layout.draw(seed, noise, noise_offset, _gaussian.normals(backend, num_samples))
            *inputs, local_mask = layout.shards()
            z, kl = run((*inputs, seed, noise, local_mask), (noise_offset, *options), backend)
            z, kl = layout.sample(z, num_samples), layout.terms(kl, kernel_ndim)
        else:
            z, kl = run((mean_q, s_q, mean_p, s_p, seed, noise, mask), (noise_offset, *options), backend)
        if kind and run is _local and backend != "reference":
            plan = (noise_offset, *options), backend, shape, event_ndim
            _KNOWN.keep(kind, plan, given, (mean_q, s_q, mean_p, s_p, mask))
    if free_bits is not None:
        kl = _gaussian.floored(kl, shape, event_ndim, free_bits, free_bits_per, mask)
    return z, _gaussian.reduce(kl, reduction, shape, event_ndim, mask)


_KNOWN = _gaussian.Known()


def _folded(tensors, options, backend):
    if backend == "reference":
        return _reference(*tensors, options)
    *operands, seed, noise, mask = tensors
    *draw, event_ndim, out_dtype, balance = options
    fold = _gaussian.Fold(operands, event_ndim, noise, mask)
    *operands, noise, mask = fold.tensors
    options = *draw, fold.event_ndim, out_dtype, balance
    z, kl = _local((*operands, seed, noise, mask), options, backend)
    return fold.sample(z), fold.terms(kl)


def _reference(mean_q, s_q, mean_p, s_p, seed, noise, mask, options):
    noise_offset, num_samples, temperature, scale, scale_p, event_ndim, out_dtype, balance = options
    draw = {"noise": noise, "seed": _seed.at(seed, mean_q.device), "noise_offset": noise_offset}
    draw |= {"num_samples": num_samples, "temperature": temperature, "out_dtype": out_dtype or mean_q.dtype}
    keywords = {"scale": scale, "scale_p": scale_p, "event_ndim": event_ndim, "balance": balance, "mask": mask}
    return reference.gaussian_rsample_kl(mean_q, s_q, mean_p, s_p, **keywords, **draw)


def _arguments(mean_q, s_q, mean_p, s_p, seed, noise, mask, options):
    """As the forward's schema has them."""
    *draw, scale, scale_p, event_ndim, out_dtype, balance = options
    scales = numbers(scale), numbers(scale_p)
    return mean_q, s_q, mean_p, s_p, seed, noise, *draw, *scales, event_ndim, mask, out_dtype, balance


@_autograd.recordable
class _GaussianRsampleKL(torch.autograd.Function):
    @staticmethod
    def compute(mean_q, s_q, mean_p, s_p, seed, noise, mask, options, backend):
        return _FWD[backend](*_arguments(mean_q, s_q, mean_p, s_p, seed, noise, mask, options))

    @staticmethod
    def forward(ctx, mean_q, s_q, mean_p, s_p, seed, noise, mask, options, backend):
        ctx.save_for_backward(mean_q, s_q, mean_p, s_p, seed, noise, mask)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        return _GaussianRsampleKL.compute(mean_q, s_q, mean_p, s_p, seed, noise, mask, options, backend)

    @staticmethod
    def backward(ctx, d_z, d_kl):
        if d_z is None and d_kl is None:
            return (None,) * 9
        *inputs, seed, noise, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        if _autograd.differentiable_backward():
            grads = _autograd.reference_gradients(
                lambda *inputs: _reference(*inputs, seed, noise, mask, ctx.options), inputs, wanted, (d_z, d_kl)
            )
        else:
            *draw, scale, scale_p, event_ndim, _, balance = ctx.options
            if d_z is None or d_kl is None:
                shape, num_samples = _gaussian.joint_shape(*inputs), draw[1]
                zero = inputs[0].new_zeros(())
                if d_z is None:
                    d_z = zero.expand(shape if num_samples is None else (num_samples, *shape))
                else:
                    d_kl = zero.expand(shape[: len(shape) - event_ndim])
            options = numbers(scale), numbers(scale_p), event_ndim, balance, mask, wanted[2] or wanted[3]
            grads = _BWD[ctx.backend](d_z, d_kl, *inputs, seed, noise, *draw, *options)
            grads = _autograd.input_gradients(grads, inputs, wanted)
        return *grads, *(None,) * 5


def _fwd_fake(mean_q, s_q, mean_p, s_p, seed, noise, noise_offset, num_samples, *options):
    _, _, _, event_ndim, _, out_dtype, *_ = options
    inputs = mean_q, s_q, mean_p, s_p
    shape = _gaussian.joint_shape(*inputs)
    z = _gaussian.empty_sample(mean_q, shape, num_samples, out_dtype or mean_q.dtype)
    return z, _gaussian.empty_terms(shape, event_ndim, mean_q, inputs)


def _bwd_fake(d_z, d_kl, mean_q, s_q, mean_p, s_p, *options):
    return _gaussian.empty_prior_gradients(mean_q, s_q, mean_p, s_p, prior_grad=options[-1])


# balance is what the backward alone takes.
_FWD = _library.define(
    "gaussian_rsample_kl_fwd",
    "(Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, Tensor? seed, Tensor? noise, SymInt noise_offset,"
    " SymInt? num_samples, float temperature, float[] scale, float[]? scale_p, int event_ndim, Tensor? mask,"
    " ScalarType? out_dtype=None, float? balance=None) -> (Tensor, Tensor)",
    _fwd_fake,
    _gaussian.check,
    _gaussian.differentiable(_GaussianRsampleKL),
)
_BWD = _library.define(
    "gaussian_rsample_kl_bwd",
    "(Tensor d_z, Tensor d_kl, Tensor mean_q, Tensor s_q, Tensor? mean_p, Tensor? s_p, Tensor? seed, Tensor? noise,"
    " SymInt noise_offset, SymInt? num_samples, float temperature, float[] scale, float[]? scale_p, int event_ndim,"
    " float? balance, Tensor? mask, bool prior_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
    _gaussian.check,
)

_local = _gaussian.local(_GaussianRsampleKL, _FWD, _reference, _arguments)
