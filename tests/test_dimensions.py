"""Tensors of more dimensions than kernels take: those that merge, and those that do not."""

import pytest
import torch

import fastelbo
from fastelbo.ops._gaussian import Fold

RANK = 16


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


def reversed_dims(x):
    return x.permute(*reversed(range(x.dim())))


SHAPES = {
    "alike": lambda: (randn(*[2] * RANK), randn(*[2] * RANK, seed=1)),
    "64": lambda: (randn(*[1] * 20, 5, *[1] * 40, 3, 1, 2), randn(5, *[1] * 40, 3, 1, 1, seed=1)),
    "blocks": lambda: (randn(*[1] * 8, *[2] * 8), randn(*[2] * 8, *[1] * 8, seed=1)),
    "in turns": lambda: (randn(*[2, 1] * 8), randn(*[1, 2] * 8, seed=1)),
    "no order": lambda: (reversed_dims(randn(*[2] * RANK)), randn(*[2] * RANK, seed=1)),
    "one sigma": lambda: (randn(*[2] * RANK), randn(seed=1)),
    "one value": lambda: (randn(*[1] * RANK), randn(*[1] * 40, seed=1)),
    "empty": lambda: (randn(*[2] * 8, 0, *[2] * 8), randn(seed=1)),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def kl_terms(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def summed(terms, event_ndim):
    terms = terms.clone()
    for _ in range(terms.dim() - 1 if event_ndim is None else event_ndim):
        terms = terms.sum(-1)
    return terms


def compare(actual, expected, inputs):
    """Values and gradients of a function in float32 with one in float64."""
    leaves = [x.detach().float().requires_grad_() for x in inputs]
    exact = [x.detach().clone().requires_grad_() for x in inputs]
    values, wanted = actual(*leaves), expected(*exact)
    upstream = randn(*wanted.shape, seed=7)
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(values, leaves, upstream.float())
    for grad, want in zip(grads, torch.autograd.grad(wanted, exact, upstream), strict=True):
        assert grad.shape == want.shape
        torch.testing.assert_close(grad.double(), want, rtol=1e-4, atol=1e-4)


@shapes
@pytest.mark.parametrize("event_ndim", [0, None])
def test_kl(backend, shape, event_ndim):
    mean, s = inputs = SHAPES[shape]()
    s_p = s - 0.5
    whole = torch.broadcast_shapes(mean.shape, s.shape)
    mask = randn(*(size if i % 3 else 1 for i, size in enumerate(whole)), seed=3) > 0
    keywords = {"mask": mask, "event_ndim": event_ndim, "backend": backend}
    compare(
        lambda mean, s: fastelbo.gaussian_kl(mean, s, 0.5, s_p.float(), **keywords),
        lambda mean, s: summed(torch.where(mask, kl_terms((mean - 0.5) * (-s_p / 2).exp(), s - s_p), 0.0), event_ndim),
        inputs,
    )


@pytest.mark.parametrize("shape, event_ndim", [("no order", 3), ("in turns", 2), ("one sigma", 0)])
def test_log_likelihood(backend, shape, event_ndim):
    mean, s = SHAPES[shape]()
    x = randn(*torch.broadcast_shapes(mean.shape, s.shape), seed=2)
    compare(
        lambda x, mean, s: fastelbo.gaussian_log_prob(x, mean, s, event_ndim=event_ndim, backend=backend),
        lambda x, mean, s: summed(
            -0.5 * ((x - mean) ** 2 * (-s).exp() + s + torch.log(torch.tensor(2 * torch.pi))), event_ndim
        ),
        (x, mean, s),
    )


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape, num_samples", [("no order", None), ("in turns", 2), ("64", None), ("blocks", 3)])
def test_draws(backend, shape, num_samples, given):
    """The noise is that of the row-major order, or one that broadcasts."""
    mean, s = SHAPES[shape]()
    whole = torch.broadcast_shapes(mean.shape, s.shape)
    leading = () if num_samples is None else (num_samples,)
    options = {"num_samples": num_samples, "backend": backend}
    if given:
        noise = randn(*leading, *(size if i % 2 else 1 for i, size in enumerate(whole)), seed=4).float()
        options["noise"] = noise
    else:
        options["seed"] = 5
        noise = fastelbo.gaussian_rsample(torch.zeros(whole.numel()), 0.0, **options).reshape(*leading, *whole)

    def draws(mean, s):
        z = fastelbo.gaussian_rsample(mean, s, **options)
        z_again, kl = fastelbo.gaussian_rsample_kl(mean, s, event_ndim=2, **options)
        assert z.shape == z_again.shape == (*leading, *whole) and kl.shape == whole[:-2]
        return torch.cat([z.flatten(), z_again.flatten(), kl.flatten()])

    def lines(mean, s):
        z = (mean + (0.5 * s).exp() * noise.double()).flatten()
        return torch.cat([z, z, summed(kl_terms(mean, s), 2).flatten()])

    compare(draws, lines, (mean, s))


def test_what_floors_and_reduces(backend):
    mean, logvar = SHAPES["in turns"]()
    terms = kl_terms(mean, logvar).reshape(2, -1).mean(0).clamp(min=0.5).sum()
    kl = fastelbo.gaussian_kl(mean.float(), logvar.float(), free_bits=0.5, reduction="mean", backend=backend)
    torch.testing.assert_close(kl.double(), terms, rtol=1e-5, atol=1e-5)


def test_distributions_and_sites_that_are_enumerated():
    loc, value = randn(*[2] * RANK).float(), randn(*[2] * RANK, seed=1).float()
    q, theirs = fastelbo.distributions.Normal(loc, 1.0), torch.distributions.Normal(loc, 1.0)
    torch.testing.assert_close(q.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(fastelbo.distributions.kl_divergence(q, q), torch.zeros(*[2] * RANK))
    assert q.rsample((3,)).shape == (3, *[2] * RANK)


def test_dimensions_that_merge_are_views():
    """An event at a stride of two is read where it lies."""
    x = randn(*[2] * RANK, 2)[..., 0]
    fold = Fold((x, x[:1, :1]), 3)
    assert [tuple(tensor.shape) for tensor in fold.tensors] == [(4, 2**11, 8), (1, 2**11, 8)]
    assert all(tensor.data_ptr() == x.data_ptr() for tensor in fold.tensors) and fold.event_ndim == 1


def test_compiles():
    mean, s = (x.float() for x in SHAPES["in turns"]())
    compiled = torch.compile(fastelbo.gaussian_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(mean, s, event_ndim=3), fastelbo.gaussian_kl(mean, s, event_ndim=3))
