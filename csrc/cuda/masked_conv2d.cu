// Masked convolutions over live taps only: output, input gradient and weight gradient.
//
// A convolution is a product of matrices, of the input at every (pixel, pair) with the weights at every (pair, output
// channel), where a pair is an input channel and one of its live taps. Masks, channel groups, stacks and dilation are
// only which pairs there are: a dead tap is none. Blocks make tiles of the product from chunks of pairs in shared
// memory. The input gradient is the same with the taps' directions negated and the weights transposed; the weight
// gradient sums the products of the input at every (pixel, pair) with the gradient at every (pixel, output channel)
// over the pixels.
#include "../common/checks.h"
#include "../common/masked_conv2d.h"
#include "host.cuh"

namespace fastelbo::device {

#include "../common/activation.h"

constexpr int kConvThreads = 128;  // of a block that makes a tile
constexpr int kNever = -(1 << 30);  // rows from the image, on whichever side

struct Pixel {
  int64_t n;
  int row, column;
};

// The pixels of a batch in raster order.
struct Raster {
  int64_t pixels = 0, image = 0;  // of the batch, of an image
  int rows = 0, columns = 0;
  bool wide = false;  // an index may need more than 31 bits
  Divisor by_image, by_columns;

  Raster() = default;
  Raster(int64_t n, int64_t rows, int64_t columns)
      : pixels(n * rows * columns),
        image(rows * columns),
        rows(int(rows)),
        columns(int(columns)),
        wide(pixels > INT32_MAX) {
    if (!wide) by_image = Divisor(uint32_t(std::max<int64_t>(image, 1))), by_columns = Divisor(uint32_t(columns));
  }
  FASTELBO_INLINE Pixel at(int64_t index) const {
    int64_t n = wide ? index / image : int64_t(by_image.divide(uint32_t(index))), rest = index - n * image;
    int64_t row = wide ? rest / columns : int64_t(by_columns.divide(uint32_t(rest)));
    return {n, int(row), int(rest - row * columns)};
  }
};

FASTELBO_INLINE int64_t offset(const Image& image, const Pixel& pixel) {
  return pixel.n * image.stride[0] + pixel.row * image.stride[2] + pixel.column * image.stride[3];
}

// A pixel of an image that is read.
struct alignas(16) Place {
  int64_t offset;
  int row, column;
};
constexpr Place kNowhere{0, kNever, 0};

FASTELBO_INLINE Place place_of(const Image& image, const Pixel& pixel) {
  return {offset(image, pixel), pixel.row, pixel.column};
}

// An input channel and a tap: where they lie from an output's pixel.
struct alignas(16) Pair {
  int64_t offset;
  int down, right;

  FASTELBO_INLINE bool inside(const Place& place, const Raster& raster) const {
    return unsigned(place.row + down) < unsigned(raster.rows) &&
           unsigned(place.column + right) < unsigned(raster.columns);
  }
};

constexpr Pair kNoPair{0, kNever, 0};

// In one instruction: else the offset would be loaded when the rest is known to be inside.
FASTELBO_INLINE Pair load_whole(const Pair* from) {
  uint4 bits = *reinterpret_cast<const uint4*>(from);
  return {int64_t(uint64_t(bits.y) << 32 | bits.x), int(bits.z), int(bits.w)};
}

// The taps, live or not, of that part of a weight which reaches into the image, in raster order.
struct Kernel {
  int columns, centre_row, centre_column, dilation;
  int first_row, first_column, weight_taps, weight_columns;  // where it lies in the weight, and of all of that

  // sign: -1 for the input gradient.
  FASTELBO_INLINE Pair pair(int tap, int channel, const Image& image, int sign) const {
    int64_t down = int64_t(tap / columns - centre_row) * dilation * sign;
    int64_t right = int64_t(tap % columns - centre_column) * dilation * sign;
    return {channel * image.stride[1] + down * image.stride[2] + right * image.stride[3], int(down), int(right)};
  }
};

// Which pairs each group of output channels sums over.
struct Direction {
  Channels outputs, inputs;
  int taps;     // live for all channels, the first in raster order
  bool centre;  // whether the next one is live for some: that of the pixel itself
  bool strict;  // mask A
  bool transposed;  // the input gradient, whose outputs are the convolution's inputs

  // The groups that a group reads at the centre: first .. end - 1.
  FASTELBO_INLINE int first(int group) const { return transposed ? group + strict : 0; }
  FASTELBO_INLINE int end(int group) const { return transposed ? inputs.groups : group + !strict; }

  FASTELBO_INLINE int pairs(int group) const {
    return taps * inputs.all() + (centre ? inputs.halves * inputs.count(first(group), end(group)) : 0);
  }
  FASTELBO_INLINE void pair(int group, int k, int* tap, int* channel) const {
    *tap = k / inputs.all();
    *channel = k % inputs.all();
    if (*tap < taps) return;
    int some = inputs.count(first(group), end(group));
    *channel = inputs.member(first(group), end(group), *channel % some) + *channel / some * inputs.half;
  }
};

// How the output channels lie in tiles: each tile is of one group, and under a gate half of it are a and half are b.
struct Tiles {
  int width, per_group, most_pairs;  // most_pairs: of any group, and a multiple of kChunk

  FASTELBO_INLINE int group(int tile) const { return tile / per_group; }
  // A unit is a channel of the first half, and under a gate that of the second.
  FASTELBO_INLINE int units(const Channels& channels) const { return width / channels.halves; }
  FASTELBO_INLINE int first_unit(int tile, const Channels& channels) const {
    return tile % per_group * units(channels);
  }
};

template <class T>
struct alignas(16) Vec4 {
  T v[4];
};

// The products of 8 values with `own`, which both lie in runs of four with gaps between where they start.
template <int own, class T>
FASTELBO_INLINE void multiply_add(const T* a, int a_gap, const T* b, int b_gap, T (&total)[own][8]) {
  Vec4<T> eight[2], others[own / 4];
  FASTELBO_UNROLL
  for (int run = 0; run < 2; ++run) eight[run] = *reinterpret_cast<const Vec4<T>*>(a + run * a_gap);
  FASTELBO_UNROLL
  for (int run = 0; run < own / 4; ++run) others[run] = *reinterpret_cast<const Vec4<T>*>(b + run * b_gap);
  FASTELBO_UNROLL
  for (int m = 0; m < own; ++m) {
    FASTELBO_UNROLL
    for (int i = 0; i < 8; ++i) total[m][i] = fma(others[m / 4].v[m % 4], eight[i / 4].v[i % 4], total[m][i]);
  }
}

constexpr int kChunk = 8;  // pairs in shared memory at a time, two times over

// Products of float32 images that registers add up, one after the other, before their total joins the others in shared
// memory: rounding errors grow with the root of this number and of that of totals, not with that of all products.
// Halves round by more than all of that, and float64 by next to nothing.
constexpr int kSum = 128;
template <Format format>
constexpr bool in_parts = format == Format::f32;

// What a block has in shared memory: at once, or one after the other.
template <class First, class Then>
struct alignas(16) AtOnce {
  First staged;
  Then sums;
};
template <class First, class Then>
union alignas(16) InTurns {
  First staged;
  Then sums;
};
template <class First, class Then, bool at_once>
using Both = std::conditional_t<at_once, AtOnce<First, Then>, InTurns<First, Then>>;

template <class T>
FASTELBO_INLINE void add(Vec4<T>& to, const Vec4<T>& values) {
  FASTELBO_UNROLL
  for (int i = 0; i < 4; ++i) to.v[i] += values.v[i];
}

template <class T>
struct Pack {
  Direction direction;
  Tiles tiles;
  Kernel kernel;
  Image weight;   // [out, in, row, column]
  Image input;
  int64_t count;  // of weights, packed
  T* weights;     // [tiles, most_pairs, width]; 0 where there is no channel or no pair
  Pair* pairs;    // [groups, most_pairs]
};

template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_pack_kernel(const __grid_constant__ Pack<T> args) {
  int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= args.count) return;
  const Direction& direction = args.direction;
  const Channels& outputs = direction.outputs;
  int position = int(at % args.tiles.width), k = int(at / args.tiles.width % args.tiles.most_pairs);
  int tile = int(at / args.tiles.width / args.tiles.most_pairs), group = args.tiles.group(tile);
  int units = args.tiles.units(outputs), unit = args.tiles.first_unit(tile, outputs) + position % units;
  bool real = k < direction.pairs(group);
  int tap = 0, other = 0;
  if (real) direction.pair(group, k, &tap, &other);
  if (position == 0 && tile % args.tiles.per_group == 0) {
    args.pairs[group * int64_t(args.tiles.most_pairs) + k] =
        real ? args.kernel.pair(tap, other, args.input, direction.transposed ? -1 : 1) : kNoPair;
  }
  T weight = 0;
  if (real && unit < outputs.count(group, group + 1)) {
    int own = outputs.member(group, unit) + position / units * outputs.half;
    int64_t out = direction.transposed ? other : own, in = direction.transposed ? own : other;
    weight = read<T>(args.weight.format, args.weight.data,
                     out * args.weight.stride[0] + in * args.weight.stride[1] +
                         (args.kernel.first_row + tap / args.kernel.columns) * args.weight.stride[2] +
                         (args.kernel.first_column + tap % args.kernel.columns) * args.weight.stride[3]);
  }
  args.weights[at] = weight;
}

// All images are of one format.
struct Convolution {
  Direction direction;
  Tiles tiles;
  int tile_count;
  Raster raster;
  Image input;
  bool input_inner = false, output_inner = false;  // whether the channels lie innermost in memory
  const void* weights;
  const Pair* pairs;
  Activation activation = Activation::none;
  Image bias, cond, residual, kept;  // bias: [channels]; the cond of a class has strides of 0
  Image output;
};

// A thread makes 8 pixels of `own` channels, both in runs of four.
template <class T, int channels>
struct ConvTile {
  static constexpr int pixels = channels == 16 ? 256 : sizeof(T) == 8 ? 64 : 128;
  static constexpr int own = pixels * channels / 8 / kConvThreads;
  static constexpr int pixel_gap = pixels / 2, channel_gap = channels / (own / 4);  // between the starts of runs
  static constexpr int pitch = pixels + 4;  // spreads channels over the banks
  struct Chunks {
    T x[2][kChunk][pitch];
    T w[2][kChunk][channels];
  };
  struct Sums {
    T z[channels][pitch];
  };
};

template <Format format, int channels>
__global__ void __launch_bounds__(kConvThreads, format == Format::f64 ? 2 : 3)
    masked_conv2d_kernel(const __grid_constant__ Convolution args) {
  using Element = Stored<format>;
  using T = typename Element::Value;
  using Bits = typename Element::Type;
  using Tile = ConvTile<T, channels>;
  constexpr int pixels = Tile::pixels, own = Tile::own, lanes = pixels < kConvThreads ? pixels : kConvThreads,
                runs = pixels / lanes;
  constexpr bool parts = in_parts<format>;
  __shared__ Both<typename Tile::Chunks, typename Tile::Sums, parts> memory;
  __shared__ Place places[pixels];
  const Channels& outputs = args.direction.outputs;
  unsigned thread = threadIdx.x;
  int tile = int(blockIdx.x % unsigned(args.tile_count)), group = args.tiles.group(tile);
  int64_t first = int64_t(blockIdx.x / unsigned(args.tile_count)) * pixels;
  int units = args.tiles.units(outputs), first_unit = args.tiles.first_unit(tile, outputs);
  int members = outputs.count(group, group + 1) - first_unit;
  if (members <= 0) return;
  if (members > units) members = units;

  Place mine[runs];
  FASTELBO_UNROLL
  for (int run = 0; run < runs; ++run) {
    int64_t index = first + thread % lanes + run * lanes;
    mine[run] = index < args.raster.pixels ? place_of(args.input, args.raster.at(index)) : kNowhere;
    if (thread < lanes) places[thread + run * lanes] = mine[run];
  }
  __syncthreads();

  const Vec4<T>* weights =
      static_cast<const Vec4<T>*>(args.weights) + int64_t(tile) * args.tiles.most_pairs * channels / 4;
  const Pair* pairs = args.pairs + int64_t(group) * args.tiles.most_pairs;
  const Bits* input = reinterpret_cast<const Bits*>(args.input.data);
  constexpr int count = pixels * kChunk / kConvThreads, vectors = kChunk * channels / 4;
  Bits x[count];
  Vec4<T> w;
  // The i-th of what a thread loads of a chunk; neighbours in memory are for neighbouring threads.
  auto pixel_of = [&](int i, auto inner) {
    return inner.value ? thread / kChunk + i * (kConvThreads / kChunk) : thread % lanes + i % runs * lanes;
  };
  auto pair_of = [&](int i, auto inner) {
    return inner.value ? thread % kChunk : thread / lanes + i / runs * (kConvThreads / lanes);
  };
  auto load = [&](int chunk, auto inner) {
    FASTELBO_UNROLL
    for (int i = 0; i < count; ++i) {
      const Place& place = inner.value ? places[pixel_of(i, inner)] : mine[i % runs];
      Pair pair = load_whole(pairs + chunk * kChunk + pair_of(i, inner));
      x[i] = pair.inside(place, args.raster) ? input[place.offset + pair.offset] : Bits(0);
    }
    if (thread < vectors) w = weights[chunk * vectors + thread];
  };
  auto put = [&](int buffer, auto inner) {
    FASTELBO_UNROLL
    for (int i = 0; i < count; ++i)
      memory.staged.x[buffer][pair_of(i, inner)][pixel_of(i, inner)] = Element::decode(x[i]);
    if (thread < vectors) reinterpret_cast<Vec4<T>*>(memory.staged.w[buffer])[thread] = w;
  };

  int own_pixel = thread % (pixels / 8) * 4, own_channel = thread / (pixels / 8) * 4;
  T total[own][8];
  auto clear = [&] {
    FASTELBO_UNROLL
    for (int m = 0; m < own; ++m) {
      FASTELBO_UNROLL
      for (int i = 0; i < 8; ++i) total[m][i] = 0;
    }
  };
  // Calls f(the m-th channel, where a run of its own pixels lies in shared memory, their sums in registers).
  auto each_run = [&](auto&& f) {
    FASTELBO_UNROLL
    for (int m = 0; m < own; ++m) {
      int channel = own_channel + m / 4 * Tile::channel_gap + m % 4;
      FASTELBO_UNROLL
      for (int run = 0; run < 2; ++run) {
        Vec4<T> some;
        FASTELBO_UNROLL
        for (int i = 0; i < 4; ++i) some.v[i] = total[m][run * 4 + i];
        f(channel, reinterpret_cast<Vec4<T>&>(memory.sums.z[channel][own_pixel + run * Tile::pixel_gap]), some);
      }
    }
  };
  clear();
  int chunks = (args.direction.pairs(group) + kChunk - 1) / kChunk;
  for (int chunk = -1; chunk < chunks; ++chunk) {
    bool more = chunk + 1 < chunks;
    if (more) {
      if (args.input_inner)
        load(chunk + 1, std::true_type());
      else
        load(chunk + 1, std::false_type());
    }
    if (chunk >= 0) {
      FASTELBO_UNROLL
      for (int k = 0; k < kChunk; ++k)
        multiply_add<own>(&memory.staged.x[chunk % 2][k][own_pixel], Tile::pixel_gap,
                          &memory.staged.w[chunk % 2][k][own_channel], Tile::channel_gap, total);
      if (parts && more && (chunk + 1) % (kSum / kChunk) == 0) {
        bool first = chunk + 1 == kSum / kChunk;
        each_run([&](int, Vec4<T>& z, Vec4<T> part) {
          if (!first) add(part, z);
          z = part;
        });
        clear();
      }
    }
    if (more) {
      if (args.input_inner)
        put((chunk + 1) % 2, std::true_type());
      else
        put((chunk + 1) % 2, std::false_type());
    }
    __syncthreads();
  }

  // Through shared memory, so that neighbouring threads write neighbours in memory, and a gate finds both its halves.
  each_run([&](int position, Vec4<T>& z, Vec4<T> some) {
    if (parts && chunks > kSum / kChunk) add(some, z);
    int half = position >= units, unit = position - half * units;
    if (args.bias.data && unit < members) {
      T bias = Element::read(args.bias.data,
                             (outputs.member(group, first_unit + unit) + half * outputs.half) * args.bias.stride[0]);
      add(some, Vec4<T>{bias, bias, bias, bias});
    }
    z = some;
  });
  __syncthreads();
  // Four channels at a time: what there is to be done is asked less often.
  int unit_lanes = args.output_inner ? 8 : kConvThreads / lanes,
      step = unit_lanes * (outputs.contiguous ? 1 : outputs.groups);
  for (int pixel = args.output_inner ? thread / 8 : thread % lanes;
       pixel < pixels && first + pixel < args.raster.pixels; pixel += kConvThreads / unit_lanes) {
    Pixel place = args.raster.at(first + pixel);
    int64_t cond = offset(args.cond, place), kept = offset(args.kept, place);
    int64_t residual = offset(args.residual, place), output = offset(args.output, place);
    for (int unit = args.output_inner ? thread % 8 : thread / lanes; unit < members; unit += 4 * unit_lanes) {
      int channel = outputs.member(group, first_unit + unit);
      T y[4] = {0, 0, 0, 0}, gate[4] = {0, 0, 0, 0};
      auto each = [&](auto&& f) {
        FASTELBO_UNROLL
        for (int i = 0; i < 4; ++i)
          if (unit + i * unit_lanes < members) f(i);
      };
      auto add = [&](const Image& image, int64_t at, T(&to)[4]) {
        if (image.data) each([&](int i) { to[i] += Element::read(image.data, at + i * step * image.stride[1]); });
      };
      auto store = [&](const Image& image, int64_t at, const T(&from)[4]) {
        if (image.data) each([&](int i) { Element::write(image.data, at + i * step * image.stride[1], from[i]); });
      };
      auto replace = [&](auto&& f) {
        FASTELBO_UNROLL
        for (int i = 0; i < 4; ++i) y[i] = f(y[i], gate[i]);
      };
      each([&](int i) { y[i] = memory.sums.z[unit + i * unit_lanes][pixel]; });
      add(args.cond, cond + channel * args.cond.stride[1], y);
      if (outputs.halves == 2) {
        int other = channel + outputs.half;
        each([&](int i) { gate[i] = memory.sums.z[unit + i * unit_lanes + units][pixel]; });
        add(args.cond, cond + other * args.cond.stride[1], gate);
        store(args.kept, kept + channel * args.kept.stride[1], y);
        store(args.kept, kept + other * args.kept.stride[1], gate);
      }
      if (args.activation == Activation::relu)
        replace([](T a, T) { return relu(a); });
      else if (args.activation == Activation::elu)
        replace([](T a, T) { return elu(a); });
      else if (args.activation == Activation::tanh_sigmoid)
        replace([](T a, T b) { return tanh(a) * sigmoid(b); });
      else if (args.activation == Activation::glu)
        replace([](T a, T b) { return a * sigmoid(b); });
      if (outputs.halves == 1) store(args.kept, kept + channel * args.kept.stride[1], y);
      add(args.residual, residual + channel * args.residual.stride[1], y);
      store(args.output, output + channel * args.output.stride[1], y);
    }
  }
}

constexpr int kSlice = 256;  // pixels of an image that a block takes

// The gradient before the activation.
struct ActivationGradient {
  Raster raster;
  unsigned slices, unit_blocks;  // slices of an image
  int units, halves;
  bool inner;      // whether the channels lie innermost in memory
  Activation activation;
  Image d_y, kept;
  Image d_z;        // or none
  double* partial;  // [n, channels, slices]: sums over the pixels; or null
};

template <Format format>
__global__ void __launch_bounds__(kThreads)
    masked_conv2d_activation_kernel(const __grid_constant__ ActivationGradient args) {
  using Element = Stored<format>;
  using T = typename Element::Value;
  __shared__ double sums[2][kThreads];
  int thread = int(threadIdx.x), unit_lanes = args.inner ? 32 : kThreads / 32;
  unsigned image_slice = blockIdx.x / args.unit_blocks, unit_block = blockIdx.x % args.unit_blocks;
  int64_t n = image_slice / args.slices, slice = image_slice % args.slices, begin = slice * kSlice;
  int64_t end = begin + kSlice < args.raster.image ? begin + kSlice : args.raster.image;
  int unit = int(unit_block) * unit_lanes + (args.inner ? thread % 32 : thread / 32), other = unit + args.units;
  double total[2] = {0, 0};
  if (unit < args.units) {
    for (int64_t i = begin + (args.inner ? thread / 32 : thread % 32); i < end; i += kThreads / unit_lanes) {
      Pixel pixel = args.raster.at(i);
      pixel.n = n;
      T upstream = Element::read(args.d_y.data, offset(args.d_y, pixel) + unit * args.d_y.stride[1]), d_a = upstream,
        d_b = 0;
      if (args.activation != Activation::none) {
        int64_t kept = offset(args.kept, pixel);
        T a = Element::read(args.kept.data, kept + unit * args.kept.stride[1]), b = 0;
        if (args.halves == 2) b = Element::read(args.kept.data, kept + other * args.kept.stride[1]);
        if (args.activation == Activation::relu)
          d_a = relu_gradient(a, upstream);
        else if (args.activation == Activation::elu)
          d_a = elu_gradient(a, upstream);
        else if (args.activation == Activation::tanh_sigmoid)
          tanh_sigmoid_gradient(a, b, upstream, d_a, d_b);
        else
          glu_gradient(a, b, upstream, d_a, d_b);
      }
      if (args.d_z.data) {
        int64_t d_z = offset(args.d_z, pixel);
        Element::write(args.d_z.data, d_z + unit * args.d_z.stride[1], d_a);
        if (args.halves == 2) Element::write(args.d_z.data, d_z + other * args.d_z.stride[1], d_b);
      }
      total[0] += double(d_a);
      total[1] += double(d_b);
    }
  }
  if (!args.partial) return;
  sums[0][thread] = total[0];
  sums[1][thread] = total[1];
  __syncthreads();
  int half = thread / unit_lanes, mine = thread % unit_lanes;
  unit = int(unit_block) * unit_lanes + mine;
  if (half >= args.halves || unit >= args.units) return;
  double sum = 0;
  for (int i = 0; i < kThreads / unit_lanes; ++i) sum += sums[half][args.inner ? i * 32 + mine : mine * 32 + i];
  args.partial[((n * args.halves + half) * args.units + unit) * args.slices + slice] = sum;
}

// Sums over the pixels of each entry, which is as many images one after the other.
struct PixelSums {
  const double* partial;  // [n, channels, slices]
  unsigned channels, slices, images;
  Format format;
  char* out;  // [entries, channels]
};

__global__ void __launch_bounds__(kThreads) masked_conv2d_sum_kernel(const __grid_constant__ PixelSums args) {
  unsigned entry = blockIdx.x / args.channels, channel = blockIdx.x % args.channels;
  double total = 0;
  for (unsigned i = threadIdx.x; i < args.images * args.slices; i += kThreads) {
    int64_t n = entry * args.images + i / args.slices;
    total += args.partial[(n * args.channels + channel) * args.slices + i % args.slices];
  }
  total = sum_lanes(total, kThreads);
  if (threadIdx.x == 0) write(args.format, args.out, blockIdx.x, total);
}

constexpr int kTileChannels = 64;
constexpr int kPixels = 16;  // in shared memory at a time, two times over

// Both images are of one format.
struct WeightGradient {
  Raster raster;
  Kernel kernel;
  int in_channels, out_channels;
  int pairs, pair_tiles, channel_tiles;  // a pair of a tap and an input channel, the channel innermost
  int64_t per_split;                     // pixels
  Image input, d_z;
  bool input_inner, d_z_inner;           // whether the channels lie innermost in memory
  void* partial;                         // [splits, pairs of the tiles, channels of the tiles]
};

// Two groups of 64 threads take half of the pixels each; a thread makes `own` pairs of 8 channels, both in runs of
// four.
template <class T>
struct WeightTile {
  static constexpr int own = sizeof(T) == 8 ? 4 : 8, pairs = 8 * own;
  static constexpr int pair_gap = 32, channel_gap = kTileChannels / 2;  // between the starts of runs
  struct Chunks {
    T x[2][kPixels][pairs + 4];  // the rest spreads pixels over the banks
    T d[2][kPixels][kTileChannels + 4];
  };
  struct Sums {
    Vec4<T> of[own * 2][kConvThreads / 2];
  };
};

template <Format format>
__global__ void __launch_bounds__(kConvThreads, format == Format::f64 ? 2 : 3)
    masked_conv2d_weight_kernel(const __grid_constant__ WeightGradient args) {
  using Element = Stored<format>;
  using T = typename Element::Value;
  using Bits = typename Element::Type;
  using Tile = WeightTile<T>;
  constexpr int own = Tile::own;
  constexpr bool parts = in_parts<format>;
  __shared__ Both<typename Tile::Chunks, typename Tile::Sums, parts> memory;
  __shared__ Pair pairs[Tile::pairs];
  __shared__ Place places[2][kPixels];
  __shared__ int64_t d_places[2][kPixels];  // -1 for none
  int thread = int(threadIdx.x);
  int64_t block = blockIdx.x;
  int first_pair = int(block % args.pair_tiles) * Tile::pairs;
  block /= args.pair_tiles;
  int first_channel = int(block % args.channel_tiles) * kTileChannels;
  int64_t split = block / args.channel_tiles, begin = split * args.per_split, end = begin + args.per_split;
  if (end > args.raster.pixels) end = args.raster.pixels;

  auto find = [&](int chunk) {
    if (thread >= kPixels) return;
    int64_t index = begin + int64_t(chunk) * kPixels + thread, d_place = -1;
    Place place = kNowhere;
    if (index < end) {
      Pixel pixel = args.raster.at(index);
      place = place_of(args.input, pixel);
      d_place = offset(args.d_z, pixel);
    }
    places[chunk % 2][thread] = place;
    d_places[chunk % 2][thread] = d_place;
  };
  if (thread < Tile::pairs) {
    int k = first_pair + thread;
    int tap = k / args.in_channels, channel = k % args.in_channels;
    pairs[thread] = k < args.pairs ? args.kernel.pair(tap, channel, args.input, 1) : kNoPair;
  }
  find(0);
  __syncthreads();

  const Bits *input = reinterpret_cast<const Bits*>(args.input.data),
             *d_z = reinterpret_cast<const Bits*>(args.d_z.data);
  Bits x[kPixels * Tile::pairs / kConvThreads], d[kPixels * kTileChannels / kConvThreads];
  // The i-th of what a thread loads of a chunk of so many columns; neighbours in memory are for neighbouring threads.
  auto pixel_of = [&](int i, int columns, auto inner) {
    return inner.value ? thread / columns + i * (kConvThreads / columns) : thread % kPixels;
  };
  auto column_of = [&](int i, int columns, auto inner) {
    return inner.value ? thread % columns : thread / kPixels + i * (kConvThreads / kPixels);
  };
  auto load_x = [&](int chunk, auto inner) {
    FASTELBO_UNROLL
    for (int i = 0; i < kPixels * Tile::pairs / kConvThreads; ++i) {
      const Place& place = places[chunk % 2][pixel_of(i, Tile::pairs, inner)];
      const Pair& pair = pairs[column_of(i, Tile::pairs, inner)];
      x[i] = pair.inside(place, args.raster) ? input[place.offset + pair.offset] : Bits(0);
    }
  };
  auto load_d = [&](int chunk, auto inner) {
    FASTELBO_UNROLL
    for (int i = 0; i < kPixels * kTileChannels / kConvThreads; ++i) {
      int64_t place = d_places[chunk % 2][pixel_of(i, kTileChannels, inner)];
      int channel = first_channel + column_of(i, kTileChannels, inner);
      d[i] = place >= 0 && channel < args.out_channels ? d_z[place + channel * args.d_z.stride[1]] : Bits(0);
    }
  };
  auto put = [&](const auto& from, auto& to, auto columns, auto inner) {
    FASTELBO_UNROLL
    for (int i = 0; i < kPixels * columns.value / kConvThreads; ++i)
      to[pixel_of(i, columns.value, inner)][column_of(i, columns.value, inner)] = Element::decode(from[i]);
  };
  std::integral_constant<int, Tile::pairs> x_columns;
  std::integral_constant<int, kTileChannels> d_columns;

  int group = thread / 64, own_pair = thread % 8 * 4, own_channel = thread % 64 / 8 * 4;
  T total[own][8];
  auto clear = [&] {
    FASTELBO_UNROLL
    for (int m = 0; m < own; ++m) {
      FASTELBO_UNROLL
      for (int i = 0; i < 8; ++i) total[m][i] = 0;
    }
  };
  // Calls f(a run of sums in shared memory, those in registers, which run).
  auto each_run = [&](auto&& f) {
    FASTELBO_UNROLL
    for (int m = 0; m < own * 2; ++m) {
      Vec4<T> some;
      FASTELBO_UNROLL
      for (int i = 0; i < 4; ++i) some.v[i] = total[m / 2][m % 2 * 4 + i];
      f(memory.sums.of[m][thread % 64], some, m);
    }
  };
  constexpr int in_part = kSum / (kPixels / 2);  // chunks
  clear();
  int chunks = int((end - begin + kPixels - 1) / kPixels);
  for (int chunk = -1; chunk < chunks; ++chunk) {
    bool more = chunk + 1 < chunks;
    if (more) {
      if (args.input_inner)
        load_x(chunk + 1, std::true_type());
      else
        load_x(chunk + 1, std::false_type());
      if (args.d_z_inner)
        load_d(chunk + 1, std::true_type());
      else
        load_d(chunk + 1, std::false_type());
    }
    find(chunk + 2);
    if (chunk >= 0) {
      FASTELBO_UNROLL
      for (int p = 0; p < kPixels / 2; ++p) {
        int pixel = group * (kPixels / 2) + p;
        multiply_add<own>(&memory.staged.d[chunk % 2][pixel][own_channel], Tile::channel_gap,
                          &memory.staged.x[chunk % 2][pixel][own_pair], Tile::pair_gap, total);
      }
      // one group after the other: they add to the same sums
      if (parts && more && (chunk + 1) % in_part == (group == 0 ? in_part / 2 : 0)) {
        bool first = chunk + 1 == in_part / 2;
        each_run([&](Vec4<T>& sums, Vec4<T> part, int) {
          if (!first) add(part, sums);
          sums = part;
        });
        clear();
      }
    }
    if (more) {
      int buffer = (chunk + 1) % 2;
      if (args.input_inner)
        put(x, memory.staged.x[buffer], x_columns, std::true_type());
      else
        put(x, memory.staged.x[buffer], x_columns, std::false_type());
      if (args.d_z_inner)
        put(d, memory.staged.d[buffer], d_columns, std::true_type());
      else
        put(d, memory.staged.d[buffer], d_columns, std::false_type());
    }
    __syncthreads();
  }

  if (group == 1) {
    each_run([&](Vec4<T>& sums, Vec4<T> some, int) {
      if (parts && chunks > in_part / 2) add(some, sums);
      sums = some;
    });
  }
  __syncthreads();
  if (group == 1) return;
  Vec4<T>* out = static_cast<Vec4<T>*>(args.partial);
  int64_t width = int64_t(args.channel_tiles) * kTileChannels,
          row = split * args.pair_tiles * Tile::pairs + first_pair + own_pair;
  each_run([&](const Vec4<T>& sums, Vec4<T> some, int m) {
    add(some, sums);
    int pair = m / 8 * Tile::pair_gap + m / 2 % 4, channel = first_channel + own_channel + m % 2 * Tile::channel_gap;
    out[((row + pair) * width + channel) / 4] = some;
  });
}

template <class T>
struct Reduce {
  Kernel kernel;
  Direction direction;
  int64_t splits, rows, width;
  const T* partial;  // [splits, rows, width]
  Image d_weight;    // [out, in, row, column]
};

// A block for 32 output channels of one input channel and tap; exactly 0 where that is dead.
template <class T>
__global__ void __launch_bounds__(kThreads) masked_conv2d_reduce_kernel(const __grid_constant__ Reduce<T> args) {
  __shared__ double sums[kThreads / 32][32];
  const Kernel& kernel = args.kernel;
  const Channels &outputs = args.direction.outputs, &inputs = args.direction.inputs;
  int blocks = (outputs.all() + 31) / 32, lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int out = int(blockIdx.x % unsigned(blocks)) * 32 + lane, pair = int(blockIdx.x / unsigned(blocks));
  int in = pair % inputs.all(), row = pair / inputs.all() / kernel.weight_columns,
      column = pair / inputs.all() % kernel.weight_columns;
  int tap = (row - kernel.first_row) * kernel.columns + column - kernel.first_column;
  bool reaches = row >= kernel.first_row && unsigned(column - kernel.first_column) < unsigned(kernel.columns);
  bool live = reaches && tap < args.direction.taps;
  if (reaches && tap == args.direction.taps && args.direction.centre && out < outputs.all())
    live = args.direction.strict ? inputs.group(in) < outputs.group(out) : inputs.group(in) <= outputs.group(out);
  double total = 0;
  if (live && out < outputs.all())
    for (int64_t split = warp; split < args.splits; split += kThreads / 32)
      total += double(args.partial[(split * args.rows + tap * inputs.all() + in) * args.width + out]);
  sums[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || out >= outputs.all()) return;
  for (int other = 1; other < kThreads / 32; ++other) total += sums[other][lane];
  int64_t at = out * args.d_weight.stride[0] + in * args.d_weight.stride[1] + row * args.d_weight.stride[2] +
               column * args.d_weight.stride[3];
  write(args.d_weight.format, args.d_weight.data, at, total);
}

}  // namespace fastelbo::device

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
  Mask mask;
  device::Raster raster;
  device::Kernel kernel;
  Image weight;
  Format format;
  ScalarType dtype;  // of the arithmetic
  Device device;

  Problem(const Tensor& input, const Tensor& weight, const std::string& mask_type, const std::string& stack,
          int64_t dilation, int64_t groups, const std::string& order, const std::string& activation)
      : n(input.sizes()[0]),
        rows(input.sizes()[2]),
        columns(input.sizes()[3]),
        z_channels(weight.sizes()[0]),
        activation(parse_activation(activation)),
        mask(weight, input, mask_type, stack, dilation, groups, order, is_gate(this->activation)),
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
                                             Text activation, bool keep) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation}.forward(
      bias, cond, residual);
  Launcher launch("masked_conv2d_fwd", input);
  Problem problem(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation);
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
                                                             bool want_bias, int64_t cond_ndim) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation}.backward(
      d_y, kept, cond_ndim);
  Launcher launch("masked_conv2d_bwd", input);
  Problem problem(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation);
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
