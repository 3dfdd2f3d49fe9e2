// Masked convolutions over live taps only: output, input gradient and weight gradient.
//
// A band of rows of one image is copied into planes, one per channel, of the arithmetic type: rows of `pitch` elements
// with zeros around the image, so that every tap is a constant offset and no loop knows an edge. A convolution is then
// a list of (offset, weight) pairs over vectors of neighbouring pixels, and masks, channel groups, stacks and dilation
// are only which pairs the list holds: a dead tap is not in it. The input gradient is the same with the offsets
// negated. The zeros beside a row are computed with, too: in small images each channel has a plane without them for
// every distance that a tap moves it to the side. With AVX-512, whose loads leave out lanes at no cost, there are no
// zeros: masks say which pixels of a vector have a tap inside the image, and an image of the arithmetic type whose rows
// lie one after the other is read where it is.
//
// Many images that are smaller still lie in the lanes: a vector is one pixel of that many images, which fill it however
// few pixels they have, and a tile of pixels goes through the runs of the list that it reads inside the image. What
// follows the sums is of one image at a time in every layout, and its bits do not depend on which it was.
//
// The loops (masked_conv2d.loops.h) in the order in which they run: what they read and write, the tasks that threads
// share, and what a thread has of its own.
//
//   name                reads                writes                    tasks              a thread's own
//
//   forward
//   conv_pack_forward   weight               packed                    blocks of outputs  nothing
//   masked_conv2d_fwd   input, packed;       y, kept                   bands of rows of   planes of input, a block
//                       bias, cond,                                    an image, or parts of outputs, a row
//                       residual                                       of some images'
//
//   backward
//   conv_pack_backward  weight               d_packed                  blocks of inputs   nothing
//   masked_conv2d_bwd   d_y, kept, input,    d_input, d_cond, sums of  chunks of bands,   planes of d_z and of input,
//                       d_packed             bands, partial: shares    or parts of their  a block of inputs, d_z of
//                                            of d_weight               gradients          rows, channels innermost
//   conv_reduce_weight  partial              d_weight                  output channels    nothing
//
// The host adds up the sums of bands, for d_bias and the cond of a class.
#include "../common/checks.h"
#include "host.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "../common/masked_conv2d.h"

namespace fastelbo {

// How a band of rows lies in a channel's planes: `above` and `below` further rows, and `gap` zeros between any two
// rows; or no gap, and `copies` planes, each moved to the side by one of `shifts`, with zeros where that leaves the
// image; or no gap and no zeros, but masks of what each tap reads inside the image. Or the rows of `lanes` images, an
// element of each after the other. Lengths are in elements, but for `columns` and `gap`, in pixels.
struct Planes {
  int64_t lanes = 1, columns, gap, pitch, above, below, rows, front, plane, size, copies = 1;
  std::vector<int64_t> shifts = {0};
  bool in_place = false;  // the channels' rows are those of the image in memory, `size` from one channel to the next
  int64_t vectors = 0;  // of a band
  std::vector<uint16_t> masks;  // [bands][taps][vectors], a bit for each lane; empty for none

  Planes() = default;
  Planes(int64_t columns, int64_t rows, int64_t reach, int64_t above, int64_t below, int64_t slack,
         std::vector<int64_t> shifts = {0})
      : columns(columns),
        gap(shifts.size() > 1 ? 0 : reach),
        pitch(columns + gap),
        above(above),
        below(below),
        rows(rows),
        front(reach),
        copies(int64_t(shifts.size())),
        shifts(std::move(shifts)) {
    allot(slack + (copies > 1 ? reach : 0));
  }
  static Planes of_images(int64_t lanes, int64_t columns, int64_t rows, int64_t gap, int64_t above, int64_t below) {
    Planes planes;
    planes.lanes = lanes;
    planes.columns = columns;
    planes.gap = gap;
    planes.pitch = (columns + gap) * lanes;
    planes.above = above;
    planes.below = below;
    planes.rows = rows;
    planes.front = gap * lanes;
    planes.allot(0);
    return planes;
  }
  void allot(int64_t slack) {
    plane = (front + (above + rows + below) * pitch + slack + 15) / 16 * 16;
    if (plane % 32 == 0) plane += 16;  // an odd number of cache lines, so that planes spread over the cache's sets
    size = copies * plane;
  }
  int64_t positions(int64_t rows) const { return rows * pitch - gap * lanes; }
  bool masked() const { return vectors > 0; }
  const uint16_t* masks_of(int64_t band, int64_t taps) const { return masks.data() + band * taps * vectors; }
  int64_t first() const { return front + above * pitch; }
  int64_t offset(int64_t down, int64_t right) const {
    if (copies == 1) return down * pitch + right * lanes;
    return down * pitch + (std::find(shifts.begin(), shifts.end(), right) - shifts.begin()) * plane;
  }
};

// Whether an image's rows lie one after the other, of the arithmetic type.
inline bool is_plane(const Image& image, int64_t columns, bool is_double) {
  return image.stride[3] == 1 && image.stride[2] == columns && image.format == (is_double ? Format::f64 : Format::f32);
}

// An input channel and one of its taps, by index; -1 is the centre.
struct ChannelTap {
  int32_t channel, tap;
};

// Products that registers add up, one after the other, before their total joins the others in memory: rounding errors
// grow with the root of this number and of that of totals, not with that of all products. tests/rounding.py has the
// bound.
constexpr int kSum = 128;

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

// One side of the convolution, its output or its input gradient. The output channels come in blocks of `block`, none of
// which spans two groups; under a gate a unit is a block of the first half and that of the second, else it is a block.
struct Side {
  int block = 0, halves = 1;
  int64_t half = 0;  // channels from one half to the other
  int64_t weights = 0;  // elements, once packed
  std::vector<int32_t> channels;  // [units][block], those of the first half; -1 for none
  std::vector<int> group;  // [units]
  std::vector<int64_t> start;  // [units] of its packed weights: [halves][pairs][block]
  std::vector<std::vector<int32_t>> group_offsets;  // [groups][pairs]
  std::vector<std::vector<ChannelTap>> group_pairs;  // [groups][pairs]
  std::vector<std::vector<Run>> group_runs;  // [groups], those of one tile after the other, or of any tile

  int64_t units() const { return int64_t(group.size()); }
  int channel(int64_t unit, int m) const { return channels[unit * block + m]; }
  int64_t pairs(int64_t unit) const { return int64_t(group_pairs[group[unit]].size()); }
  const int32_t* offsets(int64_t unit) const { return group_offsets[group[unit]].data(); }
  const Run* runs(int64_t unit) const { return group_runs[group[unit]].data(); }
  ChannelTap pair(int64_t unit, int64_t k) const { return group_pairs[group[unit]][k]; }
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
  // A band of an image, by its index among those of all images; nothing of images with anything between their rows.
  Ahead ahead(const Image& image, int64_t channels, int64_t index) const {
    bool planes = image.stride[3] == 1, pixels = image.stride[3] == channels;
    if (images > 1 || !(planes || pixels) || image.stride[2] != columns * image.stride[3]) return {};
    int64_t first = index % bands * band, rows_of_band = std::min(band, rows - first);
    int64_t element = image.format == Format::f64 ? 8 : image.format == Format::f32 ? 4 : 2;
    const char* from = image.data + image.at(index / bands, 0, first) * element;
    int64_t row = image.stride[2] * element;
    if (pixels) return {from, rows_of_band, row, row};
    return {from, channels, image.stride[1] * element, rows_of_band * row};
  }
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "masked_conv2d.loops.h"
#include "per_isa.h"

namespace fastelbo {

namespace {

#define FASTELBO_CONV_LOOP(loop, dtype) \
  ((dtype) == ScalarType::Double ? FASTELBO_BEST_DOUBLE(loop, true) : FASTELBO_BEST_FLOAT(loop, true))

template <class Loop>
void run_tasks(Loop loop, const ConvArgs& args, int64_t tasks) {
  if (tasks == 1) return loop(args, 0, 1);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

// Whether `width` positions, moved by a tap, meet an image's rows or columns.
bool meets(int64_t first, int64_t width, int64_t moved, int64_t size) {
  return first + moved + width > 0 && first + moved < size;
}

// The tiles of a row of images in lanes, a pixel a vector: f(column, width).
template <class F>
void for_tiles(int64_t columns, F&& f) {
  for (int64_t column = 0, width; column < columns; column += width) f(column, width = tile_of(columns - column));
}

constexpr int64_t kChannels = 8;  // whose rows around a tile stay in the first-level cache from tap to tap

// The runs of a tile: those of the taps that it reads, apart or joined, cut where a sum ends. Sums are the same
// whatever a tile reads.
template <class Reads>
void add_runs(std::vector<Run>& runs, const std::vector<Run>& of_taps, bool apart, Reads&& reads) {
  int32_t pairs = of_taps.empty() ? 0 : of_taps.back().end, sums = std::max((pairs + kSum - 1) / kSum, 1),
          in_sum = (pairs + sums - 1) / sums;
  size_t first = runs.size();
  for (size_t t = 0; t < of_taps.size(); ++t) {
    if (!reads(t)) continue;
    for (int32_t begin = of_taps[t].begin, end; begin < of_taps[t].end; begin = end) {
      end = std::min(of_taps[t].end, (begin / in_sum + 1) * in_sum);
      bool others = runs.size() > first;
      if (!apart && others && runs.back().end == begin && begin % in_sum != 0) {
        runs.back().end = end;
        continue;
      }
      if (others && runs.back().begin / in_sum != begin / in_sum) runs.back().ends = Run::sum;
      runs.push_back({begin, end, Run::nothing, of_taps[t].tap});
    }
  }
  if (runs.size() == first) runs.push_back({0, 0, Run::tile, 0});
  runs.back().ends = Run::tile;
}

// sign: 1 for the convolution, -1 for its input gradient, whose outputs are the convolution's inputs.
Side side_of(const LiveTaps& mask, int64_t outputs, int64_t inputs, const Planes& planes, int block, bool gated,
             int sign) {
  Side side;
  side.block = block;
  side.halves = gated ? 2 : 1;
  side.half = outputs / side.halves;
  const std::vector<int>& group = sign > 0 ? mask.group_out : mask.group_in;
  side.group_offsets.resize(mask.groups);
  side.group_pairs.resize(mask.groups);
  side.group_runs.resize(mask.groups);
  for (int g = 0; g < mask.groups; ++g) {
    std::vector<int32_t> members;
    for (int64_t c = 0; c < side.half; ++c)
      if (group[c] == g) members.push_back(int32_t(c));
    if (members.empty()) continue;
    std::vector<Run> of_taps;  // the pairs of a tap and some channels
    std::vector<const Tap*> taps;
    auto add = [&](int64_t first, int64_t end, int32_t t, const Tap& tap, auto&& live) {
      int32_t begin = int32_t(side.group_pairs[g].size());
      for (int64_t c = first; c < end; ++c) {
        if (!live(c)) continue;
        side.group_offsets[g].push_back(int32_t(c * planes.size + planes.offset(sign * tap.down, sign * tap.right)));
        side.group_pairs[g].push_back({int32_t(c), t});
      }
      of_taps.push_back(
          {begin, int32_t(side.group_pairs[g].size()), Run::nothing, t < 0 ? int32_t(mask.taps.size()) : t});
      taps.push_back(&tap);
    };
    for (int64_t first = 0; first < inputs; first += kChannels) {
      int64_t end = std::min(first + kChannels, inputs);
      for (size_t t = 0; t < mask.taps.size(); ++t)
        add(first, end, int32_t(t), mask.taps[t], [](int64_t) { return true; });
      if (mask.centre)
        add(first, end, -1, mask.centre_tap,
            [&](int64_t c) { return sign > 0 ? mask.live(members[0], c) : mask.live(c, members[0]); });
    }
    if (planes.lanes == 1) {
      add_runs(side.group_runs[g], of_taps, planes.masked(), [](size_t) { return true; });
    } else {
      for (int64_t row = 0; row < planes.rows; ++row)
        for_tiles(planes.columns, [&](int64_t column, int64_t width) {
          add_runs(side.group_runs[g], of_taps, false, [&](size_t t) {
            return meets(row, 1, sign * taps[t]->down, planes.rows) &&
                   meets(column, width, sign * taps[t]->right, planes.columns);
          });
        });
    }
    for (size_t at = 0; at < members.size(); at += block) {
      for (int m = 0; m < block; ++m) side.channels.push_back(at + m < members.size() ? members[at + m] : -1);
      side.group.push_back(g);
      side.start.push_back(side.weights);
      side.weights += side.halves * int64_t(side.group_pairs[g].size()) * block;
    }
  }
  return side;
}

struct Constants {
  int64_t block, vector, slack, lanes, pairs, few_pairs;
  bool masks;
  explicit Constants(ScalarType dtype) {
    FASTELBO_CONV_LOOP(conv_constants, dtype)(&block, &vector, &slack, &lanes, &pairs, &few_pairs, &masks);
  }
  int64_t vectors(int64_t positions) const { return (positions + vector - 1) / vector; }
};

constexpr int64_t kBandElements = 1 << 16;  // of all planes of a band: 256 KiB of a second-level cache
// Of all planes of an image in a lane, 2 MiB of sixteen: what a tile reads, a few rows of some channels, it reads for
// many taps.
constexpr int64_t kLaneElements = 1 << 15;
constexpr int64_t kTasks = 16;  // enough for any number of threads that a small batch can use
constexpr int64_t kChunkPixels = 1024;  // of a share of the weight gradient: fewer, and adding the shares shows

// The rows in a band depend on shapes only, so that results do not depend on the number of threads.
int64_t band_rows(int64_t n, int64_t rows, int64_t columns, int64_t channels, int64_t reach) {
  int64_t fitting = kBandElements / std::max<int64_t>(channels * columns, 1) - reach;
  int64_t bands = std::max<int64_t>((rows + std::max<int64_t>(fitting, 1) - 1) / std::max<int64_t>(fitting, 1),
                                    (kTasks + n - 1) / std::max<int64_t>(n, 1));
  int64_t least = std::max<int64_t>(4, 2 * reach);  // the rows above a band are packed twice
  return std::min(rows, std::max(least, (rows + bands - 1) / bands));
}

// What the planes of one side are made of: its inputs, and what the convolution over them is to be.
struct Source {
  const Image& image;  // of the inputs; without memory, if they have yet to be computed
  bool is_double;
  int64_t channels, outputs, above, below;
  int sign;  // as for side_of
};

// Leaves the channels' rows where they are, if planes without gaps would look the same.
void leave_in_place(Planes& planes, const ConvArgs& args, const Source& source) {
  planes.in_place = source.image && is_plane(source.image, args.columns, source.is_double);
  if (!planes.in_place) return;
  planes.size = source.image.stride[1];
  planes.front = planes.above = planes.below = 0;
}

// A band's rows one after the other, and which lanes of its vectors each tap reads inside the image.
Planes masked_planes(const ConvArgs& args, const Source& source, const Constants& constants) {
  Planes planes(args.columns, args.band, 0, source.above, source.below, 0);
  // rows that lie whole pages apart would share a few sets of the first-level cache
  int64_t stride = source.image.stride[1], lanes = constants.vector;
  if (stride % 1024 != 0 && stride < INT32_MAX / 2 / source.channels) leave_in_place(planes, args, source);
  planes.vectors = constants.vectors(args.band * args.columns);
  planes.masks.resize(args.bands * args.taps() * planes.vectors);
  uint16_t* masks = planes.masks.data();
  for (int64_t band = 0; band < args.bands; ++band) {
    int64_t first = band * args.band, last = std::min(first + args.band, args.rows);
    for (int64_t t = 0; t < args.taps(); ++t, masks += planes.vectors) {
      int64_t down = source.sign * args.tap(t).down, right = source.sign * args.tap(t).right;
      int64_t left_edge = std::max<int64_t>(-right, 0), right_edge = std::min(args.columns - right, args.columns);
      for (int64_t row = std::max(first, -down); row < std::min(last, args.rows - down); ++row) {
        int64_t start = (row - first) * args.columns;
        for (int64_t p = start + left_edge, next; p < start + right_edge; p = next) {
          next = std::min(start + right_edge, (p / lanes + 1) * lanes);
          masks[p / lanes] |= uint16_t(((1 << (next - p)) - 1) << p % lanes);
        }
      }
    }
  }
  return planes;
}

// A band's rows with zeros between them; or without, where the copies that this takes fit and are fewer vectors.
Planes planes_with_zeros(const ConvArgs& args, const Source& source, const Constants& constants) {
  int64_t reach = args.mask.sideways();
  Planes spaced(args.columns, args.band, reach, source.above, source.below, constants.slack);
  std::vector<int64_t> shifts = {0};
  for (const Tap& tap : args.mask.taps)
    if (std::find(shifts.begin(), shifts.end(), source.sign * tap.right) == shifts.end())
      shifts.push_back(source.sign * tap.right);
  Planes moved(args.columns, args.band, reach, source.above, source.below, constants.slack, shifts);
  bool fewer = constants.vectors(moved.positions(args.band)) < constants.vectors(spaced.positions(args.band));
  return fewer && source.channels * moved.size <= kBandElements ? moved : spaced;
}

// The planes of a band: of one image, or with images in lanes where these fit and take a twentieth fewer vectors times
// taps.
Planes planes_of(const ConvArgs& args, const Source& source, const Constants& constants) {
  int64_t reach = args.mask.sideways(), lanes = constants.vector, channels = source.channels;
  Planes pixels = constants.masks ? masked_planes(args, source, constants) : planes_with_zeros(args, source, constants);

  // a tile reads zeros beside the image for at most all of its pixels but one
  int64_t gap = std::min(reach, tile_of(args.columns) - 1), of_a_group = 0;
  Planes images = Planes::of_images(lanes, args.columns, args.rows, gap, 0, 0);
  if (channels * images.size > kLaneElements * lanes) return pixels;
  for (int64_t t = 0; t < args.taps(); ++t) {
    const Tap& tap = args.tap(t);
    for_tiles(args.columns, [&](int64_t column, int64_t width) {
      if (meets(column, width, source.sign * tap.right, args.columns))
        of_a_group += (args.rows - std::abs(tap.down)) * width;
    });
  }
  int64_t groups = (args.n + lanes - 1) / lanes, pairs = channels * source.outputs;
  int64_t transposed =
      args.n * args.rows * args.columns * (channels + source.outputs);  // each costs as much as a vector
  int64_t of_images = groups * of_a_group * pairs + transposed;
  int64_t of_pixels = args.n * args.bands * constants.vectors(pixels.positions(args.band)) * args.taps() * pairs;
  return 20 * of_images <= 19 * of_pixels ? images : pixels;
}

ConvArgs arguments(const Tensor& input, const Tensor& weight, const std::string& mask_type, const std::string& stack,
                   int64_t dilation, int64_t groups, const std::string& order, const std::string& activation,
                   const std::vector<int64_t>& taps, const Constants& constants) {
  ConvArgs args;
  auto sizes = input.sizes();
  args.n = sizes[0];
  args.in_channels = sizes[1];
  args.rows = sizes[2];
  args.columns = sizes[3];
  args.activation = parse_activation(activation);
  args.z_channels = weight.sizes()[0];
  args.y_channels = args.gated() ? args.z_channels / 2 : args.z_channels;
  args.mask = LiveTaps(weight, input, mask_type, stack, dilation, groups, order, args.gated(), taps);
  args.input = image_of(input);
  args.weight = image_of(weight);
  args.band = band_rows(args.n, args.rows, args.columns + args.mask.sideways(),
                        std::max(args.in_channels, args.z_channels), args.mask.up + args.mask.down);
  args.bands = (args.rows + args.band - 1) / args.band;
  return args;
}

void take_images(ConvArgs& args, int64_t lanes) {
  args.band = args.rows;
  args.bands = 1;
  args.images = lanes;
}

// Into how many parts the work on some images is cut, each of which packs them for itself unless a thread does several.
int64_t parts_of(const ConvArgs& args, int64_t tasks) {
  return args.images > 1 ? std::max<int64_t>(kTasks / std::max<int64_t>(tasks, 1), 1) : 1;
}

}  // namespace

std::tuple<Tensor, Tensor> masked_conv2d_fwd(Tensor input, Tensor weight, std::optional<Tensor> bias,
                                             std::optional<Tensor> cond, std::optional<Tensor> residual, Text mask_type,
                                             Text stack, int64_t dilation, int64_t channel_groups, Text group_order,
                                             Text activation, bool keep, std::vector<int64_t> taps) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps}.forward(
      bias, cond, residual);
  ScalarType dtype = arithmetic_type({&input});
  Constants constants(dtype);
  ConvArgs args =
      arguments(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps, constants);
  Source source{
      args.input, dtype == ScalarType::Double, args.in_channels, args.z_channels, args.mask.up, args.mask.down, 1};
  args.planes = planes_of(args, source, constants);
  if (args.planes.lanes > 1) take_images(args, args.planes.lanes);
  Tensor y = allocate_image(args.n, args.y_channels, input);
  Tensor kept =
      keep ? allocate_image(args.n, args.z_channels, input) : allocate(Shape{0}, input.scalar_type(), Device(input));
  args.y = image_of(y);
  if (keep) args.kept = image_of(kept);
  args.residual = image_of(residual);
  args.cond = image_of(cond);
  if (cond) args.cond_ndim = int64_t(cond->sizes().size());
  args.bias = image_of(bias);
  args.forward =
      side_of(args.mask, args.z_channels, args.in_channels, args.planes, int(constants.block), args.gated(), 1);
  Tensor packed = allocate(Shape{args.forward.weights}, dtype, Device(input));
  args.packed = packed.data_ptr();
  run_tasks(FASTELBO_CONV_LOOP(conv_pack_forward, dtype), args, args.forward.units());
  args.parts = std::min(parts_of(args, args.units()), args.forward.units());
  run_tasks(FASTELBO_CONV_LOOP(masked_conv2d_fwd, dtype), args, args.units() * args.parts);
  return {y, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_bwd(Tensor d_y, Tensor input, Tensor weight,
                                                             std::optional<Tensor> kept, Text mask_type, Text stack,
                                                             int64_t dilation, int64_t channel_groups, Text group_order,
                                                             Text activation, bool want_input, bool want_weight,
                                                             bool want_bias, int64_t cond_ndim,
                                                             std::vector<int64_t> taps) {
  ConvolutionCheck{input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps}.backward(
      d_y, kept, cond_ndim);
  ScalarType dtype = arithmetic_type({&input}), stored = input.scalar_type();
  Constants constants(dtype);
  ConvArgs args =
      arguments(input, weight, mask_type, stack, dilation, channel_groups, group_order, activation, taps, constants);
  const LiveTaps& mask = args.mask;
  Device device(input);
  args.d_y = image_of(d_y);
  args.kept = image_of(kept);
  int64_t reach = mask.sideways();
  args.planes = Planes(args.columns, args.band, reach, mask.up, mask.down, constants.slack);
  Image d_z = args.activation == Activation::none ? args.d_y : Image();
  Source source{d_z, dtype == ScalarType::Double, args.z_channels, args.in_channels, mask.down, mask.up, -1};
  if (want_input) {
    args.d_planes = planes_of(args, source, constants);
  } else {
    args.d_planes = Planes(args.columns, args.band, 0, 0, 0, constants.slack);  // no tap reads them
    leave_in_place(args.d_planes, args, source);
  }
  if (args.d_planes.lanes > 1) {
    take_images(args, args.d_planes.lanes);
    args.planes = Planes::of_images(args.images, args.columns, args.rows, reach, mask.up, mask.down);
  }
  Tensor d_input = want_input ? allocate(Shape(input), stored, input) : allocate(Shape{0}, stored, device);
  Tensor d_weight = want_weight ? allocate(Shape(weight), stored, weight) : allocate(Shape{0}, stored, device);
  Tensor d_bias = allocate(Shape{want_bias ? args.z_channels : 0}, stored, device);
  Tensor d_cond = cond_ndim == 4   ? allocate_image(args.n, args.z_channels, input)
                  : cond_ndim == 2 ? allocate(Shape{args.n, args.z_channels}, stored, device)
                                   : allocate(Shape{0}, stored, device);
  if (cond_ndim == 4) args.d_cond = image_of(d_cond);
  std::vector<double> sums;
  if (want_bias || cond_ndim == 2) {
    sums.resize(args.n * args.bands * args.z_channels);
    args.sums_wanted = true;
    args.sums = sums.data();
  }
  std::optional<Tensor> d_packed, partial;
  if (want_input) {
    args.d_input = image_of(d_input);
    args.backward = side_of(mask, args.in_channels, args.z_channels, args.d_planes, int(constants.block), false, -1);
    d_packed = allocate(Shape{args.backward.weights}, dtype, device);
    args.d_packed = d_packed->data_ptr();
    run_tasks(FASTELBO_CONV_LOOP(conv_pack_backward, dtype), args, args.backward.units());
  }
  args.chunks = std::min(args.units(), 4 * kTasks);
  int64_t count_of_taps = args.taps();
  if (want_weight) {
    args.d_weight = image_of(d_weight);
    std::memset(d_weight.data_ptr(), 0,
                size_t(d_weight.numel()) * (stored == ScalarType::Double  ? 8
                                            : stored == ScalarType::Float ? 4
                                                                          : 2));
    int64_t count = args.in_channels * count_of_taps;
    args.pairs = (count + constants.few_pairs - 1) / constants.few_pairs * constants.few_pairs;
    args.windows.resize((args.pairs + constants.pairs - 1) / constants.pairs);
    args.pair_offset.resize(args.pairs, 0);
    args.channels_at_once = constants.pairs;
    for (int64_t t = 0; t < count_of_taps; ++t) {
      const Tap& tap = args.tap(t);
      for (int64_t in = 0; in < args.in_channels; ++in) {
        int64_t pair = args.pair(in, t);
        args.windows[pair / constants.pairs].add(tap, args.rows, args.columns);
        args.pair_offset[pair] = int32_t(in * args.planes.size + args.planes.offset(tap.down, tap.right));
      }
    }
    int64_t blocks = (args.z_channels + constants.lanes - 1) / constants.lanes,
            share = blocks * args.pairs * constants.lanes;
    int64_t most = std::max<int64_t>(args.n * args.rows * args.columns / kChunkPixels, 4);
    args.chunks = std::min(args.chunks, most);
    partial = allocate(Shape{args.chunks * share}, dtype, device);
    args.partial = count ? partial->data_ptr() : nullptr;
  }
  args.parts = parts_of(args, args.chunks);
  run_tasks(FASTELBO_CONV_LOOP(masked_conv2d_bwd, dtype), args, args.chunks * args.parts);
  if (args.partial) run_tasks(FASTELBO_CONV_LOOP(conv_reduce_weight, dtype), args, args.z_channels);

  auto store_sums = [&](Tensor& to, int64_t entries) {  // each of as many consecutive bands as there are to an entry
    int64_t per_entry = entries ? args.n * args.bands / entries : 0;
    Image image = image_of(to);
    for (int64_t entry = 0; entry < entries; ++entry) {
      for (int64_t c = 0; c < args.z_channels; ++c) {
        double total = 0;
        for (int64_t unit = entry * per_entry; unit < (entry + 1) * per_entry; ++unit)
          total += sums[unit * args.z_channels + c];
        portable::with_format(image.format, [&](auto format) {
          portable::scatter<decltype(format)>(image.data, entry * args.z_channels + c, 1, 1, &total);
        });
      }
    }
  };
  if (want_bias) store_sums(d_bias, 1);
  if (cond_ndim == 2) store_sums(d_cond, args.n);
  return {d_input, d_weight, d_bias, d_cond};
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  fastelbo::implement(m, "masked_conv2d_fwd", TORCH_BOX(&fastelbo::masked_conv2d_fwd));
  fastelbo::implement(m, "masked_conv2d_bwd", TORCH_BOX(&fastelbo::masked_conv2d_bwd));
}
