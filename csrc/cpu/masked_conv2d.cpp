// Masked convolutions over live taps only: output, input gradient and weight gradient.
//
// A convolution is a list of (offset, weight) pairs, and masks, channel groups, stacks and dilation are only which
// pairs the list holds: a dead tap is not in it. The input gradient is the same with the offsets negated. For that a
// band of rows of an image is copied, in the arithmetic type, with zeros around the image, so that every tap is a
// constant offset and no loop knows an edge. How it lies there (`Layout`) is chosen by what it costs
// (masked_conv2d_layout.cpp):
//
//   spaced  A plane for each channel; a vector is neighbouring pixels. The zeros between rows are computed with, too.
//   masked  With AVX-512, whose loads leave out lanes at no cost, there are none: masks say which pixels of a vector
//   have
//           a tap inside the image, and one of the arithmetic type whose rows lie one after the other is read where it
//           is.
//   pixels  The channels of a pixel side by side, as in images with channels last; a vector is output channels of a
//   pixel.
//           Planes that are large enough for it, and for which nothing else is to be done, are transposed.
//   images  Small images lie in the lanes: a vector is a pixel of that many images, which fill it however few pixels
//   they
//           have.
//
// Tiles of pixels and of images go through the runs of the list that they read inside the image. The bits of outputs
// and of input gradients do not depend on the layout.
//
// The loops (masked_conv2d.loops.h) in the order in which they run: what they read and write, the tasks that threads
// share, and what a thread has of its own.
//
//   name                reads                writes                    tasks              a thread's own
//
//   forward
//   conv_pack_forward   weight               packed                    blocks of outputs  nothing
//   masked_conv2d_fwd   input, packed;       y, kept                   bands of rows of   planes of input, a block
//                       bias, cond,                                    an image, or parts of outputs, a row
//                       residual                                       of some images'
//
//   backward
//   conv_pack_backward  weight               d_packed                  blocks of inputs   nothing
//   masked_conv2d_bwd   d_y, kept, input,    d_input, d_cond, sums of  chunks of bands,   planes of d_z and of input,
//                       d_packed             bands, partial: shares    or parts of their  a block of inputs, d_z of
//                                            of d_weight               gradients          rows, channels innermost
//   conv_reduce_weight  partial              d_weight                  output channels    nothing
//
// The host adds up the sums of bands, for d_bias and the cond of a class.
#include "../common/checks.h"

#include <cstring>

#include "masked_conv2d.h"

#define FASTELBO_LOOPS "masked_conv2d.loops.h"
#include "per_isa.h"

namespace fastelbo {

namespace {

#define FASTELBO_CONV_LOOP(loop, dtype) \
  ((dtype) == ScalarType::Double ? FASTELBO_BEST_DOUBLE(loop, true) : FASTELBO_BEST_FLOAT(loop, true))

LoopSizes loop_sizes(ScalarType dtype) {
  LoopSizes sizes;
  FASTELBO_CONV_LOOP(conv_sizes, dtype)(sizes);
  return sizes;
}

template <class Loop>
void run_tasks(Loop loop, const ConvArgs& args, int64_t tasks) {
  if (tasks == 1) return loop(args, 0, 1);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

constexpr int64_t kChunkPixels = 1024;  // of a share of the weight gradient: fewer, and adding the shares shows

ConvArgs arguments(const Tensor& input, const Tensor& weight, const std::string& mask_type, const std::string& stack,
                   int64_t dilation, int64_t groups, const std::string& order, const std::string& activation,
                   const std::vector<int64_t>& taps) {
  ConvArgs args;
  auto sizes = input.sizes();
  args.n = sizes[0];
  args.in_channels = sizes[1];
  args.rows = sizes[2];
  args.columns = sizes[3];
  args.activation = parse_activation(activation);
  args.z_channels = weight.sizes()[0];
  args.y_channels = args.gated() ? args.z_channels / 2 : args.z_channels;
  args.mask = LiveTaps(weight, input, mask_type, stack, dilation, groups, order, args.gated(), taps);
  args.input = image_of(input);
  args.weight = image_of(weight);
  args.band = band_rows(args.n, args.rows, args.columns + args.mask.sideways(),
                        std::max(args.in_channels, args.z_channels), args.mask.up + args.mask.down);
  args.bands = (args.rows + args.band - 1) / args.band;
  return args;
}

void take_images(ConvArgs& args, int64_t lanes) {
  args.band = args.rows;
  args.bands = 1;
  args.images = lanes;
}

// Into how many parts the work on some images is cut, each of which packs them for itself unless a thread does several.
int64_t parts_of(const ConvArgs& args, int64_t tasks) {
  return args.images > 1 ? std::max<int64_t>(kTasks / std::max<int64_t>(tasks, 1), 1) : 1;
}

}  // namespace

std::tuple<Tensor, Tensor> masked_conv2d_fwd(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> cond, std::optional<Tensor> residual, Text mask_type,
                                             Text stack, int64_t dilation, int64_t channel_groups, Text group_order,
                                             Text activation, bool keep, std::vector<int64_t> taps) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps}.forward(
      bias, cond, residual);
  ScalarType dtype = arithmetic_type({&input});
  LoopSizes sizes = loop_sizes(dtype);
  ConvArgs args = arguments(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps);
  Tensor y = allocate_image(args.n, args.y_channels, input);
  Tensor kept =
      keep ? allocate_image(args.n, args.z_channels, input) : allocate(Shape{0}, input.scalar_type(), Device(input));
  args.y = image_of(y);
  if (keep) args.kept = image_of(kept);
  args.residual = image_of(residual);
  args.cond = image_of(cond);
  if (cond) args.cond_ndim = int64_t(cond->sizes().size());
  args.bias = image_of(bias);
  Source source(args, dtype == ScalarType::Double, 1);
  args.planes = planes_of(args, source, sizes);
  if (args.planes.lanes > 1) take_images(args, args.planes.lanes);
  args.forward = side_of(args, args.planes, sizes, 1);
  Tensor packed = allocate(Shape{args.forward.weights}, dtype, Device(input));
  args.packed = packed.data_ptr();
  run_tasks(FASTELBO_CONV_LOOP(conv_pack_forward, dtype), args, args.forward.units());
  args.parts = std::min(parts_of(args, args.units()), args.forward.units());
  run_tasks(FASTELBO_CONV_LOOP(masked_conv2d_fwd, dtype), args, args.units() * args.parts);
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
  ScalarType dtype = arithmetic_type({&input}), stored = input.scalar_type();
  LoopSizes sizes = loop_sizes(dtype);
  ConvArgs args = arguments(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps);
  const LiveTaps& mask = args.mask;
  Device device(input);
  args.d_y = image_of(d_y);
  args.kept = image_of(kept);
  args.cond_ndim = cond_ndim;
  Source of_input(args, dtype == ScalarType::Double, 1), of_d_z(args, dtype == ScalarType::Double, -1);
  args.planes = planes_of_weight_gradient(args, of_input, sizes);
  args.d_planes = want_input ? planes_of(args, of_d_z, sizes) : planes_without_taps(args, of_d_z, sizes);
  if (args.d_planes.lanes > 1) {
    take_images(args, args.d_planes.lanes);
    args.planes = Planes(Layout::images, args.images, args.columns, args.rows, mask.sideways(), mask.up, mask.down, 0);
  }
  Tensor d_input = want_input ? allocate(Shape(input), stored, input) : allocate(Shape{0}, stored, device);
  Tensor d_weight = want_weight ? allocate(Shape(weight), stored, weight) : allocate(Shape{0}, stored, device);
  Tensor d_bias = allocate(Shape{want_bias ? args.z_channels : 0}, stored, device);
  Tensor d_cond = cond_ndim == 4   ? allocate_image(args.n, args.z_channels, input)
                  : cond_ndim == 2 ? allocate(Shape{args.n, args.z_channels}, stored, device)
                                   : allocate(Shape{0}, stored, device);
  if (cond_ndim == 4) args.d_cond = image_of(d_cond);
  std::vector<double> sums;
  if (want_bias || cond_ndim == 2) {
    sums.resize(args.n * args.bands * args.z_channels);
    args.sums_wanted = true;
    args.sums = sums.data();
  }
  std::optional<Tensor> d_packed, partial;
  if (want_input) {
    args.d_input = image_of(d_input);
    args.backward = side_of(args, args.d_planes, sizes, -1);
    d_packed = allocate(Shape{args.backward.weights}, dtype, device);
    args.d_packed = d_packed->data_ptr();
    run_tasks(FASTELBO_CONV_LOOP(conv_pack_backward, dtype), args, args.backward.units());
  }
  args.chunks = std::min(args.units(), 4 * kTasks);
  int64_t count_of_taps = args.taps();
  if (want_weight) {
    args.d_weight = image_of(d_weight);
    std::memset(d_weight.data_ptr(), 0,
                size_t(d_weight.numel()) * (stored == ScalarType::Double  ? 8
                                            : stored == ScalarType::Float ? 4
                                                                          : 2));
    int64_t count = args.in_channels * count_of_taps;
    args.pairs = (count + sizes.few_pairs - 1) / sizes.few_pairs * sizes.few_pairs;
    args.windows.resize((args.pairs + sizes.pairs - 1) / sizes.pairs);
    args.pair_offset.resize(args.pairs, 0);
    args.channels_at_once = sizes.pairs;
    for (int64_t t = 0; t < count_of_taps; ++t) {
      const Tap& tap = args.tap(t);
      for (int64_t in = 0; in < args.in_channels; ++in) {
        int64_t pair = args.pair(in, t);
        args.windows[pair / sizes.pairs].add(tap, args.rows, args.columns);
        args.pair_offset[pair] = int32_t(in * args.planes.size + args.planes.offset(tap.down, tap.right));
      }
    }
    int64_t blocks = (args.z_channels + sizes.lanes - 1) / sizes.lanes, share = blocks * args.pairs * sizes.lanes;
    int64_t most = std::max<int64_t>(args.n * args.rows * args.columns / kChunkPixels, 4);
    args.chunks = std::min(args.chunks, most);
    partial = allocate(Shape{args.chunks * share}, dtype, device);
    args.partial = count ? partial->data_ptr() : nullptr;
  }
  args.parts = parts_of(args, args.chunks);
  run_tasks(FASTELBO_CONV_LOOP(masked_conv2d_bwd, dtype), args, args.chunks * args.parts);
  if (args.partial) run_tasks(FASTELBO_CONV_LOOP(conv_reduce_weight, dtype), args, args.z_channels);

  auto store_sums = [&](Tensor& to, int64_t entries) {  // each of as many consecutive bands as there are to an entry
    int64_t per_entry = entries ? args.n * args.bands / entries : 0;
    Image image = image_of(to);
    for (int64_t entry = 0; entry < entries; ++entry) {
      for (int64_t c = 0; c < args.z_channels; ++c) {
        double total = 0;
        for (int64_t unit = entry * per_entry; unit < (entry + 1) * per_entry; ++unit)
          total += sums[unit * args.z_channels + c];
        portable::with_format(image.format, [&](auto format) {
          portable::scatter<decltype(format)>(image.data, entry * args.z_channels + c, 1, 1, &total);
        });
      }
    }
  };
  if (want_bias) store_sums(d_bias, 1);
  if (cond_ndim == 2) store_sums(d_cond, args.n);
  return {d_input, d_weight, d_bias, d_cond};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "masked_conv2d_fwd", TORCH_BOX(&fastelbo::masked_conv2d_fwd));
  fastelbo::implement(m, "masked_conv2d_bwd", TORCH_BOX(&fastelbo::masked_conv2d_bwd));
}
