"""Seconds that drawing images takes, and how many times as long the rivals do."""

import rows
from figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SLOWER,
    VERMILION,
    foot,
    handle,
    head,
    lanes,
    significant,
    slower_patch,
    times,
)
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

CONTESTANTS = {
    "cpu": ("fastelbo", BLUE, "o"),
    "eager_cache": ("eager cache", ORANGE, "D"),
    "reference": ("fastelbo in plain torch", GREEN, "s"),
    "naive": ("naive loop", VERMILION, "^"),
}
TICKS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)


def draw(found: list[rows.Row]) -> pyplot.Figure:
    """The figure of one machine."""
    cases: dict[str, list[rows.Row]] = {}
    for row in found:
        cases.setdefault(row.shape, []).append(row)
    figure = pyplot.figure(figsize=(12.4, 3.7), layout="constrained")
    axes = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)[0]
    shortest, longest = (pick(1e-6 * row.typical_us for row in found) for pick in (min, max))
    for axis, (shape, of_case) in zip(axes, cases.items(), strict=True):
        images, *_ = shape.split("x")
        axis.set_title(f"{images} image{'s' * (images != '1')}")
        lanes(axis, [name for name, _, _ in CONTESTANTS.values()])
        axis.set_xscale("log")
        axis.set_xlim(shortest / 3, longest * 4)
        axis.set_xticks([tick for tick in TICKS if shortest / 3 <= tick <= longest * 4])
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} s"))
        axis.xaxis.set_minor_locator(NullLocator())
        points(axis, {row.contestant: row for row in of_case})
    first = found[0]
    size = " \N{MULTIPLICATION SIGN} ".join(first.shape.split("x")[-2:])
    head(figure, f"fastelbo on a {'GPU' if first.on_gpu else 'CPU'}: drawing {size} images, {first.case}", first)
    foot(
        figure,
        [
            handle("seconds, and how many times as long as ours", color=BLACK, marker="o"),
            handle("extrapolated from a few pixels", color=BLACK, marker="o", markerfacecolor="white"),
            slower_patch("faster than ours"),
        ],
    )
    return figure


def points(axis, found: dict[str, rows.Row]) -> None:
    ours = found["cpu"].typical_us
    axis.axvspan(1e-9, 1e-6 * ours, color=SLOWER, zorder=0.5)
    axis.axvline(1e-6 * ours, color=GREY, linewidth=1.4, zorder=1)
    for lane, (contestant, (_, colour, marker)) in enumerate(CONTESTANTS.items()):
        if contestant not in found:
            continue
        row = found[contestant]
        seconds, extrapolated = 1e-6 * row.typical_us, row.pass_.endswith("_extrapolated")
        style = {"color": colour, "marker": marker, "markersize": 7, "markeredgewidth": 1.5, "zorder": 3}
        axis.plot(seconds, lane, **style, markerfacecolor="white" if extrapolated else colour)
        text = f"{significant(seconds)} s" + ("" if contestant == "cpu" else f", {times(row.typical_us / ours)}")
        inner = seconds < axis.get_xlim()[1] / 100  # else the text would leave the axis
        side = {"xytext": (8, 0), "ha": "left"} if inner else {"xytext": (-8, 0), "ha": "right"}
        axis.annotate(text, (seconds, lane), textcoords="offset points", va="center", fontsize=9, **side)
