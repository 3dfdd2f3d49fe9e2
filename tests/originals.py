"""Lines of other projects, written out where the package index does not have them: what ops and drop-ins are held
against, in test_compat.py, and in the benchmarks and test_contestants.py."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

LOG_2PI = math.log(2 * math.pi)
STANDARD_NORMAL = Normal(0.0, 1.0)

# VDVAE


def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    return -0.5 + logsigma2 - logsigma1 + 0.5 * (logsigma1.exp() ** 2 + (mu1 - mu2) ** 2) / (logsigma2.exp() ** 2)


def draw_gaussian_diag_samples(mu, logsigma):
    eps = torch.empty_like(mu).normal_(0.0, 1.0)
    return torch.exp(logsigma) * eps + mu


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


# VITS


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


# pythae, pytorch/examples and most others


def sample_gauss(mu, std, eps=None):
    eps = torch.randn_like(std) if eps is None else eps
    return mu + eps * std, eps


def sample(mu, log_var, eps=None):
    return sample_gauss(mu, torch.exp(0.5 * log_var), eps)[0]


def kl(mu, log_var):
    return -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)


def kl_to_prior(mu_q, log_var_q, mu_p, log_var_p):
    ratio = torch.exp(log_var_q - log_var_p)
    return 0.5 * torch.sum(-1.0 + log_var_p - log_var_q + ratio + (mu_q - mu_p).pow(2) * torch.exp(-log_var_p), dim=-1)


def sample_and_kl(mu, log_var, eps=None):
    return sample(mu, log_var, eps), kl(mu, log_var)


def log_prob(x, mu, log_var):
    return -0.5 * torch.sum(log_var + (x - mu).pow(2) * torch.exp(-log_var) + LOG_2PI, dim=-1)


# Their lines by torch.distributions


def normal(mu, log_var):
    return Normal(mu, torch.exp(0.5 * log_var))


def distributions_sample(mu, log_var):
    return normal(mu, log_var).rsample()


def distributions_kl(mu, log_var, *prior):
    return kl_divergence(normal(mu, log_var), normal(*prior) if prior else STANDARD_NORMAL).sum(-1)


def distributions_sample_and_kl(mu, log_var):
    q = normal(mu, log_var)
    return q.rsample(), kl_divergence(q, STANDARD_NORMAL).sum(-1)


def distributions_log_prob(x, mu, log_var):
    return normal(mu, log_var).log_prob(x).sum(-1)


# bayesian-torch, and what others write for a network's weights


def kl_div(mu_q, sigma_q, mu_p, sigma_p):
    kl = torch.log(sigma_p) - torch.log(sigma_q) + (sigma_q**2 + (mu_q - mu_p) ** 2) / (2 * (sigma_p**2)) - 0.5
    return kl.mean()


class Reparameterized(nn.Module):
    """The parameters of a layer of bayesian-torch, and its KL."""

    def __init__(self, name, shape, bias=True):
        super().__init__()
        self.tensors = {name: shape, **({"bias": shape[:1]} if bias else {})}
        for name, shape in self.tensors.items():
            prior = name.replace("kernel", "weight")
            self.register_parameter(f"mu_{name}", nn.Parameter(torch.randn(shape)))
            self.register_parameter(f"rho_{name}", nn.Parameter(torch.randn(shape) - 3))
            self.register_buffer(f"prior_{prior}_mu", torch.full(shape, 0.1))
            self.register_buffer(f"prior_{prior}_sigma", torch.full(shape, 0.5))
        if not bias:
            self.mu_bias = self.rho_bias = None

    def kl_loss(self):
        kl = 0
        for name in self.tensors:
            sigma = torch.log1p(torch.exp(getattr(self, f"rho_{name}")))
            prior = (getattr(self, f"prior_{name.replace('kernel', 'weight')}_{which}") for which in ("mu", "sigma"))
            kl = kl + kl_div(getattr(self, f"mu_{name}"), sigma, *prior)
        return kl


def get_kl_loss(model):
    kl_loss = None
    for layer in model.modules():
        if hasattr(layer, "kl_loss"):
            kl_loss = layer.kl_loss() if kl_loss is None else kl_loss + layer.kl_loss()
    return kl_loss


def sample_weights(means, rhos):
    weights, kl = [], 0
    for mu, rho in zip(means, rhos, strict=True):
        sigma = torch.log1p(torch.exp(rho))
        weights.append(mu + sigma * torch.randn_like(mu))
        kl = kl + (-torch.log(sigma) + (sigma**2 + mu**2) / 2 - 0.5).sum()
    return weights, kl


# Dreamer


def dreamer_kl(mean_q, std_q, mean_p, std_p):
    # sheeprl turns validation off
    q = Independent(Normal(mean_q, std_q, validate_args=False), 1, validate_args=False)
    return kl_divergence(q, Independent(Normal(mean_p, std_p, validate_args=False), 1, validate_args=False))


def dreamer_kls(mean_q, std_q, mean_p, std_p):
    prior_moves = dreamer_kl(mean_q.detach(), std_q.detach(), mean_p, std_p)
    return prior_moves, dreamer_kl(mean_q, std_q, mean_p.detach(), std_p.detach())


def dreamer_v1(*inputs, free_nats=3.0):
    return dreamer_kl(*inputs).mean().clamp(min=free_nats)


def dreamer_v2(*inputs, free_nats=0.0, free_avg=True, alpha=0.8):
    prior_moves, posterior_moves = (
        kl.mean().clamp(min=free_nats) if free_avg else kl.clamp(min=free_nats).mean() for kl in dreamer_kls(*inputs)
    )
    return alpha * prior_moves + (1 - alpha) * posterior_moves


def dreamer_v3(*inputs, free_nats=1.0, dyn_scale=1.0, rep_scale=0.1):
    prior_moves, posterior_moves = (kl.clamp(min=free_nats) for kl in dreamer_kls(*inputs))
    return (dyn_scale * prior_moves + rep_scale * posterior_moves).mean()


# CompressAI


class CompressAIMaskedConv2d(nn.Conv2d):
    def __init__(self, *args, mask_type="A", **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.ones_like(self.weight.data))
        h, w = self.weight.shape[2:]
        self.mask[:, :, h // 2, w // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, h // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data = self.weight.data * self.mask
        return super().forward(x)


class CompressAICheckerboardMaskedConv2d(CompressAIMaskedConv2d):
    def __init__(self, *args, mask_type="A", **kwargs):
        super().__init__(*args, **kwargs)
        h, w = self.weight.shape[2:]
        self.mask[:] = 1
        self.mask[:, :, 0::2, 0::2] = 0
        self.mask[:, :, 1::2, 1::2] = 0
        self.mask[:, :, h // 2, w // 2] = mask_type == "B"


# Gated PixelCNNs: products with masks, and full convolutions


class GatedBlock(nn.Module):
    """Of the parameters of a fastelbo.nn.GatedMaskedConv2d."""

    def __init__(self, block):
        super().__init__()
        self.block, (rows, columns) = block, block.vertical.weight.shape[2:]
        self.dilation, left = block.horizontal.dilation[0], block.horizontal.weight.shape[3] - 1
        sides = columns // 2, columns // 2, rows - 1, 0
        self.around_v, self.around_h = ([self.dilation * side for side in pad] for pad in (sides, (left, 0, 0, 0)))
        masks = {name: getattr(block, name).live_taps() for name in ("vertical", "horizontal", "out")}
        for name, mask in masks.items():
            self.register_buffer(f"mask_{name}", mask)

    def gate(self, x):
        a, b = x.chunk(2, dim=1)
        return (torch.tanh(a) if self.block.activation == "tanh_sigmoid" else a) * torch.sigmoid(b)

    def forward(self, v, h, cond=None):
        vertical, horizontal, link, out = (getattr(self.block, n) for n in ("vertical", "horizontal", "link", "out"))
        z = F.conv2d(
            F.pad(v, self.around_v), vertical.weight * self.mask_vertical, vertical.bias, dilation=self.dilation
        )
        seen = z
        if self.block.link_convention != "mask-first-layer":
            seen = F.pad(z, (0, 0, 1, 0))[:, :, :-1]
        if self.block.link_convention == "pad-first" and vertical.bias is not None:
            above = torch.zeros_like(z[:, :, :1]) + vertical.bias[:, None, None]
            seen = torch.cat([above, z[:, :, :-1]], dim=2)
        weight = horizontal.weight * self.mask_horizontal
        u = F.conv2d(F.pad(h, self.around_h), weight, horizontal.bias, dilation=self.dilation) + link(seen)
        if cond is not None:
            v_cond, h_cond = self.block.cond(cond if cond.dim() == 4 else cond[:, :, None, None]).chunk(2, dim=1)
            z, u = z + v_cond, u + h_cond
        y = F.conv2d(self.gate(u), out.weight * self.mask_out, out.bias)
        return self.gate(z), y + h if self.block.residual else y


# Objectives


def elbo(x, x_mean, x_logvar, mu, logvar):
    nll = 0.5 * torch.sum(LOG_2PI + x_logvar + (x - x_mean).pow(2) / x_logvar.exp(), dim=1)
    return -(nll + kl(mu, logvar))


def iwae(log_p_x, mu, log_var):
    mu, log_var = mu.repeat(len(log_p_x), 1, 1), log_var.repeat(len(log_p_x), 1, 1)
    z = sample(mu, log_var)
    log_q_z = (-0.5 * (log_var + torch.pow(z - mu, 2) / torch.exp(log_var))).sum(dim=-1)
    log_p_z = -0.5 * (z**2).sum(dim=-1)
    return z, torch.logsumexp(log_p_x + log_p_z - log_q_z, dim=0) - math.log(len(log_p_x))
