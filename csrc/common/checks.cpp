#include "checks.h"

#include "sampling.h"

namespace fastelbo {

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::ComplexHalf: return "torch.complex32";
    case ScalarType::ComplexFloat: return "torch.complex64";
    case ScalarType::ComplexDouble: return "torch.complex128";
    case ScalarType::Bool: return "torch.bool";
    default: return "dtype " + std::to_string(int(dtype));
  }
}

std::string device_name(Device device) {
  if (device.type == aoti_torch_device_type_cpu()) return "cpu";
  if (device.type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device.index);
  return "device type " + std::to_string(device.type);
}

namespace {

std::string sizes_text(const int64_t* sizes, size_t ndim) {
  std::ostringstream text;
  text << '(';
  for (size_t d = 0; d < ndim; ++d) text << sizes[d] << (d + 1 < ndim ? ", " : ndim == 1 ? "," : "");
  text << ')';
  return text.str();
}

bool same(Device a, Device b) { return a.type == b.type && a.index == b.index; }

bool on(const Tensor& tensor, Device device) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  static const int32_t cpu = aoti_torch_device_type_cpu();
  return type == device.type && (type == cpu || same(Device(tensor), device));
}

// torch's headers ask for the number of one dtype after another until they meet a tensor's.
int32_t dtype_number(const Tensor& tensor) {
  int32_t number;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

bool has_floats(const Tensor& tensor) {
  static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                       bf16 = aoti_torch_dtype_bfloat16(), f16 = aoti_torch_dtype_float16();
  int32_t number = dtype_number(tensor);
  return number == f32 || number == bf16 || number == f16 || number == f64;
}

// Whether a tensor broadcasts to a shape, and does not widen it.
bool broadcasts_to(const Tensor& tensor, const Shape& shape) {
  auto sizes = tensor.sizes();
  int missing = shape.ndim - int(sizes.size());
  if (missing < 0) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && sizes[d] != shape.size[missing + d]) return false;
  return true;
}

}  // namespace

std::string sizes_text(const Shape& shape) { return sizes_text(shape.size, shape.ndim); }
std::string sizes_text(const Tensor& tensor) { return sizes_text(tensor.sizes().data(), tensor.sizes().size()); }

void check_float(const char* name, ScalarType dtype) {
  if (!is_float(dtype)) refuse(name, " must be float32, float64, bfloat16 or float16; got ", dtype_name(dtype));
}

void check_device(const char* name, const Tensor& tensor, const char* anchor, Device device) {
  if (!on(tensor, device))
    refuse(name, " must be on the device of ", anchor, ", ", device_name(device), "; got ",
           device_name(Device(tensor)));
}

Shape broadcast_operands(std::initializer_list<Given> operands) {
  const Given& anchor = *operands.begin();
  Device device(*anchor.tensor);
  Shape shape{};
  const char* widest = anchor.name;
  for (const Given& given : operands) {
    if (!given.tensor) continue;
    const Tensor& tensor = *given.tensor;
    if (!has_floats(tensor)) check_float(given.name, tensor.scalar_type());
    check_device(given.name, tensor, anchor.name, device);
    auto sizes = tensor.sizes();
    int ndim = int(sizes.size());
    if (ndim == shape.ndim && std::equal(sizes.begin(), sizes.end(), shape.size)) continue;
    if (ndim > kMaxDims - 1) refuse(given.name, " must have at most ", kMaxDims - 1, " dimensions; got ", ndim);
    Shape before = shape;
    const char* named = widest;
    if (ndim > shape.ndim) {
      std::copy_backward(shape.size, shape.size + shape.ndim, shape.size + ndim);
      std::fill(shape.size, shape.size + ndim - shape.ndim, 1);
      shape.ndim = ndim;
      widest = given.name;
    }
    for (int d = 1; d <= ndim; ++d) {
      int64_t& mine = shape.size[shape.ndim - d];
      int64_t theirs = sizes[ndim - d];
      if (mine == theirs || theirs == 1) continue;
      if (mine != 1)
        refuse(given.name, " must broadcast with ", named, " of shape ", sizes_text(before), "; got ",
               sizes_text(tensor));
      mine = theirs;
      widest = given.name;
    }
  }
  return shape;
}

void check_broadcasts(const char* name, const Tensor& tensor, const Shape& shape) {
  if (!broadcasts_to(tensor, shape))
    refuse(name, " must broadcast to shape ", sizes_text(shape), "; got ", sizes_text(tensor));
}

void check_event_ndim(int64_t event_ndim, const Shape& shape) {
  if (event_ndim < 0 || event_ndim > shape.ndim)
    refuse("event_ndim must be between 0 and ", shape.ndim, " for shape ", sizes_text(shape), "; got ", event_ndim);
}

void check_prior(const std::optional<Tensor>& mean_p, const std::optional<Tensor>& s_p,
                 const std::optional<std::vector<double>>& scale_p, bool prior_grad) {
  if (mean_p.has_value() != s_p.has_value())
    refuse("mean_p and s_p must both be given, or neither; got no ", mean_p ? "s_p" : "mean_p");
  if (mean_p.has_value() != scale_p.has_value())
    refuse("scale_p must come with mean_p and s_p; got ", mean_p ? "none" : "it alone");
  if (prior_grad && !mean_p) refuse("prior_grad must come with mean_p and s_p; got it alone");
}

void check_balance(std::optional<double> balance) {
  if (balance && !(*balance >= 0 && *balance <= 1)) refuse("balance must be between 0 and 1; got ", *balance);
}

void check_mask(const std::optional<Tensor>& mask, const Shape& shape, const Given& anchor) {
  if (!mask) return;
  static const int32_t boolean = aoti_torch_dtype_bool();
  if (dtype_number(*mask) != boolean) refuse("mask must be a tensor of bool; got ", dtype_name(mask->scalar_type()));
  check_device("mask", *mask, "the other tensors", Device(*anchor.tensor));
  check_broadcasts("mask", *mask, shape);
}

Shape check_draw(const std::optional<Tensor>& seed, const std::optional<Tensor>& noise, int64_t noise_offset,
                 std::optional<int64_t> num_samples, double temperature, const Shape& shape, const Given& anchor) {
  if (num_samples && *num_samples < 1) refuse("num_samples must be at least 1; got ", *num_samples);
  if (num_samples && *num_samples >> 32)
    refuse("num_samples must be below 2**32, the samples of a seed; got ", *num_samples);
  if (!std::isfinite(temperature)) refuse("temperature must be finite; got ", temperature);
  if (noise_offset < 0) refuse("noise_offset must be at least 0; got ", noise_offset);
  if (seed.has_value() == noise.has_value())
    refuse("seed or noise must be given, and not both; got ", seed ? "both" : "neither");
  Shape samples = shape.prepend(num_samples);
  if (seed) {
    static const int32_t i64 = aoti_torch_dtype_int64();
    if (dtype_number(*seed) != i64)
      refuse("seed must be an int or an int64 tensor; got ", dtype_name(seed->scalar_type()));
    if (seed->numel() != 1) refuse("seed must have one element; got shape ", sizes_text(*seed));
    if (!seed->is_cpu()) check_device("seed", *seed, "mean", Device(*anchor.tensor));  // kernels may take its value
  } else {
    ScalarType dtype = noise->scalar_type();
    if (!is_float(dtype))
      refuse("noise must be a tensor of float32, float64, bfloat16 or float16; got ", dtype_name(dtype));
    check_device("noise", *noise, "mean", Device(*anchor.tensor));
    if (!broadcasts_to(*noise, samples))
      refuse("noise must broadcast to the sample's shape ", sizes_text(samples), "; got ", sizes_text(*noise));
  }
  return samples;
}

ScalarType sample_type(std::optional<ScalarType> out_dtype, const Tensor& mean) {
  if (!out_dtype) return mean.scalar_type();
  check_float("out_dtype", *out_dtype);
  return *out_dtype;
}

Shape sample_shape(const Tensor& d_z, std::optional<int64_t> num_samples) {
  auto sizes = d_z.sizes();
  int leading = num_samples ? 1 : 0, ndim = int(sizes.size()) - leading;
  if (ndim < 0 || (leading && sizes[0] != *num_samples))
    refuse("d_z must have num_samples in front, ", *num_samples, "; got shape ", sizes_text(d_z));
  if (ndim > kMaxDims - 1) refuse("d_z must have at most ", kMaxDims - 1 + leading, " dimensions; got ", sizes.size());
  Shape shape{};
  shape.ndim = ndim;
  std::copy(sizes.begin() + leading, sizes.end(), shape.size);
  return shape;
}

void check_upstream(const char* name, const Tensor& tensor, const Shape& shape, const Given& anchor) {
  if (!has_floats(tensor)) check_float(name, tensor.scalar_type());
  check_device(name, tensor, "the other tensors", Device(*anchor.tensor));
  auto sizes = tensor.sizes();
  if (int(sizes.size()) != shape.ndim || !std::equal(sizes.begin(), sizes.end(), shape.size))
    refuse(name, " must be of shape ", sizes_text(shape), "; got ", sizes_text(tensor));
}

void check_array(const char* name, const Tensor& tensor, ScalarType dtype, int ndim, const Given& anchor) {
  ScalarType found = tensor.scalar_type();
  if (found != dtype) refuse(name, " must be ", dtype_name(dtype), "; got ", dtype_name(found));
  check_device(name, tensor, anchor.name, Device(*anchor.tensor));
  if (int(tensor.sizes().size()) != ndim || !tensor.is_contiguous())
    refuse(name, " must be contiguous, of ", ndim, " dimensions; got shape ", sizes_text(tensor), " and strides ",
           sizes_text(tensor.strides().data(), tensor.strides().size()));
}

void check_sampler(const SamplerTensors& tensors, int64_t first, int64_t end) {
  Given anchor("workspace", tensors.workspace);
  check_array("workspace", tensors.workspace, ScalarType::Float, 2, anchor);
  check_array("program", tensors.program, ScalarType::Long, 1, anchor);
  check_array("weights", tensors.weights, ScalarType::Float, 1, anchor);
  constexpr int64_t kHeader = sizeof(sampler::Header) / sizeof(int64_t);
  if (tensors.program.numel() < kHeader)
    refuse("program must have a header of ", kHeader, " numbers; got shape ", sizes_text(tensors.program));
  if (first < 0 || end < first) refuse("first and end must be steps in order; got ", first, " and ", end);
}

void check_sampler_draw(const Tensor& workspace, const Tensor& image, const std::optional<Tensor>& known,
                        const Tensor& uniforms, const Tensor& values, const std::optional<Tensor>& seen,
                        double temperature) {
  Given anchor("workspace", workspace);
  check_array("image", image, ScalarType::Long, 4, anchor);
  check_array("uniforms", uniforms, ScalarType::Float, 4, anchor);
  check_array("values", values, ScalarType::Float, 1, anchor);
  Shape shape(image);
  if (shape.size[0] != workspace.sizes()[0])
    refuse("image must be of the ", workspace.sizes()[0], " images of workspace; got shape ", sizes_text(image));
  auto same_shape = [&](const char* name, const Tensor& tensor) {
    auto sizes = tensor.sizes();
    if (!std::equal(sizes.begin(), sizes.begin() + 4, shape.size))
      refuse(name, " must be of the shape of image, ", sizes_text(image), "; got ", sizes_text(tensor));
  };
  same_shape("uniforms", uniforms);
  if (known) {
    check_array("known", *known, ScalarType::Bool, 4, anchor);
    same_shape("known", *known);
  }
  if (seen) {
    check_array("seen", *seen, ScalarType::Float, 5, anchor);
    same_shape("seen", *seen);
  }
  if (!(temperature >= 0)) refuse("temperature must be at least 0; got ", temperature);
}

}  // namespace fastelbo
