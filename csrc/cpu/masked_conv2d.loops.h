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
  static FASTELBO_INLINE void put(float* to, F32 a) { store(to, a, Whole{}); }
};
template <> struct WideOf<double> {
  using type = F64;
  static constexpr int lanes = kLanes / 2;
  static FASTELBO_INLINE F64 all(double x) { return F64(x - NativeD{}); }
  static FASTELBO_INLINE F64 get(const double* from) { return F64(*(const UnalignedD*)from); }
  static FASTELBO_INLINE void put(double* to, F64 a) { *(UnalignedD*)to = a.v; }
};

// Registers: AVX-512 has 32, the others 16 (AArch64 has 32, and does not need them).
#if defined(FASTELBO_AVX512)
constexpr int kBlock = 8, kPairs = 12;
#else
constexpr int kBlock = 4, kPairs = 6;
#endif
constexpr int kVectors = 3;       // of pixels in a tile
constexpr int kChannelVectors = 2;  // of output channels in a tile of the weight gradient

// The sizes that host code must know, too.
template <class T, bool>
void conv_constants(int64_t* block, int64_t* vector, int64_t* slack, int64_t* lanes, int64_t* pairs) {
  *block = kBlock;
  *vector = WideOf<T>::lanes;
  *slack = kVectors * WideOf<T>::lanes;
  *lanes = kChannelVectors * WideOf<T>::lanes;
  *pairs = kPairs;
}

// Rows of one channel of an image, from an offset on, to and from rows of the arithmetic type that lie `pitch` apart.
template <class T>
inline void read_rows(const Image& image, int64_t offset, int64_t rows, int64_t columns, T* to, int64_t pitch) {
  if (pitch == columns && image.stride[2] == columns * image.stride[3]) {
    columns *= rows;
    rows = 1;
  }
  with_format(image.format, [&](auto format) {
    for (int64_t row = 0; row < rows; ++row)
      gather<decltype(format)>(image.data, offset + row * image.stride[2], image.stride[3], int(columns),
                               to + row * pitch);
  });
}
template <class T>
inline void write_rows(const Image& image, int64_t offset, int64_t rows, int64_t columns, const T* from,
                       int64_t pitch) {
  if (pitch == columns && image.stride[2] == columns * image.stride[3]) {
    columns *= rows;
    rows = 1;
  }
  with_format(image.format, [&](auto format) {
    for (int64_t row = 0; row < rows; ++row)
      scatter<decltype(format)>(image.data, offset + row * image.stride[2], image.stride[3], int(columns),
                                from + row * pitch);
  });
}

// to[i * to_stride + line] = from[line * stride + i]
template <class T>
inline void transpose(const T* from, int64_t stride, int64_t lines, int64_t length, T* to, int64_t to_stride) {
  int64_t line = 0;
#if defined(FASTELBO_AVX2) || defined(FASTELBO_AVX512)
  if constexpr (sizeof(T) == 4) {
    for (; line + 8 <= lines; line += 8, from += 8 * stride, to += 8) {
      int64_t i = 0;
      for (; i + 8 <= length; i += 8) {
        __m256 r[8], s[8];
        FASTELBO_UNROLL
        for (int k = 0; k < 8; ++k) r[k] = _mm256_loadu_ps(from + k * stride + i);
        FASTELBO_UNROLL
        for (int k = 0; k < 8; k += 2) {
          s[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
          s[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
        }
        FASTELBO_UNROLL
        for (int k = 0; k < 8; k += 4) {
          r[k] = _mm256_shuffle_ps(s[k], s[k + 2], 0x44);
          r[k + 1] = _mm256_shuffle_ps(s[k], s[k + 2], 0xee);
          r[k + 2] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0x44);
          r[k + 3] = _mm256_shuffle_ps(s[k + 1], s[k + 3], 0xee);
        }
        FASTELBO_UNROLL
        for (int k = 0; k < 4; ++k) {
          _mm256_storeu_ps(to + (i + k) * to_stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x20));
          _mm256_storeu_ps(to + (i + k + 4) * to_stride, _mm256_permute2f128_ps(r[k], r[k + 4], 0x31));
        }
      }
      for (; i < length; ++i)
        for (int k = 0; k < 8; ++k) to[i * to_stride + k] = from[k * stride + i];
    }
    for (; line + 4 <= lines; line += 4, from += 4 * stride, to += 4) {
      int64_t i = 0;
      for (; i + 4 <= length; i += 4) {
        __m128 r[4];
        FASTELBO_UNROLL
        for (int k = 0; k < 4; ++k) r[k] = _mm_loadu_ps(from + k * stride + i);
        _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
        FASTELBO_UNROLL
        for (int k = 0; k < 4; ++k) _mm_storeu_ps(to + (i + k) * to_stride, r[k]);
      }
      for (; i < length; ++i)
        for (int k = 0; k < 4; ++k) to[i * to_stride + k] = from[k * stride + i];
    }
  }
#endif
  for (; line < lines; ++line, from += stride, ++to)
    for (int64_t i = 0; i < length; ++i) to[i * to_stride] = from[i];
}

// Whether an image's pixels are vectors of channels, of the arithmetic type; `pixel` is the address of one.
template <class T>
inline bool channels_innermost(const Image& image) {
  return image.stride[1] == 1 && image.stride[3] != 1 && image.format == (sizeof(T) == 4 ? Format::f32 : Format::f64);
}
template <class T>
inline T* pixel(const Image& image, int64_t offset) {
  return reinterpret_cast<T*>(image.data) + offset;
}

// How many rows to take of one channel before the next: with channels last one, so that a row of all channels stays in
// the cache, else some that fill vectors.
inline int64_t rows_of_a_channel(const Image& image, int64_t columns) {
  constexpr int64_t kPixels = 1024;
  return image.stride[3] == 1 && columns < kPixels ? kPixels / columns : 1;
}

template <class T>
FASTELBO_INLINE void zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// Of each further copy of a plane: 1 where the first one, moved to the side, stays in its row, else 0.
template <class T>
inline void find_kept(const Planes& planes, T* kept) {
  for (int64_t copy = 1; copy < planes.copies; ++copy) {
    for (int64_t i = 0; i < planes.plane; ++i, ++kept) {
      int64_t column = (i + planes.pitch - planes.front % planes.pitch) % planes.pitch + planes.shifts[size_t(copy)];
      *kept = T(column >= 0 && column < planes.columns);
    }
  }
}

// Fills the further copies of a channel's first plane.
template <class T>
inline void move_plane(const Planes& planes, const T* kept, T* of_channel) {
  int64_t reach = planes.front, count = planes.plane - 2 * reach;
  for (int64_t copy = 1; copy < planes.copies; ++copy, kept += planes.plane) {
    const T *from = of_channel + reach + planes.shifts[size_t(copy)], *keep = kept + reach;
    T* to = of_channel + copy * planes.plane + reach;
    for (int64_t i = 0; i < count; ++i) {
      T value = from[i];
      to[i] = keep[i] != 0 ? value : T(0);
    }
  }
}

// Rows first - above .. first + rows + below - 1 of all channels. Those inside the image come through fetch(row, count,
// i), `step` at a time: row .. row + count - 1 of all channels, into rows i .. of the planes.
template <class T, class Fetch>
inline void pack_planes(const Planes& planes, int64_t image_rows, int64_t channels, int64_t first, int64_t rows,
                        int64_t step, const T* kept, T* to, Fetch&& fetch) {
  int64_t all = planes.above + rows + planes.below, start = first - planes.above;
  int64_t begin = std::max<int64_t>(-start, 0), end = std::min(all, image_rows - start);
  for (int64_t c = 0; c < channels; ++c) {
    T* plane = to + c * planes.size;
    zero(plane, planes.front + begin * planes.pitch);
    for (int64_t i = begin; i < end; ++i) zero(plane + planes.front + i * planes.pitch + planes.columns, planes.gap);
    zero(plane + planes.front + end * planes.pitch, planes.plane - planes.front - end * planes.pitch);
  }
  for (int64_t i = begin; i < end; i += step) fetch(start + i, std::min(step, end - i), i);
  for (int64_t c = 0; c < channels; ++c) move_plane(planes, kept, to + c * planes.size);
}

template <class T>
inline void pack_input(const ConvArgs& args, int64_t n, int64_t first, int64_t rows, const T* kept, T* to) {
  const Planes& planes = args.planes;
  int64_t step = rows_of_a_channel(args.input, args.columns);
  pack_planes(
      planes, args.rows, args.in_channels, first, rows, step, kept, to, [&](int64_t row, int64_t count, int64_t i) {
        T* at = to + planes.front + i * planes.pitch;
        if (channels_innermost<T>(args.input))
          return transpose(pixel<T>(args.input, args.input.at(n, 0, row)), args.input.stride[3], args.columns,
                           args.in_channels, at, planes.size);
        for (int64_t c = 0; c < args.in_channels; ++c)
          read_rows(args.input, args.input.at(n, c, row), count, args.columns, at + c * planes.size, planes.pitch);
      });
}

// Products that registers add up, one after the other, before their total joins the others in memory: rounding errors
// grow with the root of this number and of that of totals, not with that of all products. tests/rounding.py has the
// bound.
constexpr int64_t kSum = 128;

// kBlock output channels of vectors * lanes neighbouring pixels, on top of a constant for each channel.
template <class T, int vectors>
inline void conv_tile(const T* in, const int32_t* offsets, int64_t pairs, int64_t in_sum, const T* weights,
                      const T* constants, T* out, int64_t pitch) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  int64_t k = 0;
  do {
    bool first = k == 0;
    V total[kBlock][vectors];
    FASTELBO_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v) total[m][v] = V(T(0));
    }
    for (int64_t end = std::min(k + in_sum, pairs); k < end; ++k, weights += kBlock) {
      const T* from = in + offsets[k];
      V x[vectors];
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v) x[v] = Wide::get(from + v * Wide::lanes);
      FASTELBO_UNROLL
      for (int m = 0; m < kBlock; ++m) {
        V w = Wide::all(weights[m]);
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v) total[m][v] = fma(w, x[v], total[m][v]);
      }
    }
    FASTELBO_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      T* to = out + m * pitch;
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v, to += Wide::lanes)
        Wide::put(to, total[m][v] + (first ? Wide::all(constants[m]) : Wide::get(to)));
    }
  } while (k < pairs);
}

// A block of output channels over all pixels of a band: out[kBlock][pitch].
template <class T>
inline void conv_band(const T* in, const int32_t* offsets, int64_t pairs, const T* weights, const T* constants,
                      int64_t positions, T* out, int64_t pitch) {
  constexpr int lanes = WideOf<T>::lanes;
  int64_t sums = std::max<int64_t>((pairs + kSum - 1) / kSum, 1), in_sum = (pairs + sums - 1) / sums;
  for (int64_t p = 0; p < positions;) {
    int64_t left = (positions - p + lanes - 1) / lanes;  // vectors; four are two and two, not three and one
    if (left >= 3 && left != 4) {
      conv_tile<T, 3>(in + p, offsets, pairs, in_sum, weights, constants, out + p, pitch);
      p += 3 * lanes;
    } else if (left >= 2) {
      conv_tile<T, 2>(in + p, offsets, pairs, in_sum, weights, constants, out + p, pitch);
      p += 2 * lanes;
    } else {
      conv_tile<T, 1>(in + p, offsets, pairs, in_sum, weights, constants, out + p, pitch);
      p += lanes;
    }
  }
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
    for (int64_t row = 0; row < rows; ++row)
      transpose(from + row * pitch, stride, kBlock, columns, pixel<T>(image, image.at(n, c, first + row)),
                image.stride[3]);
    return;
  }
  for (int m = 0; m < kBlock && side.channel(unit, m) >= 0; ++m)
    write_rows(image, image.at(n, side.channel(unit, m), first), rows, columns, from + m * stride, pitch);
}

// What follows the sum over taps and the bias, for the rows of one output channel: z[half], gaps and all.
template <class T>
inline void finish_channel(const ConvArgs& args, int64_t n, int64_t c, int64_t first, int64_t rows, T* const* z,
                           T* scratch) {
  int64_t columns = args.columns, pitch = args.planes.pitch, positions = args.planes.positions(rows);
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

template <class T>
struct ScratchOf : Scratch {
  explicit ScratchOf(int64_t count) : Scratch(count * int64_t(sizeof(T))) {}
  T* get() const { return static_cast<T*>(data); }
};

template <class T, bool>
void masked_conv2d_fwd(const ConvArgs& args, int64_t begin, int64_t end) {
  const Planes& planes = args.planes;
  const Side& forward = args.forward;
  int64_t pitch = planes.positions(args.band) + kVectors * WideOf<T>::lanes;
  ScratchOf<T> kept((planes.copies - 1) * planes.plane), in(args.in_channels * planes.size),
      z(forward.halves * kBlock * pitch), row_scratch(args.columns + kVectors * WideOf<T>::lanes);
  find_kept(planes, kept.get());
  for (int64_t task = begin; task < end; ++task) {
    int64_t n = task / args.bands, first = task % args.bands * args.band, rows = std::min(args.band, args.rows - first);
    pack_input(args, n, first, rows, kept.get(), in.get());
    for (int64_t u = 0; u < forward.units(); ++u) {
      for (int h = 0; h < forward.halves; ++h) {
        T constants[kBlock] = {};
        for (int m = 0; m < kBlock && forward.channel(u, m) >= 0; ++m) {
          int64_t channel = forward.channel(u, m) + h * forward.half;
          if (args.bias) constants[m] = value_at<T>(args.bias, channel * args.bias.stride[0]);
          if (args.cond && args.cond_ndim == 2) constants[m] += value_at<T>(args.cond, args.cond.at(n, channel, 0));
        }
        conv_band(in.get() + planes.first(), forward.offsets(u), forward.pairs(u),
                  static_cast<const T*>(args.packed) + forward.weights_of(u, h), constants, planes.positions(rows),
                  z.get() + h * kBlock * pitch, pitch);
      }
      for (int m = 0; m < kBlock && forward.channel(u, m) >= 0; ++m) {
        T* planes_of_channel[2] = {z.get() + m * pitch, z.get() + (kBlock + m) * pitch};
        finish_channel(args, n, forward.channel(u, m), first, rows, planes_of_channel, row_scratch.get());
      }
      write_unit(args.y, forward, u, n, first, rows, args.columns, z.get(), pitch, planes.pitch);
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

// The products of kPairs inputs, given by their offsets, with a block of output channels, summed over the pixels of a
// window. dz: [rows][columns][lanes of the block]. Lanes are channels, so that a NaN reaches the weights of its own
// channel only.
template <class T>
inline void weight_tile(const T* in, const int32_t* offsets, const T* dz, const Window& window, int64_t columns,
                        int64_t pitch, T* totals) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  constexpr int64_t kD = kChannelVectors * Wide::lanes;
  const T* from[kPairs];
  FASTELBO_UNROLL
  for (int m = 0; m < kPairs; ++m) from[m] = in + offsets[m];
  int64_t width = window.right - window.left, height = std::max<int64_t>(kSum / width, 1);  // of what registers add up
  width = std::min(width, kSum);
  for (int64_t top = window.top; top < window.bottom; top += height) {
    int64_t bottom = std::min(top + height, window.bottom);
    for (int64_t left = window.left; left < window.right; left += width) {
      int64_t right = std::min(left + width, window.right);
      V total[kPairs][kChannelVectors];
      FASTELBO_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        FASTELBO_UNROLL
        for (int v = 0; v < kChannelVectors; ++v) total[m][v] = V(T(0));
      }
      for (int64_t row = top; row < bottom; ++row) {
        const T* of_pixel = dz + (row * columns + left) * kD;
        for (int64_t i = row * pitch + left; i < row * pitch + right; ++i, of_pixel += kD) {
          V d[kChannelVectors];
          FASTELBO_UNROLL
          for (int v = 0; v < kChannelVectors; ++v) d[v] = Wide::get(of_pixel + v * Wide::lanes);
          FASTELBO_UNROLL
          for (int m = 0; m < kPairs; ++m) {
            V x = Wide::all(from[m][i]);
            FASTELBO_UNROLL
            for (int v = 0; v < kChannelVectors; ++v) total[m][v] = fma(x, d[v], total[m][v]);
          }
        }
      }
      T* to = totals;
      FASTELBO_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        FASTELBO_UNROLL
        for (int v = 0; v < kChannelVectors; ++v, to += Wide::lanes) Wide::put(to, Wide::get(to) + total[m][v]);
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

constexpr int64_t kWeightPositions = 256;  // pixels whose gradients, transposed, stay in the first-level cache

template <class T, bool>
void masked_conv2d_bwd(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr int lanes = kChannelVectors * WideOf<T>::lanes;
  const Planes &planes = args.planes, &d_planes = args.d_planes;
  const Side& backward = args.backward;
  int64_t pitch = d_planes.positions(args.band) + kVectors * WideOf<T>::lanes;
  int64_t blocks = (args.z_channels + lanes - 1) / lanes;
  int64_t rows_at_once = std::max<int64_t>(1, std::min(kWeightPositions / args.columns, args.band));
  int64_t step = rows_of_a_channel(args.d_y, args.columns), most = covered<T>(step * args.columns);
  ScratchOf<T> kept((d_planes.copies - 1) * d_planes.plane), dz(args.z_channels * d_planes.size), row_scratch(3 * most);
  find_kept(d_planes, kept.get());
  zero(row_scratch.get(), 3 * most);
  ScratchOf<T> in(args.partial ? args.in_channels * planes.size : 0);
  ScratchOf<T> transposed(args.partial ? rows_at_once * args.columns * lanes : 0);
  ScratchOf<T> d_in(args.d_input ? kBlock * pitch : 0);
  const T no_constants[kBlock] = {};
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    T* partial = args.partial ? static_cast<T*>(args.partial) + chunk * blocks * args.pairs * lanes : nullptr;
    if (partial) zero(partial, blocks * args.pairs * lanes);
    for (int64_t unit = args.first_unit(chunk); unit < args.first_unit(chunk + 1); ++unit) {
      int64_t n = unit / args.bands, first = unit % args.bands * args.band,
              rows = std::min(args.band, args.rows - first);
      pack_planes(d_planes, args.rows, args.z_channels, first, rows, step, kept.get(), dz.get(),
                  [&](int64_t row, int64_t count, int64_t i) {
                    if (args.activation == Activation::none && channels_innermost<T>(args.d_y))
                      return transpose(pixel<T>(args.d_y, args.d_y.at(n, 0, row)), args.d_y.stride[3], args.columns,
                                       args.z_channels, dz.get() + d_planes.front + i * d_planes.pitch, d_planes.size);
                    for (int64_t c = 0; c < args.y_channels; ++c) {
                      T* line = dz.get() + c * d_planes.size + d_planes.front + i * d_planes.pitch;
                      T* lines[2] = {line, line + args.y_channels * d_planes.size};
                      activation_gradient(args, n, c, row, count, lines, d_planes.pitch, row_scratch.get(), most);
                    }
                  });
      if (args.d_cond || args.sums_wanted) {
        for (int64_t c = 0; c < args.z_channels; ++c) {
          const T* line = dz.get() + c * d_planes.size + d_planes.first();
          if (args.d_cond)
            write_rows(args.d_cond, args.d_cond.at(n, c, first), rows, args.columns, line, d_planes.pitch);
          if (args.sums_wanted) args.sums[unit * args.z_channels + c] = sum_plane(line, d_planes.positions(rows));
        }
      }
      if (args.d_input) {
        for (int64_t u = 0; u < backward.units(); ++u) {
          conv_band(dz.get() + d_planes.first(), backward.offsets(u), backward.pairs(u),
                    static_cast<const T*>(args.d_packed) + backward.weights_of(u, 0), no_constants,
                    d_planes.positions(rows), d_in.get(), pitch);
          write_unit(args.d_input, backward, u, n, first, rows, args.columns, d_in.get(), pitch, d_planes.pitch);
        }
      }
      if (partial) {
        pack_input<T>(args, n, first, rows, nullptr, in.get());
        for (int64_t row = 0; row < rows; row += rows_at_once) {
          int64_t some = std::min(rows_at_once, rows - row);
          for (int64_t block = 0; block < blocks; ++block) {
            const T* line = dz.get() + block * lanes * d_planes.size + d_planes.first() + row * d_planes.pitch;
            bool gapless = d_planes.pitch == args.columns;
            int64_t run = gapless ? some * args.columns : args.columns;
            for (int64_t r = 0; r < (gapless ? 1 : some); ++r)
              transpose_block<T, lanes>(line + r * d_planes.pitch, d_planes.size, args.z_channels - block * lanes, run,
                                        transposed.get() + r * run * lanes);
            for (int64_t pair = 0; pair < args.pairs; pair += kPairs)
              weight_tile(in.get() + planes.first() + row * planes.pitch, args.pair_offsets(pair), transposed.get(),
                          args.window(pair / kPairs).of_rows(first + row, some), args.columns, planes.pitch,
                          partial + (block * args.pairs + pair) * lanes);
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
  for (int64_t out = begin; out < end; ++out) {
    for (int64_t in = 0; in < args.in_channels; ++in) {
      for (int64_t t = 0; t < taps; ++t) {
        double total = 0;
        if (args.live(t, out, in))
          for (int64_t chunk = 0; chunk < args.chunks; ++chunk)
            total += partial[((chunk * blocks + out / lanes) * args.pairs + t * args.in_channels + in) * lanes +
                             out % lanes];
        const Tap& tap = args.tap(t);
        int64_t offset = out * to.stride[0] + in * to.stride[1] + tap.row * to.stride[2] + tap.column * to.stride[3];
        with_format(to.format, [&](auto format) { scatter<decltype(format)>(to.data, offset, 1, 1, &total); });
      }
    }
  }
}

}  // namespace fastelbo::FASTELBO_ISA
