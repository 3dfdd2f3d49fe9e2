r"""z = mean + temperature * sigma(s) * noise (Kingma and Welling 2013, the reparameterisation)."""

import torch

from fastelbo.reference.noise import philox_normal
from fastelbo.reference.scale import arithmetic, log_std_and_std


def gaussian_rsample(
    mean, s, *, scale, num_samples=None, temperature=1.0, noise=None, seed=None, noise_offset=0, out_dtype=None
):
    """A sample ``[K, *shape]`` or ``shape``; see fastelbo.gaussian_rsample."""
    dtype = torch.result_type(mean, s) if out_dtype is None else out_dtype
    mean, s = arithmetic(mean, s)
    if noise is None:
        shape = torch.broadcast_shapes(mean.shape, s.shape)
        noise = philox_normal(seed, shape, num_samples=num_samples, noise_offset=noise_offset)
    elif num_samples is not None:
        shape = (num_samples, *torch.broadcast_shapes(mean.shape, s.shape))
        noise = noise.expand(shape)
    _, std = log_std_and_std(s, scale)
    return (mean + temperature * std * noise.to(mean.dtype)).to(dtype)
