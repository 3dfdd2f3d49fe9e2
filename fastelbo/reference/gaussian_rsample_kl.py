"""A posterior sample and its KL divergence from the prior."""

import torch

from fastelbo.reference.gaussian_kl import fill, gaussian_kl
from fastelbo.reference.gaussian_rsample import gaussian_rsample
from fastelbo.reference.scale import arithmetic, clamp


def gaussian_rsample_kl(
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
    **draw,
):
    """(z, kl); see fastelbo.gaussian_rsample_kl. ``draw`` are the keywords of gaussian_rsample."""
    shapes = [tensor.shape for tensor in (mean_q, s_q, mean_p, s_p) if tensor is not None]
    # once, so that the inward clamp sees the whole gradient; what is clamped already the ops below leave as it is
    s_q = clamp(arithmetic(mean_q, s_q, mean_p, s_p)[1], scale)
    mean, s = mean_q.expand(torch.broadcast_shapes(*shapes)), s_q
    if mask is not None:
        mean, s = fill(mask, (mean,), (s,))
    z = gaussian_rsample(mean, s, scale=scale, **draw)
    if mask is not None:
        z = torch.where(mask, z, 0.0)
    options = {"scale": scale, "scale_p": scale_p, "event_ndim": event_ndim, "balance": balance, "mask": mask}
    return z, gaussian_kl(mean_q, s_q, mean_p, s_p, **options)
