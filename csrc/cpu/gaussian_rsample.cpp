// z = mean + temperature * sigma(s) * noise, and its gradient.
#ifndef FASTELBO_ISA
#include "../common/checks.h"
#include "host.h"

namespace fastelbo {

struct GaussianRsample {
  Operand mean, s;  // [...]
  Noise noise;      // [K, ...]
  Scale scale;
  Tiling tiling;
  int64_t numel;    // of [...]
  Operand z;        // [K, ...]
  Operand d_z, d_s;
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_rsample.cpp"
#include "per_isa.h"
#endif

#ifdef FASTELBO_ISA
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
#else
namespace fastelbo {

Tensor gaussian_rsample_fwd(Tensor mean, Tensor s, std::optional<Tensor> seed, std::optional<Tensor> noise,
                            int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
                            std::vector<double> scale, ScalarType out_dtype) {
  Shape shape = broadcast_operands({{"mean", mean}, {"s", s}});
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, {"mean", mean});
  check_float("out_dtype", out_dtype);
  Tensor z = num_samples ? allocate(out, out_dtype, Device(mean)) : allocate(out, out_dtype, mean);
  int64_t numel = shape.numel();
  GaussianRsample args{{mean, shape},      {s, shape}, {noise, seed, noise_offset, num_samples, temperature, shape},
                       parse_scale(scale), {1, numel}, numel,
                       {z, out},           {},         {}};
  FASTELBO_RUN(gaussian_rsample_fwd, arithmetic_type({&mean, &s}), args.scale.exponential(), args,
               args.tiling.tiles() * args.noise.samples);
  return z;
}

// Returns d_s, of the shape of one sample.
Tensor gaussian_rsample_bwd(Tensor d_z, Tensor s, std::optional<Tensor> seed, std::optional<Tensor> noise,
                            int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
                            std::vector<double> scale) {
  Shape shape = sample_shape(d_z, num_samples);
  check_float("s", s.scalar_type());
  check_broadcasts("s", s, shape);
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, {"s", s});
  check_upstream("d_z", d_z, out, {"s", s});
  ScalarType dtype = arithmetic_type({&d_z, &s});
  Tensor d_s = allocate_gradient(shape, s, dtype, Device(s));
  int64_t numel = shape.numel();
  GaussianRsample args{{},
                       {s, shape},
                       {noise, seed, noise_offset, num_samples, temperature, shape},
                       parse_scale(scale),
                       {1, numel},
                       numel,
                       {},
                       {d_z, out},
                       {d_s, shape}};
  FASTELBO_RUN(gaussian_rsample_bwd, dtype, args.scale.exponential(), args, args.tiling.tiles());
  return d_s;
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_rsample_fwd", TORCH_BOX(&fastelbo::gaussian_rsample_fwd));
  fastelbo::implement(m, "gaussian_rsample_bwd", TORCH_BOX(&fastelbo::gaussian_rsample_bwd));
}
#endif
