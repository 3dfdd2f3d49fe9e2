"""Options of `pytest benchmarks`, and what its cases share: the machine, the tests' verdict, where rows go."""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds nothing to it

import cases
import rows

import fastelbo

ROWS, MEMORY_ROWS = pytest.StashKey[list](), pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fastelbo")
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--op", action="append", choices=sorted({case.op for case in cases.CASES}), help="repeatable; default: all")
    sizes = ", ".join(dict.fromkeys(name for sizes in cases.SIZES.values() for name in sizes))
    add("--shape", action="append", metavar="SIZE", help=f"{sizes} or a shape as 4096x256; repeatable; default: all")
    add("--dtype", action="append", choices=tuple(cases.DTYPES), help="repeatable; default: all")
    add("--rival", action="append", choices=cases.RIVALS, help="repeatable; default: all; copy always runs")
    add("--threads", type=int, help="of torch; default: torch's own choice")
    add("--rounds", type=int, help="samples of each contestant; default: 30, large 10")
    add("--quick", action="store_true", help="3 rounds, nothing large: to see that everything works")
    add("--no-save", action="store_true", help="append no rows to the results")
    add("--results", type=Path, metavar="DIR", default=rows.RESULTS, help="of <device>.csv and memory_<device>.csv")
    add("--unverified", action="store_true", help="time ops without running their tests; the rows say so")
    add("--verdict", type=Path, metavar="XML", help="pytest's --junitxml of the ops' tests, run just before")


def pytest_configure(config):
    config.stash[ROWS], config.stash[MEMORY_ROWS] = [], []
    config.option.benchmark_quiet = True  # our table replaces pytest-benchmark's; --benchmark-verbose brings it back
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes glibc keep what is freed, for every contestant alike.

    By default it returns large blocks to the kernel, and the page faults of getting them back cost as much as a kernel
    does: they would be charged to whoever allocates, and not to the copy.
    """
    if platform.system() == "Linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


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


def instruction_set() -> str:
    """Of the cpu backend, once that is loaded."""
    try:
        return fastelbo.backends.cpu_isa()
    except (AttributeError, RuntimeError):
        return ""


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.option.device
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda needs a GPU, and torch finds none", returncode=2)
    return torch.device(name)


@pytest.fixture(scope="session")
def backends(device) -> list[str]:
    return cases.usable_backends(device)


@pytest.fixture(scope="session")
def session(device, backends) -> dict:
    """What all rows of a session have in common; each kind of row takes the fields it has."""
    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name() if on_gpu else cpu_model(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else "",
        "triton": triton_version() if on_gpu else "",
        "fastelbo": fastelbo.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }


def now() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"


@pytest.fixture(scope="session")
def save(request, device, session, backends):
    """Keeps the rows of a case: on disk at once, and for the table."""
    option = request.config.option
    speed = {
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "verified": "no" if option.unverified else "yes",
    }

    def append(found: list[dict]) -> None:
        made = [rows.Row(**session, **speed, timestamp=now(), **row) for row in found]
        request.config.stash[ROWS].extend(made)
        if not option.no_save:
            rows.append(option.results / f"{device.type}.csv", made)

    return append


@pytest.fixture(scope="session")
def save_memory(request, device, session):
    option = request.config.option

    def append(found: list[dict]) -> None:
        made = [rows.MemoryRow(**session, timestamp=now(), **row) for row in found]
        request.config.stash[MEMORY_ROWS].extend(made)
        if not option.no_save:
            rows.append(option.results / f"memory_{device.type}.csv", made)

    return append


@pytest.fixture(scope="session")
def broken(request) -> dict[str, str]:
    """Why an op's tests fail, for the ops of this session whose tests do."""
    option = request.config.option
    if option.unverified:
        return {}
    params = (getattr(item, "callspec", None) for item in request.session.items)
    ops = sorted({found.params["timed"].case.op for found in params if found and "timed" in found.params})
    if option.verdict:
        verdicts = {op: recorded_failure(op, option.verdict) for op in ops}
    else:
        verdicts = {op: test_failure(op, request.config.rootpath) for op in ops}
    return {op: why for op, why in verdicts.items() if why}


def test_failure(op: str, root: Path) -> str:
    path = Path("tests", f"test_{op}.py")
    if not (root / path).exists():
        return f"{op} has no {path}"
    command = [sys.executable, "-m", "pytest", str(path), "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return "" if run.returncode == 0 else f"{path} fails:\n{(run.stdout + run.stderr)[-2000:]}"


def recorded_failure(op: str, verdict: Path) -> str:
    """Why an op counts as failing by the record of a run of its tests."""
    if not verdict.exists():
        return f"{verdict} does not exist: the tests were not run to their end"
    ran = [
        case for case in ElementTree.parse(verdict).iter("testcase") if f"test_{op}" in case.get("classname").split(".")
    ]
    failed = [case.get("name") for case in ran if case.find("failure") is not None or case.find("error") is not None]
    if failed:
        return f"{len(failed)} of its {len(ran)} tests fail in {verdict}, first {failed[0]}"
    passed = [case for case in ran if case.find("skipped") is None]
    return "" if passed else f"none of its tests ran in {verdict}"


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    if "timed" in metafunc.fixturenames:
        found = cases.timed(option.device, option.shape, option.op, option.dtype, option.rival, option.quick)
        metafunc.parametrize("timed", found, ids=map(str, found))
    if "differentiable" in metafunc.fixturenames:
        found = [case for case in cases.CASES if case.lines and case.op in (option.op or case.op)]
        metafunc.parametrize("differentiable", found, ids=[f"{case.op}-{case.name}" for case in found])
        metafunc.parametrize("dtype", option.dtype or (["float32"] if option.device == "cuda" else cases.DTYPES))


def pytest_terminal_summary(terminalreporter, config):
    if found := config.stash[ROWS]:
        terminalreporter.section("ours, and how many times as long each rival takes")
        terminalreporter.write_line(rows.table(found))
    if found := config.stash[MEMORY_ROWS]:
        terminalreporter.section("bytes per element: kept for the backward, and allocated at most in both passes")
        terminalreporter.write_line(rows.memory_table(found))
