"""Runs a module's own forward on tensors that know what their elements are, to the steps of a network."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastelbo.sampling import layers
from fastelbo.sampling.atoms import Atoms, Obscure
from fastelbo.sampling.fuse import fuse
from fastelbo.sampling.network import KNOWN, Const, Network, NotCausalError, UnknownError, unknown

#: Operators that make tensors without numbers of others, which may be written to.
MAKERS = frozenset(
    [*(f"{kind}{name}" for kind in ("", "new_") for name in ("zeros", "ones", "full", "empty"))]
    + [f"{name}_like" for name in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")]
)
LARGE, SMALL = 256, (11, 13)  # pixels of an image that is followed at a smaller size, and that size
#: Functions of Python that copy, or do not, as the batch has it.
_MAY_COPY = (Tensor.contiguous, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)

_CASTS = (Tensor.to, Tensor.half, Tensor.bfloat16, Tensor.type)


class Traced(torch.Tensor):
    """A tensor of one image. It has names of what depends on the image, or a value that depends on a condition."""

    names: "Tensor | None"
    value: "Tensor | None"
    slot: int
    tracer: "Tracer"
    loose = False  # whether torch may have laid it out otherwise, in the order of what it was computed from

    @staticmethod
    def __new__(cls, tracer, like, dtype, **_):
        """Of the shape and strides of `like`."""
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=tracer.device
        )

    def __init__(self, tracer, like, dtype, value=None, slot=-1):
        self.tracer, self.value, self.slot = tracer, value, slot
        self.names = like if value is None else None

    __torch_function__ = classmethod(lambda cls, func, types, args=(), kwargs=None: _function(func, args, kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        tracer = next(leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Traced)).tracer
        return tracer.call(func, args, kwargs or {})


def _function(func, args, kwargs):
    """What operators do not show."""
    name = getattr(func, "__name__", "")
    if name == "__set__" and func == Tensor.data.__set__:
        raise unknown("a forward that sets Tensor.data", "compute a tensor of its own")
    if name.endswith("dropout") and kwargs.get("training", [*args, True, True, True][2]):
        raise unknown("dropout while training", "training=self.training, which is False in evaluation mode")
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    if func in _CASTS and isinstance(result, Traced) and result.names is not None:
        dtype, own = result.dtype, result.tracer.dtype
        narrow = dtype.is_floating_point and dtype.itemsize < own.itemsize
        if narrow and not torch.is_autocast_enabled(result.device.type):
            raise unknown(f"features in {dtype}", f"the sampler computes in {own}")
    if func in _MAY_COPY and args and isinstance(args[0], Traced) and args[0].names is not None:
        storage = args[0].names.untyped_storage()
        part = args[0].loose or storage.nbytes() > 8 * result.numel()
        if part and result.names.untyped_storage().data_ptr() == storage.data_ptr():
            args[0].tracer.ambiguous[storage.data_ptr()] = storage, func.__name__
    return result


def _leaves(args, kwargs=None):
    """What an operator is given, out of lists."""
    found = []
    for one in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(one, list | tuple):
            found += _leaves(one)
        else:
            found.append(one)
    return found


class Tape:
    """What was computed from the condition alone, and is again from another image's."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable, Any, Any, list[int]]] = []
        self.count = 1
        self.played = Const(self._play, True)

    def add(self, func: Callable, args: Any, kwargs: Any, count: int) -> list[int]:
        """Writes a call down; the slots of its results."""
        slots = list(range(self.count, self.count + count))
        self.count += count
        args, kwargs = tree_map(lambda leaf: _Slot(leaf.slot) if isinstance(leaf, Traced) else leaf, (args, kwargs))
        self.calls.append((func, args, kwargs, slots))
        return slots

    def _play(self, known):
        found = {0: known["cond"]}
        for func, args, kwargs, slots in self.calls:
            args, kwargs = tree_map(lambda leaf: found[leaf.slot] if isinstance(leaf, _Slot) else leaf, (args, kwargs))
            results = [leaf for leaf in tree_flatten(func(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
            found.update(zip(slots, results, strict=True))
        return found


class _Played:
    """A function to what a tensor of the tape is, of what is known of a condition."""

    def __init__(self, tape, tensor):
        self.tape, self.tensor = tape, tensor

    def __call__(self, known):
        return self.tape.played(known)[self.tensor.slot]


class _Slot:
    def __init__(self, slot):
        self.slot = slot


class _Mode(TorchDispatchMode):
    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.tracer.call(func, args, kwargs or {})


class Tracer:
    """Follows a forward.

    Args:
        network: takes the steps.
        size: rows and columns of an image.
        dtype, device: of the network's parameters.
        late: see Atoms.
    """

    def __init__(
        self, network: Network, size: tuple[int, int], dtype: torch.dtype, device: torch.device, late: bool = False
    ) -> None:
        self.dtype, self.device = dtype, device
        self.atoms, self.tape = Atoms(network, size, device, late), Tape()
        self.ambiguous: dict[int, tuple[Any, str]] = {}
        self.stack: list[nn.Module] = []
        self.paths: dict[nn.Module, str] = {}
        self.function = ""
        self.calls = 0  # of operators that compute

    # Tensors

    def lift(self, names: Tensor, dtype: "torch.dtype | None" = None) -> Traced:
        """A tensor of names."""
        return Traced(self, names, dtype or self.dtype)

    def condition(self, value: Tensor, slot: int = 0) -> Traced:
        """A tensor that depends on the condition alone."""
        return Traced(self, value, value.dtype, value=value, slot=slot)

    @staticmethod
    def traced(value: Any) -> bool:
        """Whether a value depends on what the model is given."""
        return isinstance(value, Traced)

    @staticmethod
    def of_image(value: Any) -> bool:
        """Whether a tensor has names."""
        return isinstance(value, Traced) and value.names is not None

    def names(self, value: Any) -> Tensor:
        """Names of a tensor's elements, or of a number."""
        if isinstance(value, Traced):
            if value.names is not None:
                return value.names
            now = self._played(torch.clone, (value,), {})  # as it is now
            return self.atoms.constant(value.shape, _Played(self.tape, now))
        tensor = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        return self.atoms.constant(tensor.shape, tensor)

    def what(self) -> str:
        """What is being called, for errors."""
        module = self.stack[-1] if self.stack else None
        if module is None or not type(module).__module__.startswith(("torch.nn", "fastelbo.nn")):
            return {"convolution": "conv2d"}.get(self.function, self.function.strip("_"))
        text = str(module)
        return f"{self.paths[module]}, {text if len(text) < 200 else type(module).__name__}"

    # Calls

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator of torch gives."""
        name = func._schema.name.split("::")[1]
        self.calls += name.rstrip("_") in layers.HANDLERS
        traced = [leaf for leaf in _leaves(args, kwargs) if isinstance(leaf, Traced)]
        if not traced or name in MAKERS:
            given = tree_map(lambda leaf: _blank(leaf) if isinstance(leaf, Traced) else leaf, (args, kwargs))
            made = func(*given[0], **given[1])
            return self.lift(self.names(made), made.dtype) if name in MAKERS else made
        self.function = name
        if all(leaf.names is None for leaf in traced):
            return self._of_condition(name, func, args, kwargs)
        writes = func._schema.is_mutable and name.endswith("_")
        own = name[:-1] if writes else name
        still = {id(leaf) for leaf in traced if not self._seen(leaf)}
        mixed = any(leaf.names is None for leaf in traced) and all(
            leaf.names is None or id(leaf) in still for leaf in traced
        )
        if mixed or (own not in layers.MOVES and own not in ("copy", "fill", "zero")):
            given = args, kwargs
            if still:
                given = tree_map(lambda leaf: self.number(leaf) if id(leaf) in still else leaf, given)
            if mixed or all(id(leaf) in still for leaf in traced):
                return self._without_image(name, func, args, given, writes and id(args[0]) in still)
            args, kwargs = (args[0], *given[0][1:]) if writes else given[0], given[1]
        if name in layers.DECIDING:
            raise unknown(f"control flow that depends on the image ({self.what()})", "decide without it")
        if "out" in kwargs:
            raise unknown(f"{name} with out=", "take what it returns")
        if not writes:
            return self._wrapped(func, args, kwargs, self._computed(own, func, args, kwargs))
        target = args[0]
        if not isinstance(target, Traced) or target.names is None:
            raise unknown(f"Tensor.{name} in place on what depends on the image not at all", "do it out of place")
        if own in ("copy", "fill", "zero"):
            found = self.names(0 if own == "zero" else args[1])
        else:
            found = self._computed(own, func, args, kwargs)
        return self._write(name, target, found)

    def _without_image(self, name, func, args, given, writes):
        """A call of what does not depend on the image, if some of it has names, for which the numbers are given."""
        depends = any(isinstance(leaf, Traced) for leaf in _leaves(*given))
        if writes:

            def fresh(first, *rest, **more):
                return func(first.clone(), *rest, **more)

            made = self._played(fresh, *given) if depends else func(*given[0], **given[1])
            return self._write(name, args[0], self.names(made))
        if depends:
            return self._of_condition(name, func, *given)
        made = func(*given[0], **given[1])
        return tree_map(lambda one: self.lift(self.names(one), one.dtype) if isinstance(one, Tensor) else one, made)

    def _write(self, name, target, found):
        storage = target.names.untyped_storage()
        if (ambiguous := self.ambiguous.get(storage.data_ptr())) is not None:
            raise unknown(
                f"Tensor.{name} in place on what Tensor.{ambiguous[1]} copied or did not, as the batch has it",
                "do it out of place, or on a clone",
            )
        if isinstance(found, Exception):
            found = self.atoms.obscure(target.shape, found)
        self.atoms.made.pop(storage.data_ptr(), None)
        target.names.copy_(found[0] if isinstance(found, tuple) else found)
        return target

    def _seen(self, leaf):
        if leaf.names is None or not leaf.names.numel():
            return leaf.names is None
        return leaf.names[(0,) * leaf.names.dim()].item() > 0 or bool((leaf.names > 0).any())

    def number(self, leaf: Any) -> Any:
        """The numbers of a tensor with names of constants alone, which may depend on the condition."""
        parts = self.atoms.parts(leaf.names)
        given = [part.value.tensor if isinstance(part.value, _Played) else part.value for _, _, part in parts]

        def assemble(tensors):
            made = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            for (where, elements, _), tensor in zip(parts, tensors, strict=True):
                own = tensor.to(leaf.device, leaf.dtype).flatten()
                made[where.to(leaf.device)] = own[elements.to(leaf.device)]
            return made

        return self._played(assemble, (given,), {}) if any(map(self.traced, given)) else assemble(given)

    def constants_of(self, names: Tensor, still: Tensor, func: Callable, *args: Any, **options: Any) -> Tensor:
        """Names of a call's result, of which some is still: a function of numbers alone.

        Where features are at their own pixels they stay features, but for zeros: they are computed in one piece then.
        """
        if not bool(still.any()):
            return names
        made = self.names(func(*args, **options)).reshape(names.shape)
        return torch.where(still if self.atoms.late else still & (made == 0), made, names)

    def _played(self, func, args, kwargs):
        """Calls a function of what depends on the condition, and writes it down."""
        given = tree_map(lambda leaf: leaf.value if isinstance(leaf, Traced) else leaf, (args, kwargs))
        made = func(*given[0], **given[1])
        slots = iter(self.tape.add(func, args, kwargs, sum(isinstance(leaf, Tensor) for leaf in tree_flatten(made)[0])))
        return tree_map(lambda leaf: self.condition(leaf, next(slots)) if isinstance(leaf, Tensor) else leaf, made)

    def _of_condition(self, name, func, args, kwargs):
        if name in layers.DECIDING:
            raise unknown(f"control flow that depends on the condition ({self.what()})", "decide without it")
        if func._schema.is_mutable and not isinstance(args[0], Traced):
            raise unknown(f"{name} of the condition in place on what is none of it", "do it out of place")
        made = self._played(func, args, kwargs)
        return args[0] if func._schema.is_mutable else made

    def _computed(self, own, func, args, kwargs):
        """Names of a call's results, or the error for it."""
        try:
            return self._found(own, func, args, kwargs)
        except UnknownError as error:
            return error

    def _found(self, own, func, args, kwargs):
        if own in layers.MOVES:
            return self._moved(own, func, args, kwargs)
        if own == "_to_copy":
            return self._cast(args[0], kwargs)
        found = None
        if own in layers.HANDLERS:
            found = layers.HANDLERS[own](self, *args, **kwargs)
        return unknown(self.what(), layers.ADVICE.get(own, f"build the network of {KNOWN}")) if found is None else found

    def _moved(self, own, func, args, kwargs):
        """Of an operator that moves elements, by what it does to names."""
        if own == "index" and not self.of_image(args[0]) and len(args[1]) == 1:
            return layers.HANDLERS["embedding"](self, args[0], args[1][0])
        data = {"where": (1, 2), "cat": (0,), "stack": (0,), "slice_scatter": (0, 1), "select_scatter": (0, 1)}
        data_of = data.get(own, (0,))
        given = []
        for position, argument in enumerate(args):
            if position in data_of:
                several = isinstance(argument, list | tuple)
                given.append([self.names(one) for one in argument] if several else self.names(argument))
            elif any(isinstance(leaf, Traced) for leaf in _leaves([argument])):
                return unknown(f"{self.what()} by what depends on the image or the condition", "move by numbers")
            else:
                given.append(tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, argument))
        if own in ("constant_pad_nd", "masked_fill"):
            value = given.pop(2) if len(given) > 2 else kwargs.get("value", 0)
            value = value.item() if isinstance(value, Tensor) else value
            given.append(int(self.names(value)) if value else 0)
            func = getattr(torch.ops.aten, own)
        elif func._schema.name.endswith("_"):
            func = getattr(torch.ops.aten, own)
        return func(*given, **{key: value for key, value in kwargs.items() if key != "value"})

    def _cast(self, x, kwargs):
        self.atoms.refuse_obscure(x.names)
        dtype = kwargs.get("dtype") or x.dtype
        names = (
            x.names.clone()
            if kwargs.get("memory_format") is None
            else x.names.clone(memory_format=kwargs["memory_format"])
        )
        if dtype == torch.bool:
            return unknown("a cast to bool", f"build the network of {KNOWN}")
        if (
            not dtype.is_floating_point
            and x.is_floating_point()
            and bool((names >= self.atoms.image.numel() + 1).any())
        ):
            return unknown("a cast to integers of what is computed", "cast the image itself")
        return names

    def _wrapped(self, func, args, kwargs, found):
        """Tensors of a call's results."""
        if isinstance(found, Exception):
            given = tree_map(lambda leaf: _blank(leaf, "meta"), (args, kwargs))
            if "device" in given[1]:
                given[1]["device"] = "meta"
            try:
                made = func(*given[0], **given[1])
            except Exception:  # of any kind: the operator has no shapes for what is not there
                raise found from None
            return tree_map(
                lambda leaf: (
                    self.lift(self.atoms.obscure(leaf.shape, found), leaf.dtype) if isinstance(leaf, Tensor) else leaf
                ),
                made,
            )
        dtype, moves = self._dtype(func, args, kwargs), func._schema.name.split("::")[1] in layers.MOVES
        given = [leaf for leaf in _leaves(args) if self.of_image(leaf)]
        loose = any(leaf.loose or not (moves or leaf.is_contiguous()) for leaf in given)

        def lifted(leaf):
            made = self.lift(leaf, dtype)
            made.loose = loose
            return made

        return tree_map(lambda leaf: lifted(leaf) if isinstance(leaf, Tensor) else leaf, found)

    def _dtype(self, func, args, kwargs):
        if (dtype := kwargs.get("dtype")) is not None:
            return dtype
        name = func._schema.name.split("::")[1]
        leaves = _leaves(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name in layers.MOVES and name != "where":
            return tensors[0].dtype
        if name == "eq":
            return torch.bool
        floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
        if floating:
            return floating[0]
        whole = name in ("add", "sub", "rsub", "mul", "neg", "abs", "where", "pow", "clamp")
        return tensors[0].dtype if whole and not any(isinstance(leaf, float) for leaf in leaves) else self.dtype

    # Results

    def finish(self, outputs: Any, form: "Form", bernoulli: bool) -> None:
        """Has the network end with what the model returns."""
        network = self.atoms.network
        if self.of_image(outputs):
            self.atoms.refuse_obscure(outputs.names, normalised=True)
        else:
            raise ValueError(
                f"model must return one image of logits that depends on its input; got {type(outputs).__name__}"
            )
        names = form.arranged(outputs.names, (network.colours, *self.atoms.size))[0]
        index = self.atoms.which(names)
        source = self.atoms.sources[int(index.max())] if int(index.max()) >= 0 else None
        if isinstance(source, Obscure) and source.normalised is not None and bool((index == index.max()).all()):
            names, network.normalised = _unnormalised(source, names), True
        logits = self.atoms.read(names.flatten(0, 1))
        network.finish(self.atoms.still(logits) if isinstance(logits, Const) else logits, bernoulli)
        fuse(network)

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> "Iterator[None]":
        """Knows which module's code runs."""
        self.paths = {module: name for name, module in model.named_modules()}
        thread = threading.get_ident()

        def enter(module, inputs):
            if threading.get_ident() == thread and module in self.paths:
                self.stack.append(module)

        def leave(module, inputs, outputs):
            if threading.get_ident() == thread and module in self.paths:
                self.stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with _Mode(self):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _blank(leaf, device=None):
    """A tensor of the same kind, without numbers."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device or leaf.device)


def _unnormalised(source, names):
    """What a log_softmax over the levels, the first dimension, was taken of."""
    shape, dim = source.normalised.shape, source.dim
    rest = torch.Size((*shape[:dim], 1, *shape[dim + 1 :]))
    group = torch.arange(rest.numel(), device="cpu").reshape(rest).expand(shape).flatten()[names - source.base]
    if shape[dim] != len(names) or not torch.equal(group, group[:1].expand_as(group)):
        raise source.error
    return source.normalised.flatten()[names - source.base]


class Form:
    """How a model takes images, and gives logits.

    Args:
        integers: whether images are of integers.
        channels: whether images of one colour have a dimension for it.
        size: rows and columns at which the model was followed.
    """

    def __init__(self, integers: bool, channels: bool, size: tuple[int, int]) -> None:
        self.integers, self.channels, self.size = integers, channels, size

    def image(self, x: Tensor) -> Tensor:
        """Images [n, colours, rows, columns] as the model takes them."""
        x = x if self.channels else x[:, 0]
        return x.long() if self.integers else x

    @staticmethod
    def arranged(outputs: Tensor, image_shape: Sequence[int]) -> Tensor:
        """Logits as [n, levels, colours, rows, columns]."""
        colours, *size = image_shape
        shape = list(outputs.shape[1:])
        if shape[1:] == size and len(shape) == 3:
            if shape[0] % colours:
                raise ValueError(
                    f"model must return levels x {colours} channels of logits, one for each level and colour; "
                    f"got {shape[0]}"
                )
            return outputs.unflatten(1, (-1, colours))
        if len(shape) == 4 and shape[2:] == size and colours in shape[:2]:
            return outputs if shape[1] == colours else outputs.transpose(1, 2)
        if shape[:-1] == [colours, *size]:
            return outputs.movedim(-1, 1)
        if colours == 1 and shape[:-1] == size:
            return outputs.movedim(-1, 1)[:, :, None]
        if colours == 1 and shape == size:
            return outputs[:, None, None]
        raise ValueError(
            f"model must return logits [N, levels x {colours}, {size[0]}, {size[1]}], or with a dimension of their own "
            f"for the colours; got {('N', *shape)}"
        )


def check_signature(model: nn.Module, conditional: bool) -> None:
    """That a model takes an image, and a condition if it is to."""
    try:
        inspect.signature(model.forward).bind(*[None] * (1 + conditional))
    except TypeError as error:
        takes = "an image and a condition" if conditional else "one image (conditional=True: and a condition)"
        raise ValueError(f"model must take {takes}; got {type(model).__name__}.forward: {error}") from None


def network_of(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    cond: "Tensor | None" = None,
    *,
    order: str = "raster",
    bernoulli: bool = False,
    small: bool = False,
    dtype: torch.dtype = torch.float32,
    device: "torch.device | str" = "cpu",
) -> "tuple[Network, Form]":
    """The steps of a network in evaluation mode, and the form of what it takes.

    Args:
        model: from an image, and a condition if there is one, to logits.
        image_shape: (colours, rows, columns).
        cond: the condition of one image.
        order: "raster" or "wavefront".
        bernoulli: whether one output for each colour is the logit of level 1, to which 0 joins for level 0.
        small: whether large images may be followed at a smaller size, which somebody then checks.
        dtype, device: of the model's parameters.

    Raises:
        NotImplementedError: for a layer that is not known.
        ValueError: for a network that is not causal, or takes other arguments.
    """
    colours, rows, columns = image_shape
    given = dtype, torch.device(device)
    if small and rows * columns > LARGE and (cond is None or cond.shape[-2:] != (rows, columns)):
        size = min(rows, SMALL[0]), min(columns, SMALL[1])
        with contextlib.suppress(UnknownError, ValueError):
            network, form = _in_some_form(model, (colours, *size), cond, order, bernoulli, *given)
            if not any(const.spatial for const in network.constants()):
                return network, form
    return _in_some_form(model, image_shape, cond, order, bernoulli, *given)


def _in_some_form(model, image_shape, *options):
    refused = []
    for channels in (True, False)[: 1 + (image_shape[0] == 1)]:
        for integers in (False, True):
            form = Form(integers, channels, image_shape[1:])
            try:
                return _traced(model, image_shape, form, *options), form
            except RaisedError as error:
                refused.append(error)
    raise max(refused, key=lambda error: error.calls)


class RaisedError(ValueError):
    """What a model's own code raises for images of a form, after so many calls of what computes."""

    calls = 0


def _traced(model, image_shape, form, cond, order, bernoulli, dtype, device, late=False):
    colours, *size = image_shape
    network = Network(colours, order)
    tracer = Tracer(network, tuple(size), dtype, device, late)
    image = tracer.lift(tracer.atoms.image[None], dtype)
    given = [image] if cond is None else [image, tracer.condition(cond.clone())]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), tracer.watching(model):
        given[0] = form.image(given[0])
        try:
            outputs = model(*given)
        except UnknownError:
            raise
        except Exception as error:  # of any kind: it is the user's code
            raised = f"{type(error).__name__}: {error}"
            takes = ", ".join(map(str, image_shape[0 if form.channels else 1 :]))
            refused = RaisedError(f"model must take images [N, {takes}]; got {raised}")
            refused.calls = tracer.calls
            raise refused from error
    try:
        tracer.finish(outputs, form, bernoulli)
    except (UnknownError, ValueError) as error:
        if late:
            raise
        try:
            return _traced(model, image_shape, form, cond, order, bernoulli, dtype, device, late=True)
        except (UnknownError, ValueError, RecursionError) as again:  # which may be about what is made up for it alone
            raise again if isinstance(error, UnknownError) and isinstance(again, NotCausalError) else error from None
    return network
