// The layout in which a pixel's channels lie side by side. Included inside a namespace, once per instruction set
// (masked_conv2d.loops.h).

// Rows first - above .. first + rows + below - 1 of an image, whose gaps are zeros already: fetch(row, to) for those
// inside the image. Returns the first pixel of the band.
template <class T, class Fetch>
inline const T* pack_pixels(const Planes& planes, int64_t image_rows, int64_t first, int64_t rows, T* to,
                            Fetch&& fetch) {
  T* at = to + planes.front;
  for (int64_t row = first - planes.above; row < first + rows + planes.below; ++row, at += planes.pitch) {
    if (row < 0 || row >= image_rows)
      zero(at, planes.pitch);
    else
      fetch(row, at);
  }
  return to + planes.first();
}

// A unit's outputs over a row: [halves][columns][block].
template <class T>
struct PixelOutputs {
  const ConvArgs& args;
  const Planes& planes;
  const Side& side;
  ScratchOf<T> pixels, scratch;

  PixelOutputs(const ConvArgs& args, const Planes& planes, const Side& side)
      : args(args),
        planes(planes),
        side(side),
        pixels(planes.layout == Layout::pixels ? (side.halves * args.columns + 1) * side.block : 0),
        scratch(planes.layout == Layout::pixels ? side.block + WideOf<T>::lanes : 0) {}

  // As of planes. constants: [units][halves][block]
  void convolve(const Band<T>& band, int64_t n, const Share& share, const void* packed, const T* constants,
                const Image& y, bool bare) const {
    for (int64_t u = share.first(side.units()); u < share.last(side.units()); ++u) {
      Ahead ahead = band.next.part(u, side.units());
      for (int64_t row = 0; row < band.rows; ++row)
        convolve_row(band.in + row * planes.pitch, n, band.first + row, u, packed, constants, y, bare, ahead,
                     band.rows - row);
    }
  }

 private:
  // A unit's outputs of a row, of which `rows` are left.
  void convolve_row(const T* in, int64_t n, int64_t row, int64_t unit, const void* packed, const T* constants,
                    const Image& y, bool bare, Ahead& ahead, int64_t rows) const {
    Lines lines{n, side.channel(unit, 0), row, args.columns, side.channels_of(unit), true};
    bool in_place = bare && channels_innermost<T>(y) && lines.length % WideOf<T>::lanes == 0;
    T* of_halves[2] = {in_place ? pixel<T>(y, y.at(n, lines.c, row)) : pixels.get(),
                       pixels.get() + (side.halves - 1) * args.columns * side.block};
    for (int h = 0; h < side.halves; ++h)
      convolve_half(in, row, unit, static_cast<const T*>(packed) + side.weights_of(unit, h),
                    constants + (unit * side.halves + h) * side.block, of_halves[h],
                    in_place ? y.stride[3] : side.block, ahead, rows * side.halves - h);
    if (in_place) return;
    if (!bare) finish(args, lines, of_halves, side.block, scratch.get());
    write_pixels(y, lines, pixels.get(), side.block);
  }
  void convolve_half(const T* in, int64_t row, int64_t unit, const T* weights, const T* constants, T* to,
                     int64_t to_step, Ahead& ahead, int64_t left) const {
    const int32_t *offsets = side.offsets(unit), *start = side.starts(unit, row, args.rows);
    bool two = side.channels_of(unit) > WideOf<T>::lanes;
    for (int64_t column = 0, width; column < args.columns; column += width, ++start) {
      width = pixels_at_once(args.columns - column, args.columns, kPixels);
      column = std::min(column, args.columns - width);
      auto tile = two ? pixel_tile_of<T, 2>(width) : pixel_tile_of<T, 1>(width);
      tile(in + column * planes.step, planes.step, offsets, side.runs(unit) + *start, weights, side.block, constants,
           to + column * to_step, to_step);
      ahead.fetch((left * args.columns - column - 1) / kPixels + 1);
    }
  }
};

// As PlaneGradient.
template <class T>
struct PixelGradient {
  const ConvArgs& args;
  const Planes& planes;
  int64_t most;
  ScratchOf<T> scratch, packed;

  explicit PixelGradient(const ConvArgs& args)
      : args(args),
        planes(args.d_planes),
        most(planes.layout == Layout::pixels ? covered<T>(args.columns * args.y_channels) : 0),
        scratch(3 * most),
        packed(planes.layout == Layout::pixels ? planes.plane : 0) {
    zero(scratch.get(), 3 * most);
    if (planes.layout == Layout::pixels) zero(packed.get(), planes.plane);
  }

  // The band's first pixel.
  const T* pack(int64_t n, int64_t first, int64_t rows, bool stored) const {
    const T* band = pack_pixels(planes, args.rows, first, rows, packed.get(), [&](int64_t row, T* to) {
      Lines lines{n, 0, row, args.columns, args.y_channels, true};
      T* of_halves[2] = {to, to + args.y_channels};
      if (args.activation == Activation::none)
        read_pixels(args.d_y, lines, to, planes.step);
      else
        activation_gradient(args, lines, of_halves, planes.step, scratch.get(), most);
    });
    double* sums =
        args.sums_wanted && stored ? args.sums + (n * args.bands + first / args.band) * args.z_channels : nullptr;
    for (int64_t row = 0; row < rows; ++row) {
      const T* of_row = band + row * planes.pitch;
      if (args.d_cond && stored)
        write_lines(args.d_cond, {n, 0, first + row, args.columns, args.z_channels, true}, of_row, planes.step);
      for (int64_t column = 0; sums && column < args.columns; ++column)
        for (int64_t c = 0; c < args.z_channels; ++c) sums[c] += of_row[column * planes.step + c];
    }
    return band;
  }
};
