"""A causal network as a list of steps over images of features, with what each of them depends on.

A feature of a pixel depends on whole rows above it only ("above"), also on what lies left in the pixel's own row and on
some colours of the pixel itself (a set of bits for each channel), or on its whole row. The first can be computed a row
at a time, the second pixel after pixel, the last when the row is known. What the last layer depends on says whether the
network is causal, and in which order the colours of a pixel come.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastelbo.reference.masked_conv2d import GATES

ABOVE, PIXEL, ROW = range(3)  # when a feature is known: before its row, with its pixel, after its row


@dataclass(eq=False)
class Value:
    """What a step computes."""

    phase: int
    colours: list[int]  # of each channel: the colours of its own pixel that it depends on, as bits


def _value(phase, colours):
    return Value(phase, colours if phase == PIXEL else [0] * len(colours))


@dataclass(eq=False)
class View:
    """Channels of a value, moved down and to the right; zeros come in from outside of the image."""

    value: Value
    channels: tuple[int, ...]
    down: int = 0
    right: int = 0

    @property
    def phase(self) -> int:
        """When its features are known."""
        return ABOVE if self.down else self.value.phase

    @property
    def colours(self) -> list[int]:
        """As those of a value."""
        if self.down or self.right or self.phase != PIXEL:
            return [0] * len(self.channels)
        return [self.value.colours[channel] for channel in self.channels]

    def select(self, channels: Iterable[int]) -> "View":
        """Some of its channels."""
        return View(self.value, tuple(self.channels[channel] for channel in channels), self.down, self.right)


@dataclass(eq=False)
class Const:
    """What depends on the condition and on parameters only: a function of what is known so far."""

    function: Callable[[dict], Any]  # to [1, channels or 1, rows or 1, columns or 1], or to what becomes part of it
    of_image: bool = False  # whether it depends on the condition, which each image has its own of
    spatial: bool = False  # whether it has an image's size; if not, it is the same for all pixels
    channels: int = 1

    def __call__(self, known: dict) -> Any:
        """Its value, which is found once."""
        if self not in known:
            known[self] = self.function(known)
        return known[self]


Operand = View | Const


@dataclass(eq=False)
class Conv:
    """A convolution over live taps, (rows down, columns right) from the pixel; then cond, activation, residual."""

    x: View
    weight: Tensor  # [out, in, taps]
    live: Tensor  # the same, bool
    taps: list[tuple[int, int]]
    bias: Tensor | None
    cond: Operand | None
    activation: str | None
    residual: Operand | None
    out: Value


@dataclass(eq=False)
class Point:
    """A function of one or two operands at each pixel."""

    function: str
    operands: tuple[Operand, ...]
    parameters: tuple[float, ...]
    out: Value


@dataclass(eq=False)
class Join:
    """The channels of several features, one after the other."""

    parts: tuple[View, ...]
    out: Value


KNOWN = (
    "convolutions of stride 1 that are causal, torch's pointwise functions, nn.BatchNorm2d, nn.Embedding, and what "
    "moves channels, or pixels by a shift"
)
CONVOLUTIONS = "use fastelbo.nn.MaskedConv2d, or VerticalStackConv2d and HorizontalStackConv2d"


class UnknownError(NotImplementedError):
    """What a network is refused with, told from what its own code raises."""


class NotCausalError(ValueError):
    """What reads pixels that come later: in its place, if not where a shift puts it."""


def unknown(what: str, advice: str = f"build the network of {KNOWN}") -> UnknownError:
    """The error for what the sampler does not know.

    Args:
        what: names it.
        advice: what the user can do.
    """
    return UnknownError(f"model must be made of layers that the sampler knows; got {what}: {advice}")


class Network:
    """The steps in order, and what the image and the logits are.

    Args:
        colours: channels of the image.
        order: "raster" or "wavefront", which has no start of a row: there constants come with their pixels.

    Attributes:
        logits: what `finish` was told.
        stages: colours that are drawn together, in order.
        normalised: whether the model's outputs are the logits' log_softmax.
    """

    logits: View
    normalised = False

    def __init__(self, colours: int, order: str = "raster") -> None:
        self.colours = colours
        self.constant_phase = PIXEL if order == "wavefront" else ABOVE
        self.image = Value(PIXEL, [1 << colour for colour in range(colours)])
        self.steps: list[Conv | Point | Join] = []
        self.stages: list[list[int]] = []

    def level(self, colours: int) -> int:
        """The number of stages that must be drawn before a feature that depends on these colours is known."""
        return max((n + 1 for n, stage in enumerate(self.stages) if any(colours >> c & 1 for c in stage)), default=0)

    def constants(self) -> list[Const]:
        """What depends on the condition and on parameters alone, and is read by a step."""
        found: dict[Const, None] = {}
        for step in self.steps:
            operands = (step.cond, step.residual) if isinstance(step, Conv) else getattr(step, "operands", ())
            found.update((operand, None) for operand in operands if isinstance(operand, Const))
        return list(found)

    # Steps

    def conv(
        self,
        x: View,
        weight: Tensor,
        live: Tensor,
        taps: list[tuple[int, int]],
        bias: Tensor | None,
        cond: Any = None,
        activation: str | None = None,
        residual: Any = None,
    ) -> View:
        """Adds a convolution; weight and live are [out, in, taps], of taps that are all live somewhere."""
        if any(down > 0 for down, _ in taps):
            raise NotCausalError("model must be causal; got a convolution that reads rows below its pixel")
        own_row = [right for down, right in taps if down == 0]
        colours = [0] * len(weight)
        if not taps:
            phase = self.constant_phase
        elif not own_row:
            phase = ABOVE
        elif x.phase == PIXEL and max(own_row) > 0:
            phase = ROW
        else:
            phase = x.phase
            if phase == PIXEL and (0, 0) in taps:
                colours = _union(x.colours, live[:, :, taps.index((0, 0))])
        gated = activation in GATES
        for name, operand, count in (("cond", cond, len(weight)), ("residual", residual, len(weight) // (1 + gated))):
            if isinstance(operand, View) and len(operand.channels) != count:
                raise ValueError(f"{name} must have {count} channels; got {len(operand.channels)}")
        phase, colours = _with(phase, colours, cond)
        if gated:
            half = len(colours) // 2
            colours = [a | b for a, b in zip(colours[:half], colours[half:], strict=True)]
        phase, colours = _with(phase, colours, residual)
        out = _value(phase, colours)
        bias = None if bias is None else bias.detach()
        self.steps.append(Conv(x, weight.detach(), live, taps, bias, cond, activation, residual, out))
        return _whole(out)

    def point(self, function: str, *operands: Any, parameters: Sequence[float] = ()) -> View:
        """Adds a pointwise function; a constant has one channel for each of the other operand's, or one for all."""
        counts = [len(operand.channels) for operand in operands if isinstance(operand, View)]
        phase, colours = self.constant_phase, [0] * counts[0]
        for operand in operands:
            phase, colours = _with(phase, colours, operand)
        out = _value(phase, colours)
        self.steps.append(Point(function, operands, tuple(map(float, parameters)), out))
        return _whole(out)

    def join(self, parts: Sequence[View]) -> View:
        """Adds the channels of several features, one after the other."""
        out = _value(max(part.phase for part in parts), [c for part in parts for c in part.colours])
        self.steps.append(Join(tuple(parts), out))
        return _whole(out)

    def finish(self, logits: View, bernoulli: bool) -> None:
        """Says what the logits are; finds the order in which colours are drawn.

        Args:
            logits: what the model returns.
            bernoulli: whether one output for each colour is the logit of level 1, to which 0 joins for level 0.
        """
        channels = len(logits.channels)
        if bernoulli and channels == self.colours:
            logits = self.join([self.point("affine", logits, parameters=(0, 0)), logits])
        self.logits = logits
        if logits.phase == ROW:
            raise ValueError(
                "model must be causal; got logits that depend on the whole row of their pixel: shift a vertical stack "
                "down before it meets the horizontal one, or start with mask_type 'A'"
            )
        levels = len(logits.channels) // self.colours
        try:
            self.stages = self._order([channel % self.colours for channel in range(len(logits.channels))])
        except ValueError as error:
            try:
                self._order([channel // levels for channel in range(len(logits.channels))])
            except ValueError:
                raise error from None
            raise ValueError(
                "model must be causal, and return logits [N, levels x colours, H, W] with the colours innermost; got "
                "outputs whose levels are innermost, as contiguous channel groups have them: return "
                f"logits.unflatten(1, ({self.colours}, {levels})), [N, colours, levels, H, W]"
            ) from None

    def _order(self, colour_of):
        """The stages, if each channel of the logits belongs to a colour."""
        needs = [0] * self.colours
        for channel, colours in enumerate(self.logits.colours):
            needs[colour_of[channel]] |= colours
        drawn, stages = 0, []
        while drawn != (1 << self.colours) - 1:
            stage = [c for c in range(self.colours) if not drawn >> c & 1 and not needs[c] & ~drawn]
            if not stage:
                c = next(c for c in range(self.colours) if not drawn >> c & 1)
                read = [other for other in range(self.colours) if (needs[c] & ~drawn) >> other & 1]
                raise ValueError(
                    f"model must be causal; got logits of colour {c} that depend on colour {read[0]} of their own "
                    "pixel: a first layer needs mask_type 'A', and every layer, 1 x 1 ones too, the colours' "
                    "channel_groups"
                )
            stages.append(stage)
            drawn |= sum(1 << c for c in stage)
        return stages


def _whole(value):
    return View(value, tuple(range(len(value.colours))))


def _with(phase, colours, operand):
    """What a step depends on, and an operand of as many channels."""
    if not isinstance(operand, View):
        return phase, colours
    return max(phase, operand.phase), [a | b for a, b in zip(colours, operand.colours, strict=True)]


def _union(colours, live):
    """For each output the colours of the inputs that it reads; live is [out, in]."""
    found = [0] * len(live)
    for bits in set(colours) - {0}:
        reads = live[:, [i for i, own in enumerate(colours) if own == bits]].any(1).tolist()
        found = [a | bits if reads_it else a for a, reads_it in zip(found, reads, strict=True)]
    return found
