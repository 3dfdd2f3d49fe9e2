"""Masked convolutions in Triton: implicit GEMMs over the live taps only.

Whatever the mask or the stack, the live taps are the first of the kernel in raster order, so that a tap is a number
below TAPS, and none is looked up or multiplied by zero. Only channel groups, at the tap of the pixel itself, are live
for some pairs of channels and not for others: that tap then follows the others, one group at a time. Of a list of taps
each number has its place looked up.

A program owns a tile of M pixels and N output channels (under a gate, as many of each half), and walks K = (tap,
channel) in steps: steps of one tap's channels, or, for a first layer of few channels, of taps and channels together
(FLAT). The input gradient is the same walk with the taps pointing the other way; the weight gradient walks the pixels.
"""

import functools
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import triton
import triton.language as tl

from fastelbo import _autograd, _library, backends
from fastelbo.kernels import elementary, plan, tile, tune
from fastelbo.kernels.launch import TENSOR, Launch, place
from fastelbo.reference.masked_conv2d import GATES, activate, channel_groups_of
from fastelbo.reference.scale import arithmetic_dtype

boxes = None  # the kernels over TMA boxes, where the environment asks for them
if backends.CONVOLUTIONS == "tma" and not _library.INTERPRETED:
    from fastelbo.kernels import masked_conv2d_tma as boxes

_INTERPRETED: tl.constexpr = tl.constexpr(_library.INTERPRETED)

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


def _reaching(weight, stack, size, dilation):
    """The part of a weight, or of its gradient, whose taps reach into an image of that size from some pixel: an index
    of it, None for all of it."""
    up, left = _up_left(weight, stack)
    above, beside = ((extent - 1) // dilation for extent in size)
    if above >= up and beside >= left:
        return None
    rows = slice(max(up - above, 0), up + above + 1)
    return slice(None), slice(None), rows, slice(max(left - beside, 0), left + beside + 1)


def _part(weight, index):
    return weight if index is None else weight[index]


def taps_of(weight, mask_type, stack, groups, order, listed=(), part=None) -> Taps:
    """The live taps of a weight, or of a part of it; listed: their places in the whole, where there is a list."""
    whole, weight = weight.shape[3], _part(weight, part)
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


@triton.jit
def _pixels(first, images, rows, columns, SIZE: tl.constexpr):
    """Image (int64), row and column of SIZE pixels from `first` (int64) on, and which of them exist."""
    image = rows * columns
    start = first // image
    place = (first - start * image).to(tl.int32) + tl.arange(0, SIZE)
    n = start + place // image
    place = place % image
    return n, place // columns, place % columns, n < images


@triton.jit
def _at(strides, n, row, column):
    """Memory offsets of pixels; strides: of an image, a channel, a row and a column."""
    return n.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def _place(tap, KERNEL: tl.constexpr):
    """Where live taps lie in the kernel, in raster order."""
    if KERNEL[7]:
        TAPS: tl.constexpr = KERNEL[3]
        place = tap
        for i in tl.static_range(TAPS):
            place = tl.where(tap == i, KERNEL[8 + i], place)
        return place
    else:
        return tap


@triton.jit
def _group(c, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The group of a channel of CHANNELS in all, or in each half."""
    if INTERLEAVED:
        return c % CHANNELS % GROUPS
    else:
        return c % CHANNELS * GROUPS // CHANNELS


@triton.jit
def _add_block(part, total, step, STEPS: tl.constexpr):
    """After a step of a sum: the part, and the total, which it joins every so many steps (0: never, but at the end)."""
    if STEPS > 0:  # noqa: SIM102 (a constant, and step % 0 would not compile)
        if step % STEPS == STEPS - 1:
            total += part
            part = tl.zeros_like(part)
    return part, total


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    if _INTERPRETED:  # which multiplies bfloat16 as if it were integers
        return tl.dot(a.to(total.dtype), b.to(total.dtype), total, input_precision="ieee", out_dtype=total.dtype)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _load(pointer, strides, n, row, column, channel, mask, T: tl.constexpr):
    """Pixels [M] of channels [1, N] of an image, in the type T."""
    place = _at(strides, n, row, column)[:, None] + channel * strides[1]
    return tl.load(pointer + place, mask=mask, other=0).to(T)


@triton.jit
def _store(pointer, strides, n, row, column, channel, values, mask):
    """Writes pixels [M] of channels [1, N] of an image."""
    tile.put(pointer + _at(strides, n, row, column)[:, None] + channel * strides[1], values, mask)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + elementary.exp(-x))


@triton.jit
def _convolve(
    x, x_strides, weight, n, row, column, valid, out, wanted, rows, columns, dilation,
    SIGN: tl.constexpr, INPUTS: tl.constexpr, INPUT_HALF: tl.constexpr, OUTPUT_HALF: tl.constexpr,
    KERNEL: tl.constexpr, KERNEL_ROWS: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, IN_PART: tl.constexpr, above=None, above_stride=0,
):  # fmt: skip
    """The sums over live taps and input channels: [M, N].

    weight: [outputs, taps, INPUTS], contiguous. A half is all channels where no gate halves them. above: what
    the channels are above the first row; 0 where None.
    """
    COLUMNS: tl.constexpr = KERNEL[0]
    UP: tl.constexpr = KERNEL[1]
    LEFT: tl.constexpr = KERNEL[2]
    TAPS: tl.constexpr = KERNEL[3]
    GROUPS: tl.constexpr = KERNEL[4]
    INTERLEAVED: tl.constexpr = KERNEL[5]
    STRICT: tl.constexpr = KERNEL[6]
    BLOCKS: tl.constexpr = (INPUTS + K - 1) // K  # of a tap's channels
    STEPS: tl.constexpr = (TAPS * INPUTS + K - 1) // K if FLAT else TAPS * BLOCKS
    pixel = x + _at(x_strides, n, row, column)[:, None]
    to = weight + (out.to(tl.int64) * (KERNEL_ROWS * COLUMNS * INPUTS))[None, :]
    total = tl.zeros([M, N], T)
    part = total
    for step in range(STEPS):
        if FLAT:
            k = step * K + tl.arange(0, K)
            c = k % INPUTS
            live = k < TAPS * INPUTS
            places = _place(k // INPUTS, KERNEL)
            k = places * INPUTS + c
            tap = places[None, :]
        else:
            c = step % BLOCKS * K + tl.arange(0, K)
            live = c < INPUTS
            tap = _place(step // BLOCKS, KERNEL)
            k = tap * INPUTS + c
        down = (tap // COLUMNS - UP) * (dilation * SIGN)
        right = (tap % COLUMNS - LEFT) * (dilation * SIGN)
        r = row[:, None] + down
        s = column[:, None] + right
        inside = valid[:, None] & (r >= 0) & (r < rows) & (s >= 0) & (s < columns) & live[None, :]
        away = tl.cast(down, tl.int64) * x_strides[2] + tl.cast(right, tl.int64) * x_strides[3]
        a = tl.load(pixel + (away + (c.to(tl.int64) * x_strides[1])[None, :]), mask=inside, other=0)
        if above is not None:
            constant = tl.load(above + c * above_stride, mask=live, other=0)[None, :]
            a = tl.where(valid[:, None] & (r < 0), constant, a)
        b = tl.load(to + k[:, None], mask=live[:, None] & wanted[None, :], other=0)
        part, total = _add_block(_dot(a, b, part, PRECISION), total, step, IN_PART)
    total = total + part if IN_PART > 0 else part
    if GROUPS > 1:
        own = _group(out, OUTPUT_HALF, GROUPS, INTERLEAVED)
        for step in range(GROUPS * BLOCKS):
            group = step // BLOCKS
            if SIGN > 0:
                reads = (group < own) if STRICT else (group <= own)
            else:
                reads = (own < group) if STRICT else (own <= group)
            c = step % BLOCKS * K + tl.arange(0, K)
            live = (c < INPUTS) & (_group(c, INPUT_HALF, GROUPS, INTERLEAVED) == group)
            a = tl.load(pixel + (c.to(tl.int64) * x_strides[1])[None, :], mask=valid[:, None] & live[None, :], other=0)
            b = tl.load(to + (TAPS * INPUTS + c)[:, None], mask=live[:, None] & (wanted & reads)[None, :], other=0)
            part = _dot(a, b, tl.zeros([M, N], T), PRECISION)
            total += tl.where(reads[None, :], part, 0.0)  # no product: what it does not read may be NaN
    return total


@triton.jit
def _before_gate(
    z, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, KEEP: tl.constexpr,
    BARE: tl.constexpr = False,
):  # fmt: skip
    """z + bias + cond, which is kept where KEEP, without cond where BARE."""
    if bias is not None:
        z += tl.load(bias + channel * bias_stride, mask=mask, other=0).to(z.dtype)
    if KEEP and BARE:
        _store(kept, kept_strides, n, row, column, channel, z, mask)
    if cond is not None:
        z += _load(cond, cond_strides, n, row, column, channel, mask, z.dtype)
    if KEEP and not BARE:
        _store(kept, kept_strides, n, row, column, channel, z, mask)
    return z


@triton.jit(do_not_specialize=["images", "rows", "columns", "dilation"])
def _fwd(
    x, x_strides, weight, bias, bias_stride, cond, cond_strides, residual, residual_strides,
    y, y_strides, kept, kept_strides,  # images, whose strides are those of an image, a channel, a row and a column
    images, rows, columns, dilation,
    SIGN: tl.constexpr, INPUTS: tl.constexpr, INPUT_HALF: tl.constexpr, OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr, KERNEL: tl.constexpr, KERNEL_ROWS: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, FLAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    IN_PART: tl.constexpr, BARE: tl.constexpr,
):  # fmt: skip
    """y [images, OUTPUTS, rows, columns] = f(convolution + bias + cond) + residual. SIGN -1: the input gradient."""
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid" or ACTIVATION == "glu"
    WIDTH: tl.constexpr = N // 2 if GATED else N  # of the tile of y
    BLOCKS: tl.constexpr = (OUTPUTS + WIDTH - 1) // WIDTH
    program = tl.program_id(0)
    n, row, column, valid = _pixels((program // BLOCKS).to(tl.int64) * M, images, rows, columns, M)
    first = program % BLOCKS * WIDTH
    lane = tl.arange(0, N)
    if GATED:  # side by side, what the gate joins: a thread has both
        within = first + lane // 2
        out = within + lane % 2 * OUTPUTS
    else:
        within = first + lane
        out = within
    z = _convolve(
        x, x_strides, weight, n, row, column, valid, out, within < OUTPUTS, rows, columns, dilation,
        SIGN, INPUTS, INPUT_HALF, OUTPUTS, KERNEL, KERNEL_ROWS, T, PRECISION, FLAT, M, N, K, IN_PART,
    )  # fmt: skip
    channel = (first + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    mask = valid[:, None] & (channel < OUTPUTS)
    if GATED:
        a, b = tl.split(tl.reshape(z, [M, WIDTH, 2]))
        KEEP: tl.constexpr = kept is not None
        a = _before_gate(
            a, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, KEEP, BARE
        )
        b = _before_gate(
            b, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel + OUTPUTS, mask, KEEP,
            BARE,
        )  # fmt: skip
        if ACTIVATION == "tanh_sigmoid":
            a = elementary.tanh(a)
        z = a * _sigmoid(b)
    else:
        z = _before_gate(
            z, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, False
        )
        if ACTIVATION == "relu":
            z = elementary.at_least(z, 0.0)
        elif ACTIVATION == "elu":
            z = tl.where(z > 0, z, elementary.expm1_parts(elementary.at_most(z, 0.0))[0])
        if kept is not None:
            _store(kept, kept_strides, n, row, column, channel, z, mask)
    if residual is not None:
        z += _load(residual, residual_strides, n, row, column, channel, mask, T)
    _store(y, y_strides, n, row, column, channel, z, mask)


@triton.jit(do_not_specialize=["rows", "columns", "chunks"])
def _before_activation(
    d_y, d_y_strides, kept, kept_strides, d_z, d_z_strides, sums,  # sums: [images, chunks, channels of z]
    rows, columns, chunks,
    OUTPUTS: tl.constexpr, ACTIVATION: tl.constexpr, T: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation, and its sums over M * STEPS pixels of an image. OUTPUTS: channels of y."""
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid" or ACTIVATION == "glu"
    BLOCKS: tl.constexpr = (OUTPUTS + N - 1) // N
    program = tl.program_id(0)
    n = (program // BLOCKS // chunks).to(tl.int64)
    chunk = program // BLOCKS % chunks
    channel = program % BLOCKS * N + tl.arange(0, N)
    wanted = channel < OUTPUTS
    total = tl.zeros([N], T)
    other = total
    for step in range(STEPS):
        place = (chunk * STEPS + step) * M + tl.arange(0, M)
        row, column = place // columns, place % columns
        mask = (row < rows)[:, None] & wanted[None, :]
        c = channel.to(tl.int64)[None, :]
        d = _load(d_y, d_y_strides, n, row, column, c, mask, T)
        if GATED:
            a = _load(kept, kept_strides, n, row, column, c, mask, T)
            gate = _sigmoid(_load(kept, kept_strides, n, row, column, c + OUTPUTS, mask, T))
            if ACTIVATION == "tanh_sigmoid":
                a = elementary.tanh(a)
                first = d * gate * (1.0 - a * a)
            else:
                first = d * gate
            second = d * a * gate * (1.0 - gate)
            other += tl.sum(second, axis=0)
            if d_z is not None:
                _store(d_z, d_z_strides, n, row, column, c + OUTPUTS, second, mask)
        elif ACTIVATION == "relu":
            first = tl.where(_load(kept, kept_strides, n, row, column, c, mask, T) > 0, d, 0.0)
        elif ACTIVATION == "elu":
            activated = _load(kept, kept_strides, n, row, column, c, mask, T)
            first = tl.where(activated > 0, d, d * (activated + 1.0))
        else:
            first = d
        total += tl.sum(first, axis=0)
        if d_z is not None:
            _store(d_z, d_z_strides, n, row, column, c, first, mask)
    if sums is not None:
        to = sums + (n * chunks + chunk) * (2 * OUTPUTS if GATED else OUTPUTS) + channel
        tl.store(to, total, mask=wanted)
        if GATED:
            tl.store(to + OUTPUTS, other, mask=wanted)


@triton.jit(do_not_specialize=["images", "rows", "columns", "dilation", "steps"])
def _weight_gradient(
    d_z, d_z_strides, x, x_strides, shares,  # shares: [splits, channels of z, taps, INPUTS]
    images, rows, columns, dilation, steps,  # steps: blocks of K pixels to a split
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    """A split's share of the weight gradient: M output channels and N inputs of one tap, or N pairs (tap, input)."""
    COLUMNS: tl.constexpr = KERNEL[0]
    UP: tl.constexpr = KERNEL[1]
    LEFT: tl.constexpr = KERNEL[2]
    TAPS: tl.constexpr = KERNEL[3] + (
        KERNEL[4] > 1
    )  # that of the pixel itself, with its dead pairs: _add_shares drops them
    OUT_BLOCKS: tl.constexpr = (OUTPUTS + M - 1) // M
    IN_BLOCKS: tl.constexpr = (INPUTS + N - 1) // N
    TILES: tl.constexpr = OUT_BLOCKS * ((TAPS * INPUTS + N - 1) // N if FLAT else TAPS * IN_BLOCKS)
    program = tl.program_id(0)
    split = (program // TILES).to(tl.int64)
    block = program % TILES // OUT_BLOCKS
    out = program % OUT_BLOCKS * M + tl.arange(0, M)
    if FLAT:
        k = block * N + tl.arange(0, N)
        c = k % INPUTS
        live = k < TAPS * INPUTS
        tap = _place(k // INPUTS, KERNEL)[None, :]
    else:
        c = block % IN_BLOCKS * N + tl.arange(0, N)
        live = c < INPUTS
        k = block // IN_BLOCKS * INPUTS + c
        tap = _place(block // IN_BLOCKS, KERNEL)
    down = (tap // COLUMNS - UP) * dilation
    right = (tap % COLUMNS - LEFT) * dilation
    away = tl.cast(down, tl.int64) * x_strides[2] + tl.cast(right, tl.int64) * x_strides[3]
    from_x = x + away + (c.to(tl.int64) * x_strides[1])[None, :]
    from_d = d_z + (out.to(tl.int64) * d_z_strides[1])[:, None]
    total = tl.zeros([M, N], T)
    part = total
    for step in range(steps):
        n, row, column, valid = _pixels((split * steps + step) * K, images, rows, columns, K)
        r = row[:, None] + down
        s = column[:, None] + right
        inside = valid[:, None] & (r >= 0) & (r < rows) & (s >= 0) & (s < columns) & live[None, :]
        b = tl.load(from_x + _at(x_strides, n, row, column)[:, None], mask=inside, other=0)
        a = tl.load(
            from_d + _at(d_z_strides, n, row, column)[None, :], mask=valid[None, :] & (out < OUTPUTS)[:, None], other=0
        )
        part, total = _add_block(_dot(a, b, part, PRECISION), total, step, IN_PART)
    total = total + part if IN_PART > 0 else part
    to = shares + ((split * OUTPUTS + out) * (TAPS * INPUTS))[:, None] + k[None, :]
    tl.store(to, total, mask=(out < OUTPUTS)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["splits", "count", "rows"])
def _add_shares(
    shares, d_weight, d_weight_strides, splits, count, rows,  # count: elements of the weight
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, OUTPUT_HALF: tl.constexpr, KERNEL: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The weight gradient: the sum of all shares, in order, and exactly 0 at dead taps."""
    COLUMNS: tl.constexpr = KERNEL[0]
    TAPS: tl.constexpr = KERNEL[3] + (KERNEL[4] > 1)
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    column = index % COLUMNS
    row = index // COLUMNS % rows
    c = index // COLUMNS // rows % INPUTS
    out = index // COLUMNS // rows // INPUTS
    tap = row * COLUMNS + column
    if KERNEL[7]:
        place = tap
        tap = tl.full([SIZE], TAPS, tl.int64)
        for i in tl.static_range(TAPS):
            tap = tl.where(place == KERNEL[8 + i], i, tap)
    live = (index < count) & (tap < TAPS)
    if KERNEL[4] > 1:
        read = _group(c, INPUTS, KERNEL[4], KERNEL[5])
        own = _group(out, OUTPUT_HALF, KERNEL[4], KERNEL[5])
        live = live & ((tap < KERNEL[3]) | ((read < own) if KERNEL[6] else (read <= own)))
    place = (out * TAPS + tap) * INPUTS + c
    total = tl.zeros([SIZE], shares.dtype.element_ty)
    part = total
    for split in range(splits):
        share = tl.load(shares + tl.cast(split, tl.int64) * (OUTPUTS * TAPS * INPUTS) + place, mask=live, other=0)
        part, total = _add_block(part + share, total, split, 16)
    total += part
    to = d_weight + out * d_weight_strides[0] + c * d_weight_strides[1]
    tile.put(to + row * d_weight_strides[2] + column * d_weight_strides[3], total, index < count)


class Tiles(NamedTuple):
    """How programs cut their work."""

    M: int
    N: int
    K: int
    FLAT: bool
    num_warps: int = 4  # with eight, loops over taps and channels at once have been compiled to wrong code
    num_stages: int = 3


def _power_of_two(count, least, most):
    return max(least, min(most, triton.next_power_of_2(count)))


def tiles_for(dtype, precision, inputs, outputs, taps, coalesced) -> "tuple[Tiles, ...]":
    """Tiles of the convolution for so many channels of x and of z, the default first.

    coalesced: whether the output's channels lie side by side.
    """
    flat = inputs < _FEW
    k = _power_of_two(taps.TAPS * inputs if flat else inputs, 16, 32 if flat or dtype == torch.float32 else 64)
    if _library.INTERPRETED:  # where a step costs a millisecond
        return (Tiles(128, _power_of_two(outputs, 16, 32), 4 * k, flat),)
    if dtype == torch.float64:
        return (Tiles(32, 32, 16, flat, num_stages=2),)
    if dtype == torch.float32 and precision == "ieee":  # no tensor cores: operands and sums share the registers
        return (Tiles(64, _power_of_two(outputs, 16, 32), 16, flat, num_stages=2),)
    sizes = (64, 64), (128, 64), (64, 128), (128, 128)
    if taps.GROUPS > 1 or not coalesced:  # which take registers
        sizes, k = ((64, 32), *sizes), min(k, 32)
    elif not flat:
        sizes = sorted(sizes, key=((128, 64) if dtype == torch.float32 else (64, 128)).__ne__)
    return tuple(dict.fromkeys(Tiles(m, _power_of_two(outputs, 16, n), k, flat) for m, n in sizes))


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
    found = [Tiles(_power_of_two(outputs, 16, a), _power_of_two(n, 16, b), k, flat) for a, b in sizes]
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
            rows, columns = _power_of_two(m, 16, a), _power_of_two(n, 16, b)
            # sums of a thread: they fit its registers beside addresses and operands, and are worth its while
            least, most = min(columns, 64) * warps // 8, 128 if k <= first.K else 64
            if least <= rows * columns // (32 * warps) <= most and rows <= 32 * warps:
                more.append(Tiles(rows, columns, k, first.FLAT, warps, stages))
    return tuple(dict.fromkeys((*found, *more)))


def _precision(dtype):
    """How float32 is multiplied: as torch's own convolutions, which by default round operands to TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 and not _library.INTERPRETED else "ieee"


def _steps_of_a_part(dtype, precision, k):
    """Of k products each; 0 where rounding errors are those of the operands (TF32, halves), or none to speak of."""
    return max(1, _SUM // k) if dtype == torch.float32 and precision == "ieee" else 0


def _image(tensor):
    """What kernels take of an image, or of one value for a whole image."""
    if tensor is None:
        return None, (0, 0, 0, 0)
    return TENSOR, (*tensor.stride(), *(0,) * (4 - tensor.dim()))


def _scattered(x):
    """Whether a kernel would load the channels of an image one by one; the library's convolutions copy such images,
    too."""
    return x.shape[1] >= _FEW and x.stride(1) != 1


def _channels_innermost(x):
    return x.contiguous(memory_format=torch.channels_last) if _scattered(x) else x


def _packed(weight):
    """As kernels take it: [outputs, taps, inputs]."""
    return weight.contiguous(memory_format=torch.channels_last)


def _image_innermost(x):
    """_image(_channels_innermost(x)), without the copy."""
    if not _scattered(x):
        return _image(x)
    _, channels, rows, columns = x.shape
    return TENSOR, (channels * rows * columns, 1, channels * columns, channels)


def _convolution(tensors, dilation, sign, halves, activation, taps, bare=False):
    """What launches _fwd: a function of the tensors, and of `exact` (tune.choose).

    Args:
        tensors: x, weight [channels of z, of x, rows, columns], bias, cond, residual, y, kept.
        halves: of x's channels and of z's, under a gate.
        bare: whether, under a gate, cond is not part of what is kept.
    """
    x, weight, bias, cond, residual, y, kept = tensors
    images, outputs, rows, columns = y.shape
    inputs, dtype = x.shape[1], x.dtype
    arguments = (
        *_image_innermost(x), TENSOR, place(bias), 0 if bias is None else bias.stride(0),
        *_image(cond), *_image(residual), *_image(y), *_image(kept),
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
            _fwd, triton.cdiv(images * rows * columns, tiles.M) * blocks, *arguments, **constants, PRECISION=precision,
            IN_PART=_steps_of_a_part(dtype, precision, tiles.K), **tiles._asdict(), enable_fp_fusion=False,
        )  # fmt: skip

    @functools.cache
    def launches(precision):
        candidates = tiles_for(dtype, precision, inputs, outputs * halves[1], taps, by_channel == 1)
        return {tiles: launch(precision, tiles) for tiles in candidates}

    def convolve(x, weight, bias, cond, residual, y, kept, exact):
        precision = _precision(dtype)
        tensors = _channels_innermost(x), _packed(weight), bias, cond, residual, y, kept
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
    m, n = 32, _power_of_two(outputs, 1, 32)
    chunks = triton.cdiv(rows * columns, _CHUNK)
    shape = images, chunks, outputs * (2 if activation in GATES else 1)
    launch = Launch(
        _before_activation, triton.cdiv(outputs, n) * images * chunks,
        *_image(d_y), *_image(kept), *_image(d_z), TENSOR if summed else None,
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
    from_images = *_image_innermost(d_z), *_image_innermost(x), TENSOR, images, rows, columns, dilation
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
            _weight_gradient, programs * splits, *from_images, steps,
            INPUTS=inputs, OUTPUTS=outputs, KERNEL=taps.constants, T=plan.TYPES[arithmetic], PRECISION=precision,
            IN_PART=_steps_of_a_part(dtype, precision, tiles.K), **tiles._asdict(), enable_fp_fusion=False,
        )  # fmt: skip
        add = Launch(
            _add_shares, triton.cdiv(count, _REDUCE), *to_weight, splits, count, kernel_rows,
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
        precision = _precision(dtype)
        tensors = _channels_innermost(d_z), _channels_innermost(x), d_weight
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
    part = _reaching(weight, stack, input.shape[2:], dilation)
    taps = taps_of(weight, mask_type, stack, channel_groups, group_order, listed, part)
    weight = _part(weight, part)
    halves = 2 if activation in GATES else 1
    kept = kept if keep else None
    if boxes and stack == "square" and not listed:
        epilogue = boxes.Epilogue(activation, bias, cond, residual, kept)
        launch = boxes.launcher(boxes.convolution(input, weight, y, taps, dilation, epilogue=epilogue))
        if launch:
            return lambda results, input, weight, bias, cond, residual: launch(
                x=input, w=_part(weight, part), y=results[0], kept=results[1] if keep else None,
                bias=bias, cond=cond, residual=residual,
            )  # fmt: skip
    operands = input, weight, bias, cond, residual, y, kept
    convolve = _convolution(operands, dilation, 1, (1, halves), activation, taps, bare)

    def fill(results, input, weight, bias, cond, residual):
        y, kept = results
        weight = _part(weight, part)
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
    part = _reaching(weight, stack, input.shape[2:], dilation)
    taps = taps_of(weight, mask_type, stack, channel_groups, group_order, listed, part)
    weight = _part(weight, part)
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
        d_z = _channels_innermost(d_z)
    boxed = boxes if stack == "square" and not listed else None
    if want_input:
        to_input = _input_gradient(d_z, weight, d_input, dilation, halves, taps, boxed)
    if want_weight:
        to_weight = _weight_gradient_of(d_z, input, _part(d_weight, part), dilation, halves, taps, boxed)

    def fill(results, d_y, input, weight, kept):
        d_input, d_weight, d_bias, d_cond = results
        weight = _part(weight, part)
        d_z = z_gradient(d_y, d_cond)
        sums = differentiate_activation(d_y, kept, None if d_z is d_y else d_z)
        if want_bias:
            d_bias.copy_(sums.sum((0, 1), dtype=torch.float64))
        if cond_ndim == 2:
            d_cond.copy_(sums.sum(1, dtype=torch.float64))
        if not want_input and not want_weight:
            return
        d_z = _channels_innermost(d_z)
        if part is not None and want_weight:
            d_weight = _part(d_weight.zero_(), part)

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
