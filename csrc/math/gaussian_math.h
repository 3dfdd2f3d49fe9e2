// KL divergence and log-density of diagonal Gaussians, element by element, and their gradients. Derivations stand in
// fastelbo/reference/. Templates over the value type V; see math/philox.h for how these files are included.

// What the ratio of two standard deviations costs in KL: (ratio^2 - 1) / 2 - ln(ratio) >= 0, from e = ratio - 1 as
// e^2 / 2 + (e - ln(1 + e)), neither of which overflows before its own value does nor loses digits near 0.
template <class V>
struct RatioTerms {
  V e, gap;

  RatioTerms() = default;
  // Of the ratio exp(h).
  FASTELBO_INLINE explicit RatioTerms(V h) {
    V half_e, e_minus_h;
    expm1_parts(h, half_e, e_minus_h);
    e = half_e + half_e;
    gap = fma(half_e, e, e_minus_h);
  }
  // Of the ratio q / p, a normal number, apart = q - p.
  FASTELBO_INLINE RatioTerms(V apart, V q, V p) {
    auto near = abs(apart) < V(0.5f) * p;
    V quotient = select(near, apart, q) / p, ratio = select(near, V(1) + quotient, quotient);
    e = select(near, quotient, quotient - V(1));
    gap = fma(V(0.5f) * e, e, x_minus_log1p(e, ratio, near));
  }
  // (ratio^2 - 1) / 2 times a slope, which may be as small as that is large: then neither overflows.
  template <bool exponential>
  FASTELBO_INLINE V times(V slope) const {
    return exponential ? fma(V(0.5f) * e, e, e) * slope : V(0.5f) * slope * e * (V(2) + e);
  }
};

// These where the ratio of standard deviations is a normal number, else those by its logarithm.
template <class V>
FASTELBO_INLINE RatioTerms<V> unless_wild(const RatioTerms<V>& terms, V q, V p, V log_ratio) {
  RatioTerms<V> by_log(log_ratio);
  V ratio = q / p;
  auto chosen = [&](V x, V otherwise) {
    x = select(ratio > V(0x1p-121f), select(ratio < V(0x1p121f), x, otherwise), otherwise);
    return select(p > V(4 * kSmallest<V>), x, otherwise);
  };
  by_log.e = chosen(terms.e, by_log.e);
  by_log.gap = chosen(terms.gap, by_log.gap);
  return by_log;
}

// Of a standard deviation within these bounds no logarithm is needed.
constexpr float kTameLowest = 0x1p-60f, kTameHighest = 0x1p60f;

// Of q and p by raw values and spreads. The difference of sigmas comes without cancellation where the scales are the
// same but for the clamp. `tame`: both sigmas are.
template <class V, bool exponential, class Scale>
FASTELBO_INLINE RatioTerms<V> ratio_terms(const Scale& scale, const Scale& scale_p, bool same, V s_q,
                                          const Spread<V, exponential>& q, V s_p, const Spread<V, exponential>& p,
                                          typename Scale::Kind kind, bool tame) {
  if constexpr (exponential) {
    return RatioTerms<V>(q.log_std - p.log_std);
  } else {
    V apart = q.std - p.std, t_q = s_q, t_p = s_p;
    if (same) {
      t_q = clamped(scale, s_q), t_p = clamped(scale_p, s_p);
      apart = difference(scale, t_q, q.rest, q.own, t_p, V(0), p.rest, p.own, p.own_slope, kind);
      if (scale.var_eps > 0) apart = apart * ((q.own + p.own + V(2 * scale.min_std)) / (q.std + p.std));
    }
    RatioTerms<V> terms(apart, q.std, p.std);
    if (tame) return terms;
    V log_ratio = q.log_std - p.log_std;
    if (same && kind == Scale::softplus && !(scale.min_std > 0 || scale.var_eps > 0 || scale.soft_clamp > 0))
      log_ratio = select(in_tail(max(t_q, t_p) * V(scale.beta)), (t_q - t_p) * V(scale.beta), log_ratio);
    return unless_wild(terms, q.std, p.std, log_ratio);
  }
}

// Of q and the standard normal.
template <class V, bool exponential>
FASTELBO_INLINE RatioTerms<V> ratio_terms(const Spread<V, exponential>& q, bool tame) {
  if constexpr (exponential) {
    return RatioTerms<V>(q.log_std);
  } else {
    RatioTerms<V> terms(q.excess, q.std, V(1));
    return tame ? terms : unless_wild(terms, q.std, V(1), q.log_std);
  }
}

template <class V>
struct GaussianKL {
  V value;
  V d_mean_q;  // d value / d mean_q = -d value / d mean_p
  V d_s_q, d_s_p;  // inside the clamps
};

// KL(N(mean_q, q.std^2) || N(mean_p, p.std^2)), delta = mean_q - mean_p.
template <class V, bool exponential>
FASTELBO_INLINE GaussianKL<V> gaussian_kl(V delta, const RatioTerms<V>& ratio, const Spread<V, exponential>& q,
                                          const Spread<V, exponential>& p) {
  V r = p.divide(delta), half_r = V(0.5f) * r;
  V d_s_p = ratio.template times<exponential>(p.d_logvar) + half_r * (r * p.d_logvar);
  return {fma(half_r, r, ratio.gap), p.divide(r), ratio.template times<exponential>(q.d_logvar), -d_s_p};
}

// The same against the standard normal, delta = mean_q.
template <class V, bool exponential>
FASTELBO_INLINE GaussianKL<V> gaussian_kl(V delta, const RatioTerms<V>& ratio, const Spread<V, exponential>& q) {
  return {fma(V(0.5f) * delta, delta, ratio.gap), delta, ratio.template times<exponential>(q.d_logvar), V(0)};
}

template <class V>
struct GaussianNLL {
  V value;
  V d_x;  // = -d_mean
  V d_s;  // inside the clamp
};

// r^2 / 2 + weight ln p.std + constant of r = delta / p.std: -ln N(x; mean, p.std^2) of delta = x - mean, where the
// weight is 1 and the constant ln(2 pi) / 2.
template <class V, class SpreadOf>
FASTELBO_INLINE GaussianNLL<V> gaussian_nll(V delta, const SpreadOf& p, V weight, V constant = V(0)) {
  V r = p.divide(delta), d_s;
  if constexpr (SpreadOf::exponential)
    d_s = V(0.5f) * fma(-r, r, weight) * p.d_logvar;
  else  // r^2 may overflow where that does not
    d_s = V(0.5f) * fma(-r, r * p.d_logvar, weight * p.d_logvar);
  return {fma(V(0.5f) * r, r, fma(weight, p.log_std, constant)), p.divide(r), d_s};
}
