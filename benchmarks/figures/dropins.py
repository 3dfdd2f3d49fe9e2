"""How many times as long the lines take that each drop-in replaces."""

import rows
from figures.style import (
    BLACK,
    BLUE,
    GREY,
    VERMILION,
    foot,
    handle,
    head,
    lanes,
    limits,
    ratio_axis,
    significant,
    slower_patch,
    times,
)
from matplotlib import pyplot

CROSS = " \N{MULTIPLICATION SIGN} "


def draw(found: list[rows.Row]) -> pyplot.Figure:
    """The figure of one machine."""
    noisy = {rows.compared(row) for row in found if row.noisy}
    over = [(row, *ratios.values()) for row, ratios in rows.over(found)]
    figure = pyplot.figure(figsize=(12.4, 1.7 + 0.27 * len(over)), layout="constrained")
    axis = figure.subplots()
    axis.set_title("How many times as long today's lines take, forward + backward")
    lanes(axis, [label(row) for row, _ in over])
    ratio_axis(axis, *limits([ratio for _, ratio in over], room=1.5))
    for lane, (row, ratio) in enumerate(over):
        colour = BLUE if ratio >= 1 else VERMILION
        axis.plot([1, ratio], [lane, lane], color=colour, linewidth=2, zorder=2)
        filled = "white" if rows.compared(row) in noisy else colour
        axis.plot(ratio, lane, marker="o", markersize=6.5, color=colour, markerfacecolor=filled, zorder=3)
        right = {"xytext": (8, 0), "ha": "left"} if ratio >= 1 else {"xytext": (-8, 0), "ha": "right"}
        options = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
        axis.annotate(times(ratio), (ratio, lane), **right, **options, color=colour)
        time = f"{significant(row.typical_us / 1e3)} ms"
        options = {"xycoords": axis.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 8.5}
        axis.annotate(time, (1.06, lane), **options, color="#555555")
    axis.annotate("ours", (1.06, 1.013), xycoords="axes fraction", ha="right", fontsize=9.5, color="#555555")
    head(
        figure,
        f"fastelbo on a {'GPU' if found[0].on_gpu else 'CPU'}: drop-ins against the lines they replace",
        found[0],
    )
    foot(
        figure,
        [
            handle("ours is faster", color=BLUE, marker="o"),
            handle("ours is slower", color=VERMILION, marker="o"),
            handle(
                f"a median above {rows.NOISY:g} times the fastest: noisy",
                color=BLACK,
                marker="o",
                markerfacecolor="white",
            ),
            slower_patch("slower"),
            pyplot.Line2D([], [], color=GREY, linewidth=1.4, label="as fast"),
        ],
    )
    return figure


def label(row: rows.Row) -> str:
    case = f": {row.case}" if row.case else ""
    return f"{row.op.removeprefix('compat.')}{case}  [{row.shape.replace('x', CROSS)}]"
