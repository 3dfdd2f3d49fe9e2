"""Rows of any length: those of contiguous tensors start anywhere in a vector, and a row's end is another's start."""

import itertools

import pytest
import torch

import fastelbo
from fastelbo import Scale
from fastelbo.testing import gaussian

LENGTHS = [1, 2, 3, 5, 12, 31, 257, 2048, 2049, 4097]
OPS = {
    "rsample": (fastelbo.gaussian_rsample, 2),
    "kl": (fastelbo.gaussian_kl, 2),
    "kl-prior": (fastelbo.gaussian_kl, 4),
    "rsample_kl": (fastelbo.gaussian_rsample_kl, 2),
    "rsample_kl-prior": (fastelbo.gaussian_rsample_kl, 4),
    "log_prob": (fastelbo.gaussian_log_prob, 3),
}
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1.6e-2, 1e-2)}


def amid_nan(x, before):
    """x in memory between NaNs, of which an odd number in front leaves no vector of it aligned."""
    room = torch.full((x.numel() + 64,), float("nan"), dtype=x.dtype)
    part = room[before : before + x.numel()].view(x.shape)
    part.copy_(x)
    return part


def weights(x):
    """Upstream gradients that differ from event to event."""
    return torch.arange(1.0, 1 + x.numel()).cos().reshape(x.shape).to(x.dtype)


def results(op, inputs, backend, **keywords):
    """Outputs and gradients."""
    function, _ = OPS[op]
    keywords = {**keywords, "seed": 7} if "rsample" in op else keywords
    out = function(*inputs, backend=backend, **keywords)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(out, inputs, [weights(x) for x in out])


def make(op, rows, columns, dtype, before=16):
    q, p = (gaussian((rows, columns), dtype=dtype, seed=seed) for seed in (0, 1))
    inputs = {2: q, 3: (p[0], *q), 4: (*q, *p)}[OPS[op][1]]
    return [amid_nan(x, before).requires_grad_() for x in inputs]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("columns", LENGTHS)
def test_rows_of_any_length(kernels, op, columns):
    """Against plain torch in float64, of which a sum over a row of n terms may be off by their rounding alone."""
    rows = min(40, 1 + 3000 // columns)
    if columns < 8 and kernels != "triton":
        rows = 3001  # several blocks of short rows
    variants = itertools.product(TOLERANCES, (16, 17), ("logvar", Scale("logvar", clamp=(-1.0, 1.0))))
    for dtype, before, scale in itertools.islice(variants, 1 if kernels == "triton" else None):
        relative, absolute = TOLERANCES[dtype]
        inputs = make(op, rows, columns, dtype, before)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        got, want = results(op, inputs, kernels, scale=scale), results(op, exact, "reference", scale=scale)
        for x, y in zip(got, want, strict=True):
            scaled = absolute * (columns**0.5 if x.dim() == 1 else 1)
            torch.testing.assert_close(x.double(), y, rtol=relative, atol=scaled)


@pytest.mark.parametrize("op", ["kl", "rsample_kl-prior", "log_prob"])
@pytest.mark.parametrize("columns", [31, 257])
def test_upstream_gradients_of_every_kind(kernels, op, columns):
    """One for all, as of a mean; one for each event; one for each element."""
    inputs = make(op, 24, columns, torch.float32)
    function, _ = OPS[op]
    keywords = {"seed": 7} if "rsample" in op else {}
    for event_ndim in (0, 1, 2):
        found = []
        for backend in (kernels, "reference"):
            out = function(*inputs, backend=backend, event_ndim=event_ndim, **keywords)
            terms = out[1] if isinstance(out, tuple) else out
            found.append([torch.autograd.grad(terms.mean(), inputs, retain_graph=True)])
            found[-1].append(torch.autograd.grad(terms, inputs, weights(terms)))
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_million_short_rows(kernels):
    """More of them than blocks may hold at a time, and a last block that is not full."""
    if kernels == "triton" and torch.get_default_device().type == "cpu":
        pytest.skip("interpreted programs take milliseconds each")
    for columns in (1, 3, 5):
        rows = 2**20 // columns + 1
        mean, logvar = gaussian((rows, columns))
        want = fastelbo.gaussian_kl(mean.double(), logvar.double(), backend="reference")
        torch.testing.assert_close(
            fastelbo.gaussian_kl(mean, logvar, backend=kernels).double(), want, rtol=1e-6, atol=1e-6
        )
