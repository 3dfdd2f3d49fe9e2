"""Causal networks made at random, of what people write PixelCNNs of, and whether a sampler draws their images.

`make(seed)` gives a network, `examine(seed)` compares the sampler's image with the naive loop's.
"""

import copy
import random
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.utils import prune

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d
from fastelbo.sampling import IncrementalSampler

POINTWISE = (
    *(nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Hardtanh, nn.Identity),
    *(lambda: nn.ReLU(inplace=True), lambda: nn.ELU(0.7, inplace=True), lambda: nn.LeakyReLU(0.2, inplace=True)),
    *(nn.Dropout, nn.PReLU, lambda: nn.SiLU(inplace=True)),
)


@dataclass
class Made:
    """A network, and what a sampler is made with."""

    model: nn.Module
    shape: tuple[int, int, int]
    levels: int
    order: str
    backend: str
    cond: "torch.Tensor | None"
    unseen: bool  # whether its forward does what no trace shows
    parts: list[str] = field(default_factory=list)


class Part(nn.Module):
    """A part of a network: a function of its modules, the features, earlier features and the condition."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.modules_ = function, nn.ModuleList(modules)

    def forward(self, h, kept, cond):
        return self.function(self.modules_, h, kept, cond)


class Network(nn.Module):
    def __init__(self, stem, parts, keeps, head):
        super().__init__()
        self.stem, self.parts, self.head, self.keeps = stem, nn.ModuleList(parts), head, keeps

    def forward(self, x, cond=None):
        h = self.stem(x, [x], cond)
        kept = [h]
        for part, keep in zip(self.parts, self.keeps, strict=True):
            h = part(h, kept, cond)
            if keep:
                kept.append(h)  # the tensor itself: what is written to it later shows
        return self.head(h, kept, cond)


class Maker:
    """Draws parts; all of them take and give `width` channels."""

    def __init__(self, seed):
        self.random = r = random.Random(seed)
        self.colours = r.choice((1, 1, 1, 2, 3))
        self.width = self.colours * r.choice((2, 4, 6, 8, 12))
        self.conditional = r.random() < 0.3
        self.cond_channels = 3
        self.unseen, self.levels = False, 2
        self.dilation = r.choice((1, 1, 1, 2))
        self.groups = {"channel_groups": self.colours}

    def masked(self, inputs, outputs, k=None, mask="B", **options):
        k = self.random.choice((1, 3, 3, 5)) if k is None else k
        return MaskedConv2d(inputs, outputs, k, mask_type=mask, dilation=self.dilation, **self.groups, **options)

    # Parts

    def stem(self):
        r, w, colours = self.random, self.width, self.colours
        kind = r.choice(("masked", "masked", "masked", "gated", "stacks", "levels", "padded"))
        k = r.choice((3, 3, 5, 7))
        if kind == "masked":
            return kind, Part(lambda m, h, kept, cond: m[0](h), self.masked(colours, w, k, "A"))
        if kind == "levels":
            return kind, self.levels_stem(k)
        if kind == "padded":
            return kind, self.padded_stem(k)
        if kind == "gated":
            link = r.choice(("shift", "pad-first", "mask-first-layer"))
            cond = {"cond_channels": self.cond_channels} if self.conditional else {}
            blocks = [GatedMaskedConv2d(colours, w, k, mask_type="A", link=link, **self.groups, **cond)]
            blocks += [GatedMaskedConv2d(w, w, 3, link=link, **self.groups, **cond) for _ in range(r.randrange(2))]

            def run(m, h, kept, cond):
                v = h
                for block in m:
                    v, h = block(v, h, cond)
                return h

            return kind, Part(run, *blocks)
        vertical = VerticalStackConv2d(colours, w, k, activation=r.choice((None, "relu", "elu")))
        horizontal = HorizontalStackConv2d(colours, w, k, mask_type="A", **self.groups)

        def run(m, h, kept, cond):
            v = m[0](h)
            return m[1](h) + F.pad(v, (0, 0, 1, 0))[:, :, :-1]

        return kind, Part(run, vertical, horizontal)

    def levels_stem(self, k):
        """Images that an embedding, or a one-hot, takes as integers."""
        colours, which = self.colours, self.random.randrange(4)
        size = self.levels if which == 0 else 3
        table = nn.Embedding(self.levels, size)
        order = {"channel_groups": colours, "group_order": "contiguous"}
        conv = MaskedConv2d(colours * size, colours * (self.width // colours), k, mask_type="A", **order)

        def run(m, h, kept, cond):
            if which == 0:
                x = F.one_hot(h.long(), m[0].num_embeddings).to(torch.float32)
            elif which == 1:
                x = m[0](h.long())
            elif which == 2:
                x = m[0](h)  # which takes integers alone
            else:
                x = m[0](h.flatten().long()).view(*h.shape, -1)
            x = m[1](x.movedim(-1, 2).flatten(1, 2))
            return x.unflatten(1, (colours, -1)).transpose(1, 2).flatten(1, 2)  # groups in turn

        return Part(run, table, conv)

    def padded_stem(self, k):
        """A plain convolution of an image that is padded above or shifted, whose output is cropped, or shifted."""
        plain, which = nn.Conv2d(self.colours, self.width, (k // 2, k)), self.random.randrange(5)

        def run(m, h, kept, cond):
            rows = h.shape[2]
            if which == 0:
                return m[0](F.pad(h, (k // 2, k // 2, k // 2, 0)))[:, :, :rows]
            if which == 1:
                return m[0](F.pad(h, (k // 2, k // 2, k // 2, 3))).tanh()[:, :, : h.size(2)]
            ahead = k // 2, k // 2, 0, k // 2 - 1
            if which == 2:
                return F.pad(m[0](F.pad(h, ahead)).sigmoid(), (0, 0, k // 2, 0))[:, :, :rows]
            if which == 3:
                return F.softplus(m[0](F.pad(F.pad(h, (0, 0, k // 2, 0))[:, :, :rows], ahead)))
            return F.pad(F.conv2d(h, m[0].weight, m[0].bias, padding=(k // 2, k // 2)), (0, 0, 1, 2))[
                :, :, 1 : rows + 1
            ]

        return Part(run, plain)

    def reshaped(self):
        """Moves elements there and back, and asks for sizes."""
        which, groups = self.random.randrange(8), self.width // self.colours

        def run(m, h, kept, cond):
            n, c, rows, columns = h.size()
            assert c == h.shape[1] and len(h) == n
            if which == 0:
                return torch.tanh(h.view(n, c, rows * columns)).reshape(n, c, rows, columns)
            if which == 1:
                return h.permute(0, 2, 3, 1).contiguous().sigmoid().permute(0, 3, 1, 2)
            if which == 2:
                return torch.stack(h.unbind(1), dim=1) * (rows + columns) / (rows + columns + 1)
            if which == 3:
                return h.unflatten(1, (groups, self.colours)).flip(1).flatten(1, 2)
            if which == 4:
                return h**2 - h.new_ones(c, 1, 1) * 0.5 + torch.zeros_like(h)
            if which == 5:
                return torch.where(torch.arange(columns) % 2 == 0, h, h.clone().neg())
            if which == 6:
                padded = F.pad(h, (2, 1, 2, 0))
                return F.softplus(padded)[:, :, 2:, 2:-1] - padded[..., :rows, 1 : columns + 1]
            made = h.new_zeros(n, c, rows + 1, columns)
            made[:, :, 1:] = h
            return made[:, :, :-1] + h

        return Part(run)

    def cropped(self):
        """A convolution of torch, padded or cropped so that it is causal; of one colour, or of rows above."""
        which, w = self.random.randrange(4), self.width
        above = nn.Conv2d(w, w, (2, 3), padding=(2, 1))
        own = nn.Conv2d(w, w, (1, 2), padding=(0, 1))
        if self.random.random() < 0.4:
            above = nn.utils.parametrizations.weight_norm(above)

        def run(m, h, kept, cond):
            rows, columns = h.shape[2:]
            seen = m[0](h)[:, :, :rows]
            if which == 0:
                return seen + h
            if which == 1:
                return F.elu(m[0](h))[:, :, :rows] * 0.5 + h
            if which == 2 and self.colours == 1:
                return m[1](h)[..., :columns] + seen
            weight = m[0].weight * (torch.arange(2)[:, None] == 0)
            return F.conv2d(h, weight, m[0].bias, padding=(2, 1))[:, :, 1 : rows + 1] - h

        return Part(run, above, own)

    def joined(self):
        """Constants and conditions among the channels."""
        which, w = self.random.randrange(5), self.width
        conv = self.masked(w + self.colours, w, self.random.choice((1, 3)))
        linear = nn.Linear(self.cond_channels, self.colours)

        def run(m, h, kept, cond):
            n, _, rows, columns = h.shape
            if which == 0 or cond is None:
                more = h.new_ones(n, self.colours, rows, columns)
            elif which == 1:
                more = m[1](cond)[:, :, None, None].expand(-1, -1, rows, columns)
            elif which == 2:
                more = m[1](cond)[:, :, None, None] * torch.linspace(-1, 1, columns).expand(rows, columns)
            elif which == 3:
                more = F.pad(m[1](cond).view(n, -1, 1, 1), (0, columns - 1, 0, rows - 1))
            else:
                more = torch.full((n, self.colours, rows, columns), 0.5)
            return m[0](torch.cat([more, h] if which % 2 else [h, more], dim=1))

        return Part(run, conv, linear)

    def head(self, outputs):
        """Logits, in one of the forms that they may have."""
        which, colours = self.random.randrange(7), self.colours

        def run(m, h, kept, cond):
            out = m[0](h)
            n, _, rows, columns = out.shape
            if which == 0:
                return out.view(n, outputs, colours, rows, columns)
            if which == 1 and outputs != colours:
                return out.unflatten(1, (outputs, colours)).permute(0, 2, 1, 3, 4)
            if which == 2 and outputs > 1:
                return out.reshape(n, outputs, colours, rows, columns).log_softmax(1)
            return out.clone() if which == 3 else out

        return Part(run, self.masked(self.width, outputs * colours, 1))

    def conv(self):
        w, act = self.width, self.random.choice((None, "relu", "elu", "tanh_sigmoid", "glu"))
        conv = self.masked(w, 2 * w if act in ("tanh_sigmoid", "glu") else w, activation=act)
        if self.random.random() < 0.4:
            return Part(lambda m, h, kept, cond: m[0](h, residual=kept[-1]), conv)
        return Part(lambda m, h, kept, cond: m[0](h), conv)

    def point(self):
        layer = self.random.choice(POINTWISE)()
        return Part(lambda m, h, kept, cond: m[0](h), layer)

    def residual(self):
        r = self.random
        inner = nn.Sequential(r.choice(POINTWISE)(), self.masked(self.width, self.width), r.choice(POINTWISE)())
        which = r.randrange(4)
        if which == 0:
            return Part(lambda m, h, kept, cond: h + m[0](h), inner)
        if which == 1:
            return Part(lambda m, h, kept, cond: m[0](h) - kept[0] * 0.5, inner)

        def run(m, h, kept, cond):
            skip = h
            h += m[0](h) if which == 2 else torch.tanh(h)
            return h + skip

        return Part(run, inner)

    def gate(self):
        conv = self.masked(self.width, 2 * self.width)
        if self.colours == 1:

            def run(m, h, kept, cond):
                a, b = m[0](h).chunk(2, dim=1)
                return torch.tanh(a) * torch.sigmoid(b)

            return Part(run, conv)
        return Part(lambda m, h, kept, cond: torch.tanh(m[0](h)[:, ::2]) * 0.5 + h, conv)

    def in_place(self):
        w, scale = self.width, self.random.choice((0.5, -1.5, 2.0))
        half, which = w // 2, self.random.randrange(10)

        def run(m, h, kept, cond):
            if which == 0:
                h *= scale
            elif which == 1:
                h.add_(kept[0])
            elif which == 2:
                h[:, :half] *= h[:, half : 2 * half].sigmoid()
            elif which == 3:
                a, b = h.chunk(2, 1)
                b -= a.tanh()
            elif which == 4:
                F.relu(h, True)
            elif which == 5:
                return h + torch.relu_(h)
            elif which == 6:
                h[:, half:] = h[:, :half].exp().clamp(max=3) if w % 2 == 0 else h[:, half:]
            elif which == 7:
                same = h.contiguous()
                same /= 3.0
            elif which == 8:
                part = F.dropout(h[:, 1:], training=False)
                part.mul_(kept[-1][:, 1:].tanh())
            else:
                kept[0].tanh_()
            return h

        return Part(run)

    def shift(self):
        right, down, r = self.random.randrange(3), self.random.randrange(3), self.random.random()
        if not right and not down:
            right = 1

        def run(m, h, kept, cond):
            pad = F.pad(h, (right, 0, down, 0))
            moved = pad[:, :, : -down or None, : -right or None]
            if r < 0.3:
                return moved
            if r < 0.5:
                other = pad[:, :, : -down or None, : -right or None]
                other *= 0.5
            return m[0](moved) + h * 0.5 if r < 0.8 else torch.tanh(moved + h)

        return Part(run, self.masked(self.width, self.width))

    def join(self):
        which = self.random.randrange(3)
        w = self.width
        conv = self.masked(2 * w, w, self.random.choice((1, 3)))

        def run(m, h, kept, cond):
            if which == 0:
                return m[0](torch.cat([h, kept[0]], 1))
            if which == 1:
                first, rest = h.split([1, w - 1], dim=1)
                return m[0](torch.cat([rest, kept[-1], first], dim=1))
            return m[0](torch.cat((h, F.elu(-h)), dim=-3))

        return Part(run, conv)

    def norm(self):
        norm = nn.BatchNorm2d(self.width, affine=self.random.random() < 0.7)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 2)
        if self.random.random() < 0.15:
            norm = nn.GroupNorm(1, self.width)
        return Part(lambda m, h, kept, cond: m[0](h), norm)

    def one_by_one(self):
        groups = self.random.choice((1, 2)) if self.width % 2 == 0 else 1
        conv = nn.Conv2d(self.width, self.width, 1, groups=groups, bias=self.random.random() < 0.7)
        return Part(lambda m, h, kept, cond: m[0](h), conv)

    def condition(self):
        if not self.conditional:
            return self.point()
        linear, which = nn.Linear(self.cond_channels, self.width), self.random.randrange(3)
        conv = self.masked(self.width, self.width)

        def run(m, h, kept, cond):
            e = m[0](cond)
            if which == 0:
                e += 0.5
                return h + e[:, :, None, None]
            if which == 1:
                return h * torch.sigmoid(e).unsqueeze(-1).unsqueeze(-1)
            return m[1](h, cond=e)

        return Part(run, linear, conv)

    def wrapped(self):
        which, conv = self.random.randrange(4), self.masked(self.width, self.width)
        if which == 0:
            nn.utils.parametrizations.weight_norm(conv)
        elif which == 1:
            nn.utils.weight_norm(conv)
            with torch.no_grad():
                conv.weight_g.mul_(1.5)
        elif which == 2:
            nn.utils.parametrizations.spectral_norm(conv)
        else:
            prune.l1_unstructured(conv, "weight", amount=0.4)
        return Part(lambda m, h, kept, cond: m[0](h), conv)

    def hooked(self):
        which = self.random.randrange(6)
        layer = nn.ReLU() if which < 3 else self.masked(self.width, self.width)
        inner = nn.Sequential(layer, nn.Tanh())
        if which == 0:
            before = layer.forward
            layer.forward = lambda x: -2 * before(x)
        elif which == 1:
            inner.register_forward_hook(lambda module, inputs, out: out * 2)
        elif which == 2:
            inner.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5,))
        elif which == 3:
            layer.register_forward_hook(lambda module, inputs, out: out * 2)
        elif which == 4:
            before_conv = layer.forward
            layer.forward = lambda x: -2 * before_conv(x)
        else:
            layer.register_forward_hook(lambda module, inputs, out: out.mul_(2))
        return Part(lambda m, h, kept, cond: m[0](h), inner)

    def hidden(self):
        """What no trace sees."""
        self.unseen, which = True, self.random.randrange(3)

        def run(m, h, kept, cond):
            if which == 0:
                return h * 2 if type(h) is torch.Tensor else h
            if which == 1:
                m.count = getattr(m, "count", 0) + 1
                return h * m.count
            return h + 0.3 * torch.randn(h.shape)

        return Part(run)

    def wild(self):
        """What is not causal, or not known."""
        which = self.random.randrange(5)
        later = VerticalStackConv2d(self.width, self.width, 3)

        def run(m, h, kept, cond):
            if which == 0:
                return m[0](h)  # the whole row
            if which == 1:
                return h - h.mean(dim=1, keepdim=True)
            if which == 2:
                return F.pad(h, (0, 1))[..., 1:]
            if which == 3:
                return h if h.sum() > 0 else -h
            return torch.add(h, 1, out=h)

        return Part(run, later)


LIKELY = {
    **{"conv": 5, "point": 4, "residual": 4, "gate": 2, "in_place": 5, "shift": 4, "join": 3, "norm": 2},
    **{"reshaped": 4, "cropped": 3, "joined": 3},
    **{"one_by_one": 1, "condition": 2, "wrapped": 1, "hooked": 1, "hidden": 0.15, "wild": 0.3},
}


def make(seed):
    """The network of a seed."""
    torch.manual_seed(seed)
    maker = Maker(seed)
    r, levels = maker.random, maker.random.choice((2, 3, 4, 5))
    maker.levels = levels
    kind, stem = maker.stem()
    names = r.choices(list(LIKELY), list(LIKELY.values()), k=r.randrange(1, 6))
    parts = [getattr(maker, name)() for name in names]
    outputs = 1 if levels == 2 and r.random() < 0.5 else levels
    head = maker.head(outputs)
    model = Network(stem, parts, [r.random() < 0.5 for _ in parts], head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.7) if parameter.dim() > 1 else parameter.normal_(std=0.4)
    shape = (maker.colours, r.randrange(1, 5), r.randrange(1, 6))
    order = "wavefront" if kind in ("masked", "levels") and r.random() < 0.3 else "raster"
    backend = "reference" if r.random() < 0.2 else "cpu"
    cond = torch.randn(3, maker.cond_channels) if maker.conditional else None
    return Made(model.eval(), shape, levels, order, backend, cond, maker.unseen, [kind, *names])


NAMED = re.compile(r"(model|order|cond|levels|residual) must ")


@torch.no_grad()
def examine(seed):
    """ "same", "rounding", or the error that refuses a network; AssertionError for a wrong image."""
    made = make(seed)
    what = f"seed {seed}, {made.shape}, {made.order}, {made.backend}, {made.parts}"
    options = {"levels": made.levels, "order": made.order, "backend": made.backend}
    try:
        sampler = IncrementalSampler(made.model, made.shape, conditional=made.cond is not None, **options)
        drawn = sampler.sample(3, made.cond, seed=seed)
    except (NotImplementedError, ValueError) as error:
        assert NAMED.match(str(error)), f"{what}: refused without a name: {error}"
        assert made.unseen or "got a forward" not in str(error), f"{what}: only the check found it: {error}"
        return str(error)
    naive = sampler.sample(3, made.cond, seed=seed, method="naive")
    if torch.equal(drawn, naive):
        return "same"
    assert not made.unseen, f"{what}: accepted, and draws otherwise"
    _assert_rounding(made, sampler, drawn, naive, seed, what)
    return "rounding"


def _assert_rounding(made, sampler, drawn, naive, seed, what):
    """The first level of an image that differs must have its uniform number within rounding of the levels' boundary."""
    uniforms = fastelbo.reference.philox_uniform(torch.tensor([seed]), drawn.shape).double()
    exact = copy.deepcopy(sampler.model).double()
    plan = sampler._plan
    logits = [
        sampler._outputs(
            plan, model, sampler.values[naive].to(dtype), None if made.cond is None else made.cond.to(dtype)
        )
        for model, dtype in ((sampler.model, torch.float32), (exact, torch.float64))
    ]
    off = (logits[0] - logits[1]).abs().max() + torch.finfo(torch.float32).eps
    sums = logits[1].softmax(1).cumsum(1)
    for image in range(len(drawn)):
        for step in range(sampler.steps):
            (_, colours, rows, columns) = plan.where(step)
            one, other = (t[image][colours, rows, columns] for t in (drawn, naive))
            if torch.equal(one, other):
                continue
            for c, p in (one != other).nonzero().tolist():
                place = (colours[c, 0], rows[p], columns[p])
                boundaries = sums[image][(slice(None), *place)]
                distance = (boundaries - uniforms[image][place]).abs().min()
                assert distance <= 8 * off, (
                    f"{what}: a wrong image, {distance:.3g} from a boundary (rounding {off:.3g})"
                )
            break  # what comes later depends on this level
