// Elementary functions over F32, to about 1 ulp, and the same names over double. Polynomials are minimax fits on the
// reduced range. The includer supplies F32, I32, Mask, Integral and their operations (cpu/vec.h, cuda/vec.cuh), and
// includes this file inside its own namespace.

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // high has 9 bits: n * high is exact

constexpr float kExpHighest = 89.0f;

// x = n ln2 + r, |r| <= ln2 / 2: returns n; `rest` is exp(r) - 1 - r.
FASTELBO_INLINE Integral exp_reduce(F32 x, F32& r, F32& rest) {
  x = max(F32(kExpLowest), min(F32(kExpHighest), x));  // beyond, exp is 0 or inf all the same; NaN passes through both
  Integral n = round_product(x, kLog2e);
  r = fma(n.value, F32(-kLn2High), x);
  r = fma(n.value, F32(-kLn2Low), r);
  F32 q = fma(r, F32(0.001392692677f), F32(0.008363774046f));
  q = fma(q, r, F32(0.0416665487f));
  q = fma(q, r, F32(0.1666657329f));
  q = fma(q, r, F32(0.5f));
  rest = r * r * q;
  return n;
}

FASTELBO_INLINE F32 exp(F32 x) {
  F32 r, rest;
  Integral n = exp_reduce(x, r, rest);
  return times_pow2_from_1(r + rest, n);
}

// With e = exp(x) - 1: half_e = e / 2, which cannot overflow before x leaves what exp_reduce takes, and e_minus_x = e -
// x without cancellation near 0; shares its reduction with exp(x).
FASTELBO_INLINE void expm1_parts(F32 x, F32& half_e, F32& e_minus_x) {
  F32 r, rest;
  F32 half_power = half_pow2(exp_reduce(x, r, rest));
  half_e = fma(r + rest, half_power, half_power - F32(0.5f));
  e_minus_x = select(abs(x) < F32(0.34f), rest,
                     fma(F32(2.0f), half_e, -min(F32(kExpHighest), x)));  // infinity must not meet infinity
}

FASTELBO_INLINE F32 expm1(F32 x) {
  F32 half_e, e_minus_x;
  expm1_parts(x, half_e, e_minus_x);
  return half_e + half_e;
}

// Of a positive normal finite x = (1 + f) 2^e, 1 + f in [1/sqrt2, sqrt2).
struct LogParts {
  I32 exponent;
  F32 e, f;

  FASTELBO_INLINE explicit LogParts(F32 x) {
    I32 shifted = as_int(x) + (0x3f800000 - 0x3f3504f3);
    exponent = (shifted >> 23) + -127;
    e = to_float(exponent);
    f = as_float((shifted & 0x007fffff) + 0x3f3504f3) - F32(1.0f);
  }
  // 2^-e.
  FASTELBO_INLINE F32 inverse_power() const { return as_float(as_int(F32(1.0f)) - (exponent << 23)); }
  // ln x = e kLn2High + f + this.
  FASTELBO_INLINE F32 tail() const {
    F32 q = fma(f, F32(0.06971611828f), F32(-0.1147973388f));
    q = fma(q, f, F32(0.1168541983f));
    q = fma(q, f, F32(-0.1242568716f));
    q = fma(q, f, F32(0.1424905807f));
    q = fma(q, f, F32(-0.1666780263f));
    q = fma(q, f, F32(0.2000071555f));
    q = fma(q, f, F32(-0.2499999702f));
    q = fma(q, f, F32(0.3333333135f));
    F32 square = f * f;
    return fma(F32(-0.5f), square, fma(q * f, square, e * F32(kLn2Low)));
  }
};

// ln of a positive normal finite number.
FASTELBO_INLINE F32 log_normalised(F32 x) {
  LogParts parts(x);
  return fma(parts.e, F32(kLn2High), parts.f + parts.tail());
}

FASTELBO_INLINE F32 log(F32 x) {
  const F32 zero(0.0f), infinity(__builtin_inff());
  Mask subnormal = x < F32(0x1p-126f);
  F32 y = log_normalised(select(subnormal, x * F32(0x1p23f), x));
  y = select(subnormal, y - F32(23 * 0.69314718055994531f), y);
  F32 special = select(x < zero, F32(__builtin_nanf("")), x - infinity);  // -inf at 0, NaN at NaN
  return select(x > zero, select(x < infinity, y, x), special);
}

// For x > -1.
FASTELBO_INLINE F32 log1p(F32 x) {
  F32 u = F32(1.0f) + x;
  return log_normalised(u) + (x - (u - F32(1.0f))) / u;
}

// The same for -1/2 <= x <= 1, where what rounding takes from 1 + x is so little that 1 / u may be 2 - u.
FASTELBO_INLINE F32 log1p_near(F32 x) {
  F32 u = F32(1.0f) + x;
  return log_normalised(u) + (x - (u - F32(1.0f))) * (F32(2.0f) - u);
}

// x - ln(1 + x) without cancellation near 0, u = 1 + x. Near, x says more than u, else u.
FASTELBO_INLINE F32 x_minus_log1p(F32 x, F32 u, Mask near) {
  LogParts parts(u);
  parts.f = select(near, fma(parts.inverse_power(), x, parts.inverse_power() - F32(1.0f)), parts.f);
  return fma(parts.e, F32(-kLn2High), x - parts.f) - parts.tail();
}

FASTELBO_INLINE F32 tanh(F32 x) {
  F32 t = expm1(F32(-2.0f) * abs(x));  // in [-1, 0]
  return flip_sign(-t / (t + F32(2.0f)), as_int(x) & int32_t(0x80000000));
}

// For |x| <= 1/2.
FASTELBO_INLINE F32 tanh_near(F32 x) {
  F32 t = x * x;
  F32 q = fma(t, F32(0.01725699f), F32(-0.05305295f));
  q = fma(q, t, F32(0.13325988f));
  q = fma(q, t, F32(-0.3333315f));
  return fma(x * t, q, x);
}

// sin(2 pi u) and cos(2 pi u) for u in [0, 1]; u is reduced exactly.
FASTELBO_INLINE void sincos_2pi(F32 u, F32& sine, F32& cosine) {
  Integral quarters = round_product(u, 4.0f);
  F32 f = fma(quarters.value, F32(-0.25f), u);  // |f| <= 1/8
  F32 t = f * f;
  F32 s = fma(t, F32(-75.40148163f), F32(81.59253693f));
  s = fma(s, t, F32(-41.34166336f));
  s = fma(s, t, F32(6.283185482f)) * f;
  F32 c = fma(t, F32(59.42402267f), F32(-85.44882202f));
  c = fma(c, t, F32(64.9393692f));
  c = fma(c, t, F32(-19.73920822f));
  c = fma(c, t, F32(1.0f));
  I32 quadrant = low_bits(quarters);
  Mask odd = nonzero(quadrant & 1);
  // sine is negative in quadrants 2 and 3, cosine in 1 and 2
  sine = flip_sign(select(odd, c, s), (quadrant & 2) << 30);
  cosine = flip_sign(select(odd, s, c), ((quadrant + 1) & 2) << 30);
}

FASTELBO_INLINE double min(double a, double b) { return a < b ? a : b; }
FASTELBO_INLINE double max(double a, double b) { return a > b ? a : b; }
FASTELBO_INLINE double select(bool m, double a, double b) { return m ? a : b; }
FASTELBO_INLINE double abs(double a) { return std::fabs(a); }
FASTELBO_INLINE double sqrt(double a) { return std::sqrt(a); }
FASTELBO_INLINE double exp(double a) { return std::exp(a); }
FASTELBO_INLINE double expm1(double a) { return std::expm1(a); }
FASTELBO_INLINE double log(double a) { return std::log(a); }
FASTELBO_INLINE double log_normalised(double a) { return std::log(a); }
FASTELBO_INLINE double log1p(double a) { return std::log1p(a); }
FASTELBO_INLINE double log1p_near(double a) { return std::log1p(a); }
FASTELBO_INLINE double tanh(double a) { return std::tanh(a); }
FASTELBO_INLINE double tanh_near(double a) { return std::tanh(a); }
FASTELBO_INLINE void expm1_parts(double x, double& half_e, double& e_minus_x) {
  double e = std::expm1(x);
  half_e = 0.5 * e;
  e_minus_x = e - (x < 1e300 ? x : 1e300);  // infinity must not meet infinity
  if (std::fabs(x) < 0.34) {
    double series = 1;
    for (int k = 15; k >= 3; --k) series = 1 + series * x / k;
    e_minus_x = 0.5 * x * x * series;
  }
}
FASTELBO_INLINE double x_minus_log1p(double x, double u, bool near) {
  if (!near) return x - std::log(u);
  double half_e, e_minus_h;
  expm1_parts(std::log1p(x), half_e, e_minus_h);
  return e_minus_h;
}
