"""What the benchmarks time: contestants that compute something else are refused, and some are left out by rule."""

import dataclasses
import importlib
import sys
import types

import convolutions
import dropins
import originals
import pytest
import torch
from drop_in_cases import DROP_INS

MISTAKES = {  # in what pythae's lines give of a mean
    "value": lambda mu, z, kl: (z, 1.001 * kl),
    "nan": lambda mu, z, kl: (z, kl / 0),
    "gradient": lambda mu, z, kl: (z, kl.detach() + kl - kl.detach() + (mu - mu.detach()).sum(dim=-1)),
    "noise": lambda mu, z, kl: ((1 + 1e-3) * z, kl),
    "shape": lambda mu, z, kl: (z, kl[:, None]),
    "missing": lambda mu, z, kl: z,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_drop_in_that_computes_something_else(mistake):
    right = next(drop_in for drop_in in DROP_INS if drop_in.case == "sample_and_kl")
    calls, _ = dropins.calls(right)
    assert list(calls) == ["cpu", "eager"]

    def lines(mu, log_var):
        return mistake(mu, *originals.sample_and_kl(mu, log_var))

    with pytest.raises(AssertionError, match=r"^compat\.wrong sample_and_kl: .*output"):
        dropins.calls(dataclasses.replace(right, op="compat.wrong", theirs=lines))


LAYER = convolutions.Layer(2, 8, 4, 5, 3, "B")


@pytest.mark.parametrize("name", ["eager_channels_last", "full", "crop", "compile"])
def test_a_convolution_that_computes_something_else(name, monkeypatch):
    case, right = convolutions.Timed(LAYER, "float32", "forward_backward"), convolutions.contestants
    device = torch.device("cpu")
    assert set(convolutions.calls(case, device, ["cpu"], [])) == {"cpu", "cpu_channels_last"}

    def contestants(*arguments):
        found = right(*arguments)
        found = {key: found[key.replace("compile", "crop")] for key in found}  # compiling takes long
        function, *others = found[name]
        return found | {name: (lambda *inputs: 1.01 * function(*inputs), *others)}

    monkeypatch.setattr(convolutions, "contestants", contestants)
    with pytest.raises(AssertionError, match=f"^{name}: output or gradient 0 is off"):
        convolutions.calls(case, device, ["cpu"], convolutions.RIVALS)


def test_contestants_on_a_gpu(monkeypatch):
    """The kernels over TMA boxes where they take a layer, and rivals with and without a search for plans."""
    case = convolutions.Timed(LAYER, "bfloat16", "d_weight", "cuda")
    rest = torch.device("cpu"), ["triton"], convolutions.RIVALS
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    found = convolutions.calls(case, *rest)
    names = {"triton", "eager", "full", "crop", "crop_sliced", "crop_sliced_benchmark"}
    both = {name + suffix for name in names for suffix in ("", "_channels_last")} | {"full_benchmark_channels_last"}
    assert set(found) == both
    assert set(convolutions.timed_by("host", found)) == {name for name in both if "benchmark" not in name}
    assert case.timings == ("events", "graph") and case.bytes_moved == 2 * (50 * 12 + 4 * 8 * 5)
    cudnn = torch.backends.cudnn
    settings = convolutions.searched(torch.bfloat16)
    searched = convolutions.within(lambda: (cudnn.benchmark, cudnn.conv.fp32_precision), settings)
    assert searched() == (True, "ieee") and (cudnn.benchmark, cudnn.conv.fp32_precision) == (False, "tf32")

    kernels = importlib.import_module("fastelbo.kernels.masked_conv2d")
    right, calls, late = convolutions.contestants, [], 0

    def contestants(*arguments):
        found = right(*arguments)

        def over_boxes(x, *others):  # what they take lies in channels last
            calls.append(kernels.boxes.convolution(x, x.is_contiguous(memory_format=torch.channels_last)))
            return found["eager"][0](x, *others) * (1 + 2**-7 * (len(calls) == late))

        return {name: (over_boxes if "tma" in name else one[0], *one[1:]) for name, one in found.items()}

    boxes = types.SimpleNamespace(convolution=lambda x, takes: [x] if takes else None, weight_gradient=None)
    monkeypatch.setitem(sys.modules, "fastelbo.kernels.masked_conv2d_tma", boxes)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(convolutions, "contestants", contestants)
    case, rest = dataclasses.replace(case, pass_="forward"), (*rest[:2], ("eager",))
    ours = {"triton", "triton_channels_last", "tma_channels_last"}
    assert set(convolutions.calls(case, *rest)) == ours | {"eager", "eager_channels_last"}
    assert kernels.boxes is None and len(calls) == 1 + 1 + convolutions.RUNS
    late = 2 * len(calls)
    with pytest.raises(AssertionError, match=r"^tma_channels_last: other bits in another run"):
        convolutions.calls(case, *rest)
