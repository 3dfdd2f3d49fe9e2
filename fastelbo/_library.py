"""The one place that talks to torch.library: schemas are written once, in Python; compiled code implements them."""

import contextlib
import functools
import importlib
import os

import torch

from fastelbo import _autograd

_OLDEST_TORCH = (2, 10)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
    raise ImportError(f"fastelbo needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer; got {torch.__version__}")

# Two namespaces, so that Triton and CUDA C++ can both run tensors of one device.
_library = torch.library.Library("fastelbo", "DEF")
_triton_library = torch.library.Library("fastelbo_triton", "DEF")

#: Triton's interpreter runs the Triton kernels on the CPU, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def define(name: str, schema: str, fake, check=None, differentiable=None) -> "dict[str, torch._ops.OpOverload]":
    """Defines an op with a kernel per backend; returns what each backend calls.

    Two overloads of one schema share the kernels: "kernel", which the op's autograd.Function calls and is returned, and
    the default one, by whose name exported programs and other callers call it, which checks what it is given and passes
    gradients on.

    The Triton kernel of <op>_fwd is the function of that name in fastelbo.kernels.<op>: it takes the results to fill,
    which `fake` has allocated, and the op's arguments, and returns what fills them: a function of the results and of
    the schema's tensors, which later calls with arguments of the same kind (`_kind`) take at once. It must hold no
    tensor.

    Args:
        name: <op>_fwd or <op>_bwd.
        schema: its arguments and returns, without the name.
        fake: takes the op's arguments, and allocates what it returns.
        check: takes all arguments by name, and raises for what no kernel can take. (Compiled kernels check, too.)
        differentiable: takes the backend, and all arguments by name, and computes the op so that gradients pass.
            Without it the op has no derivative, and a backward through it says so.
    """
    parsed = torch._C.parse_schema(name + schema)
    parameters, defaults = parsed.arguments, defaults_of(parsed)

    def named(arguments):
        found = {parameter.name: x for parameter, x in zip(parameters, whole(arguments, defaults), strict=True)}
        if check is not None:
            check(**found)
        return found

    def allocate(*arguments):
        return fake(*whole(arguments, defaults))

    def checked(*arguments):
        return fake(*named(arguments).values())

    def through(backend, *arguments):
        return differentiable(backend, **named(arguments))

    kernels = {}
    for library, backend in ((_library, "cpu"), (_triton_library, "triton")):
        op = _define(library, name, schema, checked)  # first, so that a call without an overload takes it
        kernels[backend] = _define(library, f"{name}.kernel", schema, allocate)
        run = _autograd.under_autograd(op, differentiable and functools.partial(through, backend))
        library.impl(op, run, "Autograd")
    device = "CPU" if INTERPRETED else "CUDA"
    places = [i for i, parameter in enumerate(parameters) if "Tensor" in str(parameter.type)]
    for overload, make in ((name, checked), (f"{name}.kernel", allocate)):
        run = functools.partial(run_triton, name, make, defaults, places)
        _triton_library.impl(overload, run, device)
    if not any("float" in str(parameter.type) for parameter in parameters):  # whose kernels may tell 1 from 1.0
        kernels["triton"] = _Direct(kernels["triton"], run, device.lower())
    return {"cuda": kernels["cpu"], **kernels}


class _Direct:
    """An op's Triton kernel, called past torch's dispatcher where that has no one to tell: a tenth of a small call."""

    def __init__(self, op, run, device):
        self.op, self.run, self.device, self.overloadpacket = op, run, device, op.overloadpacket

    def __call__(self, *arguments):
        told = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _autograd.transformed()
        if told or torch.autograd._profiler_enabled() or arguments[0].device.type != self.device:
            return self.op(*arguments)
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and type(argument) not in PLAIN:
                return self.op(*arguments)
        return self.run(*arguments)


def defaults_of(schema):
    """Of an op's arguments, in order; None where there is none."""
    return [parameter.default_value for parameter in schema.arguments]


def whole(arguments, defaults):
    """All arguments of an op, which come without those at the end that have their default."""
    return *arguments, *defaults[len(arguments) :]


def by_name(op):
    """The default overload of what define returned: what an exported program is to hold."""
    return op.overloadpacket.default


def define_helper(name: str, schema: str, fake, function=None, tags=(), differentiable=None) -> "torch._ops.OpOverload":
    """Defines an op that is the same for every backend.

    Args:
        name, schema, fake: as in define.
        function: that implements it, on every device; compiled code does where None.
        tags: torch.Tag values.
        differentiable: takes the op's arguments, and computes it so that gradients pass.
    """
    op = _define(_library, name, schema, fake, tags)
    if function is not None:
        _library.impl(name, function, "CompositeExplicitAutograd")
    if differentiable is not None:
        _library.impl(op, _autograd.under_autograd(op, differentiable), "Autograd")
    return op


def _define(library, name, schema, fake, tags=()):
    library.define(f"{name}{schema}", tags=tags)
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    name, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, library.ns), name), overload or "default")


@functools.cache
def _triton_kernel(name):
    return getattr(importlib.import_module(f"fastelbo.kernels.{name.rpartition('_')[0]}"), name)


PLAIN = torch.Tensor, torch.nn.Parameter
_FOUND: dict = {}  # what allocates and what fills the results of calls of one kind
_MOST_FOUND = 4096


def _kind(argument):
    """All of an argument that may decide how a kernel runs: of a tensor not its values, nor where they are."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.device, argument.shape, argument.stride(), argument.data_ptr() % 16
    if isinstance(argument, list):
        return tuple([_kind(x) for x in argument])
    return repr(argument) if argument == 0.0 else argument  # it is equal to -0.0


def _again(results):
    """A function that allocates the like."""
    if isinstance(results, tuple):
        several = [_again(result) for result in results]
        return lambda: tuple([one() for one in several])
    keywords = {"dtype": results.dtype, "device": results.device}
    return functools.partial(torch.empty_strided, results.shape, results.stride(), **keywords)


_HERE = contextlib.nullcontext()


def _on(device):
    """Makes a device the current one where it is not."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else _HERE


def run_triton(name, fake, defaults, places, *arguments):
    """Allocates and fills what an op returns; places: of the tensors among its arguments."""
    arguments = whole(arguments, defaults)
    kind = name, fake, *map(_kind, arguments)
    allocate, fill = _FOUND.get(kind, (None, None))
    results = allocate() if allocate else fake(*arguments)
    device = (results if isinstance(results, torch.Tensor) else results[0]).device
    try:
        with _on(device):
            fill = fill or _triton_kernel(name)(results, *arguments)
            fill(results, *[arguments[place] for place in places])
    except Exception as error:
        raise RuntimeError(f"{name} failed in Triton on {device}: {error}") from error
    if not allocate:
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[kind] = _again(results), fill
    return results
