"""Masked (autoregressive) convolutions."""

import numbers
from collections.abc import Sequence

import torch

from fastelbo import _autograd, _checks, _flops, _library, _sharding, backends, reference
from fastelbo.reference.masked_conv2d import GATES

MASK_TYPES = ("A", "B")
STACKS = ("vertical", "horizontal")
GROUP_ORDERS = ("interleaved", "contiguous")
ACTIVATIONS = ("relu", "elu", *GATES)


def masked_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: "torch.Tensor | None" = None,
    *,
    mask_type: "str | None" = None,
    taps: "Sequence[Sequence[bool]] | torch.Tensor | None" = None,
    dilation: int = 1,
    channel_groups: int = 1,
    group_order: str = "interleaved",
    activation: "str | None" = None,
    cond: "torch.Tensor | None" = None,
    residual: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""Convolution of an image with a k x k kernel that reads only what comes before a pixel in raster order.

    .. math:: y = f\left(b + c + \sum_{(i,j) \text{ live}} w_{ij}\, x_{r+(i-h)d,\,col+(j-h)d}\right) + \text{residual},
              \qquad h = \lfloor k/2 \rfloor

    Live are the h rows above the kernel's centre, what lies left of the centre in its own row, and for mask B the
    centre itself. Dead taps are never read, and get gradient exactly 0: NaN or inf in a dead weight or in a future
    pixel reaches no output. Outside of the image the input counts as 0; the output has the image's size.

    With G channel groups (3 for the colours of a pixel) the channels of a pixel come in G groups, one after the other:
    at the centre, B reads the channels with g_in <= g_out, and A those with g_in < g_out. Channel c of C belongs to
    group c % G ("interleaved") or c G // C ("contiguous"); under a gate, which joins channel c with channel c + C/2,
    each half is numbered for itself.

    In place of a mask type `taps` names the live taps one by one, of a kernel of any sides, rows x columns, which has
    its centre at (rows // 2, columns // 2): checkerboards, all rows above, one's own mask.

    Args:
        input: [N, C_in, H, W] or [C_in, H, W]; float32, float64, bfloat16 or float16, any strides.
        weight: [C_out, C_in, k, k] with odd k, of the input's dtype; [C_out, C_in, rows, columns] for taps.
        bias: [C_out] or None.
        mask_type: "A" (for a network's first layer) or "B".
        taps: [rows, columns], nested lists or a tensor: what is True, or not 0, is live. At least one is.
        dilation: d, the distance between taps, an int.
        channel_groups: how many groups, G.
        group_order: "interleaved" or "contiguous".
        activation: None, "relu", "elu", or a gate over the halves (a, b) of the channels, which leaves C_out / 2 of
            them: "tanh_sigmoid" is tanh(a) sigmoid(b), "glu" is a sigmoid(b).
        cond: added before the activation: [N, C_out] (a class) or [N, C_out, H, W]; without N for an unbatched input.
        residual: added after the activation: of the output's shape.
        backend: "reference", "cpu", "triton" or "cuda"; the fastest that can run the input where None. Triton's
            kernels multiply float32 as torch's own convolutions do, in TF32 unless
            torch.backends.cudnn.conv.fp32_precision is "ieee", and time several tiles at their first call where
            torch.backends.cudnn.benchmark is set.

    Returns:
        y, [N, C_out or C_out / 2, H, W], of the input's dtype and memory format. Arithmetic is float32 for half inputs.
        Under autocast all operands are cast first, as those of torch.nn.functional.conv2d are.

    Raises:
        ValueError: an unknown mask type, group order or activation, an even or non-square kernel, both a mask type and
            taps or neither, taps of another shape than the kernel's or with channel groups, shapes that do not match,
            contiguous groups that do not divide the channels, an odd number of channels under a gate, tensors on
            several devices.
        TypeError: a dtype that is not supported, or not the input's.
        NotImplementedError: an explicit backend that cannot run this input.

    Source:
        van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.4, and "Conditional Image Generation with
        PixelCNN Decoders", equations 2 and 4.

    Example:
        >>> image, weight = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 3, 3)
        >>> fastelbo.masked_conv2d(image, weight, mask_type="A")
        tensor([[[[0., 1., 1.],
                  [2., 4., 3.]]]])
        >>> fastelbo.masked_conv2d(image, weight, taps=[[0, 1, 0], [1, 0, 1], [0, 1, 0]])
        tensor([[[[2., 3., 2.],
                  [2., 3., 2.]]]])
    """
    options = mask_type, "square", dilation, channel_groups, group_order, activation, taps
    return _run((input, weight, bias, cond, residual), options, backend)


def causal_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: "torch.Tensor | None" = None,
    *,
    stack: str,
    mask_type: str = "B",
    dilation: int = 1,
    channel_groups: int = 1,
    group_order: str = "interleaved",
    activation: "str | None" = None,
    cond: "torch.Tensor | None" = None,
    backend: "str | None" = None,
) -> torch.Tensor:
    r"""Convolution of one of the two stacks of a Gated PixelCNN, which have no dead taps and together no blind spot.

    The vertical stack reads the rows down to the pixel's own with a kernel of k//2 + 1 rows and k columns, the
    horizontal stack what lies left of the pixel, and the pixel itself, with a kernel of 1 row and k//2 + 1 columns:

    .. math:: y^v = f\left(b + c + \sum_{i \le h,\,j} w_{ij}\, x_{r+(i-h)d,\,col+(j-h)d}\right), \qquad
              y^h = f\left(b + c + \sum_{j \le h} w_{j}\, x_{r,\,col+(j-h)d}\right), \qquad h = \lfloor k/2 \rfloor.

    A vertical feature thus has seen its own row to its end: shift it down by one row before it meets the horizontal
    stack, or start with mask A.

    Args:
        input, bias, dilation, activation, cond, backend: as for masked_conv2d.
        weight: [C_out, C_in, k//2 + 1, k] for the vertical stack (fewer rows are fine), [C_out, C_in, 1, k//2 + 1] for
            the horizontal.
        stack: "vertical" or "horizontal".
        mask_type: "B", or "A" for a first layer whose last row (vertical) or last column (horizontal) is dead.
        channel_groups, group_order: as for masked_conv2d, at the last tap of the horizontal stack; the vertical stack,
            which colours of one pixel never read each other through, has none.

    Returns:
        y, as masked_conv2d.

    Raises:
        ValueError, TypeError, NotImplementedError: as masked_conv2d.

    Source:
        van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", section 2.2.

    Example:
        >>> image = torch.ones(1, 1, 2, 3)
        >>> fastelbo.causal_conv2d(image, torch.ones(1, 1, 2, 3), stack="vertical")
        tensor([[[[2., 3., 2.],
                  [4., 6., 4.]]]])
        >>> fastelbo.causal_conv2d(image, torch.ones(1, 1, 1, 2), stack="horizontal")
        tensor([[[[1., 2., 2.],
                  [1., 2., 2.]]]])
    """
    _checks.check_one_of("stack", stack, STACKS)
    options = mask_type, stack, dilation, channel_groups, group_order, activation, None
    return _run((input, weight, bias, cond, None), options, backend)


def conv_mask2d(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    mask_type: str,
    *,
    channel_groups: int = 1,
    group_order: str = "interleaved",
    gated: bool = False,
) -> torch.Tensor:
    """The live taps of masked_conv2d as a tensor: for tests, for checkpoints, and for networks of other layers.

    Args:
        out_channels, in_channels: C_out and C_in.
        kernel_size: k, odd.
        mask_type: "A" or "B".
        channel_groups: how many groups, G.
        group_order: "interleaved" or "contiguous".
        gated: whether a gate halves the output's channels, so that each half has its own groups.

    Returns:
        bool, [C_out, C_in, k, k]: True where a tap is live.

    Raises:
        ValueError: as masked_conv2d.

    Source:
        van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.4.

    Example:
        >>> fastelbo.conv_mask2d(1, 1, 3, "B")[0, 0].int()
        tensor([[1, 1, 1],
                [1, 1, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    _checks.check_one_of("mask_type", mask_type, MASK_TYPES)
    out_channels = _checks.check_positive_int("out_channels", out_channels)
    in_channels = _checks.check_positive_int("in_channels", in_channels)
    kernel_size = _checks.check_positive_int("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd; got {kernel_size}")
    if not isinstance(gated, bool):
        raise TypeError(f"gated must be a bool; got {type(gated).__name__}")
    if gated and out_channels % 2:
        raise ValueError(f"out_channels must be even under a gate; got {out_channels}")
    channel_groups = _checks.check_positive_int("channel_groups", channel_groups)
    _check_groups(channel_groups, group_order, in_channels, out_channels // 2 if gated else out_channels)
    options = {"channel_groups": channel_groups, "group_order": group_order, "gated": gated}
    return reference.conv_mask2d(out_channels, in_channels, kernel_size, mask_type, **options)


def live_taps(taps, kernel, name="taps"):
    """Where a mask of taps is live, in raster order, as the ops take it.

    Args:
        taps: [rows, columns], nested lists or a tensor.
        kernel: that shape.
        name: of taps, as the caller wrote it.
    """
    rows = taps.tolist() if isinstance(taps, torch.Tensor) else taps
    if not isinstance(rows, (list, tuple)) or any(not isinstance(row, (list, tuple)) for row in rows):
        raise TypeError(f"{name} must be rows of numbers, or a tensor of them; got {type(taps).__name__}")
    for value in (value for row in rows for value in row if not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be rows of numbers, or a tensor of them; got {type(value).__name__} among them")
    if [len(row) for row in rows] != [kernel[1]] * kernel[0]:
        raise ValueError(
            f"{name} must be of the kernel's shape {tuple(kernel)}; got rows of lengths {[len(row) for row in rows]}"
        )
    live = tuple(place for place, value in enumerate(value for row in rows for value in row) if value)
    if not live:
        raise ValueError(f"{name} must have a tap that is live; got none")
    return live


def check_options(dilation, activation):
    """What a layer, too, can be asked before it sees an image."""
    _checks.check_one_of("activation", activation, (None, *ACTIVATIONS))
    _checks.check_positive_int("dilation", dilation)


def _check_groups(groups, order, in_channels, out_channels):
    _checks.check_positive_int("channel_groups", groups)
    _checks.check_one_of("group_order", order, GROUP_ORDERS)
    if order == "contiguous" and (in_channels % groups or out_channels % groups):
        # projects round such groups differently, so one's network leaks in another's layers
        raise ValueError(
            "channel_groups in contiguous order must divide the channels, those of each half under a gate; "
            f"got {groups} groups of {in_channels} and {out_channels}"
        )


def _check_tensors(input, weight, bias, cond, residual, autocast=False):
    """Types, dtypes, devices and shapes, but for the kernel's; autocast: whether it casts the operands."""
    for name, value in (("input", input), ("weight", weight), ("bias", bias), ("cond", cond), ("residual", residual)):
        if value is None and name not in ("input", "weight"):
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        _checks.check_dtype(name, value.dtype)
        if value.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}; got {value.dtype}")
        if value.device != input.device:
            raise ValueError(f"{name} must be on the device of input, {input.device}; got {value.device}")
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be of shape [N, C, H, W] or [C, H, W]; got {tuple(input.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"weight must be of shape [C_out, C_in, rows, columns]; got {tuple(weight.shape)}")
    if input.shape[-3] != weight.shape[1]:
        raise ValueError(f"input must have the {weight.shape[1]} channels of weight; got shape {tuple(input.shape)}")
    if 0 in input.shape[-2:]:
        raise ValueError(f"input must have at least one row and one column; got shape {tuple(input.shape)}")


def _check_setting():
    if backends.CONVOLUTIONS not in (None, "tma", "block"):
        raise ValueError(f"FASTELBO_CONV must be tma, block or unset; got {backends.CONVOLUTIONS!r}")


def _check_kernel(weight, stack):
    rows, columns = weight.shape[2:]
    if stack == "square" and (rows != columns or rows % 2 == 0):
        raise ValueError(f"weight must have a square kernel of odd size; got shape {tuple(weight.shape)}")
    if stack == "horizontal" and rows != 1:
        raise ValueError(f"weight must have one row for the horizontal stack; got shape {tuple(weight.shape)}")
    if stack == "vertical" and (columns % 2 == 0 or rows > columns // 2 + 1):
        raise ValueError(
            "weight must have an odd number k of columns and at most k//2 + 1 rows for the vertical stack; "
            f"got shape {tuple(weight.shape)}"
        )


def _check_sizes(tensors, options):
    """What must fit the kernel; the output's shape."""
    input, weight, bias, cond, residual = tensors
    _, _, dilation, groups, order, activation, _ = options
    gated = activation in GATES
    check_options(dilation, activation)
    z_channels, in_channels = weight.shape[:2]
    if gated and z_channels % 2:
        raise ValueError(f"weight must have an even number of output channels for {activation}; got {z_channels}")
    _check_groups(groups, order, in_channels, z_channels // 2 if gated else z_channels)
    leading, size = input.shape[:-3], input.shape[-2:]
    if bias is not None and bias.shape != (z_channels,):
        raise ValueError(f"bias must be of shape {(z_channels,)}; got {tuple(bias.shape)}")
    if cond is not None and cond.shape not in ((*leading, z_channels), (*leading, z_channels, *size)):
        raise ValueError(
            f"cond must be of shape {(*leading, z_channels)} or {(*leading, z_channels, *size)}; "
            f"got {tuple(cond.shape)}"
        )
    shape = (*leading, z_channels // 2 if gated else z_channels, *size)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be of the output's shape {shape}; got {tuple(residual.shape)}")
    return shape


_CHECKED: dict = {}  # of calls of one kind: the options, and the output's shape
_MOST_CHECKED = 4096


def _kind(argument):
    """All of an argument that checks look at."""
    return (argument.dtype, argument.device, argument.shape) if isinstance(argument, torch.Tensor) else argument


def _checked(tensors, options, autocast):
    """The options as the ops take them, and the output's shape.

    Args:
        tensors: the caller's input, weight, bias, cond and residual.
        options: the caller's mask type, the stack, dilation, groups, their order, activation and taps.
        autocast: whether it casts the operands.
    """
    mask_type, stack, dilation, groups, order, activation, taps = options
    _check_tensors(*tensors, autocast)
    weight, listed = tensors[1], ()
    if taps is None:
        _checks.check_one_of("mask_type", mask_type, MASK_TYPES)
        _check_kernel(weight, stack)
    else:
        if mask_type is not None:
            raise ValueError(f"mask_type must be None where taps are given; got {mask_type!r}")
        if groups != 1:
            raise ValueError(f"channel_groups must be 1 where taps are given; got {groups}")
        mask_type, listed = "B", live_taps(taps, weight.shape[2:])
    dilation = _checks.check_positive_int("dilation", dilation)
    groups = _checks.check_positive_int("channel_groups", groups)
    if stack == "vertical" and groups != 1:
        raise ValueError(f"channel_groups must be 1 for the vertical stack; got {groups}")
    options = mask_type, stack, dilation, groups, order, activation, listed
    return options, _check_sizes(tensors, options)


def _checked_once(tensors, options, autocast):
    """What _checked returns. A kind of call that it has seen it need not look at again."""
    if torch.compiler.is_compiling():
        return _checked(tensors, options, autocast)
    kind = (*map(_kind, tensors), options, type(options[2]), type(options[3]), autocast)  # True is 1, and no number
    try:
        found = _CHECKED.get(kind)
    except TypeError:  # a list, say
        return _checked(tensors, options, autocast)
    if found is None:
        found = _checked(tensors, options, autocast)
        if len(_CHECKED) >= _MOST_CHECKED:
            _CHECKED.clear()
        _CHECKED[kind] = found
    return found


def _run(tensors, options, backend):
    input = tensors[0]
    autocast = isinstance(input, torch.Tensor) and _autocast(input)
    options, shape = _checked_once(tensors, options, autocast)
    if autocast:
        dtype = torch.get_autocast_dtype(input.device.type)
        tensors = tuple(tensor if tensor is None else tensor.to(dtype) for tensor in tensors)
    unbatched = input.dim() == 3
    if unbatched:
        input, weight, bias, cond, residual = tensors
        tensors = (input[None], weight, bias, *(t if t is None else t[None] for t in (cond, residual)))
    backend = backend_of(tensors[0], backend)
    keep = _autograd.recorded(tensors) and not torch.compiler.is_exporting()
    if not _sharding.sharded(*tensors):
        y = _local(tensors, (keep, *options), backend)
    else:
        _, stack, _, groups, order, activation, _ = options
        gate = activation if activation in GATES else None
        layout = _sharding.Convolution(tensors, 1 if stack == "vertical" else groups, order, gate)
        y = layout.image(_local(layout.shards(), (keep, *options), backend), (len(tensors[0]), *shape[-3:]))
    return y[0] if unbatched else y


def backend_of(input, chosen):
    """The backend for a convolution of images [N, C, H, W], which the caller may have chosen."""
    _check_setting()
    first_layer = input.shape[1] <= 4  # too few channels for tensor cores
    return backends.choose(input.device, chosen, backends.only_reference(), convolution=not first_layer)


def _local(tensors, options, backend):
    if backend == "reference":
        return _reference(*tensors, options)
    if torch.compiler.is_exporting():  # a Function would leave no more in the program than its forward
        return _library.by_name(_FWD[backend])(*_arguments(*tensors, options))[0]
    if not options[0]:  # nothing is kept for a backward
        return _FWD[backend](*_arguments(*tensors, options))[0]
    return _autograd.record(_MaskedConv2d, tensors, options, backend)


def _autocast(input):
    """Whether autocast casts the operands of a convolution of this input."""
    kind = input.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and input.dtype != torch.float64


def _reference(input, weight, bias, cond, residual, options):
    if _autocast(input):  # its arithmetic is float32, whatever autocast wants convolutions to be
        with torch.autocast(input.device.type, enabled=False):
            return _reference(input, weight, bias, cond, residual, options)
    _, mask_type, stack, dilation, groups, order, activation, taps = options
    keywords = {"mask_type": mask_type, "dilation": dilation, "channel_groups": groups, "group_order": order}
    keywords |= {"activation": activation, "cond": cond}
    if stack == "square":
        return reference.masked_conv2d(input, weight, bias, residual=residual, taps=taps, **keywords)
    return reference.causal_conv2d(input, weight, bias, stack=stack, **keywords)


_DEFAULTS = False, "B", "square", 1, 1, "interleaved", None, ()  # options


def _arguments(input, weight, bias, cond, residual, options):
    """As the forward's schema has them."""
    if cond is None and residual is None and options == _DEFAULTS:
        return input, weight, bias  # torch's dispatcher takes its time for every argument
    keep, *others, activation, taps = options
    return input, weight, bias, cond, residual, *others, activation or "", keep, taps


@_autograd.recordable
class _MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias, cond, residual, options, backend):
        ctx.set_materialize_grads(False)
        ctx.options, ctx.backend = options, backend
        keep, *others, activation, taps = options
        # an output that is the activation itself tells its derivative; else what is before a gate or a residual must
        keep_z = keep and activation is not None and (activation in GATES or residual is not None)
        y, kept = _FWD[backend](*_arguments(input, weight, bias, cond, residual, (keep_z, *others, activation, taps)))
        if activation is None:
            kept = None
        elif not keep_z:
            kept = y
        ctx.save_for_backward(input, weight, bias, cond, residual, kept)
        return y

    @staticmethod
    def backward(ctx, d_y):
        if d_y is None:
            return (None,) * 7
        *inputs, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if _autograd.differentiable_backward():
            grads = _autograd.reference_gradients(
                lambda *inputs: _reference(*inputs, ctx.options), inputs, wanted, (d_y,)
            )
            return *grads, None, None
        input, weight, _, cond, _ = inputs
        _, *options, activation, taps = ctx.options
        want_input, want_weight, want_bias, want_cond, want_residual = wanted
        d_input = d_weight = d_bias = d_cond = None
        if want_cond and activation is None and cond.dim() == 4:
            d_cond, want_cond = d_y, False
        if want_input or want_weight or want_bias or want_cond:
            # the sum over the pixels is what bias and a class get, the gradient before it what an image gets
            cond_ndim = cond.dim() if want_cond else 0
            flags = want_input, want_weight, want_bias, cond_ndim
            found = _BWD[ctx.backend](d_y, input, weight, kept, *options, activation or "", *flags, taps)
            d_input, d_weight, d_bias = (g if want else None for g, want in zip(found[:3], wanted, strict=False))
            if want_cond:
                d_cond = found[3]
        return d_input, d_weight, d_bias, d_cond, d_y if want_residual else None, None, None


def _differentiable(backend, activation, keep, taps, **given):
    tensors, options = list(given.values())[:5], list(given.values())[5:]
    y = _MaskedConv2d.apply(*tensors, (True, *options, activation or None, tuple(taps)), backend)
    if not keep:
        return y, y.new_empty((0,))
    # for who calls the op by name: exported programs keep nothing, and Functions do not come here
    with torch.no_grad():
        return y, _FWD[backend](*tensors, *options, activation, keep, taps)[1]


def _empty_image(shape, like):
    """A fake image in the memory format of another."""
    channels_last = like.shape[1] > 1 and like.stride(1) == 1 and like.stride(3) > 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _fwd_fake(
    input, weight, bias, cond, residual, mask_type, stack, dilation, groups, order, activation, keep, taps=()
):
    n, _, rows, columns = input.shape
    z = (n, weight.shape[0], rows, columns)
    shape = (n, weight.shape[0] // 2, rows, columns) if activation in GATES else z
    kept = _empty_image(z, input) if keep else input.new_empty((0,))
    return _empty_image(shape, input), kept


def _bwd_fake(
    d_y, input, weight, kept, mask_type, stack, dilation, groups, order, activation,
    want_input, want_weight, want_bias, cond_ndim, taps=(),
):  # fmt: skip
    n, _, rows, columns = input.shape
    channels = weight.shape[0]
    if cond_ndim == 4:
        d_cond = _empty_image((n, channels, rows, columns), input)
    else:
        d_cond = input.new_empty((n, channels) if cond_ndim else (0,))
    return (
        torch.empty_like(input) if want_input else input.new_empty((0,)),
        torch.empty_like(weight) if want_weight else input.new_empty((0,)),
        input.new_empty((channels if want_bias else 0,)),
        d_cond,
    )


def _check(input, weight, stack, activation, **given):
    """Raises for arguments of the ops that no kernel can take: as csrc/common/masked_conv2d.h does for compiled ones,
    for Triton's and where nothing but metadata is there."""
    if input.dim() != 4:
        raise ValueError(f"input must be of shape [N, C, H, W]; got {tuple(input.shape)}")
    tensors = {"weight": weight, **{name: x for name, x in given.items() if isinstance(x, torch.Tensor)}}
    for name, tensor in tensors.items():
        if tensor.dtype != input.dtype:
            raise TypeError(f"{name} must have the dtype of input, {input.dtype}; got {tensor.dtype}")
    forward = {name: given.get(name) for name in ("bias", "cond", "residual")}
    _check_setting()
    _check_tensors(input, weight, **forward)
    _checks.check_one_of("mask_type", given["mask_type"], MASK_TYPES)
    _checks.check_one_of("stack", stack, ("square", *STACKS))
    taps, most = given["taps"], weight.shape[2] * weight.shape[3]
    if not taps:
        _check_kernel(weight, stack)
    elif not all(before < tap < most for before, tap in zip((-1, *taps), taps, strict=False)):
        raise ValueError(f"taps must be rising and below {most}; got {taps}")
    elif (given["mask_type"], stack, given["channel_groups"]) != ("B", "square", 1):
        raise ValueError("taps must come with mask_type B, the square stack and one group; got others")
    names = "dilation", "channel_groups", "group_order"
    options = given["mask_type"], stack, *(given[name] for name in names), activation or None, taps
    shape = _check_sizes((input, weight, *forward.values()), options)
    if "d_y" in given:
        _checks.check_upstream("d_y", given["d_y"], shape, input.device)
        kept, cond_ndim = given["kept"], given["cond_ndim"]
        if kept is None and activation:
            raise ValueError("kept must be given with an activation; got none")
        if kept is not None:
            _checks.check_upstream("kept", kept, (input.shape[0], weight.shape[0], *input.shape[2:]), input.device)
        _checks.check_one_of("cond_ndim", cond_ndim, (0, 2, 4))


# kept: before the activation for a gate, after it (and before the residual) else; empty without `keep`. An activation
# of "" is none. cond_ndim: the dimensions of the cond that wants a gradient, 0 for none. taps: the live ones by their
# places in raster order, rising; empty for those of the mask type.
_FWD = _library.define(
    "masked_conv2d_fwd",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? cond=None, Tensor? residual=None, str mask_type='B',"
    " str stack='square', int dilation=1, int channel_groups=1, str group_order='interleaved', str activation='',"
    " bool keep=False, int[] taps=[]) -> (Tensor y, Tensor kept)",
    _fwd_fake,
    _check,
    _differentiable,
)
_BWD = _library.define(
    "masked_conv2d_bwd",
    "(Tensor d_y, Tensor input, Tensor weight, Tensor? kept, str mask_type, str stack, int dilation,"
    " int channel_groups, str group_order, str activation, bool want_input, bool want_weight, bool want_bias,"
    " int cond_ndim, int[] taps=[]) -> (Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor d_cond)",
    _bwd_fake,
    _check,
)
_flops.register()
