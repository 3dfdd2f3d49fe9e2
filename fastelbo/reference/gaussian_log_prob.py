r"""Log-density of a diagonal Gaussian: :math:`-r^2/2 - \ln\sigma - \tfrac12 \ln 2\pi`, r = (x - mean) / sigma."""

import math

from fastelbo.reference.gaussian_kl import reduce
from fastelbo.reference.scale import arithmetic, log_std_and_std, standardise


def gaussian_nll(x, mean, s, *, scale, event_ndim=None, reduction="none"):
    """-ln N(x; mean, sigma(s)^2); see fastelbo.gaussian_nll."""
    x, mean, s = arithmetic(x, mean, s)
    log_std, std = log_std_and_std(s, scale)
    r = standardise(x - mean, log_std, std, scale)
    value = 0.5 * r * r + (log_std + 0.5 * math.log(2 * math.pi))
    return reduce(value, max(value.dim() - 1, 0) if event_ndim is None else event_ndim, reduction)


def gaussian_log_prob(x, mean, s, *, scale, event_ndim=None, reduction="none"):
    """ln N(x; mean, sigma(s)^2); see fastelbo.gaussian_log_prob."""
    return -gaussian_nll(x, mean, s, scale=scale, event_ndim=event_ndim, reduction=reduction)
