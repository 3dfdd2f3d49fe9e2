"""The operators of torch that the sampler knows, each with the steps that it takes.

A handler takes the tracer and an operator's arguments, tensors of the image among them, and returns the names
(atoms.py) of what the operator computes, an error for a call whose result must not be needed, or None for one that it
does not know after all. MOVES are the operators that compute nothing: they are applied to names.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastelbo import _library
from fastelbo.reference.masked_conv2d import GATES, conv_mask2d
from fastelbo.reference.sampling import FUNCTIONS
from fastelbo.sampling.atoms import Atoms, Obscure, window
from fastelbo.sampling.network import CONVOLUTIONS, Const, NotCausalError, UnknownError, View, unknown

# fmt: off
MOVES = frozenset((
    "alias", "cat", "clone", "constant_pad_nd", "detach", "diagonal", "expand", "flip", "gather", "index",
    "index_select", "lift_fresh", "masked_fill", "permute", "repeat", "roll", "select", "select_scatter", "slice",
    "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "tril", "triu", "unbind",
    "unfold", "unsafe_split", "unsafe_split_with_sizes", "unsqueeze", "view", "where", "_reshape_alias",
    "_unsafe_view",
))
# fmt: on

# Where channels, rows and columns are


def arrange(atoms: Atoms, names: Tensor) -> Tensor:
    """Where in flat names of any shape the elements of [channels, rows, columns] are.

    Rows and columns may be any two dimensions that follow one another, or lie in one.
    """
    rows, columns = atoms.size
    places = torch.arange(names.numel(), device="cpu").reshape(names.shape)
    for row in range(names.dim() - 2, -1, -1):
        found = places.movedim((row, row + 1), (-2, -1)).flatten(0, -3) if names.dim() > 2 else places[None]
        if _is_image(atoms, names, found):
            return found
    for dim, size in enumerate(names.shape):
        if size % (rows * columns) == 0:
            for row, sizes in ((dim + 1, (-1, rows, columns)), (dim, (rows, columns, -1))):
                found = places.unflatten(dim, sizes).movedim((row, row + 1), (-2, -1)).flatten(0, -3)
                if _is_image(atoms, names, found):
                    return found
    if names.shape[-2:] == atoms.size:  # with parts of them moved
        return places.reshape(-1, rows, columns)
    raise unknown("features whose rows and columns lie in no dimensions of their own")


def _is_image(atoms, names, places):
    """Whether the first plane with features shows rows and columns of what they were computed at."""
    flat = names.flatten()
    for channel in range(len(places)):
        plane = flat[places[channel].flatten()].reshape(places.shape[1:])
        index = atoms.which(plane)
        used = int(index.max())
        if used < 0:
            continue
        source = atoms.sources[used]
        if isinstance(source, Obscure):
            raise source.error
        at = (index == used).nonzero()
        inside = (plane[index == used] - source.base) % (source.shape[1] * source.shape[2])
        lies = torch.stack([inside // source.shape[2], inside % source.shape[2]], 1) - at
        return bool((lies == lies[0]).all())
    return False


# Convolutions


class _Input:
    """What a convolution reads: features, and constants among them.

    Args:
        what: the convolution, for errors.
        names: [channels, rows, columns].
        padded: the same, the convolution's padding with them.
        padding: rows above and columns to the left that were padded.
    """

    def __init__(self, what: str, atoms: Atoms, names: Tensor, padded: Tensor, padding: tuple[int, int]) -> None:
        self.what, self.atoms, self.padding = what, atoms, padding
        self.seen, self.still = padded, None
        self.reads = list(range(len(padded)))  # channels
        self._whole = atoms.whole(names)
        if self._whole is None:
            if bool((padded < 0).any()):
                self.seen, self.still = padded.clamp(min=0), padded.clamp(max=0)
            self.reads = (self.seen.flatten(1).amax(1) > 0).nonzero()[:, 0].tolist()
        self._names = self.seen if len(self.reads) == len(padded) else self.seen[self.reads]
        self._of_image_size = names.shape[1:] == atoms.size

    def features(
        self, place: tuple[int, int], read: "list[tuple[int, int]]"
    ) -> "Iterator[tuple[View, tuple[int, int]]]":
        """The channels that depend on the image, and where the image lies in the padded tensor: ways to see them.

        Args:
            place: of the image among the outputs.
            read: rows down and columns to the right, from the places of outputs, that are read.
        """
        atoms, (rows, columns), refused = self.atoms, self.atoms.size, None
        if self._whole is not None:
            yield self._whole, self.padding
        elif self._of_image_size and not atoms.late:  # as are most that are moved: in one piece, at once
            try:
                yield self._seen_at(self.padding)
            except NotCausalError as error:
                refused = error
        # What is read must be zeros but for a part of the image's size.
        names = torch.zeros_like(self._names)
        (top, bottom), (left, right) = ((min(steps), max(steps)) for steps in zip(*read, strict=True))
        top, left = (max(at + first, 0) for at, first in zip(place, (top, left), strict=True))
        part = slice(None), slice(top, place[0] + rows + bottom), slice(left, place[1] + columns + right)
        names[part] = self._names[part]
        used = (names != 0).any(0)
        if not bool(used.any()):
            return
        corner = int(used.any(1).nonzero()[0, 0]), int(used.any(0).nonzero()[0, 0])
        down, right = max(read)  # what comes last is the pixel's own then
        last = place[0] + down, place[1] + right
        places = [last, (last[0], self.padding[1]), (last[0], corner[1])]
        places = [*places, self.padding, corner] if atoms.late else [self.padding, corner, *places]
        held, count = False, int((names != 0).sum())
        for where in dict.fromkeys(places):
            if int((window(names, where, atoms.size) != 0).sum()) < count:
                continue
            held = True
            try:
                yield self._seen_at(where)
            except NotCausalError as error:
                refused = refused or error
        if not held:
            raise unknown(f"{self.what} of features of more rows or columns than the image's", "crop them before")
        if refused is not None:
            raise refused

    def _seen_at(self, where):
        view = self.atoms.read(window(self._names, where, self.atoms.size))
        return self.atoms.join([view]) if view.down or view.right else view, where


def convolve(
    tracer: Any,
    names: Tensor,
    weight: Tensor,
    live: Tensor,
    bias: "Tensor | None",
    pad: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    cond: "Tensor | None" = None,
    activation: "str | None" = None,
    residual: "Tensor | None" = None,
) -> Tensor:
    """Names of a convolution's output, [channels, rows, columns].

    Args:
        tracer: whose network takes the step.
        names: of the input, [channels, rows, columns].
        weight, live: [out, in, rows, columns]; what is not live is not read.
        bias: [out].
        pad: left, right, above and below.
        dilation: down and to the right.
        cond, residual: names of what is added, [channels, rows, columns].
        activation: between the two.
    """
    atoms: Atoms = tracer.atoms
    network, what, size = atoms.network, tracer.what(), atoms.size
    if names.shape[1:] != size:
        atoms.refuse_obscure(names)
    if len(names) != weight.shape[1]:
        raise ValueError(f"model must match its own layers: {what} got {len(names)} channels")
    left, _, above, _ = pad
    padded = F.pad(names, pad)
    given = _Input(what, atoms, names, padded, (above, left))
    cond, residual = (None if more is None else more.clone() for more in (cond, residual))
    steps = [((i * dilation[0]), (j * dilation[1])) for i in range(weight.shape[2]) for j in range(weight.shape[3])]
    shape = tuple(have - last for have, last in zip(padded.shape[1:], steps[-1], strict=True))
    weight, live = weight.detach().clone(), live.to(weight.device)

    def make(place):
        added = [None if more is None else atoms.read(window(more, place, size)) for more in (cond, residual)]
        still = _still(atoms, given.still, torch.where(live, weight, 0), shape, dilation, place)
        if still is not None:
            added[0] = still if added[0] is None else _plus(network, added[0], still)
        kernels = (kernel if len(given.reads) == len(names) else kernel[:, given.reads] for kernel in (weight, live))
        flat = [kernel.flatten(2) for kernel in kernels]
        used = [n for n, own in enumerate(flat[1].flatten(0, 1).any(0).tolist()) if own]
        read = [steps[n] for n in used]
        flat = [kernel if len(used) == len(steps) else kernel[:, :, used] for kernel in flat]
        causes: list[Exception] = []
        try:
            for image, (row, column) in given.features(place, read) if read else ():
                taps = [(down + place[0] - row, right + place[1] - column) for down, right in read]
                try:
                    return network.conv(image, *flat, taps, bias, added[0], activation, added[1])
                except NotCausalError as error:
                    named = f"{what}, without rows above ({place[0]})," if place[0] > 0 else what
                    causes.append(NotCausalError(f"{str(error).replace('a convolution', named)}: {CONVOLUTIONS}"))
        except (NotCausalError, UnknownError) as error:
            causes.append(error)
        if causes:
            raise causes[0]
        none = weight[:, :0, 0]
        return network.conv(View(network.image, ()), none, none > 0, [], bias, added[0], activation, added[1])

    out = atoms.node((len(weight) // (1 + (activation in GATES)), *shape), make)
    if atoms.late and (activation, cond, residual) == (None, None, None):
        kernel = torch.where(live, weight, 0)
        options = {"bias": bias, "dilation": dilation}
        numbers = tracer.number(tracer.lift(padded.clamp(max=0), kernel.dtype))
        reads = F.conv2d((given.seen > 0).to(kernel)[None], live.to(kernel), dilation=dilation)[0]
        out = tracer.constants_of(out, reads.cpu() == 0, F.conv2d, numbers[None], kernel, **options)
    return out


def _still(atoms, names, weight, shape, dilation, place):
    """What constants among a convolution's inputs add to it; None if nothing."""
    if names is None:
        return None
    reads = (names != 0).flatten(1).any(1).nonzero()[:, 0].tolist()
    if not reads or not weight[:, reads].any():
        return None
    own = atoms.constants(names[reads])
    kernel = weight[:, reads]
    spatial = own.spatial

    def value(known):
        x = own(known).to(kernel)
        if not spatial:
            x = x.expand(*x.shape[:2], *kernel.shape[2:]) if kernel.shape[2:] != (1, 1) else x
            return F.conv2d(x, kernel)
        if x.shape[2:] != names.shape[1:]:
            x = x.expand(*x.shape[:2], *names.shape[1:])
        return window(F.conv2d(x, kernel, dilation=dilation), place, atoms.size)

    if own.of_image:
        return Const(value, True, spatial, len(weight))
    now = value({})
    return Const(lambda known: now, False, spatial, len(weight))


def _plus(network, a, b):
    """The sum of a constant, and of one or features."""
    if isinstance(a, View):
        return network.point("add", a, b)
    return Const(lambda known: a(known) + b(known), a.of_image or b.of_image, a.spatial or b.spatial, a.channels)


def _conv(tracer, input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    what, names = tracer.what(), tracer.names(input)
    tracer.atoms.refuse_obscure(names)
    if not isinstance(weight, Tensor) or tracer.traced(weight) or tracer.traced(bias):
        return unknown(f"{what} whose weight depends on what the model is given", "use a parameter")
    if transposed or set(stride) != {1}:
        raised = f"{what} of stride {tuple(stride)}" if not transposed else f"{what} that is transposed"
        return unknown(raised, "each of its outputs must be a pixel's own")
    if weight.dim() != 4:
        return None
    if not input.is_floating_point():
        raise RuntimeError("a convolution's input must be floating point")
    outputs, inputs = weight.shape[:2]
    weight = weight.detach()
    if groups > 1:
        whole = weight.new_zeros(outputs, inputs * groups, *weight.shape[2:])
        for group in range(groups):
            rows = slice(group * outputs // groups, (group + 1) * outputs // groups)
            whole[rows, group * inputs : (group + 1) * inputs] = weight[rows]
        weight = whole
    down, right = padding
    return convolve(tracer, names[0], weight, weight != 0, bias, (right, right, down, down), dilation)[None]


def _masked(tracer, *arguments):
    """The operator of fastelbo's masked convolutions."""
    given = _library.whole(arguments, _library.defaults_of(torch.ops.fastelbo.masked_conv2d_fwd.default._schema))
    input, weight, bias, cond, residual, mask_type, stack, dilation, groups, order, activation, _, taps = given
    rows, columns = weight.shape[2:]
    gated = activation in GATES
    live = torch.ones(weight.shape, dtype=torch.bool, device="cpu")
    row = rows // 2 if stack == "square" else rows - 1
    column = columns - 1 if stack == "horizontal" else columns // 2
    if taps:
        listed = torch.tensor([place in taps for place in range(rows * columns)], device="cpu").reshape(rows, columns)
        live = listed.expand(weight.shape)
    elif stack == "vertical":
        live[:, :, row] = mask_type == "B"
    else:
        with torch.device("cpu"):
            centre = conv_mask2d(*weight.shape[:2], 1, mask_type, channel_groups=groups, group_order=order, gated=gated)
        live[:, :, row + 1 :] = False
        live[:, :, row, column + 1 :] = False
        live[:, :, row, column] = centre[:, :, 0, 0]
    pad = (column * dilation, (columns - 1 - column) * dilation, row * dilation, (rows - 1 - row) * dilation)
    names = tracer.names(input)[0]
    image = names.shape[1:]
    more = []
    for added in (cond, residual):
        added = None if added is None else tracer.names(added)[0]
        more.append(added if added is None or added.dim() == 3 else added[:, None, None].expand(len(added), *image))
    out = convolve(tracer, names, weight, live, bias, pad, (dilation, dilation), more[0], activation or None, more[1])
    return out[None], torch.zeros(0, dtype=torch.int64, device="cpu")


def _linear(tracer, bias, input, weight, beta=1, alpha=1):
    """Of [pixels, channels], the product with [channels, outputs]."""
    if tracer.traced(weight) or tracer.traced(bias) or beta != 1 or alpha != 1 or weight.dim() != 2:
        return None
    atoms, names = tracer.atoms, tracer.names(input)
    kernel = weight.T[:, :, None, None]
    out = names.new_zeros(len(names), len(kernel))
    for places in arrange(atoms, names[:, 0]):
        planes = names[places.flatten()].T.reshape(-1, *places.shape)
        found = convolve(tracer, planes, kernel, kernel != 0, bias, (0, 0, 0, 0))
        out[places.flatten()] = found.flatten(1).T
    return out


def _product(tracer, a, b):
    """Of batches of matrices with one that all of them share."""
    flipped = tracer.traced(b)
    x, matrix = (tracer.names(b).transpose(1, 2), a) if flipped else (tracer.names(a), b)
    if tracer.traced(matrix) or (len(matrix) > 1 and matrix.stride(0)):
        return None
    out = _linear(tracer, None, tracer.lift(x.flatten(0, 1)), matrix[0].T if flipped else matrix[0])
    out = out.unflatten(0, x.shape[:2])
    return out.transpose(1, 2) if flipped else out


# Pointwise functions


def pointwise(tracer: Any, function: str, *operands: Any, parameters: tuple = ()) -> Tensor:
    """Names of a pointwise function of tensors, in their common shape."""
    atoms: Atoms = tracer.atoms
    network, size = atoms.network, atoms.size
    names = torch.broadcast_tensors(*map(tracer.names, operands))
    first = next(own for own, operand in zip(names, operands, strict=True) if tracer.of_image(operand))
    plain = first.dim() > 2 and (
        atoms.whole(first.reshape(-1, *first.shape[-2:])[:1]) is not None or _is_image(atoms, first, _planes(first))
    )
    places = None if plain else arrange(atoms, first)
    planes = [own.reshape(-1, *own.shape[-2:]) if plain else own.flatten()[places] for own in names]
    views = [atoms.whole(own) for own in planes]
    planes = [own.clone() for own in planes]  # what is asked for later may have been written to

    def make(place):
        at_home = place == (0, 0)
        reads = [
            view if at_home and view is not None else atoms.read(window(own, place, size))
            for view, own in zip(views, planes, strict=True)
        ]
        if not any(isinstance(read, View) for read in reads):  # zeros alone, at these pixels
            reads[0] = atoms.still(reads[0])
        return network.point(function, *reads, parameters=parameters)

    out = atoms.node(tuple(planes[0].shape), make)
    if planes[0].shape[1:] != size or atoms.late:
        still = torch.stack([own <= 0 for own in planes]).all(0)
        numbers = [tracer.number(tracer.lift(own.clamp(max=0))) for own in planes]
        out = tracer.constants_of(out, still, FUNCTIONS[function], *[*numbers, None][:2], *parameters)
    if places is not None:
        placed = torch.empty_like(out).flatten()
        placed[places.flatten()] = out.flatten()
        out = placed
    return out.reshape(first.shape)


def _planes(names):
    """The last two dimensions' first plane."""
    return torch.arange(names.shape[-2] * names.shape[-1], device="cpu").reshape(1, *names.shape[-2:])


def _affine(tracer, x, scale, shift):
    """Of numbers."""
    if (scale, shift) == (1, 0):
        return tracer.names(x).clone()
    return pointwise(tracer, "affine", x, parameters=(scale, shift))


def _number(value):
    """A Python number that an operand is, or None."""
    return value if isinstance(value, int | float) else None


def _add(tracer, a, b, alpha=1, sign=1):
    x, y = _number(a), _number(b)
    if y is not None:
        return _affine(tracer, a, 1, sign * alpha * y)
    if x is not None:
        return _affine(tracer, b, sign * alpha, x)
    if alpha != 1:
        b = tracer.lift(_affine(tracer, b, alpha, 0)) if tracer.of_image(b) else b * alpha
    return pointwise(tracer, "sub" if sign < 0 else "add", a, b)


def _mul(tracer, a, b):
    x, y = _number(a), _number(b)
    if x is None and y is None:
        return pointwise(tracer, "mul", a, b)
    return _affine(tracer, *((a, y) if x is None else (b, x)), 0)


def _div(tracer, a, b, rounding_mode=None):
    if rounding_mode is not None or _number(b) == 0:
        return None
    if (y := _number(b)) is not None:
        return _affine(tracer, a, 1 / y, 0)
    return pointwise(tracer, "div", torch.tensor(float(a), device="cpu") if _number(a) is not None else a, b)


def _pow(tracer, x, exponent):
    if exponent not in (1, 2, 3, 4):
        return None
    square = tracer.lift(pointwise(tracer, "mul", x, x)) if exponent > 1 else x
    other = {1: None, 2: None, 3: x, 4: square}[exponent]
    return tracer.names(square).clone() if other is None else pointwise(tracer, "mul", square, other)


def _elu(tracer, x, alpha=1.0, scale=1.0, input_scale=1.0):
    x = x if input_scale == 1 else tracer.lift(_affine(tracer, x, input_scale, 0))
    out = pointwise(tracer, "elu", x, parameters=(alpha * input_scale,))
    return out if scale == input_scale else _affine(tracer, tracer.lift(out), scale / input_scale, 0)


def _clamp(tracer, x, low=None, high=None):
    if not all(limit is None or _number(limit) is not None for limit in (low, high)):
        return None
    low, high = (-float("inf") if low is None else low), (float("inf") if high is None else high)
    return pointwise(tracer, "clamp", x, parameters=(low, high))


def _glu(tracer, x, dim=-1):
    a, b = tracer.names(x).chunk(2, dim)
    return pointwise(tracer, "glu", tracer.lift(a), tracer.lift(b))


def _chain(*names):
    """Functions of one operand, one after the other; a pair is affine."""

    def handle(tracer, x):
        for name in names:
            out = _affine(tracer, x, *name) if isinstance(name, tuple) else pointwise(tracer, name, x)
            x = tracer.lift(out)
        return out

    return handle


def _log_sigmoid(tracer, x):
    soft = pointwise(tracer, "softplus", tracer.lift(_affine(tracer, x, -1, 0)), parameters=(1.0, 88.0))
    return _affine(tracer, tracer.lift(soft), -1, 0), torch.zeros(0, dtype=torch.int64, device="cpu")


def _mish(tracer, x):
    soft = tracer.lift(pointwise(tracer, "softplus", x, parameters=(1.0, 20.0)))
    return pointwise(tracer, "mul", x, tracer.lift(pointwise(tracer, "tanh", soft)))


def _hardsigmoid(tracer, x):
    return _clamp(tracer, tracer.lift(_affine(tracer, x, 1 / 6, 0.5)), 0, 1)


def _batch_norm(tracer, x, weight, bias, mean, variance, training, momentum, eps):
    if training or mean is None:
        why = "without running statistics" if mean is None else "that trains in evaluation mode"
        advice = "track_running_stats=True" if mean is None else "let train() and eval() decide"
        return unknown(f"{tracer.what()} {why}", advice)
    factor = (variance.detach() + eps).rsqrt()
    factor = factor if weight is None else factor * weight.detach()
    shift = -mean.detach() * factor
    shift = shift if bias is None else shift + bias.detach()
    each = (-1, *[1] * (x.dim() - 2))
    scaled = tracer.lift(pointwise(tracer, "mul", x, factor.reshape(each)))
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    return pointwise(tracer, "add", scaled, shift.reshape(each)), none, none


# Levels as integers


def _equal(tracer, x, other):
    """1 where levels equal integers."""
    if not tracer.of_image(x):
        x, other = other, x
    if x.is_floating_point() and not bool((tracer.names(x) > tracer.atoms.image.numel()).any()):
        raise RuntimeError("levels that are compared must be integers")
    if tracer.of_image(other) or x.is_floating_point():
        return None
    off = tracer.lift(_add(tracer, x, _number(other) if _number(other) is not None else other, sign=-1))
    return _chain("abs", (-1, 1), "relu")(tracer, off)


def _scatter(tracer, x, dim, index, value, reduce=None):
    """A number at the place along a dimension that a level names, in zeros."""
    names = tracer.names(x)
    whole = _number(value) is not None and tracer.of_image(index) and index.shape[dim] == 1 and reduce is None
    if not whole or bool((names != 0).any()):
        return None
    places = torch.arange(x.shape[dim], device=x.device).reshape(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return _affine(tracer, tracer.lift(_equal(tracer, index, places)), value, 0)


def _embedding(tracer, weight, x, *options):
    """The rows of a table that levels name: the table's product with what is 1 at the level, and 0 elsewhere."""
    if tracer.traced(weight) or weight.dim() != 2:
        return None
    if x.is_floating_point():
        raise RuntimeError("indices must be integers")
    count, width = weight.shape
    atoms, names = tracer.atoms, tracer.names(x)
    places = arrange(atoms, names)
    out = names.new_zeros(names.numel(), width)
    levels = torch.arange(count, device=weight.device).to(weight.dtype)
    one = torch.ones(count, 1, 1, 1, dtype=weight.dtype, device=weight.device)
    table = weight.detach().T[:, :, None, None]
    for plane in places:
        off = convolve(
            tracer, names.flatten()[plane.flatten()].reshape(1, *plane.shape), one, one > 0, -levels, [0] * 4
        )
        (hot,) = _chain("abs", (-1, 1), "relu")(tracer, tracer.lift(off[None]))
        found = convolve(tracer, hot, table, torch.ones_like(table) > 0, None, (0, 0, 0, 0))
        out[plane.flatten()] = found.flatten(1).T
    return out.reshape(*names.shape, width)


def _log_softmax(tracer, x, dim, half_to_float=False):
    error = unknown(f"{tracer.what()} within a network", "it joins levels: it may be the last step alone")
    names = tracer.names(x)
    return tracer.atoms.obscure(names.shape, error, normalised=names.clone(), dim=dim % names.dim())


HANDLERS: dict[str, Callable] = {
    **{
        name: lambda tracer, x, *inplace, name=name: pointwise(tracer, name, x)
        for name in ("relu", "sigmoid", "tanh", "silu", "exp", "abs")
    },
    "add": _add,
    "sub": lambda tracer, a, b, alpha=1: _add(tracer, a, b, alpha, -1),
    "rsub": lambda tracer, a, b, alpha=1: _add(tracer, b, a, alpha, -1),
    "mul": _mul,
    "div": _div,
    "neg": lambda tracer, x: _affine(tracer, x, -1, 0),
    "reciprocal": lambda tracer, x: _div(tracer, 1, x),
    "pow": _pow,
    "elu": _elu,
    "leaky_relu": lambda tracer, x, slope=0.01: pointwise(tracer, "leaky_relu", x, parameters=(slope,)),
    "gelu": lambda tracer, x, approximate="none": pointwise(
        tracer, "gelu_tanh" if approximate == "tanh" else "gelu", x
    ),
    "softplus": lambda tracer, x, beta=1, threshold=20: pointwise(tracer, "softplus", x, parameters=(beta, threshold)),
    "hardtanh": lambda tracer, x, low=-1, high=1: _clamp(tracer, x, low, high),
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda tracer, x, high: _clamp(tracer, x, None, high),
    "_prelu_kernel": lambda tracer, x, weight: pointwise(tracer, "prelu", x, weight),
    "glu": _glu,
    "mish": _mish,
    "hardsigmoid": _hardsigmoid,
    "hardswish": lambda tracer, x: _mul(tracer, x, tracer.lift(_hardsigmoid(tracer, x))),
    "log_sigmoid_forward": _log_sigmoid,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": lambda tracer, x, weight, bias, mean, variance, momentum, eps: _batch_norm(
        tracer, x, weight, bias, mean, variance, False, momentum, eps
    ),
    "cudnn_batch_norm": _batch_norm,
    "convolution": _conv,
    "masked_conv2d_fwd": _masked,
    "addmm": _linear,
    "mm": lambda tracer, x, weight: _linear(tracer, None, x, weight),
    "bmm": _product,
    "celu": lambda tracer, x, alpha=1.0: _elu(tracer, x, alpha, 1.0, 1 / alpha),
    "selu": lambda tracer, x: _elu(tracer, x, 1.6732632423543772, 1.0507009873554805),
    "eq": _equal,
    "embedding": _embedding,
    "scatter": _scatter,
    "_log_softmax": _log_softmax,
}

#: Functions of the image whose result only its numbers say.
DECIDING = frozenset(("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "unique", "_unique2"))

_ATTENTION = "softmax and products of features, as attention takes, read what no fixed order of steps does"

ADVICE = {
    "native_group_norm": "it joins pixels or channels that are not known together; nn.BatchNorm2d does not",
    "native_layer_norm": "it joins channels that may not be known together; nn.BatchNorm2d does not",
    "_softmax": _ATTENTION,
    "bmm": _ATTENTION,
    "im2col": "masks that differ from pixel to pixel are no convolution",
}
