// The loops of gaussian_rsample_kl.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

template <class T, bool exponential>
void gaussian_rsample_kl_fwd(const GaussianRsampleKL& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale), scale_p(args.scale_p);  // copies, which no store to a tensor can change
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], z_tile[kTile], std_tile[kTile],
      kl_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kOwnSlope> p_at;
  RatioTile<T, exponential, Ratio::gap> ratio;
  const bool same = args.scale.same(args.scale_p);
  NoiseTile<T> noise_tile;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    const T* mean_q = read_tile(args.mean_q, start, n, mean_q_tile);
    const T* s_q = read_tile(args.s_q, start, n, s_q_tile);
    T* kl = output_terms(*args.kl, tile, kl_tile);
    T* z = output(args.z, start, n, z_tile);
    const T* noise = noise_tile.read(args.noise, 0, start, n, args.numel);
    V temperature(args.noise.temperature);
    if (!args.mean_p) {
      q_alone.read(scale, s_q, n);
      ratio.read(scale, s_q, q_alone, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        Spread<V, exponential> q = q_alone.at(scale, s_q, i, part);
        V mean = load(mean_q + i, part), std = temperature * q.std;
        store(std_tile + i, std, part);
        store(z + i, fma(std, load(noise + i, part), mean), part);
        store(kl + i, gaussian_kl(mean, ratio.at(i, part, q), q).value, part);
      });
    } else {
      const T* mean_p = read_tile(args.mean_p, start, n, mean_p_tile);
      const T* s_p = read_tile(args.s_p, start, n, s_p_tile);
      q_at.read(scale, s_q, n);
      p_at.read(scale_p, s_p, n);
      ratio.read(scale, scale_p, same, s_q, q_at, s_p, p_at, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        Spread<V, exponential> q = q_at.at(scale, s_q, i, part), p = p_at.at(scale_p, s_p, i, part);
        V mean = load(mean_q + i, part), std = temperature * q.std;
        store(std_tile + i, std, part);
        store(z + i, fma(std, load(noise + i, part), mean), part);
        store(kl + i, gaussian_kl(mean - load(mean_p + i, part), ratio.at(i, part, q, p), q, p).value, part);
      });
    }
    kept.read(args.mask, start, n);
    kept.select(n, kl, z);
    finish_terms(*args.kl, args.tiling, tile, kl, kl_tile);
    finish(args.z, start, n, z, z_tile);
    for (int64_t sample = 1; sample < args.noise.samples; ++sample) {
      int64_t out = sample * args.numel + start;
      noise = noise_tile.read(args.noise, sample, start, n, args.numel);
      z = output(args.z, out, n, z_tile);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        store(z + i, fma(load(std_tile + i, part), load(noise + i, part), load(mean_q + i, part)), part);
      });
      kept.select(n, z);
      finish(args.z, out, n, z, z_tile);
    }
  }
}

template <class T, bool exponential>
void gaussian_rsample_kl_bwd(const GaussianRsampleKL& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale), scale_p(args.scale_p);  // copies, which no store to a tensor can change
  T mean_q_tile[kTile], s_q_tile[kTile], mean_p_tile[kTile], s_p_tile[kTile], d_kl_tile[kTile];
  T d_mean_q_tile[kTile], d_s_q_tile[kTile], d_mean_p_tile[kTile], d_s_p_tile[kTile];
  SpreadTile<T, exponential, kLogStdOfWild | kSlope | kLogSlope | kExcess> q_alone;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kSlope | kLogSlope> q_at;
  SpreadTile<T, exponential, kLogStdOfWild | kOwn | kOwnSlope | kLogSlope> p_at;
  RatioTile<T, exponential, Ratio::e> ratio;
  const bool same = args.scale.same(args.scale_p);
  SampleGradient<T> sampled;
  MaskTile<T> kept;
  for (int64_t index = begin; index < end; ++index) {
    auto [start, n, row, rows] = args.tiling[index];
    const T* mean_q = read_tile(args.mean_q, start, n, mean_q_tile);
    const T* s_q = read_tile(args.s_q, start, n, s_q_tile);
    const T* d_kl = read_tile(args.d_kl, start, n, d_kl_tile);
    T* d_mean_q = output(args.d_mean_q, start, n, d_mean_q_tile);
    T* d_s_q = output(args.d_s_q, start, n, d_s_q_tile);
    sampled.read(args.noise, args.d_z, start, n, args.numel);
    kept.read(args.mask, start, n);
    V temperature(args.noise.temperature);
    if (!args.mean_p) {
      q_alone.read(scale, s_q, n);
      ratio.read(scale, s_q, q_alone, n);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        V raw = load(s_q + i, part), upstream = load(d_kl + i, part);
        Spread<V, exponential> q = q_alone.at(scale, s_q, i, part);
        GaussianKL<V> kl = gaussian_kl(load(mean_q + i, part), ratio.at(i, part, q), q);
        store(d_mean_q + i, fma(upstream, kl.d_mean_q, load(sampled.d_z + i, part)), part);
        V d_s = fma(temperature * q.d_std, (load(sampled.noisy + i, part) * load(sampled.noisy_factor + i, part)),
                    upstream * kl.d_s_q);
        store(d_s_q + i, clamp_gradient(scale, raw, d_s), part);
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
        store(d_mean_q + i, to_q * kl.d_mean_q + load(sampled.d_z + i, part), part);
        V d_s = fma(temperature * q.d_std, (load(sampled.noisy + i, part) * load(sampled.noisy_factor + i, part)),
                    to_q * kl.d_s_q);
        store(d_s_q + i, clamp_gradient(scale, raw_q, d_s), part);
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
