"""Diffusion models with learned variances (openai/guided-diffusion, improved-diffusion): the elementwise KL.

Replaces ``from guided_diffusion.losses import normal_kl``.

Where the original is wrong: it loses its digits, and its sign, where the two Gaussians are close; and a difference of
means of 0 times an infinite exp(-logvar2) is NaN, for logvar2 below -88.
"""

import torch

from fastelbo import _checks
from fastelbo.ops.gaussian_kl import gaussian_kl

__all__ = ["normal_kl"]


@_checks.calls(mean_q="mean1", s_q="logvar1", mean_p="mean2", s_p="logvar2")
def normal_kl(mean1, logvar1, mean2, logvar2):
    """KL of N(mean1, exp(logvar1)) from N(mean2, exp(logvar2)), elementwise.

    Args:
        mean1, logvar1, mean2, logvar2: tensors that broadcast, or numbers.

    Returns:
        KL in nats, of the broadcast shape.

    Raises:
        AssertionError: only numbers.

    Source:
        guided_diffusion/losses.py; Nichol and Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models".

    Example:
        >>> fastelbo.compat.guided_diffusion.normal_kl(torch.ones(2), torch.zeros(2), 0.0, 0.0)
        tensor([0.5000, 0.5000])
    """
    arguments = (mean1, logvar1, mean2, logvar2)
    assert any(isinstance(argument, torch.Tensor) for argument in arguments), "at least one argument must be a Tensor"
    return gaussian_kl(*arguments, event_ndim=0)
