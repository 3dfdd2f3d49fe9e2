"""Result rows: what they hold, and the CSV files that keep them."""

import csv
import io
import math
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OURS = ("cpu", "triton", "cuda", "tma", "block")  # backends; the last two: Triton's where FASTELBO_CONV says so
OPS = Path(__file__).parent.parent / "fastelbo" / "ops"
NOISY = 1.5  # a median this many times the minimum says that the machine was doing something else


class Kept:
    """What both kinds of rows can tell of themselves."""

    processor = ""

    @property
    def on_gpu(self) -> bool:
        return bool(self.cuda)

    @property
    def elements(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def origin(self) -> str:
        """Machine, versions and day."""
        device = f", CUDA {self.cuda}, Triton {self.triton or 'none'}" if self.on_gpu else self.processor
        versions = f"torch {self.torch}, fastelbo {self.fastelbo} at commit {self.commit}, Python {self.python}"
        return f"{self.machine}{device}; {versions}; {self.timestamp[:10]}"


@dataclass(frozen=True)
class Row(Kept):
    """One contestant of one case. Times are per call; ratios are within one interleaved run: of minima on a CPU, where
    whatever else runs only adds time, and of medians on a GPU."""

    machine: str  # CPU model or GPU name
    threads: int
    isa: str  # instruction set of the cpu backend
    torch: str
    fastelbo: str
    python: str
    commit: str
    verified: str  # "yes": the op's tests passed at the start of this run
    timestamp: str  # UTC
    op: str
    case: str
    pass_: str
    contestant: str  # a backend of ours, or a rival
    shape: str
    dtype: str
    rounds: int
    min_us: float
    p20_us: float
    median_us: float
    p80_us: float
    bytes: int  # that the op has to move, not what this contestant moves
    fraction_of_copy: float | None = None
    # on our rows: how many times as long the rival takes
    over_eager: float | None = None
    over_distributions: float | None = None
    over_compile: float | None = None
    over_compile_checkpoint: float | None = None
    gnormals_per_s: float | None = None
    # "host": a clock around many calls; "events": the GPU's own time of one call, caches cold, never waiting for the
    # host; "graph": the GPU's time of one of the calls in a CUDA graph, caches warm
    timing: str = "host"
    cuda: str = ""  # versions; empty where no GPU is timed
    triton: str = ""

    run = property(attrgetter("machine", "threads", "isa", "torch", "fastelbo", "python", "commit"))
    timed = property(attrgetter("op", "case", "pass_", "shape", "dtype", "timing"))

    @property
    def processor(self) -> str:
        return f", {self.threads} threads, {self.isa}"

    @property
    def typical_us(self) -> float:
        """The time that ratios are taken of."""
        return self.median_us if self.on_gpu else self.min_us

    @property
    def columns(self) -> int:
        """Elements of an event."""
        return int(self.shape.split("x")[-1])

    @property
    def noisy(self) -> bool:
        return self.median_us > NOISY * self.min_us


@dataclass(frozen=True)
class MemoryRow(Kept):
    """What one contestant of one case keeps for the backward, and what a GPU must have free for both passes. Counts of
    bytes: the same on every run."""

    machine: str
    torch: str
    cuda: str
    triton: str
    fastelbo: str
    python: str
    commit: str
    timestamp: str
    op: str
    case: str
    contestant: str
    shape: str
    dtype: str
    saved_bytes: int  # kept by the forward for the backward, beyond inputs and outputs
    result_bytes: int  # outputs and gradients: what no implementation can do without
    peak_bytes: int | None = None  # allocated at most during both passes, results included, inputs not

    run = property(attrgetter("machine", "torch", "cuda", "triton", "fastelbo", "python", "commit"))
    timed = property(attrgetter("op", "case", "shape", "dtype"))


# The kinds of rows, by how the names of their files begin: <beginning><device>.csv
FILES = {"": Row, "conv_": Row, "sampling_": Row, "dropins_": Row, "memory_": MemoryRow}


def columns_of(kind: type) -> dict[str, Field]:
    return {field.name.rstrip("_"): field for field in fields(kind)}


def lacking(kind: type, columns: Iterable[str]) -> list[str]:
    """The columns that no row can do without and that are not among these."""
    return [name for name, field in columns_of(kind).items() if field.default is MISSING and name not in columns]


def columns_to_extend(path: Path, kind: type, rows: Iterable[Row | MemoryRow] = ()) -> list[str]:
    """The columns of a file that takes rows of a kind; all where there is no file, or an empty one.

    Raises:
        ValueError: for a file of other columns than they hold something in, and for one that ends within a line.
    """
    known = columns_of(kind)
    text = path.read_text() if path.exists() else ""
    columns = next(csv.reader(io.StringIO(text)), list(known))
    absent = [field for name, field in known.items() if name not in columns]
    held = any(getattr(row, field.name) != field.default for field in absent for row in rows)
    if held or lacking(kind, columns) or set(columns) - known.keys():
        raise ValueError(f"{path} has other columns than this version writes: move it away first")
    if text and not text.endswith("\n"):
        raise ValueError(f"{path} ends within a line: mend or remove its last line first")
    return columns


def append(path: Path, rows: list[Row] | list[MemoryRow]) -> None:
    """Adds rows to a CSV file, all at once; it keeps all that it has, its columns too.

    Raises:
        ValueError: as columns_to_extend.
    """
    known = columns_of(type(rows[0]))
    columns = columns_to_extend(path, type(rows[0]), rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not path.exists() or not path.stat().st_size:
        writer.writerow(columns)
    for row in rows:
        values = (getattr(row, known[name].name) for name in columns)
        writer.writerow(f"{value:.5g}" if isinstance(value, float) else value for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())  # one write, so that an interrupt leaves whole lines


def read(path: Path, kind: type = Row) -> list:
    """The newest row of every run, case and contestant; a column that an older file lacks has its default.

    Raises:
        ValueError: for a file that holds something else, with the line.
    """
    rows = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            if reader.fieldnames and (missing := lacking(kind, reader.fieldnames)):
                raise ValueError(f"{path} holds no rows of this benchmark: it has no column {', '.join(missing)}")
            for line in reader:
                place = f"{path}, line {reader.line_num}"
                if None in line or None in line.values():
                    raise ValueError(f"{place}: not as many values as columns")
                columns = columns_of(kind).items()
                row = kind(**{field.name: value(field, line.get(name, ""), place) for name, field in columns})
                rows[row.run, row.timed, row.contestant] = row
        except (csv.Error, UnicodeDecodeError):
            raise ValueError(f"{path} is no CSV file") from None
    return list(rows.values())


def value(field: Field, text: str, place: str) -> str | int | float | None:
    """What is written in a column; its default where that is nothing, or the file has no such column."""
    if not text and field.default is not MISSING:
        return field.default
    kind = getattr(field.type, "__args__", [field.type])[0]  # of a number that may be None
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{place}: {field.name} is {text!r}, no number") from None


def kind_of(path: Path) -> type | None:
    """The kind of the rows in a file; None for other tables."""
    with path.open(newline="", errors="replace") as file:
        columns = file.readline().strip().split(",")
    return MemoryRow if "saved_bytes" in columns else Row if "min_us" in columns else None


def result_files(folder: Path = RESULTS) -> list[Path]:
    """The files of rows in a folder."""
    return [path for path in sorted(folder.glob("*.csv")) if kind_of(path)]


def stored_in(paths: Iterable[Path]) -> list[Row | MemoryRow]:
    """Of each machine's last commit in each of several files, the newest row of each case and contestant.

    Raises:
        ValueError: if there are none, or some file holds something else.
        OSError: for a file that cannot be read.
    """
    paths, found = list(paths), []
    for path in paths:
        of_file = sorted(read(path, kind_of(path) or Row), key=lambda row: row.timestamp)
        last = {row.run[:-1]: row.commit for row in of_file}
        found += [row for row in of_file if row.commit == last[row.run[:-1]]]
    if not found:
        raise ValueError(f"no rows in {', '.join(map(str, paths)) or RESULTS}: run pytest benchmarks")
    return found


def grouped(found: Iterable, key) -> list[tuple]:
    """As groupby, of what need not be sorted."""
    return [(name, list(group)) for name, group in groupby(sorted(found, key=key), key=key)]


def topic(row: Row | MemoryRow) -> str:
    """What a row is about; each topic has a table and a figure."""
    if isinstance(row, MemoryRow):
        return "memory"
    others = {"masked_conv2d": "convolutions", "gated_block": "convolutions", "sampling": "sampling"}
    return others.get(row.op, "speed" if (OPS / f"{row.op}.py").exists() else "dropins")
