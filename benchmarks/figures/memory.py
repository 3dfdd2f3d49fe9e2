"""What each op and rival keeps for the backward; on a GPU also what both passes need at most."""

from figures import style
from figures.speed import LABELS, OPS
from matplotlib import pyplot
from matplotlib.patches import Patch
from rows import OURS, MemoryRow

CONTESTANTS = (  # names in rows, label, colour
    (OURS, "fastelbo", style.BLUE),
    (("eager",), "eager lines", style.ORANGE),
    (("distributions",), "torch.distributions", style.VERMILION),
    (("compile",), "torch.compile", style.GREEN),
    (("compile_checkpoint",), "torch.compile of checkpoint", style.PURPLE),
)
COUNTS = (
    ("saved_bytes", "Bytes per element that are kept for the backward"),
    ("peak_bytes", "Bytes per element at most, in both passes"),
)
SIZES = {"float32": 4, "bfloat16": 2}


def draw(found: list[MemoryRow]) -> pyplot.Figure:
    """The figure of one machine."""
    counts = [count for count in COUNTS if any(getattr(row, count[0]) is not None for row in found)]
    dtypes = [dtype for dtype in SIZES if any(row.dtype == dtype for row in found)]
    figure = pyplot.figure(figsize=(12.4, 1.5 + 5.2 * len(counts)), layout="constrained")
    bands = figure.subfigures(len(counts), 1, squeeze=False)[:, 0]
    for band, (column, title) in zip(bands, counts, strict=True):
        band.suptitle(title, **style.HEADING)
        axes = band.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
        for axis, dtype in zip(axes, dtypes, strict=True):
            axis.set_title(dtype)
            style.lanes(axis, LABELS)
            axis.axvline(SIZES[dtype], color=style.GREY, linewidth=1.2, linestyle="--", zorder=1)
            bars(axis, [row for row in found if row.dtype == dtype], column)
        axes[0].set_xlim(0, 1.12 * max(getattr(row, column) / row.elements for row in found))
    one_tensor = {"linewidth": 1.2, "linestyle": "--", "label": "one tensor of the input's size"}
    handles = [Patch(color=colour, label=label) for _, label, colour in CONTESTANTS]
    handles.append(pyplot.Line2D([], [], color=style.GREY, **one_tensor))
    style.frame(figure, "memory", found[0], handles)
    return figure


def bars(axis, found: list[MemoryRow], column: str) -> None:
    for lane, (op, case, _) in enumerate(OPS):
        of_case = [row for row in found if (row.op, row.case) == (op, case) and getattr(row, column) is not None]
        drawn = [
            (min((row for row in of_case if row.contestant in names), key=lambda row: getattr(row, column)), colour)
            for names, _, colour in CONTESTANTS
            if any(row.contestant in names for row in of_case)
        ]
        for place, (row, colour) in enumerate(drawn):
            count, height = getattr(row, column), 0.16
            y, value = lane + height * (place - (len(drawn) - 1) / 2), count / row.elements
            axis.barh(y, value, height=0.85 * height, color=colour, zorder=2)
            if count < row.elements / 100:  # a bar of no length
                axis.plot(0, y, marker="D", markersize=5, color=colour, clip_on=False, zorder=3)
            text = f"{count} bytes in all" if 0 < count < row.elements / 100 else f"{value:.3g}"
            options = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "color": style.BLACK}
            background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
            axis.annotate(text, (value, y), (5, 0), **options, bbox=background)
