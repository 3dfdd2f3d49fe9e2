// z = mean + temperature * sigma(s) * noise, and its gradient.
#include "../common/checks.h"
#include "host.h"

namespace fastelbo {

struct GaussianRsample {
  Noise noise;  // [K, ...]
  Scale scale;
  int64_t numel;  // of [...]
  Tiling tiling;
  Operand mean, s;  // [...]
  Operand z;        // [K, ...]
  Operand d_z, d_s;
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_rsample.loops.h"
#include "per_isa.h"

namespace fastelbo {

Tensor gaussian_rsample_fwd(Tensor mean, Tensor s, std::optional<Tensor> seed, std::optional<Tensor> noise,
                            int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
                            std::vector<double> scale, std::optional<ScalarType> out_dtype) {
  Shape shape = broadcast_operands({{"mean", mean}, {"s", s}});
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, {"mean", mean});
  ScalarType z_type = sample_type(out_dtype, mean);
  Tensor z = num_samples ? allocate(out, z_type, Device(mean)) : allocate(out, z_type, mean);
  GaussianRsample args{{noise, seed, noise_offset, num_samples, temperature, shape}, parse_scale(scale)};
  args.numel = shape.numel();
  args.tiling = {1, args.numel};
  args.mean = {mean, shape};
  args.s = {s, shape};
  args.z = {z, out};
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
  GaussianRsample args{{noise, seed, noise_offset, num_samples, temperature, shape}, parse_scale(scale)};
  args.numel = shape.numel();
  args.tiling = {1, args.numel};
  args.s = {s, shape};
  args.d_z = {d_z, out};
  args.d_s = {d_s, shape};
  FASTELBO_RUN(gaussian_rsample_bwd, dtype, args.scale.exponential(), args, args.tiling.tiles());
  return d_s;
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_rsample_fwd", TORCH_BOX(&fastelbo::gaussian_rsample_fwd));
  fastelbo::implement(m, "gaussian_rsample_bwd", TORCH_BOX(&fastelbo::gaussian_rsample_bwd));
}
