"""What torch.utils.flop_counter counts of our ops: multiplications with live taps, as 2 FLOPs each. The rest is
elementwise, of which it counts nothing."""

import importlib.abc
import importlib.machinery
import sys
from collections import Counter

import torch

from fastelbo import _library
from fastelbo.reference.masked_conv2d import GATES, channel_groups_of

_COUNTER = "torch.utils.flop_counter"


def live_products(weight_shape, mask_type, stack, channel_groups, group_order, gated):
    """How many of a weight's entries are live.

    Args:
        weight_shape: [C_out, C_in, rows, columns].
        mask_type, stack, channel_groups, group_order: as the ops of masked_conv2d take them.
        gated: whether a gate joins two halves of the output's channels.
    """
    outputs, inputs, rows, columns = weight_shape
    if stack == "vertical":
        return outputs * inputs * (rows - (mask_type == "A")) * columns
    above, left = (rows // 2, columns // 2) if stack == "square" else (rows - 1, columns - 1)
    writes, reads = (
        Counter(channel_groups_of(channels, channel_groups, group_order, of_gate))
        for channels, of_gate in ((outputs, gated), (inputs, False))
    )
    own = sum(writes[o] * reads[i] for o in writes for i in reads if i < o + (mask_type == "B"))
    return outputs * inputs * (above * columns + left) + own


def _reaching(weight_shape, stack, size, dilation):
    """The shape of the part of a weight whose taps reach into an image of that size from some pixel."""
    outputs, inputs, rows, columns = weight_shape
    above, left = rows // 2 if stack == "square" else rows - 1, columns - 1 if stack == "horizontal" else columns // 2
    above, left = (min(reach, (extent - 1) // dilation) for reach, extent in zip((above, left), size, strict=True))
    columns = left + 1 if stack == "horizontal" else 2 * left + 1
    return outputs, inputs, 2 * above + 1 if stack == "square" else above + 1, columns


def _reached(taps, weight_shape, size, dilation):
    """How many of these taps read the image from some pixel."""
    rows, columns = weight_shape[2:]
    offsets = ((tap // columns - rows // 2, tap % columns - columns // 2) for tap in taps)
    return sum(abs(down) * dilation < size[0] and abs(right) * dilation < size[1] for down, right in offsets)


def _forward(*arguments, out_shape=None):
    given = _library.whole(arguments, _library.defaults_of(torch.ops.fastelbo.masked_conv2d_fwd.default._schema))
    input, weight, _, _, _, mask_type, stack, dilation, channel_groups, group_order, activation, _, taps = given
    images, _, rows, columns = input
    gated = activation in GATES
    if taps:
        return 2 * images * rows * columns * weight[0] * weight[1] * _reached(taps, weight, (rows, columns), dilation)
    part = _reaching(weight, stack, (rows, columns), dilation)
    return 2 * images * rows * columns * live_products(part, mask_type, stack, channel_groups, group_order, gated)


def _backward(
    d_y, input, weight, kept, mask_type, stack, dilation, channel_groups, group_order, activation,
    want_input, want_weight, want_bias, cond_ndim, taps=(), out_shape=None,
):  # fmt: skip
    options = mask_type, stack, dilation, channel_groups, group_order, activation
    return (want_input + want_weight) * _forward(input, weight, None, None, None, *options, False, taps)


def _register(counter):
    for namespace in (torch.ops.fastelbo, torch.ops.fastelbo_triton):
        counter.register_flop_formula(namespace.masked_conv2d_fwd)(_forward)
        counter.register_flop_formula(namespace.masked_conv2d_bwd)(_backward)


class _Finder(importlib.abc.MetaPathFinder):
    """Registers the formulas when torch's counter is imported, which would import Triton here."""

    def find_spec(self, name, path, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Registers the formulas now, or when torch.utils.flop_counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
