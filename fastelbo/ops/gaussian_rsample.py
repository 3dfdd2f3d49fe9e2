"""Reparameterised Gaussian sampling."""

import dataclasses
from typing import Any

import torch

from fastelbo import _checks, _library, _seed, backends, distributed, reference
from fastelbo.scale import Scale, as_scale, numbers, of_numbers


def gaussian_rsample(
    mean: "torch.Tensor | float",
    s: "torch.Tensor | float",
    *,
    scale: "str | Scale" = "logvar",
    num_samples: "int | None" = None,
    temperature: float = 1.0,
    noise: "torch.Tensor | None" = None,
    seed: "int | torch.Tensor | None" = None,
    generator: "torch.Generator | None" = None,
    noise_offset: int = 0,
    out_dtype: "torch.dtype | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""Draws from a diagonal Gaussian so that gradients reach its parameters.

    .. math:: z = \mu + T \, \sigma(s) \, \epsilon, \qquad \epsilon \sim N(0, 1)

    The noise is a function of the seed and of an element's row-major index alone (docs/noise.md): the same on every
    device, for every memory layout and number of threads. It is drawn again in the backward instead of being kept.

    Args:
        mean: float32, float64, bfloat16 or float16, any shape and strides; or a number.
        s: the raw scale, broadcast with mean, or a number.
        scale: a Scale or one of its kinds; how s becomes a standard deviation.
        num_samples: K draws, in a new first dimension.
        temperature: a number that multiplies the standard deviation.
        noise: a tensor to use as the noise, broadcast to the shape of z; then nothing is drawn.
        seed: an int, or an int64 tensor of one element on the device of mean.
        generator: a torch.Generator to draw the seed from. Without seed and generator the seed comes from torch's
            default generator of the device.
        noise_offset: global index of the first element, where mean is a shard of a larger tensor.
        out_dtype: of z; the dtype that mean and s promote to where None.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        z of the shape to which mean and s broadcast, with K in front where num_samples is given. Without K it has the
        memory order of mean.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, a number out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", section 2.4.

    Example:
        >>> mean, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> fastelbo.gaussian_rsample(mean, logvar, seed=0).shape
        torch.Size([2, 3])
    """
    scale = as_scale(scale)
    (mean, s), shape, dtype = _checks.operands(mean=mean, s=s)
    device = mean.device
    _checks.noise_arguments(noise, seed, generator, noise_offset, num_samples, temperature, shape, device)
    _checks.check_out_dtype(out_dtype)
    out_dtype = out_dtype or dtype
    backend = backends.choose(device, backend, backends.only_reference(noise))
    if noise is None:
        on_cpu = backend == "cuda" and _seed.by_value(device) and not distributed.sharded(mean, s)
        seed = _seed.as_seed(seed, generator, device, on_cpu)
    s, scale = clamp_before_broadcast(s, shape, scale, dtype)
    options: tuple[Any, ...] = num_samples, temperature, scale, out_dtype, backend
    if distributed.sharded(mean, s, noise):
        layout = distributed.Gaussian(shape, mean=mean, s=s)
        z = _sample(*layout.shards(), *layout.draw(seed, noise, noise_offset, num_samples, backend), *options)
        return layout.sample(z, num_samples)
    return _sample(mean, s, seed, noise, noise_offset, *options)


def _sample(mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype, backend):
    if backend == "reference":
        return reference.gaussian_rsample(
            mean,
            s,
            scale=scale,
            num_samples=num_samples,
            temperature=temperature,
            noise=noise,
            seed=seed,
            noise_offset=noise_offset,
            out_dtype=out_dtype,
        )
    if torch.compiler.is_exporting():  # a Function would leave no more in the program than its forward
        return _library.by_name(_FWD[backend])(
            mean, s, seed, noise, noise_offset, num_samples, temperature, numbers(scale), out_dtype
        )
    return _GaussianRsample.apply(
        *_library.distinct(mean, s), seed, noise, noise_offset, num_samples, temperature, scale, out_dtype, backend
    )


def clamp_before_broadcast(
    s: torch.Tensor, shape: torch.Size, scale: Scale, dtype: torch.dtype
) -> "tuple[torch.Tensor, Scale]":
    """The inward clamp looks at the sign of a value's whole gradient, which a broadcast value has only before it is
    broadcast: it is then applied here rather than in the kernel. dtype: that the op's tensors promote to."""
    if scale.clamp is None or scale.clamp_grad != "inward":
        return s, scale
    exporting = torch.compiler.is_exporting()  # to a program that keeps no Function, of the reference neither
    if s.shape == shape and not exporting:
        return s, scale
    s = s.to(torch.float64 if dtype == torch.float64 else torch.float32)  # half precision would round the limits
    s = _CLAMP_INWARD(s, *scale.clamp) if exporting else reference.scale.clamp(s, scale)
    return s, dataclasses.replace(scale, clamp=None)


_CLAMP_INWARD = _library.define_helper(
    "clamp_inward", "(Tensor s, float lo, float hi) -> Tensor", lambda s, lo, hi: torch.empty_like(s)
)
_library.implement("clamp_inward", torch.clamp)
_library.differentiate(_CLAMP_INWARD, reference.scale.ClampInward.apply)


class _GaussianRsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype, backend):
        ctx.save_for_backward(s, seed, noise)
        ctx.set_materialize_grads(False)
        ctx.mean_shape, ctx.mean_dtype = mean.shape, mean.dtype
        ctx.draw = (noise_offset, num_samples, temperature)
        ctx.scale, ctx.backend = scale, backend
        return _FWD[backend](mean, s, seed, noise, noise_offset, num_samples, temperature, numbers(scale), out_dtype)

    @staticmethod
    def backward(ctx, d_z):
        if d_z is None:
            return (None,) * 10
        s, seed, noise = ctx.saved_tensors
        noise_offset, num_samples, temperature = ctx.draw
        d_mean = d_s = None
        if ctx.needs_input_grad[0]:
            d_mean = _library.summed(d_z, ctx.mean_shape, ctx.mean_dtype)
        if ctx.needs_input_grad[1]:
            if _library.differentiable_backward():
                shape = d_z.shape if num_samples is None else d_z.shape[1:]

                def sample(s):
                    return reference.gaussian_rsample(
                        s.new_zeros(()).expand(shape),
                        s,
                        scale=ctx.scale,
                        num_samples=num_samples,
                        temperature=temperature,
                        noise=noise,
                        seed=_seed.at(seed, s.device),
                        noise_offset=noise_offset,
                        out_dtype=d_z.dtype,
                    )

                (d_s,) = _library.reference_gradients(sample, (s,), (True,), (d_z,))
            else:
                d_s = _library.sum_to(_BWD[ctx.backend](d_z, s, seed, noise, *ctx.draw, numbers(ctx.scale)), s)
        return d_mean, d_s, None, None, None, None, None, None, None, None


def _differentiable(backend, mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype):
    check_noise(noise)
    scale = of_numbers(scale)
    return _GaussianRsample.apply(
        mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype, backend
    )


def check_noise(noise):
    """Of an op that is called with tensors that want a gradient: no kernel passes one to the noise."""
    if noise is not None and noise.requires_grad:
        raise NotImplementedError(
            "noise must not want a gradient, which only the reference passes on; got one that does"
        )


def _fwd_check(mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype):
    _checks.check_scale_numbers(scale)
    shape = _checks.operands(mean=mean, s=s)[1]
    _checks.check_raw_draw(seed, noise, noise_offset, num_samples, temperature, shape, mean.device)
    _checks.check_out_dtype(out_dtype)


def _bwd_check(d_z, s, seed, noise, noise_offset, num_samples, temperature, scale):
    _checks.check_scale_numbers(scale)
    if num_samples is not None and tuple(d_z.shape[:1]) != (num_samples,):
        raise ValueError(f"d_z must have num_samples in front, {num_samples}; got shape {tuple(d_z.shape)}")
    shape = d_z.shape if num_samples is None else d_z.shape[1:]
    _checks.operands(s=s)
    if _checks.broadcast(s.shape, shape) != shape:
        raise ValueError(f"s must broadcast to shape {tuple(shape)}; got {tuple(s.shape)}")
    out = _checks.check_raw_draw(seed, noise, noise_offset, num_samples, temperature, shape, s.device)
    _checks.check_upstream("d_z", d_z, out, s.device)


def _fwd_fake(mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype):
    shape = torch.broadcast_shapes(mean.shape, s.shape)
    return _library.empty_sample(mean, shape, num_samples, out_dtype)


def _bwd_fake(d_z, s, seed, noise, noise_offset, num_samples, temperature, scale):
    shape = d_z.shape if num_samples is None else d_z.shape[1:]
    return _library.empty_gradient(shape, s, d_z, s)


_FWD = _library.define(
    "gaussian_rsample_fwd",
    "(Tensor mean, Tensor s, Tensor? seed, Tensor? noise, SymInt noise_offset, SymInt? num_samples, float temperature,"
    " float[] scale, ScalarType out_dtype) -> Tensor",
    _fwd_fake,
    _fwd_check,
    _differentiable,
)
_BWD = _library.define(
    "gaussian_rsample_bwd",
    "(Tensor d_z, Tensor s, Tensor? seed, Tensor? noise, SymInt noise_offset, SymInt? num_samples, float temperature,"
    " float[] scale) -> Tensor",
    _bwd_fake,
    _bwd_check,
)
