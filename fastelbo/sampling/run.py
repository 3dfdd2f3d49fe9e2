"""What runs a program: images of one shape on their way, a step after the other."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastelbo import _library
from fastelbo.reference.sampling import Line, Scattered, Section, draw
from fastelbo.sampling.network import PIXEL, Const, Network
from fastelbo.sampling.program import Program
from fastelbo.sampling.trace import Form


class Plan:
    """How images of one shape are drawn: in which order, and by which program for each kind of condition.

    Args:
        network: its steps.
        form: how the model takes images and gives logits.
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
        form: Form,
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
        self.network, self.form, self.image_shape, self.order = network, form, image_shape, order
        self.dtype, self.device, self.backend = dtype, device, backend
        self._compiled: Compiled | None = None

    def of_rows(self, rows: int) -> "Plan":
        """The same of images of another height."""
        colours, _, columns = self.image_shape
        return Plan(
            self.network, self.form, (colours, rows, columns), self.order, self.dtype, self.device, self.backend
        )

    # Which colours of which pixels a step is about

    @property
    def lag(self) -> int:
        """Columns by which the wavefront has a row follow the one above it."""
        return self.compiled.program.lag

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
        every = self.network.constants()
        fixed = {const: const({}) for const in every if not const.of_image}
        if cond is None or len(fixed) == len(every):
            return fixed
        own = [const for const in every if const not in fixed]
        flat = cond.reshape(len(cond), -1).contiguous().view(torch.uint8)  # equal conditions, as classes are, once
        distinct, which = flat.unique(dim=0, return_inverse=True)
        with one_thread(self.device):  # image by image: libraries' sums depend on the batch
            images = [{"cond": image.clone()} for image in distinct.view(cond.dtype).view(-1, *cond.shape[1:]).split(1)]
            found = {const: torch.cat([const(image) for image in images])[which] for const in own}
        return {const: fixed[const] if const in fixed else found[const] for const in every}

    @property
    def compiled(self) -> "Compiled":
        """The program."""
        if self._compiled is None:
            self._compiled = Compiled(self)
        return self._compiled


class Compiled:
    """A program, as its backend takes it.

    Args:
        plan: whose it is.

    Attributes:
        checked: whether its steps were found to be the network's own.
    """

    def __init__(self, plan: Plan) -> None:
        program = Program(plan.network, plan.image_shape, plan.order == "wavefront", plan.dtype)
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
        self.compiled = plan.compiled
        self.program = program = self.compiled.program
        self.workspace = torch.zeros(n, program.size, dtype=plan.dtype, device=plan.device)
        for const, channels, buffer in program.constants.values():
            self._store(constants[const], const.spatial, channels, buffer)

    @classmethod
    def resumed(cls, plan: Plan, n: int, workspace: Tensor, step: int, advanced: int) -> "Run":
        """A run that was written down."""
        run = cls.__new__(cls)
        run.plan, run.n, run.step, run.advanced = plan, n, step, advanced
        run.compiled, run.program, run.workspace = plan.compiled, plan.compiled.program, workspace
        return run

    def _store(self, value, spatial, channels, buffer):
        """A constant's channels, as the buffer has them."""
        channels = torch.tensor(channels, device=value.device)
        if value.shape[1] == 1:
            channels = torch.zeros_like(channels)
        ref = buffer.ref
        rows, columns = self.plan.image_shape[1:] if spatial else (1, 1)
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
