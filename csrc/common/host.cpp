#include "host.h"

#include <numeric>

#include "checks.h"

#if __has_include(<sys/single_threaded.h>)
#include <sys/single_threaded.h>
// The C++ library's shared_ptr reads this of glibc 2.32 and newer, to save atomic counts where there is one thread. Our
// own, hidden, says that there may be more, and the library runs on an older glibc, too.
decltype(__libc_single_threaded) __libc_single_threaded = false;
#endif

namespace fastelbo {

Scale parse_scale(const std::vector<double>& values) {
  if (values.empty() || values.size() > 10) refuse("scale must be of 1 to 10 numbers; got ", values.size());
  auto value = [&](size_t i, double otherwise) { return i < values.size() ? values[i] : otherwise; };
  auto check = [&](size_t i, bool valid, const char* name, const char* rule) {
    if (!valid) refuse("scale must have a ", name, " that is ", rule, "; got ", value(i, INFINITY));
  };
  auto counts = [&](size_t i, int count) {
    double x = value(i, 0);
    return x >= 0 && x < count && x == int(x);
  };
  auto finite = [&](size_t i) { return value(i, 0) >= 0 && std::isfinite(value(i, 0)); };
  check(0, counts(0, 5), "kind", "0, 1, 2, 3 or 4");
  Scale scale;
  scale.kind = Scale::Kind(int(values[0]));
  scale.clamp_lo = value(2, -INFINITY);
  scale.clamp_hi = value(3, INFINITY);
  if (values.size() == 1) return scale;  // the common case
  check(1, counts(1, 3), "clamp_grad", "0, 1 or 2");
  check(3, scale.clamp_lo < scale.clamp_hi, "clamp", "a lower limit below a higher one");
  check(4, finite(4), "soft_clamp", "at least 0 and finite");
  check(5, finite(5), "min_std", "at least 0 and finite");
  check(6, finite(6), "var_eps", "at least 0 and finite");
  check(7, value(7, 1) > 0 && std::isfinite(value(7, 1)), "beta", "positive and finite");
  scale.clamp_grad = Scale::ClampGrad(int(values[1]));
  scale.clamped = std::isfinite(scale.clamp_lo) || std::isfinite(scale.clamp_hi);
  scale.soft_clamp = value(4, 0);
  scale.inv_soft_clamp = scale.soft_clamp > 0 ? 1 / scale.soft_clamp : 0;
  scale.min_std = value(5, 0);
  scale.var_eps = value(6, 0);
  scale.beta = value(7, 1);
  scale.inv_beta = 1 / scale.beta;
  scale.log_beta = std::log(scale.beta);
  scale.unit = value(8, INFINITY);
  scale.unit_low = value(9, 0);
  scale.unit_own = std::sqrt(1 - scale.var_eps) - scale.min_std;
  scale.unit_slope = -std::expm1(-scale.beta * scale.unit_own);
  scale.unit_log_slope = std::log(scale.unit_slope);
  return scale;
}

Format format_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return Format::f32;
    case ScalarType::Double: return Format::f64;
    case ScalarType::BFloat16: return Format::bf16;
    case ScalarType::Half: return Format::f16;
    case ScalarType::Bool: return Format::u8;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16, float16 or bool");
  }
}

Shape::Shape(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() <= kMaxDims - 1, "expected at most ", kMaxDims - 1, " dimensions, got ", sizes.size());
  ndim = int(sizes.size());
  std::copy(sizes.begin(), sizes.end(), size);
}

Shape::Shape(std::initializer_list<int64_t> sizes) : ndim(int(sizes.size())) {
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

void broadcast_strides(const Tensor& tensor, const Shape& shape, int64_t reduced, int64_t* strides) {
  auto sizes = tensor.sizes(), own_strides = tensor.strides();
  int missing = shape.ndim - int(reduced) - int(sizes.size());
  for (int d = 0; d < shape.ndim; ++d) {
    int own = d - missing;
    bool varies = own >= 0 && own < int(sizes.size()) && sizes[own] != 1;
    strides[d] = varies ? own_strides[own] : 0;
  }
}

Device::Device(const Tensor& tensor) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
}

Tensor allocate_strided(const Shape& shape, const int64_t* strides, ScalarType dtype, Device device) {
  AtenTensorHandle handle;
  // The C shim costs a quarter of torch::stable::empty, which looks its operator up by name on every call.
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.ndim, shape.size, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      device.type, device.index, &handle));
  return Tensor(handle);
}

Tensor allocate(const Shape& shape, ScalarType dtype, Device device) {
  int64_t strides[kMaxDims], step = 1;
  for (int d = shape.ndim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(shape.size[d], 1);
  }
  return allocate_strided(shape, strides, dtype, device);
}

Tensor allocate(const Shape& shape, ScalarType dtype, const Tensor& like) {
  auto sizes = like.sizes(), order = like.strides();
  bool same = int(sizes.size()) == shape.ndim && std::equal(sizes.begin(), sizes.end(), shape.size);
  if (!same || like.is_contiguous()) return allocate(shape, dtype, Device(like));
  // Dense, dimensions in the order of their strides, as torch.empty_like has it: the innermost first, found by
  // insertion.
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
  return allocate_strided(shape, strides, dtype, Device(like));
}

Tensor allocate_gradient(const Shape& shape, const std::optional<Tensor>& of, ScalarType arithmetic, Device device,
                         bool wanted) {
  if (wanted) return allocate(shape, of->numel() == shape.numel() ? of->scalar_type() : arithmetic, *of);
  return allocate(Shape{0}, ScalarType::Float, device);
}

ScalarType arithmetic_type(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors)
    if (tensor && tensor->scalar_type() == ScalarType::Double) return ScalarType::Double;
  return ScalarType::Float;
}

}  // namespace fastelbo
