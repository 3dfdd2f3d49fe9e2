"""KL divergence of diagonal Gaussians: against 50-digit arithmetic, torch.distributions and plain lines."""

import itertools

import mpmath
import pytest
import torch

import fastelbo
from fastelbo.testing import assert_within_budget, gaussian, plain_kl

HALVES = [torch.bfloat16, torch.float16]


def exact_kl(mean_q, logvar_q, mean_p, logvar_p):
    """KL and its gradients with respect to the four arguments, in 50 digits; and what each gradient's terms add up to,
    which is what rounding can be measured against where they cancel."""
    with mpmath.workdps(50):
        mean_q, logvar_q, mean_p, logvar_p = (mpmath.mpf(float(x)) for x in (mean_q, logvar_q, mean_p, logvar_p))
        delta, d, precision = mean_q - mean_p, logvar_q - logvar_p, mpmath.exp(-logvar_p)
        value = (mpmath.expm1(d) - d + delta**2 * precision) / 2
        grads = delta * precision, mpmath.expm1(d) / 2, -delta * precision
        d_logvar_p = -(mpmath.expm1(d) + delta**2 * precision) / 2
        terms = (abs(mpmath.expm1(d)) + delta**2 * precision) / 2
        return value, (*grads, d_logvar_p), (*(abs(grad) for grad in grads), terms)


def grid(prior):
    """Arguments that reach logvar +-90, and offsets of 1e-4 and less from the prior."""
    logvars = [-90.0, -30.0, -3.0, -1e-4, 0.0, 1e-3, 0.7, 20.0, 90.0]
    offsets = [-88.0, -10.0, -0.8, -0.69, -0.1, -1e-2, -1e-4, -1e-6, 0.0, 1e-5, 1e-4, 1e-3, 0.3, 0.68, 0.71, 2.0, 50.0]
    deltas = [0.0, 1e-10, 1e-4, -0.3, 5.0]
    rows = []
    for logvar_p, offset, delta in itertools.product(logvars if prior else [0.0], offsets, deltas):
        if abs(logvar_p + offset) <= 90:
            mean_p = 0.25 if prior else 0.0
            rows.append((mean_p + delta, logvar_p + offset, mean_p, logvar_p))
    return torch.tensor(rows, dtype=torch.float32).unbind(1)


@pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])
def test_equals_fifty_digits(backend, prior):
    inputs = [tensor.clone().requires_grad_() for tensor in grid(prior)]
    used = inputs if prior else inputs[:2]
    kl = fastelbo.gaussian_kl(*used, event_ndim=0, backend=backend)
    grads = torch.autograd.grad(kl.sum(), used)
    largest = mpmath.mpf(torch.finfo(torch.float32).max)
    for index, row in enumerate(zip(*(tensor.tolist() for tensor in inputs), strict=True)):
        value, exact_grads, magnitudes = exact_kl(*row)
        got = kl[index].item()
        assert got >= 0, row
        if value < largest:
            assert abs(got - value) <= 1e-6 * value + 1e-44, (row, got, float(value))
        for grad, exact, magnitude in zip(grads, exact_grads, magnitudes, strict=False):
            if magnitude < largest:
                got = grad[index].item()
                assert abs(got - exact) <= 1e-6 * magnitude + 1e-44, (row, got, float(exact))


@pytest.mark.parametrize("offset", [1e-2, 1e-3, 1e-4, 1e-6])
def test_is_accurate_and_never_negative_near_the_prior(backend, offset):
    """Where today's lines are up to 44 % wrong in sum and negative in a third of the elements."""
    mean, logvar = (offset * tensor for tensor in gaussian((100_000,)))
    kl = fastelbo.gaussian_kl(mean, logvar, event_ndim=0, backend=backend)
    exact = fastelbo.reference.gaussian_kl(mean.double(), logvar.double(), scale=fastelbo.Scale("logvar"), event_ndim=0)
    assert (kl >= 0).all()
    assert ((kl - exact).abs() / exact).max() < 1e-6
    total = fastelbo.gaussian_kl(mean, logvar, event_ndim=1, backend=backend)
    assert abs(total.item() / exact.sum().item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])
def test_error_budget(backend, dtype, prior):
    inputs = [*gaussian((64, 48), dtype=dtype), *(gaussian((64, 48), dtype=dtype, seed=1) if prior else ())]

    def run(function, dtype):
        arguments = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        terms = function(*arguments)
        return terms.detach(), *torch.autograd.grad(terms.sum(), arguments)

    actual = run(lambda *a: fastelbo.gaussian_kl(*a, event_ndim=0, backend=backend), dtype)
    for name, *three in zip(
        ("kl", "d_mean_q", "d_s_q", "d_mean_p", "d_s_p"),
        actual,
        run(plain_kl, torch.float64),
        run(plain_kl, dtype),
        strict=False,
    ):
        assert_within_budget(*three, name=name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_inputs_give_float32(backend, dtype):
    mean, logvar = gaussian((4, 8), dtype=dtype)
    kl = fastelbo.gaussian_kl(mean, logvar, backend=backend)
    assert kl.dtype == torch.float32
    exact = fastelbo.gaussian_kl(mean.double(), logvar.double(), backend=backend)
    torch.testing.assert_close(kl.double(), exact, rtol=2e-7, atol=0)


def test_equals_torch_distributions(backend):
    normal = torch.distributions.Normal
    (mean_q, std_q), (mean_p, std_p) = (gaussian((6, 5), kind="std", dtype=torch.float64, seed=k) for k in (0, 1))
    expected = torch.distributions.kl_divergence(normal(mean_q, std_q), normal(mean_p, std_p))
    actual = fastelbo.gaussian_kl(mean_q, std_q, mean_p, std_p, scale="std", event_ndim=0, backend=backend)
    torch.testing.assert_close(actual, expected)


def test_each_side_has_its_own_scale(backend):
    (mean_q, logvar), (mean_p, std) = gaussian((3, 4)), gaussian((3, 4), kind="std", seed=1)
    actual = fastelbo.gaussian_kl(mean_q, logvar, mean_p, std, scale="logvar", scale_p="std", backend=backend)
    same = fastelbo.gaussian_kl(mean_q, logvar, mean_p, 2 * std.log(), backend=backend)
    torch.testing.assert_close(actual, same)


def test_near_equal_standard_deviations_keep_their_digits(backend):
    std = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    other = std * (1 + 1e-4)
    actual = fastelbo.gaussian_kl(0.0, other, 0.0, std, scale="std", event_ndim=0, backend=backend)
    h = torch.log1p((other.double() - std.double()) / std.double())
    exact = torch.expm1(h) + 0.5 * torch.expm1(h) ** 2 - h
    # the relative difference of the two standard deviations comes rounded to 2^-24, and KL is its square
    assert ((actual - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("prior", [(1.0, -0.5), "scalars", "per-channel"], ids=["numbers", "0-d", "per-channel"])
def test_broadcast_priors(backend, prior):
    mean, logvar = gaussian((3, 4, 5), requires_grad=True)
    if prior == "scalars":
        prior = torch.tensor(1.0, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    elif prior == "per-channel":
        prior = torch.randn(4, 1, requires_grad=True), torch.randn(4, 1, requires_grad=True)
    kl = fastelbo.gaussian_kl(mean, logvar, *prior, backend=backend)
    assert kl.shape == (3,)
    full = [torch.as_tensor(value).detach().expand(3, 4, 5).clone().requires_grad_() for value in prior]
    expected = plain_kl(mean, logvar, *full).sum((1, 2))
    torch.testing.assert_close(kl, expected)
    if isinstance(prior[0], torch.Tensor):
        grads = torch.autograd.grad(kl.sum(), prior)
        full_grads = torch.autograd.grad(expected.sum(), full)
        for grad, full_grad, tensor in zip(grads, full_grads, prior, strict=True):
            torch.testing.assert_close(grad, full_grad.sum_to_size(tensor.shape))


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (2, 2, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_event_and_reduction(backend, shape, reduction):
    mean, logvar = gaussian(shape)
    terms = plain_kl(mean, logvar)
    for event_ndim in (None, *range(len(shape) + 1)):
        dims = len(shape) - 1 if event_ndim is None else event_ndim
        expected = terms.sum(dim=tuple(range(len(shape) - dims, len(shape)))) if dims else terms
        expected = expected if reduction == "none" else getattr(expected, reduction)()
        actual = fastelbo.gaussian_kl(mean, logvar, event_ndim=event_ndim, reduction=reduction, backend=backend)
        torch.testing.assert_close(actual, expected)


def test_long_events_keep_their_digits(backend):
    """The error of the sum must not grow with the event."""
    mean, logvar = (tensor.expand(1, -1) for tensor in gaussian((2_000_003,)))
    exact = plain_kl(mean.double(), logvar.double()).sum(1)
    kl = fastelbo.gaussian_kl(mean, logvar, backend=backend)
    assert ((kl - exact).abs() / exact).item() < 2e-7


def test_sums_do_not_depend_on_threads():
    mean, logvar = gaussian((3, 100_001))
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            results.append(fastelbo.gaussian_kl(mean, logvar, backend="cpu"))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("argument", [0, 1], ids=["mean", "s"])
def test_bad_values_reach_their_sum_and_no_other(backend, value, argument):
    inputs = gaussian((3, 40))
    inputs[argument][1, 20] = value
    kl = fastelbo.gaussian_kl(*inputs, backend=backend)
    assert kl[1].isnan() if value != value else kl[1] == float("inf")
    assert kl[[0, 2]].isfinite().all()


def test_sigma_that_is_not_positive_follows_ieee(backend):
    kl = fastelbo.gaussian_kl(0.0, torch.tensor([1.0, 0.0, -1.0]), scale="std", event_ndim=0, backend=backend)
    assert kl[0] == 0
    assert kl[1] == float("inf")
    assert kl[2].isnan()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)], ids=str)
def test_empty(backend, shape):
    mean, logvar = gaussian(shape, requires_grad=True)
    kl = fastelbo.gaussian_kl(mean, logvar, backend=backend)
    assert torch.equal(kl, plain_kl(mean, logvar).sum(tuple(range(1, len(shape)))) if len(shape) > 1 else mean)
    kl.sum().backward()
    assert mean.grad.shape == shape


def test_zero_dimensional(backend):
    kl = fastelbo.gaussian_kl(torch.tensor(1.0), torch.tensor(0.0), backend=backend)
    assert kl.shape == ()
    assert kl.item() == 0.5
