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
      Isa limit = !std::strcmp(wanted, "portable") ? Isa::portable : !std::strcmp(wanted, "avx2") ? Isa::avx2 : Isa::avx512;
      found = std::min(found, limit);
    }
    return found;
  }();
  return best;
}

Scale parse_scale(const std::vector<double>& values) {
  STD_TORCH_CHECK(values.size() >= 1 && values.size() <= 8, "scale: expected 1 to 8 numbers, got ", values.size());
  auto value = [&](size_t i, double otherwise) { return i < values.size() ? values[i] : otherwise; };
  Scale scale;
  scale.kind = Scale::Kind(int(values[0]));
  scale.clamp_grad = Scale::ClampGrad(int(value(1, 0)));
  scale.clamp_lo = value(2, -INFINITY);
  scale.clamp_hi = value(3, INFINITY);
  scale.clamped = std::isfinite(scale.clamp_lo) || std::isfinite(scale.clamp_hi);
  scale.soft_clamp = value(4, 0);
  scale.min_std = value(5, 0);
  scale.var_eps = value(6, 0);
  scale.beta = value(7, 1);
  scale.log_beta = std::log(scale.beta);
  return scale;
}

Format format_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Format::f32;
    case ScalarType::Double: return Format::f64;
    case ScalarType::BFloat16: return Format::bf16;
    case ScalarType::Half: return Format::f16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

Shape::Shape(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() <= kMaxDims - 1, "expected at most ", kMaxDims - 1, " dimensions, got ", sizes.size());
  ndim = int(sizes.size());
  std::copy(sizes.begin(), sizes.end(), size);
}

Shape& Shape::broadcast(const Tensor& tensor) {
  Shape other(tensor);
  if (other.ndim > ndim) std::swap(*this, other);
  for (int d = 1; d <= other.ndim; ++d) {
    int64_t& mine = size[ndim - d];
    int64_t theirs = other.size[other.ndim - d];
    STD_TORCH_CHECK(mine == theirs || mine == 1 || theirs == 1, "sizes ", mine, " and ", theirs, " do not broadcast");
    if (mine == 1) mine = theirs;
  }
  return *this;
}

int64_t Shape::numel() const { return trailing(ndim); }

int64_t Shape::trailing(int64_t n) const {
  return std::accumulate(size + ndim - n, size + ndim, int64_t(1), std::multiplies<int64_t>());
}

Shape Shape::prepend(std::optional<int64_t> samples) const {
  Shape out = *this;
  if (samples) {
    out.ndim = ndim + 1;
    out.size[0] = *samples;
    std::copy(size, size + ndim, out.size + 1);
  }
  return out;
}

Shape Shape::drop_leading(int n) const {
  Shape out = *this;
  out.ndim = ndim - n;
  std::copy(size + n, size + ndim, out.size);
  return out;
}

Shape Shape::drop_trailing(int64_t n) const {
  Shape out = *this;
  out.ndim = ndim - int(n);
  return out;
}

Operand::Operand(const Tensor& tensor, const Shape& shape, int64_t reduced) {
  given = true;
  data = static_cast<char*>(tensor.data_ptr());
  format = format_of(tensor.scalar_type());
  auto sizes = tensor.sizes(), strides = tensor.strides();
  int missing = shape.ndim - int(reduced) - int(sizes.size());
  ndim = 0;
  for (int d = 0; d < shape.ndim; ++d) {
    int own = d - missing;
    bool varies = own >= 0 && own < int(sizes.size()) && sizes[own] != 1;
    int64_t n = shape.size[d], step = varies ? strides[own] : 0;
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

namespace {

Tensor empty_strided(const Shape& shape, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  // The C shim costs a quarter of torch::stable::empty, which looks its operator up by name on every call.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.ndim, shape.size, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace

Tensor allocate(const Shape& shape, ScalarType dtype) {
  int64_t strides[kMaxDims], step = 1;
  for (int d = shape.ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(shape.size[d], 1);
  }
  return empty_strided(shape, strides, dtype);
}

Tensor allocate(const Shape& shape, ScalarType dtype, const Tensor& like) {
  auto sizes = like.sizes(), order = like.strides();
  bool same = int(sizes.size()) == shape.ndim && std::equal(sizes.begin(), sizes.end(), shape.size);
  if (!same || like.is_contiguous()) return allocate(shape, dtype);
  // Dense, dimensions in the order of their strides, as torch.empty_like has it: the innermost first, found by insertion.
  int perm[kMaxDims];
  auto outer = [&](int a, int b) {  // > 0: a encloses b; 0: undecided
    if (order[a] == 0 || order[b] == 0) return 0;
    if (order[a] != order[b]) return order[a] > order[b] ? 1 : -1;
    return sizes[a] > sizes[b] ? 1 : 0;
  };
  for (int d = 0; d < shape.ndim; ++d) {
    perm[d] = shape.ndim - 1 - d;
    for (int at = d, below = d - 1; below >= 0; --below) {
      int relation = outer(perm[below], perm[at]);
      if (relation < 0) break;
      if (relation > 0) {
        std::swap(perm[below], perm[at]);
        at = below;
      }
    }
  }
  int64_t strides[kMaxDims], step = 1;
  for (int d = 0; d < shape.ndim; ++d) {
    strides[perm[d]] = step;
    step *= std::max<int64_t>(shape.size[perm[d]], 1);
  }
  return empty_strided(shape, strides, dtype);
}

Tensor allocate_gradient(const Shape& shape, const std::optional<Tensor>& of, bool wanted) {
  if (wanted) return allocate(shape, of->scalar_type(), *of);
  Shape empty = shape;
  empty.ndim = 1;
  empty.size[0] = 0;
  return allocate(empty, ScalarType::Float);
}

ScalarType arithmetic_type(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors)
    if (tensor && tensor->scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

Noise::Noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, int64_t offset,
             std::optional<int64_t> num_samples, double temperature, const Shape& shape)
    : given(noise, shape.prepend(num_samples)), offset(offset), samples(num_samples.value_or(1)), temperature(temperature) {
  if (seed) this->seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
}

Tiling event_tiling(const Shape& shape, int64_t event_ndim) {
  if (event_ndim == 0) return {1, shape.numel()};
  int64_t columns = shape.trailing(event_ndim);
  return {shape.drop_trailing(event_ndim).numel(), columns};
}

Terms::Terms(const Shape& shape, int64_t event_ndim, ScalarType dtype, const Tensor& like, const Tiling& tiling)
    : tensor(event_ndim == 0 ? allocate(shape, dtype, like) : allocate(shape.drop_trailing(event_ndim), dtype)) {
  if (event_ndim == 0) {
    elements = Operand(tensor, shape);
    return;
  }
  sums = tensor.data_ptr();
  if (tiling.chunks_per_row > 1) partial.resize(tiling.tiles());
}

void store_total(const std::vector<double>& partial, size_t first, size_t count, ScalarType dtype, void* out, int64_t at) {
  double total = std::accumulate(partial.begin() + first, partial.begin() + first + count, 0.0);
  if (dtype == ScalarType::Double) static_cast<double*>(out)[at] = total;
  else static_cast<float*>(out)[at] = float(total);
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
