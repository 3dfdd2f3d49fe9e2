// Compiles an op's loops once per instruction set. Its source declares what they take, defines FASTELBO_LOOPS as the
// file that has them, and includes this file; FASTELBO_RUN then runs the best one for this processor.
//
// Everything that is not ours is included before the first target pragma, so that no shared inline function is ever
// compiled for a machine that cannot run it.
#pragma once

#include "host.h"

#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTELBO_INLINE inline __attribute__((always_inline))
#define FASTELBO_LAMBDA __attribute__((always_inline))
#define FASTELBO_UNROLL _Pragma("GCC unroll 16")

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define FASTELBO_ISA avx512
#define FASTELBO_AVX512
namespace fastelbo::FASTELBO_ISA {
#include "loops.h"
}
#include FASTELBO_LOOPS
#undef FASTELBO_AVX512
#undef FASTELBO_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTELBO_ISA avx2
#define FASTELBO_AVX2
namespace fastelbo::FASTELBO_ISA {
#include "loops.h"
}
#include FASTELBO_LOOPS
#undef FASTELBO_AVX2
#undef FASTELBO_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#if defined(FASTELBO_ONLY)  // the namespace of one instruction set: what none is asked for is not compiled
#define FASTELBO_BEST_FLOAT(loop, exponential) (FASTELBO_ONLY::loop<float, exponential>)
#define FASTELBO_BEST_DOUBLE(loop, exponential) (FASTELBO_ONLY::loop<double, exponential>)
#elif defined(__x86_64__)
#define FASTELBO_BEST_FLOAT(loop, exponential)             \
  (isa() == Isa::avx512 ? avx512::loop<float, exponential> \
   : isa() == Isa::avx2 ? avx2::loop<float, exponential>   \
                        : portable::loop<float, exponential>)
// An element at a time, which AVX-512 makes no faster.
#define FASTELBO_BEST_DOUBLE(loop, exponential) \
  (isa() == Isa::portable ? portable::loop<double, exponential> : avx2::loop<double, exponential>)
#else
#define FASTELBO_BEST_FLOAT(loop, exponential) (portable::loop<float, exponential>)
#define FASTELBO_BEST_DOUBLE(loop, exponential) (portable::loop<double, exponential>)
#endif

// Runs the best loop<T, exponential> over `count` tiles.
#define FASTELBO_RUN(loop, dtype, exponential, args, count)                                              \
  ((dtype) == ScalarType::Double ? ((exponential) ? run(FASTELBO_BEST_DOUBLE(loop, true), args, count)   \
                                                  : run(FASTELBO_BEST_DOUBLE(loop, false), args, count)) \
                                 : ((exponential) ? run(FASTELBO_BEST_FLOAT(loop, true), args, count)    \
                                                  : run(FASTELBO_BEST_FLOAT(loop, false), args, count)))

#define FASTELBO_ISA portable
namespace fastelbo::FASTELBO_ISA {
#include "loops.h"
}
#include FASTELBO_LOOPS
#undef FASTELBO_ISA
