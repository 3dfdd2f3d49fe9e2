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
    exponential = exp(min(limit, select(beyond, exponent - limit, exponent)));
    lift = select(beyond, V(wide ? 8.218407461554972e307 : 1.6516362549940018e38), V(1));
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
  V excess;  // sigma - 1, without cancellation
  bool by_log = false;  // log_std says more than sigma where that runs out of normal numbers

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

// c tanh(t / c) of a clamped raw value for a soft clamp c; *slope is its derivative.
template <class V, class Scale>
FASTELBO_INLINE V softened(const Scale& scale, V t, V* slope) {
  *slope = V(1);
  if (!(scale.soft_clamp > 0)) return t;
  V x = t * V(scale.inv_soft_clamp), tail = exp(V(-2) * abs(x));
  *slope = V(4) * tail / ((V(1) + tail) * (V(1) + tail));  // 1 - tanh^2 has no digits left where that is near 1
  return V(scale.soft_clamp) * tanh(x);
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

// tanh(a) - tanh(b), apart = a - b: also where both are near 1 or -1, and where they are close.
template <class V>
FASTELBO_INLINE V tanh_difference(V a, V b, V apart) {
  V tail_a = exp(V(-2) * abs(a)), tail_b = exp(V(-2) * abs(b));
  V nearer = select(a * b < V(0), V(1), max(tail_a, tail_b));  // through 0 the tails' product is exp(-2 |apart|)
  V size = V(-2) * nearer * expm1(V(-2) * abs(apart)) / ((V(1) + tail_a) * (V(1) + tail_b));
  return select(apart < V(0), -size, size);
}

// The kind's own sigma of q less that of p + low, clamped raw values of which that is known, without cancellation.
template <class V, class Scale>
FASTELBO_INLINE V difference(const Scale& scale, V q, V own_q, V p, V low, V own_p, V slope_p,
                             typename Scale::Kind kind) {
  V apart = q - p - low;
  if (scale.soft_clamp > 0) {
    V inverse(scale.inv_soft_clamp);
    apart = V(scale.soft_clamp) * tanh_difference(q * inverse, p * inverse, apart * inverse);
  }
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

// `kind` is scale.kind; a caller that knows it at compile time gets the code of that kind alone.
template <bool exponential, class V, class Scale>
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
    V slope, t = softened(scale, raw, &slope), own = own_std(scale, t, kind, &out.own_slope), d_own = out.own_slope;
    const bool shifted = scale.min_std > 0 || scale.var_eps > 0, log_kind = kind <= Scale::log_std && !shifted;
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
      out.excess = plain_var ? (t - V(1)) / (out.std + V(1)) : out.std - V(1);
      if (scale.unit < decltype(scale.unit)(__builtin_inff())) {
        out.excess =
            difference(scale, raw, own, V(scale.unit), V(scale.unit_low), V(scale.unit_own), V(scale.unit_slope), kind);
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
template <bool exponential, class V, class Scale>
FASTELBO_INLINE Spread<V, exponential> spread(const Scale& scale, V s) {
  return spread<exponential>(scale, s, scale.kind);
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
