// Draws images of a causal network a pixel at a time (fastelbo/sampling): a block of threads takes an image through
// all steps of a launch, and meets after each instruction of the program. Weights come from the second-level cache.
//
// Outputs are spread over the threads, and where these are more, the inputs of an output too: sums are in an order that
// the program alone decides, so that an image does not depend on the others of its batch.
#include "../common/checks.h"
#include "../common/sampling.h"
#include "host.cuh"

namespace fastelbo::device {

#include "../math/activation.h"

using namespace sampler;

FASTELBO_INLINE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

#include "../math/sampling_functions.h"

struct SamplerArgs {
  Program program;
  const float* weights;
  float* workspace;  // [n, size]
  int64_t first, end;  // steps
  // for samples only
  int64_t* image = nullptr;  // [n, colours, rows, columns], levels
  const bool* known = nullptr;  // of the same shape, or none
  const float* uniforms = nullptr;
  const float* values = nullptr;  // [levels], what the network takes for each
  float* scratch = nullptr;  // [n, levels]
  float inverse_temperature = 1;  // infinite for the likeliest level
  float* seen = nullptr;  // [n, colours, rows, columns, levels], the logits of each draw, or none
};

// What a section runs over: the pixels of a front, or of a row.
struct Pixels {
  int64_t front, row, count;
  bool whole_row;

  FASTELBO_INLINE static Pixels of_row(const Program& program, int64_t row) {
    return {0, row, program.header().columns, true};
  }
  FASTELBO_INLINE static Pixels of_front(const Program& program, int64_t front) {
    int64_t first = program.first_row(front);
    return {front, first, program.end_row(front) - first, false};
  }
  FASTELBO_INLINE Pixel at(const Program& program, int64_t index) const {
    if (whole_row) return {row, index};
    return {row + index, program.column(front, row + index)};
  }
};

// Adds to x, and under a gate to y, the products of inputs begin .. end - 1 with an output's weights.
FASTELBO_INLINE void multiply(const Instruction& in, const Run* run, const float* image, Pixel pixel,
                              const float* weight, const float* gate_weight, int64_t begin, int64_t end, float& x,
                              float& y) {
  int64_t seen = 0;
  for (int64_t r = 0; r < in.runs && seen < end; seen += run[r].count, ++r) {
    const float* from = image + in.a.at(pixel.row, pixel.column, run[r].down) + run[r].offset;
    int64_t first = begin > seen ? begin - seen : 0, last = end - seen < run[r].count ? end - seen : run[r].count;
    for (int64_t k = first; k < last; ++k) {
      float value = from[k];
      x = fma(value, weight[(seen + k) * kPanel], x);
      if (gate_weight) y = fma(value, gate_weight[(seen + k) * kPanel], y);
    }
  }
}

FASTELBO_INLINE void finish_output(const Instruction& in, float* image, Pixel pixel, int64_t output, float x, float y) {
  if (in.b) x += image[in.b.at(pixel.row, pixel.column) + output];
  if (in.c && is_gate(in.function)) y += image[in.c.at(pixel.row, pixel.column) + output];
  x = apply(in.function, x, y, as_number(in.parameters[0]), as_number(in.parameters[1]));
  if (in.d) x += image[in.d.at(pixel.row, pixel.column) + output];
  image[in.out.at(pixel.row, pixel.column) + output] = x;
}

FASTELBO_INLINE void conv(const Program& program, const Instruction& in, const float* weights, float* image,
                          const Pixels& pixels) {
  __shared__ float parts[2][kThreads];
  const bool gate = is_gate(in.function);
  const int64_t outputs = in.panels * kPanel, all = pixels.count * outputs;
  int64_t split = 1;
  while (split < 16 && all * split * 2 <= kThreads) split *= 2;
  for (int64_t at = threadIdx.x; at < all * split; at += kThreads) {
    int64_t part = at / all, rest = at - part * all, output = rest % outputs;
    Pixel pixel = pixels.at(program, rest / outputs);
    const float* weight = weights + in.weight + output / kPanel * in.inputs * kPanel + output % kPanel;
    const float* gate_weight = gate ? weight + outputs * in.inputs : nullptr;
    float x = part ? 0.0f : weights[in.bias + output], y = part || !gate ? 0.0f : weights[in.bias + outputs + output];
    multiply(in, program.runs(in), image, pixel, weight, gate_weight, part * in.inputs / split,
             (part + 1) * in.inputs / split, x, y);
    if (split == 1)
      finish_output(in, image, pixel, output, x, y);
    else
      parts[0][at] = x, parts[1][at] = y;
  }
  if (split == 1) return;
  __syncthreads();
  if (threadIdx.x < all) {
    float x = parts[0][threadIdx.x], y = parts[1][threadIdx.x];
    for (int64_t part = 1; part < split; ++part)
      x += parts[0][part * all + threadIdx.x], y += parts[1][part * all + threadIdx.x];
    finish_output(in, image, pixels.at(program, threadIdx.x / outputs), threadIdx.x % outputs, x, y);
  }
}

FASTELBO_INLINE void point(const Program& program, const Instruction& in, float* image, const Pixels& pixels) {
  const int64_t outputs = in.panels * kPanel;
  for (int64_t at = threadIdx.x; at < pixels.count * outputs; at += kThreads) {
    auto [row, column] = pixels.at(program, at / outputs);
    float a = image[in.a.at(row, column) + at % outputs], b = in.b ? image[in.b.at(row, column) + at % outputs] : a;
    image[in.out.at(row, column) + at % outputs] =
        apply(in.function, a, b, as_number(in.parameters[0]), as_number(in.parameters[1]));
  }
}

FASTELBO_INLINE void copy(const Program& program, const Instruction& in, float* image, const Pixels& pixels) {
  const Run* run = program.runs(in);
  for (int64_t index = 0; index < pixels.count; ++index) {
    auto [row, column] = pixels.at(program, index);
    const float* from = image + in.a.at(row, column);
    float* to = image + in.out.at(row, column);
    for (int64_t r = 0; r < in.runs; ++r)
      for (int64_t k = threadIdx.x; k < run[r].count; k += kThreads) to[run[r].to + k] = from[run[r].offset + k];
  }
}

FASTELBO_INLINE void run_section(const Program& program, int64_t section, const float* weights, float* image,
                                 const Pixels& pixels) {
  for (int64_t at = program.section(section); at < program.section(section + 1); ++at) {
    const Instruction& in = *program.instruction(at);
    if (in.op == kConv)
      conv(program, in, weights, image, pixels);
    else if (in.op == kPoint)
      point(program, in, image, pixels);
    else
      copy(program, in, image, pixels);
    __syncthreads();
  }
}

// Everything that can be computed before a stage of a front is drawn, if all before it has been.
FASTELBO_INLINE void advance(const Program& program, int64_t step, const float* weights, float* image) {
  const Header& header = program.header();
  int64_t stages = program.stages(), front = step / stages, stage = step % stages;
  // One call in a loop, since each is inlined: pixels of the last front, the end of the last row, the start of this,
  // pixels.
  for (int part = stage == 0 ? 0 : 3; part < 4; ++part) {
    int64_t row = front / header.columns;
    bool starts = !header.wavefront && front % header.columns == 0;
    if (part == 0 && front > 0) run_section(program, 1 + stages, weights, image, Pixels::of_front(program, front - 1));
    if (part == 1 && starts && row > 0)
      run_section(program, 1 + header.levels, weights, image, Pixels::of_row(program, row - 1));
    if (part == 2 && starts) run_section(program, 0, weights, image, Pixels::of_row(program, row));
    if (part == 3) run_section(program, 1 + stage, weights, image, Pixels::of_front(program, front));
  }
}

// The level whose cumulative probability first exceeds u, -1 where logits make no distribution; in thread 0.
FASTELBO_INLINE int64_t draw(const float* logits, const int64_t* outputs, int64_t levels, float inverse_temperature,
                             float u, float* scratch) {
  __shared__ float highest;
  __shared__ int64_t best;
  if (threadIdx.x == 0) {
    bool numbers = true;
    best = 0;
    highest = logits[outputs[0]];
    for (int64_t k = 0; k < levels; ++k) {
      numbers &= logits[outputs[k]] == logits[outputs[k]];
      if (logits[outputs[k]] > highest) highest = logits[outputs[k]], best = k;
    }
    if (!numbers && inverse_temperature > 3e38f) best = -1;
  }
  __syncthreads();
  if (inverse_temperature > 3e38f) return best;
  for (int64_t k = threadIdx.x; k < levels; k += kThreads)
    scratch[k] = exp((logits[outputs[k]] - highest) * inverse_temperature);
  __syncthreads();
  if (threadIdx.x) return 0;
  double total = 0, sum = 0;
  for (int64_t k = 0; k < levels; ++k) total += scratch[k];
  if (!(total > 0 && total < INFINITY)) return -1;
  int64_t last = 0;
  for (int64_t k = 0; k < levels; ++k) {
    sum += scratch[k];
    if (sum > u * total) return k;
    if (scratch[k] > 0) last = k;
  }
  return last;
}

__global__ void __launch_bounds__(kThreads, 2) sampler_kernel(const __grid_constant__ SamplerArgs args) {
  const Program program = args.program;
  const Header& header = program.header();
  float* image = args.workspace + int64_t(blockIdx.x) * header.size;
  const int64_t stages = program.stages(), pixels = header.rows * header.columns;
  for (int64_t step = args.first; step < args.end; ++step) {
    advance(program, step, args.weights, image);
    if (!args.image) continue;
    Pixels front = Pixels::of_front(program, step / stages);
    for (int64_t index = 0; index < front.count; ++index) {
      auto [row, column] = front.at(program, index);
      for (int64_t colour = 0; colour < header.colours; ++colour) {
        if (program.stage(colour) != step % stages) continue;
        int64_t at = (int64_t(blockIdx.x) * header.colours + colour) * pixels + row * header.columns + column,
                level = 0;
        bool known = args.known && args.known[at];
        if (args.seen) {
          const float* logits = image + header.logits.at(row, column);
          for (int64_t k = threadIdx.x; k < header.outputs; k += kThreads)
            args.seen[at * header.outputs + k] = logits[program.outputs(colour)[k]];
        }
        if (!known)
          level =
              draw(image + header.logits.at(row, column), program.outputs(colour), header.outputs,
                   args.inverse_temperature, args.uniforms[at], args.scratch + int64_t(blockIdx.x) * header.outputs);
        if (threadIdx.x == 0) {
          if (!known) args.image[at] = level;
          image[header.image.at(row, column) + program.input(colour)] =
              args.values[args.image[at] > 0 ? args.image[at] : 0];
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace fastelbo::device

namespace fastelbo {

namespace {

device::SamplerArgs sampler_arguments(const Tensor& program, const Tensor& weights, Tensor& workspace, int64_t first,
                                      int64_t end) {
  device::SamplerArgs args;
  args.program = {static_cast<const int64_t*>(program.data_ptr())};
  args.weights = static_cast<const float*>(weights.data_ptr());
  args.workspace = static_cast<float*>(workspace.data_ptr());
  args.first = first;
  args.end = end;
  return args;
}

}  // namespace

void sampler_advance(Tensor program, Tensor weights, Tensor workspace, int64_t first, int64_t end) {
  check_sampler({program, weights, workspace}, first, end);
  Launcher launch("sampler_advance", workspace);
  launch(device::sampler_kernel, sampler_arguments(program, weights, workspace, first, end), workspace.sizes()[0]);
}

void sampler_draw(Tensor program, Tensor weights, Tensor workspace, Tensor image, std::optional<Tensor> known,
                  Tensor uniforms, Tensor values, double temperature, int64_t first, int64_t end,
                  std::optional<Tensor> seen) {
  check_sampler({program, weights, workspace}, first, end);
  check_sampler_draw(workspace, image, known, uniforms, values, seen, temperature);
  Launcher launch("sampler_draw", workspace);
  int64_t n = workspace.sizes()[0];
  Tensor scratch = allocate(Shape{n, values.sizes()[0]}, ScalarType::Float, Device(workspace));
  device::SamplerArgs args = sampler_arguments(program, weights, workspace, first, end);
  args.image = static_cast<int64_t*>(image.data_ptr());
  args.known = known ? static_cast<const bool*>(known->data_ptr()) : nullptr;
  args.uniforms = static_cast<const float*>(uniforms.data_ptr());
  args.values = static_cast<const float*>(values.data_ptr());
  args.scratch = static_cast<float*>(scratch.data_ptr());
  args.inverse_temperature = float(1 / temperature);
  args.seen = seen ? static_cast<float*>(seen->data_ptr()) : nullptr;
  launch(device::sampler_kernel, args, n);
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CUDA, m) {
  m.impl("sampler_advance", TORCH_BOX(&fastelbo::sampler_advance));
  m.impl("sampler_draw", TORCH_BOX(&fastelbo::sampler_draw));
}
