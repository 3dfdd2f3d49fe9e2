"""tools/tune_gaussians.py without a GPU: its variants on a CPU, thread by thread, what it finds wrong and says."""

import csv
import importlib
import itertools
import math
import pickle
import re
import sys
from pathlib import Path

import cases
import pytest
import test_cuda_on_cpu as on_cpu
import torch
from ops import GAUSSIAN
from torch.autograd import grad

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU stands in for the GPU that is there")
ROOT = Path(__file__).parent.parent
SOURCES = [*sorted(ROOT.glob("csrc/cuda/gaussian_*.cu")), ROOT / "csrc/cuda/host.cu"]
COMMON = [ROOT / "csrc/common" / f"{name}.cpp" for name in ("checks", "host")]
VARIANTS = (
    "threads-128", "threads-64", "long", "warp-rows", "wide", "held-8192", "occupancy", "two-groups",
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    before = list(sys.path)
    sys.path.append(str(ROOT / "tools"))
    yield importlib.import_module("tune_gaussians")
    sys.path[:] = before


@pytest.fixture
def tool(loaded, monkeypatch):
    """The tool, with a CPU in place of the GPU; a variant takes as long as `seconds` says."""
    loaded.seconds = {}
    monkeypatch.setattr(loaded, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(loaded.tune_convolutions, "disturb", lambda device: None)
    clock = lambda calls, rounds, device: {name: [loaded.seconds.get(name, 2e-3)] * rounds for name in calls}  # noqa: E731
    monkeypatch.setattr(loaded.clocks, "CLOCKS", {"events": clock, "graph": clock})
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_pass_the_ops_tests_on_a_cpu(tool, name, tmp_path):
    library = on_cpu.build(tmp_path, [*SOURCES, *COMMON], *tool.flags_of(name))
    on_cpu.run(library, [*dict.fromkeys(entry.file for entry in GAUSSIAN.values()), "rows"], on_cpu.KERNELS)


@pytest.mark.slow
def test_several_variants_in_one_process(tool, tmp_path, monkeypatch):
    """Each in its namespace, and found right by what a GPU's are found right by."""
    for name in ("today", "two-groups"):
        (tmp_path / name).mkdir()
        flags = [*tool.flags_of(name, "t.all_kernels=false"), f"-DFASTELBO_NAMESPACE={tool.namespace_of(name)}"]
        tool.load(name, on_cpu.build(tmp_path / name, [*SOURCES, *COMMON], *flags))
    monkeypatch.setattr(tool, "RUNS", 3)
    for case in tool.CASES:
        case = case._replace(shape=(5, case.shape[1]))
        found = tool.measure(tool.Group(case, ("today", "two-groups")), lambda doing: None)
        assert found.verdicts == {"today": "", "two-groups": ""}, case
        arguments = tool.arguments_of(case, "cpu")
        ours = cases.flat(tool.op_of(case, tool.namespace_of("today"))(*arguments))
        for result, right in zip(ours, cases.flat(tool.op_of(case)(*arguments)), strict=True):
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if case.dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(result, right, **tolerance)
    with pytest.raises(RuntimeError, match="kernels of contiguous float32 and bfloat16 without a clamp alone"):
        tool.op_of(tool.CASES[0], tool.namespace_of("today"))(*arguments_in_double(tool, tool.CASES[0]))


def arguments_in_double(tool, case):
    arguments = tool.arguments_of(case._replace(shape=(2, 4)), "cpu")
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def test_variants_change_numbers_that_are_there_and_the_library_takes_none_of_them(tool):
    text = (ROOT / "csrc/cuda/tuning.cuh").read_text()
    values = dict(re.findall(r"(\w+) = (\w+)[,;]", text.partition("struct Tuning")[2].partition("};")[0]))
    assert len(values) == 12 and tuple(tool.VARIANTS) == ("today", *VARIANTS)
    for name, (_, tuning, include) in tool.VARIANTS.items():
        changed = dict(re.findall(r"t\.(\w+)=(\w+)", tuning))
        assert changed.keys() <= values.keys() and not changed.items() & values.items(), name
        assert bool(changed or include) == (name != "today")
        assert not include or (ROOT / include).exists()
    macros = {"FASTELBO_TUNING", "FASTELBO_ACCESS", "FASTELBO_NAMESPACE"}
    assert set(re.findall(r"#define (\w+)", text)) == macros
    paths = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*.*") if path.name != "tuning.cuh")]
    rest = "".join(path.read_text() for path in paths).replace("tools/older_glibc.py", "")
    assert not re.search(r"#define FASTELBO_(TUNING|ACCESS|NAMESPACE)|-DFASTELBO|tools/", rest)


def test_rules_give_every_variant_its_own_flags_and_folder(tool, tmp_path):
    nvcc = tmp_path / "nv cc"
    nvcc.write_text("#!/bin/sh\necho Cuda release 13.0\n")
    nvcc.chmod(0o755)
    lines = tool.rules_of(["today", "long", "two-groups"], str(nvcc), ["90", "100"]).splitlines()
    assert "gpus = -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_100,code=sm_100" in lines
    assert f"nvcc = '{nvcc}'" in lines and f"nvcc_version = Cuda release 13.0, torch {torch.__version__}" in lines
    folder = tool.FOLDER
    flags = lines[lines.index(f"build {folder}/long/gaussian_kl.o: cuda csrc/cuda/gaussian_kl.cu") + 1]
    tuning = "'-DFASTELBO_TUNING=t.most_steps=8; t.most_summed_steps=16; t.all_kernels=false'"
    assert flags == f"  nvcc = $nvcc {tuning} -DFASTELBO_NAMESPACE=fastelbo_tuned_long"
    assert sum("two_groups.cuh" in line for line in lines) == len(SOURCES)
    links = [line.split() for line in lines if ": link_cuda" in line]
    assert [len(link) - 3 for link in links] == 3 * [len(SOURCES) + len(COMMON)]
    assert {path for link in links for path in link if "/common/" in path} == set()


@pytest.mark.parametrize("number", range(20))
def test_raw_ops_are_given_what_the_functions_hand_on(tool, number):
    case = pickle.loads(pickle.dumps(tool.CASES[number]._replace(shape=(6, 20))))  # as it comes to a process
    inputs = cases.make_inputs(case.benchmark, case.shape, case.dtype, "cpu")
    results = case.benchmark.entry.function(*inputs, **({"seed": 7} if case.benchmark.entry.drawn else {}))
    results = results if isinstance(results, tuple) else (results,)
    found = cases.flat(tool.op_of(case)(*tool.arguments_of(case, "cpu")))
    if case.pass_ == "forward":
        assert all(torch.equal(x, y) for x, y in zip(found, results, strict=True))
        return
    of_sample, of_term = cases.upstream_like((inputs[0].detach(), torch.empty(6)))
    upstream = {"gaussian_rsample": [of_sample], "gaussian_rsample_kl": [of_sample, of_term]}
    leaves = [x for x in inputs if x.requires_grad]
    right = grad(results, leaves, upstream.get(case.op, [of_term]))
    right = right[1:] if case.op == "gaussian_rsample" else right  # d_mean is d_z
    found = [x for x in found if x.numel()]
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


def spoiled(spoil):
    """Calls whose results are of 8 x 4 elements and 8 sums: what today's returns, and what spoil(...) makes of it."""
    count = itertools.count(1)
    made = lambda: (torch.arange(32.0).view(8, 4), torch.arange(1.0, 9))  # noqa: E731

    def run():
        elements, sums = made()
        spoil(elements, sums, next(count))
        return elements, sums

    return run, made()


ONE_ULP = 1 + 2**-23
MISTAKES = {
    "nothing": (lambda x, sums, run: None, ""),
    "last bit of a sum": (lambda x, sums, run: sums[3].mul_(ONE_ULP), ""),
    "more of a sum": (lambda x, sums, run: sums[2].mul_(1 + 2**-21), "wrong: other bits than today's"),
    "last bit of an element": (lambda x, sums, run: x[3, 1].mul_(ONE_ULP), "wrong: other bits than today's"),
    "nan": (lambda x, sums, run: sums[-1].fill_(math.nan), "wrong: other bits than today's"),
    "sign of zero": (lambda x, sums, run: x[0, 0].neg_(), "wrong: other bits than today's"),
    "one run": (lambda x, sums, run: x[3].mul_(ONE_ULP if run == 17 else 1), "wrong: other bits in 1 of 50 runs"),
    "last run": (lambda x, sums, run: sums[3].mul_(ONE_ULP if run > 50 else 1), "wrong: other bits in 1 of 50 runs"),
}


@pytest.mark.parametrize(("spoil", "why"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_wrong_is_found(tool, spoil, why):
    call, today = spoiled(spoil)
    assert tool.verdict(call, today, elements=32) == why


@pytest.fixture
def on_a_gpu(tool, monkeypatch):
    """main(arguments) where torch sees a GPU, for two rows; `takes(case, variant)` says what a measurement finds."""
    monkeypatch.setattr(tool, "CASES", [case for case in tool.CASES if str(case).startswith("gaussian_kl 16384x1024")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tool, "build", lambda *_: True)
    monkeypatch.setattr(tool, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(tool, "library_of", lambda name: ROOT)
    monkeypatch.setattr(tool.machine_code, "cuobjdump", lambda: "cuobjdump")
    kernels = {kernel: (40, 500, False) for case in tool.CASES for kernel in case.kernels}
    spilling = {kernel: (32, 600, kernel[1] == "backward") for kernel in kernels}
    monkeypatch.setattr(tool, "resources", lambda name, gpu: spilling if name == "occupancy" else kernels)
    described = dict.fromkeys(("gpu", "driver", "torch", "triton", "commit", "timestamp"), "")
    monkeypatch.setattr(tool.tune_convolutions, "common", lambda: described)
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
    tool.takes = lambda case, variant: 2e-4
    tool.asked = []

    def measure(group, say):
        samples, verdicts = {}, {}
        tool.asked.append(group)
        for name in group.variants:
            say(name)
            found = tool.takes(group.case, name)
            verdicts[name] = found if isinstance(found, str) else ""
            if not verdicts[name]:
                samples[name] = [found] * 3
        return tool.Measured(verdicts, samples)

    def one_process(work, tasks, count, how, deadline, prepare):
        while tasks:
            task, doing = tasks.popleft(), []
            try:
                yield task, work(task, doing.append)
            except RuntimeError as error:
                yield task, tool.tune_convolutions.Died(doing[-1], str(error))

    monkeypatch.setattr(tool, "measure", measure)
    monkeypatch.setattr(tool.tune_convolutions, "supervised", one_process)
    return lambda *arguments: tool.main(["--variant", "long", "--variant", "occupancy", *map(str, arguments)])


def line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start)).removeprefix(start).split()


FORWARD, BACKWARD = (f"gaussian_kl 16384x1024 float32 {pass_}" for pass_ in ("forward", "backward"))


def test_the_best_of_each_row_is_said_and_written(tool, on_a_gpu, tmp_path, capsys):
    seconds = {"today": 2e-4, "long": 1.6e-4, "occupancy": 4e-4}
    tool.takes = lambda case, name: seconds[name] if case.pass_ == "forward" else 1e-4
    assert on_a_gpu("--output", tmp_path / "rows.csv") == 0
    out = capsys.readouterr().out
    assert line(out, "gaussian_kl forward Packed float32 absent") == ["40/500", "=", "32/600"]
    assert line(out, "gaussian_kl backward Flat float32 absent") == ["40/500", "=", "32/600", "!"]
    assert line(out, FORWARD) == ["200.00", "160.00", "400.00", "long", "1.250"]
    assert line(out, BACKWARD) == ["100.00", "100.00", "-", "today", "1.000"]  # what spills is not timed
    assert "long: best in 1 of 2 rows, in the geometric mean 1.118 times as fast as today\n" in out
    with (tmp_path / "rows.csv").open(newline="") as file:
        found = {(row["variant"], row["pass"]): row for row in csv.DictReader(file)}
    assert len(found) == 5 and {row["verdict"] for row in found.values()} == {"right"}
    row = found["long", "forward"]
    assert [row[name] for name in ("op", "shape", "median_us", "over_today")] == [
        "gaussian_kl", "16384x1024", "160", "1.25",
    ]  # fmt: skip


def test_what_is_wrong_is_not_timed_and_the_exit_status(tool, on_a_gpu, capsys):
    tool.takes = lambda case, name: "wrong: other bits in 1 of 50 runs" if name == "long" else 2e-4
    assert on_a_gpu() == 1
    out = capsys.readouterr().out
    assert line(out, FORWARD)[:3] == ["200.00", "-", "200.00"]
    assert "    long: wrong: other bits in 1 of 50 runs\n" in out


def test_what_breaks_its_process_is_left_out_from_then_on(tool, on_a_gpu, capsys):
    def takes(case, name):
        if name == "long":
            raise RuntimeError("an illegal memory access was encountered")
        return 2e-4

    tool.takes = takes
    assert on_a_gpu() == 1
    out = capsys.readouterr().out
    assert line(out, FORWARD) == ["200.00", "-", "200.00", "today", "1.000"]
    assert f"long: wrong: broke its process in {FORWARD}: an illegal memory access" in out
    assert ["long" in group.variants for group in tool.asked] == [True, False, False] and "not reached" not in out


def test_without_todays_nothing_is_compared(tool, on_a_gpu, capsys):
    tool.takes = lambda case, name: "wrong: other bits in 3 of 50 runs" if name == "today" else 2e-4
    assert on_a_gpu() == 1
    out = capsys.readouterr().out
    assert line(out, FORWARD) == ["-", "-", "-"] and out.count("    today: wrong: other bits in 3 of 50 runs\n") == 2


def test_libraries_that_cannot_be_loaded_are_tried_once(tool, on_a_gpu, monkeypatch, capsys):
    def supervised(work, tasks, *rest):
        while tasks:
            yield tasks.popleft(), tool.tune_convolutions.Died("beginning", "its process ended with status 1")

    monkeypatch.setattr(tool.tune_convolutions, "supervised", supervised)
    assert on_a_gpu() == 1
    out = capsys.readouterr().out
    assert (
        "    today: wrong: beginning: its process ended with status 1\n" in out and f"not reached: {BACKWARD}\n" in out
    )


def test_an_interrupt_leaves_what_is_found(tool, on_a_gpu, capsys):
    def takes(case, name):
        if case.pass_ == "backward":
            raise KeyboardInterrupt
        return 2e-4

    tool.takes = takes
    assert on_a_gpu() == 130
    captured = capsys.readouterr()
    assert "interrupted; what was found so far:" in captured.err
    assert line(captured.out, FORWARD)[0] == "200.00" and f"not reached: {BACKWARD}\n" in captured.out


def test_without_a_gpu_it_refuses_and_lists(tool, capsys, monkeypatch, tmp_path):
    assert tool.main([]) == 2
    assert capsys.readouterr() == ("", "tune_gaussians.py: this machine has no GPU that torch can use\n")
    assert tool.main(["--list", "--row", "rsample_kl 65281x257"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "9 variants, 2 rows" and "gaussian_rsample_kl 65281x257 float32 backward" in lines
    assert [line.partition(":")[0] for line in lines if re.match(r"[\w-]+: ", line)] == list(tool.VARIANTS)
    assert tool.main(["--list", "--row", "none"]) == 2
    assert capsys.readouterr().err == "tune_gaussians.py: there is no such row\n"
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert "Exit status: 0 all well; 1 some variant computed something wrong" in capsys.readouterr().out
    monkeypatch.setattr(tool, "find_nvcc", lambda: None)
    assert tool.main(["--build"]) == 2
    assert "there is no nvcc to compile variants with" in capsys.readouterr().err
    monkeypatch.setattr(tool, "library_of", lambda name: tmp_path / name)
    assert tool.main(["--build", "--skip-build", "--variant", "long"]) == 2
    assert capsys.readouterr().err.endswith("has no library of today, long\n")


def test_what_kernels_take_is_read_off_their_machine_code(tool, monkeypatch):
    beginning = "_ZN8fastelbo6device"
    names = {
        f"{beginning}27gaussian_rsample_bwd_kernelINS0_9TwoGroupsINS0_4FlatILNS_6FormatE0ELb0EEEEELb1EEEvNS0_1AIT_EE": (
            {"REG": 72, "STACK": 0, "LOCAL": 0},
            [(0, "LDG.E.128 R4, desc[UR4][R2.64]"), (16, "EXIT"), (32, "NOP")],
        ),
        f"{beginning}22gaussian_kl_fwd_kernelINS0_6PackedILNS_6FormatE2ELb0EEELb1ELNS0_5PriorE1EEEvNS0_1AIT_EE": (
            {"REG": 64, "STACK": 8, "LOCAL": 0},
            [(0, "STL [R1], R7"), (16, "EXIT")],
        ),
        f"{beginning}12sum_partialsIfEEvNS0_8PartialsIT_EE": ({"REG": 20, "STACK": 0, "LOCAL": 0}, []),
    }
    monkeypatch.setattr(tool.machine_code, "kernels", lambda library, architecture: names)
    assert tool.resources("two-groups", "90") == {
        ("gaussian_rsample", "backward", "Flat", "float32", ""): (72, 2, False),
        ("gaussian_kl", "forward", "Packed", "bfloat16", "given"): (64, 2, True),
    }
    keys = {kernel for case in tool.CASES for kernel in case.kernels}
    assert len(keys) == 40 and set(tool.resources("two-groups", "90")) <= keys
