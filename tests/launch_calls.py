"""Launches what ops launch in Triton, for a GPU that need not be there: nothing is compiled, and launches are written
down.

    python tests/launch_calls.py

Every launch is made three times with the same tensors: as it comes, again, which must go past Triton, and by Triton
itself, as while a profiler watches. Prints as JSON where the last two differ, and what else tests/test_launch.py asks
for. PYTHONPATH may name another Triton.
"""

import functools
import itertools
import json
from types import SimpleNamespace

import compile_triton  # before fastelbo: it has kernels for a GPU called with tensors of a CPU
import compile_triton_calls
import torch
import triton
import triton.language as tl

from fastelbo.kernels import launch

written = []  # what launchers were given, by name
compilations = itertools.count(1)
asked = []  # the kernels that Triton itself was asked to launch


class Launcher:
    """As those of Triton 3.6; calls hooks, as its compiled part does."""

    def __init__(self, source):
        self.source = source

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):  # noqa: N803
        metadata, launch_metadata, enter, leave, *arguments = args
        enter and enter(launch_metadata)
        written.append({
            "name": self.source.name, "names": self.source.fn.arg_names, "grid": (gridX, gridY, gridZ),
            "stream": stream, "function": function, "metadata": metadata, "arguments": arguments,
        })  # fmt: skip
        leave and leave(launch_metadata)


class NamingLauncher(Launcher):
    """As those of Triton 3.9."""

    def __call__(
        self, gridX, gridY, gridZ, stream, function,  # noqa: N803
        kernel_metadata, launch_metadata, launch_enter_hook, launch_exit_hook, *args,
    ):  # fmt: skip
        hooks = launch_metadata, launch_enter_hook, launch_exit_hook
        super().__call__(gridX, gridY, gridZ, stream, function, kernel_metadata, *hooks, *args)


class UnknownLauncher(Launcher):
    """As those of a Triton to come may be."""

    def __call__(self, gridX, gridY, gridZ, stream, function, *args, more=None):  # noqa: N803
        super().__call__(gridX, gridY, gridZ, stream, function, *args)


class Compiled(triton.compiler.CompiledKernel):
    """A kernel that has not been compiled."""

    launcher = Launcher

    def __init__(self, source, target, options, **_):
        self.src, self.name, self.function = source, source.name, next(compilations)
        self.metadata = SimpleNamespace(target=target)
        self.packed_metadata = options["num_warps"], 1, 0
        self.module = None
        self._run = self.launcher(source)

    def _init_handles(self):
        pass


class Driver(compile_triton.NamedTarget):
    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device=None):
        return 100 + device


def install():
    """Has Triton compile nothing, and write down what it was asked to launch."""
    triton.runtime.driver.set_active(Driver(90))
    triton.compiler.compile = Compiled
    run = triton.JITFunction.run

    @functools.wraps(run)
    def noted(kernel, *arguments, **options):
        asked.append(kernel)
        return run(kernel, *arguments, **options)

    triton.JITFunction.run = noted


def watched(call):
    """What a call has launched while a profiler watches, and how often that heard of it."""
    heard = []
    triton.knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        call()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(heard.append)
    return written[-1], len(heard)


def same(found, want):
    """Whether two arguments are the same one: tensors not by value."""
    if isinstance(want, torch.Tensor):
        return found is want
    if hasattr(want, "block_shape"):
        parts = vars(want).keys()
        return type(found) is type(want) and all(same(getattr(found, part), getattr(want, part)) for part in parts)
    if isinstance(want, (list, tuple)) and not isinstance(want, torch.Size):
        return len(found) == len(want) and all(map(same, found, want))
    return type(found) is type(want) and found == want


def check_every_launch(differences, count):
    """Has every Launch made three times."""
    once = launch.Launch.__call__

    def thrice(self, *tensors):
        once(self, *tensors)
        before = len(asked)
        once(self, *tensors)
        if len(asked) > before:
            differences.append(f"{self._kernel.__name__}: Triton was asked again")
        found = written[-1]
        want, heard = watched(lambda: once(self, *tensors))
        count[found["name"]] = count.get(found["name"], 0) + 1
        differences.extend(f"{found['name']}: {part}" for part in want if not same(found[part], want[part]))
        warps = dict(zip(want["names"], want["arguments"], strict=True)).get("num_warps", want["metadata"][0])
        if warps != want["metadata"][0]:
            differences.append(f"{found['name']}: compiled for {want['metadata'][0]} warps, told of {warps}")
        if heard != 1:
            differences.append(f"{found['name']}: the profiler heard {heard} times")
        written.clear()

    launch.Launch.__call__ = thrice
    return once


OVER_BOXES = {
    **compile_triton.LAYERS_OVER_BOXES,
    "boxes-rows": ((64, 64, 28, 28), (64, 64, 7, 7), {"activation": "elu"}, torch.bfloat16),
    "boxes-plain": ((16, 64, 32, 32), (64, 64, 3, 3), {}, torch.bfloat16),
}


def calls():
    """Every call that must go past Triton the second time, by name."""
    for op, options in compile_triton_calls.OPTIONS.items():
        for call in compile_triton_calls.covering(options, 2):
            yield f"{op}({call})", compile_triton_calls.prepared(op, **call)
    for case, layer in {**compile_triton.LAYERS, **OVER_BOXES}.items():
        over_boxes = case in OVER_BOXES

        def run(case=case, layer=layer, over_boxes=over_boxes):
            compile_triton.over_boxes(over_boxes)
            compile_triton.run_layer(case, *layer)

        yield case, run
    for case, block in compile_triton.BLOCKS.items():
        yield f"block of {case}", functools.partial(compile_triton.run_block, *block)


@triton.jit
def kernel(x, pair, n, SIZE: tl.constexpr):  # noqa: N803
    pass


def special():
    """Functions that launches of one kernel take, of which Triton compiles another for each."""
    tensors = [torch.empty(64, dtype=torch.float32), torch.empty(64, dtype=torch.float32)[1:]]
    one = launch.Launch(kernel, 3, launch.TENSOR, (launch.TENSOR, 7), 17, SIZE=4, num_warps=4)
    functions = []
    for triton.runtime.driver.active.device in (0, 1, 0):
        for x, y in itertools.product(tensors, tensors):
            one(x, y)
            one(x, y)
            functions.append(written[-1]["function"])
    triton.runtime.driver.active.device = 0
    for n, step, size, warps in ((1, 7, 4, 4), (16, 7, 4, 4), (2**31, 7, 4, 4), (17, 1, 4, 4), (17, 16, 4, 4),
                                 (17, 7, 8, 4), (17, 7, 4, 8), (17, None, 4, 4)):  # fmt: skip
        other = launch.Launch(kernel, 3, launch.TENSOR, (launch.TENSOR, step), n, SIZE=size, num_warps=warps)
        other(*tensors)
        other(*tensors)
        functions.append(written[-1]["function"])
    return functions


def asked_by(prepare, forget=lambda: None):
    """How many of three launches Triton is asked for, the first in any case."""
    one = launch.Launch(kernel, 1, launch.TENSOR, (1, 2), 3, SIZE=next(compilations), num_warps=4)
    one(torch.empty(4))
    prepare()
    asked.clear()
    one(torch.empty(4))
    one(torch.empty(4))
    forget()
    return len(asked) + 1


def observers():
    """What asked_by says, by what is done after the first launch."""
    runtime, launcher = triton.knobs.runtime, Compiled.launcher

    def with_debug(debug):
        return lambda: setattr(runtime, "debug", debug)

    found = {"nothing": asked_by(lambda: None), "debug": asked_by(with_debug(True), with_debug(False))}
    found["pre-run hook"] = asked_by(lambda: kernel.add_pre_run_hook(lambda *_, **__: None), kernel.pre_run_hooks.clear)
    Compiled.launcher = UnknownLauncher
    found["unknown launcher"] = asked_by(lambda: None)
    Compiled.launcher = launcher
    found["nothing again"] = asked_by(lambda: None)
    return found


def precisions():
    """How one layer is multiplied while torch's setting changes: forward, input and weight gradient."""
    found = []
    for case in ("float32", "ieee", "float32"):
        written.clear()
        compile_triton.run_layer(case, *compile_triton.LAYERS["ieee"])
        launched = [dict(zip(one["names"], one["arguments"], strict=True)) for one in written]
        found.append([one["PRECISION"] for one in launched if "PRECISION" in one])
    return found


def main():
    install()
    Compiled.launcher = Launcher if triton.__version__.startswith("3.6.") else NamingLauncher
    differences, count, ran = [], {}, 0
    once = launch.Launch.__call__
    for name, call in calls():
        found = []
        check_every_launch(found, count)
        call()
        launch.Launch.__call__ = once
        differences += [f"{name}: {difference}" for difference in found]
        asked.clear()
        call()
        differences += [f"{name}: Triton launches {kernel.__name__} again" for kernel in asked]
        ran += 1
    found = {"triton": triton.__version__, "calls": ran, "launches": count, "differences": differences}
    print(json.dumps({**found, "special": special(), "asked": observers(), "precisions": precisions()}))


if __name__ == "__main__":
    main()
