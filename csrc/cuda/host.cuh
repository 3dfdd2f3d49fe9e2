// The host side of the CUDA ops: tensors in, kernels' arguments out.
#pragma once

#include <initializer_list>

#include <cuda_runtime_api.h>

#include "../common/host.h"
#include "noise.cuh"
#include "tile.cuh"

namespace fastelbo {

// A tensor as it is broadcast to the logical shape.
struct View {
  bool given = false;
  bool term = false;  // an elementwise term or its gradient: of the arithmetic type, whatever the storage of the others
  bool repeats = false;  // its kernel takes a single value a row, too
  char* data = nullptr;
  Format format = Format::f32;
  int64_t stride[kMaxDims] = {}, sample_stride = 0;  // in elements
  device::Varies varies = device::Varies::elements;  // where flat

  View() = default;
  View(const Tensor& tensor, const Shape& shape);
  View(const std::optional<Tensor>& tensor, const Shape& shape);
  // A sample, a gradient of one or given noise: with a dimension of samples in front where num_samples is given.
  static View of_samples(const std::optional<Tensor>& tensor, const Shape& shape, std::optional<int64_t> num_samples);
  // A term or its gradient, constant over the last event_ndim dimensions.
  static View of_term(const Tensor& tensor, const Shape& shape, int64_t event_ndim);
};

// How kernels go through their operands, whose strides it rewrites to those of the merged dimensions.
struct Plan {
  device::Layout layout;
  device::Work work;
  ScalarType dtype;  // of the arithmetic
  bool exponential, clamped;  // of the scales: all, any
  bool packed = false, flat = false;
  Format format = Format::f32;  // of the operands that are no terms, where packed or flat

  // The last event_ndim dimensions are summed; `summed`: something is over all of them. noise_offset: where noise is
  // drawn.
  Plan(const Shape& shape, int64_t event_ndim, ScalarType dtype, std::initializer_list<Scale> scales,
       std::optional<int64_t> noise_offset, std::optional<int64_t> num_samples, std::initializer_list<View*> views,
       bool summed = false);

 private:
  bool can_pack(std::initializer_list<View*> views, int64_t samples);
  bool can_flatten(std::initializer_list<View*> views, const Shape& shape, int64_t event_ndim, int64_t samples);
  void flatten(bool summed);
};

template <class Access>
typename Access::Operand operand(const View& view, const Plan& plan) {
  typename Access::Operand out;
  out.data = view.data;
  if constexpr (Access::flat) {
    out.sample_stride = view.sample_stride;
    out.varies = view.varies;
  } else if constexpr (Access::packed) {
    out.row_stride = plan.layout.outer ? view.stride[0] : 0;
    int64_t vector = view.format == Format::f32 ? 4 : 8;
    out.row_vectors = uint32_t(out.row_stride / vector);
    out.sample_vectors = uint32_t(view.sample_stride / vector);
    out.repeats = view.stride[plan.layout.outer] == 0;
  } else {
    out.format = view.format;
    out.sample_stride = view.sample_stride;
    std::copy(view.stride, view.stride + kMaxDims, out.stride);
  }
  return out;
}

template <class Access>
device::Draw<Access> draw(const std::optional<Tensor>& seed, const View& noise, std::optional<int64_t> num_samples,
                          double temperature, const View& sample, const Plan& plan) {
  auto value = seed ? static_cast<const int64_t*>(seed->data_ptr()) : nullptr;
  bool on_host = seed && seed->is_cpu();
  return {on_host ? nullptr : value,
          on_host ? uint64_t(*value) : 0,
          operand<Access>(noise, plan),
          uint32_t(num_samples.value_or(1)),
          typename Access::Value(temperature),
          sample.format == Format::bf16 || sample.format == Format::f16,
          noise.given};
}

template <template <Format, bool> class Access, bool clamped, class F>
void dispatch_format(const Plan& plan, F& f) {
  if (plan.format == Format::f32)
    f(FASTELBO_ACCESS(Access<Format::f32, clamped>)(), std::true_type());
  else if (plan.format == Format::bf16)
    f(Access<Format::bf16, clamped>(), std::true_type());
  else if constexpr (device::kTuning.all_kernels)
    f(Access<Format::f16, clamped>(), std::true_type());
}

template <template <Format, bool> class Access, class F>
void dispatch_vectors(const Plan& plan, F& f) {
  if (!plan.clamped)
    dispatch_format<Access, false>(plan, f);
  else if constexpr (device::kTuning.all_kernels)
    dispatch_format<Access, true>(plan, f);
}

// Calls f(an access, whether all scales are exponential), both as types. Scales that are not take the strided kernels,
// exponential ones mostly the packed or flat.
template <class F>
void dispatch(const Plan& plan, F&& f) {
  using device::Flat, device::Packed, device::Strided;
  if constexpr (!device::kTuning.all_kernels)
    STD_TORCH_CHECK((plan.packed || plan.flat) && plan.format != Format::f16 && !plan.clamped,
                    "this library has kernels of contiguous float32 and bfloat16 without a clamp alone");
  if (plan.packed) {
    dispatch_vectors<Packed>(plan, f);
  } else if (plan.flat) {
    dispatch_vectors<Flat>(plan, f);
  } else if constexpr (device::kTuning.all_kernels) {
    if (plan.dtype == ScalarType::Double && plan.exponential)
      f(Strided<double>(), std::true_type());
    else if (plan.dtype == ScalarType::Double)
      f(Strided<double>(), std::false_type());
    else if (plan.exponential)
      f(Strided<float>(), std::true_type());
    else
      f(Strided<float>(), std::false_type());
  }
}

// While it lives, torch's current device is the tensor's. Launches kernels on that device's current stream.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& on);
  ~Launcher();
  Launcher(const Launcher&) = delete;

  template <class Args>
  void operator()(void (*kernel)(Args), const Args& args, int64_t blocks, int threads = device::kThreads) const {
    if (blocks == 0) return;
    cudaLaunchConfig_t config = configuration(blocks, threads);
    check(cudaLaunchKernelEx(&config, kernel, args));
  }

 private:
  cudaLaunchConfig_t configuration(int64_t blocks, int threads) const;
  void check(cudaError_t error) const;

  const char* op_;
  CUDAGuardHandle guard_;
  cudaStream_t stream_;
};

// out[row] = the sum of partial[row, :] in a fixed order; out is of the arithmetic type.
void add_partials(const Launcher& launch, const Tensor& partial, int64_t rows, int64_t count, ScalarType dtype,
                  void* out);

// An elementwise term, or its sum over each row.
struct Terms {
  Tensor tensor;
  View elements;  // where elementwise
  std::optional<Tensor> partial;  // [rows, splits], where there are several

  // The last event_ndim dimensions of the shape are one event.
  Terms(const Shape& shape, int64_t event_ndim, ScalarType dtype, const Tensor& like);

  void make_room(const Plan& plan);
  template <class V>
  device::Sums<V> sums() const {
    if (elements.given) return {nullptr, nullptr};
    return {static_cast<V*>(tensor.data_ptr()), partial ? static_cast<double*>(partial->data_ptr()) : nullptr};
  }
  // Adds the partial sums up; the result.
  Tensor finish(const Launcher& launch, const Plan& plan);
};

}  // namespace fastelbo
