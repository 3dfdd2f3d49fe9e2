"""What tools/conv_candidates.py compares with: the same convolution in plain Triton.

Its own pipeline is right with two stages, and races with more.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit(do_not_specialize=["tiles_h", "tiles_w"])
def _convolve(x, w, y, tiles_h, tiles_w,
              C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, NB: tl.constexpr, TH: tl.constexpr,
              TW: tl.constexpr, BN: tl.constexpr, OUT: tl.constexpr):  # fmt: skip
    M: tl.constexpr = NB * TH * TW
    BLOCKS: tl.constexpr = (OUT + BN - 1) // BN
    STEPS: tl.constexpr = C // 64
    tile = tl.program_id(0)
    o = tile % BLOCKS * BN
    tile = tile // BLOCKS
    column = tile % tiles_w * TW
    row = tile // tiles_w % tiles_h * TH
    n = tile // tiles_w // tiles_h * NB
    total = tl.zeros([M, BN], tl.float32)
    for step in range(TAPS * STEPS):
        tap = step // STEPS
        c = step % STEPS * 64
        a = tl.reshape(x.load([n, row + tap // K - K // 2, column + tap % K - K // 2, c]), [M, 64])
        b = tl.reshape(w.load([o, tap, c]), [BN, 64])
        total = tl.dot(a, b.T, total)
    y.store([n, row, column, o], tl.reshape(total.to(y.dtype), [NB, TH, TW, BN]))


def call(layer, one, out, box_of):
    """A call of the forward on what one = {"x", "w"} holds."""
    x, y = one["x"].permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    w = one["w"].permute(0, 2, 3, 1).reshape(layer.o, layer.k**2, layer.c)
    box = box_of(*y.shape[:3], 128)
    width = 128 if layer.o % 128 == 0 else 64

    def descriptor(tensor, block):
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block))

    tiles = [-(-size // block) for size, block in zip(y.shape[:3], box, strict=True)]
    arguments = (descriptor(x, (*box, 64)), descriptor(w, (width, 1, 64)), descriptor(y, (*box, width)), *tiles[1:])
    grid = tiles[0] * tiles[1] * tiles[2] * -(-layer.o // width)
    return lambda: _convolve[(grid,)](
        *arguments, C=layer.c, K=layer.k, TAPS=layer.live, NB=box[0], TH=box[1], TW=box[2], BN=width, OUT=layer.o,
        num_warps=4, num_stages=2,
    )  # fmt: skip
