// What math/ needs of one value on the GPU: a float, or a double. Device code is plain C++ but for this file's
// instructions, so that the tests can run the kernels on a CPU, thread by thread (tests/cuda_on_cpu).
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define FASTELBO_INLINE __device__ __forceinline__
#define FASTELBO_UNROLL _Pragma("unroll")
#define FASTELBO_ROLLED _Pragma("unroll 1")
#endif

#include "../common/scale_params.h"

namespace fastelbo::device {

using F32 = float;
using I32 = int32_t;
using Mask = bool;

FASTELBO_INLINE float as_float(int32_t a) { return __int_as_float(a); }
FASTELBO_INLINE int32_t as_int(float a) { return __float_as_int(a); }
FASTELBO_INLINE bool nonzero(int32_t a) { return a != 0; }
FASTELBO_INLINE constexpr bool may_be_any(bool) { return true; }  // to ask takes as long as what it saves
FASTELBO_INLINE float select(bool m, float a, float b) { return m ? a : b; }
FASTELBO_INLINE float abs(float a) { return fabsf(a); }
FASTELBO_INLINE float flip_sign(float a, int32_t s) { return as_float(as_int(a) ^ s); }
FASTELBO_INLINE float fma(float a, float b, float c) { return fmaf(a, b, c); }
FASTELBO_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
FASTELBO_INLINE float sqrt(float a) { return sqrtf(a); }

#if defined(__CUDACC__)
// Keeps a value in its register: in a loop the compiler would rather work it out again from where it came.
FASTELBO_INLINE void keep(uint32_t& a) { asm volatile("" : "+r"(a)); }
FASTELBO_INLINE void keep(int64_t&) {}

// NaN stays NaN, which fminf and fmaxf would drop.
FASTELBO_INLINE float min(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
FASTELBO_INLINE float max(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

FASTELBO_INLINE float rsqrt_approx(float a) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
FASTELBO_INLINE float sqrt_approx(float a) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
FASTELBO_INLINE float log2_approx(float a) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
FASTELBO_INLINE float sin_approx(float a) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}
FASTELBO_INLINE float cos_approx(float a) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  return y;
}

// Two values to two halves, `low` in the low bits; rounded to nearest.
FASTELBO_INLINE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
FASTELBO_INLINE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// One instruction; of a 64-bit product in C++ the compiler makes two.
FASTELBO_INLINE void multiply_wide(uint32_t a, uint32_t constant, uint32_t& high, uint32_t& low) {
  asm("{ .reg .u64 product; mul.wide.u32 product, %2, %3; mov.b64 {%1, %0}, product; }"
      : "=r"(high), "=r"(low)
      : "r"(a), "r"(constant));
}

FASTELBO_INLINE float f16_to_float(uint16_t a) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(a));
  return y;
}
#endif

// sqrt(max(a, 0)) to 1 ulp. The compiler's own correctly rounded root branches, and takes twice the instructions.
FASTELBO_INLINE float sqrt_of_positive_part(float a) {
  a = fmaxf(a, 0x1p-100f);
  float inverse = rsqrt_approx(a), root = a * inverse;
  return fma(fma(-root, root, a), 0.5f * inverse, root);
}

// An integer, as a float and in the low bits of another one's mantissa: adding 1.5 * 2^23 rounds to an integer and
// leaves it there, where a conversion would take a slower unit. For |a| < 2^22, which is all the callers have.
struct Integral {
  float value, shifted;
};
constexpr float kShift = 0x1.8p23f;
FASTELBO_INLINE Integral round_product(float x, float factor) {
  float shifted = fma(x, factor, kShift);
  return {shifted - kShift, shifted};
}
FASTELBO_INLINE int32_t low_bits(Integral n) { return as_int(n.shifted); }
FASTELBO_INLINE float to_float(int32_t a) { return as_float(a + 0x4b400000) - kShift; }

constexpr float kExpLowest = -87.0f;  // exp is 0 below, where float32 is about to run out of normal numbers

// 2^(n - 1), which never overflows; 0 for n = -126. The shift drops what is above the exponent.
FASTELBO_INLINE float half_pow2(Integral n) {
  return as_float(int32_t(uint32_t(as_int(n.shifted)) << 23) + (126 << 23));
}
// (1 + x) 2^n.
FASTELBO_INLINE float times_pow2_from_1(float x, Integral n) {
  float half_power = half_pow2(n);
  return 2.0f * fma(x, half_power, half_power);
}

#include "../math/elementary.h"
#include "../math/philox.h"
#include "../math/scale.h"
#include "../math/gaussian_math.h"

}  // namespace fastelbo::device
