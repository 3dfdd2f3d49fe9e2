// Masked convolutions over live taps only: output, input gradient and weight gradient.
//
// A convolution is a product of matrices, of the input at every (pixel, pair) with the weights at every (pair, output
// channel), where a pair is an input channel and one of its live taps. Masks, channel groups, stacks and dilation are
// only which pairs there are: a dead tap is none. Blocks make tiles of the product from chunks of pairs in shared
// memory. The input gradient is the same with the taps' directions negated and the weights transposed; the weight
// gradient sums the products of the input at every (pixel, pair) with the gradient at every (pixel, output channel)
// over the pixels.
//
// The kernels, masked_conv2d_<name>_kernel but for convolve, which is masked_conv2d_kernel, in the order in which they
// run: what they read and write, their grid (a block for each), the threads of a block, and the KiB of shared memory
// that a block takes for float32, halves and float64.
//
//   name        reads                  writes                 grid                                  threads  KiB
//
//   forward (masked_conv2d.cuh)
//   pack        weight                 packed weights, pairs  256 of the packed weights             256      0
//   convolve    input, both of these;  y, kept                tiles of pixels x tiles of channels:  128      47, 35, 35
//               bias, cond, residual                          64, or 16 where groups are narrow              38, 21, 39
//
//   backward (the two above, and masked_conv2d_bwd.cuh)
//   activation  d_y, kept              d_z, slices' sums      images x slices of 256 pixels x 32    256      4
//                                                             channels (8 where pixels are inner)
//   sum         slices' sums           d_bias; d_cond [n, c]  elements of the result                256      0.1
//   pack        weight                 packed weights, pairs  256 of the packed weights             256      0
//   convolve    d_z, both of these     d_input                as in the forward                     128
//   weight      input, d_z             shares of d_weight     tiles of pairs x tiles of 64          128      35, 19, 27
//                                                             channels x splits of the pixels
//   reduce      these shares           d_weight               taps x input channels x 32 outputs    256      2
#include "../common/checks.h"
#include "masked_conv2d_bwd.cuh"

namespace fastelbo {

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(the format, as a type).
template <class F>
void with_format(Format format, F&& f) {
  switch (format) {
    case Format::f32: return f(std::integral_constant<Format, Format::f32>());
    case Format::f64: return f(std::integral_constant<Format, Format::f64>());
    case Format::bf16: return f(std::integral_constant<Format, Format::bf16>());
    default: return f(std::integral_constant<Format, Format::f16>());
  }
}

// What the forward and the backward have in common.
struct Problem {
  int64_t n, rows, columns, z_channels;
  Activation activation;
  LiveTaps mask;
  device::Raster raster;
  device::Kernel kernel;
  Image weight;
  Format format;
  ScalarType dtype;  // of the arithmetic
  Device device;

  Problem(const Tensor& input, const Tensor& weight, const std::string& mask_type, const std::string& stack,
          int64_t dilation, int64_t groups, const std::string& order, const std::string& activation,
          const std::vector<int64_t>& listed)
      : n(input.sizes()[0]),
        rows(input.sizes()[2]),
        columns(input.sizes()[3]),
        z_channels(weight.sizes()[0]),
        activation(parse_activation(activation)),
        mask(weight, input, mask_type, stack, dilation, groups, order, is_gate(this->activation), listed),
        raster(n, rows, columns),
        weight(image_of(weight)),
        format(format_of(input.scalar_type())),
        dtype(arithmetic_type({&input})),
        device(input) {
    STD_TORCH_CHECK(rows < -device::kNever && columns < -device::kNever,
                    "input: expected fewer than 2^30 rows and columns, got ", rows, " and ", columns);
    const Tap& centre = mask.centre_tap;
    kernel = {mask.end_column - mask.first_column,
              centre.row - mask.first_row,
              centre.column - mask.first_column,
              int(dilation),
              mask.first_row,
              mask.first_column,
              int(weight.sizes()[2] * weight.sizes()[3]),
              int(weight.sizes()[3])};
    if (!mask.list) return;
    STD_TORCH_CHECK(mask.taps.size() <= device::kMostListed, "taps: expected at most ", device::kMostListed, ", got ",
                    mask.taps.size());
    kernel.listed = int(mask.taps.size());
    for (const Tap& tap : mask.taps)
      kernel.list[&tap - mask.taps.data()] =
          uint16_t((tap.row - mask.first_row) * kernel.columns + tap.column - mask.first_column);
  }

  device::Direction direction(bool transposed) const {
    return {transposed ? mask.in : mask.out,
            transposed ? mask.out : mask.in,
            int(mask.taps.size()),
            mask.centre,
            mask.strict,
            transposed};
  }

  // The convolution of `input`, or its input gradient, with the rest of `args` given.
  void convolve(const Launcher& launch, bool transposed, const Tensor& input, const Tensor& output,
                device::Convolution args) const {
    if (raster.pixels == 0) return;
    const Channels &outputs = transposed ? mask.in : mask.out, &inputs = transposed ? mask.out : mask.in;
    int64_t members = divide_up(outputs.half, outputs.groups) * outputs.halves;  // of the largest group
    auto channels_in_tiles = [&](int64_t width) { return divide_up(members, width) * width; };
    // in a narrow tile, a channel takes about 1.5 times as many instructions
    int64_t width = channels_in_tiles(16) * 3 < channels_in_tiles(64) * 2 ? 16 : 64;
    int64_t per_group = divide_up(members, width), tiles = per_group * outputs.groups;
    int64_t most_pairs =
        divide_up((int64_t(mask.taps.size()) + mask.centre) * inputs.all(), device::kChunk) * device::kChunk;
    int64_t count = tiles * most_pairs * width;
    Tensor weights = allocate(Shape{count}, dtype, device);
    Tensor pairs =
        allocate(Shape{outputs.groups * most_pairs * int64_t(sizeof(device::Pair)) / 8}, ScalarType::Double, device);
    args.direction = direction(transposed);
    args.tiles = {int(width), int(per_group), int(most_pairs)};
    args.tile_count = int(tiles);
    args.raster = raster;
    args.input = image_of(input);
    args.input_inner = is_channels_last(input);
    args.output = image_of(output);
    args.output_inner = is_channels_last(output);
    args.weights = weights.data_ptr();
    args.pairs = static_cast<const device::Pair*>(pairs.data_ptr());
    with_format(format, [&](auto format) {
      using T = typename device::Stored<format.value>::Value;
      device::Pack<T> pack{args.direction,
                           args.tiles,
                           kernel,
                           weight,
                           args.input,
                           count,
                           static_cast<T*>(weights.data_ptr()),
                           static_cast<device::Pair*>(pairs.data_ptr())};
      launch(device::masked_conv2d_pack_kernel<T>, pack, divide_up(count, device::kThreads));
      auto run = [&](auto convolution, int64_t pixels) {
        launch(convolution, args, divide_up(raster.pixels, pixels) * tiles, device::kConvThreads);
      };
      if (width == 16)
        run(device::masked_conv2d_kernel<format.value, 16>, device::ConvTile<T, 16>::pixels);
      else
        run(device::masked_conv2d_kernel<format.value, 64>, device::ConvTile<T, 64>::pixels);
    });
  }

  void weight_gradient(const Launcher& launch, const Tensor& input, const Tensor& d_z, const Tensor& d_weight) const {
    int64_t pairs = (int64_t(mask.taps.size()) + mask.centre) * mask.in.all();
    int64_t in_tile =
        dtype == ScalarType::Double ? device::WeightTile<double>::pairs : device::WeightTile<float>::pairs;
    int64_t pair_tiles = divide_up(pairs, in_tile), channel_tiles = divide_up(z_channels, device::kTileChannels);
    int64_t tiles = pair_tiles * channel_tiles;
    int64_t splits = 0, per_split = 0;
    if (raster.pixels &&
        tiles) {  // enough blocks for a large GPU, of enough pixels each; a function of the shapes alone
      splits = std::max<int64_t>(1, std::min(512 / tiles, raster.pixels / 256));
      per_split = divide_up(divide_up(raster.pixels, splits), device::kPixels) * device::kPixels;
      splits = divide_up(raster.pixels, per_split);
    }
    int64_t partial_rows = pair_tiles * in_tile, width = channel_tiles * device::kTileChannels;
    Tensor partial = allocate(Shape{splits * partial_rows * width}, dtype, device);
    device::WeightGradient args{raster,
                                kernel,
                                mask.in.all(),
                                mask.out.all(),
                                int(pairs),
                                int(pair_tiles),
                                int(channel_tiles),
                                per_split,
                                image_of(input),
                                image_of(d_z),
                                is_channels_last(input),
                                is_channels_last(d_z),
                                partial.data_ptr()};
    with_format(format, [&](auto format) {
      using T = typename device::Stored<format.value>::Value;
      launch(device::masked_conv2d_weight_kernel<format.value>, args, tiles * splits, device::kConvThreads);
      device::Reduce<T> reduce{kernel,
                               direction(false),
                               splits,
                               partial_rows,
                               width,
                               static_cast<const T*>(partial.data_ptr()),
                               image_of(d_weight)};
      launch(device::masked_conv2d_reduce_kernel<T>, reduce,
             int64_t(kernel.weight_taps) * mask.in.all() * divide_up(z_channels, 32));
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> masked_conv2d_fwd(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> cond, std::optional<Tensor> residual, Text mask_type,
                                             Text stack, int64_t dilation, int64_t channel_groups, Text group_order,
                                             Text activation, bool keep, std::vector<int64_t> taps) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps}.forward(
      bias, cond, residual);
  Launcher launch("masked_conv2d_fwd", input);
  Problem problem(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps);
  Tensor y = allocate_image(problem.n, problem.mask.out.half, input);
  Tensor kept = keep ? allocate_image(problem.n, problem.z_channels, input)
                     : allocate(Shape{0}, input.scalar_type(), problem.device);
  device::Convolution args;
  args.activation = problem.activation;
  args.bias = image_of(bias);
  args.cond = image_of(cond);
  args.residual = image_of(residual);
  if (keep) args.kept = image_of(kept);
  problem.convolve(launch, false, input, y, args);
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_bwd(Tensor d_y, Tensor input, Tensor weight,
                                                             std::optional<Tensor> kept, Text mask_type, Text stack,
                                                             int64_t dilation, int64_t channel_groups, Text group_order,
                                                             Text activation, bool want_input, bool want_weight,
                                                             bool want_bias, int64_t cond_ndim,
                                                             std::vector<int64_t> taps) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps}.backward(
      d_y, kept, cond_ndim);
  Launcher launch("masked_conv2d_bwd", input);
  Problem problem(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps);
  ScalarType stored = input.scalar_type();
  const device::Raster& raster = problem.raster;
  int64_t n = problem.n, channels = problem.z_channels;
  Tensor d_input = want_input ? allocate(Shape(input), stored, input) : allocate(Shape{0}, stored, problem.device);
  Tensor d_weight = want_weight ? allocate(Shape(weight), stored, weight) : allocate(Shape{0}, stored, problem.device);
  Tensor d_bias = allocate(Shape{want_bias ? channels : 0}, stored, problem.device);
  Tensor d_cond = cond_ndim == 4   ? allocate_image(n, channels, input)
                  : cond_ndim == 2 ? allocate(Shape{n, channels}, stored, problem.device)
                                   : allocate(Shape{0}, stored, problem.device);

  // The gradient before the activation, in the images' format, as kept is: what an image's condition gets, and without
  // an activation d_y.
  Tensor d_z = cond_ndim == 4                           ? d_cond
               : problem.activation == Activation::none ? d_y
                                                        : allocate_image(n, channels, input);
  bool sums = want_bias || cond_ndim == 2, fill = cond_ndim == 4 || problem.activation != Activation::none;
  int64_t slices = divide_up(raster.image, device::kSlice);
  std::optional<Tensor> partial;
  if (sums) partial = allocate(Shape{n * channels * slices}, ScalarType::Double, problem.device);
  if (sums || fill) {
    device::ActivationGradient args{raster, unsigned(slices)};
    args.units = problem.mask.out.half;
    args.halves = problem.mask.out.halves;
    args.inner = is_channels_last(d_z);
    args.unit_blocks = unsigned(divide_up(args.units, args.inner ? 32 : device::kThreads / 32));
    args.activation = problem.activation;
    args.d_y = image_of(d_y);
    args.kept = image_of(kept);
    if (fill) args.d_z = image_of(d_z);
    if (sums) args.partial = static_cast<double*>(partial->data_ptr());
    with_format(problem.format, [&](auto format) {
      launch(device::masked_conv2d_activation_kernel<format.value>, args, n * slices * args.unit_blocks);
    });
  }
  auto sum = [&](const Tensor& out, int64_t entries) {
    if (entries == 0) return;
    device::PixelSums args{static_cast<const double*>(partial->data_ptr()),
                           unsigned(channels),
                           unsigned(slices),
                           unsigned(n / entries),
                           problem.format,
                           static_cast<char*>(out.data_ptr())};
    launch(device::masked_conv2d_sum_kernel, args, entries * channels);
  };
  if (want_bias) sum(d_bias, 1);
  if (cond_ndim == 2) sum(d_cond, n);
  if (want_input) problem.convolve(launch, true, d_z, d_input, device::Convolution());
  if (want_weight) problem.weight_gradient(launch, input, d_z, d_weight);
  return {d_input, d_weight, d_bias, d_cond};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CUDA, m) {
  fastelbo::implement(m, "masked_conv2d_fwd", TORCH_BOX(&fastelbo::masked_conv2d_fwd));
  fastelbo::implement(m, "masked_conv2d_bwd", TORCH_BOX(&fastelbo::masked_conv2d_bwd));
}
