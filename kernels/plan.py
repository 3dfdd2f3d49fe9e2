"""How tensors of any shapes, strides and dtypes are cut into the tiles of a launch."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastelbo import _library
from fastelbo.kernels.launch import TENSOR, Launch
from fastelbo.reference.scale import split

# Elements of a program at most: 16 for each thread of 4 warps, which still fit its registers. An interpreted program
# costs milliseconds, so there a few large ones must do.
_TILE = 2**14 if _library.INTERPRETED else 2**11
# A row longer than so many tiles is summed by several programs; their sums are added in float64.
_SUMMED_TILES = 4

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

ABSENT = (None, (), ())  # an operand that a kernel does without

# Arguments that Triton would otherwise compile anew for, when they are 1 or divisible by 16.
PLAIN = ["rows", "columns", "splits", "samples", "noise_offset"]


class Layout(NamedTuple):
    """How tensors that broadcast to one shape are walked together."""

    rows: int
    columns: int
    row_sizes: "tuple[int, ...]"
    column_sizes: "tuple[int, ...]"
    strides: tuple  # (row strides, column strides) of each tensor, as kernels take them (tile.py)
    vector: int  # consecutive elements that lie side by side: divides all sizes and strides


@functools.lru_cache(maxsize=4096)
def _layout(event_ndim, *tensors) -> Layout:
    """The Layout of tensors given as (shape, strides); the last event_ndim dimensions are columns, any if that is 0."""
    rank = max(len(shape) for shape, _ in tensors)
    sizes, strides = [1] * rank, []
    for shape, steps in tensors:
        missing = rank - len(shape)
        strides.append([0] * missing + [0 if size == 1 else step for size, step in zip(shape, steps, strict=True)])
        for d, size in enumerate(shape, missing):
            sizes[d] = size if size != 1 else sizes[d]
    parts = [], []  # rows and columns: dimensions as [size, stride of each tensor], merged where memory allows
    for d, size in enumerate(sizes):
        if size == 1:
            continue
        part = parts[event_ndim > 0 and d >= rank - event_ndim]
        steps = [stride[d] for stride in strides]
        if part and all(outer == inner * size for outer, inner in zip(part[-1][1], steps, strict=True)):
            part[-1][0] *= size
            part[-1][1] = steps
        else:
            part.append([size, steps])
    if event_ndim == 0 and parts[0]:
        parts[1].append(parts[0].pop())
    row_sizes, column_sizes = (tuple(size for size, _ in part) for part in parts)
    columns = math.prod(column_sizes)
    found, divisible = [], [columns, *column_sizes]
    for k in range(len(tensors)):
        row_steps, column_steps = (tuple(steps[k] for _, steps in part) for part in parts)
        row_steps, column_steps = row_steps if any(row_steps) else (), column_steps if any(column_steps) else ()
        found.append((row_steps, None if column_steps == (1,) or columns == 1 else column_steps))
        if column_steps:
            divisible += (*row_steps, *column_steps[:-1])
    return Layout(math.prod(row_sizes), columns, row_sizes, column_sizes, tuple(found), math.gcd(16, *divisible))


class Grid(NamedTuple):
    """How programs share the tiles: each takes R rows of C columns, in `steps` steps; `splits` programs share a row."""

    R: int
    C: int
    steps: int
    splits: int
    programs: int


@functools.lru_cache(maxsize=4096)
def _grid(rows, columns, summed, tile) -> Grid:
    width = min(tile, max(4, triton.next_power_of_2(columns)))
    height = min(tile // width, triton.next_power_of_2(rows))
    tiles = triton.cdiv(columns, width)
    steps = min(tiles, _SUMMED_TILES * tile // width) if summed else 1
    splits = triton.cdiv(tiles, steps)
    return Grid(height, width, steps, splits, triton.cdiv(rows, height) * splits)


def tile_size(dtype: torch.dtype, *scales) -> int:
    """How many elements a program takes: fewer where an element needs more registers.

    Args:
        dtype: that the kernel computes in.
        scales: of its Gaussians, as the schemas carry them; None for no Gaussian.
    """
    if _library.INTERPRETED:
        return _TILE
    if dtype == torch.float64:
        return _TILE // 4
    scales = [numbers(scale) for scale in scales if scale is not None]
    plain = all(kind <= 1 and min_std == 0 and var_eps == 0 for kind, _, _, _, _, min_std, var_eps, *_ in scales)
    if plain:
        return _TILE if len(scales) == 1 else _TILE // 2
    return _TILE // 2 if len(scales) == 1 else _TILE // 4


def of_sample(tensor, num_samples):
    """One Monte-Carlo sample of a tensor [K, ...], for plan()."""
    if num_samples is None or tensor is None:
        return tensor
    return tensor, tensor.shape[1:], tensor.stride()[1:]


def of_event(tensor, event_ndim):
    """What has a value for each event, at every element of the event, for plan()."""
    return tensor, (*tensor.shape, *[1] * event_ndim), (*tensor.stride(), *[0] * event_ndim)


class Plan(NamedTuple):
    """What a kernel takes beside its own arguments."""

    operands: tuple  # of a Launch
    layout: Layout
    grid: Grid
    aligned: bool
    summed: bool

    def launch(self, kernel, *arguments, **constants) -> Launch:
        """A launch of a kernel. Multiplications and additions are fused only where the source says so: the default
        differs between versions of Triton."""
        found, cut = self.layout, self.grid
        vector = found.vector if self.aligned else 1
        even = self.aligned and found.rows % cut.R == 0 and found.columns % (cut.C * cut.steps * cut.splits) == 0
        return Launch(
            kernel,
            cut.programs,
            *arguments,
            found.rows,
            found.columns // vector,
            found.row_sizes,
            found.column_sizes,
            cut.splits,
            **constants,
            VECTOR=vector,
            R=cut.R,
            C=cut.C,
            STEPS=cut.steps,
            EVEN=even,
            num_warps=4,
            enable_fp_fusion=False,
        )

    def sums(self, out):
        """Where a kernel puts its sums [rows, splits]: `out` itself where a row is summed at once, or not at all."""
        return out if self.grid.splits == 1 or not self.summed else out.new_empty((self.layout.rows, self.grid.splits))


def plan(event_ndim, *tensors, tile, noise_offset=None) -> "Plan | None":
    """How a kernel walks tensors that broadcast to one shape; None where there is nothing to walk.

    Args:
        event_ndim: how many trailing dimensions a kernel sums; 0: none.
        tensors: tensors, None, or what of_sample and of_event return.
        tile: elements of a program.
        noise_offset: for kernels that draw.
    """
    views = [
        view if isinstance(view, tuple) else (view, *(((), ()) if view is None else (view.shape, view.stride())))
        for view in tensors
    ]
    found = _layout(event_ndim, *((tuple(shape), strides) for _, shape, strides in views))
    if found.rows * found.columns == 0:
        return None
    aligned = noise_offset is None or (noise_offset % 4 == 0 and (found.columns % 4 == 0 or found.rows == 1))
    operands = tuple(
        ABSENT if tensor is None else (TENSOR, *strides)
        for (tensor, _, _), strides in zip(views, found.strides, strict=True)
    )
    if not aligned or found.vector == 1:
        tile //= 2  # every element has an address of its own
    summed = event_ndim > 0
    cut = _grid(found.rows, found.columns + (0 if aligned else 3), summed, tile)
    return Plan(operands, found, cut, aligned, summed)


def add_sums(out, sums) -> None:
    """Adds what several programs summed of a row."""
    if sums is not out:
        out.copy_(sums.sum(-1, dtype=torch.float64).reshape(out.shape))


def sample_stride(tensor, num_samples):
    """The stride between the samples of a tensor [K, ...]; None where there are no samples."""
    return None if num_samples is None or tensor is None else tensor.stride(0)


def numbers(scale):
    """A Scale's numbers, as the ops' schemas carry them, in full; the last two, its unit, again for float32."""
    if scale is None:
        return None
    defaults = (0.0, 0.0, -math.inf, math.inf, 0.0, 0.0, 0.0, 1.0, math.inf, 0.0)
    full = tuple(scale) + defaults[len(scale) :]
    return full + (split(full[8:], torch.float32) if full[8] < math.inf else full[8:])
