// KL(N(mean_q, sigma(s_q)^2) || N(mean_p, sigma(s_p)^2)) or || N(0, 1), elementwise or summed over each event.
#include "gaussians.h"

#define FASTELBO_LOOPS "gaussian_kl.loops.h"
#include "per_isa.h"

namespace fastelbo {

Tensor gaussian_kl_fwd(Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                       std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
                       std::optional<Tensor> mask, std::optional<double>) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask);
  Tiling tiling = event_tiling(given.shape, event_ndim);
  Terms kl(given.shape, event_ndim, given.dtype, mean_q, tiling);
  GaussianOperands args(given, tiling, kl);
  FASTELBO_RUN(gaussian_kl_fwd, given.dtype, given.exponential(), args, tiling.tiles());
  return kl.finish(given.dtype, tiling);
}

// Returns d_mean_q, d_s_q, d_mean_p, d_s_p, each of the full broadcast shape; the last two are empty without
// prior_grad.
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_bwd(Tensor d_kl, Tensor mean_q, Tensor s_q,
                                                           std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                                                           std::vector<double> scale,
                                                           std::optional<std::vector<double>> scale_p,
                                                           int64_t event_ndim, std::optional<double> balance,
                                                           std::optional<Tensor> mask, bool prior_grad) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, prior_grad);
  check_balance(balance);
  check_upstream("d_kl", d_kl, given.shape.drop_trailing(event_ndim), given.anchor());
  GaussianGradients grads(given, prior_grad);
  GaussianOperands args(given, d_kl, event_ndim, balance, grads);
  FASTELBO_RUN(gaussian_kl_bwd, given.dtype, given.exponential(), args, args.tiling.tiles());
  return grads.result();
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_kl_fwd", TORCH_BOX(&fastelbo::gaussian_kl_fwd));
  fastelbo::implement(m, "gaussian_kl_bwd", TORCH_BOX(&fastelbo::gaussian_kl_bwd));
}
