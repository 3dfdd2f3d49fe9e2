"""Seconds that drawing images takes, and how many times as long the rivals do."""

from figures import style
from matplotlib import pyplot
from rows import Row

CONTESTANTS = {
    "cpu": ("fastelbo", style.BLUE, "o"),
    "eager_cache": ("eager cache", style.ORANGE, "D"),
    "reference": ("fastelbo in plain torch", style.GREEN, "s"),
    "naive": ("naive loop", style.VERMILION, "^"),
}
TICKS = (0.001, 0.01, 0.1, 1, 10, 100, 1000)


def draw(found: list[Row]) -> pyplot.Figure:
    """The figure of one machine."""
    cases: dict[str, dict[str, Row]] = {}
    for row in found:
        cases.setdefault(row.shape, {})[row.contestant] = row
    figure = pyplot.figure(figsize=(12.4, 3.7), layout="constrained")
    axes = figure.subplots(1, len(cases), sharex=True, sharey=True, squeeze=False)[0]
    left, right = 1e-6 * min(row.typical_us for row in found) / 3, 1e-6 * max(row.typical_us for row in found) * 4
    for axis, (shape, of_case) in zip(axes, cases.items(), strict=True):
        images, *_ = shape.split("x")
        axis.set_title(f"{images} image{'s' * (images != '1')}")
        style.lanes(axis, [name for name, _, _ in CONTESTANTS.values()])
        style.ratio_axis(axis, left, right, 1e-6 * of_case["cpu"].typical_us, TICKS, "{x:g} s")
        points(axis, of_case)
    size = " \N{MULTIPLICATION SIGN} ".join(found[0].shape.split("x")[-2:])
    handles = [
        style.handle("seconds, and how many times as long as ours", color=style.BLACK, marker="o"),
        style.handle("extrapolated from a few pixels", color=style.BLACK, marker="o", markerfacecolor="white"),
        style.slower_patch("faster than ours"),
    ]
    style.frame(figure, f"drawing {size} images, {found[0].case}", found[0], handles)
    return figure


def points(axis, found: dict[str, Row]) -> None:
    for lane, (contestant, (_, colour, marker)) in enumerate(CONTESTANTS.items()):
        if contestant not in found:
            continue
        row = found[contestant]
        seconds, fill = 1e-6 * row.typical_us, "white" if row.pass_.endswith("_extrapolated") else colour
        point = {"color": colour, "marker": marker, "markersize": 7, "markeredgewidth": 1.5, "zorder": 3}
        axis.plot(seconds, lane, **point, markerfacecolor=fill)
        ratio = "" if contestant == "cpu" else f", {style.times(row.typical_us / found['cpu'].typical_us)}"
        fits = seconds < axis.get_xlim()[1] / 100  # else the text would leave the axis
        style.beside(axis, seconds, lane, f"{style.significant(seconds)} s{ratio}", right=fits, fontsize=9)
