r"""KL divergence of diagonal Gaussians.

With :math:`h = \ln(\sigma_q / \sigma_p)` and :math:`r = (\mu_q - \mu_p) / \sigma_p`,

.. math:: \mathrm{KL}(q \| p) = \tfrac{1}{2} \left(\tfrac{\sigma_q^2}{\sigma_p^2} + r^2 - 1\right)
          - \ln\tfrac{\sigma_q}{\sigma_p} = g(2h) + \tfrac{1}{2} r^2, \qquad g(d) = \tfrac{1}{2} (e^d - 1 - d) \ge 0.

The middle form subtracts numbers near 1 where the posterior lies near its prior, and loses every digit there. g does
not: its series has :math:`d^2` in front.
"""

import torch

from fastelbo.reference.scale import arithmetic, is_exponential, log_std_and_std, standardise


def gap(h):
    """g(2h) to the last digits for every h."""
    d = 2 * h
    small = d.abs() < 0.7
    # where() selects, yet its gradient multiplies both branches: each gets an argument it can stand
    d_small = torch.where(small, d, 0.0)
    series = torch.ones_like(d)
    for k in range(17, 2, -1):
        series = 1 + series * d_small / k
    h_large = torch.where(small, 1.0, h)
    e = torch.expm1(h_large)
    # (exp(2h) - 1) / 2 = e (1 + e / 2) with e = exp(h) - 1 does not overflow before its own value does
    # the limit keeps infinity from being subtracted from infinity
    large = e + 0.5 * e * e - h_large.clamp(max=torch.finfo(h.dtype).max)
    return torch.where(small, 0.25 * d_small * d_small * series, large)


def log_ratio(log_std_q, std_q, log_std_p, std_p):
    """ln(sigma_q / sigma_p) of standard deviations that come as such: exact differences keep it accurate near 0."""
    relative = (std_q - std_p) / std_p
    near = relative.abs() < 0.5
    return torch.where(near, torch.log1p(torch.where(near, relative, 0.0)), log_std_q - log_std_p)


def event_sum(value, event_ndim):
    """Sums the last event_ndim dimensions, all but the first where None."""
    if event_ndim is None:
        event_ndim = max(value.dim() - 1, 0)
    return value.sum(dim=tuple(range(-event_ndim, 0))) if event_ndim > 0 else value


def fill(mask, means, raws):
    """Means and raw scales whose masked elements are ones that no formula stumbles over: selected before the formula,
    because the gradient 0 of a selection after it is multiplied by what may be NaN."""
    means = (x if x is None else torch.where(mask, x, 0.0) for x in means)
    return *means, *(x if x is None else torch.where(mask, x, 1.0) for x in raws)


def gaussian_kl(
    mean_q,
    s_q,
    mean_p=None,
    s_p=None,
    *,
    scale,
    scale_p=None,
    event_ndim=None,
    balance=None,
    mask=None,
):
    """KL(q || p); see fastelbo.gaussian_kl."""
    scale_p = scale if scale_p is None else scale_p
    mean_q, s_q, mean_p, s_p = arithmetic(mean_q, s_q, mean_p, s_p)
    if mask is not None:
        mean_q, mean_p, s_q, s_p = fill(mask, (mean_q, mean_p), (s_q, s_p))
    if balance is None:
        value = elementwise_kl(mean_q, s_q, mean_p, s_p, scale, scale_p)
    else:
        to_q = elementwise_kl(mean_q, s_q, mean_p.detach(), s_p.detach(), scale, scale_p)
        to_p = elementwise_kl(mean_q.detach(), s_q.detach(), mean_p, s_p, scale, scale_p)
        value = (1 - balance) * to_q + balance * to_p
    if mask is not None:
        value = torch.where(mask, value, 0.0)
    return event_sum(value, event_ndim)


def elementwise_kl(mean_q, s_q, mean_p, s_p, scale, scale_p):
    """KL(q || p) of every element."""
    log_std_q, std_q = log_std_and_std(s_q, scale)
    if mean_p is None:
        value = gap(log_std_q) + 0.5 * mean_q * mean_q
    else:
        log_std_p, std_p = log_std_and_std(s_p, scale_p)
        if is_exponential(scale) or is_exponential(scale_p):
            h = log_std_q - log_std_p
        else:
            h = log_ratio(log_std_q, std_q, log_std_p, std_p)
        r = standardise(mean_q - mean_p, log_std_p, std_p, scale_p)
        value = gap(h) + 0.5 * r * r
    return value
