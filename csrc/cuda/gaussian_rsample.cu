// z = mean + temperature * sigma(s) * noise, and its gradient.
#include "../common/checks.h"
#include "host.cuh"

namespace fastelbo::device {

template <class Access>
struct GaussianRsample {
  using Operand = typename Access::Operand;
  Layout layout;
  Work work;
  Draw<Access> draw;
  typename Access::Scale scale;
  Operand mean, s;  // [rows, columns]
  Operand z;        // [K, rows, columns]
  Operand d_z;      // [K, rows, columns]
  Operand d_s;      // [rows, columns]
};

template <class Access, bool exponential>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_rsample_fwd_kernel(const __grid_constant__ GaussianRsample<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  const PhiloxKeys<uint32_t> keys = args.draw.keys();
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V mean[n], std[n], noise[n], z[n];
    Access::load(args.mean, args.layout, place, mean);
    Access::load(args.s, args.layout, place, std);
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) std[i] = args.draw.temperature * spread<exponential>(args.scale, std[i]).std;
    uint32_t sample = 0;
    do {
      args.draw.read(keys, args.layout, place, sample, noise);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) z[i] = fma(std[i], noise[i], mean[i]);
      Access::store(args.z, args.layout, place, z, sample);
    } while (++sample < args.draw.samples);
  }
}

// d_s = temperature * d sigma / d s * sum over samples of d_z * noise. (d_mean is the sum of d_z: the caller's.)
template <class Access, bool exponential>
__global__ void __launch_bounds__(kThreads, Access::blocks)
    gaussian_rsample_bwd_kernel(const __grid_constant__ GaussianRsample<Access> args) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  Thread<typename Access::Index> thread(args.work);
  const PhiloxKeys<uint32_t> keys = args.draw.keys();
  for (auto group = thread.first; group < thread.end; group += Access::groups * thread.lanes) {
    auto place = Access::place(args.layout, thread, group);
    V s[n], d_z[n], noise[n], noisy[n] = {};
    Access::load(args.s, args.layout, place, s);
    uint32_t sample = 0;
    do {
      Access::load(args.d_z, args.layout, place, d_z, sample);
      args.draw.read(keys, args.layout, place, sample, noise);
      FASTELBO_UNROLL
      for (int i = 0; i < n; ++i) noisy[i] = fma(d_z[i], noise[i], noisy[i]);
    } while (++sample < args.draw.samples);
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) {
      V grad = args.draw.temperature * spread<exponential>(args.scale, s[i]).d_std * noisy[i];
      s[i] = clamp_gradient(args.scale, s[i], grad);
    }
    Access::store(args.d_s, args.layout, place, s);
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

Tensor gaussian_rsample_fwd(Tensor mean, Tensor s, std::optional<Tensor> seed, std::optional<Tensor> noise,
                            int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
                            std::vector<double> scale_numbers, std::optional<ScalarType> out_dtype) {
  Shape shape = broadcast_operands({{"mean", mean}, {"s", s}});
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, {"mean", mean});
  Launcher launch("gaussian_rsample_fwd", mean);
  ScalarType z_type = sample_type(out_dtype, mean);
  Tensor z = num_samples ? allocate(out, z_type, Device(mean)) : allocate(out, z_type, mean);
  Scale scale = parse_scale(scale_numbers);
  View mean_view(mean, shape), s_view(s, shape), z_view = View::of_samples(z, shape, num_samples);
  View noise_view = View::of_samples(noise, shape, num_samples);
  Plan plan(shape, 0, arithmetic_type({&mean, &s}), {scale}, noise ? std::nullopt : std::optional(noise_offset),
            num_samples, {&mean_view, &s_view, &z_view, &noise_view});
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianRsample<Access> args{plan.layout, plan.work};
    args.draw = draw<Access>(seed, noise_view, num_samples, temperature, z_view, plan);
    args.scale = typename Access::Scale(scale);
    args.mean = operand<Access>(mean_view, plan);
    args.s = operand<Access>(s_view, plan);
    args.z = operand<Access>(z_view, plan);
    launch(device::gaussian_rsample_fwd_kernel<Access, exponential.value>, args, plan.work.blocks);
  });
  return z;
}

// Returns d_s, of the shape of one sample.
Tensor gaussian_rsample_bwd(Tensor d_z, Tensor s, std::optional<Tensor> seed, std::optional<Tensor> noise,
                            int64_t noise_offset, std::optional<int64_t> num_samples, double temperature,
                            std::vector<double> scale_numbers) {
  Shape shape = sample_shape(d_z, num_samples);
  check_float("s", s.scalar_type());
  check_broadcasts("s", s, shape);
  Shape out = check_draw(seed, noise, noise_offset, num_samples, temperature, shape, {"s", s});
  check_upstream("d_z", d_z, out, {"s", s});
  Launcher launch("gaussian_rsample_bwd", s);
  ScalarType dtype = arithmetic_type({&d_z, &s});
  Tensor d_s = allocate_gradient(shape, s, dtype, Device(s));
  Scale scale = parse_scale(scale_numbers);
  View s_view(s, shape), d_s_view(d_s, shape), d_z_view = View::of_samples(d_z, shape, num_samples);
  View noise_view = View::of_samples(noise, shape, num_samples);
  Plan plan(shape, 0, dtype, {scale}, noise ? std::nullopt : std::optional(noise_offset), num_samples,
            {&s_view, &d_s_view, &d_z_view, &noise_view});
  dispatch(plan, [&](auto access, auto exponential) {
    using Access = decltype(access);
    device::GaussianRsample<Access> args{plan.layout, plan.work};
    args.draw = draw<Access>(seed, noise_view, num_samples, temperature, d_z_view, plan);
    args.scale = typename Access::Scale(scale);
    args.s = operand<Access>(s_view, plan);
    args.d_z = operand<Access>(d_z_view, plan);
    args.d_s = operand<Access>(d_s_view, plan);
    launch(device::gaussian_rsample_bwd_kernel<Access, exponential.value>, args, plan.work.blocks);
  });
  return d_s;
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(FASTELBO_NAMESPACE, CUDA, m) {
  fastelbo::implement(m, "gaussian_rsample_fwd", TORCH_BOX(&fastelbo::gaussian_rsample_fwd));
  fastelbo::implement(m, "gaussian_rsample_bwd", TORCH_BOX(&fastelbo::gaussian_rsample_bwd));
}
