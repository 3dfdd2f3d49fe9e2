// KL divergence and log-density of diagonal Gaussians, element by element, and their gradients. Derivations stand in
// fastelbo/reference/. Templates over the value type V; see common/philox.h for how these files are included.

// For the ratio exp(h) of two standard deviations, with e = exp(h) - 1: half the excess of their variances' ratio,
// (exp(2h) - 1) / 2 = e + e^2 / 2, and what that costs in KL, e + e^2 / 2 - h >= 0. Neither overflows before its own
// value does, and e - h comes without cancellation.
template <class V>
struct RatioTerms {
  V half_expm1, gap;

  FASTELBO_INLINE explicit RatioTerms(V h) {
    V half_e, e_minus_h;
    expm1_parts(h, half_e, e_minus_h);
    V e = half_e + half_e;
    half_expm1 = fma(half_e, e, e);
    gap = fma(half_e, e, e_minus_h);
  }
};

template <class V>
struct GaussianKL {
  V value;
  V d_mean_q;    // d value / d mean_q = -d value / d mean_p
  V d_logvar_q;  // d value / d ln sigma_q^2
  V d_logvar_p;
};

// KL(N(mean_q, q.std^2) || N(mean_p, p.std^2)), delta = mean_q - mean_p, h = ln(q.std / p.std).
template <class V, bool exponential>
FASTELBO_INLINE GaussianKL<V> gaussian_kl(V delta, V h, const Spread<V, exponential>& p) {
  RatioTerms<V> ratio(h);
  V r = p.divide(delta), half_square = V(0.5f) * r * r;
  return {ratio.gap + half_square, p.divide(r), ratio.half_expm1, -(ratio.half_expm1 + half_square)};
}

// The same against the standard normal, delta = mean_q.
template <class V, bool exponential>
FASTELBO_INLINE GaussianKL<V> gaussian_kl(V delta, const Spread<V, exponential>& q) {
  RatioTerms<V> ratio(q.log_std);
  return {fma(V(0.5f) * delta, delta, ratio.gap), delta, ratio.half_expm1, V(0)};
}

template <class V>
struct GaussianNLL {
  V value;
  V d_x;  // = -d_mean
  V d_logvar;
};

// -ln N(x; mean, p.std^2), delta = x - mean; constant: ln(2 pi) / 2, or 0 to leave that out.
template <class V, bool exponential>
FASTELBO_INLINE GaussianNLL<V> gaussian_nll(V delta, const Spread<V, exponential>& p, V constant = V(0)) {
  V r = p.divide(delta);
  return {fma(V(0.5f) * r, r, p.log_std + constant), p.divide(r), V(0.5f) * fma(-r, r, V(1))};
}
