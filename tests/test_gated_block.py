"""The block of a Gated PixelCNN at once, by raw ops or in the two launches of FASTELBO_CONV=block: against the lines
that users write, NaN where nothing may look, and the block that calls its layers one by one."""

import contextlib

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from originals import GatedBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastelbo import _library, backends
from fastelbo.kernels import gated_block as kernels
from fastelbo.kernels.launch import Launch
from fastelbo.nn import GatedMaskedConv2d
from fastelbo.ops import _gated_block
from fastelbo.testing import assert_causal, assert_within_budget

interpreted = pytest.mark.skipif(not _library.INTERPRETED, reason="tests/test_gpu.py has what a GPU runs")
each_backend = pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=interpreted)])


@pytest.fixture
def taken(monkeypatch):
    """Has blocks take it: a list that grows by whether gradients are wanted, at each that does."""
    found = []
    for backend, forward in _gated_block._FORWARD.items():

        def noted(tensors, options, keep, forward=forward):
            found.append(keep)
            return forward(tensors, options, keep)

        monkeypatch.setitem(_gated_block._FORWARD, backend, noted)
    monkeypatch.setattr(backends, "CONVOLUTIONS", "block")
    return found


def lines(block, *images):
    return GatedBlock(block)(*images)


def make(inputs, outputs, size=(5, 6), *, k=3, n=2, cond=None, layout=torch.contiguous_format, **options):
    """A block, its images and its condition, in float64 with numbers that bfloat16 has."""
    options = {"backend": "cpu", "cond_channels": None if cond is None else 3, **options}
    block = GatedMaskedConv2d(inputs, outputs, k, **options).double()
    images = [torch.randn(n, inputs, *size) for _ in range(2)]
    if cond is not None:
        images.append(torch.randn(n, 3, *(size if cond == "image" else ())))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(parameter.bfloat16())
    lay_out = [x.bfloat16().double() for x in images]
    return block.to(memory_format=layout), [x.to(memory_format=layout) if x.dim() == 4 else x for x in lay_out]


def both_ways(function, block, images):
    """The stacks, and the gradients of weighted sums of them with respect to everything."""
    images = [x.detach().requires_grad_() for x in images]
    found = function(*images)
    weights = [torch.arange(1.0, 1 + y.numel()).cos().view(y.shape).to(y.dtype) for y in found]
    return [*found, *torch.autograd.grad(found, [*images, *block.parameters()], weights)]


BLOCKS = {
    "plain": ((20, 20), {"layout": torch.channels_last}),
    "few channels": ((4, 4), {"k": 5, "activation": "glu", "residual": False}),
    "pad-first": ((3, 5), {"link": "pad-first", "cond": "image"}),
    "pad-first without bias": ((4, 4), {"link": "pad-first", "bias": False}),
    "one row": ((4, 4, (1, 9)), {"link": "pad-first", "n": 3}),
    "mask-first-layer": ((5, 5), {"link": "mask-first-layer", "dilation": 2, "cond": "class"}),
    "first": ((1, 6), {"mask_type": "A", "k": 7}),
    "first of colours": ((3, 6), {"mask_type": "A", "link": "mask-first-layer", "channel_groups": 3}),
    "colours": ((6, 6), {"channel_groups": 3, "group_order": "contiguous", "cond": "class", "activation": "glu"}),
    "no tap": ((2, 3), {"mask_type": "A", "k": 1}),
    "taps beyond the image": ((4, 4, (2, 3)), {"k": 7, "n": 3}),
}


@pytest.mark.parametrize("name", BLOCKS)
@each_backend
def test_equals_the_lines(backend, name, taken):
    arguments, options = BLOCKS[name]
    block, images = make(*arguments, backend=backend, **options)
    found = both_ways(block, block, images)
    for a, b in zip(found, both_ways(lambda *x: lines(block, *x), block, images), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        again = block(*images)
    assert taken == [True, False] and all(map(torch.equal, again, found))
    assert all(a.stride() == x.stride() for a, x in zip(found[2:], images, strict=False))


@interpreted
def test_many_channels_take_a_third_launch(taken, monkeypatch):
    monkeypatch.setattr(kernels, "_MOST", 4)
    monkeypatch.setattr(_library, "_FOUND", {})
    test_equals_the_lines("triton", "colours", taken)
    block, images = make(6, 6, layout=torch.channels_last, backend="triton")
    assert launched(monkeypatch, lambda: block(*images))[0] == ["convolution", "_horizontal", "convolution"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "backend, name", [("cpu", "plain"), ("triton", "colours"), pytest.param("triton", "plain", marks=pytest.mark.slow)]
)
def test_error_budget(backend, name, dtype, taken, monkeypatch):
    """In Triton on a GPU, where there is one: there both round float32 to TF32."""
    arguments, options = BLOCKS[name]
    elsewhere = backend == "triton" and not _library.INTERPRETED
    with torch.device("cuda") if elsewhere else contextlib.nullcontext():
        block, images = make(*arguments, backend=backend, **options)
        exact = both_ways(lambda *x: lines(block, *x), block, images)
        block, images = block.to(dtype), [x.to(dtype) for x in images]
        found = both_ways(block, block, images)
        plain = both_ways(lambda *x: lines(block, *x), block, images)
        if dtype == torch.float32:  # how torch adds is the processor's: at least what the layers are off by
            monkeypatch.setattr(GatedMaskedConv2d, "_as_made", lambda self: False)
            others = zip(plain, both_ways(block, block, images), exact, strict=True)
            plain = [max(a, b, key=lambda x, want=want: (x - want).abs().max()) for a, b, want in others]
    for part, three in enumerate(zip(found, exact, plain, strict=True)):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name=str(part))
    assert taken == [True]


# What nothing may look at


class Network(nn.Module):
    """Two blocks: of so many colours."""

    def __init__(self, colours, **options):
        super().__init__()
        options = {"channel_groups": colours, **options}
        self.first = GatedMaskedConv2d(colours, 2 * colours, 3, mask_type="A", **options)
        self.second = GatedMaskedConv2d(2 * colours, 2 * colours, 3, **options)

    def forward(self, x):
        return self.second(*self.first(x, x))[1]


@pytest.mark.parametrize("colours, link, order", [(1, "shift", "interleaved"), (3, "pad-first", "contiguous")])
@each_backend
def test_no_pixel_sees_what_comes_after_it(backend, colours, link, order, taken):
    network = Network(colours, link=link, group_order=order, backend=backend).double()
    assert_causal(network, (colours, 2, 3), channel_groups=colours, group_order=order, pixels=[(1, 1)])
    assert len(taken) >= 4


@pytest.mark.parametrize("name", ["first of colours", "colours"])
@each_backend
def test_dead_taps_are_not_read(backend, name, taken):
    arguments, options = BLOCKS[name]
    block, images = make(*arguments, backend=backend, **options)
    clean = both_ways(block, block, images)
    with torch.no_grad():
        for layer in (block.vertical, block.horizontal, block.out):
            layer.weight.masked_fill_(~layer.live_taps(), float("nan"))
    assert all(map(torch.equal, clean, both_ways(block, block, images)))
    assert taken == [True] * 2


# What runs the layers one by one


def test_what_runs_the_layers(taken):
    block, images = make(4, 4)

    def same(call, images=images):
        for a, b in zip(call(*images), lines(block, *images), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    same(torch.compile(block, fullgraph=True, backend="aot_eager"))
    with FlopCounterMode(display=False) as counter:
        same(block)
    assert counter.get_total_flops() > 0
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms run on the reference"):
        torch.func.vmap(lambda v, h: block(v[None], h[None]))(*images)
    for layer in (block.vertical, block.link, block.out):
        hook = layer.register_forward_hook(lambda *_: None)
        same(block)
        hook.remove()
    block.link.forward = lambda x: F.conv2d(x, block.link.weight, block.link.bias)
    same(block)
    del block.link.forward
    for layer in (block.vertical, block.horizontal, block.out):
        layer.backend = "reference"
    same(block)
    assert taken == []
    nn.utils.parametrizations.weight_norm(block.link)
    for layer in (block.vertical, block.horizontal, block.out):
        layer.backend = "cpu"
    block(*images)
    assert taken == [True]


def test_errors_are_those_of_the_layers(taken):
    block, (v, h) = make(4, 4)
    for bad in ((v.float(), h), (v, h.float()), (v[:, :3], h), (v, h[:1]), (v[0], h[0]), (v, h[..., 1:])):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            block(*bad)
    for bad in ([v], None):
        with pytest.raises(TypeError, match="input must be a tensor; got"):
            block(bad, h)
    block.horizontal.mask[:] = 0
    with pytest.raises(ValueError, match="mask must stay"):
        block(v, h)
    assert taken == []


def test_second_derivatives(taken):
    block, images = make(1, 2, (2, 2), n=1, cond="class", link="pad-first")
    leaves = [*[x.requires_grad_() for x in images], *block.parameters()]

    def second(function):
        loss = sum(y.square().sum() for y in function(*images))
        return torch.autograd.grad(
            sum(g.sin().sum() for g in torch.autograd.grad(loss, leaves, create_graph=True)), leaves
        )

    for a, b in zip(second(block), second(lambda *x: lines(block, *x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert taken == [True]


def test_one_stack_alone(taken):
    block, (v, h) = make(4, 4)
    for i in (0, 1):
        leaves = [v.clone().requires_grad_(), h.clone().requires_grad_()]
        found = [torch.autograd.grad(f(*leaves)[i].square().sum(), leaves, allow_unused=True)
                 for f in (block, lambda *x: lines(block, *x))]  # fmt: skip
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11) if b is not None else None
    assert taken == [True] * 2


def test_autocast(taken):
    block, images = make(4, 4)
    want = lines(block, *images)
    block, images = block.float(), [x.float() for x in images]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(*images)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=0.03)
    sum(y.float().sum() for y in found).backward()
    assert taken == [True] and all(p.grad.dtype == torch.float32 for p in block.parameters())


def test_no_pixels(taken):
    block, (v, h) = make(4, 4)
    assert block(v[:0], h[:0])[1].shape == (0, 4, 5, 6) and taken == []


# Launches


def launched(monkeypatch, call):
    """The kernels that a call launches in Triton, and the ops of torch that it computes with."""
    names = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *tensors: names.append(self._kernel.__name__))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    monkeypatch.undo()
    free = "empty", "view", "as_strided", "detach", "expand", "slice", "chunk", "split", "narrow", "select", "alias"
    called = [event.name for event in profile.events() if event.name.startswith("aten::")]
    return names, [name for name in called if not any(name.startswith(f"aten::{one}") for one in free)]


@interpreted
@pytest.mark.parametrize("grad", [False, True])
def test_two_launches(grad, taken, monkeypatch):
    block, images = make(20, 20, layout=torch.channels_last, backend="triton")
    with torch.set_grad_enabled(grad):
        block(*images)
        found = launched(monkeypatch, lambda: block(*images))
    assert found == (["convolution", "_horizontal"], [])
    names, ops = launched(monkeypatch, lambda: block(*images))  # as without the setting
    assert len(names) == 3 and len(ops) > 5


@interpreted
def test_a_condition_is_another_launch(taken, monkeypatch):
    block, images = make(20, 20, layout=torch.channels_last, cond="class", backend="triton")
    names, ops = launched(monkeypatch, lambda: block(*images))
    assert names == ["convolution", "_horizontal"] and "aten::conv2d" in ops and "aten::add" not in ops
