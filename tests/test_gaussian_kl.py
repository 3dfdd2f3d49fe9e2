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
    drawn = torch.rand(1000, generator=torch.Generator().manual_seed(0), device="cpu")
    std = drawn.to(torch.get_default_device()) + 0.5
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


# The objectives: free bits, balance, mask

PRIOR = pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])


def posterior_and_prior(shape, prior=True, dtype=torch.float64):
    """Dimensions of small KL first, of large KL last."""
    tensors = [*gaussian(shape, dtype=dtype), *(gaussian(shape, dtype=dtype, seed=1) if prior else ())]
    ramp = torch.linspace(0.1, 1.5, shape[-1], dtype=dtype)
    return [(ramp * tensor).requires_grad_() for tensor in tensors]


@PRIOR
@pytest.mark.parametrize("event_ndim", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_free_bits_are_the_papers(backend, prior, event_ndim, masked):
    """The mean over the batch is that of their formulas, which floor means and examples in plain lines."""
    inputs = posterior_and_prior((6, 4, 5), prior)
    terms, batch = plain_kl(*inputs), tuple(range(3 - event_ndim))
    mask = torch.rand(6, 4, 5) < 0.7 if masked else torch.ones(6, 4, 5, dtype=torch.bool)
    terms = terms * mask
    per_example = terms.sum(tuple(range(-event_ndim, 0)))
    papers = {
        "dim": lambda floor: (terms.sum(batch) / mask.sum(batch)).clamp(min=floor),
        "example": lambda floor: per_example.clamp(min=floor).mean(),
        "batch": lambda floor: per_example.mean().clamp(min=floor),
    }
    floors = {"dim": terms.mean(), "example": per_example.median(), "batch": per_example.mean()}
    for per, formula in papers.items():
        for factor in (0.0, 0.9, 1.1, 1e3):
            floor = factor * floors[per].item()
            expected = formula(floor)
            if per == "dim":  # each dimension as often as it counts
                expected = (expected * mask.sum(batch)).sum() / per_example.numel()
            kl = fastelbo.gaussian_kl(
                *inputs,
                event_ndim=event_ndim,
                free_bits=floor,
                free_bits_per=per,
                mask=mask if masked else None,
                backend=backend,
            )
            assert kl.shape == per_example.shape
            torch.testing.assert_close(kl.mean(), expected)
            torch.testing.assert_close(
                torch.autograd.grad(kl.mean(), inputs),
                torch.autograd.grad(expected, inputs, retain_graph=True),
                rtol=1e-12,
                atol=1e-12,
            )


def test_free_bits_by_hand(backend):
    """Elements [[1/2, 2, 0], [9/2, 0, 0]]: means 5/2, 1 and 0; events 5/2 and 9/2 with mean 7/2."""
    mean, zeros = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.zeros(2, 3)
    for per, floor, expected in (
        ("dim", 0.5, [3.0, 5.0]),
        ("dim", 1.0, [2.5, 6.5]),  # the second dimension's mean lies at the floor
        ("dim", 2.5, [7.5, 7.5]),
        ("example", 3.0, [3.0, 4.5]),
        ("batch", 3.4, [2.5, 4.5]),
        ("batch", 3.5, [3.5, 3.5]),
    ):
        kl = fastelbo.gaussian_kl(mean, zeros, free_bits=floor, free_bits_per=per, backend=backend)
        assert kl.tolist() == expected, (per, floor)
        kl = fastelbo.gaussian_kl(mean, zeros, free_bits=torch.tensor(floor), free_bits_per=per, backend=backend)
        assert kl.tolist() == expected, (per, floor)
        total = fastelbo.gaussian_kl(
            mean, zeros, free_bits=floor, free_bits_per=per, reduction="sum", event_ndim=1, backend=backend
        )
        assert total == sum(expected)


@pytest.mark.parametrize("per", ["dim", "example", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_below_the_floor_the_gradient_is_exactly_0(backend, per, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in posterior_and_prior((8, 6))]
    terms = plain_kl(*(tensor.detach().double() for tensor in inputs))
    if per == "dim":
        floor = terms.mean(0).median().item()
        free = (terms.mean(0) <= floor).expand(8, 6)
    elif per == "example":
        floor = terms.sum(1).median().item() + 1e-3
        free = (terms.sum(1) <= floor)[:, None].expand(8, 6)
    else:
        floor, free = 1e3, torch.ones(8, 6, dtype=torch.bool)
    free = free.to(inputs[0].device)
    options = {"free_bits": floor * (1 + 1e-5), "free_bits_per": per, "backend": backend}
    weights = torch.rand(8) + 0.5
    grads = torch.autograd.grad((fastelbo.gaussian_kl(*inputs, **options) * weights).sum(), inputs)
    plain = torch.autograd.grad((fastelbo.gaussian_kl(*inputs, backend=backend) * weights).sum(), inputs)
    for grad, unfloored in zip(grads, plain, strict=True):
        assert not grad[free].any()
        assert torch.equal(grad[~free], unfloored[~free])
    assert free.any() and (per == "batch" or not free.all())


@pytest.mark.parametrize("per", ["dim", "example", "batch"])
def test_a_floor_hides_no_nan(backend, per):
    mean, logvar = gaussian((3, 4))
    mean[1, 2] = float("nan")
    kl = fastelbo.gaussian_kl(mean, logvar, free_bits=1e3, free_bits_per=per, backend=backend)
    assert kl[1].isnan()
    assert kl[[0, 2]].isfinite().all()


def two_kls(mean_q, s_q, mean_p, s_p, balance, **options):
    """The stop-gradient form: one KL moves the prior, one the posterior."""
    to_p = fastelbo.gaussian_kl(mean_q.detach(), s_q.detach(), mean_p, s_p, **options)
    to_q = fastelbo.gaussian_kl(mean_q, s_q, mean_p.detach(), s_p.detach(), **options)
    return balance * to_p + (1 - balance) * to_q


@pytest.mark.parametrize("balance", [0.0, 0.3, 0.8, 1.0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_balance_is_two_kls(backend, balance, dtype):
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in posterior_and_prior((6, 4))]
    kl = fastelbo.gaussian_kl(*inputs, balance=balance, backend=backend)
    expected = two_kls(*inputs, balance, backend=backend)
    plain = fastelbo.gaussian_kl(*inputs, backend=backend)
    # the reference adds up the two forms
    torch.testing.assert_close(kl, plain, rtol=0 if backend != "reference" else 4 * torch.finfo(kl.dtype).eps, atol=0)
    upstream = torch.randn_like(kl)
    # two roundings more, of numbers of the inputs' dtype
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(
        torch.autograd.grad(kl, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), **tolerance
    )


def test_balance_of_one_side(backend):
    """Parameters of q alone, or of p alone."""
    for wanted in ([0, 1], [2, 3]):
        inputs = [tensor.detach() for tensor in posterior_and_prior((6, 4))]
        leaves = [inputs[i].requires_grad_() for i in wanted]
        grads = torch.autograd.grad(fastelbo.gaussian_kl(*inputs, balance=0.7, backend=backend).sum(), leaves)
        plain = torch.autograd.grad(fastelbo.gaussian_kl(*inputs, backend=backend).sum(), leaves)
        for grad, full in zip(grads, plain, strict=True):
            torch.testing.assert_close(grad, (1 - 0.7 if wanted[0] == 0 else 0.7) * full)


def test_balance_has_the_second_derivatives_of_two_kls(backend):
    inputs = posterior_and_prior((3, 4))
    results = []
    for kl in (
        fastelbo.gaussian_kl(*inputs, balance=0.8, backend=backend),
        two_kls(*inputs, 0.8, backend=backend),
    ):
        first = torch.autograd.grad(kl.sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum((grad * grad).sum() for grad in first), inputs))
    torch.testing.assert_close(*results)


MASKS = {"full": (5, 3, 4), "per-dimension": (4,), "per-example": (5, 1, 1), "0-d": ()}
every_mask = pytest.mark.parametrize("mask_shape", MASKS.values(), ids=MASKS)


def some_mask(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3), device="cpu") < 0.6
    return mask.to(torch.get_default_device())


def poison(tensors, mask):
    """The tensors with NaN and infinities where nothing must look."""
    values = itertools.cycle([float("nan"), float("inf"), -float("inf")])
    return [tensor.detach().masked_fill(~mask, value).requires_grad_() for tensor, value in zip(tensors, values)]  # noqa: B905


@PRIOR
@every_mask
@pytest.mark.parametrize("event_ndim", [0, 1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_mask_selects(backend, prior, mask_shape, event_ndim, dtype):
    inputs = [tensor.detach().to(dtype) for tensor in posterior_and_prior((5, 3, 4), prior)]
    mask = some_mask(mask_shape)
    clean = [tensor.double().requires_grad_() for tensor in inputs]
    poisoned = poison(inputs, mask)
    dims = tuple(range(-(2 if event_ndim is None else event_ndim), 0))
    expected = torch.where(mask, plain_kl(*clean), 0)
    expected = expected.sum(dims) if dims else expected
    kl = fastelbo.gaussian_kl(*poisoned, event_ndim=event_ndim, mask=mask, backend=backend)
    assert kl.isfinite().all()
    torch.testing.assert_close(kl, expected.to(kl.dtype))
    grads = torch.autograd.grad(kl.sum(), poisoned, retain_graph=True)
    again = torch.autograd.grad(kl.sum(), poisoned, create_graph=True)  # the differentiable backward
    wanted = torch.autograd.grad(expected.sum(), clean)
    for grad, other, want in zip(grads, again, wanted, strict=True):
        assert not grad.masked_select(~mask).any()
        assert not other.masked_select(~mask).any()
        torch.testing.assert_close(grad, want.to(dtype))
        torch.testing.assert_close(other, want.to(dtype))


def test_mask_over_broadcast_inputs(backend):
    """The gradient of what several elements share is the sum over those that count."""
    mean, logvar = gaussian((5, 4), dtype=torch.float64)
    mean_p, logvar_p = torch.tensor(0.3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (mean, logvar[:1], mean_p, logvar_p)]
    mask = some_mask((5, 4))
    kl = fastelbo.gaussian_kl(*inputs, mask=mask, backend=backend)
    expected = torch.where(mask, plain_kl(*inputs), 0).sum(1)
    torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))


@pytest.mark.parametrize("grad", ["zero", "straight_through", "inward"])
def test_mask_under_a_clamp(backend, grad):
    """What no element that counts asks for does not reach a shared value either."""
    scale = fastelbo.Scale("logvar", clamp=(-0.1, 0.1), clamp_grad=grad)
    mean, _ = gaussian((5, 4), dtype=torch.float64)
    s = torch.tensor([[-1.0], [0.0], [0.05], [2.0], [3.0]], dtype=torch.float64).requires_grad_()
    mask = some_mask((5, 4))
    kl = fastelbo.gaussian_kl(mean, s, mask=mask, scale=scale, backend=backend)
    expected = fastelbo.gaussian_kl(mean, s, event_ndim=0, scale=scale, backend=backend)
    upstream = mask.double()
    (got,) = torch.autograd.grad(kl.sum(), s)
    (want,) = torch.autograd.grad(expected, s, upstream)
    torch.testing.assert_close(got, want)


def test_mean_is_over_what_counts(backend):
    """Elements all 1/2: an event of n that count has n/2."""
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    for event_ndim, expected in ((1, (1.5 + 0.5) / 2), (0, 0.5), (2, 2.0)):
        kl = fastelbo.gaussian_kl(ones, zeros, mask=mask, event_ndim=event_ndim, reduction="mean", backend=backend)
        assert kl == expected
    frames = torch.tensor([[True], [False], [True]])
    assert fastelbo.gaussian_kl(ones, zeros, mask=frames, reduction="mean", backend=backend) == 2
    mean = ones.clone().requires_grad_()
    nothing = fastelbo.gaussian_kl(
        mean, zeros, mask=~torch.ones(4, dtype=torch.bool), reduction="mean", backend=backend
    )
    assert nothing.isnan()
    assert not torch.autograd.grad(nothing, mean)[0].any()


def test_masked_examples_have_no_floor(backend):
    ones, zeros, mask = torch.ones(3, 2), torch.zeros(3, 2), torch.tensor([[True, True], [True, False], [False, False]])
    for per, floor, expected in (
        ("dim", 2.0, [4, 2, 0]),
        ("example", 0.75, [1, 0.75, 0]),
        ("batch", 0.75, [0.75, 0.75, 0]),
    ):
        kl = fastelbo.gaussian_kl(ones, zeros, free_bits=floor, free_bits_per=per, mask=mask, backend=backend)
        assert kl.tolist() == expected, per


@pytest.mark.parametrize("mask_shape", [(1,), (3, 1), (3, 0)])
def test_mean_over_empty_events_does_not_depend_on_the_masks_shape(backend, mask_shape):
    """No element of theirs counts, so that the mean is over no event."""
    mean, mask = torch.zeros(3, 0), torch.ones(mask_shape, dtype=torch.bool)
    assert fastelbo.gaussian_kl(mean, mean, mask=mask, reduction="mean", backend=backend).isnan()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_a_broadcast_prior_are_rounded_once(backend, dtype):
    """A gradient of half precision for each of a thousand rows would lose what they leave when they are added."""
    mean_q, s_q = gaussian((1000, 8))
    mean_p, s_p = (tensor.requires_grad_() for tensor in gaussian((8,), dtype=dtype, seed=1))
    upstream = torch.randn(1000, 8)
    kl = fastelbo.gaussian_kl(mean_q, s_q, mean_p, s_p, event_ndim=0, backend=backend)
    grads = torch.autograd.grad(kl, (mean_p, s_p), upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in (mean_p, s_p)]
    exact = torch.autograd.grad(plain_kl(mean_q.double(), s_q.double(), *wide), wide, upstream.double())
    for grad, want in zip(grads, exact, strict=True):
        assert ((grad.double() - want).abs() <= 0.51 * torch.finfo(dtype).eps * want.abs() + 1e-4).all()
