// How a kernel reaches its elements. The elements are rows of columns; a thread takes groups of a few consecutive
// columns.
//
// Packed: every row of every operand is whole 16-byte vectors of one storage format. Flat: every operand is contiguous
// and begins with such a vector, whatever its rows. Strided: anything else.
#pragma once

#include "../common/host.h"
#include "tuning.cuh"
#include "vec.cuh"

namespace fastelbo::device {

// n / divisor for n < 2^31 by a multiplication: a division takes twenty instructions.
struct Divisor {
  uint32_t divisor = 1, magic = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor(divisor) {
    while ((uint64_t(1) << shift) < divisor) ++shift;
    magic = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - divisor)) / divisor + 1);
  }
  FASTELBO_INLINE uint32_t divide(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
};

// The elements: row-major, for the noise from noise_offset on.
struct Layout {
  int64_t rows = 1, columns = 0;
  int64_t noise_offset = 0;
  bool aligned = false;  // groups start at multiples of four of all elements, where Philox blocks do
  // For Packed and Flat: columns in vectors, and the Philox block of the first element.
  uint32_t vectors = 0;
  uint64_t first_block = 0;
  // For Flat: all elements, and those of an event, whose row a kernel may look for; what is a row of `Work` here.
  uint32_t total = 0, span = 0, events = 1;  // span: `events` events, more than one where they are short and summed
  int event_lanes_log2 = 0;                  // of the threads that share the sum of one
  Divisor event;
  // For Strided: the dimensions that make up a row's index, then those that make up a column's.
  int outer = 0, inner = 0;
  int64_t size[kMaxDims] = {};
  Divisor divisor[kMaxDims];
  bool wide = false;  // an index may need more than 31 bits
};

// How rows are spread over threads: `lanes` threads share a row, or one of its splits, and take `steps` groups each.
struct Work {
  int64_t rows = 0, groups = 0;  // groups of a row
  int lanes_log2 = 0, steps = 0;  // a block of lanes where there are several splits
  Divisor splits;
  int64_t blocks = 0;
};

// What one thread does: groups first, first + lanes, ... below end.
template <class Index>
struct Thread {
  Index row, first, end, lanes;
  uint32_t split;

  FASTELBO_INLINE explicit Thread(const Work& work) {
    lanes = Index(1) << work.lanes_log2;
    uint32_t row_block = work.splits.divide(blockIdx.x);
    split = blockIdx.x - row_block * work.splits.divisor;
    row = Index(row_block) * (kThreads >> work.lanes_log2) + (threadIdx.x >> work.lanes_log2);
    Index span = Index(work.steps) << work.lanes_log2, start = split * span, groups = Index(work.groups);
    first = start + (threadIdx.x & (lanes - 1));
    end = start + span < groups ? start + span : groups;
    if (row >= Index(work.rows)) end = first;
    keep(row);
    keep(end);
    keep(lanes);
  }
};

// The sum over the `lanes` threads that share a row, in the first of them. Every thread of the block calls it.
FASTELBO_INLINE double sum_lanes(double x, int lanes) {
  FASTELBO_ROLLED
  for (int distance = (lanes < 32 ? lanes : 32) / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, distance);
  if (lanes > 32) {
    __shared__ double warps[kThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if ((threadIdx.x & (lanes - 1)) == 0) {
      FASTELBO_ROLLED
      for (int warp = 1; warp < lanes / 32; ++warp) x += warps[threadIdx.x / 32 + warp];
    }
  }
  return x;
}

// Where an elementwise term goes that is summed over its row.
template <class V>
struct Sums {
  V* out;           // [rows]; null where the terms are stored element by element
  double* partial;  // [rows, splits], where there are several

  template <class Index>
  FASTELBO_INLINE void store(const Work& work, const Thread<Index>& thread, double x) const {
    double total = sum_lanes(x, int(thread.lanes));
    if (thread.row >= Index(work.rows) || (threadIdx.x & (thread.lanes - 1))) return;
    if (work.splits.divisor > 1)
      partial[int64_t(thread.row) * work.splits.divisor + thread.split] = total;
    else
      out[thread.row] = V(total);
  }
};

FASTELBO_INLINE float bf16_to_float(uint32_t bits) { return as_float(int32_t(bits << 16)); }

// An element of a storage format, and the arithmetic type.
template <Format format>
struct Stored {
  using Type =
      std::conditional_t<format == Format::f64, double, std::conditional_t<format == Format::f32, float, uint16_t>>;
  using Value = std::conditional_t<format == Format::f64, double, float>;

  static FASTELBO_INLINE Value decode(Type x) {
    if constexpr (format == Format::bf16)
      return bf16_to_float(x);
    else if constexpr (format == Format::f16)
      return f16_to_float(x);
    else
      return x;
  }
  static FASTELBO_INLINE Type encode(Value x) {
    if constexpr (format == Format::bf16)
      return uint16_t(pack_bf16(x, 0));
    else if constexpr (format == Format::f16)
      return uint16_t(pack_f16(x, 0));
    else
      return x;
  }
  static FASTELBO_INLINE Value read(const char* data, int64_t at) {
    return decode(reinterpret_cast<const Type*>(data)[at]);
  }
  static FASTELBO_INLINE void write(char* data, int64_t at, Value x) { reinterpret_cast<Type*>(data)[at] = encode(x); }
};

// Where the format is known at run time only.
template <class T>
FASTELBO_INLINE T read(Format format, const char* data, int64_t at) {
  switch (format) {
    case Format::f32: return T(Stored<Format::f32>::read(data, at));
    case Format::f64: return T(Stored<Format::f64>::read(data, at));
    case Format::bf16: return T(Stored<Format::bf16>::read(data, at));
    default: return T(Stored<Format::f16>::read(data, at));
  }
}
template <class T>
FASTELBO_INLINE void write(Format format, char* data, int64_t at, T x) {
  switch (format) {
    case Format::f32: return Stored<Format::f32>::write(data, at, float(x));
    case Format::f64: return Stored<Format::f64>::write(data, at, double(x));
    case Format::bf16: return Stored<Format::bf16>::write(data, at, float(x));
    default: return Stored<Format::f16>::write(data, at, float(x));
  }
}

// An exponential scale without a soft clamp, which is what packed kernels take.
template <bool is_clamped>
struct PlainScale : ScaleKinds {
  Kind kind;
  ClampGrad clamp_grad;
  static constexpr bool clamped = is_clamped;
  float clamp_lo, clamp_hi;
  static constexpr float soft_clamp = 0, inv_soft_clamp = 0;

  PlainScale() = default;
  explicit PlainScale(const fastelbo::Scale& scale)
      : kind(scale.kind),
        clamp_grad(scale.clamp_grad),
        clamp_lo(float(scale.clamp_lo)),
        clamp_hi(float(scale.clamp_hi)) {}
};

// Vectors of 16 bytes, of elements of a format or of float32 terms.
template <Format format>
struct Vectors {
  static constexpr int width = format == Format::f32 ? 4 : 8;

  static FASTELBO_INLINE void load(const char* from, float (&out)[width]) {
    if constexpr (format == Format::f32) {
      float4 v = *reinterpret_cast<const float4*>(from);
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else {
      uint4 v = *reinterpret_cast<const uint4*>(from);
      const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
      FASTELBO_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (format == Format::bf16) {
          out[2 * i] = bf16_to_float(pair[i]);
          out[2 * i + 1] = as_float(int32_t(pair[i] & 0xffff0000u));
        } else {
          out[2 * i] = f16_to_float(uint16_t(pair[i]));
          out[2 * i + 1] = f16_to_float(uint16_t(pair[i] >> 16));
        }
      }
    }
  }
  static FASTELBO_INLINE void store(char* to, const float (&x)[width]) {
    if constexpr (format == Format::f32) {
      *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
    } else {
      uint32_t pair[4];
      FASTELBO_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (format == Format::bf16)
          pair[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
        else
          pair[i] = pack_f16(x[2 * i], x[2 * i + 1]);
      }
      *reinterpret_cast<uint4*>(to) = {pair[0], pair[1], pair[2], pair[3]};
    }
  }
  static FASTELBO_INLINE void load_terms(const float* from, float (&out)[width]) {
    FASTELBO_UNROLL
    for (int i = 0; i < width; i += 4) {
      float4 v = *reinterpret_cast<const float4*>(from + i);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  }
  static FASTELBO_INLINE void store_terms(float* to, const float (&x)[width]) {
    FASTELBO_UNROLL
    for (int i = 0; i < width; i += 4) *reinterpret_cast<float4*>(to + i) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
  }
};

// Offsets are 32-bit, in vectors: the host sees to it that they fit.
template <Format format, bool clamped>
struct Packed {
  using Value = float;
  using Index = uint32_t;
  using Scale = PlainScale<clamped>;
  static constexpr bool packed = true, flat = false;
  static constexpr int groups = 1;  // that a thread takes at once
  static constexpr int blocks = format == Format::f32 ? kTuning.packed_f32 : kTuning.packed_half;
  static constexpr int width = Vectors<format>::width;

  struct Operand {
    char* data = nullptr;  // [K, rows, columns]; null where not given
    uint32_t row_vectors = 0, sample_vectors = 0;  // strides
    int64_t row_stride = 0;  // in elements, which need not make whole vectors where there is
    bool repeats = false;    // one value a row
  };

  struct Place {
    uint32_t row, group;
    uint64_t block;

    FASTELBO_INLINE bool inside(int) const { return true; }
  };

  // The Philox block of the given one of the group's fours.
  static FASTELBO_INLINE uint64_t block(const Layout&, const Place& place, int four) { return place.block + four; }

  static FASTELBO_INLINE constexpr bool approximate(bool) { return format != Format::f32; }
  static FASTELBO_INLINE constexpr uint32_t kept(const Operand&, const Layout&, const Place&) {
    return ~0u;
  }  // no mask

  static FASTELBO_INLINE Place place(const Layout& layout, const Thread<Index>& thread, uint32_t group) {
    return {thread.row, group, layout.first_block + uint64_t(thread.row * layout.vectors + group) * (width / 4)};
  }

  static FASTELBO_INLINE char* address(const Operand& operand, const Place& place, int64_t sample) {
    return operand.data +
           16 * uint64_t(uint32_t(sample) * operand.sample_vectors + place.row * operand.row_vectors + place.group);
  }

  static FASTELBO_INLINE void load(const Operand& operand, const Layout&, const Place& place, float (&out)[width],
                                   int64_t sample = 0) {
    Vectors<format>::load(address(operand, place, sample), out);
  }

  static FASTELBO_INLINE void store(const Operand& operand, const Layout&, const Place& place, const float (&x)[width],
                                    int64_t sample = 0) {
    Vectors<format>::store(address(operand, place, sample), x);
  }

  // An operand that may hold one value a row.
  static FASTELBO_INLINE void load_repeated(const Operand& operand, const Layout& layout, const Place& place,
                                            float (&out)[width]) {
    if (!operand.repeats) return load(operand, layout, place, out);
    float value;
    if constexpr (format == Format::f32)
      value = reinterpret_cast<const float*>(operand.data)[place.row * operand.row_stride];
    else {
      uint16_t bits = reinterpret_cast<const uint16_t*>(operand.data)[place.row * operand.row_stride];
      value = format == Format::bf16 ? bf16_to_float(bits) : f16_to_float(bits);
    }
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i) out[i] = value;
  }

  // Elementwise terms and their gradients, which are float32 whatever the storage format.
  static FASTELBO_INLINE void load_term(const Operand& operand, const Layout&, const Place& place,
                                        float (&out)[width]) {
    const float* row = reinterpret_cast<const float*>(operand.data) + place.row * operand.row_stride;
    if (operand.repeats) {
      FASTELBO_UNROLL
      for (int i = 0; i < width; ++i) out[i] = *row;
      return;
    }
    Vectors<format>::load_terms(row + place.group * uint64_t(width), out);
  }
  static FASTELBO_INLINE void store_term(const Operand& operand, const Layout&, const Place& place,
                                         const float (&x)[width]) {
    float* row =
        reinterpret_cast<float*>(operand.data) + place.row * operand.row_stride + place.group * uint64_t(width);
    Vectors<format>::store_terms(row, x);
  }
};

// What of an operand of Flat varies: all, the events, nothing.
enum class Varies : uint8_t { elements, events, nothing };

template <Format format, bool clamped>
struct Flat {
  using Value = float;
  using Index = uint32_t;
  using Scale = PlainScale<clamped>;
  static constexpr bool packed = true, flat = true;
  static constexpr int groups = 1;  // that a thread takes at once
  static constexpr int blocks = format == Format::f32 ? kTuning.flat_f32 : kTuning.flat_half;
  static constexpr int width = Vectors<format>::width;
  using Vector = Vectors<format>;
  using Element = Stored<format>;

  struct Operand {
    char* data = nullptr;  // [K, total], [total / event] or a single value; null where not given
    int64_t sample_stride = 0;  // in elements
    Varies varies = Varies::elements;
  };

  struct Place {
    uint32_t vector;  // of all
    int first, last;  // what of the vector is inside of the thread's row
    bool whole;       // whether the vector ends inside of the tensors

    FASTELBO_INLINE bool inside(int i) const { return first <= i && i < last; }
    FASTELBO_INLINE uint32_t index() const { return vector * width; }
  };

  static FASTELBO_INLINE constexpr bool approximate(bool) { return format != Format::f32; }
  static FASTELBO_INLINE constexpr uint32_t kept(const Operand&, const Layout&, const Place&) {
    return ~0u;
  }  // no mask

  static FASTELBO_INLINE Place place(const Layout& layout, const Thread<Index>& thread, uint32_t group) {
    uint32_t start = thread.row * layout.span, left = layout.total - start;
    uint32_t vector = start / width + group;
    int before = int(start - vector * width);
    return {vector, before, before + int(left < layout.span ? left : layout.span),
            vector * width + width <= layout.total};
  }
  static FASTELBO_INLINE uint64_t block(const Layout& layout, const Place& place, int four) {
    return layout.first_block + uint64_t(place.vector) * (width / 4) + four;
  }

  static FASTELBO_INLINE void load(const Operand& operand, const Layout& layout, const Place& place,
                                   float (&out)[width], int64_t sample = 0) {
    const char* from = operand.data + (sample * operand.sample_stride + place.index()) * sizeof(typename Element::Type);
    if (place.whole) return Vectors<format>::load(from, out);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i) out[i] = place.index() + i < layout.total ? Element::read(from, i) : 0.0f;
  }
  static FASTELBO_INLINE void store(const Operand& operand, const Layout&, const Place& place, const float (&x)[width],
                                    int64_t sample = 0) {
    char* to = operand.data + (sample * operand.sample_stride + place.index()) * sizeof(typename Element::Type);
    if (place.first <= 0 && place.last >= width) return Vectors<format>::store(to, x);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i)
      if (place.inside(i)) Element::write(to, i, x[i]);
  }

  // Terms of a vector to where they lie among those of the thread's row.
  static FASTELBO_INLINE void hold(const Layout& layout, uint32_t row, const Place& place, const float (&x)[width],
                                   float* terms) {
    Vectors<format>::store_terms(terms + (place.vector - row * layout.span / width) * width, x);
  }

  static FASTELBO_INLINE void load_repeated(const Operand& operand, const Layout& layout, const Place& place,
                                            float (&out)[width]) {
    if (operand.varies == Varies::elements) return load(operand, layout, place, out);
    const float value = Element::read(operand.data, 0);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i) out[i] = value;
  }

  static FASTELBO_INLINE void load_term(const Operand& operand, const Layout& layout, const Place& place,
                                        float (&out)[width]) {
    const float* data = reinterpret_cast<const float*>(operand.data);
    if (operand.varies == Varies::elements) {
      if (place.whole) return Vectors<format>::load_terms(data + place.index(), out);
      FASTELBO_UNROLL
      for (int i = 0; i < width; ++i) out[i] = place.index() + i < layout.total ? data[place.index() + i] : 0.0f;
      return;
    }
    const uint32_t most = layout.total - 1;
    auto event = [&](uint32_t index) { return layout.event.divide(index < most ? index : most); };
    if (operand.varies == Varies::nothing) {
      FASTELBO_UNROLL
      for (int i = 0; i < width; ++i) out[i] = *data;
    } else if (layout.event.divisor >= width) {  // two at most
      const uint32_t at = event(place.index()), next = (at + 1) * layout.event.divisor - place.index();
      const float before = data[at], after = data[event(place.index() + width - 1)];
      FASTELBO_UNROLL
      for (int i = 0; i < width; ++i) out[i] = uint32_t(i) < next ? before : after;
    } else {
      FASTELBO_UNROLL
      for (int i = 0; i < width; ++i) out[i] = data[event(place.index() + i)];
    }
  }
  static FASTELBO_INLINE void store_term(const Operand& operand, const Layout&, const Place& place,
                                         const float (&x)[width]) {
    float* to = reinterpret_cast<float*>(operand.data) + place.index();
    if (place.first <= 0 && place.last >= width) return Vectors<format>::store_terms(to, x);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i)
      if (place.inside(i)) to[i] = x[i];
  }
};

template <class T>
struct Strided {
  using Value = T;
  using Index = int64_t;
  using Scale = ScaleOf<T>;
  static constexpr bool packed = false, flat = false;
  static constexpr int groups = 1;  // that a thread takes at once
  static constexpr int blocks =
      sizeof(T) == 4 ? 2 : 1;  // that a multiprocessor holds at least; without it, registers spill
  static constexpr int width = 4;

  struct Operand {
    char* data = nullptr;  // null where not given
    Format format = Format::f32;
    int64_t stride[kMaxDims] = {}, sample_stride = 0;  // in elements
  };

  struct Place {
    int64_t row, column;  // of the group's first element, which may lie before the row's
    int first, last;      // what of the group is inside
    uint64_t block;

    FASTELBO_INLINE bool inside(int i) const { return first <= i && i < last; }
  };

  static FASTELBO_INLINE uint64_t block(const Layout&, const Place& place, int four) { return place.block + four; }
  static FASTELBO_INLINE bool approximate(bool sample_is_half) { return sample_is_half; }

  // A bit for each element of the group: whether the mask keeps it.
  static FASTELBO_INLINE uint32_t kept(const Operand& mask, const Layout& layout, const Place& place) {
    if (!mask.data) return ~0u;
    uint32_t bits = 0;
    int64_t row = walk(mask, layout, place.row, 0, layout.outer);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i)
      if (place.inside(i) &&
          mask.data[row + walk(mask, layout, place.column + i, layout.outer, layout.outer + layout.inner)])
        bits |= 1u << i;
    return bits;
  }

  static FASTELBO_INLINE Place place(const Layout& layout, const Thread<Index>& thread, int64_t group) {
    uint64_t index = uint64_t(layout.noise_offset) + uint64_t(thread.row) * uint64_t(layout.columns);
    int shift = layout.aligned ? int(index % 4) : 0;
    Place place{thread.row, 4 * group - shift, 0, 4, index / 4 + uint64_t(group)};
    if (place.column < 0) place.first = shift;
    if (layout.columns - place.column < 4) place.last = int(layout.columns - place.column);
    return place;
  }

  // The offset of index n of dimensions begin .. end - 1.
  static FASTELBO_INLINE int64_t walk(const Operand& operand, const Layout& layout, int64_t n, int begin, int end) {
    int64_t offset = 0;
    FASTELBO_ROLLED
    for (int d = end - 1; d > begin; --d) {
      int64_t quotient = layout.wide ? n / layout.size[d] : int64_t(layout.divisor[d].divide(uint32_t(n)));
      offset += (n - quotient * layout.size[d]) * operand.stride[d];
      n = quotient;
    }
    return offset + n * operand.stride[begin];
  }

  static FASTELBO_INLINE void load(const Operand& operand, const Layout& layout, const Place& place, T (&out)[width],
                                   int64_t sample = 0) {
    int64_t row = sample * operand.sample_stride + walk(operand, layout, place.row, 0, layout.outer);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i) {
      out[i] = 0;
      if (place.inside(i))
        out[i] = read<T>(operand.format, operand.data,
                         row + walk(operand, layout, place.column + i, layout.outer, layout.outer + layout.inner));
    }
  }
  static FASTELBO_INLINE void store(const Operand& operand, const Layout& layout, const Place& place,
                                    const T (&x)[width], int64_t sample = 0) {
    int64_t row = sample * operand.sample_stride + walk(operand, layout, place.row, 0, layout.outer);
    FASTELBO_UNROLL
    for (int i = 0; i < width; ++i)
      if (place.inside(i))
        write(operand.format, operand.data,
              row + walk(operand, layout, place.column + i, layout.outer, layout.outer + layout.inner), x[i]);
  }

  static FASTELBO_INLINE void load_repeated(const Operand& operand, const Layout& layout, const Place& place,
                                            T (&out)[width]) {
    load(operand, layout, place, out);
  }
  static FASTELBO_INLINE void load_term(const Operand& operand, const Layout& layout, const Place& place,
                                        T (&out)[width]) {
    load(operand, layout, place, out);
  }
  static FASTELBO_INLINE void store_term(const Operand& operand, const Layout& layout, const Place& place,
                                         const T (&x)[width]) {
    store(operand, layout, place, x);
  }
};

// Sets to 0 what a mask leaves out of a group, NaN too.
template <int n, class V>
FASTELBO_INLINE void select(uint32_t kept, V (&x)[n]) {
  FASTELBO_UNROLL
  for (int i = 0; i < n; ++i) x[i] = kept >> i & 1 ? x[i] : V(0);
}

// The sum of what of a group is inside. All sums are float64 sums of these sums of four, so that who adds up which of
// them, as the layout decides, practically never changes a bit.
template <class Access, class V>
FASTELBO_INLINE double sum_inside(const typename Access::Place& place, V (&x)[Access::width]) {
  FASTELBO_UNROLL
  for (int i = 0; i < Access::width; ++i)
    if (!place.inside(i)) x[i] = 0;
  auto four = [&](int i) { return double((x[i] + x[i + 2]) + (x[i + 1] + x[i + 3])); };
  double total = four(0);
  FASTELBO_UNROLL
  for (int i = 4; i < Access::width; i += 4) total += four(i);
  return total;
}

// Adds up the terms of a thread's elements, and those of its events with the other threads.
template <class Access>
struct RowSums {
  using V = typename Access::Value;
  double total = 0;

  static FASTELBO_INLINE float* terms() {
    __shared__ float4 terms[kTuning.held_terms / 4 + 2];
    return reinterpret_cast<float*>(terms);
  }

  template <class Index>
  FASTELBO_INLINE void add(const Layout& layout, const Thread<Index>& thread, const typename Access::Place& place,
                           V (&x)[Access::width]) {
    if constexpr (Access::flat) {
      if (layout.events > 1) return Access::hold(layout, thread.row, place, x, terms());
    }
    total += sum_inside<Access>(place, x);
  }

  template <class Index>
  FASTELBO_INLINE void store(const Sums<V>& sums, const Layout& layout, const Work& work,
                             const Thread<Index>& thread) const {
    if constexpr (Access::flat) {
      if (layout.events > 1) return store_events(sums, layout, thread.row);
    }
    sums.store(work, thread, total);
  }

 private:
  // Of four terms those from `first` to before `last`, which may lie outside.
  static FASTELBO_INLINE double sum_four(uint32_t four, int first, int last) {
    float x[4];
    Vectors<Format::f32>::load_terms(terms() + 4 * four, x);
    FASTELBO_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i < first || i >= last) x[i] = 0;
    return double((x[0] + x[2]) + (x[1] + x[3]));
  }

  // A few threads an event.
  static FASTELBO_INLINE void store_events(const Sums<V>& sums, const Layout& layout, uint32_t row) {
    __syncthreads();
    const uint32_t lanes = 1u << layout.event_lanes_log2, size = layout.event.divisor;
    const uint32_t from = row * layout.span, left = layout.total - from;
    const uint32_t shift = from % Access::Vector::width, lane = threadIdx.x & (lanes - 1);
    const uint32_t count = (left < layout.span ? left : layout.span) / size;  // events of this block
    FASTELBO_ROLLED
    for (uint32_t first = 0; first < count; first += kThreads >> layout.event_lanes_log2) {
      const uint32_t event = first + (threadIdx.x >> layout.event_lanes_log2);
      const uint32_t start = shift + event * size, end = start + size;
      double total = 0;
      if (event < count) {
        FASTELBO_ROLLED
        for (uint32_t four = (start + 3) / 4 + lane; four < end / 4; four += lanes) total += sum_four(four, 0, 4);
        // the fours that the event begins and ends in, if it shares them
        FASTELBO_ROLLED
        for (uint32_t side = lane; side < 2; side += lanes) {
          const uint32_t edge = side ? end : start;
          if (edge % 4 && (side == 0 || start <= edge / 4 * 4))
            total += sum_four(edge / 4, int(start - edge / 4 * 4), int(end - edge / 4 * 4));
        }
      }
      FASTELBO_ROLLED
      for (uint32_t distance = lanes / 2; distance > 0; distance /= 2)
        total += __shfl_xor_sync(0xffffffffu, total, distance);
      if (event < count && lane == 0) sums.out[row * layout.events + event] = V(total);
    }
  }
};

}  // namespace fastelbo::device
