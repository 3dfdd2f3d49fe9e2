// The parameters of a fastelbo.Scale, as the ops' schemas carry them.
#pragma once

namespace fastelbo {

struct ScaleKinds {
  enum Kind { logvar, log_std, std, var, softplus };
  enum ClampGrad { zero, straight_through, inward };
};

// Real: float where the arithmetic is and conversions cost.
template <class Real>
struct ScaleOf : ScaleKinds {
  Kind kind = logvar;
  ClampGrad clamp_grad = zero;
  bool clamped = false;
  Real clamp_lo = 0, clamp_hi = 0;
  Real soft_clamp = 0, inv_soft_clamp = 0;  // 0: none
  Real min_std = 0, var_eps = 0;
  Real beta = 1, inv_beta = 1, log_beta = 0;
  Real unit = Real(__builtin_inf()), unit_low = 0;  // the raw value whose sigma is 1, as a sum; infinite: none
  Real unit_own = 1, unit_slope = 1, unit_log_slope = 0;  // there the kind's own sigma; of softplus its slope

  ScaleOf() = default;
  template <class Other>
  explicit ScaleOf(const ScaleOf<Other>& other)
      : kind(other.kind),
        clamp_grad(other.clamp_grad),
        clamped(other.clamped),
        clamp_lo(Real(other.clamp_lo)),
        clamp_hi(Real(other.clamp_hi)),
        soft_clamp(Real(other.soft_clamp)),
        inv_soft_clamp(Real(other.inv_soft_clamp)),
        min_std(Real(other.min_std)),
        var_eps(Real(other.var_eps)),
        beta(Real(other.beta)),
        inv_beta(Real(other.inv_beta)),
        log_beta(Real(other.log_beta)),
        unit(Real(other.unit)),
        unit_low(Real(other.unit - Other(Real(other.unit)) + other.unit_low)),
        unit_own(Real(other.unit_own)),
        unit_slope(Real(other.unit_slope)),
        unit_log_slope(Real(other.unit_log_slope)) {}

  // sigma is exp of a multiple of the raw value, so ln sigma needs no logarithm
  bool exponential() const { return kind <= log_std && !shifted() && soft_clamp == 0; }
  // something is added to the kind's own sigma
  bool shifted() const { return min_std > 0 || var_eps > 0; }
  // but for the clamp
  bool same(const ScaleOf& other) const {
    return kind == other.kind && soft_clamp == other.soft_clamp && min_std == other.min_std &&
           var_eps == other.var_eps && beta == other.beta;
  }
};

using Scale = ScaleOf<double>;

}  // namespace fastelbo
