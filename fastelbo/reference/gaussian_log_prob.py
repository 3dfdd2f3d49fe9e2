r"""Log-density of a diagonal Gaussian: :math:`-r^2/2 - \ln\sigma - \tfrac{1}{2} \ln 2\pi`, r = (x - mean) / sigma."""

import math

import torch

from fastelbo.reference.gaussian_kl import event_sum, fill
from fastelbo.reference.scale import arithmetic, log_std_and_std, standardise

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def gaussian_nll(x, mean, s, *, scale, event_ndim=None, mask=None, log_weight=1.0, constant=HALF_LOG_TWO_PI):
    """-ln N(x; mean, sigma(s)^2), see fastelbo.gaussian_nll; or with another weight of ln sigma, and constant."""
    x, mean, s = arithmetic(x, mean, s)
    if mask is not None:
        x, mean, s = fill(mask, (x, mean), (s,))
    log_std, std = log_std_and_std(s, scale)
    r = standardise(x - mean, log_std, std, scale)
    value = 0.5 * r * r + (log_weight * log_std + constant)
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    return event_sum(value, event_ndim)


def gaussian_log_prob(x, mean, s, *, scale, event_ndim=None, mask=None, **terms):
    """ln N(x; mean, sigma(s)^2); see fastelbo.gaussian_log_prob."""
    return -gaussian_nll(x, mean, s, scale=scale, event_ndim=event_ndim, mask=mask, **terms)
