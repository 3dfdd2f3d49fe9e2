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
import torch.nn.functional as F  # noqa: N812
from cases import chosen
from torch import nn

from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, VerticalStackConv2d
from fastelbo.sampling import IncrementalSampler

LEVELS, SIZE, CHANNELS = 256, 28, 64
DILATIONS = (1, 2, 1, 4, 1, 2, 1)
PIXELS = 2  # that the naive loop draws
RIVALS = ("reference", "eager_cache", "naive")


class GatedPixelCNN(nn.Module):
    """The network whose samplers are timed."""

    def __init__(self):
        super().__init__()
        self.vertical = VerticalStackConv2d(1, CHANNELS, 3, mask_type="A")
        self.horizontal = HorizontalStackConv2d(1, CHANNELS, 3, mask_type="A")
        self.blocks = nn.ModuleList(
            GatedMaskedConv2d(CHANNELS, CHANNELS, 3, dilation=d, link="mask-first-layer") for d in DILATIONS
        )
        self.logits = nn.Conv2d(CHANNELS, LEVELS, 1)

    def forward(self, images):
        """Logits of grey levels [N, 1, H, W]."""
        x = images * (2 / (LEVELS - 1)) - 1
        v, h = self.vertical(x), self.horizontal(x)
        for block in self.blocks:
            v, h = block(v, h)
        return self.logits(F.elu(h))


class EagerCache:
    """The network in plain torch: the vertical stack a row at a time, the horizontal stack a pixel at a time."""

    def __init__(self, model):
        self.model = model
        self.taps = [block.horizontal.weight[:, :, 0].transpose(1, 2).flatten(1) for block in model.blocks]  # left, own
        self.outs = [block.out.weight[:, :, 0, 0] for block in model.blocks]

    @torch.no_grad()
    def sample(self, n):
        """Grey levels [n, 1, H, W], and the logits [n, K, H, W] that they were drawn from."""
        model, image = self.model, torch.zeros(n, 1, SIZE, SIZE)
        logits = torch.empty(n, LEVELS, SIZE, SIZE)
        x = torch.zeros(n, 1, SIZE + 1, SIZE + 2)
        above = [torch.zeros(n, CHANNELS, SIZE + d, SIZE + 2 * d) for d in DILATIONS]  # inputs of the vertical stack
        for row in range(SIZE):
            v = F.conv2d(x[:, :, row : row + 2], model.vertical.weight, model.vertical.bias)
            links = []
            for block, d, cache in zip(model.blocks, DILATIONS, above, strict=True):
                cache[:, :, row + d, d : d + SIZE] = v[:, :, 0]
                z = F.conv2d(cache[:, :, row : row + d + 1], block.vertical.weight, block.vertical.bias, dilation=d)
                links.append(block.link(z)[:, :, 0].permute(2, 0, 1) + block.horizontal.bias)
                a, b = z.chunk(2, dim=1)
                v = a.tanh() * b.sigmoid()
            left = [torch.zeros(SIZE + d, n, CHANNELS) for d in DILATIONS]  # inputs of the horizontal stack
            for column in range(SIZE):
                h = F.linear(x[:, 0, row + 1, column, None], model.horizontal.weight[:, :, 0, 0], model.horizontal.bias)
                for index, (block, d) in enumerate(zip(model.blocks, DILATIONS, strict=True)):
                    left[index][column + d] = h
                    seen = torch.cat((left[index][column], h), dim=1)
                    a, b = torch.addmm(links[index][column], seen, self.taps[index].T).chunk(2, dim=1)
                    h = h + F.linear(a.tanh() * b.sigmoid(), self.outs[index], block.out.bias)
                found = F.linear(F.elu(h), model.logits.weight[:, :, 0, 0], model.logits.bias)
                level = found.softmax(1).multinomial(1)[:, 0].float()
                image[:, 0, row, column] = level
                x[:, 0, row + 1, column + 1] = level * (2 / (LEVELS - 1)) - 1
                logits[:, :, row, column] = found
        return image, logits

    def check(self):
        """Raises AssertionError unless the logits are those of the full forward."""
        image, logits = self.sample(2)
        with torch.no_grad():
            torch.testing.assert_close(logits, self.model(image), rtol=0, atol=1e-5)


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
    model = GatedPixelCNN().eval()
    found = {}
    for backend in ("cpu", "reference"):
        if backend in ("cpu", *rivals):
            sampler = IncrementalSampler(model, (1, SIZE, SIZE), levels=LEVELS, backend=backend)
            found[backend] = functools.partial(sampler.sample, images, seed=0)
    if "eager_cache" in rivals:
        eager = EagerCache(model)
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
