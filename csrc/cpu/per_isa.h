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
#define FASTELBO_BEST(loop, T, exponential) (FASTELBO_ONLY::loop<T, exponential>)
#elif defined(__x86_64__)
#define FASTELBO_BEST(loop, T, exponential)            \
  (isa() == Isa::avx512 ? avx512::loop<T, exponential> \
   : isa() == Isa::avx2 ? avx2::loop<T, exponential>   \
                        : portable::loop<T, exponential>)
#else
#define FASTELBO_BEST(loop, T, exponential) (portable::loop<T, exponential>)
#endif

// Runs the best loop<T, exponential> over `count` tiles.
#define FASTELBO_RUN(loop, dtype, exponential, args, count)                                               \
  ((dtype) == ScalarType::Double ? ((exponential) ? run(FASTELBO_BEST(loop, double, true), args, count)   \
                                                  : run(FASTELBO_BEST(loop, double, false), args, count)) \
                                 : ((exponential) ? run(FASTELBO_BEST(loop, float, true), args, count)    \
                                                  : run(FASTELBO_BEST(loop, float, false), args, count)))

#define FASTELBO_ISA portable
namespace fastelbo::FASTELBO_ISA {
#include "loops.h"
}
#include FASTELBO_LOOPS
#undef FASTELBO_ISA
