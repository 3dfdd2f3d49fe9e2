// KL(N(mean_q, sigma(s_q)^2) || N(mean_p, sigma(s_p)^2)) or || N(0, 1), elementwise or summed over each event.
#include "gaussians.cuh"

namespace fastelbo::device {

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_kl_fwd_kernel(const __grid_constant__ GaussianOperands<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  RowSums<Access> sums;
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V mean_q[n], s_q[n], kl[n];
    Access::load(args.mean_q, args.layout, place, mean_q);
    Access::load(args.s_q, args.layout, place, s_q);
    each_kl<exponential, prior, Excess::together>(
        args, place, mean_q, s_q, [&](int i, const auto&, const auto& found, V) { kl[i] = found.value; });
    select(Access::kept(args.mask, args.layout, place), kl);
    store_kl(args, thread, place, sums, kl);
  }
  if (!args.kl.data) sums.store(args.sums, args.layout, args.work, thread);
}

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_kl_bwd_kernel(const __grid_constant__ GaussianOperands<Access> args) {
  using V = typename Access::Value;
  Thread<typename Access::Index> thread(args.work);
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    gradients<exponential, prior, Excess::together>(args, Access::place(args.layout, thread, group),
                                                    [](int, V to_q, const auto&, const auto& kl, V& d_mean, V& d_s) {
                                                      d_mean = to_q * kl.d_mean_q;
                                                      d_s = to_q * kl.d_s_q;
                                                    });
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

Tensor gaussian_kl_fwd(Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p,
                       std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
                       std::optional<Tensor> mask, std::optional<double>) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask);
  Launcher launch("gaussian_kl_fwd", mean_q);
  Terms kl(given.shape, event_ndim, given.dtype, mean_q);
  GaussianViews both(given);
  Plan plan(given.shape, event_ndim, given.dtype, {given.scale, given.scale_p}, std::nullopt, std::nullopt,
            {&both.mean_q, &both.s_q, &both.mean_p, &both.s_p, &both.mask, &kl.elements});
  kl.make_room(plan);
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianOperands<Access> args{};
    both.fill<Access>(args, plan, kl);
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
                                                           std::vector<double> scale,
                                                           std::optional<std::vector<double>> scale_p,
                                                           int64_t event_ndim, std::optional<double> balance,
                                                           std::optional<Tensor> mask, bool prior_grad) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask, prior_grad);
  check_balance(balance);
  check_upstream("d_kl", d_kl, given.shape.drop_trailing(event_ndim), given.anchor());
  Launcher launch("gaussian_kl_bwd", mean_q);
  GaussianGradients grads(given, prior_grad);
  GaussianViews both(given, d_kl, event_ndim, balance, grads);
  Plan plan(given.shape, 0, given.dtype, {given.scale, given.scale_p}, std::nullopt, std::nullopt,
            {&both.mean_q, &both.s_q, &both.mean_p, &both.s_p, &both.mask, &both.d_kl, &both.d_mean_q, &both.d_s_q,
             &both.d_mean_p, &both.d_s_p});
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianOperands<Access> args{};
    both.fill<Access>(args, plan);
    with_prior<Access>(mean_p.has_value(), [&](auto prior) {
      launch(device::gaussian_kl_bwd_kernel<Access, exponential.value, prior.value>, args, plan.work.blocks);
    });
  });
  return grads.result();
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(FASTELBO_NAMESPACE, CUDA, m) {
  fastelbo::implement(m, "gaussian_kl_fwd", TORCH_BOX(&fastelbo::gaussian_kl_fwd));
  fastelbo::implement(m, "gaussian_kl_bwd", TORCH_BOX(&fastelbo::gaussian_kl_bwd));
}
