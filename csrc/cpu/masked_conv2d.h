// What the loops of masked_conv2d.cpp take, and how its images lie in memory while they run.
#pragma once

#include "../common/masked_conv2d.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "host.h"

namespace fastelbo {

// How pixels lie in memory while a convolution reads them.
enum class Layout {
  spaced,  // a plane for each channel, zeros between its rows
  masked,  // a plane for each channel, nothing between its rows, and masks of what each tap reads inside the image
  pixels,  // the channels of a pixel side by side, pixels of zeros between rows
  images   // planes as where they are spaced, of several images, an element of each after the other
};

// A band of rows in a layout, with `above` and `below` further rows, and `gap` pixels of zeros between any two rows.
// Other lengths are in elements, but for `columns`.
struct Planes {
  Layout layout = Layout::spaced;
  int64_t columns, rows, gap, above, below;
  int64_t step = 1;   // from a pixel to the next
  int64_t lanes = 1;  // images side by side
  int64_t pitch, front, plane;  // of a row, before the first, of all rows
  int64_t size;  // from a channel to the next
  bool in_place = false;  // the channels' rows are those of the image in memory
  int64_t vectors = 0;  // of a band, where masked
  std::vector<uint16_t> masks;  // [bands][taps][vectors], a bit for each lane

  Planes() = default;
  // of_step: images, or channels of a pixel; slack: elements that may be read past the end
  Planes(Layout layout, int64_t of_step, int64_t columns, int64_t rows, int64_t gap, int64_t above, int64_t below,
         int64_t slack)
      : layout(layout),
        columns(columns),
        rows(rows),
        gap(gap),
        above(above),
        below(below),
        step(of_step),
        lanes(layout == Layout::images ? of_step : 1),
        pitch((columns + gap) * step),
        front(gap * step),
        plane((front + (above + rows + below) * pitch + slack + 15) / 16 * 16) {
    if (plane % 32 == 0) plane += 16;  // an odd number of cache lines, so that planes spread over the cache's sets
    size = layout == Layout::pixels ? 1 : plane;
  }
  int64_t elements(int64_t channels) const {
    return in_place ? 0 : layout == Layout::pixels ? plane : channels * plane;
  }
  // Whether what is no pixel is zero from the start, and is written no more.
  bool zeroed() const { return layout == Layout::pixels || layout == Layout::images; }
  int64_t positions(int64_t rows) const { return rows * pitch - gap * step; }
  const uint16_t* masks_of(int64_t band, int64_t taps) const { return masks.data() + band * taps * vectors; }
  int64_t first() const { return front + above * pitch; }
  int64_t offset(int64_t down, int64_t right) const { return down * pitch + right * step; }
};

// The sizes of the loops of an instruction set (masked_conv2d.loops.h), in elements of the arithmetic type.
struct LoopSizes {
  int64_t block;   // output channels of a tile
  int64_t vector;  // lanes
  int64_t slack;   // that a tile may read past its positions
  int64_t lanes;   // output channels of a tile of the weight gradient, or of pixels
  int64_t pairs, few_pairs;  // inputs of a tile of the weight gradient, and of a list's last ones
  int64_t pixels;  // of a tile of pixels
  bool masks;      // whether loads that leave out lanes cost no more than others

  int64_t vectors(int64_t positions) const { return (positions + vector - 1) / vector; }
  int block_of(const Planes& planes, int64_t channels) const {
    return int(planes.layout != Layout::pixels ? block : channels > vector ? lanes : vector);
  }
};

// Whether an image's channels lie side by side.
inline bool is_innermost(const Image& image) { return image.stride[1] == 1 && image.stride[3] != 1; }

// Whether an image's rows lie one after the other, of the arithmetic type.
inline bool is_plane(const Image& image, int64_t columns, bool is_double) {
  return image.stride[3] == 1 && image.stride[2] == columns && image.format == (is_double ? Format::f64 : Format::f32);
}

// Products that registers add up, one after the other, before their total joins the others in memory: rounding errors
// grow with the root of this number and of that of totals, not with that of all products. tests/rounding.py has the
// bound.
constexpr int kSum = 128;

// An input channel and one of its taps, by index; -1 is the centre.
struct ChannelTap {
  int32_t channel, tap;
};

// Pairs that registers add up one after the other, and whether their total then joins the others in memory; a tile's
// last run says so.
struct Run {
  enum Ends : int32_t { nothing, sum, tile };
  int32_t begin, end;
  Ends ends;
  int32_t tap;  // of its first pair, which is that of all where masks need it
};

// A tile of neighbouring vectors is of at most three; four are two and two, not three and one.
inline int64_t tile_of(int64_t vectors) { return vectors >= 3 && vectors != 4 ? 3 : std::min<int64_t>(vectors, 2); }

// A tile of neighbouring pixels, where `left` of a row's columns are, is of `most`, two thirds, a third, or one: the
// last one overlaps others rather than be two.
inline int64_t pixels_at_once(int64_t left, int64_t columns, int64_t most) {
  int64_t third = most / 3, pixels = left > 2 * third ? most : left > third ? 2 * third : left > 1 ? third : 1;
  while (pixels > columns) pixels = pixels > third ? pixels - third : 1;
  return pixels;
}

// One side of the convolution, its output or its input gradient. The output channels come in blocks of `block`, none of
// which spans two groups; under a gate a unit is a block of the first half and that of the second, else it is a block.
struct Side {
  struct Group {
    std::vector<ChannelTap> pairs;
    std::vector<int32_t> offsets;  // of the pairs
    std::vector<Run> runs;         // of any tile; or of some, one after the other
    std::vector<int32_t> starts;  // [rows][tiles of a row], where a tile's runs start: of pixels, and images in lanes
  };
  int block = 0, halves = 1;
  int64_t half = 0;  // channels from one half to the other
  int64_t weights = 0;  // elements, once packed
  std::vector<Group> groups;
  std::vector<int32_t> channels;  // [units][block], those of the first half; -1 for none
  std::vector<int> group;  // [units]
  std::vector<int64_t> start;  // [units] of its packed weights: [halves][pairs][block]

  int64_t units() const { return int64_t(group.size()); }
  const Group& of(int64_t unit) const { return groups[size_t(group[unit])]; }
  int channel(int64_t unit, int m) const { return channels[unit * block + m]; }
  int64_t channels_of(int64_t unit) const {
    int64_t count = 0;
    for (int m = 0; m < block; ++m) count += channel(unit, m) >= 0;
    return count;
  }
  int64_t pairs(int64_t unit) const { return int64_t(of(unit).pairs.size()); }
  ChannelTap pair(int64_t unit, int64_t k) const { return of(unit).pairs[size_t(k)]; }
  const int32_t* offsets(int64_t unit) const { return of(unit).offsets.data(); }
  const Run* runs(int64_t unit) const { return of(unit).runs.data(); }
  // Of a row's tiles, where there are so many rows.
  const int32_t* starts(int64_t unit, int64_t row, int64_t rows) const {
    return of(unit).starts.data() + row * (int64_t(of(unit).starts.size()) / rows);
  }
  int64_t weights_of(int64_t unit, int half) const { return start[unit] + half * pairs(unit) * block; }
};

// The pixels of an image whose taps, or some of them, read inside it.
struct Window {
  int64_t top = INT64_MAX, bottom = 0, left = INT64_MAX, right = 0;

  void add(const Tap& tap, int64_t rows, int64_t columns) {
    top = std::min(top, std::max<int64_t>(-tap.down, 0));
    bottom = std::max(bottom, std::min(rows - tap.down, rows));
    left = std::min(left, std::max<int64_t>(-tap.right, 0));
    right = std::max(right, std::min(columns - tap.right, columns));
  }
  // What of it is in some rows, counted from the first of these, and in positions of so many lanes.
  Window part(int64_t first, int64_t rows, int64_t lanes) const {
    return {std::max<int64_t>(top - first, 0), std::min(bottom - first, rows), left * lanes, right * lanes};
  }
};

// What will be read next: pieces of memory, `stride` bytes apart. A tile fetches a few and waits for none; all of them
// at once would hold up its own loads.
struct Ahead {
  const char* from = nullptr;
  int64_t pieces = 0, stride = 0, length = 0;

  Ahead part(int64_t index, int64_t of) const {
    int64_t first = pieces * index / of;
    return {from + first * stride, pieces * (index + 1) / of - first, stride, length};
  }
  // tiles: how many are left, this one included
  void fetch(int64_t tiles) {
    for (int64_t rest = pieces - pieces / tiles; pieces > rest; --pieces, from += stride)
      for (int64_t i = 0; i < length; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
};

// What tasks begin .. end - 1 do of a chunk that `parts` tasks share: the same part of whatever there is to share.
struct Share {
  int64_t chunk, begin, end, parts;

  Share(int64_t task, int64_t last, int64_t parts)
      : chunk(task / parts), begin(task % parts), end(std::min(parts, begin + last - task)), parts(parts) {}
  int64_t tasks() const { return end - begin; }
  int64_t first(int64_t count) const { return begin * count / parts; }
  int64_t last(int64_t count) const { return end * count / parts; }
};

// Memory for a thread. The loops call nothing of std that is a template: compiled for one instruction set, it would be
// linked for all.
struct Scratch {
  void* data;
  explicit Scratch(int64_t bytes) : data(std::malloc(size_t(bytes > 0 ? bytes : 1))) {
    STD_TORCH_CHECK(data, "out of memory");
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

struct ConvArgs {
  int64_t n, in_channels, z_channels, y_channels, rows, columns;
  Activation activation;
  LiveTaps mask;
  int64_t band, bands;  // rows in a band, bands in an image
  int64_t images = 1, parts = 1;  // images of a task, and tasks that share these, each for some outputs
  Image input, bias, cond, residual, y, kept;
  int64_t cond_ndim = 0;  // 2 for a class, 4 for an image
  Image weight;  // strides of out, in, row, column
  Planes planes;  // of the input
  Side forward;
  void* packed = nullptr;  // forward's weights

  // backward
  Image d_y, d_input, d_weight, d_cond;  // d_cond: an image
  bool sums_wanted = false;
  Planes d_planes;  // of the gradient before the activation
  Side backward;
  void* d_packed = nullptr;
  int64_t chunks = 0, pairs = 0;  // pairs: rows of a partial weight gradient, taps times channels, in whole tiles
  int64_t channels_at_once = 1;
  std::vector<int32_t> pair_offset;
  std::vector<Window> windows;  // of each tile of pairs
  void* partial = nullptr;  // [chunks][blocks of output channels][pairs][lanes of a block]
  double* sums = nullptr;  // [n][bands][z_channels]

  int64_t units() const { return (n + images - 1) / images * bands; }
  int64_t first_unit(int64_t chunk) const { return chunk * units() / chunks; }
  int64_t taps() const { return int64_t(mask.taps.size()) + mask.centre; }
  // The tap of an index; -1 and one past the last are the centre.
  const Tap& tap(int64_t index) const {
    return index < 0 || index == int64_t(mask.taps.size()) ? mask.centre_tap : mask.taps[index];
  }
  bool live(int64_t tap, int64_t out, int64_t in) const {
    return tap < int64_t(mask.taps.size()) || mask.live(out, in);
  }
  // Pairs are ordered by tap, of as many channels at once as a tile has: its pixels are those that one tap reads inside
  // the image, and the rows of these channels stay in the first-level cache.
  int64_t pair(int64_t in, int64_t tap) const {
    int64_t first = in / channels_at_once * channels_at_once;
    return first * taps() + tap * std::min(channels_at_once, in_channels - first) + in - first;
  }
  const int32_t* pair_offsets(int64_t first) const { return pair_offset.data() + first; }
  const Window& window(int64_t tile) const { return windows[size_t(tile)]; }
  bool gated() const { return is_gate(activation); }
  // Whether nothing follows the sums of an output.
  bool bare() const { return activation == Activation::none && !kept && !residual && (!cond || cond_ndim == 2); }
  // A band of an image, by its index among those of all images; nothing of images with anything between their rows.
  Ahead ahead(const Image& image, int64_t channels, int64_t index) const {
    bool planes = image.stride[3] == 1, pixels = image.stride[3] == channels;
    if (images > 1 || !(planes || pixels) || image.stride[2] != columns * image.stride[3]) return {};
    int64_t first = index % bands * band, rows_of_band = std::min(band, rows - first);
    int64_t element = image.format == Format::f64 ? 8 : image.format == Format::f32 ? 4 : 2;
    const char* from = image.data + image.at(index / bands, 0, first) * element;
    int64_t row = image.stride[2] * element;
    constexpr int64_t kPiece = 512;  // of what lies in one piece
    if (pixels) return {from, rows_of_band * row / kPiece, kPiece, kPiece};
    return {from, channels, image.stride[1] * element, rows_of_band * row};
  }
};

constexpr int64_t kTasks = 16;  // enough for any number of threads that a small batch can use

// What the planes of one side are made of: its inputs, and what the convolution over them is to be. sign: 1 for the
// convolution, -1 for its input gradient, whose outputs are the convolution's inputs.
struct Source {
  Image image;  // of the inputs; without memory, if they have yet to be computed
  bool innermost;  // whether channels lie side by side in it, or in what it is computed from
  bool is_double;
  int64_t channels, outputs, halves, above, below;
  int sign;

  Source(const ConvArgs& args, bool is_double, int sign);
  int64_t elements(const ConvArgs& args) const { return args.n * args.rows * args.columns * (channels + outputs); }
};

// Rows of a band. They depend on shapes only, so that results do not depend on the number of threads.
int64_t band_rows(int64_t n, int64_t rows, int64_t columns, int64_t channels, int64_t reach);
// In the layout with which a convolution takes least. Where that is of images, all of an image is one band.
Planes planes_of(const ConvArgs& args, const Source& source, const LoopSizes& sizes);
// Of the convolution's input for its weight's gradient alone, and of a gradient that no tap reads.
Planes planes_of_weight_gradient(const ConvArgs& args, const Source& source, const LoopSizes& sizes);
Planes planes_without_taps(const ConvArgs& args, Source source, const LoopSizes& sizes);
Side side_of(const ConvArgs& args, const Planes& planes, const LoopSizes& sizes, int sign);

}  // namespace fastelbo
