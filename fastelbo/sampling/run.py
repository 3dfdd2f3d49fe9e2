"""What runs a program: images of one shape on their way, a step after the other."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastelbo import _library
from fastelbo.reference.sampling import Line, Scattered, Section, draw
from fastelbo.sampling.network import PIXEL, Const, Conv, Network
from fastelbo.sampling.program import Program


class Plan:
    """How images of one shape are drawn: in which order, and by which program for each kind of condition.

    Args:
        network: its steps.
        image_shape: (colours, rows, columns).
        order: "raster" or "wavefront".
        dtype, device: of the arithmetic.
        backend: "reference", "cpu" or "cuda".

    Raises:
        ValueError: for a wavefront of what depends on whole rows.
    """

    def __init__(
        self,
        network: Network,
        image_shape: tuple[int, int, int],
        order: str,
        dtype: torch.dtype,
        device: torch.device,
        backend: str,
    ) -> None:
        if order == "wavefront" and (rowwise := [step for step in network.steps if step.out.phase != PIXEL]):
            raise ValueError(
                "order must be raster for a network whose features depend on whole rows above, as those of a vertical "
                f"stack do ({len(rowwise)} of its {len(network.steps)} steps); got {order!r}"
            )
        self.network, self.image_shape, self.order = network, image_shape, order
        self.dtype, self.device, self.backend = dtype, device, backend
        self._programs: dict[tuple[bool, ...], Compiled] = {}
        self._lag: int | None = None

    def of_rows(self, rows: int) -> "Plan":
        """The same of images of another height."""
        colours, _, columns = self.image_shape
        return Plan(self.network, (colours, rows, columns), self.order, self.dtype, self.device, self.backend)

    # Which colours of which pixels a step is about

    @property
    def lag(self) -> int:
        """Columns by which the wavefront has a row follow the one above it."""
        if self._lag is None:
            self._lag = self.any_program().lag
        return self._lag

    @property
    def steps(self) -> int:
        """How many draws an image takes."""
        _, rows, columns = self.image_shape
        fronts = columns + self.lag * (rows - 1) if self.order == "wavefront" else rows * columns
        return fronts * len(self.network.stages)

    def colours(self, step: int) -> list[int]:
        """The colours that a step draws."""
        return self.network.stages[step % len(self.network.stages)]

    def pixels(self, step: int) -> list[tuple[int, int]]:
        """Row and column of each pixel that a step draws a part of."""
        front = step // len(self.network.stages)
        _, rows, columns = self.image_shape
        if self.order == "raster":
            return [divmod(front, columns)]
        return [(row, front - self.lag * row) for row in range(rows) if 0 <= front - self.lag * row < columns]

    def where(self, step: int) -> tuple[slice, Tensor, Tensor, Tensor]:
        """The index of what a step draws in images [n, C, H, W]."""
        at_rows, at_columns = zip(*self.pixels(step), strict=True)
        colours, rows, columns = (torch.tensor(i, device="cpu") for i in (self.colours(step), at_rows, at_columns))
        return slice(None), colours[:, None], rows, columns

    def rows_of_steps(self) -> list[range]:
        """All steps, as many at a time as a row of pixels takes."""
        count = self.image_shape[2] * len(self.network.stages)
        return [range(first, min(first + count, self.steps)) for first in range(0, self.steps, count)]

    # Conditions and programs

    def constants(self, cond: Tensor | None) -> dict[Const, Tensor]:
        """The values of all constants, each [n or 1, C or 1, H, W] or with 1 for both H and W."""
        operands = self._operands()
        known: dict[Any, Any] = {}
        fixed = {c: self._constant(c, known, layer) for c, layer in operands.items() if not c.of_image}
        if cond is None or len(fixed) == len(operands):
            return fixed
        own = [const for const in operands if const not in fixed]
        with one_thread(self.device):  # image by image: libraries' sums depend on the batch
            images = [{**known, "cond": image.clone(), "all": cond} for image in cond.split(1)]
            found = {const: [self._constant(const, image, operands[const]) for image in images] for const in own}
        return {const: fixed[const] if const in fixed else torch.cat(found[const]) for const in operands}

    def _operands(self) -> dict[Const, bool]:
        """All constants, with whether they are a layer's cond, which may be [n, C]."""
        found = {}
        for step in self.network.steps:
            layer = isinstance(step, Conv)
            operands = (step.cond, step.residual) if isinstance(step, Conv) else getattr(step, "operands", ())
            for operand in operands:
                if isinstance(operand, Const):
                    found[operand] = layer
        return found

    def _constant(self, const, known, layer):
        try:
            value = const(known)
        except (RuntimeError, IndexError, ValueError, AttributeError) as error:
            if "cond" not in known:
                raise
            shape = tuple(known["all"].shape)
            raise ValueError(f"cond must be what the model takes; got shape {shape}: {error}") from error
        if isinstance(value, int | float):
            value = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if layer and value.dim() == 2:
            value = value[:, :, None, None]
        if const.of_image and value.dim() == 4 and len(value) != 1:
            raise ValueError(f"cond must lead to features of one image from that of one; got {len(value)}")
        value = value.reshape((1,) * (4 - value.dim()) + value.shape)
        size, image = value.shape[2:], self.image_shape[1:]
        if any(own not in (1, whole) for own, whole in zip(size, image, strict=True)):
            raise ValueError(
                f"cond must lead to features of {image[0]} x {image[1]} pixels or of one; got {size[0]} x {size[1]}"
            )
        return value if size == (1, 1) else value.expand(*value.shape[:2], *image)

    def compiled(self, constants: dict[Const, Tensor]) -> "Compiled":
        """The program for constants of these sizes."""
        spatial = {const: value.shape[2:] != (1, 1) for const, value in constants.items()}
        key = tuple(spatial.values())
        if key not in self._programs:
            self._programs[key] = Compiled(self, spatial)
        return self._programs[key]

    def any_program(self) -> Program:
        """The last one; where there is none yet, that for a condition of one class."""
        if not self._programs:
            spatial = dict.fromkeys(self._operands(), False)
            return Program(self.network, self.image_shape, self.order == "wavefront", spatial, self.dtype)
        return next(reversed(self._programs.values())).program


class Compiled:
    """A program, as its backend takes it.

    Args:
        plan: whose it is.
        spatial: for each constant whether it has an image's size.

    Attributes:
        checked: whether its steps were found to be the network's own.
    """

    def __init__(self, plan: Plan, spatial: dict[Const, bool]) -> None:
        program = Program(plan.network, plan.image_shape, plan.order == "wavefront", spatial, plan.dtype)
        self.program, self.weights, self.checked = program, program.weights.to(plan.device), False
        if plan.backend != "reference":
            self.encoded = program.encode().to(plan.device)
        else:
            self.sections = [Section(section, self.weights) for section in program.sections]


class Run:
    """n images being drawn: their caches, and how far they are.

    Args:
        plan: of these images.
        n: how many.
        cond: the condition of each, or None.
    """

    def __init__(self, plan: Plan, n: int, cond: Tensor | None) -> None:
        self.plan, self.n, self.step, self.advanced = plan, n, 0, -1
        constants = plan.constants(cond)
        self.compiled = plan.compiled(constants)
        self.program = program = self.compiled.program
        self.workspace = torch.zeros(n, program.size, dtype=plan.dtype, device=plan.device)
        for const, channels, buffer in program.constants.values():
            self._store(constants[const], channels, buffer)

    def _store(self, value, channels, buffer):
        """A constant's channels, as the buffer has them."""
        channels = torch.tensor(channels, device=value.device)
        if value.shape[1] == 1:
            channels = torch.zeros_like(channels)
        elif int(channels.max()) >= value.shape[1]:
            raise ValueError(f"cond must lead to {int(channels.max()) + 1} channels or more; got {value.shape[1]}")
        ref = buffer.ref
        rows, columns = value.shape[2:]
        view = self.workspace.as_strided(
            (self.n, rows, columns, buffer.width),
            (self.program.size, ref.row_stride, ref.column_stride, 1),
            ref.offset,
        )
        view[..., torch.tensor(buffer.positions, device="cpu")] = value[:, channels].permute(0, 2, 3, 1).to(view)

    def _place(self, step, workspace):
        pixels = self.plan.pixels(step)
        return Line(workspace, *pixels[0], 1) if len(pixels) == 1 else Scattered(workspace, pixels)

    def advance(self, step: int, alone: bool = False) -> Tensor:
        """Computes the outputs of a step, if that has not been done: [n, K, colours, pixels].

        On the reference each image alone, or all together, which is faster, and whose sums depend on the batch.
        """
        if self.advanced != step:
            if self.plan.backend != "reference":
                _ADVANCE(self.compiled.encoded, self.compiled.weights, self.workspace, step, step + 1)
            elif alone:
                with one_thread(self.plan.device):
                    for image in self.workspace.split(1):
                        self._advance(step, image)
            else:
                self._advance(step, self.workspace)
            self.advanced = step
        program = self.program
        positions = torch.tensor(program.logit_positions, device=self.workspace.device)
        positions = positions.reshape(-1, program.colours)[:, self.plan.colours(step)]
        first, last = int(positions.min()), int(positions.max())
        read = self._place(step, self.workspace).read(program.logits, last - first + 1, offset=first)
        return read[:, :, positions - first].movedim(1, 3)

    def _advance(self, step, workspace):
        stages = len(self.plan.network.stages)
        front, stage = divmod(step, stages)
        start, *levels, end = self.compiled.sections
        columns = self.plan.image_shape[2]
        if stage == 0:
            if front:
                levels[-1].run(self._place(step - 1, workspace))
            if self.plan.order == "raster" and front % columns == 0:
                row = front // columns
                if row:
                    end.run(Line(workspace, row - 1, 0, columns))
                start.run(Line(workspace, row, 0, columns))
        levels[stage].run(self._place(step, workspace))

    def commit(self, step: int, values: Tensor) -> None:
        """What the network takes for the colours of a step: [n, colours, pixels]."""
        place, ref = self._place(step, self.workspace), self.program.image.ref
        for index, colour in enumerate(self.plan.colours(step)):
            place.write(ref, values[:, index, :, None], self.program.image.positions[colour])

    def draw(
        self,
        image: Tensor,
        known: Tensor | None,
        uniforms: Tensor,
        values: Tensor,
        temperature: float,
        steps: range,
        seen: Tensor | None = None,
    ) -> None:
        """Draws what is not known, in some steps.

        Args:
            image: int64 [n, C, H, W], the levels: those that are known, and those that are drawn.
            known: bool of the same shape, or None where nothing is.
            uniforms: of the same shape, a number for each draw.
            values: what the network takes for each level.
            temperature: the logits are divided by it.
            steps: which.
            seen: [n, C, H, W, K], receives the logits.
        """
        compiled = self.compiled
        if self.plan.backend != "reference":
            given = image, known, uniforms, values, temperature, steps.start, steps.stop, seen
            _DRAW(compiled.encoded, compiled.weights, self.workspace, *given)
            return
        for step in steps:
            logits, where = self.advance(step), self.plan.where(step)
            if seen is not None:
                seen[where] = logits.movedim(1, -1)
            drawn = draw(logits, uniforms[where], temperature)
            if known is not None:
                drawn = torch.where(known[where], image[where], drawn)
            image[where] = drawn
            self.commit(step, values[drawn.clamp(min=0)])


_ONE = threading.Lock()


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Runs on one thread of a CPU: libraries divide sums among threads."""
    if device.type != "cpu":
        yield
        return
    with _ONE:
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


def without_autocast(device: torch.device) -> torch.autocast:
    """Has torch narrow no products."""
    return torch.autocast(device.type, enabled=False)


def progress_bar(steps: Sequence, wanted: bool) -> Iterable:
    """Steps, which a bar of tqdm counts if that is wanted."""
    if not wanted:
        return steps
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(steps, desc="sampling")


_ADVANCE = _library.define_helper(
    "sampler_advance",
    "(Tensor program, Tensor weights, Tensor(a!) workspace, int first, int end) -> ()",
    lambda program, weights, workspace, first, end: None,
)
_DRAW = _library.define_helper(
    "sampler_draw",
    "(Tensor program, Tensor weights, Tensor(a!) workspace, Tensor(b!) image, Tensor? known, Tensor uniforms,"
    " Tensor values, float temperature, int first, int end, Tensor(c!)? seen=None) -> ()",
    lambda program, weights, workspace, image, known, uniforms, values, temperature, first, end, seen=None: None,
)
