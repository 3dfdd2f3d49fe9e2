"""Modules: parameters around the ops, and no mathematics."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastelbo import _autograd, _checks, _sharding, backends
from fastelbo.ops import masked_conv2d as op
from fastelbo.ops.gaussian_log_prob import Terms, log_prob
from fastelbo.reference.masked_conv2d import activate
from fastelbo.scale import Scale

__all__ = ["GatedMaskedConv2d", "GaussianNLLLoss", "HorizontalStackConv2d", "MaskedConv2d", "VerticalStackConv2d"]


class _CausalConv2d(nn.Conv2d):
    """What the three convolutions share: an nn.Conv2d by its parameters, whose dead taps are 0 wherever they go.

    Training keeps them at 0, since their gradient is. Whatever else is written to them, the convolution never reads it,
    and it is gone wherever parameters are asked for, copied or saved.
    """

    keep_mask = False
    # What the weight's shape and its dead taps follow from, or nothing reads: nn.Conv2d's may be assigned.
    _FIXED = frozenset(
        [
            "k",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
            "mask_type",
            "channel_groups",
            "group_order",
            "activation",
        ]
    )

    def __setattr__(self, name, value):
        if name in self._FIXED and self.__dict__.get("_made"):
            before = self.__dict__.get(name)
            if value != before:
                raise ValueError(f"{name} of a {type(self).__name__} must stay {before!r}; got {value!r}")
        super().__setattr__(name, value)

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stored_size,
        *,
        mask_type,
        taps=None,
        dilation,
        bias,
        channel_groups,
        group_order,
        activation,
        backend,
        device,
        dtype,
    ):
        op.check_options(dilation, activation)
        if backend is not None:
            _checks.check_one_of("backend", backend, backends.BACKENDS)
        self._mask_options = None  # nn.Conv2d's constructor resets the parameters before there is a mask
        super().__init__(
            in_channels, out_channels, stored_size, dilation=dilation, bias=bias, device=device, dtype=dtype
        )
        self.k, self._taps = kernel_size, taps
        self.mask_type, self.channel_groups, self.group_order = mask_type, channel_groups, group_order
        self.activation, self.backend = activation, backend
        self._mask_options = {"channel_groups": channel_groups, "group_order": group_order}
        self._mask_options["gated"] = activation in op.GATES
        self._made = True
        live = self.live_taps()  # checks the options
        with torch.no_grad():
            self.weight.masked_fill_(~live, 0)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew, as nn.Conv2d does, with zeros at dead taps."""
        super().reset_parameters()
        self._clear_dead_taps()

    @property
    def _parameters(self):
        """Where whoever hands parameters on finds them: state_dict, torch.export, averages of weights."""
        self._clear_dead_taps()
        return self.__dict__["_parameters"]

    @_parameters.setter
    def _parameters(self, value):
        self.__dict__["_parameters"] = value

    def __getstate__(self):
        """What copies and pickles take."""
        self._clear_dead_taps()
        return {name: value for name, value in self.__dict__.items() if name not in ("_dead_taps", "_mask")}

    @property
    def mask(self) -> torch.Tensor:
        """The live taps as other projects' buffer has them: of the weight's shape, dtype and device, 1 where a tap is
        live. It is made when first asked for. The layer computes with the taps of its mask_type whatever is written to
        it: another pattern is a ValueError, in the next forward at the latest."""
        mask, _ = self.__dict__.get("_mask") or (None, None)
        weight = self.weight
        if mask is None or mask.dtype != weight.dtype or mask.device != weight.device:
            self._check_mask()
            with torch.inference_mode(False):  # else no backward could save it
                mask = self._new_mask(weight)
        if not (_autograd.traced() or _sharding.sharded(mask)):
            self.__dict__["_mask"] = mask, None
        return mask

    @mask.setter
    def mask(self, value):
        weight = self.weight
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"mask must be a tensor; got {type(value).__name__}")
        if value.shape != weight.shape:
            raise ValueError(f"mask must be of the weight's shape {tuple(weight.shape)}; got {tuple(value.shape)}")
        before = self.__dict__.get("_mask")
        self.__dict__["_mask"] = value, None
        try:
            self._check_mask()
        except ValueError:
            self.__dict__["_mask"] = before
            raise

    def _new_mask(self, weight):
        live = self._live_taps(weight.device).to(weight.dtype)
        return _sharding.placed_as(weight, live) if _sharding.sharded(weight) else live

    def _check_mask(self):
        """Raises if what was handed out as the mask has become another one. Its values are looked at once after it was
        handed out, and whenever its version says that something was written."""
        kept = self.__dict__.get("_mask")
        if kept is None or torch.compiler.is_exporting():
            return
        mask, version = kept
        compiling = torch.compiler.is_compiling()
        if _autograd.traced() and (not compiling or _autograd.transformed()):
            return
        if not compiling:
            if mask._version == version:
                return
            self.__dict__["_mask"] = mask, mask._version
        valid = mask == self._live_taps(mask.device) if not mask.is_meta else torch.tensor(mask._version == 0)
        message = f"mask must stay that of {self._mine()}; got another one"
        try:
            _checks.check_values(valid, message)
        except ValueError:
            self.__dict__["_mask"] = mask, None  # to be raised again
            raise

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.keep_mask:
            self._check_mask()
            destination[prefix + "mask"] = self._live_taps(self.weight.device).to(self.weight.dtype)

    def _clear_dead_taps(self):
        self._check_mask()
        if self.__dict__.get("_mask_options") is None or _autograd.traced():
            return
        for name in ("weight", "weight_orig"):  # the latter under torch.nn.utils.prune
            weight = self.__dict__["_parameters"].get(name)
            if weight is not None:
                # kept, since parameters are asked for in every step of some loops
                place, dead = self.__dict__.get("_dead_taps", (None, None))
                if place != weight.device:
                    dead = ~self._live_taps(weight.device)
                    self.__dict__["_dead_taps"] = weight.device, dead
                if _sharding.sharded(weight):
                    dead = _sharding.placed_as(weight, dead)
                with torch.inference_mode():  # parameters may be of inference mode
                    weight.data.masked_fill_(dead, 0)  # .data: no backward that waits reads a dead tap

    def live_taps(self):
        """The mask of the weight: bool, of its shape and on its device, True where a tap is live."""
        return self._live_taps(self.weight.device)

    def _live_taps(self, device):
        if self._taps is not None:
            shape = self.out_channels, self.in_channels, -1, -1
            return torch.tensor(self._taps, dtype=torch.bool, device=device).expand(shape).contiguous()
        return self._crop(self._full_mask(self.mask_type, self._mask_options, device))

    def _full_mask(self, mask_type, options, device):
        """A mask of the k x k kernel, whatever torch's default device is."""
        if torch.compiler.is_compiling():  # which enters no device
            return op.conv_mask2d(self.out_channels, self.in_channels, self.k, mask_type, **options).to(device)
        with torch.device(device):
            return op.conv_mask2d(self.out_channels, self.in_channels, self.k, mask_type, **options)

    def _crop(self, full):
        """Of a k x k kernel what this module stores."""
        return full

    def extra_repr(self):
        options = [f"mask_type={self.mask_type!r}"] if self._taps is None else [f"mask={self._taps}"]
        if self.channel_groups > 1:
            options.append(f"channel_groups={self.channel_groups}, group_order={self.group_order!r}")
        if self.activation is not None:
            options.append(f"activation={self.activation!r}")
        return ", ".join([super().extra_repr(), *options])

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Takes weights of nn.Conv2d and of masked convolutions of other projects, which hold a `mask` buffer."""
        mask, name = state_dict.pop(prefix + "mask", None), prefix + "weight"
        weight = state_dict.get(name)
        if weight is not None and _sharding.sharded(weight):  # of a module like this one, as FSDP loads it
            live = self._live_taps(weight.device)
            if weight.shape == live.shape:
                state_dict[name] = torch.where(_sharding.placed_as(weight, live), weight, 0)
            weight = None
        mask, weight = (t if t is None or t.dim() != 4 else self._full(t) for t in (mask, weight))
        if mask is not None and (reason := self._reject(mask)):
            errors.append(f"{prefix}mask {reason}")
        elif weight is not None and weight.dim() == 4:
            if weight.shape[2:] == (self.k, self.k):
                weight, dropped = self._crop(weight), self._dropped(weight)
            else:
                dropped = False
            live = self._live_taps(weight.device)
            if weight.shape == live.shape and not weight.is_meta:
                if dropped or bool((weight[~live] != 0).any()):
                    warnings.warn(
                        f"{type(self).__name__}: the state_dict's weight is not 0 at dead taps; they are set to 0, as "
                        "the convolution never reads them",
                        stacklevel=2,
                    )
                weight = torch.where(live, weight, 0)
            state_dict[name] = weight
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)

    def _full(self, weight):
        """A kernel of another project's shape as the k x k one that it is a part of."""
        return weight

    def _dropped(self, full):
        """Whether cropping a k x k kernel loses anything that is not 0."""
        kept = self._crop(torch.ones(full.shape[2:], dtype=torch.bool, device=full.device)[None, None])
        lost = torch.ones(full.shape[2:], dtype=torch.bool, device=full.device)
        lost[self._where(kept.shape[2:])] = False
        return bool((full[:, :, lost] != 0).any())

    def _where(self, kept):
        return slice(0, kept[0]), slice(0, kept[1])

    def _reject(self, mask):
        """None if a mask buffer is this module's, else why not, naming the convention that it follows."""
        mine = self._mine()
        if self._matches(mask, self.mask_type, self._mask_options):
            return None
        for mask_type in op.MASK_TYPES:
            for groups in sorted({self.channel_groups, 1, 3}):
                for order in op.GROUP_ORDERS:
                    for gated in (False, True):
                        options = {"channel_groups": groups, "group_order": order, "gated": gated}
                        if self._matches(mask, mask_type, options):
                            return f"is that of {self._describe(mask_type, options)}; this module has {mine}"
        return f"of shape {tuple(mask.shape)} follows no known convention; this module has {mine}"

    def _matches(self, mask, mask_type, options):
        if mask.dim() != 4:
            return False
        try:
            own = mask_type is None
            expected = self._live_taps("cpu") if own else self._full_mask(mask_type, options, "cpu")
        except (TypeError, ValueError):
            return False
        return any(
            mask.shape[2:] == candidate.shape[2:]
            and all(size in (1, own) for size, own in zip(mask.shape, candidate.shape, strict=True))
            and torch.equal(mask.cpu().bool().expand_as(candidate), candidate)
            for candidate in self._candidates(expected)
        )

    def _candidates(self, full):
        """The masks, of kernels of any shape that loads, that stand for a k x k one."""
        return full, self._crop(full)

    def _mine(self):
        if self._taps is not None:
            return f"mask {self._taps}"
        return self._describe(self.mask_type, self._mask_options)

    @staticmethod
    def _describe(mask_type, options):
        text = f"mask_type {mask_type!r}"
        if options["channel_groups"] > 1:
            text += f" with {options['channel_groups']} channel groups in {options['group_order']!r} order"
            if options["gated"]:
                text += ", for each half under a gate"
        return text


class MaskedConv2d(_CausalConv2d):
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
        taps, dilation = None, _square("dilation", dilation)
        if mask is None:
            kernel_size, mask_type = _square("kernel_size", kernel_size), "A" if mask_type is None else mask_type
            sides = kernel_size, kernel_size
        else:
            sides = _pair("kernel_size", kernel_size)
            taps = _taps_of(mask, (out_channels, in_channels, *sides), mask_type, channel_groups)
        same = tuple(side // 2 * dilation for side in sides)
        if _square("stride", stride) != 1:
            raise ValueError(f"stride must be 1, else the output does not lie on the input; got {stride}")
        if padding not in (None, "same") and _pair("padding", padding) != same:
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


class VerticalStackConv2d(_CausalConv2d):
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
        kernel_size = _square("kernel_size", kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            (kernel_size // 2 + 1, kernel_size),
            mask_type=mask_type,
            dilation=_square("dilation", dilation),
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


class HorizontalStackConv2d(_CausalConv2d):
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
        kernel_size = _square("kernel_size", kernel_size)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            (1, kernel_size // 2 + 1),
            mask_type=mask_type,
            dilation=_square("dilation", dilation),
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
        v_cond = h_cond = 0
        if cond is not None and self.cond is not None:
            v_cond, h_cond = self.cond(cond if cond.dim() == 4 else cond[:, :, None, None]).chunk(2, dim=1)
        z = self.vertical(v)
        seen = z
        if self.link_convention != "mask-first-layer":
            seen = nn.functional.pad(z, (0, 0, 1, 0))[:, :, :-1]
        if self.link_convention == "pad-first" and self.vertical.bias is not None:
            above = self.vertical.bias[:, None, None].expand(len(z), -1, 1, z.shape[3])
            seen = torch.cat([above.to(z.dtype), seen[:, :, 1:]], dim=2)
        gated = self.horizontal(h, cond=self.link(seen) + h_cond)
        return activate(z + v_cond, self.activation), self.out(gated, residual=h if self.residual else None)


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


def _taps_of(mask, shape, mask_type, channel_groups):
    """The rows of live taps of a mask for a weight of that shape."""
    if mask_type is not None:
        raise ValueError(f"mask_type must be None where a mask is given; got {mask_type!r}")
    if channel_groups != 1:
        raise ValueError(f"channel_groups must be 1 where a mask is given; got {channel_groups}")
    if isinstance(mask, torch.Tensor):
        of_pairs = mask.dim() == 4 and all(size in (1, own) for size, own in zip(mask.shape, shape, strict=True))
        if of_pairs and not torch.equal(mask != 0, (mask[:1, :1] != 0).expand_as(mask)):
            raise ValueError("mask must be alike for all pairs of channels; got one that is not")
        if mask.shape != shape[2:] and (not of_pairs or mask.shape[2:] != shape[2:]):
            raise ValueError(f"mask must be of shape {shape[2:]} or {shape}; got {tuple(mask.shape)}")
        mask = mask[0, 0] if of_pairs else mask
    rows, columns = shape[2:]
    live = op.live_taps(mask, (rows, columns), "mask")
    return tuple(tuple(int(row * columns + column in live) for column in range(columns)) for row in range(rows))


def _pair(name: str, value: Any) -> "tuple[int, int]":
    """The two numbers that an int or a pair stands for."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an int or a pair of them; got {pair}")
    return _checks.check_int(name, pair[0]), _checks.check_int(name, pair[1])


def _square(name: str, value: Any) -> int:
    """The number that an int or a pair of equal ints stands for."""
    if isinstance(value, (tuple, list)):
        if len(set(value)) != 1:
            raise ValueError(f"{name} must be the same in both directions; got {tuple(value)}")
        value = value[0]
    return _checks.check_int(name, value)
