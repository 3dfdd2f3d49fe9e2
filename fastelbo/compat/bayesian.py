"""Bayesian layers: the KL of bayesian-torch's and torchbnn's models, and weights drawn with their KL.

Replaces ``BaseVariationalLayer_.kl_div`` (assign ``staticmethod(kl_div)`` to it) and
``bayesian_torch.models.dnn_to_bnn.get_kl_loss``, which average over each weight tensor;
``torchbnn.functional.bayesian_kl_loss`` and ``torchbnn.BKLLoss``, which sum or average over all weights; and, for all
layers at once by sample_weights, ::

    sigma = torch.log1p(torch.exp(rho))
    weight = mu + sigma * torch.randn_like(mu)
    kl = (torch.log(sigma_p) - torch.log(sigma) + (sigma**2 + (mu - mu_p) ** 2) / (2 * sigma_p**2) - 0.5).sum()

Those packages are not imported: a layer is known by the names of its parameters.

Where the originals are wrong:

* log1p(exp(rho)) is infinite for rho above 88 in float32 (11 in float16), and its gradient NaN.
* Close to the prior, where layers start, the KL loses its digits.
* bayesian-torch (0.5): an average per tensor is not the KL that an ELBO needs, and weighs a bias as much as a kernel;
  ``prior_variance`` is used as a standard deviation; get_kl_loss counts an LSTM's inner layers twice.
* torchbnn (1.2): ``last_layer_only`` gives the last bias alone, without the last weight.
"""

import numbers

import torch

from fastelbo import _checks
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_rsample_kl import gaussian_rsample_kl

__all__ = ["BKLLoss", "bayesian_kl_loss", "get_kl_loss", "kl_div", "sample_weights"]


@_checks.calls(mean_q="mu_q", s_q="sigma_q", mean_p="mu_p", s_p="sigma_p")
def kl_div(mu_q, sigma_q, mu_p, sigma_p):
    """KL of N(mu_q, sigma_q^2) from N(mu_p, sigma_p^2), averaged over all elements: bayesian-torch's convention.

    Args:
        mu_q, sigma_q, mu_p, sigma_p: tensors that broadcast, or numbers.

    Returns:
        A 0-d tensor, nats per element.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks"; bayesian_torch/layers/base_variational_layer.py.

    Example:
        >>> fastelbo.compat.bayesian.kl_div(torch.ones(2, 3), torch.ones(2, 3), 0.0, 1.0)
        tensor(0.5000)
    """
    return gaussian_kl(mu_q, sigma_q, mu_p, sigma_p, scale="std", event_ndim=0, reduction="mean")


def get_kl_loss(m):
    """The KL of a model of bayesian-torch's layers: the sum over its weights, kernels and biases of their averages.

    Args:
        m: a module.

    Returns:
        A 0-d tensor in nats, or None for a model without such layers.

    Raises:
        ValueError, TypeError: as gaussian_kl.

    Source:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks"; bayesian_torch/models/dnn_to_bnn.py.

    Example:
        >>> fastelbo.compat.bayesian.get_kl_loss(torch.nn.Linear(2, 3)) is None
        True
    """
    total = None
    for layer in m.modules():
        for name, prior in (("weight", "weight"), ("kernel", "weight"), ("bias", "bias")):
            mu = getattr(layer, f"mu_{name}", None)
            if mu is None:
                continue
            rho, mu_p, sigma_p = (
                getattr(layer, key) for key in (f"rho_{name}", f"prior_{prior}_mu", f"prior_{prior}_sigma")
            )
            scales = {"scale": "softplus", "scale_p": "std"}
            kl = gaussian_kl(mu, rho, mu_p, sigma_p, **scales, event_ndim=0, reduction="mean")
            total = kl if total is None else total + kl
    return total


def bayesian_kl_loss(model, reduction="mean", last_layer_only=False):
    """The KL of a model of torchbnn's layers.

    Args:
        model: a module.
        reduction: "sum" over all weights, or their "mean".
        last_layer_only: whether to sum over the last such layer alone; reduction then has no say.

    Returns:
        A tensor of shape [1]; 0 for a model without such layers.

    Raises:
        ValueError: an unknown reduction.

    Source:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks"; torchbnn/functional.py.

    Example:
        >>> fastelbo.compat.bayesian.bayesian_kl_loss(torch.nn.Linear(2, 3))
        tensor([0.])
    """
    layers = [layer for layer in model.modules() if getattr(layer, "weight_log_sigma", None) is not None]
    total, count = next(model.parameters()).new_zeros(1), 0
    for layer in layers[-1:] if last_layer_only else layers:
        for name in ("weight", "bias"):
            mu, log_sigma = getattr(layer, f"{name}_mu"), getattr(layer, f"{name}_log_sigma")
            if mu is not None:
                prior = (layer.prior_mu, layer.prior_log_sigma)
                total = total + gaussian_kl(mu, log_sigma, *prior, scale="log_std", event_ndim=0, reduction="sum")
                count += mu.numel()
    if last_layer_only or count == 0:
        return total
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    return total / count if reduction == "mean" else total


class BKLLoss(torch.nn.Module):
    """bayesian_kl_loss as torchbnn's module.

    Args:
        reduction, last_layer_only: as in bayesian_kl_loss.

    Raises:
        ValueError: in a call, for an unknown reduction.

    Source:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks"; torchbnn/modules/loss.py.

    Example:
        >>> fastelbo.compat.bayesian.BKLLoss(reduction="sum")(torch.nn.Linear(2, 3))
        tensor([0.])
    """

    def __init__(self, reduction="mean", last_layer_only=False):
        super().__init__()
        self.reduction, self.last_layer_only = reduction, last_layer_only

    def forward(self, model):
        """The KL of a model, a tensor of shape [1]."""
        return bayesian_kl_loss(model, self.reduction, self.last_layer_only)


@_checks.calls(mean_q="means", s_q="scales", mean_p="prior_mean", s_p="prior_std")
def sample_weights(means, scales, prior_mean=0.0, prior_std=1.0, *, scale="softplus", seed=None, generator=None):
    """Draws all weights of a model, and returns their KL from the prior: the complexity cost of Bayes by backprop.

    One op for all: they are concatenated first, and the noise is that of the concatenated tensor.

    Args:
        means: tensors of any shapes.
        scales: their raw scales, of the same shapes.
        prior_mean, prior_std: a number for all, or a number or tensor for each.
        scale: a Scale or one of its kinds; what the scales are.
        seed, generator: as in gaussian_rsample.

    Returns:
        (weights, kl): a list of tensors, views of one; and the KL of all together in nats, a 0-d tensor.

    Raises:
        ValueError: means, scales and priors that do not match; whatever gaussian_rsample_kl raises.

    Source:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks".

    Example:
        >>> means, rhos = [torch.zeros(3, 2), torch.zeros(3)], [torch.zeros(3, 2), torch.zeros(3)]
        >>> weights, kl = fastelbo.compat.bayesian.sample_weights(means, rhos)
        >>> [weight.shape for weight in weights], kl
        ([torch.Size([3, 2]), torch.Size([3])], tensor(0.9607))
    """
    means, scales = list(means), list(scales)
    if [s.shape for s in scales] != [mean.shape for mean in means]:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (means, scales)]
        raise ValueError(f"scales must have the shapes of means, {shapes[0]}; got {shapes[1]}")
    flat, kl = gaussian_rsample_kl(
        _concatenated(means),
        _concatenated(scales),
        _prior("prior_mean", prior_mean, means),
        _prior("prior_std", prior_std, means),
        scale=scale,
        scale_p="std",
        seed=seed,
        generator=generator,
        event_ndim=1,
    )
    parts = flat.split([mean.numel() for mean in means])
    return [part.view(mean.shape) for part, mean in zip(parts, means, strict=True)], kl


def _prior(name, value, means):
    """A number as it is; one for each of the means as a tensor, concatenated as they are."""
    if isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.dim() == 0):
        return value
    values = list(value)
    if len(values) != len(means):
        raise ValueError(f"{name} must be a number, or one for each of the {len(means)} means; got {len(values)}")
    return _concatenated(
        [
            torch.as_tensor(v, dtype=mean.dtype, device=mean.device).expand_as(mean)
            for v, mean in zip(values, means, strict=True)
        ]
    )


def _concatenated(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])
