"""NVAE (NVlabs/NVAE and its descendants): the softly clamped Normal of its latent groups.

Replaces ``from distributions import Normal``.

What the original does and this keeps: 5 tanh(x / 5) limits means and log standard deviations to (-5, 5), and 0.01 is
added to the standard deviation; so its "standard normal" prior Normal(0, 0) has a standard deviation of 1.01.

Where the original is wrong: its KL loses its digits, and its sign, where the posterior is close to the prior, which its
residual posteriors are by construction; under autocast in half precision it is computed in half precision.
"""

import torch

from fastelbo import _checks
from fastelbo.compat import Derived, changed, sample_and_noise
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.reference.scale import log_std_and_std
from fastelbo.scale import Scale

__all__ = ["Normal"]

_SCALE, _STD = Scale.nvae(), Scale("std")


class Normal:
    """A diagonal Gaussian whose mean and log standard deviation are softly clamped.

    Args:
        mu, log_sigma: tensors of one shape.
        temp: multiplies the standard deviation.

    Attributes:
        mu: the mean; sigma is the standard deviation. Both may be assigned, or written to.

    Raises:
        ValueError, TypeError: in a method, as the op that computes it.

    Source:
        Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder"; its distributions.py.

    Example:
        >>> q = fastelbo.compat.nvae.Normal(torch.zeros(2, 3), torch.zeros(2, 3))
        >>> z, eps = q.sample()
        >>> q.kl(q).sum()
        tensor(0.)
    """

    def __init__(self, mu, log_sigma, temp=1.0):
        self.mu = _SCALE.soft_clamp * torch.tanh(mu / _SCALE.soft_clamp)
        self._log_sigma = log_sigma
        if temp != 1.0:
            self.sigma = self.sigma * temp

    @Derived
    def sigma(self):
        """The standard deviation."""
        return log_std_and_std(self._log_sigma, _SCALE)[1]

    def _spread(self):
        """A raw scale, and what it is."""
        return (self.sigma, _STD) if changed(self, "sigma") else (self._log_sigma, _SCALE)

    @_checks.calls(mean="mu", s="log_sigma")
    def sample(self):
        """(z, eps): a draw, and the noise in it."""
        return sample_and_noise(self.mu, *self._spread())

    @_checks.calls(mean="mu", s="log_sigma", noise="eps")
    def sample_given_eps(self, eps):
        """The draw that has this noise, eps."""
        s, scale = self._spread()
        return gaussian_rsample(self.mu, s, scale=scale, noise=eps)

    @_checks.calls(mean="mu", s="log_sigma", x="samples")
    def log_p(self, samples):
        """Log-density of samples, elementwise."""
        s, scale = self._spread()
        return gaussian_log_prob(samples, self.mu, s, scale=scale, event_ndim=0)

    @_checks.calls(mean_q="mu", s_q="log_sigma", mean_p="normal_dist.mu", s_p="normal_dist.log_sigma")
    def kl(self, normal_dist):
        """KL of this from another such Normal, normal_dist, elementwise."""
        (s, scale), (s_p, scale_p) = self._spread(), normal_dist._spread()
        return gaussian_kl(self.mu, s, normal_dist.mu, s_p, scale=scale, scale_p=scale_p, event_ndim=0)
