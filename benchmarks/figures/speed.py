"""How near the Gaussian ops come to a copy, and how many times as long the rivals take. Ours is our fastest backend."""

from figures import style
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from ratios import over
from rows import Row

SIZES = (  # name, elements, colour, marker
    ("tiny ([8, 16], [128, 10])", range(1, 2**15), style.SKY, "o"),
    ("$2^{20}$ elements", range(2**20, 2**20 + 1), style.GREEN, "s"),
    ("$2^{24}$ elements", range(2**24, 2**24 + 1), style.ORANGE, "D"),
    ("$2^{26}$ elements", range(2**24 + 1, 2**40), style.VERMILION, "^"),
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
RIVALS = {
    "over_eager": "eager lines",
    "over_distributions": "torch.distributions",
    "over_compile": "torch.compile",
    "over_compile_checkpoint": "torch.compile of checkpoint",
}


def draw(found: list[Row]) -> pyplot.Figure:
    """The figure of one machine."""
    ours = [row for row, _ in over(found) if row.case != "normals"]
    graphs = [row for row in ours if row.timing == "graph"]
    ours = [row for row in ours if row.timing != "graph"]
    # the sweep over the length of events is drawn apart; of it, 2^26 elements as 1024 belong to both
    sized = [row for row in ours if row.elements <= 2**24 or row.columns == 1024]
    swept = [row for row in ours if row.elements > 2**24 and row.op != "gaussian_rsample"]
    passes = [name for name in style.PASSES if any(row.pass_ == name for row in sized)]
    compared = [name for name in passes if name != "backward"]

    heights = [1.0, *(1.0 for _ in compared), *([0.95] if len(ours) > len(sized) else [])]
    figure = pyplot.figure(figsize=(12.4, 1.4 + 3.0 * sum(heights)), layout="constrained")
    bands = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    fractions(bands[0], [row for row in sized if row.elements >= 2**20], passes)
    columns = [name for name in RIVALS if any(getattr(row, name) is not None for row in sized)]
    every = [getattr(row, name) or 1 for row in (*sized, *graphs) for name in columns]
    bounds = min(0.5, *style.limits(every)), max(20, *style.limits(every))
    for band, name in zip(bands[1:], compared, strict=False):
        ratios(band, [row for row in (*sized, *graphs) if row.pass_ == name], style.PASSES[name], columns, bounds)
    if len(ours) > len(sized):
        sweep(bands[-1], swept)
    style.frame(figure, "the Gaussian ops", found[0], legend(sized, graphs))
    return figure


def legend(sized, graphs) -> list[Line2D]:
    present = {size_of(row) for row in sized}
    sizes = [size for k, size in enumerate(SIZES) if k in present]
    found = [style.handle(name, color=colour, marker=marker) for name, _, colour, marker in sizes]
    for dtype, look in (("float32", {}), ("bfloat16", {"markerfacecolor": "white"})):
        found.append(style.handle(dtype, color=style.BLACK, marker="o", **look))
    if graphs:
        found.append(style.handle("tiny, in a CUDA graph", color=style.PURPLE, marker="o"))
    return [*found, style.slower_patch()]


def fractions(band, found, passes) -> None:
    axes = band.subplots(1, len(passes), sharey=True, squeeze=False)[0]
    band.suptitle("Speed as a fraction of a copy that moves the same bytes", **style.HEADING)
    found = [row for row in found if row.fraction_of_copy is not None]
    right = max([1.05, *(1.05 * row.fraction_of_copy for row in found)])
    for axis, name in zip(axes, passes, strict=True):
        axis.set_title(style.PASSES[name])
        axis.axvline(1, color=style.GREY, linewidth=1)
        style.lanes(axis, LABELS)
        points(axis, [row for row in found if row.pass_ == name], "fraction_of_copy")
        axis.set_xlim(0, right)
        axis.xaxis.set_major_formatter("{x:g}")


def ratios(band, found, title, columns, bounds) -> None:
    axes = band.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    band.suptitle(f"How many times as long the rivals take, {title}", **style.HEADING)
    for axis, column in zip(axes, columns, strict=True):
        compared = [row for row in found if getattr(row, column) is not None]
        axis.set_visible(bool(compared))
        axis.set_title(RIVALS[column])
        style.lanes(axis, LABELS)
        style.ratio_axis(axis, *bounds)
        points(axis, compared, column)


def points(axis, found, column) -> None:
    drawn = sorted({size_of(row) for row in found} - {None})
    for row in found:
        lane = next((k for k, (op, case, _) in enumerate(OPS) if (row.op, row.case) == (op, case)), None)
        size = size_of(row)
        if lane is None or size is None:
            continue
        y = lane + 0.25 * (drawn.index(size) - (len(drawn) - 1) / 2)
        _, _, colour, marker = SIZES[size]
        colour = style.PURPLE if row.timing == "graph" else colour
        fill = "white" if row.dtype == "bfloat16" else colour
        point = {"marker": marker, "markersize": 6, "color": colour, "markerfacecolor": fill, "markeredgewidth": 1.4}
        axis.plot(getattr(row, column), y, **point, zorder=3)


def size_of(row: Row) -> int | None:
    return next((k for k, (_, sizes, _, _) in enumerate(SIZES) if row.elements in sizes), None)


def sweep(band, found) -> None:
    """Fraction of a copy against the length of an event, at one number of elements."""
    axes = band.subplots(1, 2, sharey=True)
    band.suptitle("Fraction of a copy by the length of an event, $2^{26}$ elements", **style.HEADING)
    colours = style.BLUE, style.GREEN, style.ORANGE, style.VERMILION, style.PURPLE
    for axis, pass_ in zip(axes, ("forward", "backward"), strict=True):
        axis.set_title(style.PASSES[pass_])
        axis.set_xscale("log")
        axis.axhline(1, color=style.GREY, linewidth=1)
        for (op, case, label), colour in zip(OPS[1:], colours, strict=True):
            for dtype, line, fill in (("float32", "-", colour), ("bfloat16", ":", "white")):
                of_op = [row for row in found if (row.op, row.case, row.dtype, row.pass_) == (op, case, dtype, pass_)]
                of_op.sort(key=lambda row: row.columns)
                points = [row.columns for row in of_op], [row.fraction_of_copy for row in of_op]
                look = {"color": colour, "marker": "o", "markersize": 4.5, "markerfacecolor": fill, "linewidth": 1.6}
                axis.plot(*points, line, **look, label=label.replace("\n", " ") if dtype == "float32" else None)
        axis.set_ylim(0, max(1.1, *(1.05 * row.fraction_of_copy for row in found)))
        axis.set_xlabel("elements of an event")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", " ")))
    axes[-1].legend(frameon=False, fontsize=9, loc="lower right", title="dotted: bfloat16", title_fontsize=9)
