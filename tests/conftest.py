"""Fixtures that every test shares."""

import contextlib
import gc
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# ruff: noqa: E402
GPU = torch.cuda.is_available()
if not GPU:  # Triton's interpreter runs the kernels on the CPU; read when they are imported
    os.environ["TRITON_INTERPRET"] = "1"

import fastelbo

if not GPU:
    from triton.runtime import interpreter

    looked_at = set()

    def call(function, *arguments, **named):
        """A device function's call: looks for Triton's language in its module once, where Triton looks in each call."""
        if function.fn.__module__ not in looked_at:
            interpreter._patch_lang(function.fn)
            looked_at.add(function.fn.__module__)
        return function.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call  # the looking is three tenths of the interpreter's time

if workers := int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT", 0)):  # threads of several processes would wait in turns
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))

DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": "cuda" if GPU else "cpu", "cuda": "cuda"}
RUNNABLE = [name for name, device in DEVICES.items() if GPU or device == "cpu"]


# The files that take half of the time, the longest first: what starts last ends last.
LONG = (
    "test_torch_integration", "test_sanitizers", "test_cuda_on_cpu", "test_distributed", "test_triton_build",
    "test_masked_conv2d", "test_course", "test_benchmarks", "test_backends", "test_gaussian_rsample_kl",
    "test_examples",
)  # fmt: skip

END = float(os.environ.get("FASTELBO_TESTS_END", "inf"))  # of the time there is, in seconds since 1970


def pytest_collection_finish():
    gc.freeze()  # the million objects of torch, Triton and the tests themselves, of which none is garbage
    gc.set_threshold(20_000, 20, 20)  # compilers make millions more, few of them in cycles


def pytest_sessionfinish():
    gc.unfreeze()  # nanobind would report what is left at the end as leaked


def pytest_runtest_setup():
    if time.time() > END:
        pytest.fail("there was no time left to run it", pytrace=False)


def pytest_collection_modifyitems(items):
    """Puts long files first, marks some of Triton's cases as slow, and skips what this machine has no compiler for.

    A case of Triton's takes seconds to compile, or as long in the interpreter as hundreds of other backends' do. Of a
    product of three or more parameters every second or third one runs, so that any two values of two of them meet in
    one; of a test that is marked `dispatch` every third, so that each value of each does. Without Python's headers
    (Debian's python3-dev) torch.compile's default backend compiles nothing.
    """
    products: dict[Callable, list] = {}  # of each test: its cases, and the rank of each parameter's value
    ranks: dict[tuple, dict[int, int]] = {}
    for item in items:
        names = [re.split(r"\W+", str(mark.args[0]))[0] for mark in item.iter_markers("parametrize")]
        if dispatch := item.get_closest_marker("dispatch"):
            names = [name for name in item.callspec.params if name not in ("backend", "kernels")]
        if (dispatch or len(names) >= 3) and re.search(r"\btriton\b", item.name):
            known = [(ranks.setdefault((item.function, name), {}), id(item.callspec.params[name])) for name in names]
            products.setdefault(item.function, []).append((item, [r.setdefault(v, len(r)) for r, v in known]))
    for cases in products.values():
        highest = sorted(map(max, zip(*(values for _, values in cases), strict=True)))
        nth = min(1 + sum(highest[:-2]), 3)  # what the others add to any two values comes to that many sums
        if cases[0][0].get_closest_marker("dispatch"):
            nth = 3
        for item, values in cases:
            if sum(values) % nth:
                item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        for item in items:
            if item.get_closest_marker("inductor"):
                item.add_marker(pytest.mark.skip(reason="torch.compile needs Python.h, from python3-dev or the like"))


@contextlib.contextmanager
def at_home(name):
    """With torch's default device the one that a backend is for."""
    reason = fastelbo.backends.usable(name)
    assert reason is None, reason
    # without a mode where it is the default anyway: a mode costs every call of torch's, and test_defaults.py has them
    with torch.device(DEVICES[name]) if DEVICES[name] != "cpu" else contextlib.nullcontext():
        yield name


@pytest.fixture(params=RUNNABLE)
def backend(request):
    """Every backend that this machine can run, at home."""
    with at_home(request.param) as name:
        yield name


@pytest.fixture(params=[name for name in RUNNABLE if name != "reference"])
def kernels(request):
    """Every backend with kernels of its own that this machine can run, at home."""
    with at_home(request.param) as name:
        yield name


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For tensors so tiny that on a busy machine threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tritons():
    """Version to the folder that has it, None for the one installed. The oldest is downloaded once, into build/."""
    oldest = ".".join(map(str, fastelbo.backends._OLDEST_TRITON)) + ".0"
    installed = importlib.metadata.version("triton")
    if installed == oldest:
        return {oldest: None}
    folder = Path(__file__).parents[1] / "build" / f"triton-{oldest}"
    if not folder.exists():
        fresh = folder.with_name(f"{folder.name}.{os.getpid()}")
        options = ["--quiet", "--no-deps", "--target", fresh]
        command = [sys.executable, "-m", "pip", "install", *options, f"triton=={oldest}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"pip cannot install triton {oldest}: {done.stderr.strip().splitlines()[-1]}")
        fresh.rename(folder)
    return {oldest: folder, installed: None}
