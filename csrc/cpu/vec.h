// F32: a register of float32 lanes, 16 with AVX-512, 8 with AVX2, 4 elsewhere, and the few operations that the loops
// need of it, over the vector extensions of GCC and clang. Every instruction set applies the same operations to an
// element, so all that have fused multiply-add give the same bits.
// Included inside a namespace, once per instruction set (per_isa.h).

#if defined(FASTELBO_AVX512)
constexpr int kLanes = 16;
#elif defined(FASTELBO_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float NativeF __attribute__((vector_size(4 * kLanes)));
typedef int32_t NativeI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t NativeU __attribute__((vector_size(4 * kLanes)));
typedef uint64_t NativeW __attribute__((vector_size(4 * kLanes)));
typedef NativeF UnalignedF __attribute__((aligned(4), may_alias));

struct I32 {
  NativeI v;
};

struct F32 {
  NativeF v;

  F32() = default;
  FASTELBO_INLINE explicit F32(NativeF x) : v(x) {}
  FASTELBO_INLINE explicit F32(float x) : v(NativeF{} + x) {}
  FASTELBO_INLINE explicit F32(double x) : F32(float(x)) {}
  FASTELBO_INLINE explicit F32(int x) : F32(float(x)) {}
};

FASTELBO_INLINE F32 operator+(F32 a, F32 b) { return F32(a.v + b.v); }
FASTELBO_INLINE F32 operator-(F32 a, F32 b) { return F32(a.v - b.v); }
FASTELBO_INLINE F32 operator*(F32 a, F32 b) { return F32(a.v * b.v); }
FASTELBO_INLINE F32 operator/(F32 a, F32 b) { return F32(a.v / b.v); }
FASTELBO_INLINE F32 operator-(F32 a) { return F32(-a.v); }

// Unsigned, because what is made of a NaN's bits may overflow, before it is dropped.
FASTELBO_INLINE I32 operator-(I32 a, I32 b) { return {(NativeI)((NativeU)a.v - (NativeU)b.v)}; }
FASTELBO_INLINE I32 operator+(I32 a, int32_t b) { return {(NativeI)((NativeU)a.v + uint32_t(b))}; }
FASTELBO_INLINE I32 operator&(I32 a, int32_t b) { return {a.v & b}; }
FASTELBO_INLINE I32 operator<<(I32 a, int n) { return {(NativeI)((NativeU)a.v << n)}; }
FASTELBO_INLINE I32 operator>>(I32 a, int n) { return {a.v >> n}; }

FASTELBO_INLINE F32 as_float(I32 a) { return F32((NativeF)a.v); }
FASTELBO_INLINE I32 as_int(F32 a) { return {(NativeI)a.v}; }
FASTELBO_INLINE F32 to_float(I32 a) { return F32(__builtin_convertvector(a.v, NativeF)); }
FASTELBO_INLINE I32 to_int(F32 a) { return {__builtin_convertvector(a.v, NativeI)}; }
FASTELBO_INLINE F32 abs(F32 a) { return as_float(as_int(a) & 0x7fffffff); }
// The sign bits of s flip the sign of a.
FASTELBO_INLINE F32 flip_sign(F32 a, I32 s) { return F32((NativeF)((NativeI)a.v ^ s.v)); }

// min and max return their second argument where either is NaN.
#if defined(FASTELBO_AVX512)
struct Mask {
  __mmask16 v;
};
FASTELBO_INLINE Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, _CMP_LT_OQ)}; }
FASTELBO_INLINE Mask operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask((__m512)a.v, (__m512)b.v, _CMP_GT_OQ)}; }
FASTELBO_INLINE Mask nonzero(I32 a) { return {_mm512_test_epi32_mask((__m512i)a.v, (__m512i)a.v)}; }
FASTELBO_INLINE bool may_be_any(Mask m) { return m.v != 0; }
FASTELBO_INLINE F32 select(Mask m, F32 a, F32 b) {
  return F32((NativeF)_mm512_mask_blend_ps(m.v, (__m512)b.v, (__m512)a.v));
}
FASTELBO_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return F32((NativeF)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v));
}
FASTELBO_INLINE F32 min(F32 a, F32 b) { return F32((NativeF)_mm512_min_ps((__m512)a.v, (__m512)b.v)); }
FASTELBO_INLINE F32 max(F32 a, F32 b) { return F32((NativeF)_mm512_max_ps((__m512)a.v, (__m512)b.v)); }
FASTELBO_INLINE F32 sqrt(F32 a) { return F32((NativeF)_mm512_sqrt_ps((__m512)a.v)); }
FASTELBO_INLINE F32 round(F32 a) {
  return F32((NativeF)_mm512_roundscale_ps((__m512)a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
struct Mask {
  NativeI v;
};
FASTELBO_INLINE Mask operator<(F32 a, F32 b) { return {a.v < b.v}; }
FASTELBO_INLINE Mask operator>(F32 a, F32 b) { return {a.v > b.v}; }
FASTELBO_INLINE Mask nonzero(I32 a) { return {a.v != 0}; }
#if defined(FASTELBO_AVX2)
FASTELBO_INLINE bool may_be_any(Mask m) { return _mm256_movemask_ps((__m256)m.v) != 0; }
#else
FASTELBO_INLINE bool may_be_any(Mask) { return true; }
#endif
FASTELBO_INLINE F32 select(Mask m, F32 a, F32 b) { return F32(m.v ? a.v : b.v); }
#if defined(FASTELBO_AVX2)
FASTELBO_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return F32((NativeF)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v));
}
FASTELBO_INLINE F32 min(F32 a, F32 b) { return F32((NativeF)_mm256_min_ps((__m256)a.v, (__m256)b.v)); }
FASTELBO_INLINE F32 max(F32 a, F32 b) { return F32((NativeF)_mm256_max_ps((__m256)a.v, (__m256)b.v)); }
FASTELBO_INLINE F32 sqrt(F32 a) { return F32((NativeF)_mm256_sqrt_ps((__m256)a.v)); }
FASTELBO_INLINE F32 round(F32 a) {
  return F32((NativeF)_mm256_round_ps((__m256)a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
FASTELBO_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__FP_FAST_FMAF)
  F32 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
#else  // emulated, it would cost a library call a lane; two roundings stay within the error bounds
  return a * b + c;
#endif
}
FASTELBO_INLINE F32 min(F32 a, F32 b) { return F32(a.v < b.v ? a.v : b.v); }
FASTELBO_INLINE F32 max(F32 a, F32 b) { return F32(a.v > b.v ? a.v : b.v); }
FASTELBO_INLINE F32 sqrt(F32 a) {
  F32 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = __builtin_sqrtf(a.v[i]);
  return r;
}
// Adding 1.5 * 2^23 leaves no room for a fraction; for |a| < 2^22, which is all the callers have.
FASTELBO_INLINE F32 round(F32 a) { return (a + F32(0x1.8p23f)) - F32(0x1.8p23f); }
#endif
#endif

// An integer, as a float.
struct Integral {
  F32 value;
};
FASTELBO_INLINE Integral round_product(F32 x, float factor) { return {round(x * F32(factor))}; }
FASTELBO_INLINE I32 low_bits(Integral n) { return to_int(n.value); }

constexpr float kExpLowest = -104.0f;  // exp is 0 below

// 2^(n - 1), n limited to [-125, 128].
FASTELBO_INLINE F32 half_pow2(Integral n) {
  return as_float((to_int(min(F32(128.0f), max(F32(-125.0f), n.value))) + 126) << 23);
}

// (1 + x) 2^n, rounded once more where the result is subnormal.
FASTELBO_INLINE F32 times_pow2_from_1(F32 x, Integral n) {
  x = x + F32(1.0f);
#if defined(FASTELBO_AVX512)
  return F32((NativeF)_mm512_scalef_ps((__m512)x.v, (__m512)n.value.v));
#else
  I32 whole = low_bits(n), half = whole >> 1;  // two steps, because 2^n itself may overflow or be subnormal
  return x * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
#endif
}

FASTELBO_INLINE F32 sqrt_of_positive_part(F32 a) { return sqrt(max(F32(0.0f), a)); }

FASTELBO_INLINE double fma(double a, double b, double c) { return a * b + c; }
FASTELBO_INLINE bool may_be_any(bool mask) { return mask; }

struct Whole {};  // all lanes
struct Part {     // the first `count`; the others load as 0 and are not stored
  int count;
};
struct Within {  // as many as there are of `count`: one piece of code for both, with a branch
  int count;
};

FASTELBO_INLINE F32 load(const float* from, Whole) { return F32(*(const UnalignedF*)from); }
FASTELBO_INLINE void store(float* to, F32 a, Whole) { *(UnalignedF*)to = a.v; }
FASTELBO_INLINE F32 load(const float* from, Part part) {
  float lanes[kLanes] = {};
  for (int i = 0; i < part.count; ++i) lanes[i] = from[i];
  return load(lanes, Whole{});
}
FASTELBO_INLINE void store(float* to, F32 a, Part part) {
  float lanes[kLanes];
  store(lanes, a, Whole{});
  for (int i = 0; i < part.count; ++i) to[i] = lanes[i];
}
FASTELBO_INLINE F32 load(const float* from, Within left) {
  return left.count < kLanes ? load(from, Part{left.count}) : load(from, Whole{});
}

FASTELBO_INLINE double load(const double* from, Whole) { return *from; }
FASTELBO_INLINE void store(double* to, double a, Whole) { *to = a; }
FASTELBO_INLINE double load(const double* from, Part) { return *from; }
FASTELBO_INLINE double load(const double* from, Within) { return *from; }
FASTELBO_INLINE void store(double* to, double a, Part) { *to = a; }

// 64 bits a lane, half as many lanes: Philox words in the low halves, whatever the high halves hold.
struct Words {
  NativeW v;

  Words() = default;
  FASTELBO_INLINE explicit Words(NativeW x) : v(x) {}
  FASTELBO_INLINE explicit Words(uint32_t x) : v(NativeW{} + uint64_t(x)) {}
};

FASTELBO_INLINE Words operator^(Words a, Words b) { return Words(a.v ^ b.v); }
FASTELBO_INLINE void multiply_wide(Words a, uint32_t constant, Words& high, Words& low) {
#if defined(FASTELBO_AVX512)
  low.v = (NativeW)_mm512_mul_epu32((__m512i)a.v, _mm512_set1_epi64(constant));
#elif defined(FASTELBO_AVX2)
  low.v = (NativeW)_mm256_mul_epu32((__m256i)a.v, _mm256_set1_epi64x(constant));
#else
  low.v = (a.v & 0xffffffffull) * (uint64_t)constant;
#endif
  high.v = low.v >> 32;
}

// The words of the even lanes and of the odd lanes, interleaved and converted to float32, rounded to nearest.
FASTELBO_INLINE F32 words_to_float(Words even, Words odd) {
  NativeU words = (NativeU)((even.v & 0xffffffffull) | (odd.v << 32));
#if defined(FASTELBO_AVX512)
  return F32((NativeF)_mm512_cvtepu32_ps((__m512i)words));
#else  // both halves convert exactly, so the sum is the only rounding
  NativeF high = __builtin_convertvector((NativeI)(words >> 16), NativeF);
  NativeF low = __builtin_convertvector((NativeI)(words & 0xffffu), NativeF);
  return F32(high * 65536.0f + low);
#endif
}

// (a[j], b[j], c[j], d[j]) for every lane j, in the lane order of noise.h.
FASTELBO_INLINE void store_interleaved(float* to, F32 a, F32 b, F32 c, F32 d) {
#if defined(FASTELBO_AVX512)
  __m512 ab0 = _mm512_unpacklo_ps((__m512)a.v, (__m512)b.v), ab1 = _mm512_unpackhi_ps((__m512)a.v, (__m512)b.v);
  __m512 cd0 = _mm512_unpacklo_ps((__m512)c.v, (__m512)d.v), cd1 = _mm512_unpackhi_ps((__m512)c.v, (__m512)d.v);
  _mm512_storeu_pd((void*)(to + 0), _mm512_unpacklo_pd((__m512d)ab0, (__m512d)cd0));
  _mm512_storeu_pd((void*)(to + 16), _mm512_unpackhi_pd((__m512d)ab0, (__m512d)cd0));
  _mm512_storeu_pd((void*)(to + 32), _mm512_unpacklo_pd((__m512d)ab1, (__m512d)cd1));
  _mm512_storeu_pd((void*)(to + 48), _mm512_unpackhi_pd((__m512d)ab1, (__m512d)cd1));
#elif defined(FASTELBO_AVX2)
  __m256 ab0 = _mm256_unpacklo_ps((__m256)a.v, (__m256)b.v), ab1 = _mm256_unpackhi_ps((__m256)a.v, (__m256)b.v);
  __m256 cd0 = _mm256_unpacklo_ps((__m256)c.v, (__m256)d.v), cd1 = _mm256_unpackhi_ps((__m256)c.v, (__m256)d.v);
  _mm256_storeu_pd((double*)(to + 0), _mm256_unpacklo_pd((__m256d)ab0, (__m256d)cd0));
  _mm256_storeu_pd((double*)(to + 8), _mm256_unpackhi_pd((__m256d)ab0, (__m256d)cd0));
  _mm256_storeu_pd((double*)(to + 16), _mm256_unpacklo_pd((__m256d)ab1, (__m256d)cd1));
  _mm256_storeu_pd((double*)(to + 24), _mm256_unpackhi_pd((__m256d)ab1, (__m256d)cd1));
#else
  for (int i = 0; i < kLanes; ++i) {
    to[4 * i + 0] = a.v[i];
    to[4 * i + 1] = b.v[i];
    to[4 * i + 2] = c.v[i];
    to[4 * i + 3] = d.v[i];
  }
#endif
}
