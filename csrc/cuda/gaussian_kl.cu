// KL(N(mean_q, sigma(s_q)^2) || N(mean_p, sigma(s_p)^2)) or || N(0, 1), elementwise or summed over each event.
#include "../common/checks.h"
#include "prior.cuh"

namespace fastelbo::device {

template <class Access>
struct GaussianKLArgs {
  using V = typename Access::Value;
  using Operand = typename Access::Operand;
  Layout layout;
  Work work;
  typename Access::Scale scale, scale_p;
  Operand mean_q, s_q, mean_p, s_p;  // [rows, columns]; no mean_p: the standard normal
  Operand kl;                        // [rows, columns], where elementwise
  Sums<V> sums;                      // where not
  Operand d_kl;                      // [rows, columns]
  Operand d_mean_q, d_s_q, d_mean_p, d_s_p;  // [rows, columns]; no d_mean_p: the prior needs no gradient
  Operand mask;                      // [rows, columns]; none: every element counts
  Shares<V> share;                   // of d_kl
  bool same = false;                 // the scales, but for the clamp
};

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_kl_fwd_kernel(const __grid_constant__ GaussianKLArgs<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  RowSums<Access> sums;
  for (auto group = thread.first; group < thread.end; group += thread.lanes) {
    auto place = Access::place(args.layout, thread.row, group);
    V mean_q[n], s_q[n], kl[n];
    Access::load(args.mean_q, args.layout, place, mean_q);
    Access::load(args.s_q, args.layout, place, s_q);
    if (!has_prior<prior>(args.mean_p)) {
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) {
        auto q = spread<exponential>(args.scale, s_q[i]);
        kl[i] = gaussian_kl(mean_q[i], ratio_terms(q), q).value;
      }
    } else {
      V mean_p[n], s_p[n];
      Access::load(args.mean_p, args.layout, place, mean_p);
      Access::load(args.s_p, args.layout, place, s_p);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) {
        auto q = spread<exponential>(args.scale, s_q[i]), p = spread<exponential>(args.scale_p, s_p[i]);
        auto ratio = ratio_terms(args.scale, args.scale_p, args.same, s_q[i], q, s_p[i], p);
        kl[i] = gaussian_kl(mean_q[i] - mean_p[i], ratio, q, p).value;
      }
    }
    select(Access::kept(args.mask, args.layout, place), kl);
    if (args.kl.data)
      Access::store_term(args.kl, args.layout, place, kl);
    else
      sums.add(args.layout, thread, place, kl);
  }
  if (!args.kl.data) sums.store(args.sums, args.layout, args.work, thread);
}

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_kl_bwd_kernel(const __grid_constant__ GaussianKLArgs<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  for (auto group = thread.first; group < thread.end; group += thread.lanes) {
    auto place = Access::place(args.layout, thread.row, group);
    V mean_q[n], s_q[n], upstream[n];
    Access::load(args.mean_q, args.layout, place, mean_q);
    Access::load(args.s_q, args.layout, place, s_q);
    Access::load_term(args.d_kl, args.layout, place, upstream);
    const uint32_t kept = Access::kept(args.mask, args.layout, place);
    if (!has_prior<prior>(args.mean_p)) {
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) {
        auto q = spread<exponential>(args.scale, s_q[i]);
        auto kl = gaussian_kl(mean_q[i], ratio_terms(q), q);
        mean_q[i] = upstream[i] * kl.d_mean_q;
        s_q[i] = clamp_gradient(args.scale, s_q[i], upstream[i] * kl.d_s_q);
      }
    } else {
      V mean_p[n], s_p[n];
      Access::load(args.mean_p, args.layout, place, mean_p);
      Access::load(args.s_p, args.layout, place, s_p);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) {
        auto q = spread<exponential>(args.scale, s_q[i]), p = spread<exponential>(args.scale_p, s_p[i]);
        auto ratio = ratio_terms(args.scale, args.scale_p, args.same, s_q[i], q, s_p[i], p);
        auto kl = gaussian_kl(mean_q[i] - mean_p[i], ratio, q, p);
        V to_q = args.share.q * upstream[i], to_p = args.share.p * upstream[i];
        mean_q[i] = to_q * kl.d_mean_q;
        mean_p[i] = -to_p * kl.d_mean_q;
        s_q[i] = clamp_gradient(args.scale, s_q[i], to_q * kl.d_s_q);
        s_p[i] = clamp_gradient(args.scale_p, s_p[i], to_p * kl.d_s_p);
      }
      if (args.d_mean_p.data) {
        select(kept, mean_p);
        select(kept, s_p);
        Access::store(args.d_mean_p, args.layout, place, mean_p);
        Access::store(args.d_s_p, args.layout, place, s_p);
      }
    }
    select(kept, mean_q);
    select(kept, s_q);
    Access::store(args.d_mean_q, args.layout, place, mean_q);
    Access::store(args.d_s_q, args.layout, place, s_q);
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

Tensor gaussian_kl_fwd(Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                       std::vector<double> scale_numbers, std::optional<std::vector<double>> scale_p_numbers,
                       int64_t event_ndim, std::optional<Tensor> mask, std::optional<double>) {
  check_prior(mean_p, s_p, scale_p_numbers);
  Shape shape = broadcast_operands({{"mean_q", mean_q}, {"s_q", s_q}, {"mean_p", mean_p}, {"s_p", s_p}});
  check_event_ndim(event_ndim, shape);
  check_mask(mask, shape, {"mean_q", mean_q});
  Launcher launch("gaussian_kl_fwd", mean_q);
  ScalarType dtype = arithmetic_type({&mean_q, &s_q, pointer(mean_p), pointer(s_p)});
  Scale scale = parse_scale(scale_numbers), scale_p = parse_scale(scale_p_numbers);
  Terms kl(shape, event_ndim, dtype, mean_q);
  View mean_q_view(mean_q, shape), s_q_view(s_q, shape), mean_p_view(mean_p, shape), s_p_view(s_p, shape),
      mask_view(mask, shape);
  Plan plan(shape, event_ndim, dtype, {scale, scale_p}, std::nullopt, std::nullopt,
            {&mean_q_view, &s_q_view, &mean_p_view, &s_p_view, &mask_view, &kl.elements});
  kl.make_room(plan);
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    using V = typename Access::Value;
    device::GaussianKLArgs<Access> args{plan.layout,
                                        plan.work,
                                        typename Access::Scale(scale),
                                        typename Access::Scale(scale_p),
                                        operand<Access>(mean_q_view, plan),
                                        operand<Access>(s_q_view, plan),
                                        operand<Access>(mean_p_view, plan),
                                        operand<Access>(s_p_view, plan),
                                        operand<Access>(kl.elements, plan),
                                        kl.sums<V>()};
    args.mask = operand<Access>(mask_view, plan);
    args.same = scale.same(scale_p);
    with_prior<Access>(mean_p.has_value(), [&](auto prior) {
      launch(device::gaussian_kl_fwd_kernel<Access, exponential.value, prior.value>, args, plan.work.blocks);
    });
  });
  return kl.finish(launch, plan);
}

// Returns d_mean_q, d_s_q, d_mean_p, d_s_p, each of the full broadcast shape; the last two are empty without
// prior_grad.
std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_bwd(Tensor d_kl, Tensor mean_q, Tensor s_q,
                                                           std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                                                           std::vector<double> scale_numbers,
                                                           std::optional<std::vector<double>> scale_p_numbers,
                                                           int64_t event_ndim, std::optional<double> balance,
                                                           std::optional<Tensor> mask, bool prior_grad) {
  check_prior(mean_p, s_p, scale_p_numbers, prior_grad);
  Shape shape = broadcast_operands({{"mean_q", mean_q}, {"s_q", s_q}, {"mean_p", mean_p}, {"s_p", s_p}});
  check_event_ndim(event_ndim, shape);
  check_balance(balance);
  check_mask(mask, shape, {"mean_q", mean_q});
  check_upstream("d_kl", d_kl, shape.drop_trailing(event_ndim), {"mean_q", mean_q});
  Launcher launch("gaussian_kl_bwd", mean_q);
  ScalarType dtype = arithmetic_type({&mean_q, &s_q, pointer(mean_p), pointer(s_p)});
  Scale scale = parse_scale(scale_numbers), scale_p = parse_scale(scale_p_numbers);
  GaussianGradients grads(shape, mean_q, s_q, mean_p, s_p, dtype, prior_grad);
  View mean_q_view(mean_q, shape), s_q_view(s_q, shape), mean_p_view(mean_p, shape), s_p_view(s_p, shape),
      mask_view(mask, shape);
  View d_kl_view = View::of_term(d_kl, shape, event_ndim);
  Plan plan(shape, 0, dtype, {scale, scale_p}, std::nullopt, std::nullopt,
            {&mean_q_view, &s_q_view, &mean_p_view, &s_p_view, &d_kl_view, &grads.d_mean_q_view, &grads.d_s_q_view,
             &grads.d_mean_p_view, &grads.d_s_p_view, &mask_view});
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    using V = typename Access::Value;
    device::GaussianKLArgs<Access> args{plan.layout,
                                        plan.work,
                                        typename Access::Scale(scale),
                                        typename Access::Scale(scale_p),
                                        operand<Access>(mean_q_view, plan),
                                        operand<Access>(s_q_view, plan),
                                        operand<Access>(mean_p_view, plan),
                                        operand<Access>(s_p_view, plan),
                                        {},
                                        {},
                                        operand<Access>(d_kl_view, plan),
                                        operand<Access>(grads.d_mean_q_view, plan),
                                        operand<Access>(grads.d_s_q_view, plan),
                                        operand<Access>(grads.d_mean_p_view, plan),
                                        operand<Access>(grads.d_s_p_view, plan),
                                        operand<Access>(mask_view, plan)};
    args.share = Shares<V>(balance);
    args.same = scale.same(scale_p);
    with_prior<Access>(mean_p.has_value(), [&](auto prior) {
      launch(device::gaussian_kl_bwd_kernel<Access, exponential.value, prior.value>, args, plan.work.blocks);
    });
  });
  return grads.result();
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CUDA, m) {
  fastelbo::implement(m, "gaussian_kl_fwd", TORCH_BOX(&fastelbo::gaussian_kl_fwd));
  fastelbo::implement(m, "gaussian_kl_bwd", TORCH_BOX(&fastelbo::gaussian_kl_bwd));
}
