"""How many times as long the rivals of masked convolutions take, each in its better memory format; on a GPU the kernels
alone, where they were timed."""

from figures import style
from matplotlib import pyplot
from ratios import over
from rows import Row

RIVALS = (
    ("eager", "product with the mask", style.ORANGE, "o"),
    ("full", "full convolution", style.VERMILION, "^"),
    ("crop", "crop", style.BLUE, "D"),
    ("compile", "torch.compile of the crop", style.GREEN, "s"),
)
LABEL = 1.35  # as much of the axis as a value's text takes
OUTLINED = {"markerfacecolor": "none", "markeredgewidth": 1.3, "markersize": 6.8}


def draw(found: list[Row]) -> pyplot.Figure:
    """The figure of one machine."""
    ours = over([row for row in found if row.timing == "events"] or found)
    layers = list(dict.fromkeys((row.case, row.shape, row.dtype) for row, _ in ours))
    passes = [name for name in style.PASSES if any(row.pass_ == name for row, _ in ours)]
    rivals = [rival for rival in RIVALS if any(rival[0] in ratios for _, ratios in ours)]
    rows_of_axes = (len(passes) + 1) // 2
    figure = pyplot.figure(figsize=(12.4, 1.2 + rows_of_axes * (0.5 + 0.45 * len(layers))), layout="constrained")
    axes = list(figure.subplots(rows_of_axes, 2, sharey=True, squeeze=False).flat)
    for axis in axes[len(passes) :]:
        axis.set_visible(False)
    bounds = style.limits([ratio for _, ratios in ours for ratio in ratios.values()])
    for axis, pass_ in zip(axes, passes, strict=False):
        axis.set_title(f"How many times as long the rivals take, {style.PASSES[pass_]}")
        style.lanes(axis, [label(*layer) for layer in layers])
        style.ratio_axis(axis, *bounds)
        for lane, layer in enumerate(layers):
            of_lane = [one for one in ours if one[0].timed[1:5] == (layer[0], pass_, *layer[1:])]
            points(axis, lane, of_lane, rivals)
    handles = [style.handle(name, color=colour, marker=marker) for _, name, colour, marker in rivals]
    handles += [
        style.handle("ours contiguous, with its value", color=style.BLACK, marker="o"),
        style.handle("ours in channels_last", color=style.BLACK, marker="o", **OUTLINED),
        style.slower_patch(),
    ]
    style.frame(figure, "masked convolutions", found[0], handles)
    return figure


def label(case: str, shape: str, dtype: str) -> str:
    """As 64 to 64, 7 x 7 B, on 16 x 28 x 28."""
    channels, kernel, mask = case.split()
    inputs, outputs = channels.split("-")
    images, _, height, _ = shape.split("x")
    cross, side = "\N{MULTIPLICATION SIGN}", kernel.removeprefix("k")
    layer = f"{inputs}\N{RIGHTWARDS ARROW}{outputs}, {side}{cross}{side} {mask}"
    return f"{layer}, {images} {cross} {height}\N{SUPERSCRIPT TWO}" + ("" if dtype == "float32" else f", {dtype}")


def points(axis, lane: int, of_layer: list[tuple[Row, dict[str, float]]], rivals) -> None:
    for place, (name, _, colour, marker) in enumerate(rivals):
        y, found = lane + 0.87 / len(rivals) * (place - (len(rivals) - 1) / 2), {}
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
