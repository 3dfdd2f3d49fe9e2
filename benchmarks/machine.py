"""What a row says beside its times: the machine, versions and commit, and whether the op's tests pass there."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch

import fastelbo


@functools.cache
def session(device: torch.device) -> dict:
    """What all rows of a session have in common."""
    on_gpu = device.type == "cuda"
    triton = next((found.version for found in importlib.metadata.distributions(name="triton")), "")
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else cpu_model(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else "",
        "triton": triton if on_gpu else "",
        "fastelbo": fastelbo.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "isa": "" if fastelbo.backends.usable("cpu") else fastelbo.backends.cpu_isa(),
    }


def commit() -> str:
    """Of the code that is timed; the environment's FASTELBO_COMMIT where that was installed without its history."""

    def git(*arguments):
        command = ["git", "-C", str(Path(fastelbo.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if os.environ.get("FASTELBO_COMMIT"):
        return os.environ["FASTELBO_COMMIT"]
    # rows that are not committed yet do not make a commit dirty
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor()


def test_failure(op: str, root: Path, only: str = "") -> str:
    """Why an op's tests fail, or an empty string; only: those whose names match, as pytest's -k."""
    path = f"tests/test_{op}.py"
    command = [sys.executable, "-m", "pytest", path, "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-k", only] if only else []
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return "" if run.returncode == 0 else f"{path} fails:\n{(run.stdout + run.stderr)[-2000:]}"


def recorded_failure(op: str, verdict: Path) -> str:
    """Why an op counts as failing by the record of a run of its tests."""
    ran = [
        case
        for case in ElementTree.parse(verdict).iter("testcase")
        if f"test_{op}" in case.get("classname", "").split(".")
    ]
    failed = [case.get("name") for case in ran if case.find("failure") is not None or case.find("error") is not None]
    if failed:
        return f"{len(failed)} of its {len(ran)} tests fail in {verdict}, first {failed[0]}"
    passed = [case for case in ran if case.find("skipped") is None]
    return "" if passed else f"none of its tests ran in {verdict}"
