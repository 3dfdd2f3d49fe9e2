"""The figures of memory, masked convolutions, drawing images and drop-ins: a lane a case, ours against rivals."""

import plot_speed
import rows
from matplotlib import pyplot
from matplotlib.lines import Line2D
from plot_style import (
    BLACK,
    BLUE,
    GREEN,
    HALF,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    foot,
    head,
    lanes,
    point,
    ratio_axis,
    slower,
    times,
)
from tables import LAST, best_of, by_case

PASSES = {rows.FORWARD: "forward", rows.BOTH: "forward + backward"}


def handle(label: str, colour: str, marker: str = "o", filled: bool = True, size: int = 6) -> Line2D:
    face = colour if filled else "white"
    style = {"marker": marker, "markerfacecolor": face, "markersize": size}
    return Line2D([], [], linestyle="", label=label, color=colour, **style)


# memory

KEEPERS = (  # contestant, label, colour, marker
    ("ours", "ours", BLACK, "o"),
    ("eager", "eager lines", BLUE, "s"),
    ("distributions", "torch.distributions", VERMILION, "D"),
    ("compile", "torch.compile", GREEN, "^"),
    ("compile_checkpoint", "torch.compile of checkpoint", PURPLE, "v"),
)


def memory(found: list[rows.MemoryRow]) -> pyplot.Figure:
    """Bytes per element that are kept for the backward."""
    cases = by_case(found)
    dtypes = [dtype for dtype in ("float32", HALF) if any(row.dtype == dtype for row in found)]
    figure, axes = pyplot.subplots(
        1, len(dtypes), figsize=(12.4, 5.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        axis.set_title(f"{dtype}, bytes per element")
        lanes(axis, plot_speed.LABELS)
        for lane, (op, case, _) in enumerate(plot_speed.OPS):
            of_case = [by for key, by in cases.items() if (key[0], key[1], key[3]) == (op, case, dtype)]
            for by in of_case:
                counted = {"ours": next(row for name, row in by.items() if name in rows.OURS), **by}
                kept = [(counted[name], *how) for name, *how in KEEPERS if name in counted]
                for k, (row, _, colour, marker) in enumerate(kept):
                    y, x = lane + 0.16 * (k - (len(kept) - 1) / 2), row.saved_bytes / row.elements
                    axis.plot([0, x], [y, y], color=colour, linewidth=1.6, zorder=2)
                    point(axis, x, y, colour, marker, clip_on=False)
        axis.set_xlim(0, 1.05 * max(row.saved_bytes / row.elements for row in found))
    figure.get_layout_engine().set(w_pad=0.12)
    head(figure, found[0], ": kept for the backward,")
    foot(figure, [handle(label, colour, marker) for _, label, colour, marker in KEEPERS])
    return figure


# masked convolutions

LAYER_RIVALS = (
    ("eager", "product with the mask", BLUE, "s"),
    ("crop", "cropped", ORANGE, "D"),
    ("compile", "cropped, torch.compile", GREEN, "^"),
)


def convolutions(found: list[rows.Row]) -> pyplot.Figure:
    """How many times as long each rival takes, in its better memory format."""
    layers = list(dict.fromkeys((row.case, row.shape, row.dtype) for row in found))
    labels = [layer_label(*layer) for layer in layers]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(12.4, 1.9 + 0.42 * len(layers)), sharey=True, squeeze=False, layout="constrained"
    )
    cases = by_case(found)
    for axis, (pass_, title) in zip(axes[0], PASSES.items(), strict=True):
        axis.set_title(f"{title}: how many times as long the rivals take")
        lanes(axis, labels)
        ratio_axis(axis, 0.45, 10)
        for (_, case, of_pass, shape, dtype, _), by in cases.items():
            if of_pass != pass_:
                continue
            lane = layers.index((case, shape, dtype))
            formats = {
                suffix: min((row.typical_us for name, row in by.items() if name in ours), default=None)
                for suffix in ("", LAST)
                for ours in [{name + suffix for name in rows.OURS}]
            }
            for k, (rival, _, colour, marker) in enumerate(LAYER_RIVALS):
                theirs = best_of(by, rival)
                for suffix, our_time in formats.items():
                    if theirs and our_time:
                        # a ring around a point that it falls on
                        ring = {"filled": False, "markersize": 9, "zorder": 2} if suffix else {}
                        point(axis, theirs / our_time, lane + 0.25 * (k - 1), colour, marker, **ring)
    head(figure, found[0], ": masked convolutions")
    handles = [handle(label, colour, marker) for _, label, colour, marker in LAYER_RIVALS]
    handles += [
        handle("ours contiguous", BLACK),
        handle("ours in channels_last", BLACK, filled=False, size=9),
        slower(),
    ]
    foot(figure, handles)
    return figure


def layer_label(case: str, shape: str, dtype: str) -> str:
    """Of `64-64 k7 B` on 128x64x28x28, what people write."""
    channels, size, mask = case.split()
    images, _, side, _ = shape.split("x")
    label = f"{channels.replace('-', ' to ')}, {size[1:]} \N{MULTIPLICATION SIGN} {size[1:]} {mask}, "
    label += f"{images} images of {side}\N{SUPERSCRIPT TWO}"
    return label if dtype == "float32" else f"{label}, {dtype}"


# drawing images

DRAWING_RIVALS = (
    ("eager_cache", "eager cache", BLUE, "s"),
    ("reference", "ours in plain torch", SKY, "o"),
    ("naive", "naive loop, extrapolated", ORANGE, "D"),
)


def sampling(found: list[rows.Row]) -> pyplot.Figure:
    """How many times as long each rival takes for as many images."""
    shapes = sorted({row.shape for row in found}, key=lambda shape: int(shape.split("x")[0]))
    by = {(row.shape, row.contestant): row.typical_us for row in found}
    ours = {shape: min(by[shape, name] for name in rows.OURS if (shape, name) in by) for shape in shapes}
    figure, axis = pyplot.subplots(figsize=(12.4, 2.0 + 0.55 * len(shapes)), layout="constrained")
    axis.set_title(f"How many times as long the rivals take, {found[0].case}")
    lanes(axis, [image_label(shape, 1e-6 * ours[shape]) for shape in shapes])
    ratio_axis(axis, 0.5, 1000)
    for lane, shape in enumerate(shapes):
        for name, _, colour, marker in DRAWING_RIVALS:
            if (shape, name) in by:
                ratio = by[shape, name] / ours[shape]
                point(axis, ratio, lane, colour, marker)
                axis.annotate(times(f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"), (ratio, lane), **ABOVE)
    head(figure, found[0], ": drawing images")
    foot(figure, [*(handle(label, colour, marker) for _, label, colour, marker in DRAWING_RIVALS), slower()])
    return figure


ABOVE = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 8.5, "color": "#444444"}


def image_label(shape: str, seconds: float) -> str:
    images = shape.split("x")[0]
    return f"{images} image{'' if images == '1' else 's'}, ours {seconds:.2g} s"


# drop-ins


def dropins(found: list[rows.Row]) -> pyplot.Figure:
    """How many times as long today's lines take, with the number beside the point."""
    compared = []
    for (op, case, *_, shape, _, _), by in by_case(found).items():
        ours = min((row for name, row in by.items() if name in rows.OURS), key=lambda row: row.typical_us)
        for name, row in by.items():
            if name not in rows.OURS:
                label = ": ".join(filter(None, (op.removeprefix("compat."), case))) + f"  [{shape.replace('x', ', ')}]"
                compared.append((label, row.typical_us / ours.typical_us))
    figure, axis = pyplot.subplots(figsize=(12.4, 1.6 + 0.27 * len(compared)), layout="constrained")
    axis.set_title("How many times as long today's lines take, forward + backward")
    lanes(axis, [label for label, _ in compared])
    everything = [ratio for _, ratio in compared]
    ratio_axis(axis, min(0.5, 0.8 * min(everything)), max(5, 1.2 * max(everything)))
    for lane, (_, ratio) in enumerate(compared):
        colour, marker = (BLUE, "o") if ratio >= 1 else (VERMILION, "X")
        axis.plot([1, ratio], [lane, lane], color=colour, linewidth=1.6, zorder=2)
        point(axis, ratio, lane, colour, marker)
        side = 1 if ratio >= 1 else -1
        axis.annotate(
            times(f"{ratio:.2f}"),
            (ratio, lane),
            xytext=(8 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8.5,
        )
    head(figure, found[0], ": drop-ins")
    foot(figure, [handle("ours is faster", BLUE), handle("ours is slower", VERMILION, "X")])
    return figure
