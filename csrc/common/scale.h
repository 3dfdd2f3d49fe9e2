// From a network's raw output s to a standard deviation, and back for the gradient (fastelbo.Scale holds the formulas).
// Templates over the value type V; see common/philox.h for how these files are included.

// What a Scale says of a raw value: the standard deviation, its logarithm, and their slopes. What a caller does not
// use, the compiler does not compute. `exponential` is Scale::exponential() at compile time.
template <class V, bool exponential>
struct Spread {
  V std;  // sigma
  V log_std;  // ln sigma
  V inv_std;  // 1 / sigma where exponential, kept finite: a difference of 0 stays 0
  V d_std;  // d sigma / d s
  V d_logvar;  // d ln sigma^2 / d s

  // x / sigma, finite wherever the quotient is.
  FASTELBO_INLINE V divide(V x) const {
    if constexpr (exponential)
      return x * inv_std;
    else
      return x / std;
  }
};

// The raw value limited by clamp and soft_clamp; NaN stays NaN. *slope is d t / d s inside the clamp.
template <class V, class Scale>
FASTELBO_INLINE V limit(const Scale& scale, V s, V* slope) {
  V t = s;
  if (scale.clamped) t = min(V(scale.clamp_hi), max(V(scale.clamp_lo), s));
  *slope = V(1);
  if (scale.soft_clamp > 0) {
    V ratio = tanh(t * V(scale.inv_soft_clamp));
    t = V(scale.soft_clamp) * ratio;
    *slope = fma(-ratio, ratio, V(1));
  }
  return t;
}

// `kind` is scale.kind; a caller that knows it at compile time gets the code of that kind alone.
template <bool exponential, class V, class Scale>
FASTELBO_INLINE Spread<V, exponential> spread(const Scale& scale, V s, typename Scale::Kind kind) {
  Spread<V, exponential> out;
  V slope, t = limit(scale, s, &slope);
  if constexpr (exponential) {
    V c(kind == Scale::logvar ? 0.5f : 1.0f);
    out.log_std = c * t;
    out.std = exp(out.log_std);
    constexpr float largest = std::is_same_v<V, double> ? 709.0f : 88.0f;  // exponents beyond would overflow
    out.inv_std = exp(min(V(largest), -out.log_std));
    out.d_logvar = V(2) * c * slope;
    out.d_std = out.std * c * slope;
    return out;
  } else {
    V base, d_base, x;  // the kind's own sigma, its slope; what its logarithm is taken of
    switch (kind) {
      case Scale::logvar:
      case Scale::log_std: {
        V c(kind == Scale::logvar ? 0.5f : 1.0f);
        x = c * t;
        base = exp(x);
        d_base = c * base;
        break;
      }
      case Scale::std:
        x = base = t;
        d_base = V(1);
        break;
      case Scale::var:
        x = t;
        base = sqrt(t);
        d_base = V(0.5f) / base;
        break;
      default: {  // softplus(t; beta) = max(t, 0) + log1p(exp(-|beta t|)) / beta
        x = V(scale.beta) * t;
        V tail = exp(-abs(x));
        base = (max(x, V(0)) + log1p(tail)) * V(scale.inv_beta);
        d_base = select(x < V(0), tail, V(1)) / (V(1) + tail);
      }
    }
    if (scale.min_std > 0 || scale.var_eps > 0) {
      V shifted = base + V(scale.min_std);
      out.std = scale.var_eps > 0 ? sqrt(fma(shifted, shifted, V(scale.var_eps))) : shifted;
      out.log_std = log(out.std);
      if (scale.var_eps > 0) d_base = d_base * (shifted / out.std);
    } else {
      out.std = base;
      switch (kind) {
        case Scale::logvar:
        case Scale::log_std: out.log_std = x; break;
        case Scale::std: out.log_std = log(x); break;
        case Scale::var: out.log_std = V(0.5f) * log(x); break;
        // Far below zero softplus(x) is exp(x), and its logarithm is x long after exp(x) has become 0.
        default: out.log_std = select(x < V(-17), x - V(scale.log_beta), log(base));
      }
    }
    out.d_std = d_base * slope;
    out.d_logvar = V(2) * out.d_std / out.std;
    if (kind == Scale::softplus && scale.min_std == 0 && scale.var_eps == 0)
      out.d_logvar = select(V(scale.beta) * t < V(-17), V(2 * scale.beta) * slope, out.d_logvar);
    return out;
  }
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

// Of two standard deviations within these bounds log_ratio needs no logarithm.
constexpr float kTameLowest = 0x1p-60f, kTameHighest = 0x1p60f;

// ln(sigma_q / sigma_p) by one logarithm of the ratio, near 1 of the exact difference relative to sigma_p.
template <class V, bool exponential>
FASTELBO_INLINE V log_ratio(const Spread<V, exponential>& q, const Spread<V, exponential>& p) {
  V apart = q.log_std - p.log_std;
  if constexpr (exponential) {
    return apart;
  } else {
    V ratio = q.std / p.std, relative = (q.std - p.std) / p.std;
    auto near = abs(relative) < V(0.5f);
    V u = select(near, V(1) + relative, ratio);
    V h = log_normalised(u) + select(near, (relative - (u - V(1))) / u, V(0));
    // what is left is a ratio that overflows or loses bits, and what is no positive number
    h = select(ratio > V(0x1p-121f), select(ratio < V(0x1p121f), h, apart), apart);
    return select(p.std > V(0), h, apart);
  }
}
