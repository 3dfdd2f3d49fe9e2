"""Scale: every kind and stabiliser, on every backend, against formulas in float64 and against the originals."""

import dataclasses
import math
import pickle

import mpmath
import pytest
import torch

import fastelbo
from fastelbo.testing import gaussian

FORMULAS = {
    "logvar": lambda s: torch.exp(s / 2),
    "log_std": torch.exp,
    "std": lambda s: s,
    "var": torch.sqrt,
    "softplus": torch.nn.functional.softplus,
}

VARIANTS = [
    *(fastelbo.Scale(kind) for kind in FORMULAS),
    *(fastelbo.Scale(kind, min_std=0.1) for kind in FORMULAS),
    *(fastelbo.Scale(kind, var_eps=0.01, min_std=0.05) for kind in FORMULAS),
    *(fastelbo.Scale(kind, clamp=(0.2, 1.5)) for kind in FORMULAS),
    *(fastelbo.Scale(kind, clamp=(0.2, math.inf), clamp_grad="straight_through") for kind in FORMULAS),
    fastelbo.Scale("logvar", soft_clamp=2.0),
    fastelbo.Scale("log_std", soft_clamp=5.0, clamp=(-1.0, 1.0)),
    fastelbo.Scale("softplus", beta=math.log(2)),
    fastelbo.Scale("softplus", beta=3.0, min_std=1e-4),
    fastelbo.Scale.diffusers(),
    fastelbo.Scale.softplus(),
    fastelbo.Scale.nvae(),
    fastelbo.Scale.gaussian_nll_loss(),
]


def name(scale):
    changed = (f for f in dataclasses.fields(scale) if f.name != "kind" and getattr(scale, f.name) != f.default)
    return "-".join([scale.kind, *(f"{f.name}={getattr(scale, f.name)}" for f in changed)])


def std_of(scale, s):
    """The formulas of Scale's docstring, with the gradient of clamp_grad, in plain torch."""
    if scale.clamp is not None:
        limited = s.clamp(*scale.clamp)
        s = s + (limited - s).detach() if scale.clamp_grad == "straight_through" else limited
    if scale.soft_clamp is not None:
        s = scale.soft_clamp * torch.tanh(s / scale.soft_clamp)
    if scale.kind == "softplus":
        std = torch.nn.functional.softplus(s, beta=scale.beta)
    else:
        std = FORMULAS[scale.kind](s)
    return torch.sqrt((std + scale.min_std) ** 2 + scale.var_eps) if scale.var_eps else std + scale.min_std


@pytest.mark.parametrize("scale", VARIANTS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_standard_deviation_and_gradient(backend, scale, dtype):
    mean, s = gaussian((9, 70), kind=scale.kind, dtype=dtype, requires_grad=True)
    noise = torch.randn(9, 70, dtype=dtype)
    z = fastelbo.gaussian_rsample(mean, s, scale=scale, noise=noise, backend=backend)
    (d_s,) = torch.autograd.grad(z.sum(), s)
    exact_s = s.detach().double().requires_grad_()
    exact = mean.detach().double() + std_of(scale, exact_s) * noise.double()
    (exact_d_s,) = torch.autograd.grad(exact.sum(), exact_s)
    # a few roundings of the largest intermediate value; the gradient of var and of a limit magnifies by 1 / sigma
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(z.double(), exact, rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(d_s.double(), exact_d_s, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("scale", VARIANTS, ids=name)
def test_kl_and_log_prob_of_every_scale(backend, scale):
    """Against torch.distributions in float64, value and gradient, as q and as p."""
    mean_q, s_q = gaussian((5, 60), kind=scale.kind, dtype=torch.float64)
    mean_p, s_p = gaussian((5, 60), kind=scale.kind, dtype=torch.float64, seed=1)
    inputs = [tensor.requires_grad_() for tensor in (mean_q, s_q, mean_p, s_p)]
    q, p = (
        torch.distributions.Normal(mean_q, std_of(scale, s_q)),
        torch.distributions.Normal(mean_p, std_of(scale, s_p)),
    )
    expected = torch.distributions.kl_divergence(q, p) + p.log_prob(mean_q)
    actual = fastelbo.gaussian_kl(*inputs, scale=scale, event_ndim=0, backend=backend)
    actual = actual + fastelbo.gaussian_log_prob(mean_q, mean_p, s_p, scale=scale, event_ndim=0, backend=backend)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("broadcast", [False, True], ids=["full", "broadcast"])
def test_inward_clamp_passes_what_moves_the_value_back(backend, broadcast):
    scale = fastelbo.Scale("logvar", clamp=(-1.0, 1.0), clamp_grad="inward")
    s = torch.tensor([-2.0, -2.0, 0.0, 0.0, 2.0, 2.0], requires_grad=True)
    upstream = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    passes = torch.tensor([False, True, True, True, True, False])
    rows = 3 if broadcast else 1
    mean = torch.zeros(rows, 6)
    noise = torch.ones(rows, 6)
    if broadcast:  # the sign that counts is that of the sum over the rows
        noise = torch.tensor([[2.0], [-3.0], [5.0]]).expand(3, 6)
    z = fastelbo.gaussian_rsample(
        mean, s.expand(rows, 6) if not broadcast else s, scale=scale, noise=noise, backend=backend
    )
    (d_s,) = torch.autograd.grad((z * upstream).sum(), s)
    std = torch.exp(0.5 * s.detach().clamp(-1, 1))
    torch.testing.assert_close(d_s, torch.where(passes, 0.5 * std * upstream * noise.sum(0), 0.0))


@pytest.mark.parametrize("prior", [0.55, 0.45, None])
def test_inward_clamp_sees_the_whole_gradient(backend, prior):
    """Also where it is a sum of several, of which some have the other sign."""
    limits = {"clamp": (0.5, math.inf), "clamp_grad": "inward"}
    for kind, more in (("logvar", {"var_eps": 1e-2}), ("std", {"var_eps": 0.2}), ("softplus", {"min_std": 0.02})):
        s_q = torch.tensor([-1.0, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
        s_p = None if prior is None else torch.tensor(prior, dtype=torch.float64)
        mean_p = None if prior is None else 0.0
        limited, free = fastelbo.Scale(kind, **limits, **more), fastelbo.Scale(kind, **more)
        kl = fastelbo.gaussian_kl(
            0.0, s_q, mean_p, s_p, scale=limited, scale_p=prior and free, event_ndim=0, backend=backend
        )
        inside = s_q.detach().clamp(min=0.5).requires_grad_()
        sigma, of_prior = std_of(free, inside), std_of(free, s_p) if prior else torch.ones(())
        exact = torch.distributions.kl_divergence(
            torch.distributions.Normal(0.0, sigma), torch.distributions.Normal(0.0, of_prior)
        )
        (whole,) = torch.autograd.grad(exact.sum(), inside)
        (d_s,) = torch.autograd.grad(kl.sum(), s_q)
        torch.testing.assert_close(d_s, torch.where((s_q < 0.5) & (whole > 0), 0.0, whole))


def test_gaussian_nll_loss_preset_is_the_module():
    mean, target = gaussian((8, 5))
    var = torch.rand(8, 5).mul(1e-5).requires_grad_()
    ours = fastelbo.gaussian_nll(target, mean, var, scale=fastelbo.Scale.gaussian_nll_loss(), event_ndim=0)
    theirs = torch.nn.functional.gaussian_nll_loss(mean, target, var, full=True, reduction="none")
    torch.testing.assert_close(ours, theirs)
    for got, want in zip(torch.autograd.grad(ours.sum(), var), torch.autograd.grad(theirs.sum(), var), strict=True):
        torch.testing.assert_close(got, want)


def test_softplus_stands_what_overflows_today(backend):
    rho = torch.tensor([-200.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0], dtype=torch.float32)
    kl = fastelbo.gaussian_kl(0.0, rho, scale="softplus", event_ndim=0, backend=backend)
    # -ln softplus(rho) is -rho far below zero; above, softplus(rho) is rho
    expected = torch.tensor([199.5, 99.5, 19.5])
    torch.testing.assert_close(kl[:3], expected)
    torch.testing.assert_close(kl[4:], 0.5 * (rho[4:] ** 2 - 1) - rho[4:].log())


def test_is_frozen_hashable_and_picklable():
    scale = fastelbo.Scale("softplus", clamp=(-5, 5), min_std=0.1)
    assert scale == fastelbo.Scale("softplus", clamp=(-5.0, 5.0), min_std=0.1)
    assert hash(scale) == hash(dataclasses.replace(scale))
    with pytest.raises(TypeError, match="positional"):
        fastelbo.Scale("logvar", (-1.0, 1.0))
    assert pickle.loads(pickle.dumps(scale)) == scale
    with pytest.raises(dataclasses.FrozenInstanceError):
        scale.kind = "std"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "sigma"}, ValueError, "scale must be one of logvar, log_std, std, var, softplus; got 'sigma'"),
        ({"clamp_grad": "none"}, ValueError, "clamp_grad must be one of"),
        ({"clamp": (1.0, -1.0)}, ValueError, "clamp must have lo < hi"),
        ({"clamp": (math.nan, 1.0)}, ValueError, "clamp must have lo < hi"),
        ({"clamp": 3.0}, TypeError, "clamp must be a pair of numbers"),
        ({"soft_clamp": 0.0}, ValueError, "soft_clamp must be positive and finite; got 0.0"),
        ({"min_std": -1.0}, ValueError, "min_std must be at least 0"),
        ({"var_eps": math.inf}, ValueError, "var_eps must be at least 0 and finite"),
        ({"beta": 0}, ValueError, "beta must be positive"),
        ({"beta": "1"}, TypeError, "beta must be a number; got str"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        fastelbo.Scale(**{"kind": "logvar", **arguments})


# Results that are small against their terms: sigma close to 1, or to the prior's, on every scale whose sigma is rounded


def exact_kl(scale, s_q, s_p, mean=0.0):
    """KL of N(mean, sigma(s_q)^2) from N(0, sigma(s_p)^2), or from N(0, 1) where s_p is None, in 60 digits."""

    def sigma(s):
        if s is None:
            return mpmath.mpf(1)
        if scale.clamp is not None:
            s = min(max(s, scale.clamp[0]), scale.clamp[1])
        if scale.soft_clamp is not None:
            s = scale.soft_clamp * mpmath.tanh(s / mpmath.mpf(scale.soft_clamp))
        own = {
            "logvar": lambda: mpmath.exp(s / 2),
            "log_std": lambda: mpmath.exp(s),
            "std": lambda: s,
            "var": lambda: mpmath.sqrt(s),
            "softplus": lambda: mpmath.log1p(mpmath.exp(scale.beta * s)) / scale.beta,
        }[scale.kind]()
        return mpmath.sqrt((own + scale.min_std) ** 2 + scale.var_eps)

    q, p = sigma(s_q), sigma(s_p)
    return (((q / p) ** 2 - 1) / 2 - mpmath.log(q / p)) + (mean / p) ** 2 / 2


#: And the raw value whose sigma is 1.
CLOSE = [
    (fastelbo.Scale("std"), 1.0),
    (fastelbo.Scale("std", min_std=0.3), 0.7),
    (fastelbo.Scale("std", var_eps=0.2), math.sqrt(0.8)),
    (fastelbo.Scale("var"), 1.0),
    (fastelbo.Scale("var", var_eps=1e-3), 0.999),
    (fastelbo.Scale("var", var_eps=0.01, min_std=0.05), (math.sqrt(0.99) - 0.05) ** 2),
    (fastelbo.Scale("softplus"), math.log(math.e - 1)),
    (fastelbo.Scale("softplus", beta=20.0), 1.0),
    (fastelbo.Scale("softplus", beta=0.7), math.log(math.expm1(0.7)) / 0.7),
    (fastelbo.Scale("softplus", beta=0.3, min_std=0.9), math.log(math.expm1(0.03)) / 0.3),
    (fastelbo.Scale("softplus", var_eps=0.5, min_std=0.1, clamp=(-3.0, 3.0)), math.log(math.expm1(0.5**0.5 - 0.1))),
    (fastelbo.Scale.softplus(), math.log(math.expm1(1 - 1e-4))),
    (fastelbo.Scale("logvar", min_std=0.1), 2 * math.log(0.9)),
    (fastelbo.Scale("logvar", var_eps=1e-6), math.log(1 - 1e-6)),
    (fastelbo.Scale("logvar", soft_clamp=2.0), 0.0),
    (fastelbo.Scale("log_std", soft_clamp=5.0), 0.0),
    (fastelbo.Scale.nvae(), 5 * math.atanh(math.log(0.99) / 5)),
    (fastelbo.Scale("softplus", soft_clamp=3.0, min_std=0.01), 3 * math.atanh(math.log(math.expm1(0.99)) / 3)),
]
BOUND = {torch.float32: 1e-6, torch.float64: 2e-15}


@pytest.mark.parametrize(
    ("scale", "unit"), CLOSE, ids=lambda value: name(value) if not isinstance(value, float) else ""
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_near_the_standard_normal_equals_sixty_digits(backend, scale, unit, dtype):
    offsets = [0.0, 1e-9, -1e-8, 7e-8, -1e-7, 1e-6, -1e-5, 1e-4, -1e-3, 1e-2, -0.03, 0.1, -0.1]
    s = torch.tensor([unit + offset for offset in offsets], dtype=dtype, requires_grad=True)
    kl = fastelbo.gaussian_kl(0.0, s, scale=scale, event_ndim=0, backend=backend)
    (d_s,) = torch.autograd.grad(kl.sum(), s)
    with mpmath.workdps(60):
        for raw, got, slope in zip(s.tolist(), kl.tolist(), d_s.tolist(), strict=True):
            exact = exact_kl(scale, mpmath.mpf(raw), None)
            assert abs(got - exact) <= BOUND[dtype] * exact, (raw, got, float(exact))
            exact = mpmath.diff(lambda t: exact_kl(scale, t, None), mpmath.mpf(raw))
            assert abs(slope - exact) <= BOUND[dtype] * abs(exact) + mpmath.mpf(10) ** -25, (raw, slope, float(exact))


@pytest.mark.parametrize(
    ("scale", "unit"), CLOSE, ids=lambda value: name(value) if not isinstance(value, float) else ""
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_near_a_learned_prior_equals_sixty_digits(backend, scale, unit, dtype):
    centres = [unit, unit + 1.5, unit + 7.0, 0.3 * unit]
    s_p = torch.tensor([s for s in centres for _ in range(7)], dtype=dtype)
    factors = [1e-7, -1e-6, 1e-5, -1e-4, 1e-3, 0.01, 0.0]
    s_q = s_p * (1 + torch.tensor(factors, dtype=dtype).repeat(len(centres)))
    kl = fastelbo.gaussian_kl(0.0, s_q, 0.0, s_p, scale=scale, event_ndim=0, backend=backend)
    with mpmath.workdps(60):
        for q, p, got in zip(s_q.tolist(), s_p.tolist(), kl.tolist(), strict=True):
            exact = exact_kl(scale, mpmath.mpf(q), mpmath.mpf(p))
            assert abs(got - exact) <= BOUND[dtype] * exact, (q, p, got, float(exact))


@pytest.mark.parametrize(
    ("scale", "unit"), CLOSE, ids=lambda value: name(value) if not isinstance(value, float) else ""
)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_from_near_to_far_equals_sixty_digits(backend, scale, unit, dtype):
    """Where one formula takes over from another: distances of ln 2 of a softplus, half a soft clamp, and about them."""
    of = 1 / scale.beta if scale.kind == "softplus" else 1.0
    distances = [0.2, 0.45, 0.68, 0.6875, 0.7, 0.99, 1.0, 1.01, 1.49, 1.5, 1.51, 2.49, 2.5, 2.51, 4.0]
    s = torch.tensor([unit + sign * of * distance for distance in distances for sign in (1, -1)], dtype=dtype)
    s = s[(s > 0) | (scale.kind not in ("std", "var"))]
    alone = fastelbo.gaussian_kl(0.0, s, scale=scale, event_ndim=0, backend=backend)
    beside = fastelbo.gaussian_kl(
        0.0, s, 0.0, torch.tensor(unit, dtype=dtype), scale=scale, event_ndim=0, backend=backend
    )
    with mpmath.workdps(60):
        p = mpmath.mpf(torch.tensor(unit, dtype=dtype).item())
        for raw, *two in zip(s.tolist(), alone.tolist(), beside.tolist(), strict=True):
            for got, prior in zip(two, (None, p), strict=True):
                exact = exact_kl(scale, mpmath.mpf(raw), prior)
                assert abs(got - exact) <= 2 * BOUND[dtype] * exact, (raw, prior, got, float(exact))


def test_softplus_near_the_prior_by_hand(backend):
    kl = fastelbo.gaussian_kl(0.0, torch.tensor(0.541325), scale="softplus", event_ndim=0, backend=backend)
    torch.testing.assert_close(kl.item(), 5.6076e-15, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_softplus_far_below_zero(backend, dtype):
    """Where sigma is all but exp(s), and where the type has no such number any more."""
    double = dtype == torch.float64
    s = torch.tensor([-16.9, -17.1, -20.0, -30.0, -36.9, -37.1, -60.0, -86.0, -104.0, -200.0, -800.0], dtype=dtype)
    nll = fastelbo.gaussian_nll(0.0, 0.0, s, scale="softplus", event_ndim=0, backend=backend)
    with mpmath.workdps(60):
        for raw, got in zip(s.tolist(), nll.tolist(), strict=True):
            exact = mpmath.log(mpmath.log1p(mpmath.exp(mpmath.mpf(raw)))) + mpmath.log(2 * mpmath.pi) / 2
            assert abs(got - exact) <= (4e-16 if double else 2e-7) * abs(exact), raw
    same = fastelbo.gaussian_kl(0.0, s, 0.0, s, scale="softplus", event_ndim=0, backend=backend)
    assert not same.any()
    other = s * (1 + 1e-4)
    kl = fastelbo.gaussian_kl(0.0, other, 0.0, s, scale="softplus", event_ndim=0, backend=backend)
    with mpmath.workdps(60):
        for q, p, got in zip(other.tolist(), s.tolist(), kl.tolist(), strict=True):
            exact = exact_kl(fastelbo.Scale("softplus"), mpmath.mpf(q), mpmath.mpf(p))
            assert abs(got - exact) <= BOUND[dtype] * exact, (q, p)


@pytest.mark.parametrize("kind", ["logvar", "log_std", "softplus"])
@pytest.mark.parametrize("log_std", [-80.0, -88.5, -95.0, -100.0, -103.5], ids=str)
def test_a_prior_whose_inverse_overflows(backend, kind, log_std):
    """1 / sigma is no float32 there; the quotient of a small distance and sigma is."""
    s_p = torch.tensor([log_std * (2 if kind == "logvar" else 1)], requires_grad=True)
    mean = torch.tensor([0.0, 1e-30, -3e-32], requires_grad=True)
    kl = fastelbo.gaussian_kl(mean, s_p, 0.0, s_p, scale=kind, event_ndim=0, backend=backend)
    r = mean.detach().double() * math.exp(-s_p.double().item() * (0.5 if kind == "logvar" else 1))
    torch.testing.assert_close(kl.double(), 0.5 * r * r, rtol=1e-6, atol=0)
    x = fastelbo.gaussian_nll(mean, 0.0, s_p, scale=kind, event_ndim=0, backend=backend)
    torch.testing.assert_close(x.double(), 0.5 * r * r + log_std + 0.5 * math.log(2 * math.pi), rtol=1e-6, atol=0)
    none = torch.zeros(1, requires_grad=True)
    kl = fastelbo.gaussian_kl(none, s_p, 0.0, s_p, scale=kind, event_ndim=0, backend=backend)
    for grad in torch.autograd.grad(kl, (none, s_p)):
        assert not grad.any()


@pytest.mark.parametrize("kind", ["logvar", "log_std"])
@pytest.mark.parametrize("ratio", [0.5, 2.0, 5.0, 9.0])
def test_the_slope_of_a_soft_clamp_keeps_its_digits(backend, kind, ratio):
    """1 - tanh^2, where tanh is all but 1."""
    c = 2.0
    s = torch.tensor([ratio * c, -ratio * c], requires_grad=True)
    z = fastelbo.gaussian_rsample(
        torch.zeros(2), s, scale=fastelbo.Scale(kind, soft_clamp=c), noise=torch.ones(2), backend=backend
    )
    (d_s,) = torch.autograd.grad(z.sum(), s)
    x, factor = s.detach().double() / c, 0.5 if kind == "logvar" else 1.0
    exact = factor / torch.cosh(x) ** 2 * torch.exp(factor * c * torch.tanh(x))
    torch.testing.assert_close(d_s.double(), exact, rtol=2e-6, atol=0)


def test_limits_of_float32_and_what_is_no_number():
    for arguments, error, message in (
        ({"soft_clamp": 1e300}, ValueError, "soft_clamp must be positive and finite in float32; got 1e+300"),
        ({"soft_clamp": 1e-300}, ValueError, "soft_clamp must be positive and finite in float32; got 1e-300"),
        ({"min_std": 1e300}, ValueError, "min_std must be at least 0 and finite in float32; got 1e+300"),
        ({"beta": 10**400}, ValueError, "beta must be positive and finite in float32"),
        ({"min_std": None}, TypeError, "min_std must be a number; got NoneType"),
        ({"var_eps": None}, TypeError, "var_eps must be a number; got NoneType"),
        ({"beta": None}, TypeError, "beta must be a number; got NoneType"),
        ({"clamp": (0, 10**400)}, TypeError, "clamp must be a pair of numbers"),
    ):
        with pytest.raises(error) as caught:
            fastelbo.Scale("softplus", **arguments)
        assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["std", "softplus"])
def test_gradients_of_huge_sigmas(backend, kind):
    """sigma^2 is no float32 there; its slope by sigma is."""
    s = torch.tensor([1e15, 1e20, 1e25, 1e30], requires_grad=True)
    kl = fastelbo.gaussian_kl(0.0, s, scale=kind, event_ndim=0, backend=backend)
    (d_s,) = torch.autograd.grad(kl.sum(), s)
    torch.testing.assert_close(d_s, s.detach(), rtol=1e-6, atol=0)
    s_p = torch.tensor([1e5, 1e7, 1e10, 1e15], requires_grad=True)
    kl = fastelbo.gaussian_kl(0.0, s, 0.0, s_p, scale=kind, event_ndim=0, backend=backend)
    d_s, d_s_p = torch.autograd.grad(kl.sum(), (s, s_p))
    k = s.detach().double() / s_p.detach().double()
    torch.testing.assert_close(d_s.double(), k / s_p.detach().double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(d_s_p.double(), -k * k / s_p.detach().double(), rtol=1e-6, atol=0)
    x = torch.tensor([1e20, 1e25, 1e27, 1e30])
    nll = fastelbo.gaussian_nll(x, 0.0, s_p, scale=kind, event_ndim=0, backend=backend)
    (d_s_p,) = torch.autograd.grad(nll.sum(), s_p)
    r = x.double() / s_p.detach().double()
    torch.testing.assert_close(d_s_p.double(), -r * r / s_p.detach().double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scale", "unit"), CLOSE, ids=lambda value: name(value) if not isinstance(value, float) else ""
)
def test_gradients_near_a_learned_prior(backend, scale, unit):
    """Those by sigma are as small as the distance of the two, and opposite to the first order."""
    s_p = torch.tensor([unit + 0.1, unit + 1.0, unit + 4.0]).repeat(4)
    s_q = (s_p * (1 + torch.tensor([1e-6, -1e-5, 1e-4, 1e-2]).repeat_interleave(3))).requires_grad_()
    s_p.requires_grad_()
    kl = fastelbo.gaussian_kl(0.0, s_q, 0.0, s_p, scale=scale, event_ndim=0, backend=backend)
    grads = torch.autograd.grad(kl.sum(), (s_q, s_p))
    with mpmath.workdps(60):
        for q, p, d_q, d_p in zip(*(tensor.tolist() for tensor in (s_q, s_p, *grads)), strict=True):
            q, p = mpmath.mpf(q), mpmath.mpf(p)
            exact = mpmath.diff(lambda t, p=p: exact_kl(scale, t, p), q)
            assert abs(d_q - exact) <= 1e-6 * abs(exact), (q, p)
            exact = mpmath.diff(lambda t, q=q: exact_kl(scale, q, t), p)
            assert abs(d_p - exact) <= 1e-6 * abs(exact), (q, p)


@pytest.mark.parametrize("minimum", [-6.0, -3.5, 0.5, -80.0])
@pytest.mark.parametrize("kind", ["log_std", "logvar"])
def test_softclip(backend, kind, minimum):
    """min + softplus(s - min), as it is written, in float64."""
    home = torch.get_default_device()
    x, mean, s = (torch.randn(7, 40, generator=torch.Generator("cpu").manual_seed(i), device="cpu") for i in range(3))
    s = (6 * s + min(max(minimum, -8), 0)).clamp(min=-20)
    scale = fastelbo.Scale.softclip(minimum, kind)

    def clipped(s):
        return minimum + torch.nn.functional.softplus(s - minimum, threshold=1e9)

    leaves = [t.to(home).requires_grad_() for t in (x, mean, s)]
    exact = [t.double().requires_grad_() for t in (x, mean, s)]
    logvar = clipped(exact[2]) * (2 if kind == "log_std" else 1)
    wanted = {
        "nll": 0.5 * (((exact[0] - exact[1]) ** 2 * (-logvar).exp() + logvar).sum(1) + 40 * math.log(2 * math.pi)),
        "kl": 0.5 * (exact[1] ** 2 + logvar.exp() - 1 - logvar).sum(1),
        "z": exact[1] + (0.5 * logvar).exp() * exact[0],
    }
    options = {"scale": scale, "backend": backend}
    found = {
        "nll": fastelbo.gaussian_nll(*leaves, **options),
        "kl": fastelbo.gaussian_kl(*leaves[1:], **options),
        "z": fastelbo.gaussian_rsample(*leaves[1:], noise=leaves[0].detach(), **options),
    }
    for name, value in found.items():
        torch.testing.assert_close(value.double().cpu(), wanted[name], rtol=2e-5, atol=1e-5)
        grads = torch.autograd.grad(value.sum(), leaves[1:], retain_graph=True)
        for grad, want in zip(
            grads, torch.autograd.grad(wanted[name].sum(), exact[1:], retain_graph=True), strict=True
        ):
            torch.testing.assert_close(grad.double().cpu(), want, rtol=1e-4, atol=1e-5)


def test_softclip_bad_input():
    for arguments, error, message in (
        (("low",), TypeError, "minimum must be a number; got str"),
        ((100.0,), ValueError, "minimum must be one whose exponential is finite in float32; got 100.0"),
        ((1e6,), ValueError, "minimum must be one whose exponential is finite"),
        ((-6, "std"), ValueError, "kind must be one of log_std, logvar; got 'std'"),
    ):
        with pytest.raises(error, match=message):
            fastelbo.Scale.softclip(*arguments)
    assert fastelbo.Scale.softclip(-6) == fastelbo.Scale("log_std", min_std=math.exp(-6))
