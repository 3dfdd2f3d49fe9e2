"""How near the Gaussian ops come to a copy, and how many times as long the rivals take. Ours is our fastest backend."""

import rows
from figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    HEADING,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    foot,
    handle,
    head,
    lanes,
    limits,
    ratio_axis,
    slower_patch,
)
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

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
LABELS = [label for _, _, label in OPS]
RIVALS = (
    ("over_eager", "eager lines"),
    ("over_distributions", "torch.distributions"),
    ("over_compile", "torch.compile"),
    ("over_compile_checkpoint", "torch.compile of checkpoint"),
)
PASSES = ((rows.FORWARD, "forward"), (rows.BACKWARD, "backward"), (rows.BOTH, "forward + backward"))
HALF = "bfloat16"


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
    every = [getattr(row, column) or 1 for row in [*sized, *graphs] for column, _ in rivals]
    bounds = min(0.5, *limits(every)), max(20, *limits(every))
    for band, (name, title) in zip(bands[1:], compared, strict=False):
        of_pass = [row for row in [*sized, *graphs] if row.pass_ == name]
        ratios(band, of_pass, title, rivals, bounds)
    if lengths:
        sweep(bands[-1], swept)
    head(figure, f"fastelbo on a {'GPU' if found[0].on_gpu else 'CPU'}: the Gaussian ops", found[0])
    foot(figure, legend(sized, graphs))
    return figure


def is_sized(row: rows.Row) -> bool:
    return row.elements <= 2**24 or row.columns == 1024


def legend(sized, graphs) -> list[Line2D]:
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
    found += [Line2D([], [], color=BLACK, linewidth=1.6, label="goal"), slower_patch()]
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
        lanes(axis, LABELS)
        points(axis, [row for row in big if row.pass_ == name], "fraction_of_copy")
        axis.set_xlim(0, right)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def ratios(band, found, title, rivals, bounds) -> None:
    axes = band.subplots(1, len(rivals), sharey=True, squeeze=False)[0]
    band.suptitle(f"How many times as long the rivals take, {title}", **HEADING)
    for axis, (column, rival) in zip(axes, rivals, strict=True):
        values = [getattr(row, column) for row in found if getattr(row, column) is not None]
        if not values:
            axis.set_visible(False)
            continue
        axis.set_title(rival)
        lanes(axis, LABELS)
        ratio_axis(axis, *bounds)
        points(axis, [row for row in found if getattr(row, column) is not None], column)


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
        axis.set_ylim(0, max(1.1, *(1.05 * row.fraction_of_copy for row in found)))
        axis.set_xlabel("elements of an event")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", " ")))
    axes[-1].legend(frameon=False, fontsize=9, loc="lower right", title="dotted: bfloat16", title_fontsize=9)
