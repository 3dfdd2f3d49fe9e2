"""What all figures share: colours, the heading with machine and versions, where ours is slower, small files."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

# Okabe and Ito's palette, which stays apart for every kind of colour vision
BLACK, ORANGE, SKY, GREEN = "#1b1b1b", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, FAINT = "#8a8a8a", "#555555"
SLOWER = "#fbe8dc"  # behind what is slower than a rival
BAND = "#f7f7f9"
SHEET = Path(__file__).with_name("fastelbo.mplstyle")
HEADING = {"fontsize": 11.5, "fontweight": "bold", "x": 0.012, "ha": "left"}
COLOURS = 96  # of a file: each has a few, and their shades at edges
TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
PASSES = {"forward": "forward", "d_input": "input gradient", "d_weight": "weight gradient", "backward": "backward"}
PASSES |= {"forward_backward": "forward + backward"}


def save(figure: pyplot.Figure, path: Path) -> None:
    """As a PNG of few colours, a third as large."""
    figure.canvas.draw()
    drawn = Image.fromarray(numpy.asarray(figure.canvas.buffer_rgba()))
    pyplot.close(figure)
    drawn.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def frame(figure: pyplot.Figure, title: str, row, handles: Sequence) -> None:
    """Title, machine and versions of a row above, the legend below."""
    figure.get_layout_engine().set(w_pad=0.09)
    title = f"fastelbo on a {'GPU' if row.on_gpu else 'CPU'}: {title}"
    figure.suptitle(f"{title}\n\n", fontsize=14, fontweight="bold", x=0.012, ha="left")
    figure.text(0.0125, 1 - 0.42 / figure.get_figheight(), row.origin, fontsize=9.5, color=FAINT, va="center")
    options = {"loc": "outside lower center", "frameon": False, "fontsize": 9.5, "handletextpad": 0.4}
    lines = math.ceil(sum(len(handle.get_label()) + 6 for handle in handles) / (13 * figure.get_figwidth()))
    figure.legend(handles=handles, ncols=math.ceil(len(handles) / lines), **options)


def beside(axis, x: float, y: float, text: str, right: bool, **keywords) -> None:
    """Text on the right or left of a point."""
    side = {"xytext": (8, 0), "ha": "left"} if right else {"xytext": (-8, 0), "ha": "right"}
    axis.annotate(text, (x, y), textcoords="offset points", va="center", **side, **keywords)


def handle(label: str, **keywords) -> Line2D:
    return Line2D([], [], linestyle="", label=label, **keywords)


def slower_patch(label: str = "ours is slower") -> Patch:
    return Patch(color=SLOWER, label=label)


def lanes(axis, labels: Sequence[str]) -> None:
    """One for each label, from top to bottom."""
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_yticks(range(len(labels)), labels)
    axis.yaxis.grid(False)
    for lane in range(0, len(labels), 2):
        axis.axhspan(lane - 0.5, lane + 0.5, color=BAND, zorder=0)


def ratio_axis(axis, left, right, ours: float = 1, ticks=TICKS, form="{x:g}\N{MULTIPLICATION SIGN}") -> None:
    """How many times as long a rival takes, or how long, on a logarithmic scale that shows what is slower."""
    axis.set_xscale("log")
    axis.axvspan(left / 10, ours, color=SLOWER, zorder=0.5)
    axis.axvline(ours, color=GREY, linewidth=1.4, zorder=1)
    axis.set_xlim(left, right)
    axis.set_xticks([tick for tick in ticks if left <= tick <= right])
    axis.xaxis.set_major_formatter(form)
    axis.xaxis.minorticks_off()


def limits(ratios: Sequence[float], room: float = 1.25) -> tuple[float, float]:
    """Of a ratio axis that shows all of these and what lies on either side of 1."""
    return min(0.8, min(ratios, default=1) / room), max(2, max(ratios, default=1) * room)


def significant(value: float) -> str:
    """As 0.0283, 0.980, 12.3 or 652."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def times(ratio: float) -> str:
    """As 0.98x, 12.3x or 652x."""
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}" if ratio < 1 else f"{significant(ratio)}\N{MULTIPLICATION SIGN}"
