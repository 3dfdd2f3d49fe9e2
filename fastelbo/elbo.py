"""Variational objectives composed of the ops."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from fastelbo import _autograd, _checks, _seed
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob, gaussian_nll
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.reference.gaussian_kl import event_sum, log_ratio_and_distance
from fastelbo.reference.scale import arithmetic, arithmetic_dtype, log_std_and_std
from fastelbo.scale import Scale, as_scale

_x_term = _checks.calls(mean="x_mean", s="x_s", scale="x_scale")(gaussian_nll)
_z_term = _checks.calls(scale="z_scale", scale_p="z_scale_p", event_ndim="z_event_ndim", mask="z_mask")(gaussian_kl)

ESTIMATORS = ("iwae", "stl", "dreg")


class ELBO(NamedTuple):
    """What gaussian_elbo returns, in nats, per example.

    Args:
        elbo: -(nll + beta * kl), to be maximised.
        nll: negative log-likelihood of x.
        kl: KL divergence of the posterior from the prior.

    Example:
        >>> fastelbo.ELBO(elbo=torch.tensor([-3.0]), nll=torch.tensor([2.0]), kl=torch.tensor([1.0])).kl
        tensor([1.])
    """

    elbo: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor


def gaussian_elbo(
    x: "torch.Tensor | float",
    x_mean: "torch.Tensor | float",
    x_s: "torch.Tensor | float",
    mean_q: "torch.Tensor | float",
    s_q: "torch.Tensor | float",
    mean_p: "torch.Tensor | float | None" = None,
    s_p: "torch.Tensor | float | None" = None,
    *,
    x_scale: "str | Scale" = "logvar",
    z_scale: "str | Scale" = "logvar",
    z_scale_p: "str | Scale | None" = None,
    beta: "torch.Tensor | float" = 1.0,
    x_event_ndim: "int | None" = None,
    z_event_ndim: "int | None" = None,
    free_bits: "torch.Tensor | float | None" = None,
    free_bits_per: str = "dim",
    balance: "float | None" = None,
    x_mask: "torch.Tensor | None" = None,
    z_mask: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> ELBO:
    r"""Evidence lower bound of a variational autoencoder with a Gaussian decoder, by one sample of its latents.

    .. math:: -\left(-\ln N(x; \mu_x, \sigma_x^2) + \beta \, \mathrm{KL}(q \| p)\right)

    where the decoder has computed :math:`\mu_x` (and :math:`\sigma_x`) from a sample of q.

    Args:
        x: the data, [B, ...].
        x_mean, x_s: the decoder's mean and raw scale, which broadcast with x, or numbers: a fixed sigma is a number,
            one that is learned a 0-d parameter. With K samples of the latents in front, [K, B, ...], x_event_ndim must
            be given.
        mean_q, s_q: mean and raw scale of the posterior q, [B, ...].
        mean_p, s_p: the same of the prior p; the standard normal where both are None.
        x_scale: a Scale or one of its kinds, for x_s.
        z_scale, z_scale_p: the same for s_q and s_p; z_scale_p is z_scale where None.
        beta: weight of the KL: a number, or a 0-d tensor on x's device, which can change from step to step while
            nothing waits for the device and no traced function is compiled again.
        x_event_ndim, z_event_ndim: event_ndim of x and of the latents; all but the first dimension where None.
        free_bits, free_bits_per, balance: as in gaussian_kl. With them elbo is an objective, no longer a bound.
        x_mask, z_mask: bool, True where an element of x or of the latents counts; as in gaussian_nll and gaussian_kl.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None.

    Returns:
        ELBO(elbo, nll, kl), named, in nats: one number per example, [B] (elbo and nll [K, B] with K samples).

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices, a number out of range.
        TypeError: a dtype that is not supported.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes". beta: Higgins et al. 2017, "beta-VAE: Learning Basic
        Visual Concepts with a Constrained Variational Framework".

    Example:
        >>> x, mean, logvar = torch.ones(2, 5), torch.ones(2, 3), torch.zeros(2, 3)
        >>> elbo, nll, kl = fastelbo.gaussian_elbo(x, torch.ones(2, 5), 0.0, mean, logvar, beta=0.5)
        >>> nll, kl
        (tensor([4.5947, 4.5947]), tensor([1.5000, 1.5000]))
        >>> elbo
        tensor([-5.3447, -5.3447])
    """
    (x, x_mean, x_s), x_shape, _ = _checks.operands(x_event_ndim, "x_event_ndim", x=x, x_mean=x_mean, x_s=x_s)
    beta = _checks.check_scalar("beta", beta, x.device)
    if x_event_ndim is None and 0 < x.dim() < len(x_shape):
        raise ValueError(
            f"x_event_ndim must be given where x_mean and x_s, of shape {tuple(x_shape)}, have more dimensions than x, "
            f"of shape {tuple(x.shape)}; got None"
        )
    x_event_ndim = _checks.check_event_ndim(x_event_ndim, x_shape, "x_event_ndim")
    if x_mask is not None:
        _checks.check_mask(x_mask, x_shape, x.device, "x_mask")
    options: dict[str, Any] = {"event_ndim": x_event_ndim, "mask": x_mask, "backend": backend}
    nll = _x_term(x, x_mean, x_s, scale=x_scale, **options)
    kl = _z_term(
        mean_q,
        s_q,
        mean_p,
        s_p,
        scale=z_scale,
        scale_p=z_scale_p,
        event_ndim=z_event_ndim,
        free_bits=free_bits,
        free_bits_per=free_bits_per,
        balance=balance,
        mask=z_mask,
        backend=backend,
    )
    if kl.device != x.device:
        raise ValueError(f"mean_q must be on the device of x, {x.device}; got {kl.device}")
    if _checks.broadcast(nll.shape, kl.shape) is None:
        raise ValueError(f"mean_q must be of the examples of x, {tuple(nll.shape)}; got {tuple(kl.shape)}")
    weighted = (beta.to(kl.dtype) if isinstance(beta, torch.Tensor) else beta) * kl
    return ELBO(-(nll + weighted), nll, kl)


def gaussian_kl_per_latent(
    mean_q: "torch.Tensor | float",
    s_q: "torch.Tensor | float",
    mean_p: "torch.Tensor | float | None" = None,
    s_p: "torch.Tensor | float | None" = None,
    *,
    scale: "str | Scale" = "logvar",
    scale_p: "str | Scale | None" = None,
    event_ndim: "int | None" = None,
    mask: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""KL divergence of each latent dimension in the mean over the batch, for logs and for counting active ones: by one
    kernel, and nothing of the batch's size is written.

    .. math:: \tfrac{1}{B} \sum_b \mathrm{KL}(q_{b d} \| p_{b d})

    Args:
        mean_q, s_q, mean_p, s_p, scale, scale_p, backend: as in gaussian_kl.
        event_ndim: how many trailing dimensions are the latent's; all but the first where None.
        mask: bool, broadcasts to the shape of q and p: True where an element counts. The mean of a latent is over those
            that count; NaN over none.

    Returns:
        KL in nats, float32 (float64 for float64 inputs), of the latent's shape: the last event_ndim dimensions of the
        shape to which q and p broadcast.

    Raises:
        ValueError, TypeError, NotImplementedError: as gaussian_kl.

    Source:
        Active units: Burda et al. 2016, "Importance Weighted Autoencoders", section 5.

    Example:
        >>> mean = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> kl = fastelbo.gaussian_kl_per_latent(mean, torch.zeros(2, 3))
        >>> kl, (kl > 0.01).sum()
        (tensor([1.0000, 0.2500, 0.0000]), tensor(2))
    """
    _checks.check_prior(mean_p, s_p, scale_p)
    tensors, shape, _ = _checks.operands(event_ndim, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p)
    if mask is not None:
        _checks.check_mask(mask, shape, tensors[0].device)
    rank = len(shape)
    batch = rank - _checks.check_event_ndim(event_ndim, shape)
    order = (*range(batch, rank), *range(batch))

    def batch_last(tensor):
        """The event where a kernel expects the batch."""
        if tensor is None or tensor.dim() == 0:
            return tensor
        return tensor.reshape((1,) * (rank - tensor.dim()) + tensor.shape).permute(order)

    mean_q, s_q, mean_p, s_p, turned = map(batch_last, (*tensors, mask))
    options: dict[str, Any] = {"scale": scale, "scale_p": scale_p, "mask": turned, "backend": backend}
    total = gaussian_kl(mean_q, s_q, mean_p, s_p, event_ndim=batch, **options)
    if turned is None:
        return total / math.prod(shape[:batch])
    counted = turned.expand([shape[d] for d in order])
    return total / (counted.sum(dim=tuple(range(rank - batch, rank))) if batch else counted)


def iwae_bound(
    log_p_x: "torch.Tensor | float",
    log_p_z: "torch.Tensor | float",
    log_q_z: "torch.Tensor | float",
    *,
    dim: int = 0,
    estimator: str = "iwae",
    z: "torch.Tensor | None" = None,
) -> torch.Tensor:
    r"""Importance-weighted lower bound of the log-likelihood, from K samples of the posterior.

    .. math:: \ln \tfrac{1}{K} \sum_k w_k, \qquad w_k = \frac{p(x | z_k) \, p(z_k)}{q(z_k | x)}, \qquad
              z_k \sim q(z | x)

    The value does not depend on the estimator; the gradient that reaches the parameters of q does, and what log_q_z
    must be. With :math:`\tilde w_k = w_k / \sum_j w_j`, each adds up the samples' gradients

    ==========  =================================================  ====================================================
    estimator   gradient of q's parameters                         log_q_z
    ==========  =================================================  ====================================================
    ``"iwae"``  :math:`\tilde w_k` times the total one             ``gaussian_log_prob(z, mean, s)``
    ``"stl"``   :math:`\tilde w_k` times the one through z         ``gaussian_log_prob(z, mean.detach(), s.detach())``
    ``"dreg"``  :math:`\tilde w_k^2` times the one through z       ``gaussian_log_prob(z, mean.detach(), s.detach())``
    ==========  =================================================  ====================================================

    and all give the parameters of p the same. "dreg" has the expectation of "iwae" and less variance; its signal does
    not drown as K grows. "stl" has that expectation for K = 1 only, where it is "dreg"; for larger K it is biased.

    Args:
        log_p_x: log-likelihood of x under each sample, [K, B].
        log_p_z: log-density of each sample under the prior, [K, B]; or a number.
        log_q_z: log-density of each sample under q, [K, B], evaluated as the table says.
        dim: the dimension of the K samples.
        estimator: "iwae", "stl" (sticking the landing) or "dreg" (doubly reparameterised).
        z: the samples, [K, B, ...], drawn so that gradients reach q's parameters, and what all three log-densities were
            evaluated at; "stl" and "dreg" need it. "dreg" hooks it: every gradient that reaches z is multiplied by
            :math:`\tilde w_k`, so any other loss must take z.view_as(z) from before the densities did. One layer of
            latents only: in a hierarchy a later layer's q depends on z, which "stl" and "dreg" do not account for.

    Returns:
        The bound in nats, [B]: the shape to which the three broadcast, without dim.

    Raises:
        ValueError: shapes that do not broadcast, dim out of range, no z for "stl" or "dreg", a log_q_z that reaches the
            parameters of q past z or does not reach z (seen in eager mode only).
        TypeError: a dtype that is not supported.

    Source:
        Burda et al. 2015, "Importance Weighted Autoencoders"; Roeder et al. 2017, "Sticking the Landing"; Tucker et al.
        2018, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives".

    Example:
        >>> x, encoder, decoder = torch.zeros(2, 4), torch.nn.Linear(4, 6), torch.nn.Linear(3, 4)
        >>> mean, s = encoder(x).chunk(2, dim=1)
        >>> z = fastelbo.gaussian_rsample(mean, s, num_samples=5)
        >>> log_p_x = fastelbo.gaussian_log_prob(x, decoder(z), 0.0, event_ndim=1)
        >>> log_p_z = fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1)
        >>> log_q_z = fastelbo.gaussian_log_prob(z, mean.detach(), s.detach(), event_ndim=1)
        >>> fastelbo.iwae_bound(log_p_x, log_p_z, log_q_z, estimator="dreg", z=z).shape
        torch.Size([2])
    """
    _checks.check_one_of("estimator", estimator, ESTIMATORS)
    (log_p_x, log_p_z, log_q_z), shape, _ = _checks.operands(log_p_x=log_p_x, log_p_z=log_p_z, log_q_z=log_q_z)
    dim = _checks.check_sample_dim(dim, shape)
    wide_p_x, wide_p_z, wide_q_z = arithmetic(log_p_x, log_p_z, log_q_z)
    log_w = wide_p_x + wide_p_z - wide_q_z
    if estimator != "iwae":
        _check_samples(z, shape, estimator)
        if estimator == "dreg" and torch.compiler.is_exporting():
            raise NotImplementedError(
                "estimator must not be 'dreg' in an exported program, which keeps no gradient's weights"
            )
        if z is not None and torch.is_grad_enabled() and z.requires_grad:
            if not torch.compiler.is_compiling() and not _autograd.transformed():
                _check_paths(z, log_p_x, log_p_z, log_q_z, estimator)
            if estimator == "dreg":
                weights = torch.softmax(log_w.detach(), dim).reshape(*shape, *(1,) * (z.dim() - len(shape)))
                z.register_hook(lambda d_z: (weights * d_z).to(d_z.dtype))
    return torch.logsumexp(log_w, dim) - math.log(shape[dim])


def _check_samples(z, shape, estimator):
    if z is None:
        raise ValueError(f"z must be given for estimator {estimator!r}; got None")
    if not isinstance(z, torch.Tensor):
        raise TypeError(f"z must be a tensor; got {type(z).__name__}")
    if z.shape[: len(shape)] != shape:
        raise ValueError(f"z must begin with the shape of the log-densities, {tuple(shape)}; got {tuple(z.shape)}")


def _check_paths(z, log_p_x, log_p_z, log_q_z, estimator):
    """Asserts that log_q_z depends on parameters through z and in no other way: one detach that is missing would give
    another estimator's gradient, and no error."""
    at = torch.autograd.graph.get_gradient_edge(z)
    if any(log_density.grad_fn is at.node for log_density in (log_p_x, log_p_z, log_q_z)):
        if estimator == "stl":
            return  # one compiled or checkpointed function made both, and shows nothing of what lies inside
        raise ValueError(
            "z must not come out of the same compiled or checkpointed function as a log-density for estimator 'dreg', "
            "whose weights would not reach it there; call iwae_bound inside that function"
        )
    reached, seen, ahead = False, set(), [log_q_z.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and node is not at.node:
            raise ValueError(
                f"log_q_z must depend on parameters through z alone for estimator {estimator!r}; got one that reaches "
                f"one of shape {tuple(node.variable.shape)} past z: evaluate it at the detached mean and scale of q"
            )
        for following, output in node.next_functions:
            if following is at.node and output == at.output_nr:
                reached = True
            else:
                ahead.append(following)
    if not reached:
        raise ValueError(f"log_q_z must be evaluated at z for estimator {estimator!r}; got one that does not reach z")


def importance_weighted_log_likelihood(
    log_weights: "torch.Tensor | Iterable[torch.Tensor]", *, dim: int = 0
) -> torch.Tensor:
    r"""Log-likelihood of x by importance sampling, for evaluation: the log of the mean weight, without gradient.

    .. math:: \ln p(x) \approx \ln \tfrac{1}{K} \sum_k w_k, \qquad w_k = \frac{p(x | z_k) \, p(z_k)}{q(z_k | x)}

    a lower bound in expectation, which K tightens; thousands of samples are customary.

    Args:
        log_weights: log_p_x + log_p_z - log_q_z of K samples, [K, B]; or an iterable of such tensors, of any K each, so
            that one tensor's samples need memory at a time. A generator runs without gradients here.
        dim: the dimension of the samples.

    Returns:
        Log-likelihood in nats, [B].

    Raises:
        ValueError: no samples, dim out of range, tensors of several batches.
        TypeError: a dtype that is not supported.

    Source:
        Burda et al. 2015, "Importance Weighted Autoencoders".

    Example:
        >>> chunks = ([[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0]])
        >>> fastelbo.importance_weighted_log_likelihood(torch.tensor(chunk) for chunk in chunks)
        tensor([0., 1.])
    """
    total, count = None, 0
    with torch.no_grad():
        for chunk in (log_weights,) if isinstance(log_weights, torch.Tensor) else log_weights:
            (chunk,), shape, _ = _checks.operands(log_weights=chunk)
            part = torch.logsumexp(arithmetic(chunk)[0], _checks.check_sample_dim(dim, shape))
            if total is not None and part.shape != total.shape:
                raise ValueError(f"log_weights must be of one batch, {tuple(total.shape)}; got {tuple(part.shape)}")
            total = part if total is None else torch.logaddexp(total, part)
            count += shape[dim]
    if total is None:
        raise ValueError("log_weights must hold at least one sample; got none")
    return total - math.log(count)


def gaussian_rsample_log_prob(
    mean: "torch.Tensor | float",
    s: "torch.Tensor | float",
    *,
    scale: "str | Scale" = "logvar",
    num_samples: "int | None" = None,
    noise: "torch.Tensor | None" = None,
    seed: "int | torch.Tensor | None" = None,
    generator: "torch.Generator | None" = None,
    noise_offset: int = 0,
    out_dtype: "torch.dtype | None" = None,
    event_ndim: "int | None" = None,
    backend: "str | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor]":
    r"""Draws from a diagonal Gaussian and returns the log-density of the draw, from the noise in it.

    .. math:: z = \mu + \sigma \epsilon, \qquad \ln q(z) = \ln N(\epsilon; 0, 1) - \ln\sigma

    summed over each event. No mean is subtracted from z, so that the log-density keeps its digits where
    :math:`\sigma \ll |\mu|`, and is that of the draw before z was rounded. Its gradient is the total one, through z and
    past it; for "stl" and "dreg" in iwae_bound take gaussian_log_prob at the detached mean and s.

    Args:
        mean, s, scale, num_samples, noise, seed, generator, noise_offset, out_dtype, backend: as in gaussian_rsample.
        event_ndim: how many trailing dimensions are one event and are summed; all but the first (but the first two with
            num_samples) where None, none where 0.

    Returns:
        (z, log_q): z as from gaussian_rsample; log_q in nats, float32 (float64 for float64 inputs), of the shape of z
        less the event's dimensions.

    Raises:
        ValueError, TypeError, NotImplementedError: as gaussian_rsample.

    Source:
        The change of variables; sample_and_log_prob of distrax.

    Example:
        >>> z, log_q = fastelbo.gaussian_rsample_log_prob(torch.full((2, 3), 100.0), torch.full((2, 3), -18.0))
        >>> log_q.shape
        torch.Size([2])
    """
    scale = as_scale(scale)
    (mean, s), shape, _ = _checks.operands(event_ndim, mean=mean, s=s)
    event_ndim = _checks.check_event_ndim(event_ndim, shape)
    draw = {"num_samples": num_samples, "noise_offset": noise_offset, "backend": backend}
    z, noise = _draw_and_noise(mean, s, scale, shape, noise, seed, generator, out_dtype, draw)
    log_std, _ = log_std_and_std(arithmetic(s)[0], scale)
    log_noise = gaussian_log_prob(noise, 0.0, 1.0, scale="std", event_ndim=event_ndim, backend=backend)
    return z, log_noise - event_sum(log_std.expand(shape), event_ndim)


def _draw_and_noise(mean, s, scale, shape, noise, seed, generator, out_dtype, draw):
    """A draw and the noise in it, which is drawn again rather than kept for the backward.

    Args:
        draw: further keywords of gaussian_rsample.
    """
    if noise is None:
        draw = {**draw, "seed": _seed.as_seed(seed, generator, mean.device)}
        z = gaussian_rsample(mean, s, scale=scale, out_dtype=out_dtype, **draw)
        zeros = mean.new_zeros((), dtype=arithmetic_dtype(mean, s)).expand(shape)
        return z, gaussian_rsample(zeros, 1.0, scale="std", **draw)
    given = {"noise": noise, "seed": seed, "generator": generator}
    z = gaussian_rsample(mean, s, scale=scale, out_dtype=out_dtype, **given, **draw)
    return z, noise.expand(z.shape)


def gaussian_one_sample_kl(
    mean_q: "torch.Tensor | float",
    s_q: "torch.Tensor | float",
    mean_p: "torch.Tensor | float | None" = None,
    s_p: "torch.Tensor | float | None" = None,
    *,
    scale: "str | Scale" = "logvar",
    scale_p: "str | Scale | None" = None,
    num_samples: "int | None" = None,
    noise: "torch.Tensor | None" = None,
    seed: "int | torch.Tensor | None" = None,
    generator: "torch.Generator | None" = None,
    noise_offset: int = 0,
    out_dtype: "torch.dtype | None" = None,
    event_ndim: "int | None" = None,
    backend: "str | None" = None,
) -> "tuple[torch.Tensor, torch.Tensor]":
    r"""Draws from the posterior q and returns the one-sample estimate of its KL divergence from the prior p.

    .. math:: z \sim q, \qquad \ln q(z) - \ln p(z)

    whose mean is KL(q || p); a single one may be negative. It is computed from the noise in z without subtracting one
    density from the other, so that it keeps its digits where q is close to p, and is that of the draw before z was
    rounded. Of two Gaussians gaussian_rsample_kl gives the KL itself. For a prior of another kind, subtract its
    log-density from gaussian_rsample_log_prob's.

    Args:
        mean_q, s_q, mean_p, s_p, scale, scale_p: as in gaussian_rsample_kl.
        num_samples, noise, seed, generator, noise_offset, out_dtype, event_ndim, backend: as in
            gaussian_rsample_log_prob.

    Returns:
        (z, kl): z as from gaussian_rsample_kl; kl in nats, float32 (float64 for float64 inputs), of the shape of z less
        the event's dimensions.

    Raises:
        ValueError, TypeError, NotImplementedError: as gaussian_rsample_kl.

    Source:
        Kingma and Welling 2013, "Auto-Encoding Variational Bayes", section 2.3.

    Example:
        >>> z, kl = fastelbo.gaussian_one_sample_kl(torch.zeros(2, 3), torch.zeros(2, 3), num_samples=5)
        >>> kl.shape, kl.abs().max() < 1e-5
        (torch.Size([5, 2]), tensor(True))
    """
    scale = as_scale(scale)
    _checks.check_prior(mean_p, s_p, scale_p)
    scale_p = scale if scale_p is None else as_scale(scale_p, "scale_p")
    (mean_q, s_q, mean_p, s_p), shape, _ = _checks.operands(event_ndim, mean_q=mean_q, s_q=s_q, mean_p=mean_p, s_p=s_p)
    event_ndim = _checks.check_event_ndim(event_ndim, shape)
    out_dtype = out_dtype or _checks.promoted(mean_q, s_q)
    draw = {"num_samples": num_samples, "noise_offset": noise_offset, "backend": backend}
    z, noise = _draw_and_noise(mean_q.expand(shape), s_q, scale, shape, noise, seed, generator, out_dtype, draw)
    wide = arithmetic(mean_q, s_q, mean_p, s_p)
    noise = noise.to(wide[0].dtype)
    # (r + k noise)^2 / 2 - noise^2 / 2 - h, k = exp(h): no difference of two densities, whose digits it would not have
    h, r = log_ratio_and_distance(wide[0], wide[1], wide[2], wide[3], scale, scale_p)
    e = torch.expm1(h)
    return z, event_sum(0.5 * (r + e * noise) * (r + (2 + e) * noise) - h, event_ndim)


def optimal_sigma(
    x: "torch.Tensor | float",
    mean: "torch.Tensor | float",
    *,
    dim: "int | tuple[int, ...] | None" = None,
    mask: "torch.Tensor | None" = None,
) -> torch.Tensor:
    r"""The standard deviation that makes x likeliest around its mean: the decoder's sigma of an optimal sigma-VAE.

    .. math:: \sigma^* = \sqrt{\tfrac{1}{N} \sum_i (x_i - \mu_i)^2}

    for ``gaussian_nll(x, mean, sigma, scale="std")``. It passes no gradient on: the likelihood's with respect to it is
    0, where the elements that share a sigma have the same weight in the loss. It is 0 for a perfect reconstruction,
    whose likelihood is finite under a Scale("std") with a clamp or min_std only.

    Args:
        x: the data.
        mean: the decoder's mean, broadcasts with x.
        dim: the dimension, or dimensions, whose elements share a sigma; all where None. (0, 2, 3) is a sigma per
            channel of images, (1, 2, 3) one per image.
        mask: bool, broadcasts to their shape: True where an element counts.

    Returns:
        Sigma, float32 (float64 for float64 inputs): 0-d, or of the broadcast shape with size 1 in dim.

    Raises:
        ValueError: shapes that do not broadcast, tensors on several devices.
        TypeError: a dtype that is not supported.

    Source:
        Rybkin et al. 2021, "Simple and Effective VAE Training with Calibrated Decoders".

    Example:
        >>> x, mean = torch.tensor([[1.0, 3.0], [-1.0, 3.0]]), torch.zeros(2, 2)
        >>> fastelbo.optimal_sigma(x, mean, dim=0)
        tensor([[1., 3.]])
    """
    (x, mean), shape, _ = _checks.operands(x=x, mean=mean)
    apart = torch.sub(*arithmetic(x.detach(), mean.detach()))
    over: dict[str, Any] = {"dim": dim, "keepdim": dim is not None}
    if mask is not None:
        _checks.check_mask(mask, shape, x.device)
        apart = torch.where(mask, apart, 0.0)
    # in float64 no square of a float32 number is out of range
    squared = apart.double().square().mean(**over)
    if mask is not None:
        squared = squared / mask.expand(shape).double().mean(**over)
    return squared.sqrt().to(apart.dtype)
