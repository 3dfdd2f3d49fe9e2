"""Layers of masked convolutions that people train, and the lines that users could write for them.

"eager" is a product with the mask and a full convolution; "crop" and "crop_sliced" are the convolution cropped to the
rows at or above the centre, by padding above or by computing rows too many; "compile" is torch.compile of the crop.
All of them are timed in both memory formats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cases
import torch
import torch.nn.functional as F  # noqa: N812
from ratios import form_of, measured

import fastelbo

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
    Layer(128, 1, 64, 28, 7, "A"),  # jzbontar, first
    Layer(16, 3, 256, 32, 7, "A"),  # pixelcnn_flow, first
    Layer(128, 64, 64, 28, 7, "B"),  # jzbontar
    Layer(16, 64, 64, 28, 7, "B"),  # the same, small batch
    Layer(16, 64, 64, 28, 5, "B"),
    Layer(16, 128, 128, 28, 7, "B"),
    Layer(16, 128, 128, 28, 5, "B"),
    Layer(256, 16, 16, 28, 3, "B"),  # pytorch-generative
    Layer(16, 128, 128, 32, 3, "B"),  # pixelcnn_flow
    Layer(8, 192, 384, 16, 5, "A"),  # CompressAI
    Layer(32, 320, 320, 32, 3, "B"),  # lmconv
]
QUICK = (LAYERS[0], LAYERS[3], LAYERS[8])


@dataclass(frozen=True)
class Timed:
    """One pass of a layer."""

    layer: Layer
    dtype: str
    pass_: str

    def __str__(self):
        return f"{self.layer.name}-{self.layer.shape}-{self.dtype}-{self.pass_}"

    @property
    def with_backward(self) -> bool:
        return self.pass_ == "forward_backward"


def timed(device: str, shapes=(), ops=(), dtypes=(), quick=False) -> list[Timed]:
    """What is to be timed, as cases.timed."""
    return [
        Timed(layer, dtype, pass_)
        for layer in LAYERS
        if "masked_conv2d" in (ops or ["masked_conv2d"])
        if (layer.shape in shapes if shapes else layer in QUICK or not quick)
        for dtype in (dtypes or [{"cpu": "float32", "cuda": "bfloat16"}[device]])
        for pass_ in PASSES
    ]


def contestants(layer: Layer, dtype: torch.dtype, device: torch.device, backends: list[str]):
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
        found["compile" + suffix] = torch.compile(padded, fullgraph=True), memory_format
    return found


def make_inputs(layer: Layer, dtype, device, memory_format, with_backward: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (layer.n, layer.c_in, layer.size, layer.size), (layer.c_out, layer.c_in, layer.k, layer.k)
    x, weight = (torch.randn(shape, generator=generator).contiguous(memory_format=memory_format) for shape in shapes)
    weight /= (layer.c_in * layer.live) ** 0.5
    inputs = [tensor.to(device, dtype) for tensor in (x, weight, torch.randn(layer.c_out, generator=generator))]
    for tensor in inputs[layer.c_in <= 4 :]:  # data wants no gradient
        tensor.requires_grad_(with_backward)
    return inputs


def calls(case: Timed, device: torch.device, backends: list[str], rivals) -> dict[str, Callable]:
    """Calls without arguments of ours and of the rivals that are wanted, all of which compute the same function.

    Raises:
        AssertionError: if some do not.
    """
    dtype = getattr(torch, case.dtype)
    made = {}
    for name, (function, memory_format) in contestants(case.layer, dtype, device, backends).items():
        inputs = make_inputs(case.layer, dtype, device, memory_format, case.with_backward)
        made[name] = cases.bind(function, inputs, case.pass_)
    wanted = [name for name in made if form_of(name) in (*backends, *rivals)]
    expected = cases.flat(made["eager"]())
    for name in wanted:
        cases.compare(name, cases.flat(made[name]()), expected, 1e-3 if dtype == torch.float32 else 0.1)
    return {name: made[name] for name in wanted}


def bytes_moved(layer: Layer, dtype, with_backward: bool) -> int:
    """Input, weight and output, once; in the backward their gradients and the first two again."""
    size = torch.finfo(dtype).bits // 8
    image = layer.n * layer.size**2
    operands = image * layer.c_in + layer.c_out * layer.c_in * layer.live
    return size * (operands + image * layer.c_out + with_backward * (2 * operands + image * layer.c_out))


def fields(case: Timed, samples: dict[str, list[float]], on_gpu: bool) -> list[dict]:
    """The fields of every contestant's row that do not say where it was timed."""
    common = {"op": "masked_conv2d", "case": case.layer.name, "shape": case.layer.shape, "dtype": case.dtype}
    moved = bytes_moved(case.layer, getattr(torch, case.dtype), case.with_backward)
    return measured(common | {"pass_": case.pass_, "bytes": moved}, samples, on_gpu)
