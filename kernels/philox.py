"""Philox4x32-10 (Salmon et al. 2011) and the Box-Muller map: the noise of docs/noise.md, four normals a block."""

import triton
import triton.language as tl
from fastelbo.kernels import elementary


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
def _approximate(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(INSTRUCTION + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _box_muller(u0, u1, APPROXIMATE: tl.constexpr):
    if APPROXIMATE:
        # lg2.approx is off by 2^-22 near 1, where it may come out positive
        r = _approximate(tl.maximum(_approximate(u0, "lg2") * -1.3862943611198906, 0.0), "sqrt")
        angle = u1 * 6.283185307179586
        return r * _approximate(angle, "cos"), r * _approximate(angle, "sin")
    else:
        r = tl.sqrt_rn(-2.0 * elementary.log_of_uniform(u0))
        sine, cosine = elementary.sincos_2pi(u1)
        return r * cosine, r * sine


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
