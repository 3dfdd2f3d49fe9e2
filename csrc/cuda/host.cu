#include "host.cuh"

namespace fastelbo {

View::View(const Tensor& tensor, const Shape& shape)
    : given(true), data(static_cast<char*>(tensor.data_ptr())), format(format_of(tensor.scalar_type())) {
  broadcast_strides(tensor, shape, 0, stride);
}

View::View(const std::optional<Tensor>& tensor, const Shape& shape) {
  if (tensor) *this = View(*tensor, shape);
}

View View::of_samples(const std::optional<Tensor>& tensor, const Shape& shape, std::optional<int64_t> num_samples) {
  if (!tensor || !num_samples) return View(tensor, shape);
  View view(*tensor, shape.prepend(num_samples));
  view.sample_stride = view.stride[0];
  std::copy(view.stride + 1, view.stride + kMaxDims, view.stride);
  return view;
}

View View::of_term(const Tensor& tensor, const Shape& shape, int64_t event_ndim) {
  View view;
  view.given = view.term = view.repeats = true;
  view.data = static_cast<char*>(tensor.data_ptr());
  view.format = format_of(tensor.scalar_type());
  broadcast_strides(tensor, shape, event_ndim, view.stride);
  return view;
}

namespace {

// Whether dimension a of all the views encloses dimension b: > 0; < 0 the other way round; 0 undecided.
int encloses(std::initializer_list<View*> views, int a, int b) {
  for (const View* view : views) {
    int64_t outer = view->stride[a], inner = view->stride[b];
    if (view->given && outer != 0 && inner != 0 && outer != inner) return outer > inner ? 1 : -1;
  }
  return 0;
}

// Dimensions [begin, end) in the order of memory, the outermost first, by insertion.
void sort_by_memory(std::initializer_list<View*> views, int64_t* size, int begin, int end) {
  for (int d = begin + 1; d < end; ++d)
    for (int at = d; at > begin && encloses(views, at - 1, at) < 0; --at) {
      std::swap(size[at - 1], size[at]);
      for (View* view : views) std::swap(view->stride[at - 1], view->stride[at]);
    }
}

// Merges what can be of dimensions [begin, end), drops those of size 1 and moves the rest to `to`; returns their end.
int merge(std::initializer_list<View*> views, int64_t* size, int begin, int end, int to) {
  int first = to;
  for (int d = begin; d < end; ++d) {
    if (size[d] == 1) continue;
    bool fits = to > first;
    for (const View* view : views) fits = fits && (!view->given || view->stride[to - 1] == view->stride[d] * size[d]);
    if (fits) {
      size[to - 1] *= size[d];
      for (View* view : views) view->stride[to - 1] = view->stride[d];
      continue;
    }
    size[to] = size[d];
    for (View* view : views) view->stride[to] = view->stride[d];
    ++to;
  }
  return to;
}

int64_t product(const int64_t* size, int begin, int end) {
  int64_t total = 1;
  for (int d = begin; d < end; ++d) total *= size[d];
  return total;
}

// A function of the shape alone, so that sums have the same bits on every GPU.
device::Work spread(int64_t rows, int64_t groups, bool summed) {
  using device::kThreads, device::kTuning;
  device::Work work;
  work.rows = rows;
  work.groups = groups;
  int64_t lanes = 1, splits = 1;
  auto grow = [&](auto&& enough) {
    while (lanes < kThreads && lanes < groups && !enough()) lanes *= 2, ++work.lanes_log2;
  };
  grow([&] {
    return lanes >= 8 && lanes * kTuning.groups >= groups;
  });  // 8 lanes read whole cache lines; several groups overlap in time
  grow([&] { return rows * lanes >= kTuning.enough_threads; });
  work.steps = int((groups + lanes - 1) / lanes);
  int64_t most = summed ? kTuning.most_summed_steps : kTuning.most_steps;
  if (lanes == kThreads && work.steps > (summed ? most : 1)) {
    most = std::clamp<int64_t>(rows * groups / (kThreads * kTuning.enough_blocks), summed ? 2 : 1, most);
    splits = (groups + kThreads * most - 1) / (kThreads * most);
    work.steps = int((groups + kThreads * splits - 1) / (kThreads * splits));
  }
  work.splits = device::Divisor(uint32_t(splits));
  int64_t rows_per_block = kThreads / lanes;
  work.blocks = (rows + rows_per_block - 1) / rows_per_block * splits;
  return work;
}

}  // namespace

Plan::Plan(const Shape& shape, int64_t event_ndim, ScalarType dtype, std::initializer_list<Scale> scales,
           std::optional<int64_t> noise_offset, std::optional<int64_t> num_samples, std::initializer_list<View*> views,
           bool summed)
    : dtype(dtype), exponential(true), clamped(false) {
  packed = true;
  for (const Scale& scale : scales) {
    exponential &= scale.exponential();
    clamped |= scale.clamped;
    packed &= scale.exponential() && scale.soft_clamp == 0;
  }
  std::copy(shape.size, shape.size + shape.ndim, layout.size);
  layout.aligned = noise_offset || event_ndim || summed;
  layout.noise_offset = noise_offset.value_or(0);
  // Drawn noise follows the order of the elements, and so do sums, lest their last bits follow the layout; the rest
  // goes as memory lies.
  int events = shape.ndim - int(event_ndim);
  if (!layout.aligned) sort_by_memory(views, layout.size, 0, shape.ndim);
  bool plain = packed;  // scales that packed and flat kernels take
  flat = plain && can_flatten(views, shape, event_ndim, num_samples.value_or(1));
  int end;
  if (event_ndim) {
    layout.outer = merge(views, layout.size, 0, events, 0);
    end = merge(views, layout.size, events, shape.ndim, layout.outer);
  } else {
    end = merge(views, layout.size, 0, shape.ndim, 0);
    layout.outer = std::max(end - 1, 0);
  }
  auto divide = [&](int outer) {
    layout.outer = outer;
    layout.inner = end - outer;
    layout.rows = product(layout.size, 0, outer);
    layout.columns = product(layout.size, outer, end);
  };
  divide(layout.outer);
  packed = plain && can_pack(views, num_samples.value_or(1));
  flat &= !packed;
  layout.first_block = uint64_t(layout.noise_offset) / 4;
  if (flat) {
    flatten(event_ndim > 0);
    return;
  }
  if (!packed && !event_ndim && layout.columns < 32) divide(0);  // rows so short would leave threads idle
  layout.wide = layout.rows > INT32_MAX || layout.columns > INT32_MAX;
  if (!layout.wide)
    for (int d = 0; d < end; ++d) layout.divisor[d] = device::Divisor(uint32_t(std::max<int64_t>(layout.size[d], 1)));

  int64_t width = packed && format != Format::f32 ? 8 : 4;
  layout.vectors = uint32_t(layout.columns / width);
  int64_t shift = 0;  // shift: elements before a row in its first group
  if (layout.aligned) shift = layout.rows == 1 || layout.columns % 4 == 0 ? layout.noise_offset % 4 : 3;
  work = spread(layout.rows, layout.columns ? (layout.columns + shift + width - 1) / width : 0, event_ndim > 0);
  if (!event_ndim && layout.columns == 0) work.blocks = 0;  // no elements, and no sums of none
}

bool Plan::can_pack(std::initializer_list<View*> views, int64_t samples) {
  if (dtype != ScalarType::Float || layout.outer > 1 || layout.inner != 1 || layout.columns == 0) return false;
  bool found = false;
  for (const View* view : views)
    if (view->given && !view->term && !found) format = view->format, found = true;
  int64_t bytes = format == Format::f32 ? 4 : 2;
  if (layout.columns % (16 / bytes) || layout.noise_offset % 4) return false;
  auto fits = [&](int64_t elements) { return elements * bytes / 16 <= INT32_MAX; };
  if (!fits(layout.rows * layout.columns)) return false;
  for (const View* view : views) {
    if (!view->given) continue;
    if (view->format != (view->term ? Format::f32 : format) || view->format == Format::f64) return false;
    int64_t step = view->stride[layout.outer], size = view->term ? 4 : bytes;
    if (step == 0 && view->repeats) continue;
    auto aligned = [](int64_t address) { return address % 16 == 0; };
    if (step != 1 || !aligned(int64_t(view->data)) || !aligned(view->sample_stride * size)) return false;
    int64_t row_stride = layout.outer ? view->stride[0] : 0;
    if (!aligned(row_stride * size)) return false;
    if (!fits((samples - 1) * view->sample_stride + (layout.rows - 1) * row_stride + layout.columns)) return false;
  }
  return true;
}

// Whether every operand is contiguous, or has one value for each event, or one for all; `shape` may be reordered.
bool Plan::can_flatten(std::initializer_list<View*> views, const Shape& shape, int64_t event_ndim, int64_t samples) {
  const int64_t total = product(layout.size, 0, shape.ndim);
  if (dtype != ScalarType::Float || total == 0 || total > INT32_MAX - 8 || layout.noise_offset % 4) return false;
  int64_t events = event_ndim ? product(layout.size, shape.ndim - int(event_ndim), shape.ndim) : 0;
  bool found = false;
  for (const View* view : views)
    if (view->given && !view->term && !found) format = view->format, found = true;
  if (format != Format::f32 && format != Format::bf16 && format != Format::f16) return false;
  for (View* view : views) {
    if (!view->given) continue;
    if (view->format != (view->term ? Format::f32 : format)) return false;
    int64_t repeated = 1, expected = 1;
    int d = shape.ndim - 1;
    if (view->repeats)
      for (; d >= 0 && (layout.size[d] == 1 || view->stride[d] == 0); --d) repeated *= layout.size[d];
    for (; d >= 0; --d) {
      if (layout.size[d] == 1) continue;
      if (view->stride[d] != expected) return false;
      expected *= layout.size[d];
    }
    int64_t size = view->term || format == Format::f32 ? 4 : 2;
    view->varies = repeated == 1      ? device::Varies::elements
                   : repeated < total ? device::Varies::events
                                      : device::Varies::nothing;
    if (view->varies == device::Varies::elements && int64_t(view->data) % 16) return false;
    if (view->varies == device::Varies::events) {
      if (!view->term || (events && events != repeated)) return false;
      events = repeated;
    }
    if (samples > 1 && view->sample_stride * size % 16) return false;
  }
  layout.total = uint32_t(total);
  layout.event = device::Divisor(uint32_t(events ? events : total));
  return true;
}

// Elements in a row; sums by blocks that take several short events each, or of an event as of a packed row.
void Plan::flatten(bool summed) {
  using device::kTuning;
  const int64_t width = format == Format::f32 ? 4 : 8, event = layout.event.divisor;
  layout.rows = 1;
  layout.span = layout.total;
  if (!summed) {
    work = spread(1, (layout.total + width - 1) / width, false);
    return;
  }
  const int64_t count = layout.total / event;
  int64_t several = 1;
  if (2 * event <= kTuning.held_terms) {
    several = std::min<int64_t>(kTuning.held_terms / event, std::max<int64_t>(2, count / kTuning.enough_blocks));
    int64_t whole = width;  // so many events are whole vectors
    while (whole > 1 && whole / 2 * event % width == 0) whole /= 2;
    if (several > whole) several -= several % whole;
  }
  layout.events = uint32_t(several);
  layout.span = uint32_t(several * event);
  layout.rows = (count + several - 1) / several;
  int64_t groups = (layout.span + 2 * width - 2) / width;
  if (several == 1) {
    work = spread(layout.rows, groups, true);
    return;
  }
  // as many threads an event as there are, if each has eight fours of terms to add up
  auto room = [&](int log2) { return (several << log2) <= device::kThreads && (event >> log2) >= 32; };
  while (layout.event_lanes_log2 < 5 && room(layout.event_lanes_log2 + 1)) ++layout.event_lanes_log2;
  work.rows = layout.rows;
  work.groups = groups;
  work.lanes_log2 = kTuning.threads_log2;
  work.steps = int((groups + device::kThreads - 1) / device::kThreads);
  work.blocks = layout.rows;
}

Launcher::Launcher(const char* op, const Tensor& on) : op_(op) {
  int32_t index = Device(on).index;
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index, &guard_));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

Launcher::~Launcher() { aoti_torch_delete_cuda_guard(guard_); }

cudaLaunchConfig_t Launcher::configuration(int64_t blocks, int threads) const {
  STD_TORCH_CHECK(blocks <= INT32_MAX, op_, ": too many elements for one launch, which takes 2^31 - 1 blocks; got ",
                  blocks);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream_;
  return config;
}

void Launcher::check(cudaError_t error) const {
  cudaError_t pending = cudaGetLastError();  // clears it, so that no later launch reports this one's
  if (error == cudaSuccess) error = pending;
  STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error));
}

namespace device {

template <class T>
struct Partials {
  const double* partial;  // [rows, count]
  int64_t count;
  T* out;  // [rows]
};

// A block a row.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_partials(const __grid_constant__ Partials<T> args) {
  const double* row = args.partial + int64_t(blockIdx.x) * args.count;
  double total = 0;
  for (int64_t i = threadIdx.x; i < args.count; i += kThreads) total += row[i];
  total = sum_lanes(total, kThreads);
  if (threadIdx.x == 0) args.out[blockIdx.x] = T(total);
}

}  // namespace device

void add_partials(const Launcher& launch, const Tensor& partial, int64_t rows, int64_t count, ScalarType dtype,
                  void* out) {
  auto sums = static_cast<const double*>(partial.data_ptr());
  if (dtype == ScalarType::Double) {
    launch(device::sum_partials<double>, device::Partials<double>{sums, count, static_cast<double*>(out)}, rows);
  } else {
    launch(device::sum_partials<float>, device::Partials<float>{sums, count, static_cast<float*>(out)}, rows);
  }
}

Terms::Terms(const Shape& shape, int64_t event_ndim, ScalarType dtype, const Tensor& like)
    : tensor(event_ndim == 0 ? allocate(shape, dtype, like)
                             : allocate(shape.drop_trailing(event_ndim), dtype, Device(like))) {
  if (event_ndim == 0) elements = View::of_term(tensor, shape, 0);
}

void Terms::make_room(const Plan& plan) {
  int64_t splits = plan.work.splits.divisor;
  if (elements.given || splits == 1) return;
  partial = allocate(Shape{plan.layout.rows, splits}, ScalarType::Double, Device(tensor));
}

Tensor Terms::finish(const Launcher& launch, const Plan& plan) {
  if (partial)
    add_partials(launch, *partial, plan.layout.rows, plan.work.splits.divisor, plan.dtype, tensor.data_ptr());
  return tensor;
}

// Whether this library has code for a GPU, and its driver can run that: a cudaError_t, 0 if so.
int64_t cuda_error(int64_t device) {
  int before = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(int(device));
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, device::sum_partials<float>);
  cudaSetDevice(before);
  cudaGetLastError();  // clears what this call has found
  return int64_t(error);
}

}  // namespace fastelbo

STABLE_TORCH_LIBRARY_IMPL(FASTELBO_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&fastelbo::cuda_error));
}
