// What machine code does not tell and only a GPU's clock does: how the Gaussian kernels' work is cut. The library takes
// the values of this file; tools/tune_gaussians.py compiles the same sources with others.
#pragma once

#include <cstdint>

// Assignments to the numbers of `t`.
#ifndef FASTELBO_TUNING
#define FASTELBO_TUNING
#endif
// Another way through the elements, made of the one that is given.
#ifndef FASTELBO_ACCESS
#define FASTELBO_ACCESS(...) __VA_ARGS__
#endif
// Of torch's ops that are implemented.
#ifndef FASTELBO_NAMESPACE
#define FASTELBO_NAMESPACE fastelbo
#endif

namespace fastelbo::device {

struct Tuning {
  int threads_log2 = 8;  // of a block
  // Blocks that a multiprocessor holds at least, which bounds their registers.
  int packed_f32 = 4, packed_half = 2, flat_f32 = 3, flat_half = 2;
  int groups = 4;  // of a row that a thread takes before others share the row: they overlap in time
  int most_steps = 4, most_summed_steps = 8;  // groups that a thread takes of a long row
  int enough_threads = 65536, enough_blocks = 512;  // half of a large GPU: from there on threads take more groups
  int held_terms = 4096;  // terms of short rows that a block keeps in shared memory until it sums them
  bool all_kernels = true;  // of every format, clamp and stride; else of aligned float32 and bfloat16, without a clamp
};

constexpr Tuning tuned(Tuning t) {
  FASTELBO_TUNING;
  return t;
}
constexpr Tuning kTuning = tuned({});

constexpr int kThreads = 1 << kTuning.threads_log2;

}  // namespace fastelbo::device
