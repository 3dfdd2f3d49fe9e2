// The program of a sampler (fastelbo/sampling/program.py): a flat array of int64, the same for every device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTELBO_HOST_DEVICE __host__ __device__
#elif !defined(FASTELBO_HOST_DEVICE)
#define FASTELBO_HOST_DEVICE
#endif

namespace fastelbo::sampler {

constexpr int kPanel = 16;

enum Op : int64_t { kConv, kPoint, kCopy };

// The order is that of FUNCTIONS in fastelbo/reference/sampling.py.
enum Function : int64_t {
  kNone,
  kRelu,
  kElu,
  kLeakyRelu,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kGeluTanh,
  kSoftplus,
  kExp,
  kAbs,
  kClamp,
  kAffine,
  kAdd,
  kSub,
  kMul,
  kDiv,
  kPrelu,
  kTanhSigmoid,
  kGlu
};
FASTELBO_HOST_DEVICE inline bool is_gate(int64_t function) { return function >= kTanhSigmoid; }

// Where a feature's numbers lie in an image's workspace.
struct Ref {
  int64_t offset, row_stride, column_stride, depth, down;

  FASTELBO_HOST_DEVICE explicit operator bool() const { return offset >= 0; }
  // `up` rows above the pixel's own: a ring of `depth` rows, which rows above the image are in as zeros.
  FASTELBO_HOST_DEVICE int64_t at(int64_t row, int64_t column, int64_t up = 0) const {
    int64_t slot =
        depth == 1 ? 0 : (row - down - up + depth) % depth;  // no feature is read as many as `depth` rows above
    return offset + slot * row_stride + column * column_stride;
  }
};

struct Run {
  int64_t down, offset, count, to;
};

struct Instruction {
  int64_t op, panels, function, first_run, runs;
  int64_t weight, bias, inputs;
  Ref out, a, b, c, d;
  int64_t parameters[2];  // the bits of float32
};

struct Header {
  int64_t colours, rows, columns, levels, wavefront, lag, size, outputs;
  Ref image, logits;
  int64_t sections, instructions, runs, tables;
};

// A front is what is drawn together: a pixel, or one of each of several rows, each `lag` columns behind that above it.
struct Pixel {
  int64_t row, column;
};

struct Program {
  const int64_t* data;

  FASTELBO_HOST_DEVICE const Header& header() const { return *reinterpret_cast<const Header*>(data); }
  // Instructions of a section: 0 those at the start of a row, 1 + l those of level l, levels + 1 those at its end.
  FASTELBO_HOST_DEVICE const Instruction* instruction(int64_t at) const {
    return reinterpret_cast<const Instruction*>(data + header().instructions) + at;
  }
  FASTELBO_HOST_DEVICE int64_t section(int64_t n) const { return data[header().sections + n]; }
  FASTELBO_HOST_DEVICE const Run* runs(const Instruction& instruction) const {
    return reinterpret_cast<const Run*>(data + header().runs) + instruction.first_run;
  }
  FASTELBO_HOST_DEVICE int64_t stages() const { return header().levels - 1; }
  FASTELBO_HOST_DEVICE int64_t stage(int64_t colour) const { return data[header().tables + colour]; }
  FASTELBO_HOST_DEVICE int64_t input(int64_t colour) const { return data[header().tables + header().colours + colour]; }
  FASTELBO_HOST_DEVICE const int64_t* outputs(int64_t colour) const {
    return data + header().tables + 2 * header().colours + colour * header().outputs;
  }

  FASTELBO_HOST_DEVICE int64_t fronts() const {
    const Header& h = header();
    return h.wavefront ? h.columns + h.lag * (h.rows - 1) : h.rows * h.columns;
  }
  // The first row of a front, and the row after its last.
  FASTELBO_HOST_DEVICE int64_t first_row(int64_t front) const {
    const Header& h = header();
    if (!h.wavefront) return front / h.columns;
    int64_t late = front - h.columns + 1;
    return late > 0 && h.lag > 0 ? (late + h.lag - 1) / h.lag : 0;
  }
  FASTELBO_HOST_DEVICE int64_t end_row(int64_t front) const {
    const Header& h = header();
    if (!h.wavefront) return front / h.columns + 1;
    if (h.lag == 0) return h.rows;
    int64_t last = front / h.lag;
    return (last < h.rows - 1 ? last : h.rows - 1) + 1;
  }
  FASTELBO_HOST_DEVICE int64_t column(int64_t front, int64_t row) const {
    const Header& h = header();
    return h.wavefront ? front - h.lag * row : front % h.columns;
  }
};

}  // namespace fastelbo::sampler
