"""Launches in Triton: later calls go past it, and hand its launchers what it would."""

import gc
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo
from fastelbo import _library

SCRIPT = Path(__file__).with_name("launch_calls.py")


@pytest.fixture(scope="module")
def launched(tritons):
    """What the script says, by Triton's version."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def launch_with(folder):
        path = {} if folder is None else {"PYTHONPATH": str(folder)}
        done = subprocess.run(
            [sys.executable, SCRIPT], env=environment | path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(tritons, pool.map(launch_with, tritons.values()), strict=True))


def test_later_launches_are_what_triton_would_launch(launched):
    """Of every op, with every pair of options, and of convolutions; tensors and compiled kernels are the same ones."""
    for version, found in launched.items():
        assert found["triton"] == version
        assert found["differences"] == []
        assert found["calls"] > 250 and sum(found["launches"].values()) > 500
        kernels = {"_fwd", "_bwd", "convolution", "before_activation", "weight_gradient", "sum_shares", "_horizontal"}
        boxed = {"convolve", "weight_shares", "add_shares"}
        rows = {"convolve_rows"} if version.startswith("3.6.") else set()  # which newer ones are not trusted with
        assert found["launches"].keys() == kernels | boxed | rows


def test_what_triton_compiles_anew_for_shares_no_kernel(launched):
    """Addresses of another alignment, another device, other integers, constants and options."""
    for found in launched.values():
        first, again, others = found["special"][:8], found["special"][8:12], found["special"][12:]
        assert len({*first, *others}) == len(first) + len(others)
        assert again == first[:4]


def test_triton_is_asked_where_it_must_be(launched):
    """By profilers and other hooks, and always where its launchers are not as those we know."""
    for found in launched.values():
        once, always = 1, 3
        want = {"nothing": once, "debug": always, "pre-run hook": always, "unknown launcher": always}
        assert found["asked"] == {**want, "nothing again": once}


def test_later_calls_multiply_as_torch_says(launched):
    for found in launched.values():
        assert found["precisions"] == [["tf32"] * 3, ["ieee"] * 3, ["tf32"] * 3]


# What is remembered of a call


def test_what_decides_a_kernel_tells_calls_apart():
    tensor = torch.zeros(4, 6)
    padded = torch.zeros(25)
    others = [
        tensor.double(), tensor.to("meta"), torch.zeros(4, 7), torch.zeros(6, 4).T, padded[1:].view(4, 6),
        None, 0.0, -0.0, 0, False, "", [0.0], [-0.0], [1.0, 0.0], 1.5, 7, "text",
    ]  # fmt: skip
    assert len({_library._kind(x) for x in (tensor, *others)}) == 1 + len(others)
    assert _library._kind(tensor) == _library._kind(torch.ones(4, 6))


def test_calls_of_one_kind_share_no_tensor(monkeypatch):
    """A later call with other values, one of whose tensors comes twice, is another call."""
    monkeypatch.setattr(_library, "_FOUND", {})
    a, b, c, d = (torch.randn(3, 5) for _ in range(4))
    for tensors in ((a, b, c, b), (a, b, c, d), (b, a, a, c)):
        found = fastelbo.gaussian_kl(*tensors, backend="triton")
        torch.testing.assert_close(found, fastelbo.gaussian_kl(*tensors, backend="reference"))
    assert len(_library._FOUND) == 1


def test_nothing_of_a_call_is_kept(monkeypatch):
    """What is remembered holds no tensor."""
    monkeypatch.setattr(_library, "_FOUND", {})

    def alive():
        gc.collect()
        return sum(type(x) is torch.Tensor for x in gc.get_objects())

    def call():
        mean, s = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
        mask = torch.ones(3, 5, dtype=torch.bool)
        options = {"noise": torch.zeros(3, 5)}, {"seed": 1, "num_samples": 2}
        for keywords in options:
            z, kl = fastelbo.gaussian_rsample_kl(mean, s, mask=mask, **keywords, backend="triton")
            torch.autograd.grad((z.sum(), kl.sum()), (mean, s))
        out = fastelbo.gaussian_log_prob(mean, mean, s[0, 0], backend="triton")
        out = out.sum() + fastelbo.gaussian_rsample(mean, s, backend="triton").sum()
        torch.autograd.grad(out, (mean, s))
        x, weight = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(4, 2, 3, 3, requires_grad=True)
        cond, bias = torch.randn(1, 4, requires_grad=True), torch.randn(4, requires_grad=True)
        keywords = {"mask_type": "B", "activation": "glu", "backend": "triton"}
        y = fastelbo.masked_conv2d(x, weight, bias, cond=cond, **keywords)
        torch.autograd.grad(y.sum(), (x, weight, bias, cond))

    before = alive()
    call()
    assert len(_library._FOUND) >= 10
    assert alive() <= before


def test_what_is_remembered_has_a_limit(monkeypatch):
    monkeypatch.setattr(_library, "_FOUND", {})
    monkeypatch.setattr(_library, "_MOST_FOUND", 3)
    for rows in range(1, 9):
        mean = torch.randn(rows, 2)
        found = fastelbo.gaussian_kl(mean, mean, backend="triton")
        torch.testing.assert_close(found, fastelbo.gaussian_kl(mean, mean, backend="reference"))
        assert 0 < len(_library._FOUND) <= 3


# Past torch's dispatcher


def test_what_listens_to_the_dispatcher_hears_of_every_call(monkeypatch):
    forward = importlib.import_module("fastelbo.ops.masked_conv2d")._FWD["triton"]
    calls, op = [], forward.op
    monkeypatch.setattr(forward, "op", lambda *arguments: calls.append(1) or op(*arguments))
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 3)

    def call(x=x):
        calls.clear()
        y = fastelbo.masked_conv2d(x, weight, mask_type="B", backend="triton")
        torch.testing.assert_close(y, fastelbo.masked_conv2d(x, weight, mask_type="B", backend="reference"))
        return len(calls)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.add(func.name())
            return func(*args, **(kwargs or {}))

    heard = set()
    assert call() == 0
    with Mode():
        assert call() == 1
    assert "fastelbo_triton::masked_conv2d_fwd.kernel" in heard
    with torch.profiler.profile() as profile:
        assert call() == 1
    assert "fastelbo_triton::masked_conv2d_fwd" in {event.name for event in profile.events()}
    assert call(TwoTensor(x, x)) == 1
