"""Times the Gaussian ops: ours against all of its rivals, in turns, within one run."""

import cases
import torch


def test_speed(timed, bench):
    case, pass_ = timed.case, timed.pass_
    verified = bench.verified(case.op)
    torch.manual_seed(0)
    inputs = cases.make_inputs(case, timed.shape, timed.dtype, bench.device)
    functions = cases.contestants(case, bench.backends, bench.rivals(timed.rivals), pass_, timed.timing)
    calls = {name: cases.bind(function, inputs, pass_) for name, function in functions.items()}
    for name, call in calls.items():
        cases.check(case, name, call(), inputs, pass_)
    moved = cases.floor_bytes(case, inputs, pass_)
    calls["copy"] = cases.copy(moved, bench.device)

    common = {"verified": verified, "op": case.op, "case": case.name, "shape": cases.named(timed.shape)}
    common |= {"dtype": timed.dtype, "pass_": pass_, "bytes": moved}
    found = bench.measured(common, calls, timed.rounds, timed.timing)
    if case.name == "normals":
        for row in found[:-1]:  # but the copy
            row["gnormals_per_s"] = 1e-3 * inputs[0].numel() / row[bench.typical]
    bench.save("", found)
