"""The choice of a backend, its override, and the report of python -m fastelbo."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_python
import pytest
import torch
from ops import GAUSSIAN

import fastelbo
import fastelbo.kernels
from fastelbo import backends

CPU = torch.device("cpu")


def run(code, **environment):
    """What a Python program prints in a fresh process."""
    return fresh_python.run(code, **environment).stdout.strip()


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


@pytest.fixture
def copied(tmp_path):
    """A copy of the package, less its CUDA library."""
    package, kernels = (Path(module.__file__).parent for module in (fastelbo, fastelbo.kernels))
    shutil.copytree(package, tmp_path / "fastelbo", ignore=shutil.ignore_patterns("kernels", "_cuda.so"))
    shutil.copytree(kernels, tmp_path / "fastelbo" / "kernels")
    return tmp_path


def report_and_use(folder, code="", ignored=(), before="", **environment):
    """What python -m fastelbo and the code print in the copy, after a KL by default.

    A warning fails, but for those that begin with what is ignored."""
    program = f"""
import runpy, warnings, torch
{before}
warnings.simplefilter("error")
for start in {ignored!r}: warnings.filterwarnings("ignore", start)
import fastelbo
assert fastelbo.__file__.startswith({str(folder)!r})
assert fastelbo.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
runpy.run_module("fastelbo", run_name="__main__")
{code}
"""
    done = fresh_python.run(program, cwd=folder, PYTHONPATH=str(folder), **environment)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (None, "_cpu.so was not built: install fastelbo with a C++ compiler present"),
        (lambda library: b"", "file too short"),
        (lambda library: b"not a library" * 100, "invalid ELF header"),
        # a whole header, and a file that ends inside the code or the data: reading on would be a SIGBUS
        (lambda library: library[:3000], "_cpu.so is cut short, as by an interrupted copy: install fastelbo again"),
        (lambda library: library[: len(library) // 2], "_cpu.so is cut short"),
        (lambda library: library.replace(b"torch_empty_strided", b"torch_empty_striped"), "undefined symbol"),
    ],
    ids=["missing", "empty", "text", "header", "half", "another torch"],
)
def test_library_that_does_not_load_leaves_the_reference(copied, spoil, reason):
    library = copied / "fastelbo" / "_cpu.so"
    contents = library.read_bytes()
    library.unlink()
    if spoil is not None:
        assert spoil(contents) != contents
        library.write_bytes(spoil(contents))
    report = report_and_use(copied, ignored=["fastelbo runs in plain torch, slowly, on tensors of cpu"])
    (line,) = (line for line in report.splitlines() if line.startswith("  cpu       not usable: "))
    assert "_cpu.so" in line and reason in line


def test_package_without_triton(copied):
    without = """
import importlib.metadata, sys
def version(name, version=importlib.metadata.version):
    if name == "triton":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version, sys.modules["triton"] = version, None
"""
    report = report_and_use(copied, before=without)
    assert "triton   not installed" in report
    assert "  triton    not usable: triton is not installed: pip install triton\n" in report


def test_triton_whose_import_fails(copied):
    (copied / "triton").mkdir()
    (copied / "triton" / "__init__.py").write_text("raise OSError('libLLVM.so is missing\\nand more')\n")
    call = "fastelbo.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend='triton')"
    code = f"try: {call}\nexcept RuntimeError as error: print(error)"
    printed = report_and_use(copied, code, TRITON_INTERPRET="1")
    reason = "triton is installed, and importing it fails: OSError: libLLVM.so is missing"
    assert f"  triton    not usable: {reason}\n" in printed
    assert "gaussian_kl_fwd failed in Triton on cpu: libLLVM.so is missing" in printed


@pytest.fixture
def gpu_without_code(monkeypatch):
    """What a GPU's machine shows where the CUDA library loads; returns a dictionary of the GPUs' errors."""
    errors = {}
    monkeypatch.setitem(backends._MISSING, "cuda", None)
    monkeypatch.setitem(backends._DEVICE, "triton", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(backends, "_CUDA_ERROR", lambda index: errors.get(index, 0))
    monkeypatch.setattr(backends, "_FASTEST", {})
    backends._cannot_run.cache_clear()
    yield errors
    backends._cannot_run.cache_clear()


def test_gpus_take_the_fastest_that_runs(gpu_without_code):
    gpu_without_code[1] = 209
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert backends.choose(first) == "cuda"
    assert backends.choose(first, convolution=True) == "triton"
    assert backends.choose(torch.device("cuda")) == "cuda"
    assert backends.choose(second) == "triton"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (35, "the driver of Some GPU (cuda:0) is older than _cuda.so needs"),
        (209, "_cuda.so has no code for Some GPU (cuda:0): install fastelbo with it in TORCH_CUDA_ARCH_LIST"),
        (222, "_cuda.so does not run on Some GPU (cuda:0): CUDA error 222"),
    ],
)
def test_gpu_that_the_cuda_library_cannot_run(gpu_without_code, error, reason):
    gpu_without_code[0] = error
    assert backends.why_not("cuda", torch.device("cuda:0")) == reason
    with pytest.raises(NotImplementedError, match=re.escape(f"(cuda: {reason}; ")):
        backends.choose(torch.device("cuda:0"), "cuda")


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_compiled_function_asks_libraries_before_it_runs(monkeypatch, backend):
    """torch.compile traces no op that returns a number, as the CUDA library's answer is one."""

    class Asked(dict):
        def __getitem__(self, name):
            assert backends._CPU_ISA() >= 0
            return super().__getitem__(name)

    monkeypatch.setattr(backends, "_MISSING", Asked(backends._MISSING))
    monkeypatch.setattr(backends, "_FASTEST", {})
    chosen = torch.compile(
        lambda x: x + (backends.choose(torch.device("cpu"), backend) == "cpu"), fullgraph=True, backend="eager"
    )
    assert chosen(torch.zeros(())) == 1


@pytest.mark.skipif(backends.usable("cuda") is None, reason="the CUDA library loads")
def test_without_the_cuda_library_gpus_take_triton():
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


def test_modules_are_there_once_the_package_is_imported():
    names = ("compat", "distributions", "sampling", "testing")
    assert run(f"import fastelbo; print(*(getattr(fastelbo, name).__name__ for name in {names}))") == " ".join(
        f"fastelbo.{name}" for name in names
    )


def test_first_call_may_be_inside_a_compiled_function():
    code = """
import torch, fastelbo
kl = torch.compile(fastelbo.gaussian_kl, fullgraph=True, backend="aot_eager")
print(kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist())
"""
    assert run(code) == "[0.0, 0.0]"


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_instruction_set_can_be_lowered(isa):
    code = "import fastelbo; fastelbo.backends.usable('cpu'); print(fastelbo.backends.cpu_isa())"
    best, lowered = (run(code, FASTELBO_CPU_ISA=limit) for limit in ("avx512", isa))
    assert lowered == ("portable" if isa == "portable" or best == "portable" else "AVX2")


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_ops_pass_their_tests_on_lesser_processors(isa):
    names = [*sorted({op.file for op in GAUSSIAN.values()}), "scale"]
    files = [Path(__file__).with_name(f"test_{name}.py") for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTELBO_CPU_ISA": isa},
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_missing_library_says_so_once(copied):
    """At the first call that falls back to plain torch, be it in a compiled function."""
    (copied / "fastelbo" / "_cpu.so").unlink()
    program = """
import warnings, torch, fastelbo
m = torch.zeros(2, 3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fastelbo.gaussian_kl(m, m, backend="reference")
    assert not caught
    {first}
    fastelbo.gaussian_kl(m, m), fastelbo.gaussian_rsample(m, m)
    fastelbo.gaussian_kl(m.to("meta"), m.to("meta"))
(warning,) = [w for w in caught if w.category is RuntimeWarning]
print(warning.message)
"""
    for first in ("", "torch.compile(fastelbo.gaussian_kl, backend='eager', fullgraph=True)(m, m)"):
        done = fresh_python.run(program.format(first=first), cwd=copied, PYTHONPATH=str(copied))
        assert done.stdout == (
            "fastelbo runs in plain torch, slowly, on tensors of cpu, because its kernels cannot: cpu: _cpu.so was not "
            "built: install fastelbo with a C++ compiler present (pip install .)\n"
        )


def test_environment_that_names_no_backend_is_named():
    code = """
import torch, fastelbo
try: fastelbo.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))
except {} as error: print(error)
"""
    sentence = "FASTELBO_BACKEND must be one of reference, cpu, triton, cuda; got 'cpp'"
    assert run(code.format("ValueError"), FASTELBO_BACKEND="cpp") == sentence
    sentence = "FASTELBO_BACKEND 'cuda' cannot run this input (cuda: "
    assert run(code.format("NotImplementedError"), FASTELBO_BACKEND="cuda").startswith(sentence)


def test_environment_leaves_alone_what_only_the_reference_runs():
    code = """
import torch, fastelbo
from torch.func import grad, jvp, vmap
m, noise = torch.ones(2, 3), torch.zeros(2, 3, requires_grad=True)
print(vmap(fastelbo.gaussian_kl)(m, m).shape, grad(lambda m: fastelbo.gaussian_kl(m, m).sum())(m).shape)
print(jvp(lambda m: fastelbo.gaussian_kl(m, m), (m,), (m,))[1].shape)
fastelbo.gaussian_rsample(m, m, noise=noise).sum().backward()
print(vmap(lambda x: fastelbo.masked_conv2d(x, torch.ones(1, 1, 3, 3), mask_type="A"))(torch.ones(2, 1, 1, 3, 3)).shape)
print(noise.grad.shape, fastelbo.backends.choose(m.device))
try: vmap(lambda m: fastelbo.gaussian_kl(m, m, backend="cpu"))(m)
except NotImplementedError as error: print(error)
"""
    printed = run(code, FASTELBO_BACKEND="cpu").splitlines()
    assert printed[:2] == ["torch.Size([2, 3]) torch.Size([2, 3])", "torch.Size([2])"]
    assert printed[2:4] == ["torch.Size([2, 1, 1, 3, 3])", "torch.Size([2, 3]) cpu"]
    assert printed[4].startswith("backend 'cpu' cannot run this input (cpu: torch.func transforms run on the reference")


def test_a_torch_that_is_too_old_is_refused():
    code = """
import torch
torch.__version__ = "2.9.1+cpu"
try: import fastelbo
except ImportError as error: print(error)
"""
    assert run(code) == "fastelbo needs torch 2.10 or newer; got 2.9.1+cpu"
