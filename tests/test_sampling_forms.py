"""Shapes, constants, convolutions, levels and wrappers as people write them, against the network's own forward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sampling_networks import (
    SAMPLERS,
    Between,
    Gated,
    Stacks,
    assert_draws_as_the_naive_loop,
    assert_equals_full_forward,
    at_home,
    lively,
    teacher_forced,
)
from torch import nn

import fastelbo
from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler, trace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SAMPLERS)
def backend(request):
    with at_home(request.param):
        yield request.param


# Shapes, and what moves elements


def _sized(h):
    b, c, rows, columns = h.shape
    assert c == 8 and h.size(1) == len(h[0]) and h.dim() == 4 and h.numel() == b * c * rows * columns
    return h * (rows // 2 + 1) / columns


def _flattened(h):
    b, c, *size = h.size()
    return torch.tanh(h.flatten(2)).view(b, c, *size) + h.reshape(b, -1).exp().clamp(max=4).reshape(*h.shape)


def _channels_last(h):
    x = h.permute(0, 2, 3, 1).contiguous()
    x = torch.sigmoid(x[..., :4]) * x[..., 4:]
    return torch.cat([x, -x], -1).movedim(-1, 1)


MOVED = {
    "sizes": _sized,
    "flattened": _flattened,
    "channels last": _channels_last,
    "stack": lambda h: torch.stack([h[:, :4], h[:, 4:]], 2).mul(torch.arange(2.0).view(2, 1, 1)).flatten(1, 2),
    "unbind": lambda h: torch.stack(h.unbind(1)[::-1], 1) + h,
    "split": lambda h: torch.cat([part.tanh() for part in h.split([1, 2, 5], 1)][::-1], 1),
    "tensor_split": lambda h: torch.cat([part * (n + 1) for n, part in enumerate(h.tensor_split(3, 1))], 1),
    "index": lambda h: h[:, [3, 1, 4, 1, 5, 2, 6, 5]] + h.index_select(1, torch.arange(8).flip(0)),
    "one channel": lambda h: h * h[:, 2:3] + h[:, 3].unsqueeze(1) + h.select(1, 4)[:, None].abs(),
    "repeat": lambda h: h[:, :2].repeat(1, 4, 1, 1) + h[:, :1].expand_as(h) + h[:, :4].repeat_interleave(2, 1),
    "shuffle": lambda h: F.elu(h.view(h.size(0), 2, 4, *h.shape[2:]).transpose(1, 2).reshape_as(h), 0.7),
    "clone": lambda h: h.clone().detach().to(h.dtype).type_as(h).float().contiguous() + h[:, None].squeeze(1),
    "powers": lambda h: h**2 - h.pow(3) * 0.1 + h.square() + 2 / (1 + h**4),
    "numbers": lambda h: 1 - h / 3 + (2 - h) * 0.5 + torch.rsub(h, 1, alpha=2) + h.add(h, alpha=0.3) - (-h),
    "activations": lambda h: F.mish(h) + F.hardswish(h) + F.selu(h) + F.celu(h, 0.7) + F.logsigmoid(h) + F.relu6(h),
    "hardsigmoid": lambda h: F.hardsigmoid(h) * F.leaky_relu(h, 0.1) + h.clamp_min(0.1) + h.clamp_max(0.2),
    "shift": lambda h: F.pad(h, (0, 0, 1, 0))[:, :, : h.shape[2]] + F.pad(h, (2, 0))[..., : h.shape[3]],
    "cat of zeros": lambda h: torch.cat([torch.zeros(*h.shape[:2], 1, h.shape[3]), h[:, :, :-1]], 2) + h,
    "roll": lambda h: h.roll(3, 1),
    "pad and function": lambda h: F.pad(h, (1, 0)).sigmoid()[..., :-1] + h,
    "both pads": lambda h: F.softplus(F.pad(h, (2, 2, 2, 2)))[:, :, 1:-3, 2:-2] + h,
    "linear": lambda h: F.linear(h.permute(0, 2, 3, 1), torch.arange(64.0).view(8, 8) / 64, torch.ones(8)).movedim(
        3, 1
    ),
    "einsum": lambda h: torch.einsum("nchw,cd->ndhw", h, torch.arange(64.0).view(8, 8) / 64),
    "where": lambda h: torch.where(torch.arange(h.shape[3]) > 1, h, h.tanh()),
    "mask": lambda h: h.masked_fill(torch.arange(h.shape[2])[:, None] > 1, 0.3) + h.tril(1).tanh(),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_moves_elements_and_asks_for_sizes(name, backend):
    model = lively(Between(MOVED[name]), 2)
    for shape in ((1, 4, 5), (1, 3, 1)):
        assert_equals_full_forward(model, shape, backend)
    assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)


ENDS = {
    "as it is": lambda x: x,
    "view": lambda x: x.view(x.shape[0], 5, 3, *x.shape[2:]),
    "unflatten": lambda x: x.unflatten(1, (5, 3)),
    "colours first": lambda x: x.unflatten(1, (5, 3)).transpose(1, 2),
    "levels last": lambda x: x.unflatten(1, (5, 3)).permute(0, 2, 3, 4, 1),
    "clone": lambda x: x.clone().to(x.dtype).contiguous(),
    "log_softmax": lambda x: x.unflatten(1, (5, 3)).log_softmax(1),
    "log_softmax, colours first": lambda x: F.log_softmax(x.unflatten(1, (5, 3)).transpose(1, 2).contiguous(), dim=2),
    "log_softmax, levels last": lambda x: x.unflatten(1, (5, 3)).permute(0, 2, 3, 4, 1).log_softmax(-1),
    "log_softmax and back": lambda x: x.unflatten(1, (5, 3)).log_softmax(1).flatten(1, 2),
}


class Ended(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.end, options = end, {"channel_groups": 3}
        self.a = MaskedConv2d(3, 12, 3, mask_type="A", **options)
        self.b = MaskedConv2d(12, 15, 3, mask_type="B", **options)

    def forward(self, x):
        return self.end(self.b(F.elu(self.a(x))))


@pytest.mark.parametrize("name", ENDS)
def test_logits_may_come_in_any_order(name, backend):
    torch.manual_seed(3)
    model = lively(Ended(ENDS[name]), 2)
    sampler = assert_draws_as_the_naive_loop(model, (3, 4, 6), backend, levels=5)
    torch.manual_seed(3)
    plain = lively(Ended(ENDS["as it is"]), 2)
    images = torch.randint(5, (2, 3, 4, 6))
    want = plain(images.float()).unflatten(1, (5, 3))
    want = want.log_softmax(1) if "log" in name else want
    torch.testing.assert_close(teacher_forced(sampler, images), want.detach(), rtol=0, atol=2e-5)
    assert torch.equal(
        sampler.sample(2, seed=0), IncrementalSampler(plain, (3, 4, 6), levels=5, backend=backend).sample(2, seed=0)
    )


def test_one_colour_without_a_dimension_of_its_own(backend):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(MaskedConv2d(1, 8, 3, mask_type="A"), nn.ELU(), nn.Conv2d(8, 4, 1))

        def forward(self, x):
            _, _, _ = x.shape
            return self.net(x[:, None]).permute(0, 2, 3, 1)

    assert_draws_as_the_naive_loop(lively(Flat(), 2), (1, 3, 5), backend)


def test_contiguous_groups_name_the_order_of_the_outputs(backend):
    options = {"channel_groups": 3, "group_order": "contiguous"}
    model = nn.Sequential(
        MaskedConv2d(3, 9, 3, mask_type="A", **options), nn.Tanh(), MaskedConv2d(9, 15, 1, mask_type="B", **options)
    )
    advice = r"colours innermost; got outputs whose levels are innermost.*return logits.unflatten\(1, \(3, 5\)\)"
    with pytest.raises(ValueError, match=f"model must.*{advice}"):
        IncrementalSampler(lively(model, 3), (3, 4, 5), levels=5)
    model.append(nn.Unflatten(1, (3, 5)))
    assert_draws_as_the_naive_loop(model, (3, 4, 5), backend, levels=5)


# Constants and conditions


CONSTANTS = {
    "ones": lambda h: torch.cat([h[:, :7], h.new_ones(h.shape[0], 1, *h.shape[2:])], 1),
    "ones_like": lambda h: torch.cat((torch.ones_like(h[:, :2]), h[:, 2:]), dim=1),
    "full": lambda h: torch.cat([torch.full((h.shape[0], 3, *h.shape[2:]), 0.5), h[:, :5]], 1).tanh(),
    "columns": lambda h: torch.cat(
        [h[:, :7], torch.linspace(-1, 1, h.shape[3]).view(1, 1, 1, -1).expand(h.shape[0], 1, h.shape[2], -1)], 1
    ),
    "border": lambda h: torch.cat(
        [h[:, :7], F.pad(h.new_ones(1, 1, *h.shape[2:]), (1, 1, 1, 1))[:, :, 2:, 1:-1].expand(h.shape[0], -1, -1, -1)],
        1,
    ),
    "ones around": lambda h: F.pad(h, (1, 0), value=1.0)[..., :-1] + h,
    "product": lambda h: h * torch.arange(8.0).view(8, 1, 1) + torch.arange(h.shape[3]) / 4,
    "integers and others": lambda h: torch.cat(
        [h[:, :6], *(c.expand(len(h), 1, *h.shape[2:]) for c in (torch.arange(h.shape[3]), torch.tensor(0.3)))], 1
    ),
    "between": lambda h: torch.cat([h[:, :3], torch.ones_like(h[:, :2]), h[:, 5:]], 1),
}


@pytest.mark.parametrize("order", ["raster", "wavefront"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_join_features(name, order, backend):
    torch.manual_seed(1)
    model = lively(Between(CONSTANTS[name]), 2)
    assert_equals_full_forward(model, (1, 4, 5), backend, order=order)
    assert_draws_as_the_naive_loop(model, (1, 4, 5), backend, order=order)


class Conditions(nn.Module):
    """A context beside what a condition makes, by the functions of a hyperprior."""

    def __init__(self, join):
        super().__init__()
        self.context = MaskedConv2d(4, 8, 5, mask_type="A")
        self.hyper = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(8, 8, 1))
        self.join, self.out = join, nn.Sequential(nn.Conv2d(16, 12, 1), nn.ReLU(inplace=True), nn.Conv2d(12, 8, 1))

    def forward(self, y, z):
        return self.out(self.join(self.context(y), self.hyper(z)))


JOINS = {
    "first": lambda a, b: torch.cat((b, a), dim=1),
    "last": lambda a, b: torch.cat((a, b), dim=1),
    "in turn": lambda a, b: torch.stack((a, b), 2).flatten(1, 2),
    "activated": lambda a, b: F.elu(torch.cat([a, b], 1)),
    "of one class": lambda a, b: torch.cat([a, b.mean((2, 3), keepdim=True).expand_as(a)], 1),
    "sized": lambda a, b: torch.cat([a * b.shape[1] / a.shape[1], b * b.numel() / b.shape[0] * 0.01], 1),
}


@pytest.mark.parametrize("order", ["raster", "wavefront"])
@pytest.mark.parametrize("name", JOINS)
def test_conditions_join_features(name, order, backend):
    model = lively(Conditions(JOINS[name]), 1.5)
    cond = torch.randn(3, 3, 4, 5)
    sampler = assert_equals_full_forward(model, (4, 4, 5), backend, cond=cond, order=order)
    images = torch.randn(3, 4, 4, 5)
    alone = [teacher_forced(sampler, images[i : i + 1], cond[i : i + 1]) for i in range(3)]
    assert torch.equal(torch.cat(alone), teacher_forced(sampler, images, cond))


def test_each_kind_of_condition_is_followed_by_itself(backend):
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.table = MaskedConv2d(1, 4, 3, mask_type="A"), nn.Embedding(5, 4)

        def forward(self, x, cond):
            if cond.dtype == torch.int64:
                return self.a(x) + self.table(cond)[:, :, None, None]
            return self.a(x) * cond if cond.dim() == 4 else self.a(x).tanh() - cond[:, :, None, None]

    model = lively(Either(), 2)
    sampler = IncrementalSampler(model, (1, 3, 4), levels=4, conditional=True, backend=backend)
    for cond in (torch.tensor([0, 4]), torch.randn(2, 4), torch.randn(2, 4, 3, 4), torch.tensor([1, 1])):
        drawn = sampler.sample(2, cond, seed=0)
        assert torch.equal(drawn, sampler.sample(2, cond, seed=0, method="naive"))


def test_what_a_condition_alone_leads_to_may_be_anything(backend):
    class Sequence(nn.Module):
        """Layers that write into zeros of their own."""

        def __init__(self):
            super().__init__()
            self.a, self.b = MaskedConv2d(1, 8, 3, mask_type="A"), nn.Conv2d(8, 4, 1)
            self.lstm, self.gru = nn.LSTM(3, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
            self.attention = nn.TransformerEncoderLayer(8, 2, batch_first=True)

        def forward(self, x, cond):
            kept = torch.zeros(len(cond), 8)
            kept[:, ::2] = cond[:, 0, :1]
            kept += self.gru(self.attention(self.lstm(cond)[0]))[0].mean(1)
            return self.b(self.a(x) + kept.sin()[:, :, None, None])

    model = lively(Sequence(), 1.5)
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, conditional=True, backend=backend)
    cond = torch.randn(3, 6, 3)
    drawn = sampler.sample(3, cond, seed=0)
    assert torch.equal(drawn, sampler.sample(3, cond, seed=0, method="naive"))
    assert torch.equal(sampler.sample(3, cond.flip(0), seed=0), sampler.sample(3, cond.flip(0), seed=0, method="naive"))

    class Keeping(Between):
        def forward(self, x, cond):
            self.a.bias.copy_(cond[0])
            return self.b(self.a(x))

    with pytest.raises(NotImplementedError, match="got copy_ of the condition in place on what is none of it"):
        IncrementalSampler(Keeping(None), (1, 4, 5), levels=4, conditional=True).sample(1, torch.randn(1, 8))


def test_steps_that_no_guess_knows_follow_a_condition():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = MaskedConv2d(1, 4, 3, mask_type="A")

        def forward(self, x, cond):
            _, _, _, _, m = cond.shape
            return self.a(x) + cond.sum((2, 3, 4))[:, :, None, None] / m

    sampler = IncrementalSampler(lively(Odd(), 2), (1, 3, 4), levels=4, conditional=True)
    with pytest.raises(RuntimeError, match="steps must follow a sample or a reset"):
        sampler.steps  # noqa: B018
    with pytest.raises(ValueError, match=r"cond must be what the model takes; got shape \(2, 4\): .*not enough values"):
        sampler.sample(2, torch.zeros(2, 4))
    cond = torch.randn(2, 4, 2, 2, 2)
    assert torch.equal(*(sampler.sample(2, cond, seed=0, method=m) for m in ("cached", "naive")))
    assert sampler.steps == 12


# Convolutions of torch


class Cut(nn.Module):
    def __init__(self, rows, columns=None):
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x):
        return x[:, :, : -self.rows if self.rows else None, : -self.columns if self.columns else None]


def first(*layers):
    return nn.Sequential(MaskedConv2d(1, 8, 3, mask_type="A"), *layers, nn.Conv2d(8, 4, 1))


def moved(*layers):
    """The same of the image itself, without a mask."""
    return nn.Sequential(*layers, nn.Conv2d(8, 4, 1))


CONVOLUTIONS = {
    "zeros above": lambda: first(nn.ZeroPad2d((1, 1, 2, 0)), nn.Conv2d(8, 8, (3, 3)), Cut(0), Shift(1)),
    "cropped": lambda: first(nn.Conv2d(8, 8, 3, padding=2), nn.BatchNorm2d(8), nn.ELU(), Cut(2, 2)),
    "rows": lambda: first(nn.Conv2d(8, 8, (1, 3), padding=(0, 2)), Cut(0, 2), nn.Tanh()),
    "both": lambda: first(nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.Conv2d(8, 8, (2, 1), padding=(2, 0)), Cut(3)),
    "dilated": lambda: first(nn.Conv2d(8, 8, 2, padding=2, dilation=2, groups=2), Cut(2, 2)),
    "same, then moved": lambda: first(nn.Conv2d(8, 8, 3, padding="same"), Shift(2), nn.ReLU()),
    "function, then moved": lambda: first(nn.Conv2d(8, 8, 3, padding=1), nn.Softplus(), Shift(2)),
    "grouped": lambda: first(nn.Conv2d(8, 8, 1, groups=4), nn.SiLU()),
    "without live taps": lambda: first(nn.Conv2d(8, 8, 3, padding=1)),
}


SHIFTED = {
    "moved, then same": lambda: first(Shift(2), nn.Conv2d(8, 8, 3, padding=1), nn.ELU()),
    "moved to the right, then same": lambda: first(Shift(0, 1), nn.Conv2d(8, 8, (1, 3), padding="same"), nn.Tanh()),
    "padded by the shift, then same": lambda: first(
        nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(8, 8, 3, padding=1), Cut(1, 1)
    ),
    "of the image, moved, then same": lambda: moved(Shift(2), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
    "of the image, same, then moved": lambda: moved(nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), Shift(2)),
    "of the image, down": lambda: moved(nn.ZeroPad2d((1, 1, 1, 0)), nn.Conv2d(1, 8, (2, 3)), Shift(1), nn.ELU()),
    "of the image, down and right": lambda: moved(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(1, 8, 2), Shift(0, 1)),
    "right, then two that look ahead": lambda: first(
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.Sigmoid(), nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), Shift(0, 2)
    ),
    "rows more and more": lambda: first(
        *(nn.ZeroPad2d((1, 1, 2, 0)), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.ZeroPad2d((1, 1, 2, 1))),
        *(nn.Conv2d(8, 8, 3), nn.Softplus(), nn.Conv2d(8, 8, 1), Cut(1), Shift(1)),
    ),
    "rows less and less": lambda: first(
        nn.Conv2d(8, 8, 2, padding=(0, 1)),
        Cut(0, 1),
        nn.Conv2d(8, 8, 1),
        nn.Sigmoid(),
        nn.ZeroPad2d((0, 0, 2, 0)),
        Cut(1),
    ),
}


class Shift(nn.Module):
    def __init__(self, rows, columns=0):
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x):
        return F.pad(x, (self.columns, 0, self.rows, 0))[:, :, : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_of_torch_are_the_taps_that_they_are(name, backend):
    model = lively(CONVOLUTIONS[name](), 2)
    if name == "without live taps":
        nn.init.zeros_(model[1].weight)
    for shape in ((1, 5, 6), (1, 3, 1)):
        if name != "without live taps":
            assert_equals_full_forward(model, shape, backend)
        assert_draws_as_the_naive_loop(model, shape, backend)


@pytest.mark.parametrize("name", SHIFTED)
def test_what_looks_ahead_and_is_shifted_is_causal(name, backend):
    model = lively(SHIFTED[name](), 2)
    for shape in ((1, 5, 6), (1, 4, 3)):
        assert_equals_full_forward(model, shape, backend)
    assert_draws_as_the_naive_loop(model, (1, 3, 5), backend)
    if backend == "cpu":
        assert_equals_full_forward(model, (1, 17, 16), backend, n=1)  # followed at a smaller size where that will do


@pytest.mark.parametrize(
    "model, expected",
    [
        (first(nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid(), Shift(1)), "depend on the whole row"),
        (
            first(nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid(), Shift(0, 2)),
            r"got 1, Conv2d\(8, .* that reads rows below",
        ),
        (moved(Shift(1), nn.Conv2d(1, 8, 3, padding=1)), "depend on the whole row of their pixel|got 1, Conv2d"),
        (
            moved(nn.ZeroPad2d((2, 2, -1, 0)), nn.Conv2d(1, 8, (2, 3)), nn.ZeroPad2d((0, -2, 0, 2))),
            "pixels of the image that are moved up",
        ),
        (
            moved(nn.Conv2d(1, 8, 1), nn.Sigmoid(), nn.ZeroPad2d((0, 0, -1, 1))),
            r"got 0, .*, without rows above \(1\), that reads rows below",
        ),
        (
            first(nn.ZeroPad2d((1, 1, 1, 0)), nn.Conv2d(8, 8, (1, 2)), nn.Conv2d(8, 8, (2, 2), padding=(1, 0)), Cut(2)),
            r"got 3, Conv2d\(8, .* of features of more rows or columns than the image's: crop them before",
        ),
    ],
)
def test_what_is_moved_and_not_causal_is_named(model, expected):
    with pytest.raises((ValueError, NotImplementedError), match=f"model must be .*({expected})"):
        IncrementalSampler(lively(model), (1, 5, 6), check=False)


def test_a_mask_at_each_call_makes_the_taps(backend):
    class Product(nn.Conv2d):
        def forward(self, x):
            mask = fastelbo.conv_mask2d(*self.weight.shape[:3], "A" if self.in_channels == 1 else "B")
            return self._conv_forward(x, self.weight * mask, self.bias)

    class Once(nn.Conv2d):
        def __init__(self, *sizes, **options):
            super().__init__(*sizes, **options)
            self.weight.data.mul_(fastelbo.conv_mask2d(*self.weight.shape[:3], "B"))

    net = nn.Sequential(Product(1, 8, 3, padding=1), nn.ELU(), Once(8, 8, 3, padding=1), Product(8, 4, 5, padding=2))
    assert_equals_full_forward(lively(net, 2), (1, 4, 5), backend)
    taps = IncrementalSampler(net, (1, 4, 5))._plan.network.steps[1]
    assert taps.live.any(0).any(0).sum() == 5


@pytest.mark.parametrize("order", ["raster", "wavefront"])
def test_any_taps_that_are_causal(order, backend):
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = MaskedConv2d(1, 8, 3, mask=torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]]))
            self.weight = nn.Parameter(torch.randn(4, 8, 2, 3))

        def forward(self, x):
            h = self.a(x)
            return fastelbo.masked_conv2d(h, self.weight, taps=[[1, 0, 1], [0, 1, 0]], activation="elu") + h[:, :4]

    assert_equals_full_forward(lively(Listed(), 2), (1, 4, 5), backend, order=order)


# Levels as integers


def _colours(m, x):
    return m.table(x.long()).permute(0, 1, 4, 2, 3).flatten(1, 2)


LEVELS = {
    "embedding": (lambda m, x: m.table(x.long()).squeeze(1).permute(0, 3, 1, 2), 1, 3),
    "embedding of integers": (lambda m, x: m.table(x)[:, 0].movedim(-1, 1), 1, 3),
    "embedding without colours": (lambda m, x: m.table(x).permute(0, 3, 1, 2)[:, :3], 1, 3),
    "embedding in one dimension": (lambda m, x: m.table(x.view(-1)).view(*x.shape, 3)[:, 0].permute(0, 3, 1, 2), 1, 3),
    "rows of a parameter": (lambda m, x: m.table.weight[x[:, 0]].permute(0, 3, 1, 2), 1, 3),
    "colours": (_colours, 2, 6),
    "one_hot": (lambda m, x: F.one_hot(x.long()[:, 0], 5).permute(0, 3, 1, 2).float(), 1, 5),
    "one_hot of integers": (
        lambda m, x: F.one_hot(x.squeeze(1), num_classes=5).permute(0, 3, 1, 2).to(torch.float32),
        1,
        5,
    ),
    "rows of an identity": (lambda m, x: torch.eye(5)[x[:, 0]].permute(0, 3, 1, 2), 1, 5),
    "scatter": (lambda m, x: torch.zeros(len(x), 5, *x.shape[2:]).scatter_(1, x.long(), 1), 1, 5),
    "equal": (lambda m, x: (x.long() == torch.arange(5).view(1, 5, 1, 1)).float(), 1, 5),
    "floats": (lambda m, x: x.float() / 2 - 1, 1, 1),
}


class Levels(nn.Module):
    def __init__(self, function, colours, width):
        super().__init__()
        self.function, self.table = function, nn.Embedding(5, 3)
        self.a, self.b = MaskedConv2d(width, 8, 3, mask_type="A"), nn.Conv2d(8, 5 * colours, 1)

    def forward(self, x):
        return self.b(F.relu(self.a(self.function(self, x))))


@pytest.mark.parametrize("order", ["raster", "wavefront"])
@pytest.mark.parametrize("name", LEVELS)
def test_levels_are_embedded(name, order, backend):
    torch.manual_seed(1)
    function, colours, width = LEVELS[name]
    model = lively(Levels(function, colours, width), 3)
    sampler = assert_draws_as_the_naive_loop(model, (colours, 4, 6), backend, levels=5, order=order)
    drawn = sampler.sample(3, seed=1, method="fixed_point")
    assert torch.equal(drawn, sampler.sample(3, seed=1)) and drawn.unique().numel() == 5


def test_an_embedding_is_exact(backend):
    """Its rows come out with all their bits."""
    model = Levels(LEVELS["embedding"][0], 1, 3)
    model.a = MaskedConv2d(3, 3, 3, mask_type="A", bias=False)
    model.b = nn.Identity()
    nn.init.zeros_(model.a.weight)
    with torch.no_grad():
        model.a.weight[range(3), range(3), 1, 0] = 1.0
        model.table.weight.mul_(torch.tensor([1e-20, 1.0, 1e10]))
    sampler = IncrementalSampler(model, (1, 1, 5), levels=3, backend=backend)
    images = torch.tensor([[[[0, 1, 2, 1, 0]]]])
    logits = teacher_forced(sampler, images)[0, :, 0, 0]
    want = model.table.weight[images[0, 0, 0, :-1]].T
    assert torch.equal(logits[:, 1:], want.relu())


def test_integers_are_told_apart():
    model = Levels(LEVELS["embedding of integers"][0], 1, 3)
    with pytest.raises(ValueError, match="levels must be given for a model that takes integers; got None"):
        IncrementalSampler(model, (1, 4, 4))
    with pytest.raises(ValueError, match="values must be integers, as the model takes them"):
        IncrementalSampler(model, (1, 4, 4), levels=5, values=[0, 0.5, 1, 2, 3])


# Wrappers, copies and sizes


def _inner(model):
    model.blocks[0] = torch.compile(model.blocks[0])
    return model


def _compiled_in_place(model):
    model.compile()
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "a compiled block": _inner,
    "compiled in place": _compiled_in_place,
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model),
    "both": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_networks_are_taken(name, backend):
    model = lively(Gated(), 3)
    plain = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend).sample(4, seed=0)
    sampler = assert_draws_as_the_naive_loop(WRAPPERS[name](model).eval(), (1, 4, 5), backend)
    assert torch.equal(sampler.sample(4, seed=0), plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
@pytest.mark.parametrize("conditional", [False, True])
def test_samplers_are_copied_and_pickled(copied, conditional, backend):
    torch.manual_seed(5)
    model = lively(Stacks() if conditional else Gated(), 1.5)
    shape, levels = ((1, 5, 7), 6) if conditional else ((1, 4, 5), 4)
    sampler = IncrementalSampler(model, shape, levels=levels, conditional=conditional, backend=backend)
    cond = (torch.tensor([3, 0, 9]),) if conditional else ()
    other = copied(sampler)
    drawn = sampler.sample(3, *cond, seed=0)
    assert torch.equal(other.sample(3, *cond, seed=0), drawn)
    sampler.reset(3, *cond)
    for _ in range(9):
        sampler.step()
        ((row, column),) = sampler.pixels
        sampler.commit(drawn[:, :, row, column, None])
    other = copied(sampler)
    assert other.pixels == sampler.pixels and torch.equal(other.step(), sampler.step())
    assert repr(other) == repr(sampler) and other.cache_bytes() == sampler.cache_bytes()


@pytest.mark.parametrize("columns", [False, True])
def test_large_images_are_followed_at_their_size_where_it_matters(columns, monkeypatch, backend):
    monkeypatch.setattr(trace, "LARGE", 20)
    monkeypatch.setattr(trace, "SMALL", (4, 5))

    class Sized(Between):
        def forward(self, x):
            h = self.a(x)
            _, _, _, width = h.shape
            return self.b(h * (torch.arange(width) > 6) if columns else h * (20.0 / width))

    sampler = assert_draws_as_the_naive_loop(lively(Sized(None), 3), (1, 6, 9), backend)
    assert sampler._plan.form.size == (6, 9)
    padded = first(nn.Conv2d(8, 8, (2, 1), padding=(2, 0)), Cut(3))  # whose first row sees the bias alone
    for model in (Gated(), padded):
        plain = assert_draws_as_the_naive_loop(lively(model, 3), (1, 6, 9), backend)
        assert plain._plan.form.size == (4, 5)
