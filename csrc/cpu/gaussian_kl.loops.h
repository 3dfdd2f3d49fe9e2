// The loops of gaussian_kl.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

template <class T, bool exponential>
void gaussian_kl_fwd(const GaussianKLArgs& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale), scale_p(args.scale_p);  // copies, which no store to a tensor can change
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], kl_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kOwnSlope> p_at;
  RatioTile<T, exponential, Ratio::gap> ratio;
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
  RatioTile<T, exponential, Ratio::e> ratio;
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
