r"""The noise: Philox4x32-10 and Box-Muller (docs/noise.md).

Element e of Monte-Carlo sample k takes normal e % 4 of the block with counter (e // 4 low, e // 4 high, k, 0) under the
64-bit seed as key. The four words x of a block become uniforms :math:`u = x 2^{-32} + 2^{-33}` in float32, and these
normals :math:`r(u_0) \cos 2\pi u_1`, :math:`r(u_0) \sin 2\pi u_1`, :math:`r(u_2) \cos 2\pi u_3`,
:math:`r(u_2) \sin 2\pi u_3` with :math:`r(u) = \sqrt{-2 \ln u}`.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _multiply_wide(word, constant):
    # The product wraps to a signed 64-bit integer; its two halves come out right all the same.
    product = word * constant
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter, key, rounds=10):
    """Philox4x32 on int64 tensors that hold 32-bit words.

    Args:
        counter: four tensors that broadcast with each other.
        key: two tensors.
        rounds: 10 in the published generator.

    Returns:
        Four tensors of words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply_wide(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply_wide(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniforms(seed, numel, samples, noise_offset):
    """Those of the four words of all blocks that hold the elements: four float32 tensors [samples, blocks]."""
    first = noise_offset // 4
    blocks = (noise_offset + numel - 1) // 4 - first + 1 if numel else 0
    block = first + torch.arange(blocks, device=seed.device).reshape(1, blocks)
    sample = torch.arange(samples, device=seed.device).reshape(samples, 1)
    seed = seed.reshape(1, 1)
    words = philox4x32(
        (block & _MASK, (block >> 32) & _MASK, sample, torch.zeros_like(sample)),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return tuple((word.float() * 2.0**-32) + 2.0**-33 for word in words)


def _elements(values, numel, noise_offset):
    """The elements [samples, numel] from the four values [samples, blocks] of the blocks that hold them."""
    flat = torch.stack(values, dim=-1).flatten(1)
    start = noise_offset - 4 * (noise_offset // 4)
    return flat[:, start : start + numel]


def philox_uniform(seed, shape, *, noise_offset=0):
    """Uniforms in (0, 1] of one draw: element e takes word e % 4 of its block.

    Args:
        seed, shape, noise_offset: as for philox_normal.

    Returns:
        float32 tensor of the shape, on the device of the seed.
    """
    numel = math.prod(shape)
    return _elements(_uniforms(seed, numel, 1, noise_offset), numel, noise_offset).reshape(shape)


def philox_normal(seed, shape, *, num_samples=None, noise_offset=0):
    """Standard normals of one draw.

    Args:
        seed: int64 tensor of one element.
        shape: of one sample; elements count in row-major order.
        num_samples: K puts a dimension of K independent samples in front.
        noise_offset: global index of the first element.

    Returns:
        float32 tensor ``[K, *shape]`` or ``shape``, on the device of the seed.
    """
    numel, samples = math.prod(shape), 1 if num_samples is None else num_samples
    # float32 holds the uniform by definition; log, sin and cos in float64 make the normal correct to its last bit
    u0, u1, u2, u3 = (u.double() for u in _uniforms(seed, numel, samples, noise_offset))
    normals = []
    for radius, angle in ((u0, u1), (u2, u3)):
        r = torch.sqrt(-2 * torch.log(radius))
        normals += [r * torch.cos(2 * math.pi * angle), r * torch.sin(2 * math.pi * angle)]
    flat = _elements([normal.float() for normal in normals], numel, noise_offset)
    return flat.reshape(shape if num_samples is None else (samples, *shape))
