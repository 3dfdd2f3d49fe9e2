"""Objectives against models whose likelihood is known exactly, and the estimators of their gradients."""

import itertools
import math

import mpmath
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastelbo

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class PPCA:
    """Probabilistic PCA, x = W z + mu + sigma noise, with orthogonal columns in W: its posterior is diagonal."""

    def __init__(self, latent=2, size=5, count=4, dtype=torch.float64):
        with torch.device("cpu"):
            generator = torch.Generator().manual_seed(1)
            make = {"generator": generator, "dtype": torch.float64}
            lengths = torch.linspace(0.7, 1.6, latent, dtype=torch.float64)
            self.weight = torch.linalg.qr(torch.randn(size, latent, **make))[0] * lengths
            self.mu, self.sigma = torch.randn(size, **make), 0.6
            covariance = self.weight @ self.weight.T + self.sigma**2 * torch.eye(size, dtype=torch.float64)
            model = torch.distributions.MultivariateNormal(self.mu, covariance)
            self.x = self.mu + torch.randn(count, size, **make) @ torch.linalg.cholesky(covariance).T
            self.log_likelihood = model.log_prob(self.x)
            inverse = torch.linalg.inv(
                self.weight.T @ self.weight + self.sigma**2 * torch.eye(latent, dtype=torch.float64)
            )
            self.mean = (self.x - self.mu) @ self.weight @ inverse
            self.var = (self.sigma**2 * inverse.diagonal()).expand(count, latent)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.to(torch.get_default_device(), dtype))

    def decode(self, z):
        return z @ self.weight.T + self.mu

    def log_densities(self, z, mean, logvar, backend):
        """log_p_x, log_p_z and log_q_z of samples [K, B, latent]."""
        log_p_x = fastelbo.gaussian_log_prob(
            self.x, self.decode(z), self.sigma, scale="std", event_ndim=1, backend=backend
        )
        log_p_z = fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1, backend=backend)
        return log_p_x, log_p_z, fastelbo.gaussian_log_prob(z, mean, logvar, event_ndim=1, backend=backend)

    def blurred(self):
        """The mean and log-variance of a posterior that is off, wanting gradients."""
        return (self.mean + 0.3).requires_grad_(), (self.var.log() + 0.5).requires_grad_()


def test_bound_of_the_exact_posterior_is_the_likelihood(backend):
    """The expectation of the decoder's term in closed form: that at the posterior's mean, less the traces."""
    model = PPCA()
    options = {"x_scale": "std", "z_scale": "var", "backend": backend}
    elbo, nll, kl = fastelbo.gaussian_elbo(
        model.x, model.decode(model.mean), model.sigma, model.mean, model.var, **options
    )
    trace = (model.weight.square().sum(0) * model.var).sum(1) / (2 * model.sigma**2)
    torch.testing.assert_close(elbo - trace, model.log_likelihood, **EXACT)
    torch.testing.assert_close(elbo, -(nll + kl), **EXACT)


def test_sampled_bound_of_the_exact_posterior():
    model, count = PPCA(), 20_000
    z = fastelbo.gaussian_rsample(model.mean, model.var, scale="var", num_samples=count, seed=3)
    elbo, _, _ = fastelbo.gaussian_elbo(
        model.x, model.decode(z), model.sigma, model.mean, model.var,
        x_scale="std", z_scale="var", x_event_ndim=1, z_event_ndim=1,
    )  # fmt: skip
    error = elbo.std(0) / count**0.5
    assert ((elbo.mean(0) - model.log_likelihood).abs() < 4 * error).all()
    assert (error < 0.02).all()


def test_beta_weighs_the_kl_and_compiles_once():
    model = PPCA()

    def elbo(beta):
        return fastelbo.gaussian_elbo(model.x, model.mu, 0.0, model.mean, model.var, z_scale="var", beta=beta)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(elbo, fullgraph=True, backend=counter)
    for beta in (0.0, 0.25, 1.0, 4.0):
        want = elbo(beta)
        torch.testing.assert_close(want.elbo, -(want.nll + beta * want.kl), **EXACT)
        torch.testing.assert_close(compiled(torch.tensor(beta)).elbo, want.elbo, **EXACT)
    assert counter.frame_count == 1


def test_importance_weighted_bounds_increase():
    model, runs = PPCA(), 4000
    mean, logvar = (tensor.detach() for tensor in model.blurred())
    found = []
    for samples in (1, 4, 32):
        z = fastelbo.gaussian_rsample(mean, logvar, num_samples=samples * runs, seed=samples).unflatten(
            0, (samples, runs)
        )
        bounds = fastelbo.iwae_bound(*model.log_densities(z, mean, logvar, None))
        found.append((bounds.mean(0), bounds.std(0) / runs**0.5))
    for (low, low_error), (high, high_error) in itertools.pairwise(found):
        assert (high - low > 4 * (low_error + high_error)).all()
    assert (found[-1][0] < model.log_likelihood + 4 * found[-1][1]).all()


def test_estimators_agree_in_expectation():
    """iwae and dreg for any number of samples; stl with them for one, where it is dreg, and biased for more."""
    runs = 20_000
    for samples in (1, 5):
        found = {}
        for estimator in ("iwae", "stl", "dreg"):
            model = PPCA(count=1)
            mean, logvar = (leaf.detach().expand(runs, -1).clone().requires_grad_() for leaf in model.blurred())
            z = fastelbo.gaussian_rsample(mean, logvar, num_samples=samples, seed=11)
            q = (mean, logvar) if estimator == "iwae" else (mean.detach(), logvar.detach())
            bound = fastelbo.iwae_bound(*model.log_densities(z, *q, None), estimator=estimator, z=z)
            grads = torch.cat(torch.autograd.grad(bound.sum(), (mean, logvar)), 1)  # of each run
            found[estimator] = grads.mean(0), grads.std(0) / runs**0.5
        want, error = found["iwae"]
        for got, own_error in (found["stl"], found["dreg"]):
            assert (own_error < error).all()  # which is what they are for
            biased = samples > 1 and got is found["stl"][0]
            assert ((got - want).abs() < 4 * (error + own_error)).all() == (not biased)
        if samples == 1:
            torch.testing.assert_close(found["stl"][0], found["dreg"][0], **EXACT)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_estimators_compile(estimator):
    model = PPCA()
    leaves = [leaf.detach().requires_grad_() for leaf in model.blurred()]

    def bound(mean, logvar):
        z = fastelbo.gaussian_rsample(mean, logvar, num_samples=3, seed=5)
        q = (mean, logvar) if estimator == "iwae" else (mean.detach(), logvar.detach())
        return fastelbo.iwae_bound(*model.log_densities(z, *q, None), estimator=estimator, z=z)

    found = []
    for function in (bound, torch.compile(bound, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        found.append((value, *torch.autograd.grad(value.sum(), leaves)))
    torch.testing.assert_close(found[1], found[0], **EXACT)


def test_a_forgotten_detach_is_an_error():
    model = PPCA()
    mean, logvar = model.blurred()
    z = fastelbo.gaussian_rsample(mean, logvar, num_samples=3)
    with pytest.raises(ValueError, match="log_q_z must depend on parameters through z alone"):
        fastelbo.iwae_bound(*model.log_densities(z, mean, logvar, None), estimator="dreg", z=z)
    with pytest.raises(ValueError, match="log_q_z must be evaluated at z"):
        log_p_x, log_p_z, _ = model.log_densities(z, mean, logvar, None)
        fastelbo.iwae_bound(log_p_x, log_p_z, torch.zeros(3, 4), estimator="stl", z=z)


def test_memory_grows_by_the_samples_alone():
    model = PPCA(latent=3, size=7, count=64)
    mean, logvar = model.blurred()

    def kept(samples):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z = fastelbo.gaussian_rsample(mean, logvar, num_samples=samples)
            log_p_z, log_q_z = (fastelbo.gaussian_log_prob(z, *q, event_ndim=1) for q in ((0.0, 0.0), (mean, logvar)))
            bound = fastelbo.iwae_bound(torch.zeros(samples, 64).double(), log_p_z, log_q_z)
        return sum(sizes.values()), z.nbytes, bound

    (few, few_z, _), (many, many_z, _) = kept(10), kept(20)
    numbers = 2 * 8 * 64 * 10  # logsumexp keeps the weight of each sample
    assert many_z - few_z <= many - few <= many_z - few_z + numbers


def test_log_likelihood_by_importance_sampling():
    model = PPCA()
    mean, logvar = (tensor.detach() for tensor in model.blurred())
    z = fastelbo.gaussian_rsample(mean, logvar, num_samples=20_000, seed=5)
    log_p_x, log_p_z, log_q_z = model.log_densities(z, mean, logvar, None)
    weights = log_p_x + log_p_z - log_q_z
    found = fastelbo.importance_weighted_log_likelihood(weights)
    ratio = (weights - model.log_likelihood).exp()  # of mean 1
    assert ((found - model.log_likelihood).abs() < 5 * ratio.std(0) / 20_000**0.5).all()
    chunks = fastelbo.importance_weighted_log_likelihood(iter(weights.split(999)))
    torch.testing.assert_close(chunks, found, **EXACT)


def test_density_of_a_draw_from_its_noise(backend):
    mean, logvar = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    for leaf in (mean, logvar):
        leaf.requires_grad_()
    z, log_q = fastelbo.gaussian_rsample_log_prob(mean, logvar, seed=2, num_samples=4, backend=backend)
    want = torch.distributions.Normal(mean, (logvar / 2).exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(log_q, want, **EXACT)
    got, expected = (torch.autograd.grad(y.sum(), logvar, retain_graph=True) for y in (log_q, want))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)  # of the mean, both are independent
    far = fastelbo.gaussian_rsample_log_prob(torch.full((2, 8), 100.0), torch.full((2, 8), -18.0), seed=1)[1]
    near = fastelbo.gaussian_rsample_log_prob(torch.zeros(2, 8), torch.full((2, 8), -18.0), seed=1)[1]
    torch.testing.assert_close(far, near)  # which z, rounded at 100, no longer tells


def test_one_sample_kl_has_the_kl_as_its_mean():
    mean_q, s_q, mean_p, s_p = torch.randn(4, 3, 5).double()
    _, found = fastelbo.gaussian_one_sample_kl(mean_q, s_q, mean_p, s_p, num_samples=20_000, seed=4)
    want = fastelbo.gaussian_kl(mean_q, s_q, mean_p, s_p)
    assert ((found.mean(0) - want).abs() < 4 * found.std(0) / 20_000**0.5).all()


def test_optimal_sigma_is_the_likeliest():
    x, mean = torch.randn(50, 3).double(), torch.randn(3).double()
    sigma = fastelbo.optimal_sigma(x, mean, dim=0)
    torch.testing.assert_close(sigma, ((x - mean) ** 2).mean(0, keepdim=True).sqrt(), **EXACT)
    leaf = sigma.clone().requires_grad_()
    (d_sigma,) = torch.autograd.grad(fastelbo.gaussian_nll(x, mean, leaf, scale="std").sum(), leaf)
    torch.testing.assert_close(d_sigma, torch.zeros_like(d_sigma), rtol=0, atol=1e-9)
    mask = torch.rand(50, 3) > 0.3
    poisoned = torch.where(mask, x, math.nan)
    want = torch.stack([((x - mean)[mask[:, c], c] ** 2).mean().sqrt() for c in range(3)])
    torch.testing.assert_close(fastelbo.optimal_sigma(poisoned, mean, dim=0, mask=mask)[0], want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", ["logvar", "std", "softplus"])
def test_one_sample_kl_of_close_gaussians_keeps_its_digits(dtype, scale):
    """In a thousand dimensions two densities are of the order of a thousand, and their difference of a thousandth."""
    unit = {"logvar": -3.0, "std": 0.2, "softplus": -1.5}[scale]
    mean_q, mean_p = 5 + 1e-4 * torch.randn(2, 3, 1000, dtype=dtype)
    s_q, s_p = unit + 1e-4 * torch.randn(2, 3, 1000, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (mean_q, s_q, mean_p, s_p)]
    noise = torch.randn(3, 1000, dtype=dtype)
    _, kl = fastelbo.gaussian_one_sample_kl(*leaves, scale=scale, noise=noise)
    exact = []
    with mpmath.workdps(40):
        sigma = {
            "logvar": lambda s: mpmath.exp(s / 2),
            "std": lambda s: s,
            "softplus": lambda s: mpmath.log1p(mpmath.exp(s)),
        }[scale]
        for row in zip(*(tensor.tolist() for tensor in (*leaves, noise)), strict=True):
            total = mpmath.mpf(0)
            for element in zip(*row, strict=True):
                mq, sq, mp, sp, eps = map(mpmath.mpf, element)
                q, p = sigma(sq), sigma(sp)
                total += ((mq + q * eps - mp) / p) ** 2 / 2 - eps**2 / 2 + mpmath.log(p) - mpmath.log(q)
            exact.append(float(total))
    # the terms are of the order of 1e-4 to 1e-3 and their sum may be one of them
    torch.testing.assert_close(
        kl.double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=torch.finfo(dtype).eps
    )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    std = {"logvar": lambda s: (s / 2).exp(), "std": lambda s: s, "softplus": torch.nn.functional.softplus}[scale]
    q, p = (torch.distributions.Normal(mean, std(s)) for mean, s in (wide[:2], wide[2:]))
    z = q.loc + q.scale * noise.double()
    wanted = torch.autograd.grad((q.log_prob(z) - p.log_prob(z)).sum(), wide)
    for got, want in zip(torch.autograd.grad(kl.sum(), leaves), wanted, strict=True):
        largest = max(1.0, want.abs().max().item())
        torch.testing.assert_close(
            got.double(), want, rtol=0, atol=(2e-6 if dtype == torch.float32 else 1e-12) * largest
        )


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e25])
def test_optimal_sigma_of_tiny_and_huge_residuals(size):
    x = size * torch.tensor([3.0, -4.0, 0.0, 1.0])
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(fastelbo.optimal_sigma(x[:2], 0.0), torch.tensor(size * 12.5**0.5), rtol=1e-6, atol=0)
    sigma = fastelbo.optimal_sigma(x, 0.0, mask=mask)
    torch.testing.assert_close(sigma, torch.tensor(size * (25 / 3) ** 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_no_estimator_of_weighted_gradients(strict):
    """The weights that "dreg" puts on the gradient of z would be lost, and no error would say so."""

    class Bound(torch.nn.Module):
        def forward(self, z, log_p_x, log_p_z, log_q_z):
            return fastelbo.iwae_bound(log_p_x, log_p_z, log_q_z, estimator=self.estimator, z=z)

    bound, arguments = Bound(), [torch.zeros(5, 8, 2), *torch.randn(3, 5, 8)]
    bound.estimator = "dreg"
    with pytest.raises(Exception, match="estimator must not be 'dreg' in an exported program"):
        torch.export.export(bound, tuple(arguments), strict=strict)
    bound.estimator = "stl"
    assert torch.equal(
        torch.export.export(bound, tuple(arguments), strict=strict).module()(*arguments), bound(*arguments)
    )


# each latent


@pytest.mark.parametrize("event_ndim", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_kl_per_latent(backend, event_ndim, masked, prior):
    def randn(*shape, seed):
        x = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        return x.to(torch.get_default_device())

    leaves = [randn(5, 3, 4, seed=0), randn(3, 4, seed=1)] + ([randn(5, 1, 1, seed=2), randn(seed=3)] if prior else [])
    leaves = [x.requires_grad_() for x in leaves]
    mask = randn(5, 3, 1, seed=4) > 0 if masked else None
    if event_ndim is None:
        leaves[1] = randn(1, 3, 4, seed=1).requires_grad_()
    kl = fastelbo.gaussian_kl_per_latent(*leaves, event_ndim=event_ndim, mask=mask, backend=backend)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    mean, s, mean_p, s_p = (*exact, *([] if prior else [torch.zeros(()), torch.zeros(())]))
    terms = 0.5 * ((s - s_p).exp() + (mean - mean_p) ** 2 / s_p.exp() - 1 - s + s_p)
    counts = torch.ones(5, 3, 4) if mask is None else mask.expand(5, 3, 4).double()
    terms = terms * counts
    for _ in range(3 - (2 if event_ndim is None else event_ndim)):
        terms, counts = terms.sum(0), counts.sum(0)
    want = terms / counts
    torch.testing.assert_close(kl.double(), want, rtol=1e-5, atol=1e-6, equal_nan=True)
    live = torch.isfinite(want.detach())
    torch.testing.assert_close(
        [g.double() for g in torch.autograd.grad(kl[live].sum(), leaves)],
        list(torch.autograd.grad((terms / counts.clamp(min=1))[live].sum(), exact)), rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_kl_per_latent_bad_input():
    x = torch.zeros(2, 3)
    for arguments, keywords, message in (
        ((x, torch.zeros(2)), {}, "s_q must broadcast with mean_q of shape"),
        ((x, x), {"event_ndim": 3}, "event_ndim must be between 0 and 2"),
        ((x, x), {"mask": torch.ones(3, 2).bool()}, r"mask must broadcast to shape \(2, 3\); got \(3, 2\)"),
        ((x, x, x), {}, "mean_p and s_p must both be given"),
    ):
        with pytest.raises(ValueError, match=message):
            fastelbo.gaussian_kl_per_latent(*arguments, **keywords)
