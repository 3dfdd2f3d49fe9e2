"""Reparameterised Gaussian sampling in Triton. The noise is drawn again in the backward, by the same instructions."""

import torch
import triton
import triton.language as tl

from fastelbo import _library
from fastelbo.kernels import plan, tile
from fastelbo.kernels import scale as scales
from fastelbo.kernels.launch import place
from fastelbo.reference.scale import arithmetic_dtype


def approximate(dtype: torch.dtype) -> bool:
    """Whether a sample of this dtype may come from the processor's approximate sine and cosine.

    The rounding of half precision hides what they are off by. Forward and backward decide alike, so that their noise is
    the same to the last bit. The interpreter has no such functions.
    """
    return dtype in (torch.bfloat16, torch.float16) and not _library.INTERPRETED


@triton.jit
def heat(std, temperature, HEATED: tl.constexpr):
    """A standard deviation times the temperature, unless that is 1."""
    if HEATED:
        return std * tl.full([1, 1], temperature, std.dtype)
    else:
        return std


@triton.jit
def store_samples(
    z, z_stride, kept, mean, std, draws, samples, window, shift, columns,
    T: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Writes mean + std * noise of every sample, and 0 where it is not kept."""
    if z_stride is None:
        noise = tile.draw(draws, 0, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE)
        tile.store(z, window, tl.where(kept, tl.fma(std, noise, mean), 0.0), VECTOR)
    else:
        for sample in range(samples):
            noise = tile.draw(draws, sample, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE)
            values = tl.where(kept, tl.fma(std, noise, mean), 0.0)
            tile.store(z, window, values, VECTOR, tile.sample_start(sample, z_stride))


@triton.jit
def sample_gradients(
    d_z, d_z_stride, draws, samples, window, shift, columns,
    T: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """The sums over all samples of d_z and of d_z * noise."""
    if d_z_stride is None:
        upstream = tile.load(d_z, window, T, VECTOR)
        return upstream, upstream * tile.draw(draws, 0, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE)
    else:
        total = tl.zeros([window[0].shape[0], window[3].shape[1]], T)
        noisy = total
        for sample in range(samples):
            upstream = tile.load(d_z, window, T, VECTOR, tile.sample_start(sample, d_z_stride))
            noise = tile.draw(draws, sample, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE)
            total += upstream
            noisy = tl.fma(upstream, noise, noisy)
        return total, noisy


@triton.jit(do_not_specialize=plan.PLAIN)
def _fwd(
    mean, s, z, z_stride,  # mean, s: [rows, columns]; z: the same for each sample
    seed, noise, noise_stride, noise_offset, samples, temperature: "fp64",
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr, HEATED: tl.constexpr,
    VECTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    shift = tile.noise_shift(row, columns, noise_offset)
    window = tile.window(row, rows, split.to(tl.int64) * C, columns, shift, row_sizes, column_sizes, C, EVEN, ALIGNED)
    std = heat(scales.spread(tile.load(s, window, T, VECTOR), SCALE)[0], temperature, HEATED)
    store_samples(
        z, z_stride, tl.full([1, 1], True, tl.int1), tile.load(mean, window, T, VECTOR), std,
        (seed, noise, noise_stride, noise_offset), samples, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=plan.PLAIN)
def _bwd(
    d_z, d_z_stride, s, d_s,  # s, d_s: [rows, columns]; d_z: the same for each sample
    seed, noise, noise_stride, noise_offset, samples, temperature: "fp64",
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr, HEATED: tl.constexpr,
    VECTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    shift = tile.noise_shift(row, columns, noise_offset)
    window = tile.window(row, rows, split.to(tl.int64) * C, columns, shift, row_sizes, column_sizes, C, EVEN, ALIGNED)
    _, noisy = sample_gradients(
        d_z, d_z_stride, (seed, noise, noise_stride, noise_offset), samples,
        window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE,
    )  # fmt: skip
    raw = tile.load(s, window, T, VECTOR)
    d_std = heat(scales.spread(raw, SCALE)[2], temperature, HEATED)
    tile.store(d_s, window, scales.clamp_gradient(raw, d_std * noisy, SCALE), VECTOR)


def gaussian_rsample_fwd(z, mean, s, seed, noise, noise_offset, num_samples, temperature, scale, out_dtype):
    """What fills z; the arguments of the op's schema."""
    samples = [plan.of_sample(tensor, num_samples) for tensor in (z, noise)]
    dtype = arithmetic_dtype(mean, s)
    found = plan.plan(0, mean, s, *samples, tile=plan.tile_size(dtype, scale), noise_offset=noise_offset)
    if found is None:
        return lambda *tensors: None
    *operands, noise_operand = found.operands
    launch = found.launch(
        _fwd, *operands, plan.sample_stride(z, num_samples),
        place(seed), noise_operand, plan.sample_stride(noise, num_samples), noise_offset, num_samples or 1, temperature,
        SCALE=plan.numbers(scale), T=plan.TYPES[dtype], ALIGNED=found.aligned,
        APPROXIMATE=approximate(z.dtype), HEATED=temperature != 1,
    )  # fmt: skip
    return lambda z, mean, s, *draw: launch(mean, s, z, *draw)


def gaussian_rsample_bwd(d_s, d_z, s, seed, noise, noise_offset, num_samples, temperature, scale):
    """What fills d_s; the arguments of the op's schema."""
    samples = [plan.of_sample(tensor, num_samples) for tensor in (d_z, noise)]
    dtype = arithmetic_dtype(s, d_z)
    found = plan.plan(0, s, d_s, *samples, tile=plan.tile_size(dtype, scale), noise_offset=noise_offset)
    if found is None:
        return lambda *tensors: None
    s_operand, d_s_operand, d_z_operand, noise_operand = found.operands
    launch = found.launch(
        _bwd, d_z_operand, plan.sample_stride(d_z, num_samples), s_operand, d_s_operand,
        place(seed), noise_operand, plan.sample_stride(noise, num_samples), noise_offset, num_samples or 1, temperature,
        SCALE=plan.numbers(scale), T=plan.TYPES[dtype], ALIGNED=found.aligned,
        APPROXIMATE=approximate(d_z.dtype), HEATED=temperature != 1,
    )  # fmt: skip
    return lambda d_s, d_z, s, *draw: launch(d_z, s, d_s, *draw)
