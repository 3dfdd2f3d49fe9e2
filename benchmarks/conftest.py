"""Options of `pytest benchmarks`, and what its cases share: the tests' verdict, and where rows go."""

import argparse
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import cases
import compare
import convolutions
import dropins
import host_clock
import machine
import pytest
import rows
import sampling
import tables
import torch
from drop_in_cases import DROP_INS

# The most telling first; Pyro, at the drop-ins' end, puts a KL of its own in the place of torch's.
ORDER = ("test_speed", "test_convolutions", "test_sampling", "test_memory", "test_dropins")
OPS = {case.op for case in cases.CASES} | {"masked_conv2d", "sampling"} | {one.op for one in DROP_INS}
RIVALS = tuple(dict.fromkeys((*cases.RIVALS, *convolutions.RIVALS, *sampling.RIVALS)))
ROWS, BASELINE, COMPARED = pytest.StashKey[list](), pytest.StashKey[list](), pytest.StashKey[list]()
STARTED, DONE, FAILURES = pytest.StashKey[float](), pytest.StashKey[set](), pytest.StashKey[dict]()


def at_least(least: int, kind: type) -> Callable:
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be a number of at least {least}, got {text}")
        return value

    return parse


def pytest_addoption(parser):
    group = parser.getgroup(
        "fastelbo",
        "fastelbo: times ours against the rivals, appends rows to CSV files, prints tables; all of it takes tens of "
        "minutes, and an interrupt loses nothing but the case that it stops",
    )
    add = group.addoption
    add("--device", choices=("cpu", "cuda"), default="cpu", help="samplers and drop-ins are timed on the cpu alone")
    add("--op", action="append", choices=sorted(OPS), metavar="OP", help=f"{', '.join(sorted(OPS))}; repeatable")
    sizes = ", ".join(dict.fromkeys(name for sizes in cases.SIZES.values() for name in sizes))
    add(
        "--shape",
        action="append",
        metavar="SIZE",
        help=f"of the Gaussian ops: {sizes}, or a shape as 4096x256; of others a shape that they have, as 16x64x28x28 "
        "of a convolution; repeatable; leaves out the drop-ins (-k chooses among them)",
    )
    add(
        "--dtype",
        action="append",
        choices=(*cases.DTYPES, "float16"),
        help="repeatable; default: float32 and bfloat16 of the Gaussian ops, float32 of others, bfloat16 of "
        "convolutions on a GPU, the only ones in float16",
    )
    add("--rival", action="append", choices=RIVALS, help="repeatable; default: all; copy always runs")
    add("--threads", type=at_least(1, int), metavar="N", help="of torch; default: torch's own choice")
    add(
        "--rounds",
        type=at_least(1, int),
        metavar="N",
        help="samples of each contestant; default: 30, large ones and convolutions 10, samplers 5, and more on a GPU",
    )
    add("--quick", action="store_true", help="3 rounds, nothing large: to see that everything works")
    add("--no-save", action="store_true", help="append no rows to the results")
    add(
        "--results",
        type=Path,
        metavar="DIR",
        default=rows.RESULTS,
        help="of <device>.csv, conv_, sampling_, dropins_ and memory_<device>.csv; default: benchmarks/results",
    )
    add(
        "--compare",
        metavar="ROWS",
        help="what got slower or faster than these rows: a CSV file, a folder of them, or a commit in the results",
    )
    add(
        "--fail-slower",
        type=at_least(1, float),
        metavar="RATIO",
        help="with --compare: exit status 1 where one of ours takes more than so many times as long as on the same "
        "machine, beyond the noise, or where there is nothing to compare with",
    )
    add(
        "--unverified",
        action="store_true",
        help="time ops without running their tests, or where --verdict says that these fail; the rows say so",
    )
    add("--verdict", type=Path, metavar="XML", help="pytest's --junitxml of the ops' tests, run just before")


def pytest_configure(config):
    option = config.option
    config.stash[ROWS], config.stash[COMPARED] = [], []
    config.stash[STARTED], config.stash[DONE], config.stash[FAILURES] = time.monotonic(), set(), {}
    option.verbose = option.verbose or 1  # a line for each case
    known = cases.SIZES[option.device]
    for shape in option.shape or ():
        if shape not in known and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
            raise pytest.UsageError(f"--shape must be one of {', '.join(known)} or as 4096x256, got {shape}")
    if option.fail_slower and not option.compare:
        raise pytest.UsageError("--fail-slower needs --compare: rows to be slower than")
    try:
        if option.verdict:
            ElementTree.parse(option.verdict)
        if not option.no_save:
            refuse_unwritable(option.results)
            for name, kind in rows.FILES.items():
                rows.columns_to_extend(option.results / f"{name}{option.device}.csv", kind)
        config.stash[BASELINE] = compare.baseline(option.compare, option.results) if option.compare else []
    except ElementTree.ParseError as error:
        raise pytest.UsageError(f"--verdict must be what pytest --junitxml writes: {option.verdict}: {error}") from None
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    if option.threads:
        torch.set_num_threads(option.threads)
    host_clock.keep_freed_memory()


def refuse_unwritable(folder: Path) -> None:
    """Raises ValueError where rows could not be put into a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"no rows can be written to {folder} (--results DIR, or --no-save)")


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    name = request.config.option.device
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda needs a GPU, and torch finds none", returncode=2)
    if name == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured in a graph
    return torch.device(name)


@pytest.fixture(scope="session")
def backends(device) -> list[str]:
    return cases.usable_backends(device)


@pytest.fixture
def save(request, device, backends, unverified) -> Callable[[str, list[dict]], None]:
    """Keeps the rows of a case: for the table, and on disk at once, in the file whose name begins so."""
    option, kept = request.config.option, request.config.stash[ROWS]

    def append(name: str, found: list[dict]) -> None:
        kind = rows.FILES[name]
        common = machine.session(device) | {"verified": "no" if unverified else "yes", "timestamp": machine.now()}
        common = {name: value for name, value in common.items() if name in rows.columns_of(kind)}
        made = [kind(**common, **row) for row in found]
        kept.extend(made)
        if not option.no_save:
            path = option.results / f"{name}{device.type}.csv"
            try:
                rows.append(path, made)
            except OSError as error:
                pytest.exit(f"no rows can be written to {path}: {error.strerror}", returncode=1)

    return append


@pytest.fixture
def unverified() -> list[str]:
    """Why the rows of a case are not verified."""
    return []


@pytest.fixture
def passing(request, backends, unverified) -> Callable[[str], None]:
    """Fails a case that tests/test_<name>.py tests, unless those pass; they run once, before the first such case."""
    option, reporter = request.config.option, request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")

    def failure_of(name: str) -> str:
        if option.verdict:
            return machine.recorded_failure(name, option.verdict)
        if option.unverified:
            return "its tests were not run"
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"running tests/test_{name}.py first (--unverified does without)")
        # tests of other backends (Triton's interpreter) say nothing about these
        only = " or ".join(f"[{backend}" for backend in backends) if name == "masked_conv2d" else ""
        return machine.test_failure(name, request.config.rootpath, only)

    def check(name: str) -> None:
        failures = request.config.stash[FAILURES]
        if name not in failures:
            failures[name] = failure_of(name)
        if failures[name] and not option.unverified:
            pytest.fail(f"not timed, its tests must pass first (or --unverified): {failures[name]}", pytrace=False)
        unverified.extend(filter(None, [failures[name]]))

    return check


def pytest_generate_tests(metafunc):
    option = metafunc.config.option
    chosen = (option.device, option.shape, option.op, option.dtype)

    def parametrize(fixture, found, ids=str):
        metafunc.parametrize(fixture, found or [None], ids=ids)  # None is deselected

    if "timed" in metafunc.fixturenames:
        parametrize("timed", cases.timed(*chosen, option.rival, option.quick))
    if "convolution" in metafunc.fixturenames:
        parametrize("convolution", convolutions.timed(*chosen, option.quick))
    if "batch" in metafunc.fixturenames:
        parametrize("batch", sampling.batches(*chosen, option.quick), lambda batch: f"{batch} images")
    if "drop_in" in metafunc.fixturenames:
        parametrize("drop_in", dropins.timed(*chosen, option.rival))
    if "differentiable" in metafunc.fixturenames:
        found = [case for case in cases.CASES if case.lines and case.op in (option.op or case.op) and not option.shape]
        parametrize("differentiable", found, lambda case: case and f"{case.op}-{case.name}")
        default = ["float32"] if option.device == "cuda" else cases.DTYPES
        parametrize("dtype", [dtype for dtype in option.dtype or default if dtype in cases.DTYPES])


def pytest_collection_modifyitems(config, items):
    none = [item for item in items if hasattr(item, "callspec") and None in item.callspec.params.values()]
    config.hook.pytest_deselected(items=none)
    kept = [item for item in items if item not in none]
    items[:] = sorted(kept, key=lambda item: ORDER.index(item.path.stem) if item.path.stem in ORDER else len(ORDER))
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"))  # torch's own


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    try:
        return (yield)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # a frame that was interrupted may have no line, and pytest would fail on it


def pytest_report_teststatus(report, config):
    if report.when != "call" or not report.passed or config.option.verbose < 1:
        return None
    done, session = config.stash[DONE], config.pluginmanager.get_plugin("session")
    done.add(report.nodeid)
    elapsed = time.monotonic() - config.stash[STARTED]
    left = elapsed / len(done) * (session.testscollected - len(done))
    return report.outcome, ".", f"PASSED after {duration(elapsed)}, about {duration(left)} left"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def of_kind(kind: type, config) -> list:
    return [row for row in config.stash[ROWS] if isinstance(row, kind)]


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if not config.option.compare or exitstatus == pytest.ExitCode.USAGE_ERROR:
        return
    found = config.stash[COMPARED] = compare.changes(of_kind(rows.Row, config), config.stash[BASELINE])
    limit = config.option.fail_slower
    if limit and exitstatus == pytest.ExitCode.OK and compare.failure(found, limit):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    if found := of_kind(rows.Row, config):
        terminalreporter.section("ours, and how many times as long each rival takes")
        write(tables.speed(found))
    if found := of_kind(rows.MemoryRow, config):
        terminalreporter.section("bytes per element: kept for the backward, and allocated at most in both passes")
        write(tables.memory(found))
    if config.option.compare:
        terminalreporter.section(f"ours against {config.option.compare}")
        write(compare.table(config.stash[COMPARED], config.option.fail_slower))
