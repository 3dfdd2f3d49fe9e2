// The loops of masked_conv2d.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

#include "../math/activation.h"

#include "masked_conv2d_images.h"
#include "masked_conv2d_tiles.h"
#include "masked_conv2d_epilogue.h"

// A band's first row of the first channel, in planes or in place, and what is read for the next one.
template <class T>
struct Band {
  int64_t first, rows;
  const T* in;
  Ahead next;
};

#include "masked_conv2d_planes.h"
#include "masked_conv2d_pixels.h"

template <class T, bool>
void conv_sizes(LoopSizes& sizes) {
  constexpr int64_t lanes = WideOf<T>::lanes;
  sizes.block = kBlock;
  sizes.vector = lanes;
  sizes.slack = kVectors * lanes;
  sizes.lanes = kChannelVectors * lanes;
  sizes.pairs = kPairs;
  sizes.few_pairs = kFewPairs;
  sizes.pixels = kPixels;
  sizes.masks = kMasks;
}

// The weights of units begin .. end - 1 in the order in which tiles read them.
template <class T>
inline void pack_weights(const ConvArgs& args, const Side& side, bool transposed, T* to, int64_t begin, int64_t end) {
  const Image& weight = args.weight;
  int64_t own_stride = weight.stride[transposed ? 1 : 0], pair_stride = weight.stride[transposed ? 0 : 1];
  with_format(weight.format, [&](auto format) {
    for (int64_t u = begin; u < end; ++u) {
      for (int h = 0; h < side.halves; ++h) {
        T* at = to + side.weights_of(u, h);
        for (int64_t k = 0; k < side.pairs(u); ++k) {
          ChannelTap pair = side.pair(u, k);
          const Tap& tap = args.tap(pair.tap);
          int64_t offset = pair.channel * pair_stride + tap.row * weight.stride[2] + tap.column * weight.stride[3];
          for (int m = 0; m < side.block; ++m, ++at) {
            int own = side.channel(u, m);
            if (own < 0)
              *at = 0;
            else
              gather<decltype(format)>(weight.data, offset + (own + h * side.half) * own_stride, 0, 1, at);
          }
        }
      }
    }
  });
}

template <class T, bool>
void conv_pack_forward(const ConvArgs& args, int64_t begin, int64_t end) {
  pack_weights(args, args.forward, false, static_cast<T*>(args.packed), begin, end);
}
template <class T, bool>
void conv_pack_backward(const ConvArgs& args, int64_t begin, int64_t end) {
  pack_weights(args, args.backward, true, static_cast<T*>(args.d_packed), begin, end);
}

template <class T>
inline T value_at(const Image& image, int64_t offset) {
  T value;
  with_format(image.format, [&](auto format) { gather<decltype(format)>(image.data, offset, 0, 1, &value); });
  return value;
}

// What the sums start from: [units][halves][block][lanes], a lane of each image, or all of one; of pixels
// [units][halves][block].
template <class T>
inline void find_constants(const ConvArgs& args, int64_t n, int64_t images, T* to) {
  const Side& forward = args.forward;
  int64_t lanes = args.planes.layout == Layout::pixels ? 1 : WideOf<T>::lanes;
  for (int64_t u = 0; u < forward.units(); ++u) {
    for (int h = 0; h < forward.halves; ++h) {
      for (int m = 0; m < forward.block; ++m) {
        int64_t channel = forward.channel(u, m) + h * forward.half;
        bool there = forward.channel(u, m) >= 0;
        T bias = there && args.bias ? value_at<T>(args.bias, channel * args.bias.stride[0]) : T(0), value = bias;
        for (int64_t i = 0; i < lanes; ++i) {
          if (there && i < images) value = bias + value_at<T>(args.cond, args.cond.at(n + i, channel, 0));
          *to++ = value;
        }
      }
    }
  }
}

// The input's planes; returns the band's first row of the first channel.
template <class T>
inline const T* pack_input(const ConvArgs& args, int64_t n, int64_t first, int64_t rows, const Staging<T>& staging,
                           T* to) {
  const Planes& planes = args.planes;
  if (planes.in_place) return pixel<T>(args.input, args.input.at(n, 0, first));
  if (planes.layout == Layout::pixels)
    return pack_pixels(planes, args.rows, first, rows, to, [&](int64_t row, T* at) {
      read_pixels(args.input, {n, 0, row, args.columns, args.in_channels, true}, at, planes.step);
    });
  if (planes.layout == Layout::images) {
    int64_t images = std::min(args.images, args.n - n);
    for (int64_t c = 0; c < args.in_channels; ++c) {
      for (int64_t i = 0; i < images; ++i)
        read_lines(args.input, {n + i, c, 0, rows, args.columns}, staging.plane(i), staging.columns);
      staging.pack(images, 0, to + c * planes.size);
    }
    return to + planes.first();
  }
  int64_t step = rows_of_a_channel(args.input, args.columns, args.in_channels, planes.pitch);
  pack_planes(planes, args.rows, args.in_channels, first, rows, step, to, [&](int64_t row, int64_t count, int64_t i) {
    T* at = to + planes.front + i * planes.pitch;
    if (channels_innermost<T>(args.input))
      return transpose(pixel<T>(args.input, args.input.at(n, 0, row)), args.input.stride[3], count * args.columns,
                       args.in_channels, at, planes.size);
    for (int64_t c = 0; c < args.in_channels; ++c)
      read_lines(args.input, {n, c, row, count, args.columns}, at + c * planes.size, planes.pitch);
  });
  return to + planes.first();
}

template <class T, bool>
void masked_conv2d_fwd(const ConvArgs& args, int64_t begin, int64_t end) {
  const Planes& planes = args.planes;
  const Side& side = args.forward;
  PlaneOutputs<T> of_planes(args, planes, side);
  PixelOutputs<T> of_pixels(args, planes, side);
  Staging<T> staging(planes);
  int64_t elements = planes.elements(args.in_channels);
  ScratchOf<T> in(elements), constants(side.units() * side.halves * side.block * WideOf<T>::lanes);
  if (planes.zeroed()) zero(in.get(), elements);
  bool of_class = args.cond && args.cond_ndim == 2;
  if (!of_class) find_constants(args, 0, 0, constants.get());
  for (int64_t task = begin; task < end;) {
    Share share(task, end, args.parts);
    task += share.tasks();
    int64_t n = share.chunk / args.bands * args.images, first = share.chunk % args.bands * args.band,
            rows = std::min(args.band, args.rows - first);
    if (of_class) find_constants(args, n, std::min(args.images, args.n - n), constants.get());
    Band<T> band{first, rows, pack_input(args, n, first, rows, staging, in.get()),
                 task < end ? args.ahead(args.input, args.in_channels, task) : Ahead()};
    if (planes.layout == Layout::pixels)
      of_pixels.convolve(band, n, share, args.packed, constants.get(), args.y, args.bare());
    else
      of_planes.convolve(band, n, share, args.packed, constants.get(), args.y, args.bare());
  }
}

// to[position][channel] of lanes channels, from planes; zeros for channels that are not there.
template <class T, int lanes>
inline void transpose_block(const T* from, int64_t stride, int64_t channels, int64_t columns, T* to) {
  if (channels < lanes) zero(to, columns * lanes);
  transpose(from, stride, std::min<int64_t>(channels, lanes), columns, to, lanes);
}

constexpr int64_t kWeightPositions = 256;  // positions whose gradients, transposed, stay in the first-level cache

// Shares of the weight gradient, to which bands are added.
template <class T>
struct WeightGradient {
  static constexpr int lanes = kChannelVectors * WideOf<T>::lanes;
  const ConvArgs& args;
  const Planes &planes, &d_planes;
  bool pixels;                          // whether channels of the gradient lie side by side already
  int64_t blocks, wide, rows_at_once;   // blocks of output channels, positions of a row
  Staging<T> staging;
  ScratchOf<T> in, transposed;

  explicit WeightGradient(const ConvArgs& args)
      : args(args),
        planes(args.planes),
        d_planes(args.d_planes),
        pixels(d_planes.layout == Layout::pixels),
        blocks((args.z_channels + lanes - 1) / lanes),
        wide(args.columns * planes.lanes),
        rows_at_once(std::max<int64_t>(1, std::min(kWeightPositions / wide, args.band))),
        staging(planes),
        in(args.partial ? planes.elements(args.in_channels) : 0),
        transposed(args.partial && !pixels ? rows_at_once * wide * lanes : 0) {
    if (args.partial && planes.zeroed()) zero(in.get(), planes.elements(args.in_channels));
  }

  int64_t first(const Share& share) const { return share.first(tiles()) * kPairs; }
  int64_t last(const Share& share) const { return std::min(share.last(tiles()) * kPairs, args.pairs); }
  void start(const Share& share) const {
    for (int64_t block = 0; block < blocks; ++block)
      zero(totals(share, block, first(share)), (last(share) - first(share)) * lanes);
  }
  // dz: a band of the gradient before the activation
  void add(const Share& share, int64_t n, const Band<T>& dz) const {
    const T* band = pack_input<T>(args, n, dz.first, dz.rows, staging, in.get());
    for (int64_t row = 0; row < dz.rows; row += rows_at_once) {
      int64_t some = std::min(rows_at_once, dz.rows - row);
      for (int64_t block = 0; block < blocks; ++block)
        add_rows(share, block, dz.first + row, some, band + row * planes.pitch,
                 channels_of(dz.in + block * lanes * d_planes.size + row * d_planes.pitch, block, some));
    }
  }

 private:
  int64_t tiles() const { return (args.pairs + kPairs - 1) / kPairs; }
  T* totals(const Share& share, int64_t block, int64_t pair) const {
    return static_cast<T*>(args.partial) + ((share.chunk * blocks + block) * args.pairs + pair) * lanes;
  }
  // Some rows of a block's gradients, channels side by side.
  Rows<T> channels_of(const T* dz, int64_t block, int64_t rows) const {
    if (pixels) return {dz, d_planes.pitch, d_planes.step};
    bool gapless = d_planes.pitch == wide;
    int64_t runs = gapless ? 1 : rows, run = gapless ? rows * wide : wide, channels = args.z_channels - block * lanes;
    for (int64_t r = 0; r < runs; ++r)
      transpose_block<T, lanes>(dz + r * d_planes.pitch, d_planes.size, channels, run,
                                transposed.get() + r * run * lanes);
    return {transposed.get(), wide * lanes, lanes};
  }
  void add_rows(const Share& share, int64_t block, int64_t row, int64_t rows, const T* from, const Rows<T>& dz) const {
    bool few_channels = args.z_channels - block * lanes <= WideOf<T>::lanes;
    Rows<T> of_input{from, planes.pitch, planes.layout == Layout::pixels ? planes.step : 1};
    for (int64_t pair = first(share), step; pair < last(share); pair += step) {
      step = last(share) - pair >= kPairs ? kPairs : kFewPairs;
      auto tile = step == kPairs ? weight_tile_of<T, kPairs>(few_channels) : weight_tile_of<T, kFewPairs>(few_channels);
      tile(of_input, args.pair_offsets(pair), dz, args.window(pair / kPairs).part(row, rows, planes.lanes),
           totals(share, block, pair));
    }
  }
};

template <class T, bool>
void masked_conv2d_bwd(const ConvArgs& args, int64_t begin, int64_t end) {
  const Planes& planes = args.d_planes;
  const Side& side = args.backward;
  bool pixels = planes.layout == Layout::pixels;
  PlaneGradient<T> of_planes(args);
  PixelGradient<T> of_pixels(args);
  PlaneOutputs<T> d_in_planes(args, planes, side);
  PixelOutputs<T> d_in_pixels(args, planes, side);
  WeightGradient<T> weight(args);
  int64_t of_constants = side.units() * side.block * WideOf<T>::lanes;
  ScratchOf<T> no_constants(of_constants);
  zero(no_constants.get(), of_constants);
  for (int64_t task = begin; task < end;) {
    Share share(task, end, args.parts);
    task += share.tasks();
    if (args.partial) weight.start(share);
    for (int64_t unit = args.first_unit(share.chunk); unit < args.first_unit(share.chunk + 1); ++unit) {
      int64_t n = unit / args.bands * args.images, first = unit % args.bands * args.band,
              rows = std::min(args.band, args.rows - first);
      bool stored = share.begin == 0;
      Band<T> band{first, rows,
                   pixels ? of_pixels.pack(n, first, rows, stored) : of_planes.pack(n, first, rows, stored),
                   unit + 1 < args.units() ? args.ahead(args.d_y, args.y_channels, unit + 1) : Ahead()};
      if (args.d_input && pixels)
        d_in_pixels.convolve(band, n, share, args.d_packed, no_constants.get(), args.d_input, true);
      else if (args.d_input)
        d_in_planes.convolve(band, n, share, args.d_packed, no_constants.get(), args.d_input, true);
      if (args.partial) weight.add(share, n, band);
    }
  }
}

// The weight gradient of output channels begin .. end - 1: the chunks' shares, added in order; exactly 0 at dead taps.
template <class T, bool>
void conv_reduce_weight(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr int lanes = kChannelVectors * WideOf<T>::lanes;
  int64_t blocks = (args.z_channels + lanes - 1) / lanes, taps = args.taps();
  const T* partial = static_cast<const T*>(args.partial);
  const Image& to = args.d_weight;
  for (int64_t out = begin, next; out < end; out = next) {
    next = std::min(end, (out / lanes + 1) * lanes);  // all of a block
    for (int64_t in = 0; in < args.in_channels; ++in) {
      for (int64_t t = 0; t < taps; ++t) {
        double total[lanes] = {};
        for (int64_t chunk = 0; chunk < args.chunks; ++chunk) {
          int64_t row = (chunk * blocks + out / lanes) * args.pairs + args.pair(in, t);
          const T* from = partial + row * lanes + out % lanes;
          for (int64_t i = 0; i < next - out; ++i) total[i] += from[i];
        }
        const Tap& tap = args.tap(t);
        int64_t offset = out * to.stride[0] + in * to.stride[1] + tap.row * to.stride[2] + tap.column * to.stride[3];
        for (int64_t i = 0; i < next - out; ++i)
          if (!args.live(t, out + i, in)) total[i] = 0;
        with_format(to.format, [&](auto format) {
          scatter<decltype(format)>(to.data, offset, to.stride[0], int(next - out), total);
        });
      }
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
