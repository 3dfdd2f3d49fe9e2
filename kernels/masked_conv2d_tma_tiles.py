"""How the kernels of masked_conv2d_tma_kernels.py cut a layer's work, and what else a search may try."""

import itertools
from typing import NamedTuple

import triton

from fastelbo.kernels.masked_conv2d_tma_kernels import RENAMED


class Tile(NamedTuple):
    """How programs of convolve cut their work: M pixels, BN channels of the output (BN + BN2 with a second part)."""

    M: int
    BN: int
    BN2: int = 0
    BK: int = 64
    STAGES: int = 4
    SWAP: bool = False
    SPECIAL: bool = False
    num_warps: int = 4
    programs: int = 1  # of a multiprocessor, under SPECIAL


class RowTile(NamedTuple):
    """How programs of convolve_rows do: boxes of M pixels and TH rows, and rings of boxes and of taps."""

    M: int
    BN: int
    TH: int
    STAGES: int = 2
    W_STAGES: int = 4
    SWAP: bool = False
    num_warps: int = 4
    programs: int = 1


class WeightTile(NamedTuple):
    """How programs of weight_shares do: K pixels a step, BM channels of z, G + G2 chunks of 64 channels of x."""

    K: int
    BM: int
    G: int
    G2: int = 0
    STAGES: int = 4
    SPECIAL: bool = False
    num_warps: int = 4
    waves: int = 1  # of programs, by which the pixels are split


# Which tile a layer runs with: within 5 % of the best in all layers of an H100 80GB HBM3
# (benchmarks/results/conv_candidates_h100.csv). Gates' tiles were shown to be right there, and not compared.

FEW_PIXELS = 4096  # below which whole rows of programs stand idle, and weight gradients have been slower
_MANY_PIXELS = 32768
_ONE_WAVE = 132  # programs that run at once on the GPU of the rows


def tile_for(outputs: int, inputs: int, pixels: int, up: int, rows: int, dilation=1, gated=False):
    """The Tile or RowTile of a convolution of so many channels and pixels.

    Args:
        outputs: channels of the result; under a gate those that it leaves, which 32 must divide.
        up: rows of taps above the pixel's own.
        rows: of an image.
    """
    if gated:
        n = 64 if outputs % 64 == 0 else 32
        return Tile(128, n, n, STAGES=3 if n == 64 else 4, num_warps=8 if n == 64 else 4)
    walks = not RENAMED and dilation == 1 and up in (2, 3) and pixels >= _MANY_PIXELS
    tall = 4 if rows % 8 else 8
    if pixels <= FEW_PIXELS:
        if triton.cdiv(pixels, 128) * triton.cdiv(outputs, 64) > _ONE_WAVE // 2:
            return Tile(128, 64, STAGES=6, SWAP=True)
        return Tile(64, 64, BK=128) if inputs % 128 == 0 else Tile(64, 64, STAGES=6)
    if outputs <= 64:
        return RowTile(256, 64, tall, SWAP=True, num_warps=8) if walks else Tile(128, 64, STAGES=6, SPECIAL=True)
    if outputs % 128:
        return Tile(256, 64, SWAP=True, SPECIAL=True)
    if triton.cdiv(pixels, 128) * (outputs // 128) <= _ONE_WAVE:
        return Tile(128, 128)
    if walks and up == 2 and outputs == 128:
        return RowTile(256, 128, tall, W_STAGES=3, SWAP=True, num_warps=8)
    return Tile(128, 128, STAGES=5, SPECIAL=True, num_warps=8)


def weight_tile_for(outputs: int, inputs: int, taps: int) -> WeightTile:
    """The WeightTile of a layer."""
    if outputs <= 64:
        return WeightTile(64, 64, 2, waves=2)
    chunks = taps * triton.cdiv(inputs, 64)
    fives = chunks >= 20 and chunks % 5 == 0 and 4 * triton.cdiv(chunks, 4) > 1.1 * chunks  # 25 are five times five
    return WeightTile(64, 64, 4, 1 if fives else 0, SPECIAL=True)


# What a search on a GPU may try beside them, the likeliest first

_SHARED = 226 * 2**10  # bytes of shared memory for buffers, of the 227 KiB that a program can have


def _fits(sums, warps):
    """Whether a tile's sums fit the registers of so many warps, and are enough to be worth their while."""
    return 32 < sums // (32 * warps) <= 160


def more_tiles_for(outputs: int, inputs: int, pixels: int, up: int, rows: int, dilation=1, gated=False):
    """tile_for()'s, and others, of as many stages as there is memory for."""
    found = [tile_for(outputs, inputs, pixels, up, rows, dilation, gated)]
    if gated:
        return tuple(found)
    narrow = 64 if outputs > 32 else 32
    sizes = [(m, n, 0) for m in (128, 256, 64) for n in (narrow, 128, 256) if n == narrow or n < 2 * outputs]
    sizes += [(128, 256, 64)] if 256 < outputs <= 320 else []
    tall = 4 if rows % 8 else 8
    higher = tall + triton.next_power_of_2(max(1, up))
    for (m, n, n2), warps in itertools.product(sizes, (4, 8)):
        if not _fits(m * (n + n2), warps):
            continue
        for special, swap in itertools.product((True, False), (False, True) if n % 64 == 0 and not n2 else (False,)):
            k = 64 if inputs > 32 else 32
            stages = min(6, (_SHARED - 2 * m * (n + n2)) // (2 * k * (m + n + n2)))
            found.append(Tile(m, n, n2, k, stages, swap, special, warps))
            if special and not RENAMED and dilation == 1 and up >= 1 and k == 64 and n % 64 == 0 and m >= 8 * tall:
                stages = min(3, (_SHARED - 2 * n * (m + 64 * 3)) // (128 * m * higher // tall))
                found += [RowTile(m, n, tall, stages, 3, swap, warps)] if stages > 1 and not n2 else []
    return tuple(dict.fromkeys(found))


def more_weight_tiles_for(outputs: int, inputs: int, taps: int) -> "tuple[WeightTile, ...]":
    """weight_tile_for()'s, and others, of as many stages as there is memory for."""
    found = [weight_tile_for(outputs, inputs, taps)]
    chunks = taps * triton.cdiv(inputs, 64)
    parts = [(4, 0), (4, 1), (2, 0), (2, 1), (1, 0)]
    ms = (64, 128)[: 1 + (outputs > 64)]
    for waves, m, (g, g2), special, warps in itertools.product((1, 2), ms, parts, (True, False), (4, 8)):
        if _fits(64 * m * (g + g2), warps) and g + g2 <= chunks:
            stages = min(4, _SHARED // (128 * (m + 64 * (g + g2))))
            found.append(WeightTile(64, m, g, g2, stages, special, warps, waves))
    return tuple(dict.fromkeys(found))
