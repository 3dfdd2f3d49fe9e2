"""Launches of the masked convolutions over TMA boxes, whose kernels are in masked_conv2d_tma_kernels.py."""

import functools
from typing import NamedTuple

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastelbo.kernels import masked_conv2d_tma_kernels as kernels
from fastelbo.kernels import masked_conv2d_tma_tiles as tiling
from fastelbo.kernels.launch import TENSOR, Launch


class Taps(NamedTuple):
    """The live taps of a kernel, its first TAPS in raster order; UP and LEFT: how far off the first one lies."""

    COLUMNS: int
    UP: int
    LEFT: int
    TAPS: int
    DILATION: int = 1


@functools.lru_cache(maxsize=4096)
def box_of(images: int, rows: int, columns: int, pixels: int, tall: int = 0) -> "tuple[int, int, int]":
    """The box [images, rows, columns] of so many pixels, powers of two, with the fewest idle ones over all boxes.

    tall: rows, where they are given. Among equals the one of the fewest images and nearest to a square, which reads the
    fewest pixels beyond its own.
    """
    best = None
    power = [2**i for i in range(9)]
    for height in power:
        for width in power:
            if height * width > pixels or pixels // (height * width) > 256 or (tall and height != tall):
                continue
            if tall and pixels // height % 8:
                continue
            depth = pixels // (height * width)
            covered = pixels * triton.cdiv(images, depth) * triton.cdiv(rows, height) * triton.cdiv(columns, width)
            found = covered, depth, height + width, height, (depth, height, width)
            best = min(best or found, found)
    return best[-1]


def _descriptor(tensor, box):
    swizzle = min(128, box[-1] * tensor.element_size())
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * tensor.element_size(), rank=len(box))
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box), layout)


def _pixels_first(image):
    """[images, rows, columns, channels]."""
    return image.permute(0, 2, 3, 1)


def can_take(image: torch.Tensor) -> bool:
    """Whether the copy engine can address an image: channels innermost, and all else at multiples of 16 bytes."""
    by_image, _, by_row, by_column = image.stride()
    return (
        image.dtype in (torch.bfloat16, torch.float16)
        and image.stride(1) == 1
        and image.shape[1] % 8 == 0
        and all(stride % 8 == 0 for stride in (by_image, by_row, by_column))
        and image.data_ptr() % 16 == 0
        # no image that has an element twice
        and by_column >= image.shape[1]
        and by_row >= image.shape[3] * by_column
        and by_image >= image.shape[2] * by_row
        and image.shape[0] * image.shape[2] * image.shape[3] < 2**31
    )


class Epilogue(NamedTuple):
    """What follows a convolution's sums: the operands that are there, and where z is kept."""

    activation: str = ""
    bias: "torch.Tensor | None" = None
    cond: "torch.Tensor | None" = None
    residual: "torch.Tensor | None" = None
    kept: "torch.Tensor | None" = None


NOTHING = Epilogue()


def prepare_convolution(x, weight, y, taps: Taps, tile: tiling.Tile, transposed=False, epilogue=NOTHING):
    """The kernel, its grid and its arguments.

    Args:
        x, y, residual, kept: images [N, C, H, W] that can_take() takes.
        weight: [channels of z, all taps, channels of x], contiguous; of the forward even where `transposed`.
    """
    activation, bias, cond, residual, kept = epilogue
    images, outputs, rows, columns = y.shape
    gated = activation in ("tanh_sigmoid", "glu")
    box = box_of(images, rows, columns, tile.M)
    width = tile.BN if gated else tile.BN + tile.BN2
    tiles_n, tiles_h, tiles_w = (triton.cdiv(a, b) for a, b in zip((images, rows, columns), box, strict=True))
    tiles = tiles_n * tiles_h * tiles_w * triton.cdiv(outputs, width)
    second = tile.BN2 or tile.BN

    def weights(n):
        return _descriptor(weight, (tile.BK, 1, n) if transposed else (n, 1, tile.BK))

    def outer(image, n):
        return _descriptor(_pixels_first(y if image is None else image), (*box, n))

    arguments = dict(
        x=_descriptor(_pixels_first(x), (*box, tile.BK)), w=weights(tile.BN), w2=weights(second),
        y=outer(y, tile.BN), y2=outer(y, second), kept=outer(kept, tile.BN), residual=outer(residual, tile.BN),
        bias=x if bias is None else bias, cond=x if cond is None else cond,
        images=images, tiles=tiles, tiles_h=tiles_h, tiles_w=tiles_w,
        INPUTS=x.shape[1], OUTPUTS=outputs, **taps._asdict(), TRANSPOSED=transposed, ACTIVATION=activation,
        HAS_BIAS=bias is not None, HAS_COND=cond is not None, HAS_RESIDUAL=residual is not None,
        HAS_KEPT=kept is not None, NB=box[0], TH=box[1], TW=box[2],
        **{k: v for k, v in tile._asdict().items() if k not in ("M", "programs")},
    )  # fmt: skip
    if tile.SPECIAL and tile.programs > 1:  # which would else take all registers of a multiprocessor
        arguments["maxnreg"] = 65536 // (32 * (tile.num_warps + 4) * tile.programs)
    grid = min(tiles, tile.programs * _multiprocessors(x)) if tile.SPECIAL else tiles
    return kernels.convolve, (grid,), arguments


def prepare_rows(x, weight, y, taps: Taps, tile: tiling.RowTile, transposed=False, epilogue=NOTHING):
    """As prepare_convolution, for convolve_rows; no gate."""
    activation, bias, cond, residual, kept = epilogue
    images, outputs, rows, columns = y.shape
    box = box_of(images, rows, columns, tile.M, tile.TH)
    tiles_n, tiles_h, tiles_w = (triton.cdiv(a, b) for a, b in zip((images, rows, columns), box, strict=True))
    tiles = tiles_n * tiles_h * tiles_w * triton.cdiv(outputs, tile.BN)
    more = triton.next_power_of_2(taps.UP * taps.DILATION) if taps.UP else 0

    def image(tensor, height, channels):
        tensor = y if tensor is None else tensor
        return _descriptor(tensor.permute(2, 0, 3, 1), (height, box[0], box[2], channels))

    arguments = dict(
        x=image(x, tile.TH, 64), x2=image(x, more or 1, 64),
        w=_descriptor(weight, (64, 1, tile.BN) if transposed else (tile.BN, 1, 64)), y=image(y, tile.TH, tile.BN),
        kept=image(kept, tile.TH, tile.BN), residual=image(residual, tile.TH, tile.BN),
        bias=x if bias is None else bias, cond=x if cond is None else cond,
        images=images, tiles=tiles, tiles_h=tiles_h, tiles_w=tiles_w,
        INPUTS=x.shape[1], OUTPUTS=outputs, **taps._asdict(), TRANSPOSED=transposed, ACTIVATION=activation,
        HAS_BIAS=bias is not None, HAS_COND=cond is not None, HAS_RESIDUAL=residual is not None,
        HAS_KEPT=kept is not None, NB=box[0], TW=box[2], E=more,
        **{k: v for k, v in tile._asdict().items() if k not in ("M", "programs")},
    )  # fmt: skip
    return kernels.convolve_rows, (min(tiles, tile.programs * _multiprocessors(x)),), arguments


def _multiprocessors(tensor):
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def splits_of(boxes: int, tiles: int, programs: int, waves: int) -> "tuple[int, int]":
    """How many splits of the boxes fill so many waves of programs, and how many boxes (at least 4) go to each."""
    splits = max(1, min(programs * waves // tiles, boxes // 4))
    steps = triton.cdiv(boxes, splits)
    return triton.cdiv(boxes, steps), steps


def prepare_weight_gradient(d_z, x, d_weight, taps: Taps, tile: tiling.WeightTile, shares=None):
    """Two launches: kernel, grid, arguments, and options of each.

    Args:
        d_z, x: images that can_take() takes.
        d_weight: [channels of z, channels of x, kernel rows, columns], any strides of which those of a row and a column
            fit each other.
    """
    images, inputs, rows, columns = x.shape
    outputs = d_z.shape[1]
    box = box_of(images, rows, columns, tile.K)
    tiles_n, tiles_h, tiles_w = (triton.cdiv(a, b) for a, b in zip((images, rows, columns), box, strict=True))
    groups = triton.cdiv(taps.TAPS * triton.cdiv(inputs, 64), tile.G + tile.G2)
    tiles = triton.cdiv(outputs, tile.BM) * groups
    splits, steps = splits_of(tiles_n * tiles_h * tiles_w, tiles, _multiprocessors(x), tile.waves)
    if shares is None:
        shares = torch.empty(splits, outputs, taps.TAPS, inputs, dtype=torch.float32, device=x.device)
    first = dict(
        d_z=_descriptor(_pixels_first(d_z), (*box, tile.BM)), x=_descriptor(_pixels_first(x), (*box, 64)),
        shares=shares, tiles_h=tiles_h, tiles_w=tiles_w, steps=steps, INPUTS=inputs, OUTPUTS=outputs,
        **taps._asdict(), NB=box[0], TH=box[1], TW=box[2],
        **{k: v for k, v in tile._asdict().items() if k not in ("K", "waves")},
    )  # fmt: skip
    every = d_weight.shape[2] * d_weight.shape[3]
    size = 256
    second = dict(
        shares=shares, d_weight=d_weight, stride_out=d_weight.stride(0), stride_in=d_weight.stride(1),
        stride_tap=d_weight.stride(3), splits=splits, count=outputs, INPUTS=inputs, TAPS=taps.TAPS, ALL_TAPS=every,
        S=min(16, triton.next_power_of_2(splits)), SIZE=size, num_warps=4,
    )  # fmt: skip
    return (
        (kernels.weight_shares, (tiles * splits,), first),
        (kernels.add_shares, (triton.cdiv(outputs * every * inputs, size),), second),
    )


# Launches of a layer's passes, or None where a layer must run on another kernel


def _capability(device):
    return torch.cuda.get_device_capability(device)


def _may_run(kernel, dilation, *images):
    """Whether the GPU has these products (sm_90 alone: later ones have others), and all images are the copy engine's.

    kernel: as masked_conv2d's Taps, of the square stack.
    """
    return (
        kernel.TAPS > 0
        and kernel.GROUPS == 1
        and dilation * max(kernel.COLUMNS, kernel.UP) < 2**20
        and all(image is None or can_take(image) for image in images)
        and _capability(images[0].device)[0] == 9
    )


def _taps(kernel, dilation):
    return Taps(kernel.COLUMNS, kernel.UP, kernel.LEFT, kernel.TAPS, dilation)


def _aligned(tensor):
    """Contiguous, from a multiple of 16 bytes on."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def convolution(x, weight, y, kernel, dilation, transposed=False, epilogue=NOTHING):
    """Launches of the forward, or under `transposed` of the input gradient; None where these kernels cannot take it.

    weight: [channels of z, of x, rows, columns], any strides; kernel: as masked_conv2d's Taps, of the square stack.
    """
    cond, gated = epilogue.cond, epilogue.activation in ("tanh_sigmoid", "glu")
    outputs = y.shape[1]
    if not _may_run(kernel, dilation, x, y, epilogue.residual, epilogue.kept) or (
        cond is not None and (cond.dim() != 2 or cond.numel() >= 2**31)
    ):
        return None
    if gated and outputs % 32:  # a box of the first half of what is kept would reach into the second
        return None
    pixels = y.numel() // outputs
    tile = tiling.tile_for(outputs, x.shape[1], pixels, kernel.UP, y.shape[2], dilation, gated)
    packed = _aligned(weight.permute(0, 2, 3, 1)).flatten(1, 2)
    prepare = prepare_rows if isinstance(tile, tiling.RowTile) else prepare_convolution
    epilogue = epilogue._replace(bias=_aligned(epilogue.bias), cond=_aligned(cond))
    return [prepare(x, packed, y, _taps(kernel, dilation), tile, transposed, epilogue)]


def weight_gradient(d_z, x, d_weight, kernel, dilation):
    """Launches of the weight gradient; None where these kernels cannot, or should not, take it."""
    images, inputs, rows, columns = x.shape
    if images * rows * columns <= tiling.FEW_PIXELS or not _may_run(kernel, dilation, d_z, x):
        return None
    if d_weight.stride(2) != d_weight.shape[3] * d_weight.stride(3):
        return None
    tile = tiling.weight_tile_for(d_z.shape[1], inputs, kernel.TAPS)
    _, height, width = box_of(images, rows, columns, tile.K)
    if rows % height or columns % width:  # beyond the image d_z is 0, and a tap of x in it, which may be NaN
        return None
    return list(prepare_weight_gradient(d_z, x, d_weight, _taps(kernel, dilation), tile))


class _Descriptor:
    """What makes descriptors like one that Triton has checked, of other tensors of the same kind."""

    def __init__(self, checked):
        self._type, self._parts = type(checked), {**vars(checked), "base": None}

    def of(self, tensors):
        """The descriptor of the next of some tensors."""
        descriptor = self._type.__new__(self._type)
        vars(descriptor).update(self._parts, base=next(tensors))
        return descriptor


_SAME = {"x2": "x", "w2": "w", "y2": "y"}  # arguments that are one tensor
_INSTEAD = {"kept": "y", "residual": "y", "bias": "x", "cond": "x"}  # what is given for a tensor that is not there


def _again(kernel, grid, arguments):
    """The names of the tensors among the arguments, which are in the kernel's order, and a Launch that takes them."""
    places = {name: TENSOR for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    places |= {name: _Descriptor(value) for name, value in arguments.items() if hasattr(value, "block_shape")}
    names = [_SAME.get(name, name) for name in arguments if name in places]
    # the fusion is today's default, which Triton will change
    return names, Launch(kernel, grid[0], **(arguments | places), enable_fp_fusion=True)


def launcher(launches):
    """What launches them: a function of the tensors by their names, w the weight; None where there is nothing to."""
    if launches is None:
        return None
    found = [_again(*one) for one in launches]
    shares = launches[0][2].get("shares")
    shape = None if shares is None else shares.shape

    def launch(**tensors):
        for name in ("bias", "cond"):
            tensors[name] = _aligned(tensors.get(name))
        if "w" in tensors:
            tensors["w"] = _aligned(tensors["w"].permute(0, 2, 3, 1))
        if shape is not None:
            tensors["shares"] = torch.empty(shape, dtype=torch.float32, device=tensors["x"].device)
        for name, instead in _INSTEAD.items():
            if tensors.get(name) is None:
                tensors[name] = tensors.get(instead)
        for names, one in found:
            one(*[tensors[name] for name in names])

    return launch
