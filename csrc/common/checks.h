// What ops check of what they are given: callers of a raw op, as exported programs are, have no Python in front of it
// that has. The words are those of fastelbo/_checks.py.
#pragma once

#include <sstream>
#include <stdexcept>

#include "host.h"

namespace fastelbo {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string dtype_name(ScalarType dtype);
std::string device_name(Device device);
std::string sizes_text(const Shape& shape);
std::string sizes_text(const Tensor& tensor);

struct Given {
  const char* name;
  const Tensor* tensor;  // null: not given

  Given(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Given(const char* name, const std::optional<Tensor>& tensor) : name(name), tensor(pointer(tensor)) {}
};

inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}
void check_float(const char* name, ScalarType dtype);
// Of a tensor that kernels take as an array: contiguous, on the anchor's device.
void check_array(const char* name, const Tensor& tensor, ScalarType dtype, int ndim, const Given& anchor);
// anchor: the tensor that decides which device is right.
void check_device(const char* name, const Tensor& tensor, const char* anchor, Device device);

// The shape to which an op's tensors broadcast; the first is always given.
Shape broadcast_operands(std::initializer_list<Given> operands);

void check_broadcasts(const char* name, const Tensor& tensor, const Shape& shape);
void check_event_ndim(int64_t event_ndim, const Shape& shape);
// A prior has a mean, a scale and what the scale is; prior_grad: whether its gradient is wanted.
void check_prior(const std::optional<Tensor>& mean_p, const std::optional<Tensor>& s_p,
                 const std::optional<std::vector<double>>& scale_p, bool prior_grad = false);
void check_balance(std::optional<double> balance);
// The anchor is the tensor whose device all must be on.
void check_mask(const std::optional<Tensor>& mask, const Shape& shape, const Given& anchor);
// What decides a draw; returns the shape of the samples.
Shape check_draw(const std::optional<Tensor>& seed, const std::optional<Tensor>& noise, int64_t noise_offset,
                 std::optional<int64_t> num_samples, double temperature, const Shape& shape, const Given& anchor);
// The dtype of the samples: the mean's where none is asked for.
ScalarType sample_type(std::optional<ScalarType> out_dtype, const Tensor& mean);
// The shape of one sample, of which d_z is the gradient.
Shape sample_shape(const Tensor& d_z, std::optional<int64_t> num_samples);
// An upstream gradient, of a result of the given shape.
void check_upstream(const char* name, const Tensor& tensor, const Shape& shape, const Given& anchor);

struct SamplerTensors {
  const Tensor &program, &weights, &workspace;
};
// What a sampler's ops are given, as far as metadata tells. Whose program it is, nothing tells.
void check_sampler(const SamplerTensors& tensors, int64_t first, int64_t end);
void check_sampler_draw(const Tensor& workspace, const Tensor& image, const std::optional<Tensor>& known,
                        const Tensor& uniforms, const Tensor& values, const std::optional<Tensor>& seen,
                        double temperature);

// Registers a function for both overloads of an op (fastelbo/_library.py, define).
template <class Library, class Function>
void implement(Library& library, const std::string& name, Function function) {
  library.impl(name.c_str(), function);
  library.impl((name + ".kernel").c_str(), function);
}

}  // namespace fastelbo
