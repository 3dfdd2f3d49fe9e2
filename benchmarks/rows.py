"""Result rows: what they hold, where they are kept, the goals they are held against, and the tables made of them."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
OURS = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # our backends, and the device each is for


@dataclass(frozen=True)
class Row:
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

    @property
    def run(self) -> tuple:
        return self.machine, self.threads, self.isa, self.torch, self.fastelbo, self.python, self.commit

    @property
    def timed(self) -> tuple:
        return self.op, self.case, self.pass_, self.shape, self.dtype, self.timing

    @property
    def on_gpu(self) -> bool:
        return bool(self.cuda)

    @property
    def typical_us(self) -> float:
        """What ratios are of."""
        return self.median_us if self.on_gpu else self.min_us

    @property
    def noisy(self) -> bool:
        return self.median_us > NOISY * self.min_us

    @property
    def elements(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def columns(self) -> int:
        """Elements of an event."""
        return int(self.shape.split("x")[-1])


@dataclass(frozen=True)
class MemoryRow:
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

    @property
    def run(self) -> tuple:
        return self.machine, self.torch, self.cuda, self.triton, self.fastelbo, self.python, self.commit

    @property
    def timed(self) -> tuple:
        return self.op, self.case, self.shape, self.dtype

    @property
    def on_gpu(self) -> bool:
        return bool(self.cuda)

    @property
    def elements(self) -> int:
        return math.prod(map(int, self.shape.split("x")))


def typical(samples: Sequence[float], on_gpu: bool) -> float:
    """What ratios are of."""
    return statistics.median(samples) if on_gpu else min(samples)


def times(samples: Sequence[float]) -> dict[str, float]:
    """Quantiles of seconds, as a Row holds them."""
    samples = [*samples, *samples] if len(samples) == 1 else samples  # one has no quantiles
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    seconds = {"min_us": min(samples), "p20_us": p20, "median_us": statistics.median(samples), "p80_us": p80}
    return {name: 1e6 * value for name, value in seconds.items()}


def columns_to_extend(path: Path, kind: type) -> list[str]:
    """The columns of a file that takes rows of a kind; none where there is no file, or an empty one.

    Raises:
        ValueError: for a file of other columns, and for one that ends within a line.
    """
    text = path.read_text() if path.exists() else ""
    columns = next(csv.reader(io.StringIO(text)), [])
    known = {_column(field): field for field in fields(kind)}
    required = {name for name, field in known.items() if field.default is MISSING}
    if columns and not known.keys() >= set(columns) >= required:
        raise ValueError(f"{path} has other columns than this version writes: move it away first")
    if text and not text.endswith("\n"):
        raise ValueError(f"{path} ends within a line: mend or remove its last line first")
    return columns


def append(path: Path, rows: Iterable[Row | MemoryRow]) -> None:
    """Adds rows to a CSV file, all at once; it keeps all that it has, its columns too.

    Raises:
        ValueError: as columns_to_extend, and for a file that has no column for something that a row holds.
    """
    rows = list(rows)
    if not rows:
        return
    known = {_column(field): field for field in fields(rows[0])}
    header = columns_to_extend(path, type(rows[0]))
    columns = header or list(known)
    lacking = (field for name, field in known.items() if name not in columns)
    if any(getattr(row, field.name) != field.default for field in lacking for row in rows):
        raise ValueError(f"{path} has other columns than this version writes: move it away first")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not header:
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
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            present = reader.fieldnames or []
            required = [_column(field) for field in fields(kind) if field.default is MISSING]
            lacking = [name for name in required if name not in present]
            if present and lacking:
                some = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
                raise ValueError(f"{path} holds no rows of this benchmark: it has no column {some}")
            for line in reader:
                if None in line or None in line.values():
                    raise ValueError(f"{path}, line {reader.line_num}: not as many values as columns")
                rows.append(_row(kind, line, f"{path}, line {reader.line_num}"))
        except (csv.Error, UnicodeDecodeError):
            raise ValueError(f"{path} is no CSV file") from None
    return list({(row.run, row.timed, row.contestant): row for row in rows}.values())


def _row(kind: type, line: dict[str, str], place: str) -> Row | MemoryRow:
    values = {}
    for field in fields(kind):
        text = line.get(_column(field))
        try:
            values[field.name] = field.default if text is None else _parse(field, text)
        except ValueError:
            raise ValueError(f"{place}: {_column(field)} is {text!r}, no number") from None
    return kind(**values)


def _column(field) -> str:
    return field.name.rstrip("_")


def _parse(field, text: str):
    if field.type in (int, float, str):
        return field.type(text)
    return (int if field.type == int | None else float)(text) if text else None


def kind_of(path: Path) -> type | None:
    """The kind of the rows in a file; None for other tables, as those of predictions."""
    with path.open(newline="", errors="replace") as file:
        columns = file.readline().strip().split(",")
    return MemoryRow if "saved_bytes" in columns else Row if "min_us" in columns else None


def stored(path: Path, kind: type = Row) -> list:
    """Of each machine's last commit in a file, the newest row of each case and contestant."""
    found = sorted(read(path, kind), key=lambda row: row.timestamp)
    last = {row.run[:-1]: row.commit for row in found}
    return [row for row in found if row.commit == last[row.run[:-1]]]


def stored_in(paths: Iterable[Path]) -> list[Row | MemoryRow]:
    """Those of several files.

    Raises:
        ValueError: if there are none, or some file holds something else.
        OSError: for a file that cannot be read.
    """
    paths = list(paths)
    found = [row for path in paths for row in stored(path, kind_of(path) or Row)]
    if not found:
        raise ValueError(f"no rows in {', '.join(map(str, paths)) or RESULTS}: run pytest benchmarks")
    return found


def result_files(folder: Path = RESULTS) -> list[Path]:
    """The files of rows in a folder."""
    return [path for path in sorted(folder.glob("*.csv")) if kind_of(path)]


@dataclass(frozen=True)
class Goal:
    """A bound on one column of our best row."""

    device: str
    ops: str
    passes: str
    column: str
    bound: float
    elements: range
    dtype: str = "float32"
    normals: bool = False
    columns: range = range(1, 2**40)
    timing: str = "any"

    def applies(self, row: Row) -> bool:
        return (
            self.device in ("cuda" if row.on_gpu else "cpu", "any")
            and row.op in self.ops.split()
            and row.pass_ in self.passes.split()
            and row.elements in self.elements
            and row.columns in self.columns
            and self.dtype in (row.dtype, "any")
            and self.timing in (row.timing, "any")
            and self.normals == (row.case == "normals")
        )

    @property
    def limit(self) -> bool:
        """Whether the bound is an upper one."""
        return self.column.endswith("_us")

    def met(self, row: Row) -> bool | None:
        """None where the row lacks the column: that rival was left out."""
        value = getattr(row, self.column)
        if value is None:
            return None
        return value <= self.bound if self.limit else value >= self.bound

    def __str__(self) -> str:
        return f"{self.column} {'<=' if self.limit else '>='} {self.bound:g}"

    def verdict(self, row: Row) -> str | None:
        met = self.met(row)
        return None if met is None else f"{self}: {'met' if met else 'NOT MET'}"


ALL = "gaussian_rsample gaussian_kl gaussian_rsample_kl gaussian_log_prob"
SUMS = "gaussian_kl gaussian_log_prob"
DRAWS = "gaussian_rsample gaussian_rsample_kl"
TINY, MEDIUM, LARGE = range(2**7, 1281), range(2**20, 2**20 + 1), range(2**24, 2**40)
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"
WIDE, NARROW, VERY_WIDE = range(64, 4097), range(1, 64), range(32769, 2**40)
GOALS = [
    # "CPU, 2 cores AVX2, 2^20 elements: rsample_kl forward >= 6x eager and >= 10x torch.compile;
    Goal("cpu", "gaussian_rsample_kl", FORWARD, "over_eager", 6, MEDIUM),
    Goal("cpu", "gaussian_rsample_kl", FORWARD, "over_compile", 10, MEDIUM),
    # forward + backward >= 8x eager;
    Goal("cpu", "gaussian_rsample_kl", BOTH, "over_eager", 8, MEDIUM),
    # KL and log-likelihood forward >= 0.75 of copy, forward + backward >= 2x torch.compile; >= 1.2 G normals/s"
    Goal("cpu", SUMS, FORWARD, "fraction_of_copy", 0.75, MEDIUM),
    Goal("cpu", SUMS, BOTH, "over_compile", 2, MEDIUM),
    Goal("cpu", "gaussian_rsample", FORWARD, "gnormals_per_s", 1.2, MEDIUM, normals=True),
    # "any device, tiny tensors ([8, 16] to [128, 10]): a call costs less than the eager lines;
    Goal("any", ALL, f"{FORWARD} {BOTH}", "over_eager", 1, TINY, dtype="any", timing="host"),
    # <= 12 us forward with grad, <= 85 us forward + backward on the CPU above"
    Goal("cpu", ALL, FORWARD, "min_us", 12, TINY, dtype="any"),
    Goal("cpu", ALL, BOTH, "min_us", 85, TINY, dtype="any"),
    # "GPU, KL and log-likelihood, D 64-4096, >= 64 MB: forward >= 0.90 of copy, backward >= 0.92;
    Goal("cuda", SUMS, FORWARD, "fraction_of_copy", 0.9, LARGE, columns=WIDE),
    Goal("cuda", SUMS, BACKWARD, "fraction_of_copy", 0.92, LARGE, columns=WIDE),
    # no cliff below 0.75 for D < 64 or > 32k"
    Goal("cuda", SUMS, f"{FORWARD} {BACKWARD}", "fraction_of_copy", 0.75, LARGE, columns=NARROW),
    Goal("cuda", SUMS, f"{FORWARD} {BACKWARD}", "fraction_of_copy", 0.75, LARGE, columns=VERY_WIDE),
    # "GPU, rsample and rsample_kl, fp32: forward >= 0.90 of copy and >= 1.5x torch.compile; backward >= 0.92"
    Goal("cuda", DRAWS, FORWARD, "fraction_of_copy", 0.9, LARGE, columns=WIDE),
    Goal("cuda", DRAWS, FORWARD, "over_compile", 1.5, LARGE),
    Goal("cuda", DRAWS, BACKWARD, "fraction_of_copy", 0.92, LARGE, columns=WIDE),
    # "GPU, same, bf16: forward >= 0.80 of copy and >= 2.5x torch.compile"
    Goal("cuda", DRAWS, FORWARD, "fraction_of_copy", 0.8, LARGE, dtype="bfloat16", columns=WIDE),
    Goal("cuda", DRAWS, FORWARD, "over_compile", 2.5, LARGE, dtype="bfloat16"),
    # "GPU, forward + backward, large: >= 6x eager, >= 8x torch.distributions, >= 1.1x the best compile mode"
    Goal("cuda", ALL, BOTH, "over_eager", 6, LARGE),
    Goal("cuda", ALL, BOTH, "over_distributions", 8, LARGE),
    Goal("cuda", ALL, BOTH, "over_compile", 1.1, LARGE),
    Goal("cuda", DRAWS, BOTH, "over_compile_checkpoint", 1.1, LARGE),
]

NOISY = 1.5  # some contestant's median is this many times its minimum: the machine was doing something else
COLUMNS = ("op", "pass", "shape", "dtype", "ours", "us", "eager", "distr", "compile", "ckpt", "of copy", "goals")
PASS_NAMES = {FORWARD: "forward", BACKWARD: "backward", BOTH: "fwd+bwd"}


def best(rows: Iterable[Row]) -> list[Row]:
    """Our fastest row of every case."""
    found: dict[tuple, Row] = {}
    for row in rows:
        if row.contestant in OURS:
            kept = found.setdefault((row.run, row.timed), row)
            if row.typical_us < kept.typical_us:
                found[row.run, row.timed] = row
    return list(found.values())


def table(rows: Iterable[Row]) -> str:
    """Our best time of every case of the Gaussian ops, how many times as long each rival takes, and whether the goals
    are met; then all others."""
    rows = list(rows)
    gaussian = [row for row in rows if topic(row) == "speed"]
    noisy = {row.timed for row in gaussian if row.noisy}
    tables = [aligned([COLUMNS, *(_line(row, row.timed in noisy) for row in best(gaussian))])] if gaussian else []
    for name in ("convolutions", "sampling", "dropins"):
        others = [row for row in rows if topic(row) == name]
        tables += [rivals_table(others)] if others else []
    return "\n\n".join(tables)


def topic(row: Row | MemoryRow) -> str:
    """What a row is about; each topic has a table and a figure."""
    if isinstance(row, MemoryRow):
        return "memory"
    return {"masked_conv2d": "convolutions", "sampling": "sampling"}.get(
        row.op, "speed" if row.op in ALL.split() else "dropins"
    )


def compared(row: Row) -> tuple:
    """What rows have in common that are held against each other; a time that is extrapolated is one of the same."""
    return row.run, row.op, row.case, row.pass_.removesuffix("_extrapolated"), row.shape, row.dtype, row.timing


def form_of(contestant: str) -> str:
    """A contestant, in whatever memory format and way of cropping."""
    return contestant.removesuffix("_channels_last").removesuffix("_sliced")


def over(rows: Iterable[Row]) -> list[tuple[Row, dict[str, float]]]:
    """Ours of every case, each with how many times as long its rivals take in their fastest form."""
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(compared(row), []).append(row)
    found = []
    for of_case in cases.values():
        fastest: dict[str, float] = {}
        for row in of_case:
            name = form_of(row.contestant)
            fastest[name] = min(row.typical_us, fastest.get(name, math.inf))
        rivals = {name: time for name, time in fastest.items() if name not in OURS}
        ours = [row for row in of_case if form_of(row.contestant) in OURS]
        found += [(row, {name: time / row.typical_us for name, time in rivals.items()}) for row in ours]
    return found


def rivals_table(rows: Iterable[Row]) -> str:
    """Our times of every case, and how many times as long each rival takes."""
    rows = list(rows)
    noisy = {compared(row) for row in rows if row.noisy}
    found = over(rows)
    names = list(dict.fromkeys(name for _, ratios in found for name in ratios))
    lines = [("op", "pass", "shape", "dtype", "ours", "us", *names, "")]
    for row, ratios in found:
        marks = ["NOISY"] * (compared(row) in noisy) + ["UNVERIFIED"] * (row.verified != "yes")
        cells = (f"{ratios[name]:.2f}x" if name in ratios else "" for name in names)
        common = (f"{row.op} {row.case}".strip(), PASS_NAMES.get(row.pass_, row.pass_), row.shape, row.dtype)
        lines.append((*common, row.contestant, f"{row.typical_us:.4g}", *cells, "; ".join(marks)))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells as columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(text.rstrip() for text in texts)


def _line(row: Row, noisy: bool) -> tuple[str, ...]:
    ratios = row.over_eager, row.over_distributions, row.over_compile, row.over_compile_checkpoint
    verdicts = [goal.verdict(row) for goal in GOALS if goal.applies(row)]
    if row.verified != "yes":
        verdicts.insert(0, "UNVERIFIED")
    if noisy:
        verdicts.insert(0, "NOISY")
    graph = " in a graph" if row.timing == "graph" else ""
    return (
        f"{row.op} {row.case}".strip(),
        PASS_NAMES[row.pass_] + graph,
        row.shape,
        row.dtype,
        row.contestant,
        f"{row.typical_us:.4g}",
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        "" if row.fraction_of_copy is None else f"{row.fraction_of_copy:.2f}",
        "; ".join(filter(None, verdicts)),
    )


def goals_table(rows: Iterable[Row]) -> str:
    """A line for every goal that some row is held against: how many rows meet it, and the one that is furthest off."""
    lines = [("goal", "pass", "ops", "dtype", "elements", "event", "met", "worst", "at")]
    ours = best(rows)
    for goal in GOALS:
        held = [row for row in ours if goal.applies(row) and goal.met(row) is not None]
        if not held:
            continue
        worst = (max if goal.limit else min)(held, key=lambda row: getattr(row, goal.column))
        met = sum(goal.met(row) for row in held)
        lines.append(
            (
                str(goal),
                "/".join(PASS_NAMES[name] for name in goal.passes.split()),
                "all" if goal.ops == ALL else goal.ops.replace("gaussian_", "").replace(" ", "/"),
                goal.dtype,
                {TINY: "tiny", MEDIUM: "medium", LARGE: "large"}[goal.elements],
                {WIDE: "64..4096", NARROW: "< 64", VERY_WIDE: "> 32k"}.get(goal.columns, "any"),
                f"{met}/{len(held)}" + ("" if met == len(held) else " NOT MET"),
                f"{getattr(worst, goal.column):.3g}",
                f"{worst.op.removeprefix('gaussian_')} {worst.case} {worst.shape} {worst.contestant}".replace(
                    "  ", " "
                ),
            )
        )
    return aligned(lines)


def memory_table(rows: Iterable[MemoryRow]) -> str:
    """Bytes per element of every case: kept for the backward by each contestant, and the peak of both passes."""
    cases: dict[tuple, dict[str, MemoryRow]] = {}
    for row in rows:
        cases.setdefault(row.timed, {})[row.contestant] = row
    order = (*OURS, "eager", "distributions", "compile", "compile_checkpoint")
    names = [name for name in order if any(name in found for found in cases.values())]
    lines = [("op", "shape", "dtype", "bytes per element", *names, "results")]
    for (op, case, shape, dtype), found in cases.items():
        results = _per_element(next(iter(found.values())), "result_bytes")
        for title, column in (("saved", "saved_bytes"), ("peak", "peak_bytes")):
            cells = [_per_element(found.get(name), column) for name in names]
            if any(cells):
                lines.append((f"{op} {case}".strip(), shape, dtype, title, *cells, results))
    return aligned(lines)


def _per_element(row: MemoryRow | None, column: str) -> str:
    count = None if row is None else getattr(row, column)
    if count is None:
        return ""
    return f"{count} in all" if 0 < count < row.elements / 100 else f"{count / row.elements:.4g}"
