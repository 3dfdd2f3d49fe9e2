"""Times calls by the host's clock, all contestants in turns."""

import ctypes
import gc
import math
import platform
import time
from collections import deque
from collections.abc import Callable

import torch


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for every contestant alike.

    By default it returns large blocks to the kernel, and the page faults of getting them back cost as much as a kernel
    does: they would be charged to whoever allocates, and not to the copy.
    """
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def sample(call: Callable, loops: int) -> float:
    """Seconds per call, after one that is not timed, so that all start with caches of their own making."""
    call()
    start = clock()
    for _ in range(loops):
        call()
    return (clock() - start) / loops


def loops_for(call: Callable, seconds: float) -> int:
    """How many calls last so long, at least one."""
    if sample(call, 1) >= seconds:
        return 1
    return max(1, math.ceil(seconds / min(sample(call, 3) for _ in range(3))))


def measure(benchmark, calls: dict[str, Callable], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Samples of every call, one of each per round; a sample is as many calls as last `seconds`, or one.

    The first call is pytest-benchmark's own, which times it as sample() does; all others have their turn between two of
    its rounds. Nothing with --benchmark-disable, but for one call.
    """
    first, *others = calls
    if not benchmark.enabled:
        benchmark.pedantic(calls[first])
        return {}
    order = deque(others)
    loops = {name: loops_for(call, seconds) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def call_first():
        calls[first]()  # not returned: pytest-benchmark would free it outside of its timing

    def rest_of_round():
        order.rotate(1)  # nobody always follows the same one
        for name in order:
            samples[name].append(sample(calls[name], loops[name]))
        call_first()

    gc.collect()
    gc.disable()
    try:
        call_first()
        benchmark.pedantic(call_first, rounds=rounds, iterations=loops[first], teardown=rest_of_round)
    finally:
        gc.enable()
    samples[first] = benchmark.stats.stats.data
    return samples
