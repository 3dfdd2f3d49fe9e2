// The loops of sampling.cpp, which includes them once per instruction set.

namespace fastelbo::FASTELBO_ISA {

#include "../math/activation.h"

using namespace sampler;

constexpr int kVectors = kPanel / kLanes;  // of a panel
constexpr int kTileItems = 6;
// Panels that a tile of few items takes at a time: each accumulator is a chain, and it takes eight to hide its latency.
#if defined(FASTELBO_AVX512)
constexpr int kPanelsOf[] = {0, 8, 4, 4, 4, 4, 4};
#else
constexpr int kPanelsOf[] = {0, 4, 2, 2, 1, 1, 1};
#endif
constexpr int kMostPanels = 8;

FASTELBO_INLINE F32 everywhere(float x) { return F32(x - NativeF{}); }
inline F32 gelu(F32 x) {
  float lanes[kLanes];
  store(lanes, x, Whole{});
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + __builtin_erff(lane * 0.70710678118654752f));
  return load(lanes, Whole{});
}

#include "../math/sampling_functions.h"

// So that apply, which is always inlined, stands in the code once and not at each call.
inline F32 evaluate(int64_t function, F32 a, F32 b, float p, float q) { return apply(function, a, b, p, q); }

// Panels of outputs of a few items: z[panels][items][kPanel].
template <int items, int panels>
inline void product(const Instruction& in, const Run* runs, const Item* item, const float* weight, int64_t stride,
                    const float* bias, float* z) {
  F32 total[panels][items][kVectors];
  FASTELBO_UNROLL
  for (int p = 0; p < panels; ++p) {
    FASTELBO_UNROLL
    for (int i = 0; i < items; ++i) {
      FASTELBO_UNROLL
      for (int v = 0; v < kVectors; ++v) total[p][i][v] = load(bias + p * kPanel + v * kLanes, Whole{});
    }
  }
  for (int64_t r = 0; r < in.runs; ++r) {
    const float* x[items];
    FASTELBO_UNROLL
    for (int i = 0; i < items; ++i)
      x[i] = item[i].image + in.a.at(item[i].row, item[i].column, runs[r].down) + runs[r].offset;
    for (int64_t k = 0; k < runs[r].count; ++k, weight += kPanel) {
      FASTELBO_UNROLL
      for (int p = 0; p < panels; ++p) {
        FASTELBO_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          F32 w = load(weight + p * stride + v * kLanes, Whole{});
          FASTELBO_UNROLL
          for (int i = 0; i < items; ++i) total[p][i][v] = fma(everywhere(x[i][k]), w, total[p][i][v]);
        }
      }
    }
  }
  FASTELBO_UNROLL
  for (int p = 0; p < panels; ++p) {
    FASTELBO_UNROLL
    for (int i = 0; i < items; ++i) {
      FASTELBO_UNROLL
      for (int v = 0; v < kVectors; ++v) store(z + (p * items + i) * kPanel + v * kLanes, total[p][i][v], Whole{});
    }
  }
}

template <int64_t function>
FASTELBO_INLINE void finish_panels(const Instruction& in, const Item* item, int items, int panels, int64_t first,
                                   const float* z, const float* z_b) {
  float p = as_number(in.parameters[0]), q = as_number(in.parameters[1]);
  for (int i = 0; i < items; ++i) {
    auto [image, row, column] = item[i];
    float* out = image + in.out.at(row, column) + first * kPanel;
    const float* b = in.b ? image + in.b.at(row, column) + first * kPanel : nullptr;
    const float* c = in.c ? image + in.c.at(row, column) + first * kPanel : nullptr;
    const float* d = in.d ? image + in.d.at(row, column) + first * kPanel : nullptr;
    for (int panel = 0; panel < panels; ++panel) {
      FASTELBO_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        int at = panel * kPanel + v * kLanes, from = (panel * items + i) * kPanel + v * kLanes;
        F32 x = load(z + from, Whole{}), y(0.0f);
        if (b) x = x + load(b + at, Whole{});
        if (is_gate(function)) {
          y = load(z_b + from, Whole{});
          if (c) y = y + load(c + at, Whole{});
        }
        x = evaluate(function, x, y, p, q);
        if (d) x = x + load(d + at, Whole{});
        store(out + at, x, Whole{});
      }
    }
  }
}

template <int items, int panels>
inline void conv_tile(const Instruction& in, const Run* runs, const Item* item, const float* weights, int64_t first) {
  alignas(64) float z[2][panels * items * kPanel];
  int64_t stride = in.inputs * kPanel;
  const float *weight = weights + in.weight + first * stride, *bias = weights + in.bias + first * kPanel;
  product<items, panels>(in, runs, item, weight, stride, bias, z[0]);
  if (is_gate(in.function))
    product<items, panels>(in, runs, item, weight + in.panels * stride, stride, bias + in.panels * kPanel, z[1]);
  switch (in.function) {
    case kNone: return finish_panels<kNone>(in, item, items, panels, first, z[0], z[1]);
    case kRelu: return finish_panels<kRelu>(in, item, items, panels, first, z[0], z[1]);
    case kElu: return finish_panels<kElu>(in, item, items, panels, first, z[0], z[1]);
    case kTanhSigmoid: return finish_panels<kTanhSigmoid>(in, item, items, panels, first, z[0], z[1]);
    case kGlu: return finish_panels<kGlu>(in, item, items, panels, first, z[0], z[1]);
  }
}

// All panels of up to kTileItems items.
template <int items>
inline void conv_panels(const Instruction& in, const Run* runs, const Item* item, const float* weights, int64_t first,
                        int64_t end) {
  constexpr int panels = kPanelsOf[items];
  for (; first + panels <= end; first += panels) conv_tile<items, panels>(in, runs, item, weights, first);
  if constexpr (panels > 2)
    for (; first + panels / 2 <= end; first += panels / 2) conv_tile<items, panels / 2>(in, runs, item, weights, first);
  for (; first < end; ++first) conv_tile<items, 1>(in, runs, item, weights, first);
}

inline void conv(const Program& program, const Instruction& in, const float* weights, const Item* item, int64_t count) {
  const Run* runs = program.runs(in);
  int64_t step = count <= kTileItems ? in.panels : std::min<int64_t>(in.panels, kPanelsOf[kTileItems]);
  for (int64_t first = 0; first < in.panels; first += step) {  // while its weights are in the first-level cache
    int64_t end = std::min(first + step, in.panels);
    for (int64_t i = 0; i < count; i += kTileItems) {
      switch (std::min<int64_t>(count - i, kTileItems)) {
        case 1: conv_panels<1>(in, runs, item + i, weights, first, end); break;
        case 2: conv_panels<2>(in, runs, item + i, weights, first, end); break;
        case 3: conv_panels<3>(in, runs, item + i, weights, first, end); break;
        case 4: conv_panels<4>(in, runs, item + i, weights, first, end); break;
        case 5: conv_panels<5>(in, runs, item + i, weights, first, end); break;
        case 6: conv_panels<6>(in, runs, item + i, weights, first, end); break;
      }
    }
  }
}

inline void point(const Instruction& in, const Item* item, int64_t count) {
  float p = as_number(in.parameters[0]), q = as_number(in.parameters[1]);
  for (int64_t i = 0; i < count; ++i) {
    auto [image, row, column] = item[i];
    const float *a = image + in.a.at(row, column), *b = in.b ? image + in.b.at(row, column) : a;
    float* out = image + in.out.at(row, column);
    for (int64_t at = 0; at < in.panels * kPanel; at += kLanes)
      store(out + at, evaluate(in.function, load(a + at, Whole{}), load(b + at, Whole{}), p, q), Whole{});
  }
}

inline void copy(const Program& program, const Instruction& in, const Item* item, int64_t count) {
  const Run* runs = program.runs(in);
  for (int64_t i = 0; i < count; ++i) {
    auto [image, row, column] = item[i];
    const float* from = image + in.a.at(row, column);
    float* to = image + in.out.at(row, column);
    for (int64_t r = 0; r < in.runs; ++r)
      for (int64_t k = 0; k < runs[r].count; ++k) to[runs[r].to + k] = from[runs[r].offset + k];
  }
}

inline void run_section(const Program& program, int64_t section, const float* weights, const Item* item,
                        int64_t count) {
  for (int64_t at = program.section(section); at < program.section(section + 1); ++at) {
    const Instruction& in = *program.instruction(at);
    if (in.op == kConv)
      conv(program, in, weights, item, count);
    else if (in.op == kPoint)
      point(in, item, count);
    else
      copy(program, in, item, count);
  }
}

// Sections at the start or the end of a row, for a few images at a time, whose rows then stay in the second-level
// cache.
inline void run_row(const Program& program, int64_t section, const float* weights, float* const* images, int64_t n,
                    int64_t row, Item* items) {
  constexpr int64_t kImages = 4;
  int64_t columns = program.header().columns;
  if (program.section(section) == program.section(section + 1)) return;
  for (int64_t begin = 0; begin < n; begin += kImages) {
    int64_t end = std::min(begin + kImages, n), count = 0;
    for (int64_t image = begin; image < end; ++image)
      for (int64_t column = 0; column < columns; ++column) items[count++] = {images[image], row, column};
    run_section(program, section, weights, items, count);
  }
}

// Everything that can be computed before a stage of a front is drawn, if all before it has been.
inline void advance(const Program& program, int64_t step, const float* weights, float* const* images, int64_t n,
                    Item* items) {
  const Header& header = program.header();
  int64_t stages = program.stages(), front = step / stages, stage = step % stages;
  auto pixels = [&](int64_t which, int64_t section) {
    int64_t count = 0;
    for (int64_t image = 0; image < n; ++image)
      for (int64_t row = program.first_row(which); row < program.end_row(which); ++row)
        items[count++] = {images[image], row, program.column(which, row)};
    run_section(program, section, weights, items, count);
  };
  if (stage == 0) {
    if (front > 0) pixels(front - 1, 1 + stages);
    if (!header.wavefront && front % header.columns == 0) {
      int64_t row = front / header.columns;
      if (row > 0) run_row(program, 1 + header.levels, weights, images, n, row - 1, items);
      run_row(program, 0, weights, images, n, row, items);
    }
  }
  pixels(front, 1 + stage);
}

// The level whose cumulative probability first exceeds u, -1 where logits make no distribution.
inline int64_t draw(const float* logits, const int64_t* outputs, int64_t levels, float inverse_temperature, float u,
                    float* scratch) {
  int64_t best = 0;
  float highest = logits[outputs[0]];
  bool numbers = true;
  for (int64_t k = 0; k < levels; ++k) {
    scratch[k] = logits[outputs[k]];
    numbers &= scratch[k] == scratch[k];
    if (scratch[k] > highest) {
      highest = scratch[k];
      best = k;
    }
  }
  if (inverse_temperature > 3e38f) return numbers ? best : -1;
  for (int64_t k = 0; k < levels; k += kLanes)
    store(scratch + k, exp((load(scratch + k, Whole{}) - F32(highest)) * F32(inverse_temperature)), Whole{});
  double total = 0;
  for (int64_t k = 0; k < levels; ++k) total += scratch[k];
  if (!(total > 0 && total < INFINITY)) return -1;
  double wanted = u * total, sum = 0;
  int64_t last = 0;
  for (int64_t k = 0; k < levels; ++k) {
    sum += scratch[k];
    if (sum > wanted) return k;
    if (scratch[k] > 0) last = k;
  }
  return last;
}

template <class T, bool>
void sampler_run(const SamplerArgs& args, int64_t begin, int64_t end) {
  const Program& program = args.program;
  const Header& header = program.header();
  int64_t n = end - begin, stages = program.stages(), pixels = header.rows * header.columns;
  int64_t most = std::max(header.columns * std::min<int64_t>(n, 4), n * (header.wavefront ? header.rows : 1));
  Item* items = static_cast<Item*>(__builtin_malloc(size_t(most) * sizeof(Item) + size_t(n) * sizeof(float*)));
  float* scratch = static_cast<float*>(__builtin_malloc(size_t(header.outputs + kLanes) * sizeof(float)));
  float** images = reinterpret_cast<float**>(items + most);
  for (int64_t i = 0; i < n; ++i) images[i] = args.workspace + (begin + i) * header.size;
  for (int64_t k = 0; k < header.outputs + kLanes; ++k) scratch[k] = 0;
  for (int64_t step = args.first; step < args.end; ++step) {
    advance(program, step, args.weights, images, n, items);
    if (!args.image) continue;
    int64_t front = step / stages, stage = step % stages;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t row = program.first_row(front); row < program.end_row(front); ++row) {
        int64_t column = program.column(front, row);
        const float* logits = images[i] + header.logits.at(row, column);
        float* input = images[i] + header.image.at(row, column);
        for (int64_t colour = 0; colour < header.colours; ++colour) {
          if (program.stage(colour) != stage) continue;
          int64_t at = ((begin + i) * header.colours + colour) * pixels + row * header.columns + column;
          if (args.seen) {
            const int64_t* outputs = program.outputs(colour);
            for (int64_t k = 0; k < header.outputs; ++k) args.seen[at * header.outputs + k] = logits[outputs[k]];
          }
          if (!args.known || !args.known[at])
            args.image[at] = draw(logits, program.outputs(colour), header.outputs, args.inverse_temperature,
                                  args.uniforms[at], scratch);
          input[program.input(colour)] = args.values[args.image[at] > 0 ? args.image[at] : 0];
        }
      }
    }
  }
  __builtin_free(scratch);
  __builtin_free(items);
}

}  // namespace fastelbo::FASTELBO_ISA
