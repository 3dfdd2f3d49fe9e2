"""Checks and times candidates of kernels/masked_conv2d_tma.py on a GPU, within a given time: what to choose per layer.

    python tools/conv_candidates.py --out DIR --seconds 200

Compiles in parallel first; then one process at a time runs. A candidate is right when fifty runs agree bit for bit and
with a float32 convolution; only then it is timed, in CUDA graphs, beside the library's convolutions. Whatever is found
goes at once to DIR/rows.csv; a table comes last. A kernel that hangs, or breaks its process, costs that process alone.
With --dry-run all of it runs without a GPU: kernels are compiled for one and not launched, and times are made up.
"""

import argparse
import csv
import importlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RUNS = 50
FIELDS = (
    "stage", "layer", "pass_", "contender", "tile", "cold_us", "hot_us", "tflops", "relative_error", "worst_error",
    "wrong_runs", "differing_runs", "runs", "note",
)  # fmt: skip
WORST = 0.04  # of the result's standard deviation: bfloat16 rounds a value of seven of them by up to 0.027
RELATIVE = 4e-3


class Layer(NamedTuple):
    n: int
    c: int
    o: int
    size: tuple
    k: int
    mask: str
    dtype: str = "bfloat16"
    dilation: int = 1

    def __str__(self):
        rows, columns = self.size
        return f"{self.c}-{self.o} k{self.k} {self.mask} {self.n}x{rows}x{columns}"

    @property
    def live(self):
        return (self.k**2 - 1) // 2 + (self.mask == "B")

    @property
    def flops(self):
        return 2 * self.n * self.size[0] * self.size[1] * self.c * self.o * self.live


LAYERS = [
    Layer(128, 64, 64, (28, 28), 7, "B"),
    Layer(32, 320, 320, (32, 32), 3, "B"),
    Layer(16, 128, 128, (32, 32), 3, "B"),
    Layer(128, 128, 128, (28, 28), 5, "B"),
    Layer(8, 192, 384, (16, 16), 5, "A"),
    Layer(16, 128, 128, (28, 28), 7, "B"),
    Layer(64, 256, 256, (32, 32), 3, "B"),
    Layer(16, 64, 64, (28, 28), 7, "B"),
    Layer(128, 128, 128, (32, 32), 3, "B"),
    Layer(16, 128, 128, (28, 28), 5, "B"),
]
PASSES = ("forward", "d_weight", "d_input")
SIZES = [
    Layer(9, 64, 64, (28, 28), 7, "B"),
    Layer(4, 24, 40, (32, 32), 5, "A", "float16"),
    Layer(16, 64, 96, (16, 16), 3, "B"),
    Layer(32, 72, 64, (14, 14), 5, "B"),
    Layer(130, 64, 64, (7, 7), 3, "B"),
    Layer(16, 128, 64, (8, 8), 3, "A"),
    Layer(2, 16, 128, (64, 64), 3, "B", "bfloat16", 2),
    Layer(2, 64, 64, (100, 60), 7, "B"),
]
TINY = Layer(9, 128, 128, (28, 28), 3, "B")
TINY5 = Layer(9, 320, 320, (12, 20), 3, "B")


def tma():
    """The module of the kernels, wherever this file lies."""
    if "masked_conv2d_tma" not in sys.modules:
        path = ROOT / "kernels" / "masked_conv2d_tma.py"
        spec = importlib.util.spec_from_file_location("masked_conv2d_tma", path)
        sys.modules["masked_conv2d_tma"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["masked_conv2d_tma"])
    return sys.modules["masked_conv2d_tma"]


def tiles_of(layer, pass_):
    """Candidates of a layer, the likely best first."""
    tile, weight = tma().Tile, tma().WeightTile
    if pass_ == "d_weight":
        wide = [
            weight(64, 128, 4, 0, 4, False, 8),
            weight(64, 128, 4, 0, 4, True, 8),
            weight(64, 128, 2, 0, 3, False, 4, 2),
            weight(64, 128, 2, 0, 4, False, 8),
            weight(64, 64, 4, 0, 4, False, 4),
            weight(64, 64, 4, 0, 4, True, 4),
        ]
        five = [
            weight(64, 128, 4, 1, 3, False, 8),
            weight(64, 128, 4, 1, 4, False, 8),
            weight(64, 128, 4, 1, 3, True, 8),
        ]
        thin = [weight(64, 64, 4, 1, 4, False, 4), weight(64, 64, 4, 1, 4, True, 4)]
        if layer.o <= 64:
            return [
                *thin,
                weight(64, 64, 4, 0, 4, False, 4),
                weight(64, 64, 4, 0, 4, True, 4),
                weight(64, 64, 2, 0, 4, False, 4, 2),
                weight(128, 64, 4, 0, 2, False, 4),
                weight(64, 64, 4, 0, 2, False, 4, 2),
                weight(128, 64, 1, 0, 4, False, 4, 2),
            ]
        if layer.c == 320:
            return [*thin, *five, weight(64, 64, 4, 1, 2, False, 4, 2), *wide[2:4]]
        if layer.c == 192:
            return [
                weight(64, 128, 2, 1, 4, False, 8),
                weight(64, 128, 2, 1, 4, True, 8),
                weight(64, 64, 2, 1, 4, False, 4),
                weight(64, 64, 2, 1, 3, False, 4, 2),
                *wide[:3],
                weight(64, 128, 1, 0, 4, False, 4),
            ]
        if layer.k == 3 and layer.c == 128:
            return [*five[:1], *wide, *five[2:], weight(64, 128, 1, 0, 4, False, 4, 2)]
        return [*wide, *five[:1]]
    outputs = layer.o if pass_ == "forward" else layer.c
    row = tma().RowTile
    tall = 4 if layer.size[0] % 8 else 8  # rows of a box
    narrow = [
        row(256, 64, tall, SWAP=True),
        tile(256, 64, SWAP=True),
        tile(128, 64),
        tile(256, 64, SWAP=True, STAGES=2),
        row(128, 64, tall, STAGES=3, SWAP=True),
        tile(256, 64, SWAP=True, SPECIAL=True),
        tile(128, 64, SWAP=True),
        row(256, 64, tall, SWAP=True, num_warps=8),
        tile(128, 64, STAGES=6, SPECIAL=True),
        tile(256, 64, SWAP=True, num_warps=8),
        tile(256, 64, num_warps=8),
    ]
    much = row(256, 128, tall, STAGES=2, W_STAGES=3, SWAP=True, num_warps=8)
    if layer.k == 7:  # whose boxes are twice as high
        much = row(256, 64, tall, SWAP=True)
    square = [
        tile(128, 128, STAGES=3),
        tile(256, 128, SWAP=True, num_warps=8),
        tile(128, 128, num_warps=8),
        much,
        row(128, 128, tall, num_warps=8),
        tile(256, 128, STAGES=3, SWAP=True, SPECIAL=True, num_warps=8),
        tile(128, 128, STAGES=5, SPECIAL=True, num_warps=8),
        tile(128, 128, STAGES=4),
        tile(256, 128, STAGES=3, SPECIAL=True, num_warps=8),
        tile(128, 128, STAGES=2),
        tile(128, 128, BK=128, STAGES=3, num_warps=8),
    ]
    small = [
        tile(64, 64, STAGES=6),
        tile(64, 128, STAGES=4),
        tile(128, 64, STAGES=6),
        tile(128, 64, SWAP=True, STAGES=6),
        tile(64, 64, BK=128, STAGES=4),
        tile(64, 64, STAGES=6, SPECIAL=True, programs=2),
    ]
    pixels = layer.n * layer.size[0] * layer.size[1]
    if pixels <= 4096:
        return [*small, tile(128, 64), tile(64, 128, 64, STAGES=4), tile(64, 64, STAGES=3)]
    if outputs <= 64:
        return (
            [*narrow, tile(64, 64, STAGES=4), tile(64, 64, STAGES=6, SPECIAL=True, programs=2)]
            if pixels < 32768
            else narrow
        )
    if outputs == 320:
        return [
            tile(128, 256, 64, STAGES=3, num_warps=8),
            tile(128, 256, 64, STAGES=4, num_warps=8),
            tile(128, 256, 64, STAGES=2, SPECIAL=True, num_warps=8),
            row(256, 64, tall, SWAP=True),
            tile(256, 128, SWAP=True, num_warps=8),
            tile(128, 64),
            tile(256, 64, SWAP=True),
            row(128, 256, tall, W_STAGES=3, num_warps=8),
            tile(256, 64, SWAP=True, SPECIAL=True),
        ]
    if outputs == 256:
        large = [tile(128, 256, num_warps=8), tile(128, 256, STAGES=3, SPECIAL=True, num_warps=8)]
        return [*large, row(128, 256, tall, W_STAGES=3, num_warps=8), *square[:7]]
    return [*square, *small[:2]] if pixels < 32768 else square


def features_of(tile, pass_):
    """What a candidate needs of the compiler and the GPU that has not been proven: found out by small runs first."""
    found = [type(tile).__name__]
    if pass_ == "d_input":
        found.append("transposed")
    for name in ("SWAP", "SPECIAL"):
        if getattr(tile, name, False):
            found.append(name.lower())
    if getattr(tile, "BN2", 0) or getattr(tile, "G2", 0):
        found.append("parts")
    if getattr(tile, "G", 1) > 1:
        found.append("chunks")
    return tuple(found)


def small_runs():
    """(layer, pass, tile), for each combination of features."""
    tile, row, weight = tma().Tile, tma().RowTile, tma().WeightTile
    return [
        (TINY, "forward", tile(128, 64)),
        (TINY, "forward", tile(256, 128, SWAP=True, num_warps=8)),
        (TINY, "forward", tile(128, 128, STAGES=4, SPECIAL=True, num_warps=8)),
        (TINY, "forward", row(256, 64, 4, SWAP=True)),
        (TINY, "forward", row(128, 128, 4, num_warps=8)),
        (TINY, "d_weight", weight(64, 128, 1)),
        (TINY, "d_weight", weight(64, 128, 4, 0, 4, False, 8)),
        (TINY, "d_weight", weight(64, 64, 4, 1, 4, False, 4)),
        (TINY, "d_weight", weight(64, 128, 4, 0, 4, True, 8)),
        (TINY, "d_input", tile(128, 128, STAGES=3)),
        (TINY, "d_input", tile(256, 128, SWAP=True, num_warps=8)),
        (TINY, "d_input", row(256, 64, 4, SWAP=True)),
        (TINY, "d_input", row(128, 128, 4, num_warps=8)),
        (TINY5, "forward", tile(128, 256, 64, STAGES=3, num_warps=8)),
        (TINY, "forward", tile(256, 128, STAGES=3, SWAP=True, SPECIAL=True, num_warps=8)),
        (TINY, "d_input", tile(128, 128, STAGES=4, SPECIAL=True, num_warps=8)),
        (TINY, "d_weight", weight(64, 64, 4, 1, 4, True, 4)),
        (TINY5, "d_input", tile(128, 256, 64, STAGES=3, num_warps=8)),
        (TINY, "d_input", tile(256, 128, STAGES=3, SWAP=True, SPECIAL=True, num_warps=8)),
        (TINY5, "forward", tile(128, 256, 64, STAGES=2, SPECIAL=True, num_warps=8)),
        (TINY5, "d_input", tile(128, 256, 64, STAGES=2, SPECIAL=True, num_warps=8)),
    ]


class Epilogue(NamedTuple):
    activation: str
    bias: bool
    cond: bool
    residual: bool
    kept: bool

    def __str__(self):
        extras = [name for name in ("bias", "cond", "residual", "kept") if getattr(self, name)]
        return "+".join([self.activation or "linear", *extras])


def epilogues():
    """(layer, tile, epilogue)."""
    tile = tma().Tile
    layer = Layer(16, 64, 128, (28, 28), 3, "B")
    gate, square = tile(128, 64, 64, STAGES=3, num_warps=8), tile(128, 128, num_warps=8)
    special = tile(128, 64, 64, STAGES=3, SPECIAL=True, num_warps=8)
    swap = tile(256, 64, SWAP=True)
    return [
        (layer, square, Epilogue("", True, False, False, False)),
        (layer, gate, Epilogue("tanh_sigmoid", True, True, True, True)),
        (layer, swap, Epilogue("relu", True, True, True, True)),
        (layer, special, Epilogue("tanh_sigmoid", True, True, True, True)),
        (layer, square, Epilogue("elu", True, False, True, True)),
        (layer, gate, Epilogue("glu", False, False, False, False)),
        (layer, swap._replace(SPECIAL=True), Epilogue("elu", True, True, True, False)),
        (layer, tma().RowTile(256, 64, 4, SWAP=True), Epilogue("elu", True, True, True, True)),
        (layer, tile(128, 32, 32, STAGES=4), Epilogue("tanh_sigmoid", True, False, False, True)),
    ]


def everything():
    """All (key, layer, pass, tile, epilogue) in the order in which they run."""
    for layer, pass_, tile in small_runs():
        yield "small", layer, pass_, tile, None
    for pass_ in PASSES:
        for layer in LAYERS:
            for tile in tiles_of(layer, pass_):
                yield "layers", layer, pass_, tile, None
    for layer, tile, epilogue in epilogues():
        yield "epilogues", layer, "forward", tile, epilogue
    for layer in SIZES:
        for pass_ in PASSES:
            yield "sizes", layer, pass_, default_tile(layer, pass_), None


def default_tile(layer, pass_):
    tile, weight = tma().Tile, tma().WeightTile
    return weight(64, 64, 4) if pass_ == "d_weight" else tile(128, 64, STAGES=4)


def name_of(layer, pass_, tile, epilogue=None):
    values = ",".join(str(int(v)) if not isinstance(v, str) else v for v in tile)
    return f"{layer}|{pass_}|{type(tile).__name__}({values})" + (f"|{epilogue}" if epilogue else "")


# What touches the device


class Fake:
    """Stands in for Triton's driver where there is no GPU: enough to compile."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return None


class Session:
    """Tensors, launches and clocks of one process."""

    def __init__(self, out, dry, deadline):
        import torch

        self.torch, self.out, self.dry, self.deadline = torch, out, dry, deadline
        self.device = "cpu" if dry else "cuda"
        self.multiprocessors = 132
        if dry:
            import triton

            triton.runtime.driver.set_active(Fake())
            tma()._multiprocessors = lambda tensor: 132
        else:
            torch.backends.cudnn.conv.fp32_precision = "ieee"

    def left(self):
        return self.deadline - time.time()

    def row(self, **values):
        with open(self.out / "rows.csv", "a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow({k: values.get(k, "") for k in FIELDS})

    def say(self, doing):
        (self.out / f"doing.{os.getpid()}").write_text(doing)

    def start(self, prepared):
        """Launches what prepare_* returned."""
        for kernel, grid, arguments in prepared:
            if self.dry:
                kernel.run(grid=grid, warmup=True, **arguments)
            else:
                kernel[grid](**arguments)

    def finished(self, seconds):
        """Whether the device is through with all work within so many seconds."""
        if self.dry:
            return True
        event = self.torch.cuda.Event()
        event.record()
        end = time.time() + seconds
        while not event.query():
            if time.time() > end:
                return False
            time.sleep(0.0005)
        return True

    def graph(self, calls, least=12):
        """A replay of all calls, and how many there are of them."""
        torch = self.torch
        count = max(1, -(-least // len(calls)))
        if self.dry:
            return (lambda: None), count * len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.calls = calls  # whose tensors it reads: cudnn.benchmark gives memory that nobody holds back to the device
        with torch.cuda.graph(graph):
            for _ in range(count):
                for call in calls:
                    call()
        return graph, count * len(calls)

    def replay(self, graph):
        """Microseconds of a call."""
        graph, count = graph
        if self.dry:
            return random.uniform(20, 80)
        begin, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / count

    def time(self, graph, rounds=5):
        self.replay(graph)
        return sorted(self.replay(graph) for _ in range(rounds))[rounds // 2]


def tensors(session, layer, sets, pad=False):
    """Images and weights of a layer, `sets` times over: more than the caches hold."""
    torch = session.torch
    generator = torch.Generator(device=session.device).manual_seed(0)
    dtype = getattr(torch, layer.dtype)
    n = min(layer.n, 2) if session.dry else layer.n
    found = []
    for _ in range(sets):

        def normal(*shape):
            value = torch.randn(shape, device=session.device, generator=generator, dtype=torch.float32)
            return value.to(dtype).contiguous(memory_format=torch.channels_last)

        mask = torch.zeros(layer.k**2, device=session.device)
        mask[: layer.live] = 1
        mask = mask.view(layer.k, layer.k)
        w = normal(layer.o, layer.c, layer.k, layer.k) / (layer.c * layer.live) ** 0.5
        w = (w * mask).to(dtype).contiguous(memory_format=torch.channels_last)
        found.append({"x": normal(n, layer.c, *layer.size), "w": w, "d_z": normal(n, layer.o, *layer.size)})
    return found


def sets_of(layer, dry):
    size = 2 * layer.n * layer.size[0] * layer.size[1] * (layer.c + layer.o)
    return 1 if dry else max(2, min(24, -(-120_000_000 // size)))


def exact(session, layer, pass_, one):
    """The result in float32; the weight gradient, whose sums are long, by float64."""
    import torch.nn.functional as F  # noqa: N812

    torch = session.torch
    torch.backends.cudnn.benchmark = False
    dtype = torch.float64 if pass_ == "d_weight" else torch.float32
    x, w, d_z = (one[name].to(dtype) for name in ("x", "w", "d_z"))
    padding = layer.dilation * (layer.k // 2)
    if pass_ == "forward":
        return F.conv2d(x, w, padding=padding, dilation=layer.dilation)
    if pass_ == "d_input":
        return F.conv_transpose2d(d_z, w, padding=padding, dilation=layer.dilation)
    found = torch.nn.grad.conv2d_weight(x, w.shape, d_z, padding=padding, dilation=layer.dilation)
    live = torch.arange(layer.k**2, device=x.device).view(layer.k, layer.k) < layer.live
    return torch.where(live, found, 0.0).float()


def prepare(session, layer, pass_, tile, one, out, extras=None):
    """Launches of a candidate: what prepare_* return, as a list."""
    kernels = tma()
    half = layer.k // 2
    taps = kernels.Taps(layer.k, half, half, layer.live, layer.dilation)
    if pass_ == "d_weight":
        return list(kernels.prepare_weight_gradient(one["d_z"], one["x"], out, taps, tile))
    weight = one["w"].permute(0, 2, 3, 1).reshape(layer.o, layer.k**2, layer.c)
    source = one["x"] if pass_ == "forward" else one["d_z"]
    make = kernels.prepare_rows if isinstance(tile, kernels.RowTile) else kernels.prepare_convolution
    return [make(source, weight, out, taps, tile, transposed=pass_ == "d_input", **(extras or {}))]


def empty_result(session, pass_, one):
    like = {"forward": "d_z", "d_input": "x", "d_weight": "w"}[pass_]
    return session.torch.empty_like(one[like])


def verify(session, call, out, want, runs=RUNS):
    """Errors of the worst run, how many runs were wrong, and how many differ from the first."""
    torch = session.torch
    if session.dry:
        call()
        out.copy_(want)
        call = lambda: out.copy_(want)  # noqa: E731
        runs = 2
    errors = torch.zeros(2, runs, device=out.device)
    differs = torch.zeros(runs, device=out.device)
    norm, spread = want.norm(), want.std()
    first = None
    for run in range(runs):
        out.fill_(float("nan"))
        call()
        if run == 0 and not session.finished(4.0):
            return None
        difference = out.float() - want
        errors[0, run] = difference.norm() / norm
        errors[1, run] = difference.abs().max() / spread
        if first is None:
            first = out.clone()
        differs[run] = (out.view(torch.int16) != first.view(torch.int16)).any()
    if not session.finished(10.0):
        return None
    errors, differs = errors.cpu(), differs.cpu()
    wrong = ~((errors[0] <= RELATIVE) & (errors[1] <= WORST))
    worst = errors.nan_to_num(nan=float("inf")).max(dim=1).values.tolist()
    return worst[0], worst[1], int(wrong.sum()), int(differs.sum()), runs


def library(session, layer, pass_, sets, contiguous=False):
    """Calls by the library's convolutions: {name: one call for each set}."""
    import torch.nn.functional as F  # noqa: N812

    torch = session.torch
    torch.backends.cudnn.benchmark = not session.dry
    p = layer.k // 2
    memory_format = torch.contiguous_format if contiguous else torch.channels_last

    def lay(tensor):
        return tensor.contiguous(memory_format=memory_format)

    def backward(d_z, x, w, padding, which):
        mask = [which == "d_input", which == "d_weight", False]
        return torch.ops.aten.convolution_backward(
            d_z, x, w, None, [1, 1], padding, [1, 1], False, [0, 0], 1, mask
        )  # fmt: skip

    found = {"full": [], "crop": []}
    for one in sets:
        x, w, d_z = (lay(one[name]) for name in ("x", "w", "d_z"))
        cropped = lay(w[:, :, : p + 1])
        if pass_ == "forward":
            found["full"].append(lambda x=x, w=w: F.conv2d(x, w, padding=p))
            found["crop"].append(lambda x=x, w=cropped: F.conv2d(x, w, padding=(p, p)))
        else:
            padded = lay(F.pad(d_z, (0, 0, 0, p)))
            found["full"].append(lambda d=d_z, x=x, w=w: backward(d, x, w, [p, p], pass_))
            found["crop"].append(lambda d=padded, x=x, w=cropped: backward(d, x, w, [p, p], pass_))
    return {name + ("_contiguous" if contiguous else ""): calls for name, calls in found.items()}


def time_library(session, layer, pass_, sets, contiguous=False, write=True):
    """{name: (microseconds, graph)}."""
    found = {}
    for name, calls in library(session, layer, pass_, sets, contiguous).items():
        session.say(f"{layer}|{pass_}|library {name}")
        try:
            for call in calls[:2]:
                call()
            graph = session.graph(calls)
            cold = session.time(graph)
            hot = session.time(session.graph(calls[:1]))
        except Exception as error:
            session.row(stage="library", layer=layer, pass_=pass_, contender=name, note=repr(error)[:300])
            continue
        found[name] = cold, graph
        if write:
            session.row(stage="library", layer=layer, pass_=pass_, contender=name, cold_us=round(cold, 2),
                        hot_us=round(hot, 2), tflops=round(layer.flops / cold / 1e6, 1))  # fmt: skip
    return found


def extras_of(session, layer, epilogue, one):
    """Keywords of prepare_convolution, and the results that they and the activation make, in float32."""
    torch = session.torch
    gated = epilogue.activation in ("tanh_sigmoid", "glu")
    y = one["d_z"]
    n, z_channels, rows, columns = y.shape
    outputs = z_channels // 2 if gated else z_channels

    def image(channels):
        return (
            torch.randn(n, channels, rows, columns, device=y.device).to(y.dtype).to(memory_format=torch.channels_last)
        )

    keywords = {"activation": epilogue.activation}
    z = exact(session, layer, "forward", one)
    if epilogue.bias:
        keywords["bias"] = torch.randn(z_channels, device=y.device).to(y.dtype)
        z = z + keywords["bias"].float()[:, None, None]
    if epilogue.cond:
        keywords["cond"] = torch.randn(n, z_channels, device=y.device).to(y.dtype)
        z = z + keywords["cond"].float()[:, :, None, None]
    if gated:
        a, b = z.chunk(2, 1)
        want, kept = (torch.tanh(a) if epilogue.activation == "tanh_sigmoid" else a) * torch.sigmoid(b), z
    else:
        want = {"": lambda z: z, "relu": torch.relu, "elu": torch.nn.functional.elu}[epilogue.activation](z)
        kept = want
    if epilogue.residual:
        keywords["residual"] = image(outputs)
        want = want + keywords["residual"].float()
    if epilogue.kept:
        keywords["kept"] = image(kept.shape[1])
    return keywords, want, kept, image(outputs)


def wait_for_compilation(session, key, pool_alive):
    """Until the pool has compiled a candidate, or will not soon."""
    end = time.time() + 20
    while pool_alive() and time.time() < end and not (session.out / "compiled" / key).exists():
        time.sleep(0.05)


def key_of(stage, layer, pass_, tile, epilogue):
    import hashlib

    return hashlib.sha256(f"{stage} {name_of(layer, pass_, tile, epilogue)}".encode()).hexdigest()[:24]


class Broken(Exception):
    """This process can run nothing any more."""


def attempt(session, stage, layer, pass_, tile, epilogue, sets, want, state, runs=RUNS):
    """One candidate: verified, and its call for each set; None where it is wrong or was before."""
    torch = session.torch
    name = name_of(layer, pass_, tile, epilogue)
    common = {"stage": stage, "layer": layer, "pass_": pass_, "contender": "ours", "tile": name.split("|", 2)[2]}
    features = features_of(tile, pass_)
    if name in state.dead or (stage != "small" and features in state.lacking):
        session.row(**common, note="left out: " + state.dead.get(name, "the small run of its features failed"))
        return None
    session.say(name)
    wait_for_compilation(session, key_of(stage, layer, pass_, tile, epilogue), state.pool_alive)
    session.say(name)
    try:
        calls, outs = [], []
        for index, one in enumerate(sets):
            if epilogue:
                extras, want, kept, out = extras_of(session, layer, epilogue, one)
            else:
                extras, out = None, empty_result(session, pass_, one)
            prepared = prepare(session, layer, pass_, tile, one, out, extras)
            calls.append(lambda prepared=prepared: session.start(prepared))
            outs.append(out)
            if index == 0:
                found = verify(session, calls[0], out, want, runs)
                if found is None:
                    session.row(**common, note="HANGS")
                    raise Broken(name)
                note = ""
                if epilogue and epilogue.kept:
                    error = ((extras["kept"].float() - kept).abs().max() / kept.std()).item()
                    note = f"kept {error:.2g}"
                    if not session.dry and not error <= WORST:
                        note, found = "WRONG kept " + note, (*found[:2], runs, *found[3:])
                relative, worst, wrong, differ, runs = found
                common |= {"relative_error": f"{relative:.3g}", "worst_error": f"{worst:.3g}", "wrong_runs": wrong,
                           "differing_runs": differ, "runs": runs, "note": note}  # fmt: skip
                if wrong or differ:
                    session.row(**common)
                    return None
        return common, calls
    except Broken:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        session.row(**common, note=text[:150] + " ... " + text[-250:] if len(text) > 400 else text)
        with open(session.out / "errors.txt", "a") as file:
            file.write(f"{name}\n{traceback.format_exc()[-3000:]}\n")
        if not session.dry:
            try:
                torch.cuda.synchronize()
            except Exception as broken:
                raise Broken(name) from broken
        return None


def run_job(session, layer, pass_, state):
    """Rivals and all candidates of one layer and pass, and at last the best of both beside each other."""
    started = time.time()
    sets = tensors(session, layer, sets_of(layer, session.dry))
    rivals = time_library(session, layer, pass_, sets)
    want = exact(session, layer, pass_, sets[0])
    best = []
    for tile in tiles_of(layer, pass_):
        if session.left() < 3 or time.time() - started > state.seconds_of_a_job:
            break
        found = attempt(session, "layers", layer, pass_, tile, None, sets, want, state)
        if not found:
            continue
        common, calls = found
        graph = session.graph(calls)
        cold, hot = session.time(graph), session.time(session.graph(calls[:1]))
        session.row(**common | {"cold_us": round(cold, 2), "hot_us": round(hot, 2),
                                "tflops": round(layer.flops / cold / 1e6, 1)})  # fmt: skip
        best = sorted([*best, (cold, common["tile"], graph)], key=lambda entry: entry[0])[:3]
    baseline = state.prototype(session, layer, pass_, sets, want)
    graphs = {name: graph for name, (_, graph) in rivals.items()} | {tile: graph for _, tile, graph in best} | baseline
    samples = {name: [] for name in graphs}
    session.say(f"{layer}|{pass_}|final")
    for _ in range(7):
        for name, graph in graphs.items():
            samples[name].append(session.replay(graph))
    for name, values in samples.items():
        typical = sorted(values)[len(values) // 2]
        ours = name not in rivals and name not in baseline
        session.row(stage="final", layer=layer, pass_=pass_, contender="ours" if ours else name,
                    tile=name if ours else "", cold_us=round(typical, 2),
                    tflops=round(layer.flops / typical / 1e6, 1))  # fmt: skip


def time_today(session, layer, pass_, sets):
    """The kernels that fastelbo has today."""
    import fastelbo

    op = importlib.import_module("fastelbo.ops.masked_conv2d")
    session.torch.backends.cudnn.benchmark = False
    if pass_ == "forward":
        calls = [
            lambda one=one: fastelbo.masked_conv2d(one["x"], one["w"], mask_type=layer.mask, backend="triton")
            for one in sets
        ]
    else:
        wants = (pass_ == "d_input", pass_ == "d_weight", False, 0)
        options = (layer.mask, "square", 1, 1, "interleaved", "")
        calls = [
            lambda one=one: op._BWD["triton"](one["d_z"], one["x"], one["w"], None, *options, *wants) for one in sets
        ]
    with session.torch.no_grad():
        graph = session.graph(calls)
        return session.time(graph)


class State:
    """What a process knows of those before it."""

    def __init__(self, out, dead, lacking, done, pool):
        self.out, self.dead, self.lacking, self.done, self.pool = out, dead, lacking, done, pool
        self.seconds_of_a_job = 12.0

    def pool_alive(self):
        return (self.out / "compiling").exists()

    def prototype(self, session, layer, pass_, sets, want):
        """Triton's own pipeline with two stages, the fastest that was right: forward only."""
        if pass_ != "forward" or layer.c % 64 or layer.o % 64 or session.left() < 5:
            return {}
        try:
            import conv_candidates_prototype as old
        except ImportError:
            return {}
        try:
            session.say(f"{layer}|{pass_}|prototype")
            outs = [empty_result(session, pass_, one) for one in sets]
            calls = [old.call(layer, one, out, tma().box_of) for one, out in zip(sets, outs, strict=True)]
            if session.dry:
                return {}
            found = verify(session, calls[0], outs[0], want, 20)
            if found is None:
                raise Broken("prototype")
            session.row(stage="prototype", layer=layer, pass_=pass_, contender="triton_2_stages", wrong_runs=found[2],
                        differing_runs=found[3], runs=found[4], relative_error=found[0])  # fmt: skip
            return {"triton_2_stages": session.graph(calls)}
        except Broken:
            raise
        except Exception as error:
            session.row(
                stage="prototype", layer=layer, pass_=pass_, contender="triton_2_stages", note=repr(error)[:300]
            )
            return {}


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def work(out, deadline, dry):
    """A process that runs what is left to run, in order of value."""
    session = Session(out, dry, deadline)
    torch = session.torch
    if not dry:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    print("ready", flush=True)
    if not sys.stdin.readline():  # the parent has gone
        return
    dead = dict(line.split("\t", 1) for line in lines(out / "dead.txt") if "\t" in line)
    lacking = {tuple(line.split("+")) for line in lines(out / "lacking.txt")}
    state = State(out, dead, lacking, set(lines(out / "done.txt")), None)

    def done(job):
        with open(out / "done.txt", "a") as file:
            file.write(job + "\n")

    def job(name, call, least=3.0):
        if name in state.done or session.left() < least:
            return
        try:
            call()
        except Broken:
            raise
        except Exception:
            with open(out / "errors.txt", "a") as file:
                file.write(f"{name}\n{traceback.format_exc()[-3000:]}\n")
            session.row(stage="error", contender=name, note=traceback.format_exc()[-300:].replace("\n", " "))
            if not dry:
                torch.cuda.synchronize()  # raises where nothing more can run here
        done(name)

    def small(layer, pass_, tile):
        one = tensors(session, layer, 1)
        found = attempt(
            session, "small", layer, pass_, tile, None, one, exact(session, layer, pass_, one[0]), state, 10
        )
        if found:
            session.row(**found[0])
        else:
            features = features_of(tile, pass_)
            state.lacking.add(features)
            with open(out / "lacking.txt", "a") as file:
                file.write("+".join(features) + "\n")

    def checked(stage, layer, pass_, tile, epilogue):
        one = tensors(session, layer, 1)
        want = None if epilogue else exact(session, layer, pass_, one[0])
        found = attempt(session, stage, layer, pass_, tile, epilogue, one, want, state, 20)
        if found:
            common, calls = found
            session.row(**common | {"hot_us": round(session.time(session.graph(calls)), 2)})

    def today(layer, pass_):
        session.say(f"today {layer} {pass_}")
        sets = tensors(session, layer, sets_of(layer, dry))
        if dry:
            return
        cold = time_today(session, layer, pass_, sets)
        session.row(stage="today", layer=layer, pass_=pass_, contender="triton_today", cold_us=round(cold, 2),
                    tflops=round(layer.flops / cold / 1e6, 1))  # fmt: skip

    def contiguous(layer, pass_):
        time_library(session, layer, pass_, tensors(session, layer, sets_of(layer, dry)), contiguous=True)

    for layer in LAYERS[:4]:  # the library's, while all else is compiled
        job(f"warm {layer}", lambda layer=layer: time_library(
            session, layer, "forward", tensors(session, layer, sets_of(layer, dry)), write=False))  # fmt: skip
    for layer, pass_, tile in small_runs():
        job(f"small {name_of(layer, pass_, tile)}", lambda a=(layer, pass_, tile): small(*a))
    for pass_ in PASSES:
        for layer in LAYERS:
            job(f"layer {layer} {pass_}", lambda a=(layer, pass_): run_job(session, *a, state))
    for layer, tile, epilogue in epilogues():
        job(f"epilogue {name_of(layer, 'forward', tile, epilogue)}",
            lambda a=(layer, "forward", tile, epilogue): checked("epilogues", *a))  # fmt: skip
    for layer in SIZES:
        for pass_ in PASSES:
            job(
                f"size {layer} {pass_}",
                lambda a=(layer, pass_): checked("sizes", *a, default_tile(*a), None),
            )
    for pass_ in PASSES[:2]:
        for layer in LAYERS[:4]:
            job(f"contiguous {layer} {pass_}", lambda a=(layer, pass_): contiguous(*a), 4.0)
    for pass_ in PASSES:
        for layer in LAYERS:
            job(f"today {layer} {pass_}", lambda a=(layer, pass_): today(*a), 6.0)


def compile_share(out, index, count, dry):
    """Compiles every count-th candidate; needs no tensors but their addresses."""
    session = Session(out, dry, time.time() + 1e6)
    session.device, session.dry = "cpu", True  # tensors of the host, and no launch
    if not dry:
        multiprocessors = session.torch.cuda.get_device_properties(0).multi_processor_count
        tma()._multiprocessors = lambda tensor: multiprocessors
    torch = session.torch
    for position, (stage, layer, pass_, tile, epilogue) in enumerate(everything()):
        if position % count != index:
            continue
        name = name_of(layer, pass_, tile, epilogue)
        try:
            dtype = getattr(torch, layer.dtype)

            def image(channels, layer=layer, dtype=dtype):
                return torch.empty(
                    layer.n, channels, *layer.size, dtype=dtype, memory_format=torch.channels_last
                )  # fmt: skip

            one = {"x": image(layer.c), "d_z": image(layer.o)}
            one["w"] = torch.empty(
                layer.o, layer.c, layer.k, layer.k, dtype=dtype, memory_format=torch.channels_last
            )  # fmt: skip
            extras, out_tensor = None, empty_result(session, pass_, one)
            if epilogue:
                gated = epilogue.activation in ("tanh_sigmoid", "glu")
                out_tensor = image(layer.o // 2 if gated else layer.o)
                extras = {"activation": epilogue.activation}
                extras |= {"bias": torch.empty(layer.o, dtype=dtype)} if epilogue.bias else {}
                extras |= {"cond": torch.empty(layer.n, layer.o, dtype=dtype)} if epilogue.cond else {}
                extras |= {"residual": out_tensor} if epilogue.residual else {}
                extras |= {"kept": image(layer.o)} if epilogue.kept else {}
            session.start(prepare(session, layer, pass_, tile, one, out_tensor, extras))
        except Exception as error:
            with open(out / "compile_errors.txt", "a") as file:
                file.write(f"{name}: {type(error).__name__} {str(error)[-1500:]}\n\n")
        (out / "compiled" / key_of(stage, layer, pass_, tile, epilogue)).touch()


def spawn(arguments, out, label, **keywords):
    log = open(out / f"log.{label}.txt", "w")  # noqa: SIM115
    return subprocess.Popen([sys.executable, __file__, *arguments], stderr=log, **keywords)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count()))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile", type=int)
    parser.add_argument("--work", type=float)
    options = parser.parse_args()
    out = options.out
    if options.compile is not None:
        compile_share(out, options.compile, options.processes, options.dry_run)
        return
    if options.work is not None:
        try:
            work(out, options.work, options.dry_run)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(3)  # a hanging kernel would keep an orderly exit waiting
        return

    begin = time.time()
    deadline = begin + options.seconds - 8
    out.mkdir(parents=True, exist_ok=True)
    (out / "compiled").mkdir(exist_ok=True)
    (out / "compiling").touch()
    with open(out / "rows.csv", "w", newline="") as file:
        csv.DictWriter(file, FIELDS).writeheader()
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp(prefix="conv_candidates_"))
    dry = ["--dry-run"] if options.dry_run else []
    number = 0

    def worker():
        nonlocal number
        number += 1
        return spawn(["--out", str(out), "--work", str(deadline), *dry], out, f"work{number}",
                     stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)  # fmt: skip

    def go(process):
        process.stdin.write("go\n")
        process.stdin.flush()

    current, standby = worker(), worker()
    pool = [
        spawn(["--out", str(out), "--compile", str(i), "--processes", str(options.processes), *dry], out, f"compile{i}")
        for i in range(options.processes)
    ]
    go(current)
    failures = 0
    try:
        while time.time() < deadline + 2:
            time.sleep(0.1)
            if (out / "compiling").exists() and all(process.poll() is not None for process in pool):
                (out / "compiling").unlink()
                print(f"compiled after {time.time() - begin:.0f} s", flush=True)
            doing = out / f"doing.{current.pid}"
            stuck = doing.exists() and time.time() - doing.stat().st_mtime > 40
            if stuck:
                current.kill()
            code = current.poll()
            if code is None and not stuck:
                continue
            if code == 0:
                break
            failures += 1
            what = doing.read_text() if doing.exists() else "start"
            with open(out / "dead.txt", "a") as file:
                file.write(f"{what}\tended its process\n")
            for stage, layer, pass_, tile, epilogue in everything():
                if stage == "small" and name_of(layer, pass_, tile, epilogue) == what:
                    with open(out / "lacking.txt", "a") as file:
                        file.write("+".join(features_of(tile, pass_)) + "\n")
            if failures > 12:
                break
            current = standby
            go(current)
            standby = worker()
    finally:
        for process in (current, standby, *pool):
            if process.poll() is None:
                process.kill()
    report(out, time.time() - begin, failures)


def report(out, seconds, failures):
    """A table of what won."""
    with open(out / "rows.csv", newline="") as file:
        found = list(csv.DictReader(file))
    text = [f"{len(found)} rows in {seconds:.0f} s, {failures} processes lost"]
    for stage in ("small", "epilogues", "sizes"):
        rows = [row for row in found if row["stage"] == stage]
        bad = [row for row in rows if row["wrong_runs"] not in ("0",) or row["differing_runs"] not in ("0",)]
        text.append(f"{stage}: {len(rows) - len(bad)} of {len(rows)} right")
        text += [f"  BAD {row['layer']} {row['pass_']} {row['tile']}: wrong {row['wrong_runs']} differing "
                 f"{row['differing_runs']} of {row['runs']} {row['note'][:110]}" for row in bad]  # fmt: skip
    wrong = [row for row in found if row["stage"] == "layers" and row["wrong_runs"] != "0"]
    text.append(f"layers: {len(wrong)} candidates failed or were wrong")
    text += [
        f"  {row['layer']} {row['pass_']} {row['tile']} {row['wrong_runs']} {row['note'][:90]}" for row in wrong[:12]
    ]
    for pass_ in PASSES:
        for layer in map(str, LAYERS):
            rows = [row for row in found if row["layer"] == layer and row["pass_"] == pass_ and row["cold_us"]]
            final = {}
            for row in rows:
                if row["stage"] == "final" and row["contender"] != "ours":
                    final[row["contender"]] = float(row["cold_us"])
                if row["stage"] in ("today", "library") and row["contender"] not in final:
                    final[row["contender"]] = float(row["cold_us"])
            ours = sorted(
                (float(row["cold_us"]), row["tile"], row["tflops"])
                for row in rows
                if row["contender"] == "ours" and row["stage"] == "final"
            ) or sorted(
                (float(row["cold_us"]), row["tile"], row["tflops"]) for row in rows if row["contender"] == "ours"
            )
            rivals = {name: us for name, us in final.items() if name.startswith(("full", "crop"))}
            line = f"{pass_:8} {layer:28} " + " ".join(f"{name} {us:.1f}" for name, us in final.items())
            if ours and rivals:
                ratio = min(rivals.values()) / ours[0][0]
                line += f" | {ours[0][0]:.1f} us {ours[0][2]} TF = {ratio:.2f}x; "
                line += ", ".join(f"{us:.1f}:{tile}" for us, tile, _ in ours[:3])
            text.append(line)
    text = "\n".join(text)
    (out / "table.txt").write_text(text + "\n")
    print(text, flush=True)


if __name__ == "__main__":
    main()
