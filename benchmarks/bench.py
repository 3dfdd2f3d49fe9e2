"""What a case is timed with: the tests' verdict first, then contestants in turns, and rows, on disk at once."""

import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone

import cases
import clocks
import compare
import machine
import pytest
import ratios
import rows
import torch


class Bench:
    """One session of `pytest benchmarks`."""

    def __init__(self, config: pytest.Config):
        self.config, self.option = config, config.option
        self.rows: list[rows.Row | rows.MemoryRow] = []
        self.baseline: list[rows.Row] = []
        self.failures: dict[str, str] = {}
        self.started, self.done = time.monotonic(), set()

    def open(self) -> None:
        """Before the first case."""
        self.device = torch.device(self.option.device)
        if self.device.type == "cuda":
            if not torch.cuda.is_available():
                pytest.exit("--device cuda needs a GPU, and torch finds none", returncode=2)
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured in a graph
        self.backends = cases.usable_backends(self.device)

    def rivals(self, names: Iterable[str]) -> list[str]:
        """Those that the option chooses."""
        return [name for name in names if cases.chosen(self.option.rival, name)]

    @property
    def typical(self) -> str:
        """Which of a row's quantiles ratios are of, as Row.typical_us."""
        return "median_us" if self.device.type == "cuda" else "min_us"

    def verified(self, *names: str) -> str:
        """As a row has it: whether tests/test_<name>.py pass. They run once, before the first case that needs them.

        Fails the case, unless they do or none need be verified.
        """
        failure = next(filter(None, map(self.failure_of, names)), "")
        if failure and not self.option.unverified:
            pytest.fail(f"not timed, its tests must pass first (or --unverified): {failure}", pytrace=False)
        return "no" if failure else "yes"

    def failure_of(self, name: str) -> str:
        if name not in self.failures:
            if self.option.verdict:
                self.failures[name] = machine.recorded_failure(name, self.option.verdict)
            elif self.option.unverified:
                self.failures[name] = "its tests were not run"
            else:
                self.failures[name] = self.run_tests(name)
        return self.failures[name]

    def run_tests(self, name: str) -> str:
        manager = self.config.pluginmanager
        with manager.get_plugin("capturemanager").global_and_fixture_disabled():
            reporter = manager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.write_line(f"running tests/test_{name}.py first (--unverified does without)")
        # tests of other backends (Triton's interpreter) say nothing about these
        only = " or ".join(f"[{backend}" for backend in self.backends) if name == "masked_conv2d" else ""
        return machine.test_failure(name, self.config.rootpath, only)

    def measured(self, common: dict, calls: dict[str, Callable], rounds: int, timing: str = "host") -> list[dict]:
        """The fields of every contestant's row that do not say where it was timed.

        Args:
            common: those that all have in common.
            calls: the contestants, without arguments.
            rounds: samples of each, where no option says how many.
            timing: as a row's.
        """
        rounds = self.option.rounds or (3 if self.option.quick else rounds)
        samples = clocks.CLOCKS[timing](calls, rounds, self.device)
        return ratios.measured(common | {"timing": timing}, samples, self.typical)

    def save(self, name: str, found: list[dict]) -> None:
        """Keeps the rows of a case: for the tables, and in the file whose name begins so."""
        kind = rows.FILES[name]
        session = machine.session(self.device) | {"timestamp": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"}
        common = {column: value for column, value in session.items() if column in rows.columns_of(kind)}
        made = [kind(**common, **row) for row in found]
        self.rows += made
        if not self.option.no_save:
            path = self.option.results / f"{name}{self.device.type}.csv"
            try:
                rows.append(path, made)
            except OSError as error:
                pytest.exit(f"no rows can be written to {path}: {error.strerror}", returncode=1)

    @property
    def changes(self) -> list[compare.Change]:
        """Against the baseline."""
        return compare.changes(self.of_kind(rows.Row), self.baseline)

    def of_kind(self, kind: type) -> list:
        """Rows that were saved."""
        return [row for row in self.rows if isinstance(row, kind)]
