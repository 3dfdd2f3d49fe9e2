"""KL divergence of diagonal Gaussians."""

import torch

import fastelbo


def test_cpu_equals_reference():
    mean, logvar = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    expected = fastelbo.gaussian_kl(mean, logvar, backend="reference")
    torch.testing.assert_close(fastelbo.gaussian_kl(mean, logvar, backend="cpu"), expected)
