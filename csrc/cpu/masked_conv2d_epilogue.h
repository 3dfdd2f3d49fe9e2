// What follows the sums of a convolution, and its gradient. Included inside a namespace, once per instruction set
// (masked_conv2d.loops.h).

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

// Adds lines of an image; past the end of a line it adds zeros to the gap, and to the next line.
template <class T>
inline void add_lines(const Image& image, const Lines& lines, T* to, int64_t pitch, T* scratch, int64_t more = 0) {
  zero(scratch + lines.length, covered<T>(lines.length) - lines.length);
  for_lines(image, lines, -1, more, [&](auto format, int64_t offset, int64_t step, int length, int64_t) {
    gather<decltype(format)>(image.data, offset, step, length, scratch);
    for_covered<T>(length, [&](int64_t i) FASTELBO_LAMBDA {
      store(to + i, load(to + i, Whole{}) + load(scratch + i, Whole{}), Whole{});
    });
    to += pitch;
  });
}

// What follows the sum over taps and the bias, for lines of outputs `pitch` apart: z[half], gaps and all.
template <class T>
inline void finish(const ConvArgs& args, const Lines& lines, T* const* z, int64_t pitch, T* scratch) {
  int64_t positions = (lines.count - 1) * pitch + lines.length;
  bool gated = args.gated();
  for (int h = 0; h < (gated ? 2 : 1); ++h) {
    int64_t more = h * args.y_channels;
    if (args.cond && args.cond_ndim == 4) add_lines(args.cond, lines, z[h], pitch, scratch, more);
    if (args.kept && gated) write_lines(args.kept, lines, z[h], pitch, more);
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
  if (args.kept && !gated) write_lines(args.kept, lines, y, pitch);
  if (args.residual) add_lines(args.residual, lines, y, pitch, scratch);
}

// The gradient before the activation, for lines of outputs: d[half], whose lines lie `pitch` apart. scratch: three
// times `most`.
template <class T>
inline void activation_gradient(const ConvArgs& args, const Lines& lines, T* const* d, int64_t pitch, T* scratch,
                                int64_t most) {
  using V = typename VectorOf<T>::type;
  int64_t length = lines.length, count = lines.count * length;
  if (args.activation == Activation::none) return read_lines(args.d_y, lines, d[0], pitch);
  T *up = scratch, *a = up + most, *b = a + most;  // both of up and a, or of up and b, become the results
  read_lines(args.d_y, lines, up, length);
  read_lines(args.kept, lines, a, length);
  if (args.gated()) read_lines(args.kept, lines, b, length, args.y_channels);
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
  for (int64_t line = 0; line < lines.count; ++line) {
    for (int64_t i = 0; i < length; ++i) d[0][line * pitch + i] = up[line * length + i];
    if (args.gated())
      for (int64_t i = 0; i < length; ++i) d[1][line * pitch + i] = b[line * length + i];
  }
}
