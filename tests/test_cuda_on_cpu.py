"""The CUDA kernels' own code on a CPU, thread by thread: what a GPU would read, write and add up (not how fast).

A C++ compiler builds csrc/cuda with a stand-in for CUDA (tests/cuda_on_cpu), registered for torch's CPU tensors. The
ops' own tests then run in a process of their own, where this library takes the place of the CPU's kernels.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops import FILES

ROOT = Path(__file__).parent.parent
CXX = shlex.split(os.environ.get("CXX") or "c++")

RUN = """
import sys, pytest, torch
load = torch.ops.load_library
torch.ops.load_library = lambda path: load(sys.argv[1] if path.endswith("_cpu.so") else path)
sys.exit(pytest.main(sys.argv[2:]))
"""


def build(folder, sources, *more):
    """Compiles CUDA sources for a CPU; more: of what the compiler is told. Returns the library."""
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler {CXX[0]}")
    torch_home = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w"]
    flags += [f"-I{ROOT / 'tests' / 'cuda_on_cpu'}", f"-I{torch_home / 'include'}", "-include", "cuda_runtime_api.h"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *more]

    def compile_one(source):
        out = folder / (source.stem + source.suffix + ".o")
        subprocess.run([*CXX, *flags, "-x", "c++", "-c", source, "-o", out], check=True)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        objects = list(pool.map(compile_one, sources))
    path = folder / "cuda_on_cpu.so"
    subprocess.run(
        [*CXX, "-shared", "-o", path, *objects, f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-lc10"], check=True
    )
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("cuda_on_cpu"), [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/common/*.cpp")]
    )


NAMES = [*FILES, "rows", "memory", "sampling", "sampling_networks", "sampling_check"]
# What the kernels compute, but not what is of Python: how a network is traced, and torch.compile.
TRACING = ("default_device", "insides", "alias", "forward_keeps", "hooks", "compile", "one_output_makes")
KERNELS = f"(cpu or opcheck) and not ({' or '.join(TRACING)}) and (not test_memory or layout_changes)"


@pytest.mark.parametrize(
    "chosen",
    [
        KERNELS,
        pytest.param(f"cpu and ({' or '.join(TRACING)}) and not test_memory", marks=pytest.mark.slow),
    ],
    ids=["kernels", "tracing"],
)
def test_ops(library, chosen):
    run(library, NAMES, chosen)


def run(library, names, chosen):
    """The tests of some files that are chosen, with a library in the place of the CPU's kernels."""
    command = [sys.executable, "-c", RUN, library, *(f"tests/test_{name}.py" for name in names), f"--rootdir={ROOT}"]
    command += ["-q", "-m", "not slow", "-k", chosen, "--import-mode=importlib", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
