"""Holds the rows of a run against older ones: what got slower or faster by more than the noise.

The rule is not free of false alarms: the two runs in results/cpu.csv share 290 rows of copy, eager lines, distributions
and torch.compile, whose code is the same. It marks 7 of them as slower; a ratio above 1.1 alone would mark 17, and the
80th percentile alone 42.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import rows
import tables
from ratios import compared, form_of

NOISE = 1.1  # nine of ten ratios of those rows are smaller
JUDGED = ("SLOWER", "faster", "")  # marks of what was timed on the same machine


class Change(NamedTuple):
    """A row of ours, the newest older one of the same case, and how many times as long the rivals take since then: the
    median of theirs, which tells how the machine has changed, or 1."""

    now: rows.Row
    then: rows.Row | None
    rivals: float

    @property
    def ratio(self) -> float:
        return self.now.typical_us / self.then.typical_us

    @property
    def mark(self) -> str:
        """SLOWER is what is so against the rivals, too, and in the fastest sample against four fifths of the older."""
        if self.then is None:
            return "no older row"
        if place(self.now) != place(self.then):
            return "another machine"
        ratios = self.ratio, self.ratio / self.rivals
        if min(ratios) > NOISE and self.now.min_us > self.then.p80_us:
            return "SLOWER"
        if max(ratios) < 1 / NOISE and self.now.p80_us < self.then.min_us:
            return "faster"
        return ""


def place(row: rows.Row) -> tuple:
    return row.machine, row.threads, row.isa


def baseline(where: str, results: Path) -> list[rows.Row]:
    """The rows of a CSV file, of a folder of them, or of a commit in a folder of results.

    Raises:
        ValueError: if there are none, or the file holds something else.
        OSError: for a file that cannot be read.
    """
    path = Path(where)
    folder, commit = (path, "") if path.exists() else (results, where)
    files = [path] if path.is_file() else [file for file in rows.result_files(folder) if rows.kind_of(file) is rows.Row]
    found = [row for file in files for row in rows.read(file) if row.commit.startswith(commit)]
    if found:
        return found
    if path.exists():
        raise ValueError(f"--compare {where}: there are no rows of times in it")
    raise ValueError(f"--compare {where}: there is no such file, and no row of such a commit in {results}")


def changes(now: Sequence[rows.Row], then: Sequence[rows.Row]) -> list[Change]:
    """Ours of a run, beside the newest older rows from the same machine, or from another where that has none."""
    ratios: dict[tuple, list[float]] = {}
    found = [(row, newest(row, then)) for row in now]
    for row, older in found:
        if older and form_of(row.contestant) not in rows.OURS:
            ratios.setdefault(compared(row), []).append(row.typical_us / older.typical_us)
    return [
        Change(row, older, statistics.median(ratios.get(compared(row), [1])))
        for row, older in found
        if form_of(row.contestant) in rows.OURS
    ]


def newest(row: rows.Row, then: Sequence[rows.Row]) -> rows.Row | None:
    same = [one for one in then if (one.timed, one.contestant) == (row.timed, row.contestant)]
    here = [one for one in same if place(one) == place(row)]
    return max(here or same, key=lambda one: one.timestamp, default=None)


def failure(found: Sequence[Change], limit: float) -> str:
    """Why a run fails that may be slower by a factor of so much; empty if it does not."""
    slower = [change for change in found if change.mark == "SLOWER" and change.ratio > limit]
    if slower:
        return f"{len(slower)} of {len(found)} are slower by more than {limit:g}x"
    return "" if any(change.mark in JUDGED for change in found) else "no row from this machine to compare with"


def table(found: Sequence[Change], limit: float | None = None) -> str:
    """A line for each of ours, the summary last."""
    places = {place(change.then): change.then for change in found if change.then}
    lines = [f"now:  {found[0].now.origin}"] if found else []
    for where, row in places.items():
        other = "" if where == place(found[0].now) else "; ANOTHER MACHINE: its ratios say nothing of the code"
        lines.append(f"then: {row.origin}{other}")
    cells = [(*tables.CASE, "then us", "now us", "ratio", "rivals", "")]
    cells += [line(change) for change in sorted(found, key=lambda change: change.mark != "SLOWER")]
    if found:
        lines += ["", tables.aligned(cells), ""]
    marks = Counter(change.mark for change in found)
    counts = f"{marks['SLOWER']} slower, {marks['faster']} faster, {marks['']} neither"
    lines += [
        f"{counts}, {marks['another machine']} of another machine, {marks['no older row']} without an older row",
        f"slower: the fastest sample above 80 % of the older ones, and a ratio above {NOISE:g}, also times that of the "
        "rivals, which tells how the machine has changed",
    ]
    if limit and (why := failure(found, limit)):
        lines.append(f"FAILED: {why}")
    return "\n".join(lines)


def line(change: Change) -> tuple[str, ...]:
    now, then = change.now, change.then
    times = (f"{then.typical_us:.4g}" if then else "", f"{now.typical_us:.4g}")
    ratios = (f"{change.ratio:.2f}x", f"{change.rivals:.2f}x") if then else ("", "")
    return (*tables.case(now), *times, *ratios, change.mark)
