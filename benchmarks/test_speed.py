"""Times every case: ours against all of its rivals, in turns, within one run."""

import gc
import statistics
from collections import deque
from collections.abc import Callable

import cases
import gpu_clock
import pytest
import rows
import torch
from host_clock import clock, loops_for, sample

SAMPLE_SECONDS = 2e-3  # a sample is as many calls as last this long, or one


def measure(benchmark, calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Samples of every call, one of each per round.

    The first call is pytest-benchmark's own, which times it as sample() does; all others have their turn between two of
    its rounds.
    """
    first, *others = calls
    order = deque(others)
    loops = {name: loops_for(call, SAMPLE_SECONDS) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def call_first():
        calls[first]()  # not returned: pytest-benchmark would free it outside of its timing

    def rest_of_round():
        order.rotate(1)  # nobody always follows the same one
        for name in order:
            samples[name].append(sample(calls[name], loops[name]))
        call_first()

    call_first()
    benchmark.pedantic(call_first, rounds=rounds, iterations=loops[first], teardown=rest_of_round)
    if benchmark.stats:
        samples[first] = benchmark.stats.stats.data
    return samples


@pytest.fixture
def without_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.benchmark(timer=clock)
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")  # where the op's tests fail, and for GPU events
@pytest.mark.usefixtures("without_garbage_collection")
def test_speed(benchmark, timed, device, backends, broken, save, request):
    case, shape, pass_, timing = timed.case, timed.shape, timed.pass_, timed.timing
    if case.op in broken:
        pytest.fail(f"not timed, its tests must pass first (or --unverified): {broken[case.op]}", pytrace=False)
    option = request.config.option
    torch.manual_seed(0)
    torch._dynamo.reset()  # else a second shape makes torch.compile generate slower code for any shape
    inputs = cases.make_inputs(case, shape, cases.DTYPES[timed.dtype], device)
    elements = inputs[0].numel()
    functions = cases.contestants(case, backends, timed.rivals, pass_, timing)
    calls = {name: cases.bind(function, inputs, pass_) for name, function in functions.items()}
    for name, call in calls.items():
        cases.check(case, name, call(), inputs, pass_)
    floor = cases.floor_bytes(case, inputs, pass_)
    calls["copy"] = cases.copy(floor, device)

    if timing == "host":
        rounds = max(2, option.rounds or (3 if option.quick else 10 if elements >= 2**24 else 30))
        samples = measure(benchmark, calls, rounds)
    elif not benchmark.enabled:
        samples = {backends[0]: []}
    else:
        rounds = max(2, option.rounds or gpu_clock.rounds_for(elements, option.quick))
        measure_on_gpu = gpu_clock.measure_in_graphs if timing == "graph" else gpu_clock.measure
        samples = measure_on_gpu(calls, rounds, device)
    if not samples[backends[0]]:
        return  # --benchmark-disable: contestants were checked and not timed
    typical = {name: (min if device.type == "cpu" else statistics.median)(found) for name, found in samples.items()}
    benchmark.extra_info.update({f"{name}_us": 1e6 * value for name, value in typical.items()})
    common = {"op": case.op, "case": case.name, "shape": f"{shape[0]}x{shape[1]}", "dtype": timed.dtype, "pass_": pass_}
    common |= {"bytes": floor, "rounds": rounds, "timing": timing}
    save([common | row(name, samples, typical, case, backends, elements) for name in calls])


def row(name: str, samples, typical, case, backends, elements: int) -> dict:
    """The fields of one contestant's Row that differ from those of the others."""
    found = {"contestant": name, "fraction_of_copy": typical["copy"] / typical[name], **rows.times(samples[name])}
    if name in backends:
        rivals = [rival for rival in cases.RIVALS if rival in typical and rival != "copy"]
        found |= {f"over_{rival}": typical[rival] / typical[name] for rival in rivals}
    if case.name == "normals" and name != "copy":
        found["gnormals_per_s"] = elements / typical[name] / 1e9
    return found
