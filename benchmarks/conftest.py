"""Options of `pytest benchmarks`, and what its cases share: the tests' verdict, where rows go."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds nothing to it

import cases
import host_clock
import machine
import rows

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
    host_clock.keep_freed_memory()


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
def session(device) -> dict:
    return machine.session(device)


@pytest.fixture(scope="session")
def save(request, device, session, backends):
    """Keeps the rows of a case: on disk at once, and for the table."""
    option = request.config.option
    speed = machine.threads() | {"verified": "no" if option.unverified else "yes"}

    def append(found: list[dict]) -> None:
        made = [rows.Row(**session, **speed, timestamp=machine.now(), **row) for row in found]
        request.config.stash[ROWS].extend(made)
        if not option.no_save:
            rows.append(option.results / f"{device.type}.csv", made)

    return append


@pytest.fixture(scope="session")
def save_memory(request, device, session):
    option = request.config.option

    def append(found: list[dict]) -> None:
        made = [rows.MemoryRow(**session, timestamp=machine.now(), **row) for row in found]
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
        verdicts = {op: machine.recorded_failure(op, option.verdict) for op in ops}
    else:
        verdicts = {op: machine.test_failure(op, request.config.rootpath) for op in ops}
    return {op: why for op, why in verdicts.items() if why}


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
