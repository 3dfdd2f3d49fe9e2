"""A posterior sample and its KL divergence from the prior in one pass, forward and backward, in Triton."""

import triton
import triton.language as tl

from fastelbo.kernels import plan, tile
from fastelbo.kernels import scale as scales
from fastelbo.kernels.gaussian_kl import kl_terms, load_gaussians, shares, store_prior_gradients
from fastelbo.kernels.gaussian_rsample import approximate, heat, sample_gradients, store_samples
from fastelbo.kernels.launch import TENSOR, place
from fastelbo.reference.scale import arithmetic_dtype


@triton.jit(do_not_specialize=plan.PLAIN)
def _fwd(
    gaussians, mask,  # mean_q, s_q, mean_p, s_p; the elements that count, all where None: [rows, columns]
    kl,  # [rows, columns], or [rows, splits] where summed
    z, z_stride,  # [rows, columns] for each sample
    seed, noise, noise_stride, noise_offset, samples, temperature: "fp64",
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, SCALE_P: tl.constexpr, SUM: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr,
    APPROXIMATE: tl.constexpr, HEATED: tl.constexpr, VECTOR: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    shift = tile.noise_shift(row, columns, noise_offset)
    total = tl.zeros([R, C], T)
    for step in range(STEPS):
        first = (split * STEPS + step).to(tl.int64) * C
        window = tile.window(row, rows, first, columns, shift, row_sizes, column_sizes, C, EVEN, ALIGNED)
        mean_q, s_q, q, mean_p, s_p, p = load_gaussians(gaussians, window, SCALE, SCALE_P, T, VECTOR)
        kept = tile.kept(mask, window, VECTOR)
        terms, _, _, _ = kl_terms(mean_q, s_q, q, mean_p, s_p, p, SCALE, SCALE_P)
        terms = tl.where(kept, terms, 0.0)
        if SUM:
            total += tile.inside(terms, window)
        else:
            tile.store(kl, window, terms, VECTOR)
        store_samples(  # last, when all that only the KL takes has left its registers
            z, z_stride, kept, mean_q, heat(q[0], temperature, HEATED), (seed, noise, noise_stride, noise_offset),
            samples, window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE,
        )  # fmt: skip
    if SUM:
        tile.store_sums(kl, total, row, rows, splits, split)


@triton.jit(do_not_specialize=plan.PLAIN)
def _bwd(
    d_kl, gaussians, mask,  # d_kl; mean_q, s_q, mean_p, s_p; the elements that count: [rows, columns]
    gradients,  # d_mean_q, d_s_q, and d_mean_p, d_s_p where wanted: [rows, columns]
    d_z, d_z_stride,  # [rows, columns] for each sample
    seed, noise, noise_stride, noise_offset, samples, temperature: "fp64", balance: "fp64",
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, SCALE_P: tl.constexpr, PRIOR_GRAD: tl.constexpr, BALANCED: tl.constexpr, T: tl.constexpr,
    ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr, HEATED: tl.constexpr, VECTOR: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    shift = tile.noise_shift(row, columns, noise_offset)
    window = tile.window(row, rows, split.to(tl.int64) * C, columns, shift, row_sizes, column_sizes, C, EVEN, ALIGNED)
    mean_q, s_q, q, mean_p, s_p, p = load_gaussians(gaussians, window, SCALE, SCALE_P, T, VECTOR)
    sampled, noisy = sample_gradients(
        d_z, d_z_stride, (seed, noise, noise_stride, noise_offset), samples,
        window, shift, columns, T, VECTOR, ALIGNED, APPROXIMATE,
    )  # fmt: skip
    upstream = tile.load(d_kl, window, T, VECTOR)
    to_q, to_p = shares(upstream, balance, BALANCED)
    _, d_mean, d_s_q, d_s_p = kl_terms(mean_q, s_q, q, mean_p, s_p, p, SCALE, SCALE_P)
    kept = tile.kept(mask, window, VECTOR)
    d_s = tl.fma(heat(q[2], temperature, HEATED), noisy, to_q * d_s_q)
    tile.store(gradients[0], window, tl.where(kept, tl.fma(to_q, d_mean, sampled), 0.0), VECTOR)
    tile.store(gradients[1], window, tl.where(kept, scales.clamp_gradient(s_q, d_s, SCALE), 0.0), VECTOR)
    if PRIOR_GRAD:
        store_prior_gradients(gradients, window, kept, to_p * d_mean, s_p, to_p * d_s_p, SCALE_P, VECTOR)


def gaussian_rsample_kl_fwd(
    results, mean_q, s_q, mean_p, s_p, seed, noise, noise_offset, num_samples, temperature, scale, scale_p,
    event_ndim, mask, out_dtype, balance=None,
):  # fmt: skip
    """What fills z and kl; the arguments of the op's schema."""
    z, kl = results
    samples = [plan.of_sample(tensor, num_samples) for tensor in (z, noise)]
    found = plan.plan(
        event_ndim, mean_q, s_q, mean_p, s_p, mask, None if event_ndim else kl, *samples,
        tile=plan.tile_size(kl.dtype, scale, scale_p), noise_offset=noise_offset,
    )  # fmt: skip
    if found is None:
        return lambda results, *inputs: results[1].zero_()
    *gaussians, kept, elements, z_operand, noise_operand = found.operands
    launch = found.launch(
        _fwd, tuple(gaussians), kept, TENSOR if event_ndim > 0 else elements,
        z_operand, plan.sample_stride(z, num_samples),
        place(seed), noise_operand, plan.sample_stride(noise, num_samples), noise_offset, num_samples or 1, temperature,
        SCALE=plan.numbers(scale), SCALE_P=plan.numbers(scale_p), SUM=event_ndim > 0, T=plan.TYPES[kl.dtype],
        ALIGNED=found.aligned, APPROXIMATE=approximate(z.dtype), HEATED=temperature != 1,
    )  # fmt: skip

    def fill(results, mean_q, s_q, mean_p, s_p, seed, noise, mask):
        z, kl = results
        out = found.sums(kl)
        launch(mean_q, s_q, mean_p, s_p, mask, out, z, seed, noise)
        plan.add_sums(kl, out)

    return fill


def gaussian_rsample_kl_bwd(
    gradients, d_z, d_kl, mean_q, s_q, mean_p, s_p, seed, noise, noise_offset, num_samples, temperature, scale, scale_p,
    event_ndim, balance, mask, prior_grad,
):  # fmt: skip
    """What fills d_mean_q, d_s_q and, with prior_grad, d_mean_p and d_s_p; the arguments of the op's schema."""
    count = 4 if prior_grad else 2
    samples = [plan.of_sample(tensor, num_samples) for tensor in (d_z, noise)]
    dtype = arithmetic_dtype(mean_q, s_q, mean_p, s_p)
    found = plan.plan(
        0, plan.of_event(d_kl, event_ndim), mean_q, s_q, mean_p, s_p, mask, *gradients[:count], *[None] * (4 - count),
        *samples, tile=plan.tile_size(dtype, scale, scale_p), noise_offset=noise_offset,
    )  # fmt: skip
    if found is None:
        return lambda *tensors: None
    launch = found.launch(
        _bwd, found.operands[0], found.operands[1:5], found.operands[5], found.operands[6:10],
        found.operands[10], plan.sample_stride(d_z, num_samples),
        place(seed), found.operands[11], plan.sample_stride(noise, num_samples), noise_offset, num_samples or 1,
        temperature, balance or 0.0,
        SCALE=plan.numbers(scale), SCALE_P=plan.numbers(scale_p), PRIOR_GRAD=prior_grad,
        BALANCED=balance is not None, T=plan.TYPES[dtype],
        ALIGNED=found.aligned, APPROXIMATE=approximate(d_z.dtype), HEATED=temperature != 1,
    )  # fmt: skip

    def fill(gradients, d_z, d_kl, mean_q, s_q, mean_p, s_p, seed, noise, mask):
        launch(d_kl, mean_q, s_q, mean_p, s_p, mask, *gradients[:count], d_z, seed, noise)

    return fill
