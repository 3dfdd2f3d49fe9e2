// The parameters of a fastelbo.Scale, as the ops' schemas carry them.
#pragma once

namespace fastelbo {

struct Scale {
  enum Kind { logvar, log_std, std, var, softplus };
  enum ClampGrad { zero, straight_through, inward };

  Kind kind = logvar;
  ClampGrad clamp_grad = zero;
  bool clamped = false;
  double clamp_lo = 0, clamp_hi = 0;
  double soft_clamp = 0;  // 0: none
  double min_std = 0, var_eps = 0;
  double beta = 1, log_beta = 0;

  // sigma is exp of a multiple of the raw value, so ln sigma needs no logarithm
  bool exponential() const { return kind <= log_std && min_std == 0 && var_eps == 0; }
};

}  // namespace fastelbo
