// Every loop works on tiles of up to kTile elements in logical (row-major) order. An operand of any dtype, any strides
// and any broadcasting arrives as a contiguous run of the arithmetic type: in place where it is one already, through a
// scratch tile in the first-level cache where not. So there is one loop per op, not one per layout.
// Included inside a namespace, once per instruction set (per_isa.h).

// F32 for float arithmetic, double for double.
template <class T> struct VectorOf;
template <> struct VectorOf<float> {
  using type = F32;
  static constexpr int lanes = kLanes;
};
template <> struct VectorOf<double> {
  using type = double;
  static constexpr int lanes = 1;
};

// Calls f(offset, Whole or Part) until n elements are covered.
template <class T, class F>
FASTELBO_INLINE void for_each_vector(int n, F&& f) {
  constexpr int lanes = VectorOf<T>::lanes;
  int i = 0;
  for (; i + lanes <= n; i += lanes) f(i, Whole{});
  if (i < n) f(i, Part{n - i});
}

// Calls f(offset, Within) until n elements are covered: half the code, for loops that store whole vectors to a tile.
template <class T, class F>
FASTELBO_INLINE void for_each_vector_of_tile(int n, F&& f) {
  for (int i = 0; i < n; i += VectorOf<T>::lanes) f(i, Within{n - i});
}

inline float half_to_float(uint16_t bits) {
#if defined(FASTELBO_AVX2) || defined(FASTELBO_AVX512)
  return _cvtsh_ss(bits);
#else
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(bits);
#endif
}
inline uint16_t float_to_half(float x) {
#if defined(FASTELBO_AVX2) || defined(FASTELBO_AVX512)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  return torch::headeronly::detail::fp16_ieee_from_fp32_value(x);
#endif
}

// One element of memory to and from the arithmetic type, by storage format.
struct AsF32 {
  using Stored = float;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};
struct AsF64 {
  using Stored = double;
  static double get(double x) { return x; }
  static double put(double x) { return x; }
};
struct AsBF16 {
  using Stored = uint16_t;
  static float get(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return y;
  }
  static uint16_t put(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return uint16_t(x == x ? rounded : 0x7fc0);
  }
};
struct AsF16 {
  using Stored = uint16_t;
  static float get(uint16_t x) { return half_to_float(x); }
  static uint16_t put(float x) { return float_to_half(x); }
};
struct AsU8 {
  using Stored = uint8_t;
  static float get(uint8_t x) { return x; }
  static uint8_t put(float x) { return uint8_t(x); }
};

template <class F>
inline void with_format(Format format, F&& f) {
  switch (format) {
    case Format::f32: return f(AsF32{});
    case Format::f64: return f(AsF64{});
    case Format::bf16: return f(AsBF16{});
    case Format::f16: return f(AsF16{});
    case Format::u8: return f(AsU8{});
  }
}

template <class As, class T>
inline void gather(const char* data, int64_t offset, int64_t stride, int n, T* to) {
  auto from = reinterpret_cast<const typename As::Stored*>(data) + offset;
  if (stride == 1)
    for (int i = 0; i < n; ++i) to[i] = T(As::get(from[i]));
  else if (stride == 0) {
    T value = T(As::get(*from));
    for (int i = 0; i < n; ++i) to[i] = value;
  } else
    for (int i = 0; i < n; ++i) to[i] = T(As::get(from[i * stride]));
}
template <class As, class T>
inline void scatter(char* data, int64_t offset, int64_t stride, int n, const T* from) {
  auto to = reinterpret_cast<typename As::Stored*>(data) + offset;
  if (stride == 1)
    for (int i = 0; i < n; ++i) to[i] = As::put(from[i]);
  else
    for (int i = 0; i < n; ++i) to[i * stride] = As::put(from[i]);
}

// Calls f(memory offset, stride, count, position in the tile) for each run of the tile along the innermost dimension.
template <class F>
inline void for_each_run(const Operand& operand, int64_t start, int n, F&& f) {
  if (n == 0) return;
  int inner = operand.ndim - 1;
  int64_t index[kMaxDims], offset = 0, rest = start;
  for (int d = inner; d > 0; --d) {
    index[d] = rest % operand.size[d];
    rest /= operand.size[d];
    offset += index[d] * operand.stride[d];
  }
  index[0] = rest;
  offset += rest * operand.stride[0];
  for (int done = 0;;) {
    int count = int(std::min<int64_t>(n - done, operand.size[inner] - index[inner]));
    f(offset, operand.stride[inner], count, done);
    done += count;
    if (done == n) return;
    offset -= index[inner] * operand.stride[inner];
    index[inner] = 0;
    for (int d = inner - 1; d >= 0; --d) {
      offset += operand.stride[d];
      if (++index[d] < operand.size[d]) break;
      offset -= operand.size[d] * operand.stride[d];
      index[d] = 0;
    }
  }
}

// Where elements start .. start + n - 1 can be used in place, or null. Only whole runs of the arithmetic type can.
template <class T>
inline T* in_place(const Operand& operand, int64_t start, int n) {
  if (n == 0 || operand.format != (sizeof(T) == 4 ? Format::f32 : Format::f64)) return nullptr;
  T* found = nullptr;
  if (operand.ndim == 1) {
    if (operand.stride[0] == 1) found = reinterpret_cast<T*>(operand.data) + start;
  } else if (operand.stride[operand.ndim - 1] == 1 && n <= operand.size[operand.ndim - 1]) {
    for_each_run(operand, start, 1,
                 [&](int64_t offset, int64_t, int, int) { found = reinterpret_cast<T*>(operand.data) + offset; });
    if (start % operand.size[operand.ndim - 1] + n > operand.size[operand.ndim - 1]) found = nullptr;
  }
  return found;
}

template <class T>
inline const T* read_tile(const Operand& operand, int64_t start, int n, T* scratch) {
  if (const T* direct = in_place<T>(operand, start, n)) return direct;
  for_each_run(operand, start, n, [&](int64_t offset, int64_t stride, int count, int at) {
    with_format(operand.format, [&](auto format) {
      // What the next tile reads comes from memory while this one is computed with, as it would unasked if values were
      // used where they lie.
      if (stride == 1) {
        constexpr int64_t kLine = 64, size = sizeof(typename decltype(format)::Stored);
        const char* next = operand.data + (offset + count) * size;
        for (int64_t i = 0; i < count * size; i += kLine) __builtin_prefetch(next + i, 0, 2);
      }
      gather<decltype(format)>(operand.data, offset, stride, count, scratch + at);
    });
  });
  return scratch;
}

// Write the tile at the pointer that output() gives, then call finish(): it moves what went to scratch.
template <class T>
inline T* output(const Operand& operand, int64_t start, int n, T* scratch) {
  T* direct = in_place<T>(operand, start, n);
  return direct ? direct : scratch;
}
template <class T>
inline void finish(const Operand& operand, int64_t start, int n, const T* tile, const T* scratch) {
  if (tile != scratch) return;
  for_each_run(operand, start, n, [&](int64_t offset, int64_t stride, int count, int at) {
    with_format(operand.format,
                [&](auto format) { scatter<decltype(format)>(operand.data, offset, stride, count, tile + at); });
  });
}

// What a tile's elements are multiplied with, but that 0 takes the place of NaN, too.
template <class T>
struct MaskTile {
  const T* mask;  // null where there is none
  T scratch[kTile];

  void read(const Operand& operand, int64_t start, int n) {
    mask = operand ? read_tile(operand, start, n, scratch) : nullptr;
  }
  template <class... Values>
  void select(int n, Values*... tiles) const {
    if (mask) (select_one(n, tiles), ...);
  }

 private:
  void select_one(int n, T* x) const {
    for (int i = 0; i < n; ++i) x[i] = mask[i] != 0 ? x[i] : T(0);
  }
};

// The sum of the lanes, a power of two of them, as a tree.
template <int count>
FASTELBO_INLINE float sum_tree(float* lanes) {
  for (int width = count / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  return lanes[0];
}

// Sum in a fixed order, the same for every vector length: element i goes to accumulator i % 64, then a tree.
inline double sum(const float* x, int n) {
  constexpr int accumulators = 64, few = 16, vectors = accumulators / kLanes;
  if (n <= few) {  // the accumulators beyond would add zeros
    float lanes[few] = {};
    for (int j = 0; j < n; ++j) lanes[j] = x[j];
    return sum_tree<few>(lanes);
  }
  F32 total[vectors];
  for (F32& part : total) part = F32(0.0f);
  int i = 0;
  for (; i + accumulators <= n; i += accumulators) {
    FASTELBO_UNROLL
    for (int k = 0; k < vectors; ++k) total[k] = total[k] + load(x + i + k * kLanes, Whole{});
  }
  if (i < n) {
    FASTELBO_UNROLL
    for (int k = 0; k < vectors; ++k) {
      int left = std::min(n - i - k * kLanes, kLanes);
      if (left == kLanes)
        total[k] = total[k] + load(x + i + k * kLanes, Whole{});
      else if (left > 0)
        total[k] = total[k] + load(x + i + k * kLanes, Part{left});
    }
  }
  FASTELBO_UNROLL
  for (int width = vectors / 2; width > 0; width /= 2) {
    FASTELBO_UNROLL
    for (int k = 0; k < width; ++k) total[k] = total[k] + total[k + width];
  }
  float lanes[kLanes];
  store(lanes, total[0], Whole{});
  return sum_tree<kLanes>(lanes);
}
inline double sum(const double* x, int n) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += x[i];
  return total;
}

// Passes on a tile of terms, written where output_terms() said: as they are, or as the sums of its rows.
template <class T>
inline T* output_terms(const Terms& terms, const Tile& tile, T* scratch) {
  return terms.elements ? output(terms.elements, tile.start, tile.count, scratch) : scratch;
}
template <class T>
inline void finish_terms(Terms& terms, const Tiling& tiling, const Tile& tile, const T* values, const T* scratch) {
  if (terms.elements) return finish(terms.elements, tile.start, tile.count, values, scratch);
  if (tile.rows == 0) {
    terms.partial[tile.row * tiling.chunks_per_row + (tile.start - tile.row * tiling.columns) / kTile] =
        sum(values, tile.count);
    return;
  }
  for (int row = 0; row < tile.rows; ++row)
    static_cast<T*>(terms.sums)[tile.row + row] = T(sum(values + row * tiling.columns, int(tiling.columns)));
}
