"""The one table of drop-ins: each with the lines it replaces, on inputs of the size that its users have.

The originals are those of installed packages (pip install fastelbo[dropins]), or else their lines, written out in
originals.py. tests/test_compat.py holds both sides against each other, values and gradients of the same noise; the
benchmarks do so, too, and time them.
"""

import functools
import importlib
import itertools
import math
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import originals
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo
from fastelbo.compat import bayesian, compressai, dreamer, guided_diffusion, nvae, pythae, vdvae, vits

SEED = 5


@dataclass(frozen=True)
class DropIn:
    """Lines that stay as they are, and what they take from fastelbo or from elsewhere.

    Args:
        op: where ours lives in fastelbo.
        case: what the lines do.
        used_by: where the shapes come from.
        inputs: makes the inputs; those that require gradients get them.
        ours, theirs: what the lines take, or the name of a module to take.
        use: the lines, a function of that and of the inputs, to one tensor or a tuple.
        rival: the column of the ratio: "distributions" where theirs is torch.distributions, else "eager".
        tests: ours is tested by tests/test_<tests>.py.
        shape: of a row, where it is not that of the first input.
        num_samples: how many ours draws in front, whose noise is not that of a tensor with one dimension more.
    """

    op: str
    case: str
    used_by: str
    inputs: Callable[[], Sequence[torch.Tensor]]
    ours: Any
    theirs: Any
    use: Callable = lambda function, *inputs: function(*inputs)
    rival: str = "eager"
    tests: str = "compat"
    shape: str = ""
    num_samples: int | None = None

    def __str__(self):
        return "-".join(filter(None, (self.op, self.case, self.used_by)))

    def contestants(self) -> dict[str, Callable]:
        """Functions of the inputs, ours first."""
        return {
            name: functools.partial(self.use, importlib.import_module(side) if isinstance(side, str) else side)
            for name, side in (("cpu", self.ours), (self.rival, self.theirs))
        }

    def check(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs, then gradients; raises AssertionError unless ours and theirs agree but for 1e-4 of the largest."""
        ours, theirs = self.contestants().values()
        found, expected = results(ours, inputs), results(theirs, inputs, OurNoise(self.num_samples))
        name = f"{self.op} {self.case}: "
        assert len(found) == len(expected), f"{name}{len(found)} outputs and gradients, not {len(expected)}"
        for index, (x, y) in enumerate(zip(found, expected, strict=True)):
            place = f"{name}output or gradient {index}: "
            atol = 1e-4 * float(y.abs().max())
            torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda text, place=place: place + text)
        return found


class OurNoise(TorchDispatchMode):
    """Whoever draws normal numbers within gets the noise that ours draw after torch.manual_seed(SEED)."""

    def __init__(self, num_samples):
        super().__init__()
        self.drawn, self.num_samples = 0, num_samples

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.randn, torch.ops.aten.randn_like, torch.ops.aten.normal_):
            zeros = torch.zeros_like(result[0] if self.num_samples else result)
            torch.manual_seed(SEED)
            noise = {"num_samples": self.num_samples, "noise_offset": self.drawn}
            result.copy_(fastelbo.gaussian_rsample(zeros, 0.0, **noise))
            self.drawn += result.numel()
        return result


def results(function: Callable, inputs: Sequence[torch.Tensor], noise=None) -> list[torch.Tensor]:
    """Outputs, then gradients, of upstream gradients so positive that sums of them do not cancel."""
    torch.manual_seed(SEED)
    with noise or nullcontext():
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.rand(out.shape, generator=generator) for out in outputs]
    leaves = [x for x in inputs if x.requires_grad]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


# Inputs


def mean(*shape):
    return torch.randn(shape).requires_grad_()


def raw(*shape):
    """Log-variances, or what else is read as a scale."""
    return torch.randn(shape).mul_(0.5).requires_grad_()


def positive(*shape):
    """Standard deviations, or variances."""
    return torch.randn(shape).mul_(0.5).exp_().requires_grad_()


def two(*shape, scale=raw):
    """Mean and scale of a posterior and of a prior."""
    return mean(*shape), scale(*shape), mean(*shape), scale(*shape)


def frames(batch, longest):
    """The mask of sentences of several lengths, [B, 1, T]."""
    lengths = torch.linspace(0.4, 1, batch) * longest
    return (torch.arange(longest) < lengths[:, None])[:, None].float()


UNITS = (784, 400, 400, 10)  # of the network of Blundell et al.
LAYERS = list(itertools.pairwise(UNITS))
SHAPES = [shape for inputs, outputs in LAYERS for shape in ((outputs, inputs), (outputs,))]
WEIGHTS = str(sum(map(math.prod, SHAPES)))


@functools.cache
def bayesian_torch_model():
    return nn.Sequential(*(originals.Reparameterized("weight", (outputs, inputs)) for inputs, outputs in LAYERS))


@functools.cache
def torchbnn_model():
    linear = importlib.import_module("torchbnn").BayesLinear
    model = nn.Sequential(*(linear(0.0, 0.1, *layer) for layer in LAYERS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # at the start it lies on the prior
    return model


@functools.cache
def context_models():
    """Of CompressAI's mbt2018 and cheng2020: ours and theirs, of the same weights."""
    ours, theirs = (
        kind(192, 384, kernel_size=5, padding=2, stride=1)
        for kind in (compressai.MaskedConv2d, originals.CompressAIMaskedConv2d)
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def weights_of_network():
    return [mean(*shape) for shape in SHAPES] + [raw(*shape) for shape in SHAPES]


# Lines of users


def scvi(m, loc, scale):
    q, p = m.Normal(loc, scale), m.Normal(torch.zeros_like(loc), torch.ones_like(scale))
    return q.rsample(), m.kl_divergence(q, p).sum(dim=-1)


def likelihood(m, x, loc, scale):
    return m.Independent(m.Normal(loc, scale), 1).log_prob(x)


def trace_elbo(m, loc, scale):
    """What Pyro's Trace_ELBO computes of a latent."""
    q = m.Normal(loc, scale).to_event(1)
    p = m.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
    z = q.rsample()
    return z, q.log_prob(z) - p.log_prob(z)


def image_posterior(m, parameters):
    q = m.DiagonalGaussianDistribution(parameters)
    return q.sample(), q.kl()


def audio_posterior(m, parameters):
    q = m.OobleckDiagonalGaussianDistribution(parameters)
    return q.sample(), q.kl()


def vdvae_block(m, q, features):
    zdim = q.shape[1] // 2
    qm, qv = q.chunk(2, dim=1)
    pm, pv = features[:, :zdim], features[:, zdim : 2 * zdim]
    return m.draw_gaussian_diag_samples(qm, qv), m.gaussian_analytical_kl(qm, pm, qv, pv)


def nvae_group(normal, mu_q, log_sigma_q, mu_p, log_sigma_p):
    p, q = normal(mu_p, log_sigma_p), normal(mu_p + mu_q, log_sigma_p + log_sigma_q)
    z, _ = q.sample()
    return z, q.kl(p).sum(dim=[1, 2, 3])


def variational_bound(kl, *inputs):
    return kl(*inputs).mean(dim=[1, 2, 3]) / math.log(2.0)


def pythae_lines(m, mu, log_var):
    z, _ = m.sample_gauss(mu, torch.exp(0.5 * log_var))
    return z, m.kl(mu, log_var)


def draw_all(function, *inputs):
    weights, kl = function(inputs[: len(SHAPES)], inputs[len(SHAPES) :])
    return (*weights, kl)


def our_elbo(*inputs):
    return fastelbo.gaussian_elbo(*inputs).elbo


def our_iwae(log_p_x, mu, log_var):
    z = fastelbo.gaussian_rsample(mu, log_var, num_samples=len(log_p_x))
    log_q_z = fastelbo.gaussian_log_prob(z, mu, log_var, event_ndim=1)
    log_p_z = fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1)
    return z, fastelbo.iwae_bound(log_p_x, log_p_z, log_q_z)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # VDVAE's own lines are TorchScript
    scripted = map(torch.jit.script, (originals.gaussian_analytical_kl, originals.draw_gaussian_diag_samples))
    VDVAE = types.SimpleNamespace(**{function.name: function for function in scripted})
DISTRIBUTIONS = "fastelbo.distributions", "torch.distributions"
IMAGES = "fastelbo.compat.diffusers", "diffusers.models.autoencoders.vae"
SOUNDS = "fastelbo.compat.diffusers", "diffusers.models.autoencoders.autoencoder_oobleck"
NLL = fastelbo.nn.GaussianNLLLoss(), nn.GaussianNLLLoss()
TORCH = {"rival": "distributions", "tests": "distributions"}
IMAGE = "DiagonalGaussianDistribution: sample, kl"
AUDIO = "OobleckDiagonalGaussianDistribution: sample, kl"
BLOCK = "draw_gaussian_diag_samples, gaussian_analytical_kl"
DROP_INS = [
    DropIn("distributions", "rsample, kl_divergence", "scvi-tools: 128 cells, 10 latents",
           lambda: (mean(128, 10), positive(128, 10)), *DISTRIBUTIONS, scvi, **TORCH),
    DropIn("distributions", "log_prob", "a Gaussian decoder of MNIST",
           lambda: (torch.randn(128, 784), mean(128, 784), positive(128, 784)), *DISTRIBUTIONS, likelihood, **TORCH),
    DropIn("compat.diffusers", IMAGE, "Stable Diffusion's autoencoder on 512 x 512 pixels",
           lambda: [mean(4, 8, 64, 64)], *IMAGES, image_posterior),
    DropIn("compat.diffusers", IMAGE, "Stable Diffusion 3's on 1024 x 1024 pixels",
           lambda: [mean(4, 32, 128, 128)], *IMAGES, image_posterior),
    DropIn("compat.diffusers", AUDIO, "Stable Audio Open: 64 channels, 1024 frames",
           lambda: [mean(4, 128, 1024)], *SOUNDS, audio_posterior),
    DropIn("compat.vdvae", BLOCK, "CIFAR-10's finest blocks: 16 latent channels beside 384 others",
           lambda: (raw(16, 32, 32, 32), raw(16, 32 + 384, 32, 32)), vdvae, VDVAE, vdvae_block),
    DropIn("compat.vdvae", BLOCK, "CIFAR-10's coarsest blocks",
           lambda: (raw(16, 32, 1, 1), raw(16, 32 + 384, 1, 1)), vdvae, VDVAE, vdvae_block),
    DropIn("compat.nvae", "Normal: sample, kl", "a group of CIFAR-10: 20 latent channels, 32 images a GPU",
           lambda: two(32, 20, 16, 16), nvae.Normal, originals.NVAENormal, nvae_group),
    DropIn("compat.vits", "kl_loss", "192 channels, sentences of up to 400 frames",
           lambda: (*two(16, 192, 400), frames(16, 400)), vits.kl_loss, originals.vits_kl_loss),
    DropIn("compat.vits", "posterior_sample", "the same",
           lambda: (mean(16, 192, 400), raw(16, 192, 400), frames(16, 400)),
           vits.posterior_sample, originals.vits_posterior_sample),
    DropIn("compat.guided_diffusion", "normal_kl", "ImageNet at 64 x 64 pixels, learned variances",
           lambda: two(32, 3, 64, 64), guided_diffusion.normal_kl, originals.normal_kl, variational_bound),
    DropIn("compat.pythae", "sample_and_kl", "MNIST: 100 images, 16 latents",
           lambda: (mean(100, 16), raw(100, 16)), pythae.sample_and_kl, originals.sample_and_kl),
    DropIn("compat.pythae", "sample_gauss, kl", "the same, line by line",
           lambda: (mean(100, 16), raw(100, 16)), pythae, originals, pythae_lines),
    DropIn("compat.bayesian", "bayesian_kl_loss (torchbnn)", "a network of 784-400-400-10 units",
           lambda: list(torchbnn_model().parameters()), bayesian, "torchbnn.functional",
           lambda m, *_: m.bayesian_kl_loss(torchbnn_model(), reduction="sum"), shape=WEIGHTS),
    DropIn("compat.bayesian", "get_kl_loss (bayesian-torch)", "the same",
           lambda: list(bayesian_torch_model().parameters()), bayesian.get_kl_loss, originals.get_kl_loss,
           lambda function, *_: function(bayesian_torch_model()), shape=WEIGHTS),
    DropIn("compat.bayesian", "kl_div (bayesian-torch)", "its first layer",
           lambda: two(400, 784, scale=positive), bayesian.kl_div, originals.kl_div),
    DropIn("compat.bayesian", "sample_weights", "the network",
           weights_of_network, bayesian.sample_weights, originals.sample_weights, draw_all, shape=WEIGHTS),
    DropIn("compat.dreamer", "kl_loss_v1", "50 sequences of 50 steps, 30 latents",
           lambda: two(50, 50, 30, scale=positive), dreamer.kl_loss_v1, originals.dreamer_v1, rival="distributions"),
    DropIn("compat.dreamer", "kl_loss_v2", "16 sequences of 64 steps, 32 latents",
           lambda: two(64, 16, 32, scale=positive), dreamer.kl_loss_v2, originals.dreamer_v2, rival="distributions"),
    DropIn("compat.dreamer", "kl_loss_v3", "the same, as many latents as its 32 x 32 classes",
           lambda: two(64, 16, 1024, scale=positive), dreamer.kl_loss_v3, originals.dreamer_v3, rival="distributions"),
    DropIn("compat.compressai", "MaskedConv2d", "the context model of 192 latent channels, 256 x 256 pixels",
           lambda: [mean(8, 192, 16, 16)], lambda x: context_models()[0](x), lambda x: context_models()[1](x)),
    DropIn("nn.GaussianNLLLoss", "", "deep ensembles: 100 examples of a regression",
           lambda: (mean(100, 1), torch.randn(100, 1), positive(100, 1)), *NLL, tests="gaussian_nll_loss"),
    DropIn("nn.GaussianNLLLoss", "", "a Gaussian decoder of 64 x 64 pixels",
           lambda: (mean(32, 3, 64, 64), torch.randn(32, 3, 64, 64), positive(32, 3, 64, 64)),
           *NLL, tests="gaussian_nll_loss"),
    DropIn("gaussian_elbo", "", "pytorch/examples with a Gaussian decoder: MNIST, 20 latents",
           lambda: (torch.randn(128, 784), mean(128, 784), raw(128, 784), mean(128, 20), raw(128, 20)),
           our_elbo, originals.elbo, tests="elbo"),
    DropIn("iwae_bound", "with sample and densities", "Burda et al.: 20 images, 50 samples, 50 latents",
           lambda: (mean(50, 20), mean(20, 50), raw(20, 50)), our_iwae, originals.iwae,
           tests="elbo", shape="50x20x50", num_samples=50),
    # last: Pyro puts a KL of its own in the place of torch's
    DropIn("compat.pyro", "rsample, log_prob of two", "Pyro's VAE tutorial: 256 images, 50 latents",
           lambda: (mean(256, 50), positive(256, 50)), "fastelbo.compat.pyro", "pyro.distributions",
           trace_elbo, **TORCH),
]  # fmt: skip
