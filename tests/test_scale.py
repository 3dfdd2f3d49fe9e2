"""Scale: every kind and stabiliser, on every backend, against formulas in float64 and against the originals."""

import dataclasses
import math
import pickle

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
