"""KL divergence of diagonal Gaussians in Triton. The mathematics: fastelbo/reference/gaussian_kl.py."""

import triton
import triton.language as tl

from fastelbo.kernels import elementary, plan, tile
from fastelbo.kernels import scale as scales
from fastelbo.kernels.launch import TENSOR
from fastelbo.reference.scale import arithmetic_dtype


@triton.jit
def _excess(e, slope, SCALE: tl.constexpr):
    """(exp(2h) - 1) / 2 times a slope of ln sigma^2, e = exp(h) - 1; either alone may overflow where that does not."""
    if scales.is_exponential(SCALE):
        return tl.fma(0.5 * e, e, e) * slope
    else:
        return 0.5 * slope * e * (2.0 + e)


@triton.jit
def _parts(h, q, p, SCALE: tl.constexpr):
    """e = exp(h) - 1 and e - h of the ratio exp(h) of two sigmas q and p."""
    e, e_minus_h = elementary.expm1_parts(h)
    if not scales.is_exponential(SCALE):
        # exp of a large ratio's logarithm has lost digits that the ratio has
        far = (h > 1.0) & (p > 4 * elementary.smallest(p))
        e = tl.where(far, q / p - 1.0, e)
        e_minus_h = tl.where(far, e - h, e_minus_h)
    return e, e_minus_h


@triton.jit
def kl_terms(mean_q, s_q, q, mean_p, s_p, p, SCALE: tl.constexpr, SCALE_P: tl.constexpr):
    """KL, and its derivatives by mean_q (that by mean_p is its negative), s_q and s_p inside their clamps.

    q and p are spreads; without SCALE_P p is the standard normal.
    """
    if SCALE_P is None:
        e, e_minus_h = _parts(q[1], q[0], tl.full([1, 1], 1.0, q[0].dtype), SCALE)
        gap = tl.fma(0.5 * e, e, e_minus_h)
        d_s_q = _excess(e, q[3], SCALE)
        return tl.fma(0.5 * mean_q, mean_q, gap), mean_q, d_s_q, d_s_q
    else:
        e, e_minus_h = _parts(scales.log_ratio(s_q, q, s_p, p, SCALE, SCALE_P), q[0], p[0], SCALE)
        r = scales.divide(mean_q - mean_p, p, SCALE_P)
        half_square = 0.5 * r * r
        value = tl.fma(0.5 * e, e, e_minus_h) + half_square
        if scales.is_exponential(SCALE_P):
            d_s_p = -((tl.fma(0.5 * e, e, e) + half_square) * p[3])
        else:
            d_s_p = -(_excess(e, p[3], SCALE_P) + 0.5 * r * (r * p[3]))
        return value, scales.divide(r, p, SCALE_P), _excess(e, q[3], SCALE), d_s_p


@triton.jit
def load_gaussians(
    gaussians, window, SCALE: tl.constexpr, SCALE_P: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr
):
    """mean_q, s_q, the spread of q, and the same of p; again those of q, which nothing uses, where there is no p."""
    mean_q = tile.load(gaussians[0], window, T, VECTOR)
    s_q = tile.load(gaussians[1], window, T, VECTOR)
    q = scales.spread(s_q, SCALE, SCALE_P is None)
    if SCALE_P is None:
        return mean_q, s_q, q, mean_q, s_q, q
    else:
        mean_p = tile.load(gaussians[2], window, T, VECTOR)
        s_p = tile.load(gaussians[3], window, T, VECTOR)
        return mean_q, s_q, q, mean_p, s_p, scales.spread(s_p, SCALE_P)


@triton.jit
def shares(upstream, balance, BALANCED: tl.constexpr):
    """What of the gradient of KL reaches q, and what p."""
    if BALANCED:
        share = tl.full([1, 1], balance, upstream.dtype)
        return upstream * (1.0 - share), upstream * share
    else:
        return upstream, upstream


@triton.jit
def store_prior_gradients(gradients, window, kept, d_mean_q, s_p, d_s_p, SCALE_P: tl.constexpr, VECTOR: tl.constexpr):
    """Writes d_mean_p, the negative of d_mean_q, and d_s_p, which the clamp has yet to limit."""
    tile.store(gradients[2], window, tl.where(kept, -d_mean_q, 0.0), VECTOR)
    tile.store(gradients[3], window, tl.where(kept, scales.clamp_gradient(s_p, d_s_p, SCALE_P), 0.0), VECTOR)


@triton.jit(do_not_specialize=plan.PLAIN)
def _fwd(
    gaussians, mask,  # mean_q, s_q, mean_p, s_p; the elements that count, all where None: [rows, columns]
    kl,  # [rows, columns], or [rows, splits] where summed
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, SCALE_P: tl.constexpr, SUM: tl.constexpr, T: tl.constexpr, VECTOR: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    total = tl.zeros([R, C], T)
    for step in range(STEPS):
        first = (split * STEPS + step).to(tl.int64) * C
        window = tile.window(row, rows, first, columns, 0, row_sizes, column_sizes, C, EVEN)
        mean_q, s_q, q, mean_p, s_p, p = load_gaussians(gaussians, window, SCALE, SCALE_P, T, VECTOR)
        terms, _, _, _ = kl_terms(mean_q, s_q, q, mean_p, s_p, p, SCALE, SCALE_P)
        terms = tl.where(tile.kept(mask, window, VECTOR), terms, 0.0)
        if SUM:
            total += tile.inside(terms, window)
        else:
            tile.store(kl, window, terms, VECTOR)
    if SUM:
        tile.store_sums(kl, total, row, rows, splits, split)


@triton.jit(do_not_specialize=plan.PLAIN)
def _bwd(
    d_kl, gaussians, mask,  # d_kl; mean_q, s_q, mean_p, s_p; the elements that count: [rows, columns]
    gradients,  # d_mean_q, d_s_q, and d_mean_p, d_s_p where wanted: [rows, columns]
    balance: "fp64",
    rows, columns, row_sizes, column_sizes, splits,
    SCALE: tl.constexpr, SCALE_P: tl.constexpr, PRIOR_GRAD: tl.constexpr, BALANCED: tl.constexpr, T: tl.constexpr,
    VECTOR: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    columns = columns.to(tl.int64) * VECTOR
    row, split = tile.start(splits, R)
    window = tile.window(row, rows, split.to(tl.int64) * C, columns, 0, row_sizes, column_sizes, C, EVEN)
    mean_q, s_q, q, mean_p, s_p, p = load_gaussians(gaussians, window, SCALE, SCALE_P, T, VECTOR)
    upstream = tile.load(d_kl, window, T, VECTOR)
    to_q, to_p = shares(upstream, balance, BALANCED)
    _, d_mean, d_s_q, d_s_p = kl_terms(mean_q, s_q, q, mean_p, s_p, p, SCALE, SCALE_P)
    kept = tile.kept(mask, window, VECTOR)
    d_s = scales.clamp_gradient(s_q, to_q * d_s_q, SCALE)
    tile.store(gradients[0], window, tl.where(kept, to_q * d_mean, 0.0), VECTOR)
    tile.store(gradients[1], window, tl.where(kept, d_s, 0.0), VECTOR)
    if PRIOR_GRAD:
        store_prior_gradients(gradients, window, kept, to_p * d_mean, s_p, to_p * d_s_p, SCALE_P, VECTOR)


def gaussian_kl_fwd(kl, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, balance=None):
    """What fills kl; the arguments of the op's schema."""
    found = plan.plan(
        event_ndim, mean_q, s_q, mean_p, s_p, mask, None if event_ndim else kl,
        tile=plan.tile_size(kl.dtype, scale, scale_p),
    )  # fmt: skip
    if found is None:
        return lambda kl, *inputs: kl.zero_()
    *gaussians, kept, elements = found.operands
    launch = found.launch(
        _fwd, tuple(gaussians), kept, TENSOR if event_ndim > 0 else elements,
        SCALE=plan.numbers(scale), SCALE_P=plan.numbers(scale_p), SUM=event_ndim > 0, T=plan.TYPES[kl.dtype],
    )  # fmt: skip

    def fill(kl, *inputs):
        out = found.sums(kl)
        launch(*inputs, out)
        plan.add_sums(kl, out)

    return fill


def gaussian_kl_bwd(gradients, d_kl, mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, balance, mask, prior_grad):
    """What fills d_mean_q, d_s_q and, with prior_grad, d_mean_p and d_s_p; the arguments of the op's schema."""
    count = 4 if prior_grad else 2
    dtype = arithmetic_dtype(mean_q, s_q, mean_p, s_p)
    found = plan.plan(
        0, plan.of_event(d_kl, event_ndim), mean_q, s_q, mean_p, s_p, mask, *gradients[:count], *[None] * (4 - count),
        tile=plan.tile_size(dtype, scale, scale_p),
    )  # fmt: skip
    if found is None:
        return lambda *tensors: None
    launch = found.launch(
        _bwd, found.operands[0], found.operands[1:5], found.operands[5], found.operands[6:],
        balance or 0.0,
        SCALE=plan.numbers(scale), SCALE_P=plan.numbers(scale_p), PRIOR_GRAD=prior_grad,
        BALANCED=balance is not None, T=plan.TYPES[dtype],
    )  # fmt: skip
    return lambda gradients, *inputs: launch(*inputs, *gradients[:count])
