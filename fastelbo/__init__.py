"""Fused kernels that make variational autoencoders, Bayesian layers and PixelCNNs train faster and exactly."""

import importlib

from fastelbo import backends, distributed, nn, reference
from fastelbo.elbo import (
    ELBO,
    gaussian_elbo,
    gaussian_kl_per_latent,
    gaussian_one_sample_kl,
    gaussian_rsample_log_prob,
    importance_weighted_log_likelihood,
    iwae_bound,
    optimal_sigma,
)
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob, gaussian_nll
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.ops.gaussian_rsample_kl import gaussian_rsample_kl
from fastelbo.ops.masked_conv2d import causal_conv2d, conv_mask2d, masked_conv2d
from fastelbo.scale import Scale
from fastelbo.version import __version__

__all__ = [
    "ELBO",
    "Scale",
    "__version__",
    "backends",
    "causal_conv2d",
    "compat",
    "conv_mask2d",
    "distributed",
    "distributions",
    "gaussian_elbo",
    "gaussian_kl",
    "gaussian_kl_per_latent",
    "gaussian_log_prob",
    "gaussian_nll",
    "gaussian_one_sample_kl",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "gaussian_rsample_log_prob",
    "importance_weighted_log_likelihood",
    "iwae_bound",
    "masked_conv2d",
    "nn",
    "optimal_sigma",
    "reference",
    "sampling",
    "testing",
]


def __getattr__(name):
    """Imports what most programs do not use when it is first asked for."""
    if name in ("compat", "distributions", "sampling", "testing"):
        return importlib.import_module(f"fastelbo.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
