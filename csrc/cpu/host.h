// The host side of the CPU ops: tensors in, operands out.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../common/host.h"

namespace fastelbo {

enum class Isa { portable, avx2, avx512 };
// The best instruction set of this processor; FASTELBO_CPU_ISA may name a lesser one.
Isa isa();

constexpr int kTile = 1024;  // elements: six float tiles fit a first-level cache

// A tensor as the loops see it: broadcast to the logical shape, with mergeable dimensions merged.
struct Operand {
  bool given = false;
  char* data = nullptr;  // null where the tensor is empty, too
  Format format = Format::f32;
  int ndim = 1;
  int64_t size[kMaxDims], stride[kMaxDims];  // in elements

  Operand() = default;
  explicit operator bool() const { return given; }
  // The tensor covers the logical shape less its last `reduced` dimensions, over which it is constant.
  Operand(const Tensor& tensor, const Shape& shape, int64_t reduced = 0);
  Operand(const std::optional<Tensor>& tensor, const Shape& shape);
};

// Where a sample's noise comes from: a given tensor, or the Philox stream of a seed.
struct Noise {
  Operand given;
  uint64_t seed = 0;
  int64_t offset = 0;   // global index of the first element
  int64_t samples = 1;  // K of num_samples
  double temperature = 1;

  Noise(const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, int64_t offset,
        std::optional<int64_t> num_samples, double temperature, const Shape& shape);
};

// How the elements are cut up. A row is one event; a tile is as many whole rows as fit, or a chunk of one long row.
struct Tile {
  int64_t start;  // first element
  int count;
  int64_t row;    // first row
  int rows;       // whole rows, 0 for a chunk
};

struct Tiling {
  int64_t rows = 1, columns = 0, rows_per_tile = 1, chunks_per_row = 1;

  Tiling() = default;
  Tiling(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    if (columns > kTile)
      chunks_per_row = (columns + kTile - 1) / kTile;
    else
      rows_per_tile = kTile / std::max<int64_t>(columns, 1);
  }
  int64_t tiles() const {
    return chunks_per_row > 1 ? rows * chunks_per_row : (rows + rows_per_tile - 1) / rows_per_tile;
  }
  Tile operator[](int64_t tile) const {
    if (chunks_per_row > 1) {
      int64_t row = tile / chunks_per_row, first = tile % chunks_per_row * kTile;
      return {row * columns + first, int(std::min<int64_t>(kTile, columns - first)), row, 0};
    }
    int64_t row = tile * rows_per_tile, n = std::min(rows_per_tile, rows - row);
    return {row * columns, int(n * columns), row, int(n)};
  }
};

// Rows of the last event_ndim dimensions, or flat tiles where the op is elementwise.
Tiling event_tiling(const Shape& shape, int64_t event_ndim);

// out[at] = the sum of `count` partial sums, in order; out is of the arithmetic type.
void store_total(const std::vector<double>& partial, size_t first, size_t count, ScalarType dtype, void* out,
                 int64_t at);

// An elementwise term, or its sum over each row. Rows longer than a tile go through partial sums, added in order, so
// that the result depends neither on the number of threads nor on the instruction set.
struct Terms {
  Operand elements;             // where elementwise
  void* sums = nullptr;         // [rows] of the arithmetic type, where not
  std::vector<double> partial;  // [rows * chunks_per_row], where the rows are chunked

  Tensor tensor;

  // The last event_ndim dimensions of the shape are one event.
  Terms(const Shape& shape, int64_t event_ndim, ScalarType dtype, const Tensor& like, const Tiling& tiling);
  // Adds the partial sums up; the result.
  Tensor finish(ScalarType dtype, const Tiling& tiling);
};

constexpr int64_t kGrain = 8;  // tiles a thread takes at least: below that, waking it costs more than it brings

// Runs the loop over all tiles on torch's threads.
template <class Loop, class Args>
void run(Loop loop, const Args& args, int64_t tiles) {
  if (tiles <= kGrain) return loop(args, 0, tiles);
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

}  // namespace fastelbo
