// The kernels of a masked convolution's other gradients: masked_conv2d.cu has a table.
#pragma once

#include "masked_conv2d.cuh"

namespace fastelbo::device {

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
    T x[2][kPixels][pairs + 4];  // the 4 of padding spread pixels over the banks
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
  int tap = kernel.index((row - kernel.first_row) * kernel.columns + column - kernel.first_column);
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
