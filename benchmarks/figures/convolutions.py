"""How many times as long the rivals of masked convolutions take, each in its better memory format."""

import rows
from figures.style import BLACK, BLUE, GREEN, ORANGE, foot, handle, head, lanes, limits, ratio_axis, slower_patch, times
from matplotlib import pyplot

RIVALS = (
    ("eager", "product with the mask", ORANGE, "o"),
    ("crop", "crop", BLUE, "D"),
    ("compile", "torch.compile of the crop", GREEN, "s"),
)
PASSES = (("forward", "forward"), ("forward_backward", "forward + backward"))
LABEL = 1.35  # as much of the axis as a value's text takes
OUTLINED = {"markerfacecolor": "none", "markeredgewidth": 1.3, "markersize": 6.8}


def draw(found: list[rows.Row]) -> pyplot.Figure:
    """The figure of one machine."""
    over = fastest(rows.over(found))
    layers = list(dict.fromkeys((row.case, row.shape, row.dtype) for row, _ in over))
    figure = pyplot.figure(figsize=(12.4, 1.7 + 0.5 * len(layers)), layout="constrained")
    axes = figure.subplots(1, len(PASSES), sharey=True)
    bounds = limits([ratio for _, ratios in over for ratio in ratios.values()])
    for axis, (pass_, title) in zip(axes, PASSES, strict=True):
        axis.set_title(f"How many times as long the rivals take, {title}")
        lanes(axis, [label(*layer) for layer in layers])
        ratio_axis(axis, *bounds)
        for lane, layer in enumerate(layers):
            of_layer = [
                (row, ratios) for row, ratios in over if (row.case, row.shape, row.dtype, row.pass_) == (*layer, pass_)
            ]
            points(axis, lane, of_layer)
    head(figure, f"fastelbo on a {'GPU' if found[0].on_gpu else 'CPU'}: masked convolutions", found[0])
    handles = [handle(name, color=colour, marker=marker) for _, name, colour, marker in RIVALS]
    handles += [
        handle("ours contiguous, with its value", color=BLACK, marker="o"),
        handle("ours in channels_last", color=BLACK, marker="o", **OUTLINED),
        slower_patch(),
    ]
    foot(figure, handles)
    return figure


def fastest(over: list[tuple[rows.Row, dict[str, float]]]) -> list[tuple[rows.Row, dict[str, float]]]:
    """Of our backends the fastest, in each memory format."""
    kept: dict[tuple, tuple] = {}
    for row, ratios in sorted(over, key=lambda entry: -entry[0].typical_us):
        kept[(rows.compared(row), row.contestant.endswith("_channels_last"))] = row, ratios
    return [entry for entry in over if entry in kept.values()]


def label(case: str, shape: str, dtype: str) -> str:
    """As 64 to 64, 7 x 7 B, on 16 x 28 x 28."""
    channels, kernel, mask = case.split()
    inputs, outputs = channels.split("-")
    images, _, height, _ = shape.split("x")
    cross, side = "\N{MULTIPLICATION SIGN}", kernel.removeprefix("k")
    layer = f"{inputs}\N{RIGHTWARDS ARROW}{outputs}, {side}{cross}{side} {mask}"
    return f"{layer}, {images} {cross} {height}\N{SUPERSCRIPT TWO}" + ("" if dtype == "float32" else f", {dtype}")


def points(axis, lane: int, of_layer: list[tuple[rows.Row, dict[str, float]]]) -> None:
    for place, (name, _, colour, marker) in enumerate(RIVALS):
        y, found = lane + 0.29 * (place - 1), {}
        for row, ratios in of_layer:
            if name in ratios:
                outlined = row.contestant.endswith("_channels_last")
                found[outlined] = ratios[name]
                style = {"color": colour, "marker": marker, "markersize": 5, "zorder": 3}
                axis.plot(ratios[name], y, **(style | OUTLINED if outlined else style))
        if False in found:
            value, other = found[False], found.get(True, 0)
            x = other if value < other < LABEL * value else value  # not across the other point
            options = {"va": "center", "fontsize": 7.5, "color": BLACK, "zorder": 4}
            axis.annotate(times(value), (x, y), (6, 0), textcoords="offset points", **options)
