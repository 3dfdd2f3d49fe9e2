"""Times calls, all contestants in turns: by the host's clock, by a GPU's own events, or in CUDA graphs."""

import ctypes
import gc
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

SAMPLE_SECONDS = 2e-3  # a sample of the host's is as many calls as last this long, or one
WARM_UP = 3
GRAPH_CALLS = 20  # in one graph, whose launch takes as long as a tiny call
CYCLES_PER_SECOND = 2e9  # of a GPU, at most; a slower clock makes a pause longer, which does no harm
LONGEST_PAUSE = 5e-3  # seconds

Calls = dict[str, Callable]  # without arguments, by name
Samples = dict[str, list[float]]  # seconds


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for every contestant alike.

    By default it returns large blocks to the kernel, and the page faults of getting them back cost as much as a kernel
    does: they would be charged to whoever allocates, and not to the copy.
    """
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def turns(names: Iterable[str], rounds: int) -> Iterator[tuple[str, ...]]:
    """The order of each round: nobody always follows the same one."""
    order = deque(names)
    for _ in range(rounds):
        order.rotate(1)
        yield tuple(order)


def by_host(calls: Calls, rounds: int, device: torch.device) -> Samples:
    """Of every call by the host's clock, one per round."""
    gc.collect()
    gc.disable()
    try:
        loops = {name: loops_for(call) for name, call in calls.items()}
        samples: Samples = {name: [] for name in calls}
        for order in turns(calls, rounds):
            for name in order:
                samples[name].append(sample(calls[name], loops[name]))
        return samples
    finally:
        gc.enable()


def loops_for(call: Callable) -> int:
    """How many calls last as long as a sample, at least one."""
    if sample(call, 1) >= SAMPLE_SECONDS:
        return 1
    return max(1, math.ceil(SAMPLE_SECONDS / min(sample(call, 3) for _ in range(3))))


def sample(call: Callable, loops: int) -> float:
    """Seconds per call, after one that is not timed, so that all start with caches of their own making."""
    call()
    start = clock()
    for _ in range(loops):  # timeit's own loop adds a few per cent to tiny calls
        call()
    return (clock() - start) / loops


def clock() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def by_events(calls: Calls, rounds: int, device: torch.device, cold: bool = True) -> Samples:
    """Of every call by the GPU's events, one per round; cold: the second-level cache holds nothing of the inputs.

    The GPU pauses before each call for as long as the host needs to launch it, so that no gap between kernels is the
    host's. A call that waits for the GPU itself cannot be helped in this way, and pays for its waiting.
    """
    evict = eviction(device) if cold else lambda: None
    pauses = {name: min(LONGEST_PAUSE, 2e-5 + 2 * seconds_to_launch(call)) for name, call in calls.items()}
    pairs: dict[str, list] = {name: [] for name in calls}
    for order in turns(calls, rounds):
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            evict()
            torch.cuda._sleep(int(CYCLES_PER_SECOND * pauses[name]))
            start.record()
            calls[name]()
            end.record()
            pairs[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [1e-3 * start.elapsed_time(end) for start, end in found] for name, found in pairs.items()}


def eviction(device: torch.device) -> Callable:
    """A call that evicts the second-level cache. By reading: lines that were written would be written back at the cost
    of whoever comes next."""
    level2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    buffer = torch.ones(max(4 * level2, 2**28) // 4, dtype=torch.int32, device=device)
    result = torch.empty((), dtype=torch.int32, device=device)
    return lambda: torch.amax(buffer, (0,), out=result)


def seconds_to_launch(call: Callable) -> float:
    """How long the host takes, once it is warm."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def in_graphs(calls: Calls, rounds: int, device: torch.device) -> Samples:
    """Of every call where a CUDA graph launches it."""
    replays = {name: captured(call).replay for name, call in calls.items()}
    samples = by_events(replays, rounds, device, cold=False)
    return {name: [seconds / GRAPH_CALLS for seconds in found] for name, found in samples.items()}


def captured(call: Callable) -> torch.cuda.CUDAGraph:
    """GRAPH_CALLS calls, captured on the current stream: a backward runs on its forward's."""
    for _ in range(WARM_UP):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(GRAPH_CALLS):
            call()
    return graph


# By what a row's timing says.
CLOCKS = {"host": by_host, "events": by_events, "graph": in_graphs}
