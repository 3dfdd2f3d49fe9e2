"""Log-likelihood: against torch.distributions in float64, error budgets, every shape of scale."""

import math

import pytest
import torch

import fastelbo
from fastelbo.ops.gaussian_log_prob import Terms, log_prob
from fastelbo.testing import assert_within_budget, gaussian, plain_log_prob

SCALES = {"full": (6, 5), "per-channel": (5,), "0-d": ()}


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
def test_equals_torch_distributions(backend, shape):
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    std = (torch.rand(shape, dtype=torch.float64) + 0.1).requires_grad_()
    expected = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
    actual = fastelbo.gaussian_log_prob(x, mean, std, scale="std", backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, (x, mean, std), upstream),
        torch.autograd.grad(expected, (x, mean, std), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(backend, dtype):
    mean, logvar = gaussian((64, 48), dtype=dtype)
    x = torch.randn(64, 48).to(dtype)

    def run(function, dtype):
        arguments = [tensor.to(dtype).requires_grad_() for tensor in (x, mean, logvar)]
        terms = function(*arguments)
        return terms.detach(), *torch.autograd.grad(terms.sum(), arguments)

    actual = run(lambda *a: fastelbo.gaussian_log_prob(*a, event_ndim=0, backend=backend), dtype)
    assert actual[0].dtype == torch.float32
    for name, *three in zip(
        ("log_prob", "d_x", "d_mean", "d_s"),
        actual,
        run(plain_log_prob, torch.float64),
        run(plain_log_prob, dtype),
        strict=True,
    ):
        assert_within_budget(*three, name=name)


def test_nll_is_its_negative(backend):
    (mean, logvar), x = gaussian((3, 7)), torch.randn(3, 7)
    nll = fastelbo.gaussian_nll(x, mean, logvar, backend=backend)
    assert torch.equal(nll, -fastelbo.gaussian_log_prob(x, mean, logvar, backend=backend))


def test_numbers_are_a_unit_decoder(backend):
    x = torch.randn(4, 9)
    actual = fastelbo.gaussian_nll(x, 0.0, 1.0, scale="std", backend=backend)
    torch.testing.assert_close(actual, (0.5 * x**2 + 0.5 * math.log(2 * math.pi)).sum(1))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("event_ndim", [None, 0, 1, 2, 3])
def test_event_and_reduction(backend, event_ndim, reduction):
    (mean, logvar), x = gaussian((2, 3, 4)), torch.randn(2, 3, 4)
    terms = plain_log_prob(x, mean, logvar)
    dims = 2 if event_ndim is None else event_ndim
    expected = terms.sum(dim=tuple(range(3 - dims, 3))) if dims else terms
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    actual = fastelbo.gaussian_log_prob(x, mean, logvar, event_ndim=event_ndim, reduction=reduction, backend=backend)
    torch.testing.assert_close(actual, expected)


def test_samples_against_one_mean(backend):
    """K samples [K, B, D] under [B, D], as an importance-weighted bound needs them."""
    (mean, logvar), z = gaussian((3, 4), requires_grad=True), torch.randn(5, 3, 4)
    actual = fastelbo.gaussian_log_prob(z, mean, logvar, event_ndim=1, backend=backend)
    expected = plain_log_prob(z, mean, logvar).sum(-1)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual.sum(), (mean, logvar)),
        torch.autograd.grad(expected.sum(), (mean, logvar)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("argument", ["x", "mean", "s"])
def test_bad_values_reach_their_sum_and_no_other(backend, value, argument):
    (mean, logvar), x = gaussian((3, 40)), torch.randn(3, 40)
    {"x": x, "mean": mean, "s": logvar}[argument][1, 20] = value
    result = fastelbo.gaussian_log_prob(x, mean, logvar, backend=backend)
    assert not result[1].isfinite()
    assert result[[0, 2]].isfinite().all()


def test_gradient_of_one_sigma_keeps_its_digits(backend):
    """The sum over a million elements, which a float32 accumulator would spoil."""
    x, s = torch.randn(1000, 1003), torch.tensor(-0.3, requires_grad=True)
    (d_s,) = torch.autograd.grad(fastelbo.gaussian_nll(x, 0.1, s, reduction="sum", backend=backend), s)
    exact = 0.5 * (1 - (x.double() - float(torch.tensor(0.1))) ** 2 * torch.exp(-s.detach().double())).sum()
    assert abs(d_s.item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("shape", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("mask_shape", [(6, 5), (5,), (6, 1), ()], ids=str)
@pytest.mark.parametrize("event_ndim", [0, 1])
@pytest.mark.parametrize("beta_nll", [0.0, 0.5])
def test_mask_selects(backend, shape, mask_shape, event_ndim, beta_nll):
    x, mean = torch.randn(2, 6, 5, dtype=torch.float64)
    std = torch.rand(shape, dtype=torch.float64) + 0.1
    mask = torch.rand(mask_shape) < 0.6
    clean = [tensor.clone().requires_grad_() for tensor in (x, mean, std)]
    poisoned = [x.masked_fill(~mask, math.nan), mean.masked_fill(~mask, math.inf), std]
    if shape == (6, 5):
        poisoned[2] = std.masked_fill(~mask, -math.inf)
    poisoned = [tensor.clone().requires_grad_() for tensor in poisoned]
    terms = -torch.distributions.Normal(clean[1], clean[2]).log_prob(clean[0]) * clean[2].detach() ** (2 * beta_nll)
    expected = (
        torch.where(mask, terms, 0).sum(tuple(range(2 - event_ndim, 2))) if event_ndim else torch.where(mask, terms, 0)
    )
    options = {"scale": "std", "event_ndim": event_ndim, "mask": mask, "backend": backend}
    nll = fastelbo.gaussian_nll(*poisoned, beta_nll=beta_nll, **options)
    torch.testing.assert_close(nll, expected)
    if beta_nll == 0:
        assert torch.equal(fastelbo.gaussian_log_prob(*poisoned, **options), -nll)
    upstream = torch.randn_like(nll)
    wanted = torch.autograd.grad(expected, clean, upstream)
    for create_graph in (False, True):
        for got, want in zip(
            torch.autograd.grad(nll, poisoned, upstream, retain_graph=True, create_graph=create_graph),
            wanted,
            strict=True,
        ):
            torch.testing.assert_close(got, want)
            if got.shape == (6, 5):
                assert not got.masked_select(~mask).any()


def test_mean_is_over_what_counts(backend):
    x, mask = torch.zeros(3, 4), torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    half_log = 0.5 * math.log(2 * math.pi)
    for event_ndim, events in ((1, 2), (0, 4), (2, 1)):
        nll = fastelbo.gaussian_nll(x, 0.0, 0.0, mask=mask, event_ndim=event_ndim, reduction="mean", backend=backend)
        torch.testing.assert_close(nll, torch.tensor(4 * half_log / events))


@pytest.mark.parametrize("beta_nll", [0.25, 0.5, 1.0, 1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["var", "logvar"])
def test_beta_nll(backend, beta_nll, reduction, kind):
    """The paper's lines, with the constant."""
    mean, s = gaussian((6, 5), kind=kind, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    variance = s if kind == "var" else s.exp()
    terms = 0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))
    expected = (terms * variance.detach() ** beta_nll).sum(1)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    actual = fastelbo.gaussian_nll(x, mean, s, scale=kind, beta_nll=beta_nll, reduction=reduction, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.sum(), (x, mean, s)), torch.autograd.grad(expected.sum(), (x, mean, s))
    )


def test_beta_nll_of_1_gives_the_mean_the_gradient_of_the_squared_error(backend):
    (mean, logvar), x = gaussian((6, 5), requires_grad=True), torch.randn(6, 5)
    (d_mean,) = torch.autograd.grad(fastelbo.gaussian_nll(x, mean, logvar, beta_nll=1.0, backend=backend).sum(), mean)
    torch.testing.assert_close(d_mean, (mean - x).detach())


def test_default_event_holds_no_other_operands_batch(backend):
    column, row, full = torch.zeros(4, 1), torch.arange(4.0), torch.zeros(4, 4)
    message = (
        "x must not have its first dimension broadcast into an event of mean, of shape (4, 1), unless event_ndim is "
        "given; got (4,)"
    )
    for function in (fastelbo.gaussian_nll, fastelbo.gaussian_log_prob):
        for options in ({}, {"reduction": "mean"}, {"beta_nll": 0.5} if function is fastelbo.gaussian_nll else {}):
            with pytest.raises(ValueError) as caught:
                function(row, column, column, backend=backend, **options)
            assert message in str(caught.value)
        with pytest.raises(ValueError, match=r"^s must not have its first dimension .* of x, of shape \(4, 1\)"):
            function(column, column, row, backend=backend)
        with pytest.raises(ValueError, match=r"^x must not .* of mean, of shape \(8, 1, 5, 5\), .* got \(8, 5, 5\)"):
            function(torch.zeros(8, 5, 5), torch.zeros(8, 1, 5, 5), 0.0, backend=backend)
        assert function(row, column, column, event_ndim=1, backend=backend).shape == (4,)
        assert function(row, column, column, event_ndim=0, backend=backend).shape == (4, 4)
        # what broadcasts within an event, or along the batch, hides nothing
        for s in (0.0, torch.tensor(0.0), row, torch.zeros(1, 4), column):
            assert function(full, full, s, backend=backend).shape == (4,)
        assert function(full, row, s, backend=backend).shape == (4,)
        assert function(row, row, 0.0, backend=backend).shape == (4,)
        assert function(torch.zeros(1), torch.zeros(1, 1), 0.0, backend=backend).shape == (1,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("of_mean", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_data_may_be_integers(dtype, of_mean, backend):
    """An image's levels, which bfloat16 would round: they are taken in the dtype of the arithmetic."""
    mean, logvar = (t.to(of_mean).requires_grad_() for t in gaussian((4, 6)))
    x = torch.randint(0, 256, (4, 6)).to(dtype)
    found = fastelbo.gaussian_nll(x, mean, logvar, backend=backend)
    want = fastelbo.gaussian_nll(x.to(found.dtype), mean, logvar, backend=backend)
    exact = -torch.distributions.Normal(mean.double(), (0.5 * logvar.double()).exp()).log_prob(x.double()).sum(1)
    assert torch.equal(found, want)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    gradients = (torch.autograd.grad(out.sum(), (mean, logvar)) for out in (found, want))
    assert all(map(torch.equal, *gradients))
    with pytest.raises(TypeError, match=r"^x must be float32, float64, bfloat16 or float16; got torch.bool$"):
        fastelbo.gaussian_nll(x > 9, mean, logvar, backend=backend)


@pytest.mark.parametrize("kind", ["log_std", "std"])
@pytest.mark.parametrize("event_ndim", [0, 1])
def test_half_square_alone(backend, event_ndim, kind):
    """Without ln sigma, in the gradient too."""
    mean, x = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    s = (torch.rand(6, 5, dtype=torch.float64) + 0.1).requires_grad_()
    std = s.exp() if kind == "log_std" else s
    expected = 0.5 * ((x - mean) / std) ** 2 - 0.5
    expected = expected.sum(1) if event_ndim else expected
    terms = Terms(log_weight=0.0, constant=-0.5)
    actual = log_prob(x, mean, s, kind, event_ndim, "none", None, backend, negative=True, terms=terms)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, (x, mean, s), upstream),
        torch.autograd.grad(expected, (x, mean, s), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)
