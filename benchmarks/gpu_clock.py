"""Times on a GPU: by its own events, with cold caches, and never waiting for the host; in graphs; or by the host."""

import math
import time
from collections import deque
from collections.abc import Callable

import host_clock
import torch

WARM_UP = 3
GRAPH_CALLS = 20  # in one graph, whose launch takes as long as a tiny call
CYCLES_PER_SECOND = 2e9  # at most; a slower clock makes a pause longer, which does no harm
LONGEST_PAUSE = 5e-3  # seconds


class Cold:
    """Evicts the second-level cache. By reading: lines that were written would be written back at the cost of whoever
    comes next."""

    def __init__(self, device: torch.device):
        level2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.buffer = torch.ones(max(4 * level2, 2**28) // 4, dtype=torch.int32, device=device)
        self.result = torch.empty((), dtype=torch.int32, device=device)

    def __call__(self) -> None:
        torch.amax(self.buffer, (0,), out=self.result)


def host_seconds(call: Callable) -> float:
    """How long the host takes to launch a call, once it is warm."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def measure(calls: dict[str, Callable], rounds: int, device: torch.device, cold: bool = True) -> dict[str, list[float]]:
    """Seconds of every call, one sample of each per round, in turns.

    The GPU pauses before each call for as long as the host needs to launch it, so that no gap between kernels is the
    host's. A call that waits for the GPU itself cannot be helped in this way, and pays for its waiting.

    Args:
        calls: without arguments, by name.
        rounds: samples of each.
        device: that they run on.
        cold: whether the second-level cache holds nothing of the inputs.
    """
    evict = Cold(device) if cold else lambda: None
    pauses = {
        name: int(CYCLES_PER_SECOND * min(LONGEST_PAUSE, 2e-5 + 2 * host_seconds(call))) for name, call in calls.items()
    }
    order = deque(calls)
    pairs: dict[str, list] = {name: [] for name in calls}
    for _ in range(rounds):
        order.rotate(1)  # nobody always follows the same one
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            evict()
            torch.cuda._sleep(pauses[name])
            start.record()
            calls[name]()
            end.record()
            pairs[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [1e-3 * start.elapsed_time(end) for start, end in found] for name, found in pairs.items()}


def in_graph(call: Callable) -> Callable:
    """Replays a CUDA graph of GRAPH_CALLS calls, captured on the current stream: a backward runs on its forward's."""
    for _ in range(WARM_UP):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def measure_in_graphs(calls: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call where a graph launches it."""
    replays = {name: in_graph(call) for name, call in calls.items()}
    samples = measure(replays, rounds, device, cold=False)
    return {name: [seconds / GRAPH_CALLS for seconds in found] for name, found in samples.items()}


# By what a row's timing says.
CLOCKS = {
    "host": lambda calls, rounds, device: host_clock.measure(calls, rounds),
    "events": measure,
    "graph": measure_in_graphs,
}


def rounds_for(elements: int, quick: bool) -> int:
    if quick:
        return 5
    return max(20, min(100, math.ceil(2**26 / elements)))
