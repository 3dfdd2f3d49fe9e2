// What the KL divergences share: the optional prior, and the gradients of both Gaussians.
#pragma once

#include "host.cuh"

namespace fastelbo {

namespace device {

// Whether there is a prior: known to a packed kernel when it is compiled, to a strided one when it runs.
enum class Prior { absent, given, either };

template <Prior prior, class Operand>
FASTELBO_INLINE bool has_prior(const Operand& mean_p) {
  if constexpr (prior == Prior::either)
    return mean_p.data != nullptr;
  else
    return prior == Prior::given;
}

// Each thread decides for its own sigmas whether they need a logarithm.
template <class V, bool exponential>
FASTELBO_INLINE bool is_tame(const Spread<V, exponential>& q) {
  return q.std > V(kTameLowest) && q.std < V(kTameHighest);
}
template <class V, bool exponential>
FASTELBO_INLINE RatioTerms<V> ratio_terms(const Spread<V, exponential>& q) {
  return ratio_terms(q, is_tame(q));
}
template <class V, bool exponential, class Scale>
FASTELBO_INLINE RatioTerms<V> ratio_terms(const Scale& scale, const Scale& scale_p, bool same, V s_q,
                                          const Spread<V, exponential>& q, V s_p, const Spread<V, exponential>& p) {
  return ratio_terms(scale, scale_p, same, s_q, q, s_p, p, scale.kind, is_tame(q) && is_tame(p));
}

}  // namespace device

template <class Access, class F>
void with_prior(bool given, F&& f) {
  using device::Prior;
  if constexpr (!Access::packed)
    f(std::integral_constant<Prior, Prior::either>());
  else if (given)
    f(std::integral_constant<Prior, Prior::given>());
  else
    f(std::integral_constant<Prior, Prior::absent>());
}

// d_mean_q, d_s_q, d_mean_p, d_s_p, each of the full broadcast shape; the last two are empty without prior_grad.
struct GaussianGradients {
  Tensor d_mean_q, d_s_q, d_mean_p, d_s_p;
  View d_mean_q_view, d_s_q_view, d_mean_p_view, d_s_p_view;

  GaussianGradients(const Shape& shape, const Tensor& mean_q, const Tensor& s_q, const std::optional<Tensor>& mean_p,
                    const std::optional<Tensor>& s_p, ScalarType arithmetic, bool prior_grad)
      : d_mean_q(allocate_gradient(shape, mean_q, arithmetic, Device(mean_q))),
        d_s_q(allocate_gradient(shape, s_q, arithmetic, Device(mean_q))),
        d_mean_p(allocate_gradient(shape, mean_p, arithmetic, Device(mean_q), prior_grad)),
        d_s_p(allocate_gradient(shape, s_p, arithmetic, Device(mean_q), prior_grad)),
        d_mean_q_view(d_mean_q, shape),
        d_s_q_view(d_s_q, shape) {
    if (!prior_grad) return;
    d_mean_p_view = View(d_mean_p, shape);
    d_s_p_view = View(d_s_p, shape);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {d_mean_q, d_s_q, d_mean_p, d_s_p}; }
};

}  // namespace fastelbo
