"""Builds fastelbo's compiled libraries; everything else about the package is in pyproject.toml.

The libraries talk to torch through its stable C interface and to Python not at all, so one build serves every Python
and every torch from 2.10 on. They are plain shared libraries, loaded with torch.ops.load_library.

Environment:
    CXX       the C++ compiler
    MAX_JOBS  how many files to compile at a time; the number of processors if unset
"""

import os
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


def cpu_library() -> Extension:
    return Extension(
        "fastelbo._cpu",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
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
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                return [o for objects in pool.map(lambda s: compile_one([s], **options), sources) for o in objects]

        self.compiler.compile = compile_all
        try:
            super().build_extension(extension)
        finally:
            self.compiler.compile = compile_one


class Wheel(bdist_wheel):
    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["fastelbo", "fastelbo.ops", "fastelbo.reference", "fastelbo.kernels"],
    package_dir={"fastelbo.kernels": "kernels"},
    ext_modules=[cpu_library()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
