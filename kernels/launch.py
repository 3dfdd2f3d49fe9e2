"""Launching a kernel: by Triton the first time, and from then on through the launcher of what it has compiled.

Triton looks at every argument of every call to find what it has compiled for such: the host takes longer for that than
the GPU for a small kernel. A Launch is made when all but the tensors is known; their addresses are all that is left to
look at.
"""

import functools
import inspect

import triton

from fastelbo import _library

TENSOR = object()  # among a Launch's arguments: the next of a call's tensors

# What Triton's launchers take before the kernel's own arguments; those of 3.6 name no more than the first five.
_TAKEN = ["gridX", "gridY", "gridZ", "stream", "function"]
_TAKEN += ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]


def place(tensor):
    """TENSOR, or None where there is no tensor."""
    return None if tensor is None else TENSOR


class Launch:
    """A kernel and all that it takes, but for the tensors, whose dtypes are the same in every call.

    Args:
        kernel: of Triton or Gluon.
        programs: how many.
        arguments: the kernel's, some by position, the others by name: TENSOR where a tensor goes, in tuples too; or
            what has a method `of`, which makes the argument from an iterator over tensors.
        options: named as well: Triton's own.
    """

    def __init__(self, kernel, programs, *arguments, **options):
        self._kernel, self._programs, self._named = kernel, programs, kernel.arg_names[len(arguments) :]
        self._options = {name: value for name, value in options.items() if name not in self._named}
        self._fill = _filler((*arguments, *[options[name] for name in self._named]))
        self._compiled = {}  # by what Triton may specialise on: the device, and what addresses are divisible by

    def __call__(self, *tensors):
        """Launches it on the current device and stream; tensors: in the order of the arguments, None for none."""
        tensors = [tensor for tensor in tensors if tensor is not None]
        arguments = self._fill(iter(tensors))
        if _library.INTERPRETED or _observed(self._kernel):
            self._by_triton(arguments)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        key = device, *[tensor.data_ptr() % 16 for tensor in tensors]
        if key in self._compiled:
            run, function, metadata = self._compiled[key]
            stream = driver.get_current_stream(device)
            run(self._programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
            return
        compiled = self._by_triton(arguments)
        if _known(compiled):
            self._compiled[key] = compiled.run, compiled.function, compiled.packed_metadata

    def compile(self, *tensors):
        """What Triton compiles for such a call, which is not made; tensors may be a CPU's."""
        return self._by_triton(self._fill(tensor for tensor in tensors if tensor is not None), self._kernel.warmup)

    def _by_triton(self, arguments, run=None):
        """What was compiled. By name comes what was given by name: a kernel's num_warps is Triton's, too."""
        first = len(arguments) - len(self._named)
        named = dict(zip(self._named, arguments[first:], strict=True)) | self._options
        if run:
            return run(*arguments[:first], grid=(self._programs,), **named)
        return self._kernel[(self._programs,)](*arguments[:first], **named)


def _filler(arguments):
    """What puts tensors in their places: a function of an iterator over them, which returns the arguments."""
    places = []
    for i, argument in enumerate(arguments):
        if argument is TENSOR:
            places.append((i, next))
        elif hasattr(argument, "of"):
            places.append((i, argument.of))
        elif isinstance(argument, tuple) and _takes_tensors(argument):
            places.append((i, _filler(argument)))

    def fill(tensors):
        found = list(arguments)
        for i, take in places:
            found[i] = take(tensors)
        return tuple(found)

    return fill


def _takes_tensors(arguments) -> bool:
    return any(x is TENSOR or hasattr(x, "of") or (isinstance(x, tuple) and _takes_tensors(x)) for x in arguments)


def _observed(kernel) -> bool:
    """Whether someone, a profiler say, wants to know of launches, or to have kernels compiled otherwise."""
    runtime = triton.knobs.runtime
    wishes = runtime.launch_enter_hook, runtime.launch_exit_hook, runtime.add_stages_inspection_hook, runtime.debug
    return bool(kernel.pre_run_hooks) or any([getattr(wish, "calls", wish) for wish in wishes])


def _known(compiled) -> bool:
    """Whether a kernel was compiled, for CUDA, by a Triton whose launchers take what we give them."""
    return (
        isinstance(compiled, triton.compiler.CompiledKernel)
        and compiled.metadata.target.backend == "cuda"
        and _known_launcher(type(compiled.run))
    )


@functools.cache
def _known_launcher(launcher) -> bool:
    _, *parameters = inspect.signature(launcher.__call__).parameters.values()
    names = [parameter.name for parameter in parameters[:-1]]
    return names in (_TAKEN[:5], _TAKEN) and parameters[-1].kind == inspect.Parameter.VAR_POSITIONAL
