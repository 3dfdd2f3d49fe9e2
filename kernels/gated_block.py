"""The block of a Gated PixelCNN in Triton, in two launches: the vertical stack, and all of the horizontal one.

The first is masked_conv2d's kernel, which keeps what is before the gate: the link reads it. A program of the second
adds the row's taps and the link's product in one tile, and gates it; where it has all channels of its pixels, the 1 x 1
convolution at the end is a product of that tile. Of more channels that convolution is a launch of its own.
"""

import functools

import torch
import triton
import triton.language as tl

from fastelbo import _library
from fastelbo.kernels import elementary, plan
from fastelbo.kernels import masked_conv2d as convolutions
from fastelbo.kernels.launch import TENSOR, Launch
from fastelbo.kernels.masked_conv2d import Taps, Tiles
from fastelbo.kernels.masked_conv2d_kernels import (
    before_gate,
    dot,
    group_of,
    pixels_from,
    sigmoid,
    store_image,
    sum_taps,
)
from fastelbo.reference.scale import arithmetic_dtype

_INTERPRETED: tl.constexpr = tl.constexpr(_library.INTERPRETED)

_MOST = 128  # channels that a program can have all of


@triton.jit(do_not_specialize=["images", "rows", "columns", "dilation"])
def _horizontal(
    h, h_strides, weight, bias, bias_stride,
    z, z_strides, link, link_bias, link_bias_stride, above, above_stride,  # above: what the link sees there; None: 0
    cond, cond_strides, kept, kept_strides, gated, gated_strides,
    out, out_bias, out_bias_stride, residual, residual_strides, y, y_strides,  # out: None where gated is all there is
    images, rows, columns, dilation,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, KERNEL: tl.constexpr, LINK: tl.constexpr,
    T: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    IN_PART: tl.constexpr, LINK_K: tl.constexpr, LINK_IN_PART: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """gated = gate(row's taps of h + link of z + cond), before which kept; y = out(gated) + residual.

    A program takes N / 2 channels of M pixels; where there is out, one after the other all channels, which are ALL.
    """
    WIDTH: tl.constexpr = N // 2
    BLOCKS: tl.constexpr = (OUTPUTS + WIDTH - 1) // WIDTH
    GROUPS: tl.constexpr = KERNEL[4]
    INTERLEAVED: tl.constexpr = KERNEL[5]
    JOINED: tl.constexpr = out is not None
    KEEP: tl.constexpr = kept is not None
    program = tl.program_id(0)
    at = (program if JOINED else program // BLOCKS).to(tl.int64) * M
    n, row, column, valid = pixels_from(at, images, rows, columns, M)
    to = tl.arange(0, ALL)
    total = tl.zeros([M, ALL], T)
    for block in range(BLOCKS if JOINED else 1):
        first = (block if JOINED else program % BLOCKS) * WIDTH
        lane = tl.arange(0, N)
        within = first + lane // 2  # side by side, what the gate joins: a thread has both
        both = within + lane % 2 * OUTPUTS
        u = sum_taps(
            h, h_strides, weight, n, row, column, valid, both, within < OUTPUTS, rows, columns, dilation,
            1, INPUTS, INPUTS, OUTPUTS, KERNEL, 1, T, PRECISION, FLAT, M, N, K, IN_PART,
        )  # fmt: skip
        u += sum_taps(
            z, z_strides, link, n, row, column, valid, both, within < OUTPUTS, rows, columns, 1,
            1, 2 * OUTPUTS, 2 * OUTPUTS, OUTPUTS, LINK, 1, T, PRECISION, False, M, N, LINK_K, LINK_IN_PART,
            above, above_stride,
        )  # fmt: skip
        c = first + tl.arange(0, WIDTH)
        channel = c.to(tl.int64)[None, :]
        other = channel + OUTPUTS
        mask = valid[:, None] & (channel < OUTPUTS)
        a, b = tl.split(tl.reshape(u, [M, WIDTH, 2]))
        a = before_gate(a, link_bias, link_bias_stride, None, None, None, None, n, row, column, channel, mask, False)
        b = before_gate(b, link_bias, link_bias_stride, None, None, None, None, n, row, column, other, mask, False)
        a = before_gate(
            a, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, KEEP
        )
        b = before_gate(b, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, other, mask, KEEP)
        if ACTIVATION == "tanh_sigmoid":
            a = elementary.tanh(a)
        g = a * sigmoid(b)
        if gated is not None:
            store_image(gated, gated_strides, n, row, column, channel, g, mask)
        if JOINED:
            if not _INTERPRETED:  # which multiplies in T
                g = g.to(h.dtype.element_ty)
            place = out + to[None, :] * OUTPUTS + c[:, None]
            exists = (c < OUTPUTS)[:, None] & (to < OUTPUTS)[None, :]
            if GROUPS == 1:
                total = dot(g, tl.load(place, mask=exists, other=0), total, PRECISION)
            else:
                read = group_of(c, OUTPUTS, GROUPS, INTERLEAVED)
                for group in range(GROUPS):
                    reads = group <= group_of(to, OUTPUTS, GROUPS, INTERLEAVED)
                    w = tl.load(place, mask=exists & (read == group)[:, None] & reads[None, :], other=0)
                    part = dot(tl.where((read == group)[None, :], g, 0), w, tl.zeros([M, ALL], T), PRECISION)
                    total += tl.where(reads[None, :], part, 0.0)  # no product: what it does not read may be NaN
    if JOINED:
        channel = to.to(tl.int64)[None, :]
        mask = valid[:, None] & (channel < OUTPUTS)
        total = before_gate(
            total, out_bias, out_bias_stride, residual, residual_strides, None, None, n, row, column, channel, mask,
            False,
        )  # fmt: skip
        store_image(y, y_strides, n, row, column, channel, total, mask)


def takes(dtype: torch.dtype) -> bool:
    """Whether kernels are for operands of a dtype: without tensor cores operands and sums share the registers."""
    tensor_cores = dtype != torch.float64 and (dtype != torch.float32 or convolutions.precision_of(dtype) == "tf32")
    return tensor_cores or _library.INTERPRETED


def joins(dtype: torch.dtype, inputs: int, outputs: int, groups: int) -> bool:
    """Whether the convolution at the end is part of the second launch: its sums, of groups twice, are in registers."""
    most = _MOST if groups == 1 and inputs >= convolutions._FEW else _MOST // 2
    return outputs <= (most // 2 if groups > 1 and dtype == torch.float32 else most)


def tiles_for(inputs, outputs, taps, more) -> "tuple[Tiles, int]":
    """Of the horizontal launch: its tiles, and the link's K; more: whether it has operands that not every block has."""
    flat = inputs < convolutions._FEW
    power = convolutions.power_of_two
    k = power(taps.TAPS * inputs if flat else inputs, 16, 32)
    if _library.INTERPRETED:
        return Tiles(128, 2 * power(outputs, 8, 16), 4 * k, flat), power(2 * outputs, 16, 256)
    width = 16 if flat or more or taps.GROUPS > 1 else 32  # so that all fits the registers
    return Tiles(64, 2 * power(outputs, 16, width), k, flat, 4 if flat else 8), power(2 * outputs, 16, 32)


def gated_block_fwd(results, *arguments):
    """What fills both stacks, z, and, where kept, what is before and after the horizontal gate.

    Args:
        results: those.
        arguments: the tensors and the options of fastelbo.ops._gated_block, and whether the last two are kept.
    """
    v, h, vertical, vertical_bias, horizontal, horizontal_bias, _, link_bias, out, out_bias, *rest = arguments
    v_cond, h_cond, mask_type, vertical_mask, convention, dilation, groups, order, activation, add, keep = rest
    v_out, h_out, z, kept, gated = results
    images, inputs, rows, columns = h.shape
    outputs, dtype = h_out.shape[1], h.dtype
    joined = joins(dtype, inputs, outputs, groups)
    has_kept, has_gated = keep, keep or not joined
    part = convolutions.reaching_part(horizontal, "horizontal", h.shape[2:], dilation)
    taps = convolutions.taps_of(horizontal, mask_type, "horizontal", groups, order, part=part)
    first_row = convention == "pad-first"
    link_taps = Taps(1, 0 if convention == "mask-first-layer" else 1, 0, 1, 1, True, False)
    read_rows = convolutions.masked_conv2d_fwd(
        (v_out, z), v, vertical, vertical_bias, v_cond, None,
        vertical_mask, "vertical", dilation, 1, order, activation, True, bare=True,
    )  # fmt: skip
    image = convolutions.image_of

    def vector(bias, wanted=True):
        return (TENSOR, bias.stride(0)) if bias is not None and wanted else (None, 0)

    last = None, None, 0, *image(None), *image(None)
    if joined:
        last = TENSOR, *vector(out_bias), *image(h if add else None), *image(h_out)
    else:
        finish = convolutions.masked_conv2d_fwd(
            (h_out, kept), gated, out, out_bias, None, h if add else None, "B", "square", 1, groups, order, "", False
        )

    @functools.cache
    def read_row(precision):
        tiles, k = tiles_for(inputs, outputs, taps, h_cond is not None or first_row)
        programs = triton.cdiv(images * rows * columns, tiles.M)
        programs *= 1 if joined else triton.cdiv(outputs, tiles.N // 2)
        return Launch(
            _horizontal, programs,
            *convolutions.image_innermost(h), TENSOR, *vector(horizontal_bias),
            *image(z), TENSOR, *vector(link_bias), *vector(vertical_bias, first_row),
            *image(h_cond), *image(kept if has_kept else None), *image(gated if has_gated else None), *last,
            images, rows, columns, dilation,
            INPUTS=inputs, OUTPUTS=outputs, ACTIVATION=activation, KERNEL=taps.constants, LINK=link_taps.constants,
            T=plan.TYPES[arithmetic_dtype(h)], PRECISION=precision,
            IN_PART=convolutions.steps_of_a_part(dtype, precision, tiles.K),
            LINK_K=k, LINK_IN_PART=convolutions.steps_of_a_part(dtype, precision, k),
            ALL=convolutions.power_of_two(outputs, 16, _MOST),
            **tiles._asdict(), enable_fp_fusion=False,
        )  # fmt: skip

    def fill(results, *tensors):
        v, h, vertical, vertical_bias, horizontal, horizontal_bias, link, link_bias, out, out_bias, *added = tensors
        v_cond, h_cond = added
        v_out, h_out, z, kept, gated = results
        residual = h if add else None
        read_rows((v_out, z), v, vertical, vertical_bias, v_cond, None)
        row, link = (convolutions.packed_weight(weight) for weight in (convolutions.part_of(horizontal, part), link))
        read_row(convolutions.precision_of(dtype))(
            convolutions.channels_innermost(h), row, horizontal_bias, z, link, link_bias,
            vertical_bias if first_row else None, h_cond, kept if has_kept else None, gated if has_gated else None,
            *((out.contiguous(), out_bias, residual, h_out) if joined else ()),
        )  # fmt: skip
        if not joined:
            finish((h_out, kept), gated, out, out_bias, None, residual)

    return fill
