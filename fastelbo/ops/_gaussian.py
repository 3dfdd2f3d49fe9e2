"""What the Gaussian ops share: priors and limits of raw scales, sums over events, fakes, and the raw ops' checks."""

import dataclasses
import itertools
import math

import torch

from fastelbo import _autograd, _checks, _library, _seed, backends, reference
from fastelbo.reference.gaussian_kl import event_sum
from fastelbo.reference.scale import arithmetic_dtype
from fastelbo.scale import as_scale, numbers, of_numbers


def prior_scale(scale, mean_p, scale_p):
    """The Scale of the prior; None for the standard normal."""
    if mean_p is None:
        return None
    return scale if scale_p is None else as_scale(scale_p, "scale_p")


class Known:
    """What checks and choices came to, for later calls that differ in nothing that these look at: they take longer than
    a small tensor's kernel, and than all that torch does around it."""

    def __init__(self):
        self._plans = {}

    def find(self, mean, s, others, *given):
        """Looks a call up.

        Args:
            mean, s, others: the call's tensors; others: None where there are none, or a tuple whose elements may be.
            given: its other arguments, some in tuples; numbers come with their types, for True is 1.

        Returns:
            The plan that was kept of such a call, or None; and the call's kind, to keep one by. The kind is None, too,
            where somebody traces, or where more decides than a key can hold.
        """
        if _traced() or _transform() is not None or _forward_ad._current_level >= 0 or backends.OVERRIDE is not None:
            return None, None
        if type(mean) not in _PLAIN or type(s) not in _PLAIN:
            return None, None
        try:
            kind = given, mean.dtype, mean.shape, mean.device, mean.layout, s.dtype, s.shape, s.device, s.layout
            if others is not None:
                for tensor in others:
                    if type(tensor) in _PLAIN:
                        kind += tensor.dtype, tensor.shape, tensor.device, tensor.layout
                    elif tensor is None:
                        kind += (None,)
                    else:
                        return None, None
            return self._plans.get(kind), kind
        except (RuntimeError, TypeError):  # a nested tensor has no shape, and a list no hash
            return None, None

    def keep(self, kind, plan, before, after):
        """Keeps what a call came to, unless tensors were made others, or it was told of values that no key holds.

        Args:
            kind: from find, which must not be None.
            plan: anything but a tensor, or what holds one.
            before, after: the call's tensors, and those that the op was given.
        """
        changed = any(a is not b for a, b in zip(before, after, strict=True))
        told = [x for given in kind[0] for x in (given if type(given) is tuple else (given,))]
        unheld = any(isinstance(x, torch.Tensor) or (type(x) is float and x == 0) for x in told)  # -0.0 is 0.0, too
        if changed or unheld:
            return
        if len(self._plans) >= 4096:
            self._plans.clear()
        self._plans[kind] = plan


# What each call asks, by short ways.
_traced, _transform = torch.compiler.is_dynamo_compiling, torch._C._functorch.peek_interpreter_stack
_forward_ad, _PLAIN = torch.autograd.forward_ad, _library.PLAIN


def local(function, kernels, reference, arguments):
    """The op of a file, for tensors that are no DTensors and have no more dimensions than kernels take.

    Args:
        function: its autograd.Function.
        kernels: of its forward, by backend.
        reference, arguments: what the reference computes, and the arguments of the forward's schema; of the op's
            tensors and its options.

    Returns:
        A function of the op's tensors, its options and a backend.
    """

    def run(tensors, options, backend):
        if backend == "reference":
            return reference(*tensors, options)
        if torch.compiler.is_exporting():  # a Function would leave no more in the program than its forward
            return _library.by_name(kernels[backend])(*arguments(*tensors, options))
        if not _autograd.recorded(tensors):
            return function.compute(*tensors, options, backend)
        return _autograd.record(function, tensors, options, backend)

    return run


def clamp_before_broadcast(s, shape, scale, dtype):
    """A raw scale and its Scale as the op takes them, or None for both.

    The inward clamp looks at the sign of a value's whole gradient, which a broadcast value has only before it is
    broadcast: it is then applied here rather than in the kernel.

    Args:
        s, scale: the caller's.
        shape, dtype: to which the op's tensors broadcast and promote.
    """
    if scale is None or scale.clamp is None or scale.clamp_grad != "inward":
        return s, scale
    exporting = torch.compiler.is_exporting()  # to a program that keeps no Function, of the reference neither
    if s.shape == shape and not exporting:
        return s, scale
    s = s.to(torch.float64 if dtype == torch.float64 else torch.float32)  # half precision would round the limits
    s = _CLAMP_INWARD(s, *scale.clamp) if exporting else reference.scale.clamp(s, scale)
    return s, dataclasses.replace(scale, clamp=None)


_CLAMP_INWARD = _library.define_helper(
    "clamp_inward",
    "(Tensor s, float lo, float hi) -> Tensor",
    lambda s, lo, hi: torch.empty_like(s),
    torch.clamp,
    differentiable=reference.scale.ClampInward.apply,
)


def normals(backend, num_samples):
    """A function that draws standard normals, bit for bit those of gaussian_rsample's kernels.

    Args:
        backend, num_samples: of the op.

    Returns:
        A function of their shape, a seed on their device, and their offset in the whole draw.
    """

    def draw(shape, seed, noise_offset):
        if backend == "reference":
            return reference.noise.philox_normal(seed, shape, num_samples=num_samples, noise_offset=noise_offset)
        mean, std = (torch.full((), x, dtype=torch.float32, device=seed.device).expand(shape) for x in (0.0, 1.0))
        options = seed, None, noise_offset, num_samples, 1.0
        op = (torch.ops.fastelbo_triton if backend == "triton" else torch.ops.fastelbo).gaussian_rsample_fwd
        return op.kernel(mean, std, *options, numbers(as_scale("std")), torch.float32)

    return draw


# Events


def kernel_event_ndim(event_ndim, reduction, shape, free_bits=None, free_bits_per="dim"):
    """How many dimensions a kernel sums: those of an event, or those before the floor of free bits. An elementwise term
    that is reduced afterwards is summed in the kernel, which then need not write it out."""
    if free_bits is not None:
        return 0 if free_bits_per == "dim" else event_ndim
    return len(shape) if event_ndim == 0 and reduction != "none" else event_ndim


def floored(kl, shape, event_ndim, free_bits, free_bits_per, mask):
    """The KL of each event with the floor of free bits.

    Args:
        kl: summed over the dimensions that kernel_event_ndim says.
        shape, event_ndim: of the elementwise KL.
    """
    counted = mask
    if mask is not None and free_bits_per != "dim":
        counted = _counted_events(mask, shape, event_ndim)
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


def reduce(value, reduction, shape, event_ndim, mask):
    """Reduces what the kernel returned for kernel_event_ndim; a mean is over the events that count."""
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    if mask is not None:
        return total / _counted_events(mask, shape, event_ndim).sum()
    return total / math.prod(shape[: len(shape) - event_ndim])


def _counted_events(mask, shape, event_ndim):
    """The events of which the mask lets an element count: bool, of the shape less the event's dimensions."""
    mask = mask.reshape((1,) * (len(shape) - mask.dim()) + mask.shape)
    if event_ndim > 0:
        if 0 in shape[len(shape) - event_ndim :]:
            mask = mask.expand(shape)  # a mask that broadcasts has elements where the event has none
        mask = mask.sum(dim=tuple(range(-event_ndim, 0))) > 0  # any() of a DTensor is wrong over a sharded dimension
    return mask.expand(shape[: len(shape) - event_ndim])


# Tensors of many dimensions

MAX_DIMS = 15  # that compiled kernels take: kMaxDims - 1 in csrc/common/host.h


class Fold:
    """Tensors of more dimensions than kernels take, with neighbouring ones made one; row-major order stays.

    Dimensions become one where every tensor has all of them or is broadcast over all: views, where memory allows. If
    too many remain, broadcast tensors are written out.

    Args:
        operands: of an op.
        event_ndim: how many trailing dimensions its kernel sums, which become one with no other.
        others: a mask, or noise, which may have a dimension of samples in front; None is none.

    Attributes:
        tensors: operands and others.
        event_ndim: of theirs.
    """

    def __init__(self, operands, event_ndim, *others):
        self.shape, self.events = joint_shape(*operands), event_ndim
        tensors = (*operands, *others)
        self._cuts = self._find_cuts([tensor for tensor in tensors if tensor is not None])
        self._whole = len(self._cuts) - 1 > MAX_DIMS
        if self._whole:
            rank = len(self.shape)
            self._cuts = sorted({0, rank - event_ndim, rank})
        self.tensors = tuple(self._folded(tensor) for tensor in tensors)
        self.event_ndim = sum(cut >= len(self.shape) - event_ndim for cut in self._cuts[:-1]) if event_ndim else 0

    def _find_cuts(self, tensors):
        """Where dimensions end that become one."""
        rank, cuts, before = len(self.shape), [0], None
        for d, size in enumerate(self.shape):
            if d == rank - self.events and d > 0:
                cuts.append(d)
                before = None
            if size == 1:
                continue
            varies = [rank - d <= tensor.dim() and tensor.shape[d - rank] != 1 for tensor in tensors]
            if before is not None and varies != before:
                cuts.append(d)
            before = varies
        return [*cuts, rank]

    def _folded(self, tensor):
        if tensor is None or tensor.dim() == 0:
            return tensor
        rank = len(self.shape)
        leading = tensor.shape[: max(tensor.dim() - rank, 0)]
        sizes = (*[1] * (rank - tensor.dim()), *tensor.shape[len(leading) :])
        if self._whole:
            sizes = self.shape
            tensor = tensor.expand(*leading, *sizes)
        parts = [math.prod(sizes[i:j]) for i, j in itertools.pairwise(self._cuts)]
        return tensor.reshape(*leading, *parts)

    def sample(self, z):
        """What a kernel drew of the tensors, with all dimensions."""
        return z.reshape(*z.shape[: z.dim() - len(self._cuts) + 1], *self.shape)

    def terms(self, value):
        """Likewise of what it summed over events."""
        return value.reshape(self.shape[: len(self.shape) - self.events])


# Fakes, which lie in memory as csrc/common/host.h allocates results


def joint_shape(*tensors):
    """The shape to which tensors broadcast; None is none."""
    return torch.broadcast_shapes(*[tensor.shape for tensor in tensors if tensor is not None])


def _empty(shape, dtype, like):
    """In the memory order of `like` where that has the full shape, else contiguous."""
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def empty_sample(mean, shape, num_samples, dtype):
    """A sample."""
    if num_samples is None:
        return _empty(shape, dtype, mean)
    return mean.new_empty((num_samples, *shape), dtype=dtype)


def empty_terms(shape, event_ndim, like, inputs):
    """KL or log-densities."""
    dtype = arithmetic_dtype(*inputs)
    if event_ndim == 0:
        return _empty(shape, dtype, like)
    return like.new_empty(shape[: len(shape) - event_ndim], dtype=dtype)


def empty_gradient(shape, like, inputs):
    """A gradient of `like`: in the arithmetic's precision where it has yet to be summed."""
    same = like.numel() == math.prod(shape)
    return _empty(shape, like.dtype if same else arithmetic_dtype(*inputs), like)


def empty_prior_gradients(mean_q, s_q, mean_p, s_p, prior_grad):
    """Gradients of q and p, those of p empty where they are not wanted."""
    inputs = mean_q, s_q, mean_p, s_p
    shape = joint_shape(*inputs)
    if prior_grad:
        return tuple(empty_gradient(shape, x, inputs) for x in inputs)
    nothing = (mean_q.new_empty((0,), dtype=torch.float32) for _ in range(2))
    return *(empty_gradient(shape, x, inputs) for x in inputs[:2]), *nothing


# The raw ops, by whose names exported programs and other languages call them

_OPERANDS = ("x", "mean", "s", "mean_q", "s_q", "mean_p", "s_p")
_TENSORS = (*_OPERANDS, "seed", "noise", "mask")


def check(**given):
    """Raises for arguments of an op that no kernel can take: as csrc/common/checks.h does for compiled kernels, in the
    same words, for Triton's and where nothing but metadata is there."""
    if "scale_p" in given:
        names = ("mean_p", "s_p", "scale", "scale_p", "balance")
        _checks.check_raw_prior(*(given[name] for name in names), given.get("prior_grad", False))
    else:
        _checks.check_scale_numbers(given["scale"])
    operands = {name: given[name] for name in _OPERANDS if name in given}
    for name, tensor in operands.items():
        check_rank(name, tensor)
    shape, device = _checks.operands(**operands)[1], next(iter(operands.values())).device
    upstream = {"d_z": shape}
    if "temperature" in given:
        names = ("seed", "noise", "noise_offset", "num_samples", "temperature")
        upstream["d_z"] = check_draw(*(given[name] for name in names), shape, device)
    if "event_ndim" in given:
        _checks.check_event_ndim(given["event_ndim"], shape)
        if given["mask"] is not None:
            _checks.check_mask(given["mask"], shape, device)
        upstream["d_kl"] = upstream["d_out"] = shape[: len(shape) - given["event_ndim"]]
    _checks.check_out_dtype(given.get("out_dtype"))
    for name in ("d_z", "d_kl", "d_out"):
        if name in given:
            _checks.check_upstream(name, given[name], upstream[name], device)


def check_rank(name, tensor, limit=MAX_DIMS):
    """Of what Fold has not been asked for."""
    if tensor is not None and tensor.dim() > limit:
        raise ValueError(f"{name} must have at most {limit} dimensions; got {tensor.dim()}")


def check_draw(seed, noise, noise_offset, num_samples, temperature, shape, device):
    """What decides an op's draw; the samples' shape."""
    if (seed is None) == (noise is None):
        raise ValueError(f"seed or noise must be given, and not both; got {'neither' if seed is None else 'both'}")
    _checks.noise_arguments(noise, None, None, noise_offset, num_samples, temperature, shape, device)
    if seed is not None:
        _seed.as_seed(seed, None, seed.device if seed.is_cpu else device)  # kernels may take its value on the host
    return shape if num_samples is None else (num_samples, *shape)


def differentiable(function):
    """What computes an op, so that gradients pass, from the arguments of its schema.

    Args:
        function: the op's autograd.Function: it takes the schema's tensors, and all else as a tuple, in its order.
    """

    def call(backend, **given):
        if given.get("noise") is not None and given["noise"].requires_grad:
            raise NotImplementedError(
                "noise must not want a gradient, which only the reference passes on; got one that does"
            )
        options = (
            of_numbers(x) if name.startswith("scale") else x for name, x in given.items() if name not in _TENSORS
        )
        return function.apply(*(x for name, x in given.items() if name in _TENSORS), tuple(options), backend)

    return call
