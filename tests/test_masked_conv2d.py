"""Masked convolutions: against masks as published, plain torch in float64, and NaN where nothing may look."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from rounding import convolution_errors, sum_error
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

import fastelbo
from fastelbo.testing import assert_within_budget

HALVES = [torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "elu", "tanh_sigmoid", "glu"]
NAMES = "y", "d_input", "d_weight", "d_bias", "d_cond"
MANY_SMALL = 31, 6, 12, 7, 7, 7  # on CPUs these are images in lanes, all lanes but one of some vectors
GROUPS = [(1, "interleaved"), (2, "contiguous"), (3, "interleaved"), (3, "contiguous")]


@pytest.fixture(autouse=True)
def without_tf32():
    """GPUs round the operands of float32 convolutions unless told not to; ours obey the same flag."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def published_mask(out_channels, in_channels, k, mask_type, groups=1, order="interleaved", gated=False):
    """Tap by tap, from the text of the papers: section 3.4 of "Pixel Recurrent Neural Networks"."""
    mask = torch.zeros(out_channels, in_channels, k, k)

    def colour(c, channels):
        if order == "interleaved":  # R, G, B, R, G, B: pixelcnn_flow and others
            return c % groups
        third = channels // groups  # deepul: the first third is R
        return c // third

    for out, inp, i, j in itertools.product(range(out_channels), range(in_channels), range(k), range(k)):
        if i < k // 2 or (i == k // 2 and j < k // 2):
            mask[out, inp, i, j] = 1
        elif i == k // 2 and j == k // 2:
            own = colour(out % (out_channels // 2), out_channels // 2) if gated else colour(out, out_channels)
            read = colour(inp, in_channels)
            if read < own or (read == own and mask_type == "B"):
                mask[out, inp, i, j] = 1
    return mask


def lines(x, weight, bias=None, *, mask, dilation=1, activation=None, cond=None, residual=None):
    """What users write: a product with the mask, a full convolution, and the rest one by one."""
    rows, columns = mask.shape[-2:]
    around = columns // 2, columns - 1 - columns // 2, rows // 2, rows - 1 - rows // 2
    z = F.conv2d(F.pad(x, [dilation * size for size in around]), weight * mask, bias, dilation=dilation)
    if cond is not None:
        z = z + (cond[:, :, None, None] if cond.dim() == 2 else cond)
    if activation == "tanh_sigmoid":
        a, b = z.chunk(2, 1)
        z = a.tanh() * b.sigmoid()
    elif activation == "glu":
        z = F.glu(z, 1)
    elif activation:
        z = getattr(F, activation)(z)
    return z if residual is None else z + residual


def operands(
    n=2, c=6, o=12, h=5, w=7, k=3, *, activation=None, cond="class", residual=True, dtype=torch.float64, seed=0
):
    """input, weight, bias, cond and residual; the weights small enough that activations stay off their limits."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        return values.to(torch.get_default_device(), dtype)

    y = o // 2 if activation in ("tanh_sigmoid", "glu") else o
    conds = {"class": lambda: normal(n, o), "image": lambda: normal(n, o, h, w), None: lambda: None}
    weight = normal(o, c, k, k) / (c * k * k) ** 0.5
    return [normal(n, c, h, w), weight, normal(o), conds[cond](), normal(n, y, h, w) if residual else None]


def outputs_and_gradients(function, tensors, **keywords):
    """The output, and the gradients of a weighted sum of it with respect to all tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    x, weight, bias, cond, residual = leaves
    extra = {} if residual is None else {"residual": residual}
    y = function(x, weight, bias, cond=cond, **extra, **keywords)
    weights = torch.arange(1.0, 1 + y.numel(), dtype=torch.float64).cos().reshape(y.shape).to(y.dtype)
    given = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, given, weights)]


def assert_close(got, want):
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, msg=lambda m, index=index: f"{index}: {m}")


# masks


@pytest.mark.parametrize("groups, order", GROUPS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_masks_are_the_published_ones(k, mask_type, groups, order):
    for gated in (False, True):
        mask = fastelbo.conv_mask2d(12, 6, k, mask_type, channel_groups=groups, group_order=order, gated=gated)
        assert torch.equal(mask.float(), published_mask(12, 6, k, mask_type, groups, order, gated))


@pytest.mark.parametrize("k, live", [(3, 4), (5, 12), (7, 24)])
def test_number_of_live_taps(k, live):
    assert fastelbo.conv_mask2d(1, 1, k, "A").sum() == live
    assert fastelbo.conv_mask2d(1, 1, k, "B").sum() == live + 1


# values and gradients


@pytest.mark.parametrize("groups, order", GROUPS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("n, k", [(2, 1), (2, 3), (2, 5), (2, 7), (8, 7), (9, 5)])
def test_equals_the_product_with_the_mask(backend, n, k, mask_type, groups, order):
    tensors = operands(n, k=k, cond=None, residual=False)
    mask = published_mask(12, 6, k, mask_type, groups, order).double()
    keywords = {"mask_type": mask_type, "channel_groups": groups, "group_order": order, "backend": backend}
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask))
    assert (got[2][mask == 0] == 0).all()  # exactly


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("cond", [None, "class", "image"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", [(2, 6, 12, 5, 7, 3), MANY_SMALL], ids=str)
def test_what_surrounds_the_convolution(backend, shape, activation, cond, residual):
    gated = activation in ("tanh_sigmoid", "glu")
    tensors = operands(*shape, activation=activation, cond=cond, residual=residual)
    mask = published_mask(12, 6, shape[-1], "B", 3, "contiguous", gated).double()
    keywords = {"mask_type": "B", "channel_groups": 3, "group_order": "contiguous", "backend": backend}
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, activation=activation, **keywords)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask, activation=activation))


@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (5, 33)], ids=str)
@pytest.mark.parametrize("n, k", [(3, 3), (3, 7), (16, 7), (17, 3)])
def test_sizes_and_dilations(backend, size, dilation, n, k):
    """Non-square images, and such that are smaller than the kernel; channels that fill no vector."""
    tensors = operands(n, 5, 7, *size, k)
    mask = published_mask(7, 5, k, "B").double()
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, mask_type="B", dilation=dilation, backend=backend)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask, dilation=dilation))


@pytest.mark.parametrize("dilation", [3, 7, 8, 100_000, 2**31 - 1])
@pytest.mark.parametrize("stack", ["square", "vertical", "horizontal"])
def test_taps_outside_of_the_image_cost_nothing(backend, stack, dilation):
    """Against what is left of the kernel where its outer taps see nothing; padding by the dilation takes terabytes."""
    x, weight, bias, cond, _ = operands(2, 3, 6, 8, 4, 5, dtype=torch.float64)
    weight = {"square": weight, "vertical": weight[:, :, :3], "horizontal": weight[:, :, 2:3, :3]}[stack]
    keywords = {"dilation": dilation, "backend": backend, "activation": "elu"}
    function = fastelbo.masked_conv2d
    if stack != "square":
        function, keywords["stack"] = fastelbo.causal_conv2d, stack
    got = outputs_and_gradients(function, [x, weight, bias, cond, None], mask_type="B", **keywords)
    height, width = weight.shape[2:]
    up = height // 2 if stack == "square" else height - 1
    left = width - 1 if stack == "horizontal" else width // 2

    def sums(x, w, b, *, cond):
        z = torch.zeros(2, 6, 8, 4, dtype=torch.float64) + b[:, None, None] + cond[:, :, None, None]
        for i, j in itertools.product(range(height), range(width)):
            down, right = (i - up) * dilation, (j - left) * dilation
            if i > up or (stack != "vertical" and i == up and j > left) or -down >= 8 or abs(right) >= 4:
                continue
            moved = F.pad(x, (max(-right, 0), max(right, 0), -down, 0))[:, :, :8, max(right, 0) :][..., :4]
            z = z + torch.einsum("nchw,oc->nohw", moved, w[:, :, i, j])
        return F.elu(z)

    want = outputs_and_gradients(sums, [x, weight, bias, cond, None])
    assert_close(got, want)
    far = (torch.arange(height) - up).abs() * dilation >= 8
    assert (got[2][:, :, far] == 0).all()


@pytest.mark.parametrize("channels", [(1, 1), (1, 64), (3, 21), (17, 30), (40, 9), (70, 131)], ids=str)
def test_channels(backend, channels):
    tensors = operands(1, *channels, 13, 11, 5)
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, mask_type="A", backend=backend)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=published_mask(*channels[::-1], 5, "A").double()))


@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("groups", [1, 3])
def test_many_gated_channels(backend, groups, order):
    """A gate whose halves, and whose groups, take several tiles of a kernel; in contiguous order, tiles in part."""
    tensors = operands(1, 3, 300, 3, 5, 3, activation="glu")
    mask = published_mask(300, 3, 3, "A", groups, order, gated=True).double()
    keywords = {"mask_type": "A", "channel_groups": groups, "group_order": order, "backend": backend}
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, activation="glu", **keywords)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask, activation="glu"))


def test_groups_that_write_no_channel(backend):
    tensors = operands(1, 6, 3, 4, 5, 3, cond=None, residual=False)
    keywords = {"mask_type": "B", "channel_groups": 5, "backend": backend}
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords)
    mask = published_mask(3, 6, 3, "B", 5, "interleaved").double()
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask))


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]] if t.dim() > 1 else torch.stack([t, t], 1)[:, 0],
    "every other": lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 12, 6, 7, 3), (2, 5, 70, 6, 7, 3), MANY_SMALL], ids=str)
def test_memory_layouts(backend, layout, dtype, shape):
    lay_out = LAYOUTS[layout] if layout != "transposed" else lambda t: LAYOUTS[layout](t) if t.dim() > 1 else t
    tensors = operands(*shape, activation="glu", cond="image", dtype=dtype)
    keywords = {"mask_type": "B", "activation": "glu", "backend": backend}
    want = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords)
    got = outputs_and_gradients(fastelbo.masked_conv2d, [lay_out(t) for t in tensors], **keywords)
    tolerance = 450 * torch.finfo(dtype).eps  # the sums may be added up in another order
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    if layout == "channels_last" and backend != "reference":
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        assert got[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("keywords", [{"mask_type": "A"}, {"mask_type": "B", "dilation": 2}, {"taps": "unequal sides"}])
@pytest.mark.parametrize("n, size", [(2, (8, 8)), (2, (7, 7)), (2, (3, 9)), (2, (2, 7)), (2, (20, 14)), (31, (7, 7))])
def test_an_image_among_zeros_has_the_same_bits(n, size, keywords, layout):
    """However wide it is: planes of small images have other gaps between their rows, or hold several images."""
    keywords = dict(keywords)
    kernel = (7, 7) if "mask_type" in keywords else (3, 5)
    if "taps" in keywords:
        keywords["taps"] = TAPS[keywords["taps"]]
    weight, image = torch.randn(24, 20, *kernel), torch.randn(n, 20, *size)
    results = []
    for columns in (size[1], size[1] + 16):
        x = F.pad(image, (0, columns - size[1])).requires_grad_()
        y = fastelbo.masked_conv2d(LAYOUTS[layout](x), weight, backend="cpu", **keywords)[..., : size[1]]
        (d_x,) = torch.autograd.grad(y, x, image.new_ones(1).expand(y.shape))
        results.append((y, d_x[..., : size[1]]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keywords", [{"mask_type": "A"}, {"mask_type": "B", "channel_groups": 3}], ids=str)
@pytest.mark.parametrize("bad", [None, float("nan")], ids=str)
def test_an_image_has_the_same_bits_in_any_batch(bad, keywords):
    """Also beside one of NaN."""
    x, weight, bias, cond, residual = operands(33, 20, 24, 7, 7, 7, activation="glu", dtype=torch.float32)
    results = []
    for images in (slice(None), slice(4, 5)):
        leaf = x[images].clone().requires_grad_()
        given = leaf if bad is None or len(leaf) == 1 else torch.cat([leaf[:3], leaf[3:4] * bad, leaf[4:]])
        others = {"activation": "glu", "cond": cond[images], "residual": residual[images], "backend": "cpu"}
        y = fastelbo.masked_conv2d(given, weight, bias, **keywords, **others)
        (d_x,) = torch.autograd.grad(y, leaf, y.detach().cos())
        results.append((y[4:5], d_x[4:5]) if len(y) > 1 else (y, d_x))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("keywords", [{"mask_type": "A"}, {"mask_type": "B", "dilation": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "n, size", [(3, (28, 28)), (2, (5, 7)), (2, (3, 9)), (1, (32, 32)), (1, (1, 50)), (1, (90, 20))]
)
def test_what_lies_beside_an_image_in_memory_reaches_nothing(n, size, dtype, keywords):
    """NaN before it, after it and between its channels, or beside those of a pixel; rows and pixels that lie one after
    the other may be read where they are. Only the sums of d_weight may have another order with channels last."""

    def among_nans(image):
        whole = torch.full((n + 2, image.shape[1] + 2, *size), float("nan"), dtype=dtype)
        whole[1:-1, 1:-1] = image
        return whole[1:-1, 1:-1]

    def pixels_among_nans(image):
        whole = torch.full((n + 2, *size, image.shape[1] + 2), float("nan"), dtype=dtype)
        whole[1:-1, ..., 1:-1] = image.movedim(1, -1)
        return whole[1:-1, ..., 1:-1].movedim(-1, 1)

    x, weight, _, _, d_y = operands(n, 20, 24, *size, 7, dtype=dtype)
    results = []
    for lay_out in (torch.clone, among_nans, LAYOUTS["channels_last"], pixels_among_nans):
        leaves = [lay_out(x).requires_grad_(), weight.clone().requires_grad_()]
        y = fastelbo.masked_conv2d(*leaves, backend="cpu", **keywords)
        results.append((y, *torch.autograd.grad(y, leaves, lay_out(d_y))))
    planes, planes_among_nans, pixels, between_nans = results
    for some, others in ((planes, planes_among_nans), (pixels, between_nans), (planes[:2], pixels[:2])):
        assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
    tolerance = 450 * torch.finfo(dtype).eps
    torch.testing.assert_close(planes[2], pixels[2], rtol=tolerance, atol=tolerance)


def test_a_channel_of_pixels():
    """One of several that lie side by side."""
    image, weight = torch.randn(2, 9, 9, 3), torch.randn(16, 1, 5, 5)
    channel = image.movedim(-1, 1)[:, 1:2]
    assert channel.stride(1) == 1 and channel.stride(3) == 3
    got, want = (
        fastelbo.masked_conv2d(x, weight, mask_type="B", backend="cpu") for x in (channel, channel.contiguous())
    )
    assert torch.equal(got, want)


def test_gradient_of_any_strides(backend):
    x, weight, *_ = operands()
    x.requires_grad_()
    y = fastelbo.masked_conv2d(x, weight, mask_type="B", backend=backend)
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (full,) = torch.autograd.grad(y, x, torch.ones_like(y).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(expanded, full)


@functools.cache
def budget(device, dtype, activation, *shape, k):
    """Operands; what the lines compute of them exactly, and in their dtype; and what float32 promises."""
    tensors = operands(*shape, k, activation=activation, cond="image", residual=False, dtype=dtype)
    mask = published_mask(shape[2], shape[1], k, "B").double()  # which is its own square

    def run(dtype):
        cast = [None if t is None else t.to(dtype) for t in tensors]
        return outputs_and_gradients(lines, cast, activation=activation, mask=mask.to(dtype))

    convolve = [lambda x, w, b, c: lines(x, w, b, mask=mask, cond=c), tensors[:4]]
    return tensors, run(torch.float64), run(dtype), convolution_errors(*convolve, upstream=1.0, slope=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(4, 3, 40, 16, 15, 7), (2, 32, 24, 12, 13, 5), (3, 60, 30, 9, 8, 3), (16, 16, 12, 7, 7, 7)], ids=str
)
def test_error_budget(backend, dtype, activation, shape):
    *shape, k = shape
    tensors, *known = budget(torch.get_default_device(), dtype, activation, *shape, k=k)
    keywords = {"mask_type": "B", "activation": activation, "backend": backend}
    actual = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords)
    for name, *three, error in zip(NAMES, actual, *known, strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name=name, promised=error if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize(
    "shape",
    [(1, 128, 24, 9, 8, 7), (1, 24, 128, 9, 8, 7), (4, 4, 16, 64, 48, 3), (32, 24, 64, 8, 8, 5), (256, 8, 8, 7, 7, 7)],
    ids=str,
)
def test_float32_sums_are_in_blocks(kernels, shape):
    """What the algorithm promises, whatever torch does there: one chain of fused additions is off by far more."""
    *shape, k = shape
    x, weight, bias, *_ = operands(*shape, k, cond=None, residual=False, dtype=torch.float32)
    upstream = torch.randn(x.shape[0], shape[2], *x.shape[2:], generator=torch.Generator(x.device).manual_seed(1))
    mask = published_mask(shape[2], shape[1], k, "B").double()

    def run(function, tensors, upstream, **keywords):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves, **keywords)
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]

    tensors = [x, weight, bias]
    actual = run(fastelbo.masked_conv2d, tensors, upstream, mask_type="B", backend=kernels)
    exact = run(lines, [t.double() for t in tensors], upstream.double(), mask=mask)
    squares = run(lines, [t.double().square() for t in tensors], upstream.double().square(), mask=mask)
    pixels, live = upstream[:, 0].numel(), int(mask[0, 0].sum())
    terms = live * shape[1], live * shape[2], pixels, pixels
    for name, a, b, s, n in zip(NAMES, actual, exact, squares, terms, strict=False):
        error, most = (a - b).abs().max().item(), sum_error(n, s)
        assert error <= most, f"{name}: off by {error:.3g}, where sums in blocks are off by at most {most:.3g}"


@pytest.mark.dispatch
@pytest.mark.parametrize("activation", [None, "elu", "tanh_sigmoid", "glu"])
@pytest.mark.parametrize("mask_type, groups", [("A", 1), ("A", 3), ("B", 3)])
def test_gradcheck(backend, activation, mask_type, groups):
    tensors = [t.requires_grad_() for t in operands(1, 3, 6, 3, 4, 3, activation=activation)]

    def function(x, weight, bias, cond, residual):
        keywords = {"mask_type": mask_type, "channel_groups": groups, "activation": activation, "cond": cond}
        return fastelbo.masked_conv2d(x, weight, bias, residual=residual, backend=backend, **keywords)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("shape", [(2, 6, 12, 5, 7, 3), MANY_SMALL], ids=str)
def test_only_wanted_gradients(backend, shape):
    """Every subset of inputs that want a gradient gets the same as when all do."""
    tensors = operands(*shape, activation="tanh_sigmoid")
    keywords = {"mask_type": "B", "activation": "tanh_sigmoid", "backend": backend}
    every = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords)[1:]
    for wanted in [subset for subset in itertools.product([False, True], repeat=5) if sum(subset) in (1, 4)]:
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        y = fastelbo.masked_conv2d(*leaves[:3], cond=leaves[3], residual=leaves[4], **keywords)
        y.backward(torch.arange(1.0, 1 + y.numel(), dtype=torch.float64).cos().reshape(y.shape))
        for leaf, want, expected in zip(leaves, wanted, every, strict=True):
            assert (leaf.grad is not None) == want
            if want:
                assert_close([leaf.grad], [expected])


# causality


def later_pixels(h, w, row, column, own):
    position = torch.arange(h * w).reshape(h, w)
    return position > position[row, column] if not own else position >= position[row, column]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("n", [1, 8])
def test_future_pixels_reach_nothing(backend, mask_type, dilation, bad, n):
    x, weight, bias, *_ = operands(n, 3, 9, 6, 7, 5, cond=None, residual=False)
    keywords = {"mask_type": mask_type, "dilation": dilation, "backend": backend}
    clean = fastelbo.masked_conv2d(x, weight, bias, **keywords)
    for row, column in itertools.product((0, 2, 3, 5), (0, 1, 3, 6)):
        later = later_pixels(6, 7, row, column, mask_type == "A")
        y = fastelbo.masked_conv2d(x.masked_fill(later, bad), weight, bias, **keywords)
        past = ~later_pixels(6, 7, row, column, own=False)  # this output and all before it
        assert torch.equal(y[:, :, past], clean[:, :, past])


@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("activation", [None, "glu"])
def test_later_channel_groups_reach_nothing(backend, mask_type, order, activation):
    x, weight, bias, *_ = operands(1, 6, 12, 4, 5, 3, cond=None, residual=False)
    keywords = {"mask_type": mask_type, "channel_groups": 3, "group_order": order, "activation": activation}
    clean = fastelbo.masked_conv2d(x, weight, bias, backend=backend, **keywords)
    channels = clean.shape[1]
    of_input = torch.arange(6) % 3 if order == "interleaved" else torch.arange(6) // 2
    of_output = torch.arange(channels) % 3 if order == "interleaved" else torch.arange(channels) // (channels // 3)
    for group in range(3):
        poisoned = x.clone()
        poisoned[:, of_input > group if mask_type == "B" else of_input >= group, 2, 3] = float("nan")
        y = fastelbo.masked_conv2d(poisoned, weight, bias, backend=backend, **keywords)
        assert torch.equal(y[:, of_output == group, 2, 3], clean[:, of_output == group, 2, 3])


def test_dead_weights_are_never_read(backend):
    for (groups, order), mask_type, k in itertools.product(GROUPS, "AB", (1, 3, 5)):
        x, weight, *_ = operands(8, k=k)
        mask = fastelbo.conv_mask2d(12, 6, k, mask_type, channel_groups=groups, group_order=order)
        keywords = {"mask_type": mask_type, "channel_groups": groups, "group_order": order, "backend": backend}

        def run(weight, x=x, keywords=keywords):
            return outputs_and_gradients(fastelbo.masked_conv2d, [x, weight, None, None, None], **keywords)

        poisoned, clean = run(weight.masked_fill(~mask, float("nan"))), run(weight)
        for a, b in zip(poisoned, clean, strict=True):
            assert torch.equal(a, b)
        assert (poisoned[2][~mask] == 0).all()


@pytest.mark.parametrize("n", [2, 8])
def test_pixels_that_nothing_reads_leave_the_gradients_alone(backend, n):
    """The last pixel is in everybody's future under mask A: NaN there reaches no weight's gradient."""
    x, weight, bias, *_ = operands(n, 3, 8, 5, 6, 5)
    keywords = {"mask_type": "A", "backend": backend}
    clean = outputs_and_gradients(fastelbo.masked_conv2d, [x, weight, bias, None, None], **keywords)
    x[:, :, -1, -1] = float("nan")
    poisoned = outputs_and_gradients(fastelbo.masked_conv2d, [x, weight, bias, None, None], **keywords)
    for a, b in zip(poisoned, clean, strict=True):
        assert torch.equal(a, b)


# stacks


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("activation", [None, "tanh_sigmoid"])
def test_stacks_are_parts_of_the_full_kernel(backend, k, dilation, mask_type, activation):
    x, weight, bias, cond, _ = operands(k=k)
    h = k // 2
    rows, columns = torch.arange(k)[:, None], torch.arange(k)
    seen = {
        "vertical": (rows < h + (mask_type == "B")).expand(k, k),
        "horizontal": (rows == h) & (columns < h + (mask_type == "B")),
    }
    crops = {"vertical": weight[:, :, : h + 1], "horizontal": weight[:, :, h : h + 1, : h + 1]}
    for stack, mask in seen.items():
        keywords = {"dilation": dilation, "activation": activation}
        want = outputs_and_gradients(lines, [x, weight, bias, cond, None], mask=mask.double()[None, None], **keywords)
        keywords |= {"stack": stack, "mask_type": mask_type, "backend": backend}
        got = outputs_and_gradients(fastelbo.causal_conv2d, [x, crops[stack], bias, cond, None], **keywords)
        want[2] = want[2][:, :, : h + 1] if stack == "vertical" else want[2][:, :, h : h + 1, : h + 1]
        assert_close(got, want)


def test_future_pixels_reach_no_stack(backend):
    x, weight, *_ = operands(1, 2, 4, 5, 6, 5)
    later = later_pixels(5, 6, 2, 3, own=False)
    below = torch.arange(5)[:, None].expand(5, 6) > 2
    horizontal = weight[:, :, :1, :3]
    for stack, part, bad in (("vertical", weight[:, :, :3], below), ("horizontal", horizontal, later)):
        clean, poisoned = (
            fastelbo.causal_conv2d(image, part, stack=stack, backend=backend)
            for image in (x, x.masked_fill(bad, float("nan")))
        )
        assert torch.equal(clean[:, :, ~bad], poisoned[:, :, ~bad])


# edges and reproducibility


def test_empty_batch_and_no_batch(backend):
    x, weight, bias, cond, residual = operands()
    keywords = {"mask_type": "B", "backend": backend}
    got = outputs_and_gradients(fastelbo.masked_conv2d, [x[:0], weight, bias, cond[:0], residual[:0]], **keywords)
    assert got[0].shape == (0, 12, 5, 7)
    assert all((g == 0).all() for g in got[2:4])
    for c in (cond, operands(cond="image")[3]):
        whole = fastelbo.masked_conv2d(x, weight, bias, cond=c, residual=residual, **keywords)
        one = fastelbo.masked_conv2d(x[0], weight, bias, cond=c[0], residual=residual[0], **keywords)
        torch.testing.assert_close(one, whole[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mask_a_without_taps(backend, dtype):
    x, weight, bias, *_ = operands(k=1, dtype=dtype)
    got = outputs_and_gradients(fastelbo.masked_conv2d, [x, weight, bias, None, None], mask_type="A", backend=backend)
    assert torch.equal(got[0], bias[:, None, None].expand_as(got[0]))
    assert (got[1] == 0).all()
    assert (got[2] == 0).all()


def test_bitwise_the_same_from_run_to_run(kernels):
    tensors = operands(5, 16, 32, 19, 13, 5, activation="tanh_sigmoid", dtype=torch.float32)
    keywords = {"mask_type": "B", "activation": "tanh_sigmoid", "backend": kernels}
    first, second = (outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(5, 16, 32, 19, 13, 5), (31, 32, 32, 7, 7, 7), (160, 16, 32, 7, 7, 7)], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(shape):
    tensors = operands(*shape, activation="tanh_sigmoid", dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        try:
            keywords = {"mask_type": "B", "activation": "tanh_sigmoid", "backend": "cpu"}
            results.append(outputs_and_gradients(fastelbo.masked_conv2d, tensors, **keywords))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# any set of taps

TAPS = {
    "checkerboard": [[0, 1, 0], [1, 0, 1], [0, 1, 0]],
    "checkerboard 5": [[(row + column) % 2 for column in range(5)] for row in range(5)],
    "row": [[1, 1, 1, 1, 1]],
    "column": [[1], [0], [1]],
    "even sides": [[1, 1], [1, 0]],
    "below alone": [[0, 0, 0], [0, 0, 0], [1, 0, 1]],
    "unequal sides": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [1, 0, 0, 0, 1]],
    "all rows above": [[1] * 5] * 2 + [[0] * 5] * 3,
    "all": [[1] * 3] * 3,
}


@pytest.mark.parametrize("n", [2, 9])
@pytest.mark.parametrize("size, dilation", [((6, 7), 1), ((6, 7), 2), ((2, 9), 1), ((1, 1), 9)], ids=str)
@pytest.mark.parametrize("taps", TAPS.values(), ids=TAPS)
def test_any_taps_equal_the_product_with_them(backend, taps, size, dilation, n):
    tensors = operands(n, 6, 8, *size, residual=False)
    mask = torch.tensor(taps, dtype=torch.float64)
    tensors[1] = torch.randn(8, 6, *mask.shape, dtype=torch.float64) / 8
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, taps=taps, dilation=dilation, backend=backend)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask, dilation=dilation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_surrounds_taps(backend, activation):
    taps = TAPS["checkerboard"]
    tensors = operands(2, 20, 24, 9, 11, activation=activation, cond="image")
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, taps=taps, activation=activation, backend=backend)
    mask = torch.tensor(taps, dtype=torch.float64)
    assert_close(got, outputs_and_gradients(lines, tensors, mask=mask, activation=activation))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [TAPS["checkerboard 5"], TAPS["unequal sides"]], ids=["checkerboard", "unequal"])
def test_error_budget_of_taps(backend, dtype, taps):
    tensors = [t.to(dtype) for t in operands(3, 32, 40, 12, 13)]
    mask = torch.tensor(taps)
    tensors[1] = (torch.randn(40, 32, *mask.shape) / 18).to(dtype)
    got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, taps=taps, backend=backend)
    exact = outputs_and_gradients(lines, [t.double() for t in tensors], mask=mask)
    plain = outputs_and_gradients(lines, tensors, mask=mask)
    for name, *three in zip(
        ("y", "d_input", "d_weight", "d_bias", "d_cond", "d_residual"), got, exact, plain, strict=True
    ):
        assert_within_budget(*three, name=name)


def test_dead_taps_of_a_list_are_never_read(backend):
    for taps in TAPS.values():
        dead = torch.tensor(taps) == 0
        x, _, bias, *_ = operands(2, 6, 8, 5, 6)
        weight = torch.randn(8, 6, *dead.shape, dtype=torch.float64)

        def run(x, weight, bias=bias, taps=taps):
            tensors = [x, weight, bias, None, None]
            return outputs_and_gradients(fastelbo.masked_conv2d, tensors, taps=taps, backend=backend)

        clean, poisoned = run(x, weight), run(x, weight.masked_fill(dead, float("nan")))
        assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))
        assert (poisoned[2][:, :, dead] == 0).all()
        row, column = 2, 3  # a pixel reaches those alone that read it
        x[:, :, row, column] = float("nan")
        y = run(x, weight)[0]
        reached = torch.zeros(5, 6, dtype=torch.bool)
        rows, columns = dead.shape
        for i, j in (~dead).nonzero().tolist():
            r, s = row - i + rows // 2, column - j + columns // 2
            if 0 <= r < 5 and 0 <= s < 6:
                reached[r, s] = True
        assert torch.equal(y.isnan().all(1).all(0), reached)
        assert torch.equal(y[:, :, ~reached], clean[0][:, :, ~reached])


def test_taps_of_a_mask_type_are_that_mask_type(backend):
    for mask_type in "AB":
        taps = fastelbo.conv_mask2d(1, 1, 5, mask_type)[0, 0]
        tensors = operands(2, 6, 8, 6, 7, k=5)
        got = outputs_and_gradients(fastelbo.masked_conv2d, tensors, taps=taps, backend=backend)
        assert_close(got, outputs_and_gradients(fastelbo.masked_conv2d, tensors, mask_type=mask_type, backend=backend))


# inside torch


@pytest.mark.parametrize("activation, residual, layout", [(None, False, 0), ("relu", True, 1), ("glu", False, 1)])
def test_opcheck(activation, residual, layout):
    x, weight, bias, cond, added = operands(activation=activation)
    if layout:
        x = x.contiguous(memory_format=torch.channels_last)
    ops, options = torch.ops.fastelbo, ("B", "square", 1, 3, "interleaved", activation or "")
    keep = activation is not None
    arguments = (x, weight, bias, cond, added if residual else None, *options, keep)
    torch.library.opcheck(ops.masked_conv2d_fwd.default, arguments)
    y, kept = ops.masked_conv2d_fwd(*arguments)
    for flags in ((True, True, True, 2), (True, False, False, 0), (False, True, False, 4)):
        arguments = (y, x, weight, kept if keep else None, *options, *flags)
        torch.library.opcheck(ops.masked_conv2d_bwd.default, arguments)


@pytest.mark.parametrize("activation", [None, "elu", "tanh_sigmoid"])
def test_compile(backend, activation):
    torch._dynamo.reset()  # torch gives up on a function that it has compiled for eight cases
    tensors = operands(activation=activation)

    def function(*args, **keywords):
        return fastelbo.masked_conv2d(*args, mask_type="B", activation=activation, backend=backend, **keywords)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_close(outputs_and_gradients(compiled, tensors), outputs_and_gradients(function, tensors))


def test_checkpoint(backend):
    tensors = operands(activation="glu")

    def function(*args, **keywords):
        return fastelbo.masked_conv2d(*args, mask_type="B", activation="glu", backend=backend, **keywords)

    def recomputed(*args, **keywords):
        return checkpoint(function, *args, use_reentrant=False, **keywords)

    for a, b in zip(outputs_and_gradients(recomputed, tensors), outputs_and_gradients(function, tensors), strict=True):
        assert torch.equal(a, b)


def test_functional_transforms_run_on_the_reference():
    x, weight, bias, *_ = operands()

    def loss(weight, x):
        return fastelbo.masked_conv2d(x, weight, bias, mask_type="B", channel_groups=3).square().sum()

    per_example = vmap(grad(loss), (None, 0))(weight, x)
    for i in range(2):
        leaf = weight.clone().requires_grad_()
        torch.testing.assert_close(per_example[i], torch.autograd.grad(loss(leaf, x[i]), leaf)[0])
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms run on the reference"):
        vmap(lambda image: fastelbo.masked_conv2d(image, weight, mask_type="B", backend="cpu"))(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_it_does_for_convolutions(backend, compiled):
    torch._dynamo.reset()
    tensors, device = operands(dtype=torch.float32, activation="tanh_sigmoid"), torch.get_default_device().type
    keywords = {"mask_type": "B", "activation": "tanh_sigmoid", "backend": backend}

    def function(*args, **more):
        with torch.autocast(device, dtype=torch.bfloat16):
            return fastelbo.masked_conv2d(*args, **more, **keywords)

    used = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    got = outputs_and_gradients(used, tensors)
    half = outputs_and_gradients(fastelbo.masked_conv2d, [t.bfloat16() for t in tensors], **keywords)
    assert got[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in got[1:])
    for a, b in zip(got, half, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype))


# bad input

X, W = torch.zeros(2, 6, 5, 7), torch.zeros(12, 6, 3, 3)
BAD = [
    ((X, W), {"mask_type": "C"}, ValueError, "mask_type must be one of A, B; got 'C'"),
    ((X, W), {"mask_type": None}, ValueError, "mask_type must be one of A, B; got None"),
    ((X, torch.zeros(12, 6, 4, 4)), {}, ValueError, "weight must have a square kernel of odd size; got shape (12, 6, 4, 4)"),
    ((X, torch.zeros(12, 6, 3, 5)), {}, ValueError, "weight must have a square kernel of odd size"),
    ((X, torch.zeros(12, 6, 3)), {}, ValueError, "weight must be of shape [C_out, C_in, rows, columns]; got (12, 6, 3)"),
    ((X, torch.zeros(12, 5, 3, 3)), {}, ValueError, "input must have the 5 channels of weight; got shape (2, 6, 5, 7)"),
    ((X[0, 0], W), {}, ValueError, "input must be of shape [N, C, H, W] or [C, H, W]; got (5, 7)"),
    ((X[:, :, :0], W), {}, ValueError, "input must have at least one row and one column; got shape (2, 6, 0, 7)"),
    ((X, W, torch.zeros(6)), {}, ValueError, "bias must be of shape (12,); got (6,)"),
    ((X, W), {"cond": torch.zeros(2, 6)}, ValueError, "cond must be of shape (2, 12) or (2, 12, 5, 7); got (2, 6)"),
    ((X, W), {"residual": X}, ValueError, "residual must be of the output's shape (2, 12, 5, 7); got (2, 6, 5, 7)"),
    ((X, W), {"activation": "gelu"}, ValueError, "activation must be one of None, relu, elu, tanh_sigmoid, glu; got 'gelu'"),
    ((X, W[:11]), {"activation": "glu"}, ValueError, "weight must have an even number of output channels for glu; got 11"),
    ((X, W), {"dilation": 0}, ValueError, "dilation must be at least 1; got 0"),
    ((X, W), {"dilation": 1.0}, TypeError, "dilation must be an int; got float"),
    ((X, W), {"channel_groups": 0}, ValueError, "channel_groups must be at least 1; got 0"),
    ((X, W), {"group_order": "blocked"}, ValueError, "group_order must be one of interleaved, contiguous; got 'blocked'"),
    ((X, W), {"channel_groups": 4, "group_order": "contiguous"}, ValueError, "channel_groups in contiguous order must divide"),
    ((X, W.double()), {}, TypeError, "weight must have the dtype of input, torch.float32; got torch.float64"),
    ((X.long(), W), {}, TypeError, "input must be float32, float64, bfloat16 or float16; got torch.int64"),
    ((X, None), {}, TypeError, "weight must be a tensor; got NoneType"),
    ((X, W.to("meta")), {}, ValueError, "weight must be on the device of input, cpu; got meta"),
    ((X, W), {"backend": "cuda"}, NotImplementedError, "backend 'cuda' cannot run this input (cuda: "),
    ((X, W), {"backend": "gpu"}, ValueError, "backend must be one of reference, cpu, triton, cuda; got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, keywords, error, message", BAD, ids=range(len(BAD)))
def test_bad_input(arguments, keywords, error, message):
    with pytest.raises(error) as caught:
        fastelbo.masked_conv2d(*arguments, **{"mask_type": "B", **keywords})
    assert message in str(caught.value)


def test_bad_input_of_taps():
    for taps, error, message in (
        ([[0, 1]], ValueError, "taps must be of the kernel's shape (3, 3); got rows of lengths [2]"),
        (torch.ones(3, 4), ValueError, "taps must be of the kernel's shape (3, 3); got rows of lengths [4, 4, 4]"),
        ([[0] * 3] * 3, ValueError, "taps must have a tap that is live; got none"),
        ([[1, 0, "x"]] * 3, TypeError, "taps must be rows of numbers, or a tensor of them; got str among them"),
        ("A", TypeError, "taps must be rows of numbers, or a tensor of them; got str"),
        ([1, 1, 1], TypeError, "taps must be rows of numbers, or a tensor of them; got list"),
        (torch.tensor(1), TypeError, "taps must be rows of numbers, or a tensor of them; got Tensor"),
    ):
        with pytest.raises(error) as caught:
            fastelbo.masked_conv2d(X, W, taps=taps)
        assert message in str(caught.value)
    cross = TAPS["checkerboard"]
    with pytest.raises(ValueError, match="mask_type must be None where taps are given; got 'A'"):
        fastelbo.masked_conv2d(X, W, mask_type="A", taps=cross)
    with pytest.raises(ValueError, match="channel_groups must be 1 where taps are given; got 3"):
        fastelbo.masked_conv2d(X, W, taps=cross, channel_groups=3)


def test_bad_input_of_stacks_and_masks():
    with pytest.raises(ValueError, match="stack must be one of vertical, horizontal; got 'diagonal'"):
        fastelbo.causal_conv2d(X, W, stack="diagonal")
    with pytest.raises(ValueError, match="weight must have one row for the horizontal stack"):
        fastelbo.causal_conv2d(X, W, stack="horizontal")
    with pytest.raises(ValueError, match="at most k//2 \\+ 1 rows for the vertical stack"):
        fastelbo.causal_conv2d(X, W, stack="vertical")
    with pytest.raises(ValueError, match="channel_groups must be 1 for the vertical stack; got 3"):
        fastelbo.causal_conv2d(X, W[:, :, :2], stack="vertical", channel_groups=3)
    with pytest.raises(ValueError, match="kernel_size must be odd; got 4"):
        fastelbo.conv_mask2d(3, 3, 4, "A")
    with pytest.raises(ValueError, match="out_channels must be even under a gate; got 3"):
        fastelbo.conv_mask2d(3, 3, 3, "A", gated=True)
    with pytest.raises(ValueError, match="2 groups of 3 and 4"):
        fastelbo.conv_mask2d(4, 3, 3, "B", channel_groups=2, group_order="contiguous")


# the op itself, which exported programs call


def raw(direction, library=torch.ops.fastelbo, device="cpu", **overrides):
    """A call of the op with small images, but for some arguments."""
    arguments = {"input": X, "weight": W}
    if direction == "fwd":
        arguments |= {"bias": None, "cond": None, "residual": None}
    else:
        arguments = {"d_y": torch.zeros(2, 12, 5, 7), **arguments, "kept": None}
    arguments |= {"mask_type": "B", "stack": "square", "dilation": 1, "channel_groups": 1, "group_order": "interleaved"}
    arguments |= {"activation": "", "keep": False} if direction == "fwd" else {"activation": ""}
    if direction == "bwd":
        arguments |= {"want_input": True, "want_weight": True, "want_bias": True, "cond_ndim": 0}
    assert overrides.keys() <= arguments.keys()
    given = (x.to(device) if isinstance(x, torch.Tensor) else x for x in (arguments | overrides).values())
    return getattr(library, f"masked_conv2d_{direction}")(*given)


Y = torch.zeros(2, 12, 5, 7)
RAW = [
    ("fwd", {"input": X[0]}, "input must be of shape [N, C, H, W] with at least one row and one column; got (6, 5, 7)"),
    ("fwd", {"input": X[:, :, :0]}, "at least one row and one column; got (2, 6, 0, 7)"),
    ("fwd", {"input": X.bool(), "weight": W.bool()}, "input must be float32, float64, bfloat16 or float16"),
    ("fwd", {"weight": W[0]}, "weight must be of shape [C_out, C_in, rows, columns]; got (6, 3, 3)"),
    ("fwd", {"weight": W[:0]}, "weight must be of shape [C_out, C_in, rows, columns]; got (0, 6, 3, 3)"),
    ("fwd", {"weight": W[:, :4]}, "weight must be of shape (12, 6, 3, 3); got (12, 4, 3, 3)"),
    ("fwd", {"weight": W[:, :, :2]}, "weight must have a kernel of the square stack; got shape (12, 6, 2, 3)"),
    ("fwd", {"stack": "horizontal"}, "weight must have a kernel of the horizontal stack; got shape (12, 6, 3, 3)"),
    ("fwd", {"stack": "vertical"}, "weight must have a kernel of the vertical stack; got shape (12, 6, 3, 3)"),
    ("fwd", {"weight": W.double()}, "weight must have the dtype of input"),
    ("fwd", {"bias": torch.zeros(11)}, "bias must be of shape (12,); got (11,)"),
    ("fwd", {"bias": torch.zeros(12, dtype=torch.int32)}, "bias must have the dtype of input"),
    ("fwd", {"cond": torch.zeros(1, 12)}, "cond must be of shape (2, 12); got (1, 12)"),
    ("fwd", {"cond": Y[:, :, :4]}, "cond must be of shape (2, 12, 5, 7); got (2, 12, 4, 7)"),
    ("fwd", {"residual": X}, "residual must be of shape (2, 12, 5, 7); got (2, 6, 5, 7)"),
    ("fwd", {"residual": Y, "activation": "glu"}, "residual must be of shape (2, 6, 5, 7); got (2, 12, 5, 7)"),
    ("fwd", {"activation": "gelu"}, "activation: got gelu"),
    ("fwd", {"activation": "glu", "weight": W[:11]}, "weight must have an even number of output channels for glu; got 11"),
    ("fwd", {"mask_type": "C"}, "mask_type must be A or B; got C"),
    ("fwd", {"stack": "diagonal"}, "stack must be square, vertical or horizontal; got diagonal"),
    ("fwd", {"group_order": "blocked"}, "group_order must be interleaved or contiguous; got blocked"),
    ("fwd", {"dilation": -1}, "dilation must be from 1 on and below 2**31; got -1"),
    ("fwd", {"channel_groups": 0}, "channel_groups must be from 1 on and below 2**31; got 0"),
    ("fwd", {"channel_groups": 4, "group_order": "contiguous"}, "must divide the channels in contiguous order; got 4"),
    ("bwd", {"d_y": Y[:1]}, "d_y must be of shape (2, 12, 5, 7); got (1, 12, 5, 7)"),
    ("bwd", {"d_y": Y.double()}, "d_y must have the dtype of input"),
    ("bwd", {"activation": "relu"}, "kept must be given with an activation; got none"),
    ("bwd", {"activation": "relu", "kept": Y[0]}, "kept must be of shape (2, 12, 5, 7); got (12, 5, 7)"),
    ("bwd", {"cond_ndim": 3}, "cond_ndim must be 0, 2 or 4; got 3"),
    ("bwd", {"weight": W[:, :4]}, "weight must be of shape (12, 6, 3, 3); got (12, 4, 3, 3)"),
    ("bwd", {"input": X[:, :4]}, "weight must be of shape (12, 4, 3, 3); got (12, 6, 3, 3)"),
]  # fmt: skip


@pytest.mark.parametrize("direction, overrides, message", RAW, ids=range(len(RAW)))
def test_bad_input_of_the_op(direction, overrides, message):
    assert all(torch.isfinite(out).all() for out in raw(direction))
    with pytest.raises(RuntimeError) as caught:
        raw(direction, **overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("direction, overrides", [case[:2] for case in RAW], ids=range(len(RAW)))
@pytest.mark.parametrize("where", ["meta", "triton"])
def test_bad_input_of_the_op_without_compiled_code(where, direction, overrides):
    """For Triton's kernels, and where there are none, the package checks itself."""
    at = {"device": "meta"}
    if where == "triton":
        at = {"library": torch.ops.fastelbo_triton, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    raw(direction, **at)
    with pytest.raises((ValueError, TypeError)) as caught:
        raw(direction, **at, **overrides)
    assert any(name in str(caught.value) for name in overrides)


# dilations beyond the image


def naive(x, weight, stack, mask_type, dilation, groups):
    """Output pixel by output pixel and tap by tap, of those taps that lie in the image."""
    outputs, inputs, height, width = weight.shape
    up = height // 2 if stack == "square" else height - 1
    left = width - 1 if stack == "horizontal" else width // 2
    rows, columns = x.shape[2:]
    pixels = []
    for r, c in itertools.product(range(rows), range(columns)):
        total = x.new_zeros(x.shape[0], outputs) + 0 * (x.sum() + weight.sum())  # autograd wants both
        for i, j in itertools.product(range(up + 1), range(width)):
            at = r + (i - up) * dilation, c + (j - left) * dilation
            if not (0 <= at[0] < rows and 0 <= at[1] < columns):
                continue
            if i < up or (stack == "vertical" and mask_type == "B") or (stack != "vertical" and j < left):
                total = total + x[:, :, at[0], at[1]] @ weight[:, :, i, j].T
            elif stack != "vertical" and j == left:
                read, own = torch.arange(inputs) % groups, torch.arange(outputs)[:, None] % groups
                pairs = (read < own if mask_type == "A" else read <= own).to(x.dtype)
                total = total + x[:, :, r, c] @ (weight[:, :, i, j] * pairs).T
        pixels.append(total)
    return torch.stack(pixels, -1).reshape(x.shape[0], outputs, rows, columns)


@pytest.mark.parametrize("dilation", [3, 4, 7, 8, 100_000, 2**31 - 1])
@pytest.mark.parametrize("stack, groups", [("square", 1), ("square", 3), ("vertical", 1), ("horizontal", 3)])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_taps_outside_of_the_image_take_no_memory(backend, mask_type, stack, groups, dilation):
    """Memory for a border as wide as the dilation would be terabytes."""
    x, weight, *_ = operands(2, 3, 6, 8, 4, 7)
    weight = {"square": weight, "vertical": weight[:, :, :4], "horizontal": weight[:, :, :1, :4]}[stack]
    options = {"mask_type": mask_type, "dilation": dilation, "channel_groups": groups, "backend": backend}
    if stack != "square":
        options["stack"] = stack
    function = fastelbo.masked_conv2d if stack == "square" else fastelbo.causal_conv2d
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    y, want = function(*leaves, **options), naive(*leaves, stack, mask_type, dilation, groups)
    weights = torch.arange(1.0, 1 + y.numel(), dtype=torch.float64).cos().reshape(y.shape)
    assert_close([y], [want])
    assert_close(torch.autograd.grad(y, leaves, weights), torch.autograd.grad(want, leaves, weights))


@pytest.mark.parametrize("dilation", [9, 100_000, 2**31 - 1])
def test_the_op_itself_at_dilations_beyond_the_image(kernels, dilation):
    """Exported programs call it; their images may be of any size."""
    x, weight, *_ = operands(2, 3, 6, 8, 4, 3)
    op = getattr(torch.ops, "fastelbo_triton" if kernels == "triton" else "fastelbo")
    options = "B", "square", dilation, 1, "interleaved", ""
    y, _ = op.masked_conv2d_fwd(x, weight, None, None, None, *options, False)
    d_x, d_weight, *_ = op.masked_conv2d_bwd(y, x, weight, None, *options, True, True, False, 0)
    want = torch.einsum("nchw,oc->nohw", x, weight[:, :, 1, 1])
    d_centre = torch.einsum("nohw,nchw->oc", want, x)
    assert_close(
        [y, d_x, d_weight[:, :, 1, 1]], [want, torch.einsum("nohw,oc->nchw", want, weight[:, :, 1, 1]), d_centre]
    )
    d_weight[:, :, 1, 1] = 0
    assert (d_weight == 0).all()


def test_a_good_call_lets_no_bad_one_pass():
    """Checks are remembered by what they look at."""
    x, weight = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 3)
    half = weight.bfloat16()
    fastelbo.masked_conv2d(x, weight, mask_type="B")
    fastelbo.masked_conv2d(x, weight, taps=((0, 1, 0), (1, 0, 1), (0, 1, 0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastelbo.masked_conv2d(x, half, mask_type="B")
    fastelbo.causal_conv2d(x, torch.randn(4, 2, 1, 2), stack="horizontal")
    for error, words, (given, keywords) in (
        (TypeError, "dilation must be an int; got bool", (weight, {"dilation": True})),
        (TypeError, "channel_groups must be an int; got float", (weight, {"channel_groups": 1.0})),
        (TypeError, "weight must have the dtype of input", (half, {})),
        (ValueError, "residual must be of the output's shape", (weight, {"residual": x})),
        (ValueError, "input must have the 2 channels|must have the 3 channels", (torch.randn(4, 3, 3, 3), {})),
        (
            ValueError,
            "mask_type must be None where taps are given",
            (weight, {"taps": ((0, 1, 0), (1, 0, 1), (0, 1, 0))}),
        ),
        (TypeError, "cond must be a tensor; got float", (weight, {"cond": 1.0})),
        (ValueError, "mask_type must be one of A, B", (torch.randn(4, 2, 1, 2), {"mask_type": None})),
    ):
        with pytest.raises(error, match=words):
            fastelbo.masked_conv2d(x, given, **({"mask_type": "B"} | keywords))
