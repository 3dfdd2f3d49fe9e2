"""PixelCNNs as they were published: small ones of the same structure, as their users hand them to the sampler."""

from collections import OrderedDict

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
        rows, columns = self.kernel_size
        mask = torch.ones_like(self.weight)
        mask[:, :, rows // 2, columns // 2 + (mask_type == "B") :] = 0
        mask[:, :, rows // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def of_seven_layers(levels=4, width=8):
    """J. Zbontar's: masks, norms and activations in a row."""
    layers = [Masked("A", 1, width, 7, 1, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    for _ in range(2):
        layers += [Masked("B", width, width, 7, 1, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Conv2d(width, levels, 1))


class OfDictionaries(nn.Module):
    """pythae's: from a dictionary to one of the logits and the loss."""

    def __init__(self, levels=4, colours=1, width=8):
        super().__init__()
        self.levels, self.colours, net = levels, colours, []
        for n in range(3):
            conv = Masked("B" if n else "A", width if n else colours, width, 5, padding=2)
            net.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
        self.net = nn.Sequential(*net, nn.Conv2d(width, levels * colours, 1))

    def forward(self, inputs, **options):
        x = inputs["data"]
        out = self.net(x).reshape(x.shape[0], self.levels, self.colours, x.shape[2], x.shape[3])
        return OrderedDict(loss=F.cross_entropy(out, x.long()), out=out)


class Logits(nn.Module):
    """What a user writes around it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model({"data": x})["out"]


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


class Residual(nn.Module):
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
    def forward(self, x):
        _, channels, _, _ = x.shape
        assert channels % 2 == 0, "x must have an even number of channels."
        x, gate = x[:, : channels // 2], x[:, channels // 2 :]
        return torch.tanh(x) * torch.sigmoid(gate)


class CroppedGatedLayer(nn.Module):
    def __init__(self, inputs, width, k, first):
        super().__init__()
        assert k % 2 == 1
        self.first, self.activation = first, GatedActivation()
        self.rows = nn.Conv2d(inputs, width, (1, k), padding=(0, k // 2))
        self.columns = nn.Conv2d(width, 2 * width, (k // 2 + 1, 1), padding=(k // 2 + 1, 0))
        self.vertical_skip = nn.Conv2d(inputs, 2 * width, 1)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = Masked("A" if first else "B", inputs, 2 * width, (1, k), padding=(0, k // 2))
        self.residual, self.skip = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, vertical, horizontal):
        _, _, h, _ = vertical.shape
        v = self.columns(self.rows(vertical))[:, :, :h, :]
        link = self.link(v)
        v = self.activation(v + self.vertical_skip(vertical))
        out = self.activation(link + self.horizontal(horizontal))
        skip, out = self.skip(out), self.residual(out)
        return v, out if self.first else out + horizontal, skip


class CroppedGated(nn.Module):
    """E. Hotaj's GatedPixelCNN: the vertical stack's padding makes its last rows, which are cropped."""

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

    def __init__(self, inputs, outputs, mask, dilation=1):
        super().__init__()
        size = mask.shape
        padding = tuple(dilation * (k - 1) // 2 for k in size)
        self.conv = nn.Conv2d(inputs, outputs, size, padding=padding, dilation=dilation)
        self.register_buffer("mask", mask[None, None])

    def forward(self, x):
        self.conv.weight.data *= self.mask
        return self.conv(x)


def vertical(inputs, outputs, k=3, first=False, **options):
    mask = torch.ones(k, k)
    mask[k // 2 + 1 - first :] = 0
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
        self.link, self.out = nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, v, h):
        v_features = self.vertical(v)
        value, gate = v_features.chunk(2, dim=1)
        v = torch.tanh(value) * torch.sigmoid(gate)
        h_features = self.horizontal(h) + self.link(v_features)
        value, gate = h_features.chunk(2, dim=1)
        return v, self.out(torch.tanh(value) * torch.sigmoid(gate)) + h


class Dilated(nn.Module):
    """That of the UvA's course, whose images come as levels."""

    def __init__(self, levels=4, colours=1, width=8):
        super().__init__()
        self.levels = levels
        self.first_v = vertical(colours, width, first=True)
        self.first_h = horizontal(colours, width, first=True)
        self.layers = nn.ModuleList(GatedMasked(width, dilation=d) for d in (1, 2, 1))
        self.out = nn.Conv2d(width, levels * colours, 1)

    def forward(self, x):
        x = (x.float() / 255.0) * 2 - 1
        v, h = self.first_v(x), self.first_h(x)
        for layer in self.layers:
            v, h = layer(v, h)
        out = self.out(F.elu(h))
        return out.reshape(out.shape[0], self.levels, out.shape[1] // self.levels, out.shape[2], out.shape[3])


class ColourMasked(nn.Conv2d):
    """A mask over the colours of the pixel, too."""

    def __init__(self, mask_type, colours, *sizes, **options):
        super().__init__(*sizes, **options)
        rows, columns = (size // 2 for size in self.kernel_size)
        mask = torch.zeros_like(self.weight)
        mask[:, :, :rows] = 1
        mask[:, :, rows, :columns] = 1
        outputs, inputs = (torch.arange(n)[:, None] % colours for n in self.weight.shape[:2])
        mask[:, :, rows, columns] = (outputs >= inputs.T if mask_type == "B" else outputs > inputs.T).float()
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


class Cropped(nn.Conv2d):
    """Two crops of one output, which share its memory."""

    def forward(self, x):
        x = super().forward(x)
        k, _ = self.kernel_size
        return x[:, :, 1:-k, :], x[:, :, : -k - 1, :]


class LabelledBlock(nn.Module):
    def __init__(self, mask_type, colours, inputs, width, k, labels):
        super().__init__()
        self.width = width
        self.vertical = Cropped(inputs, 2 * width, (k // 2 + 1, k), padding=(k // 2 + 1, k // 2))
        self.vertical_fc = nn.Conv2d(inputs, 2 * width, 1)
        self.link = ColourMasked("B", colours, 2 * width, 2 * width, 1)
        self.horizontal = ColourMasked(mask_type, colours, inputs, 2 * width, (1, k), padding=(0, k // 2))
        self.out = ColourMasked("B", colours, width, width, 1)
        self.skip = ColourMasked("B", colours, width, width, 1)
        self.label = nn.Embedding(labels, 2 * width)
        self.first = mask_type == "A"

    def forward(self, x):
        v, h, skip, label = x
        embedded = self.label(label).unsqueeze(2).unsqueeze(3)
        v_out, v_shifted = self.vertical(v)
        if not self.first:
            v_out += self.vertical_fc(v)
        v_out += embedded
        a, b = torch.split(v_out, self.width, dim=1)
        v_out = torch.tanh(a) * torch.sigmoid(b)
        h_out = self.horizontal(h)
        v_shifted = self.link(v_shifted)
        h_out += v_shifted
        h_out += embedded
        a, b = torch.split(h_out, self.width, dim=1)
        h_out = torch.tanh(a) * torch.sigmoid(b)
        skip = skip + self.skip(h_out)
        h_out = self.out(h_out)
        if not self.first:
            h_out += h
        return v_out, h_out, skip, label


class Coloured(nn.Module):
    """anordertoreclaim's: colours in turn, labels, skips, crops that are written to."""

    def __init__(self, levels=4, colours=3, width=12, labels=5):
        super().__init__()
        self.levels, self.colours, self.width = levels, colours, width
        self.first = LabelledBlock("A", colours, colours, width, 5, labels)
        self.blocks = nn.Sequential(*(LabelledBlock("B", colours, width, width, 3, labels) for _ in range(2)))
        self.hidden = ColourMasked("B", colours, width, width, 1)
        self.out = ColourMasked("B", colours, width, colours * levels, 1)

    def forward(self, image, label):
        count, _, height, width = image.size()
        skip = image.new_zeros((count, self.width, height, width), requires_grad=True)
        _, _, skip, _ = self.blocks(self.first((image, image, skip, label)))
        out = self.out(F.relu(self.hidden(F.relu(skip))))
        return out.view(count, self.levels, self.colours, height, width)


class CodesLayer(nn.Module):
    def __init__(self, mask_type, width, k, residual, classes):
        super().__init__()
        self.mask_type, self.residual = mask_type, residual
        self.embedding = nn.Embedding(classes, 2 * width)
        self.vertical = nn.Conv2d(width, 2 * width, (k // 2 + 1, k), 1, (k // 2, k // 2))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, k // 2 + 1), 1, (0, k // 2))
        self.out = nn.Conv2d(width, width, 1)

    def gate(self, x):
        a, b = x.chunk(2, dim=1)
        return F.tanh(a) * F.sigmoid(b)

    def forward(self, v, h, label):
        if self.mask_type == "A":
            self.vertical.weight.data[:, :, -1].zero_()
            self.horizontal.weight.data[:, :, :, -1].zero_()
        label = self.embedding(label)
        from_v = self.vertical(v)[:, :, : v.size(-1), :]
        from_h = self.horizontal(h)[:, :, :, : h.size(-2)]
        out = self.gate(self.link(from_v) + from_h + label[:, :, None, None])
        out = self.out(out) + h if self.residual else self.out(out)
        return self.gate(from_v + label[:, :, None, None]), out


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
        v, h = x, x
        for layer in self.layers:
            v, h = layer(v, h, label)
        return self.out(h)


class OutOfPlace(nn.Conv2d):
    """CompressAI's layer."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.register_buffer("mask", torch.ones_like(self.weight))
        _, _, rows, columns = self.mask.size()
        self.mask[:, :, rows // 2, columns // 2 :] = 0
        self.mask[:, :, rows // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


class Joint(nn.Module):
    """CompressAI's joint model: a context, and what a hyperprior knows, make means and scales."""

    def __init__(self, channels=6):
        super().__init__()
        self.context_prediction = OutOfPlace(channels, 2 * channels, kernel_size=5, padding=2, stride=1)
        self.entropy_parameters = nn.Sequential(
            nn.Conv2d(4 * channels, 20, 1), nn.LeakyReLU(inplace=True), nn.Conv2d(20, 2 * channels, 1)
        )

    def forward(self, y, params):
        context = self.context_prediction(y)
        return self.entropy_parameters(torch.cat((params, context), dim=1))


PUBLISHED = {
    "jzbontar": of_seven_layers,
    "pythae": lambda: Logits(OfDictionaries()),
    "pytorch-generative PixelCNN": Residual,
    "pytorch-generative GatedPixelCNN": CroppedGated,
    "uvadlc": Dilated,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_taken_as_they_are(name, backend):
    torch.manual_seed(2)
    model = lively(PUBLISHED[name](), 1.5)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
    values = [0.0, 80.0, 170.0, 255.0] if name == "uvadlc" else None
    assert_draws_as_the_naive_loop(model, (1, 6, 7), backend, values=values)
    assert_draws_as_the_naive_loop(model, (1, 9, 4), backend, values=values)


def test_colours_and_labels_of_a_published_network(backend):
    model = lively(Coloured(), 1.5)
    sampler = IncrementalSampler(model, (3, 5, 6), levels=4, conditional=True, backend=backend)
    label = torch.tensor([1, 4, 0])
    drawn = sampler.sample(3, label, seed=0)
    assert sampler.stages == [[0], [1], [2]] and drawn.unique().numel() == 4
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


@pytest.mark.parametrize("order", ["raster", "wavefront"])
def test_a_published_joint_model(order, backend):
    model = lively(Joint(), 1.5)
    y, params = torch.randn(2, 6, 4, 5), torch.randn(2, 12, 4, 5)
    sampler = IncrementalSampler(model, (6, 4, 5), conditional=True, order=order, backend=backend)
    want = model(y, params).unflatten(1, (2, 6))
    torch.testing.assert_close(teacher_forced(sampler, y, params), want, rtol=0, atol=2e-5)
    assert sampler.steps == (20 if order == "raster" else 5 + 3 * 3)


def down_shift(x):
    return F.pad(x[:, :, : x.size(2) - 1, :], (0, 0, 1, 0))


def right_shift(x):
    return F.pad(x[:, :, :, : x.size(3) - 1], (1, 0))


def concat_elu(x):
    return F.elu(torch.cat([x, -x], dim=1))


class Shifted(nn.Module):
    """PixelCNN++'s convolutions: padded above and to the left, weight-normed, or shifted afterwards."""

    def __init__(self, inputs, outputs, kernel, pad, stride=1, shift=None):
        super().__init__()
        conv = nn.Conv2d(inputs, outputs, kernel, stride)
        self.conv, self.pad, self.shift = nn.utils.parametrizations.weight_norm(conv), nn.ZeroPad2d(pad), shift

    def forward(self, x):
        x = self.conv(self.pad(x))
        return self.shift(x) if self.shift else x


def down_shifted(inputs, outputs, stride=1, shift=None, kernel=(2, 3)):
    side = (kernel[1] - 1) // 2
    return Shifted(inputs, outputs, kernel, (side, side, kernel[0] - 1, 0), stride, shift)


def down_right_shifted(inputs, outputs, stride=1, shift=None, kernel=(2, 2)):
    return Shifted(inputs, outputs, kernel, (kernel[1] - 1, 0, kernel[0] - 1, 0), stride, shift)


class GatedResnet(nn.Module):
    def __init__(self, width, conv, skip=0):
        super().__init__()
        self.first, self.last = conv(2 * width, width), conv(2 * width, 2 * width)
        self.skip = nn.Conv2d(2 * skip, width, 1) if skip else None
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, x, other=None):
        y = self.first(concat_elu(x))
        if self.skip is not None:
            y += self.skip(concat_elu(other))
        a, b = torch.chunk(self.last(self.dropout(concat_elu(y))), 2, dim=1)
        return x + a * torch.sigmoid(b)


class Mixtures(nn.Module):
    """PixelCNN++, of one size of features or of two."""

    def __init__(self, strided, colours=3, width=6, mixtures=2):
        super().__init__()
        self.strided, self.padding = strided, None
        self.u_first = down_shifted(colours + 1, width, shift=down_shift)
        self.ul_down = down_shifted(colours + 1, width, shift=down_shift, kernel=(1, 3))
        self.ul_right = down_right_shifted(colours + 1, width, shift=right_shift, kernel=(2, 1))
        self.u, self.ul = GatedResnet(width, down_shifted), GatedResnet(width, down_right_shifted, width)
        self.smaller = down_right_shifted(width, width, 2) if strided else None
        self.larger = nn.ConvTranspose2d(width, width, 2, 2) if strided else None
        self.out = nn.Conv2d(width, (3 * colours + 1) * mixtures, 1)

    def forward(self, x):
        xs = [int(size) for size in x.size()]
        self.padding = torch.ones(xs[0], 1, xs[2], xs[3])
        x = torch.cat((x, self.padding), 1)
        u, ul = self.u_first(x), self.ul_down(x) + self.ul_right(x)
        u = self.u(u)
        ul = self.ul(ul, u)
        if self.strided:
            ul = self.larger(self.smaller(ul))
        return self.out(F.elu(ul))


class Attention(nn.Module):
    """PixelSNAIL's block: what is above and to the left, as its contents have it."""

    def __init__(self, width=8, levels=4):
        super().__init__()
        self.first = down_right_shifted(1, width, shift=right_shift)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Conv2d(2 * width, levels, 1)

    def forward(self, x):
        h = self.first(x)
        n, c, rows, columns = h.shape
        pixels = h.flatten(2).transpose(1, 2)
        scores = self.query(pixels) @ pixels.transpose(1, 2)
        later = torch.triu(torch.ones(rows * columns, rows * columns), 0).bool()
        found = scores.masked_fill(later, -1e4).softmax(2) @ self.value(pixels)
        return self.out(torch.cat([h, found.transpose(1, 2).reshape(n, c, rows, columns)], 1))


class LocallyMasked(nn.Module):
    """lmconv's: a mask for each pixel."""

    def __init__(self, levels=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(levels, 9))
        self.register_buffer("mask", (torch.rand(9, 30) < 0.5).float())

    def forward(self, x):
        columns = F.unfold(x, 3, padding=1) * self.mask
        return (self.weight @ columns).view(x.shape[0], -1, *x.shape[2:])


REFUSED = {
    "PixelCNN++": (
        lambda: Mixtures(True),
        3,
        r"got smaller.conv, .*Conv2d.* of stride \(2, 2\): each of its outputs must be",
    ),
    "PixelSNAIL": (Attention, 1, "got softmax|got bmm: softmax and products of features, as attention takes"),
    "lmconv": (LocallyMasked, 1, "got im2col: masks that differ from pixel to pixel are no convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_published_networks_are_refused_with_the_cause(name):
    make, colours, expected = REFUSED[name]
    with pytest.raises(
        NotImplementedError, match=f"(?s)model must be made of layers that the sampler knows.*({expected})"
    ):
        IncrementalSampler(lively(make()), (colours, 5, 6))


def test_pixelcnn_plus_plus_of_one_size(backend):
    model = lively(Mixtures(False), 1.5)
    images = torch.randn(2, 3, 5, 6)
    with pytest.raises(ValueError, match="model must return levels x 3 channels"):
        IncrementalSampler(model, (3, 5, 6), backend=backend)
    model.out = lively(nn.Conv2d(6, 21, 1))
    sampler = IncrementalSampler(model, (3, 5, 6), backend=backend)
    want = model(images).unflatten(1, (7, 3))
    torch.testing.assert_close(teacher_forced(sampler, images), want, rtol=0, atol=1e-5)
