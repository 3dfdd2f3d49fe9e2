// The kernels of a masked convolution, and of its input gradient, which is one too: masked_conv2d.cu has a table.
#pragma once

#include "../common/masked_conv2d.h"
#include "host.cuh"

namespace fastelbo::device {

#include "../math/activation.h"

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

constexpr int kMostListed = 128;

// The taps, live or not, of that part of a weight which reaches into the image, in raster order; the live ones are the
// first, or a list.
struct Kernel {
  int columns, centre_row, centre_column, dilation;
  int first_row, first_column, weight_taps, weight_columns;  // where it lies in the weight, and of all of that
  int listed;                                                // how many are in the list; 0: there is none
  uint16_t list[kMostListed];

  // Where the live tap of an index lies, in raster order; and the other way round, or a number beyond all live taps.
  FASTELBO_INLINE int place(int tap) const { return listed ? list[tap] : tap; }
  FASTELBO_INLINE int index(int place) const {
    for (int tap = 0; tap < listed; ++tap)
      if (list[tap] == place) return tap;
    return listed ? kMostListed : place;
  }

  // sign: -1 for the input gradient.
  FASTELBO_INLINE Pair pair(int tap, int channel, const Image& image, int sign) const {
    int at = place(tap);
    int64_t down = int64_t(at / columns - centre_row) * dilation * sign;
    int64_t right = int64_t(at % columns - centre_column) * dilation * sign;
    return {channel * image.stride[1] + down * image.stride[2] + right * image.stride[3], int(down), int(right)};
  }
};

// Which pairs each group of output channels sums over.
struct Direction {
  Channels outputs, inputs;
  int taps;     // live for all channels
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
    int own = outputs.member(group, unit) + position / units * outputs.half, place = args.kernel.place(tap);
    int64_t out = direction.transposed ? other : own, in = direction.transposed ? own : other;
    weight = read<T>(args.weight.format, args.weight.data,
                     out * args.weight.stride[0] + in * args.weight.stride[1] +
                         (args.kernel.first_row + place / args.kernel.columns) * args.weight.stride[2] +
                         (args.kernel.first_column + place % args.kernel.columns) * args.weight.stride[3]);
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
  static constexpr int pitch = pixels + 4;  // of which the 4 of padding spread channels over the banks
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

}  // namespace fastelbo::device
