"""A causal network as a list of steps over images of features, with what each of them depends on.

A feature of a pixel depends on whole rows above it only ("above"), also on what lies left in the pixel's own row and on
some colours of the pixel itself (a set of bits for each channel), or on its whole row. The first can be computed a row
at a time, the second pixel after pixel, the last when the row is known. What the last layer depends on says whether the
network is causal, and in which order the colours of a pixel come.
"""

import functools
import inspect
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from fastelbo import nn as ours
from fastelbo.ops.masked_conv2d import GATES

ABOVE, PIXEL, ROW = range(3)  # when a feature is known: before its row, with its pixel, after its row


@dataclass(eq=False)
class Value:
    """What a step computes."""

    phase: int
    colours: list[int]  # of each channel: the colours of its own pixel that it depends on, as bits


@dataclass(eq=False)
class View:
    """Channels of a value, moved down and to the right; zeros come in from outside of the image."""

    value: Value
    channels: tuple[int, ...]
    down: int = 0
    right: int = 0

    @property
    def phase(self) -> int:
        return ABOVE if self.down else self.value.phase

    @property
    def colours(self) -> list[int]:
        if self.down or self.right or self.phase != PIXEL:
            return [0] * len(self.channels)
        return [self.value.colours[channel] for channel in self.channels]

    def select(self, channels) -> "View":
        return View(self.value, tuple(self.channels[channel] for channel in channels), self.down, self.right)


@dataclass(eq=False)
class Const:
    """What depends on the condition and on parameters only: a function of what is known so far."""

    function: Callable[[dict], Tensor]
    of_image: bool = False  # whether it depends on the condition, which each image has its own of

    def __call__(self, known: dict) -> Tensor:
        if self not in known:
            known[self] = self.function(known)
        return known[self]


@dataclass(eq=False)
class Padded:
    """A view with zeros above and to the left, which a slice must take off at the other side."""

    view: View
    down: int
    right: int


@dataclass(eq=False)
class Storage:
    """What tensors that share memory hold: an operation in place on one of them shows in all."""

    content: View | Padded
    cropped: "Storage | None" = None  # of padded ones, the slice
    strided: bool = False  # whether it is such a slice, which is not contiguous
    ambiguous: bool = False  # whether a copy, or more of the same memory, was taken: that depends on the batch


@dataclass(eq=False)
class Shared:
    """A tensor of features: channels of a storage."""

    storage: Storage
    channels: tuple[int, ...]

    @property
    def content(self) -> View | Padded:
        content = self.storage.content
        return content.select(self.channels) if isinstance(content, View) else content

    @property
    def whole(self) -> bool:
        return isinstance(self.storage.content, View) and len(self.channels) == len(self.storage.content.channels)

    def select(self, channels) -> "Shared":
        return Shared(self.storage, tuple(self.channels[channel] for channel in channels))


def _storing(result):
    """New features in a storage of their own."""
    if isinstance(result, tuple | list):
        return type(result)(map(_storing, result))
    if isinstance(result, View):
        return Shared(Storage(result), tuple(range(len(result.channels))))
    return Shared(Storage(result), ()) if isinstance(result, Padded) else result


Operand = View | Const


@dataclass(eq=False)
class Conv:
    """A convolution over live taps, (rows down, columns right) from the pixel; then cond, activation, residual."""

    x: View
    weight: Tensor  # [out, in, taps]
    live: Tensor  # the same, bool
    taps: list[tuple[int, int]]
    bias: Tensor | None
    cond: Operand | None
    activation: str | None
    residual: Operand | None
    out: Value


@dataclass(eq=False)
class Point:
    """A function of one or two operands at each pixel."""

    function: str
    operands: tuple[Operand, ...]
    parameters: tuple[float, ...]
    out: Value


@dataclass(eq=False)
class Join:
    """The channels of several operands, one after the other."""

    parts: tuple[Operand, ...]
    out: Value


@dataclass
class Network:
    """The steps in order, and what the image and the logits are."""

    image: Value
    logits: View
    steps: list[Conv | Point | Join] = field(default_factory=list)
    stages: list[list[int]] = field(default_factory=list)  # colours that are drawn together, in order

    def level(self, colours: int) -> int:
        """The number of stages that must be drawn before a feature that depends on these colours is known."""
        return max((n + 1 for n, stage in enumerate(self.stages) if any(colours >> c & 1 for c in stage)), default=0)


KNOWN = (
    "the layers of fastelbo.nn, nn.Conv2d with 1 x 1 kernels, torch's pointwise functions, cat, chunk and split of "
    "channels"
)
CONVOLUTIONS = "use fastelbo.nn.MaskedConv2d, or VerticalStackConv2d and HorizontalStackConv2d"


class _UnknownError(NotImplementedError):
    """What a network is refused with, told from what its own code raises."""


def unknown(what: str, advice: str = f"build the network of {KNOWN}") -> NotImplementedError:
    return _UnknownError(f"model must be made of layers that the sampler knows; got {what}: {advice}")


_METHODS = ("__call__", "_call_impl", "forward", "_conv_forward", "live_taps")


_BLOCK = {
    "vertical": ours.VerticalStackConv2d,
    "horizontal": ours.HorizontalStackConv2d,
    "link": nn.Conv2d,
    "out": ours.MaskedConv2d,
}


def _parts(module):
    """The modules whose code the sampler stands in for where a module is a known layer, and which layers they are."""
    kind = next((kind for kind in _MODULES if isinstance(module, kind)), None)
    inside = _BLOCK if kind is ours.GatedMaskedConv2d else {}
    return [("", module, kind), *((name, getattr(module, name), kind) for name, kind in inside.items())]


def _layer(module):
    """The known layer that a module is, if it computes what that layer's code says."""
    for _, part, kind in _parts(module):
        if kind is None or not isinstance(part, kind) or any(name in vars(part) for name in _METHODS):
            return None
        if any(getattr(type(part), name, None) is not getattr(kind, name, None) for name in _METHODS):
            return None
    return _parts(module)[0][2]


class _Proxy(fx.Proxy):
    """One that sees what is done to it in place, too: fx has a += b as a = a + b."""

    def __setattr__(self, name, value):
        if name not in ("tracer", "node"):
            raise unknown(f"a forward that sets Tensor.{name}", "compute a tensor of its own")
        super().__setattr__(name, value)

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self):
        return 2 if self.tracer.is_stacks(self.node) else super().__len__()


def _in_place(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return bool(_layer(module)) or ("forward" not in vars(module) and super().is_leaf_module(module, name))

    def proxy(self, node):
        return _Proxy(node, self)

    def is_stacks(self, node):
        """Whether a node is both stacks that a block returns, which `*block(v, h)` unpacks."""
        return node.op == "call_module" and isinstance(self.root.get_submodule(node.target), ours.GatedMaskedConv2d)

    def iter(self, obj):
        return iter((obj[0], obj[1])) if self.is_stacks(obj.node) else super().iter(obj)

    def call_module(self, module, forward, arguments, keywords):
        if "forward" not in vars(module):
            return super().call_module(module, forward, arguments, keywords)
        try:
            return super().call_module(module, forward, arguments, keywords)
        except _UnknownError:
            raise
        except Exception as error:  # of any kind: it is the user's code
            what = f"{self.path_of_module(module).removeprefix('model.')}, {_short(module)} with a forward of its own"
            raise unknown(f"{what} ({error})", "make it a module's") from error


class _Plain(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model(image)


class _Conditional(_Plain):
    def forward(self, image, cond):
        return self.model(image, cond)


def trace(model: nn.Module, colours: int, conditional: bool, bernoulli: bool = False) -> Network:
    """The steps of a network in evaluation mode.

    Args:
        model: from an image, and a condition if conditional, to logits.
        colours: channels of the image.
        conditional: whether the model takes a condition.
        bernoulli: whether one output for each colour is the logit of level 1, to which 0 joins for level 0.

    Raises:
        NotImplementedError: for a layer that is not known.
        ValueError: for a network that is not causal, or takes other arguments.
    """
    root = (_Conditional if conditional else _Plain)(model)
    try:
        inspect.signature(model.forward).bind(*[None] * (1 + conditional))
    except TypeError as error:
        takes = "an image and a condition" if conditional else "one image (conditional=True: and a condition)"
        raise ValueError(f"model must take {takes}; got {type(model).__name__}.forward: {error}") from None
    try:
        graph = _Tracer().trace(root)
    except _UnknownError:
        raise
    except fx.proxy.TraceError as error:
        raise unknown(f"control flow that depends on its input ({error})", "decide without it") from None
    except Exception as error:  # of any kind: it is the user's code
        raise unknown(f"a forward that torch.fx cannot follow ({error})") from error
    return _Builder(root, colours, bernoulli).run(graph)


def _short(module) -> str:
    text = str(module)
    return text if len(text) < 200 else type(module).__name__


def _method(name):
    return lambda tensor, *arguments, **keywords: getattr(tensor, name)(*arguments, **keywords)


def _evaluate(value, known):
    return fx.node.map_aggregate(value, lambda leaf: leaf(known) if isinstance(leaf, Const) else leaf)


class _Builder:
    """Follows the graph with features and constants in place of tensors."""

    def __init__(self, model, colours, bernoulli):
        self.model, self.colours, self.bernoulli = model, colours, bernoulli
        image = Value(PIXEL, [1 << colour for colour in range(colours)])
        self.network = Network(image, View(image, ()))
        self.steps = self.network.steps
        self.input = View(image, tuple(range(colours)))

    def run(self, graph) -> Network:
        environment = {}
        inputs = iter((_storing(self.input), Const(lambda known: known["cond"], True)))
        for node in graph.nodes:
            arguments, keywords = (fx.node.map_arg(a, environment.__getitem__) for a in (node.args, node.kwargs))
            if node.op == "placeholder":
                environment[node] = next(inputs)
            elif node.op == "output":
                (result,) = arguments
                self.finish(result.content if isinstance(result, Shared) else result)
            elif node.op == "get_attr":
                environment[node] = self.attribute(node.target)
            else:
                environment[node] = self.call(node, arguments, keywords)
        return self.network

    def attribute(self, name):
        tensor = operator.attrgetter(name)(self.model)
        return Const(lambda known: tensor.detach()) if isinstance(tensor, Tensor) else tensor

    def call(self, node, arguments, keywords):
        if not any(isinstance(leaf, Shared) for leaf in _leaves((arguments, keywords))):
            return self.constant(node, arguments, keywords)
        if node.target is operator.getitem and isinstance(arguments[0], tuple | list | dict):
            return arguments[0][arguments[1]]
        what, function = self.lookup(node)
        if function is None:
            raise unknown(what, self.advice(node))
        try:
            if node.target is not operator.getitem:
                _contents((arguments, keywords))  # refuses padded ones
            if function.func in _SHARING:
                return function(*arguments, **keywords)
            target = self.in_place(node, function, arguments, keywords)
            found = function(*_contents(arguments), **_contents(keywords))
        except (TypeError, AttributeError, LookupError) as error:
            raise unknown(f"{what} ({error})") from None
        if found is None:
            raise unknown(what, self.advice(node))
        return _storing(found) if target is None else self.write(what, target, found)

    def write(self, what, target, found):
        """Stores what an operation in place has computed: in all tensors that share memory with its first operand."""
        if not isinstance(target, Shared):
            raise unknown(f"{what} in place on {_kind(target)}", "do it out of place")
        storage, count = target.storage, len(target.channels)
        if storage.ambiguous:
            advice = "do it out of place, or on a clone"
            raise unknown(f"{what} in place on what Tensor.contiguous copied or did not, as the batch has it", advice)
        if len(found.channels) != count:
            raise unknown(f"{what} in place of {len(found.channels)} channels in {count}", "do it out of place")
        whole = range(len(storage.content.channels))
        kept = [channel for channel in whole if channel not in target.channels]
        if kept:
            found = self.cat((storage.content.select(kept), found), 1)
        place = {channel: position for position, channel in enumerate((*kept, *target.channels))}
        storage.content = found.select([place[channel] for channel in whole])
        return target

    def lookup(self, node):
        """What to call a node in an error, and what handles it, if anything does."""
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            what = f"{node.target.removeprefix('model.')}, {_short(module)}"
            self.without_hooks(node.target)
            kind = _layer(module)
            if kind in (nn.BatchNorm2d, *_DROPOUTS) and module.training:
                raise unknown(f"{what} that trains in evaluation mode", "let train() and eval() decide")
            return what, kind and functools.partial(_MODULES[kind], self, module)
        if node.op == "call_method":
            what, handler = f"Tensor.{node.target}", _TENSOR_METHODS.get(node.target)
        else:
            what, handler = getattr(node.target, "__name__", str(node.target)), _FUNCTIONS.get(node.target)
            if node.target is getattr:
                what = f"Tensor.{node.args[1]}"
        return what, handler and functools.partial(handler, self)

    def without_hooks(self, target):
        """Refuses a layer whose hooks the sampler would leave out, its own or those of a layer inside of it."""
        for inner, part, _ in _parts(self.model.get_submodule(target)):
            if part._forward_hooks or part._forward_pre_hooks:
                name = f"{target}.{inner}".removeprefix("model.").rstrip(".")
                raise unknown(f"{name}, {_short(part)} with forward hooks", "remove them")

    def advice(self, node) -> str:
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            if isinstance(module, nn.modules.conv._ConvNd):
                return CONVOLUTIONS
            if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d):
                return "it joins pixels or channels that are not known together; nn.BatchNorm2d does not"
        elif "conv" in str(node.target):
            return CONVOLUTIONS
        return f"build the network of {KNOWN}"

    def in_place(self, node, function, arguments, keywords):
        """The operand that a call changes, None for a call that does not."""
        if "out" in keywords:
            raise unknown(f"{getattr(node.target, '__name__', node.target)} with out=", "take what it returns")
        if node.op == "call_module":
            changes = getattr(self.model.get_submodule(node.target), "inplace", False)
        else:
            name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            changes = (name.endswith("_") and not name.endswith("__")) or node.target in _IN_PLACE
        bound = inspect.signature(function).bind(*arguments, **keywords).arguments
        changes = changes or bound.get("inplace", False)
        return next(iter(bound.values())) if changes else None

    def constant(self, node, arguments, keywords):
        if node.op == "call_module":
            function = self.model.get_submodule(node.target)
        elif node.op == "call_method":
            function = _method(node.target)
        else:
            function = node.target
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if "out" in keywords:
            raise unknown(f"{name} with out=", "take what it returns")
        in_place = node.op != "call_module" and (
            (name.endswith("_") and not name.endswith("__")) or node.target in _IN_PLACE or keywords.get("inplace")
        )
        if in_place and isinstance(first := (*node.args, *node.kwargs.values())[0], fx.Node):
            if first.op in ("placeholder", "get_attr") or len(first.users) > 1:
                raise unknown(
                    f"{name} in place on the condition, on a parameter or on what is used again", "do it out of place"
                )
            changing, function = function, lambda first, *rest, **more: changing(first.clone(), *rest, **more)
        of_image = any(isinstance(leaf, Const) and leaf.of_image for leaf in _leaves((arguments, keywords)))
        return Const(lambda known: function(*_evaluate(arguments, known), **_evaluate(keywords, known)), of_image)

    def finish(self, logits):
        network = self.network
        if not isinstance(logits, View):
            raise ValueError(
                f"model must return one image of logits that depends on its input; got {type(logits).__name__}"
            )
        channels = len(logits.channels)
        if channels % self.colours:
            raise ValueError(
                f"model must return levels x {self.colours} channels of logits, one for each level and colour; "
                f"got {channels}"
            )
        if self.bernoulli and channels == self.colours:
            logits = self.cat((self.point("affine", logits, parameters=(0, 0)), logits), 1)
        network.logits = logits
        if logits.phase == ROW:
            raise ValueError(
                "model must be causal; got logits that depend on the whole row of their pixel: shift a vertical stack "
                "down before it meets the horizontal one, or start with mask_type 'A'"
            )
        needs = [0] * self.colours
        for channel, colours in enumerate(logits.colours):
            needs[channel % self.colours] |= colours
        drawn = 0
        while drawn != (1 << self.colours) - 1:
            stage = [c for c in range(self.colours) if not drawn >> c & 1 and not needs[c] & ~drawn]
            if not stage:
                c = next(c for c in range(self.colours) if not drawn >> c & 1)
                read = [other for other in range(self.colours) if (needs[c] & ~drawn) >> other & 1]
                raise ValueError(
                    f"model must be causal; got logits of colour {c} that depend on colour {read[0]} of their own "
                    "pixel: a first layer needs mask_type 'A', and every layer, 1 x 1 ones too, the colours' "
                    "channel_groups"
                )
            network.stages.append(stage)
            drawn |= sum(1 << c for c in stage)

    # Steps

    def conv(self, x, weight, live, taps, bias, cond=None, activation=None, residual=None):
        """Adds a convolution; weight and live are [out, in, taps]."""
        read = [tap for n, tap in enumerate(taps) if live[:, :, n].any()]
        if any(down > 0 for down, _ in read):
            raise ValueError("model must be causal; got a convolution that reads rows below its pixel")
        if x.right and any(right > 0 for _, right in read):
            x = self.cat((x,), 1)  # whose zeros to the right of the image the shifted view has not
        own_row = [right for down, right in read if down == 0]
        colours = [0] * len(weight)
        if not own_row:
            phase = ABOVE
        elif x.phase == PIXEL and max(own_row) > 0:
            phase = ROW
        else:
            phase = x.phase
            if phase == PIXEL and (0, 0) in taps:
                colours = _union(x.colours, live[:, :, taps.index((0, 0))])
        gated = activation in GATES
        for name, operand, count in (("cond", cond, len(weight)), ("residual", residual, len(weight) // (1 + gated))):
            if isinstance(operand, View) and len(operand.channels) != count:
                raise ValueError(f"{name} must have {count} channels; got {len(operand.channels)}")
            if operand is not None and not isinstance(operand, View | Const):
                raise unknown(f"a {name} that is {type(operand).__name__}")
        for operand in (cond,) if gated else (cond, residual):
            if isinstance(operand, View):
                phase = max(phase, operand.phase)
                colours = [a | b for a, b in zip(colours, operand.colours, strict=True)]
        if gated:
            half = len(colours) // 2
            colours = [a | b for a, b in zip(colours[:half], colours[half:], strict=True)]
            if isinstance(residual, View):
                phase = max(phase, residual.phase)
                colours = [a | b for a, b in zip(colours, residual.colours, strict=True)]
        out = Value(phase, colours if phase == PIXEL else [0] * len(colours))
        bias = None if bias is None else bias.detach()
        self.steps.append(Conv(x, weight.detach(), live, taps, bias, cond, activation, residual, out))
        return _whole(out)

    def point(self, function, *operands, parameters=()):
        """Adds a pointwise function; a constant has one channel for each of the other operand's, or one for all."""
        for operand in operands:
            if not isinstance(operand, View | Const):
                raise unknown(f"{function} of features and {type(operand).__name__}")
        views = [operand for operand in operands if isinstance(operand, View)]
        if any(len(view.channels) != len(views[0].channels) for view in views):
            raise unknown(f"{function} of features with {' and '.join(str(len(v.channels)) for v in views)} channels")
        phase, colours = _join(views)
        out = Value(phase, colours)
        self.steps.append(Point(function, operands, tuple(map(float, parameters)), out))
        return _whole(out)

    def batch_norm(self, module, x):
        if module.running_mean is None:
            raise unknown("nn.BatchNorm2d without running statistics", "track_running_stats=True")
        factor = (module.running_var.detach() + module.eps).rsqrt()
        if module.weight is not None:
            factor = factor * module.weight.detach()
        shift = -module.running_mean.detach() * factor
        if module.bias is not None:
            shift = shift + module.bias.detach()
        scaled = self.point("mul", x, Const(lambda known: factor[:, None, None]))
        return self.point("add", scaled, Const(lambda known: shift[:, None, None]))

    def causal_conv(self, module, x, cond=None, residual=None):
        """A layer of fastelbo.nn."""
        self.channels(x, module.in_channels, module)
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
        return self.conv(x, module.weight.flatten(2), live, taps, module.bias, cond, module.activation, residual)

    def conv_1x1(self, module, x):
        """nn.Conv2d; None for one that reads other pixels."""
        if module.kernel_size != (1, 1) or module.stride != (1, 1) or module.padding not in ((0, 0), "same", "valid"):
            return None
        self.channels(x, module.in_channels, module)
        outputs, inputs = module.weight.shape[:2]
        live = torch.zeros(outputs, module.in_channels, dtype=torch.bool, device=module.weight.device)
        weight = module.weight.new_zeros(outputs, module.in_channels)
        for group in range(module.groups):
            rows = slice(group * outputs // module.groups, (group + 1) * outputs // module.groups)
            columns = slice(group * inputs, (group + 1) * inputs)
            live[rows, columns] = True
            weight[rows, columns] = module.weight.detach()[rows, :, 0, 0]
        return self.conv(x, weight[:, :, None], live[:, :, None], [(0, 0)], module.bias)

    def gated(self, module, v, h, cond=None):
        """GatedMaskedConv2d, as its forward has it."""
        if (cond is None) != (module.cond is None):
            raise ValueError(f"cond must {'not ' if module.cond is None else ''}be given: cond_channels decides")
        v_cond = h_cond = None
        if cond is not None:
            if not isinstance(cond, Const):
                raise unknown(
                    "GatedMaskedConv2d with a cond that depends on the image", "compute it from the condition"
                )
            both = Const(
                lambda known: module.cond(c if (c := cond(known)).dim() == 4 else c[:, :, None, None]), cond.of_image
            )
            v_cond, h_cond = (
                Const(lambda known, half=half: both(known).chunk(2, dim=1)[half], cond.of_image) for half in (0, 1)
            )
        z = self.causal_conv(module.vertical, v)
        seen = View(z.value, z.channels, 1) if module.link_convention == "shift" else z
        link = self.conv_1x1(module.link, seen)
        if h_cond is not None:
            link = self.point("add", link, h_cond)
        gated = self.causal_conv(module.horizontal, h, cond=link)
        half = len(z.channels) // 2
        summed = z if v_cond is None else self.point("add", z, v_cond)
        v = self.point(module.activation, summed.select(range(half)), summed.select(range(half, 2 * half)))
        return v, self.causal_conv(module.out, gated, residual=h if module.residual else None)

    def channels(self, x, expected, module):
        if not isinstance(x, View):
            raise unknown(f"{type(module).__name__} of {type(x).__name__}")
        if len(x.channels) != expected:
            raise ValueError(f"model must match its own layers: {module} got {len(x.channels)} channels")

    def cat(self, tensors, dim=0, axis=None):
        if (dim if axis is None else axis) not in (1, -3):
            raise unknown("cat along another dimension than the channels", "cat along dim=1")
        parts = tuple(tensors)
        views = [part for part in parts if isinstance(part, View)]
        if len(views) < len(parts):
            raise unknown("cat of features and a constant", "add the constant as a condition")
        out = Value(max(view.phase for view in views), [c for view in views for c in view.colours])
        if out.phase != PIXEL:
            out.colours = [0] * len(out.colours)
        self.steps.append(Join(parts, out))
        return _whole(out)

    def split(self, x, size, dim=0):
        if dim not in (1, -3):
            raise unknown("split along another dimension than the channels", "split along dim=1")
        sizes = size if isinstance(size, list | tuple) else None
        if sizes is None:
            count = len(x.channels)
            sizes = [min(size, count - start) for start in range(0, count, size)]
        starts = [0, *itertools.accumulate(sizes)]
        return tuple(x.select(range(start, start + size)) for start, size in zip(starts, sizes, strict=False))

    def chunk(self, x, chunks, dim=0):
        return self.split(x, -(-len(x.channels) // chunks), dim)

    def glu(self, x, dim=-1):
        a, b = self.chunk(x, 2, dim)
        return self.point("glu", a, b)

    def pad(self, x, pad, mode="constant", value=None):
        left, right, above, below = (*pad, 0, 0)[:4] if len(pad) in (2, 4) else (0, -1, 0, 0)
        if mode != "constant" or value or right or below or left < 0 or above < 0:
            raise unknown(
                "pad other than by zeros above and to the left", "pad so, and slice as much off the other side"
            )
        return Padded(x, above, left)

    def getitem(self, x, index):
        """Channels of features, or the slice of padded ones; these share their memory."""
        whole = slice(None)
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[whole] * (5 - len(index)), *index[at + 1 :])
        index = (*index, *[whole] * (4 - len(index)))
        images, channels, rows, columns = index
        if isinstance(padded := x.storage.content, Padded):
            ends = [(s.start or 0, s.stop, s.step or 1) if isinstance(s, slice) else None for s in (rows, columns)]
            wanted = [(0, -amount if amount else None, 1) for amount in (padded.down, padded.right)]
            if (images, channels) == (whole, whole) and ends == wanted:
                view = padded.view
                if x.storage.cropped is None:
                    moved = View(view.value, view.channels, view.down + padded.down, view.right + padded.right)
                    x.storage.cropped = Storage(moved, strided=True)
                return Shared(x.storage.cropped, tuple(range(len(view.channels))))
            raise unknown("pad without the slice that undoes it", "slice as much off the other side as was padded")
        if images == rows == columns == whole and isinstance(channels, slice):
            return x.select(range(len(x.channels))[channels])
        raise unknown(f"indexing with {index}", "slice channels only")

    def setitem(self, x, index, value):
        """Features written to channels of others; what a[:, :2] += b ends with, too."""
        part = self.getitem(x, index)
        if not isinstance(value, Shared):
            raise unknown("features that are set to a constant", "multiply by a mask, or join channels")
        self.write("setitem", part, value.content)
        return x

    def contiguous(self, x):
        """The same memory or a copy; a part of the channels is contiguous in a batch of one image only."""
        if not x.whole or x.storage.strided:
            x.storage.ambiguous = True
        return x


def _contents(value):
    """What the tensors in an argument hold now."""

    def content(leaf):
        if not isinstance(leaf, Shared):
            return leaf
        if isinstance(leaf.content, Padded):
            raise unknown("pad without the slice that undoes it", "slice as much off the other side as was padded")
        return leaf.content

    return fx.node.map_aggregate(value, content)


def _kind(target):
    return "what depends on the condition alone" if isinstance(target, Const) else type(target).__name__


def _leaves(value):
    leaves = []
    fx.node.map_aggregate(value, leaves.append)
    return leaves


def _whole(value):
    return View(value, tuple(range(len(value.colours))))


def _sharing(handler):
    """Marks a handler that takes tensors, not what they hold, and returns ones that share their memory."""
    _SHARING.add(handler)
    return handler


_SHARING: set[Callable] = set()


def _join(views):
    phase = max(view.phase for view in views)
    colours = [0] * len(views[0].channels)
    if phase == PIXEL:
        for view in views:
            colours = [a | b for a, b in zip(colours, view.colours, strict=True)]
    return phase, colours


def _union(colours, live):
    """For each output the colours of the inputs that it reads; live is [out, in]."""
    found = [0] * len(live)
    for bits in set(colours) - {0}:
        reads = live[:, [i for i, own in enumerate(colours) if own == bits]].any(1).tolist()
        found = [a | bits if reads_it else a for a, reads_it in zip(found, reads, strict=True)]
    return found


# What is known. A handler takes the builder, the module if there is one, and the arguments by torch's names.


def _add(builder, input, other, alpha=1):
    if alpha != 1:
        raise unknown("add with alpha", "multiply before")
    return _binary("add", builder, input, other)


def _sub(builder, input, other, alpha=1):
    if alpha != 1:
        raise unknown("sub with alpha", "multiply before")
    return _binary("sub", builder, input, other)


def _binary(function, builder, input, other):
    numbers = [operand for operand in (input, other) if isinstance(operand, int | float)]
    if not numbers:
        return builder.point(function, input, other)
    (a,) = numbers
    scale, shift = {"add": (1, a), "sub": (1, -a), "mul": (a, 0), "div": (1 / a if a else 0, 0)}[function]
    if isinstance(input, View):
        if function == "div" and a == 0:
            raise unknown("a division by 0")
        return builder.point("affine", input, parameters=(scale, shift))
    if function == "sub":
        return builder.point("affine", other, parameters=(-1, a))
    if function == "div":
        number = torch.tensor(float(a), dtype=torch.float64, device="cpu")
        return builder.point("div", Const(lambda known: number), other)
    return builder.point("affine", other, parameters=(scale, shift))


def _elu(builder, input, alpha=1.0, inplace=False):
    return builder.point("elu", input, parameters=(alpha,))


def _leaky_relu(builder, input, negative_slope=0.01, inplace=False):
    return builder.point("leaky_relu", input, parameters=(negative_slope,))


def _gelu(builder, input, approximate="none"):
    return builder.point("gelu_tanh" if approximate == "tanh" else "gelu", input)


def _softplus(builder, input, beta=1.0, threshold=20.0):
    return builder.point("softplus", input, parameters=(beta, threshold))


def _clamp(builder, input, min=None, max=None):
    low, high = (-float("inf") if min is None else min), (float("inf") if max is None else max)
    return builder.point("clamp", input, parameters=(low, high))


def _hardtanh(builder, input, min_val=-1.0, max_val=1.0, inplace=False):
    return _clamp(builder, input, min_val, max_val)


def _relu6(builder, input, inplace=False):
    return _clamp(builder, input, 0, 6)


@_sharing
def _dropout(builder, input, p=0.5, training=True, inplace=False):
    if training:
        raise unknown("dropout while training", "training=self.training, which is False in evaluation mode")
    return input


def _unary(name):
    return lambda builder, input, inplace=False: builder.point(name, input)


def _square(builder, input):
    return builder.point("mul", input, input)


def _neg(builder, input):
    return builder.point("affine", input, parameters=(-1, 0))


def _prelu(builder, input, weight):
    return builder.point("prelu", input, Const(lambda known: weight(known).reshape(-1, 1, 1), weight.of_image))


def _module(name, *attributes):
    """A pointwise module as the function of that name."""

    def handle(builder, module, input):
        return _UNARY[name](builder, input, **{attribute: getattr(module, attribute) for attribute in attributes})

    return handle


_UNARY = {
    **{name: _unary(name) for name in ("relu", "sigmoid", "tanh", "silu", "exp", "abs")},
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "gelu": _gelu,
    "softplus": _softplus,
    "hardtanh": _hardtanh,
    "relu6": _relu6,
    "glu": lambda builder, input, dim=-1: builder.glu(input, dim),
    "neg": _neg,
    "square": _square,
    "clamp": _clamp,
    "dropout": _dropout,
}

_BINARY = {
    "add": _add,
    "sub": _sub,
    "mul": lambda builder, input, other: _binary("mul", builder, input, other),
    "div": lambda builder, input, other: _binary("div", builder, input, other),
}


@_sharing
def _identity(builder, module, input):
    return input


@_sharing
def _chunk(builder, input, chunks, dim=0):
    return builder.chunk(input, chunks, dim)


@_sharing
def _split(builder, tensor, split_size_or_sections, dim=0):
    return builder.split(tensor, split_size_or_sections, dim)


@_sharing
def _split_method(builder, tensor, split_size, dim=0):
    return builder.split(tensor, split_size, dim)


@_sharing
def _getitem(builder, x, index):
    return builder.getitem(x, index)


@_sharing
def _setitem(builder, x, index, value):
    return builder.setitem(x, index, value)


@_sharing
def _contiguous(builder, x, memory_format=None):
    return builder.contiguous(x)


@_sharing
def _float(builder, x):
    return x


_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_IN_PLACE = tuple(getattr(operator, "i" + name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))


_MODULES = {
    ours.GatedMaskedConv2d: lambda builder, module, v, h, cond=None: builder.gated(module, v, h, cond),
    ours.MaskedConv2d: lambda builder, module, input, cond=None, residual=None: builder.causal_conv(
        module, input, cond, residual
    ),
    ours.VerticalStackConv2d: lambda builder, module, input, cond=None: builder.causal_conv(module, input, cond),
    ours.HorizontalStackConv2d: lambda builder, module, input, cond=None: builder.causal_conv(module, input, cond),
    nn.Conv2d: lambda builder, module, input: builder.conv_1x1(module, input),
    nn.BatchNorm2d: lambda builder, module, input: builder.batch_norm(module, input),
    nn.PReLU: lambda builder, module, input: _prelu(builder, input, Const(lambda known: module.weight.detach())),
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
    **dict.fromkeys((nn.Identity, *_DROPOUTS), _identity),
}

_FUNCTIONS = {
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
    torch.cat: lambda builder, tensors, dim=0: builder.cat(tensors, dim),
    torch.concat: lambda builder, tensors, dim=0: builder.cat(tensors, dim),
    torch.chunk: _chunk,
    torch.split: _split,
    F.pad: lambda builder, input, pad, mode="constant", value=None: builder.pad(input, pad, mode, value),
    operator.getitem: _getitem,
    operator.setitem: _setitem,
}


_TENSOR_METHODS = {
    **{name: handler for name, handler in (_UNARY | _BINARY).items() if hasattr(Tensor, name)},
    **{name + "_": handler for name, handler in (_UNARY | _BINARY).items() if hasattr(Tensor, name + "_")},
    "chunk": _chunk,
    "split": _split_method,
    "contiguous": _contiguous,
    "float": _float,
}
