"""Result rows: what they hold, where they are kept, the goals they are held against, and the table made of them."""

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


OURS = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # our backends, and the device each is for


@dataclass(frozen=True)
class Row:
    """One contestant of one case. Times are per call; ratios are of minima within one interleaved run."""

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

    @property
    def run(self) -> tuple:
        return self.machine, self.threads, self.isa, self.torch, self.fastelbo, self.python, self.commit

    @property
    def timed(self) -> tuple:
        return self.op, self.case, self.pass_, self.shape, self.dtype


NAMES = [field.name for field in fields(Row)]
HEADER = [name.rstrip("_") for name in NAMES]


def times(samples: Sequence[float]) -> dict[str, float]:
    """Quantiles of seconds, as a Row holds them."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    seconds = {"min_us": min(samples), "p20_us": p20, "median_us": statistics.median(samples), "p80_us": p80}
    return {name: 1e6 * value for name, value in seconds.items()}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file, which keeps all that it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        file.seek(0)
        found = next(csv.reader(file), None)
        if found not in (None, HEADER):
            raise ValueError(f"{path} has other columns than this version writes: move it away first")
        writer = csv.writer(file, lineterminator="\n")
        if found is None:
            writer.writerow(HEADER)
        for row in rows:
            values = (getattr(row, name) for name in NAMES)
            writer.writerow(f"{value:.5g}" if isinstance(value, float) else value for value in values)


def read(path: Path) -> list[Row]:
    """The newest row of every run, case and contestant."""
    parsers = [kind if (kind := field.type) in (int, float, str) else _optional for field in fields(Row)]
    with path.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    rows = [Row(*(parse(text) for parse, text in zip(parsers, line, strict=True))) for line in lines]
    return list({(row.run, row.timed, row.contestant): row for row in rows}.values())


def _optional(text: str) -> float | None:
    return float(text) if text else None


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

    def applies(self, row: Row) -> bool:
        return (
            self.device in (OURS[row.contestant], "any")
            and row.op in self.ops.split()
            and row.pass_ in self.passes.split()
            and math.prod(map(int, row.shape.split("x"))) in self.elements
            and self.dtype in (row.dtype, "any")
            and self.normals == (row.case == "normals")
        )

    def verdict(self, row: Row) -> str | None:
        """None where the row lacks the column: that rival was left out."""
        value, limit = getattr(row, self.column), self.column == "min_us"
        if value is None:
            return None
        met = value <= self.bound if limit else value >= self.bound
        return f"{self.column} {'<=' if limit else '>='} {self.bound:g}: {'met' if met else 'NOT MET'}"


ALL = "gaussian_rsample gaussian_kl gaussian_rsample_kl gaussian_log_prob"
SUMS = "gaussian_kl gaussian_log_prob"
DRAWS = "gaussian_rsample gaussian_rsample_kl"
TINY, MEDIUM, LARGE = range(2**7, 1281), range(2**20, 2**20 + 1), range(2**24, 2**40)
BOTH = "forward_backward"
GOALS = [
    # "CPU, 2 cores AVX2, 2^20 elements: rsample_kl forward >= 6x eager and >= 10x torch.compile;
    Goal("cpu", "gaussian_rsample_kl", "forward", "over_eager", 6, MEDIUM),
    Goal("cpu", "gaussian_rsample_kl", "forward", "over_compile", 10, MEDIUM),
    # forward + backward >= 8x eager;
    Goal("cpu", "gaussian_rsample_kl", BOTH, "over_eager", 8, MEDIUM),
    # KL and log-likelihood forward >= 0.75 of copy, forward + backward >= 2x torch.compile; >= 1.2 G normals/s"
    Goal("cpu", SUMS, "forward", "fraction_of_copy", 0.75, MEDIUM),
    Goal("cpu", SUMS, BOTH, "over_compile", 2, MEDIUM),
    Goal("cpu", "gaussian_rsample", "forward", "gnormals_per_s", 1.2, MEDIUM, normals=True),
    # "any device, tiny tensors ([8, 16] to [128, 10]): a call costs less than the eager lines;
    Goal("any", ALL, f"forward {BOTH}", "over_eager", 1, TINY, dtype="any"),
    # <= 12 us forward with grad, <= 85 us forward + backward on the CPU above"
    Goal("cpu", ALL, "forward", "min_us", 12, TINY, dtype="any"),
    Goal("cpu", ALL, BOTH, "min_us", 85, TINY, dtype="any"),
    # "GPU, KL and log-likelihood, D 64-4096, >= 64 MB: forward >= 0.90 of copy"
    Goal("cuda", SUMS, "forward", "fraction_of_copy", 0.9, LARGE),
    # "GPU, rsample and rsample_kl, fp32: forward >= 0.90 of copy and >= 1.5x torch.compile"
    Goal("cuda", DRAWS, "forward", "fraction_of_copy", 0.9, LARGE),
    Goal("cuda", DRAWS, "forward", "over_compile", 1.5, LARGE),
    # "GPU, same, bf16: forward >= 0.80 of copy and >= 2.5x torch.compile"
    Goal("cuda", DRAWS, "forward", "fraction_of_copy", 0.8, LARGE, dtype="bfloat16"),
    Goal("cuda", DRAWS, "forward", "over_compile", 2.5, LARGE, dtype="bfloat16"),
    # "GPU, forward + backward, large: >= 6x eager, >= 8x torch.distributions, >= 1.1x the best compile mode"
    Goal("cuda", ALL, BOTH, "over_eager", 6, LARGE),
    Goal("cuda", ALL, BOTH, "over_distributions", 8, LARGE),
    Goal("cuda", ALL, BOTH, "over_compile", 1.1, LARGE),
    Goal("cuda", DRAWS, BOTH, "over_compile_checkpoint", 1.1, LARGE),
]

NOISY = 1.5  # some contestant's median is this many times its minimum: the machine was doing something else
COLUMNS = ("op", "pass", "shape", "dtype", "ours", "min us", "eager", "distr", "compile", "ckpt", "of copy", "goals")


def table(rows: Iterable[Row]) -> str:
    """Our best time of every case, how many times as long each rival takes, and whether the goals are met."""
    rows, best = list(rows), {}
    noisy = {row.timed for row in rows if row.median_us > NOISY * row.min_us}
    for row in rows:
        if row.contestant in OURS and (row.timed not in best or row.min_us < best[row.timed].min_us):
            best[row.timed] = row
    lines = [COLUMNS, *(_line(row, row.timed in noisy) for row in best.values())]
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
    return (
        f"{row.op} {row.case}".strip(),
        "fwd+bwd" if row.pass_ == BOTH else row.pass_,
        row.shape,
        row.dtype,
        row.contestant,
        f"{row.min_us:.4g}",
        *("" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
        f"{row.fraction_of_copy:.2f}",
        "; ".join(filter(None, verdicts)),
    )
