"""What a test of these ops needs, ours or a user's: inputs, the plain lines of today, and error budgets."""

import math

import torch


def gaussian(shape, *, kind="logvar", dtype=torch.float32, seed=0, requires_grad=False):
    """A mean and a raw scale of one kind, both with values as networks emit them.

    Args:
        shape: of both.
        kind: a Scale kind; "std" and "var" come positive.
        dtype: of both.
        seed: of the values.
        requires_grad: of both.

    Returns:
        (mean, s), on torch's default device; the same values on each.

    Example:
        >>> mean, s = fastelbo.testing.gaussian((2, 3), kind="std")
        >>> bool((s > 0).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((2, *shape), generator=generator, dtype=torch.float64, device="cpu")
    mean, s = values.to(torch.get_default_device())
    if kind in ("std", "var"):
        s = torch.exp(0.5 * s)
    return tuple(tensor.to(dtype).requires_grad_(requires_grad) for tensor in (mean, s))


def plain_kl(mean_q, logvar_q, mean_p=None, logvar_p=None):
    """Today's lines, elementwise, in the inputs' own precision: what an error budget is measured against."""
    if mean_p is None:
        return -0.5 * (1 + logvar_q - mean_q**2 - torch.exp(logvar_q))
    return 0.5 * (
        -1.0 + logvar_p - logvar_q + torch.exp(logvar_q - logvar_p) + (mean_q - mean_p) ** 2 * torch.exp(-logvar_p)
    )


def plain_rsample(mean, logvar, noise):
    """Today's line."""
    return mean + torch.exp(0.5 * logvar) * noise


def plain_log_prob(x, mean, logvar):
    """Today's line, elementwise."""
    return -0.5 * (logvar + (x - mean) ** 2 * torch.exp(-logvar) + math.log(2 * math.pi))


def assert_within_budget(actual, exact, plain, name="result"):
    """Asserts that a result is off by at most twice what plain torch is in the same dtype, plus one rounding unit.

    Args:
        actual: the result under test.
        exact: the same in float64.
        plain: the same by plain torch lines in the inputs' dtype.
        name: what an error message calls it.

    Raises:
        AssertionError: naming the error, the budget and where the budget comes from.
    """
    scale = exact.abs().max().item()
    unit = torch.finfo(actual.dtype).eps * scale
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    budget = 2 * plain_error + unit
    assert error <= budget, (
        f"{name}: error {error:.3g} exceeds the budget {budget:.3g} (twice plain torch's {plain_error:.3g}, plus one "
        f"unit of {actual.dtype} at {scale:.3g})"
    )
