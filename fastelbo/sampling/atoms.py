"""Which number each element of a tensor is, while a network's own forward runs.

In place of numbers, tensors hold the numbers' names: a positive integer for each output of a step, a negative one for
each element of a constant, and 0 for the constant 0. Whatever moves elements (slices, pads, reshapes, stacks, writes
through a view) moves names by the same function of torch. Where numbers are computed with, names say what they are:
channels of a value, moved by some rows and columns; constants; or parts of both.

A value is computed at the pixels of the image. Tensors may be larger or smaller (a convolution's output before it is
cropped): then it is computed at those of their pixels that are asked for.
"""

import bisect
import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fastelbo.sampling.network import Const, Network, NotCausalError, UnknownError, View, unknown

Place = tuple[int, int]  # rows and columns


@dataclass(eq=False)
class Constant:
    """Elements of a tensor that does not depend on the image.

    Args:
        value: that tensor, or a function to it of what is known of a condition.
    """

    base: int
    value: Tensor | Callable[[dict], Tensor]


@dataclass(eq=False)
class Node:
    """What a step computes: [channels, rows, columns].

    Args:
        make: adds the step, so that it is computed at the pixels that lie as far down and to the right of the image's
            own, and returns the view.
    """

    base: int
    shape: tuple[int, int, int]
    make: Callable[[Place], View]
    made: dict[Place, View] = field(default_factory=dict)

    def at(self, place: Place) -> View:
        """Its view, computed once for each place."""
        if place not in self.made:
            self.made[place] = self.make(place)
        return self.made[place]


@dataclass(eq=False)
class Obscure:
    """What no step computes; only if it is needed, that is an error."""

    base: int
    error: Exception
    normalised: "Tensor | None" = None  # of a log_softmax the names of what it was taken of
    dim: int = 0  # along which it was taken


Source = Node | Obscure


def window(names: Tensor, place: Place, size: Place) -> Tensor:
    """The image's part of names [..., rows, columns] that begins at a place; 0 beyond their edges."""
    (top, left), (rows, columns) = place, size
    have_rows, have_columns = names.shape[-2:]
    if (top, left) == (0, 0) and (have_rows, have_columns) == (rows, columns):
        return names
    return F.pad(names, (-left, left + columns - have_columns, -top, top + rows - have_rows))


class Atoms:
    """Names, and the steps of a network that they lead to.

    Args:
        network: takes the steps.
        size: rows and columns of the image.
        device: of the network's parameters.
        late: whether features are computed where the last that they read is the pixel's own, not at their own pixels
            where they can be: what looks ahead, and is shifted in the end, is causal there alone.
    """

    def __init__(self, network: Network, size: Place, device: torch.device, late: bool = False) -> None:
        self.network, self.size, self.device, self.late = network, size, device, late
        self.sources: list[Source] = []
        self.fixed: list[Constant] = []
        self._next = self._next_fixed = 1
        self._bases: list[int] = []
        self.made: dict[int, tuple[Tensor, Node]] = {}  # names by their storage, until it is written to
        self._grid = torch.arange(size[0] * size[1], device="cpu").reshape(size)
        self._joins: dict[tuple, View] = {}
        self._still: dict[Const, View] = {}
        self.image = self.node((network.colours, *size), self._image_at)

    def _image_at(self, place):
        if place != (0, 0):
            raise NotCausalError("model must be causal; got pixels of the image that are moved up")
        return View(self.network.image, tuple(range(self.network.colours)))

    # Names

    def _claim(self, count):
        base = self._next
        self._next += count
        self._bases.append(base)
        return base

    def node(self, shape: Sequence[int], make: Callable[[Place], View]) -> Tensor:
        """Names of what a step computes: [channels, rows, columns]."""
        channels, rows, columns = shape
        node = Node(self._claim(channels * rows * columns), (channels, rows, columns), make)
        self.sources.append(node)
        if (rows, columns) == self.size and len(self.sources) > 1 and not self.late:
            # now, since later on chains of steps would be chains of calls; an error is for who needs it
            with contextlib.suppress(NotCausalError, UnknownError):
                node.at((0, 0))
        names = torch.arange(node.base, self._next, device="cpu").reshape(shape)
        self.made[names.untyped_storage().data_ptr()] = names, node
        return names

    def constant(self, shape: Sequence[int], value: "Tensor | Callable[[dict], Tensor]") -> Tensor:
        """Names of a constant's elements."""
        base, count = self._next_fixed, torch.Size(shape).numel()
        self.fixed.append(Constant(base, value))
        self._next_fixed += count
        names = -torch.arange(base, base + count, device="cpu").reshape(shape)
        return torch.where(value.cpu() == 0, 0, names) if isinstance(value, Tensor) else names

    def obscure(self, shape: Sequence[int], error: Exception, **more: Any) -> Tensor:
        """Names of what no step computes."""
        self.sources.append(Obscure(self._next, error, **more))
        return torch.arange(self._claim(torch.Size(shape).numel()), self._next, device="cpu").reshape(shape)

    def which(self, names: Tensor) -> Tensor:
        """Indices of the sources of names, -1 for constants."""
        return torch.bucketize(names.contiguous(), torch.tensor(self._bases, device="cpu"), right=True) - 1

    def refuse_obscure(self, names: Tensor, normalised: bool = False) -> None:
        """Raises the error of what no step computes, if any of it is among names.

        Args:
            names: of any shape.
            normalised: whether a log_softmax may be.
        """
        if not any(isinstance(source, Obscure) for source in self.sources):
            return
        for used in self.which(names).unique().tolist():
            source = self.sources[used] if used >= 0 else None
            if isinstance(source, Obscure) and not (normalised and source.normalised is not None):
                raise source.error

    # What names are

    def named(self, plane_names: Tensor) -> list[tuple[Node, int, int, int] | None]:
        """Of each channel's largest name the node, its channel, and how far down and to the right of it the node's own
        pixel lies; None where it is a constant's."""
        columns = plane_names.shape[2]
        largest, at = plane_names.flatten(1).max(1)
        found: list[tuple[Node, int, int, int] | None] = []
        for index, name, where in zip(self.which(largest).tolist(), largest.tolist(), at.tolist(), strict=True):
            source = self.sources[index] if index >= 0 else None
            if isinstance(source, Obscure):
                raise source.error
            if not isinstance(source, Node):
                found.append(None)
                continue
            _, source_rows, source_columns = source.shape
            channel, rest = divmod(name - source.base, source_rows * source_columns)
            row, column = divmod(rest, source_columns)
            found.append((source, channel, row - where // columns, column - where % columns))
        return found

    def whole(self, names: Tensor) -> View | None:
        """Names [channels, rows, columns], if they are all of some features at their own pixels."""
        if names.shape[1:] != self.size or not len(names):
            return None
        count = self._grid.numel()
        made, node = self.made.get(names.untyped_storage().data_ptr(), (None, None))
        runs: list[tuple[Any, Any]] = []  # of a source's channels
        if made is not None and names.stride() == (count, self.size[1], 1) and not names.storage_offset() % count:
            channel = names.storage_offset() // count
            runs.append((node, range(channel, channel + len(names))))
        else:
            firsts = names[:, 0, 0]
            if not torch.equal(names - firsts[:, None, None], self._grid.expand_as(names)):
                return None
            for first in firsts.tolist():
                source = self.sources[bisect.bisect(self._bases, first) - 1] if first > 0 else None
                if not isinstance(source, Node) or (first - source.base) % count:
                    return None
                if not runs or runs[-1][0] is not source:
                    runs.append((source, []))
                runs[-1][1].append((first - source.base) // count)
        image = self.sources[0]
        if any(source.shape[1:] != self.size or (self.late and source is not image) for source, _ in runs):
            return None
        try:
            parts = [source.at((0, 0)).select(channels) for source, channels in runs]
        except NotCausalError:
            return None
        return parts[0] if len(parts) == 1 else self.join(parts)

    def _plane(self, source, channels, place):
        """Names of channels of a source, from a place on: [channels, rows, columns]."""
        names = torch.arange(source.shape[1] * source.shape[2], device="cpu").reshape(1, *source.shape[1:])
        starts = torch.tensor(channels, device="cpu") * names.numel() + source.base
        inside = window(names + 1, place, self.size)
        return torch.where(inside > 0, starts[:, None, None] + inside - 1, 0)

    def _view(self, source, channels, place):
        """Channels of a source from a place on, and where the view has them: everywhere, with 0 outside, if None."""
        row, column = place
        if source.shape[1:] == self.size and (not self.late or source is self.sources[0]):
            try:
                view = source.at((0, 0)).select(channels)
                if row > 0:
                    raise NotCausalError("model must be causal; got features that are moved up")
                if row == 0 and column > 0:  # what the row has to the right
                    eye = torch.eye(len(channels), device=self.device)[:, :, None]
                    return self.network.conv(view, eye, eye > 0, [(0, column)], None), None
                return View(view.value, view.channels, view.down - row, view.right - column), None
            except NotCausalError:
                if place == (0, 0):
                    raise
        view = source.at(place).select(channels)
        inside = window(torch.ones(source.shape[1:], dtype=torch.int64, device="cpu"), place, self.size) > 0
        return view, None if bool(inside.all()) else inside

    def read(self, names: Tensor, depth: int = 0) -> "View | Const":
        """What names [channels, rows, columns] of the image's size are."""
        if depth > 4:
            raise unknown("pixels that are moved otherwise than by shifts")
        if (view := self.whole(names)) is not None:
            return view
        named = self.named(names)
        groups: dict[Any, list[int]] = {}
        for channel, one in enumerate(named):
            groups.setdefault(one and (one[0], one[2], one[3]), []).append(channel)
        operands: list[Any] = [None] * len(named)
        for group, members in groups.items():
            part = names[members] if len(groups) > 1 else names
            operand = self._one_group(part, group, [one and one[1] for one in map(named.__getitem__, members)], depth)
            for position, channel in enumerate(members):
                operands[channel] = operand, position
        return self.together(operands)

    def _one_group(self, names, group, channels, depth):
        """What names are whose largest ones are of one source and equally far moved."""
        if group is None:
            return self.constants(names)
        source, *place = group
        view, inside = self._view(source, channels, tuple(place))
        expected = self._plane(source, channels, tuple(place))
        same = names == expected
        if inside is None and bool(same.all()):
            return view
        same &= expected != 0
        rest = torch.where(same, 0, names)
        if not torch.equal(same, expected != 0) or inside is not None:
            mask = same if not torch.equal(same, same[:1].expand_as(same)) else same[:1]
            view = self.network.point("mul", view, _given(mask.to(torch.float32)[None]))
        if not bool(rest.any()):
            return view
        return self.network.point("add", view, self.read(rest, depth + 1))

    def together(self, operands: "list[tuple[View | Const, int]]") -> "View | Const":
        """Channels of several operands, one after the other."""
        runs: list[tuple[View | Const, list[int]]] = []
        for operand, channel in operands:
            if runs and runs[-1][0] is operand:
                runs[-1][1].append(channel)
            else:
                runs.append((operand, [channel]))
        if len(runs) == 1 and isinstance(runs[0][0], Const):
            return runs[0][0]
        parts: list[View] = []
        for operand, channels in runs:
            view = (self.still(operand) if isinstance(operand, Const) else operand).select(channels)
            last = parts[-1] if parts else None
            if last and (last.value, last.down, last.right) == (view.value, view.down, view.right):
                parts[-1] = View(last.value, last.channels + view.channels, last.down, last.right)
            else:
                parts.append(view)
        return parts[0] if len(parts) == 1 else self.join(parts)

    def join(self, parts: list[View]) -> View:
        """The parts one after the other, once for all who ask for them."""
        key = tuple((part.value, part.channels, part.down, part.right) for part in parts)
        if key not in self._joins:
            self._joins[key] = self.network.join(parts)
        return self._joins[key]

    def still(self, const: Const) -> View:
        """A constant as features that depend on nothing."""
        if const not in self._still:
            none = torch.zeros(const.channels, 0, 0, device=self.device)
            self._still[const] = self.network.conv(View(self.network.image, ()), none, none > 0, [], None, const)
        return self._still[const]

    def parts(self, names: Tensor) -> list[tuple[Tensor, Tensor, Constant]]:
        """The constants that names are of, each with where they are, and which of its elements."""
        if not bool((names != 0).any()):
            return []
        bases = torch.tensor([constant.base for constant in self.fixed], device="cpu")
        index = torch.bucketize(-names.contiguous(), bases, right=True) - 1
        used = [(index == n, self.fixed[n]) for n in index.unique().tolist() if n >= 0]
        return [(where, -names[where] - constant.base, constant) for where, constant in used]

    def constants(self, names: Tensor) -> Const:
        """Names of constants alone, [channels, rows, columns], as an operand."""
        same = names[:, :1, :1]
        if torch.equal(names, same.expand_as(names)):
            names = same
        spatial = names.shape[1:] != (1, 1)
        parts = [(where, elements, constant.value) for where, elements, constant in self.parts(names)]

        def value(known):
            tensors = [(given if isinstance(given, Tensor) else given(known)).to(self.device) for _, _, given in parts]
            dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.bool)
            found = torch.zeros(names.shape, dtype=dtype, device=self.device)
            for (where, elements, _), tensor in zip(parts, tensors, strict=True):
                found[where.to(self.device)] = tensor.flatten()[elements.to(self.device)].to(dtype)
            return found[None]

        of_image = any(not isinstance(given, Tensor) for _, _, given in parts)
        if not of_image:
            given_now = value({})
            return Const(lambda known: given_now, False, spatial, len(names))
        return Const(value, True, spatial, len(names))


def _given(tensor):
    return Const(lambda known: tensor, False, tensor.shape[2:] != (1, 1), tensor.shape[1])
