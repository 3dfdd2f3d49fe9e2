"""Times masked convolutions on layers that people train: python benchmarks/convolutions.py --help

Ours against the three lines users could write: a product with the mask and a full convolution ("eager"), the
convolution cropped to the rows at or above the centre in both memory formats ("crop", "crop_channels_last"; in each the
faster of padding above and of computing rows too many), and torch.compile of the crop ("compile"). In turns, within one
run; rows go to benchmarks/results/conv_<device>.csv.
"""

import csv
from collections.abc import Callable
from typing import NamedTuple

import host_clock
import machine
import rows
import torch
import torch.nn.functional as F  # noqa: N812

import fastelbo

SAMPLE_SECONDS = 5e-3
# Of an H200: multiplications and additions a second in bfloat16 that matrix products reach, bytes a second of a copy.
TENSOR_CORES, COPY = 7.9e14, 4.3e12
PASSES = ("forward", "forward_backward")


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


def bounds() -> "list[dict]":
    """What an H200 allows a bfloat16 forward, and how many times as long rivals take that are as efficient.

    Predicted, not measured.
    """
    found = []
    for layer in LAYERS:
        pixels = layer.n * layer.size**2
        moved = bytes_moved(layer, torch.bfloat16, with_backward=False) / COPY

        def seconds(taps, pixels=pixels, layer=layer, moved=moved):
            return max(2 * pixels * layer.c_in * layer.c_out * taps / TENSOR_CORES, moved)

        ours = seconds(layer.live)
        found.append(
            {
                "layer": layer.name,
                "shape": layer.shape,
                "predicted_us": f"{1e6 * ours:.1f}",
                "bound_by": "bytes" if ours == moved else "products",
                "over_eager_at_most": f"{seconds(layer.k**2) / ours:.2f}",
                "over_crop_at_most": f"{seconds(layer.k * (layer.k // 2 + 1)) / ours:.2f}",
            }
        )
    return found


def main():
    parser = machine.parser(__doc__, rounds=10)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layer", type=int, nargs="*", help=f"0 to {len(LAYERS) - 1}; default: all")
    parser.add_argument("--pass", dest="passes", choices=PASSES, nargs="*", default=PASSES)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes its time")
    parser.add_argument("--bounds", action="store_true", help="no timing: what an H200 allows, to conv_bounds.csv")
    options = parser.parse_args()
    if options.bounds:
        lines = bounds()
        with (options.results / "conv_bounds.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
        print(rows.aligned([tuple(lines[0]), *(tuple(line.values()) for line in lines)]))
        return
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    backends = [name for name in rows.OURS if fastelbo.backends.why_not(name, device) is None]
    # tests of other backends (Triton's interpreter) say nothing about these
    about = machine.start(device, options, ["masked_conv2d"], only=" or ".join(f"[{name}" for name in backends))
    for index in options.layer or range(len(LAYERS)):
        layer = LAYERS[index]
        for pass_ in options.passes:
            torch._dynamo.reset()
            with_backward = pass_ == "forward_backward"
            found = contestants(layer, dtype, device, backends, not options.no_compile)
            calls = {name: make_call(*entry, layer, dtype, device, with_backward) for name, entry in found.items()}
            check({name: call() for name, call in calls.items()}, dtype)
            samples = host_clock.measure(calls, options.rounds, SAMPLE_SECONDS)
            fastest = {name: min(values) for name, values in samples.items()}
            report(layer, pass_, options, backends, samples, fastest, about)


def report(layer, pass_, options, backends, samples, fastest, about):
    """Prints how many times as long each rival takes, in its better memory format, and keeps the rows."""

    def best(rival):
        return min((time for name, time in fastest.items() if name.startswith(rival)), default=None)

    made, now = [], machine.now()
    for name, values in samples.items():
        ratios = {}
        if name.removesuffix("_channels_last") in backends:
            ratios = {"over_eager": best("eager") / fastest[name]}
            if best("compile"):
                ratios["over_compile"] = best("compile") / fastest[name]
            flop = 2 * layer.n * layer.size**2 * layer.c_in * layer.c_out * layer.live
            flop *= 1 if pass_ == "forward" else 2 if layer.c_in <= 4 else 3
            compiled = f", compile {ratios['over_compile']:.2f}x" if "over_compile" in ratios else ""
            print(
                f"{layer.shape:15} {layer.name:14} {pass_:17} {name:18} {1e3 * fastest[name]:8.2f} ms "
                f"{flop / fastest[name] / 1e9:6.0f} GFLOP/s   mask-multiply {ratios['over_eager']:.2f}x, "
                f"crop {best('crop') / fastest[name]:.2f}x{compiled}",
                flush=True,
            )
        moved = bytes_moved(layer, getattr(torch, options.dtype), pass_ == "forward_backward")
        common = {"op": "masked_conv2d", "case": layer.name, "shape": layer.shape, "dtype": options.dtype}
        common |= {"pass_": pass_, "contestant": name, "rounds": options.rounds, "bytes": moved, "timestamp": now}
        made.append(rows.Row(**about, **common, **rows.times(values), **ratios))
    if not options.no_save:
        rows.append(options.results / f"conv_{options.device}.csv", made)


if __name__ == "__main__":
    main()
