"""Builds fastelbo's compiled libraries with ninja; everything else about the package is in pyproject.toml.

The libraries talk to torch through its stable C interface and to Python not at all, so one build serves every Python
and every torch from 2.10 on. They are plain shared libraries, loaded with torch.ops.load_library.

build/torch-<version>/ keeps what is compiled, in a folder for each set of options. All builds of a checkout share it:
ninja compiles what a source, a header, an option or a compiler has changed for, by the rules of csrc/rules.ninja.

Environment:
    CXX                   the C++ compiler; c++ if unset. The CPU library takes CPPFLAGS, CXXFLAGS and LDFLAGS, too
    MAX_JOBS              how many files to compile at a time; the number of processors if unset
    FASTELBO_CUDA         auto (the default): CUDA kernels where nvcc is, GPU or not; 1: fail without it; 0: none
    TORCH_CUDA_ARCH_LIST  GPUs to compile for, 8.0 or newer; "8.0;9.0;10.0+PTX" if unset
    FASTELBO_GLIBC        the glibc to run on, as in 2.28, for wheels (make wheel); this machine's if unset
    FASTELBO_SANITIZE     sanitizers for the CPU library, as in address,undefined (tests/test_sanitizers.py)
"""

import fcntl
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


def setting(name, default, pattern, rule):
    """An environment variable's value; empty is unset."""
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        sys.exit(f"{name} must {rule}; got {value!r}")
    return value


def words(name, default=""):
    """An environment variable that is a command or a part of one, as ninja spells it."""
    return shlex.join(shlex.split(os.environ.get(name) or default)).replace("$", "$$")


def find(program, folder):
    """A program's path: in the folder, or else on the PATH."""
    return shutil.which(program, path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")


def version(compiler):
    """What a compiler calls itself."""
    try:
        return re.search(r".*\d\.\d.*", subprocess.check_output([*shlex.split(compiler), "--version"], text=True))[0]
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"fastelbo's build needs a compiler, and {compiler} does not run: {error}")


try:
    BUILD = f"build/torch-{metadata.version('torch')}"
except metadata.PackageNotFoundError:
    sys.exit("fastelbo's build needs torch: pip install 'torch>=2.10', then pip install --no-build-isolation .")
JOBS = setting("MAX_JOBS", str(os.cpu_count() or 1), r"[1-9]\d*", "be a number from 1 on")
CUDA = setting("FASTELBO_CUDA", "auto", "auto|0|1", "be auto, 0 or 1")
GLIBC = setting("FASTELBO_GLIBC", "", r"(\d+\.\d+)?", "be a version, as in 2.28")
SANITIZE = setting("FASTELBO_SANITIZE", "", "[a-z,-]*", "list sanitizers, as in address,undefined")
CXX = words("CXX", "c++")
LIBRARIES = {"fastelbo._cpu": ("sanitized" if SANITIZE else "cpu", SANITIZE, "common/*.cpp", "cpu/*.cpp")}
NVCC = find("nvcc", f"{os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH') or '/usr/local/cuda'}/bin")
if not NVCC and CUDA == "1":
    sys.exit("FASTELBO_CUDA=1, but nvcc is neither in CUDA_HOME nor on the PATH")
if not NVCC and CUDA == "auto":
    print("fastelbo: no nvcc, so the CUDA kernels are left out")
if NVCC and CUDA != "0":
    NUMBER, RULE = r"(8|9|\d\d+)\.\d[af]?(\+PTX)?", "list numbers from 8.0 on, as in 8.0;9.0+PTX"
    GPUS = setting("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX", f"{NUMBER}([;, ]+{NUMBER})*", RULE)
    LIBRARIES["fastelbo._cuda"] = ("cuda", re.sub("[;, ]+", "-", GPUS), "common/*.cpp", "cuda/*.cu")


def variables():
    """What csrc/rules.ninja leaves open."""
    yield f"folder = {BUILD}\nglibc = {GLIBC}\nsanitize = {SANITIZE}\npython = {shlex.quote(sys.executable)}"
    yield f"cxx = {CXX}\ncxx_version = {version(CXX)}"
    yield from (f"{name.lower()} = {words(name)}" for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS"))
    if "fastelbo._cuda" in LIBRARIES:
        host = f" -ccbin={shlex.split(CXX)[-1]}" if os.environ.get("CXX") else ""  # it takes no ccache
        yield f"nvcc = {shlex.quote(NVCC)}{host}\nnvcc_version = {version(shlex.quote(NVCC))}"
        gpus = [(major + minor, ptx) for major, minor, ptx in re.findall(r"(\d+)\.(\w+)(\+PTX)?", GPUS)]
        codes = [(gpu, f"sm_{gpu}") for gpu, _ in gpus] + [(gpu, f"compute_{gpu}") for gpu, ptx in gpus if ptx]
        yield "gpus = " + " ".join(f"-gencode=arch=compute_{gpu},code={code}" for gpu, code in codes)


def library(rule, options, *patterns):
    """The path of a library, and how ninja makes it of what matches in csrc."""
    folder = f"{BUILD}/{rule}-{options}".rstrip("-")
    sources = {source for pattern in patterns for source in Path("csrc").glob(pattern)}
    sources = sorted(sources, key=lambda source: (-source.stat().st_size, source))  # the largest take longest
    objects = {f"{folder}/{source.parent.name}/{source.stem}.o": source for source in sources}
    older = [f"{BUILD}/glibc-{GLIBC}/lib{name}_older.so" for name in "cm" if GLIBC]
    path = f"{folder}/library{GLIBC}.so"
    rules = [f"build {out}: {rule} {source}" for out, source in objects.items()]
    return path, "\n".join([*rules, f"build {path}: link_{rule} {' '.join([*objects, *older])}", f"default {path}\n"])


class BuildLibraries(build_ext):
    def build_extensions(self):
        self.force = True  # to copy: ninja knows what is new
        ninja = find("ninja", f"{sys.prefix}/bin") or sys.exit("fastelbo's build needs ninja: pip install ninja")
        libraries = {name: library(*parts) for name, parts in LIBRARIES.items()}
        rules = [*variables(), "include csrc/rules.ninja", *(rules for _, rules in libraries.values())]
        Path(BUILD).mkdir(parents=True, exist_ok=True)
        Path(BUILD, "torch").unlink(missing_ok=True)
        Path(BUILD, "torch").symlink_to(Path(util.find_spec("torch").origin).parent)
        Path(BUILD, "build.ninja").write_text("\n".join(rules))
        print(f"fastelbo: building {' and '.join(LIBRARIES)} in {BUILD}", flush=True)
        running = subprocess.Popen([ninja, "-f", f"{BUILD}/build.ninja", f"-j{JOBS}"])
        try:
            failed = running.wait()
        except KeyboardInterrupt:
            running.wait()  # until it has taken away what is half written
            raise
        if failed:
            sys.exit("fastelbo: ninja failed, as it says above")
        Path(self.get_ext_fullpath("fastelbo._cuda")).unlink(missing_ok=True)  # an earlier build may have had it
        for name, (path, _) in libraries.items():
            Path(self.get_ext_fullpath(name)).parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(path, self.get_ext_fullpath(name))

    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".so"  # no Python tag: the library does not know Python


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


Path("build").mkdir(exist_ok=True)
with Path("build/lock").open("w") as lock:
    try:  # builds of a checkout write into the same folders, and ninja has no lock of its own
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("fastelbo: waiting for another build of this folder", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    setup(
        packages=["fastelbo", *(f"fastelbo.{name}" for name in ("compat", "kernels", "ops", "reference", "sampling"))],
        package_dir={"fastelbo.kernels": "kernels"},
        ext_modules=[Extension(name, []) for name in LIBRARIES],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
    )
