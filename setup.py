"""Builds fastelbo's compiled libraries; everything else about the package is in pyproject.toml.

The libraries talk to torch through its stable C interface and to Python not at all, so one build serves every Python
and every torch from 2.10 on. They are plain shared libraries, loaded with torch.ops.load_library.

Environment:
    CXX                   the C++ compiler
    MAX_JOBS              how many files to compile at a time; the number of processors if unset
    FASTELBO_CUDA         auto (the default): CUDA kernels where nvcc is found; 1: fail without it; 0: none
    TORCH_CUDA_ARCH_LIST  GPUs to compile for, 8.0 or newer; "8.0;9.0;10.0+PTX" if unset
    FASTELBO_GLIBC        the glibc to run on, as in 2.28, for wheels (make wheel); this machine's if unset
    FASTELBO_SANITIZE     sanitizers for the CPU library, as in address,undefined (tests/test_sanitizers.py)
"""

import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

try:
    import torch
except ImportError:
    sys.exit(
        "fastelbo's build needs torch >= 2.10 for its headers: pip install torch first, then\n"
        "    pip install --no-build-isolation ."
    )

TORCH = Path(torch.__file__).parent
TORCH_TARGET = "0x020a000000000000"  # 2.10: the oldest torch whose stable interface has all we call


def sanitizers() -> "list[str]":
    """GCC's options for FASTELBO_SANITIZE."""
    wanted = os.environ.get("FASTELBO_SANITIZE")
    if not wanted:
        return []
    return [
        f"-fsanitize={wanted}",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-fno-wrapv",  # Python may have been built with -fwrapv, which takes the checks of signed overflow out
        "-O1",
        "-g1",
        # Inlined as deeply as our loops are, these checks would take the compiler a quarter of an hour. A null pointer
        # faults without them, and the types that vptr looks up are libtorch's.
        "-fno-sanitize=null,object-size,vptr",
        "-fno-sanitize-address-use-after-scope",
        "--param=asan-instrumentation-with-call-threshold=0",
    ]


SANITIZE = sanitizers()


def sources(*patterns: str) -> "list[str]":
    """Of csrc, the largest with their headers first: they take longest."""

    def size(path):
        return sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))

    found = {path for pattern in patterns for path in Path("csrc").glob(pattern)}
    return [str(path) for path in sorted(found, key=lambda path: (-size(path), path))]


def cpu_library() -> Extension:
    return Extension(
        "fastelbo._cpu",
        sources=sources("common/*.cpp", "cpu/*.cpp"),
        depends=[*sources("*/*.h"), __file__],
        include_dirs=[str(TORCH / "include")],
        library_dirs=[str(TORCH / "lib")],
        libraries=["torch_cpu", "c10"],
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-g0",  # Python may have been built with -g, which makes the library five times as large
            "-ffp-contract=off",  # fused multiply-add only where the source says so: the same bits everywhere
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",  # vectors never cross a library's boundary
            "-Wno-maybe-uninitialized",  # GCC 12 warns of its own intrinsics
            "-Wno-unknown-pragmas",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            *SANITIZE,
        ],
        extra_link_args=SANITIZE[:1],
    )


def find_nvcc() -> "str | None":
    """nvcc, whether or not a GPU is visible: containers and CI have none."""
    wanted = os.environ.get("FASTELBO_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FASTELBO_CUDA must be auto, 0 or 1; got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if nvcc is None and wanted == "1":
        sys.exit("FASTELBO_CUDA=1, but nvcc is neither in CUDA_HOME nor on the PATH")
    if nvcc is None:
        print("fastelbo: no nvcc, so the CUDA kernels are left out")
    return nvcc


def gpu_targets() -> "list[str]":
    """nvcc's options for TORCH_CUDA_ARCH_LIST."""
    options = []
    for arch in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0;10.0+PTX"):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not found or int(found[1]) < 8:
            sys.exit(f"TORCH_CUDA_ARCH_LIST must list numbers from 8.0 on, as in 8.0;9.0+PTX; got {arch!r}")
        number = found[1] + found[2]
        kinds = ["sm", "compute"] if found[3] else ["sm"]
        options += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return options


def cuda_library() -> Extension:
    return Extension(
        "fastelbo._cuda",
        sources=sources("cuda/*.cu", "common/*.cpp"),
        depends=sources("*/*.h", "cuda/*.cuh"),
        extra_compile_args=[
            *gpu_targets(),
            "-std=c++17",
            "-O3",
            "-fmad=false",  # fused only where the source says so: forward and backward draw the same noise
            "-Xcompiler=-fPIC,-fvisibility=hidden,-g0",
            f"-I{TORCH / 'include'}",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            "-DUSE_CUDA",
        ],
    )


class BuildLibraries(build_ext):
    def run(self):
        for extension in self.extensions:
            print(f"fastelbo: building {extension.name} against torch {torch.__version__}:")
            print("  " + ", ".join(extension.sources))
        super().run()

    def get_ext_filename(self, name):
        return name.replace(".", os.sep) + ".so"  # no Python tag: the library does not know Python

    def get_export_symbols(self, extension):
        return []

    def build_extension(self, extension):
        if extension.name == "fastelbo._cuda":
            return self.build_cuda(extension)
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            return [o for objects in self.in_parallel(lambda s: compile_one([s], **options), sources) for o in objects]

        extension.extra_link_args += self.older_glibc()
        self.compiler.compile = compile_all
        try:
            super().build_extension(extension)
        finally:
            self.compiler.compile = compile_one

    def build_cuda(self, extension):
        library, folder = Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp, "cuda")
        newest = max(Path(file).stat().st_mtime for file in [*extension.sources, *extension.depends, __file__])
        if library.exists() and library.stat().st_mtime > newest and not self.force:
            return
        nvcc = [NVCC, f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else [NVCC]

        def compile_one(source):
            out = folder / Path(source).with_suffix(".o")
            out.parent.mkdir(parents=True, exist_ok=True)
            self.spawn([*nvcc, *extension.extra_compile_args, "-c", source, "-o", str(out)])
            return str(out)

        # The library takes its symbols from whatever libtorch_cuda.so is loaded, and torch without CUDA has none to
        # link against: an empty library of that name stands in. cudart is linked in: torch's may be of another CUDA.
        folder.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        stub, name = folder / "stub.cpp", "libtorch_cuda.so"
        stub.write_text("")
        self.spawn([*nvcc, "-shared", "-cudart=none", f"-Xlinker=-soname={name}", str(stub), "-o", str(folder / name)])
        objects = self.in_parallel(compile_one, extension.sources)
        # as -l options, which nvcc leaves behind --no-as-needed, where it moves files ahead of it
        libraries = ["-Xlinker=--no-as-needed", f"-L{folder}", "-ltorch_cuda"]
        libraries += [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", *self.older_glibc()]
        self.spawn([*nvcc, "-shared", "-cudart=static", *objects, *libraries, "-o", str(library)])

    def older_glibc(self):
        # Before glibc 2.34 threads and dlopen lie in libraries of their own, which are there once libtorch_cpu.so is.
        if not os.environ.get("FASTELBO_GLIBC"):
            return []
        folder = Path(self.build_temp, "glibc")
        self.spawn([sys.executable, "tools/older_glibc.py", os.environ["FASTELBO_GLIBC"], str(folder)])
        return [f"-L{folder}", "-lc_older", "-lm_older"]

    def in_parallel(self, function, items):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            return list(pool.map(function, items))


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


NVCC = find_nvcc()

setup(
    packages=["fastelbo", *(f"fastelbo.{name}" for name in ("compat", "kernels", "ops", "reference", "sampling"))],
    package_dir={"fastelbo.kernels": "kernels"},
    ext_modules=[cpu_library(), *([cuda_library()] if NVCC else [])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
