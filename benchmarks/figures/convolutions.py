"""How many times as long the rivals of masked convolutions take, each in its better memory format."""

from figures import style
from matplotlib import pyplot
from ratios import over
from rows import Row

RIVALS = (
    ("eager", "product with the mask", style.ORANGE, "o"),
    ("crop", "crop", style.BLUE, "D"),
    ("compile", "torch.compile of the crop", style.GREEN, "s"),
)
PASSES = (("forward", "forward"), ("forward_backward", "forward + backward"))
LABEL = 1.35  # as much of the axis as a value's text takes
OUTLINED = {"markerfacecolor": "none", "markeredgewidth": 1.3, "markersize": 6.8}


def draw(found: list[Row]) -> pyplot.Figure:
    """The figure of one machine."""
    ours = over(found)
    layers = list(dict.fromkeys((row.case, row.shape, row.dtype) for row, _ in ours))
    figure = pyplot.figure(figsize=(12.4, 1.7 + 0.5 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(PASSES), sharey=True)
    bounds = style.limits([ratio for _, ratios in ours for ratio in ratios.values()])
    for axis, (pass_, title) in zip(axes, PASSES, strict=True):
        axis.set_title(f"How many times as long the rivals take, {title}")
        style.lanes(axis, [label(*layer) for layer in layers])
        style.ratio_axis(axis, *bounds)
        for lane, layer in enumerate(layers):
            points(axis, lane, [one for one in ours if key(one[0]) == (*layer, pass_)])
    handles = [style.handle(name, color=colour, marker=marker) for _, name, colour, marker in RIVALS]
    handles += [
        style.handle("ours contiguous, with its value", color=style.BLACK, marker="o"),
        style.handle("ours in channels_last", color=style.BLACK, marker="o", **OUTLINED),
        style.slower_patch(),
    ]
    style.frame(figure, "masked convolutions", found[0], handles)
    return figure


def key(row: Row) -> tuple:
    return row.case, row.shape, row.dtype, row.pass_


def label(case: str, shape: str, dtype: str) -> str:
    """As 64 to 64, 7 x 7 B, on 16 x 28 x 28."""
    channels, kernel, mask = case.split()
    inputs, outputs = channels.split("-")
    images, _, height, _ = shape.split("x")
    cross, side = "\N{MULTIPLICATION SIGN}", kernel.removeprefix("k")
    layer = f"{inputs}\N{RIGHTWARDS ARROW}{outputs}, {side}{cross}{side} {mask}"
    return f"{layer}, {images} {cross} {height}\N{SUPERSCRIPT TWO}" + ("" if dtype == "float32" else f", {dtype}")


def points(axis, lane: int, of_layer: list[tuple[Row, dict[str, float]]]) -> None:
    for place, (name, _, colour, marker) in enumerate(RIVALS):
        y, found = lane + 0.29 * (place - 1), {}
        for row, ratios in of_layer:
            if name in ratios:
                outlined = row.contestant.endswith("_channels_last")
                found[outlined] = ratios[name]
                point = {"color": colour, "marker": marker, "markersize": 5, "zorder": 3}
                axis.plot(ratios[name], y, **(point | OUTLINED if outlined else point))
        if False in found:
            value, other = found[False], found.get(True, 0)
            x = other if value < other < LABEL * value else value  # not across the other point
            options = {"va": "center", "fontsize": 7.5, "color": style.BLACK, "zorder": 4}
            axis.annotate(style.times(value), (x, y), (6, 0), textcoords="offset points", **options)
