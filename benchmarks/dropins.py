"""Drop-ins, each with the lines it replaces and inputs of the size that its users have.

The originals are those of installed packages (pip install fastelbo[dropins]), or else their lines, written out. Both
sides must compute the same, values and gradients of the same noise, or are not timed.
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

import cases
import rows
import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo
from fastelbo.compat import bayesian, dreamer, pythae

TOLERANCE = 1e-4  # of the largest value
SEED = 5
BOTH = "forward_backward"


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


# torch.distributions


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


# diffusers


def image_posterior(m, parameters):
    q = m.DiagonalGaussianDistribution(parameters)
    return q.sample(), q.kl()


def audio_posterior(m, parameters):
    q = m.OobleckDiagonalGaussianDistribution(parameters)
    return q.sample(), q.kl()


# VDVAE, whose own lines are TorchScript


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    return -0.5 + logsigma2 - logsigma1 + 0.5 * (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / (logsigma2.exp() ** 2)


def draw_gaussian_diag_samples(mu, logsigma):
    eps = torch.empty_like(mu).normal_(0.0, 1.0)
    return torch.exp(logsigma) * eps + mu


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    VDVAE = types.SimpleNamespace(
        **{f.__name__: torch.jit.script(f) for f in (gaussian_analytical_kl, draw_gaussian_diag_samples)}
    )


def vdvae_block(m, q, features):
    zdim = q.shape[1] // 2
    qm, qv = q.chunk(2, dim=1)
    pm, pv = features[:, :zdim], features[:, zdim : 2 * zdim]
    return m.draw_gaussian_diag_samples(qm, qv), m.gaussian_analytical_kl(qm, pm, qv, pv)


# NVAE


class NVAENormal:
    def __init__(self, mu, log_sigma):
        self.mu = 5 * torch.tanh(mu / 5)
        self.sigma = torch.exp(5 * torch.tanh(log_sigma / 5)) + 0.01

    def sample(self):
        eps = torch.randn_like(self.mu)
        return self.mu + self.sigma * eps, eps

    def kl(self, other):
        difference, ratio = (self.mu - other.mu) / other.sigma, self.sigma / other.sigma
        return 0.5 * (difference**2 + ratio**2) - 0.5 - torch.log(ratio)


def nvae_group(normal, mu_q, log_sigma_q, mu_p, log_sigma_p):
    p, q = normal(mu_p, log_sigma_p), normal(mu_p + mu_q, log_sigma_p + log_sigma_q)
    z, _ = q.sample()
    return z, q.kl(p).sum(dim=[1, 2, 3])


# VITS


def frames(batch, longest):
    """The mask of sentences of several lengths, [B, 1, T]."""
    lengths = torch.linspace(0.4, 1, batch) * longest
    return (torch.arange(longest) < lengths[:, None])[:, None].float()


def vits_kl_loss(z_p, logs_q, m_p, logs_p, z_mask):
    kl = logs_p - logs_q - 0.5
    kl = kl + 0.5 * ((z_p - m_p) ** 2) * torch.exp(-2.0 * logs_p)
    return torch.sum(kl * z_mask) / torch.sum(z_mask)


def vits_posterior_sample(m, logs, x_mask):
    return (m + torch.randn_like(m) * torch.exp(logs)) * x_mask


# guided-diffusion


def normal_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (
        -1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + ((mean1 - mean2) ** 2) * torch.exp(-logvar2)
    )


def variational_bound(kl, *inputs):
    return kl(*inputs).mean(dim=[1, 2, 3]) / math.log(2.0)


# pythae, pytorch/examples and most others


def sample_and_kl(mu, log_var):
    std = torch.exp(0.5 * log_var)
    z = mu + torch.randn_like(std) * std
    return z, -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)


def sample_gauss(mu, std):
    eps = torch.randn_like(std)
    return mu + eps * std, eps


def kl(mu, log_var):
    return -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)


def pythae_lines(m, mu, log_var):
    z, _ = m.sample_gauss(mu, torch.exp(0.5 * log_var))
    return z, m.kl(mu, log_var)


# Bayesian layers of the network of Blundell et al.

UNITS = (784, 400, 400, 10)
LAYERS = list(itertools.pairwise(UNITS))
SHAPES = [shape for inputs, outputs in LAYERS for shape in ((outputs, inputs), (outputs,))]
WEIGHTS = str(sum(map(math.prod, SHAPES)))


class BayesianTorchLinear(nn.Module):
    """bayesian-torch's LinearReparameterization, as far as its KL goes."""

    def __init__(self, inputs, outputs):
        super().__init__()
        for name, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            self.register_parameter(f"mu_{name}", nn.Parameter(0.1 * torch.randn(shape)))
            self.register_parameter(f"rho_{name}", nn.Parameter(0.1 * torch.randn(shape) - 3))
            self.register_buffer(f"prior_{name}_mu", torch.zeros(shape))
            self.register_buffer(f"prior_{name}_sigma", torch.ones(shape))

    def kl_loss(self):
        sigma_weight = torch.log1p(torch.exp(self.rho_weight))
        kl = kl_div(self.mu_weight, sigma_weight, self.prior_weight_mu, self.prior_weight_sigma)
        sigma_bias = torch.log1p(torch.exp(self.rho_bias))
        return kl + kl_div(self.mu_bias, sigma_bias, self.prior_bias_mu, self.prior_bias_sigma)


def kl_div(mu_q, sigma_q, mu_p, sigma_p):
    kl = torch.log(sigma_p) - torch.log(sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * (sigma_p**2)) - 0.5
    return kl.mean()


def get_kl_loss(model):
    kl_loss = None
    for layer in model.modules():
        if hasattr(layer, "kl_loss"):
            kl_loss = layer.kl_loss() if kl_loss is None else kl_loss + layer.kl_loss()
    return kl_loss


@functools.cache
def bayesian_torch_model():
    return nn.Sequential(*(BayesianTorchLinear(*layer) for layer in LAYERS))


@functools.cache
def torchbnn_model():
    linear = importlib.import_module("torchbnn").BayesLinear
    model = nn.Sequential(*(linear(0.0, 0.1, *layer) for layer in LAYERS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # at the start it lies on the prior
    return model


def weights_of_network():
    return [mean(*shape) for shape in SHAPES] + [raw(*shape) for shape in SHAPES]


def draw_all(function, *inputs):
    weights, kl = function(inputs[: len(SHAPES)], inputs[len(SHAPES) :])
    return (*weights, kl)


def sample_weights(means, rhos):
    weights, kl = [], 0
    for mu, rho in zip(means, rhos, strict=True):
        sigma = torch.log1p(torch.exp(rho))
        weights.append(mu + sigma * torch.randn_like(mu))
        kl = kl + (-torch.log(sigma) + (sigma**2 + mu**2) / 2 - 0.5).sum()
    return weights, kl


# World models


def dreamer_kl(mean_q, std_q, mean_p, std_p):
    # sheeprl turns validation off
    q = Independent(Normal(mean_q, std_q, validate_args=False), 1, validate_args=False)
    return kl_divergence(q, Independent(Normal(mean_p, std_p, validate_args=False), 1, validate_args=False))


def dreamer_kls(mean_q, std_q, mean_p, std_p):
    prior_moves = dreamer_kl(mean_q.detach(), std_q.detach(), mean_p, std_p)
    return prior_moves, dreamer_kl(mean_q, std_q, mean_p.detach(), std_p.detach())


def dreamer_v1(*inputs):
    return dreamer_kl(*inputs).mean().clamp(min=3.0)


def dreamer_v2(*inputs):
    prior_moves, posterior_moves = (kl.mean().clamp(min=0.0) for kl in dreamer_kls(*inputs))
    return 0.8 * prior_moves + (1 - 0.8) * posterior_moves


def dreamer_v3(*inputs):
    prior_moves, posterior_moves = (kl.clamp(min=1.0) for kl in dreamer_kls(*inputs))
    return (1.0 * prior_moves + 0.1 * posterior_moves).mean()


# Objectives


def elbo(x, x_mean, x_logvar, mu, logvar):
    nll = 0.5 * torch.sum(math.log(2 * math.pi) + x_logvar + (x - x_mean).pow(2) / x_logvar.exp(), dim=1)
    return -(nll + kl(mu, logvar))


def our_elbo(*inputs):
    return fastelbo.gaussian_elbo(*inputs).elbo


def iwae(log_p_x, mu, log_var):
    mu, log_var = mu.repeat(len(log_p_x), 1, 1), log_var.repeat(len(log_p_x), 1, 1)
    z, _ = sample_gauss(mu, torch.exp(0.5 * log_var))
    log_q_z = (-0.5 * (log_var + torch.pow(z - mu, 2) / torch.exp(log_var))).sum(dim=-1)
    log_p_z = -0.5 * (z**2).sum(dim=-1)
    return z, torch.logsumexp(log_p_x + log_p_z - log_q_z, dim=0) - math.log(len(log_p_x))


def our_iwae(log_p_x, mu, log_var):
    z = fastelbo.gaussian_rsample(mu, log_var, num_samples=len(log_p_x))
    log_q_z = fastelbo.gaussian_log_prob(z, mu, log_var, event_ndim=1)
    log_p_z = fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1)
    return z, fastelbo.iwae_bound(log_p_x, log_p_z, log_q_z)


DISTRIBUTIONS = "fastelbo.distributions", "torch.distributions"
IMAGES = "fastelbo.compat.diffusers", "diffusers.models.autoencoders.vae"
AUDIO = "fastelbo.compat.diffusers", "diffusers.models.autoencoders.autoencoder_oobleck"
TORCH = {"rival": "distributions", "tests": "distributions"}
ELBO = {"tests": "elbo"}
DROP_INS = [
    DropIn(
        "distributions",
        "rsample, kl_divergence",
        "scvi-tools: 128 cells, 10 latents",
        lambda: (mean(128, 10), positive(128, 10)),
        *DISTRIBUTIONS,
        scvi,
        **TORCH,
    ),
    DropIn(
        "distributions",
        "log_prob",
        "a Gaussian decoder of MNIST",
        lambda: (torch.randn(128, 784), mean(128, 784), positive(128, 784)),
        *DISTRIBUTIONS,
        likelihood,
        **TORCH,
    ),
    DropIn(
        "compat.diffusers",
        "DiagonalGaussianDistribution: sample, kl",
        "Stable Diffusion's autoencoder on 512 x 512 pixels",
        lambda: [mean(4, 8, 64, 64)],
        *IMAGES,
        image_posterior,
    ),
    DropIn(
        "compat.diffusers",
        "DiagonalGaussianDistribution: sample, kl",
        "Stable Diffusion 3's on 1024 x 1024 pixels",
        lambda: [mean(4, 32, 128, 128)],
        *IMAGES,
        image_posterior,
    ),
    DropIn(
        "compat.diffusers",
        "OobleckDiagonalGaussianDistribution: sample, kl",
        "Stable Audio Open: 64 channels, 1024 frames",
        lambda: [mean(4, 128, 1024)],
        *AUDIO,
        audio_posterior,
    ),
    DropIn(
        "compat.vdvae",
        "draw_gaussian_diag_samples, gaussian_analytical_kl",
        "CIFAR-10's finest blocks: 16 latent channels beside 384 others",
        lambda: (raw(16, 32, 32, 32), raw(16, 32 + 384, 32, 32)),
        "fastelbo.compat.vdvae",
        VDVAE,
        vdvae_block,
    ),
    DropIn(
        "compat.vdvae",
        "draw_gaussian_diag_samples, gaussian_analytical_kl",
        "CIFAR-10's coarsest blocks",
        lambda: (raw(16, 32, 1, 1), raw(16, 32 + 384, 1, 1)),
        "fastelbo.compat.vdvae",
        VDVAE,
        vdvae_block,
    ),
    DropIn(
        "compat.nvae",
        "Normal: sample, kl",
        "a group of CIFAR-10: 20 latent channels, 32 images a GPU",
        lambda: two(32, 20, 16, 16),
        fastelbo.compat.nvae.Normal,
        NVAENormal,
        nvae_group,
    ),
    DropIn(
        "compat.vits",
        "kl_loss",
        "192 channels, sentences of up to 400 frames",
        lambda: (*two(16, 192, 400), frames(16, 400)),
        fastelbo.compat.vits.kl_loss,
        vits_kl_loss,
    ),
    DropIn(
        "compat.vits",
        "posterior_sample",
        "the same",
        lambda: (mean(16, 192, 400), raw(16, 192, 400), frames(16, 400)),
        fastelbo.compat.vits.posterior_sample,
        vits_posterior_sample,
    ),
    DropIn(
        "compat.guided_diffusion",
        "normal_kl",
        "ImageNet at 64 x 64 pixels, learned variances",
        lambda: two(32, 3, 64, 64),
        fastelbo.compat.guided_diffusion.normal_kl,
        normal_kl,
        variational_bound,
    ),
    DropIn(
        "compat.pythae",
        "sample_and_kl",
        "MNIST: 100 images, 16 latents",
        lambda: (mean(100, 16), raw(100, 16)),
        pythae.sample_and_kl,
        sample_and_kl,
    ),
    DropIn(
        "compat.pythae",
        "sample_gauss, kl",
        "the same, line by line",
        lambda: (mean(100, 16), raw(100, 16)),
        pythae,
        types.SimpleNamespace(sample_gauss=sample_gauss, kl=kl),
        pythae_lines,
    ),
    DropIn(
        "compat.bayesian",
        "bayesian_kl_loss (torchbnn)",
        "a network of 784-400-400-10 units",
        lambda: list(torchbnn_model().parameters()),
        bayesian,
        "torchbnn.functional",
        lambda m, *_: m.bayesian_kl_loss(torchbnn_model(), reduction="sum"),
        shape=WEIGHTS,
    ),
    DropIn(
        "compat.bayesian",
        "get_kl_loss (bayesian-torch)",
        "the same",
        lambda: list(bayesian_torch_model().parameters()),
        bayesian.get_kl_loss,
        get_kl_loss,
        lambda function, *_: function(bayesian_torch_model()),
        shape=WEIGHTS,
    ),
    DropIn(
        "compat.bayesian",
        "kl_div (bayesian-torch)",
        "its first layer",
        lambda: two(400, 784, scale=positive),
        bayesian.kl_div,
        kl_div,
    ),
    DropIn(
        "compat.bayesian",
        "sample_weights",
        "the network",
        weights_of_network,
        bayesian.sample_weights,
        sample_weights,
        draw_all,
        shape=WEIGHTS,
    ),
    DropIn(
        "compat.dreamer",
        "kl_loss_v1",
        "50 sequences of 50 steps, 30 latents",
        lambda: two(50, 50, 30, scale=positive),
        dreamer.kl_loss_v1,
        dreamer_v1,
        rival="distributions",
    ),
    DropIn(
        "compat.dreamer",
        "kl_loss_v2",
        "16 sequences of 64 steps, 32 latents",
        lambda: two(64, 16, 32, scale=positive),
        dreamer.kl_loss_v2,
        dreamer_v2,
        rival="distributions",
    ),
    DropIn(
        "compat.dreamer",
        "kl_loss_v3",
        "the same, as many latents as its 32 x 32 classes",
        lambda: two(64, 16, 1024, scale=positive),
        dreamer.kl_loss_v3,
        dreamer_v3,
        rival="distributions",
    ),
    DropIn(
        "nn.GaussianNLLLoss",
        "",
        "deep ensembles: 100 examples of a regression",
        lambda: (mean(100, 1), torch.randn(100, 1), positive(100, 1)),
        fastelbo.nn.GaussianNLLLoss(),
        nn.GaussianNLLLoss(),
        tests="gaussian_nll_loss",
    ),
    DropIn(
        "nn.GaussianNLLLoss",
        "",
        "a Gaussian decoder of 64 x 64 pixels",
        lambda: (mean(32, 3, 64, 64), torch.randn(32, 3, 64, 64), positive(32, 3, 64, 64)),
        fastelbo.nn.GaussianNLLLoss(),
        nn.GaussianNLLLoss(),
        tests="gaussian_nll_loss",
    ),
    DropIn(
        "gaussian_elbo",
        "",
        "pytorch/examples with a Gaussian decoder: MNIST, 20 latents",
        lambda: (torch.randn(128, 784), mean(128, 784), raw(128, 784), mean(128, 20), raw(128, 20)),
        our_elbo,
        elbo,
        **ELBO,
    ),
    DropIn(
        "iwae_bound",
        "with sample and densities",
        "Burda et al.: 20 images, 50 samples, 50 latents",
        lambda: (mean(50, 20), mean(20, 50), raw(20, 50)),
        our_iwae,
        iwae,
        **ELBO,
        shape="50x20x50",
        num_samples=50,
    ),
    DropIn(  # last: Pyro puts a KL of its own in the place of torch's
        "compat.pyro",
        "rsample, log_prob of two",
        "Pyro's VAE tutorial: 256 images, 50 latents",
        lambda: (mean(256, 50), positive(256, 50)),
        "fastelbo.compat.pyro",
        "pyro.distributions",
        trace_elbo,
        **TORCH,
    ),
]


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


def results(function: Callable, inputs, noise=None) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    call = cases.bind(function, inputs, BOTH)
    torch.manual_seed(SEED)
    with noise or nullcontext():
        outputs, grads = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [tensor.detach() for tensor in (*outputs, *grads)]


def check(drop_in: DropIn, inputs) -> list[torch.Tensor]:
    """Raises AssertionError unless ours agrees with theirs; outputs and gradients."""
    ours, theirs = drop_in.contestants().values()
    found = results(ours, inputs)
    cases.compare(
        f"{drop_in.op} {drop_in.case}", found, results(theirs, inputs, OurNoise(drop_in.num_samples)), TOLERANCE
    )
    return found


def timed(device: str, shapes=(), ops=(), dtypes=(), rivals=()) -> list[DropIn]:
    """What is to be timed, as cases.timed; nothing on a GPU, and nothing by its shape."""
    if device != "cpu" or shapes or "float32" not in (dtypes or ["float32"]):
        return []
    return [one for one in DROP_INS if one.op in (ops or [one.op]) and one.rival in (rivals or [one.rival])]


def calls(drop_in: DropIn) -> tuple[dict[str, Callable], dict]:
    """Calls without arguments of both sides, which agree, and the fields that their rows have in common.

    Raises:
        AssertionError: if they do not agree.
    """
    torch.manual_seed(0)
    inputs = drop_in.inputs()
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    found = check(drop_in, inputs)
    # inputs and outputs once; in the backward the inputs again, and the gradients of both
    moved = sum(tensor.nbytes for tensor in (*inputs, *inputs, *found, *found[: len(found) - len(leaves)]))
    shape = drop_in.shape or "x".join(map(str, inputs[0].shape))
    common = {"op": drop_in.op, "case": drop_in.case, "pass_": BOTH, "shape": shape, "dtype": "float32"}
    made = {name: cases.bind(function, inputs, BOTH) for name, function in drop_in.contestants().items()}
    return made, common | {"bytes": moved}


def fields(drop_in: DropIn, common: dict, samples: dict[str, list[float]]) -> list[dict]:
    """The fields of both rows that do not say where they were timed."""
    ratio = {f"over_{drop_in.rival}": min(samples[drop_in.rival]) / min(samples["cpu"])}
    return [
        common | {"contestant": name, "rounds": len(values), **rows.times(values)} | (ratio if name == "cpu" else {})
        for name, values in samples.items()
    ]
