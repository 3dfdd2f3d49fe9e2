// The layouts in which every channel has a plane, of one image or of several. Included inside a namespace, once per
// instruction set (masked_conv2d.loops.h).

// How many rows to take of one channel before the next: some that fill vectors, with channels last so few that all
// channels stay in the cache, one where they are not one long row.
inline int64_t rows_of_a_channel(const Image& image, int64_t columns, int64_t channels, int64_t pitch) {
  constexpr int64_t kPixels = 1024, kElements = 4096;
  if (image.stride[3] == 1) return std::max<int64_t>(kPixels / columns, 1);
  return Lines{0, 0, 0, 1, columns}.joined(image, pitch) ? std::max<int64_t>(kElements / (columns * channels), 1) : 1;
}

// Rows first - above .. first + rows + below - 1 of all channels. Those inside the image come through fetch(row, count,
// i), `step` at a time: row .. row + count - 1 of all channels, into rows i .. of the planes.
template <class T, class Fetch>
inline void pack_planes(const Planes& planes, int64_t image_rows, int64_t channels, int64_t first, int64_t rows,
                        int64_t step, T* to, Fetch&& fetch) {
  int64_t all = planes.above + rows + planes.below, start = first - planes.above;
  int64_t begin = std::max<int64_t>(-start, 0), end = std::min(all, image_rows - start);
  for (int64_t c = 0; c < channels; ++c) {
    T* plane = to + c * planes.size;
    zero(plane, planes.front + begin * planes.pitch);
    for (int64_t i = begin; i < end; ++i) zero(plane + planes.front + i * planes.pitch + planes.columns, planes.gap);
    zero(plane + planes.front + end * planes.pitch, planes.plane - planes.front - end * planes.pitch);
  }
  for (int64_t i = begin; i < end; i += step) fetch(start + i, std::min(step, end - i), i);
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
        length(planes.layout == Layout::images ? planes.rows * columns : 0),
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

// Writes rows of a unit's channels, which lie `stride` apart.
template <class T>
inline void write_unit(const Image& image, const Side& side, int64_t unit, int64_t n, int64_t first, int64_t rows,
                       int64_t columns, const T* from, int64_t stride, int64_t pitch) {
  int c = side.channel(unit, 0);
  if (channels_innermost<T>(image) && side.channel(unit, kBlock - 1) == c + kBlock - 1) {
    if (Lines{n, c, first, rows, columns}.joined(image, pitch)) {
      columns *= rows;
      rows = 1;
    }
    for (int64_t row = 0; row < rows; ++row)
      transpose(from + row * pitch, stride, kBlock, columns, pixel<T>(image, image.at(n, c, first + row)),
                image.stride[3]);
    return;
  }
  for (int m = 0; m < kBlock && side.channel(unit, m) >= 0; ++m)
    write_lines(image, {n, side.channel(unit, m), first, rows, columns}, from + m * stride, pitch);
}

// A unit's outputs over a band: [halves][kBlock][pitch], of each image.
template <class T>
struct PlaneOutputs {
  static constexpr int lanes = WideOf<T>::lanes;
  const ConvArgs& args;
  const Planes& planes;
  const Side& side;
  bool of_images;
  int64_t row_pitch, pitch, size;  // of a channel's row, of a channel, of an image
  ScratchOf<T> pixels, interleaved, scratch;

  PlaneOutputs(const ConvArgs& args, const Planes& planes, const Side& side)
      : args(args),
        planes(planes),
        side(side),
        of_images(planes.layout == Layout::images),
        row_pitch(of_images ? args.columns : planes.pitch),
        pitch((args.band * row_pitch + lanes - 1) / lanes * lanes + kVectors * lanes),
        size(planes.layout == Layout::pixels ? 0 : side.halves * kBlock * pitch),
        pixels(planes.lanes * size),
        interleaved(of_images ? kBlock * lanes * args.band * args.columns : 0),
        scratch(args.columns + kVectors * lanes) {}

  // A band's outputs, of the share's units. constants: [units][halves][kBlock][lanes]; bare: whether nothing follows.
  void convolve(const Band<T>& band, int64_t n, const Share& share, const void* packed, const T* constants,
                const Image& y, bool bare) const {
    int64_t images = std::min(args.images, args.n - n);
    for (int64_t u = share.first(side.units()); u < share.last(side.units()); ++u) {
      T* place = bare ? in_place(y, u, n, band) : nullptr;
      for (int h = 0; h < side.halves; ++h)
        convolve_unit(band, u, h, static_cast<const T*>(packed) + side.weights_of(u, h),
                      constants + (u * side.halves + h) * kBlock * lanes, place, y.stride[1]);
      for (int64_t i = 0; i < images && !place; ++i) {
        for (int m = 0; m < kBlock && side.channel(u, m) >= 0 && !bare; ++m) {
          T* of_channel[2] = {channel(i, 0, m), channel(i, side.halves - 1, m)};
          finish(args, {n + i, side.channel(u, m), band.first, band.rows, args.columns}, of_channel, row_pitch,
                 scratch.get());
        }
        write_unit(y, side, u, n + i, band.first, band.rows, args.columns, channel(i, 0, 0), pitch, row_pitch);
      }
    }
  }

 private:
  T* channel(int64_t image, int half, int m) const { return pixels.get() + image * size + (half * kBlock + m) * pitch; }
  // Where a unit lies in an image of the same layout, whole vectors of whole blocks, else null.
  T* in_place(const Image& image, int64_t unit, int64_t n, const Band<T>& band) const {
    int c = side.channel(unit, 0);
    bool same = !of_images && is_plane(image, args.columns, sizeof(T) == 8) && row_pitch == args.columns &&
                band.rows * args.columns % lanes == 0 && side.channel(unit, kBlock - 1) == c + kBlock - 1;
    return same ? pixel<T>(image, image.at(n, c, band.first)) : nullptr;
  }
  // to: null, or in place
  void convolve_unit(const Band<T>& band, int64_t unit, int half, const T* weights, const T* constants, T* to,
                     int64_t to_pitch) const {
    const int32_t* offsets = side.offsets(unit);
    const Run* runs = side.runs(unit);
    if (!of_images) {
      if (!to) {
        to = channel(0, half, 0);
        to_pitch = pitch;
      }
      Ahead ahead = half == 0 ? band.next.part(unit, side.units()) : Ahead();
      const uint16_t* masks = kMasks ? planes.masks_of(band.first / args.band, args.taps()) : nullptr;
      conv_row<T, kMasks>(band.in, offsets, runs, nullptr, masks, planes.vectors, weights, constants,
                          planes.positions(band.rows), to, to_pitch, ahead);
      return;
    }
    int64_t wide = args.columns * lanes, plane = band.rows * wide;
    to = interleaved.get();
    for (int64_t row = 0; row < band.rows; ++row)
      conv_row<T, false>(band.in + row * planes.pitch, offsets, runs, side.starts(unit, row, args.rows), nullptr, 0,
                         weights, constants, wide, to + row * wide, plane);
    for (int m = 0; m < kBlock; ++m)
      transpose(to + m * plane, lanes, band.rows * args.columns, lanes, channel(0, half, m), size);
  }
};

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
struct PlaneGradient {
  const ConvArgs& args;
  const Planes& planes;
  int64_t step, most;
  ScratchOf<T> scratch, packed;
  Staging<T> staging;

  explicit PlaneGradient(const ConvArgs& args)
      : args(args),
        planes(args.d_planes),
        step(planes.layout == Layout::images
                 ? args.rows
                 : rows_of_a_channel(args.d_y, args.columns, args.z_channels, planes.pitch)),
        most(covered<T>(step * args.columns)),
        scratch(3 * most),
        packed(planes.layout == Layout::pixels ? 0 : planes.elements(args.z_channels)),
        staging(planes, args.gated() ? 2 : 1) {
    zero(scratch.get(), 3 * most);
    if (planes.layout == Layout::images) zero(packed.get(), planes.elements(args.z_channels));
  }

  // of: a channel's rows, `pitch` apart, with zeros between them
  void store(int64_t n, int64_t c, int64_t first, int64_t rows, const T* of, int64_t pitch) const {
    if (args.d_cond) write_lines(args.d_cond, {n, c, first, rows, args.columns}, of, pitch);
    if (args.sums_wanted)
      args.sums[(n * args.bands + first / args.band) * args.z_channels + c] =
          sum_plane(of, (rows - 1) * pitch + args.columns);
  }

  // The band's first row of the first channel.
  const T* pack(int64_t n, int64_t first, int64_t rows, bool stored) const {
    T* to = packed.get();
    const T* band = planes.in_place ? pixel<T>(args.d_y, args.d_y.at(n, 0, first)) : to + planes.first();
    if (planes.layout == Layout::images) {
      pack_images(n, stored, to);
      return band;
    }
    if (!planes.in_place)
      pack_planes(
          planes, args.rows, args.z_channels, first, rows, step, to, [&](int64_t row, int64_t count, int64_t i) {
            if (args.activation == Activation::none && channels_innermost<T>(args.d_y))
              return transpose(pixel<T>(args.d_y, args.d_y.at(n, 0, row)), args.d_y.stride[3], count * args.columns,
                               args.z_channels, to + planes.front + i * planes.pitch, planes.size);
            for (int64_t c = 0; c < args.y_channels; ++c) {
              T* line = to + c * planes.size + planes.front + i * planes.pitch;
              T* of_halves[2] = {line, line + args.y_channels * planes.size};
              activation_gradient(args, {n, c, row, count, args.columns}, of_halves, planes.pitch, scratch.get(), most);
            }
          });
    for (int64_t c = 0; c < args.z_channels; ++c) store(n, c, first, rows, band + c * planes.size, planes.pitch);
    return band;
  }

  void pack_images(int64_t n, bool stored, T* to) const {
    int64_t images = std::min(args.images, args.n - n);
    for (int64_t c = 0; c < args.y_channels; ++c) {
      for (int64_t i = 0; i < images; ++i) {
        T* of_halves[2] = {staging.plane(i), staging.plane(i, args.gated())};
        activation_gradient(args, {n + i, c, 0, args.rows, args.columns}, of_halves, staging.columns, scratch.get(),
                            most);
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
