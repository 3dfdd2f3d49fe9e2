// As much of CUDA as csrc/cuda needs, on a CPU: a C++ compiler that finds this file first and includes it up front
// (tests/test_cuda_on_cpu.py) makes a library whose kernels run there, thread by thread, on torch's CPU tensors. It
// checks indices, masks, sums and host code; not the instructions, the memory model or the speed of a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define USE_CUDA
#include <torch/csrc/stable/library.h>
#define CUDA CPU  // the dispatch key of the registrations

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define FASTELBO_INLINE inline
#define FASTELBO_UNROLL
#define FASTELBO_ROLLED

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle*) { return 0; }
__attribute__((weak)) AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
}

inline dim3 threadIdx, blockIdx;

// The threads of a block take turns: each runs until it meets the others. A context starts a thread on its own stack,
// once for all blocks; from then on jumps switch, which unlike contexts make no system call.
struct Block {
  static constexpr size_t kStack = 1 << 16;
  jmp_buf scheduler;
  std::vector<ucontext_t> starts;
  std::vector<std::array<jmp_buf, 1>> threads;
  std::vector<bool> running, done;
  std::vector<double> exchanged;
  std::unique_ptr<char[]> stacks;
  std::function<void()> kernel;

  static Block& current() {
    static Block block;
    return block;
  }
  static void enter() {
    Block& block = current();
    for (;;) {
      block.kernel();
      block.done[threadIdx.x] = true;
      block.wait_for_others();
    }
  }
  void run(unsigned count) {
    if (starts.size() < count) {
      starts.resize(count);
      threads.resize(count);
      running.assign(count, false);
      exchanged.resize(count);
      stacks.reset(new char[count * kStack]);
      for (unsigned i = 0; i < count; ++i) {
        getcontext(&starts[i]);
        starts[i].uc_stack = {stacks.get() + i * kStack, 0, kStack};
        makecontext(&starts[i], enter, 0);
      }
    }
    done.assign(count, false);
    for (bool left = true; left;) {
      left = false;
      for (unsigned i = 0; i < count; ++i) {
        if (!done[i]) resume(i);
        left |= !done[i];
      }
    }
  }
  void resume(unsigned i) {
    threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (running[i]) _longjmp(threads[i][0], 1);
    running[i] = true;
    setcontext(&starts[i]);
  }
  void wait_for_others() {
    if (!_setjmp(threads[threadIdx.x][0])) _longjmp(scheduler, 1);
  }
};

inline void __syncthreads() { Block::current().wait_for_others(); }
inline double __shfl_xor_sync(unsigned, double x, int distance) {
  Block& block = Block::current();
  block.exchanged[threadIdx.x] = x;
  block.wait_for_others();
  double other = block.exchanged[threadIdx.x ^ distance];
  block.wait_for_others();
  return other;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Args), const Args& args) {
  Block& block = Block::current();
  block.kernel = [&] { kernel(args); };
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx.x = i;
    block.run(config->blockDim.x);
  }
  return cudaSuccess;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float __int_as_float(int32_t a) {
  float y;
  std::memcpy(&y, &a, 4);
  return y;
}
inline int32_t __float_as_int(float a) {
  int32_t y;
  std::memcpy(&y, &a, 4);
  return y;
}

namespace fastelbo::device {

inline void keep(uint32_t&) {}
inline void keep(int64_t&) {}

inline float min(float a, float b) { return a != a || b != b ? NAN : a < b ? a : b; }
inline float max(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

inline void multiply_wide(uint32_t a, uint32_t constant, uint32_t& high, uint32_t& low) {
  uint64_t product = uint64_t(a) * constant;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}

inline float rsqrt_approx(float a) { return std::nextafter(1 / std::sqrt(a), 0.0f); }
inline float sqrt_approx(float a) { return std::sqrt(a); }
inline float log2_approx(float a) { return std::log2(a); }
inline float sin_approx(float a) { return std::sin(a); }
inline float cos_approx(float a) { return std::cos(a); }

inline uint32_t bf16_bits(float x) {
  uint32_t bits = uint32_t(__float_as_int(x));
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
inline uint32_t f16_bits(float x) {
  _Float16 half = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline uint32_t pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
inline float f16_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return half;
}

}  // namespace fastelbo::device
