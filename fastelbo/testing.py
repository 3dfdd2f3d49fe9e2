"""What a test of these ops needs, ours or a user's: inputs, the plain lines of today, and error budgets."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import torch


def gaussian(
    shape: "Sequence[int]",
    *,
    kind: str = "logvar",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    requires_grad: bool = False,
) -> "tuple[torch.Tensor, ...]":
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


def plain_kl(
    mean_q: torch.Tensor,
    logvar_q: torch.Tensor,
    mean_p: "torch.Tensor | None" = None,
    logvar_p: "torch.Tensor | None" = None,
) -> torch.Tensor:
    r"""KL in today's lines, elementwise, in the inputs' own precision: what an error budget is measured against.

    .. math:: \tfrac{1}{2} \left(e^{s_q} + \mu_q^2 - 1 - s_q\right), \text{ or } \tfrac{1}{2} \left(s_p - s_q
              + e^{s_q - s_p} + (\mu_q - \mu_p)^2 e^{-s_p} - 1\right)

    Args:
        mean_q, logvar_q: mean and log-variance of the posterior, any shape.
        mean_p, logvar_p: of the prior; the standard normal where both are None.

    Returns:
        KL in nats, of the broadcast shape and the inputs' dtype.

    Example:
        >>> fastelbo.testing.plain_kl(torch.ones(2), torch.zeros(2))
        tensor([0.5000, 0.5000])
    """
    if mean_p is None or logvar_p is None:
        return -0.5 * (1 + logvar_q - mean_q**2 - torch.exp(logvar_q))
    return 0.5 * (
        -1.0 + logvar_p - logvar_q + torch.exp(logvar_q - logvar_p) + (mean_q - mean_p) ** 2 * torch.exp(-logvar_p)
    )


def plain_rsample(mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""A draw in today's line, :math:`\mu + e^{s / 2} \epsilon`.

    Args:
        mean, logvar: mean and log-variance, any shape.
        noise: standard normals, broadcast with them.

    Returns:
        The draw, of the broadcast shape and the inputs' dtype.

    Example:
        >>> fastelbo.testing.plain_rsample(torch.ones(2), torch.zeros(2), torch.tensor([-1.0, 2.0]))
        tensor([0., 3.])
    """
    return mean + torch.exp(0.5 * logvar) * noise


def plain_log_prob(x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    r"""A log-density in today's line, elementwise: :math:`-\tfrac{1}{2} (s + (x - \mu)^2 e^{-s} + \ln 2\pi)`.

    Args:
        x, mean, logvar: data, mean and log-variance; they broadcast.

    Returns:
        Log-density in nats, of the broadcast shape and the inputs' dtype.

    Example:
        >>> fastelbo.testing.plain_log_prob(torch.zeros(2), torch.zeros(2), torch.zeros(2))
        tensor([-0.9189, -0.9189])
    """
    return -0.5 * (logvar + (x - mean) ** 2 * torch.exp(-logvar) + math.log(2 * math.pi))


def assert_within_budget(
    actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, name: str = "result", *, promised: float = 0.0
) -> None:
    """Asserts that a result is off by at most twice what plain torch is in the same dtype, plus one rounding unit.

    Args:
        actual: the result under test.
        exact: the same in float64.
        plain: the same by plain torch lines in the inputs' dtype.
        name: what an error message calls it.
        promised: an error that the result's own algorithm does not exceed on any processor, where there is a bound of
            it: the budget is at least that, since how plain torch adds, and so how far it is off, is the processor's.

    Raises:
        AssertionError: naming the error, the budget and where the budget comes from.

    Example:
        >>> mean, logvar = fastelbo.testing.gaussian((64, 32))
        >>> actual = fastelbo.gaussian_kl(mean, logvar, event_ndim=0)
        >>> exact, plain = (fastelbo.testing.plain_kl(mean.to(t), logvar.to(t)) for t in (torch.float64, torch.float32))
        >>> fastelbo.testing.assert_within_budget(actual, exact, plain)
    """
    scale = exact.abs().max().item()
    unit = torch.finfo(actual.dtype).eps * scale
    error = (actual.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    budget = max(2 * plain_error + unit, promised)
    assert error <= budget, (
        f"{name}: error {error:.3g} exceeds the budget {budget:.3g} (twice plain torch's {plain_error:.3g}, plus one "
        f"unit of {actual.dtype} at {scale:.3g}; at least the promised {promised:.3g})"
    )


def assert_causal(
    module: "Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]",
    in_shape: "Sequence[int]",
    *,
    out_channels_per_channel: "int | None" = None,
    channel_groups: int = 1,
    group_order: str = "interleaved",
    strict: bool = True,
    poison: bool = True,
    pixels: "Iterable[tuple[int, int]] | None" = None,
    order: "torch.Tensor | Sequence[Sequence[int]] | None" = None,
    seed: int = 0,
) -> None:
    """Asserts that a network's output at a pixel depends on nothing that comes later, in raster order or another one.

    Two proofs. By gradients, in float64: the output at a pixel, weighted at random, has gradient exactly 0 with
    respect to every later pixel. By poison: with NaN in every later pixel the output at the pixel stays what it was,
    which finds what a gradient that vanishes by chance hides, and products with weights of 0.

    The module is tested in evaluation mode, on a copy in float64; it is left as it was.

    Args:
        module: a callable from an image [N, C, H, W] to [N, C', H, W], or to a tuple whose last is that.
        in_shape: (C, H, W) or (N, C, H, W). Small images do, if larger than the receptive field in part. Images are on
            the module's own device, the CPU for a function.
        out_channels_per_channel: the output holds the channels of every group so many at a time (256 logits of R, then
            of G, then of B, as from contiguous channels); None where they are ordered as group_order says.
        channel_groups: G; with more than one, an output channel may read, in its own pixel, only inputs of the groups
            before its own (the same group too, unless strict).
        group_order: "interleaved" or "contiguous": of the input's channels, and of the output's.
        strict: whether the network must not see the pixel itself (True for a whole network, whose first layer has mask
            A; False for a layer or block with mask B).
        poison: whether to try NaN; False for networks that compute statistics over the whole image.
        pixels: (row, column) pairs to test; all where None.
        order: [H, W], in which step each pixel is drawn, where that is not raster order. Those of one step do not read
            each other: of a checkerboard in two steps it is (row + column) % 2.
        seed: of the images and weights.

    Raises:
        AssertionError: naming the output's pixel and the pixel and channel that it must not read.
        ValueError: an order of another shape than the image's.

    Example:
        >>> conv = fastelbo.nn.MaskedConv2d(1, 4, 3, mask_type="A")
        >>> fastelbo.testing.assert_causal(conv, (1, 5, 6))
    """
    in_shape = tuple(in_shape) if len(in_shape) == 4 else (2, *in_shape)
    channels, rows, columns = in_shape[1:]
    network, device = module, torch.device("cpu")
    if isinstance(module, torch.nn.Module):
        network = copy.deepcopy(module).double().eval().requires_grad_(False)
        device = next((tensor.device for tensor in (*network.parameters(), *network.buffers())), device)

    def run(image):
        out = network(image)
        return out if isinstance(out, torch.Tensor) else out[-1]

    generator = torch.Generator(device="cpu").manual_seed(seed)
    image = torch.randn(in_shape, generator=generator, dtype=torch.float64, device="cpu").to(device)
    with torch.no_grad():
        clean = run(image)
    assert clean.dim() == 4 and clean.shape[2:] == (rows, columns), (
        f"the output must be of the input's size {rows} x {columns}; got {tuple(clean.shape)}"
    )
    group_in = _groups(channels, channel_groups, group_order)
    if out_channels_per_channel is None:
        group_out = _groups(clean.shape[1], channel_groups, group_order)
    else:
        group_out = torch.arange(clean.shape[1], device="cpu") // out_channels_per_channel
    group_in, group_out = group_in.to(device), group_out.to(device)
    if order is None:
        step = torch.arange(rows * columns, device=device).reshape(rows, columns)
    else:
        step = torch.as_tensor(order, device=device)
    if step.shape != (rows, columns):
        raise ValueError(f"order must be of the image's shape {(rows, columns)}; got {tuple(step.shape)}")
    weights = torch.randn(clean.shape, generator=generator, dtype=torch.float64, device="cpu").to(device)
    for row, column in pixels or [(r, c) for r in range(rows) for c in range(columns)]:
        for group in range(channel_groups):
            later = (step >= step[row, column]).expand(channels, -1, -1).clone()
            later[:, row, column] = group_in >= group if strict else group_in > group
            if not later.any():
                continue
            chosen = group_out == group

            def at_pixel(out, row=row, column=column, chosen=chosen):
                return out[:, chosen, row, column]

            if not chosen.any():
                continue
            place = f"the output at row {row}, column {column}" + (f" of group {group}" if channel_groups > 1 else "")
            leaf = image.clone().requires_grad_()
            value = (at_pixel(run(leaf)) * at_pixel(weights)).sum()
            if value.requires_grad:
                (grad,) = torch.autograd.grad(value, leaf, allow_unused=True)
                if grad is not None:
                    _assert_none(grad.abs().amax(0) * later != 0, f"{place} has a gradient with respect to")
            if poison:
                with torch.no_grad():
                    poisoned = at_pixel(run(image.masked_fill(later, float("nan"))))
                if not torch.allclose(poisoned, at_pixel(clean), rtol=1e-9, atol=1e-12):
                    guilty = torch.zeros_like(later)
                    for index in later.nonzero().tolist():
                        one = torch.zeros_like(later)
                        one[tuple(index)] = True
                        with torch.no_grad():
                            out = at_pixel(run(image.masked_fill(one, float("nan"))))
                        guilty[tuple(index)] = not torch.allclose(out, at_pixel(clean), rtol=1e-9, atol=1e-12)
                    _assert_none(guilty, f"{place} changes with NaN in")
                    raise AssertionError(f"{place} changes with NaN in all later pixels together")


def _groups(channels, groups, order):
    index = torch.arange(channels, device="cpu")
    return index % groups if order == "interleaved" else index * groups // channels


def _assert_none(found, claim):
    if found.any():
        places = [f"row {r}, column {c}, channel {ch}" for ch, r, c in found.nonzero().tolist()]
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        raise AssertionError(f"{claim} {'; '.join(places[:3])}{more}: it must not read them")
