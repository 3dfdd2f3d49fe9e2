"""Fused kernels that make variational autoencoders, Bayesian layers and PixelCNNs train faster and exactly."""

import importlib

from fastelbo import backends, nn, reference
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob, gaussian_nll
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.ops.gaussian_rsample_kl import gaussian_rsample_kl
from fastelbo.ops.masked_conv2d import causal_conv2d, conv_mask2d, masked_conv2d
from fastelbo.scale import Scale
from fastelbo.version import __version__

__all__ = [
    "Scale",
    "__version__",
    "backends",
    "causal_conv2d",
    "compat",
    "conv_mask2d",
    "distributions",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_nll",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "masked_conv2d",
    "nn",
    "reference",
]


def __getattr__(name):
    """Imports what most programs do not use when it is first asked for."""
    if name in ("compat", "distributions"):
        return importlib.import_module(f"fastelbo.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
