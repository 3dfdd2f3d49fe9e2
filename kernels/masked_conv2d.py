"""Masked convolutions in Triton: where live taps lie, and tiles and launches of masked_conv2d_kernels.py's kernels."""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import triton

from fastelbo import _autograd, _library, backends
from fastelbo.kernels import masked_conv2d_kernels as kernels
from fastelbo.kernels import plan, tune
from fastelbo.kernels.launch import TENSOR, Launch, place
from fastelbo.reference.masked_conv2d import GATES, activate, channel_groups_of
from fastelbo.reference.scale import arithmetic_dtype

boxes = None  # the kernels over TMA boxes, where the environment asks for them
if backends.CONVOLUTIONS == "tma" and not _library.INTERPRETED:
    from fastelbo.kernels import masked_conv2d_tma as boxes


# Programs that share a weight gradient, and the fewest pixels worth one. Of no GPU in particular: the sums, and so
# their rounding, are the same on all.
_WEIGHT_PROGRAMS = 512
_LEAST_PIXELS = 512
_FEW = 16  # input channels below which a step takes taps and channels together
_SUM = 128  # products that float32 sums take one after the other before their total joins the others
_REDUCE = 512  # elements of a program that adds up shares of a weight gradient
_CHUNK = 2048  # pixels of a program that sums a gradient over an image


class Taps(NamedTuple):
    """Where a kernel's live taps lie, as constants of a Triton kernel."""

    COLUMNS: int  # of the kernel
    UP: int  # rows above the pixel itself
    LEFT: int  # columns left of it
    TAPS: int  # live for every pair of channels, the first in raster order
    GROUPS: int  # 1: no further tap; else that of the pixel itself is live for some pairs
    INTERLEAVED: bool
    STRICT: bool  # mask A: a channel must be of a lesser group, not of the same
    PLACES: "tuple[int, ...]" = ()  # of live taps, in raster order, where these are not the first

    @property
    def constants(self):
        """As a kernel takes them: the places follow their being there."""
        return *self[:7], len(self.PLACES) > 0, *self.PLACES


def _up_left(weight, stack):
    """Rows and columns of a weight before the tap of the pixel itself."""
    rows, columns = weight.shape[2:]
    return rows // 2 if stack == "square" else rows - 1, columns - 1 if stack == "horizontal" else columns // 2


def reaching_part(weight, stack, size, dilation):
    """The part of a weight, or of its gradient, whose taps reach into an image of that size from some pixel: an index
    of it, None for all of it."""
    up, left = _up_left(weight, stack)
    above, beside = ((extent - 1) // dilation for extent in size)
    if above >= up and beside >= left:
        return None
    rows = slice(max(up - above, 0), up + above + 1)
    return slice(None), slice(None), rows, slice(max(left - beside, 0), left + beside + 1)


def part_of(weight, index):
    """The part of a weight, by reaching_part's index."""
    return weight if index is None else weight[index]


def taps_of(weight, mask_type, stack, groups, order, listed=(), part=None) -> Taps:
    """The live taps of a weight, or of a part of it; listed: their places in the whole, where there is a list."""
    whole, weight = weight.shape[3], part_of(weight, part)
    rows, columns = weight.shape[2:]
    up, left = _up_left(weight, stack)
    if listed:
        first_row, first_column = (0, 0) if part is None else (cut.start for cut in part[2:])
        at = ((tap // whole - first_row, tap % whole - first_column) for tap in listed)
        places = tuple(row * columns + column for row, column in at if 0 <= row < rows and 0 <= column < columns)
        return Taps(columns, up, left, len(places), 1, True, False, places)
    if stack == "vertical":
        return Taps(columns, up, left, (up + (mask_type == "B")) * columns, 1, True, False)
    taps = up * columns + left + (mask_type == "B" and groups == 1)
    return Taps(columns, up, left, taps, groups, order == "interleaved", mask_type == "A")


class Tiles(NamedTuple):
    """How programs cut their work."""

    M: int
    N: int
    K: int
    FLAT: bool
    num_warps: int = 4  # with eight, loops over taps and channels at once have been compiled to wrong code
    num_stages: int = 3


def power_of_two(count, least, most):
    """That is next to a count, within bounds."""
    return max(least, min(most, triton.next_power_of_2(count)))


def tiles_for(dtype, precision, inputs, outputs, taps, coalesced) -> "tuple[Tiles, ...]":
    """Tiles of the convolution for so many channels of x and of z, the default first.

    coalesced: whether the output's channels lie side by side.
    """
    flat = inputs < _FEW
    k = power_of_two(taps.TAPS * inputs if flat else inputs, 16, 32 if flat or dtype == torch.float32 else 64)
    if _library.INTERPRETED:  # where a step costs a millisecond
        return (Tiles(128, power_of_two(outputs, 16, 32), 4 * k, flat),)
    if dtype == torch.float64:
        return (Tiles(32, 32, 16, flat, num_stages=2),)
    if dtype == torch.float32 and precision == "ieee":  # no tensor cores: operands and sums share the registers
        return (Tiles(64, power_of_two(outputs, 16, 32), 16, flat, num_stages=2),)
    sizes = (64, 64), (128, 64), (64, 128), (128, 128)
    if taps.GROUPS > 1 or not coalesced:  # which take registers
        sizes, k = ((64, 32), *sizes), min(k, 32)
    elif not flat:
        sizes = sorted(sizes, key=((128, 64) if dtype == torch.float32 else (64, 128)).__ne__)
    return tuple(dict.fromkeys(Tiles(m, power_of_two(outputs, 16, n), k, flat) for m, n in sizes))


def weight_tiles_for(dtype, precision, inputs, outputs, taps) -> "tuple[Tiles, ...]":
    """Tiles of the weight gradient, the default first."""
    flat = inputs < _FEW
    if _library.INTERPRETED:
        return (Tiles(32, 64, 256, flat),)
    if dtype == torch.float64:
        return (Tiles(32, 32, 16, flat, num_stages=2),)
    k = 32 if flat or dtype == torch.float32 else 64
    sizes = ((64, 64),) if precision == "ieee" and dtype == torch.float32 else ((64, 64), (128, 64), (64, 128))
    n = taps * inputs if flat else inputs
    found = [Tiles(power_of_two(outputs, 16, a), power_of_two(n, 16, b), k, flat) for a, b in sizes]
    return tuple(dict.fromkeys(found))


def more_tiles_for(dtype, precision, inputs, outputs, taps, coalesced) -> "tuple[Tiles, ...]":
    """Those of tiles_for(), and others that a search on a GPU may try, the likeliest first."""
    found = tiles_for(dtype, precision, inputs, outputs, taps, coalesced)
    return _more(found, (64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (256, 128), (128, 256), n=outputs)


def more_weight_tiles_for(dtype, precision, inputs, outputs, taps) -> "tuple[Tiles, ...]":
    """As more_tiles_for, of the weight gradient."""
    found = weight_tiles_for(dtype, precision, inputs, outputs, taps)
    n = taps * inputs if found[0].FLAT else inputs
    return _more(found, (64, 64), (128, 64), (64, 128), (128, 128), (64, 256), (128, 256), m=outputs, n=n)


def _more(found, *sizes, m=256, n):
    """found, and tiles of such sizes, where there are as many rows and columns."""
    first = found[0]
    if _library.INTERPRETED or first.num_stages == 2:  # no tensor cores
        return found
    more = []
    for k, stages in ((first.K, 3), (first.K, 4), (max(16, first.K // 2), 5), (2 * first.K, 2)):
        for (a, b), warps in itertools.product(sizes, (4, 8)):
            rows, columns = power_of_two(m, 16, a), power_of_two(n, 16, b)
            # sums of a thread: they fit its registers beside addresses and operands, and are worth its while
            least, most = min(columns, 64) * warps // 8, 128 if k <= first.K else 64
            if least <= rows * columns // (32 * warps) <= most and rows <= 32 * warps:
                more.append(Tiles(rows, columns, k, first.FLAT, warps, stages))
    return tuple(dict.fromkeys((*found, *more)))


def precision_of(dtype):
    """How float32 is multiplied: as torch's own convolutions, which by default round operands to TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 and not _library.INTERPRETED else "ieee"


def steps_of_a_part(dtype, precision, k):
    """Of k products each; 0 where rounding errors are those of the operands (TF32, halves), or none to speak of."""
    return max(1, _SUM // k) if dtype == torch.float32 and precision == "ieee" else 0


def image_of(tensor):
    """What kernels take of an image, or of one value for a whole image."""
    if tensor is None:
        return None, (0, 0, 0, 0)
    return TENSOR, (*tensor.stride(), *(0,) * (4 - tensor.dim()))


def _scattered(x):
    """Whether a kernel would load the channels of an image one by one; the library's convolutions copy such images,
    too."""
    return x.shape[1] >= _FEW and x.stride(1) != 1


def channels_innermost(x):
    """The image, or a copy in channels last where a kernel would load channels one by one."""
    return x.contiguous(memory_format=torch.channels_last) if _scattered(x) else x


def packed_weight(weight):
    """As kernels take it: [outputs, taps, inputs]."""
    return weight.contiguous(memory_format=torch.channels_last)


def image_innermost(x):
    """image_of(channels_innermost(x)), without the copy."""
    if not _scattered(x):
        return image_of(x)
    _, channels, rows, columns = x.shape
    return TENSOR, (channels * rows * columns, 1, channels * columns, channels)


def _convolution(tensors, dilation, sign, halves, activation, taps, bare=False):
    """What launches kernels.convolution: a function of the tensors, and of `exact` (tune.choose).

    Args:
        tensors: x, weight [channels of z, of x, rows, columns], bias, cond, residual, y, kept.
        halves: of x's channels and of z's, under a gate.
        bare: whether, under a gate, cond is not part of what is kept.
    """
    x, weight, bias, cond, residual, y, kept = tensors
    images, outputs, rows, columns = y.shape
    inputs, dtype = x.shape[1], x.dtype
    arguments = (
        *image_innermost(x), TENSOR, place(bias), 0 if bias is None else bias.stride(0),
        *image_of(cond), *image_of(residual), *image_of(y), *image_of(kept),
        images, rows, columns, dilation,
    )  # fmt: skip
    constants = {
        "SIGN": sign, "INPUTS": inputs, "INPUT_HALF": inputs // halves[0], "OUTPUTS": outputs, "ACTIVATION": activation,
        "KERNEL": taps.constants, "KERNEL_ROWS": weight.shape[2], "T": plan.TYPES[arithmetic_dtype(x)], "BARE": bare,
    }  # fmt: skip
    by_channel = y.stride(1)
    key = ("convolve", sign, dtype, tuple(x.shape), outputs, activation, taps, dilation, by_channel)

    def launch(precision, tiles):
        blocks = triton.cdiv(outputs, tiles.N // halves[1])
        return Launch(
            kernels.convolution, triton.cdiv(images * rows * columns, tiles.M) * blocks, *arguments, **constants,
            PRECISION=precision, IN_PART=steps_of_a_part(dtype, precision, tiles.K), **tiles._asdict(),
            enable_fp_fusion=False,
        )  # fmt: skip

    @functools.cache
    def launches(precision):
        candidates = tiles_for(dtype, precision, inputs, outputs * halves[1], taps, by_channel == 1)
        return {tiles: launch(precision, tiles) for tiles in candidates}

    def convolve(x, weight, bias, cond, residual, y, kept, exact):
        precision = precision_of(dtype)
        tensors = channels_innermost(x), packed_weight(weight), bias, cond, residual, y, kept
        tune.launch((*key, precision), launches(precision), tensors, y, exact)

    return convolve


def _input_gradient(d_z, weight, d_input, dilation, halves, taps, boxed):
    """What fills d_input: a function of the tensors, and of `exact` (tune.choose).

    boxed: the kernels over TMA boxes, where they may be taken.
    """
    launch = boxed and boxed.launcher(boxed.convolution(d_z, weight, d_input, taps, dilation, True))
    if launch:
        return lambda d_z, weight, d_input, exact: launch(x=d_z, w=weight, y=d_input)
    absent = None, None, None
    operands = d_z, weight.transpose(0, 1), *absent, d_input, None
    convolve = _convolution(operands, dilation, -1, (halves, 1), "", taps)
    return lambda d_z, weight, d_input, exact: convolve(d_z, weight.transpose(0, 1), *absent, d_input, None, exact)


def _gradient_before_activation(d_y, kept, d_z, activation, summed):
    """What fills d_z, where wanted: a function of d_y, kept and d_z. It returns the sums over each chunk of an image,
    [images, chunks, channels of z], where these are wanted."""
    if d_z is None and not summed:
        return lambda *tensors: None
    images, outputs, rows, columns = d_y.shape
    dtype = arithmetic_dtype(d_y)
    m, n = 32, power_of_two(outputs, 1, 32)
    chunks = triton.cdiv(rows * columns, _CHUNK)
    shape = images, chunks, outputs * (2 if activation in GATES else 1)
    launch = Launch(
        kernels.before_activation, triton.cdiv(outputs, n) * images * chunks,
        *image_of(d_y), *image_of(kept), *image_of(d_z), TENSOR if summed else None,
        rows, columns, chunks,
        OUTPUTS=outputs, ACTIVATION=activation, T=plan.TYPES[dtype],
        M=m, N=n, STEPS=triton.cdiv(min(rows * columns, _CHUNK), m), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip

    def fill(d_y, kept, d_z):
        sums = d_y.new_empty(shape, dtype=dtype) if summed else None
        launch(d_y, kept, d_z, sums)
        return sums

    return fill


def _weight_gradient_of(d_z, x, d_weight, dilation, halves, taps, boxed):
    """What fills d_weight: a function of the tensors, and of `exact` (tune.choose); boxed: as _input_gradient's."""
    launch_boxed = boxed and boxed.launcher(boxed.weight_gradient(d_z, x, d_weight, taps, dilation))
    if launch_boxed:
        return lambda d_z, x, d_weight, exact: launch_boxed(d_z=d_z, x=x, d_weight=d_weight)
    images, inputs, rows, columns = x.shape
    outputs, dtype = d_z.shape[1], x.dtype
    arithmetic = arithmetic_dtype(x)
    live = taps.TAPS + (taps.GROUPS > 1)
    if live == 0:
        return lambda d_z, x, d_weight, exact: d_weight.zero_()
    from_images = *image_innermost(d_z), *image_innermost(x), TENSOR, images, rows, columns, dilation
    to_weight = TENSOR, TENSOR, d_weight.stride()
    count, kernel_rows = d_weight.numel(), d_weight.shape[2]
    key = ("weight", dtype, tuple(x.shape), outputs, taps, dilation)

    def launch(precision, tiles):
        per_tap = triton.cdiv(live * inputs, tiles.N) if tiles.FLAT else live * triton.cdiv(inputs, tiles.N)
        programs = triton.cdiv(outputs, tiles.M) * per_tap
        pixels = max(_LEAST_PIXELS, triton.cdiv(images * rows * columns * programs, _WEIGHT_PROGRAMS))
        steps = triton.cdiv(pixels, tiles.K)
        splits = triton.cdiv(images * rows * columns, steps * tiles.K)
        share = Launch(
            kernels.weight_gradient, programs * splits, *from_images, steps,
            INPUTS=inputs, OUTPUTS=outputs, KERNEL=taps.constants, T=plan.TYPES[arithmetic], PRECISION=precision,
            IN_PART=steps_of_a_part(dtype, precision, tiles.K), **tiles._asdict(), enable_fp_fusion=False,
        )  # fmt: skip
        add = Launch(
            kernels.sum_shares, triton.cdiv(count, _REDUCE), *to_weight, splits, count, kernel_rows,
            INPUTS=inputs, OUTPUTS=outputs, OUTPUT_HALF=outputs // halves, KERNEL=taps.constants, SIZE=_REDUCE,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

        def run(d_z, x, d_weight):
            shares = x.new_empty((splits, outputs, live, inputs), dtype=arithmetic)
            share(d_z, x, shares)
            add(shares, d_weight)

        return run

    @functools.cache
    def launches(precision):
        candidates = weight_tiles_for(dtype, precision, inputs, outputs, live)
        return {tiles: launch(precision, tiles) for tiles in candidates}

    def differentiate(d_z, x, d_weight, exact):
        precision = precision_of(dtype)
        tensors = channels_innermost(d_z), channels_innermost(x), d_weight
        tune.launch((*key, precision), launches(precision), tensors, d_weight, exact)

    return differentiate


def _plain(x, weight, taps, dilation, halves):
    """The convolution alone by torch: what a tile must compute before it may be chosen for its speed."""
    if not taps.PLACES:
        weight = weight[:, :, : taps.UP + 1]  # all rows below are dead
    rows, columns = weight.shape[2:]
    tap = torch.arange(rows * columns, device=x.device).reshape(rows, columns)
    among = torch.isin(tap, torch.tensor(taps.PLACES, device=x.device)) if taps.PLACES else tap < taps.TAPS
    live = among.expand(weight.shape)
    if taps.GROUPS > 1:
        order = "interleaved" if taps.INTERLEAVED else "contiguous"
        own, read = (
            torch.tensor(channel_groups_of(channels, taps.GROUPS, order, gated), device=x.device)
            for channels, gated in ((weight.shape[0], halves == 2), (weight.shape[1], False))
        )
        pairs = read < own[:, None] if taps.STRICT else read <= own[:, None]
        live = live | (pairs[:, :, None, None] & (tap == taps.TAPS))
    x = F.pad(x, [dilation * size for size in (taps.LEFT, columns - 1 - taps.LEFT, taps.UP, rows - 1 - taps.UP)])
    return F.conv2d(x, weight.masked_fill(~live, 0), dilation=dilation)


def masked_conv2d_fwd(
    results, input, weight, bias, cond, residual,
    mask_type, stack, dilation, channel_groups, group_order, activation, keep, listed=(), bare=False,
):  # fmt: skip
    """What fills y and kept; the arguments of the op's schema, and `bare`, which _convolution() takes."""
    y, kept = results
    if y.numel() == 0:
        return lambda *tensors: None
    part = reaching_part(weight, stack, input.shape[2:], dilation)
    taps = taps_of(weight, mask_type, stack, channel_groups, group_order, listed, part)
    weight = part_of(weight, part)
    halves = 2 if activation in GATES else 1
    kept = kept if keep else None
    if boxes and stack == "square" and not listed:
        epilogue = boxes.Epilogue(activation, bias, cond, residual, kept)
        launch = boxes.launcher(boxes.convolution(input, weight, y, taps, dilation, epilogue=epilogue))
        if launch:
            return lambda results, input, weight, bias, cond, residual: launch(
                x=input, w=part_of(weight, part), y=results[0], kept=results[1] if keep else None,
                bias=bias, cond=cond, residual=residual,
            )  # fmt: skip
    operands = input, weight, bias, cond, residual, y, kept
    convolve = _convolution(operands, dilation, 1, (1, halves), activation, taps, bare)

    def fill(results, input, weight, bias, cond, residual):
        y, kept = results
        weight = part_of(weight, part)
        kept = kept if keep else None

        def exact():
            z = _plain(input, weight, taps, dilation, halves)
            z = z if bias is None else z + bias[:, None, None]
            z = z if cond is None else z + cond.reshape(*cond.shape, *[1] * (4 - cond.dim()))
            found = activate(z, activation or None)
            return found if residual is None else found + residual

        convolve(input, weight, bias, cond, residual, y, kept, exact)

    return fill


def masked_conv2d_bwd(
    results, d_y, input, weight, kept, mask_type, stack, dilation, channel_groups, group_order, activation,
    want_input, want_weight, want_bias, cond_ndim, listed=(),
):  # fmt: skip
    """What fills d_input, d_weight, d_bias and d_cond; the arguments of the op's schema."""
    d_input, d_weight, _, d_cond = results
    if d_y.numel() == 0:
        return lambda results, *tensors: [gradient.zero_() for gradient in results]
    part = reaching_part(weight, stack, input.shape[2:], dilation)
    taps = taps_of(weight, mask_type, stack, channel_groups, group_order, listed, part)
    weight = part_of(weight, part)
    halves = 2 if activation in GATES else 1
    z_shape = input.shape[0], weight.shape[0], *input.shape[2:]
    separate = activation and cond_ndim != 4 and (want_input or want_weight)

    def z_gradient(d_y, d_cond):
        """The gradient before the activation, yet to be filled where it is not d_y; None where it is not wanted."""
        if cond_ndim == 4:
            return d_cond
        if separate:
            return torch.empty(z_shape, dtype=d_y.dtype, device=d_y.device, memory_format=torch.channels_last)
        return None if activation else d_y

    d_z = z_gradient(d_y, d_cond)
    summed = want_bias or cond_ndim == 2
    differentiate_activation = _gradient_before_activation(d_y, kept, None if d_z is d_y else d_z, activation, summed)
    if want_input or want_weight:
        d_z = channels_innermost(d_z)
    boxed = boxes if stack == "square" and not listed else None
    if want_input:
        to_input = _input_gradient(d_z, weight, d_input, dilation, halves, taps, boxed)
    if want_weight:
        to_weight = _weight_gradient_of(d_z, input, part_of(d_weight, part), dilation, halves, taps, boxed)

    def fill(results, d_y, input, weight, kept):
        d_input, d_weight, d_bias, d_cond = results
        weight = part_of(weight, part)
        d_z = z_gradient(d_y, d_cond)
        sums = differentiate_activation(d_y, kept, None if d_z is d_y else d_z)
        if want_bias:
            d_bias.copy_(sums.sum((0, 1), dtype=torch.float64))
        if cond_ndim == 2:
            d_cond.copy_(sums.sum(1, dtype=torch.float64))
        if not want_input and not want_weight:
            return
        d_z = channels_innermost(d_z)
        if part is not None and want_weight:
            d_weight = part_of(d_weight.zero_(), part)

        def exact(operand):
            wanted = [tensor is operand for tensor in (input, weight)]
            found = _autograd.reference_gradients(
                lambda x, w: _plain(x, w, taps, dilation, halves), (input, weight), wanted, (d_z,)
            )
            return found[wanted.index(True)]

        if want_input:
            to_input(d_z, weight, d_input, lambda: exact(input))
        if want_weight:
            to_weight(d_z, input, d_weight, lambda: exact(weight))

    return fill
