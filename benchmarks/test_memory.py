"""Counts what every op and rival keeps for the backward, and on a GPU what both passes need at most."""

import cases
import torch

# on a GPU what test_speed.py compiles too, so that it is compiled but once
SHAPES = {"cpu": (512, 256), "cuda": (65536, 1024)}


def saved_bytes(call, inputs) -> int:
    """Bytes of the storages that the forward keeps, but for those of its inputs and outputs."""
    kept = []  # the tensors themselves: a storage that is freed would give its address to the next

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.detach()) or x, lambda x: x):
        outputs = call(*inputs)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*inputs, *cases.flat(outputs)):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(both_passes, device) -> int | None:
    """Bytes asked of torch's allocator, beyond what is there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    results = both_passes()
    torch.cuda.synchronize()
    del results
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def test_memory(timed, bench):
    (case, dtype), found = timed, []
    shape = SHAPES[bench.device.type]
    inputs = cases.make_inputs(case, shape, dtype, bench.device)
    common = {"op": case.op, "case": case.name, "shape": cases.named(shape), "dtype": dtype}
    for name, call in cases.contestants(case, bench.backends, bench.rivals(cases.RIVALS), "forward_backward").items():
        both_passes = cases.bind(call, inputs, "forward_backward")
        # its first call allocates what is allocated once, and what a compiler measures
        counts = {"result_bytes": sum(tensor.nbytes for tensor in cases.flat(both_passes()))}
        counts |= {"saved_bytes": saved_bytes(call, inputs), "peak_bytes": peak_bytes(both_passes, bench.device)}
        found.append(common | {"contestant": name} | counts)
    bench.save("memory_", found)
    ours = [row for row in found if row["contestant"] in bench.backends]
    seed = 8 if case.entry.drawn else 0
    assert all(row["saved_bytes"] == seed for row in ours), "ours keep nothing but a seed"
