"""Times calls by the host's clock, all contestants in turns."""

import ctypes
import math
import platform
import time
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
