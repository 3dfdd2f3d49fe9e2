// KL(N(mean_q, sigma(s_q)^2) || N(mean_p, sigma(s_p)^2)) or || N(0, 1), elementwise or summed over each event.
#ifndef FASTELBO_ISA
#include "../common/checks.h"
#include "host.h"

namespace fastelbo {

struct GaussianKLArgs {
  Operand mean_q, s_q, mean_p, s_p;  // no mean_p: the standard normal
  Scale scale, scale_p;
  Tiling tiling;
  Terms* kl;
  Operand d_kl;
  Operand d_mean_q, d_s_q, d_mean_p, d_s_p;  // no d_mean_p: the prior needs no gradient
  Operand mask;                  // none: every element counts
  Shares<double> share;              // of d_kl
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_kl.cpp"
#include "per_isa.h"
#endif

#ifdef FASTELBO_ISA
namespace fastelbo::FASTELBO_ISA {

template <class T, bool exponential>
void gaussian_kl_fwd(const GaussianKLArgs& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale), scale_p(args.scale_p);  // copies, which no store to a tensor can change
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], kl_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kOwnSlope> p_at;
  RatioTile<T, exponential> ratio;
  const bool same = args.scale.same(args.scale_p);
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    const T* mean_q = read_tile(args.mean_q, start, n, mean_q_tile);
    const T* s_q = read_tile(args.s_q, start, n, s_q_tile);
    T* kl = output_terms(*args.kl, tile, kl_tile);
    if (!args.mean_p) {
      q_alone.read(scale, s_q, n);
      ratio.read(scale, s_q, q_alone, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        Spread<V, exponential> q = q_alone.at(scale, s_q, i, part);
        store(kl + i, gaussian_kl(load(mean_q + i, part), ratio.at(i, part, q), q).value, part);
      });
    } else {
      const T* mean_p = read_tile(args.mean_p, start, n, mean_p_tile);
      const T* s_p = read_tile(args.s_p, start, n, s_p_tile);
      q_at.read(scale, s_q, n);
      p_at.read(scale_p, s_p, n);
      ratio.read(scale, scale_p, same, s_q, q_at, s_p, p_at, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V delta = load(mean_q + i, part) - load(mean_p + i, part);
        Spread<V, exponential> q = q_at.at(scale, s_q, i, part), p = p_at.at(scale_p, s_p, i, part);
        store(kl + i, gaussian_kl(delta, ratio.at(i, part, q, p), q, p).value, part);
      });
    }
    kept.read(args.mask, start, n);
    kept.select(n, kl);
    finish_terms(*args.kl, args.tiling, tile, kl, kl_tile);
  }
}

template <class T, bool exponential>
void gaussian_kl_bwd(const GaussianKLArgs& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale), scale_p(args.scale_p);  // copies, which no store to a tensor can change
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], d_kl_tile[kTile];
  T d_mean_q_tile[kTile], d_s_q_tile[kTile], d_mean_p_tile[kTile], d_s_p_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kLogSlope | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kLogSlope> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kOwnSlope | kLogSlope> p_at;
  RatioTile<T, exponential> ratio;
  const bool same = args.scale.same(args.scale_p);
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    const T* mean_q = read_tile(args.mean_q, start, n, mean_q_tile);
    const T* s_q = read_tile(args.s_q, start, n, s_q_tile);
    const T* d_kl = read_tile(args.d_kl, start, n, d_kl_tile);
    T* d_mean_q = output(args.d_mean_q, start, n, d_mean_q_tile);
    T* d_s_q = output(args.d_s_q, start, n, d_s_q_tile);
    kept.read(args.mask, start, n);
    if (!args.mean_p) {
      q_alone.read(scale, s_q, n);
      ratio.read(scale, s_q, q_alone, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V raw = load(s_q + i, part), upstream = load(d_kl + i, part);
        Spread<V, exponential> q = q_alone.at(scale, s_q, i, part);
        GaussianKL<V> kl = gaussian_kl(load(mean_q + i, part), ratio.at(i, part, q), q);
        store(d_mean_q + i, upstream * kl.d_mean_q, part);
        store(d_s_q + i, clamp_gradient(scale, raw, upstream * kl.d_s_q), part);
      });
    } else {
      const T* mean_p = read_tile(args.mean_p, start, n, mean_p_tile);
      const T* s_p = read_tile(args.s_p, start, n, s_p_tile);
      bool prior(args.d_mean_p);
      T* d_mean_p = prior ? output(args.d_mean_p, start, n, d_mean_p_tile) : d_mean_p_tile;
      T* d_s_p = prior ? output(args.d_s_p, start, n, d_s_p_tile) : d_s_p_tile;
      V share_q(args.share.q), share_p(args.share.p);
      q_at.read(scale, s_q, n);
      p_at.read(scale_p, s_p, n);
      ratio.read(scale, scale_p, same, s_q, q_at, s_p, p_at, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V raw_q = load(s_q + i, part), raw_p = load(s_p + i, part), upstream = load(d_kl + i, part);
        Spread<V, exponential> q = q_at.at(scale, s_q, i, part), p = p_at.at(scale_p, s_p, i, part);
        GaussianKL<V> kl = gaussian_kl(load(mean_q + i, part) - load(mean_p + i, part), ratio.at(i, part, q, p), q, p);
        V to_q = share_q * upstream, to_p = share_p * upstream;
        store(d_mean_q + i, to_q * kl.d_mean_q, part);
        store(d_s_q + i, clamp_gradient(scale, raw_q, to_q * kl.d_s_q), part);
        store(d_mean_p + i, -to_p * kl.d_mean_q, part);
        store(d_s_p + i, clamp_gradient(scale_p, raw_p, to_p * kl.d_s_p), part);
      });
      if (prior) {
        kept.select(n, d_mean_p, d_s_p);
        finish(args.d_mean_p, start, n, d_mean_p, d_mean_p_tile);
        finish(args.d_s_p, start, n, d_s_p, d_s_p_tile);
      }
    }
    kept.select(n, d_mean_q, d_s_q);
    finish(args.d_mean_q, start, n, d_mean_q, d_mean_q_tile);
    finish(args.d_s_q, start, n, d_s_q, d_s_q_tile);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
#else
namespace fastelbo {

Tensor gaussian_kl_fwd(Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                       std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
                       std::optional<Tensor> mask, std::optional<double>) {
  check_prior(mean_p, s_p, scale_p);
  Shape shape = broadcast_operands({{"mean_q", mean_q}, {"s_q", s_q}, {"mean_p", mean_p}, {"s_p", s_p}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"mean_q", mean_q});
  ScalarType dtype = arithmetic_type({&mean_q, &s_q, pointer(mean_p), pointer(s_p)});
  Tiling tiling = event_tiling(shape, event_ndim);
  Terms kl(shape, event_ndim, dtype, mean_q, tiling);
  GaussianKLArgs args{{mean_q, shape},    {s_q, shape},         {mean_p, shape}, {s_p, shape},
                      parse_scale(scale), parse_scale(scale_p), tiling,          &kl};
  args.mask = {mask, shape};
  FASTELBO_RUN(gaussian_kl_fwd, dtype, args.scale.exponential() && args.scale_p.exponential(), args, tiling.tiles());
  return kl.finish(dtype, tiling);
}

// Returns d_mean_q, d_s_q, d_mean_p, d_s_p, each of the full broadcast shape; the last two are empty without
// prior_grad.
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_bwd(Tensor d_kl, Tensor mean_q, Tensor s_q,
                                                           std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                                                           std::vector<double> scale,
                                                           std::optional<std::vector<double>> scale_p,
                                                           int64_t event_ndim, std::optional<double> balance,
                                                           std::optional<Tensor> mask, bool prior_grad) {
  check_prior(mean_p, s_p, scale_p, prior_grad);
  Shape shape = broadcast_operands({{"mean_q", mean_q}, {"s_q", s_q}, {"mean_p", mean_p}, {"s_p", s_p}});
  check_event_ndim(event_ndim, shape);
  check_balance(balance);
  check_mask(mask, shape, {"mean_q", mean_q});
  check_upstream("d_kl", d_kl, shape.drop_trailing(event_ndim), {"mean_q", mean_q});
  ScalarType dtype = arithmetic_type({&mean_q, &s_q, pointer(mean_p), pointer(s_p)});
  Device device(mean_q);
  Tensor d_mean_q = allocate_gradient(shape, mean_q, dtype, device),
         d_s_q = allocate_gradient(shape, s_q, dtype, device);
  Tensor d_mean_p = allocate_gradient(shape, mean_p, dtype, device, prior_grad),
         d_s_p = allocate_gradient(shape, s_p, dtype, device, prior_grad);
  GaussianKLArgs args{{mean_q, shape},           {s_q, shape},         {mean_p, shape},    {s_p, shape},
                      parse_scale(scale),        parse_scale(scale_p), {1, shape.numel()}, nullptr,
                      {d_kl, shape, event_ndim}, {d_mean_q, shape},    {d_s_q, shape}};
  args.mask = {mask, shape};
  args.share = Shares<double>(balance);
  if (prior_grad) {
    args.d_mean_p = {d_mean_p, shape};
    args.d_s_p = {d_s_p, shape};
  }
  FASTELBO_RUN(gaussian_kl_bwd, dtype, args.scale.exponential() && args.scale_p.exponential(), args,
               args.tiling.tiles());
  return {d_mean_q, d_s_q, d_mean_p, d_s_p};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_kl_fwd", TORCH_BOX(&fastelbo::gaussian_kl_fwd));
  fastelbo::implement(m, "gaussian_kl_bwd", TORCH_BOX(&fastelbo::gaussian_kl_bwd));
}
#endif
