"""The benchmarks' own tools, as far as a machine without a GPU can tell: gpu.sh, options, rows, report and plot."""

import csv
import dataclasses
import functools
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
STORED = BENCHMARKS / "results" / "cpu.csv"


def run(*command, cwd=ROOT, **environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def tool(name, *arguments):
    return run(sys.executable, BENCHMARKS / name, *arguments)


def benchmarks(*arguments, **environment):
    return run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/ on the path, as its own programs have it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def results(tmp_path):
    """A folder of results that holds something."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cuda.csv").write_text("what was measured before\n")
    return folder


# gpu.sh


def assert_refused(done, sentence, folder, before):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("gpu.sh: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert contents(folder) == before


def test_gpu_script_explains_itself():
    done = run("bash", BENCHMARKS / "gpu.sh", "--help")
    assert done.returncode == 0
    for option in ("--quick", "--skip-build", "--skip-tests", "--skip-benchmarks", "--wheel", "--out", "Exit status"):
        assert option in done.stdout


def test_gpu_script_without_a_gpu(results, tmp_path):
    """From any folder, and where the folder of results does not exist yet."""
    before = contents(results)
    for out in (results, tmp_path / "none"):
        done = run("bash", BENCHMARKS / "gpu.sh", "--out", out, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
        assert_refused(done, "no GPU", results, before)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments", [["--fast"], ["--out"], ["--wheel", "none.whl"]], ids=str)
def test_gpu_script_with_wrong_arguments(arguments, results):
    done = run("bash", BENCHMARKS / "gpu.sh", *arguments, CUDA_VISIBLE_DEVICES="")
    assert_refused(done, arguments[-1], results, contents(results))


@pytest.fixture
def pretended_gpu(tmp_path):
    """A torch that finds a GPU with so much memory free."""

    def make(gib):
        text = f"""
class cuda:
    is_available = staticmethod(lambda: True)
    mem_get_info = staticmethod(lambda: ({gib} * 2**30, 80 * 2**30))
"""
        (tmp_path / "torch.py").write_text(text)
        return {"PYTHONPATH": str(tmp_path)}

    return make


def test_gpu_script_with_too_little_memory(pretended_gpu, results):
    done = run("bash", BENCHMARKS / "gpu.sh", "--out", results, **pretended_gpu(3))
    assert_refused(done, "3.0 GiB of 80.0 GiB free", results, contents(results))


def test_gpu_script_without_nvcc(pretended_gpu, results, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    environment = {**pretended_gpu(40), "PATH": str(tools), "CUDA_HOME": ""}
    done = run("bash", BENCHMARKS / "gpu.sh", "--out", results, **environment)
    assert_refused(done, "no nvcc", results, contents(results))


# Collection


def test_gpu_cases_are_collected_without_a_gpu():
    done = run(sys.executable, "-m", "pytest", "benchmarks", "--device", "cuda", "--collect-only", "-q")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "-8x16-float32-forward-graph",
        "-65536x1024-bfloat16-backward-events",
        "-671x100000-",
        "test_memory",
    ):
        assert expected in done.stdout


def test_timing_on_a_gpu_needs_one(tmp_path):
    arguments = ("benchmarks", "--device", "cuda", "--results", tmp_path / "none", "-q")
    done = run(sys.executable, "-m", "pytest", *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "--device cuda needs a GPU" in done.stdout
    assert not (tmp_path / "none").exists()


def test_every_size_says_what_it_times(modules):
    import cases

    for device in ("cpu", "cuda"):
        timed = cases.timed(device)
        assert len(set(map(str, timed))) == len(timed)
        assert {one.case.op for one in timed} == {case.op for case in cases.CASES}
        quick = cases.timed(device, quick=True)
        assert quick and all(one.shape[0] * one.shape[1] <= 2**20 for one in quick)
    shapes = {one.shape for one in cases.timed("cuda", ["12x34"], ["gaussian_kl"])}
    assert shapes == {(12, 34)}


def test_verdict_of_tests_that_ran_before(modules, tmp_path):
    """What pytest --junitxml writes decides whether an op may be timed."""
    import machine

    bodies = {
        "right": "def test_a(): pass",
        "wrong": "def test_a(): pass\ndef test_b(): assert False",
        "broken": "import pytest\n@pytest.fixture\ndef f(): 1 / 0\ndef test_a(): pass\ndef test_b(f): pass",
        "skipped": "import pytest\n@pytest.mark.skip\ndef test_a(): pass",
    }
    tests, verdict = tmp_path / "tests", tmp_path / "verdict.xml"
    tests.mkdir()
    for op, body in bodies.items():
        (tests / f"test_{op}.py").write_text(body)
    absent = machine.recorded_failure("right", verdict)
    assert absent == f"{verdict} does not exist: the tests were not run to their end"
    options = ("--import-mode=importlib", "-q", "-p", "no:cacheprovider", "--junitxml", verdict, "tests")
    run(sys.executable, "-m", "pytest", *options, cwd=tmp_path)
    fails = f"1 of its 2 tests fail in {verdict}, first test_b"
    none = f"none of its tests ran in {verdict}"
    expected = {"right": "", "wrong": fails, "broken": fails, "skipped": none, "unknown": none}
    assert {op: machine.recorded_failure(op, verdict) for op in expected} == expected


# Rows


def make_rows(rows, cases):
    """A row of every GPU case, with figures that are made up."""
    made = []
    for one in cases.timed("cuda"):
        shape = f"{one.shape[0]}x{one.shape[1]}"
        ratios = {f"over_{name}": 3.0 for name in one.rivals if name != "copy"}
        for contestant, time in (("triton", 2.0), ("cuda", 1.0), ("copy", 0.5)):
            made.append(
                rows.Row(
                    machine="A GPU that is not there",
                    threads=1,
                    isa="",
                    torch="2.0",
                    fastelbo="0",
                    python="3",
                    commit="made-up",
                    verified="yes",
                    timestamp="2026-01-01T00:00:00Z",
                    op=one.case.op,
                    case=one.case.name,
                    pass_=one.pass_,
                    contestant=contestant,
                    shape=shape,
                    dtype=one.dtype,
                    rounds=1,
                    **{f"{name}_us": time for name in ("min", "p20", "median", "p80")},
                    bytes=1,
                    fraction_of_copy=0.5 / time,
                    **(ratios if contestant != "copy" else {}),
                    timing=one.timing,
                    cuda="13.0",
                    triton="3.6.0",
                )
            )
    return made


def test_rows_come_back(modules, tmp_path):
    import cases
    import rows

    made, path = make_rows(rows, cases), tmp_path / "cuda.csv"
    rows.append(path, made)
    assert rows.read(path) == made
    rows.append(path, made[:1])
    assert len(path.read_text().splitlines()) == 1 + len(made) + 1


def test_files_with_fewer_columns(modules, tmp_path):
    """They are read, and take rows that have nothing in the columns they lack; no other."""
    import cases
    import rows

    path = tmp_path / "cpu.csv"
    shutil.copy(STORED, path)
    before = path.read_text()
    stored = rows.read(path)
    assert stored and all(row.timing == "host" and not row.on_gpu for row in stored)
    rows.append(path, stored[:2])
    assert path.read_text().startswith(before)
    assert rows.read(path) == rows.read(STORED)
    with pytest.raises(ValueError, match="has other columns"):
        rows.append(path, make_rows(rows, cases)[:1])
    assert rows.read(path) == rows.read(STORED)


# What is made of them


def test_report_of_stored_rows():
    done = tool("report.py", STORED)
    assert done.returncode == 0, done.stderr
    for expected in ("gaussian_rsample_kl", "over_eager >= 8: NOT MET", "commit"):
        assert expected in done.stdout
    goals = tool("report.py", "--goals", STORED)
    assert goals.returncode == 0 and "0/1 NOT MET" in goals.stdout


def test_report_and_plot_of_gpu_rows(modules, tmp_path):
    import cases
    import rows

    path = tmp_path / "cuda.csv"
    rows.append(path, make_rows(rows, cases))
    done = tool("report.py", "--goals", path)
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split()[:3]): line for line in done.stdout.splitlines()}
    assert "NOT MET" in lines["fraction_of_copy", ">=", "0.9"]  # a half
    assert "NOT MET" not in lines["over_compile", ">=", "1.5"]  # three
    assert done.stdout.startswith("A GPU that is not there, CUDA 13.0, Triton 3.6.0; torch 2.0")
    assert "in a graph" in tool("report.py", path).stdout
    done = tool("plot.py", path, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "speed_cuda.png").read_bytes().startswith(b"\x89PNG")


FIGURES = [f"{name}_cpu.png" for name in ("convolutions", "dropins", "memory", "sampling", "speed")]


def test_one_command_draws_all_stored_rows(tmp_path):
    done = tool("plot.py", "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    made = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in made] == FIGURES
    for path in (*made, *(ROOT / "docs" / "figures" / name for name in FIGURES)):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 150_000, path


def lines_of(name):
    with (BENCHMARKS / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def drawn(axis):
    """The points of a figure, by the label of their lane, or its number right of another figure with the same lanes."""
    labels = [text.get_text() for text in axis.get_yticklabels()]
    found = {}
    for line in axis.get_lines():
        if line.get_marker() not in ("", "None") and len(line.get_xdata()) == 1:
            lane = round(line.get_ydata()[0])
            found.setdefault(labels[lane] if labels else lane, []).append(line.get_xdata()[0])
    return {label: sorted(values) for label, values in found.items()}


def text_of(figure):
    return " ".join(text.get_text() for text in (figure._suptitle, *figure.texts))


def test_figure_of_drop_ins_shows_the_rows(modules):
    import plot_rivals
    import rows

    stored = lines_of("dropins_cpu.csv")
    figure = plot_rivals.dropins(rows.stored([BENCHMARKS / "results" / "dropins_cpu.csv"]))
    expected = [float(b["min_us"]) / float(a["min_us"]) for a, b in zip(stored[::2], stored[1::2], strict=True)]
    assert {line["contestant"] for line in stored[::2]} == {"cpu"}
    (axis,) = figure.axes
    points = drawn(axis)
    assert [values[0] for values in points.values()] == pytest.approx(expected)
    assert points["pythae: sample_gauss, kl  [100, 16]"] == pytest.approx([234.79 / 401.97])
    for part in (stored[0]["machine"], stored[0]["torch"], stored[0]["commit"], "2 threads"):
        assert part in text_of(figure)
    assert any(list(line.get_xdata()) == [1, 1] for line in axis.get_lines()), "no line at 1x"


def test_figure_of_images_shows_the_rows(modules):
    import plot_rivals
    import rows

    figure = plot_rivals.sampling(rows.stored([BENCHMARKS / "results" / "sampling_cpu.csv"]))
    times = {
        (line["shape"].split("x")[0], line["contestant"]): float(line["min_us"])
        for line in lines_of("sampling_cpu.csv")
    }
    expected = [
        sorted(times[n, rival] / times[n, "cpu"] for rival in ("naive", "reference", "eager_cache"))
        for n in ("1", "16", "64")
    ]
    assert list(drawn(figure.axes[0]).values()) == [pytest.approx(values) for values in expected]


def test_figure_of_convolutions_shows_the_rows(modules):
    import plot_rivals
    import rows

    figure = plot_rivals.convolutions(rows.stored([BENCHMARKS / "results" / "conv_cpu.csv"]))
    stored = lines_of("conv_cpu.csv")
    for axis, pass_ in zip(figure.axes, ("forward", "forward_backward"), strict=True):
        layers = {}
        for line in stored:
            if line["pass"] == pass_:
                layers.setdefault((line["case"], line["shape"]), {})[line["contestant"]] = float(line["min_us"])
        expected = []
        for times in layers.values():
            theirs = [min(t for name, t in times.items() if name.startswith(r)) for r in ("eager", "crop", "compile")]
            expected.append(sorted(t / times[ours] for t in theirs for ours in ("cpu", "cpu_channels_last")))
        assert list(drawn(axis).values()) == [pytest.approx(values) for values in expected]


def test_figure_of_memory_shows_the_rows(modules):
    import plot_rivals
    import rows

    path = BENCHMARKS / "results" / "memory_cpu.csv"
    figure = plot_rivals.memory(rows.stored([path], rows.MemoryRow))
    for axis, dtype in zip(figure.axes, ("float32", "bfloat16"), strict=True):
        counts = [int(line["saved_bytes"]) / (512 * 256) for line in lines_of(path.name) if line["dtype"] == dtype]
        assert sorted(itertools.chain(*drawn(axis).values())) == pytest.approx(sorted(counts))
    assert drawn(figure.axes[0])["KL, learned prior"] == [0, 4, 16, 24]


def test_figure_of_ops_shows_the_rows(modules):
    import plot_speed
    import rows

    figure = plot_speed.draw(rows.stored([STORED]))
    commit = max(lines_of("cpu.csv"), key=lambda line: line["timestamp"])["commit"]
    newest = {}
    for line in lines_of("cpu.csv"):
        which = line["commit"], line["contestant"], line["pass"], line["case"] == "normals"
        if which == (commit, "cpu", "forward", False):
            newest[line["op"], line["case"], line["shape"], line["dtype"]] = float(line["over_compile"])
    axis = next(axis for axis in figure.get_axes() if axis.get_title() == "torch.compile")
    assert sorted(itertools.chain(*drawn(axis).values())) == pytest.approx(sorted(newest.values()))


@pytest.mark.parametrize("name", ["report.py", "plot.py"])
def test_nothing_to_show(name, tmp_path):
    empty = tmp_path / "cpu.csv"
    empty.write_text(STORED.read_text().splitlines()[0] + "\n")
    for path, sentence in ((empty, "no rows in"), (tmp_path / "none.csv", "none.csv")):
        arguments = ("--output", tmp_path / "figures") if name == "plot.py" else ()
        done = tool(name, path, *arguments)
        assert done.returncode == 1
        assert sentence in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "figures").exists()
    assert tool(name, "--help").returncode == 0


# Drop-ins


def test_an_interrupted_run_keeps_the_cases_before(modules, tmp_path):
    import rows

    plugin = """
def pytest_runtest_setup(item):
    if "line by line" in item.name:
        raise KeyboardInterrupt
"""
    (tmp_path / "interrupt.py").write_text(plugin)
    options = ("--op", "compat.pythae", "--rounds", "2", "--unverified", "--results", tmp_path, "-p", "interrupt")
    done = benchmarks("benchmarks/test_dropins.py", *options, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "compat.pythae sample_and_kl" in done.stdout and "UNVERIFIED" in done.stdout
    found = rows.read(tmp_path / "dropins_cpu.csv")
    assert [row.contestant for row in found] == ["cpu", "eager"]
    ours, theirs = found
    assert ours.over_eager == pytest.approx(theirs.min_us / ours.min_us, rel=1e-3) and theirs.over_eager is None
    assert (ours.op, ours.shape, ours.pass_, ours.verified) == ("compat.pythae", "100x16", "forward_backward", "no")
    # two inputs, z and kl; in the backward the same, and two gradients
    assert ours.bytes == 4 * (2 * (2 * 1600 + 1600 + 100) + 2 * 1600)


def test_every_drop_in_agrees_with_the_original(modules):
    """All but Pyro's, which changes what torch.distributions does in this process."""
    import dropins

    for drop_in in dropins.DROP_INS:
        if drop_in.op != "compat.pyro":
            dropins.torch.manual_seed(0)
            dropins.check(drop_in, drop_in.inputs())
    ops = {drop_in.op for drop_in in dropins.DROP_INS}
    assert {f"compat.{project}" for project in dropins.fastelbo.compat.PROJECTS} < ops


def mistaken(part):
    """Pythae's lines with one thing wrong."""
    import dropins

    def lines(mu, log_var):
        z, kl = dropins.sample_and_kl(mu, log_var)
        return {
            "value": (z, 1.001 * kl),
            "nan": (z, kl / 0),
            "gradient": (z, kl.detach() + kl - kl.detach() + (mu - mu.detach()).sum(dim=-1)),
            "noise": ((1 + 1e-3) * z, kl),
            "shape": (z, kl[:, None]),
            "missing": z,
        }[part]

    return lines


@pytest.mark.parametrize("part", ["value", "nan", "gradient", "noise", "shape", "missing"])
def test_a_drop_in_that_computes_something_else_is_not_timed(part, modules):
    import dropins

    right = next(drop_in for drop_in in dropins.DROP_INS if drop_in.case == "sample_and_kl")
    dropins.prepare(right)
    with pytest.raises(AssertionError, match=r"^compat\.pythae sample_and_kl: .*output"):
        dropins.prepare(dataclasses.replace(right, theirs=mistaken(part)))


def test_a_convolution_that_computes_something_else_is_not_timed(modules, monkeypatch):
    import convolutions
    import torch

    right, layer = convolutions.contestants, convolutions.Layer(2, 3, 4, 5, 3, "B", "a test")
    timed = convolutions.Timed(layer, "float32", "forward_backward")
    arguments = timed, torch.device("cpu"), ["cpu"], ("eager", "crop")
    calls = convolutions.wanted_contestants(*arguments)
    assert list(calls)[:2] == ["cpu", "cpu_channels_last"] and {"eager", "crop", "crop_sliced"} < set(calls)
    assert set(convolutions.wanted_contestants(*arguments[:3], ["crop"])) == {n for n in calls if "eager" not in n}

    def wrong(*arguments):
        found = right(*arguments)
        function, memory_format = found["crop"]
        return found | {"crop": (lambda *inputs: 1.01 * function(*inputs), memory_format)}

    monkeypatch.setattr(convolutions, "contestants", wrong)
    with pytest.raises(AssertionError, match="crop computes something else"):
        convolutions.wanted_contestants(*arguments)


def test_an_eager_cache_that_computes_something_else_is_not_timed(modules, monkeypatch):
    import sampling

    class Wrong(sampling.EagerCache):
        def __init__(self, model):
            super().__init__(model)
            self.taps = [1.01 * taps for taps in self.taps]

    assert list(sampling.contestants(1, ["naive"])) == ["cpu", "naive"]
    monkeypatch.setattr(sampling, "EagerCache", Wrong)
    with pytest.raises(AssertionError, match="not close"):
        sampling.contestants(1, ["naive"])


@pytest.mark.parametrize(
    ("file", "op"), [("dropins", "compat.pythae"), ("sampling", "sampling"), ("convolutions", "masked_conv2d")]
)
def test_what_fails_its_tests_is_not_timed(file, op, tmp_path):
    verdict = tmp_path / "verdict.xml"
    verdict.write_text("<testsuites/>")
    options = ("--op", op, "--quick", "--verdict", verdict, "--results", tmp_path / "none")
    done = benchmarks(f"benchmarks/test_{file}.py", *options)
    assert done.returncode == 1 and "none of its tests ran" in done.stdout and "passed" not in done.stdout
    assert not (tmp_path / "none").exists()


# Options, and a run against stored rows


def test_bad_options_say_so(modules):
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", BENCHMARKS / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    good = {"device": "cpu", "op": [], "rival": [], "dtype": [], "shape": [], "rounds": None, "threads": None}
    good |= {"fail_slower": None, "compare": [], "verdict": None, "no_save": False, "results": BENCHMARKS / "results"}
    assert conftest.mistaken(types.SimpleNamespace(**good)) == ""
    compared = {"compare": [STORED], "fail_slower": 1.1}
    for bad, sentence in (
        ({"op": ["gaussian_lk"]}, "--op gaussian_lk is none of compat.bayesian, "),
        ({"rival": ["jax"]}, "--rival jax is none of eager, "),
        ({"dtype": ["int8"]}, "--dtype int8 is none of float32, "),
        ({"device": "tpu"}, "--device tpu is none of cpu, cuda"),
        ({"shape": ["8x"]}, "--shape 8x is neither one of tiny, medium, large nor a shape"),
        ({"rounds": -1}, "--rounds must be at least 1, not -1"),
        ({"threads": 0}, "--threads must be at least 1, not 0"),
        ({"fail_slower": 1.1}, "--fail-slower needs --compare"),
        (compared | {"fail_slower": -1.0}, "--fail-slower must be a positive ratio, not -1"),
        (compared | {"rounds": 2}, "--fail-slower needs 3 --rounds or more"),
        ({"verdict": Path("none.xml")}, "--verdict: none.xml: no such file"),
        ({"verdict": STORED}, f"--verdict: {STORED} is no XML file"),
        ({"results": STORED}, f"--results {STORED}: {STORED} is no folder that can be written to"),
    ):
        assert conftest.mistaken(types.SimpleNamespace(**good | bad)).startswith(sentence)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--op", "gaussian_lk"), "--op gaussian_lk is none of"),
        (("--compare", "none.csv"), "--compare: none.csv: no such file or directory"),
        (
            ("--compare", STORED.with_name("memory_cpu.csv")),
            "memory_cpu.csv holds no rows of times: it has no column bytes",
        ),
    ],
    ids=["op", "missing", "kind"],
)
def test_bad_options_end_pytest(arguments, sentence, tmp_path):
    done = benchmarks("benchmarks", *arguments, "--results", tmp_path / "none")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert sentence in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "none").exists()


def test_corrupt_files_are_refused(modules, tmp_path):
    import rows

    header, first, second, *_ = STORED.read_text().splitlines()
    path = tmp_path / "cpu.csv"
    for text, sentence in (
        (f"{header}\n{first}\n{second[:40]}\n", f"{path}, line 3: fewer cells than columns"),
        (f"{header}\n{first},1\n", f"{path}, line 2: more cells than columns"),
        (f"{header}\n{first.replace('326.62', 'fast')}\n", f"{path}, line 2: min_us is 'fast', which is no number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as refused:
            rows.read(path)
        assert str(refused.value) == sentence
    done = tool("report.py", path)
    assert done.returncode == 1 and done.stderr == f"{sentence}\n"


def test_one_sample_has_quantiles(modules):
    import rows

    assert set(rows.times([2.0]).values()) == {2e6}
    assert rows.times([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {
        "min_us": 1e6,
        "p20_us": 2e6,
        "median_us": 3.5e6,
        "p80_us": 5e6,
    }


def test_changes_against_stored_rows(modules):
    import cases
    import compare
    import rows

    first = next(row for row in make_rows(rows, cases) if row.contestant == "cuda")
    change = functools.partial(dataclasses.replace, first, rounds=5)

    def row(p20, p80, **fields):
        return change(p20_us=p20, median_us=(p20 + p80) / 2, p80_us=p80, **fields)

    def rival(median):
        return change(contestant="eager", median_us=median)

    now = row(10, 14)
    for then, verdict in (
        (row(7, 9), "slower"),
        (row(7, 10), ""),
        (row(15, 17), "faster"),
        (row(14, 17), ""),
        (row(7, 9, rounds=2), "too few samples"),
    ):
        (found,) = compare.changes([then], [now])
        assert found.verdict == verdict and found.ratio == pytest.approx(12 / then.median_us) and found.rivals is None
        assert len(compare.slower([found], 1.4)) == (verdict == "slower")
        assert not compare.slower([found], 1.6)
    (found,) = compare.changes([row(7, 9), rival(2.0)], [now, rival(3.0)])
    assert found.rivals == 1.5
    # the newest of the same machine, however new those of others are
    stored = [
        row(1, 2, timestamp="2026-01-03T00:00:00Z", machine="another"),
        row(3, 4, timestamp="2026-01-02T00:00:00Z", torch="1.9"),
        row(5, 6, timestamp="2026-01-01T00:00:00Z"),
    ]
    (found,) = compare.changes(stored, [now])
    assert found.then is stored[1] and "torch was 1.9" in compare.table([found])
    (found,) = compare.changes(stored[:1], [now])
    assert "NOT LIKE BEFORE in 1 of 1 cases: machine was another" in compare.table([found])
    assert compare.changes([change(shape="1x1")], [now]) == []


@pytest.mark.parametrize(("factor", "verdict", "code"), [(1e-3, "slower", 1), (1e3, "faster", 0)])
def test_a_run_is_held_against_a_file(factor, verdict, code, modules, tmp_path):
    import rows

    path = tmp_path / "cpu.csv"
    stored = [row for row in rows.read(STORED) if row.op == "gaussian_kl" and row.shape == "8x16"]
    times = ("min_us", "p20_us", "median_us", "p80_us")
    rows.append(path, [dataclasses.replace(row, **{t: factor * getattr(row, t) for t in times}) for row in stored])
    before = path.read_bytes()
    case = (
        "--op",
        "gaussian_kl",
        "--shape",
        "8x16",
        "--dtype",
        "float32",
        "--rival",
        "eager",
        "-k",
        "prior-8x16-float32-forward-",
    )
    options = ("--quick", "--unverified", "--results", tmp_path, "--compare", path, "--fail-slower", "1.5")
    done = benchmarks("benchmarks/test_speed.py", *case, *options)
    assert done.returncode == code, done.stdout + done.stderr
    assert f"{code} of 1 cases are slower and take at least 1.5 times as long" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.endswith(verdict))
    assert line.startswith("gaussian_kl learned prior forward 8x16 float32")
    # this run's rows came after
    assert path.read_bytes().startswith(before) and len(path.read_bytes()) > len(before)


def test_all_cases_are_collected_on_a_cpu():
    done = benchmarks("benchmarks", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    files = [line.split("::")[0] for line in done.stdout.splitlines() if "::" in line]
    names = ("convolutions", "memory", "sampling", "speed", "dropins")
    assert list(dict.fromkeys(files)) == [f"benchmarks/test_{name}.py" for name in names]
    assert "compat.pyro" in done.stdout.split("\n\n")[0].splitlines()[-1]
