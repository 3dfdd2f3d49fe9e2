// A posterior sample and its KL divergence from the prior in one pass over the data, forward and backward.
#include "gaussians.cuh"

namespace fastelbo::device {

template <class Access>
struct GaussianRsampleKL : GaussianOperands<Access> {
  Draw<Access> draw;
  typename Access::Operand z, d_z;  // [K, rows, columns]
};

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_rsample_kl_fwd_kernel(const __grid_constant__ GaussianRsampleKL<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  const PhiloxKeys<uint32_t> keys = args.draw.keys();
  RowSums<Access> sums;
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V mean_q[n], s_q[n], std[n], kl[n];
    Access::load(args.mean_q, args.layout, place, mean_q);
    Access::load(args.s_q, args.layout, place, s_q);
    each_kl<exponential, prior, Excess::beside>(args, place, mean_q, s_q,
                                                [&](int i, const auto& q, const auto& found, V) {
                                                  kl[i] = found.value;
                                                  std[i] = args.draw.temperature * q.std;
                                                });
    const uint32_t kept = Access::kept(args.mask, args.layout, place);
    select(kept, kl);
    store_kl(args, thread, place, sums, kl);
    uint32_t sample = 0;
    do {
      V z[n];
      args.draw.read(keys, args.layout, place, sample, z);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) z[i] = fma(std[i], z[i], mean_q[i]);
      select(kept, z);
      Access::store(args.z, args.layout, place, z, sample);
    } while (++sample < args.draw.samples);
  }
  if (!args.kl.data) sums.store(args.sums, args.layout, args.work, thread);
}

template <class Access, bool exponential, Prior prior>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_rsample_kl_bwd_kernel(const __grid_constant__ GaussianRsampleKL<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  const PhiloxKeys<uint32_t> keys = args.draw.keys();
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V sampled[n] = {}, noisy[n] = {};  // the sums over samples of d_z and of d_z * noise
    uint32_t sample = 0;
    do {
      V d_z[n], noise[n];
      Access::load(args.d_z, args.layout, place, d_z, sample);
      args.draw.read(keys, args.layout, place, sample, noise);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) {
        sampled[i] += d_z[i];
        noisy[i] = fma(d_z[i], noise[i], noisy[i]);
      }
    } while (++sample < args.draw.samples);
    gradients<exponential, prior, Excess::beside>(
        args, place, [&](int i, V to_q, const auto& q, const auto& kl, V& d_mean, V& d_s) {
          d_mean = fma(to_q, kl.d_mean_q, sampled[i]);
          d_s = fma(args.draw.temperature * q.d_std, noisy[i], to_q * kl.d_s_q);
        });
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

std::tuple<Tensor, Tensor> gaussian_rsample_kl_fwd(
    Tensor mean_q, Tensor s_q, std::optional<Tensor> mean_p, std::optional<Tensor> s_p, std::optional<Tensor> seed,
    std::optional<Tensor> noise, int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
    std::vector<double> scale, std::optional<std::vector<double>> scale_p, int64_t event_ndim,
    std::optional<Tensor> mask, std::optional<ScalarType> out_dtype, std::optional<double>) {
  Gaussians given(mean_q, s_q, mean_p, s_p, scale, scale_p, event_ndim, mask);
  const Shape& shape = given.shape;
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, given.anchor());
  Launcher launch("gaussian_rsample_kl_fwd", mean_q);
  ScalarType z_type = sample_type(out_dtype, mean_q);
  Tensor z = num_samples ? allocate(out, z_type, Device(mean_q)) : allocate(out, z_type, mean_q);
  Terms kl(shape, event_ndim, given.dtype, mean_q);
  GaussianViews both(given);
  View z_view = View::of_samples(z, shape, num_samples), noise_view = View::of_samples(noise, shape, num_samples);
  Plan plan(shape, event_ndim, given.dtype, {given.scale, given.scale_p},
            noise ? std::nullopt : std::optional(noise_offset), num_samples,
            {&both.mean_q, &both.s_q, &both.mean_p, &both.s_p, &both.mask, &z_view, &noise_view, &kl.elements});
  kl.make_room(plan);
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianRsampleKL<Access> args{};
    both.fill<Access>(args, plan, kl);
    args.draw = draw<Access>(seed, noise_view, num_samples, temperature, z_view, plan);
    args.z = operand<Access>(z_view, plan);
    with_prior<Access>(mean_p.has_value(), [&](auto prior) {
      launch(device::gaussian_rsample_kl_fwd_kernel<Access, exponential.value, prior.value>, args, plan.work.blocks);
    });
  });
  return {z, kl.finish(launch, plan)};
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
  Launcher launch("gaussian_rsample_kl_bwd", mean_q);
  GaussianGradients grads(given, prior_grad);
  GaussianViews both(given, d_kl, event_ndim, balance, grads);
  View d_z_view = View::of_samples(d_z, shape, num_samples), noise_view = View::of_samples(noise, shape, num_samples);
  Plan plan(shape, 0, given.dtype, {given.scale, given.scale_p}, noise ? std::nullopt : std::optional(noise_offset),
            num_samples,
            {&both.mean_q, &both.s_q, &both.mean_p, &both.s_p, &both.mask, &d_z_view, &noise_view, &both.d_kl,
             &both.d_mean_q, &both.d_s_q, &both.d_mean_p, &both.d_s_p});
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianRsampleKL<Access> args{};
    both.fill<Access>(args, plan);
    args.draw = draw<Access>(seed, noise_view, num_samples, temperature, d_z_view, plan);
    args.d_z = operand<Access>(d_z_view, plan);
    with_prior<Access>(mean_p.has_value(), [&](auto prior) {
      launch(device::gaussian_rsample_kl_bwd_kernel<Access, exponential.value, prior.value>, args, plan.work.blocks);
    });
  });
  return grads.result();
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(FASTELBO_NAMESPACE, CUDA, m) {
  fastelbo::implement(m, "gaussian_rsample_kl_fwd", TORCH_BOX(&fastelbo::gaussian_rsample_kl_fwd));
  fastelbo::implement(m, "gaussian_rsample_kl_bwd", TORCH_BOX(&fastelbo::gaussian_rsample_kl_bwd));
}
