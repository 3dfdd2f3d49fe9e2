"""Very deep VAEs (openai/vdvae and its descendants): elementwise KL and draws, from log standard deviations.

Replaces ``from vae_helpers import gaussian_analytical_kl, draw_gaussian_diag_samples``.

Where the original is wrong: its KL squares exp(logsigma) and divides by it, which in float32 is NaN or infinite for log
standard deviations beyond 44, and it loses its digits, and its sign, near the prior; of half-precision inputs it is
computed in half precision. Here it is right in all of these, and float32 for half inputs.
"""

from fastelbo import _checks
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_rsample import gaussian_rsample

__all__ = ["draw_gaussian_diag_samples", "gaussian_analytical_kl"]


@_checks.calls(mean_q="mu1", s_q="logsigma1", mean_p="mu2", s_p="logsigma2")
def gaussian_analytical_kl(mu1, mu2, logsigma1, logsigma2):
    """KL of N(mu1, exp(logsigma1)^2) from N(mu2, exp(logsigma2)^2), elementwise. Mind the order of the arguments.

    Args:
        mu1, mu2, logsigma1, logsigma2: tensors that broadcast.

    Returns:
        KL in nats, of the broadcast shape.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Child 2021, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images"; vae_helpers.py.

    Example:
        >>> zeros = torch.zeros(2)
        >>> fastelbo.compat.vdvae.gaussian_analytical_kl(torch.ones(2), zeros, zeros, zeros)
        tensor([0.5000, 0.5000])
    """
    return gaussian_kl(mu1, logsigma1, mu2, logsigma2, scale="log_std", event_ndim=0)


@_checks.calls(mean="mu", s="logsigma")
def draw_gaussian_diag_samples(mu, logsigma):
    """Draws from N(mu, exp(logsigma)^2).

    Args:
        mu, logsigma: tensors that broadcast.

    Returns:
        A tensor of the broadcast shape.

    Raises:
        ValueError, TypeError: as gaussian_rsample.

    Source:
        Child 2021, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images"; vae_helpers.py.

    Example:
        >>> fastelbo.compat.vdvae.draw_gaussian_diag_samples(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """
    return gaussian_rsample(mu, logsigma, scale="log_std")
