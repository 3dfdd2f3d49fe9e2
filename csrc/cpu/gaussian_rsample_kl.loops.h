// The loops of gaussian_rsample_kl.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

#include "gaussians_tile.h"

template <class T, bool exponential>
void gaussian_rsample_kl_fwd(const GaussianRsampleKL& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  GaussiansTile<T, exponential, Ratio::gap, kSampled> both(args);
  T z_tile[kTile], std_tile[kTile], kl_tile[kTile];
  NoiseTile<T> noise_tile;
  const V temperature(args.noise.temperature);
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    int64_t start = tile.start;
    int n = tile.count;
    both.read(start, n);
    T* kl = output_terms(*args.kl, tile, kl_tile);
    T* z = output(args.z, start, n, z_tile);
    const T* noise = noise_tile.read(args.noise, 0, start, n, args.numel);
    both.each([&](int i, auto part, const Spread<V, exponential>& q, const GaussianKL<V>& found) FASTELBO_LAMBDA {
      V std = temperature * q.std;
      store(std_tile + i, std, part);
      store(z + i, fma(std, load(noise + i, part), load(both.mean_q + i, part)), part);
      store(kl + i, found.value, part);
    });
    both.select(kl, z);
    finish_terms(*args.kl, args.tiling, tile, kl, kl_tile);
    finish(args.z, start, n, z, z_tile);
    for (int64_t sample = 1; sample < args.noise.samples; ++sample) {
      int64_t out = sample * args.numel + start;
      noise = noise_tile.read(args.noise, sample, start, n, args.numel);
      z = output(args.z, out, n, z_tile);
      for_each_vector<T>(n, [&](int i, auto part) FASTELBO_LAMBDA {
        store(z + i, fma(load(std_tile + i, part), load(noise + i, part), load(both.mean_q + i, part)), part);
      });
      both.select(z);
      finish(args.z, out, n, z, z_tile);
    }
  }
}

template <class T, bool exponential>
void gaussian_rsample_kl_bwd(const GaussianRsampleKL& args, int64_t begin, int64_t end) {
  using V = typename VectorOf<T>::type;
  GaussiansTile<T, exponential, Ratio::e, kSampled | kSlope | kLogSlope> both(args);
  SampleGradient<T> sampled;
  const V temperature(args.noise.temperature);
  for (int64_t index = begin; index < end; ++index) {
    Tile tile = args.tiling[index];
    sampled.read(args.noise, args.d_z, tile.start, tile.count, args.numel);
    both.read(tile.start, tile.count);
    both.gradients([&](int i, auto part, V to_q, const Spread<V, exponential>& q, const GaussianKL<V>& kl)
                       FASTELBO_LAMBDA {
                         V noisy = load(sampled.noisy + i, part) * load(sampled.noisy_factor + i, part);
                         return std::pair(fma(to_q, kl.d_mean_q, load(sampled.d_z + i, part)),
                                          fma(temperature * q.d_std, noisy, to_q * kl.d_s_q));
                       });
  }
}

}  // namespace fastelbo::FASTELBO_ISA
