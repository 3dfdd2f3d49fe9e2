#include "masked_conv2d.h"

#include "checks.h"

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

void ConvolutionCheck::operand(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) const {
  auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == shape.size() && std::equal(sizes.begin(), sizes.end(), shape.begin()), name,
                  " must be of shape ", sizes_text(Shape(shape)), "; got ", sizes_text(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  Device own(tensor), others(input);
  STD_TORCH_CHECK(own.type == others.type && own.index == others.index, name, " must be on the device of input");
}

void ConvolutionCheck::layer() const {
  auto image = input.sizes(), kernel = weight.sizes();
  STD_TORCH_CHECK(image.size() == 4 && image[2] > 0 && image[3] > 0,
                  "input must be of shape [N, C, H, W] with at least one row and one column; got ", sizes_text(input));
  STD_TORCH_CHECK(format_of(input.scalar_type()) != Format::u8, "input must be float32, float64, bfloat16 or float16");
  STD_TORCH_CHECK(kernel.size() == 4 && weight.numel() > 0,
                  "weight must be of shape [C_out, C_in, rows, columns]; got ", sizes_text(weight));
  operand("weight", weight, {kernel[0], image[1], kernel[2], kernel[3]});
  bool square = stack == "square", vertical = stack == "vertical", horizontal = stack == "horizontal";
  if (!listed.empty()) {
    for (size_t i = 0; i < listed.size(); ++i)
      STD_TORCH_CHECK((i ? listed[i - 1] : -1) < listed[i] && listed[i] < kernel[2] * kernel[3],
                      "taps must be rising and below ", kernel[2] * kernel[3], "; got ", listed[i]);
    STD_TORCH_CHECK(square && groups == 1 && mask_type == "B",
                    "taps must come with mask_type B, the square stack and one group");
  }
  STD_TORCH_CHECK(square || vertical || horizontal, "stack must be square, vertical or horizontal; got ", stack);
  STD_TORCH_CHECK(!listed.empty() || (square && kernel[2] == kernel[3] && kernel[3] % 2) ||
                      (horizontal && kernel[2] == 1) || (vertical && kernel[3] % 2 && kernel[2] <= kernel[3] / 2 + 1),
                  "weight must have a kernel of the ", stack, " stack; got shape ", sizes_text(weight));
  STD_TORCH_CHECK(mask_type == "A" || mask_type == "B", "mask_type must be A or B; got ", mask_type);
  STD_TORCH_CHECK(order == "interleaved" || order == "contiguous",
                  "group_order must be interleaved or contiguous; got ", order);
  constexpr int64_t kMost = int64_t(1) << 31;
  STD_TORCH_CHECK(dilation >= 1 && dilation < kMost, "dilation must be from 1 on and below 2**31; got ", dilation);
  STD_TORCH_CHECK(groups >= 1 && groups < kMost, "channel_groups must be from 1 on and below 2**31; got ", groups);
  int64_t half = gated() ? kernel[0] / 2 : kernel[0];
  STD_TORCH_CHECK(order == "interleaved" || (image[1] % groups == 0 && half % groups == 0),
                  "channel_groups must divide the channels in contiguous order; got ", groups);
  STD_TORCH_CHECK(!gated() || kernel[0] % 2 == 0, "weight must have an even number of output channels for ", activation,
                  "; got ", kernel[0]);
}

void ConvolutionCheck::forward(const std::optional<Tensor>& bias, const std::optional<Tensor>& cond,
                               const std::optional<Tensor>& residual) const {
  layer();
  auto image = input.sizes();
  int64_t z_channels = weight.sizes()[0];
  if (bias) operand("bias", *bias, {z_channels});
  if (cond && cond->sizes().size() == 2)
    operand("cond", *cond, {image[0], z_channels});
  else if (cond)
    operand("cond", *cond, {image[0], z_channels, image[2], image[3]});
  if (residual) operand("residual", *residual, {image[0], gated() ? z_channels / 2 : z_channels, image[2], image[3]});
}

void ConvolutionCheck::backward(const Tensor& d_y, const std::optional<Tensor>& kept, int64_t cond_ndim) const {
  layer();
  auto image = input.sizes();
  int64_t z_channels = weight.sizes()[0];
  operand("d_y", d_y, {image[0], gated() ? z_channels / 2 : z_channels, image[2], image[3]});
  STD_TORCH_CHECK(kept || activation.empty(), "kept must be given with an activation; got none");
  if (kept) operand("kept", *kept, {image[0], z_channels, image[2], image[3]});
  STD_TORCH_CHECK(cond_ndim == 0 || cond_ndim == 2 || cond_ndim == 4, "cond_ndim must be 0, 2 or 4; got ", cond_ndim);
}

Channels::Channels(int64_t channels, int64_t groups, const std::string& order, bool gated)
    : half(int(gated ? channels / 2 : channels)),
      halves(gated ? 2 : 1),
      groups(int(groups)),
      contiguous(order == "contiguous"),
      each(half / this->groups),
      rest(half % this->groups) {}

LiveTaps::LiveTaps(const Tensor& weight, const Tensor& input, const std::string& type, const std::string& stack,
                   int64_t dilation, int64_t groups, const std::string& order, bool gated,
                   const std::vector<int64_t>& listed)
    : strict(type == "A"),
      out(weight.sizes()[0], groups, order, gated),
      in(weight.sizes()[1], groups, order, false),
      groups(int(groups)),
      list(!listed.empty()) {
  int rows = int(weight.sizes()[2]), columns = int(weight.sizes()[3]);
  int row = stack == "square" ? rows / 2 : rows - 1, column = stack == "horizontal" ? columns - 1 : columns / 2;
  bool vertical = stack == "vertical";
  auto first_within = [&](int reach, int64_t size) { return int(std::max<int64_t>(reach - (size - 1) / dilation, 0)); };
  first_row = first_within(row, input.sizes()[2]);
  end_row = list ? rows - first_within(rows - 1 - row, input.sizes()[2]) : row + 1;
  first_column = first_within(column, input.sizes()[3]);
  end_column = columns - first_within(columns - 1 - column, input.sizes()[3]);
  for (int i = first_row; i < end_row; ++i) {
    for (int j = first_column; j < end_column; ++j) {
      bool live = list ? std::binary_search(listed.begin(), listed.end(), int64_t(i) * columns + j)
                       : i < row || (vertical ? type == "B" : j < column);
      if (live) taps.push_back({i, j, (i - row) * dilation, (j - column) * dilation});
    }
  }
  centre = !list && !vertical && (type == "B" || groups > 1);
  centre_tap = {row, column, 0, 0};
  for (int c = 0; c < out.all(); ++c) group_out.push_back(out.group(c));
  for (int c = 0; c < in.all(); ++c) group_in.push_back(in.group(c));
  for (const Tap& tap : taps) {
    up = std::max(up, -tap.down);
    down = std::max(down, tap.down);
    left = std::max(left, -tap.right);
    right = std::max(right, tap.right);
  }
}

}  // namespace fastelbo
