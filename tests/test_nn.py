"""Modules: checkpoints of other projects, wrappers of torch, and networks that stay causal while they train."""

import copy
import doctest
import functools
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d
from fastelbo.testing import assert_causal

LINKS = ["shift", "pad-first", "mask-first-layer"]


class PixelCNN(nn.Module):
    """Mask A, then mask B with a residual."""

    def __init__(self, channels=3, hidden=6, out=9, groups=3, order="interleaved"):
        super().__init__()
        options = {"channel_groups": groups, "group_order": order}
        self.first = MaskedConv2d(channels, hidden, 5, mask_type="A", **options)
        self.middle = MaskedConv2d(hidden, 2 * hidden, 3, mask_type="B", activation="tanh_sigmoid", **options)
        self.last = MaskedConv2d(hidden, out, 1, mask_type="B", **options)

    def forward(self, x):
        h = self.first(x)
        return self.last(self.middle(h, residual=h))


class GatedPixelCNN(nn.Module):
    def __init__(self, channels=1, hidden=4, out=5, link="shift", groups=1, cond_channels=None):
        super().__init__()
        options = {"link": link, "channel_groups": groups, "cond_channels": cond_channels}
        self.first = GatedMaskedConv2d(channels, hidden, 5, mask_type="A", **options)
        self.blocks = nn.ModuleList(GatedMaskedConv2d(hidden, hidden, 3, dilation=d, **options) for d in (1, 2))
        self.last = MaskedConv2d(hidden, out, 1, mask_type="B", channel_groups=groups)

    def forward(self, x, cond=None):
        v, h = self.first(x, x, cond)
        for block in self.blocks:
            v, h = block(v, h, cond)
        return self.last(h)


def test_docstring_examples_run():
    things = [getattr(fastelbo.nn, name) for name in fastelbo.nn.__all__]
    for thing in (*things, assert_causal):
        names = {"fastelbo": fastelbo, "torch": torch}
        parsed = doctest.DocTestParser().get_doctest(inspect.getdoc(thing), names, thing.__name__, None, None)
        assert parsed.examples
        runner = doctest.DocTestRunner()
        runner.run(parsed)
        assert runner.summarize().failed == 0


def test_is_a_conv2d_by_its_parameters():
    plain, ours = nn.Conv2d(4, 6, 5, padding=2), MaskedConv2d(4, 6, kernel_size=5, padding=2, stride=1)
    assert isinstance(ours, nn.Conv2d)
    assert ours.mask_type == "A"  # CompressAI's default
    assert [(n, p.shape) for n, p in plain.named_parameters()] == [(n, p.shape) for n, p in ours.named_parameters()]
    assert (ours.weight[~ours.live_taps()] == 0).all()
    assert "mask_type='A'" in repr(ours)


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_loads_plain_weights(mask_type):
    plain, ours = nn.Conv2d(3, 6, 5, padding=2), MaskedConv2d(3, 6, 5, mask_type=mask_type)
    with pytest.warns(UserWarning, match="not 0 at dead taps; they are set to 0") as caught:
        ours.load_state_dict(plain.state_dict())
    assert len(caught) == 1
    assert torch.equal(ours.weight, torch.where(ours.live_taps(), plain.weight, 0))
    x = torch.randn(2, 3, 6, 7)
    expected = nn.functional.conv2d(x, plain.weight * ours.live_taps(), plain.bias, padding=2)
    torch.testing.assert_close(ours(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(ours.state_dict())
        ours.load_state_dict(plain.state_dict())


def test_loads_a_mask_of_the_same_convention():
    ours = MaskedConv2d(3, 6, 3, mask_type="B", channel_groups=3)
    for mask in (ours.live_taps(), ours.live_taps().double()):
        ours.load_state_dict({**ours.state_dict(), "mask": mask})
    one = MaskedConv2d(3, 6, 3, mask_type="B")
    one.load_state_dict({**one.state_dict(), "mask": one.live_taps()[:1, :1].float()})  # as one [1, 1, k, k]
    nested = nn.Sequential(ours)
    nested.load_state_dict({**nested.state_dict(), "0.mask": ours.live_taps()})
    assert "mask" not in ours.state_dict()


@pytest.mark.parametrize(
    "other, name",
    [
        ({"mask_type": "A", "channel_groups": 3}, "mask_type 'A' with 3 channel groups in 'interleaved' order"),
        (
            {"mask_type": "B", "channel_groups": 3, "group_order": "contiguous"},
            "mask_type 'B' with 3 channel groups in 'contiguous' order",
        ),
        ({"mask_type": "A"}, "mask_type 'A'; this module has"),
        ({"mask_type": "B"}, "mask_type 'B'; this module has"),
    ],
)
def test_a_mask_of_another_convention_is_named(other, name):
    ours = MaskedConv2d(3, 6, 3, mask_type="B", channel_groups=3)
    mask = fastelbo.conv_mask2d(6, 3, 3, other.pop("mask_type"), **other).float()
    with pytest.raises(RuntimeError, match=name.replace("(", "\\(")):
        ours.load_state_dict({**ours.state_dict(), "mask": mask})
    with pytest.raises(RuntimeError, match="follows no known convention"):
        ours.load_state_dict({**ours.state_dict(), "mask": 1 - mask})


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_stacks_load_full_kernels_with_their_masks(mask_type):
    h, full = 2, torch.randn(4, 3, 5, 5)
    rows, columns = torch.arange(5)[:, None], torch.arange(5)
    vertical, horizontal = (
        stack(3, 4, 5, mask_type=mask_type) for stack in (VerticalStackConv2d, HorizontalStackConv2d)
    )
    x = torch.randn(2, 3, 6, 7)
    for stack, mask in (
        (vertical, (rows < h + (mask_type == "B")).expand(5, 5)),
        (horizontal, (rows == h) & (columns < h + (mask_type == "B"))),
    ):
        weight = full * mask
        state = {"weight": weight, "bias": stack.bias.detach()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stack.load_state_dict({**state, "mask": mask[None, None].float()} if stack is vertical else state)
        torch.testing.assert_close(stack(x), nn.functional.conv2d(x, weight, stack.bias, padding=2))
        with pytest.warns(UserWarning, match="not 0 at dead taps"):
            stack.load_state_dict({**state, "weight": full})
        torch.testing.assert_close(stack(x), nn.functional.conv2d(x, weight, stack.bias, padding=2))
    row = full[:, :, h : h + 1] * (columns < h + (mask_type == "B"))
    for stored in (row, row[..., :3]):
        with torch.no_grad():
            horizontal.weight.zero_()
        horizontal.load_state_dict({"weight": stored, "bias": horizontal.bias.detach()})
        torch.testing.assert_close(
            horizontal(x), nn.functional.conv2d(x, row, horizontal.bias, padding=(0, 2)), rtol=1e-4, atol=1e-5
        )


# causality


@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("groups", [1, 3])
def test_networks_are_causal(groups, order):
    assert_causal(PixelCNN(groups=groups, order=order), (3, 4, 5), channel_groups=groups, group_order=order)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("link", LINKS)
def test_gated_networks_are_causal_and_have_no_blind_spot(link, groups):
    network = GatedPixelCNN(groups * 1, 6, 6, link, groups).double()
    assert_causal(network, (groups, 4, 6), channel_groups=groups, pixels=[(0, 0), (1, 5), (2, 0), (2, 3)])
    x = torch.randn(1, groups, 6, 7, dtype=torch.float64, requires_grad=True)
    (seen,) = torch.autograd.grad(network(x)[0, :, 4, 2].sum(), x)
    seen = seen[0].abs().sum(0) != 0
    assert seen[:4].all()  # to the right too, which one stack alone cannot see
    assert seen[4, :2].all()


@pytest.mark.parametrize("norm", ["none", "weight_norm", "old weight_norm", "spectral_norm"])
def test_trained_networks_stay_causal(norm):
    network = PixelCNN(out=3)
    wrap = {
        "none": lambda m: m,
        "weight_norm": parametrizations.weight_norm,
        "old weight_norm": lambda m: torch.nn.utils.weight_norm(m),
        "spectral_norm": parametrizations.spectral_norm,
    }[norm]
    for module in (network.first, network.middle, network.last):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            wrap(module)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(4):
        x = torch.randn(4, 3, 6, 5)
        optimiser.zero_grad()
        (network(x) - x).square().mean().backward()
        if norm == "none":
            for module in (network.first, network.middle, network.last):
                assert (module.weight.grad[~module.live_taps()] == 0).all()
        optimiser.step()
    for module in (network.first, network.middle, network.last):
        # a spectral norm is that of the whole weight, so that dead taps get a gradient through it; nothing reads them
        assert norm == "spectral_norm" or (module.weight[~module.live_taps()] == 0).all()
    if norm == "old weight_norm":
        for module in (network.first, network.middle, network.last):
            torch.nn.utils.remove_weight_norm(module)  # its weight is no leaf, which deepcopy refuses
    assert_causal(network, (3, 4, 4), channel_groups=3)


def test_conditions():
    for cond in (torch.randn(2, 3), torch.randn(2, 3, 5, 4)):
        network = GatedPixelCNN(cond_channels=3)
        x = torch.randn(2, 1, 5, 4)
        assert network(x, cond).shape == (2, 5, 5, 4)
        assert not torch.equal(network(x, cond), network(x, 2 * cond))
        network, cond = network.double(), cond.double()
        assert_causal(functools.partial(network, cond=cond), (2, 1, 5, 4))
    with pytest.raises(ValueError, match="cond must be given"):
        network(x.double())
    with pytest.raises(ValueError, match="cond must not be given"):
        GatedPixelCNN()(x, cond)


# inside torch


@pytest.mark.parametrize("network", [PixelCNN(), GatedPixelCNN(3)], ids=["plain", "gated"])
def test_wrappers_of_torch(network):
    x = torch.randn(2, 3, 5, 6)
    want = network(x)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    others = {
        "deepcopy": copy.deepcopy(network),
        "pickle": pickle.loads(pickle.dumps(network)),
        "save": torch.load(buffer, weights_only=False),
        "compile": torch.compile(network, fullgraph=True, backend="aot_eager"),
        "export": torch.export.export(network, (x,)).module(),
    }
    for name, other in others.items():
        torch.testing.assert_close(other(x), want, msg=lambda m, name=name: f"{name}: {m}")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), want, rtol=0.1, atol=0.05)


@pytest.mark.inductor
def test_inductor_compiles_a_training_step():
    network = PixelCNN()
    x = torch.randn(2, 3, 5, 6)
    compiled = torch.compile(network, fullgraph=True)
    for function in (network, compiled):
        function(x).square().sum().backward()
    parameters = list(network.parameters())
    double = [p.grad.clone() for p in parameters]
    network.zero_grad()
    network(x).square().sum().backward()
    for p, twice in zip(parameters, double, strict=True):
        torch.testing.assert_close(twice, 2 * p.grad)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network = GatedPixelCNN(3)
        x = torch.randn(2, 3, 5, 6)
        parallel = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        parallel(x).square().sum().backward()
        grads = [p.grad for p in network.parameters()]
        network.zero_grad()
        network(x).square().sum().backward()
        for p, grad in zip(network.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)
    finally:
        torch.distributed.destroy_process_group()


# dead taps


def refill(network):
    """Writes to every tap, as initialisers do that know nothing of masks."""
    for name, parameter in network.named_parameters():
        if name.endswith(("weight", "weight_orig")):
            with torch.no_grad():
                nn.init.kaiming_normal_(parameter)


def averaged(network, _):
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        refill(network)
        average.update_parameters(network)
    return {name.removeprefix("module."): value for name, value in average.state_dict().items()}


def saved(network, _):
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=False).named_parameters())


def exported(network, x, strict):
    return torch.export.export(network, (x,), strict=strict).state_dict


LEAVING = {
    "state_dict": lambda network, _: network.state_dict(),
    "deepcopy": lambda network, _: dict(copy.deepcopy(network).named_parameters()),
    "pickle": lambda network, _: dict(pickle.loads(pickle.dumps(network)).named_parameters()),
    "save": saved,
    "export": functools.partial(exported, strict=False),
    "strict export": functools.partial(exported, strict=True),
    "average": averaged,
}


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_what_leaves_has_zeros_at_dead_taps(mask_type, leave):
    network = nn.Sequential(
        MaskedConv2d(3, 6, 5, mask_type=mask_type, channel_groups=3),
        VerticalStackConv2d(6, 6, 3, mask_type=mask_type),
        HorizontalStackConv2d(6, 6, 5, mask_type=mask_type, channel_groups=3),
    )
    x = torch.randn(2, 3, 5, 6)
    refill(network)
    want = network(x)
    left = LEAVING[leave](network, x)
    dead = {f"{i}.weight": ~layer.live_taps() for i, layer in enumerate(network)}
    assert any(mask.any() for mask in dead.values())
    for name, mask in dead.items():
        assert (left[name][mask] == 0).all(), name
        assert (left[name][~mask] != 0).all(), name
    if leave != "average":  # whose training went on
        assert torch.equal(network(x), want)


def test_weights_drawn_anew_have_zeros_at_dead_taps():
    layer = MaskedConv2d(3, 6, 5, mask_type="A")
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert (layer.weight[~layer.live_taps()] == 0).all() and (layer.weight[layer.live_taps()] != 0).all()
    assert not torch.equal(layer.weight, before)


def test_a_pruned_layer_leaves_with_zeros_at_dead_taps():
    layer = MaskedConv2d(3, 6, 3, mask_type="B")
    prune.random_unstructured(layer, "weight", amount=0.5)
    refill(layer)
    x = torch.randn(2, 3, 5, 6)
    want = layer(x)
    dead = ~layer.live_taps()
    assert (layer.weight_orig[dead] != 0).any()
    assert (layer.state_dict()["weight_orig"][dead] == 0).all()
    assert torch.equal(layer(x), want)
    prune.remove(layer, "weight")
    assert (layer.state_dict()["weight"][dead] == 0).all()


def test_a_checkpoint_between_forward_and_backward_disturbs_nothing():
    layer, x = MaskedConv2d(3, 6, 3, mask_type="B"), torch.randn(2, 3, 5, 6)
    refill(layer)
    y = layer(x).sum()
    layer.state_dict()
    copy.deepcopy(layer)
    y.backward()
    assert (layer.weight.grad[~layer.live_taps()] == 0).all()


# bad input

BAD = [
    ({"kernel_size": 4}, ValueError, "kernel_size must be odd; got 4"),
    ({"kernel_size": (3, 5)}, ValueError, "kernel_size must be the same in both directions; got (3, 5)"),
    ({"stride": 2}, ValueError, "stride must be 1"),
    ({"padding": 0}, ValueError, "padding must be 1, at which the output has the input's size; got 0"),
    ({"dilation": 2, "padding": 1}, ValueError, "padding must be 2"),
    ({"groups": 3}, NotImplementedError, "groups must be 1"),
    ({"padding_mode": "reflect"}, NotImplementedError, "padding_mode must be zeros; got 'reflect'"),
    ({"mask_type": "C"}, ValueError, "mask_type must be one of A, B; got 'C'"),
    ({"out_channels": 5, "activation": "glu"}, ValueError, "out_channels must be even under a gate; got 5"),
    ({"channel_groups": 2, "group_order": "contiguous"}, ValueError, "must divide the channels"),
    ({"activation": "gelu"}, ValueError, "activation must be one of None, relu, elu, tanh_sigmoid, glu; got 'gelu'"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1; got 0"),
    ({"dilation": (1, 2)}, ValueError, "dilation must be the same in both directions; got (1, 2)"),
    ({"dilation": 2.0}, TypeError, "dilation must be an int; got float"),
    ({"backend": "gpu"}, ValueError, "backend must be one of reference, cpu, triton, cuda; got 'gpu'"),
]


@pytest.mark.parametrize("keywords, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(keywords, error, message):
    with pytest.raises(error) as caught:
        MaskedConv2d(**{"in_channels": 3, "out_channels": 6, "kernel_size": 3, **keywords})
    assert message in str(caught.value)


@pytest.mark.parametrize("keywords, error, message", BAD[-5:], ids=range(5))
@pytest.mark.parametrize("stack", [VerticalStackConv2d, HorizontalStackConv2d])
def test_bad_stacks(stack, keywords, error, message):
    with pytest.raises(error) as caught:
        stack(3, 6, 3, **keywords)
    assert message in str(caught.value)


def test_bad_blocks():
    with pytest.raises(ValueError, match="residual needs mask_type 'B'"):
        GatedMaskedConv2d(4, 4, 3, mask_type="A", residual=True)
    with pytest.raises(ValueError, match="link must be one of shift, pad-first, mask-first-layer; got 'none'"):
        GatedMaskedConv2d(4, 4, 3, link="none")
    with pytest.raises(ValueError, match="activation must be one of tanh_sigmoid, glu; got 'relu'"):
        GatedMaskedConv2d(4, 4, 3, activation="relu")
    with pytest.raises(ValueError, match="dilation must be at least 1; got 0"):
        GatedMaskedConv2d(4, 4, 3, dilation=0)


# assert_causal itself


@pytest.mark.parametrize(
    "network, keywords, message",
    [
        (
            nn.Conv2d(1, 2, 3, padding=1),
            {},
            "row 0, column 0 has a gradient with respect to row 0, column 0, channel 0",
        ),
        (MaskedConv2d(1, 2, 3, mask_type="B"), {}, "with respect to row 0, column 0, channel 0"),
        (MaskedConv2d(3, 6, 1, mask_type="B", channel_groups=3), {"channel_groups": 3}, "of group 0"),
        (nn.Conv2d(1, 2, 3), {}, "the output must be of the input's size 4 x 5"),
    ],
    ids=["no mask", "mask B first", "own colour", "size"],
)
def test_leaks_are_found(network, keywords, message):
    channels = network.in_channels
    with pytest.raises(AssertionError) as caught:
        assert_causal(network, (channels, 4, 5), **keywords)
    assert message in str(caught.value)


def test_leaks_through_products_with_zero_are_found():
    """Gradients are 0 there, yet a NaN passes."""
    weight = torch.randn(2, 1, 3, 3, dtype=torch.float64) * fastelbo.conv_mask2d(2, 1, 3, "A")

    def network(x):
        return nn.functional.conv2d(x, weight, padding=1)

    assert_causal(network, (1, 4, 5), poison=False)
    with pytest.raises(AssertionError, match="changes with NaN in row"):
        assert_causal(network, (1, 4, 5))


def test_the_order_of_groups_is_proved():
    options = {"channel_groups": 3}
    network = nn.Sequential(
        MaskedConv2d(3, 6, 3, mask_type="A", **options),
        MaskedConv2d(6, 6, 1, mask_type="B", group_order="contiguous", **options),
    )
    with pytest.raises(AssertionError, match="of group"):
        assert_causal(network, (3, 3, 4), **options)
    layer = MaskedConv2d(6, 6, 3, mask_type="B", **options)
    assert_causal(layer, (6, 3, 4), strict=False, **options)
    by_colour = PixelCNN(out=6, order="contiguous")  # two logits of R, two of G, two of B
    assert_causal(
        by_colour, (3, 3, 4), channel_groups=3, group_order="contiguous", out_channels_per_channel=2, pixels=[(1, 2)]
    )


# the mask of other projects' convolutions


def layers_with_masks():
    yield from (MaskedConv2d(3, 6, 5, mask_type=t, channel_groups=g) for t in "AB" for g in (1, 3))
    yield from (MaskedConv2d(3, 6, 1, mask_type="B"), MaskedConv2d(3, 6, 3, activation="glu", channel_groups=3))
    yield from (stack(3, 6, 5, mask_type=t) for stack in (VerticalStackConv2d, HorizontalStackConv2d) for t in "AB")


@pytest.mark.parametrize("layer", list(layers_with_masks()), ids=repr)
def test_mask_is_a_tensor_like_the_weight(layer):
    assert torch.equal(layer.mask, layer.live_taps().float()) and layer.mask is layer.mask
    other = copy.deepcopy(layer).double()
    assert torch.equal(other.mask, layer.live_taps().double()) and other.mask.dtype == torch.float64
    assert layer.to("meta").mask.device.type == "meta" and layer.mask.shape == layer.weight.shape
    assert "mask" not in layer.state_dict() and not list(layer.buffers())


def test_mask_multiplies_weights_as_loops_of_codecs_do():
    layer, x = MaskedConv2d(3, 6, 5, mask_type="A"), torch.randn(2, 3, 6, 5)
    refill(layer)

    def lines(x):
        return nn.functional.conv2d(x, layer.weight * layer.mask, layer.bias, padding=2)

    want = layer(x)
    with torch.inference_mode():
        _ = layer.mask  # first asked for where no gradient is known
    torch.testing.assert_close(lines(x), want)
    torch.testing.assert_close(torch.compile(lines, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), want)
    (gradient,) = torch.autograd.grad(lines(x).square().sum(), layer.weight)
    (own,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-4)


def checkerboard(mask):
    mask[:] = 1
    mask[:, :, 0::2, 0::2] = 0
    mask[:, :, 1::2, 1::2] = 0


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: checkerboard(layer.mask),
        lambda layer: checkerboard(layer.mask.data),
        lambda layer: layer.mask[0, 0].__setitem__((4, 4), 1),
        lambda layer: layer.mask.mul_(0.5),
    ],
    ids=["in place", "data", "one tap", "factor"],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda layer, x: layer(x),
        lambda layer, x: layer.state_dict(),
        lambda layer, x: copy.deepcopy(layer),
        lambda layer, x: torch.export.export(layer, (x,)),
        lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
        lambda layer, x: layer.double().mask,
    ],
    ids=["forward", "state_dict", "copy", "export", "compile", "to"],
)
def test_another_mask_that_is_written_is_an_error(write, use):
    layer, x = MaskedConv2d(3, 6, 5, mask_type="A"), torch.randn(2, 3, 6, 5)
    write(layer)
    for _ in range(2):  # it stays one
        with pytest.raises((ValueError, RuntimeError), match="mask must stay that of mask_type 'A'; got another one"):
            use(layer, x)


def test_masks_that_are_assigned_or_written_anew():
    layer, x = MaskedConv2d(3, 6, 5, mask_type="B"), torch.randn(2, 3, 6, 5)
    want = layer(x)
    layer.mask.fill_(1)  # in one of the usual ways
    layer.mask[:, :, 2, 3:] = 0
    layer.mask[:, :, 3:] = 0
    assert torch.equal(layer(x), want)
    layer.mask = layer.live_taps().float()
    assert torch.equal(layer(x), want)
    for bad, error, message in (
        (torch.ones(6, 3, 5, 5), ValueError, "mask must stay that of mask_type 'B'; got another one"),
        (torch.ones(5, 5), ValueError, r"mask must be of the weight's shape \(6, 3, 5, 5\); got \(5, 5\)"),
        (None, TypeError, "mask must be a tensor; got NoneType"),
    ):
        with pytest.raises(error, match=message):
            layer.mask = bad
        assert torch.equal(layer(x), want)
    state = MaskedConv2d(3, 6, 5, mask_type="B", keep_mask=True).state_dict()
    torch.func.functional_call(layer, state, x)
    assert torch.equal(layer(x), want)


def test_an_average_of_state_dicts_with_masks_loads():
    """As averages of weights go over all floating-point tensors of a state_dict."""
    layer = MaskedConv2d(3, 6, 5, mask_type="B", keep_mask=True)
    average = copy.deepcopy(layer)
    for _ in range(20):
        refill(layer)
        for mine, other in zip(average.state_dict().values(), layer.state_dict().values(), strict=True):
            mine.mul_(0.9).add_(other, alpha=0.1)
    x = torch.randn(2, 3, 6, 5)
    average(x)
    drifted = {name: 0.9 * x + 0.1 * x for name, x in average.state_dict().items()}
    average.load_state_dict(drifted)
    torch.testing.assert_close(average(x), layer_of(average)(x))


def layer_of(layer):
    plain = nn.Conv2d(3, 6, 5, padding=2)
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if name != "mask"})
    return plain


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_horizontal_stacks_take_masks_of_rows(mask_type):
    """As 1 x k kernels have them, and k x k ones of which one row is live."""
    stack = HorizontalStackConv2d(4, 4, 5, mask_type=mask_type)
    columns = (torch.arange(5) < 2 + (mask_type == "B")).float()
    row, square = columns.expand(1, 1, 1, 5), torch.zeros(1, 1, 5, 5)
    square[0, 0, 2] = columns
    weight = torch.randn(4, 4, 1, 5) * row
    x = torch.randn(2, 4, 6, 7)
    for mask in (row, row.expand(4, 4, 1, 5), square, row[..., :3], stack.mask):
        stack.load_state_dict({"weight": weight, "bias": stack.bias.detach(), "mask": mask})
        torch.testing.assert_close(stack(x), nn.functional.conv2d(x, weight, stack.bias, padding=(0, 2)))
    other = "B" if mask_type == "A" else "A"
    columns = (torch.arange(5) < 2 + (other == "B")).float()
    with pytest.raises(RuntimeError, match=f"mask is that of mask_type '{other}'; this module has"):
        stack.load_state_dict({**stack.state_dict(), "mask": columns.expand(1, 1, 1, 5)})
    with pytest.raises(RuntimeError, match="follows no known convention"):
        stack.load_state_dict({**stack.state_dict(), "mask": columns.flip(0).expand(1, 1, 1, 5)})


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("padding_mode", "circular", "padding_mode of a MaskedConv2d must stay 'zeros'; got 'circular'"),
        ("padding", (0, 0), r"padding of a MaskedConv2d must stay \(2, 2\); got \(0, 0\)"),
        ("stride", (2, 2), r"stride of a MaskedConv2d must stay \(1, 1\); got \(2, 2\)"),
        ("mask_type", "B", "mask_type of a MaskedConv2d must stay 'A'; got 'B'"),
    ],
)
def test_what_nothing_would_read_is_not_assigned_in_silence(name, value, message):
    """As one that makes all convolutions of a model circular."""
    layer = MaskedConv2d(3, 6, 5)
    with pytest.raises(ValueError, match=message):
        setattr(layer, name, value)
    setattr(layer, name, getattr(layer, name))
    assert layer(torch.zeros(1, 3, 4, 4)).shape == (1, 6, 4, 4)


# any set of taps

CHECKERBOARD = [[(row + column) % 2 for column in range(5)] for row in range(5)]
ABOVE = [[1, 1, 1], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("kernel_size, mask", [(5, CHECKERBOARD), (3, ABOVE), ((1, 4), [[1, 0, 0, 1]])], ids=str)
def test_a_mask_of_ones_own(kernel_size, mask):
    """nn.Conv2d with the mask's zeros in its weight."""
    live = torch.tensor(mask) != 0
    conv = fastelbo.nn.MaskedConv2d(6, 8, kernel_size, mask=mask, dilation=2).double()
    assert torch.equal(conv.live_taps(), live.expand(8, 6, -1, -1))
    assert not conv.weight[:, :, ~live].any() and bool(conv.weight[:, :, live].any())
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    rows, columns = live.shape
    around = columns // 2, columns - 1 - columns // 2, rows // 2, rows - 1 - rows // 2
    want = nn.functional.conv2d(nn.functional.pad(x, [2 * size for size in around]), conv.weight, conv.bias, dilation=2)
    torch.testing.assert_close(conv(x), want)
    assert torch.equal(conv.mask, live.expand(8, 6, -1, -1).double())
    for form in (live, live.expand(8, 6, -1, -1), live.float()[None, None]):
        other = fastelbo.nn.MaskedConv2d(6, 8, kernel_size, mask=form, dilation=2).double()
        other.load_state_dict({**conv.state_dict(), "mask": live.expand(8, 6, -1, -1)})
        assert torch.equal(other(x), conv(x))
    with pytest.raises(RuntimeError, match=r"mask of shape .* follows no known convention; this module has mask"):
        conv.load_state_dict({**conv.state_dict(), "mask": ~live.expand(8, 6, -1, -1)})
    copied = pickle.loads(pickle.dumps(conv))
    assert torch.equal(copied(x), conv(x)) and "mask=" in repr(copied)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": CHECKERBOARD, "mask_type": "A"}, ValueError, "mask_type must be None where a mask is given; got 'A'"),
        ({"mask": CHECKERBOARD, "channel_groups": 3}, ValueError, "channel_groups must be 1 where a mask is given"),
        ({"mask": ABOVE}, ValueError, "mask must be of the kernel's shape (5, 5); got rows of lengths [3, 3, 3]"),
        ({"mask": torch.ones(3, 3)}, ValueError, "mask must be of shape (5, 5) or (6, 6, 5, 5); got (3, 3)"),
        ({"mask": [[1, 0], [1]]}, ValueError, "mask must be of the kernel's shape (5, 5); got rows of lengths [2, 1]"),
        ({"mask": "A"}, TypeError, "mask must be rows of numbers, or a tensor of them; got str"),
        ({"mask": torch.zeros(5, 5)}, ValueError, "mask must have a tap that is live; got none"),
        ({"mask": torch.eye(6)[:, :, None, None].expand(-1, -1, 5, 5)}, ValueError, "mask must be alike for all pairs"),
        ({"mask": CHECKERBOARD, "padding": 1}, ValueError, "padding must be 2, at which the output has the"),
        ({"kernel_size": (5, 3)}, ValueError, "kernel_size must be the same in both directions; got (5, 3)"),
        ({"kernel_size": (5, 3, 1), "mask": ABOVE}, ValueError, "kernel_size must be an int or a pair of them"),
    ],
)  # fmt: skip
def test_bad_masks_of_ones_own(arguments, error, message):
    with pytest.raises(error) as caught:
        fastelbo.nn.MaskedConv2d(6, 6, **{"kernel_size": 5, **arguments})
    assert message in str(caught.value)


def test_the_sampler_takes_a_mask_that_is_causal():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        fastelbo.nn.MaskedConv2d(1, 8, 3, mask=ABOVE, activation="elu"),
        fastelbo.nn.MaskedConv2d(8, 8, (1, 3), mask=[[1, 1, 0]], activation="relu"),
        fastelbo.nn.MaskedConv2d(8, 4, 1, mask_type="B"),
    )
    sampler = fastelbo.sampling.IncrementalSampler(network, (1, 6, 5), levels=4)
    for seed in range(3):
        assert torch.equal(sampler.sample(4, seed=seed), sampler.sample(4, seed=seed, method="naive"))
    network[0] = fastelbo.nn.MaskedConv2d(1, 8, 5, mask=CHECKERBOARD)
    with pytest.raises(ValueError, match="model must be causal"):
        fastelbo.sampling.IncrementalSampler(network, (1, 6, 5), levels=4)


class SecondStep(torch.nn.Module):
    """Of a checkerboard in two steps: the second's pixels read the first's, and these nothing."""

    def __init__(self, mask):
        super().__init__()
        self.conv = fastelbo.nn.MaskedConv2d(2, 4, 5, mask=mask)

    def forward(self, x):
        return torch.where(board(x.shape[2:]) == 1, self.conv(x), 0)


def board(size):
    return torch.arange(size[0])[:, None].add(torch.arange(size[1])) % 2


def test_causal_in_another_order():
    order = board((5, 6))
    assert_causal(SecondStep(CHECKERBOARD), (2, 5, 6), order=order)
    assert_causal(SecondStep(CHECKERBOARD), (2, 5, 6), order=order.tolist())
    with pytest.raises(AssertionError, match="row 0, column 1 has a gradient with respect to"):
        assert_causal(SecondStep([[1] * 5] * 5), (2, 5, 6), order=order)
    with pytest.raises(AssertionError, match="has a gradient with respect to"):
        assert_causal(SecondStep(CHECKERBOARD), (2, 5, 6))
    with pytest.raises(ValueError, match=r"order must be of the image's shape \(5, 6\); got \(6, 5\)"):
        assert_causal(SecondStep(CHECKERBOARD), (2, 5, 6), order=order.T)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_link_that_pads_first_is_a_crop_of_a_padded_convolution(bias, rows):
    """As networks have it whose vertical convolution is padded by a row more, and cropped."""
    torch.manual_seed(0)
    block = GatedMaskedConv2d(3, 4, 3, link="pad-first", bias=bias).double()
    v, h = torch.randn(2, 3, rows, 5, dtype=torch.float64), torch.randn(2, 3, rows, 5, dtype=torch.float64)
    weight, at = block.vertical.weight, block.vertical.bias
    padded = torch.nn.functional.conv2d(torch.nn.functional.pad(v, (1, 1, 2, 0)), weight, at)
    z, seen = padded[:, :, 1:], padded[:, :, :-1]
    a, b = z.chunk(2, 1)
    found_v, found_h = block(v, h)
    torch.testing.assert_close(found_v, torch.tanh(a) * torch.sigmoid(b), rtol=0, atol=1e-14)
    torch.testing.assert_close(found_h, block.out(block.horizontal(h, cond=block.link(seen))), rtol=0, atol=1e-14)
