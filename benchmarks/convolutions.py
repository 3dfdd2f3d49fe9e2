"""Layers of masked convolutions that people train, and the lines that users could write for them.

"eager" is a product with the mask and a full convolution; "full" is that convolution alone, of a weight whose dead taps
are zero, which no training keeps so; "crop" and "crop_sliced" are the convolution cropped to the rows at or above the
centre, by padding above or by computing rows too many; "compile" is torch.compile of the crop; "_benchmark" is under
torch.backends.cudnn.benchmark. All of them are timed in both memory formats. "tma" is Triton's backend as
FASTELBO_CONV=tma has it, of the layers that it takes then.
"""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import cases
import torch
import torch.nn.functional as F  # noqa: N812
from originals import GatedBlock
from ratios import form_of
from rows import OURS

import fastelbo

OPS = "masked_conv2d", "gated_block"
PASSES = {"cpu": ("forward", "forward_backward"), "cuda": ("forward", "d_input", "d_weight", "forward_backward")}
RIVALS = ("eager", "full", "crop", "compile")
FORMATS = {"": torch.contiguous_format, "_channels_last": torch.channels_last}  # by the end of a contestant's name
SMALL = 10**10  # operations: a kernel takes 20 us or less of them on an H200, and its launch as long
RUNS = 10  # of ours on a GPU, which must give the same bits
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.005}  # of the largest value; TF32 in float32


class Layer(NamedTuple):
    """A layer of a published network: [n, c_in, size, size] to c_out channels, with a mask."""

    n: int
    c_in: int
    c_out: int
    size: int
    k: int
    mask_type: str
    op: str = "masked_conv2d"

    @property
    def shape(self):
        return f"{self.n}x{self.c_in}x{self.size}x{self.size}"

    @property
    def name(self):
        return f"{self.c_in}-{self.c_out} k{self.k} {self.mask_type}"

    @property
    def live(self):
        """Products for each pixel and pair of channels in and out."""
        if self is BLOCK:  # both stacks' taps, for twice the channels, the link of two by two, and the last
            return 2 * (self.k // 2 + 1) * (self.k + 1) + 5
        return (self.k**2 - 1) // 2 + (self.mask_type == "B")

    @property
    def of_data(self):
        """Whether it is a network's first: data wants no gradient."""
        return self.c_in <= 4


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
BLOCK = Layer(16, 64, 64, 28, 3, "gated", "gated_block")  # both stacks of a Gated PixelCNN's


@dataclass(frozen=True)
class Timed:
    """One pass of a layer, on a kind of device."""

    layer: Layer
    dtype: str
    pass_: str
    device: str = "cpu"

    def __str__(self):
        return f"{self.layer.name}-{self.layer.shape}-{self.dtype}-{self.pass_}"

    @property
    def timings(self) -> tuple[str, ...]:
        """As in rows.Row: on a GPU kernels by events; of small ones also in graphs, and the host, whom others keep
        waiting."""
        if self.device == "cpu":
            return ("host",)
        n, c_in, c_out, size, *_ = self.layer
        if 2 * n * size**2 * c_in * c_out * self.layer.live >= SMALL:
            return ("events",)
        small = {"forward": ("events", "host", "graph"), "forward_backward": ("events", "host")}
        return small.get(self.pass_, ("events", "graph"))

    @property
    def fields(self) -> dict:
        """What all of its rows have in common."""
        found = {"op": self.layer.op, "case": self.layer.name, "shape": self.layer.shape, "dtype": self.dtype}
        return found | {"pass_": self.pass_, "bytes": self.bytes_moved}

    @property
    def bytes_moved(self) -> int:
        """Input, weight and one result, once; in the backward their gradients and the first two again."""
        layer = self.layer
        image, size = layer.n * layer.size**2, torch.finfo(getattr(torch, self.dtype)).bits // 8
        image *= 2 if layer is BLOCK else 1
        operands, output = image * layer.c_in + layer.c_out * layer.c_in * layer.live, image * layer.c_out
        return size * (operands + output + (self.pass_ == "forward_backward") * (2 * operands + output))


def timed(option) -> list[Timed]:
    """What is to be timed, as cases.timed."""
    layers = QUICK if option.quick and not option.shape else LAYERS
    layers = layers if cases.chosen(option.op, "masked_conv2d") else []
    layers = [*layers, BLOCK] if cases.chosen(option.op, "gated_block") and (option.op or not option.quick) else layers
    default = {"cpu": "float32", "cuda": "bfloat16"}[option.device]
    return [
        Timed(layer, dtype, pass_, option.device)
        for pass_ in PASSES[option.device]
        for layer in layers
        if cases.chosen(option.shape, layer.shape) and not (pass_ == "d_input" and layer.of_data)
        if layer is not BLOCK or not pass_.startswith("d_")
        for dtype in option.dtype or [default]
    ]


def contestants(case: Timed, device: torch.device, backends: list[str], rivals):
    """Functions of (input, weight, bias), the memory format of each, and what is to be set for its calls."""
    layer, dtype = case.layer, getattr(torch, case.dtype)
    pad, mask = layer.k // 2, mask_of(layer, dtype, device)

    def full(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=pad)

    def eager(x, weight, bias):
        return full(x, weight * mask, bias)

    def padded(x, weight, bias):
        return F.conv2d(F.pad(x, (0, 0, pad, 0)), (weight * mask)[:, :, : pad + 1], bias, padding=(0, pad))

    def sliced(x, weight, bias):
        return F.conv2d(x, (weight * mask)[:, :, : pad + 1], bias, padding=(pad, pad))[:, :, : layer.size]

    def ours(backend):
        return lambda *inputs: fastelbo.masked_conv2d(*inputs, mask_type=layer.mask_type, backend=backend)

    found, on_gpu = {}, case.device == "cuda"
    for suffix, memory_format in FORMATS.items():
        found |= {backend + suffix: (ours(backend), memory_format, []) for backend in backends}
        if "triton" in backends and on_gpu and torch.cuda.get_device_capability()[0] == 9:
            found["tma" + suffix] = ours("triton"), memory_format, over_boxes()
        if on_gpu:  # first, because the plans that a search finds stay
            found["crop_sliced_benchmark" + suffix] = sliced, memory_format, searched(dtype)
            if suffix:
                found["full_benchmark" + suffix] = full, memory_format, searched(dtype)
        plain = {"eager": eager, "full": full, "crop": padded, "crop_sliced": sliced}
        found |= {name + suffix: (function, memory_format, []) for name, function in plain.items()}
        # a compiled backward can run but once; on a GPU inductor lays convolutions out in channels last itself
        if "compile" in rivals and case.pass_ in ("forward", "forward_backward") and (suffix or not on_gpu):
            found["compile" + suffix] = cases.compiled(padded, fullgraph=True), memory_format, []
    return found


def mask_of(layer: Layer, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return fastelbo.conv_mask2d(layer.c_out, layer.c_in, layer.k, layer.mask_type).to(device, dtype)


def over_boxes() -> list[tuple]:
    """What to set for a call as FASTELBO_CONV=tma has it: what there is to choose from, and what has been chosen."""
    kernels, boxes = (importlib.import_module(f"fastelbo.kernels.masked_conv2d{name}") for name in ("", "_tma"))
    return [(kernels, "boxes", boxes), (fastelbo._library, "_FOUND", {})]


def searched(dtype: torch.dtype) -> list[tuple]:
    """What to set for a call under torch.backends.cudnn.benchmark.

    torch keeps one plan for each convolution, however it was found. Whether float32 may be rounded to TF32 is part of
    what it knows a convolution by, and changes nothing of one in halves: those get a plan of their own by it.
    """
    cudnn = torch.backends.cudnn
    other = [] if dtype == torch.float32 else [(cudnn.conv, "fp32_precision", "ieee")]
    return [(cudnn, "benchmark", True), *other]


def within(call: Callable, settings: list[tuple]) -> Callable:
    """A call for whose time attributes of modules, (module, name, value), are set."""

    def changed():
        before = [getattr(module, name) for module, name, _ in settings]
        for module, name, value in settings:
            setattr(module, name, value)
        try:
            return call()
        finally:
            for (module, name, _), value in zip(settings, before, strict=True):
                setattr(module, name, value)

    return changed if settings else call


def takes_boxes(call: Callable, boxes) -> bool:
    """Whether any of their kernels is chosen in the first call within over_boxes."""
    taken = []

    def recorded(choose):
        return lambda *arguments: taken.append(choose(*arguments)) or taken[-1]

    within(call, [(boxes, name, recorded(getattr(boxes, name))) for name in ("convolution", "weight_gradient")])()
    return any(found is not None for found in taken)


def make_inputs(case: Timed, device, memory_format=torch.contiguous_format) -> list[torch.Tensor]:
    """Input, weight, whose dead taps are zero, and bias."""
    layer, generator = case.layer, torch.Generator(device).manual_seed(0)
    shapes = (layer.n, layer.c_in, layer.size, layer.size), (layer.c_out, layer.c_in, layer.k, layer.k), (layer.c_out,)
    inputs = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    inputs[1] *= mask_of(layer, torch.float32, device) / (layer.c_in * layer.live) ** 0.5
    inputs = [x.to(getattr(torch, case.dtype)) for x in inputs]
    inputs = [x.contiguous(memory_format=memory_format) if x.dim() == 4 else x for x in inputs]
    both = case.pass_ == "forward_backward"
    wanted = (both and not layer.of_data) or case.pass_ == "d_input", both or case.pass_ == "d_weight", both
    return [x.requires_grad_(gets_gradient) for x, gets_gradient in zip(inputs, wanted, strict=True)]


def exact(case: Timed, device, pass_: str) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients in float64, by products of matrices: the library has no fast convolution of those."""
    inputs = [x.detach().double().requires_grad_(x.requires_grad) for x in make_inputs(case, device)]
    mask, pad = mask_of(case.layer, torch.float64, device), case.layer.k // 2

    with torch.backends.cudnn.flags(enabled=False):
        return cases.flat(cases.bind(lambda x, w, b: F.conv2d(x, w * mask, b, padding=pad), inputs, pass_)())


def calls(case: Timed, device: torch.device, backends: list[str], rivals) -> dict[str, Callable]:
    """Calls without arguments of ours and of the rivals that are wanted, all of which compute the same function.

    Raises:
        AssertionError: if some do not, or if ours change from run to run.
    """
    if case.layer is BLOCK:
        return calls_of_block(case, device, backends, rivals)
    dtype, made, inputs = getattr(torch, case.dtype), {}, {}
    pass_ = "backward" if case.pass_.startswith("d_") else case.pass_
    expected, mask = exact(case, device, pass_), mask_of(case.layer, dtype, device)
    for name, (function, memory_format, settings) in contestants(case, device, backends, rivals).items():
        form = form_of(name)
        if form not in (*OURS, *rivals):
            continue
        if memory_format not in inputs:
            inputs[memory_format] = make_inputs(case, device, memory_format)
        call = within(cases.bind(function, inputs[memory_format], pass_), settings)
        if form == "tma" and not takes_boxes(call, settings[0][2]):
            continue
        results = cases.flat(call())
        live = [x * mask if form == "full" and x.shape == mask.shape else x for x in results]
        cases.compare(name, live, expected, TOLERANCE[dtype])
        for _ in range(RUNS - 1 if form in OURS and case.device == "cuda" else 0):
            same = map(torch.equal, cases.flat(call()), results)
            assert all(same), f"{name}: other bits in another run"
        made[name] = call
    return made


def calls_of_block(case: Timed, device: torch.device, backends: list[str], rivals) -> dict[str, Callable]:
    """As calls, of both stacks; "block": Triton's backend as FASTELBO_CONV=block has it."""
    layer, dtype, wanted, made = case.layer, getattr(torch, case.dtype), case.pass_ == "forward_backward", {}
    torch.manual_seed(0)
    images = [torch.randn(layer.n, layer.c_in, layer.size, layer.size, device=device) for _ in range(2)]
    block = fastelbo.nn.GatedMaskedConv2d(layer.c_in, layer.c_out, layer.k, device=device)

    def call(function, dtype, memory_format, settings=(), backend=None):
        own = copy.deepcopy(block).to(dtype=dtype, memory_format=memory_format).requires_grad_(wanted)
        own.vertical.backend = own.horizontal.backend = own.out.backend = backend
        inputs = [x.to(dtype, memory_format=memory_format) for x in images]
        inputs = [*(x.requires_grad_(wanted) for x in inputs), *own.parameters()]
        found = function(own)
        return within(cases.bind(lambda v, h, *_: found(v, h), inputs, case.pass_), settings)

    expected = cases.flat(call(GatedBlock, torch.float64, torch.contiguous_format)())
    launches = [(fastelbo.backends, "CONVOLUTIONS", "block")]
    for suffix, memory_format in FORMATS.items():
        common = dtype, memory_format
        for backend in backends:
            made[backend + suffix] = call(lambda own: own, *common, backend=backend)
        if "triton" in backends and case.device == "cuda":
            made["block" + suffix] = call(lambda own: own, *common, launches, "triton")
        if "eager" in rivals:
            made["eager" + suffix] = call(GatedBlock, *common)
        if "compile" in rivals and (suffix or case.device == "cpu"):
            made["compile" + suffix] = call(lambda own: cases.compiled(GatedBlock(own), fullgraph=True), *common)
    for name, one in made.items():
        cases.compare(name, cases.flat(one()), expected, TOLERANCE[dtype])
    return made


def timed_by(timing: str, calls: dict[str, Callable]) -> dict[str, Callable]:
    """The contestants whose calls can tell: a plan that was searched for costs the host what others do."""
    return {name: call for name, call in calls.items() if timing != "host" or "_benchmark" not in name}
