"""VITS and its descendants: the prior loss of one sample under a mask, and the posterior's sample.

Replaces ``from losses import kl_loss`` and ``z = (m + torch.randn_like(m) * torch.exp(logs)) * x_mask``.

The loss takes the cross-entropy from one sample z_p and the entropy in closed form; a single value may be negative, and
is meant so. It is divided by the number of frames, not of elements.

Where the original is wrong: it multiplies by the mask, so that a NaN or an infinity in a padded frame spoils the whole
loss. Here padded frames are never read, and get gradient 0.
"""

import torch

from fastelbo import _checks
from fastelbo.ops.gaussian_log_prob import Terms, log_prob
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.reference.scale import arithmetic

__all__ = ["kl_loss", "posterior_sample"]


@_checks.calls(x="z_p", mean="m_p", s="logs_p", mask="z_mask")
def kl_loss(z_p, logs_q, m_p, logs_p, z_mask):
    r"""One-sample KL of N(., exp(logs_q)^2), which the flow took to z_p, from N(m_p, exp(logs_p)^2); per frame.

    .. math:: -\ln N(z_p; m_p, \sigma_p^2) - \ln\sigma_q - \tfrac{1}{2} \ln 2 \pi e, \qquad \sigma = e^{\text{logs}}

    summed over the frames that count, and divided by their number.

    Args:
        z_p, logs_q, m_p, logs_p: [B, H, T].
        z_mask: [B, 1, T], not 0 where a frame counts.

    Returns:
        A 0-d tensor: nats per frame that counts.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Kim et al. 2021, "Conditional Variational Autoencoder with Adversarial Learning for End-to-End
        Text-to-Speech"; losses.py.

    Example:
        >>> zeros, mask = torch.zeros(2, 3, 4), torch.ones(2, 1, 4)
        >>> fastelbo.compat.vits.kl_loss(zeros + 1, zeros, zeros, zeros, mask)
        tensor(0.)
    """
    live = z_mask != 0
    # the two logarithms are subtracted from each other alone
    terms = Terms(log_weight=0.0, constant=-0.5)
    distances = log_prob(z_p, m_p, logs_p, "log_std", 1, "none", live, None, negative=True, terms=terms)
    logarithms = torch.where(live, torch.sub(*arithmetic(logs_p, logs_q)), 0)
    return (distances.sum() + logarithms.sum()) / live.sum()


@_checks.calls(mean="m", s="logs", temperature="noise_scale")
def posterior_sample(m, logs, x_mask, noise_scale=1.0):
    """Draws from N(m, exp(logs)^2), and 0 where the mask is 0.

    Args:
        m, logs: [B, H, T].
        x_mask: [B, 1, T], not 0 where a frame counts.
        noise_scale: multiplies the standard deviation, as inference does.

    Returns:
        [B, H, T].

    Raises:
        ValueError, TypeError: as gaussian_rsample.

    Source:
        Kim et al. 2021, "Conditional Variational Autoencoder with Adversarial Learning for End-to-End
        Text-to-Speech"; models.py.

    Example:
        >>> m, logs = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
        >>> fastelbo.compat.vits.posterior_sample(m, logs, torch.zeros(2, 1, 4)).abs().sum()
        tensor(0.)
    """
    live = x_mask != 0
    logs = torch.where(live, logs, 0)  # for its gradient, which is a product with exp(logs); that of m is not
    return torch.where(live, gaussian_rsample(m, logs, scale="log_std", temperature=noise_scale), 0)
