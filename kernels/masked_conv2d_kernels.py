"""The kernels of masked convolutions in Triton: implicit GEMMs over the live taps only.

Whatever the mask or the stack, the live taps are the first of the kernel in raster order, so that a tap is a number
below TAPS, and none is looked up or multiplied by zero. Only channel groups, at the tap of the pixel itself, are live
for some pairs of channels and not for others: that tap then follows the others, one group at a time. Of a list of taps
each number has its place looked up.

A program owns a tile of M pixels and N output channels (under a gate, as many of each half), and walks K = (tap,
channel) in steps: steps of one tap's channels, or, for a first layer of few channels, of taps and channels together
(FLAT). The input gradient is the same walk with the taps pointing the other way; the weight gradient walks the pixels.
"""

import triton
import triton.language as tl

from fastelbo import _library
from fastelbo.kernels import elementary, tile

_INTERPRETED: tl.constexpr = tl.constexpr(_library.INTERPRETED)


@triton.jit
def pixels_from(first, images, rows, columns, SIZE: tl.constexpr):
    """Image (int64), row and column of SIZE pixels from `first` (int64) on, and which of them exist."""
    image = rows * columns
    start = first // image
    place = (first - start * image).to(tl.int32) + tl.arange(0, SIZE)
    n = start + place // image
    place = place % image
    return n, place // columns, place % columns, n < images


@triton.jit
def offsets_of(strides, n, row, column):
    """Memory offsets of pixels; strides: of an image, a channel, a row and a column."""
    return n.to(tl.int64) * strides[0] + row.to(tl.int64) * strides[2] + column.to(tl.int64) * strides[3]


@triton.jit
def place_of(tap, KERNEL: tl.constexpr):
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
def group_of(c, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The group of a channel of CHANNELS in all, or in each half."""
    if INTERLEAVED:
        return c % CHANNELS % GROUPS
    else:
        return c % CHANNELS * GROUPS // CHANNELS


@triton.jit
def add_block(part, total, step, STEPS: tl.constexpr):
    """After a step of a sum: the part, and the total, which it joins every so many steps (0: never, but at the end)."""
    if STEPS > 0:  # noqa: SIM102 (a constant, and step % 0 would not compile)
        if step % STEPS == STEPS - 1:
            total += part
            part = tl.zeros_like(part)
    return part, total


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b."""
    if _INTERPRETED:  # which multiplies bfloat16 as if it were integers
        return tl.dot(a.to(total.dtype), b.to(total.dtype), total, input_precision="ieee", out_dtype=total.dtype)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def load_image(pointer, strides, n, row, column, channel, mask, T: tl.constexpr):
    """Pixels [M] of channels [1, N] of an image, in the type T."""
    place = offsets_of(strides, n, row, column)[:, None] + channel * strides[1]
    return tl.load(pointer + place, mask=mask, other=0).to(T)


@triton.jit
def store_image(pointer, strides, n, row, column, channel, values, mask):
    """Writes pixels [M] of channels [1, N] of an image."""
    tile.put(pointer + offsets_of(strides, n, row, column)[:, None] + channel * strides[1], values, mask)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + elementary.exp(-x))


@triton.jit
def sum_taps(
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
    pixel = x + offsets_of(x_strides, n, row, column)[:, None]
    to = weight + (out.to(tl.int64) * (KERNEL_ROWS * COLUMNS * INPUTS))[None, :]
    total = tl.zeros([M, N], T)
    part = total
    for step in range(STEPS):
        if FLAT:
            k = step * K + tl.arange(0, K)
            c = k % INPUTS
            live = k < TAPS * INPUTS
            places = place_of(k // INPUTS, KERNEL)
            k = places * INPUTS + c
            tap = places[None, :]
        else:
            c = step % BLOCKS * K + tl.arange(0, K)
            live = c < INPUTS
            tap = place_of(step // BLOCKS, KERNEL)
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
        part, total = add_block(dot(a, b, part, PRECISION), total, step, IN_PART)
    total = total + part if IN_PART > 0 else part
    if GROUPS > 1:
        own = group_of(out, OUTPUT_HALF, GROUPS, INTERLEAVED)
        for step in range(GROUPS * BLOCKS):
            group = step // BLOCKS
            if SIGN > 0:
                reads = (group < own) if STRICT else (group <= own)
            else:
                reads = (own < group) if STRICT else (own <= group)
            c = step % BLOCKS * K + tl.arange(0, K)
            live = (c < INPUTS) & (group_of(c, INPUT_HALF, GROUPS, INTERLEAVED) == group)
            a = tl.load(pixel + (c.to(tl.int64) * x_strides[1])[None, :], mask=valid[:, None] & live[None, :], other=0)
            b = tl.load(to + (TAPS * INPUTS + c)[:, None], mask=live[:, None] & (wanted & reads)[None, :], other=0)
            part = dot(a, b, tl.zeros([M, N], T), PRECISION)
            total += tl.where(reads[None, :], part, 0.0)  # no product: what it does not read may be NaN
    return total


@triton.jit
def before_gate(
    z, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, KEEP: tl.constexpr,
    BARE: tl.constexpr = False,
):  # fmt: skip
    """z + bias + cond, which is kept where KEEP, without cond where BARE."""
    if bias is not None:
        z += tl.load(bias + channel * bias_stride, mask=mask, other=0).to(z.dtype)
    if KEEP and BARE:
        store_image(kept, kept_strides, n, row, column, channel, z, mask)
    if cond is not None:
        z += load_image(cond, cond_strides, n, row, column, channel, mask, z.dtype)
    if KEEP and not BARE:
        store_image(kept, kept_strides, n, row, column, channel, z, mask)
    return z


@triton.jit(do_not_specialize=["images", "rows", "columns", "dilation"])
def convolution(
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
    n, row, column, valid = pixels_from((program // BLOCKS).to(tl.int64) * M, images, rows, columns, M)
    first = program % BLOCKS * WIDTH
    lane = tl.arange(0, N)
    if GATED:  # side by side, what the gate joins: a thread has both
        within = first + lane // 2
        out = within + lane % 2 * OUTPUTS
    else:
        within = first + lane
        out = within
    z = sum_taps(
        x, x_strides, weight, n, row, column, valid, out, within < OUTPUTS, rows, columns, dilation,
        SIGN, INPUTS, INPUT_HALF, OUTPUTS, KERNEL, KERNEL_ROWS, T, PRECISION, FLAT, M, N, K, IN_PART,
    )  # fmt: skip
    channel = (first + tl.arange(0, WIDTH)).to(tl.int64)[None, :]
    mask = valid[:, None] & (channel < OUTPUTS)
    if GATED:
        a, b = tl.split(tl.reshape(z, [M, WIDTH, 2]))
        KEEP: tl.constexpr = kept is not None
        a = before_gate(
            a, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, KEEP, BARE
        )
        b = before_gate(
            b, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel + OUTPUTS, mask, KEEP,
            BARE,
        )  # fmt: skip
        if ACTIVATION == "tanh_sigmoid":
            a = elementary.tanh(a)
        z = a * sigmoid(b)
    else:
        z = before_gate(
            z, bias, bias_stride, cond, cond_strides, kept, kept_strides, n, row, column, channel, mask, False
        )
        if ACTIVATION == "relu":
            z = elementary.at_least(z, 0.0)
        elif ACTIVATION == "elu":
            z = tl.where(z > 0, z, elementary.expm1_parts(elementary.at_most(z, 0.0))[0])
        if kept is not None:
            store_image(kept, kept_strides, n, row, column, channel, z, mask)
    if residual is not None:
        z += load_image(residual, residual_strides, n, row, column, channel, mask, T)
    store_image(y, y_strides, n, row, column, channel, z, mask)


@triton.jit(do_not_specialize=["rows", "columns", "chunks"])
def before_activation(
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
        d = load_image(d_y, d_y_strides, n, row, column, c, mask, T)
        if GATED:
            a = load_image(kept, kept_strides, n, row, column, c, mask, T)
            gate = sigmoid(load_image(kept, kept_strides, n, row, column, c + OUTPUTS, mask, T))
            if ACTIVATION == "tanh_sigmoid":
                a = elementary.tanh(a)
                first = d * gate * (1.0 - a * a)
            else:
                first = d * gate
            second = d * a * gate * (1.0 - gate)
            other += tl.sum(second, axis=0)
            if d_z is not None:
                store_image(d_z, d_z_strides, n, row, column, c + OUTPUTS, second, mask)
        elif ACTIVATION == "relu":
            first = tl.where(load_image(kept, kept_strides, n, row, column, c, mask, T) > 0, d, 0.0)
        elif ACTIVATION == "elu":
            activated = load_image(kept, kept_strides, n, row, column, c, mask, T)
            first = tl.where(activated > 0, d, d * (activated + 1.0))
        else:
            first = d
        total += tl.sum(first, axis=0)
        if d_z is not None:
            store_image(d_z, d_z_strides, n, row, column, c, first, mask)
    if sums is not None:
        to = sums + (n * chunks + chunk) * (2 * OUTPUTS if GATED else OUTPUTS) + channel
        tl.store(to, total, mask=wanted)
        if GATED:
            tl.store(to + OUTPUTS, other, mask=wanted)


@triton.jit(do_not_specialize=["images", "rows", "columns", "dilation", "steps"])
def weight_gradient(
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
    )  # that of the pixel itself, with its dead pairs: sum_shares drops them
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
        tap = place_of(k // INPUTS, KERNEL)[None, :]
    else:
        c = block % IN_BLOCKS * N + tl.arange(0, N)
        live = c < INPUTS
        k = block // IN_BLOCKS * INPUTS + c
        tap = place_of(block // IN_BLOCKS, KERNEL)
    down = (tap // COLUMNS - UP) * dilation
    right = (tap % COLUMNS - LEFT) * dilation
    away = tl.cast(down, tl.int64) * x_strides[2] + tl.cast(right, tl.int64) * x_strides[3]
    from_x = x + away + (c.to(tl.int64) * x_strides[1])[None, :]
    from_d = d_z + (out.to(tl.int64) * d_z_strides[1])[:, None]
    total = tl.zeros([M, N], T)
    part = total
    for step in range(steps):
        n, row, column, valid = pixels_from((split * steps + step) * K, images, rows, columns, K)
        r = row[:, None] + down
        s = column[:, None] + right
        inside = valid[:, None] & (r >= 0) & (r < rows) & (s >= 0) & (s < columns) & live[None, :]
        b = tl.load(from_x + offsets_of(x_strides, n, row, column)[:, None], mask=inside, other=0)
        a = tl.load(
            from_d + offsets_of(d_z_strides, n, row, column)[None, :],
            mask=valid[None, :] & (out < OUTPUTS)[:, None],
            other=0,
        )
        part, total = add_block(dot(a, b, part, PRECISION), total, step, IN_PART)
    total = total + part if IN_PART > 0 else part
    to = shares + ((split * OUTPUTS + out) * (TAPS * INPUTS))[:, None] + k[None, :]
    tl.store(to, total, mask=(out < OUTPUTS)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["splits", "count", "rows"])
def sum_shares(
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
        read = group_of(c, INPUTS, KERNEL[4], KERNEL[5])
        own = group_of(out, OUTPUT_HALF, KERNEL[4], KERNEL[5])
        live = live & ((tap < KERNEL[3]) | ((read < own) if KERNEL[6] else (read <= own)))
    place = (out * TAPS + tap) * INPUTS + c
    total = tl.zeros([SIZE], shares.dtype.element_ty)
    part = total
    for split in range(splits):
        share = tl.load(shares + tl.cast(split, tl.int64) * (OUTPUTS * TAPS * INPUTS) + place, mask=live, other=0)
        part, total = add_block(part + share, total, split, 16)
    total += part
    to = d_weight + out * d_weight_strides[0] + c * d_weight_strides[1]
    tile.put(to + row * d_weight_strides[2] + column * d_weight_strides[3], total, index < count)
