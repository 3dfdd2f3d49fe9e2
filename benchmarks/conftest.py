"""Options of `pytest benchmarks`, which cases they choose, and what is printed."""

import argparse
import gc
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

import cases
import clocks
import compare
import convolutions
import dropins
import pytest
import rows
import sampling
import tables
import torch
from bench import Bench
from drop_in_cases import DROP_INS

# What each file times, the most telling first. Pyro, the last drop-in, puts a KL of its own in the place of torch's.
TIMED = {
    "test_speed": cases.timed,
    "test_convolutions": convolutions.timed,
    "test_sampling": sampling.timed,
    "test_memory": cases.counted,
    "test_dropins": dropins.timed,
}
OPS = sorted({*(case.op for case in cases.CASES), *convolutions.OPS, "sampling", *(one.op for one in DROP_INS)})
RIVALS = tuple(dict.fromkeys((*cases.RIVALS, "copy", *convolutions.RIVALS, *sampling.RIVALS)))
BENCH = pytest.StashKey[Bench]()


def at_least_one(kind: type) -> Callable:
    """Reads a number from the command line."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if 1 <= value < float("inf"):
            return value
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text}")

    return parse


FLAG, SEVERAL = {"action": "store_true"}, {"action": "append"}
SIZES = ", ".join(dict.fromkeys(name for sizes in cases.SIZES.values() for name in sizes))
OPTIONS = {
    "device": ({"choices": ("cpu", "cuda"), "default": "cpu"}, "samplers and drop-ins are timed on the cpu alone"),
    "op": (SEVERAL | {"choices": OPS, "metavar": "OP"}, f"{', '.join(OPS)}; repeatable"),
    "shape": (SEVERAL | {"metavar": "SIZE"},
     f"of the Gaussian ops: {SIZES}, or a shape as 4096x256; of others a shape that they have, as 16x64x28x28 of "
     "a convolution; repeatable; leaves out the drop-ins (-k chooses among them)"),
    "dtype": (SEVERAL | {"choices": (*cases.DTYPES, "float16")},
     "repeatable; default: float32 and bfloat16 of the Gaussian ops, float32 of others, bfloat16 of convolutions "
     "on a GPU, the only ones in float16"),
    "rival": (SEVERAL | {"choices": RIVALS}, "repeatable; default: all; copy always runs"),
    "threads": ({"type": at_least_one(int), "metavar": "N"}, "of torch; default: torch's own choice"),
    "rounds": ({"type": at_least_one(int), "metavar": "N"},
     "samples of each contestant; default: 30, large ones and convolutions 10, samplers 5, and more on a GPU"),
    "quick": (FLAG, "3 rounds, nothing large: to see that everything works"),
    "no-save": (FLAG, "append no rows to the results"),
    "results": ({"type": Path, "metavar": "DIR", "default": rows.RESULTS},
     "of <device>.csv, conv_, sampling_, dropins_ and memory_<device>.csv; default: benchmarks/results"),
    "compare": ({"metavar": "ROWS"},
     "what got slower or faster than these rows: a CSV file, a folder of them, or a commit in the results"),
    "fail-slower": ({"type": at_least_one(float), "metavar": "RATIO"},
     "with --compare: exit status 1 where one of ours takes more than so many times as long as on the same "
     "machine, beyond the noise, or where there is nothing to compare with"),
    "unverified": (FLAG,
     "time ops without running their tests, or where --verdict says that these fail; the rows say so"),
    "verdict": ({"type": Path, "metavar": "XML"}, "pytest's --junitxml of the ops' tests, run just before"),
}  # fmt: skip


def pytest_addoption(parser):
    what = "times ours against the rivals, appends rows to CSV files, prints tables"
    long = "all of it takes tens of minutes, and an interrupt loses nothing but the case that it stops"
    group = parser.getgroup("fastelbo", f"fastelbo: {what}; {long}")
    for name, (options, words) in OPTIONS.items():
        group.addoption(f"--{name}", help=words, **options)


def pytest_configure(config):
    option = config.option
    bench = config.stash[BENCH] = Bench(config)
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method. is deprecated")  # torch's own
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
        if option.compare:
            bench.baseline = compare.baseline(option.compare, option.results)
    except ElementTree.ParseError as error:
        raise pytest.UsageError(f"--verdict must be what pytest --junitxml writes: {option.verdict}: {error}") from None
    except (OSError, ValueError) as error:
        raise pytest.UsageError(str(error)) from None
    if option.threads:
        torch.set_num_threads(option.threads)
    clocks.keep_freed_memory()
    gc.freeze()  # what has been imported stays, and need not be looked through before each case


def refuse_unwritable(folder: Path) -> None:
    """Raises ValueError where rows could not be put into a folder, which need not exist yet."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"no rows can be written to {folder} (--results DIR, or --no-save)")


@pytest.fixture(scope="session")
def bench(pytestconfig) -> Bench:
    bench = pytestconfig.stash[BENCH]
    bench.open()
    return bench


def pytest_generate_tests(metafunc):
    if "timed" in metafunc.fixturenames:
        found = TIMED[metafunc.definition.path.stem](metafunc.config.option)
        metafunc.parametrize("timed", found or [None], ids=str)  # None is deselected


def pytest_collection_modifyitems(config, items):
    none = [item for item in items if hasattr(item, "callspec") and None in item.callspec.params.values()]
    config.hook.pytest_deselected(items=none)
    kept = [item for item in items if item not in none]
    order = [*TIMED, *(item.path.stem for item in kept)]
    items[:] = sorted(kept, key=lambda item: order.index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    try:
        return (yield)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None  # a frame that was interrupted may have no line, and pytest would fail on it


def pytest_report_teststatus(report, config):
    if report.when == "call" and report.passed and config.option.verbose > 0:
        bench, session = config.stash[BENCH], config.pluginmanager.get_plugin("session")
        bench.done.add(report.nodeid)
        elapsed = time.monotonic() - bench.started
        left = elapsed / len(bench.done) * (session.testscollected - len(bench.done))
        words = f"PASSED after {timedelta(seconds=round(elapsed))}, about {timedelta(seconds=round(left))} left"
        return report.outcome, ".", words


def pytest_sessionfinish(session, exitstatus):
    limit = session.config.option.fail_slower
    if limit and exitstatus == pytest.ExitCode.OK and compare.failure(session.config.stash[BENCH].changes, limit):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    write, bench = terminalreporter.write_line, config.stash[BENCH]
    if found := bench.of_kind(rows.Row):
        terminalreporter.section("ours, and how many times as long each rival takes")
        write(tables.speed(found))
    if found := bench.of_kind(rows.MemoryRow):
        terminalreporter.section("bytes per element: kept for the backward, and allocated at most in both passes")
        write(tables.memory(found))
    if config.option.compare:
        terminalreporter.section(f"ours against {config.option.compare}")
        write(compare.table(bench.changes, config.option.fail_slower))
