// The two Gaussians of a KL divergence, as an op is given them, and the gradients of both.
#pragma once

#include "checks.h"

namespace fastelbo {

// Checked: q, and p unless it is the standard normal.
struct Gaussians {
  const Tensor &mean_q, &s_q;
  const std::optional<Tensor>&mean_p, &s_p, &mask;  // no mask: every element counts
  Scale scale, scale_p;
  Shape shape;  // to which all broadcast
  ScalarType dtype;  // of the arithmetic

  Gaussians(const Tensor& mean_q, const Tensor& s_q, const std::optional<Tensor>& mean_p,
            const std::optional<Tensor>& s_p, const std::vector<double>& scale,
            const std::optional<std::vector<double>>& scale_p, int64_t event_ndim, const std::optional<Tensor>& mask,
            bool prior_grad = false)
      : mean_q(mean_q),
        s_q(s_q),
        mean_p(mean_p),
        s_p(s_p),
        mask(mask),
        shape((check_prior(mean_p, s_p, scale_p, prior_grad),
               broadcast_operands({{"mean_q", mean_q}, {"s_q", s_q}, {"mean_p", mean_p}, {"s_p", s_p}}))) {
    check_event_ndim(event_ndim, shape);
    check_mask(mask, shape, anchor());
    this->scale = parse_scale(scale);
    this->scale_p = parse_scale(scale_p);
    dtype = arithmetic_type({&mean_q, &s_q, pointer(mean_p), pointer(s_p)});
  }

  // The tensor on whose device all are.
  Given anchor() const { return {"mean_q", mean_q}; }
  bool exponential() const { return scale.exponential() && scale_p.exponential(); }
};

// Each of the full broadcast shape; those of p are empty where they are not wanted.
struct GaussianGradients {
  bool prior;
  Tensor d_mean_q, d_s_q, d_mean_p, d_s_p;

  GaussianGradients(const Gaussians& of, bool prior_grad)
      : prior(prior_grad),
        d_mean_q(allocate_gradient(of.shape, of.mean_q, of.dtype, Device(of.mean_q))),
        d_s_q(allocate_gradient(of.shape, of.s_q, of.dtype, Device(of.mean_q))),
        d_mean_p(allocate_gradient(of.shape, of.mean_p, of.dtype, Device(of.mean_q), prior_grad)),
        d_s_p(allocate_gradient(of.shape, of.s_p, of.dtype, Device(of.mean_q), prior_grad)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> result() const { return {d_mean_q, d_s_q, d_mean_p, d_s_p}; }
};

}  // namespace fastelbo
