"""How all figures of the benchmarks look: colours, axes of ratios, lanes, and what stands at their head."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import rows
from matplotlib import pyplot
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

# Okabe and Ito's palette, which stays apart for every kind of colour vision
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#1b1b1b",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY, PALE, SLOWER = "#8a8a8a", "#f7f7f9", "#fbe3d6"
HALF = "bfloat16"
HEADING = {"fontsize": 11.5, "fontweight": "bold", "x": 0.012, "ha": "left"}
COLOURS = 64  # of a picture, with those between a line and its ground


def use() -> None:
    pyplot.rcParams.update(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.titlesize": 10.5,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "xtick.color": "#444444",
            "ytick.color": "#222222",
            "ytick.left": False,
            "savefig.dpi": 150,
        }
    )


def save(figure: pyplot.Figure, path: Path) -> None:
    """As a PNG of few colours, a third of the size of one of all."""
    drawn = io.BytesIO()
    figure.savefig(drawn)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def head(figure: pyplot.Figure, first: "rows.Row | rows.MemoryRow", what: str = "") -> None:
    """What was measured, on which machine, and of which versions and commit."""
    machine, versions = f"{'GPU' if first.on_gpu else 'CPU'}: {first.machine}", f"torch {first.torch}"
    if isinstance(first, rows.Row) and not first.on_gpu:
        machine += f", {first.threads} threads, {first.isa}"
    versions += f", fastelbo {first.fastelbo} at commit {first.commit}"
    if first.on_gpu:
        versions += f", CUDA {first.cuda}, Triton {first.triton}"
    figure.suptitle(f"fastelbo{what} on a {machine}\n\n", fontsize=14, fontweight="bold", x=0.012, ha="left")
    below = 1 - 0.42 / figure.get_figheight()
    figure.text(0.0125, below, versions, fontsize=9.5, color="#555555", va="center")


def foot(figure: pyplot.Figure, handles: Sequence) -> None:
    """The legend."""
    figure.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False, fontsize=9.5, handletextpad=0.4)


def slower() -> Patch:
    """The legend's entry for the ground on which ours is slower."""
    return Patch(color=SLOWER, label="ours is slower")


def lanes(axis, labels: Sequence[str]) -> None:
    """One for each label, from top to bottom."""
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_yticks(range(len(labels)), labels)
    axis.yaxis.grid(False)
    for lane in range(0, len(labels), 2):
        axis.axhspan(lane - 0.5, lane + 0.5, color=PALE, zorder=0)


def ratio_axis(axis, left: float, right: float) -> None:
    """Logarithmic, of how many times as long a rival takes; below 1 ours is slower."""
    axis.set_xscale("log")
    axis.axvline(1, color="#555555", linewidth=1)
    axis.axvspan(1e-3, 1, color=SLOWER, zorder=0.5)
    axis.set_xlim(left, right)
    axis.set_xticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if left <= tick <= right])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: times(f"{x:g}")))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="x", which="minor", bottom=False)


def times(ratio: str) -> str:
    return ratio + "\N{MULTIPLICATION SIGN}"


def point(axis, x: float, y: float, colour: str, marker: str = "o", filled: bool = True, **keywords) -> None:
    face = colour if filled else "white"
    style = {"color": colour, "markerfacecolor": face, "markersize": 6, "markeredgewidth": 1.4, "zorder": 3}
    axis.plot(x, y, marker=marker, **style | keywords)
