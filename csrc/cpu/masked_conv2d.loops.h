// The loops of masked_conv2d.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

#include "../math/activation.h"

// A register of doubles, for the float64 convolution; the elementwise loops have scalar ones.
typedef double NativeD __attribute__((vector_size(4 * kLanes)));
typedef NativeD UnalignedD __attribute__((aligned(8), may_alias));
struct F64 {
  NativeD v;
  F64() = default;
  FASTELBO_INLINE explicit F64(NativeD x) : v(x) {}
  FASTELBO_INLINE explicit F64(double x) : v(NativeD{} + x) {}
};
FASTELBO_INLINE F64 fma(F64 a, F64 b, F64 c) {
#if defined(FASTELBO_AVX512)
  return F64((NativeD)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v));
#elif defined(FASTELBO_AVX2)
  return F64((NativeD)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v));
#else
  return F64(a.v * b.v + c.v);
#endif
}
FASTELBO_INLINE F64 operator+(F64 a, F64 b) { return F64(a.v + b.v); }

template <class T> struct WideOf;
template <> struct WideOf<float> {
  using type = F32;
  static constexpr int lanes = kLanes;
  // x - 0 is x, and compiles to a broadcast; 0 + x, which F32(x) is, turns -0 into 0 and costs an addition
  static FASTELBO_INLINE F32 all(float x) { return F32(x - NativeF{}); }
  static FASTELBO_INLINE F32 get(const float* from) { return load(from, Whole{}); }
#if defined(FASTELBO_AVX512)
  static FASTELBO_INLINE F32 get(const float* from, uint16_t mask) {
    return F32((NativeF)_mm512_maskz_loadu_ps(mask, from));
  }
#endif
  static FASTELBO_INLINE void put(float* to, F32 a) { store(to, a, Whole{}); }
};
template <> struct WideOf<double> {
  using type = F64;
  static constexpr int lanes = kLanes / 2;
  static FASTELBO_INLINE F64 all(double x) { return F64(x - NativeD{}); }
  static FASTELBO_INLINE F64 get(const double* from) { return F64(*(const UnalignedD*)from); }
#if defined(FASTELBO_AVX512)
  static FASTELBO_INLINE F64 get(const double* from, uint16_t mask) {
    return F64((NativeD)_mm512_maskz_loadu_pd(__mmask8(mask), from));
  }
#endif
  static FASTELBO_INLINE void put(double* to, F64 a) { *(UnalignedD*)to = a.v; }
};

// Registers: AVX-512 has 32, the others 16 (AArch64 has 32, and does not need them).
#if defined(FASTELBO_AVX512)
constexpr int kBlock = 8, kPairs = 12;
constexpr bool kMasks = true;  // a load that leaves out lanes costs no more than another
#else
constexpr int kBlock = 4, kPairs = 6;
constexpr bool kMasks = false;
#endif
constexpr int kVectors = 3;       // of pixels in a tile
constexpr int kFewPairs = kPairs / 3;  // of a list's last tiles
constexpr int kChannelVectors = 2;  // of output channels in a tile of the weight gradient

// The sizes that host code must know, too.
template <class T, bool>
void conv_constants(int64_t* block, int64_t* vector, int64_t* slack, int64_t* lanes, int64_t* pairs, int64_t* few_pairs,
                    bool* masks) {
  *block = kBlock;
  *vector = WideOf<T>::lanes;
  *slack = kVectors * WideOf<T>::lanes;
  *lanes = kChannelVectors * WideOf<T>::lanes;
  *pairs = kPairs;
  *few_pairs = kFewPairs;
  *masks = kMasks;
}

#include "masked_conv2d_planes.h"

enum class Layout { spaced, masked, images };  // pixels with zeros between rows, or with masks; images in lanes

// kBlock output channels of `vectors` neighbouring vectors, on top of a vector for each channel. masks: those of the
// first tap, `of_tap` before those of the next. Returns the next tile's runs.
template <class T, int vectors, bool masked>
inline const Run* conv_tile(const T* in, const int32_t* offsets, const Run* run, const uint16_t* masks, int64_t of_tap,
                            const T* weights, const T* constants, T* out, int64_t pitch) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  for (bool first = true;; first = false) {
    V total[kBlock][vectors];
    FASTELBO_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v) total[m][v] = V(T(0));
    }
    for (;; ++run) {
      int64_t begin = run->begin, end = run->end;
      uint16_t inside[vectors] = {};
      if (masked && begin < end) {
        int any = 0;
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v) any |= inside[v] = masks[run->tap * of_tap + v];
        if (!any) end = begin;
      }
      const T* w = weights + begin * kBlock;
      for (int64_t k = begin; k < end; ++k, w += kBlock) {
        const T* from = in + offsets[k];
        V x[vectors];
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v, from += Wide::lanes) {
          if constexpr (masked)
            x[v] = Wide::get(from, inside[v]);
          else
            x[v] = Wide::get(from);
        }
        FASTELBO_UNROLL
        for (int m = 0; m < kBlock; ++m) {
          V of_channel = Wide::all(w[m]);
          FASTELBO_UNROLL
          for (int v = 0; v < vectors; ++v) total[m][v] = fma(of_channel, x[v], total[m][v]);
        }
      }
      if (run->ends != Run::nothing) break;
    }
    FASTELBO_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      T* to = out + m * pitch;
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v, to += Wide::lanes)
        Wide::put(to, total[m][v] + Wide::get(first ? constants + m * Wide::lanes : to));
    }
    if ((run++)->ends == Run::tile) return run;
  }
}

// A block of output channels over neighbouring positions: out[kBlock][pitch]. With images in lanes each tile has runs
// of its own, else all have the same.
template <class T, Layout layout>
inline const Run* conv_row(const T* in, const int32_t* offsets, const Run* runs, const uint16_t* masks, int64_t of_tap,
                           const T* weights, const T* constants, int64_t positions, T* out, int64_t pitch,
                           Ahead ahead = {}) {
  constexpr int lanes = WideOf<T>::lanes;
  constexpr bool masked = layout == Layout::masked;
  for (int64_t left = (positions + lanes - 1) / lanes, tile; left > 0; left -= tile) {
    tile = tile_of(left);
    auto conv = tile == 3 ? &conv_tile<T, 3, masked> : tile == 2 ? &conv_tile<T, 2, masked> : &conv_tile<T, 1, masked>;
    const Run* next = conv(in, offsets, runs, masks, of_tap, weights, constants, out, pitch);
    if (layout == Layout::images) runs = next;
    if (masked) masks += tile;
    ahead.fetch((left + kVectors - 1) / kVectors);
    in += tile * lanes;
    out += tile * lanes;
  }
  return runs;
}

// The weights of units begin .. end - 1 in the order in which conv_tile reads them.
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
          for (int m = 0; m < kBlock; ++m, ++at) {
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

// Vectors that cover n elements, and those that they cover in all. Rows in scratch are that long, with zeros at the
// end.
template <class T>
FASTELBO_INLINE int64_t covered(int64_t n) {
  constexpr int lanes = VectorOf<T>::lanes;
  return (n + lanes - 1) / lanes * lanes;
}
template <class T, class F>
FASTELBO_INLINE void for_covered(int64_t n, F&& f) {
  for (int64_t i = 0; i < n; i += VectorOf<T>::lanes) f(i);
}

// Adds rows of an image; past the end of a row it adds zeros to the gap, and to the next row.
template <class T>
inline void add_rows(const Image& image, int64_t offset, int64_t rows, int64_t columns, T* to, int64_t pitch,
                     T* scratch) {
  zero(scratch + columns, covered<T>(columns) - columns);
  for (int64_t row = 0; row < rows; ++row, to += pitch) {
    read_rows(image, offset + row * image.stride[2], 1, columns, scratch, columns);
    for_covered<T>(columns, [&](int64_t i) FASTELBO_LAMBDA {
      store(to + i, load(to + i, Whole{}) + load(scratch + i, Whole{}), Whole{});
    });
  }
}

// Writes rows of a unit's channels, which lie `stride` apart.
template <class T>
inline void write_unit(const Image& image, const Side& side, int64_t unit, int64_t n, int64_t first, int64_t rows,
                       int64_t columns, const T* from, int64_t stride, int64_t pitch) {
  int c = side.channel(unit, 0);
  if (channels_innermost<T>(image) && side.channel(unit, kBlock - 1) == c + kBlock - 1) {
    if (is_one_row(image, columns, pitch)) {
      columns *= rows;
      rows = 1;
    }
    for (int64_t row = 0; row < rows; ++row)
      transpose(from + row * pitch, stride, kBlock, columns, pixel<T>(image, image.at(n, c, first + row)),
                image.stride[3]);
    return;
  }
  for (int m = 0; m < kBlock && side.channel(unit, m) >= 0; ++m)
    write_rows(image, image.at(n, side.channel(unit, m), first), rows, columns, from + m * stride, pitch);
}

// What follows the sum over taps and the bias, for the rows of one output channel, `pitch` apart: z[half], gaps and
// all.
template <class T>
inline void finish_channel(const ConvArgs& args, int64_t n, int64_t c, int64_t first, int64_t rows, T* const* z,
                           int64_t pitch, T* scratch) {
  int64_t columns = args.columns, positions = (rows - 1) * pitch + columns;
  bool gated = args.gated();
  for (int h = 0; h < (gated ? 2 : 1); ++h) {
    int64_t channel = c + h * args.y_channels;
    if (args.cond && args.cond_ndim == 4)
      add_rows(args.cond, args.cond.at(n, channel, first), rows, columns, z[h], pitch, scratch);
    if (args.kept && gated) write_rows(args.kept, args.kept.at(n, channel, first), rows, columns, z[h], pitch);
  }
  T* y = z[0];
  switch (args.activation) {
    case Activation::none: break;
    case Activation::relu:
      for_covered<T>(positions, [&](int64_t i) FASTELBO_LAMBDA { store(y + i, relu(load(y + i, Whole{})), Whole{}); });
      break;
    case Activation::elu:
      for_covered<T>(positions, [&](int64_t i) FASTELBO_LAMBDA { store(y + i, elu(load(y + i, Whole{})), Whole{}); });
      break;
    case Activation::tanh_sigmoid:
      for_covered<T>(positions, [&](int64_t i) FASTELBO_LAMBDA {
        store(y + i, tanh(load(y + i, Whole{})) * sigmoid(load(z[1] + i, Whole{})), Whole{});
      });
      break;
    case Activation::glu:
      for_covered<T>(positions, [&](int64_t i) FASTELBO_LAMBDA {
        store(y + i, load(y + i, Whole{}) * sigmoid(load(z[1] + i, Whole{})), Whole{});
      });
      break;
  }
  if (args.kept && !gated) write_rows(args.kept, args.kept.at(n, c, first), rows, columns, y, pitch);
  if (args.residual) add_rows(args.residual, args.residual.at(n, c, first), rows, columns, y, pitch, scratch);
}

// A band's first row of the first channel, in planes or in place, and what is read for the next one.
template <class T>
struct Band {
  int64_t first, rows;
  const T* in;
  Ahead next;
};

// A unit's outputs over a band: [halves][kBlock][pitch], of each image.
template <class T>
struct Outputs {
  static constexpr int lanes = WideOf<T>::lanes;
  const ConvArgs& args;
  const Planes& planes;
  const Side& side;
  bool of_images;
  int64_t row_pitch, pitch, size;  // of a channel's row, of a channel, of an image
  ScratchOf<T> pixels, interleaved;

  Outputs(const ConvArgs& args, const Planes& planes, const Side& side)
      : args(args),
        planes(planes),
        side(side),
        of_images(planes.lanes > 1),
        row_pitch(of_images ? args.columns : planes.pitch),
        pitch((args.band * row_pitch + lanes - 1) / lanes * lanes + kVectors * lanes),
        size(side.halves * kBlock * pitch),
        pixels(planes.lanes * size),
        interleaved(of_images ? kBlock * lanes * args.band * args.columns : 0) {}
  T* channel(int64_t image, int half, int m) const { return pixels.get() + image * size + (half * kBlock + m) * pitch; }
  // Where a unit lies in an image of the same layout, whole vectors of whole blocks, else null.
  T* in_place(const Image& image, int64_t unit, int64_t n, const Band<T>& band) const {
    int c = side.channel(unit, 0);
    bool same = !of_images && is_plane(image, args.columns, sizeof(T) == 8) && row_pitch == args.columns &&
                band.rows * args.columns % lanes == 0 && side.channel(unit, kBlock - 1) == c + kBlock - 1;
    return same ? pixel<T>(image, image.at(n, c, band.first)) : nullptr;
  }
  // constants: [kBlock][lanes]; to: null, or in place
  void convolve(const Band<T>& band, int64_t unit, int half, const void* packed, const T* constants, T* to,
                int64_t to_pitch) const {
    const T* weights = static_cast<const T*>(packed) + side.weights_of(unit, half);
    const int32_t* offsets = side.offsets(unit);
    const Run* runs = side.runs(unit);
    if (!of_images) {
      if (!to) {
        to = channel(0, half, 0);
        to_pitch = pitch;
      }
      int64_t positions = planes.positions(band.rows);
      Ahead ahead = half == 0 ? band.next.part(unit, side.units()) : Ahead();
      if constexpr (kMasks)
        conv_row<T, Layout::masked>(band.in, offsets, runs, planes.masks_of(band.first / args.band, args.taps()),
                                    planes.vectors, weights, constants, positions, to, to_pitch, ahead);
      else
        conv_row<T, Layout::spaced>(band.in, offsets, runs, nullptr, 0, weights, constants, positions, to, to_pitch,
                                    ahead);
      return;
    }
    int64_t wide = args.columns * lanes, plane = band.rows * wide;
    to = interleaved.get();
    for (int64_t row = 0; row < band.rows; ++row)
      runs = conv_row<T, Layout::images>(band.in + row * planes.pitch, offsets, runs, nullptr, 0, weights, constants,
                                         wide, to + row * wide, plane);
    for (int m = 0; m < kBlock; ++m)
      transpose(to + m * plane, lanes, band.rows * args.columns, lanes, channel(0, half, m), size);
  }
};

// What the sums start from: [units][halves][kBlock][lanes], a lane of each image, or all of one.
template <class T>
inline void find_constants(const ConvArgs& args, int64_t n, int64_t images, T* to) {
  const Side& forward = args.forward;
  for (int64_t u = 0; u < forward.units(); ++u) {
    for (int h = 0; h < forward.halves; ++h) {
      for (int m = 0; m < kBlock; ++m) {
        int64_t channel = forward.channel(u, m) + h * forward.half;
        bool there = forward.channel(u, m) >= 0;
        T bias = there && args.bias ? value_at<T>(args.bias, channel * args.bias.stride[0]) : T(0), value = bias;
        for (int64_t i = 0; i < WideOf<T>::lanes; ++i) {
          if (there && i < images) value = bias + value_at<T>(args.cond, args.cond.at(n + i, channel, 0));
          *to++ = value;
        }
      }
    }
  }
}

template <class T, bool>
void masked_conv2d_fwd(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr int lanes = WideOf<T>::lanes;
  const Planes& planes = args.planes;
  const Side& forward = args.forward;
  ScratchOf<T> kept((planes.copies - 1) * planes.plane), in(planes.in_place ? 0 : args.in_channels * planes.size),
      constants(forward.units() * forward.halves * kBlock * lanes), row_scratch(args.columns + kVectors * lanes);
  bool of_class = args.cond && args.cond_ndim == 2;
  bool bare = args.activation == Activation::none && !args.kept && !args.residual && (!args.cond || of_class);
  if (!of_class) find_constants(args, 0, 0, constants.get());
  Outputs<T> z(args, planes, forward);
  Staging<T> staging(planes);
  find_kept(planes, kept.get());
  if (planes.lanes > 1) zero(in.get(), args.in_channels * planes.size);
  for (int64_t task = begin; task < end;) {
    Share share(task, end, args.parts);
    task += share.tasks();
    int64_t n = share.chunk / args.bands * args.images, images = std::min(args.images, args.n - n),
            first = share.chunk % args.bands * args.band, rows = std::min(args.band, args.rows - first);
    if (of_class) find_constants(args, n, images, constants.get());
    Band<T> band{first, rows, pack_input(args, n, first, rows, kept.get(), staging, in.get()),
                 task < end ? args.ahead(args.input, args.in_channels, task) : Ahead()};
    for (int64_t u = share.first(forward.units()); u < share.last(forward.units()); ++u) {
      T* y = bare ? z.in_place(args.y, u, n, band) : nullptr;
      for (int h = 0; h < forward.halves; ++h)
        z.convolve(band, u, h, args.packed, constants.get() + (u * forward.halves + h) * kBlock * lanes, y,
                   args.y.stride[1]);
      if (y) continue;
      for (int64_t i = 0; i < images; ++i) {
        for (int m = 0; m < kBlock && forward.channel(u, m) >= 0; ++m) {
          T* of_channel[2] = {z.channel(i, 0, m), z.channel(i, forward.halves - 1, m)};
          finish_channel(args, n + i, forward.channel(u, m), first, rows, of_channel, z.row_pitch, row_scratch.get());
        }
        write_unit(args.y, forward, u, n + i, first, rows, args.columns, z.channel(i, 0, 0), z.pitch, z.row_pitch);
      }
    }
  }
}

// The gradient before the activation, for some rows of one output channel: d[half], whose rows lie `pitch` apart.
// scratch: three times `most`.
template <class T>
inline void activation_gradient(const ConvArgs& args, int64_t n, int64_t c, int64_t row, int64_t rows, T* const* d,
                                int64_t pitch, T* scratch, int64_t most) {
  using V = typename VectorOf<T>::type;
  int64_t columns = args.columns, count = rows * columns;
  if (args.activation == Activation::none)
    return read_rows(args.d_y, args.d_y.at(n, c, row), rows, columns, d[0], pitch);
  T *up = scratch, *a = up + most, *b = a + most;  // both of up and a, or of up and b, become the results
  read_rows(args.d_y, args.d_y.at(n, c, row), rows, columns, up, columns);
  read_rows(args.kept, args.kept.at(n, c, row), rows, columns, a, columns);
  if (args.gated()) read_rows(args.kept, args.kept.at(n, c + args.y_channels, row), rows, columns, b, columns);
  switch (args.activation) {
    case Activation::none: break;
    case Activation::relu:
      for_covered<T>(count, [&](int64_t i) FASTELBO_LAMBDA {
        store(up + i, relu_gradient(load(a + i, Whole{}), load(up + i, Whole{})), Whole{});
      });
      break;
    case Activation::elu:
      for_covered<T>(count, [&](int64_t i) FASTELBO_LAMBDA {
        store(up + i, elu_gradient(load(a + i, Whole{}), load(up + i, Whole{})), Whole{});
      });
      break;
    case Activation::tanh_sigmoid:
      for_covered<T>(count, [&](int64_t i) FASTELBO_LAMBDA {
        V d_a, d_b;
        tanh_sigmoid_gradient(load(a + i, Whole{}), load(b + i, Whole{}), load(up + i, Whole{}), d_a, d_b);
        store(up + i, d_a, Whole{});
        store(b + i, d_b, Whole{});
      });
      break;
    case Activation::glu:
      for_covered<T>(count, [&](int64_t i) FASTELBO_LAMBDA {
        V d_a, d_b;
        glu_gradient(load(a + i, Whole{}), load(b + i, Whole{}), load(up + i, Whole{}), d_a, d_b);
        store(up + i, d_a, Whole{});
        store(b + i, d_b, Whole{});
      });
      break;
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < columns; ++i) d[0][r * pitch + i] = up[r * columns + i];
    if (args.gated())
      for (int64_t i = 0; i < columns; ++i) d[1][r * pitch + i] = b[r * columns + i];
  }
}

// to[position][channel] of lanes channels, from planes; zeros for channels that are not there.
template <class T, int lanes>
inline void transpose_block(const T* from, int64_t stride, int64_t channels, int64_t columns, T* to) {
  if (channels < lanes) zero(to, columns * lanes);
  transpose(from, stride, std::min<int64_t>(channels, lanes), columns, to, lanes);
}

// The products of `pairs` inputs, given by their offsets, with a block of output channels, summed over the pixels of a
// window. dz: [rows][columns][lanes of the block]. Lanes are channels, so that a NaN reaches the weights of its own
// channel only. vectors: fewer than the block has, where its channels fill no more.
template <class T, int pairs, int vectors>
inline void weight_tile(const T* in, const int32_t* offsets, const T* dz, const Window& window, int64_t columns,
                        int64_t pitch, T* totals) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  constexpr int64_t kD = kChannelVectors * Wide::lanes;
  const T* from[pairs];
  FASTELBO_UNROLL
  for (int m = 0; m < pairs; ++m) from[m] = in + offsets[m];
  int64_t width = window.right - window.left, height = std::max<int64_t>(kSum / width, 1);  // of what registers add up
  width = std::min<int64_t>(width, kSum);
  for (int64_t top = window.top; top < window.bottom; top += height) {
    int64_t bottom = std::min(top + height, window.bottom);
    for (int64_t left = window.left; left < window.right; left += width) {
      int64_t right = std::min(left + width, window.right);
      V total[pairs][vectors];
      FASTELBO_UNROLL
      for (int m = 0; m < pairs; ++m) {
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v) total[m][v] = V(T(0));
      }
      for (int64_t row = top; row < bottom; ++row) {
        const T* of_pixel = dz + (row * columns + left) * kD;
        for (int64_t i = row * pitch + left; i < row * pitch + right; ++i, of_pixel += kD) {
          V d[vectors];
          FASTELBO_UNROLL
          for (int v = 0; v < vectors; ++v) d[v] = Wide::get(of_pixel + v * Wide::lanes);
          FASTELBO_UNROLL
          for (int m = 0; m < pairs; ++m) {
            V x = Wide::all(from[m][i]);
            FASTELBO_UNROLL
            for (int v = 0; v < vectors; ++v) total[m][v] = fma(x, d[v], total[m][v]);
          }
        }
      }
      T* to = totals;
      FASTELBO_UNROLL
      for (int m = 0; m < pairs; ++m, to += kD) {
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v) {
          T* of = to + v * Wide::lanes;
          Wide::put(of, Wide::get(of) + total[m][v]);
        }
      }
    }
  }
}

// The sum of a plane, whose gaps are zeros.
template <class T>
inline double sum_plane(const T* from, int64_t positions) {
  double total = 0;
  for (int64_t p = 0; p < positions; p += kTile) total += sum(from + p, int(std::min<int64_t>(kTile, positions - p)));
  return total;
}

// The gradient before the activation of a band in d_planes, and what else is wanted of it: d_cond, and sums. Where it
// is that of the output, and no tap reads beside it, it stays in place.
template <class T>
struct ActivationGradient {
  const ConvArgs& args;
  const Planes& planes;
  int64_t step, most;
  ScratchOf<T> kept, scratch, packed;
  Staging<T> staging;

  explicit ActivationGradient(const ConvArgs& args)
      : args(args),
        planes(args.d_planes),
        step(planes.lanes > 1 ? args.rows : rows_of_a_channel(args.d_y, args.columns, args.z_channels, planes.pitch)),
        most(covered<T>(step * args.columns)),
        kept((planes.copies - 1) * planes.plane),
        scratch(3 * most),
        packed(planes.in_place ? 0 : args.z_channels * planes.size),
        staging(planes, args.gated() ? 2 : 1) {
    find_kept(planes, kept.get());
    zero(scratch.get(), 3 * most);
    if (planes.lanes > 1) zero(packed.get(), args.z_channels * planes.size);
  }

  // of: a channel's rows, `pitch` apart, with zeros between them
  void store(int64_t n, int64_t c, int64_t first, int64_t rows, const T* of, int64_t pitch) const {
    if (args.d_cond) write_rows(args.d_cond, args.d_cond.at(n, c, first), rows, args.columns, of, pitch);
    if (args.sums_wanted)
      args.sums[(n * args.bands + first / args.band) * args.z_channels + c] =
          sum_plane(of, (rows - 1) * pitch + args.columns);
  }

  // The band's first row of the first channel.
  const T* pack(int64_t n, int64_t first, int64_t rows, bool stored) const {
    T* to = packed.get();
    const T* band = planes.in_place ? pixel<T>(args.d_y, args.d_y.at(n, 0, first)) : to + planes.first();
    if (planes.lanes > 1) {
      pack_images(n, stored, to);
      return band;
    }
    if (!planes.in_place)
      pack_planes(planes, args.rows, args.z_channels, first, rows, step, kept.get(), to,
                  [&](int64_t row, int64_t count, int64_t i) {
                    if (args.activation == Activation::none && channels_innermost<T>(args.d_y))
                      return transpose(pixel<T>(args.d_y, args.d_y.at(n, 0, row)), args.d_y.stride[3],
                                       count * args.columns, args.z_channels, to + planes.front + i * planes.pitch,
                                       planes.size);
                    for (int64_t c = 0; c < args.y_channels; ++c) {
                      T* line = to + c * planes.size + planes.front + i * planes.pitch;
                      T* lines[2] = {line, line + args.y_channels * planes.size};
                      activation_gradient(args, n, c, row, count, lines, planes.pitch, scratch.get(), most);
                    }
                  });
    for (int64_t c = 0; c < args.z_channels; ++c) store(n, c, first, rows, band + c * planes.size, planes.pitch);
    return band;
  }

  void pack_images(int64_t n, bool stored, T* to) const {
    int64_t images = std::min(args.images, args.n - n);
    for (int64_t c = 0; c < args.y_channels; ++c) {
      for (int64_t i = 0; i < images; ++i) {
        T* lines[2] = {staging.plane(i), staging.plane(i, args.gated())};
        activation_gradient(args, n + i, c, 0, args.rows, lines, staging.columns, scratch.get(), most);
      }
      for (int h = 0; h < (args.gated() ? 2 : 1); ++h) {
        int64_t channel = c + h * args.y_channels;
        for (int64_t i = 0; i < images && stored; ++i)
          store(n + i, channel, 0, args.rows, staging.plane(i, h), staging.columns);
        staging.pack(images, h, to + channel * planes.size);
      }
    }
  }
};

constexpr int64_t kWeightPositions = 256;  // positions whose gradients, transposed, stay in the first-level cache

template <class T, bool>
void masked_conv2d_bwd(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr int lanes = kChannelVectors * WideOf<T>::lanes;
  const Planes &planes = args.planes, &d_planes = args.d_planes;
  const Side& backward = args.backward;
  int64_t blocks = (args.z_channels + lanes - 1) / lanes, tiles = (args.pairs + kPairs - 1) / kPairs;
  int64_t wide = args.columns * planes.lanes;  // positions of a row
  int64_t rows_at_once = std::max<int64_t>(1, std::min(kWeightPositions / wide, args.band));
  ActivationGradient<T> gradient(args);
  Outputs<T> d_in(args, d_planes, backward);
  Staging<T> staging(planes);
  int64_t in_size = args.partial ? args.in_channels * planes.size : 0;
  ScratchOf<T> in(in_size), transposed(args.partial ? rows_at_once * wide * lanes : 0);
  if (planes.lanes > 1) zero(in.get(), in_size);
  const T no_constants[kBlock * WideOf<T>::lanes] = {};
  for (int64_t task = begin; task < end;) {
    Share share(task, end, args.parts);
    task += share.tasks();
    int64_t first_pair = share.first(tiles) * kPairs, last_pair = std::min(share.last(tiles) * kPairs, args.pairs);
    T* partial = args.partial ? static_cast<T*>(args.partial) + share.chunk * blocks * args.pairs * lanes : nullptr;
    for (int64_t block = 0; partial && block < blocks; ++block)
      zero(partial + (block * args.pairs + first_pair) * lanes, (last_pair - first_pair) * lanes);
    for (int64_t unit = args.first_unit(share.chunk); unit < args.first_unit(share.chunk + 1); ++unit) {
      int64_t n = unit / args.bands * args.images, images = std::min(args.images, args.n - n),
              first = unit % args.bands * args.band, rows = std::min(args.band, args.rows - first);
      const T* dz = gradient.pack(n, first, rows, share.begin == 0);
      Band<T> d_band{first, rows, dz,
                     unit + 1 < args.units() ? args.ahead(args.d_y, args.y_channels, unit + 1) : Ahead()};
      if (args.d_input) {
        for (int64_t u = share.first(backward.units()); u < share.last(backward.units()); ++u) {
          T* in_place = d_in.in_place(args.d_input, u, n, d_band);
          d_in.convolve(d_band, u, 0, args.d_packed, no_constants, in_place, args.d_input.stride[1]);
          for (int64_t i = 0; i < images && !in_place; ++i)
            write_unit(args.d_input, backward, u, n + i, first, rows, args.columns, d_in.channel(i, 0, 0), d_in.pitch,
                       d_in.row_pitch);
        }
      }
      if (partial) {
        const T* band = pack_input<T>(args, n, first, rows, nullptr, staging, in.get());
        for (int64_t row = 0; row < rows; row += rows_at_once) {
          int64_t some = std::min(rows_at_once, rows - row);
          for (int64_t block = 0; block < blocks; ++block) {
            const T* line = dz + block * lanes * d_planes.size + row * d_planes.pitch;
            bool few_channels = args.z_channels - block * lanes <= WideOf<T>::lanes;
            bool gapless = d_planes.pitch == wide;
            int64_t run = gapless ? some * wide : wide;
            for (int64_t r = 0; r < (gapless ? 1 : some); ++r)
              transpose_block<T, lanes>(line + r * d_planes.pitch, d_planes.size, args.z_channels - block * lanes, run,
                                        transposed.get() + r * run * lanes);
            for (int64_t pair = first_pair, step; pair < last_pair; pair += step) {
              step = last_pair - pair >= kPairs ? kPairs : kFewPairs;
              auto tile = step == kPairs
                              ? few_channels ? &weight_tile<T, kPairs, 1> : &weight_tile<T, kPairs, kChannelVectors>
                          : few_channels ? &weight_tile<T, kFewPairs, 1>
                                         : &weight_tile<T, kFewPairs, kChannelVectors>;
              tile(band + row * planes.pitch, args.pair_offsets(pair), transposed.get(),
                   args.window(pair / kPairs).part(first + row, some, planes.lanes), wide, planes.pitch,
                   partial + (block * args.pairs + pair) * lanes);
            }
          }
        }
      }
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
