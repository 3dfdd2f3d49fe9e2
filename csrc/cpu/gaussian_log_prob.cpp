// ln N(x; mean, sigma(s)^2), or its negative, elementwise or summed over each event.
#ifndef FASTELBO_ISA
#include "../common/checks.h"
#include "host.h"

namespace fastelbo {

struct GaussianLogProb {
  Operand x, mean, s;
  Scale scale;
  double sign;  // of the negative log-likelihood in the result
  double constant;  // in that
  bool one_s;   // s is a single number: what depends on it alone leaves the loop
  Tiling tiling;
  Terms* log_prob;
  Operand d_out;
  Operand d_x, d_mean, d_s;  // no d_x: x needs no gradient
  double* d_s_partial;       // [tiles], where one_s: the sums that make up its gradient
  Operand mask;              // none: every element counts
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_log_prob.cpp"
#include "per_isa.h"
#endif

#ifdef FASTELBO_ISA
namespace fastelbo::FASTELBO_ISA {

// Calls loop(raw_at, spread_at): functions from a position in the tile to the raw scale there and to what it means.
template <class T, bool exponential, int needs, class Loop>
FASTELBO_INLINE void with_scale(const ScaleOf<T>& scale, bool one_s, const T* s, int n,
                                SpreadTile<T, exponential, needs>& ahead, Loop&& loop) {
  using V = typename VectorOf<T>::type;
  if (one_s) {
    V raw(*s);
    Spread<V, exponential> fixed = spread<exponential>(scale, raw);
    loop([&](int, auto) FASTELBO_LAMBDA { return raw; }, [&](int, auto) FASTELBO_LAMBDA { return fixed; });
  } else {
    ahead.read(scale, s, n);
    loop([&](int i, auto part) FASTELBO_LAMBDA { return load(s + i, part); },
         [&](int i, auto part) FASTELBO_LAMBDA { return ahead.at(scale, s, i, part); });
  }
}

template <class T, bool exponential>
void gaussian_log_prob_fwd(const GaussianLogProb& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T x_tile[kTile], mean_tile[kTile], s_tile[kTile], out_tile[kTile];
  SpreadTile<T, exponential, kLogStd> p_at;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    const T* x = read_tile(args.x, start, n, x_tile);
    const T* mean = read_tile(args.mean, start, n, mean_tile);
    const T* s = read_tile(args.s, start, n, s_tile);
    T* out = output_terms(*args.log_prob, tile, out_tile);
    V sign(args.sign), constant(args.constant);
    with_scale(scale, args.one_s, s, n, p_at, [&](auto, auto spread_at) FASTELBO_LAMBDA {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V delta = load(x + i, part) - load(mean + i, part);
        store(out + i, sign * gaussian_nll(delta, spread_at(i, part), constant).value, part);
      });
    });
    kept.read(args.mask, start, n);
    kept.select(n, out);
    finish_terms(*args.log_prob, args.tiling, tile, out, out_tile);
  }
}

template <class T, bool exponential>
void gaussian_log_prob_bwd(const GaussianLogProb& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T x_tile[kTile], mean_tile[kTile], s_tile[kTile], d_out_tile[kTile], d_x_tile[kTile], d_mean_tile[kTile],
      d_s_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kLogSlope> p_at;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    auto [start, n, row, rows] = args.tiling[index];
    const T* x = read_tile(args.x, start, n, x_tile);
    const T* mean = read_tile(args.mean, start, n, mean_tile);
    const T* s = read_tile(args.s, start, n, s_tile);
    const T* d_out = read_tile(args.d_out, start, n, d_out_tile);
    bool x_grad(args.d_x);
    T* d_x = x_grad ? output(args.d_x, start, n, d_x_tile) : d_x_tile;
    T* d_mean = output(args.d_mean, start, n, d_mean_tile);
    T* d_s = args.d_s ? output(args.d_s, start, n, d_s_tile) : d_s_tile;
    V sign(args.sign);
    with_scale(scale, args.one_s, s, n, p_at, [&](auto raw_at, auto spread_at) FASTELBO_LAMBDA {
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V raw = raw_at(i, part), upstream = sign * load(d_out + i, part);
        Spread<V, exponential> p = spread_at(i, part);
        GaussianNLL<V> nll = gaussian_nll(load(x + i, part) - load(mean + i, part), p);
        V d_delta = upstream * nll.d_x;
        if (x_grad) store(d_x + i, d_delta, part);
        store(d_mean + i, -d_delta, part);
        store(d_s + i, clamp_gradient(scale, raw, upstream * nll.d_s), part);
      });
    });
    kept.read(args.mask, start, n);
    kept.select(n, d_mean, d_s);
    if (x_grad) {
      kept.select(n, d_x);
      finish(args.d_x, start, n, d_x, d_x_tile);
    }
    finish(args.d_mean, start, n, d_mean, d_mean_tile);
    if (args.d_s_partial)
      args.d_s_partial[index] = sum(d_s, n);
    else
      finish(args.d_s, start, n, d_s, d_s_tile);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
#else
namespace fastelbo {

Tensor gaussian_log_prob_fwd(Tensor x, Tensor mean, Tensor s, std::vector<double> scale, int64_t event_ndim,
                             bool negative, std::optional<Tensor> mask, bool full) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  Tiling tiling = event_tiling(shape, event_ndim);
  Terms log_prob(shape, event_ndim, dtype, mean, tiling);
  GaussianLogProb args{
      {x, shape},     {mean, shape}, {s, shape}, parse_scale(scale), negative ? 1.0 : -1.0, full ? kHalfLogTwoPi : 0,
      s.numel() == 1, tiling,        &log_prob};
  args.mask = {mask, shape};
  FASTELBO_RUN(gaussian_log_prob_fwd, dtype, args.scale.exponential(), args, tiling.tiles());
  return log_prob.finish(dtype, tiling);
}

// Returns d_x, d_mean, d_s, each of the full broadcast shape, but for an s of one element, whose gradient is summed
// here. The first is empty without x_grad.
std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(Tensor d_out, Tensor x, Tensor mean, Tensor s,
                                                         std::vector<double> scale, int64_t event_ndim, bool negative,
                                                         std::optional<Tensor> mask, bool x_grad) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  check_upstream("d_out", d_out, shape.drop_trailing(event_ndim), {"x", x});
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  bool one_s = s.numel() == 1;
  Device device(mean);
  Tensor d_x = allocate_gradient(shape, x, dtype, device, x_grad),
         d_mean = allocate_gradient(shape, mean, dtype, device);
  Tensor d_s = one_s ? allocate(Shape(s), dtype, device) : allocate_gradient(shape, s, dtype, device);
  GaussianLogProb args{{x, shape},
                       {mean, shape},
                       {s, shape},
                       parse_scale(scale),
                       negative ? 1.0 : -1.0,
                       0,
                       one_s,
                       {1, shape.numel()},
                       nullptr,
                       {d_out, shape, event_ndim},
                       {},
                       {d_mean, shape},
                       {},
                       nullptr};
  args.mask = {mask, shape};
  if (x_grad) args.d_x = {d_x, shape};
  std::vector<double> partial(one_s ? args.tiling.tiles() : 0);
  if (one_s)
    args.d_s_partial = partial.data();
  else
    args.d_s = {d_s, shape};
  FASTELBO_RUN(gaussian_log_prob_bwd, dtype, args.scale.exponential(), args, args.tiling.tiles());
  if (one_s) store_total(partial, 0, partial.size(), dtype, d_s.data_ptr(), 0);
  return {d_x, d_mean, d_s};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_log_prob_fwd", TORCH_BOX(&fastelbo::gaussian_log_prob_fwd));
  fastelbo::implement(m, "gaussian_log_prob_bwd", TORCH_BOX(&fastelbo::gaussian_log_prob_bwd));
}
#endif
