// From a network's raw output s to a standard deviation, and back for the gradient (fastelbo.Scale holds the formulas).
// Templates over the value type V; see math/philox.h for how these files are included.

// The least normal number.
template <class V>
constexpr float kSmallest = 0x1p-126f;
template <>
constexpr double kSmallest<double> = 0x1p-1022;

// 1 / sigma of a ln sigma, in two factors, each of them kept finite: a difference of 0 stays 0 however small sigma is.
template <class V>
struct Inverse {
  V exponential, lift;

  Inverse() = default;
  FASTELBO_INLINE explicit Inverse(V log_std) {
    constexpr bool wide = std::is_same_v<V, double>;
    V limit(wide ? 709.0f : 88.0f), exponent = -log_std;
    auto beyond = exponent > limit;
    lift = V(1);
    if (may_be_any(beyond)) {
      exponent = select(beyond, exponent - limit, exponent);
      lift = select(beyond, V(wide ? 8.218407461554972e307 : 1.6516362549940018e38), V(1));
    }
    exponential = exp(min(limit, exponent));
  }
  FASTELBO_INLINE V times(V x) const { return x * exponential * lift; }
};

// What a Scale says of a raw value: the standard deviation, its logarithm, and their slopes. What a caller does not
// use, the compiler does not compute. `is_exponential` is Scale::exponential() at compile time.
template <class V, bool is_exponential>
struct Spread {
  V std;  // sigma
  V log_std;  // ln sigma
  V d_std;  // d sigma / d s
  V d_logvar;  // d ln sigma^2 / d s
  V own, own_slope;  // the kind's own sigma, before min_std and var_eps, and its slope
  V rest;  // (1 - |tanh(t / c)|) / 2 under a soft clamp c
  V excess;  // sigma - 1, without cancellation
  bool by_log = false;  // log_std says more than sigma where that runs out of normal numbers
  static constexpr bool exponential = is_exponential;

  // x / sigma, finite wherever the quotient is.
  FASTELBO_INLINE V divide(V x) const {
    if constexpr (is_exponential) return Inverse<V>(log_std).times(x);
    if (!by_log) return x / std;
    return select(std < V(4 * kSmallest<V>), Inverse<V>(log_std).times(x), x / std);
  }
};

template <class V, class Scale>
FASTELBO_INLINE V clamped(const Scale& scale, V s) {
  return scale.clamped ? min(V(scale.clamp_hi), max(V(scale.clamp_lo), s)) : s;  // NaN stays NaN
}

// c tanh(t / c) of a clamped raw value for a soft clamp c, its derivative, and *rest = (1 - |tanh(t / c)|) / 2, which
// has digits where tanh has none left.
template <class V, class Scale>
FASTELBO_INLINE V softened(const Scale& scale, V t, V* slope, V* rest) {
  *slope = V(1), *rest = V(0);
  if (!(scale.soft_clamp > 0)) return t;
  V x = t * V(scale.inv_soft_clamp), exponent = V(-2) * abs(x), tail = exp(exponent), inverse = V(1) / (V(1) + tail);
  V size = V(-scale.soft_clamp) * expm1(exponent) * inverse;
  *rest = tail * inverse;
  *slope = V(4) * *rest * inverse;
  return select(x < V(0), -size, size);
}

// Where softplus(x) is exp(x), to the last digit of its logarithm.
template <class V>
FASTELBO_INLINE auto in_tail(V x) {
  return x < V(std::is_same_v<V, double> ? -37.0f : -17.0f);
}

// Of a limited raw value the kind's own sigma, before min_std and var_eps, and its slope.
template <class V, class Scale>
FASTELBO_INLINE V own_std(const Scale& scale, V t, typename Scale::Kind kind, V* slope) {
  switch (kind) {
    case Scale::logvar:
    case Scale::log_std: {
      V c(kind == Scale::logvar ? 0.5f : 1.0f), own = exp(c * t);
      *slope = c * own;
      return own;
    }
    case Scale::std: *slope = V(1); return t;
    case Scale::var: {
      V own = sqrt(t);
      *slope = V(0.5f) / own;
      return own;
    }
    default: {  // softplus(t; beta) = max(t, 0) + log1p(exp(-|beta t|)) / beta
      V x = V(scale.beta) * t, tail = exp(-abs(x));
      *slope = select(x < V(0), tail, V(1)) / (V(1) + tail);
      return (max(x, V(0)) + log1p_near(tail)) * V(scale.inv_beta);
    }
  }
}

// tanh(a) - tanh(b), apart = a - b: also where both are near 1 or -1, and where they are close. Of a and b the signs
// count, and rest = (1 - |tanh|) / 2: close, it is tanh(a - b) (1 - tanh(a) tanh(b)).
template <class V>
FASTELBO_INLINE V tanh_difference(V a, V rest_a, V b, V rest_b, V apart) {
  V most_a = V(1) - rest_a, most_b = V(1) - rest_b, gap = abs(apart);
  auto across = a * b < V(0);
  V near = tanh_near(min(gap, V(0.5f))) *
           fma(rest_a, select(across, rest_b, most_b), most_a * select(across, most_b, rest_b));
  V far = select(across, most_a - rest_b, abs(rest_b - rest_a)), half = select(gap < V(0.5f), near, far);
  return select(apart < V(0), V(-2), V(2)) * half;
}

// The kind's own sigma of q less that of p + low, clamped raw values of which that is known, without cancellation.
template <class V, class Scale>
FASTELBO_INLINE V difference(const Scale& scale, V q, V rest_q, V own_q, V p, V low, V rest_p, V own_p, V slope_p,
                             typename Scale::Kind kind) {
  V apart = q - p - low;
  if (scale.soft_clamp > 0)
    apart = V(scale.soft_clamp) * tanh_difference(q, rest_q, p, rest_p, apart * V(scale.inv_soft_clamp));
  switch (kind) {
    case Scale::logvar:
    case Scale::log_std: return own_p * expm1(V(kind == Scale::logvar ? 0.5f : 1.0f) * apart);
    case Scale::std: return apart;
    case Scale::var: return apart / (own_q + own_p);
    default: {
      // softplus(x + u) - softplus(x) = log1p(p expm1(u)) = u + log1p((1 - p) expm1(-u)), p the slope at x; 1 - p has
      // lost its digits where p is near 1, and has little weight there
      V u = V(scale.beta) * apart;
      auto left = slope_p < V(0.5f);
      V grown = log1p_near(min(slope_p, V(1) - slope_p) * expm1(min(V(60), select(left, u, -u))));
      return (grown + select(left, V(0), u)) * V(scale.inv_beta);
    }
  }
}

// Of a raw value, limited but not softened, softplus's own sigma less that of the unit, its slope, and that sigma: by
// one logarithm, near the unit of softplus(x + u) - softplus(x), elsewhere of softplus itself.
template <class V, class Scale>
FASTELBO_INLINE V softplus_beyond_unit(const Scale& scale, V t, V* own, V* slope) {
  V beta(scale.beta), inv_beta(scale.inv_beta), there(scale.beta * scale.unit_own), slope_there(scale.unit_slope);
  V x = beta * t, u = beta * (t - V(scale.unit) - V(scale.unit_low));
  auto near = abs(u) < V(0.6875f), below = x < V(0);
  V exponent = select(near, u, -abs(x)), power = exp(exponent);
  V grown = select(near, slope_there * expm1(exponent), power), logarithm = log1p_near(grown);
  *slope = select(near, slope_there * power, select(below, power, V(1))) / (V(1) + grown);
  *own = (select(near, there, max(x, V(0))) + logarithm) * inv_beta;
  V step = select(below, -there, u + V(scale.unit_log_slope));
  return (select(near, V(0), step) + logarithm) * inv_beta;
}

// Whether a spread's excess is wanted, that of q against the standard normal: beside a sigma that has the bits of all
// other spreads, as one that is sampled from, or together with sigma.
enum class Excess { none, beside, together };

// `kind` is scale.kind; a caller that knows it at compile time gets the code of that kind alone.
template <bool exponential, Excess excess, class V, class Scale>
FASTELBO_INLINE Spread<V, exponential> spread(const Scale& scale, V s, typename Scale::Kind kind) {
  Spread<V, exponential> out;
  V raw = clamped(scale, s);
  if constexpr (exponential) {
    V c(kind == Scale::logvar ? 0.5f : 1.0f);
    out.log_std = c * raw;
    out.std = exp(out.log_std);
    out.d_logvar = V(2) * c;
    out.d_std = out.std * c;
  } else {
    const bool shifted = scale.min_std > 0 || scale.var_eps > 0, log_kind = kind <= Scale::log_std && !shifted;
    const bool has_unit = excess != Excess::none && scale.unit < decltype(scale.unit)(__builtin_inff());
    const bool together = has_unit && excess == Excess::together && kind == Scale::softplus && !(scale.soft_clamp > 0);
    V slope, t = softened(scale, raw, &slope, &out.rest), own;
    if (together)
      out.excess = softplus_beyond_unit(scale, t, &own, &out.own_slope);
    else
      own = own_std(scale, t, kind, &out.own_slope);
    V d_own = out.own_slope;
    out.std = out.own = own;
    if (shifted) {
      V above = own + V(scale.min_std);
      out.std = scale.var_eps > 0 ? sqrt(fma(above, above, V(scale.var_eps))) : above;
      if (scale.var_eps > 0) d_own = d_own * (above / out.std);
    }
    out.d_std = d_own * slope;
    out.d_logvar = V(2) * out.d_std / out.std;
    if (log_kind) {
      V c(kind == Scale::logvar ? 0.5f : 1.0f);
      out.log_std = c * t;
      out.excess = expm1(out.log_std);
      out.d_logvar = V(2) * c * slope;
      out.by_log = true;
    } else {
      const bool plain_var = kind == Scale::var && !shifted;
      out.log_std = plain_var ? V(0.5f) * log(t) : log(out.std);
      if (!has_unit) {
        out.excess = plain_var ? (t - V(1)) / (out.std + V(1)) : out.std - V(1);
      } else {
        if (!together) {
          V unit(scale.unit), tail = exp(V(-2) * abs(unit * V(scale.inv_soft_clamp)));
          out.excess = difference(scale, raw, out.rest, own, unit, V(scale.unit_low), tail / (V(1) + tail),
                                  V(scale.unit_own), V(scale.unit_slope), kind);
        }
        if (scale.var_eps > 0)
          out.excess = out.excess * (own + V(scale.min_std) + sqrt(V(1 - scale.var_eps))) / (V(1) + out.std);
      }
    }
    if (kind == Scale::softplus && !shifted) {
      // Far below zero softplus(x) is exp(x), and its logarithm is x long after exp(x) has become 0.
      V x = V(scale.beta) * t;
      out.log_std = select(in_tail(x), x - V(scale.log_beta), out.log_std);
      out.d_logvar = select(in_tail(x), V(2 * scale.beta) * slope, out.d_logvar);
      out.by_log = true;
    }
  }
  return out;
}
template <bool exponential, Excess excess = Excess::none, class V, class Scale>
FASTELBO_INLINE Spread<V, exponential> spread(const Scale& scale, V s) {
  return spread<exponential, excess>(scale, s, scale.kind);
}

// The gradient that reaches the raw value s when the limited value is owed `grad`.
template <class V, class Scale>
FASTELBO_INLINE V clamp_gradient(const Scale& scale, V s, V grad) {
  if (!scale.clamped || scale.clamp_grad == Scale::straight_through) return grad;
  auto below = s<V(scale.clamp_lo), above = s> V(scale.clamp_hi);
  if (scale.clamp_grad == Scale::inward) {  // a descent step moves s against the gradient
    V passed_below = select(grad < V(0), grad, V(0)), passed_above = select(grad > V(0), grad, V(0));
    return select(below, passed_below, select(above, passed_above, grad));
  }
  return select(below, V(0), select(above, V(0), grad));
}
