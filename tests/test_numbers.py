"""Numbers as people have them: of NumPy, and 0-d tensors."""

import functools

import numpy as np
import pytest
import torch

import fastelbo
from fastelbo.compat import bayesian, dreamer, nvae, vits


def gaussians(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


A, B = gaussians(4, 6)
IMAGE, WEIGHT = gaussians(2, 3, 5, 5)[0], torch.ones(6, 3, 3, 3)
Q = fastelbo.distributions.Normal(A, 1.0)

# Calls of one number each, and the Python number.
CALLS = {
    "num_samples": (lambda n: fastelbo.gaussian_rsample(A, B, seed=1, num_samples=n), 3),
    "num_samples of two": (lambda n: fastelbo.gaussian_rsample_kl(A, B, seed=1, num_samples=n), 3),
    "seed": (lambda n: fastelbo.gaussian_rsample(A, B, seed=n), 7),
    "noise_offset": (lambda n: fastelbo.gaussian_rsample(A, B, seed=1, noise_offset=n), 8),
    "temperature": (lambda x: fastelbo.gaussian_rsample(A, B, seed=1, temperature=x), 0.5),
    "temperature of two": (lambda x: fastelbo.gaussian_rsample_kl(A, B, seed=1, temperature=x), 0.5),
    "event_ndim": (lambda n: fastelbo.gaussian_kl(A, B, event_ndim=n), 2),
    "event_ndim of a density": (lambda n: fastelbo.gaussian_log_prob(A, B, 0.0, event_ndim=n), 0),
    "free_bits": (lambda x: fastelbo.gaussian_kl(A, B, free_bits=x), 0.25),
    "balance": (lambda x: fastelbo.gaussian_kl(A, B, B, A, balance=x), 0.25),
    "beta": (lambda x: fastelbo.gaussian_elbo(A, B, 0.0, A, B, beta=x), 0.5),
    "beta_nll": (lambda x: fastelbo.gaussian_nll(A, B, A, beta_nll=x), 0.5),
    "x_event_ndim": (lambda n: fastelbo.gaussian_elbo(A, B, 0.0, A, B, x_event_ndim=n), 1),
    "dim": (lambda n: fastelbo.iwae_bound(A, A, B, dim=n), 1),
    "mean": (lambda x: fastelbo.gaussian_rsample(x, B, seed=1), 0.5),
    "s": (lambda x: fastelbo.gaussian_kl(A, B, 0.0, x), -0.25),
    "x": (lambda n: fastelbo.gaussian_log_prob(n, A, B), 2),
    "dilation": (lambda n: fastelbo.masked_conv2d(IMAGE, WEIGHT, mask_type="A", dilation=n), 2),
    "channel_groups": (lambda n: fastelbo.masked_conv2d(IMAGE, WEIGHT, mask_type="A", channel_groups=n), 3),
    "groups of a stack": (
        lambda n: fastelbo.causal_conv2d(IMAGE, WEIGHT[..., :1, :2], stack="horizontal", channel_groups=n), 3,
    ),
    "conv_mask2d": (lambda n: fastelbo.conv_mask2d(n, n, n, "B", channel_groups=n), 3),
    "kernel_size": (lambda n: list(fastelbo.nn.MaskedConv2d(n, n, n).live_taps().flatten()), 3),
    "free_nats": (lambda x: dreamer.kl_loss_v1(A, B.exp(), B, A.exp(), free_nats=x), 0.25),
    "alpha": (lambda x: dreamer.kl_loss_v2(A, B.exp(), B, A.exp(), alpha=x), 0.25),
    "dyn_scale": (lambda x: dreamer.kl_loss_v3(A, B.exp(), B, A.exp(), dyn_scale=x), 0.25),
    "temp": (lambda x: nvae.Normal(A, B, x).sigma, 0.5),
    "noise_scale": (lambda x: vits.posterior_sample(A[None], B[None], torch.zeros(1, 4, 6), x), 0.5),
    "prior_std": (lambda x: bayesian.sample_weights([A], [B], prior_std=x, seed=torch.tensor([1])), 0.5),
    "sample_shape": (lambda n: Q.rsample((n,)).shape, 3),
    "image_shape": (
        lambda n: fastelbo.sampling.IncrementalSampler(PIXELS, (n // n, n, n), levels=2).sample(2, seed=1), 3,
    ),
    "n": (lambda n: fastelbo.sampling.IncrementalSampler(PIXELS, (1, 3, 3), levels=2).sample(n, seed=n), 2),
}  # fmt: skip
PIXELS = torch.nn.Sequential(fastelbo.nn.MaskedConv2d(1, 2, 3))


@pytest.mark.parametrize("kind", ["numpy", "half", "tensor"])
@pytest.mark.parametrize("name", CALLS)
def test_any_number_is_one(name, kind):
    call, number = CALLS[name]
    if isinstance(number, int):
        made = {"numpy": np.int64, "half": np.uint8, "tensor": torch.tensor}[kind](number)
    else:
        made = {"numpy": np.float64, "half": np.float16, "tensor": torch.tensor}[kind](number)
    torch.testing.assert_close(call(made), call(number), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["soft_clamp", "min_std", "var_eps", "beta"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor])
def test_numbers_of_a_scale(name, kind):
    scale = functools.partial(fastelbo.Scale, "softplus")
    assert scale(**{name: kind(0.5)}) == scale(**{name: 0.5})
    assert fastelbo.Scale("logvar", clamp=(kind(-1.0), kind(2.0))) == fastelbo.Scale("logvar", clamp=(-1.0, 2.0))


def test_a_learned_prior_is_a_parameter_without_dimensions(backend):
    """Its gradient is that of the sum, in float64."""
    mean, logvar = A.to(torch.get_default_device()), B.to(torch.get_default_device())
    mean_p, s_p = (torch.full((), x, requires_grad=True) for x in (0.3, -0.4))
    kl = fastelbo.gaussian_kl(mean, logvar, mean_p, s_p, reduction="sum", backend=backend)
    m, v, exact_mean, exact_s = (x.detach().double().requires_grad_() for x in (mean, logvar, mean_p, s_p))
    exact = 0.5 * ((v - exact_s).exp() + (m - exact_mean) ** 2 / exact_s.exp() - 1 - v + exact_s).sum()
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(kl, (mean_p, s_p))
    for grad, want in zip(grads, torch.autograd.grad(exact, (exact_mean, exact_s)), strict=True):
        assert grad.shape == () and grad.dtype == torch.float32
        torch.testing.assert_close(grad.double(), want, rtol=1e-6, atol=0)


def test_a_number_of_the_cpu_goes_with_tensors_of_any_device():
    """As in torch's arithmetic; here the other device is one without values."""
    mean, logvar, number = A.to("meta"), B.to("meta"), torch.tensor(0.5, requires_grad=True)
    for call in (
        lambda: fastelbo.gaussian_kl(mean, logvar, 0.0, number, backend="reference"),
        lambda: fastelbo.gaussian_log_prob(mean, mean, number, backend="reference"),
        lambda: fastelbo.gaussian_log_prob(number, mean, logvar, backend="reference"),
        lambda: fastelbo.gaussian_kl(mean, logvar, free_bits=number, backend="reference"),
        lambda: fastelbo.gaussian_elbo(mean, mean, 0.0, mean, logvar, beta=number, backend="reference").elbo,
    ):
        assert call().shape == (4,) and call().device.type == "meta"
    with pytest.raises(ValueError, match="s_p must be on the device of mean_q, meta; got cpu"):
        fastelbo.gaussian_kl(mean, logvar, 0.0, number.expand(6))
