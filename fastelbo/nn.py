"""Modules: parameters around the ops, and no mathematics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastelbo import _autograd, _checks
from fastelbo._causal_conv2d import CausalConv2d, pair, square, taps_of
from fastelbo.ops import masked_conv2d as op
from fastelbo.ops._gated_block import gated_block, seen_by_link
from fastelbo.ops.gaussian_log_prob import Terms, log_prob
from fastelbo.reference.masked_conv2d import activate
from fastelbo.scale import Scale

__all__ = ["GatedMaskedConv2d", "GaussianNLLLoss", "HorizontalStackConv2d", "MaskedConv2d", "VerticalStackConv2d"]


class MaskedConv2d(CausalConv2d):
    """masked_conv2d with parameters; takes the place of nn.Conv2d and of CompressAI's MaskedConv2d.

    The parameters have nn.Conv2d's names and shapes, with 0 at dead taps. A state_dict may hold a `mask`, which must be
    this module's; weights that are not 0 at dead taps are loaded with zeros there, and a warning. Initialisers, noise
    (of private or Bayesian training) and pruning may write to dead taps: nothing reads them, and they are 0 again in a
    state_dict, a copy, a pickle, an exported program and whatever else asks the module for its parameters, an average
    of weights among them. Reading `weight` alone does not clear them, nor does it under torch's weight norms, whose
    norms are those of all taps.

    Args:
        in_channels, out_channels: C_in and C_out, the latter before a gate halves them.
        kernel_size: k, odd; with a mask, a pair of any two sides.
        stride: 1; for nn.Conv2d's users.
        padding: k//2 times the dilation, "same", or None for either.
        dilation: the distance between taps.
        groups: 1, too.
        bias: whether there is one.
        padding_mode: "zeros".
        mask_type: "A" or "B"; "A" where None.
        mask: in place of a mask type the live taps, nested lists or a tensor, [rows, columns] or of the weight's shape,
            and then alike for all pairs of channels.
        channel_groups, group_order, activation, backend: as for masked_conv2d.
        keep_mask: whether a state_dict holds the `mask`, a tensor like the weight, as those of projects do whose masked
            convolutions keep it in a buffer (they load strictly, then); without it, it is one of nn.Conv2d.
        device, dtype: of the parameters.

    Attributes:
        mask: the live taps as such a buffer has them, 1 where a tap is live. What is written to it must leave it so.

    Raises:
        ValueError: as masked_conv2d, and for a stride or padding at which the output does not lie on the input; in a
            call, for a mask to which another one was written.
        NotImplementedError: for groups or another padding mode.

    Source:
        van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.4.

    Example:
        >>> conv = fastelbo.nn.MaskedConv2d(3, 8, 5, mask_type="A")
        >>> conv(torch.zeros(2, 3, 7, 9)).shape
        torch.Size([2, 8, 7, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: "int | tuple[int, int]",
        stride: "int | tuple[int, int]" = 1,
        padding: "int | str | tuple[int, int] | None" = None,
        dilation: "int | tuple[int, int]" = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
        *,
        mask_type: "str | None" = None,
        mask: "torch.Tensor | Sequence | None" = None,
        channel_groups: int = 1,
        group_order: str = "interleaved",
        activation: "str | None" = None,
        keep_mask: bool = False,
        backend: "str | None" = None,
    ) -> None:
        taps, dilation = None, square("dilation", dilation)
        if mask is None:
            kernel_size, mask_type = square("kernel_size", kernel_size), "A" if mask_type is None else mask_type
            sides = kernel_size, kernel_size
        else:
            sides = pair("kernel_size", kernel_size)
            taps = taps_of(mask, (out_channels, in_channels, *sides), mask_type, channel_groups)
        same = tuple(side // 2 * dilation for side in sides)
        if square("stride", stride) != 1:
            raise ValueError(f"stride must be 1, else the output does not lie on the input; got {stride}")
        if padding not in (None, "same") and pair("padding", padding) != same:
            expected = same if same[0] != same[1] else same[0]
            raise ValueError(f"padding must be {expected}, at which the output has the input's size; got {padding}")
        if groups != 1:
            raise NotImplementedError(f"groups must be 1 (channel_groups are those of a pixel's colours); got {groups}")
        if padding_mode != "zeros":
            raise NotImplementedError(f"padding_mode must be zeros; got {padding_mode!r}")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size if taps is None else None,
            sides,
            mask_type=mask_type,
            taps=taps,
            dilation=dilation,
            bias=bias,
            channel_groups=channel_groups,
            group_order=group_order,
            activation=activation,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.__dict__["padding"] = same  # which nn.Conv2d has not been told
        self.keep_mask = keep_mask

    def forward(
        self, input: torch.Tensor, cond: "torch.Tensor | None" = None, residual: "torch.Tensor | None" = None
    ) -> torch.Tensor:
        """From input [N, C_in, H, W] to [N, C_out or C_out / 2, H, W]; cond and residual as for masked_conv2d."""
        self._check_mask()
        return op.masked_conv2d(
            input,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            taps=self._taps,
            dilation=self.dilation[0],
            channel_groups=self.channel_groups,
            group_order=self.group_order,
            activation=self.activation,
            cond=cond,
            residual=residual,
            backend=self.backend,
        )


class VerticalStackConv2d(CausalConv2d):
    """causal_conv2d of the vertical stack with parameters: reads the rows down to the pixel's own.

    The weight is [C_out, C_in, k//2 + 1, k]. A state_dict may hold a k x k weight, which is cropped, and a `mask`.

    Args:
        in_channels, out_channels: C_in and C_out, the latter before a gate halves them.
        kernel_size: k, odd.
        mask_type: "B", or "A" for a first layer that must not see the pixel's own row.
        dilation, bias, activation, backend, device, dtype: as for MaskedConv2d.

    Raises:
        ValueError: as causal_conv2d.

    Source:
        van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2.2.

    Example:
        >>> fastelbo.nn.VerticalStackConv2d(3, 8, 5).weight.shape
        torch.Size([8, 3, 3, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: "int | tuple[int, int]",
        *,
        mask_type: str = "B",
        dilation: "int | tuple[int, int]" = 1,
        bias: bool = True,
        activation: "str | None" = None,
        backend: "str | None" = None,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        kernel_size = square("kernel_size", kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            (kernel_size // 2 + 1, kernel_size),
            mask_type=mask_type,
            dilation=square("dilation", dilation),
            bias=bias,
            channel_groups=1,
            group_order="interleaved",
            activation=activation,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def _live_taps(self, device):
        live = super()._live_taps(device)
        live[:, :, -1] = self.mask_type == "B"
        return live

    def _crop(self, full):
        return full[:, :, : self.k // 2 + 1]

    def _matches(self, mask, mask_type, options):
        if mask.dim() != 4 or mask.shape[2] not in (self.k, self.k // 2 + 1) or mask.shape[3] != self.k:
            return False
        rows = torch.arange(mask.shape[2], device="cpu") < self.k // 2 + (mask_type == "B")
        return torch.equal(mask.cpu().bool(), rows[:, None].expand(mask.shape))

    def forward(self, input: torch.Tensor, cond: "torch.Tensor | None" = None) -> torch.Tensor:
        """From input [N, C_in, H, W] to [N, C_out or C_out / 2, H, W]; cond as for causal_conv2d."""
        self._check_mask()
        return op.causal_conv2d(
            input,
            self.weight,
            self.bias,
            stack="vertical",
            mask_type=self.mask_type,
            dilation=self.dilation[0],
            activation=self.activation,
            cond=cond,
            backend=self.backend,
        )


class HorizontalStackConv2d(CausalConv2d):
    """causal_conv2d of the horizontal stack with parameters: reads what lies left of the pixel, and the pixel.

    The weight is [C_out, C_in, 1, k//2 + 1]. A state_dict may hold a 1 x k weight, which is cropped, and a `mask`.

    Args:
        in_channels, out_channels: C_in and C_out, the latter before a gate halves them.
        kernel_size: k, odd.
        mask_type: "B", or "A" for a first layer that must not see the pixel itself.
        channel_groups, group_order: as for causal_conv2d.
        dilation, bias, activation, backend, device, dtype: as for MaskedConv2d.

    Raises:
        ValueError: as causal_conv2d.

    Source:
        van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2.2.

    Example:
        >>> fastelbo.nn.HorizontalStackConv2d(3, 8, 5).weight.shape
        torch.Size([8, 3, 1, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: "int | tuple[int, int]",
        *,
        mask_type: str = "B",
        dilation: "int | tuple[int, int]" = 1,
        bias: bool = True,
        channel_groups: int = 1,
        group_order: str = "interleaved",
        activation: "str | None" = None,
        backend: "str | None" = None,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        kernel_size = square("kernel_size", kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            (1, kernel_size // 2 + 1),
            mask_type=mask_type,
            dilation=square("dilation", dilation),
            bias=bias,
            channel_groups=channel_groups,
            group_order=group_order,
            activation=activation,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def _crop(self, full):
        return full[:, :, self.k // 2 : self.k // 2 + 1, : self.k // 2 + 1]

    def _full(self, weight):
        rows = self.k // 2 if weight.shape[2:] == (1, self.k) else 0
        return nn.functional.pad(weight, (0, 0, rows, rows))

    def _candidates(self, full):
        row = full.clone()
        row[:, :, : self.k // 2] = False
        return *super()._candidates(full), row

    def _where(self, kept):
        return slice(self.k // 2, self.k // 2 + 1), slice(0, kept[1])

    def forward(self, input: torch.Tensor, cond: "torch.Tensor | None" = None) -> torch.Tensor:
        """From input [N, C_in, H, W] to [N, C_out or C_out / 2, H, W]; cond as for causal_conv2d."""
        self._check_mask()
        return op.causal_conv2d(
            input,
            self.weight,
            self.bias,
            stack="horizontal",
            mask_type=self.mask_type,
            dilation=self.dilation[0],
            channel_groups=self.channel_groups,
            group_order=self.group_order,
            activation=self.activation,
            cond=cond,
            backend=self.backend,
        )


class GatedMaskedConv2d(nn.Module):
    """A block of the Gated PixelCNN: two stacks of gated convolutions, which together have no blind spot.

    The vertical stack v reads the rows above, the horizontal stack h what lies left in the pixel's own row and, through
    a 1 x 1 link, what v has read. h alone leads to the output of a network. Both start from the image:
    ``v, h = first(x, x)``.

    Three conventions keep the pixel's own row, which v could read, from h. ``link="shift"``: v reads its own row and
    the link shifts it down by one (the paper's): above the first row it is 0. ``link="pad-first"``: the same, of an
    image that was padded before v's convolution, so that above the first row it is the convolution's bias.
    ``link="mask-first-layer"``: the network's first block has mask A in v too, and the link stays in place. All blocks
    of a network must follow the same.

    Args:
        in_channels, out_channels: of both stacks; C_out is what remains after the gate.
        kernel_size: k, odd.
        mask_type: "A" for a network's first block, "B" for all others.
        link: "shift", "pad-first" or "mask-first-layer".
        dilation: the distance between taps.
        cond_channels: channels of a condition; None for no condition.
        residual: whether the horizontal stack adds its input; None for where it can: mask B and C_in = C_out.
        activation: the gate, "tanh_sigmoid" or "glu".
        channel_groups, group_order: of the horizontal stack, as for masked_conv2d.
        bias, backend, device, dtype: as for MaskedConv2d.

    Raises:
        ValueError: an unknown link or gate, or a residual that would show the pixel to itself or has another shape.

    Source:
        van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", figure 2.

    Example:
        >>> x = torch.zeros(2, 3, 6, 5)
        >>> first = fastelbo.nn.GatedMaskedConv2d(3, 8, 7, mask_type="A")
        >>> block = fastelbo.nn.GatedMaskedConv2d(8, 8, 3)
        >>> v, h = block(*first(x, x))
        >>> h.shape
        torch.Size([2, 8, 6, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: "int | tuple[int, int]",
        *,
        mask_type: str = "B",
        link: str = "shift",
        dilation: "int | tuple[int, int]" = 1,
        cond_channels: "int | None" = None,
        residual: "bool | None" = None,
        activation: str = "tanh_sigmoid",
        channel_groups: int = 1,
        group_order: str = "interleaved",
        bias: bool = True,
        backend: "str | None" = None,
        device: "torch.device | str | None" = None,
        dtype: "torch.dtype | None" = None,
    ) -> None:
        super().__init__()
        _checks.check_one_of("mask_type", mask_type, op.MASK_TYPES)
        _checks.check_one_of("link", link, ("shift", "pad-first", "mask-first-layer"))
        _checks.check_one_of("activation", activation, op.GATES)
        can_add = mask_type == "B" and in_channels == out_channels
        if residual and not can_add:
            raise ValueError(
                "residual needs mask_type 'B' (else a pixel would see itself) and as many output as input channels; "
                f"got mask_type {mask_type!r}, {in_channels} and {out_channels}"
            )
        self.link_convention, self.activation = link, activation
        self.residual = can_add if residual is None else residual
        common: dict[str, Any] = {
            "dilation": dilation,
            "bias": bias,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        groups: dict[str, Any] = {"channel_groups": channel_groups, "group_order": group_order}
        vertical_mask = mask_type if link == "mask-first-layer" else "B"
        self.vertical = VerticalStackConv2d(
            in_channels, 2 * out_channels, kernel_size, mask_type=vertical_mask, **common
        )
        self.horizontal = HorizontalStackConv2d(
            in_channels, 2 * out_channels, kernel_size, mask_type=mask_type, activation=activation, **groups, **common
        )
        self.link = nn.Conv2d(2 * out_channels, 2 * out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.out = MaskedConv2d(
            out_channels,
            out_channels,
            1,
            bias=bias,
            device=device,
            dtype=dtype,
            mask_type="B",
            backend=backend,
            **groups,
        )
        self.cond: nn.Conv2d | None = None
        if cond_channels is not None:
            self.cond = nn.Conv2d(cond_channels, 4 * out_channels, 1, bias=False, device=device, dtype=dtype)

    @property
    def _options(self):
        """As gated_block takes them."""
        h = self.horizontal
        kinds = h.mask_type, self.vertical.mask_type, self.link_convention
        return *kinds, h.dilation[0], h.channel_groups, h.group_order, self.activation, self.residual

    def _as_made(self):
        """Whether its layers are those of its constructor, and nothing but parameters can make their calls differ."""
        v, h, link, out = self.vertical, self.horizontal, self.link, self.out
        kinds = VerticalStackConv2d, HorizontalStackConv2d, nn.Conv2d, MaskedConv2d
        for layer, kind in zip((v, h, link, out), kinds, strict=True):
            hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
            called = getattr(layer.forward, "__func__", None)
            if called is not kind.forward or any(hooks) or layer._compiled_call_impl is not None:
                return False
            if layer is not link:
                layer._check_mask()
        return (
            (v.dilation, v.activation, v.backend, h.activation, link.stride, link.padding)
            == (h.dilation, None, h.backend, self.activation, (1, 1), (0, 0))
            and (out.mask_type, out.activation, out.channel_groups, out.group_order, out.backend)
            == ("B", None, h.channel_groups, h.group_order, h.backend)
            and not nn.modules.module._has_any_global_hook()
        )

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, cond: "torch.Tensor | None" = None
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Both stacks [N, C_in, H, W] to both [N, C_out, H, W].

        Args:
            v, h: the stacks; both the image for the first block.
            cond: [N, cond_channels] (a class's embedding) or [N, cond_channels, H, W]; None for no condition.
        """
        if (cond is None) != (self.cond is None):
            raise ValueError(f"cond must {'not ' if self.cond is None else ''}be given: cond_channels decides")
        v_cond = h_cond = None
        if cond is not None and self.cond is not None:
            v_cond, h_cond = self.cond(cond if cond.dim() == 4 else cond[:, :, None, None]).chunk(2, dim=1)
        if not _autograd.traced() and self._as_made():
            layers = self.vertical, self.horizontal, self.link, self.out
            parameters = (parameter for layer in layers for parameter in (layer.weight, layer.bias))
            both = gated_block((v, h, *parameters, v_cond, h_cond), self._options, self.out.backend)
            if both is not None:
                return both
        z = self.vertical(v)
        link = self.link(seen_by_link(z, self.vertical.bias, self.link_convention))
        gated = self.horizontal(h, cond=link if h_cond is None else link + h_cond)
        v_gated = activate(z if v_cond is None else z + v_cond, self.activation)
        return v_gated, self.out(gated, residual=h if self.residual else None)


class GaussianNLLLoss(nn.GaussianNLLLoss):
    r"""gaussian_nll as a module that takes the place of nn.GaussianNLLLoss: the same arguments, errors and gradients.

    .. math:: \tfrac{1}{2} \left(\ln v + \frac{(\text{input} - \text{target})^2}{v}\right), \qquad v = \max(var, eps)

    Unlike the original it does not wait for a GPU to see whether var has negative entries: there the device asserts it.
    Results are float32 for half inputs.

    Args:
        full: whether to add the constant ln(2 pi) / 2.
        eps: least variance; the gradient ignores the limit.
        reduction: "none", "mean" or "sum".

    Raises:
        ValueError: in a call, for negative entries of var, a var of the wrong size, or an unknown reduction.
        RuntimeError: in a call, for a target that does not broadcast with input.

    Source:
        Nix and Weigend 1994, "Estimating the mean and variance of the target probability distribution".

    Example:
        >>> loss = fastelbo.nn.GaussianNLLLoss()
        >>> loss(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3))
        tensor(0.5000)
    """

    @_checks.calls(x="target", mean="input", s="var")
    def forward(self, input: torch.Tensor, target: torch.Tensor, var: "torch.Tensor | float") -> torch.Tensor:
        """The loss.

        Args:
            input: the means, of any shape.
            target: broadcasts with input.
            var: the variances, of input's shape, or of that shape with one dimension 1 or the last one missing; or a
                number.
        """
        negative = "var has negative entry/entries"
        if isinstance(var, torch.Tensor):
            _checks.check_values((var < 0).logical_not(), negative)  # NaN passes
            if input.shape[:-1] == var.shape != input.shape:
                var = var.unsqueeze(-1)
            elif var.shape != input.shape and not _one_is_1(input.shape, var.shape):
                raise ValueError("var is of incorrect size")
        elif var < 0:
            raise ValueError(negative)
        if self.reduction not in ("none", "mean", "sum"):
            raise ValueError(f"{self.reduction} is not valid")
        if target.shape != input.shape:
            input, target = torch.broadcast_tensors(input, target)
        summed = 0 if self.reduction == "none" else input.dim()
        scale = Scale.gaussian_nll_loss(self.eps)
        terms = Terms() if self.full else Terms(constant=0.0)
        loss = log_prob(target, input, var, scale, summed, "none", None, None, negative=True, terms=terms)
        return loss / input.numel() if self.reduction == "mean" else loss


def _one_is_1(shape, other):
    """Whether the other shape differs from the first in one dimension, where it is 1."""
    return len(shape) == len(other) and sum(b for a, b in zip(shape, other, strict=True) if a != b) == 1
