"""Masked convolutions on layers that people train, which test_convolutions.py times.

Ours against the three lines users could write: a product with the mask and a full convolution ("eager"), the
convolution cropped to the rows at or above the centre in both memory formats ("crop", "crop_channels_last"; in each the
faster of padding above and of computing rows too many), and torch.compile of the crop ("compile").
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import rows
import torch
import torch.nn.functional as F  # noqa: N812

import fastelbo

SAMPLE_SECONDS = 5e-3
PASSES = ("forward", "forward_backward")
RIVALS = ("eager", "crop", "compile")


class Layer(NamedTuple):
    """A layer of a published network: [n, c_in, size, size] to c_out channels, with a mask."""

    n: int
    c_in: int
    c_out: int
    size: int
    k: int
    mask_type: str
    used_by: str

    @property
    def shape(self):
        return f"{self.n}x{self.c_in}x{self.size}x{self.size}"

    @property
    def name(self):
        return f"{self.c_in}-{self.c_out} k{self.k} {self.mask_type}"

    @property
    def live(self):
        return (self.k**2 - 1) // 2 + (self.mask_type == "B")


LAYERS = [
    Layer(128, 1, 64, 28, 7, "A", "jzbontar, first"),
    Layer(16, 3, 256, 32, 7, "A", "pixelcnn_flow, first"),
    Layer(128, 64, 64, 28, 7, "B", "jzbontar"),
    Layer(16, 64, 64, 28, 7, "B", "the same, small batch"),
    Layer(16, 64, 64, 28, 5, "B", "goal"),
    Layer(16, 128, 128, 28, 7, "B", "goal"),
    Layer(16, 128, 128, 28, 5, "B", "goal"),
    Layer(256, 16, 16, 28, 3, "B", "pytorch-generative"),
    Layer(16, 128, 128, 32, 3, "B", "pixelcnn_flow"),
    Layer(8, 192, 384, 16, 5, "A", "CompressAI"),
    Layer(32, 320, 320, 32, 3, "B", "lmconv"),
]
QUICK = (0, 4, 8)  # of LAYERS


def contestants(layer: Layer, dtype: torch.dtype, device: torch.device, backends: list[str], compiled: bool):
    """Functions of (input, weight, bias), and the memory format of each."""
    pad = layer.k // 2
    mask = fastelbo.conv_mask2d(layer.c_out, layer.c_in, layer.k, layer.mask_type).to(device, dtype)

    def eager(x, weight, bias):
        return F.conv2d(x, weight * mask, bias, padding=pad)

    def padded(x, weight, bias):
        return F.conv2d(F.pad(x, (0, 0, pad, 0)), (weight * mask)[:, :, : pad + 1], bias, padding=(0, pad))

    def sliced(x, weight, bias):
        return F.conv2d(x, (weight * mask)[:, :, : pad + 1], bias, padding=(pad, pad))[:, :, : layer.size]

    def ours(backend):
        return lambda *inputs: fastelbo.masked_conv2d(*inputs, mask_type=layer.mask_type, backend=backend)

    found = {}
    for suffix, memory_format in (("", torch.contiguous_format), ("_channels_last", torch.channels_last)):
        found |= {backend + suffix: (ours(backend), memory_format) for backend in backends}
        found["eager" + suffix] = eager, memory_format
        found["crop" + suffix] = padded, memory_format
        found["crop_sliced" + suffix] = sliced, memory_format
        if compiled:
            found["compile" + suffix] = torch.compile(padded, fullgraph=True), memory_format
    return found


def make_call(function, memory_format, layer: Layer, dtype, device, with_backward: bool) -> Callable:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        value = torch.randn(shape, generator=generator).to(device, dtype)
        return value.contiguous(memory_format=memory_format) if len(shape) == 4 else value

    x = normal(layer.n, layer.c_in, layer.size, layer.size)
    weight = normal(layer.c_out, layer.c_in, layer.k, layer.k) / (layer.c_in * layer.live) ** 0.5
    bias, d_y = normal(layer.c_out), normal(layer.n, layer.c_out, layer.size, layer.size)
    if not with_backward:
        return lambda: function(x, weight, bias)
    first = layer.c_in <= 4  # data wants no gradient
    leaves = [t.requires_grad_() for t in ((weight, bias) if first else (x, weight, bias))]

    def step():
        y = function(x, weight, bias)
        return y.detach(), *torch.autograd.grad(y, leaves, d_y)

    return step


def check(results: dict[str, tuple], dtype) -> None:
    """All compute the same function."""
    results = {name: r if isinstance(r, tuple) else (r,) for name, r in results.items()}
    want = results["eager"]
    for name, got in results.items():
        for a, b in zip(got, want, strict=True):
            limit = (1e-3 if dtype == torch.float32 else 0.1) * b.abs().max()
            assert (a - b).abs().max() <= limit, f"{name} computes something else"


def bytes_moved(layer: Layer, dtype, with_backward: bool) -> int:
    """Input, weight and output, once; in the backward their gradients and the first two again."""
    size = torch.finfo(dtype).bits // 8
    image = layer.n * layer.size**2
    operands = image * layer.c_in + layer.c_out * layer.c_in * layer.live
    return size * (operands + image * layer.c_out + with_backward * (2 * operands + image * layer.c_out))


@dataclass(frozen=True)
class Timed:
    """One layer and dtype, and one pass of it."""

    layer: Layer
    dtype: str
    pass_: str
    op = tests = "masked_conv2d"

    def __str__(self):
        return "-".join((self.op, self.layer.shape, *self.layer.name.split(), self.dtype, self.pass_))


def timed(device: str, dtypes=(), quick=False) -> list[Timed]:
    """What is to be timed: bfloat16 by default on a GPU, whose tensor cores take it, else float32."""
    layers = [LAYERS[index] for index in QUICK] if quick else LAYERS
    dtypes = dtypes or ["bfloat16" if device == "cuda" else "float32"]
    return [Timed(layer, dtype, pass_) for layer in layers for dtype in dtypes for pass_ in PASSES]


def wanted_contestants(timed: Timed, device: torch.device, backends: list[str], rivals) -> dict[str, Callable]:
    """Calls that compute the same, ours first.

    Raises:
        AssertionError: where one computes something else than the product with the mask.
    """
    layer, dtype, with_backward = timed.layer, getattr(torch, timed.dtype), timed.pass_ == "forward_backward"
    found = contestants(layer, dtype, device, backends, "compile" in rivals)
    calls = {name: make_call(*entry, layer, dtype, device, with_backward) for name, entry in found.items()}
    names = [name for name in calls if name.startswith((*backends, *rivals))]
    check({name: calls[name]() for name in dict.fromkeys(["eager", *names])}, dtype)
    return {name: calls[name] for name in sorted(names, key=lambda name: not name.startswith(tuple(backends)))}


def rows_of(timed: Timed, backends: list[str], samples: dict[str, list[float]], rounds: int) -> list[dict]:
    """The fields of the contestants' rows that differ from those of other layers."""
    layer, dtype = timed.layer, getattr(torch, timed.dtype)
    fastest = {name: min(values) for name, values in samples.items()}
    common = {"op": timed.op, "case": layer.name, "shape": layer.shape, "dtype": timed.dtype, "pass_": timed.pass_}
    common |= {"rounds": rounds, "bytes": bytes_moved(layer, dtype, timed.pass_ == "forward_backward")}
    found = []
    for name, values in samples.items():
        ratios = {}
        if name.removesuffix("_channels_last") in backends:
            for rival in ("eager", "compile"):
                theirs = [time for other, time in fastest.items() if other.startswith(rival)]
                ratios |= {f"over_{rival}": min(theirs) / fastest[name]} if theirs else {}
        found.append(common | {"contestant": name, **rows.times(values)} | ratios)
    return found
