"""What the layers of masked and causal convolutions share: an nn.Conv2d by its parameters, and what its mask is."""

import warnings
from typing import Any

import torch
from torch import nn

from fastelbo import _autograd, _checks, _sharding, backends
from fastelbo.ops import masked_conv2d as op


class CausalConv2d(nn.Conv2d):
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


def taps_of(mask, shape, mask_type, channel_groups):
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


def pair(name: str, value: Any) -> "tuple[int, int]":
    """The two numbers that an int or a pair stands for."""
    two = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(two) != 2:
        raise ValueError(f"{name} must be an int or a pair of them; got {two}")
    return _checks.check_int(name, two[0]), _checks.check_int(name, two[1])


def square(name: str, value: Any) -> int:
    """The number that an int or a pair of equal ints stands for."""
    if isinstance(value, (tuple, list)):
        if len(set(value)) != 1:
            raise ValueError(f"{name} must be the same in both directions; got {tuple(value)}")
        value = value[0]
    return _checks.check_int(name, value)
