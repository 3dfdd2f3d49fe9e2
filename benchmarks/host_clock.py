"""Times calls by the host's clock, all contestants in turns."""

import ctypes
import gc
import math
import platform
import time
from collections import deque
from collections.abc import Callable

import torch

SAMPLE_SECONDS = 2e-3  # a sample is as many calls as last this long, or one


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


def loops_for(call: Callable) -> int:
    """How many calls last as long as a sample, at least one."""
    if sample(call, 1) >= SAMPLE_SECONDS:
        return 1
    return max(1, math.ceil(SAMPLE_SECONDS / min(sample(call, 3) for _ in range(3))))


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, one sample of each per round, in turns."""
    gc.collect()
    gc.disable()
    try:
        loops = {name: loops_for(call) for name, call in calls.items()}
        order = deque(calls)
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            order.rotate(1)  # nobody always follows the same one
            for name in order:
                samples[name].append(sample(calls[name], loops[name]))
        return samples
    finally:
        gc.enable()
