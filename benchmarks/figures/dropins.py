"""How many times as long the lines take that each drop-in replaces."""

from figures import style
from matplotlib import pyplot
from ratios import compared, over
from rows import NOISY, Row

CROSS = " \N{MULTIPLICATION SIGN} "


def draw(found: list[Row]) -> pyplot.Figure:
    """The figure of one machine."""
    noisy = {compared(row) for row in found if row.noisy}
    pairs = [(row, *ratios.values()) for row, ratios in over(found)]
    figure = pyplot.figure(figsize=(12.4, 1.7 + 0.27 * len(pairs)), layout="constrained")
    axis = figure.subplots()
    axis.set_title("How many times as long today's lines take, forward + backward")
    style.lanes(axis, [label(row) for row, _ in pairs])
    style.ratio_axis(axis, *style.limits([ratio for _, ratio in pairs], room=1.5))
    for lane, (row, ratio) in enumerate(pairs):
        colour = style.BLUE if ratio >= 1 else style.VERMILION
        fill = "white" if compared(row) in noisy else colour
        axis.plot([1, ratio], [lane, lane], color=colour, linewidth=2, zorder=2)
        axis.plot(ratio, lane, marker="o", markersize=6.5, color=colour, markerfacecolor=fill, zorder=3)
        style.beside(axis, ratio, lane, style.times(ratio), right=ratio >= 1, fontsize=8.5, color=colour)
        options = {"xycoords": axis.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 8.5}
        axis.annotate(f"{style.significant(row.typical_us / 1e3)} ms", (1.06, lane), **options, color=style.FAINT)
    axis.annotate("ours", (1.06, 1.013), xycoords="axes fraction", ha="right", fontsize=9.5, color=style.FAINT)
    noisy_label = f"a median above {NOISY:g} times the fastest: noisy"
    handles = [
        style.handle("ours is faster", color=style.BLUE, marker="o"),
        style.handle("ours is slower", color=style.VERMILION, marker="o"),
        style.handle(noisy_label, color=style.BLACK, marker="o", markerfacecolor="white"),
        style.slower_patch("slower"),
        pyplot.Line2D([], [], color=style.GREY, linewidth=1.4, label="as fast"),
    ]
    style.frame(figure, "drop-ins against the lines they replace", found[0], handles)
    return figure


def label(row: Row) -> str:
    case = f": {row.case}" if row.case else ""
    return f"{row.op.removeprefix('compat.')}{case}  [{row.shape.replace('x', CROSS)}]"
