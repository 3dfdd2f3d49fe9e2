// Both Gaussians of a KL divergence: what its ops' kernels read and write, and what they do alike.
#pragma once

#include "../common/gaussians.h"
#include "host.cuh"

namespace fastelbo {

namespace device {

template <class Access>
struct GaussianOperands {
  using V = typename Access::Value;
  using Operand = typename Access::Operand;
  Layout layout;
  Work work;
  typename Access::Scale scale, scale_p;
  bool same;                                 // the scales, but for the clamp
  Operand mean_q, s_q, mean_p, s_p;          // [rows, columns]; no mean_p: the standard normal
  Operand mask;                              // [rows, columns]; none: every element counts
  Operand kl;                                // [rows, columns], where elementwise
  Sums<V> sums;                              // where not
  Operand d_kl;                              // [rows, columns]
  Operand d_mean_q, d_s_q, d_mean_p, d_s_p;  // [rows, columns]; no d_mean_p: the prior needs no gradient
  Shares<V> share;                           // of d_kl
};

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

// The divergence of a group of elements, of which q is loaded: calls f(i, the spread of q, the divergence and its
// slopes, the raw value of p's sigma, 0 where there is none).
template <bool exponential, Prior prior, Excess excess, class Access, class F>
FASTELBO_INLINE void each_kl(const GaussianOperands<Access>& args, const typename Access::Place& place,
                             const typename Access::Value (&mean_q)[Access::width],
                             const typename Access::Value (&s_q)[Access::width], F&& f) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  if (!has_prior<prior>(args.mean_p)) {
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) {
      auto q = spread<exponential, excess>(args.scale, s_q[i]);
      f(i, q, gaussian_kl(mean_q[i], ratio_terms(q), q), V(0));
    }
  } else {
    V mean_p[n], s_p[n];
    Access::load(args.mean_p, args.layout, place, mean_p);
    Access::load(args.s_p, args.layout, place, s_p);
    FASTELBO_UNROLL
    for (int i = 0; i < n; ++i) {
      auto q = spread<exponential>(args.scale, s_q[i]), p = spread<exponential>(args.scale_p, s_p[i]);
      auto ratio = ratio_terms(args.scale, args.scale_p, args.same, s_q[i], q, s_p[i], p);
      f(i, q, gaussian_kl(mean_q[i] - mean_p[i], ratio, q, p), s_p[i]);
    }
  }
}

// Where a group's divergences go.
template <class Access>
FASTELBO_INLINE void store_kl(const GaussianOperands<Access>& args, const Thread<typename Access::Index>& thread,
                              const typename Access::Place& place, RowSums<Access>& sums,
                              typename Access::Value (&kl)[Access::width]) {
  if (args.kl.data)
    Access::store_term(args.kl, args.layout, place, kl);
  else
    sums.add(args.layout, thread, place, kl);
}

// The gradients of a group of elements: f(i, what reaches q of the divergence's, the spread of q, the divergence, the
// gradients by mean_q and by q's raw value inside its clamp, which it sets).
template <bool exponential, Prior prior, Excess excess, class Access, class F>
FASTELBO_INLINE void gradients(const GaussianOperands<Access>& args, const typename Access::Place& place, F&& f) {
  using V = typename Access::Value;
  constexpr int n = Access::width;
  V mean_q[n], s_q[n], upstream[n], d_mean_q[n], d_s_q[n], d_mean_p[n], d_s_p[n];
  Access::load(args.mean_q, args.layout, place, mean_q);
  Access::load(args.s_q, args.layout, place, s_q);
  Access::load_term(args.d_kl, args.layout, place, upstream);
  const uint32_t kept = Access::kept(args.mask, args.layout, place);
  each_kl<exponential, prior, excess>(args, place, mean_q, s_q, [&](int i, const auto& q, const auto& kl, V s_p) {
    const bool given = has_prior<prior>(args.mean_p);
    V d_s;
    f(i, given ? args.share.q * upstream[i] : upstream[i], q, kl, d_mean_q[i], d_s);
    d_s_q[i] = clamp_gradient(args.scale, s_q[i], d_s);
    if (!given) return;
    V to_p = args.share.p * upstream[i];
    d_mean_p[i] = -to_p * kl.d_mean_q;
    d_s_p[i] = clamp_gradient(args.scale_p, s_p, to_p * kl.d_s_p);
  });
  select(kept, d_mean_q);
  select(kept, d_s_q);
  Access::store(args.d_mean_q, args.layout, place, d_mean_q);
  Access::store(args.d_s_q, args.layout, place, d_s_q);
  if (!has_prior<prior>(args.mean_p) || !args.d_mean_p.data) return;
  select(kept, d_mean_p);
  select(kept, d_s_p);
  Access::store(args.d_mean_p, args.layout, place, d_mean_p);
  Access::store(args.d_s_p, args.layout, place, d_s_p);
}

}  // namespace device

// Calls f(device::Prior as a type).
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

// Both Gaussians, and the gradients of both where there are any, on their way to a kernel.
struct GaussianViews {
  const Gaussians& given;
  View mean_q, s_q, mean_p, s_p, mask;
  View d_kl, d_mean_q, d_s_q, d_mean_p, d_s_p;
  std::optional<double> balance;

  explicit GaussianViews(const Gaussians& given)
      : given(given),
        mean_q(given.mean_q, given.shape),
        s_q(given.s_q, given.shape),
        mean_p(given.mean_p, given.shape),
        s_p(given.s_p, given.shape),
        mask(given.mask, given.shape) {}
  GaussianViews(const Gaussians& given, const Tensor& d_kl, int64_t event_ndim, std::optional<double> balance,
                const GaussianGradients& grads)
      : GaussianViews(given) {
    this->d_kl = View::of_term(d_kl, given.shape, event_ndim);
    d_mean_q = View(grads.d_mean_q, given.shape);
    d_s_q = View(grads.d_s_q, given.shape);
    if (grads.prior) {
      d_mean_p = View(grads.d_mean_p, given.shape);
      d_s_p = View(grads.d_s_p, given.shape);
    }
    this->balance = balance;
  }

  // Args: GaussianOperands, or what has them as its base.
  template <class Access, class Args>
  void fill(Args& args, const Plan& plan) const {
    args.layout = plan.layout;
    args.work = plan.work;
    args.scale = typename Access::Scale(given.scale);
    args.scale_p = typename Access::Scale(given.scale_p);
    args.same = given.scale.same(given.scale_p);
    args.mean_q = operand<Access>(mean_q, plan);
    args.s_q = operand<Access>(s_q, plan);
    args.mean_p = operand<Access>(mean_p, plan);
    args.s_p = operand<Access>(s_p, plan);
    args.mask = operand<Access>(mask, plan);
    args.d_kl = operand<Access>(d_kl, plan);
    args.d_mean_q = operand<Access>(d_mean_q, plan);
    args.d_s_q = operand<Access>(d_s_q, plan);
    args.d_mean_p = operand<Access>(d_mean_p, plan);
    args.d_s_p = operand<Access>(d_s_p, plan);
    args.share = Shares<typename Access::Value>(balance);
  }
  template <class Access, class Args>
  void fill(Args& args, const Plan& plan, const Terms& kl) const {
    fill<Access>(args, plan);
    args.kl = operand<Access>(kl.elements, plan);
    args.sums = kl.sums<typename Access::Value>();
  }
};

}  // namespace fastelbo
