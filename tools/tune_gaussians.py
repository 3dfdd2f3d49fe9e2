"""Times other ways to compile the Gaussian CUDA kernels, beside today's, on this machine's GPU.

    python tools/tune_gaussians.py --output FILE
    python tools/tune_gaussians.py --build
    python tools/tune_gaussians.py --list

A variant is csrc/cuda's sources with other numbers (csrc/cuda/tuning.cuh), in a library and a namespace of its own. All
are compiled first, or come from a machine that has nvcc. A variant is right where it spills no register, where every
element has today's bits, and every sum but for its last one, and where fifty runs on poisoned results, half of them
while another stream is busy, have the same bits. Only then it is timed, by events with cold caches, tiny calls in CUDA
graphs, all variants in turns. A table says for each row what each takes, and which is best.

Exit status: 0 all well; 1 some variant computed something wrong, or could not be compiled; 2 nothing was done: no GPU,
no libraries, or wrong arguments; 130 interrupted, which prints what was found so far.
"""

import argparse
import functools
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastelbo.scale import as_scale, numbers

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT / name) for name in ("benchmarks", "tests", "tools")]
import cases  # noqa: E402
import clocks  # noqa: E402
import rows  # noqa: E402
import test_cuda_build as machine_code  # noqa: E402
import tune_convolutions  # noqa: E402

DEVICE = tune_convolutions.DEVICE
FOLDER = Path("build", "tuning")  # of what is compiled, below ROOT
LIBRARIES = FOLDER / "libraries"  # all that another machine needs
RUNS, ROUNDS = 50, 30
# How the process starts that measures, and how many seconds it may say nothing.
MEASURE = "spawn", 60


class Variant(NamedTuple):
    """What is compiled otherwise than today, and why that may be faster."""

    why: str
    tuning: str = ""  # C++, as csrc/cuda/tuning.cuh takes it
    include: str = ""  # a header of tools/, ahead of the sources


TODAY = "today"
VARIANTS = {
    TODAY: Variant("the library's own numbers"),
    "threads-128": Variant(
        "blocks of half as many threads: fewer wait at a barrier, and a block makes room for the next one sooner",
        "t.threads_log2=7; t.packed_f32=8; t.packed_half=4; t.flat_f32=6; t.flat_half=4; t.enough_blocks=1024",
    ),
    "threads-64": Variant(
        "blocks of two warps: of Triton's tiles the smallest were fastest where there is no noise",
        "t.threads_log2=6; t.packed_f32=16; t.packed_half=8; t.flat_f32=12; t.flat_half=8; t.enough_blocks=2048;"
        " t.held_terms=2048",
    ),
    "long": Variant(
        "twice the groups a thread: it works out its place and Philox keys half as often",
        "t.most_steps=8; t.most_summed_steps=16",
    ),
    "warp-rows": Variant(
        "a thread takes eight groups of a row before others share it: one warp adds up 1024 columns, by shuffles alone",
        "t.groups=8",
    ),
    "wide": Variant(
        "four times the threads before each takes more groups: a medium tensor on all of a large GPU",
        "t.enough_threads=262144; t.enough_blocks=2048",
    ),
    "held-8192": Variant(
        "twice the terms of short rows in shared memory: 257 columns of bfloat16 are 257 vectors a block of 256 today",
        "t.held_terms=8192",
    ),
    "occupancy": Variant(
        "fewer registers, more warps: at least 6 blocks a multiprocessor of float32, 4 of bfloat16; odd rows 5 and 3",
        "t.packed_f32=6; t.flat_f32=5; t.packed_half=4; t.flat_half=3",
    ),
    "two-groups": Variant(
        "two groups of a float32 row at once, as many elements as of bfloat16: loads and draws overlap",
        include="tools/two_groups.cuh",
    ),
}


class Case(NamedTuple):
    """What is timed: one pass of an op on one shape."""

    op: str
    kind: str  # of inputs, as the benchmarks name it
    shape: tuple[int, int]
    dtype: str
    pass_: str
    timing: str  # as rows.Row has it

    def __str__(self):
        prior = (self.kind,) if self.with_prior else ()
        return " ".join((self.op, *prior, cases.named(self.shape), self.dtype, self.pass_))

    @property
    def benchmark(self) -> cases.Case:
        """What makes its inputs."""
        return next(case for case in cases.CASES if (case.op, case.name) == (self.op, self.kind))

    @property
    def with_prior(self) -> bool:
        """Whether the divergence is from a learned prior."""
        return self.kind == "learned prior"

    @property
    def kernels(self) -> list:
        """The keys of `resources` for the kernels that it may launch."""
        prior = ("given" if self.with_prior else "absent") if "kl" in self.op else ""
        return [(self.op, self.pass_, access, self.dtype, prior) for access in ("Packed", "Flat")]


class Group(NamedTuple):
    """What is measured together."""

    case: Case
    variants: tuple[str, ...]


class Measured(NamedTuple):
    """Of a group: for each variant why it is not right, or "", and all seconds of those that are."""

    verdicts: dict
    samples: dict


@dataclass(frozen=True)
class Row(tune_convolutions.Session):
    """One variant of one case."""

    op: str
    case: str
    shape: str
    dtype: str
    pass_: str
    timing: str
    variant: str
    verdict: str  # "right", or why not
    runs: int = RUNS
    rounds: int = 0
    median_us: float | None = None
    min_us: float | None = None
    over_today: float | None = None  # how many times as long today's takes


# What there is to time: the most telling first, for what comes last is lost where time runs out.
# Of float32 and bfloat16, 64 MB each where large; an odd number of elements, so that 257 columns are never aligned.
SHAPES = {
    "aligned": ({"float32": (16384, 1024), "bfloat16": (32768, 1024)}, "events"),
    "257": ({"float32": (65281, 257), "bfloat16": (130561, 257)}, "events"),
    "medium": (dict.fromkeys(cases.DTYPES, (4096, 256)), "events"),
    "tiny": (dict.fromkeys(cases.DTYPES, (128, 10)), "graph"),
}
CASES = [
    Case(benchmark.op, benchmark.name, shapes[dtype], dtype, pass_, timing)
    for shapes, timing in SHAPES.values()
    for benchmark in cases.CASES
    if benchmark.lines and "0" not in benchmark.inputs
    for dtype in shapes
    for pass_ in ("forward", "backward")
]


def op_of(case, namespace="fastelbo"):
    """The raw op of a pass."""
    name = f"{case.op}_{'fwd' if case.pass_ == 'forward' else 'bwd'}"
    return getattr(getattr(torch.ops, namespace), name).kernel


def arguments_of(case, device) -> list:
    """What fastelbo's function hands on to the op of a pass."""
    inputs = [tensor.detach() for tensor in cases.make_inputs(case.benchmark, case.shape, case.dtype, device)]
    forward = op_of(case._replace(pass_="forward"))._schema.arguments
    given = dict(zip((argument.name for argument in forward), inputs, strict=False))
    upstream, scale = cases.upstream_like((inputs[0], torch.empty(len(inputs[0]), device=device))), as_scale("logvar")
    values = {
        "mean_p": None, "s_p": None, "scale": numbers(scale), "scale_p": numbers(scale if "mean_p" in given else None),
        "event_ndim": 1, "mask": None, "balance": None, "prior_grad": "mean_p" in given, "x_grad": False,
        "seed": torch.tensor([7]), "noise": None, "noise_offset": 0, "num_samples": None, "temperature": 1.0,
        "out_dtype": inputs[0].dtype, "negative": False, "log_weight": 1.0, "constant": 0.5 * math.log(2 * math.pi),
        "d_z": upstream[0], "d_kl": upstream[1], "d_out": upstream[1],
    } | given  # fmt: skip
    return [values[argument.name] for argument in op_of(case)._schema.arguments]


# How variants are compiled


def namespace_of(name) -> str:
    """Of torch's ops, where a variant has its own."""
    return f"fastelbo_tuned_{name.replace('-', '_')}"


def flags_of(name, *more) -> list[str]:
    """What a compiler takes beside what csrc/rules.ninja says; more: further assignments to numbers."""
    _, tuning, include = VARIANTS[name]
    flags = [f"-DFASTELBO_TUNING={'; '.join(filter(None, (tuning, *more)))}"]
    return flags + (["-include", str(ROOT / include)] if include else [])


def library_of(name) -> Path:
    """A variant's."""
    return ROOT / LIBRARIES / f"{name}.so"


def rules_of(names, nvcc, gpus) -> str:
    """Ninja's."""
    release = subprocess.check_output([nvcc, "--version"], text=True).splitlines()[-1]
    gencode = " ".join(f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in gpus)
    lines = [f"folder = {FOLDER}", "glibc =", "cxx = c++", f"nvcc = {shlex.quote(nvcc)}", f"gpus = {gencode}"]
    # another torch has other headers, on which no object depends
    lines += [f"nvcc_version = {release}, torch {torch.__version__}", "include csrc/rules.ninja"]
    shared = {f"{FOLDER}/{name}.o": f"csrc/common/{name}.cpp" for name in ("checks", "host")}
    lines += [f"build {out}: cuda {source}" for out, source in shared.items()]
    sources = [*sorted((ROOT / "csrc/cuda").glob("gaussian_*.cu")), ROOT / "csrc/cuda/host.cu"]
    for name in names:
        flags = [*flags_of(name, "t.all_kernels=false"), f"-DFASTELBO_NAMESPACE={namespace_of(name)}"]
        objects = {f"{FOLDER}/{name}/{source.stem}.o": source.relative_to(ROOT) for source in sources}
        for out, source in objects.items():
            lines += [f"build {out}: cuda {source}", f"  nvcc = $nvcc {shlex.join(flags)}"]
        # a folder of its own, because the rule writes there
        lines += [f"build {LIBRARIES}/{name}.so: link_cuda {' '.join([*objects, *shared])}"]
        lines += [f"  folder = {FOLDER}/{name}", f"default {LIBRARIES}/{name}.so"]
    return "\n".join([*lines, ""])


def build(names, nvcc, gpus) -> bool:
    """Compiles what has changed; whether all is well."""
    ninja = shutil.which("ninja", path=f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}") or "ninja"
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    torch_link = ROOT / FOLDER / "torch"
    torch_link.unlink(missing_ok=True)
    torch_link.symlink_to(Path(torch.__file__).parent)
    (ROOT / FOLDER / "build.ninja").write_text(rules_of(names, nvcc, gpus))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    return subprocess.run([ninja, "-f", FOLDER / "build.ninja", "-j", jobs], cwd=ROOT).returncode == 0


def find_nvcc() -> str | None:
    """The compiler: CUDA_HOME's, or else that on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ.get('PATH', '')}")


def resources(name, gpu) -> dict:
    """Of a variant's kernels by op, pass, access, dtype and prior: registers, instructions, whether it spills."""
    found = {}
    for kernel, (usage, instructions) in machine_code.kernels(library_of(name), f"sm_{gpu}").items():
        parts = re.search(r"\d(gaussian_\w+)_(fwd|bwd)_kernel.*(Packed|Flat)ILNS_6FormatE(\d)", kernel)
        if parts:
            op, way, access, dtype = parts.groups()
            prior = re.search(r"PriorE(\d)", kernel)
            prior = ("absent", "given")[int(prior[1])] if prior else ""
            key = (
                op,
                {"fwd": "forward", "bwd": "backward"}[way],
                access,
                {"0": "float32", "2": "bfloat16"}[dtype],
                prior,
            )
            local = any(re.search(r"\b(LDL|STL)\b", text) for _, text in instructions)
            count = sum(not text.startswith("NOP") for _, text in instructions)
            spills = local or usage["STACK"] > 0 or usage["LOCAL"] > 0
            found[key] = usage["REG"], count, spills
    return found


def line_of(name, cells) -> str:
    """Of a table."""
    return f"{name:56}" + "".join(f" {cell:>11}" for cell in cells)


def report_resources(found) -> None:
    """Prints registers/instructions of every kernel, where they are other than today's."""
    names = [name for name in found if name != TODAY]
    print(line_of("registers/instructions", [TODAY, *names]))
    for kernel, (registers, count, _) in sorted(found[TODAY].items()):
        cells = [f"{registers}/{count}"]
        for name in names:
            other, size, spills = found[name][kernel]
            cells.append("=" if (other, size) == (registers, count) else f"{other}/{size}{' !' * spills}")
        print(line_of(" ".join(filter(None, kernel)), cells))
    print("=: as today's; !: spills registers, and is not timed")


# What a process does that measures


def load(name, path) -> None:
    """Has a variant's ops in a namespace of their own."""
    namespace = namespace_of(name)
    _LIBRARIES.append(torch.library.Library(namespace, "DEF"))
    for op in sorted({op_of(case).name() for case in CASES}):
        schema = str(torch._C._get_schema(*op.split(".")))
        _LIBRARIES[-1].define(schema.partition("::")[2])
    torch.ops.load_library(str(path))


_LIBRARIES: list = []  # ops are gone with them


def begin(names) -> None:
    """Loads what is to be measured."""
    for name in names:
        load(name, library_of(name))
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured in a graph


def bits(tensor) -> torch.Tensor:
    """As integers."""
    return tensor.view(getattr(torch, f"int{8 * tensor.dtype.itemsize}"))


def verdict(call, today, elements) -> str:
    """Why what a call returns is not right, or nothing; waits for the device once. today: what today's does; elements:
    of a tensor that is no sums."""
    results = cases.flat(call())
    first = [result.clone() for result in results]
    different = torch.zeros((), dtype=torch.int64, device=first[-1].device)
    for run in range(RUNS):
        for result in results:
            result.fill_(math.nan)
        del result, results  # what is allocated anew lies where the last ones did
        if run % 2:
            tune_convolutions.disturb(different.device)
        results = cases.flat(call())
        equal = [(bits(x) == bits(y)).all() for x, y in zip(results, first, strict=True)]
        different += ~torch.stack(equal).all()
    off = []
    for found, right in zip(first, today, strict=True):
        if found.shape != right.shape or found.dtype != right.dtype:
            return f"wrong: {tuple(found.shape)} of {found.dtype}"
        steps = (bits(found).long() - bits(right).long()).abs()
        if steps.numel():
            off.append(steps.max() - int(steps.numel() < elements))  # a sum's last bit follows who adds up what
    worst, runs = torch.stack([torch.stack(off).max(), different]).tolist()
    if worst > 0:
        return "wrong: other bits than today's"
    return f"wrong: other bits in {runs} of {RUNS} runs" if runs else ""


def measure(group, say) -> Measured:
    """Checks the variants of a group and times those that are right."""
    case, names = group
    say(TODAY)
    arguments = arguments_of(case, DEVICE)
    calls = {name: functools.partial(op_of(case, namespace_of(name)), *arguments) for name in names}
    today = [result.clone() for result in cases.flat(calls[TODAY]())]
    verdicts, right = {}, {}
    for name, call in calls.items():
        say(name)
        verdicts[name] = verdict(call, today, math.prod(case.shape))
        if not verdicts[name]:
            right[name] = call
    say("timing")
    return Measured(verdicts, clocks.CLOCKS[case.timing](right, ROUNDS, DEVICE))


# What is done, and said


def measured(groups, deadline, found, broken) -> None:
    """Fills `found`, by case, and `broken`, why a variant breaks its process: it is left out from then on."""
    names = tuple(dict.fromkeys(name for group in groups for name in group.variants))
    waiting, count = deque(groups), len(groups)
    prepare = functools.partial(begin, names)
    for group, value in tune_convolutions.supervised(measure, waiting, 1, MEASURE, deadline, prepare):
        if not isinstance(value, tune_convolutions.Died):
            found[group.case] = value
        elif value.doing in names and value.doing != TODAY:
            broken[value.doing] = f"wrong: broke its process in {group.case}: {value.reason}"
            rest = [group, *waiting]
            waiting.clear()
            waiting.extend(g._replace(variants=tuple(x for x in g.variants if x not in broken)) for g in rest)
        else:
            found[group.case] = Measured({TODAY: f"wrong: {value.doing}: {value.reason}"}, {})
            if value.doing == "beginning":  # what is to be measured cannot be loaded
                waiting.clear()
        tune_convolutions.progress(f"{count - len(waiting)} of {count} rows measured", deadline)


def rows_of(case, value, described) -> list[Row]:
    """Of what was measured together."""
    fields = {"op": case.op, "case": case.kind, "shape": cases.named(case.shape)}
    fields |= {"dtype": case.dtype, "pass_": case.pass_, "timing": case.timing}
    medians = {name: 1e6 * statistics.median(seconds) for name, seconds in value.samples.items()}
    made = []
    for name, why in value.verdicts.items():
        times = {}
        if name in medians and TODAY in medians:
            samples = value.samples[name]
            times = {"rounds": len(samples), "median_us": medians[name], "min_us": 1e6 * min(samples)}
            times["over_today"] = medians[TODAY] / medians[name]
        made.append(Row(**described, **fields, variant=name, verdict=why or "right", **times))
    return made


def report(found, names) -> None:
    """Prints the times of each row, and how each variant did in all of them."""
    print("\n" + line_of("microseconds", [*names, "best"]) + ", times as fast as today")
    gains = {name: [] for name in names}
    for case, those in found.items():
        timed = {row.variant: row for row in those if row.median_us}
        cells = [f"{timed[name].median_us:.2f}" if name in timed else "-" for name in names]
        if timed:
            best = min(timed.values(), key=lambda row: row.median_us)
            cells.append(f"{best.variant} {best.over_today:.3f}")
            for name, row in timed.items():
                gains[name].append((row.over_today, row is best))
        print(line_of(str(case), cells))
        for row in those:
            if row.verdict.startswith("wrong"):
                print(f"    {row.variant}: {row.verdict}")
    for name, each in gains.items():
        if each:
            mean, best = statistics.geometric_mean(gain for gain, _ in each), sum(first for _, first in each)
            print(
                f"{name}: best in {best} of {len(each)} rows, in the geometric mean {mean:.3f} times as fast as today"
            )


def options_of(arguments):
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the variants and the rows, and do nothing")
    parser.add_argument("--build", action="store_true", help="compile, print what kernels take of a GPU, and stop")
    parser.add_argument("--skip-build", action="store_true", help=f"take what is in {LIBRARIES}, from any machine")
    parser.add_argument("--variant", action="append", choices=[name for name in VARIANTS if name != TODAY])
    parser.add_argument("--row", action="append", metavar="TEXT", help="only rows of whose name this is a part")
    parser.add_argument("--limit", type=float, default=150, metavar="SECONDS", help="of measuring; default: 150")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a CSV file that rows are appended to")
    return parser.parse_args(arguments)


def gpus_of(there) -> list[str]:
    """To compile for: those of TORCH_CUDA_ARCH_LIST, else this machine's, else an H100's."""
    listed = re.findall(r"(\d+)\.(\w+)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    own = [tuple(map(str, torch.cuda.get_device_capability()))] if there else [("9", "0")]
    return [major + minor for major, minor in listed or own]


def main(arguments=None) -> int:
    """Returns the exit status."""

    def refuse(why):
        print(f"tune_gaussians.py: {why}", file=sys.stderr)
        return 2

    options, there = options_of(arguments), torch.cuda.is_available()
    names = [TODAY, *(options.variant or [name for name in VARIANTS if name != TODAY])]
    chosen = [case for case in CASES if not options.row or any(text in str(case) for text in options.row)]
    if not chosen:
        return refuse("there is no such row")
    if options.list:
        for name in names:
            why, *settings = VARIANTS[name]
            print(f"{name}: {why}", *(f"    {text}" for text in settings if text), sep="\n")
        print(*chosen, f"{len(names)} variants, {len(chosen)} rows", sep="\n")
        return 0
    if not there and not options.build:
        return refuse("this machine has no GPU that torch can use")
    try:
        rows.columns_to_extend(options.output or Path(os.devnull), Row)
    except ValueError as error:
        return refuse(str(error))
    gpus, nvcc = gpus_of(there), find_nvcc()
    if not options.skip_build and not nvcc:
        return refuse("there is no nvcc to compile variants with; --skip-build takes what another machine compiled")
    if not options.skip_build and not build(names, nvcc, gpus):
        print("tune_gaussians.py: ninja failed, as it says above", file=sys.stderr)
        return 1
    if absent := [name for name in names if not library_of(name).exists()]:
        return refuse(f"{LIBRARIES} has no library of {', '.join(absent)}")
    taken = {}
    if machine_code.cuobjdump():
        taken = {name: resources(name, gpus[-1]) for name in names}
        report_resources(taken)
    else:
        print("no cuobjdump, neither Triton's nor CUDA's: who spills registers is not known")
    if options.build:
        return 0

    spills = {(name, kernel) for name, kernels in taken.items() for kernel, (*_, local) in kernels.items() if local}
    groups = [
        Group(case, tuple(name for name in names if not any((name, kernel) in spills for kernel in case.kernels)))
        for case in chosen
    ]
    began, described, found, broken, status = time.monotonic(), tune_convolutions.common(), {}, {}, 0
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, tune_convolutions.interrupt)
    try:
        measured(groups, began + options.limit, found, broken)
    except KeyboardInterrupt:
        print("\ninterrupted; what was found so far:", file=sys.stderr)
        status = 130
    made = {case: rows_of(case, found[case], described) for case in chosen if case in found}
    if options.output and made:
        rows.append(options.output, [row for those in made.values() for row in those])
    report(made, names)
    for case in chosen:
        if case not in made:
            print(f"not reached: {case}")
    for name, why in broken.items():
        print(f"{name}: {why}")
    print(f"measuring took {time.monotonic() - began:.0f} s")
    verdicts = {row.verdict for those in made.values() for row in those} | set(broken.values())
    return 1 if any(why.startswith("wrong") for why in verdicts) else status or int("right" not in verdicts)


if __name__ == "__main__":
    sys.exit(main())
