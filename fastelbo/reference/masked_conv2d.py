r"""Masked (autoregressive) convolutions.

An image is generated in raster order. The output at row r and column c may read the rows above and, in row r, what lies
to the left; mask B reads the pixel (r, c) itself too, mask A does not. A k x k kernel then has live taps in the k//2
rows above its centre and left of the centre in its own row, and the convolution is a sum of three dense ones,

.. math:: y_{rc} = \sum_{i<h,\,j} w_{ij} x_{r+(i-h)d,\,c+(j-h)d} + \sum_{j<h} w_{hj} x_{r,\,c+(j-h)d} + w_{hh} x_{rc},
          \qquad h = \lfloor k/2 \rfloor,

none of which reads a dead tap or a future pixel. That is how it is computed here: a product with a mask of zeros has
the same value only as long as every weight and pixel is finite. Channel groups (colours) are generated in turn within a
pixel; they limit the last term to the pairs of channels with g_in <= g_out (B) or g_in < g_out (A).
"""

import torch
import torch.nn.functional as F  # noqa: N812

from fastelbo.reference.scale import arithmetic

GATES = ("tanh_sigmoid", "glu")


def channel_groups_of(channels, groups, order, gated=False):
    """The group of every channel: "interleaved" c % G, "contiguous" c * G // C; per half where a gate halves them."""
    if gated:
        return channel_groups_of(channels // 2, groups, order) * 2
    if order == "interleaved":
        return [c % groups for c in range(channels)]
    return [c * groups // channels for c in range(channels)]


def conv_mask2d(
    out_channels, in_channels, kernel_size, mask_type, *, channel_groups=1, group_order="interleaved", gated=False
):
    """The live taps; see fastelbo.conv_mask2d."""
    centre = kernel_size // 2
    mask = torch.zeros(out_channels, in_channels, kernel_size, kernel_size, dtype=torch.bool)
    mask[:, :, :centre] = True
    mask[:, :, centre, :centre] = True
    g_out = torch.tensor(channel_groups_of(out_channels, channel_groups, group_order, gated))
    g_in = torch.tensor(channel_groups_of(in_channels, channel_groups, group_order))
    mask[:, :, centre, centre] = g_in <= g_out[:, None] if mask_type == "B" else g_in < g_out[:, None]
    return mask


def activate(z, activation):
    """The activation of the pre-activation z; the gates halve its channels."""
    if activation is None:
        return z
    if activation == "relu":
        return torch.relu(z)
    if activation == "elu":
        return F.elu(z)
    a, b = z.chunk(2, dim=1)
    return (torch.tanh(a) if activation == "tanh_sigmoid" else a) * torch.sigmoid(b)


def _rectangle(x, weight, above, left, dilation):
    """The convolution whose first tap lies `above` rows up and `left` columns to the left, in units of the dilation."""
    rows, columns = x.shape[2:]
    if not torch.compiler.is_compiling():  # whose sizes may be symbols; taps that reach into the image from no pixel
        top, first = (max(before - (size - 1) // dilation, 0) for before, size in ((above, rows), (left, columns)))
        bottom, end = (before + (size - 1) // dilation + 1 for before, size in ((above, rows), (left, columns)))
        weight, above, left = weight[:, :, top : max(bottom, 0), first : max(end, 0)], above - top, left - first
        if weight.numel() == 0:
            return _nothing(x, weight, weight.shape[0])
    down, across = (size - 1 for size in weight.shape[2:])
    x = F.pad(x, [dilation * size for size in (left, across - left, above, down - above)])  # or cut, below 0
    return F.conv2d(x, weight, dilation=dilation)


def _nothing(x, weight, channels):
    """Zeros, which depend on both operands as far as autograd knows."""
    return x.new_zeros(x.shape[0], channels, *x.shape[2:]) + x[:0].sum() + weight[:0].sum()


def _centre(x, weight, mask_type, groups, order, gated):
    """The 1 x 1 convolution of the tap that reads the pixel itself; None where no pair of channels is live."""
    out_channels, in_channels = weight.shape
    g_out = channel_groups_of(out_channels, groups, order, gated)
    g_in = channel_groups_of(in_channels, groups, order)
    pieces, order_of_pieces = [], []
    for group in range(groups):
        reads = [c for c in range(in_channels) if g_in[c] < group + (mask_type == "B")]
        writes = [c for c in range(out_channels) if g_out[c] == group]
        if not writes:
            continue
        order_of_pieces += writes
        if reads and len(reads) < in_channels:
            pieces.append(F.conv2d(x[:, reads], weight[writes][:, reads, None, None]))
        elif reads:
            pieces.append(F.conv2d(x, weight[writes][:, :, None, None]))
        else:
            pieces.append(_nothing(x, weight, len(writes)))
    back = sorted(range(out_channels), key=order_of_pieces.__getitem__)
    return torch.cat(pieces, dim=1)[:, back]


def _runs(taps, columns):
    """Live taps next to each other in a row: that row, the first column and the one after the last."""
    starts = [tap for tap in taps if tap % columns == 0 or tap - 1 not in taps]
    ends = [tap for tap in taps if tap % columns == columns - 1 or tap + 1 not in taps]
    return [(a // columns, a % columns, b % columns + 1) for a, b in zip(starts, ends, strict=True)]


def _convolve(tensors, mask_type, stack, dilation, groups, order, activation, taps=()):
    dtype = tensors[0].dtype
    x, weight, bias, cond, residual = arithmetic(*tensors)
    above = weight.shape[2] // 2 if stack == "square" else weight.shape[2] - 1
    left = weight.shape[3] - 1 if stack == "horizontal" else weight.shape[3] // 2
    parts = []
    if taps:
        for row, first, end in _runs(taps, weight.shape[3]):
            part = weight[:, :, row : row + 1, first:end]
            parts.append(_rectangle(x, part, above - row, left - first, dilation))
    elif stack == "vertical":
        rows = above + (mask_type == "B")
        if rows:
            parts.append(_rectangle(x, weight[:, :, :rows], above, left, dilation))
    else:
        if above:
            parts.append(_rectangle(x, weight[:, :, :above], above, left, dilation))
        if left:
            parts.append(_rectangle(x, weight[:, :, above : above + 1, :left], 0, left, dilation))
        if mask_type == "B" or groups > 1:
            gated = activation in GATES
            parts.append(_centre(x, weight[:, :, above, left], mask_type, groups, order, gated))
    z = sum(parts[1:], parts[0]) if parts else _nothing(x, weight, weight.shape[0])
    if bias is not None:
        z = z + bias[:, None, None]
    if cond is not None:
        z = z + (cond[:, :, None, None] if cond.dim() == 2 else cond)
    y = activate(z, activation)
    return (y if residual is None else y + residual).to(dtype)


def masked_conv2d(
    input,
    weight,
    bias=None,
    *,
    mask_type,
    dilation=1,
    channel_groups=1,
    group_order="interleaved",
    activation=None,
    cond=None,
    residual=None,
    taps=(),
):
    """A masked convolution; see fastelbo.masked_conv2d. Batched tensors only; taps by their places in raster order."""
    tensors = input, weight, bias, cond, residual
    return _convolve(tensors, mask_type, "square", dilation, channel_groups, group_order, activation, taps)


def causal_conv2d(
    input,
    weight,
    bias=None,
    *,
    stack,
    mask_type="B",
    dilation=1,
    channel_groups=1,
    group_order="interleaved",
    activation=None,
    cond=None,
):
    """A convolution of the vertical or horizontal stack; see fastelbo.causal_conv2d. Batched tensors only."""
    tensors = input, weight, bias, cond, None
    return _convolve(tensors, mask_type, stack, dilation, channel_groups, group_order, activation)
