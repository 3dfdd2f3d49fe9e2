// Draws images of a causal network a pixel at a time (fastelbo/sampling): runs a program over many pixels at once,
// which are those of a row, or those of the same place in several images.
//
// Every output is one chain of multiply-adds in the order of the weights, whichever pixels share a tile with it, so
// that an image does not depend on the others of its batch.
#include "../common/checks.h"
#include "../common/sampling.h"
#include "host.h"

namespace fastelbo {

// A pixel of an image.
struct Item {
  float* image;  // its workspace
  int64_t row, column;
};

struct SamplerArgs {
  sampler::Program program;
  const float* weights;
  float* workspace;  // [n, size]
  int64_t n, first, end;  // steps
  // for samples only
  int64_t* image = nullptr;       // [n, colours, rows, columns], levels
  const bool* known = nullptr;    // of the same shape, or none
  const float* uniforms = nullptr;
  const float* values = nullptr;  // [levels], what the network takes for each
  float inverse_temperature = 1;  // infinite for the likeliest level
  float* seen = nullptr;          // [n, colours, rows, columns, levels], the logits of each draw, or none
};

}  // namespace fastelbo

#define FASTELBO_LOOPS "sampling.loops.h"
#include "per_isa.h"

namespace fastelbo {

namespace {

SamplerArgs sampler_arguments(const Tensor& program, const Tensor& weights, Tensor& workspace, int64_t first,
                              int64_t end) {
  check_sampler({program, weights, workspace}, first, end);
  SamplerArgs args;
  args.program = {static_cast<const int64_t*>(program.data_ptr())};
  args.weights = static_cast<const float*>(weights.data_ptr());
  args.workspace = static_cast<float*>(workspace.data_ptr());
  args.n = workspace.sizes()[0];
  const sampler::Header& header = args.program.header();
  int64_t size = workspace.sizes()[1], steps = args.program.fronts() * args.program.stages();
  if (size != header.size) refuse("workspace must have the program's ", header.size, " columns; got ", size);
  if (end > steps) refuse("end must be at most the program's ", steps, " steps; got ", end);
  args.first = first;
  args.end = end;
  return args;
}

void run_images(const SamplerArgs& args) {
  auto loop = FASTELBO_BEST_FLOAT(sampler_run, true);
  if (args.n <= 1) return loop(args, 0, args.n);
  torch::stable::parallel_for(0, args.n, 1, [&](int64_t begin, int64_t end) { loop(args, begin, end); });
}

}  // namespace

void sampler_advance(Tensor program, Tensor weights, Tensor workspace, int64_t first, int64_t end) {
  run_images(sampler_arguments(program, weights, workspace, first, end));
}

void sampler_draw(Tensor program, Tensor weights, Tensor workspace, Tensor image, std::optional<Tensor> known,
                  Tensor uniforms, Tensor values, double temperature, int64_t first, int64_t end,
                  std::optional<Tensor> seen) {
  SamplerArgs args = sampler_arguments(program, weights, workspace, first, end);
  check_sampler_draw(workspace, image, known, uniforms, values, seen, temperature);
  const sampler::Header& header = args.program.header();
  const int64_t shape[] = {header.colours, header.rows, header.columns};
  if (!std::equal(shape, shape + 3, image.sizes().data() + 1))
    refuse("image must be of the program's ", shape[0], " x ", shape[1], " x ", shape[2], "; got shape ",
           sizes_text(image));
  if (seen && seen->sizes()[4] != header.outputs)
    refuse("seen must have the program's ", header.outputs, " outputs; got shape ", sizes_text(*seen));
  // Where logits are asked for, levels that are known may be of more values than the network has outputs.
  if (seen ? values.numel() < header.outputs : values.numel() != header.outputs)
    refuse("values must be the program's ", header.outputs, " numbers; got ", values.numel());
  args.image = static_cast<int64_t*>(image.data_ptr());
  args.known = known ? static_cast<const bool*>(known->data_ptr()) : nullptr;
  args.uniforms = static_cast<const float*>(uniforms.data_ptr());
  args.values = static_cast<const float*>(values.data_ptr());
  args.inverse_temperature = float(1 / temperature);
  args.seen = seen ? static_cast<float*>(seen->data_ptr()) : nullptr;
  run_images(args);
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(fastelbo, CPU, m) {
  m.impl("sampler_advance", TORCH_BOX(&fastelbo::sampler_advance));
  m.impl("sampler_draw", TORCH_BOX(&fastelbo::sampler_draw));
}
