"""What setup.py and ninja compile again after a change, and what one build does to another.

A package of three small files is built with stand-ins for torch and nvcc, by a real compiler.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = r"""#!/bin/sh
for word; do
    shift
    case $word in
    --version) echo "stand-in, release 13.0"; exit ;;
    -ccbin=*) echo "${word#-ccbin=}" > "$(dirname "$0")/host" ;;
    -gencode=* | -fmad=* | -Xcompiler=* | -cudart=*) ;;
    -Xlinker=*) set -- "$@" "-Wl,${word#-Xlinker=}" ;;
    *.cu) set -- "$@" -x c++ "$word" ;;
    *) set -- "$@" "$word" ;;
    esac
done
exec c++ -fPIC "$@"
"""
# Compiles b as soon as there is no file "slow".
SLOW = """#!/bin/sh
case "$*" in *-c*cpu/b.cpp*)
    echo half > "$(echo "$*" | sed 's/.* -o //')"
    while [ -e slow ]; do sleep 0.1; done
    ;;
esac
exec c++ "$@"
"""
ALL_CPU = {"c++ csrc/common/host.cpp", "c++ csrc/cpu/a.cpp", "c++ csrc/cpu/b.cpp", "link cpu"}
ALL_CUDA = {"nvcc csrc/common/host.cpp", "nvcc csrc/cuda/c.cu", "link cuda"}


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Checkout:
    """A package to build, with no more in its environment than it needs."""

    def __init__(self, folder):
        self.root, self.torch, self.cuda = folder / "checkout", folder / "site" / "torch", folder / "cuda"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/rules.ninja", "tools/older_glibc.py"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        for name in (
            "fastelbo",
            "kernels",
            *(f"fastelbo/{name}" for name in ("compat", "ops", "reference", "sampling")),
        ):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / name / "__init__.py").touch()
        shutil.copy(ROOT / "fastelbo" / "version.py", self.root / "fastelbo")
        self.write("common/host.cpp", '#include "host.h"\nint host() { return HOST; }\n')
        self.write("common/host.h", "#define HOST 1\n")
        self.write("cpu/a.cpp", '#include "a.h"\n#include <torch/t.h>\nint a() { return A + T; }\n')
        self.write("cpu/a.h", "#define A 1\n")
        self.write("cpu/b.cpp", "int b() { return 1; }\n")
        self.write("cuda/c.cu", '#include "c.cuh"\nint c() { return C; }\n')
        self.write("cuda/c.cuh", "#define C 1\n")
        (self.torch / "include" / "torch").mkdir(parents=True)
        (self.torch / "include" / "torch" / "t.h").write_text("#define T 1\n")
        (self.torch / "lib").mkdir()
        (self.torch / "__init__.py").touch()
        for name in ("torch_cpu", "c10"):
            out = self.torch / "lib" / f"lib{name}.so"
            subprocess.run(["c++", "-shared", "-x", "c++", "/dev/null", "-o", out], check=True)
        self.install_torch("2.10.0")
        program(self.cuda / "bin" / "nvcc", NVCC)

    def write(self, name, text):
        (self.root / "csrc" / name).parent.mkdir(exist_ok=True)
        (self.root / "csrc" / name).write_text(text)

    def install_torch(self, version):
        for old in self.torch.parent.glob("*.dist-info"):
            shutil.rmtree(old)
        info = self.torch.parent / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def start(self, *arguments, **environment):
        ours = ("CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "MAX_JOBS", "TORCH_CUDA_ARCH_LIST", "CUDA_PATH")
        kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("FASTELBO")}
        kept |= {"PYTHONPATH": str(self.torch.parent), "CUDA_HOME": str(self.cuda), **environment}
        command = [sys.executable, *(arguments or ("setup.py", "build_ext"))]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=kept, start_new_session=True, **pipe)

    def build(self, *arguments, **environment):
        """What was compiled and linked."""
        running = self.start(*arguments, **environment)
        said, _ = running.communicate()
        assert running.returncode == 0, said
        return made(said)


def made(said):
    steps = re.findall(r"^\[\d+/\d+\] (.*)", said, re.M)
    assert steps or "no work to do" in said, said
    return {re.sub(r"build/[^/]*/(\w+).*", r"\1", step) for step in steps}


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """For builds that end before they compile."""
    return Checkout(tmp_path_factory.mktemp("untouched"))


def test_a_change_compiles_what_depends_on_it_and_no_more(checkout):
    assert checkout.build() == ALL_CPU | ALL_CUDA
    assert checkout.build() == set()
    checkout.write("cpu/a.h", "#define A 2\n")
    assert checkout.build() == {"c++ csrc/cpu/a.cpp", "link cpu"}
    checkout.write("cuda/c.cuh", "#define C 2\n")
    assert checkout.build() == {"nvcc csrc/cuda/c.cu", "link cuda"}
    checkout.write("common/host.h", "#define HOST 2\n")
    assert checkout.build() == {"c++ csrc/common/host.cpp", "link cpu", "nvcc csrc/common/host.cpp", "link cuda"}
    checkout.write("cpu/d.cpp", "int d() { return 1; }\n")
    assert checkout.build() == {"c++ csrc/cpu/d.cpp", "link cpu"}
    assert checkout.build("setup.py", "bdist_wheel") == set()


def test_options_have_folders_of_their_own(checkout):
    """So that going back compiles nothing."""
    checkout.build()
    assert checkout.build(TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX") == ALL_CUDA
    assert checkout.build(FASTELBO_SANITIZE="undefined") == {
        "c++ csrc/common/host.cpp, sanitized",
        "c++ csrc/cpu/a.cpp, sanitized",
        "c++ csrc/cpu/b.cpp, sanitized",
        "link sanitized",
    }
    assert checkout.build(FASTELBO_GLIBC="2.28") == {"glibc 2.28", "link cpu", "link cuda"}
    checkout.install_torch("2.11.0")
    assert checkout.build() == ALL_CPU | ALL_CUDA
    checkout.install_torch("2.10.0")
    assert checkout.build() == set()


def test_another_compiler_or_other_flags_compile_anew(checkout):
    checkout.build()
    assert checkout.build(CXXFLAGS="-DX='a b'", LDFLAGS="-Wl,-rpath,$ORIGIN") == ALL_CPU
    built = next(checkout.root.glob("build/lib*/fastelbo/_cpu.so"))
    dynamic = subprocess.check_output(["readelf", "-d", built], text=True)
    assert "[$ORIGIN]" in dynamic, dynamic
    assert checkout.build() == ALL_CPU
    launcher = program(checkout.root.parent / "launcher", '#!/bin/sh\nexec "$@"\n')
    assert checkout.build(CXX=f"{launcher} c++") == ALL_CPU | ALL_CUDA
    assert (checkout.cuda / "bin" / "host").read_text() == "c++\n"
    program(launcher, '#!/bin/sh\n[ "$2" = --version ] && echo newer 99.0 && exit\nexec "$@"\n')
    assert checkout.build(CXX=f"{launcher} c++") == ALL_CPU | ALL_CUDA


def test_libraries_are_those_of_the_latest_build(checkout):
    """Without the CUDA library that an earlier one left, and with the variant that is asked for, though it be older."""
    (checkout.root / "csrc" / "cpu" / "b.cpp").write_text("int b() { return X; }\n")
    copies = []
    for flags in ("-DX=1", "-DX=2", "-DX=1"):
        checkout.build("setup.py", "bdist_wheel", CXXFLAGS=flags)
        copies.append(next(checkout.root.glob("build/lib*/fastelbo/_cpu.so")).read_bytes())
    assert copies[0] == copies[2] != copies[1]
    checkout.build("setup.py", "bdist_wheel", CXXFLAGS="-DX=1", FASTELBO_CUDA="0")
    (wheel,) = (checkout.root / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith(".so")] == ["fastelbo/_cpu.so"]


def test_an_interrupted_build_goes_on(checkout):
    environment = {"CXX": str(program(checkout.root.parent / "compiler", SLOW)), "FASTELBO_CUDA": "0", "MAX_JOBS": "2"}
    (checkout.root / "slow").touch()
    running = checkout.start(**environment)
    objects = checkout.root / "build" / "torch-2.10.0" / "cpu"
    half, others = objects / "cpu" / "b.o", [objects / "cpu" / "a.o", objects / "common" / "host.o"]
    deadline = time.monotonic() + 60
    while not (half.exists() and all(path.exists() and path.stat().st_size for path in others)):
        assert time.monotonic() < deadline and running.poll() is None, running.communicate()
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(60) != 0
    assert not half.exists()
    (checkout.root / "slow").unlink()
    assert checkout.build(**environment) == {"c++ csrc/cpu/b.cpp", "link cpu"}


def test_two_builds_at_once_are_both_right(checkout):
    """One waits for the other, and has nothing left to compile."""
    folders = [checkout.root.parent / name for name in ("first", "second")]
    running = [checkout.start("setup.py", "bdist_wheel", "--dist-dir", str(folder)) for folder in folders]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted(made(text) for text in said) == sorted([set(), ALL_CPU | ALL_CUDA])
    contents = []
    for folder in folders:
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1] and {"fastelbo/_cpu.so", "fastelbo/_cuda.so"} < set(contents[0])


def test_a_build_says_that_it_waits(checkout):
    (checkout.root / "build").mkdir()
    with (checkout.root / "build" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = checkout.start()
        assert running.stdout.readline() == "fastelbo: waiting for another build of this folder\n"
    assert made(running.communicate()[0]) == ALL_CPU | ALL_CUDA


def test_a_failure_says_what_failed(checkout):
    checkout.write("cpu/b.cpp", "int b( { return 1; }\n")
    running = checkout.start()
    said, _ = running.communicate()
    assert running.returncode != 0
    assert re.search(r"b\.cpp:1:\d+: error", said) and "fastelbo: ninja failed" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FASTELBO_CUDA": "yes"}, "FASTELBO_CUDA must be auto, 0 or 1; got 'yes'"),
        (
            {"FASTELBO_CUDA": "1", "PATH": "", "CUDA_HOME": "/nonexistent"},
            "nvcc is neither in CUDA_HOME nor on the PATH",
        ),
        (
            {"FASTELBO_CUDA": "auto", "PATH": "", "CUDA_HOME": "/nonexistent"},
            "no nvcc, so the CUDA kernels are left out",
        ),
        (
            {"TORCH_CUDA_ARCH_LIST": "9.0;7.5"},
            "TORCH_CUDA_ARCH_LIST must list numbers from 8.0 on, as in 8.0;9.0+PTX; got",
        ),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a number from 1 on; got '0'"),
        ({"FASTELBO_GLIBC": "old"}, "FASTELBO_GLIBC must be a version, as in 2.28; got 'old'"),
        ({"FASTELBO_SANITIZE": "a b"}, "FASTELBO_SANITIZE must list sanitizers, as in address,undefined; got 'a b'"),
        ({"CXX": "/nonexistent/c++"}, "fastelbo's build needs a compiler, and /nonexistent/c++ does not run"),
        ({"PATH": "", "PREFIX": "/nonexistent"}, "fastelbo's build needs ninja: pip install ninja"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_build_says_what_is_wrong(untouched, environment, message):
    script = """
import os, runpy, sys
sys.prefix, sys.argv = os.environ.get("PREFIX", sys.prefix), ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    said, _ = untouched.start("-c", script, **environment).communicate()
    assert message in said and (message.startswith("no nvcc") or "Traceback" not in said), said


def test_without_torch_it_says_so(untouched):
    script = """
import importlib.metadata, runpy, sys
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version, sys.argv = version, ["setup.py", "build_ext"]
runpy.run_path("setup.py", run_name="__main__")
"""
    said, _ = untouched.start("-c", script).communicate()
    assert said.startswith("fastelbo's build needs torch: pip install 'torch>=2.10'"), said
