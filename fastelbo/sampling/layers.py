"""The modules and functions that the sampler knows, each with the steps that it takes.

A handler takes the network, the module if there is one, and the arguments by torch's names: what tensors hold, or, of a
sharing one (memory.py), the tensors. It returns None for a call that it does not know after all.
"""

import itertools
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fastelbo import nn as ours
from fastelbo.sampling.memory import Padded, contiguous, getitem, setitem, sharing
from fastelbo.sampling.network import Const, View, unknown

_CODE = ("__call__", "_call_impl", "forward", "_conv_forward", "live_taps")
_BLOCK = {
    "vertical": ours.VerticalStackConv2d,
    "horizontal": ours.HorizontalStackConv2d,
    "link": nn.Conv2d,
    "out": ours.MaskedConv2d,
}


def parts(module: nn.Module) -> list[tuple[str, nn.Module, type[nn.Module] | None]]:
    """The modules whose code the sampler stands in for where a module is a known layer, and which layers they are."""
    kind = next((kind for kind in MODULES if isinstance(module, kind)), None)
    inside = _BLOCK if kind is ours.GatedMaskedConv2d else {}
    return [("", module, kind), *((name, getattr(module, name), kind) for name, kind in inside.items())]


def layer(module: nn.Module) -> type[nn.Module] | None:
    """The known layer that a module is, if it computes what that layer's code says."""
    for _, part, kind in parts(module):
        if kind is None or not isinstance(part, kind) or any(name in vars(part) for name in _CODE):
            return None
        if any(getattr(type(part), name, None) is not getattr(kind, name, None) for name in _CODE):
            return None
    return parts(module)[0][2]


# Layers


def _causal_conv(network, module, input, cond=None, residual=None):
    _check_channels(input, module.in_channels, module)
    rows, columns = module.weight.shape[2:]
    if isinstance(module, ours.VerticalStackConv2d):
        row, column = rows - 1, columns // 2
    elif isinstance(module, ours.HorizontalStackConv2d):
        row, column = 0, columns - 1
    else:
        row, column = rows // 2, columns // 2
    dilation = module.dilation[0]
    taps = [((i - row) * dilation, (j - column) * dilation) for i in range(rows) for j in range(columns)]
    live = module.live_taps().to(module.weight.device).flatten(2)
    return network.conv(input, module.weight.flatten(2), live, taps, module.bias, cond, module.activation, residual)


def _stack(network, module, input, cond=None):
    return _causal_conv(network, module, input, cond)


def _conv_1x1(network, module, input):
    """nn.Conv2d; None for one that reads other pixels."""
    if module.kernel_size != (1, 1) or module.stride != (1, 1) or module.padding not in ((0, 0), "same", "valid"):
        return None
    _check_channels(input, module.in_channels, module)
    outputs, inputs = module.weight.shape[:2]
    live = torch.zeros(outputs, module.in_channels, dtype=torch.bool, device=module.weight.device)
    weight = module.weight.new_zeros(outputs, module.in_channels)
    for group in range(module.groups):
        rows = slice(group * outputs // module.groups, (group + 1) * outputs // module.groups)
        columns = slice(group * inputs, (group + 1) * inputs)
        live[rows, columns] = True
        weight[rows, columns] = module.weight.detach()[rows, :, 0, 0]
    return network.conv(input, weight[:, :, None], live[:, :, None], [(0, 0)], module.bias)


def _gated(network, module, v, h, cond=None):
    """GatedMaskedConv2d, as its forward has it."""
    if (cond is None) != (module.cond is None):
        raise ValueError(f"cond must {'not ' if module.cond is None else ''}be given: cond_channels decides")
    v_cond = h_cond = None
    if cond is not None:
        if not isinstance(cond, Const):
            raise unknown("GatedMaskedConv2d with a cond that depends on the image", "compute it from the condition")
        both = Const(
            lambda known: module.cond(c if (c := cond(known)).dim() == 4 else c[:, :, None, None]), cond.of_image
        )
        v_cond, h_cond = (
            Const(lambda known, half=half: both(known).chunk(2, dim=1)[half], cond.of_image) for half in (0, 1)
        )
    z = _causal_conv(network, module.vertical, v)
    seen = View(z.value, z.channels, 1) if module.link_convention == "shift" else z
    link = _conv_1x1(network, module.link, seen)
    if h_cond is not None:
        link = network.point("add", link, h_cond)
    gated = _causal_conv(network, module.horizontal, h, cond=link)
    half = len(z.channels) // 2
    summed = z if v_cond is None else network.point("add", z, v_cond)
    v = network.point(module.activation, summed.select(range(half)), summed.select(range(half, 2 * half)))
    return v, _causal_conv(network, module.out, gated, residual=h if module.residual else None)


def _check_channels(x, expected, module):
    if not isinstance(x, View):
        raise unknown(f"{type(module).__name__} of {type(x).__name__}")
    if len(x.channels) != expected:
        raise ValueError(f"model must match its own layers: {module} got {len(x.channels)} channels")


def _batch_norm(network, module, input):
    if module.running_mean is None:
        raise unknown("nn.BatchNorm2d without running statistics", "track_running_stats=True")
    factor = (module.running_var.detach() + module.eps).rsqrt()
    if module.weight is not None:
        factor = factor * module.weight.detach()
    shift = -module.running_mean.detach() * factor
    if module.bias is not None:
        shift = shift + module.bias.detach()
    scaled = network.point("mul", input, Const(lambda known: factor[:, None, None]))
    return network.point("add", scaled, Const(lambda known: shift[:, None, None]))


# Channels


def _cat(network, tensors, dim=0, axis=None):
    if (dim if axis is None else axis) not in (1, -3):
        raise unknown("cat along another dimension than the channels", "cat along dim=1")
    parts = tuple(tensors)
    if not all(isinstance(part, View) for part in parts):
        raise unknown("cat of features and a constant", "add the constant as a condition")
    return network.join(parts)


@sharing
def _split(network, tensor, split_size_or_sections, dim=0):
    if dim not in (1, -3):
        raise unknown("split along another dimension than the channels", "split along dim=1")
    sizes = split_size_or_sections
    if not isinstance(sizes, list | tuple):
        count = len(tensor.channels)
        sizes = [min(sizes, count - start) for start in range(0, count, sizes)]
    starts = [0, *itertools.accumulate(sizes)]
    return tuple(tensor.select(range(start, start + size)) for start, size in zip(starts, sizes, strict=False))


@sharing
def _chunk(network, input, chunks, dim=0):
    return _split(network, input, -(-len(input.channels) // chunks), dim)


def _pad(network, input, pad, mode="constant", value=None):
    left, right, above, below = (*pad, 0, 0)[:4] if len(pad) in (2, 4) else (0, -1, 0, 0)
    if mode != "constant" or value or right or below or left < 0 or above < 0:
        raise unknown("pad other than by zeros above and to the left", "pad so, and slice as much off the other side")
    return Padded(input, above, left)


# Pointwise functions


def _add(network, input, other, alpha=1):
    if alpha != 1:
        raise unknown("add with alpha", "multiply before")
    return _binary("add", network, input, other)


def _sub(network, input, other, alpha=1):
    if alpha != 1:
        raise unknown("sub with alpha", "multiply before")
    return _binary("sub", network, input, other)


def _binary(function, network, input, other):
    numbers = [operand for operand in (input, other) if isinstance(operand, int | float)]
    if not numbers:
        return network.point(function, input, other)
    (a,) = numbers
    scale, shift = {"add": (1, a), "sub": (1, -a), "mul": (a, 0), "div": (1 / a if a else 0, 0)}[function]
    if isinstance(input, View):
        if function == "div" and a == 0:
            raise unknown("a division by 0")
        return network.point("affine", input, parameters=(scale, shift))
    if function == "sub":
        return network.point("affine", other, parameters=(-1, a))
    if function == "div":
        number = torch.tensor(float(a), dtype=torch.float64, device="cpu")
        return network.point("div", Const(lambda known: number), other)
    return network.point("affine", other, parameters=(scale, shift))


def _elu(network, input, alpha=1.0, inplace=False):
    return network.point("elu", input, parameters=(alpha,))


def _leaky_relu(network, input, negative_slope=0.01, inplace=False):
    return network.point("leaky_relu", input, parameters=(negative_slope,))


def _gelu(network, input, approximate="none"):
    return network.point("gelu_tanh" if approximate == "tanh" else "gelu", input)


def _softplus(network, input, beta=1.0, threshold=20.0):
    return network.point("softplus", input, parameters=(beta, threshold))


def _clamp(network, input, min=None, max=None):
    low, high = (-float("inf") if min is None else min), (float("inf") if max is None else max)
    return network.point("clamp", input, parameters=(low, high))


def _hardtanh(network, input, min_val=-1.0, max_val=1.0, inplace=False):
    return _clamp(network, input, min_val, max_val)


def _relu6(network, input, inplace=False):
    return _clamp(network, input, 0, 6)


@sharing
def _dropout(network, input, p=0.5, training=True, inplace=False):
    if training:
        raise unknown("dropout while training", "training=self.training, which is False in evaluation mode")
    return input


def _unary(name):
    return lambda network, input, inplace=False: network.point(name, input)


def _square(network, input):
    return network.point("mul", input, input)


def _neg(network, input):
    return network.point("affine", input, parameters=(-1, 0))


def _prelu(network, input, weight):
    return network.point("prelu", input, Const(lambda known: weight(known).reshape(-1, 1, 1), weight.of_image))


def _glu(network, input, dim=-1):
    a, b = _chunk(network, input, 2, dim)
    return network.point("glu", a, b)


def _module(name, *attributes):
    """A pointwise module as the function of that name."""

    def handle(network, module, input):
        return _UNARY[name](network, input, **{attribute: getattr(module, attribute) for attribute in attributes})

    return handle


_UNARY = {
    **{name: _unary(name) for name in ("relu", "sigmoid", "tanh", "silu", "exp", "abs")},
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "softplus": _softplus,
    "hardtanh": _hardtanh,
    "relu6": _relu6,
    "glu": _glu,
    "neg": _neg,
    "square": _square,
    "clamp": _clamp,
    "dropout": _dropout,
}

_BINARY = {
    "add": _add,
    "sub": _sub,
    "mul": lambda network, input, other: _binary("mul", network, input, other),
    "div": lambda network, input, other: _binary("div", network, input, other),
}


@sharing
def _split_method(network, tensor, split_size, dim=0):
    return _split(network, tensor, split_size, dim)


@sharing
def _identity(network, module, input):
    return input


@sharing
def _float(network, x):
    return x


# What is known


DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
#: Functions that write into their first operand.
IN_PLACE = tuple(getattr(operator, "i" + name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


MODULES: dict[type[nn.Module], Callable] = {
    ours.GatedMaskedConv2d: _gated,
    ours.MaskedConv2d: _causal_conv,
    ours.VerticalStackConv2d: _stack,
    ours.HorizontalStackConv2d: _stack,
    nn.Conv2d: _conv_1x1,
    nn.BatchNorm2d: _batch_norm,
    nn.PReLU: lambda network, module, input: _prelu(network, input, Const(lambda known: module.weight.detach())),
    nn.ReLU6: _module("relu6"),
    nn.Hardtanh: _module("hardtanh", "min_val", "max_val"),
    nn.ReLU: _module("relu"),
    nn.ELU: _module("elu", "alpha"),
    nn.LeakyReLU: _module("leaky_relu", "negative_slope"),
    nn.Sigmoid: _module("sigmoid"),
    nn.Tanh: _module("tanh"),
    nn.SiLU: _module("silu"),
    nn.GELU: _module("gelu", "approximate"),
    nn.Softplus: _module("softplus", "beta", "threshold"),
    nn.GLU: _module("glu", "dim"),
    **dict.fromkeys((nn.Identity, *DROPOUTS), _identity),
}

FUNCTIONS: dict[Callable, Callable] = {
    **{
        getattr(place, name + suffix): _UNARY[name]
        for name in _UNARY
        for place in (torch, F)
        for suffix in ("", "_")
        if callable(getattr(place, name + suffix, None))
    },
    **{getattr(torch, name): handler for name, handler in _BINARY.items()},
    **{getattr(operator, name): _BINARY[name] for name in ("add", "sub", "mul")},
    operator.truediv: _BINARY["div"],
    **{getattr(operator, "i" + name): _BINARY[name] for name in ("add", "sub", "mul")},
    operator.itruediv: _BINARY["div"],
    operator.neg: _neg,
    F.prelu: _prelu,
    F.dropout2d: _dropout,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.chunk: _chunk,
    torch.split: _split,
    F.pad: _pad,
    operator.getitem: getitem,
    operator.setitem: setitem,
}


METHODS: dict[str, Callable] = {
    **{name: handler for name, handler in (_UNARY | _BINARY).items() if hasattr(Tensor, name)},
    **{name + "_": handler for name, handler in (_UNARY | _BINARY).items() if hasattr(Tensor, name + "_")},
    "chunk": _chunk,
    "split": _split_method,
    "contiguous": contiguous,
    "float": _float,
}
