// KL(N(mean_q, sigma(s_q)^2) || N(mean_p, sigma(s_p)^2)) or || N(0, 1), elementwise or summed over each event.
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

#define FASTELBO_LOOPS "gaussian_kl.loops.h"
#include "per_isa.h"

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
