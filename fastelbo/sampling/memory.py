"""Tensors that share memory: what is written into one of them shows in all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastelbo.sampling.network import Const, Network, View, unknown


@dataclass(eq=False)
class Padded:
    """A view with zeros above and to the left, which a slice must take off at the other side."""

    view: View
    down: int
    right: int


@dataclass(eq=False)
class Storage:
    """What tensors that share memory hold: an operation in place on one of them shows in all."""

    content: View | Padded
    cropped: "Storage | None" = None  # of padded ones, the slice
    strided: bool = False  # whether it is such a slice, which is not contiguous
    ambiguous: bool = False  # whether a copy, or more of the same memory, was taken: that depends on the batch


@dataclass(eq=False)
class Shared:
    """A tensor of features: channels of a storage."""

    storage: Storage
    channels: tuple[int, ...]

    @property
    def content(self) -> View | Padded:
        """What its channels hold now."""
        content = self.storage.content
        return content.select(self.channels) if isinstance(content, View) else content

    @property
    def whole(self) -> bool:
        """Whether it has all channels of its storage."""
        return isinstance(self.storage.content, View) and len(self.channels) == len(self.storage.content.channels)

    def select(self, channels: Iterable[int]) -> "Shared":
        """Some of its channels, in the same memory."""
        return Shared(self.storage, tuple(self.channels[channel] for channel in channels))


def storing(result: Any) -> Any:
    """New features in a storage of their own."""
    if isinstance(result, tuple | list):
        return type(result)(map(storing, result))
    if isinstance(result, View):
        return Shared(Storage(result), tuple(range(len(result.channels))))
    return Shared(Storage(result), ()) if isinstance(result, Padded) else result


def contents(value: Any) -> Any:
    """What the tensors in an argument hold now."""

    def content(leaf):
        if not isinstance(leaf, Shared):
            return leaf
        if isinstance(leaf.content, Padded):
            raise _half_a_pad()
        return leaf.content

    return fx.node.map_aggregate(value, content)


def _half_a_pad():
    return unknown("pad without the slice that undoes it", "slice as much off the other side as was padded")


def write(network: Network, what: str, target: Any, found: View) -> Shared:
    """Stores what an operation in place has computed: in all tensors that share memory with its first operand.

    Args:
        network: takes a step, where only some of the channels are written.
        what: names the operation in errors.
        target: its first operand.
        found: what it has computed.
    """
    if not isinstance(target, Shared):
        kind = "what depends on the condition alone" if isinstance(target, Const) else type(target).__name__
        raise unknown(f"{what} in place on {kind}", "do it out of place")
    storage, count = target.storage, len(target.channels)
    if storage.ambiguous:
        advice = "do it out of place, or on a clone"
        raise unknown(f"{what} in place on what Tensor.contiguous copied or did not, as the batch has it", advice)
    if len(found.channels) != count:
        raise unknown(f"{what} in place of {len(found.channels)} channels in {count}", "do it out of place")
    if isinstance(storage.content, Padded):
        raise _half_a_pad()
    whole = range(len(storage.content.channels))
    kept = [channel for channel in whole if channel not in target.channels]
    if kept:
        found = network.join([storage.content.select(kept), found])
    place = {channel: position for position, channel in enumerate((*kept, *target.channels))}
    storage.content = found.select([place[channel] for channel in whole])
    return target


SHARING: set[Callable] = set()


def sharing(handler: Callable) -> Callable:
    """Marks a handler that takes tensors, not what they hold, and returns ones that share their memory."""
    SHARING.add(handler)
    return handler


@sharing
def getitem(network: Network, x: Shared, index: Any) -> Shared:
    """Channels of features, or the slice of padded ones; these share their memory."""
    whole = slice(None)
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[whole] * (5 - len(index)), *index[at + 1 :])
    index = (*index, *[whole] * (4 - len(index)))
    images, channels, rows, columns = index
    if isinstance(padded := x.storage.content, Padded):
        ends = [(s.start or 0, s.stop, s.step or 1) if isinstance(s, slice) else None for s in (rows, columns)]
        wanted = [(0, -amount if amount else None, 1) for amount in (padded.down, padded.right)]
        if (images, channels) == (whole, whole) and ends == wanted:
            view = padded.view
            if x.storage.cropped is None:
                moved = View(view.value, view.channels, view.down + padded.down, view.right + padded.right)
                x.storage.cropped = Storage(moved, strided=True)
            return Shared(x.storage.cropped, tuple(range(len(view.channels))))
        raise _half_a_pad()
    if images == rows == columns == whole and isinstance(channels, slice):
        return x.select(range(len(x.channels))[channels])
    raise unknown(f"indexing with {index}", "slice channels only")


@sharing
def setitem(network: Network, x: Shared, index: Any, value: Any) -> Shared:
    """Features written to channels of others; what a[:, :2] += b ends with, too."""
    part = getitem(network, x, index)
    if not isinstance(value, Shared):
        raise unknown("features that are set to a constant", "multiply by a mask, or join channels")
    write(network, "setitem", part, contents(value))
    return x


@sharing
def contiguous(network: Network, x: Shared, memory_format: Any = None) -> Shared:
    """The same memory or a copy; a part of the channels is contiguous in a batch of one image only."""
    if not x.whole or x.storage.strided:
        x.storage.ambiguous = True
    return x
