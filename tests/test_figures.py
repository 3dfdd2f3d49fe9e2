"""What is made of stored rows: tables and figures show what stands in them."""

import csv
import dataclasses
import math
import runpy
import subprocess
import sys
import types
from pathlib import Path

import cases
import plot
import pytest
import ratios
import rows
import tables
from figures import speed

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs a script in this process: exit status, and what it printed."""

    def run(name, *arguments):
        path = ROOT / "benchmarks" / name
        monkeypatch.setattr(sys, "argv", [str(part) for part in (path, *arguments)])
        status = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        return types.SimpleNamespace(returncode=status, **capsys.readouterr()._asdict())

    return run


def test_report_of_stored_rows(tool):
    """A heading for each run, and a line for each case with what its row says."""
    done = tool("report.py", RESULTS / "cpu.csv", RESULTS / "cuda.csv")
    assert done.returncode == 0, done.err
    for heading in ("AMD EPYC, 2 threads, AVX-512; torch 2", "NVIDIA H200, CUDA 13.0, Triton 3.6.0; torch 2"):
        assert any(line.startswith(heading) and "commit" in line for line in done.out.splitlines())
    assert "forward in a graph" in done.out
    case = ["gaussian_rsample_kl", "fwd+bwd", "4096x256", "float32", "cpu"]
    (found,) = (line.split() for line in done.out.splitlines() if line.split()[:5] == case)
    stored = rows.stored_in([RESULTS / "cpu.csv"])
    row = next(row for row in stored if tables.case(row) == tuple(case))
    rivals = row.over_eager, row.over_distributions, row.over_compile, row.fraction_of_copy, row.over_compile_checkpoint
    best = min(row.over_eager, row.over_distributions, row.over_compile, row.over_compile_checkpoint)
    noisy = ["NOISY"] * any(other.noisy for other in stored if tables.compared(other) == tables.compared(row))
    assert found[5:] == [f"{row.min_us:.4g}", *(f"{ratio:.2f}x" for ratio in (*rivals, best)), *noisy]


def test_the_fastest_backend_stands_for_ours():
    """In each memory format; a rival has the fastest of its forms."""
    first = dataclasses.replace(rows.read(RESULTS / "conv_cuda.csv")[0], shape="1x1")
    times = {"triton": 3.0, "cuda": 2.0, "tma_channels_last": 4.0, "crop": 8.0, "full_benchmark": 3.0}
    times["crop_sliced_benchmark_channels_last"] = 6.0
    made = [dataclasses.replace(first, contestant=name, median_us=time) for name, time in times.items()]
    found = {row.contestant: others for row, others in ratios.over(made)}
    assert found == {"cuda": {"crop": 3.0, "full": 1.5}, "tma_channels_last": {"crop": 1.5, "full": 0.75}}
    assert tables.slower(made) == "a rival is faster in 0 of 1 cases"
    late = [*made, dataclasses.replace(first, contestant="eager", median_us=1.0)]
    assert tables.slower(late).splitlines()[-1].split()[-4:] == ["cuda", "2", "eager", "0.50x"]
    assert tables.slower([dataclasses.replace(row, timing="events") for row in late[:3]]) == (
        "a rival is faster in 0 of 0 cases"
    )


def test_figure_of_convolutions_on_a_gpu():
    """A figure shows kernels alone, where they were timed, and an axis for each pass; older rows are the host's."""
    old = [row for row in rows.read(RESULTS / "conv_cuda.csv") if row.commit == "be313d9"]
    new = [
        dataclasses.replace(row, pass_=pass_, timing=timing, median_us=time * row.median_us)
        for row in old
        for pass_ in ("forward", "d_weight", "forward_backward")
        for timing, time in (("host", 1), ("events", 0.5))
        if row.pass_ == "forward"
    ]
    for made, axes, timing in ((old, 2, "host"), (new, 3, "events")):
        figure = plot.KINDS["convolutions"].draw(made)
        assert sum(axis.get_visible() for axis in figure.axes) == axes
        expected = [
            ratio
            for _, others in ratios.over(row for row in made if row.timing == timing)
            for name, ratio in others.items()
            if name in ("eager", "crop", "compile")
        ]
        assert points(figure) == pytest.approx(sorted(expected))
        plot.style.pyplot.close(figure)


@pytest.mark.parametrize("name", ["report.py", "plot.py"])
def test_nothing_to_show(name, tool, tmp_path):
    empty = tmp_path / "cpu.csv"
    empty.write_text((RESULTS / "cpu.csv").read_text().splitlines()[0] + "\n")
    for path, sentence in ((empty, "no rows in"), (tmp_path / "none.csv", "none.csv")):
        done = tool(name, path, *(("--output", tmp_path / "figures") if name == "plot.py" else ()))
        assert done.returncode == 1
        assert sentence in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name", ["report.py", "plot.py"])
def test_a_script_runs_by_itself(name):
    assert subprocess.run([sys.executable, ROOT / "benchmarks" / name, "--help"], capture_output=True).returncode == 0


def points(figure):
    """Values of all markers, from left to right; each lies on its axis."""
    found = []
    for axis in figure.axes:
        values = [float(line.get_xdata()[0]) for line in axis.get_lines() if len(line.get_xdata()) == 1]
        left, right = axis.get_xlim()
        assert all(left < value < right for value in values)
        found += values
    return sorted(found)


def texts(figure):
    return sorted(text.get_text() for axis in figure.axes for text in axis.texts)


@pytest.fixture
def drawn():
    """The figure of a stored file, whose heading says where the rows are from, and its lines as text."""
    figures = []

    def make(name):
        path = RESULTS / name
        every = plot.figures_of(rows.stored_in([path]))
        title = min(every, key=len)  # of the newest rows; others say of which machine
        figures.append(plot.KINDS[title.split("_")[0]].draw(every[title]))
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        newest = max(lines, key=lambda line: line["timestamp"])
        heading = " ".join(text.get_text() for text in figures[-1].findobj(lambda artist: hasattr(artist, "get_text")))
        for part in (newest["machine"], f"torch {newest['torch']}", newest["commit"], newest["timestamp"][:10]):
            assert part in heading
        return figures[-1], [line for line in lines if line["commit"] == newest["commit"]]

    yield make
    for figure in figures:
        plot.style.pyplot.close(figure)


def test_figure_of_speed(drawn):
    figure, lines = drawn("cpu.csv")
    ours = {}
    for line in lines:
        if line["contestant"] == "cpu" and line["case"] != "normals":
            ours[tuple(line[name] for name in ("op", "case", "pass", "shape", "dtype"))] = line
    expected = []
    for line in ours.values():
        if math.prod(map(int, line["shape"].split("x"))) >= 2**20:
            expected.append(float(line["fraction_of_copy"]))
        rivals = ("over_eager", "over_distributions", "over_compile", "over_compile_checkpoint")
        expected += [float(line[name]) for name in rivals if line[name]]
    assert points(figure) == pytest.approx(sorted(expected))


def test_figure_of_memory(drawn):
    figure, lines = drawn("memory_cpu.csv")
    expected = [int(line["saved_bytes"]) / (512 * 256) for line in lines]
    bars = [bar.get_width() for axis in figure.axes for container in axis.containers for bar in container]
    assert sorted(bars) == pytest.approx(sorted(expected))
    pairs = zip(lines, expected, strict=True)
    assert texts(figure) == sorted("8 bytes in all" if line["saved_bytes"] == "8" else f"{x:.3g}" for line, x in pairs)


def test_figure_of_convolutions(drawn):
    figure, lines = drawn("conv_cpu.csv")
    times, expected, shown = {}, [], []
    for line in lines:
        times.setdefault((line["case"], line["shape"], line["pass"]), {})[line["contestant"]] = float(line["min_us"])
    for of_case in times.values():
        for rival in ("eager", "full", "crop", "compile"):
            if not any(name.startswith(rival) for name in of_case):  # a block has neither
                continue
            best = min(time for name, time in of_case.items() if name.startswith(rival))
            expected += [best / of_case["cpu"], best / of_case["cpu_channels_last"]]
            shown.append(f"{best / of_case['cpu']:.2f}{TIMES}")
    assert points(figure) == pytest.approx(sorted(expected))
    assert texts(figure) == sorted(shown)


def test_figure_of_sampling(drawn):
    figure, lines = drawn("sampling_cpu.csv")
    seconds = {(line["shape"], line["contestant"]): 1e-6 * float(line["min_us"]) for line in lines}
    assert points(figure) == pytest.approx(sorted(seconds.values()))
    assert "0.0283 s" in texts(figure) and f"569 s, 652{TIMES}" in texts(figure)
    for axis, shape in zip(figure.axes, dict.fromkeys(shape for shape, _ in seconds), strict=True):
        (ours,) = (line for line in axis.get_lines() if len(line.get_xdata()) == 2)
        assert ours.get_xdata()[0] == pytest.approx(seconds[shape, "cpu"])


def test_figure_of_drop_ins(drawn):
    """Those that are slower lie where the axis says so, in another colour."""
    figure, lines = drawn("dropins_cpu.csv")
    pairs = list(zip(lines[::2], lines[1::2], strict=True))
    expected = [float(theirs["min_us"]) / float(ours["min_us"]) for ours, theirs in pairs]
    (axis,) = figure.axes
    markers = [line for line in axis.get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_xdata()[0] for line in markers] == pytest.approx(expected)
    noisy = [any(float(line["median_us"]) > 1.5 * float(line["min_us"]) for line in pair) for pair in pairs]
    assert [line.get_markerfacecolor() == "white" for line in markers] == noisy
    colours = {ratio < 1: line.get_color() for ratio, line in zip(expected, markers, strict=True)}
    assert len(set(colours.values())) == 2
    assert all(line.get_color() == colours[ratio < 1] for ratio, line in zip(expected, markers, strict=True))
    assert {f"{ratio:.2f}{TIMES}" for ratio in expected} < set(texts(figure))


def test_all_figures_are_drawn_and_small(tool, tmp_path, monkeypatch):
    """Here of fewer dots, for time; those that are published have all of theirs."""
    monkeypatch.setattr(plot.style, "SHEET", [plot.style.SHEET, {"figure.dpi": 50}])
    with plot.pyplot.rc_context():
        done = tool("plot.py", "--output", tmp_path / "figures")
    assert done.returncode == 0, done.err
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    kinds = {"": "speed", "memory_": "memory", "conv_": "convolutions", "sampling_": "sampling", "dropins_": "dropins"}
    stored = {path.name for path in RESULTS.iterdir()}
    of_rows = {
        f"{kind}_{device}": f"{prefix}{device}.csv" for prefix, kind in kinds.items() for device in ("cpu", "cuda")
    }
    expected = {figure for figure, name in of_rows.items() if name in stored}
    assert {f"{kind}_cpu" for kind in kinds.values()} <= expected
    # further ones name an older machine
    assert {name.removesuffix(".png") for name in drawn if name.count("_") == 1} == expected
    published = {path.name: path.read_bytes() for path in (ROOT / "docs" / "figures").iterdir()}
    assert drawn.keys() == published.keys()
    for picture in (*drawn.values(), *published.values()):
        assert picture.startswith(b"\x89PNG") and len(picture) < 150_000


def test_every_case_has_a_lane():
    assert {(op, case) for op, case, _ in speed.OPS} == {(case.op, case.name) for case in cases.CASES if case.lines}


def test_figures_of_several_machines():
    """The newest has the plain name."""
    first = rows.read(RESULTS / "cpu.csv")[0]
    old = dataclasses.replace(first, machine="An old one", timestamp="2020-01-01T00:00:00Z")
    gpu = dataclasses.replace(first, machine="A GPU", cuda="13.0", contestant="triton")
    assert {name: [row.machine for row in found] for name, found in plot.figures_of([old, first, gpu]).items()} == {
        "speed_cpu": [first.machine],
        "speed_cpu_an-old-one": ["An old one"],
        "speed_cuda": ["A GPU"],
    }
