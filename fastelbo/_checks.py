"""Argument checks. Errors have one voice: the argument, the rule, what came. None waits for a device: all are on
metadata, but for `values`, which drop-ins use whose originals look at values."""

import functools
import math
import numbers
import re
import sys
from typing import Any

import torch

from fastelbo import _autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATS = "float32, float64, bfloat16 or float16"
_MAX_DIMS = 64  # torch's own limit
_OPTIONAL = ("mean_p", "s_p")
_OBSERVED = ("x",)  # data, which may be integers, as of images
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def calls(**names: str) -> Any:
    """A decorator for a function whose arguments go on to an op under other names: errors name them as its caller did.

    Args:
        names: what the op calls an argument, and what the caller calls it.
    """
    words = re.compile(rf"(?<![\w'.])({'|'.join(names)})(?!\w)")

    def decorate(function):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            try:
                return function(*arguments, **keywords)
            except (TypeError, ValueError) as error:
                raise type(error)(words.sub(lambda word: names[word[0]], str(error))) from error

        return call

    return decorate


def operands(
    event_ndim: Any = 0, event_name: str = "event_ndim", /, **named: Any
) -> "tuple[tuple[torch.Tensor, ...], torch.Size, torch.dtype]":
    """Checks the tensors of an op, and makes tensors of its numbers.

    Args:
        event_ndim: as the op got it: where None, no operand's batch may broadcast into another's event.
        event_name: what an error calls that.
        named: tensors or Python numbers, and None for a prior that is not given, in the order in which errors should
            name them.

    Returns:
        The tensors (None where None came), their broadcast shape, and the dtype torch promotes them to.
    """
    values = tuple(named.values())
    first = values[0]
    if isinstance(first, torch.Tensor) and not first.is_nested:
        shape, dtype, device, with_numbers = first.shape, first.dtype, first.device, False
        for name, value in named.items():  # the common case: nothing to convert, nothing to broadcast but scalars
            if value is first or (value is None and name in _OPTIONAL):
                continue
            if type(value) is float:
                with_numbers = True
            elif not (
                isinstance(value, torch.Tensor)
                and value.layout is torch.strided
                and value.dtype == dtype
                and value.device == device
                and not value.is_nested
                and (value.shape == shape or value.dim() == 0)
            ):
                return _mixed_operands(named, event_ndim, event_name)
        if dtype in DTYPES and len(shape) <= _MAX_DIMS and first.layout is torch.strided:
            if with_numbers:
                values = tuple([_tensor_of(x, dtype, device) if type(x) is float else x for x in values])
            return values, shape, dtype
    return _mixed_operands(named, event_ndim, event_name)


def _tensor_of(number, dtype, device):
    """A number as an operand beside tensors of that dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # half precision would round it
    return torch.full((), number, dtype=wide, device=device)


def _mixed_operands(named, event_ndim, event_name):
    tensors = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    if not tensors:
        raise TypeError(f"{' or '.join(named)} must be a tensor; got only numbers")
    anchor_name = next((name for name in tensors if named[name].is_nested or named[name].dim() > 0), tensors[0])
    device = named[anchor_name].device
    shape, widest = torch.Size(()), anchor_name
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            if (value is None and name in _OPTIONAL) or _is_number(value):
                continue
            raise TypeError(f"{name} must be a tensor or a number; got {type(value).__name__}")
        if name not in _OBSERVED or value.dtype not in _INTEGERS:
            check_dtype(name, value.dtype)
        check_dense(name, value)
        if value.device != device and not (value.dim() == 0 and value.device.type == "cpu"):
            raise ValueError(f"{name} must be on the device of {anchor_name}, {device}; got {value.device}")
        if value.dim() == 0:
            continue
        if value.shape != shape:
            joint = broadcast(shape, value.shape)
            if joint is None:
                raise ValueError(
                    f"{name} must broadcast with {widest} of shape {tuple(shape)}; got {tuple(value.shape)}"
                )
            if joint != shape:
                shape, widest = joint, name
    if len(shape) > _MAX_DIMS:
        name, value = max(
            ((name, value) for name, value in named.items() if isinstance(value, torch.Tensor)),
            key=lambda item: item[1].dim(),
        )
        raise ValueError(f"{name} must have at most {_MAX_DIMS} dimensions; got {value.dim()}")
    if event_ndim is None:
        _default_event(named, len(shape), event_name)
    dtype = promoted(*named.values())
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    made = []
    for name, value in named.items():
        if value is not None and not isinstance(value, torch.Tensor):
            if isinstance(value, int) and abs(value) > sys.float_info.max:
                raise ValueError(f"{name} must be a number that a float holds; got one of {value.bit_length()} bits")
            value = _tensor_of(float(value), dtype, device)
        elif value is not None and value.dtype in _INTEGERS:
            value = value.to(arithmetic)
        elif value is not None and value.dtype == torch.float64 and arithmetic == torch.float32:
            value = value.to(arithmetic)  # it is 0-d: else the arithmetic would be float64
        if isinstance(value, torch.Tensor) and value.device != device:
            value = value.to(device)  # 0-d, of the CPU: a number to torch's arithmetic, too
        made.append(value)
    return tuple(made), shape, dtype


def _is_number(value):
    """A number of Python or NumPy, and no bool."""
    if isinstance(value, (torch.Tensor, bool)):
        return False
    return isinstance(value, (int, float, numbers.Real))


def check_dtype(name, dtype):
    """One that the ops compute with."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be {_FLOATS}; got {dtype}")


def check_one_of(name, value, allowed):
    """A choice among names, or None."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def check_int(name, value, rule="an int", symbolic=False):
    """An int, of NumPy or a 0-d tensor too (whose device is waited for), and no bool; symbolic: or what stands for one
    where sizes are not yet known. The value."""
    if type(value) is int:
        return value
    if isinstance(value, torch.Tensor):
        _check_0d(name, value)
        if value.dtype in _INTEGERS:
            return int(value)
        raise TypeError(f"{name} must be {rule}; got {value.dtype}")
    if symbolic and isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {rule}; got {type(value).__name__}")
    return int(value)


def check_positive_int(name, value):
    """A number of things, of which there is at least one, as compiled code holds it; the value."""
    value = check_int(name, value, symbolic=True)
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31; got {value}")
    return value


def check_number(name, value, rule="a number"):
    """A number, of NumPy or a 0-d tensor too (whose device is waited for), and no bool. The value."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, torch.Tensor):
        _check_0d(name, value)
        if value.requires_grad:
            raise ValueError(f"{name} must be a number, which gets no gradient; got a tensor that requires one")
        if not (value.is_floating_point() or value.dtype in _INTEGERS):
            raise TypeError(f"{name} must be {rule}; got {value.dtype}")
        return value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {rule}; got {type(value).__name__}")
    return float(value)


def _check_0d(name, value):
    if value.dim() > 0:
        raise ValueError(f"{name} must be a number or 0-d; got shape {tuple(value.shape)}")
    if value.is_meta:
        raise ValueError(f"{name} must be a number or on a device that holds one; got a tensor on meta")


def check_dense(name, tensor):
    """No kernel reads sparse or nested tensors."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor; got a {kind} one")


def _default_event(named, rank, event_name):
    """The default event is all but the first dimension of the broadcast shape. An operand of fewer dimensions has its
    first, its own batch, in there; where no operand of all dimensions has that size too, broadcasting made the event,
    and the sum would be over the batch."""
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    full = {name: value.shape for name, value in tensors.items() if value.dim() == rank}
    for name, value in tensors.items():
        place = rank - value.dim()
        if place > 0 and value.shape[0] != 1 and all(shape[place] == 1 for shape in full.values()):
            other, shape = next(iter(full.items()))
            raise ValueError(
                f"{name} must not have its first dimension broadcast into an event of {other}, of shape "
                f"{tuple(shape)}, unless {event_name} is given; got {tuple(value.shape)}"
            )


def promoted(*values):
    """The dtype that torch promotes tensors to (numbers and None have no say, nor has a 0-d tensor beside others)."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        dtypes = {tensor.dtype for tensor in tensors if tensor.dim() > 0} or dtypes
    return functools.reduce(torch.promote_types, dtypes)


def broadcast(a, b):
    """The shape to which two shapes broadcast, or None (tracing cannot catch what torch.broadcast_shapes raises)."""
    if len(a) < len(b):
        a, b = b, a
    sizes = list(a)
    for d in range(-len(b), 0):
        if sizes[d] == 1:
            sizes[d] = b[d]
        elif b[d] != 1 and b[d] != sizes[d]:
            return None
    return torch.Size(sizes)


def check_event_ndim(value, shape, name="event_ndim"):
    """The number of trailing dimensions to sum: all but the first where None came."""
    rank = len(shape)
    if value is None:
        return max(rank - 1, 0)
    value = check_int(name, value, "an int or None")
    if not 0 <= value <= rank:
        raise ValueError(f"{name} must be between 0 and {rank} for shape {tuple(shape)}; got {value}")
    return value


def check_sample_dim(value, shape):
    """The dimension of the samples, of which there must be one."""
    rank = len(shape)
    value = check_int("dim", value)
    if not -rank <= value < rank:
        raise ValueError(f"dim must be between {-rank} and {rank - 1} for shape {tuple(shape)}; got {value}")
    if shape[value] == 0:
        raise ValueError(f"dim must have at least one sample; got shape {tuple(shape)}")
    return value


def check_reduction(value):
    if value not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean; got {value!r}")


def check_prior(mean_p, s_p, scale_p):
    """A prior has a mean and a scale, or neither."""
    if (mean_p is None) != (s_p is None):
        missing = "mean_p" if mean_p is None else "s_p"
        raise ValueError(f"mean_p and s_p must both be given, or neither; got no {missing}")
    if mean_p is None and scale_p is not None:
        raise ValueError("scale_p must come with mean_p and s_p; got it alone")


def check_mask(mask, shape, device, name="mask"):
    """A mask says which elements count."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a tensor of bool; got {kind}")
    check_dense(name, mask)
    check_device(name, mask, device)
    if broadcast(mask.shape, shape) != shape:
        raise ValueError(f"{name} must broadcast to shape {tuple(shape)}; got {tuple(mask.shape)}")


def check_device(name, tensor, device):
    """Of a tensor that comes with others."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of the other tensors, {device}; got {tensor.device}")


def check_scalar(name, value, device, at_least=-math.inf):
    """A number that training may change: as a 0-d tensor, which no traced function is compiled again for, nor waited
    for. The value."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a number or a floating-point tensor; got {value.dtype}")
        if value.dim() > 0:
            raise ValueError(f"{name} must be a number or 0-d; got shape {tuple(value.shape)}")
        if value.device.type != "cpu":  # torch's arithmetic, too, takes a 0-d tensor of the CPU as a number
            check_device(name, value, device)
        if at_least > -math.inf and readable(value) and not value.detach() >= at_least:
            raise ValueError(f"{name} must be at least {at_least}; got {value.item()}")
        return value
    value = check_number(name, value, "a number or a 0-d tensor")
    if not value >= at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    return value


def check_fraction(name, value):
    value = check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1; got {value}")
    return value


def check_kl_objective(free_bits, free_bits_per, balance, mask, shape, event_ndim, device, mean_p):
    """What turns a KL divergence into an objective; the values of free_bits and balance."""
    if free_bits_per not in ("dim", "example", "batch"):
        raise ValueError(f"free_bits_per must be dim, example or batch; got {free_bits_per!r}")
    if free_bits is not None:
        free_bits = check_scalar("free_bits", free_bits, device, at_least=0)
        if free_bits_per == "dim" and event_ndim == 0:
            raise ValueError("event_ndim must be at least 1 for free_bits_per='dim'; got 0")
    if balance is not None:
        if mean_p is None:
            raise ValueError("balance must come with mean_p and s_p; got it alone")
        balance = check_fraction("balance", balance)
    if mask is not None:
        check_mask(mask, shape, device)
    return free_bits, balance


def noise_arguments(noise, seed, generator, noise_offset, num_samples, temperature, shape, device):
    """Checks what decides a draw, but for the seed; noise_offset, num_samples and temperature as numbers."""
    if num_samples is not None:
        num_samples = check_int("num_samples", num_samples, "an int or None", symbolic=True)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1; got {num_samples}")
        if num_samples >= 2**32:
            raise ValueError(f"num_samples must be below 2**32, the samples of a seed; got {num_samples}")
        if len(shape) == _MAX_DIMS:
            raise ValueError(
                f"num_samples must make no more than {_MAX_DIMS} dimensions; got {num_samples} in front of {len(shape)}"
            )
        shape = torch.Size((num_samples, *shape))
    temperature = check_number("temperature", temperature)
    if not abs(temperature) <= sys.float_info.max:
        raise ValueError(f"temperature must be finite; got {temperature}")
    noise_offset = check_int("noise_offset", noise_offset, symbolic=True)
    if noise_offset < 0:
        raise ValueError(f"noise_offset must be at least 0; got {noise_offset}")
    if noise_offset >= 2**63:
        raise ValueError(f"noise_offset must be below 2**63; got {noise_offset}")
    if noise is None:
        if seed is not None and generator is not None:
            raise ValueError("seed and generator must not both be given")
        return noise_offset, num_samples, temperature
    if seed is not None or generator is not None:
        raise ValueError("noise must not be given together with seed or generator")
    if not isinstance(noise, torch.Tensor) or noise.dtype not in DTYPES:
        kind = noise.dtype if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise TypeError(f"noise must be a tensor of {_FLOATS}; got {kind}")
    check_dense("noise", noise)
    if noise.device != device:
        raise ValueError(f"noise must be on the device of mean, {device}; got {noise.device}")
    if broadcast(noise.shape, shape) != shape:
        raise ValueError(f"noise must broadcast to the sample's shape {tuple(shape)}; got {tuple(noise.shape)}")
    return noise_offset, num_samples, temperature


def check_out_dtype(value):
    if value is not None:
        check_dtype("out_dtype", value)


def readable(tensor):
    """Whether Python can look at a tensor's values: they lie in host memory, and nothing is being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _autograd.transformed()


def check_values(valid, message):
    """Checks values: a ValueError where Python can look at them; elsewhere the device asserts it and nobody waits.

    Args:
        valid: bool tensor, of the values' device.
        message: of the error. (What a device says is its own.)
    """
    if readable(valid):
        if not valid.all():
            raise ValueError(message)
    elif not _autograd.transformed():  # whose tensors stand for others'
        torch._assert_async(valid.all(), message)


# Of what a raw op is called with


def check_scale_numbers(values):
    """The numbers of a Scale, as the ops' schemas carry them."""
    if not 1 <= len(values) <= 10:
        raise ValueError(f"scale must be of 1 to 10 numbers; got {len(values)}")
    full = (*values[:8], *_SCALE_DEFAULTS[len(values) :])  # those that follow are made of these
    kind, clamp_grad, lo, hi, *positive, beta = full
    for name, value, valid, rule in (
        ("kind", kind, kind in range(5), "0, 1, 2, 3 or 4"),
        ("clamp_grad", clamp_grad, clamp_grad in range(3), "0, 1 or 2"),
        ("clamp", hi, lo < hi, "a lower limit below a higher one"),
        *(
            (name, value, 0 <= value < math.inf, "at least 0 and finite")
            for name, value in zip(("soft_clamp", "min_std", "var_eps"), positive, strict=True)
        ),
        ("beta", beta, 0 < beta < math.inf, "positive and finite"),
    ):
        if not valid:
            raise ValueError(f"scale must have a {name} that is {rule}; got {value:g}")
    return full


_SCALE_DEFAULTS = (0.0, 0.0, -math.inf, math.inf, 0.0, 0.0, 0.0, 1.0)


def check_raw_prior(mean_p, s_p, scale, scale_p, balance, prior_grad):
    """The prior of a raw op, what the scales are, and what of the gradient reaches the prior."""
    check_prior(mean_p, s_p, None)
    if (mean_p is None) != (scale_p is None):
        raise ValueError(f"scale_p must come with mean_p and s_p; got {'it alone' if mean_p is None else 'none'}")
    if prior_grad and mean_p is None:
        raise ValueError("prior_grad must come with mean_p and s_p; got it alone")
    for values in (scale, scale_p):
        if values is not None:
            check_scale_numbers(values)
    if balance is not None:
        check_fraction("balance", balance)


def check_upstream(name, tensor, shape, device):
    """The gradient of a result of the shape."""
    check_dtype(name, tensor.dtype)
    check_device(name, tensor, device)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be of shape {tuple(shape)}; got {tuple(tensor.shape)}")
