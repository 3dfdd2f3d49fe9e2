// The loops of gaussian_rsample.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

// One item is one tile of one sample; the samples of a tile follow each other while its inputs are in cache.
template <class T, bool exponential>
void gaussian_rsample_fwd(const GaussianRsample& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T mean_tile[kTile], s_tile[kTile], z_tile[kTile];
  SpreadTile<T, exponential, kNoMore> p_at;
  NoiseTile<T> noise_tile;
  for (int64_t item = begin; item < end; ++item) {
    auto [start, n, row, rows] = args.tiling[item / args.noise.samples];
    int64_t sample = item % args.noise.samples, out = sample * args.numel + start;
    const T* mean = read_tile(args.mean, start, n, mean_tile);
    const T* s = read_tile(args.s, start, n, s_tile);
    T* z = output(args.z, out, n, z_tile);
    const T* noise = noise_tile.read(args.noise, sample, start, n, args.numel);
    V temperature(args.noise.temperature);
    p_at.read(scale, s, n);
    for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
      store(z + i, fma(temperature * p_at.at(scale, s, i, part).std, load(noise + i, part), load(mean + i, part)),
            part);
    });
    finish(args.z, out, n, z, z_tile);
  }
}

// d_s = temperature * d sigma / d s * sum over samples of d_z * noise. (d_mean is the sum of d_z: the caller's.)
template <class T, bool exponential>
void gaussian_rsample_bwd(const GaussianRsample& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  const ScaleOf<T> scale(args.scale);  // a copy, which no store to a tensor can change
  T s_tile[kTile], d_s_tile[kTile];
  SpreadTile<T, exponential, kSlope> p_at;
  SampleGradient<T> sampled;
  for (int64_t tile = begin; tile < end; ++tile) {
    auto [start, n, row, rows] = args.tiling[tile];
    const T* s = read_tile(args.s, start, n, s_tile);
    T* d_s = output(args.d_s, start, n, d_s_tile);
    sampled.read(args.noise, args.d_z, start, n, args.numel);
    V temperature(args.noise.temperature);
    p_at.read(scale, s, n);
    for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
      V raw = load(s + i, part);
      V grad = temperature * p_at.at(scale, s, i, part).d_std *
               (load(sampled.noisy + i, part) * load(sampled.noisy_factor + i, part));
      store(d_s + i, clamp_gradient(scale, raw, grad), part);
    });
    finish(args.d_s, start, n, d_s, d_s_tile);
  }
}

}  // namespace fastelbo::FASTELBO_ISA
