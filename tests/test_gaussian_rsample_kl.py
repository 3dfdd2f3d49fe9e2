"""A sample and its KL in one pass equal the two ops."""

import math

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


OBJECTIVES = {
    "dim": {"free_bits": 0.5},
    "example": {"free_bits": 2.5, "free_bits_per": "example"},
    "batch": {"free_bits": 1e3, "free_bits_per": "batch"},
    "balance": {"balance": 0.8},
    "balance-1": {"balance": 1.0},
    "balance-0": {"balance": 0.0},
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_objectives_are_those_of_the_two_ops(backend, objective, num_samples, reduction):
    inputs = [*gaussian((5, 6), dtype=torch.float64), *gaussian((5, 6), dtype=torch.float64, seed=1)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    draw = {"seed": 11, "num_samples": num_samples, "backend": backend}
    z, kl = fastelbo.gaussian_rsample_kl(*inputs, **draw, **objective, reduction=reduction)
    z_alone = fastelbo.gaussian_rsample(*inputs[:2], **draw)
    kl_alone = fastelbo.gaussian_kl(*inputs, **objective, reduction=reduction, backend=backend)
    assert torch.equal(z, z_alone)
    torch.testing.assert_close(kl, kl_alone, rtol=1e-15, atol=0)
    upstream = torch.randn_like(z), torch.randn_like(kl)
    for used in ([0, 1], [0], [1]):
        for create_graph in (False, True):
            got, want = (
                torch.autograd.grad(
                    [outputs[i] for i in used],
                    inputs,
                    [upstream[i] for i in used],
                    allow_unused=True,
                    materialize_grads=True,
                    retain_graph=True,
                    create_graph=create_graph,
                )
                for outputs in ((z, kl), (z_alone, kl_alone))
            )
            # the differentiable backward draws the reference's noise, a few float32 units from the kernel's
            tolerance = 1e-5 if create_graph and 0 in used and backend != "reference" else 1e-13
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


POISON = float("nan"), float("inf"), -float("inf"), float("nan")


@pytest.mark.parametrize("mask_shape", [(5, 6), (6,), (5, 1)], ids=str)
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])
def test_mask_takes_elements_out(backend, mask_shape, num_samples, prior):
    """The sample is 0 there; elsewhere all is as with no mask, whatever stands in the masked elements."""
    clean = [*gaussian((5, 6), dtype=torch.float64), *(gaussian((5, 6), dtype=torch.float64, seed=1) if prior else ())]
    mask = (torch.arange(math.prod(mask_shape)) % 3 > 0).reshape(mask_shape)
    poisoned = [x.masked_fill(~mask, value).requires_grad_() for x, value in zip(clean, POISON, strict=False)]
    clean = [x.requires_grad_() for x in clean]
    options = {"seed": 3, "num_samples": num_samples, "backend": backend}
    z, kl = fastelbo.gaussian_rsample_kl(*poisoned, mask=mask, **options)
    z_clean, terms = fastelbo.gaussian_rsample_kl(*clean, event_ndim=0, **options)
    assert not z.masked_select(~mask).any()
    assert torch.equal(z.masked_select(mask), z_clean.masked_select(mask))
    torch.testing.assert_close(kl, torch.where(mask, terms, 0).sum(1))
    d_z, d_kl = torch.randn_like(z), torch.randn_like(kl)
    want = torch.autograd.grad(
        (z_clean, terms), clean, (torch.where(mask, d_z, 0), torch.where(mask, d_kl[:, None].expand(5, 6), 0))
    )
    for create_graph in (False, True):
        grads = torch.autograd.grad((z, kl), poisoned, (d_z, d_kl), retain_graph=True, create_graph=create_graph)
        tolerance = 1e-5 if create_graph and backend != "reference" else 1e-13  # noise, as above
        for grad, wanted in zip(grads, want, strict=True):
            assert not grad.masked_select(~mask).any()
            torch.testing.assert_close(grad, wanted, rtol=tolerance, atol=tolerance)
