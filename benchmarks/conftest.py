"""Options of `pytest benchmarks`, and what its cases share: the tests' verdict, where rows go."""

import os
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode adds nothing to it

import cases
import compare
import convolutions
import dropins
import host_clock
import machine
import rows
import sampling
import tables

ROWS, STORED, CHANGES = pytest.StashKey[dict](), pytest.StashKey[list](), pytest.StashKey[list]()
OPS = sorted({case.op for case in cases.CASES} | {"masked_conv2d", "sampling"} | {d.op for d in dropins.DROP_INS})
RIVALS = list(dict.fromkeys((*cases.RIVALS, *convolutions.RIVALS, *sampling.RIVALS)))
DTYPES = (*cases.DTYPES, "float16")
DEVICES = ("cpu", "cuda")


def pytest_addoption(parser):
    group = parser.getgroup("fastelbo", "fastelbo: what is timed, against what, and where its rows go")

    def add(name, text, **keywords):
        group.addoption(name, help=text, **keywords)

    many = {"action": "append", "default": [], "metavar": "NAME"}
    sizes = ", ".join(dict.fromkeys(name for sizes in cases.SIZES.values() for name in sizes))
    add("--device", "cpu (default) or cuda", default="cpu", metavar="NAME")
    add("--op", f"only this one; repeatable: {', '.join(OPS)}", **many)
    add("--rival", f"only against this one; repeatable: {', '.join(RIVALS)}; ops always run beside a copy", **many)
    add("--dtype", f"only this one; repeatable: {', '.join(DTYPES)} (masked_conv2d only)", **many)
    add("--shape", f"of Gaussian ops only this one; repeatable: {sizes}, or as 4096x256", **many | {"metavar": "SIZE"})
    add("--rounds", "samples of each contestant; default: 3 to 100, by what a call takes", type=int, metavar="N")
    add("--quick", "3 rounds, nothing that takes long: to see that everything works", action="store_true")
    add("--threads", "of torch; default: torch's own choice", type=int, metavar="N")
    add(
        "--results",
        "CSV files of rows, added to after every case; default: benchmarks/results",
        **path("DIR", rows.RESULTS),
    )
    add("--no-save", "add no rows to them", action="store_true")
    add("--unverified", "time without running the tests of what is timed first; the rows say so", action="store_true")
    add("--verdict", "what pytest --junitxml wrote of those tests, run just before", **path("XML"))
    text = "times then and now of every case that is also in this file of rows; repeatable. A case is marked "
    add("--compare", text + compare.RULE.replace("%", "%%"), **path("CSV", []), action="append")
    text = "exit with 1 if a case that --compare marks slower takes at least so many times as long, e.g. 1.1"
    add("--fail-slower", text, type=float, metavar="RATIO")


def path(metavar: str, default=None) -> dict:
    return {"type": Path, "metavar": metavar, "default": default}


def pytest_configure(config):
    option = config.option
    config.stash[ROWS] = {prefix: [] for prefix in rows.PREFIXES}
    config.stash[STORED], config.stash[CHANGES] = [], []
    option.benchmark_quiet = True  # our table replaces pytest-benchmark's; --benchmark-verbose brings it back
    # where a case is refused, and for GPU events
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if mistake := mistaken(option):
        raise pytest.UsageError(mistake)
    try:
        # now, lest this run's own rows be among them
        config.stash[STORED] = compare.read(option.compare) if option.compare else []
    except (OSError, ValueError) as error:
        raise pytest.UsageError(f"--compare: {rows.sentence(error)}") from None
    if option.threads:
        torch.set_num_threads(option.threads)
    host_clock.keep_freed_memory()


def mistaken(option) -> str:
    """What is wrong with the options, or an empty string."""
    for name, known in (("device", DEVICES), ("op", OPS), ("rival", RIVALS), ("dtype", DTYPES)):
        value = getattr(option, name)
        for given in value if isinstance(value, list) else [value]:
            if given not in known:
                return f"--{name} {given} is none of {', '.join(known)}"
    for size in option.shape:
        if size not in cases.SIZES[option.device] and not is_shape(size):
            return f"--shape {size} is neither one of {', '.join(cases.SIZES[option.device])} nor a shape as 4096x256"
    for name in ("rounds", "threads"):
        value = getattr(option, name)
        if value is not None and value < 1:
            return f"--{name} must be at least 1, not {value}"
    if option.fail_slower is not None:
        if not option.compare:
            return "--fail-slower needs --compare, the file of rows to hold this run against"
        if not option.fail_slower > 0:
            return f"--fail-slower must be a positive ratio, not {option.fail_slower:g}"
        if option.rounds is not None and option.rounds < compare.FEWEST:
            return f"--fail-slower needs {compare.FEWEST} --rounds or more: nothing is marked slower of fewer samples"
    if option.verdict:
        try:
            ElementTree.parse(option.verdict)
        except OSError as error:
            return f"--verdict: {rows.sentence(error)}: the tests were not run to their end"
        except ElementTree.ParseError as error:
            return f"--verdict: {option.verdict} is no XML file: {error}"
    if not option.no_save:
        there = next(folder for folder in (option.results, *option.results.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            return f"--results {option.results}: {there} is no folder that can be written to (or --no-save)"
    return ""


def is_shape(size: str) -> bool:
    parts = size.split("x")
    return len(parts) == 2 and all(part.isascii() and part.isdigit() and int(part) for part in parts)


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
def save(request, device, backends):
    """Keeps the rows of a case: on disk at once, and for the tables."""
    option = request.config.option
    session = machine.session(device)
    speed = session | machine.threads() | {"verified": "no" if option.unverified else "yes"}

    def append(found: list[dict], prefix: str = "") -> None:
        kind, common = rows.kind(prefix), session if prefix == "memory_" else speed
        made = [kind(**common, timestamp=machine.now(), **row) for row in found]
        request.config.stash[ROWS][prefix].extend(made)
        if not option.no_save:
            rows.append(option.results / f"{prefix}{device.type}.csv", made)

    return append


@pytest.fixture(scope="session")
def broken(request, backends) -> dict[str, str]:
    """Why the tests of what is timed fail, by their name, for those of this session that do."""
    option = request.config.option
    if option.unverified:
        return {}
    names = sorted({name for item in request.session.items for name in tests_of(item)})
    if option.verdict:
        verdicts = {name: machine.recorded_failure(name, option.verdict) for name in names}
    else:
        # tests of other backends (Triton's interpreter) say nothing about these
        only = {"masked_conv2d": " or ".join(f"[{backend}" for backend in backends)}
        verdicts = {name: machine.test_failure(name, request.config.rootpath, only.get(name, "")) for name in names}
    return {name: why for name, why in verdicts.items() if why}


def tests_of(item) -> list[str]:
    """What must pass before this case is timed: tests/test_<name>.py."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return [param.tests for param in params if hasattr(param, "tests")]


@pytest.fixture
def tested(request, broken) -> None:
    """Fails a case whose op's tests fail."""
    for name in tests_of(request.node):
        if name in broken:
            why = f"not timed, its tests must pass first (or --unverified): {broken[name]}"
            pytest.fail(why, pytrace=False)


def pytest_generate_tests(metafunc):
    option = metafunc.config.option

    def parametrize(name, found, rivals=()):
        if name in metafunc.fixturenames:
            chosen = [one for one in found if one.op in (option.op or [one.op])]
            chosen = chosen if not option.rival or not rivals or set(rivals) & set(option.rival) else []
            metafunc.parametrize(name, chosen, ids=map(str, chosen))

    dtypes = [dtype for dtype in option.dtype if dtype in cases.DTYPES]
    on_cpu = option.device == "cpu" and "float32" in (option.dtype or ["float32"])
    ops = cases.timed(option.device, option.shape, (), dtypes, option.rival, option.quick)
    parametrize("timed", ops if dtypes or not option.dtype else [])
    layers = convolutions.timed(option.device, option.dtype, option.quick)
    parametrize("layer", layers, convolutions.RIVALS)
    parametrize("images", sampling.timed(option.quick) if on_cpu else [], sampling.RIVALS)
    parametrize("drop_in", [one for one in dropins.DROP_INS if on_cpu and one.rival in (option.rival or [one.rival])])
    if "differentiable" in metafunc.fixturenames:
        found = [case for case in cases.CASES if case.lines and case.op in (option.op or [case.op])]
        metafunc.parametrize("differentiable", found, ids=[f"{case.op}-{case.name}" for case in found])
        default = ["float32"] if option.device == "cuda" else cases.DTYPES
        metafunc.parametrize("dtype", dtypes if option.dtype else default)


def pytest_collection_modifyitems(config, items):
    """Leaves out tests that have no case; drop-ins come last, for Pyro puts a KL of its own in the place of torch's."""
    empty = [item for item in items if hasattr(item, "callspec") and "NOTSET" in item.callspec.id]
    if empty:
        config.hook.pytest_deselected(items=empty)
        items[:] = [item for item in items if item not in empty]
    items.sort(key=lambda item: item.path.name == "test_dropins.py")


def pytest_sessionfinish(session):
    config, option = session.config, session.config.option
    if not option.compare or option.collectonly:
        return
    measured = [row for prefix, made in config.stash[ROWS].items() if prefix != "memory_" for row in made]
    config.stash[CHANGES] = changes = compare.changes(config.stash[STORED], measured)
    failing = option.fail_slower is not None and compare.slower(changes, option.fail_slower)
    if session.exitstatus == pytest.ExitCode.OK and (failing or not changes):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    option = config.option
    for prefix, made in config.stash[ROWS].items():
        if made:
            title, table = tables.TABLES[prefix]
            terminalreporter.section(title)
            terminalreporter.write_line(table(made))
    if option.compare and not option.collectonly:
        terminalreporter.section(f"then, in {', '.join(map(str, option.compare))}, and now")
        changes = config.stash[CHANGES]
        terminalreporter.write_line(compare.table(changes) if changes else "no case of this run is there")
        if option.fail_slower is not None:
            count = len(compare.slower(changes, option.fail_slower))
            text = f"{count} of {len(changes)} cases are slower and take at least {option.fail_slower:g} times as long"
            terminalreporter.write_line(text)
