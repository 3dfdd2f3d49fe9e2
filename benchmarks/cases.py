"""What is timed: each op of ours, the lines and torch.distributions calls it replaces, and the bytes it has to move."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import originals
import pytest
import torch
from ops import GAUSSIAN, Gaussian
from torch.utils.checkpoint import checkpoint

import fastelbo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "backward", "forward_backward")
RIVALS = ("eager", "distributions", "compile", "compile_checkpoint")
UNCOMPILED = ("eager", "distributions")


@dataclass(frozen=True)
class Size:
    """Shapes of one class, and what is timed on them."""

    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    passes: tuple[str, ...] = ("forward", "forward_backward")
    timings: tuple[str, ...] = ("host",)  # as in rows.Row
    # of a case and a dtype: a compilation takes seconds, and time on a GPU is short
    rivals: Callable[["Case", str], tuple[str, ...]] = lambda case, dtype: RIVALS
    summed: bool = False  # only ops that sum over events
    quick: bool = True


# The most telling first: what comes last is lost where time runs out.
SIZES = {
    "cpu": {
        "tiny": Size(((8, 16), (128, 10))),
        "medium": Size(((4096, 256),)),
        "large": Size(((65536, 256),), quick=False),
    },
    "cuda": {
        "large": Size(
            ((65536, 1024),), passes=PASSES, timings=("events",), quick=False,
            rivals=lambda case, dtype: RIVALS if dtype == "float32" or case.entry.drawn else UNCOMPILED,
        ),
        "rows": Size(  # as many elements in events of other lengths
            tuple((2**26 // columns, columns) for columns in (1, 3, 31, 64, 257, 4096, 100_000)),
            passes=("forward", "backward"), timings=("events",), summed=True, quick=False,
            rivals=lambda case, dtype: (),
        ),
        "tiny": Size(
            ((8, 16), (128, 10)), ("float32",), timings=("host", "graph"),
            rivals=lambda case, dtype: RIVALS if case.op == "gaussian_rsample_kl" else UNCOMPILED,
        ),
        "medium": Size(((4096, 256),), timings=("events",), rivals=lambda case, dtype: UNCOMPILED),
        "64MB": Size(
            ((65536, 256),), ("float32",), PASSES, ("events",), rivals=lambda case, dtype: UNCOMPILED, quick=False
        ),
    },
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of the largest value: is it the same function at all


@dataclass(frozen=True)
class Case:
    """One op on one kind of input."""

    entry: Gaussian  # of the table of ops
    name: str  # the kind of input
    inputs: str  # a letter each: p for a parameter, 0 for a 0-d one, d for data (wants no gradient), z for zeros
    floor: tuple[int, int]  # elements read and written per element, in the forward and in the backward
    lines: Callable | None = None  # that users write, a function of the inputs; also compiled
    distributions: Callable | None = None  # the same by torch.distributions
    others: dict[str, Callable] = field(default_factory=dict)  # further rivals
    ours: Callable | None = None  # a function of the inputs and the backend, where that is not simply the op
    sizes: tuple[str, ...] = ()  # all
    passes: tuple[str, ...] = PASSES

    @property
    def op(self) -> str:
        """Its name in fastelbo."""
        return self.entry.name


CASES = [
    Case(GAUSSIAN["rsample"], "", "pp", (3, 3), originals.sample, originals.distributions_sample),
    Case(GAUSSIAN["kl"], "standard normal", "pp", (2, 4), originals.kl, originals.distributions_kl),
    Case(GAUSSIAN["kl-prior"], "learned prior", "pppp", (4, 8), originals.kl_to_prior, originals.distributions_kl),
    Case(GAUSSIAN["rsample_kl"], "", "pp", (3, 5), originals.sample_and_kl, originals.distributions_sample_and_kl),
    Case(GAUSSIAN["log_prob"], "", "dpp", (3, 5), originals.log_prob, originals.distributions_log_prob),
    Case(GAUSSIAN["log_prob"], "scalar scale", "dp0", (2, 3), originals.log_prob, originals.distributions_log_prob),
    Case(  # mean and s are 0, so that what comes back is the noise itself; the third input is what normal_ writes to
        GAUSSIAN["rsample"], "normals", "zzd", (3, 0), sizes=("medium", "64MB"), passes=("forward",),
        others={"randn": lambda mean, s, to: torch.randn_like(mean), "normal_": lambda mean, s, to: to.normal_()},
        ours=lambda mean, s, to, backend: fastelbo.gaussian_rsample(mean, s, backend=backend),
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """One case on one shape and dtype, one pass of it, and how it is timed."""

    case: Case
    shape: tuple[int, int]
    dtype: str
    pass_: str
    timing: str
    rivals: tuple[str, ...]

    def __str__(self):
        return "-".join((self.case.op, self.case.name, named(self.shape), self.dtype, self.pass_, self.timing))

    @property
    def rounds(self) -> int:
        """Samples of each contestant: fewer of what takes long."""
        elements = math.prod(self.shape)
        if self.timing == "host":
            return 10 if elements >= 2**24 else 30
        return max(20, min(100, math.ceil(2**26 / elements)))


def timed(option) -> list[Timed]:
    """What is to be timed, by the options of `pytest benchmarks`: device, shape, op, dtype, rival and quick.

    Shapes as "4096x256" come with every dtype, pass and rival; others, but for names of SIZES, are of other ops' cases.
    What takes long is left out of a quick run, unless its size is chosen.
    """
    known = SIZES[option.device]
    names = [name for name in option.shape or known if name in known or name.count("x") == 1]
    sizes = {name: size_of(option.device, name) for name in names}
    return [
        Timed(case, shape, dtype, pass_, timing, size.rivals(case, dtype))
        for name, size in sizes.items()
        if option.shape or size.quick or not option.quick
        for case in CASES
        if chosen(option.op, case.op) and (case.entry.terms or not size.summed)
        if not case.sizes or name in case.sizes or name not in known
        for shape in size.shapes
        for dtype in size.dtypes
        if chosen(option.dtype, dtype)
        for pass_ in size.passes
        if pass_ in case.passes
        for timing in size.timings
    ]


def counted(option) -> list:
    """The cases and dtypes whose memory is to be counted, as timed."""
    return [
        pytest.param((case, dtype), id=f"{case.op}-{case.name}-{dtype}")
        for case in CASES
        if case.lines and chosen(option.op, case.op) and not option.shape
        for dtype in option.dtype or (["float32"] if option.device == "cuda" else DTYPES)
        if dtype in DTYPES
    ]


def chosen(values, value: str) -> bool:
    """By an option that may be given several times, or not at all for everything."""
    return not values or value in values


def size_of(device: str, name: str) -> Size:
    if name in SIZES[device]:
        return SIZES[device][name]
    shape = tuple(map(int, name.split("x")))
    return Size((shape,)) if device == "cpu" else Size((shape,), passes=PASSES, timings=("events",))


def named(shape: Iterable[int]) -> str:
    """As rows have a shape: 4096x256."""
    return "x".join(map(str, shape))


def make_inputs(case: Case, shape, dtype: str, device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def make(kind):
        values = torch.randn(() if kind == "0" else shape, generator=generator, device=device)
        values = values.mul_(0) if kind == "z" else values  # written, hence not the system's one page of zeros
        return values.to(DTYPES[dtype]).requires_grad_(kind in "p0")

    return [make(kind) for kind in case.inputs]


def usable_backends(device: torch.device) -> list[str]:
    """Ours, for what the device is; Triton's interpreter is for tests, and "reference" is no contestant."""
    names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = {name: fastelbo.backends.why_not(name, device) for name in names}
    if all(reasons.values()):
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return [name for name in names if reasons[name] is None]


def contestants(case: Case, backends: list[str], wanted, pass_: str, timing: str = "host") -> dict[str, Callable]:
    """Functions from a case's inputs to its outputs, ours first."""
    ours = {name: functools.partial(case.ours or case.entry.function, backend=name) for name in backends}
    lines = case.lines
    if lines is None:
        return ours | case.others
    rivals = {"eager": lines}
    if timing != "graph":  # its checks of values wait for the GPU, which no graph can
        rivals["distributions"] = case.distributions
    if "compile" in wanted and pass_ != "backward":  # which gives its saved tensors away, and can run but once
        rivals["compile"] = compiled(lines)
    if "compile_checkpoint" in wanted and pass_ == "forward_backward" and case.entry.drawn:
        rivals["compile_checkpoint"] = compiled(lambda *inputs: checkpoint(lines, *inputs, use_reentrant=False))
    return ours | {name: rival for name, rival in rivals.items() if name in wanted} | case.others


def compiled(function: Callable, **options) -> Callable:
    """By torch.compile, which forgets all else: a second shape makes it generate slower code for any shape."""
    torch.compiler.reset()
    return torch.compile(function, **options)


def bind(function: Callable, inputs, pass_: str) -> Callable:
    """A call without arguments of one pass. What comes before that pass exists before the call."""
    if pass_ == "forward":
        return lambda: function(*inputs)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    outputs = function(*inputs)
    upstream = upstream_like(outputs)

    def backward():
        return outputs, torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)

    def forward_backward():
        outputs = function(*inputs)
        return outputs, torch.autograd.grad(outputs, leaves, upstream)

    return backward if pass_ == "backward" else forward_backward


def upstream_like(outputs):
    """Gradients of the outputs, positive so that sums of them do not cancel; the same ones for every contestant, and in
    memory as the outputs are."""
    if isinstance(outputs, tuple):
        return tuple(upstream_like(output) for output in outputs)
    generator = torch.Generator(outputs.device).manual_seed(1)
    return torch.empty_like(outputs).copy_(torch.rand(outputs.shape, generator=generator, device=outputs.device))


def flat(result) -> tuple[torch.Tensor, ...]:
    """Outputs, then gradients, of what a call that `bind` made returns."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(one for part in result for one in flat(part))


def copy(bytes_moved: int, device) -> Callable:
    """The ruler: a copy that reads and writes this many bytes in all."""
    source = torch.ones(max(1, bytes_moved // 8), device=device)
    destination = torch.ones_like(source)
    return lambda: destination.copy_(source)


def floor_bytes(case: Case, inputs, pass_: str) -> int:
    """What a pass has to read and write: each input and each result once."""
    forward, backward = case.floor
    elements = {"forward": forward, "backward": backward, "forward_backward": forward + backward}[pass_]
    # sums over rows are float32; the backward reads their gradients
    sums = len(case.entry.terms) * len(inputs[0]) * 4 * (2 if pass_ == "forward_backward" else 1)
    return elements * inputs[0].numel() * inputs[0].element_size() + sums


def check(case: Case, name: str, result, inputs, pass_: str) -> None:
    """Raises AssertionError unless a contestant computes what the plain float32 lines do, of its own noise."""
    found = flat(result)
    exact_inputs = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in inputs]
    leaves = [tensor for tensor in exact_inputs if tensor.requires_grad]
    noise = ()
    if case.entry.drawn:
        mean, s = (tensor.detach() for tensor in exact_inputs[:2])
        noise = ((found[0].detach().float() - mean) * torch.exp(-0.5 * s),)
        # six standard errors of the mean and of the standard deviation
        assert abs(noise[0].mean()) < 6 / noise[0].numel() ** 0.5, f"{name}: the noise has mean {noise[0].mean()}"
        assert abs(noise[0].std() - 1) < 4.3 / noise[0].numel() ** 0.5, f"{name}: the noise has std {noise[0].std()}"
    if case.lines is None:
        return
    exact = case.lines(*exact_inputs, *noise)
    grads = () if pass_ == "forward" else torch.autograd.grad(exact, leaves, upstream_like(exact))
    compare(name, found, (*flat(exact), *grads), TOLERANCE[inputs[0].dtype])


def compare(name: str, results, expected, tolerance: float) -> None:
    """Raises AssertionError unless outputs and gradients are as expected, but for so much of the largest value."""
    assert len(results) == len(expected), f"{name}: {len(results)} outputs and gradients, not {len(expected)}"
    for index, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert actual.shape == wanted.shape, f"{name}: output or gradient {index} is {tuple(actual.shape)}"
        error = (actual - wanted).abs().max() / wanted.abs().max()
        assert error < tolerance, f"{name}: output or gradient {index} is off by {error:.1e}"
