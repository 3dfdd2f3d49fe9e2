"""Every kind of call of the Gaussian ops compiles: on the oldest Triton that is supported, and on the one installed."""

import itertools
import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_triton_calls.py")
CAPABILITIES = (80, 90, 100)
MOST_STACK = (
    8  # ptxas sets itself a limit of registers, and rarely leaves one value of a float64 kernel on the stack for it
)
MOST_REGISTERS = 200  # at four warps a program two programs fit a multiprocessor, whatever is asked


def compiled(tritons, capabilities, strength, *ops):
    """What the script says, for each version and capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def compile_with(version, capability):
        folder = tritons[version]
        done = subprocess.run(
            [sys.executable, SCRIPT, str(capability), str(strength), *ops],
            env=environment if folder is None else {**environment, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["triton"] == version
        return found["calls"]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(
            itertools.product(tritons, capabilities),
            pool.map(compile_with, *zip(*itertools.product(tritons, capabilities), strict=True)),
            strict=True,
        ))  # fmt: skip


def check(found):
    for machine, calls in found.items():
        failed = [f"{call}: {what['error']}" for call, what in calls.items() if "error" in what]
        assert not failed, (machine, failed)
        spilt = [(call, what) for call, what in calls.items() if what["stack"] > MOST_STACK or what["local"]]
        assert not spilt, (machine, spilt)
        narrowed = [(call, what["narrowed"]) for call, what in calls.items() if what["narrowed"]]
        assert not narrowed, (machine, narrowed)
        greedy = [(call, what["reg"]) for call, what in calls.items() if what["reg"] > MOST_REGISTERS]
        assert not greedy, (machine, greedy)


@pytest.mark.parametrize("strength", [1, 2])
def test_coverings_cover(strength):
    script = runpy.run_path(str(SCRIPT))
    for options in script["OPTIONS"].values():
        calls = list(script["covering"](options, strength))
        for some in itertools.combinations(options, strength):
            found = {tuple(call[name] for name in some) for call in calls}
            assert found == set(itertools.product(*(options[name] for name in some)))


def test_every_value_of_every_option_compiles(tritons):
    check(compiled(tritons, (90,), 1, "gaussian_rsample_kl", "gaussian_log_prob"))  # which have all options


@pytest.mark.slow
def test_every_pair_of_values_compiles(tritons):
    check(compiled(tritons, CAPABILITIES, 2))
