"""The choice of a backend, its override, and the report of python -m fastelbo."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastelbo
from fastelbo import _extension, backends

CPU = torch.device("cpu")


def run(code, **environment):
    """Runs a Python program in a fresh process; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_automatic_choice_is_the_compiled_library():
    assert backends.choose(CPU) == "cpu"
    assert backends.choose(torch.device("meta")) == "reference"


def test_explicit_choice_never_falls_back():
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot run this input \(cuda: "):
        backends.choose(CPU, "cuda")
    with pytest.raises(
        NotImplementedError, match="cpu: it runs tensors on cpu, these are on meta; reference: can run it"
    ):
        backends.choose(torch.device("meta"), "cpu")
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda; got 'gpu'"):
        fastelbo.gaussian_kl(torch.zeros(3), torch.zeros(3), backend="gpu")


def test_noise_that_wants_a_gradient_gets_one():
    mean, noise = torch.zeros(3), torch.randn(3, requires_grad=True)
    z = fastelbo.gaussian_rsample(mean, torch.full((3,), 2.0), scale="std", noise=noise)
    assert torch.equal(torch.autograd.grad(z.sum(), noise)[0], torch.full((3,), 2.0))
    with pytest.raises(NotImplementedError, match="only the reference passes a gradient to noise"):
        fastelbo.gaussian_rsample(mean, mean, noise=noise, backend="cpu")


def test_environment_overrides_the_default_only():
    code = "import torch, fastelbo; d = torch.device('cpu'); print(fastelbo.backends.choose(d), {}"
    assert run(code.format("fastelbo.backends.choose(d, 'cpu'))"), FASTELBO_BACKEND="reference") == "reference cpu"


def test_missing_library_leaves_the_reference(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "_extension.py"))
    monkeypatch.setattr(_extension, "_FAILURES", {})
    monkeypatch.setattr(backends, "_MISSING", {name: backends.usable(name) for name in ("cpu", "triton", "cuda")})
    assert "was not built" in backends.usable("cpu")
    assert backends.fastest()["cpu"] == "reference"
    (tmp_path / "_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_FAILURES", {})
    assert "_cpu.so does not load with torch" in backends.usable("cpu")


def test_gpus_take_triton_until_rows_say_otherwise():
    code = "import torch, fastelbo; print(fastelbo.backends.choose(torch.device('cuda')))"
    assert run(code, TRITON_INTERPRET="0") == "triton"


@pytest.mark.parametrize(("version", "reason"), [(None, "triton is not installed"), ("3.5.1", "needs 3.6 or newer")])
def test_triton_that_is_missing_or_old(monkeypatch, version, reason):
    def find(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    assert reason in backends.usable("triton")


@pytest.mark.skipif(backends.why_not("triton", CPU) is not None, reason="Triton runs on this machine's GPU")
def test_a_failing_launch_names_its_op(monkeypatch):
    def fail(*arguments):
        raise ValueError("no such kernel")

    monkeypatch.setattr(fastelbo._library, "_triton_kernel", lambda name: fail)
    with pytest.raises(RuntimeError, match="gaussian_kl_fwd failed in Triton on cpu: no such kernel"):
        fastelbo.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend="triton")


def test_report_names_every_backend():
    done = subprocess.run([sys.executable, "-m", "fastelbo"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for expected in (
        fastelbo.__version__,
        torch.__version__,
        "reference plain torch",
        "cpu       C++",
        "triton",
        "cuda",
    ):
        assert expected in done.stdout


def test_import_does_not_load_triton():
    assert run("import sys, fastelbo; print('triton' in sys.modules)") == "False"


def test_first_call_may_be_inside_a_compiled_function():
    code = """
import torch, fastelbo
kl = torch.compile(fastelbo.gaussian_kl, fullgraph=True, backend="aot_eager")
print(kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist())
"""
    assert run(code) == "[0.0, 0.0]"


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_set_can_be_lowered(isa):
    best = run("import fastelbo; fastelbo.backends.usable('cpu'); print(fastelbo.backends.cpu_isa())")
    lowered = run(
        "import fastelbo; fastelbo.backends.usable('cpu'); print(fastelbo.backends.cpu_isa())", FASTELBO_CPU_ISA=isa
    )
    assert lowered == ("portable" if isa == "portable" or best == "portable" else "AVX2")


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_ops_pass_their_tests_on_lesser_processors(isa):
    names = ("gaussian_kl", "gaussian_log_prob", "gaussian_rsample", "gaussian_rsample_kl", "scale")
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTELBO_CPU_ISA": isa},
        check=False,
    )
    assert done.returncode == 0, done.stdout
