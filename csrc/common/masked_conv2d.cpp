#include "masked_conv2d.h"

namespace fastelbo {

Activation parse_activation(const std::string& name) {
  if (name.empty()) return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "elu") return Activation::elu;
  if (name == "tanh_sigmoid") return Activation::tanh_sigmoid;
  STD_TORCH_CHECK(name == "glu", "activation: got ", name);
  return Activation::glu;
}

Image image_of(const Tensor& tensor) {
  Image image;
  image.data = static_cast<char*>(tensor.data_ptr());
  image.format = format_of(tensor.scalar_type());
  auto strides = tensor.strides();
  std::copy(strides.begin(), strides.end(), image.stride);
  return image;
}

Image image_of(const std::optional<Tensor>& tensor) { return tensor ? image_of(*tensor) : Image(); }

bool is_channels_last(const Tensor& tensor) {
  return tensor.sizes()[1] > 1 && tensor.strides()[1] == 1 && tensor.strides()[3] > 1;
}

Tensor allocate_image(int64_t n, int64_t channels, const Tensor& like) {
  int64_t rows = like.sizes()[2], columns = like.sizes()[3], image = channels * rows * columns;
  Shape shape{n, channels, rows, columns};
  if (!is_channels_last(like)) return allocate(shape, like.scalar_type(), Device(like));
  const int64_t strides[] = {image, 1, channels * columns, channels};
  return allocate_strided(shape, strides, like.scalar_type(), Device(like));
}

Channels::Channels(int64_t channels, int64_t groups, const std::string& order, bool gated)
    : half(int(gated ? channels / 2 : channels)),
      halves(gated ? 2 : 1),
      groups(int(groups)),
      contiguous(order == "contiguous"),
      each(half / this->groups),
      rest(half % this->groups) {}

Mask::Mask(const Tensor& weight, const std::string& type, const std::string& stack, int64_t dilation, int64_t groups,
           const std::string& order, bool gated)
    : strict(type == "A"),
      out(weight.sizes()[0], groups, order, gated),
      in(weight.sizes()[1], groups, order, false),
      groups(int(groups)) {
  int rows = int(weight.sizes()[2]), columns = int(weight.sizes()[3]);
  int row = stack == "square" ? rows / 2 : rows - 1, column = stack == "horizontal" ? columns - 1 : columns / 2;
  bool vertical = stack == "vertical";
  for (int i = 0; i <= row; ++i) {
    for (int j = 0; j < columns; ++j) {
      bool live = i < row || (vertical ? type == "B" : j < column);
      if (live) taps.push_back({i, j, (i - row) * dilation, (j - column) * dilation});
    }
  }
  centre = !vertical && (type == "B" || groups > 1);
  centre_tap = {row, column, 0, 0};
  for (int c = 0; c < out.all(); ++c) group_out.push_back(out.group(c));
  for (int c = 0; c < in.all(); ++c) group_in.push_back(in.group(c));
  for (const Tap& tap : taps) {
    up = std::max(up, -tap.down);
    left = std::max(left, -tap.right);
    right = std::max(right, tap.right);
  }
}

}  // namespace fastelbo
