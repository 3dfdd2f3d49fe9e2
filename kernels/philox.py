"""Philox4x32-10 (Salmon et al. 2011) and the Box-Muller map: the noise of docs/noise.md, four normals a block."""

import triton
import triton.language as tl

from fastelbo import _library

_INTERPRETED: tl.constexpr = tl.constexpr(_library.INTERPRETED)  # the interpreter knows no instructions
# 1.5 * 2^23: adding it rounds to an integer, which lands in the low bits
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def _multiply_wide(word, constant):
    """The high and the low word of a product: one 32 x 32 -> 64 bit multiplication."""
    product = word.to(tl.uint64) * constant
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32_10(c0, c1, c2, c3, k0, k1):
    """The four words of each counter; all arguments uint32."""
    for _ in tl.static_range(10):
        high0, low0 = _multiply_wide(c0, 0xD2511F53)
        high1, low1 = _multiply_wide(c2, 0xCD9E8D57)
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def words(seed, block, sample):
    """The words of blocks of four elements.

    Args:
        seed: int64 scalar.
        block: int64, any shape.
        sample: int32 scalar, the Monte-Carlo sample.
    """
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    zero = c0 & 0
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return philox4x32_10(c0, c1, (zero + sample).to(tl.uint32), zero, k0, k1)


@triton.jit
def _uniform(word):
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)  # 2^-32, 2^-33


@triton.jit
def _instruction(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _log2(x):
    if _INTERPRETED:
        return tl.log2(x)
    else:
        return _instruction(x, "lg2")


@triton.jit
def _radius(u):
    """sqrt(-2 ln u)."""
    # lg2.approx is off by 2^-22 near 1, where the logarithm itself is small: there a series in 1 - u, which is exact
    v = 1.0 - u
    near = tl.fma(v, 0.4, 0.5)
    near = tl.fma(near, v, 0.6666666667)
    near = tl.fma(near, v, 1.0)
    near = tl.fma(near, v, 2.0) * v
    return tl.sqrt(tl.where(v < 0.0625, near, _log2(u) * -1.3862943611198906))


@triton.jit
def _box_muller(u0, u1, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        r = tl.sqrt(tl.maximum(_log2(u0) * -1.3862943611198906, 0.0))
        angle = u1 * 6.283185307179586
        return r * _instruction(angle, "cos"), r * _instruction(angle, "sin")
    else:
        r = _radius(u0)
        # u1 = half_turns / 2 + f, |f| <= 1/4: an odd number of half turns changes both signs
        half_turns = tl.fma(u1, 2.0, _MAGIC)
        r = (r.to(tl.int32, bitcast=True) ^ (half_turns.to(tl.int32, bitcast=True) << 31)).to(tl.float32, bitcast=True)
        f = tl.fma(half_turns - _MAGIC, -0.5, u1)
        t = f * f
        # minimax polynomials of sin(2 pi f) / f and cos(2 pi f), to 7e-9 and 5e-8
        s = tl.fma(t, 39.76161575317383, -76.5813980102539)
        s = tl.fma(s, t, 81.60248565673828)
        s = tl.fma(s, t, -41.34168243408203)
        s = tl.fma(s, t, 6.2831854820251465) * f
        c = tl.fma(t, 56.24238204956055, -85.2403335571289)
        c = tl.fma(c, t, 64.9345932006836)
        c = tl.fma(c, t, -19.739171981811523)
        c = tl.fma(c, t, 0.9999999403953552)
        return r * c, r * s


@triton.jit
def normals(seed, block, sample, APPROXIMATE: tl.constexpr):
    """float32 normals [R, 4 B] of blocks [R, B].

    Args:
        seed, block, sample: as in words().
        APPROXIMATE: by the processor's approximate functions: off by up to 3e-6, which the rounding of a half-precision
            sample hides.
    """
    w0, w1, w2, w3 = words(seed, block, sample)
    n0, n1 = _box_muller(_uniform(w0), _uniform(w1), APPROXIMATE)
    n2, n3 = _box_muller(_uniform(w2), _uniform(w3), APPROXIMATE)
    joined = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # [R, B, 2, 2]: n0, n1, n2, n3
    return tl.reshape(joined, [block.shape[0], 4 * block.shape[1]])
