"""Masked convolutions on Hopper's tensor cores: implicit GEMMs over TMA boxes, bfloat16 and float16, channels last.

A tile of pixels is a box [images, rows, columns] of the image, its operand for a tap the box moved by the tap. The copy
engine fills with 0 what lies outside of the image, and leaves out on the way back what a box has too much: there is no
padding, no mask and no address arithmetic, and boxes need not divide the image. Only live taps, the first in raster
order, are ever read.

Both operands of every product are read from shared memory by the tensor cores themselves. Operands that pass through
registers (ldmatrix) let the copy engine overwrite a buffer that a running product still reads: Triton's own pipeline of
the same loop was wrong in some runs. Here a buffer is refilled only after all warps have waited for the product that
reads it; a barrier of all threads stands between, since a warp's wait speaks for that warp alone.

The compiler's own barriers do not know that products run on after their issue: wherever ordinary stores reuse a
product's buffer, the barrier is written out.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# named anew after Triton 3.6
_copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
RENAMED: gl.constexpr = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _as(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The memory from a buffer's first byte on, as another shape, which may be larger."""
    if RENAMED:
        return buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)


@gluon.jit
def _sigmoid(x):
    return 1.0 / (1.0 + gl.exp(-x))


@gluon.jit
def _tanh(x):
    """To a relative error of 1e-6: a series where 1 - exp(-2 |x|) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    e = gl.exp(-2.0 * gl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return gl.where(gl.abs(x) < 0.25, series, gl.where(x < 0.0, -far, far))


@gluon.jit
def _elu(x):
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0)))))
    below = gl.where(x > -0.25, series, gl.exp(gl.minimum(x, 0.0)) - 1.0)
    return gl.where(x > 0.0, x, below)


@gluon.jit
def _place(tile, tiles_h, tiles_w, BLOCKS: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
           WIDTH: gl.constexpr):  # fmt: skip
    """The first image, row, column and output channel of a tile; neighbours share their pixels."""
    first = tile % BLOCKS * WIDTH
    tile = tile // BLOCKS
    column = tile % tiles_w * TW
    tile = tile // tiles_w
    return tile // tiles_h * NB, tile % tiles_h * TH, column, first


@gluon.jit
def _fill(x, w, w2, sx, sw, sw2, bar, slot, step, n, row, column, first, second, pred,
          INPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr, DILATION: gl.constexpr,
          TRANSPOSED: gl.constexpr, BK: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Starts the copies of one step's operands; TRANSPOSED: those of the input gradient, whose taps point back."""
    BLOCKS: gl.constexpr = (INPUTS + BK - 1) // BK
    SIGN: gl.constexpr = -DILATION if TRANSPOSED else DILATION
    tap = step // BLOCKS
    c = step % BLOCKS * BK
    down = (tap // COLUMNS - UP) * SIGN
    right = (tap % COLUMNS - LEFT) * SIGN
    BYTES: gl.constexpr = x.block_type.nbytes + w.block_type.nbytes + (w2.block_type.nbytes if PARTS == 2 else 0)
    mbarrier.expect(bar, BYTES, pred=pred)
    _copy_in(x, [n, row + down, column + right, c], bar, sx.index(slot), pred=pred)
    if TRANSPOSED:
        _copy_in(w, [c, tap, first], bar, sw.index(slot), pred=pred)
        if PARTS == 2:
            _copy_in(w2, [c, tap, second], bar, sw2.index(slot), pred=pred)
    else:
        _copy_in(w, [first, tap, c], bar, sw.index(slot), pred=pred)
        if PARTS == 2:
            _copy_in(w2, [second, tap, c], bar, sw2.index(slot), pred=pred)


@gluon.jit
def _multiply(pixels, weights, total, M: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, TRANSPOSED: gl.constexpr,
              SWAP: gl.constexpr):  # fmt: skip
    """Starts total += pixels @ weights, [M, BN], or under SWAP its transpose: the wider operand second is cheaper."""
    p = pixels.reshape([M, BK])
    if SWAP:
        if TRANSPOSED:
            return warpgroup_mma(weights.reshape([BK, BN]).permute((1, 0)), p.permute((1, 0)), total, is_async=True)
        else:
            return warpgroup_mma(weights.reshape([BN, BK]), p.permute((1, 0)), total, is_async=True)
    else:
        if TRANSPOSED:
            return warpgroup_mma(p, weights.reshape([BK, BN]), total, is_async=True)
        else:
            return warpgroup_mma(p, weights.reshape([BN, BK]).permute((1, 0)), total, is_async=True)


@gluon.jit
def _before(z, bias, cond, image, channel, images, CHANNELS: gl.constexpr, FIRST: gl.constexpr, Z: gl.constexpr,
            HAS_BIAS: gl.constexpr, HAS_COND: gl.constexpr):  # fmt: skip
    """z + bias + cond; channel: of CHANNELS, the first of which is FIRST of Z."""
    if HAS_BIAS:
        z += gl.load(bias + FIRST + channel, mask=channel < CHANNELS, other=0.0).to(gl.float32)
    if HAS_COND:
        there = (image < images) & (channel < CHANNELS)
        z += gl.load(cond + image * Z + FIRST + channel, mask=there, other=0.0).to(gl.float32)
    return z


@gluon.jit
def _view(buffer, M: gl.constexpr, BN: gl.constexpr, SWAP: gl.constexpr):
    """A box of an image as the matrix that the products are."""
    if SWAP:
        return buffer.reshape([M, BN]).permute((1, 0))
    else:
        return buffer.reshape([M, BN])


@gluon.jit
def _put(out, buffer, values, p, q, r, first, M: gl.constexpr, BN: gl.constexpr, SWAP: gl.constexpr):
    tma.store_wait(pendings=0)  # of what the buffer held before
    _barrier()
    _view(buffer, M, BN, SWAP).store(values.to(out.dtype))
    fence_async_shared()
    _barrier()
    _copy_out(out, [p, q, r, first], buffer)


@gluon.jit
def _get(image, buffer, bar, phase, p, q, r, first, M: gl.constexpr, BN: gl.constexpr, SWAP: gl.constexpr,
         LAYOUT: gl.constexpr):  # fmt: skip
    """A tile of an image, in the products' layout."""
    tma.store_wait(pendings=0)
    _barrier()
    mbarrier.expect(bar, image.block_type.nbytes)
    _copy_in(image, [p, q, r, first], bar, buffer)
    mbarrier.wait(bar, phase)
    return _view(buffer, M, BN, SWAP).load(LAYOUT).to(gl.float32)


@gluon.jit
def _activate(z, ACTIVATION: gl.constexpr):
    if ACTIVATION == "relu":
        return gl.where(z == z, gl.maximum(z, 0.0), z)
    elif ACTIVATION == "elu":
        return _elu(z)
    else:
        return z


@gluon.jit
def _finish(total, total2, y, y2, kept, residual, bias, cond, buffer, buffer2, bar, phase, images, n, p, q, r, first,
            OUTPUTS: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_COND: gl.constexpr,
            HAS_RESIDUAL: gl.constexpr, HAS_KEPT: gl.constexpr, M: gl.constexpr, PIXELS: gl.constexpr, NB: gl.constexpr,
            BN: gl.constexpr, BN2: gl.constexpr, SWAP: gl.constexpr, LAYOUT: gl.constexpr,
            LAYOUT2: gl.constexpr):  # fmt: skip
    """Bias, cond, activation or gate, residual; writes the tile at (p, q, r) of an image's other dimensions.

    Pixel m of the tile is of image n + m // PIXELS % NB.
    """
    GATED: gl.constexpr = ACTIVATION == "tanh_sigmoid" or ACTIVATION == "glu"
    Z: gl.constexpr = 2 * OUTPUTS if GATED else OUTPUTS
    if SWAP:
        m = gl.arange(0, M, gl.SliceLayout(0, LAYOUT))[None, :]
        lane = gl.arange(0, BN, gl.SliceLayout(1, LAYOUT))[:, None]
    else:
        m = gl.arange(0, M, gl.SliceLayout(1, LAYOUT))[:, None]
        lane = gl.arange(0, BN, gl.SliceLayout(0, LAYOUT))[None, :]
    z = _before(total, bias, cond, n + m // PIXELS % NB, first + lane, images, OUTPUTS, 0, Z, HAS_BIAS, HAS_COND)
    if GATED:
        gate = _before(
            total2, bias, cond, n + m // PIXELS % NB, first + lane, images, OUTPUTS, OUTPUTS, Z, HAS_BIAS, HAS_COND
        )
        if HAS_KEPT:
            _put(kept, buffer, z, p, q, r, first, M, BN, SWAP)
            _put(kept, buffer, gate, p, q, r, OUTPUTS + first, M, BN, SWAP)
        if ACTIVATION == "tanh_sigmoid":
            z = _tanh(z)
        z = z * _sigmoid(gate)
    else:
        z = _activate(z, ACTIVATION)
        if HAS_KEPT:
            _put(kept, buffer, z, p, q, r, first, M, BN, SWAP)
    if HAS_RESIDUAL:
        z += _get(residual, buffer, bar, phase, p, q, r, first, M, BN, SWAP, LAYOUT)
    _put(y, buffer, z, p, q, r, first, M, BN, SWAP)
    if BN2 > 0 and not GATED:  # more channels of the same tile, of a layer that is neither gated nor kept
        if SWAP:
            lane2 = gl.arange(0, BN2, gl.SliceLayout(1, LAYOUT2))[:, None]
            m2 = gl.arange(0, M, gl.SliceLayout(0, LAYOUT2))[None, :]
        else:
            lane2 = gl.arange(0, BN2, gl.SliceLayout(0, LAYOUT2))[None, :]
            m2 = gl.arange(0, M, gl.SliceLayout(1, LAYOUT2))[:, None]
        more = _before(
            total2, bias, cond, n + m2 // PIXELS % NB, first + BN + lane2, images, OUTPUTS, 0, Z, HAS_BIAS, HAS_COND
        )
        _put(y2, buffer2, _activate(more, ACTIVATION), p, q, r, first + BN, M, BN2, SWAP)


@gluon.jit
def _produce(x, w, w2, sx, sw, sw2, full, empty, tiles, tiles_h, tiles_w,
             INPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr,
             DILATION: gl.constexpr, TRANSPOSED: gl.constexpr, BK: gl.constexpr, PARTS: gl.constexpr,
             STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr,
             SECOND: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr):  # fmt: skip
    """The warp that keeps the copy engine busy, across tiles."""
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, row, column, first = _place(tile, tiles_h, tiles_w, BLOCKS, NB, TH, TW, WIDTH)
        for step in range(STEPS):
            slot = done % STAGES
            mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)  # at once in the first round
            _fill(x, w, w2, sx, sw, sw2, full.index(slot), slot, step, n, row, column, first, first + SECOND, True,
                  INPUTS, COLUMNS, UP, LEFT, DILATION, TRANSPOSED, BK, PARTS)  # fmt: skip
            done += 1


@gluon.jit
def _consume(sx, sw, sw2, full, empty, buffer, buffer2, bar, y, y2, kept, residual, bias, cond, images, tiles, tiles_h,
             tiles_w, OUTPUTS: gl.constexpr, TRANSPOSED: gl.constexpr, BK: gl.constexpr, PARTS: gl.constexpr,
             STEPS: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, WIDTH: gl.constexpr,
             NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, M: gl.constexpr, BN: gl.constexpr,
             BN2: gl.constexpr, SWAP: gl.constexpr, LAYOUT: gl.constexpr, LAYOUT2: gl.constexpr,
             ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_COND: gl.constexpr,
             HAS_RESIDUAL: gl.constexpr, HAS_KEPT: gl.constexpr):  # fmt: skip
    """The warps that multiply: a tile after another, of operands that _produce brings."""
    done = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, row, column, first = _place(tile, tiles_h, tiles_w, BLOCKS, NB, TH, TW, WIDTH)
        if SWAP:
            total = gl.zeros([BN, M], gl.float32, LAYOUT)
            total2 = gl.zeros([BN2 if PARTS == 2 else BN, M], gl.float32, LAYOUT2)
        else:
            total = gl.zeros([M, BN], gl.float32, LAYOUT)
            total2 = gl.zeros([M, BN2 if PARTS == 2 else BN], gl.float32, LAYOUT2)
        for step in range(STEPS):
            slot = done % STAGES
            mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            total = _multiply(sx.index(slot), sw.index(slot), total, M, BN, BK, TRANSPOSED, SWAP)
            if PARTS == 2:
                total2 = _multiply(sx.index(slot), sw2.index(slot), total2, M, BN2, BK, TRANSPOSED, SWAP)
                total, total2 = warpgroup_mma_wait(num_outstanding=2, deps=(total, total2))
            else:
                total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            _barrier()  # all warps are through with the products of the step before
            mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), pred=step > 0)
            done += 1
        if PARTS == 2:
            total, total2 = warpgroup_mma_wait(num_outstanding=0, deps=(total, total2))
        else:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        _barrier()
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES))
        _finish(total, total2, y, y2, kept, residual, bias, cond, buffer, buffer2, bar, phase, images, n, n, row,
                column, first, OUTPUTS, ACTIVATION, HAS_BIAS, HAS_COND, HAS_RESIDUAL, HAS_KEPT, M, TH * TW, NB, BN,
                BN2, SWAP, LAYOUT, LAYOUT2)  # fmt: skip
        phase ^= 1
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["images", "tiles", "tiles_h", "tiles_w"])
def convolve(x, w, w2, y, y2, kept, residual, bias, cond, images, tiles, tiles_h, tiles_w,
             INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr,
             TAPS: gl.constexpr, DILATION: gl.constexpr, TRANSPOSED: gl.constexpr, ACTIVATION: gl.constexpr,
             HAS_BIAS: gl.constexpr, HAS_COND: gl.constexpr, HAS_RESIDUAL: gl.constexpr, HAS_KEPT: gl.constexpr,
             NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, BN: gl.constexpr, BN2: gl.constexpr,
             BK: gl.constexpr, STAGES: gl.constexpr, SWAP: gl.constexpr, SPECIAL: gl.constexpr,
             num_warps: gl.constexpr):  # fmt: skip
    """y = f(convolution + bias + cond) + residual, or under TRANSPOSED the input gradient.

    x, y, residual: descriptors of [images, rows, columns, channels], boxes [NB, TH, TW, BK or BN]; kept likewise, of z
    under a gate. w: of the whole weight, [channels of z, taps, channels of x], boxes [BN, 1, BK], and under TRANSPOSED
    [BK, 1, BN]. w2, y2: with BN2 channels instead, for a tile of BN + BN2 (320 is 256 and 64), or for a gate's second
    half. cond: [images, channels of z]. SPECIAL: a warp of its own copies, and programs walk over tiles.
    """
    GATED: gl.constexpr = ACTIVATION == "tanh_sigmoid" or ACTIVATION == "glu"
    PARTS: gl.constexpr = 2 if BN2 > 0 else 1
    WIDTH: gl.constexpr = BN if GATED else BN + BN2
    SECOND: gl.constexpr = OUTPUTS if GATED else BN
    M: gl.constexpr = NB * TH * TW
    BLOCKS: gl.constexpr = (OUTPUTS + WIDTH - 1) // WIDTH
    STEPS: gl.constexpr = TAPS * ((INPUTS + BK - 1) // BK)
    FIRST: gl.constexpr = BN if SWAP else M  # rows of the product
    WIDE: gl.constexpr = M if SWAP else BN
    ROWS: gl.constexpr = num_warps if FIRST >= 16 * num_warps else 4  # warps beside each other down the product
    N_WARP: gl.constexpr = WIDE * ROWS // num_warps
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROWS, num_warps // ROWS], instr_shape=[16, N_WARP if N_WARP < 256 else 256, 16]
    )
    WIDE2: gl.constexpr = BN2 if PARTS == 2 and not SWAP else WIDE
    N_WARP2: gl.constexpr = WIDE2 * ROWS // num_warps
    LAYOUT2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROWS, num_warps // ROWS], instr_shape=[16, N_WARP2 if N_WARP2 < 256 else 256, 16]
    )
    sx = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_type.shape, x.layout)
    sw = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_type.shape, w.layout)
    if PARTS == 2:
        sw2 = gl.allocate_shared_memory(w2.dtype, [STAGES] + w2.block_type.shape, w2.layout)
    else:
        sw2 = sw
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    mbarrier.init(bar, count=1)
    if SPECIAL:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(empty.index(i), count=1)
        fence_async_shared()
        _barrier()
        buffer = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
        if PARTS == 2 and not GATED:
            buffer2 = gl.allocate_shared_memory(y2.dtype, y2.block_type.shape, y2.layout)
        else:
            buffer2 = buffer
        gl.warp_specialize(
            [
                (_consume, (sx, sw, sw2, full, empty, buffer, buffer2, bar, y, y2, kept, residual, bias, cond, images,
                            tiles, tiles_h, tiles_w, OUTPUTS, TRANSPOSED, BK, PARTS, STEPS, STAGES, BLOCKS, WIDTH,
                            NB, TH, TW, M, BN, BN2, SWAP, LAYOUT, LAYOUT2, ACTIVATION, HAS_BIAS, HAS_COND,
                            HAS_RESIDUAL, HAS_KEPT)),
                (_produce, (x, w, w2, sx, sw, sw2, full, empty, tiles, tiles_h, tiles_w, INPUTS, COLUMNS, UP, LEFT,
                            DILATION, TRANSPOSED, BK, PARTS, STEPS, STAGES, BLOCKS, WIDTH, SECOND, NB, TH, TW)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        fence_async_shared()
        _barrier()
        n, row, column, first = _place(gl.program_id(0), tiles_h, tiles_w, BLOCKS, NB, TH, TW, WIDTH)
        for i in gl.static_range(STAGES - 1):
            _fill(x, w, w2, sx, sw, sw2, full.index(i), i, i, n, row, column, first, first + SECOND, i < STEPS,
                  INPUTS, COLUMNS, UP, LEFT, DILATION, TRANSPOSED, BK, PARTS)  # fmt: skip
        if SWAP:
            total = gl.zeros([BN, M], gl.float32, LAYOUT)
            total2 = gl.zeros([BN2 if PARTS == 2 else BN, M], gl.float32, LAYOUT2)
        else:
            total = gl.zeros([M, BN], gl.float32, LAYOUT)
            total2 = gl.zeros([M, BN2 if PARTS == 2 else BN], gl.float32, LAYOUT2)
        for step in range(STEPS):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            total = _multiply(sx.index(slot), sw.index(slot), total, M, BN, BK, TRANSPOSED, SWAP)
            if PARTS == 2:
                total2 = _multiply(sx.index(slot), sw2.index(slot), total2, M, BN2, BK, TRANSPOSED, SWAP)
                total, total2 = warpgroup_mma_wait(num_outstanding=2, deps=(total, total2))
            else:
                total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            _barrier()  # all warps are through with the products of the step before: its buffers are free
            ahead = step + STAGES - 1
            _fill(x, w, w2, sx, sw, sw2, full.index(ahead % STAGES), ahead % STAGES, ahead, n, row, column, first,
                  first + SECOND, ahead < STEPS, INPUTS, COLUMNS, UP, LEFT, DILATION, TRANSPOSED, BK,
                  PARTS)  # fmt: skip
        if PARTS == 2:
            total, total2 = warpgroup_mma_wait(num_outstanding=0, deps=(total, total2))
        else:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        _barrier()  # the buffer may lie where the last product was read from
        buffer = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
        if PARTS == 2 and not GATED:
            buffer2 = gl.allocate_shared_memory(y2.dtype, y2.block_type.shape, y2.layout)
        else:
            buffer2 = buffer
        _finish(total, total2, y, y2, kept, residual, bias, cond, buffer, buffer2, bar, 0, images, n, n, row, column,
                first, OUTPUTS, ACTIVATION, HAS_BIAS, HAS_COND, HAS_RESIDUAL, HAS_KEPT, M, TH * TW, NB, BN, BN2, SWAP,
                LAYOUT, LAYOUT2)  # fmt: skip
        tma.store_wait(pendings=0)


@gluon.jit
def _produce_rows(x, x2, w, sx, sw, full, empty, full_w, empty_w, tiles, tiles_h, tiles_w,
                  INPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr,
                  TAPS: gl.constexpr, DILATION: gl.constexpr, TRANSPOSED: gl.constexpr, STAGES: gl.constexpr,
                  W_STAGES: gl.constexpr, BLOCKS: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
                  BN: gl.constexpr, E: gl.constexpr):  # fmt: skip
    SIGN: gl.constexpr = -DILATION if TRANSPOSED else DILATION
    BOX: gl.constexpr = x.layout
    BYTES: gl.constexpr = x.block_type.nbytes + (x2.block_type.nbytes if E > 0 else 0)
    CHANNELS: gl.constexpr = (INPUTS + 63) // 64
    WALKS: gl.constexpr = (COLUMNS if TAPS > COLUMNS else TAPS) * CHANNELS
    done = 0
    done_w = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, row, column, first = _place(tile, tiles_h, tiles_w, BLOCKS, NB, TH, TW, BN)
        start = row if TRANSPOSED else row - UP * DILATION
        for walk in range(WALKS):
            j = walk // CHANNELS
            c = walk % CHANNELS * 64
            slot = done % STAGES
            mbarrier.wait(empty.index(slot), ((done // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            right = column + (j - LEFT) * SIGN
            to = _as(sx.index(slot * (TH + E)), [TH, NB, TW, 64], BOX)
            _copy_in(x, [start, n, right, c], bar, to)
            if E > 0:
                more = _as(sx.index(slot * (TH + E) + TH), [E, NB, TW, 64], BOX)
                _copy_in(x2, [start + TH, n, right, c], bar, more)
            done += 1
            for i in range((TAPS - j + COLUMNS - 1) // COLUMNS):
                at = done_w % W_STAGES
                mbarrier.wait(empty_w.index(at), ((done_w // W_STAGES) & 1) ^ 1)
                mbarrier.expect(full_w.index(at), w.block_type.nbytes)
                if TRANSPOSED:
                    _copy_in(w, [c, i * COLUMNS + j, first], full_w.index(at), sw.index(at))
                else:
                    _copy_in(w, [first, i * COLUMNS + j, c], full_w.index(at), sw.index(at))
                done_w += 1


@gluon.jit
def _consume_rows(sx, sw, full, empty, full_w, empty_w, buffer, bar, y, kept, residual, bias, cond, images, tiles,
                  tiles_h, tiles_w, INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, COLUMNS: gl.constexpr,
                  UP: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr, TRANSPOSED: gl.constexpr,
                  STAGES: gl.constexpr, W_STAGES: gl.constexpr, BLOCKS: gl.constexpr, NB: gl.constexpr,
                  TH: gl.constexpr, TW: gl.constexpr, M: gl.constexpr, BN: gl.constexpr, E: gl.constexpr,
                  SWAP: gl.constexpr, LAYOUT: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr,
                  HAS_COND: gl.constexpr, HAS_RESIDUAL: gl.constexpr, HAS_KEPT: gl.constexpr):  # fmt: skip
    CHANNELS: gl.constexpr = (INPUTS + 63) // 64
    WALKS: gl.constexpr = (COLUMNS if TAPS > COLUMNS else TAPS) * CHANNELS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    done = 0
    done_w = 0
    phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, row, column, first = _place(tile, tiles_h, tiles_w, BLOCKS, NB, TH, TW, BN)
        if SWAP:
            total = gl.zeros([BN, M], gl.float32, LAYOUT)
        else:
            total = gl.zeros([M, BN], gl.float32, LAYOUT)
        for walk in range(WALKS):
            j = walk // CHANNELS
            slot = done % STAGES
            mbarrier.wait(full.index(slot), (done // STAGES) & 1)
            for i in range((TAPS - j + COLUMNS - 1) // COLUMNS):
                at = done_w % W_STAGES
                mbarrier.wait(full_w.index(at), (done_w // W_STAGES) & 1)
                down = (UP - i if TRANSPOSED else i) * DILATION
                pixels = _as(sx.index(slot * (TH + E) + down), [M, 64], FLAT)
                total = _multiply(pixels, sw.index(at), total, M, BN, 64, TRANSPOSED, SWAP)
                total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
                _barrier()  # all warps are through with the product before
                mbarrier.arrive(empty_w.index((done_w + W_STAGES - 1) % W_STAGES), pred=walk + i > 0)
                mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES), pred=(i == 0) & (walk > 0))
                done_w += 1
            done += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        _barrier()
        mbarrier.arrive(empty_w.index((done_w + W_STAGES - 1) % W_STAGES))
        mbarrier.arrive(empty.index((done + STAGES - 1) % STAGES))
        _finish(total, total, y, y, kept, residual, bias, cond, buffer, buffer, bar, phase, images, n, row, n, column,
                first, OUTPUTS, ACTIVATION, HAS_BIAS, HAS_COND, HAS_RESIDUAL, HAS_KEPT, M, TW, NB, BN, 0, SWAP,
                LAYOUT, LAYOUT)  # fmt: skip
        phase ^= 1
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=["images", "tiles", "tiles_h", "tiles_w"])
def convolve_rows(x, x2, w, y, kept, residual, bias, cond, images, tiles, tiles_h, tiles_w,
                  INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr,
                  LEFT: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr, TRANSPOSED: gl.constexpr,
                  ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_COND: gl.constexpr,
                  HAS_RESIDUAL: gl.constexpr, HAS_KEPT: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr,
                  TW: gl.constexpr, BN: gl.constexpr, E: gl.constexpr, STAGES: gl.constexpr, W_STAGES: gl.constexpr,
                  SWAP: gl.constexpr, num_warps: gl.constexpr):  # fmt: skip
    """convolve with a warp of its own that copies, and half the copies: taps of one column share their rows.

    A box lies in shared memory with its rows outermost, and with E rows more, so that the operand of a tap i rows
    further down is the same memory from row i on. Descriptors of images are [rows, images, columns, channels], boxes
    [TH, NB, TW, 64 or BN], and that of x2 has E rows; NB * TW must be a multiple of eight, of which the swizzle is
    made.
    """
    M: gl.constexpr = NB * TH * TW
    BLOCKS: gl.constexpr = (OUTPUTS + BN - 1) // BN
    FIRST: gl.constexpr = BN if SWAP else M
    WIDE: gl.constexpr = M if SWAP else BN
    ROWS: gl.constexpr = num_warps if FIRST >= 16 * num_warps else 4
    N_WARP: gl.constexpr = WIDE * ROWS // num_warps
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROWS, num_warps // ROWS], instr_shape=[16, N_WARP if N_WARP < 256 else 256, 16]
    )
    ROW: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    sx = gl.allocate_shared_memory(x.dtype, [STAGES * (TH + E), NB, TW, 64], ROW)
    sw = gl.allocate_shared_memory(w.dtype, [W_STAGES] + w.block_type.shape, w.layout)
    buffer = gl.allocate_shared_memory(y.dtype, y.block_type.shape, y.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_w = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    empty_w = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(full_w.index(i), count=1)
        mbarrier.init(empty_w.index(i), count=1)
    mbarrier.init(bar, count=1)
    fence_async_shared()
    _barrier()
    gl.warp_specialize(
        [
            (_consume_rows, (sx, sw, full, empty, full_w, empty_w, buffer, bar, y, kept, residual, bias, cond, images,
                             tiles, tiles_h, tiles_w, INPUTS, OUTPUTS, COLUMNS, UP, TAPS, DILATION, TRANSPOSED,
                             STAGES, W_STAGES, BLOCKS, NB, TH, TW, M, BN, E, SWAP, LAYOUT, ACTIVATION, HAS_BIAS,
                             HAS_COND, HAS_RESIDUAL, HAS_KEPT)),
            (_produce_rows, (x, x2, w, sx, sw, full, empty, full_w, empty_w, tiles, tiles_h, tiles_w, INPUTS, COLUMNS,
                             UP, LEFT, TAPS, DILATION, TRANSPOSED, STAGES, W_STAGES, BLOCKS, NB, TH, TW, BN, E)),
        ],
        [1],
        [24],
    )  # fmt: skip


@gluon.jit
def _fill_pixels(d_z, x, sz, sx, sx2, bar, slot, box, out, chunk, tiles_h, tiles_w, pred,
                 INPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr,
                 DILATION: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, G: gl.constexpr,
                 G2: gl.constexpr):  # fmt: skip
    """Starts the copies of one box of pixels: of d_z, and of G + G2 chunks of x, each moved by its own tap."""
    BLOCKS: gl.constexpr = (INPUTS + 63) // 64
    column = box % tiles_w * TW
    box = box // tiles_w
    row = box % tiles_h * TH
    n = box // tiles_h * NB  # past the last image all is 0
    mbarrier.expect(bar, d_z.block_type.nbytes + (G + G2) * x.block_type.nbytes, pred=pred)
    _copy_in(d_z, [n, row, column, out], bar, sz.index(slot), pred=pred)
    for i in gl.static_range(G + G2):
        tap = (chunk + i) // BLOCKS
        at = [n, row + (tap // COLUMNS - UP) * DILATION, column + (tap % COLUMNS - LEFT) * DILATION,
              (chunk + i) % BLOCKS * 64]  # fmt: skip
        if i < G:
            _copy_in(x, at, bar, sx.index(slot * G + i), pred=pred)
        else:
            _copy_in(x, at, bar, sx2.index(slot * G2 + (i - G)), pred=pred)


@gluon.jit
def _write_share(shares, total, split, out, chunk, INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, TAPS: gl.constexpr,
                 BM: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    BLOCKS: gl.constexpr = (INPUTS + 63) // 64
    o = out + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    lane = gl.arange(0, N, gl.SliceLayout(0, LAYOUT))[None, :]
    tap = (chunk + lane // 64) // BLOCKS
    c = (chunk + lane // 64) % BLOCKS * 64 + lane % 64
    to = shares + gl.cast(split, gl.int64) * (OUTPUTS * TAPS * INPUTS) + (o * (TAPS * INPUTS) + (tap * INPUTS + c))
    gl.store(to, total, mask=(o < OUTPUTS) & (tap < TAPS) & (c < INPUTS))


@gluon.jit
def _produce_pixels(d_z, x, sz, sx, sx2, full, empty, first, out, chunk, tiles_h, tiles_w, steps,
                    INPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr, LEFT: gl.constexpr,
                    DILATION: gl.constexpr, NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr,
                    G: gl.constexpr, G2: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
        _fill_pixels(d_z, x, sz, sx, sx2, full.index(slot), slot, first + step, out, chunk, tiles_h, tiles_w, True,
                     INPUTS, COLUMNS, UP, LEFT, DILATION, NB, TH, TW, G, G2)  # fmt: skip


@gluon.jit
def _consume_pixels(sz, bx, bx2, full, empty, shares, split, out, chunk, steps, INPUTS: gl.constexpr,
                    OUTPUTS: gl.constexpr, TAPS: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, G: gl.constexpr,
                    G2: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
                    LAYOUT2: gl.constexpr):  # fmt: skip
    total = gl.zeros([BM, 64 * G], gl.float32, LAYOUT)
    total2 = gl.zeros([BM, 64 * (G2 if G2 > 0 else 1)], gl.float32, LAYOUT2)
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        z = sz.index(slot).reshape([K, BM]).permute((1, 0))
        total = warpgroup_mma(z, bx.index(slot), total, is_async=True)
        if G2 > 0:
            total2 = warpgroup_mma(z, bx2.index(slot), total2, is_async=True)
            total, total2 = warpgroup_mma_wait(num_outstanding=2, deps=(total, total2))
        else:
            total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
        _barrier()
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > 0)
    if G2 > 0:
        total, total2 = warpgroup_mma_wait(num_outstanding=0, deps=(total, total2))
        _write_share(shares, total2, split, out, chunk + G, INPUTS, OUTPUTS, TAPS, BM, 64 * G2, LAYOUT2)
    else:
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
    _write_share(shares, total, split, out, chunk, INPUTS, OUTPUTS, TAPS, BM, 64 * G, LAYOUT)


@gluon.jit(do_not_specialize=["tiles_h", "tiles_w", "steps"])
def weight_shares(d_z, x, shares, tiles_h, tiles_w, steps,
                  INPUTS: gl.constexpr, OUTPUTS: gl.constexpr, COLUMNS: gl.constexpr, UP: gl.constexpr,
                  LEFT: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr,
                  NB: gl.constexpr, TH: gl.constexpr, TW: gl.constexpr, BM: gl.constexpr, G: gl.constexpr,
                  G2: gl.constexpr, STAGES: gl.constexpr, SPECIAL: gl.constexpr,
                  num_warps: gl.constexpr):  # fmt: skip
    """A split's share of the weight gradient, whose inner dimension is the pixels: `steps` boxes of them.

    d_z, x: descriptors as convolve's, boxes [NB, TH, TW, BM] and [NB, TH, TW, 64]. shares: [splits, channels of z,
    TAPS, channels of x], float32. A program owns BM channels of z and G + G2 chunks, each 64 channels of x at one tap:
    chunks of several taps lie side by side in shared memory, so that one wide product takes all of them, and d_z is
    read once for all.
    """
    K: gl.constexpr = NB * TH * TW
    CHUNKS: gl.constexpr = TAPS * ((INPUTS + 63) // 64)
    GROUPS: gl.constexpr = (CHUNKS + G + G2 - 1) // (G + G2)
    OUT_BLOCKS: gl.constexpr = (OUTPUTS + BM - 1) // BM
    ROWS: gl.constexpr = num_warps if BM >= 16 * num_warps else 4
    N_WARP: gl.constexpr = 64 * G * ROWS // num_warps
    N_WARP2: gl.constexpr = 64 * (G2 if G2 > 0 else 1) * ROWS // num_warps
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROWS, num_warps // ROWS], instr_shape=[16, N_WARP, 16]
    )
    LAYOUT2: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[ROWS, num_warps // ROWS], instr_shape=[16, N_WARP2, 16]
    )
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    program = gl.program_id(0)
    split = program // (OUT_BLOCKS * GROUPS)
    out = program % OUT_BLOCKS * BM
    chunk = program // OUT_BLOCKS % GROUPS * (G + G2)
    sz = gl.allocate_shared_memory(d_z.dtype, [STAGES] + d_z.block_type.shape, d_z.layout)
    sx = gl.allocate_shared_memory(x.dtype, [STAGES * G] + x.block_type.shape, x.layout)
    bx = _as(sx, [STAGES, K, 64 * G], FLAT)
    if G2 > 0:
        sx2 = gl.allocate_shared_memory(x.dtype, [STAGES * G2] + x.block_type.shape, x.layout)
        bx2 = _as(sx2, [STAGES, K, 64 * G2], FLAT)
    else:
        sx2 = sx
        bx2 = bx
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    first = split * steps
    if SPECIAL:
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(empty.index(i), count=1)
        fence_async_shared()
        _barrier()
        gl.warp_specialize(
            [
                (_consume_pixels, (sz, bx, bx2, full, empty, shares, split, out, chunk, steps, INPUTS, OUTPUTS, TAPS,
                                   K, BM, G, G2, STAGES, LAYOUT, LAYOUT2)),
                (_produce_pixels, (d_z, x, sz, sx, sx2, full, empty, first, out, chunk, tiles_h, tiles_w, steps,
                                   INPUTS, COLUMNS, UP, LEFT, DILATION, NB, TH, TW, G, G2, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip
    else:
        fence_async_shared()
        _barrier()
        for i in gl.static_range(STAGES - 1):
            _fill_pixels(d_z, x, sz, sx, sx2, full.index(i), i, first + i, out, chunk, tiles_h, tiles_w, i < steps,
                         INPUTS, COLUMNS, UP, LEFT, DILATION, NB, TH, TW, G, G2)  # fmt: skip
        total = gl.zeros([BM, 64 * G], gl.float32, LAYOUT)
        total2 = gl.zeros([BM, 64 * (G2 if G2 > 0 else 1)], gl.float32, LAYOUT2)
        for step in range(steps):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), (step // STAGES) & 1)
            z = sz.index(slot).reshape([K, BM]).permute((1, 0))
            total = warpgroup_mma(z, bx.index(slot), total, is_async=True)
            if G2 > 0:
                total2 = warpgroup_mma(z, bx2.index(slot), total2, is_async=True)
                total, total2 = warpgroup_mma_wait(num_outstanding=2, deps=(total, total2))
            else:
                total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
            _barrier()
            ahead = step + STAGES - 1
            _fill_pixels(d_z, x, sz, sx, sx2, full.index(ahead % STAGES), ahead % STAGES, first + ahead, out, chunk,
                         tiles_h, tiles_w, ahead < steps, INPUTS, COLUMNS, UP, LEFT, DILATION, NB, TH, TW, G,
                         G2)  # fmt: skip
        if G2 > 0:
            total, total2 = warpgroup_mma_wait(num_outstanding=0, deps=(total, total2))
            _write_share(shares, total2, split, out, chunk + G, INPUTS, OUTPUTS, TAPS, BM, 64 * G2, LAYOUT2)
        else:
            total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        _write_share(shares, total, split, out, chunk, INPUTS, OUTPUTS, TAPS, BM, 64 * G, LAYOUT)


@triton.jit(do_not_specialize=["splits", "count"])
def add_shares(shares, d_weight, stride_out, stride_in, stride_tap, splits, count,
               INPUTS: tl.constexpr, TAPS: tl.constexpr, ALL_TAPS: tl.constexpr, S: tl.constexpr,
               SIZE: tl.constexpr):  # fmt: skip
    """The weight gradient [channels of z, ALL_TAPS, INPUTS]: the sum of all shares, in one order; 0 at dead taps."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    c = index % INPUTS
    tap = index // INPUTS % ALL_TAPS
    out = index // INPUTS // ALL_TAPS
    live = (index < count * ALL_TAPS * INPUTS) & (tap < TAPS)
    place = (out * TAPS + tap) * INPUTS + c
    total = tl.zeros([S, SIZE], tl.float32)
    for first in range(0, splits, S):
        split = (first + tl.arange(0, S)).to(tl.int64)
        mask = (split < splits)[:, None] & live[None, :]
        total += tl.load(shares + split[:, None] * (count * TAPS * INPUTS) + place[None, :], mask=mask, other=0.0)
    to = d_weight + out * stride_out + c * stride_in + tap * stride_tap
    tl.store(to, tl.sum(total, axis=0).to(d_weight.dtype.element_ty), mask=index < count * ALL_TAPS * INPUTS)
