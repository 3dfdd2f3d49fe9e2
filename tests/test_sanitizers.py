"""The C++ of the cpu backend under AddressSanitizer and UndefinedBehaviorSanitizer: no access outside of a tensor or a
scratch tile, no overflow and no misaligned access goes by unseen while its tests run."""

import functools
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ops import FILES

import fastelbo

ROOT = Path(__file__).parent.parent
SANITIZERS = "address,undefined,float-cast-overflow"
BUILD = ROOT / "build" / "sanitized"
BEST = {"portable": "portable", "AVX2": "avx2", "AVX-512": "avx512"}[fastelbo.backends.cpu_isa()]
QUICKLY = [BEST] if BEST == "portable" else [BEST, pytest.param("portable", marks=pytest.mark.slow)]
PROPERTIES = str(ROOT / "tests" / "test_properties.py")
OPS = [f"test_{name}.py" for name in (*FILES, "scale", "sampling", "sampling_networks", "sampling_check")]

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="Apple's compiler is not the one that setup.py asks")


def runtime(name):
    """The path of a library of the compiler's."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    assert os.path.isabs(found), f"{compiler} has no {name}, without which no sanitized library runs: install it"
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs Python with fastelbo's C++ sanitized; returns what subprocess.run does."""
    # the runtime comes first, and C++'s before the first exception is thrown
    preload = " ".join(runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))

    @functools.cache
    def home(isa):
        """A folder with the package, whose library has the loops of one instruction set: all take thrice as long."""
        flags = f"{os.environ.get('CPPFLAGS', '')} -DFASTELBO_ONLY={isa}"
        environment = {**os.environ, "FASTELBO_SANITIZE": SANITIZERS, "FASTELBO_CUDA": "0", "CPPFLAGS": flags}
        library = BUILD / isa  # another process may build for another one
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(library)]
        built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-4000:]
        folder = tmp_path_factory.mktemp("sanitized")
        package = folder / "fastelbo"
        shutil.copytree(ROOT / "fastelbo", package, ignore=shutil.ignore_patterns("*.so", "kernels", "__pycache__"))
        shutil.copytree(ROOT / "kernels", package / "kernels")
        shutil.copy(library / "fastelbo" / "_cpu.so", package)
        return folder

    def run(*arguments, isa=BEST):
        environment = {
            **os.environ,
            "LD_PRELOAD": preload,
            "PYTHONPATH": str(home(isa)),
            "FASTELBO_CPU_ISA": isa,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has to its end
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "OMP_NUM_THREADS": "2",
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=home(isa), env=environment, capture_output=True, text=True, errors="replace")

    return run


def run_tests(sanitized, *arguments, isa):
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-x"]
    options += ["-s"]  # what a sanitizer says as it ends the process is not for pytest to keep
    result = sanitized("-m", "pytest", *options, *arguments, isa=isa)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[:6000]


PROBE = """
import numpy, torch, fastelbo
print(fastelbo.__file__, fastelbo.backends.cpu_isa(), flush=True)
values = {values}
fastelbo.gaussian_kl(torch.from_numpy(values), 0.0, scale="{scale}", backend="cpu")
print("survived")
"""
WRONG = {
    "heap-buffer-overflow": "numpy.lib.stride_tricks.as_strided(numpy.zeros(16, 'float32'), (64,))",
    "misaligned address": "numpy.frombuffer(bytearray(65), 'float32', 16, 1)",
}


@pytest.mark.parametrize("error", [None, *WRONG])
def test_the_sanitizers_are_on(sanitized, error):
    """They stop a process that reads outside of its memory, and one that reads floats where none can be."""
    result = sanitized("-c", PROBE.format(values=WRONG.get(error, "numpy.zeros(16, 'float32')"), scale="logvar"))
    assert "sanitized" in result.stdout.split("/fastelbo/")[0], result.stdout + result.stderr
    assert ("survived" in result.stdout) == (error is None)
    assert (result.returncode == 0) == (error is None)
    if error is not None:
        assert error in result.stderr and "csrc/cpu/" in result.stderr, result.stderr


@pytest.mark.parametrize("isa", QUICKLY)
def test_properties(sanitized, isa):
    run_tests(sanitized, PROPERTIES, "-m", "not slow", "-k", "not budget", isa=isa)  # memory, not accuracy


@pytest.mark.slow
@pytest.mark.parametrize("isa", dict.fromkeys(["portable", BEST]))
def test_ops(sanitized, isa):
    run_tests(sanitized, *(str(ROOT / "tests" / name) for name in OPS), "-m", "not slow", "-k", "[cpu", isa=isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", dict.fromkeys(["portable", BEST]))
def test_more_properties(sanitized, isa):
    run_tests(sanitized, PROPERTIES, "-m", "slow", "-k", "not budget", isa=isa)
