"""Reparameterised Gaussian sampling."""

import torch

from fastelbo import _autograd, _checks, _library, _seed, _sharding, backends, reference
from fastelbo.ops import _gaussian
from fastelbo.scale import Scale, as_scale, numbers


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
        temperature: multiplies the standard deviation: a number, of Python or NumPy or a 0-d tensor, whose device is
            waited for, as for num_samples and noise_offset.
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
    kind = None
    if noise is seed is generator is None:
        choices, types = (scale, out_dtype, backend), (type(num_samples), type(temperature), type(noise_offset))
        plan, kind = _KNOWN.find(mean, s, None, choices, num_samples, temperature, noise_offset, types)
        if plan:
            return plan(mean, s)
    given = mean, s
    scale = as_scale(scale)
    (mean, s), shape, dtype = _checks.operands(mean=mean, s=s)
    device = mean.device
    noise_offset, num_samples, temperature = _checks.noise_arguments(
        noise, seed, generator, noise_offset, num_samples, temperature, shape, device
    )
    _checks.check_out_dtype(out_dtype)
    backend = backends.choose(device, backend, backends.only_reference(noise))
    if noise is None:
        on_cpu = backend == "cuda" and _seed.by_value(device) and not _sharding.sharded(mean, s)
        seed = _seed.as_seed(seed, generator, device, on_cpu)
    s, scale = _gaussian.clamp_before_broadcast(s, shape, scale, dtype)
    if out_dtype is None and dtype != mean.dtype:
        out_dtype = dtype
    options: tuple = (noise_offset, num_samples, temperature, scale, out_dtype)
    run = _local if len(shape) <= _gaussian.MAX_DIMS else _folded
    if _sharding.sharded(mean, s, noise):
        layout = _sharding.Gaussian(shape, mean=mean, s=s)
        seed, noise, noise_offset = layout.draw(seed, noise, noise_offset, _gaussian.normals(backend, num_samples))
        z = run((*layout.shards(), seed, noise), (noise_offset, *options[1:]), backend)
        return layout.sample(z, num_samples)
    if scale is _DEFAULTS[3] and options == _DEFAULTS and not torch.compiler.is_compiling():
        options = ()  # to be left out of calls: each costs torch's dispatcher up to a microsecond
    z = run((mean, s, seed, noise), options, backend)
    if kind and run is _local and backend != "reference":
        _KNOWN.keep(kind, _plan(mean, s, options, backend), given, (mean, s))
    return z


_KNOWN = _gaussian.Known()


def _plan(mean, s, options, backend):
    """What draws from tensors of such a kind."""

    def draw(mean, s):
        seed = _seed.drawn(mean, backend)
        return _autograd.at_once(_GaussianRsample, (mean, s, seed, None), options, backend)

    def commonest(mean, s):
        return _Draw.record(mean, s) if s.requires_grad and torch.is_grad_enabled() else draw(mean, s)

    return commonest if backend == "cpu" and options == () and mean.shape == s.shape else draw


def _folded(tensors, options, backend):
    if backend == "reference":
        return _reference(*tensors, options)
    mean, s, seed, noise = tensors
    fold = _gaussian.Fold((mean, s), 0, noise)
    mean, s, noise = fold.tensors
    return fold.sample(_local((mean, s, seed, noise), options, backend))


def _reference(mean, s, seed, noise, options):
    noise_offset, num_samples, temperature, scale, out_dtype = options or _DEFAULTS
    draw = {"noise": noise, "seed": _seed.at(seed, mean.device), "noise_offset": noise_offset}
    keywords = {"scale": scale, "num_samples": num_samples, "temperature": temperature}
    keywords["out_dtype"] = out_dtype or mean.dtype
    return reference.gaussian_rsample(mean, s, **keywords, **draw)


_DEFAULTS = 0, None, 1.0, as_scale("logvar"), None  # of the schemas, where the options are ()


def _arguments(mean, s, seed, noise, options):
    """As the forward's schema has them."""
    if not options:
        return mean, s, seed, noise
    noise_offset, num_samples, temperature, scale, out_dtype = options
    return mean, s, seed, noise, noise_offset, num_samples, temperature, numbers(scale), out_dtype


def _reference_gradient(d_z, s, seed, noise, options):
    """Of s, differentiable itself."""
    _, num_samples, *_ = options or _DEFAULTS
    mean = s.new_zeros(()).expand(d_z.shape if num_samples is None else d_z.shape[1:])
    return _autograd.reference_gradients(lambda s: _reference(mean, s, seed, noise, options), (s,), (True,), (d_z,))[0]


@_autograd.recordable
class _GaussianRsample(torch.autograd.Function):
    @staticmethod
    def compute(mean, s, seed, noise, options, backend):
        return _FWD[backend](*_arguments(mean, s, seed, noise, options))

    @staticmethod
    def forward(ctx, mean, s, seed, noise, options, backend):
        ctx.save_for_backward(s, seed, noise)
        ctx.set_materialize_grads(False)
        ctx.mean_shape, ctx.mean_dtype = mean.shape, mean.dtype
        ctx.options, ctx.backend = options, backend
        return _GaussianRsample.compute(mean, s, seed, noise, options, backend)

    @staticmethod
    def backward(ctx, d_z):
        if d_z is None:
            return (None,) * 6
        s, seed, noise = ctx.saved_tensors
        d_mean = d_s = None
        if ctx.needs_input_grad[0]:
            d_mean = _autograd.summed(d_z, ctx.mean_shape, ctx.mean_dtype)
        if ctx.needs_input_grad[1] and _autograd.differentiable_backward():
            d_s = _reference_gradient(d_z, s, seed, noise, ctx.options)
        elif ctx.needs_input_grad[1]:
            arguments = _arguments(d_z, s, seed, noise, ctx.options)[:8]  # all but the sample's dtype
            d_s = _autograd.summed(_BWD[ctx.backend](*arguments), s.shape, s.dtype)
        return d_mean, d_s, None, None, None, None


@_autograd.recordable
class _Draw(torch.autograd.Function):
    """The commonest sample, of two tensors of one shape, whose s wants a gradient: a tiny one costs no more than eager
    torch's. Its ops are called past a function of Python's."""

    @staticmethod
    def forward(ctx, mean, s):
        seed = _seed.drawn_on_cpu()
        ctx.save_for_backward(s, seed)
        return _FWD["cpu"]._op(mean, s, seed)

    @staticmethod
    def backward(ctx, d_z):
        s, seed = ctx.saved_tensors
        if _autograd.differentiable_backward():
            return d_z, _reference_gradient(d_z, s, seed, None, ())
        return d_z, _BWD["cpu"]._op(d_z, s, seed)


def _bwd_check(d_z, s, seed, noise, noise_offset, num_samples, temperature, scale):
    _checks.check_scale_numbers(scale)
    if num_samples is not None and tuple(d_z.shape[:1]) != (num_samples,):
        raise ValueError(f"d_z must have num_samples in front, {num_samples}; got shape {tuple(d_z.shape)}")
    _gaussian.check_rank("d_z", d_z, _gaussian.MAX_DIMS + (num_samples is not None))
    shape = d_z.shape if num_samples is None else d_z.shape[1:]
    _checks.operands(s=s)
    if _checks.broadcast(s.shape, shape) != shape:
        raise ValueError(f"s must broadcast to shape {tuple(shape)}; got {tuple(s.shape)}")
    out = _gaussian.check_draw(seed, noise, noise_offset, num_samples, temperature, shape, s.device)
    _checks.check_upstream("d_z", d_z, out, s.device)


def _fwd_fake(mean, s, seed, noise, noise_offset, num_samples, *options):
    return _gaussian.empty_sample(mean, _gaussian.joint_shape(mean, s), num_samples, options[-1] or mean.dtype)


def _bwd_fake(d_z, s, seed, noise, noise_offset, num_samples, *_):
    return _gaussian.empty_gradient(d_z.shape if num_samples is None else d_z.shape[1:], s, (d_z, s))


_FWD = _library.define(
    "gaussian_rsample_fwd",
    "(Tensor mean, Tensor s, Tensor? seed, Tensor? noise=None, SymInt noise_offset=0, SymInt? num_samples=None,"
    " float temperature=1.0, float[] scale=[0.0], ScalarType? out_dtype=None) -> Tensor",
    _fwd_fake,
    _gaussian.check,
    _gaussian.differentiable(_GaussianRsample),
)
_BWD = _library.define(
    "gaussian_rsample_bwd",
    "(Tensor d_z, Tensor s, Tensor? seed, Tensor? noise=None, SymInt noise_offset=0, SymInt? num_samples=None,"
    " float temperature=1.0, float[] scale=[0.0]) -> Tensor",
    _bwd_fake,
    _bwd_check,
)

_local = _gaussian.local(_GaussianRsample, _FWD, _reference, _arguments)
