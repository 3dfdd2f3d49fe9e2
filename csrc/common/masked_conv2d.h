// What describes a masked convolution, on every device.
#pragma once

#include "host.h"

#if defined(__CUDACC__)
#define FASTELBO_HOST_DEVICE __host__ __device__
#else
#define FASTELBO_HOST_DEVICE
#endif

namespace fastelbo {

enum class Activation { none, relu, elu, tanh_sigmoid, glu };
Activation parse_activation(const std::string& name);
// Whether it joins two halves of the channels.
FASTELBO_HOST_DEVICE inline bool is_gate(Activation activation) { return activation >= Activation::tanh_sigmoid; }

// An image of shape [n, channels, rows, columns] in any format, or none.
struct Image {
  char* data = nullptr;
  Format format = Format::f32;
  int64_t stride[4] = {};  // in elements
  explicit operator bool() const { return data != nullptr; }
  int64_t at(int64_t n, int64_t c, int64_t row) const { return n * stride[0] + c * stride[1] + row * stride[2]; }
};
// A tensor of fewer dimensions has strides for those alone.
Image image_of(const Tensor& tensor);
Image image_of(const std::optional<Tensor>& tensor);

// As is_channels_last in the op's Python file.
bool is_channels_last(const Tensor& tensor);
// A new image in the memory format of another.
Tensor allocate_image(int64_t n, int64_t channels, const Tensor& like);

// Refuses what the loops would misread: operands of other ranks, sizes, dtypes or devices than the op's Python function
// hands on. Programs that were exported call the op itself.
struct ConvolutionCheck {
  const Tensor &input, &weight;
  const std::string &mask_type, &stack;
  int64_t dilation, groups;
  const std::string &order, &activation;
  const std::vector<int64_t>& listed;

  void forward(const std::optional<Tensor>& bias, const std::optional<Tensor>& cond,
               const std::optional<Tensor>& residual) const;
  void backward(const Tensor& d_y, const std::optional<Tensor>& kept, int64_t cond_ndim) const;

 private:
  void layer() const;
  bool gated() const { return is_gate(parse_activation(activation)); }
  void operand(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) const;
};

// How channels are numbered in groups; under a gate each half for itself.
struct Channels {
  int half = 0, halves = 1;  // the channels of a half, which are all where there is one
  int groups = 1;
  bool contiguous = false;   // and the groups divide a half
  int each = 0, rest = 0;    // half / groups and half % groups: a division takes twenty instructions on a GPU

  Channels() = default;
  Channels(int64_t channels, int64_t groups, const std::string& order, bool gated);
  FASTELBO_HOST_DEVICE int all() const { return half * halves; }
  FASTELBO_HOST_DEVICE int group(int channel) const {
    int c = channel % half;
    return contiguous ? int(int64_t(c) * groups / half) : c % groups;
  }
  // How many of a half are in groups first .. end - 1, and the i-th of them.
  FASTELBO_HOST_DEVICE int count(int first, int end) const {
    int last = rest < end ? rest : end;
    return each * (end - first) + (last > first ? last - first : 0);
  }
  FASTELBO_HOST_DEVICE int member(int first, int end, int i) const {
    return contiguous ? each * first + i : i / (end - first) * groups + first + i % (end - first);
  }
  // The i-th of a single group.
  FASTELBO_HOST_DEVICE int member(int group, int i) const { return contiguous ? each * group + i : i * groups + group; }
};

struct Tap {
  int row, column;    // in the weight
  int64_t down, right;  // of the pixel that it reads, from the output's
};

// Which taps are live, and for which channels. Those that reach into the image from no pixel are as if they were dead.
struct LiveTaps {
  int first_row = 0, end_row = 0, first_column = 0,
      end_column = 0;  // the part of the weight that reaches into the image
  std::vector<Tap> taps;  // those live for every pair of channels, in raster order: the first of that part, or a list
  bool centre = false;  // whether there is a further one, live for some pairs at least: that of the pixel itself
  Tap centre_tap;  // the next one in raster order, if it is
  bool strict = false;  // mask A: a channel must be of a lesser group, not of the same
  Channels out, in;
  std::vector<int> group_out, group_in;
  int groups = 1;
  bool list = false;
  int64_t up = 0, down = 0, left = 0, right = 0;  // how far the taps reach

  LiveTaps() = default;
  LiveTaps(const Tensor& weight, const Tensor& input, const std::string& type, const std::string& stack,
           int64_t dilation, int64_t groups, const std::string& order, bool gated, const std::vector<int64_t>& listed);
  int64_t sideways() const { return left > right ? left : right; }
  bool live(int64_t out, int64_t in) const {
    return strict ? group_in[in] < group_out[out] : group_in[in] <= group_out[out];
  }
};

}  // namespace fastelbo
