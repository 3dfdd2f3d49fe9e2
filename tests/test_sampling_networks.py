"""Which networks a sampler takes, with the logits of their own forward, and which it refuses by name."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sampling_networks import (
    SAMPLERS,
    Between,
    EagerCache,
    Gated,
    GatedPixelCNN,
    Stacks,
    Wild,
    assert_draws_as_the_naive_loop,
    assert_equals_full_forward,
    at_home,
    lively,
    teacher_forced,
)
from torch import nn
from torch.nn.utils import prune

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d
from fastelbo.sampling import IncrementalSampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SAMPLERS)
def backend(request):
    with at_home(request.param):
        yield request.param


def test_logits_are_those_of_a_cache_written_by_hand(backend):
    model = lively(GatedPixelCNN(6, 5, dilations=(1, 2)), gain=1.0)
    images, logits = EagerCache(model, size=6).sample(3)
    sampler = IncrementalSampler(model, (1, 6, 6), levels=5, backend=backend)
    torch.testing.assert_close(teacher_forced(sampler, images.long())[:, :, 0], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("link", ["shift", "pad-first", "mask-first-layer"])
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("colours", [1, 3])
def test_gated_networks(link, order, colours, backend):
    model = lively(Gated(colours, link=link, channel_groups=colours, group_order=order, k=5))
    if order == "interleaved":  # the logits' colours are innermost
        assert_equals_full_forward(model, (colours, 5, 7), backend)
    elif colours == 1:
        assert_equals_full_forward(model, (colours, 7, 4), backend)
    else:
        torch.manual_seed(1)
        model.last = lively(MaskedConv2d(12, 3, 1, mask_type="B", channel_groups=3, group_order=order))
        assert_equals_full_forward(model, (colours, 6, 5), backend)


def test_both_stacks_of_a_block_may_be_handed_on_at_once(backend):
    class Starred(Gated):
        def forward(self, x):
            stacks = self.first(x, x)
            for block in self.blocks:
                stacks = block(*stacks)
            return self.last(stacks[1])

    assert_equals_full_forward(lively(Starred(3, channel_groups=3)), (3, 5, 7), backend)


@pytest.mark.parametrize("activation", ["tanh_sigmoid", "glu"])
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("link", ["shift", "pad-first", "mask-first-layer"])
def test_gates_and_conditions(activation, spatial, link, backend):
    model = lively(Gated(activation=activation, cond_channels=5, link=link, dilations=(2,)))
    cond = torch.randn(3, 5, 4, 6) if spatial else torch.randn(3, 5)
    sampler = assert_equals_full_forward(model, (1, 4, 6), backend, cond=cond)
    other = teacher_forced(sampler, torch.zeros(3, 1, 4, 6), cond + 1)
    assert (other - teacher_forced(sampler, torch.zeros(3, 1, 4, 6), cond)).abs().max() > 1e-3


@pytest.mark.parametrize("activation", [None, "relu", "elu", "tanh_sigmoid", "glu"])
@pytest.mark.parametrize("dilation, groups", [(1, 1), (2, 1), (1, 3)])
def test_masked_convolutions(activation, dilation, groups, backend):
    options = {"channel_groups": groups, "dilation": dilation}
    model = nn.Sequential(
        MaskedConv2d(groups, 24, 5, mask_type="A", activation=activation, **options),
        MaskedConv2d(12 if activation in ("tanh_sigmoid", "glu") else 24, 18, 3, mask_type="B", **options),
        nn.Tanh(),
        MaskedConv2d(18, 2 * groups, 1, mask_type="B", channel_groups=groups),
    )
    assert_equals_full_forward(lively(model), (groups, 6, 5), backend)


def test_everything_else_that_is_known(backend):
    model = lively(Stacks(), 1.5)
    sampler = assert_equals_full_forward(model, (1, 5, 7), backend, cond=torch.tensor([3, 0, 9]))
    assert sampler.model.training is False and model.embed.weight.requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.ReLU(), nn.ELU(0.7), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(), nn.GELU("tanh")),
        *(nn.Softplus(2, 1), nn.ReLU6(), nn.Hardtanh(-0.2, 0.3), nn.PReLU(), nn.GLU(1)),
    ],
    ids=str,
)
def test_pointwise_layers(layer, backend):
    last = nn.Conv2d(8 if isinstance(layer, nn.GLU) else 16, 3, 1)
    model = lively(nn.Sequential(MaskedConv2d(1, 16, 3, mask_type="A"), layer, last))
    assert_equals_full_forward(model, (1, 4, 3), backend, n=2)


@pytest.mark.parametrize("name", ["exp", "abs", "neg", "square", "elu", "clamp", "div", "sub"])
def test_pointwise_functions(name, backend):
    functions = {
        "elu": lambda x: F.elu(x, alpha=0.5),
        "clamp": lambda x: x.clamp(min=-0.1),
        "div": lambda x: 1 / (x.exp() + 2),
        "sub": lambda x: x.sub(x.tanh()),
    }

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = MaskedConv2d(1, 5, 3, mask_type="A")

        def forward(self, x):
            x = self.conv(x)
            return functions.get(name, getattr(torch, name, None))(x)

    assert_equals_full_forward(lively(Model()), (1, 4, 3), backend, n=2)


@pytest.mark.parametrize(
    "model, expected",
    [
        (
            nn.Sequential(MaskedConv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)),
            r"got 1, Conv2d\(4, 4.* that reads rows below its pixel: use fastelbo.nn.M",
        ),
        (
            nn.Sequential(MaskedConv2d(1, 4, 3), nn.Conv2d(4, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 1)),
            r"got 1, Conv2d\(4, 4.* of stride \(2, 2\): each",
        ),
        (nn.Sequential(MaskedConv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 1)), r"got 1, ConvTranspose2d.* transposed"),
        (nn.Sequential(MaskedConv2d(1, 4, 3), nn.GroupNorm(2, 4)), r"got 1, GroupNorm.*not known together"),
        (nn.Sequential(MaskedConv2d(1, 4, 3), nn.Softmax(1)), r"got 1, Softmax.*attention"),
        (Wild(lambda x: x.mean(1, keepdim=True)), "got mean: build the network of convolutions"),
        (Wild(lambda x: x.flip(3)), "depend on the whole row"),
        (Wild(lambda x: x[:, :, 1:]), "return logits .* got .'N', 4, 3, 4"),
        (Wild(lambda x: F.pad(x, (0, 0, 1, 0))[:, :3]), "return logits"),
        (Wild(lambda x: F.pad(x, (0, 1, 0, 0))[..., 1:]), "depend on the whole row"),
        (Wild(lambda x: F.pad(x, (0, 0, 0, 1))[:, :, 1:]), "reads rows below its pixel"),
        (Wild(lambda x: F.conv2d(x, x)), "got conv2d whose weight depends on what the model is given"),
        (Wild(lambda x: torch.cat([x, x], 2)), "return logits"),
        (Wild(lambda x: F.dropout(x)), "got dropout while training"),
        (Wild(lambda x: x if x.sum() > 0 else -x), "got sum|control flow"),
        (Wild(lambda x: x if float(x[0, 0, 0, 0]) > 0 else -x), "control flow that depends on the image"),
        (Wild(lambda x: x + torch.cat([x, x], 1)), r"take images \[N, 1, 4, 4\]; got RuntimeError: The size"),
        (Wild(lambda x: (x, x)), "return one image of logits .* got tuple"),
        (Wild(lambda x: torch.rand(1, 4, 4, 4)), "return one image of logits that depends on its input; got Tensor"),
        (Wild(lambda x: x.half()), "got features in torch.float16"),
        (Wild(lambda x: x.round().long().float()), "got round"),
        (Wild(lambda x: x.long().float()), "cast to integers of what is computed"),
        (Wild(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")[:, :, 1:-1, 1:-1].tanh()), "got reflection_pad2d"),
        (Wild(lambda x: (x.flatten(2) @ x.flatten(2).transpose(1, 2) @ x.flatten(2)).view(x.shape)), "attention"),
        (Wild(lambda x: F.log_softmax(x, 1) * 2), "got log_softmax within a network"),
        (Wild(lambda x: F.log_softmax(x.flatten(2), 2).view(x.shape)), "got log_softmax within a network"),
    ],
)
def test_an_unknown_layer_is_named(model, expected):
    with pytest.raises((NotImplementedError, ValueError), match=f"(?s)model must.*({expected})"):
        IncrementalSampler(model, (1, 4, 4))


def test_a_network_that_reads_nothing(backend):
    class Constant(Between):
        def forward(self, x):
            return self.b(torch.ones_like(self.a(x)))

    model = lively(Constant(None), 3)
    assert_draws_as_the_naive_loop(model, (1, 3, 4), backend)


def test_what_is_not_read_may_be_anything(backend):
    class Watched(Between):
        def forward(self, x):
            h = self.a(x)
            self.mean = h.mean(), h.std(1), F.softmax(h, 1)
            self.loss = F.cross_entropy(h, x[:, 0].long())
            return self.b(h)

    assert_draws_as_the_naive_loop(lively(Watched(None), 3), (1, 4, 5), backend)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward", "class"])
def test_hooks_and_overridden_forwards_are_followed(kind, backend):
    model = nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"), nn.Tanh(), nn.Conv2d(4, 4, 1))
    model = lively(model, 3)
    plain = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend).sample(4, seed=0)
    if kind == "hook":
        model[0].register_forward_hook(lambda module, inputs, out: 2 * out)
    elif kind == "pre-hook":
        model[0].register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    elif kind == "forward":
        own = model[0].forward
        model[0].forward = lambda x: -5 * own(x)
    else:

        class Doubled(nn.Conv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        model[2].__class__ = Doubled
    sampler = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert not torch.equal(sampler.sample(4, seed=0), plain)


def test_functions_take_the_place_of_modules(backend):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 1, 3, 3)), nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            h = fastelbo.masked_conv2d(x, self.a, mask_type="A", activation="elu")
            return torch.einsum("nchw,kc->nkhw", h, self.b)

    assert_draws_as_the_naive_loop(lively(Functional()), (1, 4, 5), backend)


def test_subclasses_and_weight_norm(backend):
    class Ours(MaskedConv2d):
        pass

    class Block(GatedMaskedConv2d):
        pass

    model = Gated()
    model.blocks[1] = Block(12, 12, 3)
    model.last = nn.Sequential(Ours(12, 8, 1, mask_type="B"), nn.Conv2d(8, 4, 1))
    for conv in (model.first.horizontal, model.last[0], model.last[1]):
        nn.utils.parametrizations.weight_norm(conv)
    assert_equals_full_forward(lively(model), (1, 4, 5), backend)


class Unshifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.h = VerticalStackConv2d(1, 4, 3), HorizontalStackConv2d(1, 4, 3, mask_type="A")

    def forward(self, x):
        return self.v(x) + self.h(x)


@pytest.mark.parametrize(
    "model, colours, expected",
    [
        (nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="B")), 1, "colour 0 that depend on colour 0"),
        (nn.Sequential(nn.Conv2d(1, 4, 1)), 1, "colour 0 that depend on colour 0"),
        (Unshifted(), 1, "whole row"),
        (Gated(3, channel_groups=3, last=nn.Conv2d(12, 12, 1)), 3, "colour 0 that depend on colour 0"),
        (Gated(3, channel_groups=3, last=nn.Conv2d(12, 4, 1)), 3, "got 4"),
        (nn.Sequential(MaskedConv2d(2, 4, 3)), 1, "take images .* input must have the 2 channels"),
        (nn.Sequential(nn.Conv2d(2, 4, 3)), 1, "Conv2d.*got 1 channels"),
    ],
)
def test_a_network_that_is_not_causal_is_refused(model, colours, expected):
    with pytest.raises(ValueError, match=f"model must.*{expected}"):
        IncrementalSampler(model, (colours, 4, 4))


def test_bad_models_and_shapes():
    with pytest.raises(TypeError, match="model must be a module; got function"):
        IncrementalSampler(lambda x: x, (1, 4, 4))
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), all at least 1; got \(4, 4\)"):
        IncrementalSampler(Gated(), (4, 4))
    with pytest.raises(ValueError, match="model must take an image and a condition"):
        IncrementalSampler(nn.Sequential(), (1, 4, 4), conditional=True)
    with pytest.raises(NotImplementedError, match="cpu: it computes in float32, and the model is in torch.float64"):
        IncrementalSampler(Gated().double(), (1, 4, 4), backend="cpu")


def _added(h):
    skip = h
    h += torch.tanh(h)
    return h + skip


def _through_a_slice(h):
    h[:, :3] *= h[:, 4:7]
    return h


def _through_chunks(h):
    a, b = h.chunk(2, dim=1)
    b.sub_(a.tanh())
    F.relu(a, True)  # in place by position
    return h


def _kept_before(h):
    before = h * 1
    part = torch.dropout(F.dropout(h[:, 2:5], training=False), 0.5, False)
    part /= 3.0
    return torch.cat([before, h], 1)[:, ::2]


def _set(h):
    h[:, 1:3] = h[:, 5:7].exp()
    return h


class Residual(nn.Module):
    """The block of many a network, whose first layer changes what the block adds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(8, 8, 1))

    def forward(self, h):
        return h + self.layers(h)


def _shifted(h):
    moved = F.pad(h, (1, 0))
    left, same = moved[..., :-1], moved[..., :-1]
    left.neg_()
    return same + h


IN_PLACE = {
    "augmented": _added,
    "slice": _through_a_slice,
    "chunks": _through_chunks,
    "identities": _kept_before,
    "set": _set,
    "shifted": _shifted,
    "operand": lambda h: h + F.relu_(h),
    "block": Residual(),
    "contiguous": lambda h: h.contiguous().mul_(2) + h,
    "keyword": lambda h: torch.mul(input=torch.relu_(input=h), other=h),
    "zero": lambda h: torch.cat([h[:, :3].zero_(), h[:, 3:]], 1) + h,
    "fill": lambda h: h[:, :1].fill_(1) + h,
    "constant": lambda h: h.__setitem__((slice(None), slice(0, 1)), 0.5) or h,
    "border": lambda h: h.__setitem__((slice(None), slice(None), 0), 2.0) or h.tanh(),
    "padded": lambda h: F.pad(h, (1, 0)).add_(1).sigmoid_()[..., :-1] + h,
    "strided": lambda h: (s := F.pad(h, (1, 0))[..., :-1]).add_(1).contiguous().mul_(2) + s,
    "made": lambda h: (
        (z := torch.zeros(h.shape)).__setitem__((..., slice(1, None), slice(None)), h[:, :, :-1]) or z + h
    ),
    "overlap": lambda h: (p := F.pad(h, (0, 0, 1, 0)))[:, :, :-1].add_(p[:, :, 1:].tanh()) + p[:, :, :-1],
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_in_place_shows_in_every_alias(name, backend):
    model = lively(Between(IN_PLACE[name]), 3).requires_grad_(False)
    assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert_equals_full_forward(model, (1, 4, 5), backend)


@pytest.mark.parametrize("order", ["raster", "wavefront"])
@pytest.mark.parametrize("columns", [1, 3, 6])
@pytest.mark.parametrize("pad", [(1, 0), (2, 0), (1, 0, 1, 0)])
@pytest.mark.parametrize("layer", [MaskedConv2d, VerticalStackConv2d])
def test_shifts_end_at_the_edge_of_the_image(order, columns, pad, layer, backend):
    class Shifted(Between):
        def __init__(self):
            super().__init__(None)
            self.b = layer(8, 4, 5, mask_type="B")

        def forward(self, x):
            h = self.a(x)
            moved = F.pad(h, pad)[:, :, : -pad[2] if len(pad) > 2 else None, : -pad[0]]
            if layer is VerticalStackConv2d:
                return F.pad(self.b(moved), (0, 0, 1, 0))[:, :, :-1] + h[:, :4]
            return self.b(moved) + h[:, 4:]

    model = lively(Shifted(), 3)
    reads_above = (layer is VerticalStackConv2d or len(pad) > 2) and pad[0] < columns
    if order == "wavefront" and reads_above:
        with pytest.raises(ValueError, match="order must be raster"):
            IncrementalSampler(model, (1, 3, columns), order=order, backend=backend)
        return
    assert_equals_full_forward(model, (1, 3, columns), backend, order=order)


def test_a_wavefront_follows_what_shifts_read(backend):
    class Above(Between):
        def forward(self, x):
            h = self.a(x)
            return (h + F.pad(h, (0, 0, 1, 0))[:, :, :-1])[:, :4] + F.pad(h, (0, 0, 2, 0))[:, :, :-2][:, 3:7]

    model = lively(Above(None), 3)
    model.a = lively(HorizontalStackConv2d(1, 8, 3, mask_type="A"), 3)
    sampler = assert_equals_full_forward(model, (1, 4, 5), backend, order="wavefront")
    assert sampler.lag == 1


@pytest.mark.parametrize("inner", ["vertical", "horizontal", "link", "out"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "subclass"])
def test_the_insides_of_a_block_are_looked_at(inner, how, backend):
    model = lively(Gated(dilations=()), 2)
    plain = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend).sample(4, seed=0)
    part = getattr(model.first, inner)
    if how == "hook":
        part.register_forward_hook(lambda module, inputs, out: 3 * out)
    elif how == "pre-hook":
        part.register_forward_pre_hook(lambda module, inputs: (3 * inputs[0], *inputs[1:]))
    elif how == "forward":
        before = part.forward
        part.forward = lambda *args, **kwargs: 3 * before(*args, **kwargs)
    else:
        own = type(part)
        part.__class__ = type("Thrice", (own,), {"forward": lambda self, x, **more: 3 * own.forward(self, x, **more)})
    sampler = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert not torch.equal(sampler.sample(4, seed=0), plain)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda h: torch.add(h, 1, out=h), "add with out="),
        (lambda h: setattr(h, "data", h * 2) or h, "sets Tensor.data"),
        (lambda h: h[:, :4].contiguous().mul_(2).tanh() + h[:, 4:], "Tensor.mul_ in place on what Tensor.contiguous"),
        (lambda h: h[:, :4].reshape(*h[:, :4].shape).mul_(2).tanh() + h[:, 4:], "Tensor.mul_ in place on what"),
        (lambda h: torch.zeros_like(h).put_(h.long(), h) + h, "got (put|a cast to integers)"),
    ],
)
def test_what_changes_memory_otherwise_is_refused(function, expected):
    with pytest.raises(NotImplementedError, match=f"model must be made of layers that the sampler knows.*{expected}"):
        IncrementalSampler(Between(function), (1, 4, 5), levels=4)


def test_a_layer_that_trains_in_evaluation_mode_is_refused():
    class Always(nn.Dropout):
        def train(self, mode=True):
            return super().train(True)

    model = nn.Sequential(MaskedConv2d(1, 8, 3, mask_type="A"), Always(), nn.Conv2d(8, 4, 1))
    with pytest.raises(NotImplementedError, match="got dropout while training"):
        IncrementalSampler(model, (1, 4, 5), levels=4)


def test_a_convolution_without_live_inputs(backend):
    model = lively(nn.Sequential(MaskedConv2d(1, 6, 1, mask_type="A"), nn.Tanh(), MaskedConv2d(6, 4, 1, mask_type="B")))
    assert_draws_as_the_naive_loop(model, (1, 2, 3), backend)


def test_causality_is_tested_on_the_modules_own_device():
    from fastelbo.testing import assert_causal

    good, bad = MaskedConv2d(3, 6, 3, mask_type="A", channel_groups=3), MaskedConv2d(1, 4, 3, mask_type="B")
    default = torch.get_default_dtype()
    for setting in ("device", "dtype", "both"):
        try:
            if setting != "dtype":
                torch.set_default_device("meta")
            if setting != "device":
                torch.set_default_dtype(torch.float16)
            assert_causal(good, (3, 4, 5), channel_groups=3, pixels=[(0, 0), (2, 3)])
            assert_causal(good, (3, 4, 5), channel_groups=3, out_channels_per_channel=None, pixels=[(1, 1)])
            with pytest.raises(AssertionError, match="row 1, column 1 has a gradient"):
                assert_causal(bad, (1, 3, 4), pixels=[(1, 1)])
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(default)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_hooks_that_set_a_weight_are_done_with(kind, backend):
    model = lively(Gated(dilations=()), 3)
    if kind == "prune":
        prune.random_unstructured(model.first.horizontal, "weight", amount=0.5)
        prune.l1_unstructured(model.last, "weight", amount=0.3)
    else:
        getattr(nn.utils, kind)(model.first.horizontal)
        getattr(nn.utils, kind)(model.last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # and the weight that the hook has set is stale
    if kind == "weight_norm":
        model(torch.zeros(1, 1, 4, 5))  # it is in a graph now
        with torch.no_grad():
            model.last.weight_g.mul_(1.5)
    model.eval()
    assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert_equals_full_forward(model, (1, 4, 5), backend)
    assert model.last._forward_pre_hooks


def test_a_model_that_cannot_be_copied_is_named():
    model = Gated(dilations=())
    model.lines = (line for line in ())
    with pytest.raises(TypeError, match="model must be one that copy.deepcopy copies; got Gated: cannot"):
        IncrementalSampler(model, (1, 4, 5))


def test_what_a_forward_keeps_of_a_trace_is_gone(backend):
    class Cached(Gated):
        kept = None

        def forward(self, x):
            self.kept = x
            return super().forward(self.kept)

    assert_draws_as_the_naive_loop(lively(Cached()), (1, 4, 5), backend)


def test_a_size_of_the_condition_is_a_number(backend):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = MaskedConv2d(1, 4, 3, mask_type="A")

        def forward(self, x, cond):
            return self.a(x) * cond.shape[1]

    assert_equals_full_forward(lively(Sized()), (1, 3, 4), backend, cond=torch.randn(3, 5))


def test_operands_and_shapes_of_other_types_are_named():
    with pytest.raises(ValueError, match="model must take images .* got TypeError: .* 'NoneType'"):
        IncrementalSampler(Wild(lambda x: x + None), (1, 4, 4))
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), all at least 1; got \(True, 4, 4\)"):
        IncrementalSampler(Gated(), (True, 4, 4))
