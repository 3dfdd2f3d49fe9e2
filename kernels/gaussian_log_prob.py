"""Log-density of a diagonal Gaussian in Triton, or its negative."""

import torch
import triton
import triton.language as tl

from fastelbo.kernels import plan, tile
from fastelbo.kernels import scale as scales
from fastelbo.kernels.launch import TENSOR
from fastelbo.reference.gaussian_log_prob import HALF_LOG_TWO_PI
from fastelbo.reference.scale import arithmetic_dtype


@triton.jit(do_not_specialize=plan.PLAIN)
def _fwd(
    x, mean, s, mask,  # the last: the elements that count, all where None: [rows, columns]
    out,  # [rows, columns], or [rows, splits] where summed
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, LOG_WEIGHT: tl.constexpr, CONSTANT: tl.constexpr, NEGATIVE: tl.constexpr, SUM: tl.constexpr,
    T: tl.constexpr, VECTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    total = tl.zeros([R, C], T)
    for step in range(STEPS):
        first = (split * STEPS + step).to(tl.int64) * C
        window = tile.window(row, rows, first, columns, 0, row_sizes, column_sizes, C, EVEN)
        p = scales.spread(tile.load(s, window, T, VECTOR), SCALE)
        r = scales.divide(tile.load(x, window, T, VECTOR) - tile.load(mean, window, T, VECTOR), p, SCALE)
        terms = tl.fma(0.5 * r, r, LOG_WEIGHT * p[1] + CONSTANT)
        if not NEGATIVE:
            terms = -terms
        terms = tl.where(tile.kept(mask, window, VECTOR), terms, 0.0)
        if SUM:
            total += tile.inside(terms, window)
        else:
            tile.store(out, window, terms, VECTOR)
    if SUM:
        tile.store_sums(out, total, row, rows, splits, split)


@triton.jit(do_not_specialize=plan.PLAIN)
def _bwd(
    d_out, x, mean, s, mask, d_x, d_mean, d_s,  # [rows, columns]
    d_s_sums,  # [programs]: float64 sums that make up the gradient of a single s, in place of d_s
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, LOG_WEIGHT: tl.constexpr, NEGATIVE: tl.constexpr, X_GRAD: tl.constexpr, ONE_S: tl.constexpr,
    T: tl.constexpr, VECTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    window = tile.window(row, rows, split.to(tl.int64) * C, columns, 0, row_sizes, column_sizes, C, EVEN)
    upstream = tile.load(d_out, window, T, VECTOR)
    if not NEGATIVE:
        upstream = -upstream
    raw = tile.load(s, window, T, VECTOR)
    p = scales.spread(raw, SCALE)
    r = scales.divide(tile.load(x, window, T, VECTOR) - tile.load(mean, window, T, VECTOR), p, SCALE)
    kept = tile.kept(mask, window, VECTOR)
    d_delta = tl.where(kept, upstream * scales.divide(r, p, SCALE), 0.0)
    if X_GRAD:
        tile.store(d_x, window, d_delta, VECTOR)
    tile.store(d_mean, window, -d_delta, VECTOR)
    if scales.is_exponential(SCALE):
        d_raw = 0.5 * tl.fma(-r, r, LOG_WEIGHT) * p[3]
    else:  # r^2 may overflow where that does not
        d_raw = 0.5 * tl.fma(-r, r * p[3], LOG_WEIGHT * p[3])
    d_raw = scales.clamp_gradient(raw, upstream * d_raw, SCALE)
    d_raw = tl.where(kept, d_raw, 0.0)
    if ONE_S:
        tl.store(d_s_sums + tl.program_id(0), tl.sum(tile.inside(d_raw, window).to(tl.float64)))
    else:
        tile.store(d_s, window, d_raw, VECTOR)


def gaussian_log_prob_fwd(out, x, mean, s, scale, event_ndim, negative, mask, log_weight=1.0, constant=HALF_LOG_TWO_PI):
    """What fills out; the arguments of the op's schema."""
    found = plan.plan(event_ndim, x, mean, s, mask, None if event_ndim else out, tile=plan.tile_size(out.dtype, scale))
    if found is None:
        return lambda out, *inputs: out.zero_()
    *operands, elements = found.operands
    launch = found.launch(
        _fwd, *operands, TENSOR if event_ndim > 0 else elements,
        SCALE=plan.numbers(scale), LOG_WEIGHT=log_weight, CONSTANT=constant, NEGATIVE=negative,
        SUM=event_ndim > 0, T=plan.TYPES[out.dtype],
    )  # fmt: skip

    def fill(out, *inputs):
        terms = found.sums(out)
        launch(*inputs, terms)
        plan.add_sums(out, terms)

    return fill


def gaussian_log_prob_bwd(gradients, d_out, x, mean, s, scale, event_ndim, negative, mask, x_grad, log_weight=1.0):
    """What fills d_x with x_grad, d_mean and d_s, that of a single s summed; the arguments of the op's schema."""
    d_x, d_mean, d_s = gradients
    one_s = s.numel() == 1
    dtype = arithmetic_dtype(x, mean, s)
    found = plan.plan(
        0, plan.of_event(d_out, event_ndim), x, mean, s, mask, d_x if x_grad else None, d_mean,
        None if one_s else d_s, tile=plan.tile_size(dtype, scale),
    )  # fmt: skip
    if found is None:
        return lambda gradients, *inputs: gradients[2].zero_() if one_s else None
    launch = found.launch(
        _bwd, *found.operands, TENSOR if one_s else None,
        SCALE=plan.numbers(scale), LOG_WEIGHT=log_weight, NEGATIVE=negative, X_GRAD=x_grad, ONE_S=one_s,
        T=plan.TYPES[dtype],
    )  # fmt: skip

    def fill(gradients, *inputs):
        d_x, d_mean, d_s = gradients
        sums = d_s.new_empty(found.grid.programs, dtype=torch.float64) if one_s else d_s
        launch(*inputs, d_x if x_grad else None, d_mean, sums)
        plan.add_sums(d_s, sums)

    return fill
