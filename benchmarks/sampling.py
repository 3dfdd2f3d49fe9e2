"""A Gated PixelCNN to draw images from, and the ways in which users could draw them.

The network is as large as a common tutorial's: 64 channels, 7 layers of dilations 1, 2, 1, 4, 1, 2, 1, 256 grey levels,
28 x 28 pixels. The "naive" loop runs all of it for every pixel: a few pixels are timed, and the rows' times are those
of a whole image extrapolated from them (pass "sample_extrapolated"). "eager_cache" is what a user would write for this
network, checked against its full forward; "reference" is our sampler in plain torch.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from cases import chosen
from sampling_networks import EagerCache, GatedPixelCNN
from torch import nn

from fastelbo.sampling import IncrementalSampler

LEVELS, SIZE, CHANNELS = 256, 28, 64
DILATIONS = (1, 2, 1, 4, 1, 2, 1)
PIXELS = 2  # that the naive loop draws
RIVALS = ("reference", "eager_cache", "naive")


def timed(option) -> list:
    """How many images are to be drawn at a time, as cases.timed; nothing is timed on a GPU."""
    if option.device != "cpu" or not chosen(option.op, "sampling") or not chosen(option.dtype, "float32"):
        return []
    found = [n for n in (1, 16, 64) if chosen(option.shape, fields(n)["shape"])]
    return [pytest.param(n, id=f"{n} images") for n in found if n == 1 or option.shape or not option.quick]


def fields(images: int) -> dict:
    """What all rows have in common."""
    found = {"op": "sampling", "case": f"GatedPixelCNN {CHANNELS}x{len(DILATIONS)}", "pass_": "sample"}
    return found | {"shape": f"{images}x1x{SIZE}x{SIZE}", "dtype": "float32", "bytes": 8 * images * SIZE**2}


def contestants(images: int, rivals) -> dict[str, Callable]:
    """Functions that draw so many images, or the naive loop's few pixels of them.

    Raises:
        AssertionError: if the cache's logits are not those of the full forward.
    """
    torch.manual_seed(0)
    model = GatedPixelCNN(CHANNELS, LEVELS, DILATIONS).eval()
    found = {}
    for backend in ("cpu", "reference"):
        if backend in ("cpu", *rivals):
            sampler = IncrementalSampler(model, (1, SIZE, SIZE), levels=LEVELS, backend=backend)
            found[backend] = functools.partial(sampler.sample, images, seed=0)
    if "eager_cache" in rivals:
        eager = EagerCache(model, SIZE)
        eager.check()
        found["eager_cache"] = functools.partial(eager.sample, images)
    if "naive" in rivals:
        found["naive"] = functools.partial(draw_pixels, model, images)
    return found


@torch.no_grad()
def draw_pixels(model: nn.Module, images: int) -> None:
    """The first PIXELS pixels of images, by a full forward for each of them."""
    x = torch.randint(LEVELS, (images, 1, SIZE, SIZE)).float()
    for pixel in range(PIXELS):
        logits = model(x)[:, :, pixel // SIZE, pixel % SIZE]
        x[:, 0, pixel // SIZE, pixel % SIZE] = logits.softmax(1).multinomial(1)[:, 0].float()


def extrapolated(found: list[dict]) -> list[dict]:
    """Rows, in which those of the naive loop are of whole images."""
    rows = {row["contestant"]: row for row in found}
    if naive := rows.get("naive"):
        naive |= {name: SIZE * SIZE / PIXELS * naive[name] for name in naive if name.endswith("_us")}
        naive["pass_"] = "sample_extrapolated"
        rows["cpu"]["over_eager"] = naive["min_us"] / rows["cpu"]["min_us"]
    return found
