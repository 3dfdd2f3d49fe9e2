"""Plain torch: the oracle of every other backend, and where the mathematics is derived. Imports nothing of ours.

Slow and exact. Arithmetic is float32 for half-precision inputs, the input's own precision otherwise; everything is
differentiable to any order and works under torch.func.
"""

from fastelbo.reference.gaussian_kl import gaussian_kl
from fastelbo.reference.gaussian_log_prob import gaussian_log_prob, gaussian_nll
from fastelbo.reference.gaussian_rsample import gaussian_rsample
from fastelbo.reference.gaussian_rsample_kl import gaussian_rsample_kl
from fastelbo.reference.masked_conv2d import causal_conv2d, conv_mask2d, masked_conv2d
from fastelbo.reference.noise import philox_normal, philox_uniform

__all__ = [
    "causal_conv2d",
    "conv_mask2d",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_nll",
    "gaussian_rsample",
    "gaussian_rsample_kl",
    "masked_conv2d",
    "philox_normal",
    "philox_uniform",
]
