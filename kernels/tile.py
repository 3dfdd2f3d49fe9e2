"""How a kernel sees its tensors: a tile of some rows and columns, whose elements it loads, stores, draws and sums.

An operand comes as (pointer, row strides, column strides), one stride for each dimension (plan.py). The strides are ()
where it is constant over them, so that what depends on a row alone is loaded and computed once a row; column strides
are None where columns lie side by side. The pointer is None where an operand is absent. Rows and columns follow the
logical order, whatever the memory's: an element's index in its draw is row * columns + column.

Triton 3.6 compares no tuple that holds a None, nor does it tell its length: what is asked is always a part of it.
"""

import triton
import triton.language as tl

from fastelbo import _library
from fastelbo.kernels import philox

_INTERPRETED: tl.constexpr = tl.constexpr(_library.INTERPRETED)


@triton.jit
def start(splits, R: tl.constexpr):
    """The rows [R, 1] of this program, and which of the splits of their columns is its."""
    program = tl.program_id(0)
    return (program // splits).to(tl.int64) * R + tl.arange(0, R)[:, None], program % splits


@triton.jit
def window(
    row, rows, first, columns, shift, row_sizes, column_sizes,
    C: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr = True,
):  # fmt: skip
    """The elements of a tile: C columns of its rows from `first` on, or from `first` - `shift` on where not ALIGNED.

    Returns its rows, their mask, `first`, its columns counted from there, their mask, and the sizes of all dimensions.
    EVEN promises that all of it lies inside.
    """
    lane = tl.arange(0, C)[None, :]
    if EVEN:
        whole = tl.full([1, 1], True, tl.int1)
        return row, whole, first, lane, whole, row_sizes, column_sizes
    elif ALIGNED:
        return row, row < rows, first, lane, lane < columns - first, row_sizes, column_sizes
    else:
        lane = lane - shift.to(tl.int32)
        return row, row < rows, first, lane, (lane + first >= 0) & (lane < columns - first), row_sizes, column_sizes


@triton.jit
def _offsets(index, sizes, strides, DIVISOR: tl.constexpr):
    """Memory offsets of logical indices along some dimensions; the strides are multiples of DIVISOR."""
    found = index * 0
    for d in tl.static_range(len(strides) - 1, 0, -1):
        found += (index % sizes[d]) * (strides[d] // DIVISOR)
        index = index // sizes[d]
    # the compiler can tell what this is divisible by, and so how wide a load may be
    return (found + index * (strides[0] // DIVISOR)) * DIVISOR


@triton.jit
def _place(operand, start, window, VECTOR: tl.constexpr):
    """Pointers to the window's elements and their mask: [R, C], of size 1 along what the operand is constant over."""
    row, row_mask, first, lane, lane_mask, row_sizes, column_sizes = window
    pointer, row_strides, column_strides = operand
    pointer += start
    if column_strides is None:
        if len(row_strides) > 0:
            pointer += _offsets(row, row_sizes, row_strides, VECTOR)
        return pointer + first + lane, row_mask & lane_mask
    elif len(column_strides) > 0:
        if len(row_strides) > 0:
            pointer += _offsets(row, row_sizes, row_strides, 1)
        return pointer + _offsets(first + lane, column_sizes, column_strides, 1), row_mask & lane_mask
    elif len(row_strides) > 0:
        return pointer + _offsets(row, row_sizes, row_strides, 1), row_mask
    else:
        return pointer + tl.zeros([1, 1], tl.int32), tl.full([1, 1], True, tl.int1)


@triton.jit
def load(operand, window, T: tl.constexpr, VECTOR: tl.constexpr, start=0):
    """A window's elements in the type T, from an operand whose first element lies at `start`."""
    pointer, mask = _place(operand, start, window, VECTOR)
    return tl.load(pointer, mask=mask, other=0).to(T)


@triton.jit
def kept(mask, window, VECTOR: tl.constexpr):
    """Which of a window's elements a mask keeps; all where there is none."""
    if mask[0] is not None:
        return load(mask, window, tl.int1, VECTOR)
    else:
        return tl.full([1, 1], True, tl.int1)


@triton.jit
def store(operand, window, values, VECTOR: tl.constexpr, start=0):
    """Writes a window's elements."""
    pointer, mask = _place(operand, start, window, VECTOR)
    put(pointer, values, mask & window[1] & window[4])


@triton.jit
def put(pointer, values, mask):
    """Writes values in the type that the pointers have."""
    if _INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        values = _round_to_bfloat16(values.to(tl.float32))
    tl.store(pointer, values.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _round_to_bfloat16(x):
    """To the nearest, in float32: the interpreter's own conversion cuts bits off."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def sample_start(sample, stride):
    """Where a Monte-Carlo sample starts; stride None: there is but one."""
    if stride is None:
        return 0
    else:
        return tl.cast(sample, tl.int64) * stride


@triton.jit
def noise_shift(row, columns, noise_offset):
    """By how much a row's windows must start early, [R, 1], to start on a block of four normals."""
    return (noise_offset + row * columns) & 3


@triton.jit
def draw(
    draws, sample, window, shift, columns,
    T: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """The noise of a window in one sample, drawn or given. draws: (seed pointer, noise, its sample stride, offset)."""
    seed, noise, stride, noise_offset = draws
    if noise[0] is not None:
        return load(noise, window, T, VECTOR, sample_start(sample, stride))
    else:
        row, _, first, lane, _, _, _ = window
        begin = noise_offset + row * columns + first
        if not ALIGNED:
            begin -= shift
        block = (begin >> 2) + tl.arange(0, lane.shape[1] // 4)[None, :]
        return philox.normals(tl.load(seed), block, sample, APPROXIMATE).to(T)


@triton.jit
def inside(terms, window):
    """Terms, and 0 outside of the window."""
    return tl.where(window[1] & window[4], terms, 0.0)


@triton.jit
def store_sums(sums, total, row, rows, splits, split):
    """Writes the sums of a total's rows [R, C] to sums [rows, splits]."""
    tl.store(sums + row * splits + split, tl.sum(total, axis=1, keep_dims=True), mask=row < rows)
