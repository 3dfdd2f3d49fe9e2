"""What the incremental sampler draws, and what it is given, against full forwards of the same network."""

import builtins
import itertools

import fresh_python
import pytest
import torch
from sampling_networks import (
    BACKENDS,
    SAMPLERS,
    WRONG,
    Gated,
    Stacks,
    assert_draws_as_the_naive_loop,
    at_home,
    full,
    lively,
    teacher_forced,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo
from fastelbo.nn import HorizontalStackConv2d, MaskedConv2d
from fastelbo.sampling import IncrementalSampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SAMPLERS)
def backend(request):
    with at_home(request.param):
        yield request.param


def test_both_kinds_of_condition_on_one_sampler(backend):
    model = lively(Gated(cond_channels=5, dilations=()))
    sampler = IncrementalSampler(model, (1, 3, 4), conditional=True, backend=backend)
    images = torch.randn(2, 1, 3, 4)
    before = sampler.cache_bytes(2)
    for cond in (torch.randn(2, 5), torch.randn(2, 5, 3, 4), torch.randn(2, 5)):
        torch.testing.assert_close(teacher_forced(sampler, images, cond), full(model, images, cond), rtol=0, atol=1e-5)
    assert sampler.cache_bytes(2) > before  # that of the image was given in between


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


def test_isas_agree():
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
        found.add(fresh_python.run(script, FASTELBO_CPU_ISA=isa).stdout)
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
        (torch.zeros(2, 5, 3, 4), ValueError, r"cond must be what the model takes; got shape \(2, 5, 3, 4\)"),
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


def test_equal_conditions_are_computed_once(backend):
    """Those that are equal bit by bit: 0 and -0 are two."""
    if (backend, torch.float32) in WRONG:
        return

    class Tanhs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.tanh.default
            return func(*args, **(kwargs or {}))

    sampler = IncrementalSampler(lively(Conditioned()), (1, 3, 9), levels=4, conditional=True, backend=backend)
    three, which = torch.stack((torch.randn(300), torch.zeros(300), -torch.zeros(300))), [2, 0, 1, 0, 2, 0]
    sampler.reset(1, three[:1])
    for cond in (three, three[which], three[:1].expand(5, 300), three.T.contiguous().T):
        tanhs = Tanhs()
        tanhs.count = 0
        with tanhs:
            sampler.reset(len(cond), cond)
        assert tanhs.count == (1 if len(cond) == 5 else 3)
    images = torch.randint(4, (3, 1, 3, 9))
    expected = teacher_forced(sampler, images, three)
    assert torch.equal(teacher_forced(sampler, images[which], three[which]), expected[which])


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


RARER = [pytest.param(*both, marks=pytest.mark.slow) for both in (("context", True), ("set", False), ("dtype", True))]


@pytest.mark.parametrize(
    "how, conditional",
    [("context", False), ("set", True), ("dtype", False), ("both", False), ("both", True), *RARER],
)
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


@pytest.mark.parametrize("temperature", [0, 0.0, -0.0])
def test_zero_has_two_signs(temperature, backend):
    sampler = IncrementalSampler(lively(Gated()), (1, 4, 5), levels=4, backend=backend)
    drawn = sampler.sample(2, temperature=temperature)
    assert torch.equal(drawn, sampler.sample(2, temperature=0, method="naive"))
