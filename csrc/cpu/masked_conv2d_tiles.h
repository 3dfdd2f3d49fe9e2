// What registers add up: outputs in planes, outputs in pixels, and weight gradients. Included inside a namespace, once
// per instruction set (masked_conv2d.loops.h).

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
constexpr int kBlock = 8, kPairs = 12, kPixels = 12;
constexpr bool kMasks = true;  // a load that leaves out lanes costs no more than another
#else
constexpr int kBlock = 4, kPairs = 6, kPixels = 6;
constexpr bool kMasks = false;
#endif
constexpr int kVectors = 3;       // of pixels in a tile
constexpr int kFewPairs = kPairs / 3;  // of a list's last tiles
constexpr int kChannelVectors = 2;  // of output channels in a tile of the weight gradient, or of pixels

// kBlock output channels of `vectors` neighbouring vectors, on top of a vector for each channel. masks: those of the
// first tap, `of_tap` before those of the next.
template <class T, int vectors, bool masked>
inline void conv_tile(const T* in, const int32_t* offsets, const Run* run, const uint16_t* masks, int64_t of_tap,
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
    if ((run++)->ends == Run::tile) return;
  }
}

// A block of output channels over neighbouring positions: out[kBlock][pitch]. starts: of each tile's runs, null where
// all have the same.
template <class T, bool masked>
inline void conv_row(const T* in, const int32_t* offsets, const Run* runs, const int32_t* starts, const uint16_t* masks,
                     int64_t of_tap, const T* weights, const T* constants, int64_t positions, T* out, int64_t pitch,
                     Ahead ahead = {}) {
  constexpr int lanes = WideOf<T>::lanes;
  for (int64_t left = (positions + lanes - 1) / lanes, tile; left > 0; left -= tile) {
    tile = tile_of(left);
    auto conv = tile == 3 ? &conv_tile<T, 3, masked> : tile == 2 ? &conv_tile<T, 2, masked> : &conv_tile<T, 1, masked>;
    conv(in, offsets, runs + (starts ? *starts++ : 0), masks, of_tap, weights, constants, out, pitch);
    if (masked) masks += tile;
    ahead.fetch((left + kVectors - 1) / kVectors);
    in += tile * lanes;
    out += tile * lanes;
  }
}

// Neighbouring pixels, `step` apart in memory, of some output channels, on top of the constants of these. weights:
// [pairs][block]
template <class T, int pixels, int vectors>
inline void pixel_tile(const T* in, int64_t step, const int32_t* offsets, const Run* run, const T* weights,
                       int64_t block, const T* constants, T* out, int64_t out_step) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  for (bool first = true;; first = false) {
    V total[pixels][vectors];
    FASTELBO_UNROLL
    for (int p = 0; p < pixels; ++p) {
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v) total[p][v] = V(T(0));
    }
    for (;; ++run) {
      const T* w = weights + run->begin * block;
      for (int64_t k = run->begin; k < run->end; ++k, w += block) {
        const T* from = in + offsets[k];
        V of_channels[vectors];
        FASTELBO_UNROLL
        for (int v = 0; v < vectors; ++v) of_channels[v] = Wide::get(w + v * Wide::lanes);
        FASTELBO_UNROLL
        for (int p = 0; p < pixels; ++p) {
          V x = Wide::all(from[p * step]);
          FASTELBO_UNROLL
          for (int v = 0; v < vectors; ++v) total[p][v] = fma(of_channels[v], x, total[p][v]);
        }
      }
      if (run->ends != Run::nothing) break;
    }
    FASTELBO_UNROLL
    for (int p = 0; p < pixels; ++p) {
      T* to = out + p * out_step;
      FASTELBO_UNROLL
      for (int v = 0; v < vectors; ++v) {
        T* of = to + v * Wide::lanes;
        Wide::put(of, total[p][v] + Wide::get(first ? constants + v * Wide::lanes : of));
      }
    }
    if ((run++)->ends == Run::tile) return;
  }
}

template <class T, int vectors>
inline auto pixel_tile_of(int64_t pixels) {
  return pixels == kPixels           ? &pixel_tile<T, kPixels, vectors>
         : pixels == kPixels * 2 / 3 ? &pixel_tile<T, kPixels * 2 / 3, vectors>
         : pixels == kPixels / 3     ? &pixel_tile<T, kPixels / 3, vectors>
                                     : &pixel_tile<T, 1, vectors>;
}

// Where rows and their pixels lie.
template <class T>
struct Rows {
  const T* data;
  int64_t pitch, step;

  int64_t at(int64_t row, int64_t column) const { return row * pitch + column * step; }
};

// The products of `pairs` inputs, given by their offsets, with a block of output channels, summed over the pixels of a
// window. dz: pixels of channels side by side, which are the lanes, so that a NaN reaches the weights of its own
// channel only. vectors: fewer than the block has, where its channels fill no more.
template <class T, int pairs, int vectors>
inline void weight_tile(const Rows<T>& in, const int32_t* offsets, const Rows<T>& dz, const Window& window, T* totals) {
  using Wide = WideOf<T>;
  using V = typename Wide::type;
  constexpr int64_t kD = kChannelVectors * Wide::lanes;
  const T* from[pairs];
  FASTELBO_UNROLL
  for (int m = 0; m < pairs; ++m) from[m] = in.data + offsets[m];
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
        const T* of_pixel = dz.data + dz.at(row, left);
        for (int64_t i = in.at(row, left), end = in.at(row, right); i < end; i += in.step, of_pixel += dz.step) {
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
template <class T, int pairs>
inline auto weight_tile_of(bool few_channels) {
  return few_channels ? &weight_tile<T, pairs, 1> : &weight_tile<T, pairs, kChannelVectors>;
}
