// ln N(x; mean, sigma(s)^2), or its negative, elementwise or summed over each event.
#include "../common/checks.h"
#include "host.h"

namespace fastelbo {

struct GaussianLogProb {
  Operand x, mean, s;
  Operand mask;  // none: every element counts
  Scale scale;
  double sign;      // of the negative log-likelihood in the result
  double log_weight, constant;  // of ln sigma in that, and what is added
  bool one_s;       // s is a single number: what depends on it alone leaves the loop
  Tiling tiling;
  Terms* log_prob;
  Operand d_out;
  Operand d_x, d_mean, d_s;  // no d_x: x needs no gradient
  double* d_s_partial;       // [tiles], where one_s: the sums that make up its gradient
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "gaussian_log_prob.loops.h"
#include "per_isa.h"

namespace fastelbo {

Tensor gaussian_log_prob_fwd(Tensor x, Tensor mean, Tensor s, std::vector<double> scale, int64_t event_ndim,
                             bool negative, std::optional<Tensor> mask, double log_weight, double constant) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  Tiling tiling = event_tiling(shape, event_ndim);
  Terms log_prob(shape, event_ndim, dtype, mean, tiling);
  GaussianLogProb args{{x, shape}, {mean, shape}, {s, shape}, {mask, shape}, parse_scale(scale)};
  args.sign = negative ? 1 : -1;
  args.log_weight = log_weight;
  args.constant = constant;
  args.one_s = s.numel() == 1;
  args.tiling = tiling;
  args.log_prob = &log_prob;
  FASTELBO_RUN(gaussian_log_prob_fwd, dtype, args.scale.exponential(), args, tiling.tiles());
  return log_prob.finish(dtype, tiling);
}

// Returns d_x, d_mean, d_s, each of the full broadcast shape, but for an s of one element, whose gradient is summed
// here. The first is empty without x_grad.
std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(Tensor d_out, Tensor x, Tensor mean, Tensor s,
                                                         std::vector<double> scale, int64_t event_ndim, bool negative,
                                                         std::optional<Tensor> mask, bool x_grad, double log_weight) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  check_upstream("d_out", d_out, shape.drop_trailing(event_ndim), {"x", x});
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  bool one_s = s.numel() == 1;
  Device device(mean);
  Tensor d_x = allocate_gradient(shape, x, dtype, device, x_grad),
         d_mean = allocate_gradient(shape, mean, dtype, device);
  Tensor d_s = one_s ? allocate(Shape(s), dtype, device) : allocate_gradient(shape, s, dtype, device);
  GaussianLogProb args{{x, shape}, {mean, shape}, {s, shape}, {mask, shape}, parse_scale(scale)};
  args.sign = negative ? 1 : -1;
  args.log_weight = log_weight;
  args.one_s = one_s;
  args.tiling = {1, shape.numel()};
  args.d_out = {d_out, shape, event_ndim};
  if (x_grad) args.d_x = {d_x, shape};
  args.d_mean = {d_mean, shape};
  std::vector<double> partial(one_s ? args.tiling.tiles() : 0);
  if (one_s)
    args.d_s_partial = partial.data();
  else
    args.d_s = {d_s, shape};
  FASTELBO_RUN(gaussian_log_prob_bwd, dtype, args.scale.exponential(), args, args.tiling.tiles());
  if (one_s) store_total(partial, 0, partial.size(), dtype, d_s.data_ptr(), 0);
  return {d_x, d_mean, d_s};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "gaussian_log_prob_fwd", TORCH_BOX(&fastelbo::gaussian_log_prob_fwd));
  fastelbo::implement(m, "gaussian_log_prob_bwd", TORCH_BOX(&fastelbo::gaussian_log_prob_bwd));
}
