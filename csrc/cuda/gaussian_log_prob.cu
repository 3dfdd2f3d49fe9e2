// ln N(x; mean, sigma(s)^2), or its negative, elementwise or summed over each event.
#include "../common/checks.h"
#include "host.cuh"

namespace fastelbo::device {

template <class Access>
struct GaussianLogProb {
  using V = typename Access::Value;
  using Operand = typename Access::Operand;
  Layout layout;
  Work work;
  typename Access::Scale scale;
  V sign;               // of the negative log-likelihood in the result
  V log_weight, constant;  // of ln sigma in that, and what is added
  Operand x, mean, s;   // [rows, columns]
  Operand log_prob;     // [rows, columns], where elementwise
  Sums<V> sums;         // where not
  Operand d_out;        // [rows, columns]
  Operand d_x, d_mean;  // [rows, columns]; no d_x: x needs no gradient
  Operand d_s;          // [rows, columns], where s is not a single number
  double* d_s_partial;  // [blocks], where it is: the sums that make up its gradient
  Operand mask;         // [rows, columns]; none: every element counts
};

template <class Access, bool exponential>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_log_prob_fwd_kernel(const __grid_constant__ GaussianLogProb<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  RowSums<Access> sums;
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V x[n], mean[n], s[n];
    Access::load(args.x, args.layout, place, x);
    Access::load(args.mean, args.layout, place, mean);
    Access::load_repeated(args.s, args.layout, place, s);
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i)
      x[i] = args.sign *
             gaussian_nll(x[i] - mean[i], spread<exponential>(args.scale, s[i]), args.log_weight, args.constant).value;
    select(Access::kept(args.mask, args.layout, place), x);
    if (args.log_prob.data)
      Access::store_term(args.log_prob, args.layout, place, x);
    else
      sums.add(args.layout, thread, place, x);
  }
  if (!args.log_prob.data) sums.store(args.sums, args.layout, args.work, thread);
}

template <class Access, bool exponential>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_log_prob_bwd_kernel(const __grid_constant__ GaussianLogProb<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  double total = 0;
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V x[n], mean[n], s[n], upstream[n];
    Access::load(args.x, args.layout, place, x);
    Access::load(args.mean, args.layout, place, mean);
    Access::load_repeated(args.s, args.layout, place, s);
    Access::load_term(args.d_out, args.layout, place, upstream);
    const uint32_t kept = Access::kept(args.mask, args.layout, place);
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) {
      auto p = spread<exponential>(args.scale, s[i]);
      auto nll = gaussian_nll(x[i] - mean[i], p, args.log_weight);
      V signed_upstream = args.sign * upstream[i];
      x[i] = signed_upstream * nll.d_x;
      mean[i] = -x[i];
      s[i] = clamp_gradient(args.scale, s[i], signed_upstream * nll.d_s);
    }
    select(kept, x);
    select(kept, mean);
    select(kept, s);
    if (args.d_x.data) Access::store(args.d_x, args.layout, place, x);
    Access::store(args.d_mean, args.layout, place, mean);
    if (args.d_s.data)
      Access::store(args.d_s, args.layout, place, s);
    else
      total += sum_inside<Access>(place, s);
  }
  if (args.d_s_partial) {
    double sum = sum_lanes(total, kThreads);
    if (threadIdx.x == 0) args.d_s_partial[blockIdx.x] = sum;
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

// What forward and backward read.
template <class Access>
device::GaussianLogProb<Access> gaussian_log_prob_args(const Plan& plan, const Scale& scale, bool negative,
                                                       double log_weight, const View& x, const View& mean,
                                                       const View& s, const View& mask) {
  device::GaussianLogProb<Access> args{};
  args.layout = plan.layout;
  args.work = plan.work;
  args.scale = typename Access::Scale(scale);
  args.sign = negative ? 1 : -1;
  args.log_weight = log_weight;
  args.x = operand<Access>(x, plan);
  args.mean = operand<Access>(mean, plan);
  args.s = operand<Access>(s, plan);
  args.mask = operand<Access>(mask, plan);
  return args;
}

Tensor gaussian_log_prob_fwd(Tensor x, Tensor mean, Tensor s, std::vector<double> scale_numbers, int64_t event_ndim,
                             bool negative, std::optional<Tensor> mask, double log_weight, double constant) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  Launcher launch("gaussian_log_prob_fwd", mean);
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  Scale scale = parse_scale(scale_numbers);
  Terms log_prob(shape, event_ndim, dtype, mean);
  View x_view(x, shape), mean_view(mean, shape), s_view(s, shape), mask_view(mask, shape);
  s_view.repeats = true;
  Plan plan(shape, event_ndim, dtype, {scale}, std::nullopt, std::nullopt,
            {&x_view, &mean_view, &s_view, &mask_view, &log_prob.elements});
  log_prob.make_room(plan);
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    auto args = gaussian_log_prob_args<Access>(plan, scale, negative, log_weight, x_view, mean_view, s_view, mask_view);
    args.constant = constant;
    args.log_prob = operand<Access>(log_prob.elements, plan);
    args.sums = log_prob.sums<typename Access::Value>();
    launch(device::gaussian_log_prob_fwd_kernel<Access, exponential.value>, args, plan.work.blocks);
  });
  return log_prob.finish(launch, plan);
}

// Returns d_x, d_mean, d_s, each of the full broadcast shape, but for an s of one element, whose gradient is summed
// here. The first is empty without x_grad.
std::tuple<Tensor, Tensor, Tensor> gaussian_log_prob_bwd(Tensor d_out, Tensor x, Tensor mean, Tensor s,
                                                         std::vector<double> scale_numbers, int64_t event_ndim,
                                                         bool negative, std::optional<Tensor> mask, bool x_grad,
                                                         double log_weight) {
  Shape shape = broadcast_operands({{"x", x}, {"mean", mean}, {"s", s}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"x", x});
  check_upstream("d_out", d_out, shape.drop_trailing(event_ndim), {"x", x});
  Launcher launch("gaussian_log_prob_bwd", mean);
  ScalarType dtype = arithmetic_type({&x, &mean, &s});
  Scale scale = parse_scale(scale_numbers);
  bool one_s = s.numel() == 1;
  Device device(mean);
  Tensor d_x = allocate_gradient(shape, x, dtype, device, x_grad),
         d_mean = allocate_gradient(shape, mean, dtype, device);
  Tensor d_s = one_s ? allocate(Shape(s), dtype, device) : allocate_gradient(shape, s, dtype, device);
  View x_view(x, shape), mean_view(mean, shape), s_view(s, shape), d_out_view = View::of_term(d_out, shape, event_ndim);
  View d_x_view, d_mean_view(d_mean, shape), d_s_view, mask_view(mask, shape);
  s_view.repeats = true;
  if (x_grad) d_x_view = View(d_x, shape);
  if (!one_s) d_s_view = View(d_s, shape);
  Plan plan(shape, 0, dtype, {scale}, std::nullopt, std::nullopt,
            {&x_view, &mean_view, &s_view, &d_out_view, &d_x_view, &d_mean_view, &d_s_view, &mask_view}, one_s);
  std::optional<Tensor> partial;
  if (one_s) partial = allocate(Shape{plan.work.blocks}, ScalarType::Double, device);
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    auto args = gaussian_log_prob_args<Access>(plan, scale, negative, log_weight, x_view, mean_view, s_view, mask_view);
    args.d_out = operand<Access>(d_out_view, plan);
    args.d_x = operand<Access>(d_x_view, plan);
    args.d_mean = operand<Access>(d_mean_view, plan);
    args.d_s = operand<Access>(d_s_view, plan);
    args.d_s_partial = partial ? static_cast<double*>(partial->data_ptr()) : nullptr;
    launch(device::gaussian_log_prob_bwd_kernel<Access, exponential.value>, args, plan.work.blocks);
  });
  if (partial) add_partials(launch, *partial, 1, plan.work.blocks, dtype, d_s.data_ptr());
  return {d_x, d_mean, d_s};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(FASTELBO_NAMESPACE, CUDA, m) {
  fastelbo::implement(m, "gaussian_log_prob_fwd", TORCH_BOX(&fastelbo::gaussian_log_prob_fwd));
  fastelbo::implement(m, "gaussian_log_prob_bwd", TORCH_BOX(&fastelbo::gaussian_log_prob_bwd));
}
