"""A sample and its KL in one pass equal the two ops."""

import pytest
import torch

import fastelbo
from fastelbo.testing import gaussian


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("shape", [(5, 33), (3, 4, 50), (2, 3000), (2, 5000)], ids=str)
def test_equals_the_two_ops(backend, dtype, prior, num_samples, shape):
    """Bit for bit forward; the gradients are rounded once where the two ops' are rounded and added.

    On a GPU a row that starts inside a block of four normals is read from the block's start: its KL is then summed in
    another order.
    """
    inputs = [*gaussian(shape, dtype=dtype), *(gaussian(shape, dtype=dtype, seed=1) if prior else ())]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    draw = {"seed": 11, "num_samples": num_samples, "backend": backend}
    z, kl = fastelbo.gaussian_rsample_kl(*inputs, **draw)
    z_alone = fastelbo.gaussian_rsample(*inputs[:2], **draw)
    kl_alone = fastelbo.gaussian_kl(*inputs, backend=backend)
    assert torch.equal(z, z_alone)
    if backend in ("reference", "cpu") or shape[-1] % 4 == 0:
        assert torch.equal(kl, kl_alone)
    else:
        torch.testing.assert_close(kl, kl_alone, rtol=4 * torch.finfo(kl.dtype).eps, atol=0)
    upstream = torch.randn_like(z), torch.randn_like(kl)
    eps = torch.finfo(dtype).eps
    for got, want in zip(
        torch.autograd.grad((z, kl), inputs, upstream),
        torch.autograd.grad((z_alone, kl_alone), inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * want.abs().max().item())


@pytest.mark.parametrize("event_ndim", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_event_and_reduction_do_not_touch_the_sample(backend, event_ndim, reduction):
    mean, logvar = gaussian((2, 3, 4))
    z, kl = fastelbo.gaussian_rsample_kl(
        mean, logvar, seed=1, event_ndim=event_ndim, reduction=reduction, backend=backend
    )
    assert torch.equal(z, fastelbo.gaussian_rsample(mean, logvar, seed=1, backend=backend))
    expected = fastelbo.gaussian_kl(mean, logvar, event_ndim=event_ndim, reduction=reduction, backend=backend)
    assert torch.equal(kl, expected)


def test_temperature_does_not_touch_the_kl(backend):
    mean, logvar = gaussian((4, 9))
    z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=1, temperature=0.0, backend=backend)
    assert torch.equal(z, mean)
    assert torch.equal(kl, fastelbo.gaussian_rsample_kl(mean, logvar, seed=1, backend=backend)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_within_the_budget_of_plain_torch(backend, dtype):
    from fastelbo.testing import assert_within_budget, plain_kl, plain_rsample

    inputs, noise = gaussian((40, 50), dtype=dtype), torch.randn(40, 50).to(dtype)
    weight = torch.randn(40).to(dtype)

    def run(dtype, fused):
        mean, logvar = (tensor.to(dtype).requires_grad_() for tensor in inputs)
        if fused:
            z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, noise=noise, backend=backend)
        else:
            z, kl = plain_rsample(mean, logvar, noise.to(dtype)), plain_kl(mean, logvar).sum(1)
        loss = (z.square()).sum() + (kl * weight.to(kl.dtype)).sum()
        return torch.autograd.grad(loss, (mean, logvar))

    for name, *three in zip(
        ("d_mean", "d_s"), run(dtype, True), run(torch.float64, False), run(dtype, False), strict=True
    ):
        assert_within_budget(*three, name=name)


@pytest.mark.parametrize("columns", [1, 3, 31, 257, 100_000])
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "one-off"])
def test_rows_of_any_length_from_any_address(backend, columns, start):
    """Views that start one element into their memory, so that wide loads cannot read them."""
    rows = 2 if columns > 1000 else 6
    inputs = [
        torch.cat([tensor.new_zeros(start), tensor.flatten()])[start:].reshape(rows, columns).requires_grad_()
        for tensor in gaussian((rows, columns))
    ]
    results = []
    for name in (backend, "reference"):
        z, kl = fastelbo.gaussian_rsample_kl(*inputs, seed=3, noise_offset=5, backend=name)
        grads = torch.autograd.grad((z, kl), inputs, (torch.ones_like(z), torch.ones_like(kl)))
        results.append((z, kl, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
