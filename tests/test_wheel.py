"""What a release ships: a complete source distribution, a wheel for every Python, libraries for older systems."""

import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GLIBC = re.search(r"FASTELBO_GLIBC=(\S+)", (ROOT / "Makefile").read_text())[1]  # what make wheel builds for


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("older_glibc", ROOT / "tools" / "older_glibc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def too_new(library):
    """The functions and variables that a library asks for of glibc versions newer than GLIBC."""
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "-W", library], text=True)
    found = re.findall(r" UND (\w+)@GLIBC_([\d.]+)", symbols)
    assert found
    return {name for name, version in found if [*map(int, version.split("."))] > [*map(int, GLIBC.split("."))]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Paths of an sdist, and of a wheel that is packed from it without compiling."""
    folder = tmp_path_factory.mktemp("distributions")
    checkout, unpacked = folder / "checkout", folder / "unpacked"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "*.so", "*.egg-info", "benchmarks", "docs")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    for litter in ("kernels/__pycache__/philox.cpython-311.pyc", "csrc/cpu/host.o", "fastelbo/_cpu.so"):
        (checkout / litter).parent.mkdir(exist_ok=True)
        (checkout / litter).touch()

    def setup(cwd, *commands):
        environment = {**os.environ, "FASTELBO_CUDA": "0"}
        command = [sys.executable, "setup.py", "-q", *commands, "--dist-dir", folder]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    setup(checkout, "sdist")
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    setup(*unpacked.iterdir(), "build_py", "bdist_wheel", "--skip-build")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def below(folder, *patterns):
    return {str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / folder).rglob(pattern)}


def test_source_distribution_has_all_that_a_build_needs_and_no_more(packed):
    with tarfile.open(packed[0]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    sources = (
        below("csrc", "*.h", "*.cpp", "*.cu", "*.cuh", "*.ninja") | below("kernels", "*.py") | below("fastelbo", "*.py")
    )
    sources = {name for name in sources if not name.startswith("fastelbo/kernels/")}
    assert len(sources) > 60
    sources |= {"fastelbo/py.typed", "setup.py", "pyproject.toml", "LICENSE", "README.md", "tools/older_glibc.py"}
    made = {"PKG-INFO", "setup.cfg", "MANIFEST.in", "constraints.txt"}
    assert {name for name in names if not name.startswith("fastelbo.egg-info/")} == sources | made


def test_wheel_holds_the_package_alone(packed):
    with zipfile.ZipFile(packed[1]) as archive:
        names = set(archive.namelist())
    modules = {name for name in below("fastelbo", "*.py") if not name.startswith("fastelbo/kernels/")}
    modules |= {f"fastelbo/{name}" for name in below("kernels", "*.py")}
    info = {name for name in names if ".dist-info/" in name}
    assert names - info == modules | {"fastelbo/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_wheel_is_for_every_python_and_one_platform(packed):
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert packed[1].name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(packed[1]) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/WHEEL"))
    assert "Root-Is-Purelib: false" in metadata


@pytest.mark.parametrize("name", ["_cpu.so", "_cuda.so"])
def test_nothing_in_the_libraries_needs_a_newer_glibc(tool, name):
    library = ROOT / "fastelbo" / name
    if name == "_cuda.so" and not library.exists():
        pytest.skip("fastelbo/_cuda.so is not there: no nvcc when fastelbo was built, or FASTELBO_CUDA=0")
    older = {}
    for glibc in ("libc.so.6", "libm.so.6"):
        path = subprocess.check_output([*tool.COMPILER, f"-print-file-name={glibc}"], text=True).strip()
        older |= tool.versions(path, GLIBC)
    for symbol in too_new(library):
        assert symbol in older and tool.number(older[symbol][1]) <= tool.number(GLIBC), symbol


def test_what_is_linked_for_an_older_glibc_runs_here(tool, tmp_path):
    """Threads moved to another library in glibc 2.34, and exp got a new version in 2.29."""
    source, library = tmp_path / "threads.cpp", tmp_path / "threads.so"
    source.write_text(
        """
        #include <cmath>
        #include <pthread.h>
        static void* run(void* x) { *(double*)x = std::exp(*(double*)x); return x; }
        extern "C" double exp_in_a_thread(double x) {
          pthread_t thread;
          if (pthread_create(&thread, nullptr, run, &x) || pthread_join(thread, nullptr)) return NAN;
          return x;
        }
        """
    )
    subprocess.run([sys.executable, tool.__file__, GLIBC, tmp_path / "glibc"], check=True)
    options = ["-shared", "-fPIC", "-pthread", f"-L{tmp_path / 'glibc'}", "-lc_older", "-lm_older"]
    subprocess.run([*tool.COMPILER, source, *options, "-o", library], check=True)
    assert too_new(library) == set()
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "-W", library], text=True)
    assert not re.findall(r" GLOBAL .* UND \w+$", symbols, re.M), "a symbol without a version may be any"
    function = ctypes.CDLL(str(library)).exp_in_a_thread
    function.argtypes, function.restype = [ctypes.c_double], ctypes.c_double
    assert function(1.5) == pytest.approx(math.exp(1.5), rel=1e-15)
