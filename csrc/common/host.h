// What the host side of the ops shares on every device. Talks to torch through its stable ABI only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "scale_params.h"

namespace fastelbo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kMaxDims = 16;

// A string of a schema. torch's own conversion to std::string, up to 2.13 at least, leaks it on every call.
struct Text : std::string {
  using std::string::string;
};

// From the schema's list: kind, clamp_grad, clamp_lo, clamp_hi, soft_clamp, min_std, var_eps, beta; trailing defaults
// are left out.
Scale parse_scale(const std::vector<double>& values);
inline Scale parse_scale(const std::optional<std::vector<double>>& values) {
  return values ? parse_scale(*values) : Scale();
}

enum class Format { f32, f64, bf16, f16, u8 };  // u8: a mask's
Format format_of(ScalarType dtype);

struct Shape {
  int ndim = 0;
  int64_t size[kMaxDims];

  explicit Shape(const Tensor& tensor);
  Shape(std::initializer_list<int64_t> sizes);
  // Widens this shape so that the tensor broadcasts against it. Python has checked that it does.
  Shape& broadcast(const Tensor& tensor);
  Shape& broadcast(const std::optional<Tensor>& tensor) { return tensor ? broadcast(*tensor) : *this; }
  int64_t numel() const;
  // The product of the last `ndim` sizes.
  int64_t trailing(int64_t ndim) const;
  Shape prepend(std::optional<int64_t> samples) const;
  Shape drop_leading(int n) const;
  Shape drop_trailing(int64_t n) const;
};

// The strides, in elements, of a tensor as it is broadcast to the logical shape less its last `reduced` dimensions,
// over which it is constant.
void broadcast_strides(const Tensor& tensor, const Shape& shape, int64_t reduced, int64_t* strides);

struct Device {
  int32_t type, index;

  explicit Device(const Tensor& tensor);
};

// A new tensor with the memory order of `like`, where that has the full shape, else contiguous; on the same device.
Tensor allocate(const Shape& shape, ScalarType dtype, const Tensor& like);
Tensor allocate(const Shape& shape, ScalarType dtype, Device device);
Tensor allocate_strided(const Shape& shape, const int64_t* strides, ScalarType dtype, Device device);
// The gradient of `of`, before it is summed to its shape: in the precision of the arithmetic where it will be, so that
// it is rounded once. An empty tensor where it is not wanted.
Tensor allocate_gradient(const Shape& shape, const std::optional<Tensor>& of, ScalarType arithmetic, Device device,
                         bool wanted = true);

// float64 if any tensor is, else float32.
ScalarType arithmetic_type(std::initializer_list<const Tensor*> tensors);
inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// What reaches q and p of a KL's gradient: all of it, or shares by fastelbo.gaussian_kl's balance.
template <class Real>
struct Shares {
  Real q = 1, p = 1;

  Shares() = default;
  explicit Shares(std::optional<double> balance) : q(Real(1 - balance.value_or(0))), p(Real(balance.value_or(1))) {}
};

}  // namespace fastelbo

template <>
struct torch::stable::detail::ToImpl<fastelbo::Text> {
  static fastelbo::Text call(StableIValue value, uint64_t, bool) {
    StringHandle handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fastelbo::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
