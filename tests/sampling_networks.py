"""Networks and comparisons that the sampler's tests share."""

import contextlib
import copy

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d
from fastelbo.sampling import IncrementalSampler

BACKENDS = ("reference", "cpu")
SAMPLERS = (*BACKENDS, *(["cuda"] if torch.cuda.is_available() else []))  # which have one, and run here
WRONG = [("cpu", torch.float64), ("cuda", torch.float64)]  # of a backend and a dtype that it has no sampler for


@contextlib.contextmanager
def at_home(backend):
    """With torch's default device the one that a backend is for, where networks' own layers count all bits, too."""
    home = torch.device("cuda" if backend == "cuda" else "cpu")
    with home, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def lively(model, gain=2.0):
    """Weights and biases large enough for every one of them to show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(gain) if parameter.dim() > 1 else parameter.normal_(std=0.3)
    return model.eval().to(torch.get_default_device())


def teacher_forced(sampler, images, cond=None):
    """What step returns when the images are committed: [n, K, C, H, W]."""
    colours, rows, columns = sampler.image_shape
    sampler.reset(len(images), cond)
    found = None
    for _ in range(sampler.steps):
        logits, which, pixels = sampler.step(), sampler.colours, sampler.pixels
        if found is None:
            found = torch.full((len(images), logits.shape[1], colours, rows, columns), float("nan")).to(logits)
        for p, (row, column) in enumerate(pixels):
            found[:, :, which, row, column] = logits[..., p]
        at_pixels = [images[:, which, row, column] for row, column in pixels]
        sampler.commit(torch.stack(at_pixels, 2))
    return found


def full(model, images, cond=None):
    logits = model(images) if cond is None else model(images, cond)
    return logits.detach().unflatten(1, (-1, images.shape[1]))


def assert_equals_full_forward(model, shape, backend, n=3, cond=None, **options):
    images = torch.randn(n, *shape)
    sampler = IncrementalSampler(model, shape, conditional=cond is not None, backend=backend, **options)
    want = full(model, images, cond)
    assert want.abs().max() > 0.05 and (want.amax((0, 2, 3, 4)) - want.amin((0, 2, 3, 4)) > 1e-3).all()
    bound = 1e-5 * max(1, want.abs().max())  # sums round by their largest terms
    torch.testing.assert_close(teacher_forced(sampler, images, cond), want, rtol=0, atol=float(bound))
    return sampler


class Gated(nn.Module):
    def __init__(self, colours=1, channels=12, levels=4, dilations=(1, 2), k=3, last=None, **options):
        super().__init__()
        self.first = GatedMaskedConv2d(colours, channels, k, mask_type="A", **options)
        self.blocks = nn.ModuleList(GatedMaskedConv2d(channels, channels, 3, dilation=d, **options) for d in dilations)
        groups = {name: options[name] for name in ("channel_groups", "group_order") if name in options}
        self.last = last or MaskedConv2d(channels, levels * colours, 1, mask_type="B", **groups)

    def forward(self, x, cond=None):
        v, h = self.first(x, x, cond)
        for block in self.blocks:
            v, h = block(v, h, cond)
        return self.last(F.elu(h))


class Stacks(nn.Module):
    """Both stacks by hand, with shifts, skips, joins, splits, residuals and conditions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.position = nn.Parameter(torch.randn(1, 8, 5, 7))
        self.v1, self.v2 = VerticalStackConv2d(1, 8, 3), VerticalStackConv2d(8, 16, 5, activation="relu", dilation=2)
        self.h1 = HorizontalStackConv2d(1, 8, 5, mask_type="A")
        self.h2 = HorizontalStackConv2d(8, 8, 3, activation="elu")
        self.mixed = MaskedConv2d(8, 8, 3, mask_type="B")
        self.norm, self.prelu = nn.BatchNorm2d(8), nn.PReLU(8)
        self.link = nn.Conv2d(16, 8, 1, groups=4)
        self.out = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(40, 6, 1), nn.Identity())
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x, label):
        bias = self.embed(label)[:, :, None, None]
        v = self.v1(x)
        above = F.pad(v, (0, 0, 1, 0))[:, :, :-1]
        second = self.v2(above) + bias
        h = self.h1(x) + above + self.position
        left = F.pad(h, (1, 0, 0, 0))[..., :-1]
        h = self.mixed(self.prelu(self.norm(h)), residual=h)
        h = self.h2(h, cond=self.link(second)) * 0.5 - left / 3
        a, b = torch.cat([h, above], 1).chunk(2, dim=1)
        first, rest = second.split([5, 11], dim=1)
        skip = torch.cat([first, F.silu(rest), torch.sigmoid(a) * b.tanh()], dim=1)
        return self.out(torch.cat((skip, 1 - h, F.gelu(h[:, 2:]), F.softplus(a[:, :2])), 1))


class Wild(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = MaskedConv2d(1, 4, 3, mask_type="A"), function

    def forward(self, x):
        return self.function(self.conv(x))


def assert_draws_as_the_naive_loop(model, shape, backend, levels=4, **options):
    sampler = IncrementalSampler(model, shape, levels=levels, backend=backend, **options)
    drawn = sampler.sample(4, seed=0)
    assert drawn.unique().numel() > 1
    assert torch.equal(drawn, sampler.sample(4, seed=0, method="naive"))
    return sampler


class Between(nn.Module):
    """A function of features between two masked convolutions."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = MaskedConv2d(1, 8, 3, mask_type="A"), MaskedConv2d(8, 4, 3, mask_type="B")
        self.function = copy.deepcopy(function)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


class GatedPixelCNN(nn.Module):
    """As tutorials have it."""

    def __init__(self, channels, levels, dilations):
        super().__init__()
        self.channels, self.levels, self.dilations = channels, levels, dilations
        self.vertical = VerticalStackConv2d(1, channels, 3, mask_type="A")
        self.horizontal = HorizontalStackConv2d(1, channels, 3, mask_type="A")
        self.blocks = nn.ModuleList(
            GatedMaskedConv2d(channels, channels, 3, dilation=d, link="mask-first-layer") for d in dilations
        )
        self.logits = nn.Conv2d(channels, levels, 1)

    def forward(self, images):
        """Logits of grey levels [N, 1, H, W]."""
        x = images * (2 / (self.levels - 1)) - 1
        v, h = self.vertical(x), self.horizontal(x)
        for block in self.blocks:
            v, h = block(v, h)
        return self.logits(F.elu(h))


class EagerCache:
    """What a user would write to draw from that network: the vertical stack a row at a time, the horizontal stack a
    pixel at a time."""

    def __init__(self, model, size):
        self.model, self.size = model, size
        self.taps = [block.horizontal.weight[:, :, 0].transpose(1, 2).flatten(1) for block in model.blocks]  # left, own
        self.outs = [block.out.weight[:, :, 0, 0] for block in model.blocks]

    @torch.no_grad()
    def sample(self, n):
        """Grey levels [n, 1, H, W], and the logits [n, K, H, W] that they were drawn from."""
        model, size, dilations = self.model, self.size, self.model.dilations
        image, logits = torch.zeros(n, 1, size, size), torch.empty(n, model.levels, size, size)
        x = torch.zeros(n, 1, size + 1, size + 2)
        above = [torch.zeros(n, model.channels, size + d, size + 2 * d) for d in dilations]  # the vertical stack's
        for row in range(size):
            v = F.conv2d(x[:, :, row : row + 2], model.vertical.weight, model.vertical.bias)
            links = []
            for block, d, cache in zip(model.blocks, dilations, above, strict=True):
                cache[:, :, row + d, d : d + size] = v[:, :, 0]
                z = F.conv2d(cache[:, :, row : row + d + 1], block.vertical.weight, block.vertical.bias, dilation=d)
                links.append(block.link(z)[:, :, 0].permute(2, 0, 1) + block.horizontal.bias)
                a, b = z.chunk(2, dim=1)
                v = a.tanh() * b.sigmoid()
            left = [torch.zeros(size + d, n, model.channels) for d in dilations]  # the horizontal stack's
            for column in range(size):
                h = F.linear(x[:, 0, row + 1, column, None], model.horizontal.weight[:, :, 0, 0], model.horizontal.bias)
                for index, (block, d) in enumerate(zip(model.blocks, dilations, strict=True)):
                    left[index][column + d] = h
                    seen = torch.cat((left[index][column], h), dim=1)
                    a, b = torch.addmm(links[index][column], seen, self.taps[index].T).chunk(2, dim=1)
                    h = h + F.linear(a.tanh() * b.sigmoid(), self.outs[index], block.out.bias)
                found = F.linear(F.elu(h), model.logits.weight[:, :, 0, 0], model.logits.bias)
                level = found.softmax(1).multinomial(1)[:, 0].float()
                image[:, 0, row, column] = level
                x[:, 0, row + 1, column + 1] = level * (2 / (model.levels - 1)) - 1
                logits[:, :, row, column] = found
        return image, logits

    def check(self):
        """Raises AssertionError unless the logits are those of the full forward."""
        image, logits = self.sample(2)
        with torch.no_grad():
            torch.testing.assert_close(logits, self.model(image), rtol=0, atol=1e-5)
