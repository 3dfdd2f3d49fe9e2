"""Follows a module's forward with torch.fx, to the steps of a network."""

import functools
import inspect
import operator

from torch import Tensor, fx, nn

from fastelbo import nn as ours
from fastelbo.sampling import layers
from fastelbo.sampling.memory import SHARING, Shared, contents, storing, write
from fastelbo.sampling.network import CONVOLUTIONS, KNOWN, Const, Network, UnknownError, View, unknown


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


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_operator}__", _in_place(getattr(operator, f"__i{_operator}__")))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return bool(layers.layer(module)) or ("forward" not in vars(module) and super().is_leaf_module(module, name))

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
        except UnknownError:
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


def network_of(model: nn.Module, colours: int, conditional: bool, bernoulli: bool = False) -> Network:
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
    except UnknownError:
        raise
    except fx.proxy.TraceError as error:
        raise unknown(f"control flow that depends on its input ({error})", "decide without it") from None
    except Exception as error:  # of any kind: it is the user's code
        raise unknown(f"a forward that torch.fx cannot follow ({error})") from error
    return _Follower(root, Network(colours)).run(graph, bernoulli)


def _short(module) -> str:
    text = str(module)
    return text if len(text) < 200 else type(module).__name__


def _method(name):
    return lambda tensor, *arguments, **keywords: getattr(tensor, name)(*arguments, **keywords)


def _evaluate(value, known):
    return fx.node.map_aggregate(value, lambda leaf: leaf(known) if isinstance(leaf, Const) else leaf)


class _Follower:
    """Follows the graph with features and constants in place of tensors."""

    def __init__(self, model, network):
        self.model, self.network = model, network

    def run(self, graph, bernoulli):
        environment = {}
        image = View(self.network.image, tuple(range(self.network.colours)))
        inputs = iter((storing(image), Const(lambda known: known["cond"], True)))
        for node in graph.nodes:
            arguments, keywords = (fx.node.map_arg(a, environment.__getitem__) for a in (node.args, node.kwargs))
            if node.op == "placeholder":
                environment[node] = next(inputs)
            elif node.op == "output":
                (result,) = arguments
                self.network.finish(result.content if isinstance(result, Shared) else result, bernoulli)
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
                contents((arguments, keywords))  # refuses padded ones
            if function.func in SHARING:
                return function(*arguments, **keywords)
            _without_out(node, keywords)
            target = self.in_place(node, function, arguments, keywords)
            found = function(*contents(arguments), **contents(keywords))
        except (TypeError, AttributeError, LookupError) as error:
            raise unknown(f"{what} ({error})") from None
        if found is None:
            raise unknown(what, self.advice(node))
        return storing(found) if target is None else write(self.network, what, target, found)

    def lookup(self, node):
        """What to call a node in an error, and what handles it, if anything does."""
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            what = f"{node.target.removeprefix('model.')}, {_short(module)}"
            self.without_hooks(node.target)
            kind = layers.layer(module)
            if kind in (nn.BatchNorm2d, *layers.DROPOUTS) and module.training:
                raise unknown(f"{what} that trains in evaluation mode", "let train() and eval() decide")
            return what, kind and functools.partial(layers.MODULES[kind], self.network, module)
        if node.op == "call_method":
            what, handler = f"Tensor.{node.target}", layers.METHODS.get(node.target)
        else:
            what, handler = getattr(node.target, "__name__", str(node.target)), layers.FUNCTIONS.get(node.target)
            if node.target is getattr:
                what = f"Tensor.{node.args[1]}"
        return what, handler and functools.partial(handler, self.network)

    def without_hooks(self, target):
        """Refuses a layer whose hooks the sampler would leave out, its own or those of a layer inside of it."""
        for inner, part, _ in layers.parts(self.model.get_submodule(target)):
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
        if node.op == "call_module":
            changes = getattr(self.model.get_submodule(node.target), "inplace", False)
        else:
            changes = _writes(node)
        bound = inspect.signature(function).bind(*arguments, **keywords).arguments
        changes = changes or bound.get("inplace", False)
        return next(iter(bound.values())) if changes else None

    def constant(self, node, arguments, keywords):
        _without_out(node, keywords)
        if node.op == "call_module":
            function = self.model.get_submodule(node.target)
        else:
            function = _method(node.target) if node.op == "call_method" else node.target
            if _writes(node) or keywords.get("inplace"):
                function = _on_a_clone(node, function)
        of_image = any(isinstance(leaf, Const) and leaf.of_image for leaf in _leaves((arguments, keywords)))
        return Const(lambda known: function(*_evaluate(arguments, known), **_evaluate(keywords, known)), of_image)


def _name(node):
    return str(getattr(node.target, "__name__", node.target))


def _without_out(node, keywords):
    if "out" in keywords:
        raise unknown(f"{_name(node)} with out=", "take what it returns")


def _writes(node):
    """Whether a function or method writes into its first operand, by its name."""
    return (_name(node).endswith("_") and not _name(node).endswith("__")) or node.target in layers.IN_PLACE


def _on_a_clone(node, function):
    """A function that writes into what depends on the condition alone, which nothing else reads, without doing so."""
    first = (*node.args, *node.kwargs.values())[0]
    if not isinstance(first, fx.Node):
        return function
    if first.op in ("placeholder", "get_attr") or len(first.users) > 1:
        raise unknown(
            f"{_name(node)} in place on the condition, on a parameter or on what is used again", "do it out of place"
        )
    return lambda first, *rest, **more: function(first.clone(), *rest, **more)


def _leaves(value):
    leaves = []
    fx.node.map_aggregate(value, leaves.append)
    return leaves
