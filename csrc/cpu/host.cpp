#include "host.h"

#include <cstdlib>
#include <cstring>
#include <numeric>

namespace fastelbo {

Isa isa() {
  static const Isa best = [] {
    Isa found = Isa::portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = Isa::avx2;
    if (found == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      found = Isa::avx512;
#endif
    if (const char* wanted = std::getenv("FASTELBO_CPU_ISA")) {
      Isa limit = !std::strcmp(wanted, "portable") ? Isa::portable
                  : !std::strcmp(wanted, "avx2")   ? Isa::avx2
                                                   : Isa::avx512;
      found = std::min(found, limit);
    }
    return found;
  }();
  return best;
}

Operand::Operand(const Tensor& tensor, const Shape& shape, int64_t reduced) {
  given = true;
  data = static_cast<char*>(tensor.data_ptr());
  format = format_of(tensor.scalar_type());
  int64_t strides[kMaxDims];
  broadcast_strides(tensor, shape, reduced, strides);
  ndim = 0;
  for (int d = 0; d < shape.ndim; ++d) {
    int64_t n = shape.size[d], step = strides[d];
    if (n == 1) continue;
    if (ndim > 0 && stride[ndim - 1] == step * n) {
      size[ndim - 1] *= n;
      stride[ndim - 1] = step;
    } else {
      size[ndim] = n;
      stride[ndim++] = step;
    }
  }
  if (ndim == 0) {
    size[0] = 1;
    stride[0] = 1;
    ndim = 1;
  }
}

Operand::Operand(const std::optional<Tensor>& tensor, const Shape& shape) {
  if (tensor) *this = Operand(*tensor, shape);
}

Noise::Noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, int64_t offset,
             std::optional<int64_t> num_samples, double temperature, const Shape& shape)
    : given(noise, shape.prepend(num_samples)),
      offset(offset),
      samples(num_samples.value_or(1)),
      temperature(temperature) {
  if (seed) this->seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
}

Tiling event_tiling(const Shape& shape, int64_t event_ndim) {
  if (event_ndim == 0) return {1, shape.numel()};
  int64_t columns = shape.trailing(event_ndim);
  return {shape.drop_trailing(event_ndim).numel(), columns};
}

Terms::Terms(const Shape& shape, int64_t event_ndim, ScalarType dtype, const Tensor& like, const Tiling& tiling)
    : tensor(event_ndim == 0 ? allocate(shape, dtype, like)
                             : allocate(shape.drop_trailing(event_ndim), dtype, Device(like))) {
  if (event_ndim == 0) {
    elements = Operand(tensor, shape);
    return;
  }
  sums = tensor.data_ptr();
  if (tiling.chunks_per_row > 1) partial.resize(tiling.tiles());
}

void store_total(const std::vector<double>& partial, size_t first, size_t count, ScalarType dtype, void* out,
                 int64_t at) {
  double total = std::accumulate(partial.begin() + first, partial.begin() + first + count, 0.0);
  if (dtype == ScalarType::Double)
    static_cast<double*>(out)[at] = total;
  else
    static_cast<float*>(out)[at] = float(total);
}

Tensor Terms::finish(ScalarType dtype, const Tiling& tiling) {
  for (size_t first = 0; first < partial.size(); first += tiling.chunks_per_row) {
    store_total(partial, first, tiling.chunks_per_row, dtype, sums, first / tiling.chunks_per_row);
  }
  return tensor;
}

int64_t cpu_isa() { return int64_t(isa()); }

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&fastelbo::cpu_isa)); }
