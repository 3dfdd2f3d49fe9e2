"""Times of this run against those of stored rows.

pytest-benchmark's own --benchmark-compare does not serve: its storage knows only the contestant that its fixture times,
the first of each case, and neither rivals nor what a row says of the machine.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import rows

FEWEST = 3  # samples; one alone lies above the p80 of others every fifth time
RULE = (
    "slower: four fifths of the samples lie above what four fifths lay below before (p20 now > p80 then); faster: the "
    "reverse; neither of fewer than 3 samples; where the rivals' ratio moved as much, the machine did"
)


@dataclass(frozen=True)
class Change:
    """A row of ours and the stored one of the same case."""

    then: rows.Row
    now: rows.Row
    rivals: float | None  # times of the rivals, now by then: what changed with the machine

    @property
    def ratio(self) -> float:
        return self.now.typical_us / self.then.typical_us

    @property
    def verdict(self) -> str:
        """Whether the change is beyond the noise of both runs."""
        if min(self.now.rounds, self.then.rounds) < FEWEST:
            return "too few samples"
        if self.now.p20_us > self.then.p80_us:
            return "slower"
        return "faster" if self.now.p80_us < self.then.p20_us else ""

    @property
    def differs(self) -> str:
        """What else changed, of what decides a time."""
        names = ["machine", "threads", "isa", "torch", *(["cuda", "triton"] if self.now.on_gpu else [])]
        pairs = {name: (getattr(self.then, name), getattr(self.now, name)) for name in names}
        return ", ".join(f"{name} was {then}" for name, (then, now) in pairs.items() if then != now)


def read(paths: Iterable[Path]) -> list[rows.Row]:
    """The rows of files of times.

    Raises:
        ValueError, OSError: for another kind of file, or none.
    """
    found = [row for path in paths for row in rows.read(path)]
    if not found:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}")
    return found


def changes(stored: Sequence[rows.Row], measured: Iterable[rows.Row]) -> list[Change]:
    """Of every row of ours that has a stored counterpart: the newest one, of the same machine and threads if any is."""
    pairs = [(row, then) for row in measured if (then := counterpart(stored, row)) is not None]
    others: dict[tuple, list[float]] = {}
    for now, then in pairs:
        if not is_ours(now):
            others.setdefault(now.timed, []).append(now.typical_us / then.typical_us)
    return [
        Change(then, now, statistics.median(others[now.timed]) if now.timed in others else None)
        for now, then in pairs
        if is_ours(now)
    ]


def is_ours(row: rows.Row) -> bool:
    return row.contestant.removesuffix("_channels_last") in rows.OURS


def counterpart(stored: Sequence[rows.Row], row: rows.Row) -> rows.Row | None:
    same = [then for then in stored if (then.timed, then.contestant) == (row.timed, row.contestant)]
    return max(
        same, key=lambda then: (then.machine == row.machine, then.threads == row.threads, then.timestamp), default=None
    )


def table(found: Sequence[Change]) -> str:
    """A line for each case, then the rule and what else changed."""
    lines = [("case", "ours", "then, us", "now, us", "ratio", "rivals'", "")]
    for change in found:
        row = change.now
        lines.append(
            (
                " ".join(
                    filter(None, (row.op, row.case, rows.PASS_NAMES.get(row.pass_, row.pass_), row.shape, row.dtype))
                )
                + (" in a graph" if row.timing == "graph" else ""),
                row.contestant,
                f"{change.then.typical_us:.4g}",
                f"{row.typical_us:.4g}",
                f"{change.ratio:.2f}",
                "" if change.rivals is None else f"{change.rivals:.2f}",
                change.verdict,
            )
        )
    what = "medians" if found[0].now.on_gpu else "minima"
    notes = [f"ratio: of {what}, now by then; rivals': the median of theirs in the same case; {RULE}"]
    for differs in dict.fromkeys(change.differs for change in found):
        count = sum(change.differs == differs for change in found)
        if differs:
            notes.append(f"NOT LIKE BEFORE in {count} of {len(found)} cases: {differs}")
    commits = sorted({change.then.commit for change in found})
    notes.append(f"then: commit {', '.join(commits)}; now: commit {found[0].now.commit}")
    return "\n".join([rows.aligned(lines), *notes])


def slower(found: Iterable[Change], ratio: float) -> list[Change]:
    """Those marked slower that take at least so many times as long."""
    return [change for change in found if change.verdict == "slower" and change.ratio >= ratio]
