"""Which of several configurations a kernel runs with: the first, or, where the user asks for it, the fastest."""

import torch
import triton

from fastelbo import _library

_FASTEST = {}
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def wanted() -> bool:
    """Whether configurations may be timed: as torch's own convolutions, where torch.backends.cudnn.benchmark is set.

    Not where results must be the same in every process: another configuration adds in another order.
    """
    return (
        torch.backends.cudnn.benchmark
        and not torch.are_deterministic_algorithms_enabled()
        and not _library.INTERPRETED
        and not torch.cuda.is_current_stream_capturing()
    )


def choose(key, configurations, run, result, exact):
    """A configuration for a kernel.

    Args:
        key: hashable; what the choice depends on, beside the device.
        configurations: of any type, the default first.
        run: launches the kernel with a configuration.
        result: the tensor that it fills.
        exact: computes by plain torch what it must fill it with. A configuration that computes something else is never
            chosen: compilers have been known to turn a good kernel into a bad one.

    Raises:
        RuntimeError: if no configuration computes that.
    """
    if not wanted():
        return configurations[0]
    key = (result.device, *key)
    if key not in _FASTEST:
        _FASTEST[key] = fastest(configurations, run, result, exact(), triton.testing.do_bench)
    return _FASTEST[key]


def fastest(configurations, run, result, exact, time):
    """The configuration for which time(call) is least, of those that compute `exact`."""
    seconds = {}
    for configuration in configurations:
        result.fill_(float("nan"))
        try:
            run(configuration)
        except triton.runtime.errors.OutOfResources:
            continue
        scale = exact.abs().max().item()
        if (result - exact).abs().max().item() <= _TOLERANCE[result.dtype] * scale:
            seconds[configuration] = time(lambda configuration=configuration: run(configuration))
    if not seconds:
        raise RuntimeError("no configuration of the kernel computes what plain torch does")
    return min(seconds, key=seconds.get)


def launch(key, candidates, tensors, result, exact):
    """Launches the chosen one of candidates, a dictionary from configurations to functions of the tensors."""
    chosen = choose(key, tuple(candidates), lambda configuration: candidates[configuration](*tensors), result, exact)
    candidates[chosen](*tensors)
