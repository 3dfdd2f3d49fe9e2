"""Reparameterised sampling: values, gradients, shapes and dtypes. The noise itself has tests/test_noise.py."""

import pytest
import torch

import fastelbo
from fastelbo.testing import assert_within_budget, gaussian, plain_rsample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_budget(backend, dtype):
    mean, logvar = gaussian((31, 65), dtype=dtype)
    noise = torch.randn(31, 65).to(dtype)

    def run(function, dtype):
        arguments = [tensor.to(dtype).requires_grad_() for tensor in (mean, logvar)]
        z = function(*arguments, noise.to(dtype))
        return z.detach(), *torch.autograd.grad(z.sum(), arguments)

    actual = run(lambda m, s, n: fastelbo.gaussian_rsample(m, s, noise=n, backend=backend), dtype)
    for name, *three in zip(
        ("z", "d_mean", "d_s"), actual, run(plain_rsample, torch.float64), run(plain_rsample, dtype), strict=True
    ):
        assert_within_budget(*three, name=name)


def test_backends_agree():
    mean, logvar = gaussian((7, 33), requires_grad=True)
    upstream = torch.randn(7, 33)
    results = []
    for backend in ("reference", "cpu"):
        z = fastelbo.gaussian_rsample(mean, logvar, seed=5, backend=backend)
        results.append((z, *torch.autograd.grad(z, (mean, logvar), upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_samples", [None, 1, 5])
def test_samples_share_mean_and_scale(backend, num_samples):
    mean, logvar = gaussian((4, 300), requires_grad=True)
    noise = torch.randn(() if num_samples is None else (num_samples, 1, 1)) + torch.randn(4, 300)
    z = fastelbo.gaussian_rsample(mean, logvar, noise=noise, num_samples=num_samples, backend=backend)
    expected = plain_rsample(mean, logvar, noise)
    torch.testing.assert_close(z, expected)
    upstream = torch.randn_like(z)
    for got, want in zip(
        torch.autograd.grad(z, (mean, logvar), upstream),
        torch.autograd.grad(expected, (mean, logvar), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mean_shape", "s_shape"), [((4, 6), (6,)), ((6,), (4, 6)), ((4, 1), (1, 6)), ((4, 6), ()), ((), (4, 6)), ((), ())]
)
def test_broadcasting(backend, mean_shape, s_shape):
    mean, logvar = gaussian(mean_shape, requires_grad=True)[0], gaussian(s_shape, seed=1, requires_grad=True)[1]
    noise = torch.randn(torch.broadcast_shapes(mean_shape, s_shape))
    z = fastelbo.gaussian_rsample(mean, logvar, noise=noise, backend=backend)
    expected = plain_rsample(mean, logvar, noise)
    torch.testing.assert_close(z, expected)
    for got, want in zip(
        torch.autograd.grad(z.sum(), (mean, logvar)), torch.autograd.grad(expected.sum(), (mean, logvar)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_numbers(backend):
    noise = torch.randn(3, 4)
    z = fastelbo.gaussian_rsample(torch.ones(3, 4), 0.5, scale="std", noise=noise, backend=backend)
    torch.testing.assert_close(z, 1 + 0.5 * noise)
    z = fastelbo.gaussian_rsample(2.0, torch.zeros(3, 4), noise=noise, backend=backend)
    torch.testing.assert_close(z, 2 + noise)


@pytest.mark.parametrize("mean_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("s_dtype", [*DTYPES, torch.float64], ids=str)
def test_dtype_is_what_torch_promotes_to(backend, mean_dtype, s_dtype):
    mean, logvar = gaussian((2, 3), dtype=mean_dtype)[0], gaussian((2, 3), dtype=s_dtype)[1]
    z = fastelbo.gaussian_rsample(mean, logvar, seed=0, backend=backend)
    assert z.dtype == torch.promote_types(mean_dtype, s_dtype)
    scalar = fastelbo.gaussian_rsample(mean, logvar[0, 0], seed=0, backend=backend)
    assert scalar.dtype == mean_dtype
    exact = fastelbo.gaussian_rsample(mean.double(), logvar.double(), seed=0, backend=backend)
    unit = torch.finfo(z.dtype).eps if z.dtype.itemsize == 2 else 1e-6
    torch.testing.assert_close(z.double(), exact, rtol=unit, atol=unit)


def test_out_dtype_keeps_noise_below_half_a_unit(backend):
    """In bfloat16 ten plus a thousandth of noise is ten."""
    mean, std = torch.full((1000,), 10.0, dtype=torch.bfloat16), torch.full((1000,), 1e-3, dtype=torch.bfloat16)
    z = fastelbo.gaussian_rsample(mean, std, scale="std", out_dtype=torch.float32, backend=backend)
    assert z.dtype == torch.float32
    assert z.unique().numel() > 800  # float32 has about 6000 numbers there, so some 130 of 1000 draws coincide


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_bad_values_stay_with_their_element(backend, value):
    mean, logvar = gaussian((3, 40))
    logvar[1, 20] = value
    z = fastelbo.gaussian_rsample(mean, logvar, backend=backend)
    assert not z[1, 20].isfinite()
    assert z.isfinite().sum() == 119


def test_zero_std_gives_the_mean(backend):
    mean = torch.randn(50)
    assert torch.equal(fastelbo.gaussian_rsample(mean, torch.zeros(50), scale="std", backend=backend), mean)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_samples", [None, 64], ids=str)
def test_gradients_that_are_summed_are_rounded_once(backend, wide, num_samples):
    """Of a half-precision sample, and of half-precision parameters: after the sum, not before."""
    shape = (64, 512) if num_samples is None else (512,)
    noise, upstream = torch.randn(64, 512), torch.randn(64, 512).bfloat16()
    mean, s = torch.zeros(512, dtype=wide, requires_grad=True), torch.zeros(512, dtype=torch.bfloat16)
    s.requires_grad_()
    full = torch.zeros(shape, dtype=wide).requires_grad_()  # what mean and s broadcast with, without samples
    options = {"noise": noise.to(wide), "num_samples": num_samples, "out_dtype": torch.bfloat16, "backend": backend}
    z = fastelbo.gaussian_rsample(mean, s if num_samples else full, **options)
    (d_mean,) = torch.autograd.grad(z, mean, upstream)
    exact = upstream.double().sum(0)
    assert (d_mean - exact).abs().max() <= 64 * torch.finfo(wide).eps * upstream.abs().max()
    z = fastelbo.gaussian_rsample(mean if num_samples else full, s, **options)
    (d_s,) = torch.autograd.grad(z, s, upstream)
    exact = (upstream.double() * noise.double()).sum(0) / 2
    assert torch.equal(d_s, exact.bfloat16()) or (d_s - exact).abs().max() <= 2**-8 * exact.abs().max()
    off = (d_s.double() - exact).abs() / exact.abs()
    assert off.max() <= 2**-8 * 1.01  # half a unit of its own


def test_num_samples_needs_a_dimension(backend):
    mean = torch.zeros([1] * 64)
    assert fastelbo.gaussian_rsample(mean, 0.0, backend=backend).dim() == 64
    message = "num_samples must make no more than 64 dimensions; got 3 in front of 64"
    for function in (fastelbo.gaussian_rsample, fastelbo.gaussian_rsample_kl):
        with pytest.raises(ValueError, match=message):
            function(mean, 0.0, num_samples=3, backend=backend)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (), (0, 3), (1,) * 15 + (2,)], ids=str)
def test_shortcut_is_the_long_way_with_the_seed_that_torch_draws(shape, wanted, dtype):
    def results(**seed):
        generator = torch.Generator().manual_seed(1)
        tensors = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3)]
        inputs = [tensor.requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=False)]
        z = fastelbo.gaussian_rsample(*inputs, **seed)
        inputs = [tensor for tensor in inputs if tensor.requires_grad]
        if not inputs:
            return [z]
        first = torch.autograd.grad(z, inputs, tensors[2], retain_graph=True)
        again = torch.autograd.grad(z, inputs, tensors[2], create_graph=True)
        twice = torch.autograd.grad(again[-1].sum(), inputs[-1]) if wanted[1] else ()
        return [z, *first, *again, *twice]

    torch.manual_seed(0)
    short, after = results(), torch.rand(())
    torch.manual_seed(0)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    assert torch.rand(()) == after
    for a, b in zip(short, results(seed=seed), strict=True):
        assert a.dtype == dtype and torch.equal(a, b)
