"""Drop-ins against the originals where the package index has them, and against float64 formulas."""

import copy
import functools
import importlib
import inspect
import math
import re
import sys
import types

import diffusers
import fresh_python
import originals
import pytest
import torch
import torchbnn
import torchbnn.functional
from diffusers.models.autoencoders import autoencoder_oobleck, vae
from drop_in_cases import DROP_INS
from originals import Reparameterized
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import fastelbo
from fastelbo.compat import PROJECTS, bayesian, compressai, dreamer, guided_diffusion, nvae, pythae, vdvae, vits
from fastelbo.compat import diffusers as ours
from fastelbo.testing import assert_within_budget

TRUE = {"DiagonalGaussianDistribution": vae, "OobleckDiagonalGaussianDistribution": autoencoder_oobleck}
THEIRS = {name: getattr(module, name) for name, module in TRUE.items()}
PAIRS = {name: (getattr(ours, name), theirs) for name, theirs in THEIRS.items()}
both = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_and_gradients(function, *inputs, dtype=None):
    """A function's value and gradients; upstream is the same whatever function it is."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    value = function(*leaves)
    upstream = randn(*value.shape, seed=9).to(value.dtype)
    return value.detach(), *torch.autograd.grad(value, leaves, upstream)


def assert_same(actual, expected, *inputs, **options):
    torch.testing.assert_close(
        value_and_gradients(actual, *inputs), value_and_gradients(expected, *inputs), check_dtype=False, **options
    )


@pytest.mark.parametrize("project", PROJECTS)
def test_a_file_says_what_it_replaces_and_what_is_wrong(project):
    module = importlib.import_module(f"fastelbo.compat.{project}")
    assert "Replaces" in module.__doc__ and re.search("Where (the )?originals? ", module.__doc__)


def test_every_drop_in_agrees_with_the_original():
    """On the inputs of the benchmarks; all but Pyro's, which changes what torch.distributions does in this process."""
    for drop_in in DROP_INS:
        if drop_in.op != "compat.pyro":
            torch.manual_seed(0)
            drop_in.check(drop_in.inputs())
    assert {f"compat.{project}" for project in PROJECTS} < {drop_in.op for drop_in in DROP_INS}


def test_other_names_are_pyros():
    """In a process of its own, for Pyro changes what torch.distributions does."""
    code = """
import pyro.distributions as theirs
from fastelbo.compat import pyro as ours
print({name for name in theirs.__all__ if getattr(ours, name) is not getattr(theirs, name)} == set(ours.__all__))
try: ours.Gaussian
except AttributeError as error: print(error)
"""
    done = fresh_python.run(code)
    assert done.stdout == "True\nmodule 'fastelbo.compat.pyro' has no attribute 'Gaussian'\n"


# diffusers


def image_model():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    return diffusers.AutoencoderKL(**blocks, block_out_channels=(8,), norm_num_groups=4, sample_size=8), (2, 3, 8, 8)


def video_model():
    small = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    return diffusers.AutoencoderKLWan(**small), (2, 3, 1, 8, 8)


def audio_model():
    small = {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4, "audio_channels": 1}
    return diffusers.AutoencoderOobleck(**small, downsampling_ratios=[2], channel_multiples=[1]), (2, 1, 16)


def train_step(model, x):
    """Value and gradients of a training step's loss, and the draw in it."""
    posterior = model.encode(x).latent_dist
    z = posterior.sample(torch.Generator().manual_seed(3))
    loss = (model.decode(z).sample - x).pow(2).mean() + 0.01 * posterior.kl().sum()
    return type(posterior), z, loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("make", [image_model, video_model, audio_model], ids=["image", "video", "audio"])
def test_autoencoders_train_as_with_their_own(make, monkeypatch):
    torch.manual_seed(0)
    model, shape = make()
    x = randn(*shape, dtype=torch.float32)
    with ours.patch():
        cls, z, *actual = train_step(model, x)
    assert cls in (ours.DiagonalGaussianDistribution, ours.OobleckDiagonalGaussianDistribution)
    # our noise in their draw
    noise = fastelbo.gaussian_rsample(torch.zeros_like(z), 0.0, generator=torch.Generator().manual_seed(3))
    for module in TRUE.values():
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    cls, their_z, *expected = train_step(model, x)
    assert cls in THEIRS.values()
    torch.testing.assert_close((z, *actual), (their_z, *expected))


def test_models_and_pipelines_use_patched_classes():
    model, shape = image_model()
    with ours.patch():
        assert type(model.encode(torch.zeros(shape)).latent_dist) is ours.DiagonalGaussianDistribution
        out = model(torch.zeros(shape), sample_posterior=True, generator=torch.Generator().manual_seed(0))
        assert out.sample.shape == shape
    assert type(model.encode(torch.zeros(shape)).latent_dist) is vae.DiagonalGaussianDistribution


def test_patch_can_be_undone():
    def state():
        return [getattr(module, name) for name, module in TRUE.items()]

    outer = ours.patch()
    with ours.patch():
        assert [cls.__module__ for cls in state()] == ["fastelbo.compat.diffusers"] * 2
        # as a module that is imported while patched has it
        late = types.ModuleType("diffusers.late")
        late.DiagonalGaussianDistribution = vae.DiagonalGaussianDistribution
        with pytest.MonkeyPatch.context() as patched:
            patched.setitem(sys.modules, "diffusers.late", late)
            outer.close()
        assert late.DiagonalGaussianDistribution is THEIRS["DiagonalGaussianDistribution"]
    assert state() == list(THEIRS.values())
    with pytest.raises(ZeroDivisionError), ours.patch():
        raise ZeroDivisionError
    assert state() == list(THEIRS.values())


@both
def test_same_attributes_and_methods(pair):
    parameters = randn(2, 6, 4, 5, dtype=torch.float32)
    mine, theirs = (cls(parameters) for cls in pair)
    assert set(dir(theirs)) - set(dir(object())) <= set(dir(mine))
    for name in ("__init__", "sample", "kl", "mode"):
        signatures = [inspect.signature(getattr(cls, name)).parameters.values() for cls in pair]
        assert [(p.name, p.default) for p in signatures[0]] == [(p.name, p.default) for p in signatures[1]]
    for name in vars(theirs):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))
    assert torch.equal(mine.mode(), theirs.mode())


@both
def test_attributes_have_their_gradients(pair):
    parameters = torch.cat([randn(2, 3, 4), 20 * randn(2, 3, 4, seed=1)], dim=1)
    for name in ("mean", "logvar", "std", "var"):
        assert_same(*(lambda x, cls=cls, name=name: getattr(cls(x), name) for cls in pair), parameters)


def wide(*shape):
    """Parameters with log-variances on both sides of the clamp."""
    return torch.cat([randn(*shape), 15 * randn(*shape, seed=1)], dim=1)


def test_kl_and_nll_are_theirs_of_images():
    cls, theirs = PAIRS["DiagonalGaussianDistribution"]
    parameters, sample, prior = wide(2, 3, 4, 5), randn(2, 3, 4, 5, seed=2), wide(2, 3, 4, 5).flip(0)
    assert_same(lambda p: cls(p).kl(), lambda p: theirs(p).kl(), parameters)
    assert_same(lambda p, q: cls(p).kl(cls(q)), lambda p, q: theirs(p).kl(theirs(q)), parameters, prior)
    assert_same(lambda p, q: cls(p).kl(theirs(q)), lambda p, q: theirs(p).kl(theirs(q)), parameters, prior)
    assert_same(lambda p, x: cls(p).nll(x), lambda p, x: theirs(p).nll(x), parameters, sample)
    for dims in ([1, 2, 3], (1,), [-1, -2], [0, 1, 2, 3]):
        assert_same(*(lambda p, x, c=c, dims=dims: c(p).nll(x, dims) for c in (cls, theirs)), parameters, sample)


@pytest.mark.parametrize(
    "shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 4, 5)], ids=lambda shape: f"{len(shape)}-D"
)
def test_kl_and_nll_of_every_rank(shape):
    cls = ours.DiagonalGaussianDistribution
    parameters, sample, prior = wide(*shape), randn(*shape, seed=2), wide(*shape).flip(0)

    def normal(p):
        mean, logvar = p.chunk(2, 1)
        return Independent(Normal(mean, torch.exp(0.5 * logvar.clamp(-30, 20))), len(shape) - 1)

    def standard(p):
        return Independent(Normal(torch.zeros_like(sample), 1.0), len(shape) - 1)

    assert_same(lambda p: cls(p).kl(), lambda p: kl_divergence(normal(p), standard(p)), parameters)
    assert_same(lambda p, q: cls(p).kl(cls(q)), lambda p, q: kl_divergence(normal(p), normal(q)), parameters, prior)
    assert_same(lambda p, x: cls(p).nll(x), lambda p, x: -normal(p).log_prob(x), parameters, sample)


def test_oobleck_kl():
    cls, theirs = PAIRS["OobleckDiagonalGaussianDistribution"]
    parameters, prior = (torch.cat([randn(2, 3, 8, seed=i), 3 * randn(2, 3, 8, seed=i + 1)], dim=1) for i in (0, 2))

    def twice_kl(p, q):
        p, q = (Normal(mean, nn.functional.softplus(s) + 1e-4) for mean, s in (x.chunk(2, 1) for x in (p, q)))
        return 2 * kl_divergence(p, q).sum(1).mean()

    assert_same(lambda p: cls(p).kl(), lambda p: theirs(p).kl(), parameters)
    assert_same(lambda p, q: cls(p).kl(cls(q)), twice_kl, parameters, prior)


def test_where_the_originals_are_wrong():
    """What the docstring says of them, as far as it is not in the tests above."""
    image, video, audio = (torch.zeros(2, 6, *rest) for rest in ((4, 5), (3, 4, 5), (4,)))
    cls, theirs = PAIRS["DiagonalGaussianDistribution"]
    assert theirs(video).kl().shape == theirs(video).nll(video[:, :3]).shape == (2, 5)
    assert cls(video).kl().shape == cls(video).nll(video[:, :3]).shape == (2,)
    with pytest.raises(IndexError):
        theirs(audio).kl()
    assert cls(audio).kl().shape == (2,)

    near = torch.full((2, 6, 4, 5), 1e-4)
    exact = cls(near.double()).kl()
    assert (theirs(near).kl().double() / exact - 1).abs().max() > 0.01
    torch.testing.assert_close(cls(near).kl().double(), exact, rtol=1e-6, atol=0)

    half = torch.full((2, 6, 4, 5), 12.0, dtype=torch.float16)
    assert theirs(half).kl().isinf().all()
    torch.testing.assert_close(cls(half).kl().double(), cls(half.double()).kl())

    assert theirs(image).kl(theirs(image, deterministic=True)).isnan().all()
    assert cls(image).kl(cls(image, deterministic=True)).eq(math.inf).all()
    assert theirs(image.to("meta"), deterministic=True).kl().device.type == "cpu"
    assert cls(image.to("meta"), deterministic=True).kl().device.type == "meta"

    cls, theirs = PAIRS["OobleckDiagonalGaussianDistribution"]
    narrow = torch.cat([torch.zeros(2, 3, 4), torch.full((2, 3, 4), -2.0)], dim=1)
    assert theirs(narrow).kl(theirs(audio)) < 0 < cls(narrow).kl(cls(audio))
    assert not torch.equal(theirs(audio, deterministic=True).sample(), audio[:, :3])


@both
def test_deterministic(pair):
    parameters = randn(2, 6, 4, 5, dtype=torch.float32).requires_grad_()
    mine, theirs = (cls(parameters, deterministic=True) for cls in pair)
    assert torch.equal(mine.sample(), mine.mean)
    assert torch.equal(mine.kl(), theirs.kl())
    if hasattr(theirs, "nll"):
        assert torch.equal(mine.nll(mine.mean), theirs.nll(mine.mean))
    (gradient,) = torch.autograd.grad(mine.sample().sum(), parameters)
    assert torch.equal(gradient, torch.cat([torch.ones(2, 3, 4, 5), torch.zeros(2, 3, 4, 5)], dim=1))
    for name in ("std", "var"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))


@both
def test_draws(pair):
    q = pair[0](torch.cat([torch.full((2, 3, 100, 100), 2.0), torch.full((2, 3, 100, 100), -1.0)], dim=1))

    def draw(seed):
        return q.sample(torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    noise = (draw(0) - q.mean) / q.std
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    torch.manual_seed(5)
    first = q.sample()
    torch.manual_seed(5)
    assert torch.equal(first, q.sample())


@both
def test_one_generator_for_each_example(pair):
    parameters = randn(3, 6, 4, 5, dtype=torch.float32)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    z = pair[0](parameters).sample(generators())
    for i, generator in enumerate(generators()):
        assert torch.equal(z[i : i + 1], pair[0](parameters[i : i + 1]).sample(generator))
        assert torch.equal(z[i : i + 1], pair[0](parameters[i : i + 1]).sample([torch.Generator().manual_seed(i)]))
    with pytest.raises(IndexError):
        pair[1](parameters).sample(generators()[:2])
    with pytest.raises(IndexError):
        pair[0](parameters).sample(generators()[:2])


@both
def test_generator_of_another_device(pair):
    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    for cls in pair:
        with pytest.raises(ValueError, match="Cannot generate a cpu tensor from a generator of type cuda"):
            cls(torch.zeros(2, 6, 4)).sample(Elsewhere())
    # the host's generator decides elsewhere too, as in diffusers
    assert pair[0](torch.zeros(2, 6, 4, device="meta")).sample(torch.Generator()).device.type == "meta"


@both
@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 4), torch.zeros(2)], ids=["one-channel", "1-D"])
def test_raises_what_diffusers_raises(pair, bad):
    errors = []
    for cls in reversed(pair):
        with pytest.raises((ValueError, IndexError)) as caught:
            cls(bad)
        errors.append(caught)
    assert errors[0].type is errors[1].type


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_diffusers_error_budget(dtype):
    cls, theirs = PAIRS["DiagonalGaussianDistribution"]
    parameters = randn(4, 16, 8, 8)
    run = value_and_gradients
    three = [
        run(lambda p: cls(p).kl(), parameters, dtype=dtype),
        run(lambda p: theirs(p).kl(), parameters.to(dtype), dtype=torch.float64),
        run(lambda p: theirs(p).kl(), parameters, dtype=dtype),
    ]
    for values in zip(*three, strict=True):
        assert_within_budget(*values)


def test_packed_parameters_are_read_in_place():
    """Channels-last, as convolutions write them."""
    parameters = randn(2, 6, 4, 5, dtype=torch.float32).to(memory_format=torch.channels_last)
    q, plain = (ours.DiagonalGaussianDistribution(p) for p in (parameters, parameters.contiguous()))
    z, expected = (dist.sample(torch.Generator().manual_seed(0)) for dist in (q, plain))
    assert q.mean.data_ptr() == parameters.data_ptr()
    torch.testing.assert_close((z, q.kl()), (expected, plain.kl()))


@both
def test_compiles_without_a_break(pair):
    def bottleneck(parameters):
        q = pair[0](parameters)
        return q.sample(), q.kl()

    parameters = randn(2, 6, 4, 5)
    torch.manual_seed(0)
    expected = bottleneck(parameters)
    torch.manual_seed(0)
    torch.testing.assert_close(torch.compile(bottleneck, fullgraph=True, backend="aot_eager")(parameters), expected)


# The elementwise lines


def exact_kl(mean1, std1, mean2, std2):
    return kl_divergence(Normal(mean1, std1), Normal(mean2, std2))


FOUR = [randn(3, 4, seed=seed) for seed in range(4)]


def test_vdvae():
    def expected(m1, m2, s1, s2):
        return exact_kl(m1, torch.exp(s1), m2, torch.exp(s2))

    assert_same(vdvae.gaussian_analytical_kl, expected, *FOUR)
    assert_same(vdvae.gaussian_analytical_kl, expected, FOUR[0], FOUR[1][:1], FOUR[2], FOUR[3][:1])
    wide = vdvae.gaussian_analytical_kl(torch.zeros(2), torch.zeros(2), torch.full((2,), 45.0), torch.full((2,), 45.0))
    assert torch.equal(wide, torch.zeros(2))
    torch.manual_seed(1)
    z = vdvae.draw_gaussian_diag_samples(*FOUR[:2])
    torch.manual_seed(1)
    assert torch.equal(z, fastelbo.gaussian_rsample(*FOUR[:2], scale="log_std"))


def test_guided_diffusion():
    def expected(m1, s1, m2, s2):
        return exact_kl(m1, torch.exp(0.5 * s1), m2, torch.exp(0.5 * s2))

    assert_same(guided_diffusion.normal_kl, expected, *FOUR)
    zero = torch.zeros((), dtype=torch.float64)
    assert_same(
        lambda m, s: guided_diffusion.normal_kl(m, s, 0.0, 0.0), lambda m, s: expected(m, s, zero, zero), *FOUR[:2]
    )
    assert_same(
        lambda m, s: guided_diffusion.normal_kl(0.5, -1.0, m, s),
        lambda m, s: expected(zero + 0.5, zero - 1.0, m, s),
        *FOUR[:2],
    )
    same = guided_diffusion.normal_kl(torch.zeros(2), torch.full((2,), -89.0), 0.0, torch.full((2,), -89.0))
    assert torch.equal(same, torch.zeros(2))
    with pytest.raises(AssertionError, match="at least one argument must be a Tensor"):
        guided_diffusion.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_pythae():
    mu, log_var = FOUR[:2]

    assert_same(pythae.kl, originals.kl, mu, log_var)
    assert_same(lambda *x: pythae.sample_and_kl(*x)[1], originals.kl, mu, log_var)
    assert pythae.kl(randn(2, 5, 4), randn(2, 5, 4)).shape == (2, 5)
    torch.manual_seed(0)
    z, eps = pythae.sample_gauss(mu, log_var.exp())
    torch.testing.assert_close(z, mu + log_var.exp() * eps)
    torch.manual_seed(0)
    torch.testing.assert_close(pythae.sample_and_kl(mu, 2 * log_var)[0], z)
    assert not eps.requires_grad and not torch.equal(eps, pythae.sample_gauss(mu, log_var.exp())[1])


@pytest.mark.parametrize("temp", [1.0, 0.7])
def test_nvae(temp):
    def sigma(log_sigma):
        return temp * (torch.exp(5 * torch.tanh(log_sigma / 5)) + 1e-2)

    def normal(mu, log_sigma):
        return Normal(5 * torch.tanh(mu / 5), sigma(log_sigma))

    def q(mu, log_sigma):
        return nvae.Normal(mu, log_sigma, temp)

    inputs = [3 * x for x in FOUR]
    torch.testing.assert_close(q(*inputs[:2]).sigma, normal(*inputs[:2]).scale)
    torch.testing.assert_close(q(*inputs[:2]).mu, normal(*inputs[:2]).loc)
    assert_same(lambda *x: q(*x[:2]).kl(q(*x[2:])), lambda *x: kl_divergence(normal(*x[:2]), normal(*x[2:])), *inputs)
    assert_same(lambda x, *p: q(*p).log_p(x), lambda x, *p: normal(*p).log_prob(x), *inputs[:3])
    z, eps = q(*inputs[:2]).sample()
    torch.testing.assert_close(z, normal(*inputs[:2]).loc + normal(*inputs[:2]).scale * eps)
    assert_same(
        lambda *x: q(*x[:2]).sample_given_eps(x[2]),
        lambda *x: normal(*x[:2]).loc + normal(*x[:2]).scale * x[2],
        *inputs[:3],
    )
    assert not torch.equal(eps, q(*inputs[:2]).sample()[1])


def test_vits():
    inputs = [randn(2, 3, 5, seed=seed) for seed in range(4)]
    mask = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])[:, None]

    def lines(*x):
        return originals.vits_kl_loss(*x, mask)

    assert_same(lambda *x: vits.kl_loss(*x, mask), lines, *inputs)
    assert vits.kl_loss(*(x.bfloat16() for x in inputs), mask.bfloat16()).dtype == torch.float32
    padding = (math.nan, math.inf, math.nan, -math.inf)
    poisoned = [x.masked_fill(mask == 0, value) for x, value in zip(inputs, padding, strict=True)]
    actual = value_and_gradients(lambda *x: vits.kl_loss(*x, mask), *poisoned)
    torch.testing.assert_close(actual, value_and_gradients(lines, *inputs), check_dtype=False)

    torch.manual_seed(0)
    z = vits.posterior_sample(*poisoned[:1], inputs[1], mask, noise_scale=0.5)
    torch.manual_seed(0)
    expected = fastelbo.gaussian_rsample(inputs[0], inputs[1], scale="log_std", temperature=0.5)
    torch.testing.assert_close(z, expected * mask)
    leaves = [x.clone().requires_grad_() for x in poisoned[:2]]
    gradients = torch.autograd.grad(vits.posterior_sample(*leaves, mask).sum(), leaves)
    assert torch.equal(gradients[0], mask.expand_as(z).double())
    assert not (gradients[1] * (1 - mask)).any() and (gradients[1] != 0).logical_or(mask == 0).all()


# dreamer


LATENTS = [randn(5, 6, 4), randn(5, 6, 4, seed=1).exp(), randn(5, 6, 4, seed=2), randn(5, 6, 4, seed=3).exp()]
# between two of them: at one of them, which gradient there is hangs on the last bit of a KL
FLOOR = originals.dreamer_kls(*LATENTS)[0].flatten().sort().values[14:16].mean().item()


@pytest.mark.parametrize("free_nats", [0.0, FLOOR, 1e3], ids=["no-floor", "some-below", "all-below"])
def test_dreamer(free_nats):
    for mine, theirs, options in (
        (dreamer.kl_loss_v1, originals.dreamer_v1, {}),
        (dreamer.kl_loss_v2, originals.dreamer_v2, {}),
        (dreamer.kl_loss_v2, originals.dreamer_v2, {"free_avg": False}),
        (dreamer.kl_loss_v3, originals.dreamer_v3, {"dyn_scale": 0.5}),
    ):
        both = (functools.partial(f, free_nats=free_nats, **options) for f in (mine, theirs))
        assert_same(*both, *LATENTS)


def test_dreamer_below_the_floor_has_no_gradient():
    for loss in (dreamer.kl_loss_v1, dreamer.kl_loss_v2, dreamer.kl_loss_v3):
        value, *gradients = value_and_gradients(lambda *x, loss=loss: loss(*x, free_nats=1e3), *LATENTS)
        assert value >= 1e3 and not any(gradient.any() for gradient in gradients)


def test_dreamer_balance_is_what_each_side_gets():
    _, *full = value_and_gradients(lambda *x: dreamer.kl_loss_v1(*x, free_nats=0.0), *LATENTS)
    _, *balanced = value_and_gradients(lambda *x: dreamer.kl_loss_v2(*x, alpha=0.8), *LATENTS)
    for share, gradient, whole in zip((0.2, 0.2, 0.8, 0.8), balanced, full, strict=True):
        torch.testing.assert_close(gradient, share * whole)


# Bayesian layers


def bnn():
    torch.manual_seed(0)
    prior = {"prior_mu": 0.1, "prior_sigma": 0.2}
    model = nn.Sequential(
        torchbnn.BayesConv2d(**prior, in_channels=2, out_channels=3, kernel_size=3),
        torchbnn.BayesBatchNorm2d(**prior, num_features=3),
        torchbnn.BayesBatchNorm2d(**prior, num_features=3, affine=False),
        nn.Linear(3, 3),
        torchbnn.BayesLinear(**prior, in_features=3, out_features=4, bias=False),
        torchbnn.BayesLinear(**prior, in_features=4, out_features=2),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_torchbnn(reduction):
    model = bnn()
    actual = bayesian.bayesian_kl_loss(model, reduction)
    expected = torchbnn.functional.bayesian_kl_loss(model, reduction)
    assert actual.shape == expected.shape == (1,)
    torch.testing.assert_close(actual, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(actual, parameters, allow_unused=True),
        torch.autograd.grad(expected, parameters, allow_unused=True),
    )


def test_torchbnns_last_layer_and_bad_input():
    model = bnn()
    last = bayesian.bayesian_kl_loss(model, last_layer_only=True)
    torch.testing.assert_close(last, torchbnn.functional.bayesian_kl_loss(model[-1:], "sum"))
    assert torchbnn.functional.bayesian_kl_loss(model, last_layer_only=True) < last  # the bias alone
    for kl_loss in (bayesian.bayesian_kl_loss, torchbnn.functional.bayesian_kl_loss):
        with pytest.raises(ValueError, match=r"^median is not valid$"):
            kl_loss(model, "median")
        assert torch.equal(kl_loss(nn.Linear(2, 2)), torch.zeros(1))


def test_bayesian_torch():
    layers = Reparameterized("kernel", (3, 2, 3, 3)), Reparameterized("weight", (4, 5), bias=False)
    model = nn.Sequential(*layers, nn.Linear(2, 2))
    exact = copy.deepcopy(model).double()
    values = bayesian.get_kl_loss(model), originals.get_kl_loss(exact)
    torch.testing.assert_close(*values, check_dtype=False)
    gradients = (
        torch.autograd.grad(kl, list(m[:2].parameters())) for kl, m in zip(values, (model, exact), strict=True)
    )
    torch.testing.assert_close(*gradients, check_dtype=False)
    assert bayesian.get_kl_loss(nn.Linear(2, 2)) is None


def test_bayesian_torchs_kl_div():
    mu, sigma, mu_p, sigma_p = LATENTS
    assert_same(bayesian.kl_div, lambda *x: exact_kl(*x).mean(), mu, sigma, mu_p, sigma_p)
    torch.testing.assert_close(
        bayesian.kl_div(mu, sigma, 0.5, 2.0), exact_kl(mu, sigma, mu.new_tensor(0.5), mu.new_tensor(2.0)).mean()
    )


SHAPES = [(3, 2, 3, 3), (3,), (5, 4), (), (2, 0)]


def weights(dtype=torch.float64):
    return [
        [(offset + randn(*shape, seed=10 * i + j)).to(dtype).requires_grad_() for j, shape in enumerate(SHAPES)]
        for i, offset in enumerate((0.0, -3.0))
    ]


PRIORS = {
    "numbers": (0.1, 0.5),
    "lists": ([0.1 * i for i in range(5)], [0.5 + i for i in range(5)]),
    "tensors": ([randn(*s, seed=7) for s in SHAPES], [randn(*s, seed=8).exp() for s in SHAPES]),
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_sample_weights(prior):
    means, rhos = weights()
    drawn, kl = bayesian.sample_weights(means, rhos, *prior, seed=3)
    expected, offset = 0, 0
    for i, (mean, rho, weight) in enumerate(zip(means, rhos, drawn, strict=True)):
        options = {"scale": "softplus", "seed": 3, "noise_offset": offset}
        torch.testing.assert_close(weight, fastelbo.gaussian_rsample(mean, rho, **options))
        offset += mean.numel()
        mean_p, std_p = (torch.as_tensor(p[i] if isinstance(p, list) else p, dtype=torch.float64) for p in prior)
        expected = expected + exact_kl(mean, torch.log1p(torch.exp(rho)), mean_p, std_p).sum()
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(
        torch.autograd.grad(kl, [*means, *rhos], retain_graph=True), torch.autograd.grad(expected, [*means, *rhos])
    )
    gradients = torch.autograd.grad(sum(weight.sum() for weight in drawn), means)
    assert all(torch.equal(gradient, torch.ones_like(gradient)) for gradient in gradients)


def test_sample_weights_trains_a_network():
    """Bayes by backprop of a line: the posterior moves from the prior to the data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, generator=generator)
    y = 2 * x - 1 + 0.1 * torch.randn(64, 1, generator=generator)
    means, rhos = (
        [nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))],
        [
            nn.Parameter(torch.full((1, 1), -3.0)),
            nn.Parameter(torch.full((1,), -3.0)),
        ],
    )
    optimizer = torch.optim.Adam([*means, *rhos], lr=0.05)
    for _ in range(200):
        (weight, bias), kl = bayesian.sample_weights(means, rhos, generator=generator)
        nll = fastelbo.gaussian_nll(y, nn.functional.linear(x, weight, bias), 0.1, scale="std", event_ndim=2)
        optimizer.zero_grad()
        (nll + kl).backward()
        optimizer.step()
    assert abs(means[0].item() - 2) < 0.1 and abs(means[1].item() + 1) < 0.1


def test_sample_weights_bad_input():
    means, rhos = weights()
    with pytest.raises(ValueError, match="scales must have the shapes of means"):
        bayesian.sample_weights(means, rhos[:-1])
    with pytest.raises(ValueError, match="for each of the 5 means; got 2"):
        bayesian.sample_weights(means, rhos, 0.0, [1.0, 2.0])
    with pytest.raises(ValueError, match="scale must be one of"):
        bayesian.sample_weights(means, rhos, scale="rho")


def test_vits_of_equal_sigmas_keeps_its_digits():
    logs = torch.full((1, 1, 4), -40.0) + torch.tensor([0.0, 1e-5, -1e-5, 3e-5])
    m, mask = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    loss = vits.kl_loss(m + torch.exp(logs), logs, m, logs, mask)
    torch.testing.assert_close(loss, torch.tensor(0.0), rtol=0, atol=1e-6)
    other = logs - 1e-3
    loss = vits.kl_loss(m, other, m, logs, mask)
    exact = -0.5 + (logs.double() - other.double()).mean().item()
    torch.testing.assert_close(loss.item(), exact, rtol=1e-7, atol=0)


def test_second_derivatives_of_vits_loss():
    """Both sigmas of what is inside move, though the slope by one of them is 0."""
    inputs = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mask = torch.ones(2, 1, 4, dtype=torch.float64)
    mask[1, :, 2:] = 0
    assert torch.autograd.gradgradcheck(lambda *inputs: vits.kl_loss(*inputs, mask), inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: guided_diffusion.normal_kl(x, x, x[:, :2], 0.0), "mean2 must broadcast with mean1 of shape (2, 3)"),
        (lambda x: vdvae.gaussian_analytical_kl(x, x, x[:, :2], 0.0), "logsigma1 must broadcast with mu1 of shape"),
        (lambda x: pythae.kl(x, x.long()), "log_var must be float32"),
        (lambda x: pythae.sample_gauss(x, x.long()), "std must be float32"),
        (lambda x: bayesian.kl_div(x, x[:, :2], 0.0, 1.0), "sigma_q must broadcast with mu_q of shape (2, 3)"),
        (lambda x: dreamer.kl_loss_v2(x, x, x, x, free_nats=-1.0), "free_nats must be at least 0; got -1.0"),
        (lambda x: dreamer.kl_loss_v2(x, x, x, x, alpha=2.0), "alpha must be between 0 and 1; got 2.0"),
        (
            lambda x: nvae.Normal(x, x).sample_given_eps(torch.zeros(5)),
            "eps must broadcast to the sample's shape (2, 3)",
        ),
        (lambda x: nvae.Normal(x, x).log_p(x > 0), "samples must be float32"),
        (lambda x: vits.kl_loss(x, x, x[:, :2], x, x), "m_p must broadcast with z_p of shape (2, 3)"),
        (lambda x: vits.posterior_sample(x, x, x, float("nan")), "noise_scale must be finite; got nan"),
    ],
    ids=lambda value: value.split(" must")[0] if isinstance(value, str) else "",
)
def test_errors_name_the_originals_arguments(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(torch.zeros(2, 3))
    assert message in str(caught.value)


# CompressAI


def context_model(seed, **options):
    torch.manual_seed(seed)
    return compressai.MaskedConv2d(3, 6, 5, padding=2, **options), originals.CompressAIMaskedConv2d(
        3, 6, 5, padding=2, **options
    )


@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_compressais_state_dicts_load_strictly_both_ways(mask_type):
    mine, theirs = context_model(0, mask_type=mask_type)
    x = randn(2, 3, 6, 7, dtype=torch.float32)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(mine.state_dict())
    assert torch.equal(mine.mask, theirs.mask)
    torch.testing.assert_close(mine(x), theirs(x))
    mine, _ = context_model(1, mask_type=mask_type)
    nn.Sequential(mine).load_state_dict(nn.Sequential(theirs).state_dict(), strict=True)
    torch.testing.assert_close(mine(x), theirs(x))
    other = "B" if mask_type == "A" else "A"
    with pytest.raises(RuntimeError, match=f"mask is that of mask_type '{mask_type}'; this module has"):
        context_model(1, mask_type=other)[0].load_state_dict(theirs.state_dict())


def test_compressais_arguments():
    x = randn(2, 3, 6, 7, dtype=torch.float32)
    for arguments in ((5,), (5, 1, 0), (3, 1, "valid"), (3, 1, 2, 2), (1,)):
        mine = compressai.MaskedConv2d(3, 6, *arguments, mask_type="B")
        theirs = originals.CompressAIMaskedConv2d(3, 6, *arguments, mask_type="B")
        theirs.load_state_dict(mine.state_dict())
        torch.testing.assert_close(copy.deepcopy(mine)(x), theirs(x))
    with pytest.raises(ValueError, match="padding must be 2"):
        compressai.MaskedConv2d(3, 6, 5, padding=1)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("name", ["MaskedConv2d", "CheckerboardMaskedConv2d"])
@pytest.mark.parametrize("kernel_size", [5, (3, 5), (5, 3), (1, 5)], ids=str)
def test_compressais_masks(name, kernel_size, mask_type):
    """Of kernels of unequal sides, and of checkerboards."""
    x, padding = randn(2, 3, 6, 7, dtype=torch.float32), "same"
    mine = getattr(compressai, name)(3, 6, kernel_size, padding=padding, mask_type=mask_type)
    theirs = getattr(originals, f"CompressAI{name}")(3, 6, kernel_size, padding=padding, mask_type=mask_type)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert torch.equal(mine.mask, theirs.mask)
    torch.testing.assert_close(mine(x), theirs(x))
    again = getattr(compressai, name)(3, 6, kernel_size, padding=padding, mask_type=mask_type)
    again.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(again(x), theirs(x))
    inner = getattr(compressai, name)(3, 6, kernel_size, mask_type=mask_type)
    inner.load_state_dict(theirs.state_dict())
    rows, columns = (size // 2 for size in inner.kernel_size)
    assert torch.equal(inner(x), again(x)[:, :, rows : 6 - rows, columns : 7 - columns])


def test_compressais_loop_over_pixels_sees_what_the_layer_computes():
    mine, theirs = context_model(0)
    theirs.load_state_dict(mine.state_dict())
    padded = nn.functional.pad(randn(1, 3, 6, 7, dtype=torch.float32), (2, 2, 2, 2))
    whole = mine(padded)[:, :, 2:-2, 2:-2]
    for h in range(6):
        for w in range(7):
            crop = padded[:, :, h : h + 5, w : w + 5]
            pixel = nn.functional.conv2d(crop, mine.weight * mine.mask, bias=mine.bias)
            assert torch.equal(pixel, nn.functional.conv2d(crop, theirs.weight * theirs.mask, bias=theirs.bias))
            torch.testing.assert_close(pixel[0, :, 0, 0], whole[0, :, h, w])


def test_compressai_is_patched_where_it_is_imported(monkeypatch):
    """A stand-in of the package, which does not install beside the numpy that tests have."""
    package, layers, google, user = (
        types.ModuleType(name) for name in ("compressai", "compressai.layers", "compressai.models.google", "user")
    )
    layers.MaskedConv2d = google.MaskedConv2d = user.Context = originals.CompressAIMaskedConv2d
    for module in (package, layers, google):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with compressai.patch(user):
        assert layers.MaskedConv2d is google.MaskedConv2d is user.Context is compressai.MaskedConv2d
    assert layers.MaskedConv2d is google.MaskedConv2d is user.Context is originals.CompressAIMaskedConv2d
    with compressai.patch():
        assert layers.MaskedConv2d is compressai.MaskedConv2d and user.Context is originals.CompressAIMaskedConv2d


# attributes that people assign, or write to


def halve(name):
    def edit(q):
        setattr(q, name, getattr(q, name) * 0.5)

    return edit


def write(name):
    def edit(q):
        getattr(q, name).mul_(0.5)

    return edit


def number(name):
    return lambda q: setattr(q, name, torch.tensor(0.25, dtype=torch.float64))


def widen_then_look(q):
    q.std = q.std + 1
    assert q.var.shape == q.logvar.shape == q.std.shape


def two(first, second):
    return lambda q: (first(q), second(q))


EDITS = {
    **{f"{name} anew": halve(name) for name in ("mean", "std", "var", "logvar")},
    **{f"{name} in place": write(name) for name in ("mean", "std", "var", "logvar")},
    **{f"{name} a number": number(name) for name in ("std", "var", "logvar")},
    "std *=": lambda q: setattr(q, "std", q.std.mul_(0.5)),
    "std, then others are looked at": widen_then_look,
    "mean and std": two(halve("mean"), write("std")),
    "var and logvar": two(halve("var"), lambda q: setattr(q, "logvar", q.var.log())),
    "only looked at": lambda q: (q.std, q.var, q.logvar),
    # an Oobleck distribution draws at random all the same
    "deterministic": lambda q: None if "Oobleck" in type(q).__name__ else setattr(q, "deterministic", True),
    "parameters": lambda q: setattr(q, "parameters", q.parameters + 1),
    "scale": lambda q: q.scale.mul_(0.5) if hasattr(q, "scale") else None,
    "scale anew": lambda q: setattr(q, "scale", q.scale * 0.5) if hasattr(q, "scale") else None,
}


# autograd refuses these, of the original too
WRITING = {"mean in place", "std in place", "var in place", "std *=", "mean and std", "scale"}
MODES = ("grad", "inference", "no grad")
EDITED = [(edit, mode) for edit in EDITS for mode in MODES if mode != "grad" or edit not in WRITING]


@both
@pytest.mark.parametrize("edit, mode", EDITED)
def test_what_is_assigned_or_written_counts(pair, edit, mode, monkeypatch):
    noise = randn(2, 3, 4, 5, seed=3)
    for module in TRUE.values():
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise)
    monkeypatch.setattr(ours, "_seed", types.SimpleNamespace(as_seed=None))
    draw = fastelbo.gaussian_rsample
    monkeypatch.setattr(ours, "gaussian_rsample", lambda *args, seed, generator, **k: draw(*args, noise=noise, **k))
    found = []
    context = {"grad": torch.enable_grad, "inference": torch.inference_mode, "no grad": torch.no_grad}[mode]
    for cls in pair:
        with context():
            parameters = torch.cat([randn(2, 3, 4, 5), 3 * randn(2, 3, 4, 5, seed=1)], dim=1)
            leaf = parameters.requires_grad_(mode == "grad")
            q, other = cls(leaf * 1), cls(leaf.flip(0) * 1)
            EDITS[edit](q)
            values = [q.sample(), q.mode(), q.kl()]
            if hasattr(q, "nll"):
                values += [q.nll(noise), q.nll(noise, [2])]
                values += [q.kl(other), other.kl(q)]
            values += [q.std, q.var, q.logvar]
        total = sum(torch.as_tensor(value).double().square().sum() for value in values)
        found.append((values, torch.autograd.grad(total, leaf) if mode == "grad" else ()))
    torch.testing.assert_close(*found, check_dtype=False)


def test_a_copy_of_a_posterior_has_attributes_of_its_own():
    q = ours.DiagonalGaussianDistribution(randn(2, 6, 4, 5))
    _ = q.std
    for other in (copy.copy(q), copy.deepcopy(q)):
        other.std = other.std * 0
        assert torch.equal(other.sample(), q.mean) and not torch.equal(q.sample(), q.mean)


def test_assigned_attributes_compile():
    def bottleneck(parameters, cls):
        q = cls(parameters)
        q.std = q.std * 0
        q.logvar.mul_(2)
        return q.sample(), q.kl()

    parameters = randn(2, 6, 4, 5)
    want = bottleneck(parameters, THEIRS["DiagonalGaussianDistribution"])
    got = torch.compile(bottleneck, fullgraph=True, backend="aot_eager")(parameters, ours.DiagonalGaussianDistribution)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("temp", [1.0, 0.7])
@pytest.mark.parametrize(
    "edit", [halve("sigma"), write("sigma"), halve("mu"), lambda q: q.sigma], ids=["anew", "in place", "mu", "read"]
)
def test_nvaes_sigma_may_be_assigned(edit, temp):
    mu, log_sigma, eps = randn(3, 4), randn(3, 4, seed=1), randn(3, 4, seed=2)
    mine, theirs = nvae.Normal(mu, log_sigma, temp), originals.NVAENormal(mu, log_sigma)
    theirs.sigma = theirs.sigma * temp
    other = nvae.Normal(mu, log_sigma), originals.NVAENormal(mu, log_sigma)
    for q in (mine, theirs):
        edit(q)
    torch.testing.assert_close(mine.sample_given_eps(eps), theirs.mu + theirs.sigma * eps)
    torch.testing.assert_close(mine.kl(other[0]), theirs.kl(other[1]))
    torch.testing.assert_close(other[0].kl(mine), other[1].kl(theirs))
    torch.testing.assert_close(mine.log_p(eps), Normal(theirs.mu, theirs.sigma).log_prob(eps))


# modules that are imported under an alias


def test_patch_reaches_modules_under_an_alias():
    """In a process of its own, as it changes torch."""
    code = """
import torch
import torch.distributions as td
from torch.distributions import Normal as Gaussian
import types, fastelbo
user = types.ModuleType("user")
user.Gaussian, user.other = Gaussian, td.Bernoulli
loc = torch.randn(3, 4, dtype=torch.float64)
def lines():
    q = td.Independent(td.Normal(loc, 1.0), 1)
    p = td.Independent(td.Normal(torch.zeros_like(loc), 2.0).expand((3, 4)), 1)
    x = td.TransformedDistribution(user.Gaussian(loc, 1.0), [td.ExpTransform()])
    return td.kl_divergence(q, p), q.log_prob(loc), td.LogNormal(loc, 1.0).log_prob(loc.exp()), x.log_prob(loc.exp())
want = lines()
with fastelbo.compat.patch(fastelbo.distributions, td, user):
    print(td.Normal is user.Gaussian is fastelbo.distributions.Normal, td.kl_divergence.__module__)
    print(user.other.__module__)
    torch.testing.assert_close(lines(), want)
    assert td.Normal(loc, 1.0).rsample((2,)).shape == (2, 3, 4) and isinstance(td.Normal(loc, 1.0), Gaussian)
    with fastelbo.compat.patch(fastelbo.distributions, td): pass
    assert td.Normal is fastelbo.distributions.Normal
assert td.Normal is user.Gaussian is Gaussian
torch.testing.assert_close(lines(), want)
"""
    done = fresh_python.run(code)
    assert done.stdout == "True fastelbo.distributions\ntorch.distributions.bernoulli\n"


def test_patch_reaches_pyros_names():
    code = """
import pyro.distributions as dist, torch, fastelbo
with fastelbo.compat.patch(fastelbo.compat.pyro, dist):
    q = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    print(type(q).__module__, type(q.base_dist).__module__, q.log_prob(torch.zeros(2, 3)).tolist())
print(dist.Normal.__module__)
"""
    done = fresh_python.run(code)
    value = Independent(Normal(torch.zeros(2, 3), 1.0), 1).log_prob(torch.zeros(2, 3)).tolist()
    assert done.stdout == f"fastelbo.compat.pyro fastelbo.compat.pyro {value}\npyro.distributions.torch\n"


def test_patch_of_a_projects_own_files():
    helpers, model = types.ModuleType("vae_helpers"), types.ModuleType("vae")
    names = ("gaussian_analytical_kl", "draw_gaussian_diag_samples")
    for name in names:
        setattr(helpers, name, getattr(originals, name))
    model.kl, model.torch = originals.gaussian_analytical_kl, torch
    with fastelbo.compat.patch(vdvae, helpers, model):
        assert all(getattr(helpers, name) is getattr(vdvae, name) for name in names)
        assert model.kl is vdvae.gaussian_analytical_kl and model.torch is torch
    assert all(getattr(helpers, name) is getattr(originals, name) for name in names)
    assert model.kl is originals.gaussian_analytical_kl
    for modules, given in (((math,), "math"), ((), "no module")):
        message = f"^modules must have one of draw_gaussian_diag_samples, gaussian_analytical_kl; got {given}$"
        with pytest.raises(ValueError, match=message):
            fastelbo.compat.patch(vdvae, *modules)


# what projects log


def test_bklloss():
    model = bnn()
    for arguments in ((), ("sum",), ("mean", False)):
        loss, theirs = bayesian.BKLLoss(*arguments), torchbnn.BKLLoss(*arguments)
        torch.testing.assert_close(loss(model), theirs(model))
        loss.reduction = theirs.reduction = "sum"
        torch.testing.assert_close(loss(model), theirs(model))
    torch.testing.assert_close(bayesian.BKLLoss(last_layer_only=True)(model), bayesian.BKLLoss("sum")(model[-1:]))


@pytest.mark.parametrize("free_nats", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("version", ["v1", "v2", "v2 each", "v3"])
def test_dreamers_parts(version, free_nats):
    inputs = [x.requires_grad_() for x in (randn(6, 5, 4), randn(6, 5, 4, seed=1).exp(), randn(6, 5, 4, seed=2),
                                            randn(6, 5, 4, seed=3).exp())]  # fmt: skip
    loss_function, options = {
        "v1": (dreamer.kl_loss_v1, {}),
        "v2": (dreamer.kl_loss_v2, {"alpha": 0.7}),
        "v2 each": (dreamer.kl_loss_v2, {"free_avg": False}),
        "v3": (dreamer.kl_loss_v3, {"dyn_scale": 0.5, "rep_scale": 0.1}),
    }[version]
    loss = loss_function(*inputs, free_nats=free_nats, **options)
    parts = loss_function(*inputs, free_nats=free_nats, **options, parts=True)
    torch.testing.assert_close(parts.loss, loss)
    torch.testing.assert_close(parts.per_step.mean(), loss)
    for value in (parts.loss, parts.per_step.mean()):
        torch.testing.assert_close(torch.autograd.grad(value, inputs, retain_graph=True),
                                   torch.autograd.grad(loss, inputs, retain_graph=True))  # fmt: skip
    kl = originals.dreamer_kl(*inputs).detach()
    torch.testing.assert_close(parts.kl, kl)
    assert not parts.kl.requires_grad
    if version == "v1":
        assert parts.dyn is parts.rep is None
        return
    floored = kl.mean().clamp(min=free_nats) if version == "v2" else kl.clamp(min=free_nats).mean()
    torch.testing.assert_close((parts.dyn, parts.rep), (floored, floored))
    if version == "v3":
        torch.testing.assert_close(parts.per_step, 0.6 * kl.clamp(min=free_nats))
        torch.testing.assert_close(loss, 0.5 * parts.dyn + 0.1 * parts.rep)


def test_dreamers_parts_check_the_floor():
    with pytest.raises(ValueError, match=r"^free_nats must be at least 0; got -1"):
        dreamer.kl_loss_v1(*FOUR, free_nats=-1, parts=True)
