// The noise (docs/noise.md), one Philox block a thread.
#pragma once

#include "tile.cuh"

namespace fastelbo::device {

// By the processor's approximate functions, which are off by up to 3e-6: the rounding of a half-precision sample hides
// it.
FASTELBO_INLINE void box_muller_approximate(uint32_t word0, uint32_t word1, float& n0, float& n1) {
  // -2 ln u; lg2.approx is off by 2^-22 near 1, where it may come out positive
  float r = sqrt_approx(fmaxf(0.0f, -1.3862943611198906f * log2_approx(uniform(float(word0)))));
  // The signed word is an angle in [-pi, pi), where sin.approx and cos.approx are most accurate.
  float angle = fma(float(int32_t(word1)), 6.2831853071795865f * 0x1p-32f, 6.2831853071795865f * 0x1p-33f);
  n0 = r * cos_approx(angle);
  n1 = r * sin_approx(angle);
}

// The four normals of a block.
template <bool approximate>
FASTELBO_INLINE void normals(const PhiloxKeys<uint32_t>& keys, uint32_t sample, uint64_t block, float* out) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = sample, c3 = 0;
  philox4x32_10<1>(&c0, &c1, &c2, &c3, keys);
  if constexpr (approximate) {
    box_muller_approximate(c0, c1, out[0], out[1]);
    box_muller_approximate(c2, c3, out[2], out[3]);
  } else {
    box_muller(uniform(float(c0)), uniform(float(c1)), out[0], out[1]);
    box_muller(uniform(float(c2)), uniform(float(c3)), out[2], out[3]);
  }
}

// Where the samples' noise comes from: a given tensor, or the Philox stream of a seed.
template <class Access>
struct Draw {
  using V = typename Access::Value;

  const int64_t* seed;  // [1], on the device: read there, so that nothing waits for it; null where the host knows
  uint64_t seed_value;  // it
  typename Access::Operand given;  // [K, rows, columns]
  uint32_t samples;     // K, at least 1
  V temperature;
  bool approximate;     // the sample is stored in half precision; forward and backward agree on it
  bool is_given;        // one instruction less than to look at the pointer

  FASTELBO_INLINE PhiloxKeys<uint32_t> keys() const {
    return PhiloxKeys<uint32_t>(seed ? uint64_t(*seed) : seed_value);
  }

  FASTELBO_INLINE void read(const PhiloxKeys<uint32_t>& keys, const Layout& layout, const typename Access::Place& place,
                            int64_t sample, V (&noise)[Access::width]) const {
    if (is_given) return Access::load(given, layout, place, noise, sample);
    FASTELBO_UNROLL
    for (int i = 0; i < Access::width; i += 4) {
      float drawn[4];
      if (Access::approximate(approximate))
        normals<true>(keys, uint32_t(sample), Access::block(layout, place, i / 4), drawn);
      else
        normals<false>(keys, uint32_t(sample), Access::block(layout, place, i / 4), drawn);
      FASTELBO_UNROLL
      for (int j = 0; j < 4; ++j) noise[i + j] = V(drawn[j]);
    }
  }
};

}  // namespace fastelbo::device
