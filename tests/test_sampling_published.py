"""PixelCNNs as they were published: small ones of the same structure, as their users hand them to the sampler."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sampling_networks import SAMPLERS, assert_draws_as_the_naive_loop, at_home, lively, teacher_forced
from torch import nn

from fastelbo.sampling import IncrementalSampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SAMPLERS)
def backend(request):
    with at_home(request.param):
        yield request.param


class Masked(nn.Conv2d):
    """The layer of most of them, whose mask meets the weight at each call."""

    def __init__(self, mask_type, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("mask", self.weight.data.clone())
        rows, columns = self.kernel_size
        self.mask.fill_(1)
        self.mask[:, :, rows // 2, columns // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, rows // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def in_a_row(levels=4, width=8):
    """J. Zbontar's: masks, norms and activations in a row."""
    layers = [Masked("A", 1, width, 7, 1, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    for _ in range(2):
        layers += [Masked("B", width, width, 7, 1, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Conv2d(width, levels, 1))


class Product(Masked):
    """pythae's layer, which leaves its weight as it is."""

    def forward(self, x):
        weight = self.weight * self.mask
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


class Output(OrderedDict):
    """A dictionary whose entries are attributes, too."""

    def __init__(self, **entries):
        super().__init__(**entries)
        vars(self).update(entries)


class OfDictionaries(nn.Module):
    """pythae's: from a dictionary to one of the logits and the loss."""

    def __init__(self, levels=4, colours=1, width=8):
        super().__init__()
        self.levels, self.colours, net = levels, colours, []
        for n in range(3):
            conv = Product("B" if n else "A", width if n else colours, width, 5, 1, 2)
            net.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        self.net = nn.Sequential(*net, nn.Conv2d(width, levels * colours, 1))

    def forward(self, inputs, **options):
        x = inputs["data"]
        out = self.net(x).reshape(x.shape[0], self.levels, self.colours, x.shape[2], x.shape[3])
        return Output(out=out, loss=F.cross_entropy(out, x.long()))


class Logits(nn.Module):
    """What a user writes around it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model({"data": x}).out


class Sized(nn.Module):
    """The base of E. Hotaj's models, which keeps the size of the first image it meets, before its forward."""

    def __call__(self, x):
        if getattr(self, "rows", None) is None and x.dim() == 4:
            for name, size in zip(("colours", "rows", "columns"), x.shape[1:], strict=True):
                self.register_buffer(name, torch.tensor(size))
        return super().__call__(x)


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        bottleneck = width // 2
        causal = Masked("B", bottleneck, bottleneck, 3, padding=1)
        self.net = nn.Sequential(
            *(nn.ReLU(), nn.Conv2d(width, bottleneck, 1), nn.ReLU(), causal),
            *(nn.ReLU(), nn.Conv2d(bottleneck, width, 1)),
        )

    def forward(self, x):
        return x + self.net(x)


class Residual(Sized):
    """E. Hotaj's PixelCNN."""

    def __init__(self, levels=4, width=8):
        super().__init__()
        self.input = Masked("A", 1, width, 7, padding=3)
        self.layers = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, levels, 1))

    def forward(self, x):
        x = self.input(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class GatedActivation(nn.Module):
    def __init__(self, function=torch.tanh):
        super().__init__()
        self.function = function

    def forward(self, x):
        _, channels, _, _ = x.shape
        assert channels % 2 == 0, "x must have an even number of channels."
        x, gate = x[:, : channels // 2, :, :], x[:, channels // 2 :, :, :]
        return self.function(x) * torch.sigmoid(gate)


class CroppedGatedLayer(nn.Module):
    def __init__(self, inputs, width, k, first):
        super().__init__()
        self.first, self.activation, pad = first, GatedActivation(), (k - 1) // 2
        self.rows = nn.Conv2d(inputs, width, (1, k), padding=(0, pad))
        self.columns = nn.Conv2d(width, 2 * width, (k // 2 + 1, 1), padding=(pad + 1, 0))
        self.vertical_skip = nn.Conv2d(inputs, 2 * width, 1)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(inputs, 2 * width, (1, k // 2 + 1), padding=(0, pad + int(first)))
        self.residual, self.skip = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, vertical, horizontal):
        _, _, h, w = vertical.shape
        v = self.columns(self.rows(vertical))[:, :, :h, :]
        link = self.link(v)
        v = self.activation(v + self.vertical_skip(vertical))
        out = self.activation(link + self.horizontal(horizontal)[:, :, :, :w])
        skip, out = self.skip(out), self.residual(out)
        return v, out if self.first else out + horizontal, skip


class CroppedGated(Sized):
    """E. Hotaj's GatedPixelCNN: no masks, but paddings that make more rows and columns, which are cropped."""

    def __init__(self, levels=4, width=8):
        super().__init__()
        self.input = CroppedGatedLayer(1, width, 7, True)
        self.layers = nn.ModuleList(CroppedGatedLayer(width, width, 3, False) for _ in range(2))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, levels, 1))

    def forward(self, x):
        v, h, skips = self.input(x, x)
        for layer in self.layers:
            v, h, skip = layer(v, h)
            skips += skip
        return self.head(skips)


class MaskedConvolution(nn.Module):
    """A convolution and its mask, beside one another."""

    def __init__(self, inputs, outputs, mask, **options):
        super().__init__()
        dilation = options.get("dilation", 1)
        padding = tuple(dilation * (k - 1) // 2 for k in mask.shape)
        self.conv = nn.Conv2d(inputs, outputs, tuple(mask.shape), padding=padding, **options)
        self.register_buffer("mask", mask[None, None])

    def forward(self, x):
        self.conv.weight.data *= self.mask
        return self.conv(x)


def vertical(inputs, outputs, k=3, first=False, **options):
    mask = torch.ones(k, k)
    mask[k // 2 + 1 - first :, :] = 0
    return MaskedConvolution(inputs, outputs, mask, **options)


def horizontal(inputs, outputs, k=3, first=False, **options):
    mask = torch.ones(1, k)
    mask[0, k // 2 + 1 - first :] = 0
    return MaskedConvolution(inputs, outputs, mask, **options)


class GatedMasked(nn.Module):
    def __init__(self, width, **options):
        super().__init__()
        self.vertical = vertical(width, 2 * width, **options)
        self.horizontal = horizontal(width, 2 * width, **options)
        self.link, self.out = nn.Conv2d(2 * width, 2 * width, 1, padding=0), nn.Conv2d(width, width, 1, padding=0)

    def forward(self, v, h):
        v_features = self.vertical(v)
        value, gate = v_features.chunk(2, dim=1)
        v = torch.tanh(value) * torch.sigmoid(gate)
        h_features = self.horizontal(h)
        h_features = h_features + self.link(v_features)
        value, gate = h_features.chunk(2, dim=1)
        return v, self.out(torch.tanh(value) * torch.sigmoid(gate)) + h


class Dilated(nn.Module):
    """That of the UvA's course, whose images come as levels."""

    def __init__(self, levels=4, colours=1, width=8):
        super().__init__()
        self.levels = levels
        self.first_v = vertical(colours, width, first=True)
        self.first_h = horizontal(colours, width, first=True)
        self.layers = nn.ModuleList(GatedMasked(width, **d) for d in ({}, {"dilation": 2}, {}, {"dilation": 4}))
        self.out = nn.Conv2d(width, levels * colours, 1, padding=0)

    def forward(self, x):
        x = (x.float() / 255.0) * 2 - 1
        v, h = self.first_v(x), self.first_h(x)
        for layer in self.layers:
            v, h = layer(v, h)
        out = self.out(F.elu(h))
        return out.reshape(out.shape[0], self.levels, out.shape[1] // self.levels, out.shape[2], out.shape[3])


class ColourMasked(nn.Conv2d):
    """A mask over the colours of the pixel, too."""

    def __init__(self, *sizes, mask_type, colours=3, **options):
        super().__init__(*sizes, **options)
        rows, columns = (size // 2 for size in self.kernel_size)
        outputs, inputs = (np.arange(n)[:, None] % colours for n in self.weight.size()[:2])
        mask = np.zeros(self.weight.size(), dtype=np.float32)
        mask[:, :, :rows, :] = 1
        mask[:, :, rows, : columns + 1] = 1
        mask[:, :, rows, columns] = outputs >= inputs.T if mask_type == "B" else outputs > inputs.T
        self.register_buffer("mask", torch.from_numpy(mask).float())

    def forward(self, x):
        self.weight.data *= self.mask
        x = super().forward(x)
        return x


class Cropped(nn.Conv2d):
    """Two crops of one output, which share its memory."""

    def forward(self, x):
        x = super().forward(x)
        k, _ = self.kernel_size
        return x[:, :, 1:-k, :], x[:, :, : -k - 1, :]


def crops(inputs, outputs, k):
    return Cropped(inputs, outputs, (k // 2 + 1, k), padding=(k // 2 + 1, k // 2))


class FirstBlock(nn.Module):
    """Both convolutions of the horizontal stack have mask A, so that a colour sees the last but one alone."""

    def __init__(self, width, k):
        super().__init__()
        self.width, self.vertical, self.vertical_fc = width, crops(3, 2 * width, k), nn.Conv2d(3, 2 * width, (1, 1))
        self.link = nn.Conv2d(2 * width, 2 * width, (1, 1))
        self.horizontal = ColourMasked(3, 2 * width, (1, k), mask_type="A", padding=(0, k // 2))
        self.out = ColourMasked(width, width, (1, 1), mask_type="A")

    def forward(self, image):
        v, shifted = self.vertical(image)
        v += self.vertical_fc(image)
        a, b = torch.split(v, self.width, dim=1)
        v = torch.tanh(a) * torch.sigmoid(b)
        h = self.horizontal(image)
        shifted = self.link(shifted)
        h += shifted
        a, b = torch.split(h, self.width, dim=1)
        return v, self.out(torch.tanh(a) * torch.sigmoid(b))


class LabelledBlock(nn.Module):
    def __init__(self, width, k, labels):
        super().__init__()
        self.width, self.label = width, nn.Embedding(labels, 2 * width)
        self.vertical, self.vertical_fc = crops(width, 2 * width, k), nn.Conv2d(width, 2 * width, (1, 1))
        self.link = ColourMasked(2 * width, 2 * width, (1, 1), mask_type="B")
        self.horizontal = ColourMasked(width, 2 * width, (1, k), mask_type="B", padding=(0, k // 2))
        self.out, self.skip = (ColourMasked(width, width, (1, 1), mask_type="B") for _ in range(2))

    def forward(self, x):
        v_in, h_in, skip, label = x[0], x[1], x[2], x[3]
        embedded = self.label(label).unsqueeze(2).unsqueeze(3)
        v, shifted = self.vertical(v_in)
        v += self.vertical_fc(v_in)
        v += embedded
        a, b = torch.split(v, self.width, dim=1)
        v = torch.tanh(a) * torch.sigmoid(b)
        h = self.horizontal(h_in)
        shifted = self.link(shifted)
        h += shifted
        h += embedded
        a, b = torch.split(h, self.width, dim=1)
        h = torch.tanh(a) * torch.sigmoid(b)
        skip = skip + self.skip(h)
        return {0: v + v_in, 1: self.out(h) + h_in, 2: skip, 3: label}


class Coloured(nn.Module):
    """anordertoreclaim's: colours in turn, labels, skips, crops that are written to, dictionaries of them all."""

    def __init__(self, levels=4, width=12, labels=5):
        super().__init__()
        self.levels, self.width, self.first = levels, width, FirstBlock(width, 5)
        self.blocks = nn.Sequential(*[LabelledBlock(width, 3, labels) for _ in range(2)])
        self.label = nn.Embedding(labels, width)
        self.hidden = ColourMasked(width, 9, (1, 1), mask_type="B")
        self.out = ColourMasked(9, 3 * levels, (1, 1), mask_type="B")

    def forward(self, image, label):
        count, colours, height, width = image.size()
        v, h = self.first(image)
        skip = image.new_zeros((count, self.width, height, width), requires_grad=True)
        _, _, out, _ = self.blocks({0: v, 1: h, 2: skip, 3: label}).values()
        out += self.label(label).unsqueeze(2).unsqueeze(3)
        out = self.out(F.relu(self.hidden(F.relu(out))))
        return out.view(count, self.levels, colours, height, width)


class Halves(nn.Module):
    def forward(self, x):
        x, y = x.chunk(2, dim=1)
        return F.tanh(x) * F.sigmoid(y)


class CodesLayer(nn.Module):
    def __init__(self, mask_type, width, k, residual, classes):
        super().__init__()
        self.mask_type, self.residual, self.gate = mask_type, residual, Halves()
        self.embedding = nn.Embedding(classes, 2 * width)
        self.vertical = nn.Conv2d(width, 2 * width, (k // 2 + 1, k), 1, (k // 2, k // 2))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, k // 2 + 1), 1, (0, k // 2))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, v, h, label):
        if self.mask_type == "A":
            self.vertical.weight.data[:, :, -1].zero_()
            self.horizontal.weight.data[:, :, :, -1].zero_()
        label = self.embedding(label)
        from_v = self.vertical(v)
        from_v = from_v[:, :, : v.size(-1), :]  # rows as many as columns: his codes are squares
        out_v = self.gate(from_v + label[:, :, None, None])
        from_h = self.horizontal(h)
        from_h = from_h[:, :, :, : h.size(-2)]
        out = self.gate(self.link(from_v) + from_h + label[:, :, None, None])
        return out_v, self.out(out) + h if self.residual else self.out(out)


class Codes(nn.Module):
    """R. Kumar's prior of a VQ-VAE: codes [N, H, W], embedded."""

    def __init__(self, codes=6, width=8, classes=5):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.layers = nn.ModuleList(
            CodesLayer("B" if n else "A", width, 3 if n else 7, n > 0, classes) for n in range(3)
        )
        self.out = nn.Sequential(nn.Conv2d(width, 12, 1), nn.ReLU(True), nn.Conv2d(12, codes, 1))

    def forward(self, x, label):
        shape = (*x.size(), -1)
        x = self.embedding(x.view(-1)).view(shape).permute(0, 3, 1, 2)
        v, h = (x, x)
        for layer in self.layers:
            v, h = layer(v, h, label)
        return self.out(h)


class OutOfPlace(nn.Conv2d):
    """CompressAI's layer."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("mask", torch.ones_like(self.weight.data))
        _, _, rows, columns = self.mask.size()
        self.mask[:, :, rows // 2, columns // 2 :] = 0
        self.mask[:, :, rows // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


class Joint(nn.Module):
    """CompressAI's joint model: a context, and what a hyperprior knows, make scales and means."""

    def __init__(self, channels=6):
        super().__init__()
        self.context_prediction = OutOfPlace(channels, 2 * channels, kernel_size=5, padding=2, stride=1)
        self.entropy_parameters = nn.Sequential(
            *(nn.Conv2d(4 * channels, 20, 1), nn.LeakyReLU(inplace=True)),
            *(nn.Conv2d(20, 16, 1), nn.LeakyReLU(inplace=True), nn.Conv2d(16, 2 * channels, 1)),
        )

    def forward(self, y, params):
        context = self.context_prediction(y)
        scales, means = self.entropy_parameters(torch.cat((params, context), dim=1)).chunk(2, 1)
        return torch.stack((scales, means), 1)


class Called(nn.Conv2d):
    """R. Trullo's layer: a mask that is no buffer, at a call that is no forward."""

    def __init__(self, inputs, outputs, size, padding, seen):
        super().__init__(inputs, outputs, size, padding=padding)
        self.mask = torch.zeros_like(self.weight)
        self.mask[(slice(None), slice(None), *seen)] = 1

    def __call__(self, x):
        self.weight.data *= self.mask
        return super().__call__(x)


class Pair(nn.Module):
    def __init__(self, inputs, width, k, first):
        super().__init__()
        self.width, self.first, seen = width, first, slice(k // 2 + (not first))
        self.vertical = Called(inputs, 2 * width, k, k // 2, (seen, slice(None)))
        self.horizontal = Called(inputs, 2 * width, (1, k), (0, k // 2), (slice(None), seen))
        self.link, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def gate(self, x):
        return torch.tanh(x[:, : self.width]) * torch.sigmoid(x[:, self.width :])

    def forward(self, x):
        v, h = x
        from_v = self.vertical(v)
        out = self.out(self.gate(self.link(from_v) + self.horizontal(h)))
        return [self.gate(from_v), out if self.first else out + h]


class Pairs(nn.Module):
    """R. Trullo's Gated PixelCNN: a list of both stacks from layer to layer."""

    def __init__(self, levels=4, width=8):
        super().__init__()
        self.layers = nn.ModuleList([Pair(1, width, 5, True)])
        for _ in range(2):
            self.layers.append(Pair(width, width, 3, False))
        self.out = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(True), nn.Conv2d(width, levels, 1))

    def forward(self, x):
        x = [x, x]
        for layer in self.layers:
            x = layer(x)
        return self.out(x[1])


class ZeroedBlock(nn.Module):
    def __init__(self, width, k):
        super().__init__()
        self.vertical = nn.Conv2d(width, 2 * width, k, padding=k // 2)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, k), padding=(0, k // 2))
        self.link, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1, bias=False)
        self.label = nn.Conv2d(2 * width, 2 * width, 1)

    def forward(self, v, h, label):
        k = self.vertical.kernel_size[0]
        self.vertical.weight.data[:, :, k // 2 :, :].zero_()
        self.horizontal.weight.data[:, :, :, k // 2 + 1 :].zero_()
        label = self.label(label)
        from_v = self.vertical(v)
        out = Halves()(self.horizontal(h) + (self.link(from_v) + label) + label)
        return Halves()(from_v), self.out(out) + h


class Lower(nn.Module):
    """K. Bliznashki's prior of a VQ-VAE's finer codes: the coarser ones are made as large, beside a label."""

    def __init__(self, levels=4, width=8, classes=5):
        super().__init__()
        self.label, self.codes = nn.Linear(classes, 2 * width), nn.ConvTranspose2d(1, width, 4, stride=2, padding=1)
        self.more = nn.utils.weight_norm(nn.Conv2d(2 * width, 2 * width, 3, padding=1))
        self.input = nn.Conv2d(1, 2 * width, 7, padding=3)
        self.blocks = nn.ModuleList([ZeroedBlock(width, 5) for _ in range(2)])
        self.out = nn.Conv2d(width, levels, 1)

    def forward(self, x, codes, label):
        self.input.weight.data[:, :, 4:, :].zero_()
        self.input.weight.data[:, :, 3, 4:].zero_()
        self.input.weight.data[:, :, 3, 3] = 0
        codes = self.codes(codes)
        codes = self.more(concat_elu(codes))
        label = self.label(label)[:, :, None, None]
        v = h = Halves()(self.input(x) + codes + label)
        for block in self.blocks:
            v, h = block(v, h, label)
        return self.out(h).unsqueeze(2)


class OfOneCondition(nn.Module):
    """What a user writes around it: codes [N, 1, 3, 3], and beside their rows a label, as one tensor."""

    def __init__(self):
        super().__init__()
        self.model = Lower()

    def forward(self, x, cond):
        return self.model(x, cond[:, None, :3, :3], cond[:, 3:].flatten(1)[:, :5])


PUBLISHED = {
    "jzbontar": in_a_row,
    "pythae": lambda: Logits(OfDictionaries()),
    "pytorch-generative PixelCNN": Residual,
    "pytorch-generative GatedPixelCNN": CroppedGated,
    "uvadlc": Dilated,
    "rogertrullo": Pairs,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_taken_as_they_are(name, backend):
    torch.manual_seed(2)
    model = lively(PUBLISHED[name](), 1.5)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
        if isinstance(part, Called):
            part.mask = part.mask.to(part.weight)
    values = [0.0, 80.0, 170.0, 255.0] if name == "uvadlc" else None
    assert_draws_as_the_naive_loop(model, (1, 6, 7), backend, values=values)
    assert_draws_as_the_naive_loop(model, (1, 9, 4), backend, values=values)


def test_a_published_network_of_three_colours_and_one_of_a_single_output(backend):
    sampler = assert_draws_as_the_naive_loop(lively(Logits(OfDictionaries(colours=3)), 1.5), (3, 5, 6), backend)
    assert sampler.stages == [[0, 1, 2]]
    assert_draws_as_the_naive_loop(lively(CroppedGated(levels=1), 3), (1, 5, 6), backend, levels=2)


def test_colours_and_labels_of_a_published_network(backend):
    model = lively(Coloured(), 1.5)
    sampler = IncrementalSampler(model, (3, 5, 6), levels=4, conditional=True, backend=backend)
    label = torch.tensor([1, 4, 0])
    drawn = sampler.sample(3, label, seed=0)
    assert sampler.stages == [[0, 1], [2]] and drawn.unique().numel() == 4
    assert torch.equal(drawn, sampler.sample(3, label, seed=0, method="naive"))
    assert not torch.equal(drawn, sampler.sample(3, label + 1 - label.clamp(max=1), seed=0))


def test_codes_of_a_published_prior(backend):
    model = lively(Codes(), 1.5)
    sampler = IncrementalSampler(model, (1, 6, 6), levels=6, conditional=True, backend=backend)
    label = torch.tensor([1, 4, 0])
    drawn = sampler.sample(3, label, seed=0)
    assert drawn.shape == (3, 1, 6, 6) and drawn.unique().numel() == 6
    for method in ("naive", "fixed_point"):
        assert torch.equal(drawn, sampler.sample(3, label, seed=0, method=method))
    # What came farthest says why not: codes that are no square, not the float ones that were tried before.
    with pytest.raises(ValueError, match=r"must take images \[N, 6, 7\]; got RuntimeError: The size of tensor a \(7\)"):
        IncrementalSampler(model, (1, 6, 7), levels=6, conditional=True).sample(3, label)


def test_finer_codes_of_a_published_prior(backend):
    sampler = IncrementalSampler(lively(OfOneCondition(), 1.5), (1, 6, 6), levels=4, conditional=True, backend=backend)
    cond = torch.randn(3, 6, 3)
    drawn = sampler.sample(3, cond, seed=0)
    assert drawn.unique().numel() == 4
    assert torch.equal(drawn, sampler.sample(3, cond, seed=0, method="naive"))


@pytest.mark.parametrize("order", ["raster", "wavefront"])
def test_a_published_joint_model(order, backend):
    model = lively(Joint(), 1.5)
    y, params = torch.randn(2, 6, 4, 5), torch.randn(2, 12, 4, 5)
    sampler = IncrementalSampler(model, (6, 4, 5), conditional=True, order=order, backend=backend)
    torch.testing.assert_close(teacher_forced(sampler, y, params), model(y, params), rtol=0, atol=2e-5)
    assert sampler.steps == (20 if order == "raster" else 5 + 3 * 3)


# PixelCNN++


def down_shift(x, pad):
    sizes = [int(size) for size in x.size()]
    return pad(x[:, :, : sizes[2] - 1, :])


def right_shift(x, pad):
    sizes = [int(size) for size in x.size()]
    return pad(x[:, :, :, : sizes[3] - 1])


def concat_elu(x):
    axis = len(x.size()) - 3
    return F.elu(torch.cat([x, -x], dim=axis))


class Pixelwise(nn.Module):
    """A linear layer over the channels of all pixels in a row."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear, self.outputs = nn.utils.weight_norm(nn.Linear(inputs, outputs)), outputs

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        sizes = [int(size) for size in x.size()]
        out = self.linear(x.contiguous().view(sizes[0] * sizes[1] * sizes[2], sizes[3]))
        sizes[-1] = self.outputs
        return out.view(sizes).permute(0, 3, 1, 2)


class Shifted(nn.Module):
    """A weight-normed convolution of what is padded above and to the left, shifted afterwards or not."""

    def __init__(self, inputs, outputs, kernel, pad, stride=1, shift=None):
        super().__init__()
        self.conv = nn.utils.weight_norm(nn.Conv2d(inputs, outputs, kernel, stride))
        self.pad, self.shift = nn.ZeroPad2d(pad), shift

    def forward(self, x):
        x = self.conv(self.pad(x))
        return self.shift(x) if self.shift else x


def down_shifted(inputs, outputs, stride=1, shift=False, kernel=(2, 3)):
    side, shifted = int((kernel[1] - 1) / 2), lambda x: down_shift(x, nn.ZeroPad2d((0, 0, 1, 0)))
    return Shifted(inputs, outputs, kernel, (side, side, kernel[0] - 1, 0), stride, shifted if shift else None)


def down_right_shifted(inputs, outputs, stride=1, shift=False, kernel=(2, 2)):
    shifted = (lambda x: right_shift(x, nn.ZeroPad2d((1, 0, 0, 0)))) if shift else None
    return Shifted(inputs, outputs, kernel, (kernel[1] - 1, 0, kernel[0] - 1, 0), stride, shifted)


class GatedResnet(nn.Module):
    def __init__(self, width, conv, skips=0):
        super().__init__()
        self.first, self.last = conv(2 * width, width), conv(2 * width, 2 * width)
        if skips:
            self.skip = Pixelwise(2 * skips * width, width)
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, x, other=None):
        y = self.first(concat_elu(x))
        if other is not None:
            y += self.skip(concat_elu(other))
        y = self.dropout(concat_elu(y))
        a, b = torch.chunk(self.last(y), 2, dim=1)
        return x + a * F.sigmoid(b)


class Mixtures(nn.Module):
    """PixelCNN++, of one size of features or of more: up with all that is kept, and down with it."""

    def __init__(self, sizes, colours=3, width=6, outputs=20, keeps=False):
        super().__init__()
        self.keeps, self.padding, down, right = keeps, None, down_shifted, down_right_shifted
        self.u_first = down(colours + 1, width, shift=True)
        self.ul_first = nn.ModuleList(
            [down(colours + 1, width, shift=True, kernel=(1, 3)), right(colours + 1, width, shift=True, kernel=(2, 1))]
        )
        pairs = [(GatedResnet(width, down), GatedResnet(width, right, 1)) for _ in range(sizes)]
        self.up = nn.ModuleList([nn.ModuleList(pair) for pair in pairs])
        pairs = [(GatedResnet(width, down, 1), GatedResnet(width, right, 2)) for _ in range(sizes)]
        self.down = nn.ModuleList([nn.ModuleList(pair) for pair in pairs])
        self.smaller = nn.ModuleList([nn.ModuleList([conv(width, width, 2) for conv in (down, right)])] * (sizes - 1))
        self.larger = nn.ConvTranspose2d(width, width, 2, 2)
        self.out = Pixelwise(width, outputs)

    def forward(self, x):
        if self.padding is None or not self.keeps:
            sizes = [int(size) for size in x.size()]
            self.padding = torch.ones(sizes[0], 1, sizes[2], sizes[3], requires_grad=False)
        x = torch.cat((x, self.padding), 1)
        us, uls = [self.u_first(x)], [self.ul_first[0](x) + self.ul_first[1](x)]
        for n, (for_u, for_ul) in enumerate(self.up):
            us += [for_u(us[-1])]
            uls += [for_ul(uls[-1], us[-1])]
            if n < len(self.smaller):
                us += [self.smaller[n][0](us[-1])]
                uls += [self.smaller[n][1](uls[-1])]
        u, ul = us.pop(), uls.pop()
        for n, (for_u, for_ul) in enumerate(self.down):
            u = for_u(u, us.pop())
            ul = for_ul(ul, torch.cat((u, uls.pop()), 1))
            if n < len(self.smaller):
                u, ul = self.larger(u), self.larger(ul)
        return self.out(F.elu(ul))


def test_pixelcnn_plus_plus_of_one_size(backend):
    model = lively(Mixtures(1), 1.5)
    with pytest.raises(ValueError, match="model must return levels x 3 channels"):
        IncrementalSampler(model, (3, 5, 6), backend=backend)
    model, images = lively(Mixtures(1, outputs=21), 1.5), torch.randn(2, 3, 5, 6)
    sampler = IncrementalSampler(model, (3, 5, 6), backend=backend)
    want = model(images).unflatten(1, (7, 3))
    torch.testing.assert_close(teacher_forced(sampler, images), want, rtol=0, atol=1e-5)


def test_a_padding_of_one_number_of_images_is_told():
    sampler = IncrementalSampler(lively(Mixtures(1, outputs=21, keeps=True)), (3, 5, 6))
    with pytest.raises(NotImplementedError, match="model must take any number of images.*got RuntimeError: Sizes of"):
        sampler.reset(3)


# PixelSNAIL


class Weighed(nn.Module):
    """A convolution whose direction loses what comes later at each call."""

    def __init__(self, inputs, outputs, kernel, causal=0, pad=None, **options):
        super().__init__()
        self.pad, self.causal = nn.ZeroPad2d(pad or 0), causal
        self.conv = nn.utils.weight_norm(nn.Conv2d(inputs, outputs, kernel, **options))

    def forward(self, x):
        x = self.pad(x)
        if self.causal > 0:
            self.conv.weight_v.data[:, :, -1, self.causal :].zero_()
        return self.conv(x)


class SnailBlock(nn.Module):
    def __init__(self, width, k, conv, more=0):
        super().__init__()
        self.activation, self.dropout, self.gate = nn.ELU(), nn.Dropout(0.1), nn.GLU(1)
        options = {"causal": k // 2, "pad": (k // 2, k // 2, k - 1, 0)} if conv == "causal" else {"padding": k // 2}
        self.first, self.last = Weighed(width, width, k, **options), Weighed(width, 2 * width, k, **options)
        self.more = Weighed(more, 2 * width, 1, bias=False) if more else None

    def forward(self, x, cond=None):
        out = self.dropout(self.activation(self.first(self.activation(x))))
        out = self.last(out)
        if cond is not None:
            out += self.more(cond)
        out = self.gate(out)
        out += x
        return out


def attended(query, key, value, heads):
    """What is above and to the left, as its contents have it."""
    n, _, rows, columns = key.shape
    query, key, value = (x.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3) for x in (query, key, value))
    seen = torch.tril(torch.ones(rows * columns, rows * columns), diagonal=-1)
    scores = torch.matmul(query, key.transpose(2, 3)) / 2
    scores = torch.softmax(scores.masked_fill(seen == 0, -1e4), 3).masked_fill(seen == 0, 0)
    return (scores @ value).transpose(2, 3).reshape(n, -1, rows, columns)


class Snail(nn.Module):
    """S. Kim's PixelSNAIL: codes as one-hots, coordinates, gates, and attention or not; its logits beside a cache."""

    def __init__(self, attention, more=0, levels=4, width=8, size=(6, 7), k=3):
        super().__init__()
        self.levels, self.attention = levels, attention
        self.horizontal = Weighed(levels, width, (k // 2, k), pad=(k // 2, k // 2, k // 2 - 1, 0))
        self.vertical = Weighed(levels, width, ((k + 1) // 2, k // 2), pad=(k // 2 - 1, 0, (k + 1) // 2 - 1, 0))
        rows, columns = size
        x = ((torch.arange(rows).float() - rows / 2) / rows).view(1, 1, rows, 1).expand(1, 1, rows, columns)
        y = ((torch.arange(columns).float() - columns / 2) / columns).view(1, 1, 1, columns)
        self.register_buffer("background", torch.cat([x, y.expand(1, 1, rows, columns)], 1))
        self.blocks = nn.ModuleList([SnailBlock(width, k, "causal", more) for _ in range(2)])
        self.join = Weighed(width + 2, width, 1)
        if more:
            self.codes = nn.Sequential(Weighed(levels, more, k, padding=k // 2), SnailBlock(more, k, "plain"))
        self.out = nn.Sequential(SnailBlock(width, 1, "plain"), nn.ELU(inplace=True), Weighed(width, levels, 1))

    def forward(self, x, cond=None):
        n, rows, columns = x.shape
        x = F.one_hot(x, self.levels).permute(0, 3, 1, 2).type_as(self.background)
        out = F.pad(self.horizontal(x), [0, 0, 1, 0])[:, :, :rows, :]
        out = out + F.pad(self.vertical(x), [1, 0, 0, 0])[:, :, :, :columns]
        background = self.background[:, :, :rows, :].expand(n, 2, rows, columns)
        if cond is not None:
            cond = F.one_hot(cond, self.levels).permute(0, 3, 1, 2).type_as(self.background)
            cond = F.interpolate(self.codes(cond), scale_factor=2)[:, :, :rows, :columns]
        for block in self.blocks:
            out = block(out, cond)
        out = self.join(torch.cat([out, background], 1))
        return self.out(attended(out, out, out, 2) if self.attention else out), {}


class FirstOf(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *given):
        return self.model(*given)[0]


def test_pixelsnail_without_attention(backend):
    torch.manual_seed(3)
    assert_draws_as_the_naive_loop(lively(FirstOf(Snail(False)), 1.5), (1, 6, 7), backend)
    model, cond = lively(FirstOf(Snail(False, more=6)), 1.5), torch.randint(4, (3, 3, 4))
    sampler = IncrementalSampler(model, (1, 6, 7), levels=4, conditional=True, backend=backend)
    drawn = sampler.sample(3, cond, seed=0)
    assert torch.equal(drawn, sampler.sample(3, cond, seed=0, method="naive"))
    assert not torch.equal(drawn, sampler.sample(3, 3 - cond, seed=0))


class CroppedBlock(nn.Module):
    """E. Hotaj's block of PixelSNAIL: kernels of 2 x 2, padded all around, and cropped."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=2, padding=1)
        self.last = nn.Conv2d(width, 2 * width, kernel_size=2, padding=1)
        self.activation = GatedActivation(nn.Identity())

    def forward(self, x):
        _, _, h, w = x.shape
        out = F.elu(self.first(F.elu(x)))[:, :, :h, :w]
        return x + self.activation(self.last(out)[:, :, :h, :w])


class OtherSnail(Sized):
    def __init__(self, attention, levels=4, width=8):
        super().__init__()
        self.attention, self.input = attention, Masked("A", 1, width, 3, padding=1)
        self.blocks = nn.Sequential(*[CroppedBlock(width) for _ in range(2)])
        self.key_and_value, self.query = nn.Conv2d(width + 1, 2 * width, 1), nn.Conv2d(width, width, 1)
        self.out = nn.Sequential(nn.Conv2d(width, 4, 1), nn.Conv2d(4, levels, 1))

    def forward(self, x):
        image, x = x, self.input(x)
        x = self.blocks(x)
        if self.attention:
            key, value = self.key_and_value(torch.cat((x, image), dim=1)).split([8, 8], dim=1)
            x = x + attended(self.query(x), key, value, 2)
        return self.out(x)


def test_cropped_blocks_without_attention(backend):
    assert_draws_as_the_naive_loop(lively(OtherSnail(False), 1.5), (1, 6, 7), backend)


# Locally masked convolutions


class MaskedColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask, weight, bias):
        ctx.save_for_backward(x, mask, weight)
        columns = F.unfold(x, (3, 3), dilation=1, padding=(1, 1))
        masked = torch.mul(columns.view(x.size(0) * x.size(1), 9, columns.size(2)), mask).view(columns.shape)
        out = weight.view(weight.size(0), -1).matmul(masked) + bias.unsqueeze(0).unsqueeze(2)
        return out.view(x.size(0), -1, *x.shape[2:])


class LocallyMasked(nn.Module):
    """lmconv's: a mask for each pixel."""

    def __init__(self, levels=4):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(levels, 1, 3, 3)), nn.Parameter(torch.randn(levels))
        self.register_buffer("mask", (torch.rand(1, 9, 30) < 0.5).float())

    def forward(self, x):
        return MaskedColumns.apply(x, self.mask, self.weight, self.bias)


ATTENTION = "got softmax|got bmm: softmax and products of features, as attention takes"


REFUSED = {
    "PixelCNN++": (
        lambda: Mixtures(2),
        (3, 6, 6),
        r"got smaller.0.[01].conv, .*Conv2d.* of stride \(2, 2\): each of its outputs must be",
    ),
    "PixelSNAIL": (lambda: FirstOf(Snail(True)), (1, 6, 7), ATTENTION),
    "pytorch-generative PixelSNAIL": (lambda: OtherSnail(True), (1, 6, 7), ATTENTION),
    "lmconv": (LocallyMasked, (1, 5, 6), "got im2col: masks that differ from pixel to pixel are no convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_published_networks_are_refused_with_the_cause(name):
    make, shape, expected = REFUSED[name]
    with pytest.raises(
        NotImplementedError, match=f"(?s)model must be made of layers that the sampler knows.*({expected})"
    ):
        IncrementalSampler(lively(make()), shape)
