"""The kernels over TMA boxes, run by a model of the hardware, against plain convolutions in float64; and which layers
take them, by which tiles."""

import csv
import importlib
import importlib.util
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import fresh_python
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

import fastelbo

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")

slow = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SIZES = [(28, 28), (32, 32), (16, 16), (14, 14), (7, 7), (8, 8), (64, 64), (100, 60)]


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernels():
    return importlib.import_module("fastelbo.kernels.masked_conv2d_tma")


@pytest.fixture
def run(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda tensor: 3)
    with module_of(Path(__file__).parent / "gluon_stand_in.py").standing_in(kernels, monkeypatch) as run:
        yield run


def image(n, channels, size):
    return torch.randn(n, channels, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


def case(n, c, o, size, k, mask, dilation=1):
    """Image, weight with NaN in its dead taps, gradient, taps, and the live weight."""
    torch.manual_seed(0)
    live = (k * k - 1) // 2 + (mask == "B")
    x, d_z = image(n, c, size), image(n, o, size)
    weight = torch.randn(o, k * k, c, dtype=torch.float64)
    weight[:, live:] = float("nan")
    full = weight.nan_to_num(0.0).reshape(o, k, k, c).permute(0, 3, 1, 2)
    return x, weight, d_z, (k, k // 2, k // 2, live, dilation), full


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def forms(kernels):
    tile, row = kernels.tiling.Tile, kernels.tiling.RowTile
    return {
        "plain": tile(128, 64, STAGES=3),
        "swapped": tile(128, 64, STAGES=2, SWAP=True),
        "special": tile(64, 64, STAGES=3, SPECIAL=True),
        "special swapped": tile(128, 64, STAGES=2, SWAP=True, SPECIAL=True),
        "two parts": tile(64, 64, 32, STAGES=3),
        "special, two parts": tile(64, 64, 32, STAGES=2, SPECIAL=True),
        "wide steps": tile(64, 128, BK=128, STAGES=2),
        "rows": row(128, 64, 4),
        "rows swapped": row(128, 64, 4, STAGES=3, W_STAGES=2, SWAP=True),
    }


def make(kernels, form):
    tile = forms(kernels)[form]
    return tile, kernels.prepare_rows if isinstance(tile, kernels.tiling.RowTile) else kernels.prepare_convolution


FORMS = ["plain", "swapped", "special", "special swapped", "two parts", "special, two parts", "wide steps", "rows",
         "rows swapped"]  # fmt: skip


@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=slow)], ids=["forward", "input gradient"])
@pytest.mark.parametrize(
    "form",
    [
        form if form in ("special swapped", "wide steps", "rows swapped") else pytest.param(form, marks=slow)
        for form in FORMS
    ],
)
def test_every_form_convolves(kernels, run, form, transposed):
    x, weight, d_z, taps, full = case(3, 72, 104, (8, 12), 5, "B")
    tile, prepare = make(kernels, form)
    source, want = (d_z, F.conv_transpose2d(d_z, full, padding=2)) if transposed else (x, F.conv2d(x, full, padding=2))
    y = torch.full_like(x if transposed else d_z, float("nan"))
    run(*prepare(source, weight, y, kernels.Taps(*taps), tile, transposed=transposed))
    close(y, want)


@slow
@pytest.mark.parametrize("form", ["plain", "rows"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size(kernels, run, form, size):
    x, weight, d_z, taps, full = case(2, 8, 16, size, 3, "A")
    tile, prepare = make(kernels, form)
    y = torch.full_like(d_z, float("nan"))
    run(*prepare(x, weight, y, kernels.Taps(*taps), tile))
    close(y, F.conv2d(x, full, padding=1))
    back = torch.full_like(x, float("nan"))
    run(*prepare(d_z, weight, back, kernels.Taps(*taps), tile, transposed=True))
    close(back, F.conv_transpose2d(d_z, full, padding=1))


@slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("k", "mask", "dilation"), [(7, "A", 1), (3, "B", 2), (1, "B", 1)])
def test_kernels_and_dilations(kernels, run, form, k, mask, dilation):
    x, weight, d_z, taps, full = case(2, 16, 8, (9, 8), k, mask, dilation)
    tile, prepare = make(kernels, form)
    y = torch.full_like(d_z, float("nan"))
    run(*prepare(x, weight, y, kernels.Taps(*taps), tile))
    close(y, F.conv2d(x, full, padding=dilation * (k // 2), dilation=dilation))


@slow
@pytest.mark.parametrize("form", ["plain", "swapped", "special", "rows", "rows swapped"])
@pytest.mark.parametrize("activation", ["", "relu", "elu", "tanh_sigmoid", "glu"])
def test_epilogues(kernels, run, form, activation):
    gated = activation in ("tanh_sigmoid", "glu")
    tile, prepare = make(kernels, form)
    if gated and "rows" in form:
        pytest.skip("no gate there")
    x, weight, z, taps, full = case(3, 16, 48, (8, 8), 3, "B")
    tile = tile._replace(BN=32, BN2=32) if gated else tile
    outputs = 24 if gated else 48
    bias, cond = torch.randn(48, dtype=torch.float64), torch.randn(3, 48, dtype=torch.float64)
    residual, kept = image(3, outputs, (8, 8)), torch.full_like(z, float("nan"))
    y = torch.full_like(residual, float("nan"))
    extras = dict(activation=activation, bias=bias, cond=cond, residual=residual, kept=kept)
    run(*prepare(x, weight, y, kernels.Taps(*taps), tile, epilogue=kernels.Epilogue(**extras)))
    z = F.conv2d(x, full, bias, padding=1) + cond[:, :, None, None]
    a, b = z.chunk(2, 1)
    value = {
        "": z, "relu": z.relu(), "elu": F.elu(z), "tanh_sigmoid": a.tanh() * b.sigmoid(), "glu": a * b.sigmoid()
    }[activation]  # fmt: skip
    torch.testing.assert_close(y, value + residual, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept, z if gated else value, rtol=1e-5, atol=1e-6)


WEIGHT_FORMS = [(1, 0, False), (2, 0, True), (4, 0, False), (4, 1, False), (4, 1, True), (2, 1, False)]


@slow
@pytest.mark.parametrize(("g", "g2", "special"), WEIGHT_FORMS)
@pytest.mark.parametrize("channels", [(72, 104), (64, 64), (192, 40)], ids=str)
def test_weight_gradient(kernels, run, monkeypatch, g, g2, special, channels):
    c, o = channels
    x, _, d_z, taps, _ = case(5, c, o, (8, 12), 3, "B")
    taps = kernels.Taps(*taps)
    tile = kernels.tiling.WeightTile(64, 64, g, g2, 3, special, waves=99)
    d_weight = torch.full((o, c, 3, 3), float("nan"), dtype=torch.float64)
    first, second = kernels.prepare_weight_gradient(d_z, x, d_weight, taps, tile)
    first[2]["shares"] = first[2]["shares"].double()
    first[2]["shares"].fill_(float("nan"))
    run(*first)
    shares = first[2]["shares"]
    assert shares.shape[0] == second[2]["splits"] > 1
    want = torch.nn.grad.conv2d_weight(x, (o, c, 3, 3), d_z, padding=1)
    close(shares.sum(0), want.permute(0, 2, 3, 1).reshape(o, 9, c)[:, : taps.TAPS])


@slow
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weight_gradient_of_any_size(kernels, run, size):
    x, _, d_z, taps, _ = case(2, 8, 16, size, 3, "A")
    taps = kernels.Taps(*taps)
    d_weight = torch.empty(16, 8, 3, 3, dtype=torch.float64)
    first, _ = kernels.prepare_weight_gradient(d_z, x, d_weight, taps, kernels.tiling.WeightTile(64, 64, 2, 0, 3))
    first[2]["shares"] = first[2]["shares"].double().fill_(float("nan"))
    run(*first)
    want = torch.nn.grad.conv2d_weight(x, (16, 8, 3, 3), d_z, padding=1)
    close(first[2]["shares"].sum(0), want.permute(0, 2, 3, 1).reshape(16, 9, 8)[:, : taps.TAPS])


@pytest.mark.parametrize(("size", "n"), [*zip(SIZES, itertools.repeat(16), strict=False), ((7, 7), 128)], ids=str)
def test_few_pixels_are_idle(kernels, size, n):
    rows, columns = size

    def idle(m):
        box = kernels.box_of(n, rows, columns, m)
        covered = m * -(-n // box[0]) * -(-rows // box[1]) * -(-columns // box[2])
        return covered / (n * rows * columns) - 1

    assert idle(64) <= 0.15
    assert idle(128) <= 0.15


# Which layers take these kernels, and how they are called


@pytest.fixture
def launched(kernels, monkeypatch):
    """The launches of masked_conv2d on a GPU of capability 9.0, as the environment variable has them; nothing runs."""
    found = []

    def launch(kernel, programs, arguments):
        found.append(kernel.__name__)

    on_a_gpu(kernels, monkeypatch, launch)
    return found


def on_a_gpu(kernels, monkeypatch, launch, capability=(9, 0)):
    """launch: what takes a kernel, how many programs, and its arguments by name."""

    class Launch:
        def __init__(self, kernel, programs, *, enable_fp_fusion, **arguments):
            self.kernel, self.programs, self.arguments = kernel, programs, arguments

        def __call__(self, *tensors):
            tensors, arguments = iter(tensors), dict(self.arguments)
            for name, value in arguments.items():
                if value is kernels.TENSOR:
                    arguments[name] = next(tensors)
                elif hasattr(value, "of"):
                    arguments[name] = value.of(tensors)
            launch(self.kernel, self.programs, arguments)

    today = importlib.import_module("fastelbo.kernels.masked_conv2d")
    assert today.boxes is None  # unless asked for
    monkeypatch.setattr(today, "boxes", kernels)
    monkeypatch.setattr(kernels, "Launch", Launch)
    monkeypatch.setattr(fastelbo._library, "_FOUND", {})  # what other devices' calls have found
    monkeypatch.setattr(kernels, "_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda tensor: 132)


def layer(c=16, o=16, k=3, size=(8, 8), n=2, dtype=torch.bfloat16, memory_format=torch.channels_last, z=None):
    """Image, weight, and all that may surround them."""
    x, weight, residual = (
        torch.randn(shape, dtype=dtype).to(memory_format=memory_format)
        for shape in ((n, c, *size), (z or o, c, k, k), (n, o, *size))
    )
    return x, weight / 8, torch.randn(z or o, dtype=dtype), torch.randn(n, z or o, dtype=dtype), residual


def both_ways(x, weight, bias=None, cond=None, residual=None, upstream=None, **keywords):
    """The output, and the gradients of all that there is."""
    given = [t.detach().requires_grad_() for t in (x, weight, bias, cond, residual) if t is not None]
    named = iter(given[2:])
    bias, cond, residual = (None if t is None else next(named) for t in (bias, cond, residual))
    extra = {} if residual is None else {"residual": residual}
    keywords = {"mask_type": "B", "backend": "triton"} | keywords
    if "stack" in keywords:
        y = fastelbo.causal_conv2d(*given[:2], bias, cond=cond, **keywords)
    else:
        y = fastelbo.masked_conv2d(*given[:2], bias, cond=cond, **extra, **keywords)
    upstream = torch.ones_like(y) if upstream is None else upstream
    return [y.detach(), *torch.autograd.grad(y, given, upstream)]


TAKEN = ["convolve", "convolve", "weight_shares", "add_shares"]


@pytest.mark.parametrize(
    ("case", "keywords", "taken"),
    [
        ({}, {}, TAKEN),
        ({"dtype": torch.float16}, {"mask_type": "A", "dilation": 2}, TAKEN),
        ({"c": 24, "o": 40, "size": (4, 8)}, {"activation": "elu"}, TAKEN),
        ({"o": 32, "z": 64}, {"activation": "glu"}, TAKEN),
        ({"size": (7, 7)}, {}, TAKEN[:2]),  # no box of pixels divides the image: taps would meet NaN beyond it
        ({"o": 24, "z": 48}, {"activation": "glu"}, TAKEN[1:]),  # what is kept ends within a box
        ({"c": 12}, {}, []),
        ({"o": 12}, {}, []),
        ({"dtype": torch.float32}, {}, []),
        ({"memory_format": torch.contiguous_format}, {}, []),
        ({"k": 1}, {"mask_type": "A"}, []),
        ({}, {"channel_groups": 2}, []),
    ],
    ids=str,
)
def test_a_layer_takes_them_by_rule(kernels, launched, monkeypatch, case, keywords, taken):
    monkeypatch.setattr(kernels.tiling, "FEW_PIXELS", 0)
    tensors = layer(**case)
    found = both_ways(*tensors, **keywords)
    assert launched == taken
    monkeypatch.setattr(importlib.import_module("fastelbo.kernels.masked_conv2d"), "boxes", None)
    monkeypatch.setattr(fastelbo._library, "_FOUND", {})
    launched.clear()
    plain = both_ways(*tensors, **keywords)
    assert not launched
    if not taken:
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_what_else_keeps_a_layer_off_them(kernels, launched, monkeypatch):
    x, weight, bias, cond, residual = layer(size=(4, 4))

    def taken(*tensors, **keywords):
        launched.clear()
        monkeypatch.setattr(fastelbo._library, "_FOUND", {})
        fastelbo.masked_conv2d(*tensors, **{"mask_type": "B", "backend": "triton"} | keywords)
        return launched == ["convolve"]

    assert taken(x, weight, bias, cond=cond, residual=residual)
    assert not taken(x, weight, cond=torch.randn_like(residual))
    assert not taken(x, weight, residual=residual.contiguous())
    assert not taken(x[:1].expand(2, -1, -1, -1), weight)
    shifted = torch.empty(x.numel() + 4, dtype=x.dtype)[4:].as_strided(x.shape, x.stride())
    assert not taken(shifted, weight)  # not from a multiple of 16 bytes on
    wide = torch.randn(2, 32, 4, 4, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    assert taken(wide[:, 8:24], weight)  # but some of an image's channels are fine
    launched.clear()
    fastelbo.causal_conv2d(x, weight[:, :, :2], stack="vertical", backend="triton")
    assert not launched
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0)):  # later ones have other products
        monkeypatch.setattr(kernels, "_capability", lambda device, capability=capability: capability)
        assert not taken(x, weight)


def test_weight_gradients_of_few_pixels_run_on_the_other_kernel(launched):
    x, weight, *_ = layer()
    both_ways(x, weight)
    assert launched == TAKEN[:2]


def same(found, want):
    """Whether two arguments are the same: tensors that lie in one place, and descriptors of them."""
    if hasattr(found, "block_shape"):
        parts = ("shape", "strides", "block_shape", "layout")
        return same(found.base, want.base) and all(getattr(found, part) == getattr(want, part) for part in parts)
    if isinstance(found, torch.Tensor):
        return (found.data_ptr(), found.shape, found.stride()) == (want.data_ptr(), want.shape, want.stride())
    return found == want


NAME = r"(\d+)-(\d+) k(\d) (\w) (\d+)x(\d+)x(\d+)"


class Layer(NamedTuple):
    """A layer of the rows, as they write it: 64-64 k7 B 128x28x28."""

    c: int
    o: int
    k: int
    mask: str
    n: int
    size: tuple

    @property
    def live(self):
        return (self.k**2 - 1) // 2 + (self.mask == "B")

    @property
    def pixels(self):
        return self.n * self.size[0] * self.size[1]

    def tile_for(self, kernels, pass_):
        if pass_ == "d_weight":
            return kernels.tiling.weight_tile_for(self.o, self.c, self.live)
        outputs, inputs = (self.o, self.c) if pass_ == "forward" else (self.c, self.o)
        return kernels.tiling.tile_for(outputs, inputs, self.pixels, self.k // 2, self.size[0])


@pytest.fixture(scope="module")
def candidates():
    """Layer to the rows of all tiles that were right in fifty runs on an H100 and timed there."""
    found = {}
    with (ROOT / "benchmarks" / "results" / "conv_candidates_h100.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["stage"] == "layers" and row["cold_us"]:
                c, o, k, mask, n, *size = re.fullmatch(NAME, row["layer"]).groups()
                layer = Layer(int(c), int(o), int(k), mask, int(n), tuple(map(int, size)))
                found.setdefault(layer, []).append(row)
    assert len(found) == 10
    return found


PASSES = ("forward", "d_input", "d_weight")


@pytest.mark.parametrize("pass_", PASSES)
def test_arguments_are_those_that_candidates_were_right_with(kernels, candidates, monkeypatch, pass_):
    monkeypatch.setattr(kernels, "_multiprocessors", lambda tensor: 132)
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0))
    today = importlib.import_module("fastelbo.kernels.masked_conv2d")
    for case in candidates:
        x, weight, d_z = (
            torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
            for shape in ((case.n, case.c, *case.size), (case.o, case.c, case.k, case.k), (case.n, case.o, *case.size))
        )
        source, result = {"forward": (x, d_z), "d_input": (d_z, x), "d_weight": (d_z, weight)}[pass_]
        out, tile = torch.empty_like(result), case.tile_for(kernels, pass_)
        kernel = today.taps_of(weight, case.mask, "square", 1, "interleaved")
        taps = kernels.Taps(case.k, case.k // 2, case.k // 2, case.live, 1)
        if pass_ == "d_weight":
            found = kernels.weight_gradient(d_z, x, out, kernel, 1)
            if found is None:
                assert case.pixels <= 4096
                continue
            want = kernels.prepare_weight_gradient(d_z, x, out, taps, tile)
        else:
            found = kernels.convolution(source, weight, out, kernel, 1, pass_ == "d_input")
            prepare = kernels.prepare_rows if isinstance(tile, kernels.tiling.RowTile) else kernels.prepare_convolution
            by_taps = weight.permute(0, 2, 3, 1).reshape(case.o, case.k**2, case.c)
            want = [prepare(source, by_taps, out, taps, tile, transposed=pass_ == "d_input")]
        for (a, grid, arguments), (b, other, wanted) in zip(found, want, strict=True):
            assert a is b and grid == other and arguments.keys() == wanted.keys()
            different = {name for name in wanted if not same(arguments[name], wanted[name])}
            assert different <= {"shares"}


def test_tiles_are_the_measured_best(kernels, candidates, monkeypatch):
    """Within 5 % of the best of a layer."""
    monkeypatch.setattr(kernels.tiling, "RENAMED", False)
    for case, pass_ in itertools.product(candidates, PASSES):
        times = {row["tile"]: float(row["cold_us"]) for row in candidates[case] if row["pass_"] == pass_}
        if pass_ == "d_weight" and (not times or case.pixels <= kernels.tiling.FEW_PIXELS):
            continue
        tile = case.tile_for(kernels, pass_)
        name = f"{type(tile).__name__}({','.join(str(int(value)) for value in tile)})"
        assert times[name] <= 1.05 * min(times.values()), (case, pass_, name)


@pytest.mark.parametrize("activation", [None, "relu", pytest.param("elu", marks=slow), "tanh_sigmoid",
                                        pytest.param("glu", marks=slow)])  # fmt: skip
def test_the_op_on_a_model_of_the_hardware(kernels, run, monkeypatch, activation):
    """From the public function to the kernels' own lines and back, in float64, with NaN in dead taps."""

    def launch(kernel, programs, arguments):
        names.append(kernel.__name__)
        if "d_weight" in arguments:
            kernel[(programs,)](**arguments)
        else:
            run(kernel, (programs,), arguments)

    names = []
    on_a_gpu(kernels, monkeypatch, launch)
    monkeypatch.setattr(kernels, "can_take", lambda image: image.stride(1) == 1)
    monkeypatch.setattr(kernels.tiling, "FEW_PIXELS", 0)
    gated = activation in ("tanh_sigmoid", "glu")
    x, weight, *rest = layer(8, 32, 3, (8, 8), dtype=torch.float64, z=64 if gated else 32)
    weight.flatten(2)[:, :, 5:] = float("nan")
    upstream = torch.randn_like(rest[-1])
    found = both_ways(x, weight, *rest, upstream=upstream, activation=activation)
    again = both_ways(x, weight, *rest, upstream=upstream, activation=activation)
    assert names == 2 * TAKEN and all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    want = both_ways(x, weight, *rest, upstream=upstream, activation=activation, backend="reference")
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not found[2].flatten(2)[:, :, 5:].any()


def test_environment_that_names_no_kernel_is_named():
    code = """
import torch, fastelbo
x = torch.ones(1, 1, 2, 3)
try: fastelbo.masked_conv2d(x, torch.ones(1, 1, 3, 3), mask_type="A")
except ValueError as error: print(error)
try: fastelbo.nn.GatedMaskedConv2d(1, 4, 3, mask_type="A")(x, x)
except ValueError as error: print(error)
try: torch.ops.fastelbo.masked_conv2d_fwd(x.to("meta"), torch.ones(1, 1, 3, 3, device="meta"), None)
except ValueError as error: print(error)
"""
    said = fresh_python.run(code, FASTELBO_CONV="cudnn").stdout
    assert said == 3 * "FASTELBO_CONV must be tma, block or unset; got 'cudnn'\n"


def test_environment_chooses_once():
    code = "import fastelbo.kernels.masked_conv2d as m; print(m.boxes.__name__)"
    done = fresh_python.run(code, TRITON_INTERPRET=None, FASTELBO_CONV="tma")
    assert done.stdout == "fastelbo.kernels.masked_conv2d_tma\n"
