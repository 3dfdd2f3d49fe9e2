// Images into the planes of masked_conv2d.cpp, and rows of an image to and from memory, in any format and any strides.
// Included inside a namespace, once per instruction set (masked_conv2d.loops.h).

template <class T>
struct ScratchOf : Scratch {
  explicit ScratchOf(int64_t count) : Scratch(count * int64_t(sizeof(T))) {}
  T* get() const { return static_cast<T*>(data); }
};

// Whether rows of an image, and those of planes `pitch` apart, are one long row.
inline bool is_one_row(const Image& image, int64_t columns, int64_t pitch) {
  return pitch == columns && image.stride[2] == columns * image.stride[3];
}

// Rows of one channel of an image, from an offset on, to and from rows of the arithmetic type that lie `pitch` apart.
template <class T>
inline void read_rows(const Image& image, int64_t offset, int64_t rows, int64_t columns, T* to, int64_t pitch) {
  if (is_one_row(image, columns, pitch)) {
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
  if (is_one_row(image, columns, pitch)) {
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

// How many rows to take of one channel before the next: some that fill vectors, with channels last so few that all
// channels stay in the cache, one where they are not one long row.
inline int64_t rows_of_a_channel(const Image& image, int64_t columns, int64_t channels, int64_t pitch) {
  constexpr int64_t kPixels = 1024, kElements = 4096;
  if (image.stride[3] == 1) return std::max<int64_t>(kPixels / columns, 1);
  return is_one_row(image, columns, pitch) ? std::max<int64_t>(kElements / (columns * channels), 1) : 1;
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

// Where the planes of some images lie one by one, before their pixels become lanes: [halves][lanes][length].
template <class T>
struct Staging {
  const Planes& planes;
  int64_t columns, length;  // of a row with its gap, of a plane
  ScratchOf<T> rows;

  explicit Staging(const Planes& planes, int64_t halves = 1)
      : planes(planes),
        columns(planes.columns + planes.gap),
        length(planes.lanes > 1 ? planes.rows * columns : 0),
        rows(halves * planes.lanes * length) {
    zero(rows.get(), halves * planes.lanes * length);
  }
  T* plane(int64_t image, int64_t half = 0) const { return rows.get() + (half * planes.lanes + image) * length; }
  // Into the planes of a channel, `to`; images that are not there are zeros.
  void pack(int64_t images, int64_t half, T* to) const {
    zero(plane(images, half), (planes.lanes - images) * length);
    transpose(plane(0, half), length, planes.lanes, length, to + planes.first(), planes.lanes);
  }
};

// The input's planes; returns the band's first row of the first channel.
template <class T>
inline const T* pack_input(const ConvArgs& args, int64_t n, int64_t first, int64_t rows, const T* kept,
                           const Staging<T>& staging, T* to) {
  const Planes& planes = args.planes;
  if (planes.in_place) return pixel<T>(args.input, args.input.at(n, 0, first));
  if (planes.lanes > 1) {
    int64_t images = std::min(args.images, args.n - n);
    for (int64_t c = 0; c < args.in_channels; ++c) {
      for (int64_t i = 0; i < images; ++i)
        read_rows(args.input, args.input.at(n + i, c, 0), rows, args.columns, staging.plane(i), staging.columns);
      staging.pack(images, 0, to + c * planes.size);
    }
    return to + planes.first();
  }
  int64_t step = rows_of_a_channel(args.input, args.columns, args.in_channels, planes.pitch);
  pack_planes(
      planes, args.rows, args.in_channels, first, rows, step, kept, to, [&](int64_t row, int64_t count, int64_t i) {
        T* at = to + planes.front + i * planes.pitch;
        if (channels_innermost<T>(args.input))
          return transpose(pixel<T>(args.input, args.input.at(n, 0, row)), args.input.stride[3], count * args.columns,
                           args.in_channels, at, planes.size);
        for (int64_t c = 0; c < args.in_channels; ++c)
          read_rows(args.input, args.input.at(n, c, row), count, args.columns, at + c * planes.size, planes.pitch);
      });
  return to + planes.first();
}
