r"""KL divergence of diagonal Gaussians.

With :math:`h = \ln(\sigma_q / \sigma_p)` and :math:`r = (\mu_q - \mu_p) / \sigma_p`,

.. math:: \mathrm{KL}(q \| p) = \tfrac{1}{2} \left(\tfrac{\sigma_q^2}{\sigma_p^2} + r^2 - 1\right)
          - \ln\tfrac{\sigma_q}{\sigma_p} = g(2h) + \tfrac{1}{2} r^2, \qquad g(d) = \tfrac{1}{2} (e^d - 1 - d) \ge 0.

The middle form subtracts numbers near 1 where the posterior lies near its prior, and loses every digit there. g does
not: its series has :math:`d^2` in front.
"""

import torch

from fastelbo.reference.scale import (
    arithmetic,
    clamp,
    difference,
    is_exponential,
    is_shifted,
    log_std_and_std,
    own_std,
    standardise,
    tails,
)


def gap(h, ratio=None):
    """g(2h) to the last digits for every h.

    Args:
        h: ln(sigma_q / sigma_p).
        ratio: sigma_q / sigma_p where that is large and no exponential, else 1: exp(h) has lost digits that it has, and
            its gradient does not overflow where exp(2h) does.
    """
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
    if ratio is not None:
        large = torch.where(ratio > 1, 0.5 * (ratio - 1) * (ratio + 1) - h_large, large)
    return torch.where(small, 0.25 * d_small * d_small * series, large)


def log_ratio(s_q, q, s_p, p, scale, scale_p):
    """ln(sigma_q / sigma_p) of clamped raw values and what log_std_and_std says of them: near 0 through the difference
    of the standard deviations, which of one scale comes without cancellation."""
    (log_std_q, std_q), (log_std_p, std_p) = q, p
    one = all(getattr(scale, x) == getattr(scale_p, x) for x in ("kind", "soft_clamp", "min_std", "var_eps", "beta"))
    if one and is_exponential(scale) and scale.soft_clamp is None:
        return log_std_q - log_std_p
    if one:
        apart = difference(s_q, s_p, scale)
        if scale.var_eps > 0:
            own = own_std(s_q, scale) + own_std(s_p, scale) + 2 * scale.min_std
            apart = apart * (own / (std_q + std_p))
    else:
        apart = std_q - std_p
    fair = (std_p > 4 * torch.finfo(std_p.dtype).tiny) & std_p.isfinite()
    relative = apart / torch.where(fair, std_p, 1.0)
    near = fair & (relative.abs() < 0.5)
    h = torch.where(near, torch.log1p(torch.where(near, relative, 0.0)), log_std_q - log_std_p)
    if one and scale.kind == "softplus" and not is_shifted(scale) and scale.soft_clamp is None:
        both = tails(scale.beta * torch.maximum(s_q, s_p))
        h = torch.where(both, scale.beta * (s_q - s_p), h)
    return h


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
    s_q, s_p = _clamped(s_q, s_p, scale, scale_p)
    h, r = log_ratio_and_distance(mean_q, s_q, mean_p, s_p, scale, scale_p)
    ratio = None
    if not is_exponential(scale):
        std_q = log_std_and_std(s_q, scale)[1]
        std_p = torch.ones_like(std_q) if s_p is None else log_std_and_std(s_p, scale_p)[1]
        far = (h > 1) & (std_p > 4 * torch.finfo(std_p.dtype).tiny)
        ratio = torch.where(far, std_q, 1.0) / torch.where(far, std_p, 1.0)
    return gap(h, ratio) + 0.5 * r * r


def log_ratio_and_distance(mean_q, s_q, mean_p, s_p, scale, scale_p):
    """ln(sigma_q / sigma_p) and (mean_q - mean_p) / sigma_p of every element."""
    s_q, s_p = _clamped(s_q, s_p, scale, scale_p)
    q = log_std_and_std(s_q, scale)
    if mean_p is None:
        return q[0], mean_q
    p = log_std_and_std(s_p, scale_p)
    return log_ratio(s_q, q, s_p, p, scale, scale_p), standardise(mean_q - mean_p, *p, scale_p)


def _clamped(s_q, s_p, scale, scale_p):
    """Once, so that the inward clamp sees the whole gradient; what is clamped already stays as it is."""
    return clamp(s_q, scale), None if s_p is None else clamp(s_p, scale_p)
