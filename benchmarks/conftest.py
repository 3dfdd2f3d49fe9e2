"""Options of `pytest benchmarks`, and what its cases share: the machine, the tests' verdict, where rows go."""

import ctypes
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds nothing to it

import cases
import rows

import fastelbo

ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    group = parser.getgroup("fastelbo")
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--op", action="append", choices=sorted({case.op for case in cases.CASES}), help="repeatable; default: all")
    add("--shape", action="append", metavar="SIZE", help=f"{', '.join(cases.SIZES)} or a shape as 4096x256; repeatable")
    add("--dtype", action="append", choices=tuple(cases.DTYPES), help="repeatable; default: all")
    add("--rival", action="append", choices=cases.RIVALS, help="repeatable; default: all; copy always runs")
    add("--threads", type=int, help="of torch; default: torch's own choice")
    add("--rounds", type=int, help="samples of each contestant; default: 30, large 10")
    add("--quick", action="store_true", help="3 rounds, nothing large: to see that everything works")
    add("--no-save", action="store_true", help="append no rows to the results")
    add("--results", type=Path, metavar="PATH", help="CSV file; default: benchmarks/results/<device>.csv")
    add("--unverified", action="store_true", help="time ops without running their tests; the rows say so")


def pytest_configure(config):
    config.stash[ROWS] = []
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
    """Of the code that is timed."""

    def git(*arguments):
        command = ["git", "-C", str(Path(fastelbo.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    # rows that are not committed yet do not make a commit dirty
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


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


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    return torch.device(request.config.option.device)


@pytest.fixture(scope="session")
def backends(device) -> list[str]:
    return cases.usable_backends(device)


@pytest.fixture(scope="session")
def save(request, device, backends):
    """Keeps the rows of a case: on disk at once, and for the table."""
    option = request.config.option
    path = option.results or rows.RESULTS / f"{device.type}.csv"
    session = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "torch": torch.__version__,
        "fastelbo": fastelbo.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "verified": "no" if option.unverified else "yes",
    }

    def append(found: list[dict]) -> None:
        now = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
        made = [rows.Row(**session, timestamp=now, **row) for row in found]
        request.config.stash[ROWS].extend(made)
        if not option.no_save:
            rows.append(path, made)

    return append


@pytest.fixture(scope="session")
def broken(request) -> dict[str, str]:
    """Why an op's tests fail, for the ops of this session whose tests do."""
    if request.config.option.unverified:
        return {}
    ops = sorted({item.callspec.params["case"].op for item in request.session.items})
    verdicts = {op: test_failure(op, request.config.rootpath) for op in ops}
    return {op: why for op, why in verdicts.items() if why}


def test_failure(op: str, root: Path) -> str:
    path = Path("tests", f"test_{op}.py")
    if not (root / path).exists():
        return f"{op} has no {path}"
    command = [sys.executable, "-m", "pytest", str(path), "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return "" if run.returncode == 0 else f"{path} fails:\n{(run.stdout + run.stderr)[-2000:]}"


def shapes(option) -> list[tuple[str, tuple[int, int]]]:
    """Sizes and shapes to time; a shape of the user's own comes as both."""
    sizes = option.shape or [name for name in cases.SIZES if not (option.quick and name == "large")]
    return [(size, shape) for size in sizes for shape in cases.SIZES.get(size) or [tuple(map(int, size.split("x")))]]


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    parameters = [
        pytest.param(case, shape, dtype, pass_, id=f"{case.op}-{case.name}-{shape[0]}x{shape[1]}-{dtype}-{pass_}")
        for case in cases.CASES
        if case.op in (option.op or case.op)
        for size, shape in shapes(option)
        if size in case.sizes or size not in cases.SIZES
        for dtype in option.dtype or cases.DTYPES
        for pass_ in case.passes
    ]
    metafunc.parametrize(("case", "shape", "dtype", "pass_"), parameters)


def pytest_terminal_summary(terminalreporter, config):
    if found := config.stash[ROWS]:
        terminalreporter.section("ours, and how many times as long each rival takes")
        terminalreporter.write_line(rows.table(found))
