"""NVAE (NVlabs/NVAE and its descendants): the softly clamped Normal of its latent groups.

Replaces ``from distributions import Normal``.

What the original does and this keeps: 5 tanh(x / 5) limits means and log standard deviations to (-5, 5), and 0.01 is
added to the standard deviation; so its "standard normal" prior Normal(0, 0) has a standard deviation of 1.01.

Where the original is wrong: its KL loses its digits, and its sign, where the posterior is close to the prior, which its
residual posteriors are by construction; under autocast in half precision it is computed in half precision.
"""

import torch

from fastelbo import _checks
from fastelbo.compat import sample_and_noise
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.reference.scale import log_std_and_std
from fastelbo.scale import Scale

__all__ = ["Normal"]

_SCALE = Scale.nvae()


class Normal:
    """A diagonal Gaussian whose mean and log standard deviation are softly clamped.

    Args:
        mu, log_sigma: tensors of one shape.
        temp: multiplies the standard deviation.

    Attributes:
        mu: the mean; sigma is the standard deviation.

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
        self._s, self._scale = log_sigma, _SCALE
        if temp != 1.0:
            self._s, self._scale = self.sigma * temp, Scale("std")

    @property
    def sigma(self):
        """The standard deviation."""
        return log_std_and_std(self._s, self._scale)[1]

    @_checks.calls(mean="mu", s="log_sigma")
    def sample(self):
        """(z, eps): a draw, and the noise in it."""
        return sample_and_noise(self.mu, self._s, self._scale)

    @_checks.calls(mean="mu", s="log_sigma", noise="eps")
    def sample_given_eps(self, eps):
        """The draw that has this noise, eps."""
        return gaussian_rsample(self.mu, self._s, scale=self._scale, noise=eps)

    @_checks.calls(mean="mu", s="log_sigma", x="samples")
    def log_p(self, samples):
        """Log-density of samples, elementwise."""
        return gaussian_log_prob(samples, self.mu, self._s, scale=self._scale, event_ndim=0)

    @_checks.calls(mean_q="mu", s_q="log_sigma", mean_p="normal_dist.mu", s_p="normal_dist.log_sigma")
    def kl(self, normal_dist):
        """KL of this from another such Normal, normal_dist, elementwise."""
        other = normal_dist
        return gaussian_kl(self.mu, self._s, other.mu, other._s, scale=self._scale, scale_p=other._scale, event_ndim=0)
