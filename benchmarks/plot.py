"""Draws benchmarks/results: how near our ops come to a copy, and how many times as long the rivals take.

One figure for each device, of the newest rows of each machine's last commit. A point is our fastest backend.
"""

import argparse
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import rows
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
# Okabe and Ito's palette, which stays apart for every kind of colour vision
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#1b1b1b",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
SIZES = (  # name, elements, colour, marker
    ("tiny", range(1, 2**15), SKY, "o"),
    ("2^20", range(2**20, 2**20 + 1), GREEN, "s"),
    ("2^24", range(2**24, 2**24 + 1), ORANGE, "D"),
    ("2^26", range(2**24 + 1, 2**40), VERMILION, "^"),
)
OPS = (
    ("gaussian_rsample", "", "rsample"),
    ("gaussian_rsample_kl", "", "rsample + KL"),
    ("gaussian_kl", "standard normal", "KL to N(0, I)"),
    ("gaussian_kl", "learned prior", "KL, learned prior"),
    ("gaussian_log_prob", "", "log-likelihood"),
    ("gaussian_log_prob", "scalar scale", "log-likelihood,\none sigma"),
)
RIVALS = (
    ("over_eager", "eager lines"),
    ("over_distributions", "torch.distributions"),
    ("over_compile", "torch.compile"),
    ("over_compile_checkpoint", "torch.compile of checkpoint"),
)
PASSES = ((rows.FORWARD, "forward"), (rows.BACKWARD, "backward"), (rows.BOTH, "forward + backward"))
HALF = "bfloat16"
GREY = "#8a8a8a"
HEADING = {"fontsize": 11.5, "fontweight": "bold", "x": 0.012, "ha": "left"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR", help="default: docs/figures")
    options = parser.parse_args()
    paths = options.path or rows.result_files()
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        parser.exit(1, f"{', '.join(missing)}: no such file\n")
    found = rows.stored(paths)
    if not found:
        parser.exit(1, f"no rows in {', '.join(map(str, paths)) or rows.RESULTS}: run pytest benchmarks\n")
    options.output.mkdir(parents=True, exist_ok=True)
    style()
    for device, of_device in groupby(sorted(found, key=lambda row: row.on_gpu), key=lambda row: row.on_gpu):
        machines = [list(group) for _, group in groupby(sorted(of_device, key=by_run), key=by_run)]
        newest = max(machines, key=lambda group: group[-1].timestamp)
        for group in machines:
            name = f"speed_{'cuda' if device else 'cpu'}"
            if group is not newest:
                name += "_" + "".join(c if c.isalnum() else "-" for c in group[0].machine.lower())
            path = options.output / f"{name}.png"
            figure = draw(group)
            figure.savefig(path)
            pyplot.close(figure)
            print(path)


def by_run(row: rows.Row) -> tuple:
    return row.run


def style() -> None:
    pyplot.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "xtick.color": "#444444",
            "ytick.color": "#222222",
            "ytick.left": False,
            "savefig.dpi": 150,
        }
    )


def draw(found: list[rows.Row]) -> pyplot.Figure:
    """The figure of one machine."""
    ours = [row for row in rows.best(found) if row.case != "normals"]
    graphs = [row for row in ours if row.timing == "graph"]
    ours = [row for row in ours if row.timing != "graph"]
    # the sweep over the length of events is drawn apart; of it, 2^26 elements as 1024 belong to both
    lengths = {row.columns for row in ours if row.elements > 2**24 and not is_sized(row)}
    sized = [row for row in ours if is_sized(row)]
    swept = [row for row in ours if row.elements > 2**24 and row.op in (rows.SUMS + " gaussian_rsample_kl").split()]
    passes = [(name, title) for name, title in PASSES if any(row.pass_ == name for row in sized)]
    rivals = [rival for rival in RIVALS if any(getattr(row, rival[0]) is not None for row in sized)]
    compared = [(name, title) for name, title in passes if name != rows.BACKWARD]

    heights = [1.0, *[1.0 for _ in compared], *([0.95] if lengths else [])]
    figure = pyplot.figure(figsize=(12.4, 1.4 + 3.0 * sum(heights)), layout="constrained")
    bands = figure.subfigures(len(heights), 1, height_ratios=heights)
    bands = list(bands) if len(heights) > 1 else [bands]
    fractions(bands[0], sized, passes)
    largest = max((getattr(row, column) or 1 for row in [*sized, *graphs] for column, _ in rivals), default=1)
    for band, (name, title) in zip(bands[1:], compared, strict=False):
        of_pass = [row for row in [*sized, *graphs] if row.pass_ == name]
        ratios(band, of_pass, title, rivals, max(20, 1.3 * largest))
    if lengths:
        sweep(bands[-1], swept)
    first = found[0]
    versions = f"torch {first.torch}, fastelbo {first.fastelbo} at commit {first.commit}"
    machine = first.machine if first.on_gpu else f"{first.machine}, {first.threads} threads, {first.isa}"
    if first.on_gpu:
        versions += f", CUDA {first.cuda}, Triton {first.triton}"
    noun = "GPU" if first.on_gpu else "CPU"
    figure.suptitle(f"fastelbo on a {noun}: {machine}\n\n", fontsize=14, fontweight="bold", x=0.012, ha="left")
    figure.text(0.0125, 1 - 0.42 / figure.get_figheight(), versions, fontsize=9.5, color="#555555", va="center")
    figure.legend(
        handles=legend(sized, graphs),
        loc="outside lower center",
        ncols=8,
        frameon=False,
        fontsize=9.5,
        handletextpad=0.4,
    )
    return figure


def is_sized(row: rows.Row) -> bool:
    return row.elements <= 2**24 or row.columns == 1024


def legend(sized, graphs) -> list[Line2D]:
    def handle(label, **keywords):
        return Line2D([], [], linestyle="", label=label, **keywords)

    elements = {row.elements for row in sized}
    found = [
        handle(
            f"{name} ([8, 16], [128, 10])" if name == "tiny" else f"{exponent(name)} elements", color=colour, marker=m
        )
        for name, sizes, colour, m in SIZES
        if any(count in sizes for count in elements)
    ]
    found += [
        handle("float32", color=BLACK, marker="o"),
        handle(HALF, color=BLACK, marker="o", markerfacecolor="white"),
    ]
    if graphs:
        found.append(handle("tiny, in a CUDA graph", color=PURPLE, marker="o"))
    found.append(Line2D([], [], color=BLACK, linewidth=1.6, label="goal"))
    return found


def exponent(name: str) -> str:
    return f"$2^{{{name.removeprefix('2^')}}}$"


def fractions(band, sized, passes) -> None:
    axes = band.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    band.suptitle("Speed as a fraction of a copy that moves the same bytes", **HEADING)
    big = [row for row in sized if row.elements >= 2**20 and row.fraction_of_copy is not None]
    right = max([1.05, *(1.05 * row.fraction_of_copy for row in big)])
    for axis, (name, title) in zip(axes, passes, strict=True):
        axis.set_title(title)
        axis.axvline(1, color=GREY, linewidth=1)
        lanes(axis)
        points(axis, [row for row in big if row.pass_ == name], "fraction_of_copy")
        axis.set_xlim(0, right)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def ratios(band, found, title, rivals, right) -> None:
    axes = band.subplots(1, len(rivals), sharey=True, squeeze=False)[0]
    band.suptitle(f"How many times as long the rivals take, {title}", **HEADING)
    for axis, (column, rival) in zip(axes, rivals, strict=True):
        values = [getattr(row, column) for row in found if getattr(row, column) is not None]
        if not values:
            axis.set_visible(False)
            continue
        axis.set_title(rival)
        axis.set_xscale("log")
        axis.axvline(1, color=GREY, linewidth=1)
        axis.axvspan(1e-3, 1, color="#f4f4f4", zorder=0)
        lanes(axis)
        points(axis, [row for row in found if getattr(row, column) is not None], column)
        axis.set_xlim(0.5, right)
        ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= axis.get_xlim()[1]]
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}\N{MULTIPLICATION SIGN}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", which="minor", bottom=False)


def lanes(axis) -> None:
    """One for each op, from top to bottom."""
    axis.set_ylim(len(OPS) - 0.5, -0.5)
    axis.set_yticks(range(len(OPS)), [label for _, _, label in OPS])
    axis.yaxis.grid(False)
    for lane in range(0, len(OPS), 2):
        axis.axhspan(lane - 0.5, lane + 0.5, color="#f7f7f9", zorder=0)


def points(axis, found, column) -> None:
    sizes = sorted({size for row in found if (size := size_of(row)) is not None})
    for row in found:
        lane = next((k for k, (op, case, _) in enumerate(OPS) if (row.op, row.case) == (op, case)), None)
        size = size_of(row)
        if lane is None or size is None:
            continue
        y = lane + offset(size, sizes)
        for goal in rows.GOALS:
            if goal.column == column and goal.applies(row):
                axis.plot(2 * [goal.bound], [y - 0.14, y + 0.14], color=BLACK, linewidth=2, solid_capstyle="butt")
        _, _, colour, marker = SIZES[size]
        colour = PURPLE if row.timing == "graph" else colour
        axis.plot(
            getattr(row, column),
            y,
            marker=marker,
            markersize=6,
            color=colour,
            markerfacecolor="white" if row.dtype == HALF else colour,
            markeredgewidth=1.4,
            zorder=3,
        )


def offset(size: int, sizes: list[int]) -> float:
    """Of a size from the middle of its lane."""
    return 0.25 * (sizes.index(size) - (len(sizes) - 1) / 2)


def size_of(row: rows.Row) -> int | None:
    return next((k for k, (_, sizes, _, _) in enumerate(SIZES) if row.elements in sizes), None)


def sweep(band, found) -> None:
    """Fraction of a copy against the length of an event, at one number of elements."""
    passes = [(name, title) for name, title in PASSES if name != rows.BOTH]
    axes = band.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    band.suptitle(f"Fraction of a copy by the length of an event, {exponent('2^26')} elements", **HEADING)
    colours = dict(zip([(op, case) for op, case, _ in OPS[1:]], (BLUE, GREEN, ORANGE, VERMILION, PURPLE), strict=True))
    for axis, (name, title) in zip(axes, passes, strict=True):
        axis.set_title(title)
        axis.set_xscale("log")
        axis.axhline(1, color=GREY, linewidth=1)
        for (op, case), colour in colours.items():
            for dtype, line in (("float32", "-"), (HALF, ":")):
                of_op = sorted(
                    (row for row in found if (row.op, row.case, row.dtype, row.pass_) == (op, case, dtype, name)),
                    key=lambda row: row.columns,
                )
                label = next(label for o, c, label in OPS if (o, c) == (op, case)).replace("\n", " ")
                axis.plot(
                    [row.columns for row in of_op],
                    [row.fraction_of_copy for row in of_op],
                    line,
                    color=colour,
                    marker="o",
                    markersize=4.5,
                    markerfacecolor=colour if dtype == "float32" else "white",
                    linewidth=1.6,
                    label=label if dtype == "float32" else None,
                )
        bound = {rows.FORWARD: 0.9, rows.BACKWARD: 0.92}[name]
        for y, left, right in ((0.75, 1, 64), (bound, 64, 4096), (0.75, 32769, 2e5)):
            axis.plot([left, right], [y, y], color=BLACK, linewidth=1.6)
        axis.set_ylim(0, 1.1)
        axis.set_xlabel("elements of an event")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", " ")))
    axes[-1].legend(frameon=False, fontsize=9, loc="lower right", title="dotted: bfloat16", title_fontsize=9)


if __name__ == "__main__":
    main()
