"""A block of the Gated PixelCNN at once: by raw ops on CPUs, in two launches where FASTELBO_CONV=block asks for them.

It is no op that torch knows: what traces, transforms or watches a call gets the layers that the block is composed of.
"""

import functools
import importlib

import torch
import torch.nn.functional as F  # noqa: N812

from fastelbo import _autograd, _checks, _library, backends, reference
from fastelbo.ops import masked_conv2d
from fastelbo.reference.masked_conv2d import activate


def seen_by_link(z: torch.Tensor, bias: "torch.Tensor | None", convention: str) -> torch.Tensor:
    """What the link of a block reads for every pixel.

    Args:
        z: the vertical convolution's output, [N, 2 C, H, W].
        bias: of that convolution.
        convention: a GatedMaskedConv2d's link.
    """
    if convention == "mask-first-layer":
        return z
    shifted = F.pad(z, (0, 0, 1, 0))[:, :, :-1]
    if convention == "shift" or bias is None:
        return shifted
    above = bias[:, None, None].expand(len(z), -1, 1, z.shape[3])
    return torch.cat([above.to(z.dtype), shifted[:, :, 1:]], dim=2)


def gated_block(tensors, options, chosen: "str | None") -> "tuple[torch.Tensor, torch.Tensor] | None":
    """Both stacks, [N, C, H, W]; None where the block's layers are to be called one by one.

    Args:
        tensors: v and h; weight and bias of the vertical convolution, the horizontal one, the link and the one at the
            end; what is added before the gates of v and of h, which may have size 1 where it is the same throughout.
        options: the mask types of h and v, the link's convention, the dilation, the channel groups and their order, the
            gate, and whether h is added at the end.
        chosen: the caller's backend.
    """
    if not _fit(tensors, options[-1]):
        return None
    v = tensors[0]
    backend = masked_conv2d.backend_of(v, chosen)
    if backend not in ("cpu", "triton") or (backend == "triton" and backends.CONVOLUTIONS != "block"):
        return None
    if masked_conv2d._autocast(v):
        dtype = torch.get_autocast_dtype(v.device.type)
        tensors = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)
    if backend == "triton" and not _kernels().takes(tensors[0].dtype):
        return None
    size = v.shape[0], tensors[6].shape[0], *v.shape[2:]
    tensors = *tensors[:10], *(cond if cond is None else cond.expand(size) for cond in tensors[10:])
    if _autograd.recorded(tensors):
        return _autograd.record(_GatedBlock, tensors, options, backend)
    return _FORWARD[backend](tensors, options, False)[:2]


@functools.cache
def _kernels():
    return importlib.import_module("fastelbo.kernels.gated_block")


def _fit(tensors, add) -> bool:
    """Whether tensors are plain ones of one device, dtype and block; else the layers say what is wrong."""
    v, h, vertical, vertical_bias, horizontal, horizontal_bias, link, link_bias, out, out_bias, *conds = tensors
    given = [v, h, *[tensor for tensor in tensors[2:] if tensor is not None]]
    if any(type(x) not in _library.PLAIN or x.dtype not in _checks.DTYPES or x.device != v.device for x in given):
        return False
    if v.dim() != 4 or v.shape != h.shape or v.numel() == 0:
        return False
    if any(x.dtype != v.dtype for x in given) and not masked_conv2d._autocast(v):
        return False
    inputs, outputs = v.shape[1], out.shape[0]
    shapes = (vertical.shape[:2], horizontal.shape[:2], link.shape, out.shape)
    both = 2 * outputs
    biases = ((vertical_bias, both), (horizontal_bias, both), (link_bias, both), (out_bias, outputs))
    size = v.shape[0], both, *v.shape[2:]
    return (
        shapes == ((both, inputs), (both, inputs), (both, both, 1, 1), (outputs, outputs, 1, 1))
        and all(bias is None or bias.shape == (channels,) for bias, channels in biases)
        and all(c is None or all(a in (1, b) for a, b in zip(c.shape, size, strict=True)) for c in conds)
        and (inputs == outputs or not add)
    )


def _empty(shape, like, wanted=True):
    """Of the block's own: with channels side by side."""
    options = {"dtype": like.dtype, "device": like.device}
    return torch.empty(shape, memory_format=torch.channels_last, **options) if wanted else torch.empty(0, **options)


def _fake(v, h, vertical, vertical_bias, horizontal, horizontal_bias, link, link_bias, out, *rest):
    images, inputs, rows, columns = v.shape
    one, both = ((images, channels, rows, columns) for channels in (out.shape[0], link.shape[0]))
    groups, keep = rest[-5], rest[-1]
    joined = _kernels().joins(v.dtype, inputs, out.shape[0], groups)
    found = masked_conv2d._empty_image(one, v), masked_conv2d._empty_image(one, h), _empty(both, v)
    return *found, _empty(both, v, keep), _empty(one, v, keep or not joined)


def _in_two_launches(tensors, options, keep):
    """v, h, z, and what is before and after the horizontal gate, where that is kept."""
    return _library.run_triton("gated_block_fwd", _fake, (), range(12), *tensors, *options, keep)


def _shifting(link, convention):
    """The link as a convolution that shifts, of the rows above and at the pixel, and its taps."""
    return (link, []) if convention == "mask-first-layer" else (F.pad(link, (0, 0, 0, 1)), [0])


def _by_ops(tensors, options, keep):
    """As _in_two_launches."""
    v, h, vertical, vertical_bias, horizontal, horizontal_bias, link, link_bias, out, out_bias, v_cond, h_cond = tensors
    mask_type, vertical_mask, convention, dilation, groups, order, activation, add = options
    convolve, point = masked_conv2d._FWD["cpu"], ("B", "square", 1)
    rows = v, vertical, vertical_bias, None, None, vertical_mask, "vertical", dilation, 1, order
    if v_cond is None:
        v_out, z = convolve(*rows, activation, True)
    else:
        z, _ = convolve(*rows, "", False)
        v_out = activate(z + v_cond, activation)
    if convention == "pad-first":
        seen, weight, taps = seen_by_link(z, vertical_bias, convention), link, []
    else:
        seen, (weight, taps) = z, _shifting(link, convention)
    of_link, _ = convolve(seen, weight, link_bias, h_cond, None, *point, 1, order, "", False, taps)
    row = mask_type, "horizontal", dilation, groups, order, activation
    gated, before = convolve(h, horizontal, horizontal_bias, of_link, None, *row, keep)
    y, _ = convolve(gated, out, out_bias, None, h if add else None, *point, groups, order, "", False)
    return v_out, y, z, before, gated


_FORWARD = {"cpu": _by_ops, "triton": _in_two_launches}


def _reference(tensors, options):
    v, h, vertical, vertical_bias, horizontal, horizontal_bias, link, link_bias, out, out_bias, v_cond, h_cond = tensors
    mask_type, vertical_mask, convention, dilation, groups, order, activation, add = options
    z = reference.causal_conv2d(
        v, vertical, vertical_bias, stack="vertical", mask_type=vertical_mask, dilation=dilation
    )
    of_link = F.conv2d(seen_by_link(z, vertical_bias, convention), link, link_bias)
    of_groups = {"channel_groups": groups, "group_order": order}
    gated = reference.causal_conv2d(
        h, horizontal, horizontal_bias, stack="horizontal", mask_type=mask_type, dilation=dilation, **of_groups,
        activation=activation, cond=of_link if h_cond is None else of_link + h_cond,
    )  # fmt: skip
    y = reference.masked_conv2d(gated, out, out_bias, mask_type="B", **of_groups, residual=h if add else None)
    return activate(z if v_cond is None else z + v_cond, activation), y


@_autograd.recordable
class _GatedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.set_materialize_grads(False)
        *tensors, ctx.options, ctx.backend = arguments
        v, h, *kept = _FORWARD[ctx.backend](tensors, ctx.options, True)
        ctx.save_for_backward(*tensors, *kept)
        return v, h

    @staticmethod
    def backward(ctx, d_v_out, d_h_out):
        *inputs, z, before, gated = ctx.saved_tensors
        v, h, vertical, vertical_bias, horizontal, _, link, _, out, _, v_cond, _ = inputs
        wanted = ctx.needs_input_grad[:12]
        if _autograd.differentiable_backward():
            grads = _autograd.reference_gradients(
                lambda *inputs: _reference(inputs, ctx.options), inputs, wanted, (d_v_out, d_h_out)
            )
            return *grads, None, None
        if d_v_out is None and d_h_out is None:
            return (None,) * 14
        mask_type, vertical_mask, convention, dilation, groups, order, activation, add = ctx.options
        differentiate = masked_conv2d._BWD[ctx.backend]
        found: list = [None] * 12
        d_z = None
        row = mask_type, "horizontal", dilation, groups, order, activation
        rows = vertical_mask, "vertical", dilation, 1, order
        point = "B", "square", 1
        if d_v_out is not None:
            both = z if v_cond is None else z + v_cond
            d_z = found[10] = differentiate(d_v_out, v, vertical, both, *rows, activation, False, False, False, 4)[3]
        if d_h_out is not None:
            d_gated, found[8], found[9], _ = differentiate(
                d_h_out, gated, out, None, *point, groups, order, "", True, *wanted[8:10], 0
            )
            of_bias = wanted[5] or wanted[7]  # which are added at the same place
            found[1], found[4], found[5], d_both = differentiate(
                d_gated, h, horizontal, before, *row, wanted[1], wanted[4], of_bias, 4
            )
            found[7], found[11] = found[5], d_both
            if add and wanted[1]:
                found[1] += d_h_out
            weight, taps = _shifting(link, convention)
            d_seen, d_link, _, _ = differentiate(
                d_both, z, weight, None, *point, 1, order, "", True, wanted[6], False, 0, taps
            )
            d_z = d_seen if d_z is None else d_seen.add_(d_z)  # d_z may be v_cond's gradient, too
            found[6] = d_link[:, :, :1] if wanted[6] else None
        found[0], found[2], found[3], _ = differentiate(d_z, v, vertical, None, *rows, "", *wanted[:1], *wanted[2:4], 0)
        if d_h_out is not None and convention == "pad-first" and vertical_bias is not None:
            above = d_both[:, :, 0].sum((0, 2), dtype=torch.float64)  # of what reads the bias
            if wanted[3]:
                found[3] = found[3] + (link[:, :, 0, 0].double().T @ above).to(z.dtype)
            if wanted[6]:
                found[6] = found[6] + torch.outer(above, vertical_bias.double())[:, :, None, None].to(z.dtype)
        return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), None, None
