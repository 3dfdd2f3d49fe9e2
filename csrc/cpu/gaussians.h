// What the loops of a KL divergence read and write.
#pragma once

#include "../common/gaussians.h"
#include "host.h"

namespace fastelbo {

struct GaussianOperands {
  Operand mean_q, s_q, mean_p, s_p;  // no mean_p: the standard normal
  Operand mask;                      // none: every element counts
  Scale scale, scale_p;
  Tiling tiling;
  Terms* kl = nullptr;  // where the divergence goes, or else
  Operand d_kl;         // its gradient, and
  Operand d_mean_q, d_s_q, d_mean_p, d_s_p;  // theirs; no d_mean_p: the prior needs none
  Shares<double> share;  // of d_kl

  GaussianOperands(const Gaussians& given, const Tiling& tiling, Terms& kl) : GaussianOperands(given, tiling) {
    this->kl = &kl;
  }
  GaussianOperands(const Gaussians& given, const Tensor& d_kl, int64_t event_ndim, std::optional<double> balance,
                   const GaussianGradients& grads)
      : GaussianOperands(given, {1, given.shape.numel()}) {
    this->d_kl = {d_kl, given.shape, event_ndim};
    d_mean_q = {grads.d_mean_q, given.shape};
    d_s_q = {grads.d_s_q, given.shape};
    if (grads.prior) {
      d_mean_p = {grads.d_mean_p, given.shape};
      d_s_p = {grads.d_s_p, given.shape};
    }
    share = Shares<double>(balance);
  }

 private:
  GaussianOperands(const Gaussians& given, const Tiling& tiling)
      : mean_q(given.mean_q, given.shape),
        s_q(given.s_q, given.shape),
        mean_p(given.mean_p, given.shape),
        s_p(given.s_p, given.shape),
        mask(given.mask, given.shape),
        scale(given.scale),
        scale_p(given.scale_p),
        tiling(tiling) {}
};

}  // namespace fastelbo
