"""The lines of pythae, of pytorch/examples and of most other VAEs.

Replaces::

    z, eps = self._sample_gauss(mu, torch.exp(0.5 * log_var))
    kld = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)

by ``z, kld = sample_and_kl(mu, log_var)``, or each line by ``sample_gauss`` and ``kl``.

Where the original is wrong: close to the prior it subtracts numbers near 1, so that a collapsed posterior's KL has no
digits and often the wrong sign; in float16 exp(log_var) overflows from 11.1 on. Here the noise is not kept for the
backward either.
"""

from fastelbo import _checks
from fastelbo.compat import sample_and_noise
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_rsample_kl import gaussian_rsample_kl

__all__ = ["kl", "sample_and_kl", "sample_gauss"]


@_checks.calls(mean="mu", s="std")
def sample_gauss(mu, std):
    """Draws from N(mu, std^2), as pythae's _sample_gauss does.

    Args:
        mu, std: tensors of one shape.

    Returns:
        (z, eps): the draw, and the noise in it.

    Raises:
        ValueError, TypeError: as gaussian_rsample.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes"; pythae/models/vae/vae_model.py.

    Example:
        >>> z, eps = fastelbo.compat.pythae.sample_gauss(torch.zeros(2, 3), torch.ones(2, 3))
        >>> torch.equal(z, eps)
        True
    """
    return sample_and_noise(mu, std, "std")


@_checks.calls(mean_q="mu", s_q="log_var")
def kl(mu, log_var):
    """KL of N(mu, exp(log_var)) from the standard normal, summed over the last dimension.

    Args:
        mu, log_var: tensors of one shape.

    Returns:
        KL in nats, of that shape less the last dimension.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes"; pythae/models/vae/vae_model.py.

    Example:
        >>> fastelbo.compat.pythae.kl(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1.5000, 1.5000])
    """
    return gaussian_kl(mu, log_var, event_ndim=1)


@_checks.calls(mean_q="mu", s_q="log_var")
def sample_and_kl(mu, log_var):
    """A draw from N(mu, exp(log_var)) and what kl returns, in one pass.

    Args:
        mu, log_var: tensors of one shape.

    Returns:
        (z, kl).

    Raises:
        ValueError, TypeError: as gaussian_rsample_kl.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes"; pythae/models/vae/vae_model.py.

    Example:
        >>> z, kl = fastelbo.compat.pythae.sample_and_kl(torch.ones(2, 3), torch.zeros(2, 3))
        >>> kl
        tensor([1.5000, 1.5000])
    """
    return gaussian_rsample_kl(mu, log_var, event_ndim=1)
