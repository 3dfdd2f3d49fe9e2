"""Times the Gaussian ops: ours against all of its rivals, in turns, within one run."""

import cases
import gpu_clock
import ratios
import torch


def test_speed(timed, device, backends, passing, save, request):
    case, shape, pass_, timing = timed.case, timed.shape, timed.pass_, timed.timing
    passing(case.op)
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

    rounds = 3 if option.quick else 10 if elements >= 2**24 else 30
    rounds = rounds if timing == "host" else gpu_clock.rounds_for(elements, option.quick)
    samples = gpu_clock.CLOCKS[timing](calls, option.rounds or rounds, device)
    common = {"op": case.op, "case": case.name, "shape": f"{shape[0]}x{shape[1]}", "dtype": timed.dtype}
    common |= {"pass_": pass_, "bytes": floor, "timing": timing}
    on_gpu = device.type == "cuda"
    found = ratios.measured(common, samples, on_gpu)
    if case.name == "normals":
        for row in found[:-1]:  # but the copy
            row["gnormals_per_s"] = elements / ratios.typical(samples[row["contestant"]], on_gpu) / 1e9
    save("", found)
