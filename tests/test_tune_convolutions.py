"""tools/tune_convolutions.py without a GPU: what it lists, refuses, compiles and finds wrong, by the interpreter and by
models of the hardware and of clocks."""

import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
import time
import types
from collections import deque
from pathlib import Path

import convolutions
import fresh_python
import gluon_stand_in
import pytest
import test_masked_conv2d_tma
import torch
import torch.nn.functional as F  # noqa: N812

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU stands in for the GPU that is there")
TOOL = Path(__file__).parent.parent / "tools" / "tune_convolutions.py"
LAYER = convolutions.Layer(1, 16, 16, 3, 3, "B")
CASES = {pass_: convolutions.Timed(LAYER, "float32", pass_, "cuda") for pass_ in ("forward", "d_input", "d_weight")}


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where processes find its functions
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded():
    before = list(sys.path)
    yield module_of(TOOL)
    sys.path[:] = before
    del sys.modules[TOOL.stem]


@pytest.fixture
def tool(loaded, monkeypatch):
    """The tool, with a CPU in place of the GPU; a contestant's time is what `seconds` says of its name."""

    def by_events(calls, rounds, device):
        asked.append((list(calls), rounds))
        return {name: [loaded.seconds(name)] * rounds for name in calls}

    asked = loaded.asked = []
    loaded.seconds = lambda name: 1e-3
    monkeypatch.setattr(loaded, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(loaded.clocks, "by_events", by_events)
    loaded.disturbed = []
    monkeypatch.setattr(loaded, "disturb", loaded.disturbed.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loaded, "COMPILE", ("fork", 20))
    monkeypatch.setattr(loaded, "MEASURE", ("fork", 20))
    monkeypatch.setattr(convolutions, "LAYERS", [LAYER])
    for name in ("_capability", "_multiprocessors"):
        monkeypatch.setattr(loaded.masked_conv2d_tma, name, getattr(loaded.masked_conv2d_tma, name))
    loaded.begin((9, 0), 132, compiling=False)
    return loaded


def in_triton(tool):
    """Candidates that the interpreter can run, in few steps."""
    tiles = tool.masked_conv2d.Tiles
    return [tool.Candidate("triton", tiles(m, n, 256, False)) for m, n in ((16, 16), (32, 16))]


def measured(tool, case, candidates):
    said = []
    found = tool.measure(tool.Group(case, tuple(candidates)), said.append)
    assert said == [*candidates, "timing"]
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_that_are_right_are_timed_beside_the_rivals(tool, case, monkeypatch):
    monkeypatch.setattr(tool, "RUNS", 2)  # of the interpreter, which takes long
    right = [*in_triton(tool), tool.Candidate("cuda")]  # whose op runs in C++ here
    seconds = {right[0]: 1e-3, right[1]: 2.5e-3, right[2]: 2e-3, "crop": 4e-3, "full": 9e-3}
    tool.seconds = lambda name: seconds.get(name, 5e-3)
    found = measured(tool, case, right)
    assert set(found.verdicts) == set(right)
    assert all(why == "" and error < 1e-6 for why, error in found.verdicts.values())
    (first, rounds), (kept, more) = tool.asked
    assert (rounds, more) == (tool.FIRST_ROUNDS, tool.ROUNDS)
    assert {"eager", "full", "crop", "crop_sliced_benchmark", "full_benchmark_channels_last"} <= set(first)
    assert set(first) - set(kept) == {right[1], "full"}  # more than twice as slow as the best of its side
    assert len(found.samples[right[0]]) == more and len(found.samples[right[1]]) == rounds


def in_torch(tool, monkeypatch, spoil):
    """Has candidates run by plain torch; spoil(result, its elements, number of the run): of those but the first."""

    def running(case, candidate, tensors, *settings):
        x, weight, bias, _, result = tensors
        right, count = F.conv2d(x, weight, bias, padding=case.layer.k // 2), itertools.count(1)  # dead taps are 0

        def run():
            result.copy_(right)
            if candidate != in_triton(tool)[0]:
                spoil(result, result.permute(0, 2, 3, 1).view(-1), next(count))
            return result

        return run

    monkeypatch.setattr(tool, "running", running)


ONE_ULP = 1 + 2**-23
MISTAKES = {
    "all": (lambda y, elements, run: y.mul_(1.01), "wrong by 1.0e-02"),
    "one element": (lambda y, elements, run: elements[-1].add_(0.3), "of the largest value at most"),
    "nan": (lambda y, elements, run: elements[-1].fill_(math.nan), "wrong by nan"),
    "one run": (lambda y, elements, run: y.mul_(ONE_ULP if run == 17 else 1), "other bits in 1 of 50 runs"),
    "last runs": (lambda y, elements, run: elements[0].mul_(ONE_ULP if run > 49 else 1), "other bits in 2 of 50 runs"),
}


@pytest.mark.parametrize(("spoil", "why"), MISTAKES.values(), ids=MISTAKES)
def test_a_candidate_that_is_wrong_is_found_and_not_timed(tool, monkeypatch, spoil, why):
    in_torch(tool, monkeypatch, spoil)
    good, bad = in_triton(tool)
    found = measured(tool, CASES["forward"], (good, bad))
    assert found.verdicts[good][0] == ""
    assert found.verdicts[bad][0].startswith("wrong") and why in found.verdicts[bad][0]
    assert good in found.samples and bad not in found.samples
    assert len(tool.disturbed) == 2 * 25  # of fifty runs every second one


def test_other_work_is_on_another_stream(loaded, monkeypatch):
    entered, slept = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"another of {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    loaded.disturb(torch.device("cpu", 0))
    loaded.disturb(torch.device("cpu", 0))
    assert entered == ["another of cpu:0"] * 2 and len(slept) == 2 and max(slept) < 100_000


def work(task, say):
    """For other processes: what becomes of a task."""
    say(f"{task} begun")
    if task == "dies":
        os._exit(7)
    if task == "hangs":
        time.sleep(60)
    if task == "raises":
        raise RuntimeError("Triton Error [CUDA]:\nan illegal memory access was encountered\n")
    return f"{task} {os.getpid()}"


def test_what_kills_or_holds_its_process_costs_that_alone(tool):
    names = ["a", "dies", "b", "hangs", "c", "raises", "d"]
    found = dict(tool.supervised(work, deque(names), 2, ("fork", 0.5), time.monotonic() + 30))
    died = {name: value for name, value in found.items() if isinstance(value, tool.Died)}
    assert set(found) == set(names)
    assert died == {
        "dies": ("dies begun", "its process ended with status 7"),
        "hangs": ("hangs begun", "took longer than 0.5 s"),
        "raises": ("raises begun", "RuntimeError: an illegal memory access was encountered"),
    }
    assert all(found[name].startswith(f"{name} ") for name in names if name not in died)


def test_nothing_goes_on_beyond_the_deadline(tool):
    began = time.monotonic()
    found = dict(tool.supervised(work, deque(["a", "hangs", "b"]), 1, ("fork", 60), began + 0.5))
    assert list(found) == ["a"] and time.monotonic() - began < 5


@pytest.fixture
def on_a_gpu(tool, monkeypatch):
    """main(arguments) where torch sees a GPU, for two candidates of one layer's forward, all in this process."""
    candidates = in_triton(tool)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    monkeypatch.setattr(tool.fastelbo.backends, "why_not", lambda name, device: "no" if name == "cuda" else None)
    monkeypatch.setattr(tool.fastelbo.backends, "fastest", lambda device, convolution: "triton")
    monkeypatch.setattr(tool, "candidates_of", lambda case, backend: candidates if backend == "triton" else [])
    monkeypatch.setattr(tool, "compile_one", lambda task, say: "")
    monkeypatch.setattr(tool.machine, "session", lambda device: dict.fromkeys(("machine", "torch", "triton", "commit")))
    monkeypatch.setattr(tool.signal, "signal", lambda *_: None)

    def one_process(work, tasks, count, how, deadline, prepare=tuple):
        while tasks:
            task, doing = tasks.popleft(), []
            try:
                yield task, work(task, doing.append)
            except Exception as error:
                yield task, tool.Died(doing[-1], tool.sentence(error))

    monkeypatch.setattr(tool, "supervised", one_process)
    return lambda *arguments: tool.main(["--pass", "forward", "--dtype", "float32", *map(str, arguments)])


def table(path):
    with path.open(newline="") as file:
        return {row["contestant"]: row for row in csv.DictReader(file)}


def test_the_best_is_said_and_written(tool, on_a_gpu, monkeypatch, tmp_path, capsys):
    in_torch(tool, monkeypatch, lambda *_: None)
    today, best = in_triton(tool)
    seconds = {today: 3e-3, best: 2e-3, "crop_channels_last": 5e-3}
    tool.seconds = lambda name: seconds.get(name, 6e-3)
    assert on_a_gpu("--output", tmp_path / "rows.csv") == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("16-16 k3 B"))
    assert line.split()[5:] == [
        "triton", "Tiles(32,16,256,0,4,3)", "2000.0", "0.0", "2.50", "|",
        "triton", "Tiles(16,16,256,0,4,3),", "3000.0,", "1.67",
    ]  # fmt: skip
    assert "at least 1.0 in 1, at least 1.3 in 1, of 1 rows" in out and "not reached" not in out
    found = table(tmp_path / "rows.csv")
    row = found[str(best)]
    assert (row["verdict"], row["runs"], row["chosen"], row["pass"]) == ("right", "50", "", "forward")
    assert float(row["median_us"]) == 2000 and float(row["over_best_rival"]) == 2.5 and found[str(today)]["chosen"]
    assert float(row["tflops"]) == pytest.approx(2 * 9 * 16 * 16 * 5 / 2e-3 / 1e12, rel=1e-4)
    assert found["crop_channels_last"]["verdict"] == "rival"
    assert on_a_gpu("--output", tmp_path / "rows.csv") == 0  # appended
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + 2 * len(found)


def test_what_is_wrong_is_the_exit_status(tool, on_a_gpu, monkeypatch, tmp_path, capsys):
    in_torch(tool, monkeypatch, MISTAKES["one run"][0])
    assert on_a_gpu("--output", tmp_path / "rows.csv") == 1
    why = "wrong: other bits in 1 of 50 runs"
    assert f"    {in_triton(tool)[1]}: {why}\n" in capsys.readouterr().out
    row = table(tmp_path / "rows.csv")[str(in_triton(tool)[1])]
    assert (row["verdict"], row["median_us"]) == (why, "")


def test_what_breaks_the_gpu_is_left_out_from_then_on(tool, on_a_gpu, monkeypatch, tmp_path, capsys):
    def spoil(y, elements, run):
        raise RuntimeError("an illegal memory access was encountered")

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    in_torch(tool, monkeypatch, spoil)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert on_a_gpu() == 1
    out = capsys.readouterr().out
    good, bad = in_triton(tool)
    assert f"{good} " in out and f"{bad}: wrong: broke its process: RuntimeError: an illegal memory" in out
    assert [bad in names for names, _ in tool.asked] == [False] * 4 and "not reached" not in out


def test_what_is_not_compiled_or_not_reached_is_named(tool, on_a_gpu, monkeypatch, capsys):
    in_torch(tool, monkeypatch, lambda *_: None)
    good, bad = in_triton(tool)
    monkeypatch.setattr(tool, "compile_one", lambda task, say: "OutOfMemory: too large" if task[1] == bad else "")
    assert on_a_gpu() == 0
    out = capsys.readouterr().out
    assert f"{good} " in out and f"    {bad}: not compiled: OutOfMemory: too large\n" in out

    def interrupted(work, tasks, *rest):
        if work is tool.measure:
            raise KeyboardInterrupt
        yield from ((task, "") for task in [tasks[0]])

    monkeypatch.setattr(tool, "supervised", interrupted)
    assert on_a_gpu() == 130
    captured = capsys.readouterr()
    assert "interrupted; what was found so far:" in captured.err
    assert f"not reached: {CASES['forward']}: {good}, {bad}\n" in captured.out


def test_without_a_gpu_it_refuses_and_lists(tool, capsys, tmp_path, monkeypatch):
    assert tool.main([]) == 2
    captured = capsys.readouterr()
    assert captured == ("", "tune_convolutions.py: this machine has no GPU that torch can use\n")
    assert tool.main(["--list", "--layer", "none"]) == 2
    assert "there is no candidate for such layers" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    assert "Exit status: 0 all well; 1 some candidate computed something wrong" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "rows.csv").write_text("op,case\n")
    assert tool.main(["--output", str(tmp_path / "rows.csv")]) == 2
    assert "has other columns than this version writes" in capsys.readouterr().err


def test_candidates_begin_with_what_is_chosen(tool, capsys):
    """The choice of today is unchanged, and among them once; and a case that a kernel leaves to another has none."""
    for case in CASES.values():
        case = dataclasses.replace(case, layer=LAYER._replace(n=64, c_in=64, c_out=64, size=16), dtype="bfloat16")
        layer, of_weight = case.layer, case.pass_ == "d_weight"
        found = [one.tile for one in tool.candidates_of(case, "tma")]
        boxes = tool.masked_conv2d_tma.tiling
        chosen = boxes.weight_tile_for(64, 64, layer.live) if of_weight else boxes.tile_for(64, 64, 64 * 256, 1, 16)
        assert found[0] == chosen and len(set(found)) == len(found) > 10
        for dtype, size in (("float32", 16), ("bfloat16", 7)):
            left = tool.candidates_of(
                dataclasses.replace(case, dtype=dtype, layer=layer._replace(n=1, size=size)), "tma"
            )
            assert left == [] or (dtype, of_weight) == ("bfloat16", False)
        assert len(tool.candidates_of(case, "triton")) == 1  # the interpreter's
        assert tool.candidates_of(case, "cuda") == [("cuda", None)]
    assert tool.main(["--list", "--pass", "d_weight", "--backend", "triton", "--backend", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(lines), lines[0]] == [4, "16-16 k3 B-1x16x3x3-bfloat16-d_weight:"]
    assert lines[1].endswith(" (chosen today)") and lines[2:] == ["    cuda", "2 candidates of 1 layers and passes"]


COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import tune_convolutions as tool
tool.begin((9, 0), 132)
found = {}
for pass_, backend in (("d_input", "triton"), ("d_weight", "tma")):
    case = tool.convolutions.Timed(tool.convolutions.Layer(128, 16, 16, 8, 3, "B"), "bfloat16", pass_, "cuda")
    candidates = tool.candidates_of(case, backend)
    found[backend] = len(candidates), tool.compile_one((case, candidates[-1]), print)
    broken = candidates[0].tile._replace(**{"M" if backend == "triton" else "BM": 24})
    found[f"broken {backend}"] = tool.compile_one((case, tool.Candidate(backend, broken)), print)
print(json.dumps(found))
"""


def test_candidates_are_compiled_without_a_gpu_and_failures_named(tmp_path):
    """Into Triton's cache: the weight gradient's kernel and the sum of its shares, and the input gradient's."""
    done = fresh_python.run(COMPILE, TOOL.parent, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    found = json.loads(done.stdout)
    (some, why), (more, other) = found["triton"], found["tma"]
    assert (why, other) == ("", "") and min(some, more) > 10
    assert sorted(path.stem for path in tmp_path.rglob("*.cubin")) == ["add_shares", "convolution", "weight_shares"]
    assert found["broken triton"] == "ValueError: arange's range must be a power of 2"
    assert found["broken tma"].startswith("AssertionError")


@pytest.mark.parametrize("pass_", CASES)
def test_kernels_over_boxes_on_a_model_of_the_hardware(tool, monkeypatch, pass_):
    """Those that are asked for run, and are right."""
    boxes, layer = tool.masked_conv2d_tma, LAYER._replace(size=8)
    case = convolutions.Timed(layer, "float64", pass_, "cuda")
    with gluon_stand_in.standing_in(boxes, monkeypatch) as run:

        def launch(kernel, programs, arguments):
            ran.append(kernel.__name__)
            if "d_weight" in arguments:
                kernel[(programs,)](**arguments)
            else:
                run(kernel, (programs,), arguments)

        ran = []
        test_masked_conv2d_tma.on_a_gpu(boxes, monkeypatch, launch)
        monkeypatch.setattr(boxes, "can_take", lambda image: image.stride(1) == 1)
        monkeypatch.setattr(tool, "RUNS", 2)
        monkeypatch.setitem(tool.RELATIVE, torch.float64, 1e-6)
        monkeypatch.setitem(convolutions.TOLERANCE, torch.float64, 1e-6)
        tiles = boxes.tiling
        tile = tiles.WeightTile(64, 64, 1) if pass_ == "d_weight" else tiles.Tile(64, 64, STAGES=2, SWAP=True)
        found = measured(tool, case, [tool.Candidate("tma", tile)])
        assert found.verdicts == {("tma", tile): ("", pytest.approx(0, abs=1e-7))}, found.verdicts
        assert set(ran) == ({"weight_shares", "add_shares"} if pass_ == "d_weight" else {"convolve"})
