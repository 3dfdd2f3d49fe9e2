"""The incremental sampler against full forwards of the same network."""

import builtins
import copy
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d
from fastelbo.sampling import IncrementalSampler, check

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("reference", "cpu")


@pytest.fixture(params=[*BACKENDS, *(["cuda"] if torch.cuda.is_available() else [])])
def backend(request):
    """Every backend with a sampler, with torch's default device the one that it is for."""
    home = torch.device("cuda" if request.param == "cuda" else "cpu")
    with home, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # networks' own layers count all bits, too
        yield request.param


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
    torch.testing.assert_close(teacher_forced(sampler, images, cond), want, rtol=0, atol=1e-5)
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


@pytest.mark.parametrize("link", ["shift", "mask-first-layer"])
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
@pytest.mark.parametrize("link", ["shift", "mask-first-layer"])
def test_gates_and_conditions(activation, spatial, link, backend):
    model = lively(Gated(activation=activation, cond_channels=5, link=link, dilations=(2,)))
    cond = torch.randn(3, 5, 4, 6) if spatial else torch.randn(3, 5)
    sampler = assert_equals_full_forward(model, (1, 4, 6), backend, cond=cond)
    other = teacher_forced(sampler, torch.zeros(3, 1, 4, 6), cond + 1)
    assert (other - teacher_forced(sampler, torch.zeros(3, 1, 4, 6), cond)).abs().max() > 1e-3


def test_both_kinds_of_condition_on_one_sampler(backend):
    model = lively(Gated(cond_channels=5, dilations=()))
    sampler = IncrementalSampler(model, (1, 3, 4), conditional=True, backend=backend)
    images = torch.randn(2, 1, 3, 4)
    before = sampler.cache_bytes(2)
    for cond in (torch.randn(2, 5), torch.randn(2, 5, 3, 4), torch.randn(2, 5)):
        torch.testing.assert_close(teacher_forced(sampler, images, cond), full(model, images, cond), rtol=0, atol=1e-5)
    assert sampler.cache_bytes(2) > before  # that of the image was given in between


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


def test_float64_runs_on_the_reference_to_fifteen_digits():
    model = lively(Gated().double())
    sampler = IncrementalSampler(model, (1, 4, 5))
    assert sampler.backend == "reference"
    images = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(teacher_forced(sampler, images), full(model, images), rtol=0, atol=1e-13)


@pytest.mark.parametrize("channels", [1, 5, 40])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 13])
def test_an_image_does_not_depend_on_its_batch(channels, n):
    torch.manual_seed(2)
    sampler = IncrementalSampler(lively(Gated(channels=channels, dilations=(1,))), (1, 3, 4), levels=4, backend="cpu")
    images = torch.randint(4, (n, 1, 3, 4))
    together = teacher_forced(sampler, images)
    for i in {0, n // 2, n - 1}:
        assert torch.equal(teacher_forced(sampler, images[i : i + 1])[0], together[i])


def test_a_part_of_a_batch_draws_the_same_images(backend):
    sampler = IncrementalSampler(lively(Gated()), (1, 3, 5), levels=4, backend=backend)
    whole = sampler.sample(7, seed=3)
    assert torch.equal(sampler.sample(4, seed=3, noise_offset=3 * 15), whole[3:])
    assert not torch.equal(sampler.sample(7, seed=4), whole)
    assert whole.unique().tolist() == [0, 1, 2, 3] and whole.unique(dim=0).shape[0] == 7


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
def test_all_methods_draw_the_same_images(colours, temperature):
    model = lively(Gated(colours, channel_groups=colours))
    values = [-1.0, -0.2, 0.4, 1.0]
    images = []
    for backend, method in [*itertools.product(BACKENDS, ["cached"]), ("cpu", "naive"), ("cpu", "fixed_point")]:
        sampler = IncrementalSampler(model, (colours, 4, 5), levels=4, values=values, backend=backend)
        images.append(sampler.sample(4, seed=5, temperature=temperature, method=method))
    assert all(torch.equal(image, images[0]) for image in images)
    assert images[0].unique().numel() > 1


def test_seed_generator_and_default_generator():
    sampler = IncrementalSampler(lively(Gated(dilations=())), (1, 4, 4), levels=4)
    draws = [sampler.sample(2, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(2), draws[0]) and not torch.equal(sampler.sample(2), draws[0])
    assert torch.equal(sampler.sample(2, seed=torch.tensor(6)), sampler.sample(2, seed=6))


def test_draws_follow_the_probabilities():
    model = lively(nn.Sequential(MaskedConv2d(1, 2, 3, mask_type="A")), 3)
    sampler = IncrementalSampler(model, (1, 2, 2), levels=2, backend="cpu")
    drawn = sampler.sample(4000, seed=0)
    images = torch.tensor(list(itertools.product(range(2), repeat=4))).reshape(-1, 1, 2, 2)
    log_p = model(images.float()).log_softmax(1).gather(1, images).sum((1, 2, 3))
    expected = 4000 * log_p.exp()
    observed = torch.stack([(drawn == image).flatten(1).all(1).sum() for image in images])
    assert ((observed - expected) ** 2 / expected).sum() < 37.7  # the 0.999 quantile at 15 degrees of freedom


@pytest.mark.parametrize("method", ["cached", "naive", "fixed_point"])
def test_completion_keeps_known_pixels_and_conditions_on_them(method, backend):
    sampler = IncrementalSampler(lively(Gated(levels=5), 3), (1, 6, 4), levels=5, backend=backend)
    init = torch.randint(5, (3, 1, 6, 4))
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[:3], mask[4, 1] = True, True
    odd = torch.where(mask, init, 99).transpose(2, 3).contiguous().transpose(2, 3)  # strides do not matter
    done = sampler.sample(3, seed=1, init=odd, mask=mask, method=method)
    assert torch.equal(done[..., mask], init[..., mask])
    other = sampler.sample(3, seed=1, init=(init + 1) % 5, mask=mask, method=method)
    assert not torch.equal(done[..., ~mask], other[..., ~mask])
    # what was drawn given the known pixels is what is drawn again with more of them known
    mask[3] = True
    assert torch.equal(sampler.sample(3, seed=1, init=done, mask=mask, method=method), done)


def test_unknown_pixels_are_drawn_as_an_entropy_coder_would(backend):
    sampler = IncrementalSampler(lively(Gated(3, channel_groups=3)), (3, 3, 4), levels=4, backend=backend)
    image = sampler.sample(2, seed=9)
    uniforms = fastelbo.reference.philox_uniform(torch.tensor([9]), image.shape)
    assert sampler.steps == 36 and sampler.stages == [[0], [1], [2]]
    sampler.reset(2)
    for _ in range(sampler.steps):
        logits, ((row, column),), (colour,) = sampler.step(), sampler.pixels, sampler.colours
        assert torch.equal(sampler.step(), logits) and logits.shape == (2, 4, 1, 1)
        sums = logits[:, :, 0, 0].double().softmax(1).cumsum(1)
        level = (sums <= uniforms[:, colour, row, column, None]).sum(1)
        assert torch.equal(level, image[:, colour, row, column])
        sampler.commit(level[:, None, None])
    with pytest.raises(RuntimeError, match="all 36 steps are done"):
        sampler.step()


def test_uniforms_are_the_words_of_the_noise():
    torch.manual_seed(0)
    seed = torch.tensor([123456789012345])
    uniforms = fastelbo.reference.philox_uniform(seed, (3, 7))
    assert torch.equal(fastelbo.reference.philox_uniform(seed, (2, 7), noise_offset=7), uniforms[1:])
    normals = fastelbo.reference.philox_normal(seed, (20,)).reshape(5, 4)
    u = uniforms.flatten()[:20].double().reshape(5, 4)
    radius = (-2 * u[:, 0].log()).sqrt()
    torch.testing.assert_close((radius * (2 * torch.pi * u[:, 1]).cos()).float(), normals[:, 0])


def context_model(k, channels=6):
    layers = (nn.Conv2d(12, 20, 1), nn.LeakyReLU(), nn.Conv2d(20, 2 * channels, 1))
    return lively(nn.Sequential(MaskedConv2d(channels, 12, k, mask_type="A"), *layers))


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("rows, columns", [(7, 5), (3, 9), (9, 1), (1, 4)])
def test_wavefront_is_exact_in_fewer_steps(k, rows, columns, backend):
    if k == 1:
        model = nn.Sequential(HorizontalStackConv2d(6, 12, 5, mask_type="A"), nn.ReLU(), nn.Conv2d(12, 12, 1))
        model, lag = lively(model), 0
    else:
        model, lag = context_model(k), min(k // 2 + 1, columns)
    images = torch.randn(2, 6, rows, columns)
    sampler = IncrementalSampler(model, (6, rows, columns), order="wavefront", backend=backend)
    assert sampler.steps == columns + lag * (rows - 1) and sampler.stages == [list(range(6))]
    torch.testing.assert_close(teacher_forced(sampler, images), full(model, images), rtol=0, atol=1e-5)


def test_wavefront_of_deep_networks_draws_the_same_images(backend):
    convs = (
        MaskedConv2d(3, 9, 5, mask_type="A", channel_groups=3),
        MaskedConv2d(9, 9, 3, channel_groups=3, mask_type="B"),
    )
    model = lively(nn.Sequential(*convs, nn.ReLU(), MaskedConv2d(9, 12, 1, mask_type="B", channel_groups=3)))
    draws = [
        IncrementalSampler(model, (3, 6, 7), levels=4, order=order, backend=backend).sample(3, seed=2)
        for order in ("raster", "wavefront")
    ]
    assert torch.equal(*draws)


def test_memory_of_the_caches(backend):
    model = nn.Sequential(MaskedConv2d(1, 20, 5, mask_type="A"), nn.ReLU(), MaskedConv2d(20, 4, 3, mask_type="B"))
    sampler = IncrementalSampler(model, (1, 8, 10), levels=4, backend=backend)
    # image 16 wide, two columns to each side, three rows; the conv's 32 for a pixel; the relu's a column to each side,
    # two rows; the logits' 16 for a pixel; and up to three panels of 16 at the end
    caches = 16 * (2 + 10 + 2) * 3 + 32 + 32 * (1 + 10 + 1) * 2 + 16
    assert 4 * caches <= sampler.cache_bytes() <= 4 * (caches + 48)
    assert sampler.cache_bytes(5) == 5 * sampler.cache_bytes()
    sampler.reset(5)
    assert sampler._run.workspace.numel() * 4 == sampler.cache_bytes(5)


def test_the_rows_of_long_images_are_not_kept():
    model = lively(Gated(dilations=(2,)))
    sizes = [IncrementalSampler(model, (1, rows, 6)).cache_bytes() for rows in (8, 80)]
    assert sizes[0] == sizes[1]


def test_isas_agree(tmp_path):
    import os
    import subprocess
    import sys

    script = (
        "import sys, torch, fastelbo; from fastelbo.sampling import IncrementalSampler; torch.manual_seed(0); "
        "from fastelbo.nn import GatedMaskedConv2d as G\n"
        "class M(torch.nn.Module):\n"
        "    def __init__(s):\n"
        "        super().__init__(); s.g = G(1, 20, 3, mask_type='A'); s.o = torch.nn.Conv2d(20, 9, 1)\n"
        "    def forward(s, x): return s.o(s.g(x, x)[1])\n"
        "s = IncrementalSampler(M(), (1, 5, 6), levels=9, backend='cpu')\n"
        "print(s.sample(8, seed=1).flatten().tolist())"
    )
    found = set()
    for isa in ("portable", "avx512"):  # which takes the best there is
        run = [sys.executable, "-c", script]
        done = subprocess.run(run, env={**os.environ, "FASTELBO_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1


def test_progress_is_shown_if_tqdm_is_there(monkeypatch, capsys):
    sampler = IncrementalSampler(lively(Gated(dilations=())), (1, 3, 3), levels=4)
    sampler.sample(1, progress=True)
    assert "sampling" in "".join(capsys.readouterr())
    real = builtins.__import__

    def without_tqdm(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    sampler.sample(1)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        sampler.sample(1, progress=True)


def test_training_afterwards_does_not_show():
    model = lively(Gated(dilations=()))
    sampler = IncrementalSampler(model, (1, 4, 4), levels=4)
    before = [sampler.sample(2, seed=0, method=method) for method in ("cached", "naive")]
    lively(model, 5)
    assert all(
        torch.equal(sampler.sample(2, seed=0, method=m), b) for m, b in zip(("cached", "naive"), before, strict=True)
    )


# Bad input

FIRST = {"mask_type": "A"}


class Wild(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = MaskedConv2d(1, 4, 3, mask_type="A"), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "model, expected",
    [
        (
            nn.Sequential(MaskedConv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)),
            r"got 1, Conv2d\(4, 4.*use fastelbo.nn.M",
        ),
        (nn.Sequential(MaskedConv2d(1, 4, 3), nn.GroupNorm(2, 4)), r"got 1, GroupNorm.*not known together"),
        (nn.Sequential(MaskedConv2d(1, 4, 3), nn.Softmax(1)), r"got 1, Softmax.*build the network of the layers of"),
        (Wild(lambda x: x.mean(1, keepdim=True)), "got Tensor.mean"),
        (Wild(lambda x: x.flip(3)), "got Tensor.flip"),
        (Wild(lambda x: x[:, :, 1:]), "got indexing"),
        (Wild(lambda x: F.pad(x, (0, 0, 1, 0))), "logits that depends on its input|got Padded"),
        (Wild(lambda x: F.pad(x, (0, 1, 0, 0))[..., 1:]), "got pad other than"),
        (Wild(lambda x: F.conv2d(x, x)), "got conv2d: use fastelbo.nn.MaskedConv2d"),
        (Wild(lambda x: torch.cat([x, x], 2)), "got cat along another"),
        (Wild(lambda x: x.view(x.shape)), "got Tensor.shape"),
        (Wild(lambda x: F.dropout(x)), "got dropout while training"),
        (Wild(lambda x: x if x.sum() > 0 else -x), "got Tensor.sum|control flow"),
        (Wild(lambda x: x + torch.cat([x, x], 1)), "got add of features with 4 and 8 channels"),
    ],
)
def test_an_unknown_layer_is_named(model, expected):
    with pytest.raises((NotImplementedError, ValueError), match=f"(?s)model must.*({expected})"):
        IncrementalSampler(model, (1, 4, 4))


def test_hooks_and_overridden_forwards_are_refused():
    model = nn.Sequential(MaskedConv2d(1, 4, 3))
    model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(NotImplementedError, match="got 0, MaskedConv2d.* with forward hooks: remove them"):
        IncrementalSampler(model, (1, 4, 4))

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(NotImplementedError, match="got conv2d: use fastelbo.nn.MaskedConv2d"):
        IncrementalSampler(nn.Sequential(MaskedConv2d(1, 4, 3), Doubled(4, 4, 1)), (1, 4, 4))

    class Functional(nn.Module):
        def forward(self, x):
            return fastelbo.masked_conv2d(x, torch.ones(4, 1, 3, 3), mask_type="A")

    with pytest.raises(NotImplementedError, match="got a forward that torch.fx cannot follow"):
        IncrementalSampler(Functional(), (1, 4, 4))


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
        (nn.Sequential(MaskedConv2d(2, 4, 3)), 1, "got 1 channels"),
    ],
)
def test_a_network_that_is_not_causal_is_refused(model, colours, expected):
    with pytest.raises(ValueError, match=f"model must.*{expected}"):
        IncrementalSampler(model, (colours, 4, 4))


@pytest.fixture
def sampler():
    return IncrementalSampler(Gated(dilations=()), (1, 4, 5), levels=4)


@pytest.mark.parametrize(
    "options, error, expected",
    [
        ({"levels": 5}, ValueError, "levels must be 4: the model has 4 outputs for 1 colour"),
        ({"values": [0, 1, 2]}, ValueError, "values must come with levels"),
        ({"levels": 4, "values": [0, 1, 2]}, ValueError, "values must be one number for each of 4 levels; got shape"),
        ({"order": "spiral"}, ValueError, "order must be one of raster, wavefront; got 'spiral'"),
        ({"order": "wavefront"}, ValueError, "order must be raster for a network whose features depend on whole rows"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, NotImplementedError, "backend 'triton' cannot run this sampler"),
        ({"conditional": True, "levels": 4}, ValueError, "cond must not be given: cond_channels decides"),
    ],
)
def test_bad_options(options, error, expected):
    with pytest.raises(error, match=expected):
        IncrementalSampler(Gated(dilations=()), (1, 4, 5), **options)


def test_bad_models_and_shapes():
    with pytest.raises(TypeError, match="model must be a module; got function"):
        IncrementalSampler(lambda x: x, (1, 4, 4))
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), all at least 1; got \(4, 4\)"):
        IncrementalSampler(Gated(), (4, 4))
    with pytest.raises(ValueError, match="model must take an image and a condition"):
        IncrementalSampler(nn.Sequential(), (1, 4, 4), conditional=True)
    with pytest.raises(NotImplementedError, match="cpu: it computes in float32, and the model is in torch.float64"):
        IncrementalSampler(Gated().double(), (1, 4, 4), backend="cpu")


MASK = torch.ones(2, 1, 4, 5, dtype=torch.bool)
INIT = torch.zeros(2, 1, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "options, error, expected",
    [
        ({"n": 0}, ValueError, "n must be at least 1; got 0"),
        ({"n": 2.0}, TypeError, "n must be an int; got float"),
        ({"method": "fast"}, ValueError, "method must be one of cached, naive, fixed_point; got 'fast'"),
        ({"temperature": -1}, ValueError, "temperature must be finite and at least 0; got -1"),
        ({"temperature": "1"}, TypeError, "temperature must be a number; got str"),
        ({"noise_offset": -1}, ValueError, "noise_offset must be at least 0; got -1"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator must not both be given"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"cond": torch.zeros(2, 3)}, ValueError, "cond must not be given: conditional=False"),
        ({"init": INIT}, ValueError, "init and mask must both be given, or neither; got no mask"),
        ({"mask": MASK}, ValueError, "init and mask must both be given, or neither; got no init"),
        ({"init": INIT.float(), "mask": MASK}, TypeError, "init must be a tensor of integers; got torch.float32"),
        ({"init": INIT[:1], "mask": MASK}, ValueError, r"init must be of shape \(2, 1, 4, 5\); got \(1, 1, 4, 5\)"),
        ({"init": INIT, "mask": MASK.int()}, TypeError, "mask must be a tensor of bool; got torch.int32"),
        ({"init": INIT, "mask": MASK[..., :3]}, ValueError, r"mask must broadcast to shape \(2, 1, 4, 5\); got"),
        ({"init": INIT + 4, "mask": MASK}, ValueError, "init must be between 0 and 3 where mask is True"),
    ],
)
def test_bad_arguments_of_sample(sampler, options, error, expected):
    with pytest.raises(error, match=expected):
        sampler.sample(**{"n": 2, **options})


@pytest.mark.parametrize(
    "cond, error, expected",
    [
        (None, ValueError, "cond must be given: conditional=True"),
        ([1], TypeError, "cond must be a tensor; got list"),
        (torch.zeros(3, 5), ValueError, r"cond must be of 2 images; got shape \(3, 5\)"),
        (torch.zeros(2, 4), ValueError, r"cond must be what the model takes; got shape \(2, 4\)"),
        (torch.zeros(2, 5, 3, 4), ValueError, "cond must lead to features of 4 x 5 pixels or of one; got 3 x 4"),
    ],
)
def test_bad_conditions(cond, error, expected):
    sampler = IncrementalSampler(Gated(cond_channels=5), (1, 4, 5), levels=4, conditional=True)
    with pytest.raises(error, match=expected):
        sampler.sample(2, cond)


def test_step_and_commit_in_the_wrong_order_or_shape(sampler):
    with pytest.raises(RuntimeError, match="step and commit must follow reset"):
        sampler.step()
    sampler.reset(2)
    level = torch.zeros(2, 1, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="commit must follow a step"):
        sampler.commit(level)
    sampler.step()
    with pytest.raises(ValueError, match=r"values must be of shape \(2, 1, 1\); got \(2, 1\)"):
        sampler.commit(level[:, 0])
    with pytest.raises(TypeError, match="values must be integers, levels; got torch.float32"):
        sampler.commit(level.float())
    with pytest.raises(ValueError, match="values must be between 0 and 3"):
        sampler.commit(level + 4)


def test_outputs_without_levels_are_not_sampled():
    sampler = IncrementalSampler(Gated(), (1, 4, 5))
    with pytest.raises(ValueError, match="levels must be given to sample"):
        sampler.sample(1)


@pytest.mark.parametrize("method", ["cached", "naive", "fixed_point"])
def test_logits_that_are_not_numbers_are_refused(method, backend):
    model = nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A"))
    nn.init.constant_(model[0].bias, float("nan"))
    with pytest.raises(ValueError, match="got NaN or infinity"):
        IncrementalSampler(model, (1, 3, 3), levels=4, backend=backend).sample(2, method=method)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_logits_that_are_no_numbers_are_an_error(temperature, method, backend):
    model = lively(Gated())
    with torch.no_grad():
        model.last.bias[2] = float("nan")
    sampler = IncrementalSampler(model, (1, 3, 4), levels=4, backend=backend)
    with pytest.raises(ValueError, match="model must return logits that make a distribution"):
        sampler.sample(2, seed=0, temperature=temperature, method=method)


# Where a trace sees less than Python does


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
    if order == "wavefront" and (layer is VerticalStackConv2d or len(pad) > 2):
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


def test_a_forward_of_an_instance_is_followed(backend):
    model = lively(nn.Sequential(MaskedConv2d(1, 8, 3, mask_type="A"), nn.ReLU(), nn.Conv2d(8, 4, 1)), 3)
    plain = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend).sample(4, seed=0)
    before = model[1].forward
    model[1].forward = lambda x: -5 * before(x)
    sampler = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert not torch.equal(sampler.sample(4, seed=0), plain)
    first = model[0].forward
    model[0].forward = lambda x: -5 * first(x)
    with pytest.raises(NotImplementedError, match="got 0, MaskedConv2d.* with a forward of its own"):
        IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)


@pytest.mark.parametrize("inner", ["vertical", "horizontal", "link", "out"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "subclass"])
def test_the_insides_of_a_block_are_looked_at(inner, how):
    model = lively(Gated(dilations=()))
    part = getattr(model.first, inner)
    if how == "hook":
        part.register_forward_hook(lambda module, inputs, out: 2 * out)
    elif how == "pre-hook":
        part.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:]))
    elif how == "forward":
        before = part.forward
        part.forward = lambda *args, **kwargs: 2 * before(*args, **kwargs)
    else:
        part.__class__ = type("Twice", (type(part),), {"forward": lambda self, x, **more: 2 * type(part)(self, x)})
    cause = "with forward hooks" if "hook" in how else "with a forward of its own|conv2d|torch.fx cannot follow"
    with pytest.raises(NotImplementedError, match=f"model must be made of layers that the sampler knows.*({cause})"):
        IncrementalSampler(model, (1, 4, 5), levels=4)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda h: torch.add(h, 1, out=h), "add with out="),
        (lambda h: h.zero_() + 1, "Tensor.zero_"),
        (lambda h: h[:, :1].fill_(1) + h, "Tensor.fill_"),
        (lambda h: setattr(h, "data", h * 2) or h, "sets Tensor.data"),
        (lambda h: h[:, :4].contiguous().mul_(2).tanh() + h[:, 4:], "Tensor.mul_ in place on what Tensor.contiguous"),
        (
            lambda h: (s := F.pad(h, (1, 0))[..., :-1]).add_(1).contiguous().mul_(2) + s,
            "Tensor.mul_ in place on what Tensor.contiguous",
        ),
        (lambda h: h.__setitem__((slice(None), slice(0, 1)), 0.0) or h, "set to a constant"),
        (lambda h: F.pad(h, (1, 0)).relu_()[..., :-1], "pad without the slice"),
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
    with pytest.raises(NotImplementedError, match="got 1, Always.* that trains in evaluation mode"):
        IncrementalSampler(model, (1, 4, 5), levels=4)


def test_a_convolution_without_live_inputs(backend):
    model = lively(nn.Sequential(MaskedConv2d(1, 6, 1, mask_type="A"), nn.Tanh(), MaskedConv2d(6, 4, 1, mask_type="B")))
    assert_draws_as_the_naive_loop(model, (1, 2, 3), backend)


class Scaled(Between):
    """A network whose forward does what its trace does not show."""

    def __init__(self, scale):
        super().__init__(None)
        self.scale = scale
        self.register_buffer("buffer", torch.ones(1))

    def forward(self, x):
        return self.b(self.scale(self, self.a(x)))


def _counted(self, h):
    self.count = getattr(self, "count", 0) + 1
    return h * self.count


def _autocast(self, h):
    with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16):
        return torch.cat([self.b(h), self.b(h)], 1).float()


def _buffered(self, h):
    self.buffer.add_(1)
    return h * self.buffer


UNSEEN = {
    "buffer": _buffered,
    "type": lambda self, h: h * 2 if isinstance(h, torch.Tensor) else h,
    "count": _counted,
    "autocast": _autocast,
    "noise": lambda self, h: h + torch.randn(1, device=next(self.parameters()).device),
    "slight": lambda self, h: h * 1.001 if isinstance(h, torch.Tensor) else h,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_trace_sees_is_found_before_a_draw(name, backend):
    model = lively(Scaled(UNSEEN[name]))
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    expected = (
        r"model must compute what its layers' steps show; got a forward whose logits differ .* by up to \S+ \(row \d, "
        r'column \d, colour 0, output \d\), where rounding explains \S+: .*method="naive" draws by the network itself'
    )
    if name in ("buffer", "count", "noise"):
        expected = r'model must compute the same at each call; got a forward .* differ by .*method="naive" draws'
    for draw in (lambda: sampler.sample(2, seed=0), lambda: sampler.reset(2)):
        with pytest.raises(NotImplementedError, match=expected):
            draw()
    assert sampler.sample(2, seed=0, method="naive").shape == (2, 1, 4, 5)
    unchecked = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend, check=False)
    assert unchecked.sample(2, seed=0).shape == (2, 1, 4, 5)
    unchecked.reset(2).step()


@pytest.mark.parametrize(
    "scale",
    [
        lambda self, h: h if torch.is_grad_enabled() else h * 2,
        lambda self, h: h if self.training else h * 2,
        lambda self, h: _Doubled.apply(h),
    ],
)
def test_what_a_trace_sees_in_a_draws_own_state(scale, backend):
    with torch.no_grad():
        assert_draws_as_the_naive_loop(lively(Scaled(scale), 3), (1, 4, 5), backend)
    with torch.enable_grad():
        assert_draws_as_the_naive_loop(lively(Scaled(scale), 3), (1, 4, 5), backend)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2


def test_hooks_of_all_modules_are_found(backend):
    from torch.nn.modules.module import register_module_forward_hook

    model = lively(Gated(dilations=()))
    handle = register_module_forward_hook(
        lambda module, inputs, out: 2 * out if isinstance(module, MaskedConv2d) else None
    )
    try:
        with pytest.raises(NotImplementedError, match="got a forward whose logits differ"):
            IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend).sample(1, seed=0)
    finally:
        handle.remove()


def test_the_check_takes_the_condition_and_each_of_its_kinds(backend):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Gated(cond_channels=5, dilations=())

        def forward(self, x, cond):
            logits = self.net(x, cond)
            return logits * 2 if isinstance(cond, torch.Tensor) and cond.dim() == 4 else logits

    sampler = IncrementalSampler(lively(Odd()), (1, 3, 4), levels=4, conditional=True, backend=backend)
    assert torch.equal(*(sampler.sample(3, torch.ones(3, 5), seed=0, method=m) for m in ("cached", "naive")))
    with pytest.raises(NotImplementedError, match="got a forward whose logits differ"):
        sampler.sample(3, torch.ones(3, 5, 3, 4), seed=0)


def test_the_check_runs_once_and_disturbs_nothing(backend, monkeypatch):
    model = lively(Gated())
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    runs = []
    monkeypatch.setattr(check, "compare", lambda *given, own=check.compare: runs.append(own(*given)))
    torch.manual_seed(1)
    first = sampler.sample(2)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(2), first) and torch.equal(torch.get_rng_state(), state)
    sampler.reset(2).step()
    assert len(runs) == 1
    with pytest.raises(TypeError, match="check must be a bool; got int"):
        IncrementalSampler(model, (1, 4, 5), check=1)


WRONG = [("cpu", torch.float64), ("cuda", torch.float64)]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_alone_fails_no_check(scale, shape, dtype, backend):
    if (backend, dtype) in WRONG:
        return
    for seed in range(3):
        torch.manual_seed(seed)
        for model in (Gated(), nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A")), Gated(k=7)):
            model = lively(model, 3).to(dtype)
            values = torch.randn(4) * scale
            IncrementalSampler(model, shape, levels=4, values=values, backend=backend).sample(1, seed=0)


def test_logits_of_minus_infinity_pass_the_check(backend):
    model = lively(Gated(dilations=()))
    with torch.no_grad():
        model.last.bias[2] = -float("inf")
    sampler = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert not (sampler.sample(4, seed=0) == 2).any()


class Conditioned(nn.Module):
    """A network with library layers on its condition, whose sums depend on the batch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(300, 257), nn.Tanh(), nn.Linear(257, 24))
        self.net = Gated(channels=40, cond_channels=24, dilations=(1,))

    def forward(self, x, cond):
        return self.net(x, self.embed(cond))


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_same_bits_in_any_batch_and_on_any_threads(dtype, conditional, backend):
    if (backend, dtype) in WRONG:
        return
    model = lively(Conditioned() if conditional else Gated(channels=40, dilations=(1,))).to(dtype)
    images = torch.randint(4, (16, 1, 3, 9))
    cond = torch.randn(16, 300, dtype=dtype) if conditional else None
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for n in (1, 3, 16):
                sampler = IncrementalSampler(model, (1, 3, 9), levels=4, conditional=conditional, backend=backend)
                of_these = None if cond is None else cond[:n]
                found[threads, n] = teacher_forced(sampler, images[:n], of_these)
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    whole = found[1, 16]
    assert whole.unique().numel() > 100
    for (_, n), logits in found.items():
        assert torch.equal(logits, whole[:n])


# Two levels from one output


@pytest.mark.parametrize("colours", [1, 3])
def test_one_output_makes_two_levels(colours, backend):
    model = lively(Gated(colours, levels=1, channel_groups=colours), 3)
    two = lively(Gated(colours, levels=2, channel_groups=colours), 3)
    two.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("last")}, strict=False)
    with torch.no_grad():
        two.last.weight.zero_()[colours:] = model.last.weight
        two.last.bias.zero_()[colours:] = model.last.bias
    one = assert_draws_as_the_naive_loop(model, (colours, 5, 6), backend, levels=2)
    drawn = one.sample(4, seed=0)
    for method in ("cached", "naive", "fixed_point"):
        other = IncrementalSampler(two, (colours, 5, 6), levels=2, backend=backend)
        assert torch.equal(one.sample(4, seed=0, method=method), drawn)
        assert torch.equal(other.sample(4, seed=0, method=method), drawn)
    logits = teacher_forced(one, drawn)
    torch.testing.assert_close(logits[:, 1], model(drawn.float()), rtol=0, atol=1e-5)
    assert (logits[:, 0] == 0).all() and logits.shape[1] == 2
    raw = IncrementalSampler(model, (colours, 5, 6), backend=backend)
    torch.testing.assert_close(teacher_forced(raw, drawn.float())[:, 0], logits[:, 1], rtol=0, atol=1e-5)


def test_one_output_draws_ones_with_the_sigmoid_of_its_logit(backend):
    model = nn.Sequential(MaskedConv2d(1, 1, 3, mask_type="A"))
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 0.7)
    drawn = IncrementalSampler(model, (1, 4, 5), levels=2, backend=backend).sample(500, seed=0)
    uniforms = fastelbo.reference.philox_uniform(torch.tensor([0]), drawn.shape)
    assert torch.equal(drawn, (uniforms.double() >= torch.sigmoid(torch.tensor(-0.7).double())).long())


@pytest.mark.parametrize(
    "levels, error, expected",
    [
        (1, ValueError, "levels must be at least 2 .*one output for each colour has 2.*; got 1"),
        (0, ValueError, "levels must be at least 2"),
        (3, ValueError, "levels must be 2: the model has 1 outputs for 1 colour.*; got 3"),
        (2.0, TypeError, "levels must be an int or None; got float"),
        (True, TypeError, "levels must be an int or None; got bool"),
    ],
)
def test_levels_of_one_output(levels, error, expected):
    with pytest.raises(error, match=expected):
        IncrementalSampler(Gated(levels=1), (1, 4, 4), levels=levels)


# Defaults of others, and input that is none


@pytest.mark.parametrize("how", ["context", "set", "dtype", "both"])
@pytest.mark.parametrize("conditional", [False, True])
def test_default_device_and_dtype_do_not_matter(how, conditional, backend):
    model = lively(Conditioned() if conditional else Stacks(), 1.5)
    model = model if conditional else Unlabelled(model)
    cond = torch.randn(2, 300) if conditional else None

    def everything():
        options = {"conditional": conditional, "backend": backend}
        found = []
        sampler = IncrementalSampler(model, (1, 5, 7), levels=levels, **options)
        for method in ("cached", "naive", "fixed_point"):
            found.append(sampler.sample(2, cond, seed=0, method=method))
        half = torch.arange(5, device="cpu")[:, None] < 3
        found.append(sampler.sample(2, cond, seed=1, init=found[0], mask=half, temperature=0.7))
        sampler.reset(2, cond)
        for _ in range(9):
            found.append(sampler.step())
            sampler.commit(found[0][:, sampler.colours, 0, :2][..., :1])
        free = IncrementalSampler(model, (1, 5, 7), **options)
        free.reset(2, cond)
        found.append(free.step())
        torch.manual_seed(0)
        found.append(sampler.sample(2, cond))
        return [sampler.cache_bytes(), sampler.steps, *found]

    levels = 4 if conditional else 6
    before = everything()
    dtype = torch.get_default_dtype()
    try:
        if how == "context":
            with torch.device("meta"):
                after = everything()
        else:
            if how != "dtype":
                torch.set_default_device("meta")
            if how != "set":
                torch.set_default_dtype(torch.float64)
            after = everything()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    for own, other in zip(before, after, strict=True):
        if isinstance(own, torch.Tensor):
            assert own.device == other.device and own.dtype == other.dtype and torch.equal(own, other)
        else:
            assert own == other


class Unlabelled(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("label", torch.tensor([3]))

    def forward(self, x):
        return self.model(x, self.label)


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


@pytest.mark.parametrize("shape", [5, None, 1.5, torch.tensor(3)])
def test_an_image_shape_that_is_no_shape(shape):
    with pytest.raises(TypeError, match=r"image_shape must be \(C, H, W\), all at least 1; got"):
        IncrementalSampler(Gated(), shape)


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -float("inf"), -0.5])
@pytest.mark.parametrize("method", ["cached", "naive", "fixed_point"])
def test_temperatures_that_are_none(sampler, temperature, method):
    rule = "finite and at least 0" if temperature == -0.5 else "finite"
    with pytest.raises(ValueError, match=f"temperature must be {rule}; got"):
        sampler.sample(1, temperature=temperature, method=method)


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "prune"])
def test_hooks_that_set_a_weight_are_done_with(kind, backend):
    model = lively(Gated(dilations=()), 3)
    if kind == "prune":
        nn.utils.prune.random_unstructured(model.first.horizontal, "weight", amount=0.5)
        nn.utils.prune.l1_unstructured(model.last, "weight", amount=0.3)
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


class Narrow(Gated):
    """Runs its last layer in half precision, where it is not in float64."""

    def forward(self, x):
        _, h = self.first(x, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.last(h).float()


def test_a_forward_that_narrows_float32_alone_is_found(backend):
    """In float64 it computes what its steps do."""
    model = lively(Narrow(dilations=(), last=nn.Conv2d(12, 4, 1)))
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    with pytest.raises(NotImplementedError, match="model must compute what its layers' steps show"):
        sampler.sample(2, seed=0)


def test_settings_of_precision_come_back():
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    IncrementalSampler(lively(Gated()), (1, 4, 5), levels=4).sample(1)
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before


@pytest.mark.parametrize("order", ["raster", "wavefront"])
def test_large_images_are_checked_in_their_first_rows(order, backend, monkeypatch):
    seen = []
    compare = check.compare
    monkeypatch.setattr(check, "compare", lambda plan, *given: seen.append(plan.image_shape) or compare(plan, *given))
    monkeypatch.setattr(check, "SEEN", 40)
    model = lively(nn.Sequential(MaskedConv2d(1, 6, 5, mask_type="A"), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    sampler = IncrementalSampler(model, (1, 30, 7), levels=4, backend=backend, order=order)
    assert torch.equal(sampler.sample(2, seed=0), sampler.sample(2, seed=0, method="naive"))
    assert seen == [(1, 6, 7)] and sampler.image_shape == (1, 30, 7)
    wrong = lively(Wild(lambda x: 2 * x if isinstance(x, torch.Tensor) else x))
    with pytest.raises(NotImplementedError, match="model must compute"):
        IncrementalSampler(wrong, (1, 30, 7), levels=4, backend=backend).sample(1)


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0])
def test_zero_has_two_signs(temperature, backend):
    sampler = IncrementalSampler(lively(Gated()), (1, 4, 5), levels=4, backend=backend)
    drawn = sampler.sample(2, temperature=temperature)
    assert torch.equal(drawn, sampler.sample(2, temperature=0, method="naive"))


def test_a_size_of_the_condition_is_a_number(backend):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = MaskedConv2d(1, 4, 3, mask_type="A")

        def forward(self, x, cond):
            return self.a(x) * cond.shape[1]

    assert_equals_full_forward(lively(Sized()), (1, 3, 4), backend, cond=torch.randn(3, 5))


def test_operands_and_shapes_of_other_types_are_named():
    with pytest.raises(NotImplementedError, match="model must.*got add of features and NoneType"):
        IncrementalSampler(Wild(lambda x: x + None), (1, 4, 4))
    with pytest.raises(ValueError, match=r"image_shape must be \(C, H, W\), all at least 1; got \(True, 4, 4\)"):
        IncrementalSampler(Gated(), (True, 4, 4))
