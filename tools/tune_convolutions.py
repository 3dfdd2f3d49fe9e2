"""Tries every way in which the kernels can run the benchmarks' masked convolutions on this machine's GPU.

    python tools/tune_convolutions.py --output FILE
    python tools/tune_convolutions.py --list --layer "64-64 k7"

Candidates are compiled by all CPU cores first. One is right when it agrees with float64 and fifty runs on a poisoned
result, half of them while another stream is busy, have the same bits. Only then it is timed, by events with cold
caches, in turns with torch's own full convolution, crop and product with the mask. A table says for each layer and pass
which is best and what fastelbo chooses today. A kernel that hangs or breaks its process costs that process alone.

Exit status: 0 all well; 1 some candidate computed something wrong, or none ran; 2 nothing was done: no GPU, or wrong
arguments; 130 interrupted, which prints what was found so far.
"""

import argparse
import functools
import importlib
import math
import multiprocessing.connection
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from triton.backends.compiler import GPUTarget

import fastelbo

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]
import cases  # noqa: E402
import clocks  # noqa: E402
import convolutions  # noqa: E402
import machine  # noqa: E402
import ratios  # noqa: E402
import rows  # noqa: E402

# modules whose settings change, which the package's functions of the same name would hide
launch, masked_conv2d, masked_conv2d_tma = (
    importlib.import_module(f"fastelbo.kernels.{name}") for name in ("launch", "masked_conv2d", "masked_conv2d_tma")
)

BACKENDS = ("triton", "tma", "cuda")
PASSES = ("forward", "d_input", "d_weight")
RIVALS = ("eager", "full", "crop")
RUNS = 50
RELATIVE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-3}  # error of a result; TF32 in float32
FIRST_ROUNDS, ROUNDS = 4, 15  # of timing; what is SLOW times as slow as the best of its side takes the first ones alone
SLOW = 2
COMPILING = 0.5  # of the time, at most
DEVICE = torch.device("cuda")
# How processes start, none of which may inherit a GPU, and how many seconds they may say nothing.
COMPILE, MEASURE = ("forkserver", 60), ("spawn", 30)


class Candidate(NamedTuple):
    """A way to run a pass: a backend, and how its programs cut their work, None where it has one way."""

    backend: str
    tile: tuple | None = None

    def __str__(self):
        if self.tile is None:
            return self.backend
        return f"{self.backend} {type(self.tile).__name__}({','.join(str(int(value)) for value in self.tile)})"


class Group(NamedTuple):
    """What is measured together."""

    case: convolutions.Timed
    candidates: tuple[Candidate, ...]


class Died(NamedTuple):
    """In place of what a process was to return: what it was doing, and why there is nothing."""

    doing: object
    reason: str


class Measured(NamedTuple):
    """Of a group: for each candidate why it is not right, or "", and its error; and all seconds of what was timed."""

    verdicts: dict
    samples: dict


@dataclass(frozen=True)
class Session:
    """What all rows of a session say."""

    gpu: str
    driver: str
    torch: str
    triton: str
    commit: str
    timestamp: str  # UTC


@dataclass(frozen=True)
class Row(Session):
    """One candidate, or one rival, of one layer and pass."""

    case: str
    shape: str
    dtype: str
    pass_: str
    contestant: str
    chosen: str  # "yes": what the library takes by itself
    verdict: str  # "right", or why not
    relative_error: float | None = None
    runs: int = 0
    rounds: int = 0
    median_us: float | None = None
    min_us: float | None = None
    tflops: float | None = None  # of live taps
    over_best_rival: float | None = None  # how many times as long that takes


# What there is to try

# Of a backend and of whether it is a weight's gradient: the function that chooses, and one for all there is to choose.
CHOICES = {
    ("triton", False): (masked_conv2d, "tiles_for", masked_conv2d.more_tiles_for),
    ("triton", True): (masked_conv2d, "weight_tiles_for", masked_conv2d.more_weight_tiles_for),
    ("tma", False): (masked_conv2d_tma.tiling, "tile_for", masked_conv2d_tma.tiling.more_tiles_for),
    ("tma", True): (masked_conv2d_tma.tiling, "weight_tile_for", masked_conv2d_tma.tiling.more_weight_tiles_for),
}


def tensors_of(case, device=None) -> list[torch.Tensor]:
    """Input, weight, bias, gradient of the output, and the result, of NaN; without a device memory that no one uses."""
    layer, images = case.layer, (case.layer.n, case.layer.size, case.layer.size)
    shapes = [(images[0], channels, *images[1:]) for channels in (layer.c_in, layer.c_out)]
    shapes[1:1] = (layer.c_out, layer.c_in, layer.k, layer.k), (layer.c_out,)
    formats = [torch.channels_last if len(shape) == 4 else torch.contiguous_format for shape in shapes]
    kind = {"dtype": getattr(torch, case.dtype), "device": device}
    found = [torch.empty(shape, memory_format=one, **kind) for shape, one in zip(shapes, formats, strict=True)]
    if device:
        found[:3] = [tensor.detach() for tensor in convolutions.make_inputs(case, device, torch.channels_last)]
        found[3] = cases.upstream_like(found[3])
    result = torch.empty_like(found[{"forward": 3, "d_input": 0, "d_weight": 1}[case.pass_]])
    return [*found, result.fill_(float("nan")) if device else result]


def filling(case, backend, tensors):
    """A call that fills the result of a pass, or a new one in CUDA C++, and returns it."""
    x, weight, bias, d_z, result = tensors
    options = case.layer.mask_type, "square", 1, 1, "interleaved", ""
    wanted = [case.pass_ == name for name in PASSES]
    forward, given = wanted[0], (x, weight, bias, None, None) if wanted[0] else (d_z, x, weight, None)
    options += (False,) if forward else (*wanted[1:], False, 0)
    if backend == "cuda":
        op = getattr(torch.ops.fastelbo, f"masked_conv2d_{'fwd' if forward else 'bwd'}").kernel
        return lambda: op(*given, *options)[0 if forward else wanted.index(True) - 1]
    results = (result, None) if forward else [result if want else None for want in (*wanted[1:], False, False)]
    prepare = masked_conv2d.masked_conv2d_fwd if forward else masked_conv2d.masked_conv2d_bwd
    fill = prepare(results, *given, *options)
    return lambda: fill(results, *given) or result


def with_choice(call, case, backend, choose, *settings):
    """What a call returns while its tile is chosen by what choose() makes of the function that does else."""
    of_weight = case.pass_ == "d_weight"
    module, name, _ = CHOICES[backend, of_weight]
    few = [(masked_conv2d_tma.tiling, "FEW_PIXELS", 0)] if of_weight else []  # a rule of today's choice
    boxes = masked_conv2d, "boxes", masked_conv2d_tma if backend == "tma" else None
    return convolutions.within(call, [boxes, (module, name, choose(getattr(module, name))), *few, *settings])()


def candidates_of(case, backend) -> list[Candidate]:
    """All of a backend, first the one that it chooses today."""
    if backend == "cuda":
        return [Candidate(backend)]
    asked, modules, tensors = [], [], tensors_of(case)
    note = launch.Launch, "__call__", lambda one, *_: modules.append(one._kernel.fn.__module__)

    def choose(right):
        return lambda *arguments: asked.append(arguments) or right(*arguments)

    with_choice(lambda: filling(case, backend, tensors)(), case, backend, choose, note)
    if backend == "tma" and masked_conv2d_tma.kernels.__name__ not in modules:  # the case is left to other kernels
        return []
    *_, more = CHOICES[backend, case.pass_ == "d_weight"]
    return [Candidate(backend, tile) for tile in more(*asked[0])]


def running(case, candidate, tensors, *settings):
    """A call that runs a candidate, after its first run."""
    found = []

    def first():
        found.append(filling(case, candidate.backend, tensors))
        found[0]()

    if candidate.backend == "cuda":
        first()
    else:
        choice = candidate.tile if candidate.backend == "tma" else (candidate.tile,)
        with_choice(first, case, candidate.backend, lambda right: lambda *arguments: choice, *settings)
    return found[0]


# What processes do


def begin(capability, multiprocessors, compiling=True):
    """Has launches prepared, and compiled where wanted, for a GPU that this process does not touch."""
    masked_conv2d_tma._capability = lambda device: capability
    masked_conv2d_tma._multiprocessors = lambda tensor: multiprocessors
    if compiling:
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        functions = {"target": lambda: target, "device": lambda: 0, "stream": lambda device=None: 0}
        named = {f"get_current_{name}": function for name, function in functions.items()}
        triton.runtime.driver.set_active(SimpleNamespace(**named))


def compile_one(task, say) -> str:
    """Puts what a candidate launches into Triton's cache on disk; returns why it cannot, or nothing."""
    case, candidate = task
    try:
        running(case, candidate, tensors_of(case), (launch.Launch, "__call__", launch.Launch.compile))
    except Exception as error:
        return sentence(error)
    return ""


def sentence(error) -> str:
    """What was wrong at first, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(getattr(error, "error_message", None) or error).splitlines()]
    return f"{type(error).__name__}: {next((line for line in reversed(lines) if len(line) > 1), '')[:150]}"


@functools.cache
def staged(case, device):
    """The tensors of a pass, its result in float64, and calls of the library's own by name."""
    tensors = tensors_of(case, device)
    x, weight, bias, d_z = (tensor.double() for tensor in tensors[:4])
    mask, pad = convolutions.mask_of(case.layer, torch.float64, device), case.layer.k // 2
    with torch.backends.cudnn.flags(enabled=False):
        if case.pass_ == "forward":
            right = F.conv2d(x, weight * mask, bias, padding=pad)
        elif case.pass_ == "d_input":
            right = torch.nn.grad.conv2d_input(x.shape, weight * mask, d_z, padding=pad)
        else:
            right = torch.nn.grad.conv2d_weight(x, weight.shape, d_z, padding=pad) * mask
    bound, rivals = "forward" if case.pass_ == "forward" else "backward", {}
    for name, (function, memory_format, settings) in convolutions.contestants(case, device, [], RIVALS).items():
        if ratios.form_of(name) in RIVALS:
            inputs = convolutions.make_inputs(case, device, memory_format)
            rivals[name] = convolutions.within(cases.bind(function, inputs, bound), settings)
    return tensors, right, rivals


def disturb(device):
    """Sets another stream to work, for some microseconds and from some time on."""
    stream, buffer = _other(device)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(random.randrange(100_000))
        buffer.mul_(1)


@functools.cache
def _other(device):
    return torch.cuda.Stream(device), torch.ones(2**23, device=device)


def verdict(call, right, dtype) -> tuple[str, float]:
    """Why what a call returns is not right, or nothing, and its error; waits for the device once."""
    bits = getattr(torch, f"int{8 * dtype.itemsize}")
    first, different = None, torch.zeros((), dtype=torch.int64, device=right.device)
    result = call()
    for run in range(RUNS):
        result.fill_(float("nan"))
        del result  # one that is allocated anew lies where the last one did
        if run % 2:
            disturb(right.device)
        result = call()
        first = result.clone() if first is None else first
        different += (result.view(bits) != first.view(bits)).any()
    off = first.double() - right
    scale = right.abs().max()
    relative, worst, different = torch.stack((off.norm() / right.norm(), off.abs().max() / scale, different)).tolist()
    if not (relative <= RELATIVE[dtype] and worst <= convolutions.TOLERANCE[dtype]):
        return f"wrong by {relative:.1e}, and by {worst:.1e} of the largest value at most", relative
    return f"wrong: other bits in {different:.0f} of {RUNS} runs" if different else "", relative


def measure(group, say) -> Measured:
    """Checks the candidates of a group and times those that are right, in turns with torch's own."""
    tensors, right, rivals = staged(group.case, DEVICE)
    verdicts, calls = {}, {}
    for candidate in group.candidates:
        say(candidate)
        try:
            call = running(group.case, candidate, tensors)
            verdicts[candidate] = verdict(call, right, tensors[4].dtype)
        except Exception as error:
            verdicts[candidate] = sentence(error), math.nan
            torch.cuda.synchronize()  # raises where the error has broken this process's GPU
        else:
            if not verdicts[candidate][0]:
                calls[candidate] = call
    say("timing")
    samples = clocks.by_events(calls | rivals, FIRST_ROUNDS, DEVICE)
    kept = {}
    for side in (calls, rivals):
        medians = {name: statistics.median(samples[name]) for name in side}
        kept |= {name: side[name] for name, median in medians.items() if median <= SLOW * min(medians.values())}
    return Measured(verdicts, samples | clocks.by_events(kept, ROUNDS, DEVICE))


def serve(connection, work, prepare):
    """Works off what comes through a connection: sends what each task is doing, and last what it returned."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prepare()
    while True:
        try:
            connection.send(("done", work(connection.recv(), lambda doing: connection.send(("doing", doing)))))
        except EOFError:
            return
        except Exception as error:
            connection.send(("died", sentence(error)))
            return


def supervised(work, tasks, count, how, deadline, prepare=tuple):
    """Yields (task, what work(task, say) returned), or (task, Died), from so many processes; ends at the deadline.

    A process that dies, or says nothing for too long, is replaced. tasks: a deque, to which some may be added.
    """
    method, patience = how
    context, idle, busy = multiprocessing.get_context(method), [], {}
    context.set_forkserver_preload(["torch", "triton", "fastelbo"])  # whose import takes seconds
    try:
        while (tasks or busy) and (now := time.monotonic()) < deadline:
            while tasks and len(busy) < count:
                task, (connection, process) = tasks.popleft(), idle.pop() if idle else (None, None)
                if process is None:
                    connection, other = context.Pipe()
                    process = context.Process(target=serve, args=(other, work, prepare), daemon=True)
                    process.start()
                    other.close()
                connection.send(task)
                busy[connection] = process, task, "beginning", now
            ready = multiprocessing.connection.wait(busy, min(1, deadline - now))
            for connection, (process, task, doing, since) in list(busy.items()):
                kind, value = "late", f"took longer than {patience} s"
                if connection in ready:
                    try:
                        kind, value = connection.recv()
                    except (EOFError, ConnectionError):
                        process.join(5)
                        kind, value = "died", f"its process ended with status {process.exitcode}"
                elif time.monotonic() - since < patience:
                    continue
                busy[connection] = process, task, value, time.monotonic()
                if kind != "doing":
                    del busy[connection]
                    if kind == "done":
                        idle.append((connection, process))
                    else:
                        process.kill()
                    yield task, value if kind == "done" else Died(doing, value)
    finally:
        for process in [process for _, process in idle] + [process for process, *_ in busy.values()]:
            process.kill()


# What is done, and said


@dataclass
class Tuning:
    """All that is known, whenever it ends."""

    candidates: dict  # a case's
    compiled: set  # (case, candidate)
    failed: dict  # why (case, candidate) cannot be compiled or breaks its process; of (case, None) why there is nothing
    measured: dict  # a case's

    def compile(self, device, deadline) -> None:
        """Of every backend, layer and pass first what is chosen today."""
        ranks, known = {}, set()
        for case, those in self.candidates.items():
            counts = dict.fromkeys(BACKENDS, 0)
            for one in those:
                kernel = case.layer._replace(n=0), case.pass_, one  # mostly the same one for any number of images
                ranks[case, one] = kernel in known, counts[one.backend]
                counts[one.backend] += 1
                known.add(kernel)
        self.compiled |= {task for task in ranks if task[1].tile is None}
        waiting = deque(sorted(ranks.keys() - self.compiled, key=ranks.get))
        count, prepare = len(os.sched_getaffinity(0)), functools.partial(begin, *device)
        for task, why in supervised(compile_one, waiting, count, COMPILE, deadline, prepare):
            if why:
                self.failed[task] = f"not compiled: {why.reason if isinstance(why, Died) else why}"
            else:
                self.compiled.add(task)
            progress(f"{len(self.compiled) + len(self.failed)} of {len(ranks)} candidates compiled", deadline)

    def measure(self, deadline) -> None:
        """Of all layers and passes what is chosen today, and then everything."""
        there = {case: [x for x in those if (case, x) in self.compiled] for case, those in self.candidates.items()}
        first = {case: {one.backend: one for one in reversed(those)}.values() for case, those in there.items()}
        groups = deque(Group(case, tuple(those)) for each in (first, there) for case, those in each.items())
        count = len(groups)
        for group, found in supervised(measure, groups, 1, MEASURE, deadline):
            case = group.case
            if not isinstance(found, Died):
                self.measured[case] = found
                self.failed.pop((case, None), None)
            elif found.doing in group.candidates:
                self.failed[case, found.doing] = f"wrong: broke its process: {found.reason}"
                bad, rest = (case, found.doing), [group, *groups]
                groups.clear()
                groups.extend(Group(c, tuple(one for one in those if (c, one) != bad)) for c, those in rest)
            elif case not in self.measured:
                self.failed[case, None] = f"wrong: nothing could be measured: {found.reason}"
            progress(f"{count - len(groups)} of {count} groups measured", deadline)

    def rows(self, case, chosen, common) -> list[Row]:
        """Of a case: its candidates, those that failed too, and torch's own."""
        layer, (verdicts, samples) = case.layer, self.measured.get(case, Measured({}, {}))
        medians = {name: 1e6 * statistics.median(seconds) for name, seconds in samples.items()}
        rivals = {name: us for name, us in medians.items() if isinstance(name, str)}
        failed = {one: (why, None) for (other, one), why in self.failed.items() if other == case}
        operations, found = 2 * layer.n * layer.size**2 * layer.c_in * layer.c_out * layer.live, []
        for name, (why, error) in (dict.fromkeys(rivals, ("rival", None)) | failed | verdicts).items():
            fields = {"runs": RUNS} if name in verdicts else {}
            if us := medians.get(name):
                fields |= {"rounds": len(samples[name]), "median_us": us, "min_us": 1e6 * min(samples[name])}
                fields |= {"tflops": 1e-6 * operations / us, "over_best_rival": min(rivals.values()) / us}
            fields |= {"verdict": why or "right", "relative_error": error, "chosen": "yes" if name == chosen else ""}
            fields |= {"case": layer.name, "shape": layer.shape, "dtype": case.dtype, "pass_": case.pass_}
            found.append(Row(**common, contestant=str(name or "all"), **fields))
        return found

    def left(self) -> dict:
        """A case's candidates of which nothing is known."""
        known = self.failed.keys() | {(case, one) for case, found in self.measured.items() for one in found.verdicts}
        left = {case: [x for x in those if (case, x) not in known] for case, those in self.candidates.items()}
        return {case: those for case, those in left.items() if those}


def progress(text, deadline):
    """A line that the next one replaces."""
    print(f"\r{text}, {max(0, deadline - time.monotonic()):.0f} s left   ", end="", file=sys.stderr, flush=True)


def report(found, left) -> None:
    """Prints rows, those of a case together, and what was not reached."""
    over = []
    print(f"\n{'layer':30} {'pass':8} {'best':40} {'us':>7} TFLOP/s  ratio | chosen today, us, ratio")
    for those in found:
        ours = [row for row in those if row.verdict == "right" and row.median_us]
        name = f"{those[0].case + ' ' + those[0].shape:30} {those[0].pass_:8}"
        if ours:
            best = min(ours, key=lambda row: row.median_us)
            today = [f"{row.contestant}, {row.median_us:.1f}, {row.over_best_rival:.2f}" for row in ours if row.chosen]
            over.append(best.over_best_rival)
            numbers = f"{best.median_us:7.1f} {best.tflops:7.1f} {best.over_best_rival:6.2f}"
            print(f"{name} {best.contestant:40} {numbers} | {(*today, 'not timed')[0]}")
        else:
            print(f"{name} none that is right")
        for row in those:
            if row.verdict not in ("right", "rival"):
                print(f"    {row.contestant}: {row.verdict}")
    for case, those in left.items():
        print(f"not reached: {case}: {', '.join(map(str, those))}")
    counts = ", ".join(f"at least {least} in {sum(ratio >= least for ratio in over)}" for least in (1.0, 1.3))
    print(f"the best rival takes this many times as long as the best candidate: {counts}, of {len(over)} rows")


def options_of(arguments):
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the candidates, of an H100 where there is no GPU")
    parser.add_argument("--layer", action="append", help="only layers of whose name and shape this is a part")
    parser.add_argument("--pass", dest="pass_", action="append", choices=PASSES)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="tma: Triton's with FASTELBO_CONV=tma")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--limit", type=float, default=240, metavar="SECONDS", help="for all of it; default: 240")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file that rows are appended to")
    return parser.parse_args(arguments)


def common() -> dict:
    """The fields of a Session."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]
    except OSError:
        driver = ""
    session = machine.session(DEVICE)
    found = {name: session[name] for name in ("torch", "triton", "commit")}
    found["timestamp"] = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    return found | {"gpu": session["machine"], "driver": driver}


def chosen(case, candidates, there):
    """What fastelbo takes by itself, of a case's candidates."""
    first, firsts = case.layer.of_data, {one.backend: one for one in reversed(candidates)}
    backend = fastelbo.backends.fastest(DEVICE, convolution=not first) if there else "cuda" if first else "triton"
    over_boxes = backend == "triton" and fastelbo.backends.CONVOLUTIONS == "tma"
    return (firsts.get("tma") if over_boxes else None) or firsts.get(backend)


def interrupt(*_):
    """Once: `timeout` sends a second signal to the whole group, in the middle of what is printed."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments=None) -> int:
    """Returns the exit status."""

    def refuse(why):
        print(f"tune_convolutions.py: {why}", file=sys.stderr)
        return 2

    options, began, there = options_of(arguments), time.monotonic(), torch.cuda.is_available()
    backends, device = options.backend or BACKENDS, ((9, 0), 132)
    if not options.list:
        if not there:
            return refuse("this machine has no GPU that torch can use")
        try:
            rows.columns_to_extend(options.output or Path(os.devnull), Row)
        except ValueError as error:
            return refuse(str(error))
    if there:
        device = torch.cuda.get_device_capability(), torch.cuda.get_device_properties(0).multi_processor_count
        needs = {name: "cuda" if name == "cuda" else "triton" for name in backends}
        backends = [name for name in backends if fastelbo.backends.why_not(needs[name], DEVICE) is None]
    begin(*device, compiling=False)
    every = (convolutions.Timed(at, options.dtype, pass_, "cuda") for at in convolutions.LAYERS for pass_ in PASSES)
    found = {
        case: [candidate for backend in backends for candidate in candidates_of(case, backend)]
        for case in every
        if cases.chosen(options.pass_, case.pass_) and not (case.pass_ == "d_input" and case.layer.of_data)
        if not options.layer or any(part in f"{case.layer.name} {case.layer.shape}" for part in options.layer)
    }
    found = {case: those for case, those in found.items() if those}
    if not found:
        return refuse("there is no candidate for such layers, passes and backends")
    today = {case: chosen(case, those, there) for case, those in found.items()}
    if options.list:
        for case, those in found.items():
            print(f"{case}:", *(f"    {one}{' (chosen today)' * (one == today[case])}" for one in those), sep="\n")
        print(f"{sum(map(len, found.values()))} candidates of {len(found)} layers and passes")
        return 0
    described = common()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, interrupt)
    tuning, status = Tuning(found, set(), {}, {}), 0
    try:
        tuning.compile(device, began + COMPILING * options.limit)
        tuning.measure(began + options.limit)
    except KeyboardInterrupt:
        print("\ninterrupted; what was found so far:", file=sys.stderr)
        status = 130
    found = [tuning.rows(case, today[case], described) for case in found]
    if options.output and any(found):
        rows.append(options.output, [row for those in found for row in those])
    report([those for those in found if those], tuning.left())
    print(f"all of it took {time.monotonic() - began:.0f} s")
    verdicts = {row.verdict for those in found for row in those}
    return 1 if any(why.startswith("wrong") for why in verdicts) else status or int("right" not in verdicts)


if __name__ == "__main__":
    sys.exit(main())
