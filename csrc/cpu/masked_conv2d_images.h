// Lines of an image to and from memory, in any format and any strides. Included inside a namespace, once per
// instruction set (masked_conv2d.loops.h).

template <class T>
struct ScratchOf : Scratch {
  explicit ScratchOf(int64_t count) : Scratch(count * int64_t(sizeof(T))) {}
  T* get() const { return static_cast<T*>(data); }
};

template <class T>
FASTELBO_INLINE void zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// Lines of an image from a channel and a row on: rows of the channel, or pixels of the row, each a line of channels.
struct Lines {
  int64_t n, c, row, count, length;
  bool pixels = false;

  int64_t step(const Image& image) const { return image.stride[pixels ? 1 : 3]; }
  int64_t stride(const Image& image) const { return image.stride[pixels ? 3 : 2]; }
  // Whether they, and lines in memory `pitch` apart, are one long line.
  bool joined(const Image& image, int64_t pitch) const {
    return pitch == length && stride(image) == length * step(image);
  }
};

// Calls f(format, offset in the image, step, length, offset in memory) for the lines, `more` channels further on.
template <class F>
inline void for_lines(const Image& image, const Lines& lines, int64_t pitch, int64_t more, F&& f) {
  bool joined = lines.joined(image, pitch);
  int64_t offset = image.at(lines.n, lines.c + more, lines.row), step = lines.step(image), stride = lines.stride(image),
          count = joined ? 1 : lines.count, length = joined ? lines.count * lines.length : lines.length;
  with_format(image.format, [&](auto format) {
    for (int64_t line = 0; line < count; ++line) f(format, offset + line * stride, step, int(length), line * pitch);
  });
}

// Lines of an image to and from lines of the arithmetic type that lie `pitch` apart.
template <class T>
inline void read_lines(const Image& image, const Lines& lines, T* to, int64_t pitch, int64_t more = 0) {
  for_lines(image, lines, pitch, more, [&](auto format, int64_t offset, int64_t step, int length, int64_t at) {
    gather<decltype(format)>(image.data, offset, step, length, to + at);
  });
}
template <class T>
inline void write_lines(const Image& image, const Lines& lines, const T* from, int64_t pitch, int64_t more = 0) {
  for_lines(image, lines, pitch, more, [&](auto format, int64_t offset, int64_t step, int length, int64_t at) {
    scatter<decltype(format)>(image.data, offset, step, length, from + at);
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

// Whether an image's pixels are vectors of channels, or its rows of pixels, of the arithmetic type; `pixel` is the
// address of one.
template <class T>
inline bool channels_innermost(const Image& image) {
  return is_innermost(image) && image.format == (sizeof(T) == 4 ? Format::f32 : Format::f64);
}
template <class T>
inline bool is_planes(const Image& image) {
  return image.stride[3] == 1 && image.format == (sizeof(T) == 4 ? Format::f32 : Format::f64);
}
template <class T>
inline T* pixel(const Image& image, int64_t offset) {
  return reinterpret_cast<T*>(image.data) + offset;
}

// Pixels of an image, which may be planes of the arithmetic type, to and from memory.
template <class T>
inline void read_pixels(const Image& image, const Lines& lines, T* to, int64_t pitch) {
  if (!is_planes<T>(image)) return read_lines(image, lines, to, pitch);
  transpose(pixel<T>(image, image.at(lines.n, lines.c, lines.row)), image.stride[1], lines.length, lines.count, to,
            pitch);
}
template <class T>
inline void write_pixels(const Image& image, const Lines& lines, const T* from, int64_t pitch) {
  if (!is_planes<T>(image)) return write_lines(image, lines, from, pitch);
  transpose(from, pitch, lines.count, lines.length, pixel<T>(image, image.at(lines.n, lines.c, lines.row)),
            image.stride[1]);
}
