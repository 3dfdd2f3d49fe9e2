"""The steps of a network as a flat program: where each feature is kept, and what is computed when.

Every image has a workspace of float32 numbers (float64 on the reference), the same for all. A feature that is read at
other pixels than its own lies there in rows with its channels innermost, zeros to the left and right, in a ring of as
many rows as are still read; one that is not has a single pixel's place. The channels of a feature come in the order in
which they are known, those of each level (after so many stages of the pixel) padded to whole panels of 16.

An instruction computes some channels of a feature at one pixel, from runs of numbers relative to it. The instructions
come in sections: those at the start of a row, those of a pixel's levels, and those at the end of a row. Weights are
packed in panels of 16 outputs. csrc/common/sampling.h reads the same numbers.
"""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo.reference import sampling as reference
from fastelbo.reference.masked_conv2d import GATES
from fastelbo.reference.sampling import PANEL
from fastelbo.sampling.network import ABOVE, PIXEL, ROW, Const, Conv, Join, Network, Point, Value, View

FUNCTIONS = tuple(reference.FUNCTIONS)  # encoded by their places here, and so are these
OPS = ("conv", "point", "copy")
INSTRUCTION = 35  # numbers of an encoded one


class Ref(NamedTuple):
    """Where a feature's numbers lie: at offset + (row - down) % depth * row_stride + column * column_stride."""

    offset: int = -1
    row_stride: int = 0
    column_stride: int = 0
    depth: int = 1
    down: int = 0

    def plus(self, offset: int) -> "Ref":
        """The place of numbers so far behind these."""
        return self._replace(offset=self.offset + offset)


NOWHERE = Ref()


class Run(NamedTuple):
    """Numbers that follow one another, `down` rows above; to: where a copy puts them."""

    down: int
    offset: int
    length: int
    to: int = 0


@dataclass(eq=False)
class Instruction:
    """One instruction. Of a convolution `a` is the input, `b` and `c` the condition's halves, `d` the residual."""

    op: str
    panels: int
    out: Ref
    a: Ref = NOWHERE
    b: Ref = NOWHERE
    c: Ref = NOWHERE
    d: Ref = NOWHERE
    function: str = "none"
    runs: list[Run] = field(default_factory=list)
    weight: int = 0  # where in the weights; panels of 16, after one another for the two halves of a gate
    bias: int = 0
    inputs: int = 0
    parameters: tuple[float, ...] = ()

    @property
    def halves(self) -> int:
        """How many sums make an output: two under a gate."""
        return 2 if self.function in GATES else 1


@dataclass(eq=False)
class Buffer:
    """A feature's place."""

    positions: list[int]  # of each channel within a pixel
    ranges: list[tuple[int, int, list[int]]]  # of each level: first position, panels, channels
    width: int  # of a pixel
    ref: Ref


@dataclass
class Reads:
    """How far from its own pixel a value is read."""

    up: int = 0
    left: int = 0
    right: int = 0
    kept: bool = False


class Program:
    """The program of a network.

    Args:
        network: its steps.
        shape: (colours, rows, columns) of an image.
        wavefront: whether pixels of several rows are computed together.
        dtype: of the arithmetic.
    """

    def __init__(self, network: Network, shape, wavefront: bool, dtype: torch.dtype):
        self.network, self.dtype = network, dtype
        self.colours, self.rows, self.columns = shape
        self.wavefront = wavefront
        self.size = 0  # numbers in an image's workspace
        self.lag = 0  # columns by which a row must follow the one above it, so that all that it reads is known
        self.start: list[Instruction] = []  # of a row
        self.levels: list[list[Instruction]] = [[] for _ in range(len(network.stages) + 1)]
        self.end: list[Instruction] = []  # of a row
        self.pieces: list[Tensor] = []  # of the weights
        self.weights_size = 0
        self.constants: dict[tuple, tuple[Const, list[int], Buffer]] = {}
        self.buffers: dict[Value, Buffer] = {}
        self.reads = self._find_reads()
        self._place(network.image)
        for step in network.steps:
            self._place(step.out)
        for step in network.steps:
            if isinstance(step, Conv):
                self._conv(step)
            elif isinstance(step, Point):
                self._point(step)
            else:
                self._join(step)
        logits = network.logits
        self.logits = self._view_ref(logits)
        self.logit_positions = [self.buffers[logits.value].positions[channel] for channel in logits.channels]
        self.image = self.buffers[network.image]
        self.size = (self.size + 2 * PANEL) // PANEL * PANEL  # reads of a last, incomplete panel end inside
        if self.size // PANEL % 2 == 0:
            self.size += PANEL  # an odd number of cache lines: images do not share a cache's sets
        pieces = [piece.reshape(-1).to(dtype) for piece in self.pieces]
        self.weights = torch.cat(pieces) if pieces else torch.zeros(0, dtype=dtype, device="cpu")

    # Places

    def _find_reads(self) -> dict[Value, Reads]:
        found = {value: Reads() for value in (self.network.image, *(step.out for step in self.network.steps))}

        def read(view, rowwise, taps=((0, 0),)):
            if not isinstance(view, View):
                return
            reads = found[view.value]
            for down, right in taps:
                up, across = view.down - down, right - view.right
                if up > 0:
                    self.lag = max(self.lag, min(across // up + 1, self.columns))  # at most raster order
                reads.up, reads.left = max(reads.up, up), max(reads.left, -across)
                reads.right = max(reads.right, across)
                reads.kept |= bool(up or across) or (rowwise and view.value.phase == PIXEL)

        for step in self.network.steps:
            rowwise = step.out.phase != PIXEL
            if isinstance(step, Conv):
                read(step.x, rowwise, step.taps)
                read(step.cond, rowwise)
                read(step.residual, rowwise)
            else:
                for operand in step.operands if isinstance(step, Point) else step.parts:
                    read(operand, rowwise)
        read(self.network.logits, False)
        return found

    def _place(self, value: Value) -> None:
        reads = self.reads[value]
        levels = [self.network.level(c) if value.phase == PIXEL else 0 for c in value.colours]
        self.buffers[value] = self._buffer(levels, reads, reads.kept or value.phase != PIXEL)

    def _buffer(self, levels, reads: Reads, kept: bool) -> Buffer:
        positions, ranges, width = [0] * len(levels), [], 0
        for level in range(len(self.levels)):
            members = [channel for channel, own in enumerate(levels) if own == level]
            panels = -(-len(members) // PANEL)
            ranges.append((width, panels, members))
            for position, channel in enumerate(members, width):
                positions[channel] = position
            width += panels * PANEL
        if kept or self.wavefront:
            depth = reads.up + (self.rows if self.wavefront else 1)
            row_stride = (reads.left + self.columns + reads.right) * width
            ref = Ref(self._take(depth * row_stride) + reads.left * width, row_stride, width, depth)
        else:
            ref = Ref(self._take(width))
        return Buffer(positions, ranges, width, ref)

    def _take(self, count: int) -> int:
        self.size += count
        return self.size - count

    def _view_ref(self, view: View) -> Ref:
        ref = self.buffers[view.value].ref
        return ref._replace(offset=ref.offset - view.right * ref.column_stride, down=view.down)

    def _constant(self, const: Const, channels, layout: Buffer) -> Ref:
        """A constant's place, its channels as the layout has them."""
        key = const, tuple(channels), tuple(layout.positions)
        if key not in self.constants:
            if const.spatial:
                row_stride = self.columns * layout.width
                ref = Ref(self._take(self.rows * row_stride), row_stride, layout.width, self.rows)
            else:
                ref = Ref(self._take(layout.width))
            buffer = Buffer(layout.positions, layout.ranges, layout.width, ref)
            self.constants[key] = const, list(channels), buffer
        return self.constants[key][2].ref

    def _aligned(self, operand, channels, layout: Buffer, phase: int) -> Ref:
        """Channels of an operand as the layout has them: in place where they lie so, else copied."""
        if isinstance(operand, Const):
            return self._constant(operand, channels, layout)
        source = self.buffers[operand.value]
        positions = [source.positions[operand.channels[channel]] for channel in channels]
        shifts = {a - b for a, b in zip(positions, layout.positions, strict=True)}
        if len(shifts) == 1:
            return self._view_ref(operand).plus(shifts.pop())
        if operand.phase == ABOVE and not self.wavefront:  # which has no start of a row
            phase = ABOVE
        levels = [0] * len(channels)
        for level, (_, _, members) in enumerate(layout.ranges):
            for channel in members:
                levels[channel] = level
        copied = self._buffer(levels, Reads(), phase != PIXEL)
        self._copy(operand, positions, copied, phase)
        return copied.ref

    def _copy(self, view: View, positions, to: Buffer, phase: int, channels=None) -> None:
        """Adds copies of a view's positions to the channels of a buffer."""
        channels = range(len(positions)) if channels is None else channels
        wanted = dict(zip(channels, positions, strict=True))
        for level, (_, _, members) in enumerate(to.ranges):
            pairs = [(wanted[channel], to.positions[channel]) for channel in members if channel in wanted]
            runs = [Run(0, *run) for run in _merge(pairs)]
            if runs:
                self._add(phase, level, Instruction("copy", 0, to.ref, self._view_ref(view), runs=runs))

    # Instructions

    def _add(self, phase: int, level: int, instruction: Instruction) -> None:
        {ABOVE: self.start, PIXEL: self.levels[level], ROW: self.end}[phase].append(instruction)

    def _keep(self, piece: Tensor) -> int:
        self.pieces.append(piece)
        self.weights_size += piece.numel()
        return self.weights_size - piece.numel()

    def _conv(self, step: Conv) -> None:
        out, phase = self.buffers[step.out], step.out.phase
        source, ref = self.buffers[step.x.value], self._view_ref(step.x)
        half = len(out.positions)
        halves = 2 if step.activation in GATES else 1
        cond = [NOWHERE, NOWHERE]
        if step.cond is not None:
            for h in range(halves):
                cond[h] = self._aligned(step.cond, range(h * half, (h + 1) * half), out, phase)
        residual = NOWHERE if step.residual is None else self._aligned(step.residual, range(half), out, phase)
        positions = [source.positions[channel] for channel in step.x.channels]
        for level, (first, panels, members) in enumerate(out.ranges):
            if not members:
                continue
            outputs = [members, [channel + half for channel in members]][:halves]
            live = step.live[[row for rows in outputs for row in rows]].any(0)  # [in, taps]
            reads = []  # row, offset, tap, input
            for tap, (down, right) in enumerate(step.taps):
                for channel in live[:, tap].nonzero()[:, 0].tolist():
                    reads.append((-down, right * ref.column_stride + positions[channel], tap, channel))
            reads.sort(key=lambda read: (-read[0], read[1]))
            runs = []
            for down, group in itertools.groupby(reads, key=lambda read: read[0]):
                runs += [Run(down, offset, count) for offset, _, count in _spans([read[1] for read in group])]
            taps, channels = ([read[i] for read in reads] for i in (2, 3))
            packed = []
            for rows in outputs:
                weight = torch.where(step.live, step.weight, 0)[rows][:, channels, taps]  # [outputs, reads]
                packed.append(_panels(weight.T, panels))
            bias = step.weight.new_zeros(len(step.weight)) if step.bias is None else step.bias
            packed_bias = [_panels(bias[rows][None], panels) for rows in outputs]
            b, c, d = (place.plus(first) if place.offset >= 0 else place for place in (*cond, residual))
            instruction = Instruction(
                "conv",
                panels,
                out.ref.plus(first),
                ref,
                b,
                c,
                d,
                function=step.activation or "none",
                runs=runs,
                weight=self._keep(torch.cat(packed)),
                bias=self._keep(torch.cat(packed_bias)),
                inputs=len(reads),
                parameters=(1.0,) if step.activation == "elu" else (),
            )
            self._add(phase, level, instruction)

    def _point(self, step: Point) -> None:
        out, phase = self.buffers[step.out], step.out.phase
        refs = [self._aligned(operand, range(len(out.positions)), out, phase) for operand in step.operands]
        for level, (first, panels, members) in enumerate(out.ranges):
            if members:
                a, b = ([ref.plus(first) for ref in refs] + [NOWHERE])[:2]
                instruction = Instruction(
                    "point", panels, out.ref.plus(first), a, b, function=step.function, parameters=step.parameters
                )
                self._add(phase, level, instruction)

    def _join(self, step: Join) -> None:
        out, start = self.buffers[step.out], 0
        for part in step.parts:
            positions = [self.buffers[part.value].positions[channel] for channel in part.channels]
            self._copy(part, positions, out, step.out.phase, range(start, start + len(positions)))
            start += len(positions)

    # What runs it

    @property
    def sections(self) -> list[list[Instruction]]:
        """Those at the start of a row, those of each level of a pixel, and those at the end of a row."""
        return [self.start, *self.levels, self.end]

    def encode(self) -> Tensor:
        """All of it but the weights as int64 numbers; csrc/common/sampling.h describes them."""
        instructions: list[int] = []
        runs: list[int] = []
        bounds = [0]
        for section in self.sections:
            for i in section:
                instructions += [OPS.index(i.op), i.panels, FUNCTIONS.index(i.function), len(runs) // 4, len(i.runs)]
                instructions += [i.weight, i.bias, i.inputs]
                for ref in (i.out, i.a, i.b, i.c, i.d):
                    instructions += ref
                instructions += [*_bits(i.parameters), 0, 0][:2]
                for run in i.runs:
                    runs += run
            bounds.append(len(instructions) // INSTRUCTION)
        levels = len(self.levels)
        outputs = len(self.logit_positions) // self.colours
        header = [self.colours, self.rows, self.columns, levels, int(self.wavefront), self.lag, self.size, outputs]
        header += [*self.image.ref, *self.logits]
        stage_of = {colour: n for n, stage in enumerate(self.network.stages) for colour in stage}
        tables = [stage_of[colour] for colour in range(self.colours)]
        tables += self.image.positions
        tables += [self.logit_positions[k * self.colours + c] for c in range(self.colours) for k in range(outputs)]
        # after the header: where the sections, the instructions, the runs and the tables start
        places = [len(header) + 4]
        places.append(places[0] + len(bounds))
        places.append(places[1] + len(instructions))
        places.append(places[2] + len(runs))
        return torch.tensor([*header, *places, *bounds, *instructions, *runs, *tables], dtype=torch.int64, device="cpu")


def _bits(parameters):
    """Float32 numbers as integers."""
    return torch.tensor(parameters, dtype=torch.float32, device="cpu").view(torch.int32).tolist()


def _merge(pairs):
    """Pairs (from, to) as runs (from, count, to)."""
    runs = []
    for source, target in sorted(pairs, key=lambda pair: pair[1]):
        if runs and (runs[-1][0] + runs[-1][1], runs[-1][2] + runs[-1][1]) == (source, target):
            runs[-1][1] += 1
        else:
            runs.append([source, 1, target])
    return runs


def _spans(offsets):
    """Ascending offsets as runs (first, first, count)."""
    return [(first, to, count) for first, count, to in _merge([(offset, offset) for offset in offsets])]


def _panels(matrix, panels):
    """[k, outputs] as [panels, k, 16], with zeros for outputs that are not there."""
    k, outputs = matrix.shape
    padded = matrix.new_zeros(k, panels * PANEL)
    padded[:, :outputs] = matrix
    return padded.reshape(k, panels, PANEL).transpose(0, 1).reshape(panels, k * PANEL)
