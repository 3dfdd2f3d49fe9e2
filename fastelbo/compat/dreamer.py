"""World models with Gaussian latents (Dreamer and its descendants, sheeprl, torchrl): the KL of posterior from prior,
with free nats and balance, in the three versions.

Replaces lines such as::

    kl = kl_divergence(Independent(Normal(mean_q, std_q), 1), Independent(Normal(mean_p, std_p), 1))
    loss = torch.max(kl.mean(), free_nats)                                          # DreamerV1
    loss = alpha * lhs + (1 - alpha) * rhs                                          # DreamerV2
    loss = dyn_scale * dyn.clamp(min=free) + rep_scale * rep.clamp(min=free)        # DreamerV3

Where originals are wrong: sheeprl's DreamerV2 with kl_free_avg=False gives torch.maximum a number, which raises a
TypeError; KLs of a posterior close to its prior lose their digits. Below the floor the gradient is exactly 0.

They evaluate the KL twice, once with the posterior held and once with the prior held; here it is evaluated once.
"""

from typing import NamedTuple

import torch

from fastelbo import _checks
from fastelbo.ops import _gaussian
from fastelbo.ops.gaussian_kl import gaussian_kl

__all__ = ["Parts", "kl_loss_v1", "kl_loss_v2", "kl_loss_v3"]


class Parts(NamedTuple):
    """What a loss is made of, as training logs have it.

    Args:
        loss: 0-d, which is the mean of per_step; both pass gradients on.
        per_step: [...], the loss of each step, weights and floor included.
        kl: [...], the KL of each step, without either.
        dyn: 0-d, the loss that moves the prior, before its weight; None in version 1.
        rep: 0-d, the loss that moves the posterior: the same value; None in version 1.

    Raises:
        TypeError: as any tuple.

    Source:
        Hafner et al. 2023, "Mastering Diverse Domains through World Models".

    Example:
        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 2)
        >>> loss, _, kl, dyn, _ = fastelbo.compat.dreamer.kl_loss_v3(zeros, ones, zeros, ones, parts=True)
        >>> loss, kl.mean(), dyn
        (tensor(1.1000), tensor(0.), tensor(1.))
    """

    loss: torch.Tensor
    per_step: torch.Tensor
    kl: torch.Tensor
    dyn: "torch.Tensor | None"
    rep: "torch.Tensor | None"


@_checks.calls(free_bits="free_nats")
def kl_loss_v1(mean_q, s_q, mean_p, s_p, *, free_nats=3.0, scale="std", parts=False):
    """max(mean KL, free_nats).

    Args:
        mean_q, s_q: posterior, [..., D].
        mean_p, s_p: prior, the same.
        free_nats: the floor.
        scale: what s_q and s_p are.
        parts: whether to return Parts.

    Returns:
        A 0-d tensor, nats in the mean over all but D; or Parts.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Hafner et al. 2020, "Dream to Control: Learning Behaviors by Latent Imagination".

    Example:
        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 2)
        >>> fastelbo.compat.dreamer.kl_loss_v1(zeros, ones, zeros, ones)
        tensor(3.)
    """
    return _kl_loss((mean_q, s_q, mean_p, s_p), scale, free_nats, "batch", parts)


@_checks.calls(free_bits="free_nats", balance="alpha")
def kl_loss_v2(mean_q, s_q, mean_p, s_p, *, alpha=0.8, free_nats=0.0, free_avg=True, scale="std", parts=False):
    """alpha times the KL that moves the prior, plus 1 - alpha times the KL that moves the posterior.

    Args:
        mean_q, s_q, mean_p, s_p, scale, parts: as in kl_loss_v1.
        alpha: the balance, between 0 and 1.
        free_nats: the floor of the mean KL (free_avg), or of each KL.
        free_avg: see free_nats.

    Returns:
        A 0-d tensor, nats in the mean over all but D; or Parts.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Hafner et al. 2021, "Mastering Atari with Discrete World Models", algorithm 2.

    Example:
        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 2)
        >>> fastelbo.compat.dreamer.kl_loss_v2(ones, ones, zeros, ones)
        tensor(1.)
    """
    per = "batch" if free_avg else "example"
    return _kl_loss((mean_q, s_q, mean_p, s_p), scale, free_nats, per, parts, balance=alpha)


@_checks.calls(free_bits="free_nats", balance="dyn_scale / (dyn_scale + rep_scale)")
def kl_loss_v3(mean_q, s_q, mean_p, s_p, *, dyn_scale=1.0, rep_scale=0.1, free_nats=1.0, scale="std", parts=False):
    """dyn_scale times the KL that moves the prior, plus rep_scale times the KL that moves the posterior, each at least
    free_nats in every example.

    Args:
        mean_q, s_q, mean_p, s_p, scale, parts: as in kl_loss_v1.
        dyn_scale, rep_scale: weights, at least 0.
        free_nats: the floor of each KL.

    Returns:
        A 0-d tensor, nats in the mean over all but D; or Parts.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Hafner et al. 2023, "Mastering Diverse Domains through World Models".

    Example:
        >>> zeros, ones = torch.zeros(4, 2), torch.ones(4, 2)
        >>> fastelbo.compat.dreamer.kl_loss_v3(zeros, ones, zeros, ones)
        tensor(1.1000)
    """
    dyn_scale, rep_scale = (
        _checks.check_number(name, weight) for name, weight in (("dyn_scale", dyn_scale), ("rep_scale", rep_scale))
    )
    total = dyn_scale + rep_scale
    balance = dyn_scale / total if total else 0.0
    return _kl_loss((mean_q, s_q, mean_p, s_p), scale, free_nats, "example", parts, total, balance=balance)


def _kl_loss(gaussians, scale, free_nats, per, parts, weight=1, balance=None):
    options = {"scale": scale, "balance": balance, "event_ndim": 1}
    if not parts:
        return weight * gaussian_kl(*gaussians, **options, free_bits=free_nats, free_bits_per=per, reduction="mean")
    kl = gaussian_kl(*gaussians, **options)
    free_nats = _checks.check_scalar("free_nats", free_nats, kl.device, at_least=0)
    floored = _gaussian.floored(kl, (*kl.shape, 1), 1, free_nats, per, None)
    value = None if balance is None else floored.detach().mean()
    return Parts((weight * floored).mean(), weight * floored, kl.detach(), value, value)
