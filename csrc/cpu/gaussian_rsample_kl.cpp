// A posterior sample and its KL divergence from the prior in one pass over the data, forward and backward.
#include "gaussians.h"

namespace fastelbo {

struct GaussianRsampleKL : GaussianOperands {  // [...]
  Noise noise;    // [K, ...]
  int64_t numel;  // of [...]
  Operand z;      // [K, ...], or else
  Operand d_z;    // [K, ...]
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_rsample_kl.loops.h"
#include "per_isa.h"

namespace fastelbo {

std::tuple<Tensor, Tensor> gaussian_rsample_kl_fwd(
    Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p, std::optional<Tensor> seed,
    std::optional<Tensor> noise, int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
    std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
    std::optional<Tensor> mask, std::optional<ScalarType> out_dtype, std::optional<double>) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask);
  const Shape& shape = given.shape;
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, given.anchor());
  ScalarType z_type = sample_type(out_dtype, mean_q);
  Tensor z = num_samples ? allocate(out, z_type, Device(mean_q)) : allocate(out, z_type, mean_q);
  Tiling tiling = event_tiling(shape, event_ndim);
  Terms kl(shape, event_ndim, given.dtype, mean_q, tiling);
  GaussianRsampleKL args{
      {given, tiling, kl}, {noise, seed, noise_offset, num_samples, temperature, shape}, shape.numel()};
  args.z = {z, out};
  FASTELBO_RUN(gaussian_rsample_kl_fwd, given.dtype, given.exponential(), args, tiling.tiles());
  return {z, kl.finish(given.dtype, tiling)};
}

// Returns d_mean_q, d_s_q, d_mean_p, d_s_p, each of the full broadcast shape; the last two are empty without
// prior_grad.
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_rsample_kl_bwd(
    Tensor d_z, Tensor d_kl, Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
    std::optional<Tensor> seed, std::optional<Tensor> noise, int64_t noise_offset, std::optional<int64_t> num_samples,
    double temperature, std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
    std::optional<double> balance, std::optional<Tensor> mask, bool prior_grad) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, prior_grad);
  const Shape& shape = given.shape;
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, given.anchor());
  check_balance(balance);
  check_upstream("d_z", d_z, out, given.anchor());
  check_upstream("d_kl", d_kl, shape.drop_trailing(event_ndim), given.anchor());
  GaussianGradients grads(given, prior_grad);
  GaussianRsampleKL args{{given, d_kl, event_ndim, balance, grads},
                         {noise, seed, noise_offset, num_samples, temperature, shape},
                         shape.numel()};
  args.d_z = {d_z, out};
  FASTELBO_RUN(gaussian_rsample_kl_bwd, given.dtype, given.exponential(), args, args.tiling.tiles());
  return grads.result();
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_rsample_kl_fwd", TORCH_BOX(&fastelbo::gaussian_rsample_kl_fwd));
  fastelbo::implement(m, "gaussian_rsample_kl_bwd", TORCH_BOX(&fastelbo::gaussian_rsample_kl_bwd));
}
