// How images lie in memory while a convolution reads them, and what each of its tiles reads of them.
#include "masked_conv2d.h"

namespace fastelbo {

namespace {

constexpr int64_t kBandElements = 1 << 16;  // of all planes of a band: 256 KiB of a second-level cache
// Of all planes of an image in a lane, 2 MiB of sixteen: what a tile reads, a few rows of some channels, it reads for
// many taps.
constexpr int64_t kLaneElements = 1 << 15;
constexpr int64_t kChannels = 8;  // whose rows around a tile stay in the first-level cache from tap to tap

// Whether channels so far apart, whole pages, share a few sets of the first-level cache.
bool crowds(int64_t stride) { return stride % 1024 == 0; }

// Whether `width` positions, moved by a tap, meet an image's rows or columns.
bool meets(int64_t first, int64_t width, int64_t moved, int64_t size) {
  return first + moved + width > 0 && first + moved < size;
}

// The tiles of a row of pixels, or of a pixel of some images a vector: f(column, width).
template <class F>
void for_tiles(const Planes& planes, const LoopSizes& sizes, F&& f) {
  for (int64_t column = 0, width; column < planes.columns; column += width) {
    int64_t left = planes.columns - column;
    width = planes.layout == Layout::pixels ? pixels_at_once(left, planes.columns, sizes.pixels) : tile_of(left);
    column = std::min(column, planes.columns - width);
    f(column, width);
  }
}

// The pixels of an image that all taps read, each of its tile's cost: cost(width).
template <class Cost>
int64_t pixels_read(const ConvArgs& args, const Planes& planes, const LoopSizes& sizes, int sign, Cost&& cost) {
  int64_t total = 0;
  for (int64_t t = 0; t < args.taps(); ++t) {
    int64_t right = sign * args.tap(t).right, rows = std::max<int64_t>(args.rows - std::abs(args.tap(t).down), 0);
    for_tiles(planes, sizes, [&](int64_t column, int64_t width) {
      if (meets(column, width, right, args.columns)) total += rows * cost(width);
    });
  }
  return total;
}

// A layout, and how many products of vectors a convolution takes with it.
struct Candidate {
  Planes planes;
  int64_t cost;
};

Planes in_layout(Layout layout, int64_t step, const ConvArgs& args, const Source& source, int64_t gap,
                 int64_t slack = 0) {
  return {layout, step, args.columns, args.band, gap, source.above, source.below, slack};
}

// Leaves the channels' rows where they are, if planes without gaps would look the same.
void leave_in_place(Planes& planes, const ConvArgs& args, const Source& source) {
  planes.in_place = source.image && is_plane(source.image, args.columns, source.is_double);
  if (!planes.in_place) return;
  planes.size = source.image.stride[1];
  planes.front = planes.above = planes.below = 0;
}

// Whole vectors of channels for the gradient, as that of the weight takes them.
Planes pixels_of(const ConvArgs& args, const Source& source, const LoopSizes& sizes, int64_t gap) {
  int64_t channels = source.sign > 0 ? source.channels : sizes.vectors(source.channels) * sizes.vector;
  return in_layout(Layout::pixels, channels, args, source, gap);
}

// Which lanes of a band's vectors each tap reads inside the image.
void find_masks(Planes& planes, const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  int64_t lanes = sizes.vector;
  planes.vectors = sizes.vectors(args.band * args.columns);
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
}

Candidate of_rows(const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  Planes planes = in_layout(sizes.masks ? Layout::masked : Layout::spaced, 1, args, source,
                            sizes.masks ? 0 : args.mask.sideways(), sizes.masks ? 0 : sizes.slack);
  int64_t vectors = args.n * args.bands * sizes.vectors(planes.positions(args.band));
  int64_t transposed = source.innermost ? source.elements(args) / 2 : 0;  // at two elements for a product
  return {planes, vectors * args.taps() * source.channels * source.outputs + transposed};
}

Candidate of_pixels(const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  Planes planes = pixels_of(args, source, sizes, args.mask.sideways());
  // Measured: 0.77 of another layout's product, and a tile's start. Sums of fewer than four pixels wait for one
  // another.
  auto percent = [&](int64_t width) { return 77 * (std::max<int64_t>(width, 4) + sizes.pixels / 6); };
  int64_t vectors = source.halves * sizes.vectors(source.outputs / source.halves);
  int64_t cost = args.n * pixels_read(args, planes, sizes, source.sign, percent) / 100 * source.channels * vectors;
  if (!source.innermost) cost = (cost + source.elements(args) / 2) * 20 / 19;
  return {planes, cost};
}

Candidate of_images(const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  int64_t groups = sizes.vectors(args.n), gap = std::min(args.mask.sideways(), tile_of(args.columns) - 1);
  // A tile reads zeros beside the image for at most all of its pixels but one, and none above or below.
  Planes planes(Layout::images, sizes.vector, args.columns, args.rows, gap, 0, 0, 0);
  int64_t read = pixels_read(args, planes, sizes, source.sign, [](int64_t width) { return width; });
  return {planes, groups * read * source.channels * source.outputs + source.elements(args)};
}

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

// The runs of each tile of each row, and where they start; rows that read the same rows of taps share them.
void add_runs_of_tiles(std::vector<Run>& runs, std::vector<int32_t>& starts, const std::vector<Run>& of_taps,
                       const std::vector<const Tap*>& taps, const ConvArgs& args, const Planes& planes,
                       const LoopSizes& sizes, int sign) {
  std::vector<char> before, reads(taps.size());
  size_t row_before = 0;
  for (int64_t row = 0; row < args.rows; ++row, before = reads) {
    for (size_t t = 0; t < taps.size(); ++t) reads[t] = meets(row, 1, sign * taps[t]->down, args.rows);
    size_t of_row = starts.size(), tile = 0;
    for_tiles(planes, sizes, [&](int64_t column, int64_t width) {
      if (row > 0 && reads == before) return starts.push_back(starts[row_before + tile++]);
      starts.push_back(int32_t(runs.size()));
      add_runs(runs, of_taps, false,
               [&](size_t t) { return reads[t] && meets(column, width, sign * taps[t]->right, args.columns); });
    });
    row_before = of_row;
  }
}

}  // namespace

Source::Source(const ConvArgs& args, bool is_double, int sign)
    : image(sign > 0                              ? args.input
            : args.activation == Activation::none ? args.d_y
                                                  : Image()),
      innermost(is_innermost(sign > 0 ? args.input : args.d_y)),
      is_double(is_double),
      channels(sign > 0 ? args.in_channels : args.z_channels),
      outputs(sign > 0 ? args.z_channels : args.in_channels),
      halves(sign > 0 && args.gated() ? 2 : 1),
      above(sign > 0 ? args.mask.up : args.mask.down),
      below(sign > 0 ? args.mask.down : args.mask.up),
      sign(sign) {}

int64_t band_rows(int64_t n, int64_t rows, int64_t columns, int64_t channels, int64_t reach) {
  int64_t fitting = kBandElements / std::max<int64_t>(channels * columns, 1) - reach;
  int64_t bands = std::max<int64_t>((rows + std::max<int64_t>(fitting, 1) - 1) / std::max<int64_t>(fitting, 1),
                                    (kTasks + n - 1) / std::max<int64_t>(n, 1));
  int64_t least = std::max<int64_t>(4, 2 * reach);  // the rows above a band are packed twice
  return std::min(rows, std::max(least, (rows + bands - 1) / bands));
}

Planes planes_of(const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  // planes become pixels, and pixels planes, where nothing else is done to either
  bool bare = source.sign > 0 ? args.bare() : args.activation == Activation::none && args.cond_ndim != 4;
  bool transposes = bare && is_plane(source.image, args.columns, source.is_double) && !crowds(source.image.stride[1]) &&
                    !crowds(args.rows * args.columns);
  Candidate best = of_rows(args, source, sizes);
  if ((source.innermost || transposes) && args.mask.groups == 1) {
    Candidate pixels = of_pixels(args, source, sizes);
    if (pixels.cost < best.cost) best = pixels;
  }
  Candidate images = of_images(args, source, sizes);
  bool fits = source.channels * images.planes.size <= kLaneElements * sizes.vector;
  if (fits && images.cost < best.cost) best = images;
  if (best.planes.layout == Layout::masked) {
    int64_t stride = source.image.stride[1];
    if (!crowds(stride) && stride < INT32_MAX / 2 / source.channels) leave_in_place(best.planes, args, source);
    find_masks(best.planes, args, source, sizes);
  }
  return best.planes;
}

Planes planes_of_weight_gradient(const ConvArgs& args, const Source& source, const LoopSizes& sizes) {
  int64_t gap = args.mask.sideways();
  return source.innermost ? pixels_of(args, source, sizes, gap)
                          : in_layout(Layout::spaced, 1, args, source, gap, sizes.slack);
}

Planes planes_without_taps(const ConvArgs& args, Source source, const LoopSizes& sizes) {
  source.above = source.below = 0;
  if (source.innermost) return pixels_of(args, source, sizes, 0);
  Planes planes = in_layout(Layout::spaced, 1, args, source, 0, sizes.slack);
  leave_in_place(planes, args, source);
  return planes;
}

Side side_of(const ConvArgs& args, const Planes& planes, const LoopSizes& sizes, int sign) {
  const LiveTaps& mask = args.mask;
  int64_t outputs = sign > 0 ? args.z_channels : args.in_channels,
          inputs = sign > 0 ? args.in_channels : args.z_channels;
  Side side;
  side.halves = sign > 0 && args.gated() ? 2 : 1;
  side.half = outputs / side.halves;
  side.block = sizes.block_of(planes, side.half);
  const std::vector<int>& group = sign > 0 ? mask.group_out : mask.group_in;
  side.groups.resize(mask.groups);
  for (int g = 0; g < mask.groups; ++g) {
    std::vector<int32_t> members;
    for (int64_t c = 0; c < side.half; ++c)
      if (group[c] == g) members.push_back(int32_t(c));
    if (members.empty()) continue;
    Side::Group& of = side.groups[g];
    std::vector<Run> of_taps;  // the pairs of a tap and some channels
    std::vector<const Tap*> taps;
    auto add = [&](int64_t first, int64_t end, int32_t t, const Tap& tap, auto&& live) {
      int32_t begin = int32_t(of.pairs.size());
      for (int64_t c = first; c < end; ++c) {
        if (!live(c)) continue;
        of.offsets.push_back(int32_t(c * planes.size + planes.offset(sign * tap.down, sign * tap.right)));
        of.pairs.push_back({int32_t(c), t});
      }
      of_taps.push_back({begin, int32_t(of.pairs.size()), Run::nothing, t < 0 ? int32_t(mask.taps.size()) : t});
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
    if (planes.layout == Layout::pixels || planes.layout == Layout::images)
      add_runs_of_tiles(of.runs, of.starts, of_taps, taps, args, planes, sizes, sign);
    else
      add_runs(of.runs, of_taps, planes.layout == Layout::masked, [](size_t) { return true; });
    for (size_t at = 0; at < members.size(); at += side.block) {
      for (int m = 0; m < side.block; ++m) side.channels.push_back(at + m < members.size() ? members[at + m] : -1);
      side.group.push_back(g);
      side.start.push_back(side.weights);
      side.weights += side.halves * int64_t(of.pairs.size()) * side.block;
    }
  }
  return side;
}

}  // namespace fastelbo
