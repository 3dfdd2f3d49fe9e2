"""The benchmarks' own tools, as far as a machine without a GPU can tell: options, rows, comparison, figures."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
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


def sessions(*many, **environment):
    """Exit status and output of several runs of pytest benchmarks, all in one process: importing takes the longest."""
    script = """
import contextlib, io, json, sys
import pytest
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = int(pytest.main(["benchmarks", "-p", "no:cacheprovider", *arguments]))
    found.append((code, out.getvalue()))
print(json.dumps(found))
"""
    arguments = json.dumps([[str(part) for part in arguments] for arguments in many])
    done = run(sys.executable, "-c", script, arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def modules(monkeypatch):
    """benchmarks/ on the path, as its own programs have it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if BENCHMARKS in Path(getattr(sys.modules[name], "__file__", None) or ROOT).parents or name == "figures":
            del sys.modules[name]


# Options

TINY = ("--op", "gaussian_kl", "--shape", "8x16", "--dtype", "float32", "--rival", "eager", "--unverified", "-q")


def test_gpu_cases_are_collected_without_a_gpu_and_not_timed(tmp_path):
    quick = ("--dtype", "bfloat16", "--rounds", "7", "--quick", "--rival", "eager", "--rival", "crop")
    options = ("--device", "cuda", "--collect-only", "-q")
    none = tmp_path / "none"
    found = sessions(options, (*options, *quick), ("--device", "cuda", "--results", none), CUDA_VISIBLE_DEVICES="")
    (code, found), (quick_code, quick_found), (refused, sentence) = found
    assert code == quick_code == 0, found + quick_found
    assert refused == 2 and "--device cuda needs a GPU" in sentence and not none.exists()
    for expected in (
        "-8x16-float32-forward-graph",
        "-65536x1024-bfloat16-backward-events",
        "-671x100000-",
        "test_memory",
        "128-128 k3 B-16x128x32x32-bfloat16-forward]",
    ):
        assert expected in found
    assert "test_sampling" not in found and "test_dropins" not in found
    assert quick_found.count("test_convolutions[") == 6


def test_options_choose_among_all_cases():
    """Pyro, which changes what torch.distributions does, comes last."""
    options = ("--collect-only", "-q")
    chosen = (
        ("--op", "sampling"),
        ("--op", "masked_conv2d", "--quick"),
        ("--op", "compat.pyro", "--op", "gaussian_kl", "--shape", "3x4"),
        ("--op", "compat.pythae", "--op", "distributions", "--rival", "distributions"),
        ("--shape", "16x1x28x28", "--shape", "8x192x16x16"),
        ("--dtype", "float16", "--shape", "8x192x16x16"),
    )
    (code, everything), *found = sessions(options, *((*options, *some) for some in chosen))
    assert code == 0
    cases = everything.split("\n\n")[0].splitlines()
    files = [name for name, _ in itertools.groupby(line.split("::")[0].removeprefix("benchmarks/") for line in cases)]
    assert files == [f"test_{name}.py" for name in ("speed", "convolutions", "sampling", "memory", "dropins")]
    assert "pyro" in cases[-1]
    sampling, convolutions, gaussian, distributions, shapes, half = (
        [line for line in text.splitlines() if "::" in line] for code, text in found
    )
    assert len(sampling) == 3 and all("test_sampling" in line for line in sampling)
    assert len(convolutions) == 6 and all("test_convolutions" in line for line in convolutions)
    assert len(gaussian) == 8 and all("gaussian_kl" in line and "-3x4-" in line for line in gaussian)
    assert len(distributions) == 2 and all("[distributions-" in line for line in distributions)
    assert sorted(line.split("::")[1].split("[")[0] for line in shapes) == 2 * ["test_convolutions"] + ["test_sampling"]
    assert len(half) == 2 and all("float16" in line for line in half)


def test_bad_input_gives_one_sentence_and_loses_nothing(tmp_path):
    """Before anything is timed or written."""
    header, first, *_ = STORED.read_text().splitlines()
    (tmp_path / "file").write_text("")
    texts = {
        "empty": header + "\n",
        "other": "a,b\n1,2\n",
        "word": f"{header}\n{first.replace(',30,', ',thirty,')}\n",
        "short": f"{header}\n{first[: len(first) // 2]}\n",
        "binary": "\0\1\udcff",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text, errors="surrogateescape")
    for name, text in {"columns": texts["other"], "cut": f"{header}\n{first[:40]}"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "conv_cpu.csv").write_text(text)
    (tmp_path / "cut.xml").write_text("<testsuites>")
    refused = [
        (["--op", "gaussian"], "argument --op: invalid choice: 'gaussian'"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--shape", "huge"], "--shape must be one of tiny, medium, large or as 4096x256, got huge"),
        (["--shape", "0x16"], "or as 4096x256, got 0x16"),
        (["--rounds", "-3"], "argument --rounds: must be a number of at least 1, got -3"),
        (["--rounds", "0"], "got 0"),
        (["--rounds", "1.5"], "got 1.5"),
        (["--threads", "two"], "argument --threads: must be a number of at least 1, got two"),
        (
            ["--results", tmp_path / "file"],
            f"no rows can be written to {tmp_path / 'file'} (--results DIR, or --no-save)",
        ),
        (["--results", tmp_path / "file" / "below"], "no rows can be written to"),
        (["--results", tmp_path / "columns"], "conv_cpu.csv has other columns than this version writes"),
        (["--results", tmp_path / "cut"], "conv_cpu.csv ends within a line"),
        (["--compare", tmp_path / "none.csv"], "there is no such file, and no row of such a commit"),
        (["--compare", tmp_path / "empty.csv"], "there are no rows of times in it"),
        (
            ["--compare", tmp_path / "other.csv"],
            "other.csv holds no rows of this benchmark: it has no column machine, ",
        ),
        (["--compare", tmp_path / "word.csv"], "word.csv, line 2: rounds is 'thirty', no number"),
        (["--compare", tmp_path / "short.csv"], "short.csv, line 2: not as many values as columns"),
        (["--compare", tmp_path / "binary.csv"], "binary.csv "),
        (["--compare", BENCHMARKS / "results" / "memory_cpu.csv"], "it has no column"),
        (["--fail-slower", "2"], "--fail-slower needs --compare"),
        (
            ["--compare", STORED, "--fail-slower", "0.5"],
            "argument --fail-slower: must be a number of at least 1, got 0.5",
        ),
        (["--compare", STORED, "--fail-slower", "nan"], "got nan"),
        (["--verdict", tmp_path / "none.xml"], "none.xml"),
        (["--verdict", tmp_path / "cut.xml"], "--verdict must be what pytest --junitxml writes"),
    ]
    before = contents(tmp_path)
    found = sessions(*((*TINY, "--results", tmp_path / "results", *options) for options, _ in refused))
    for (options, sentence), (code, text) in zip(refused, found, strict=True):
        assert code == 4 and text.count("ERROR: ") == 1 and "Traceback" not in text, (options, text)
        assert any(sentence in line for line in text.splitlines() if "ERROR: " in line or " error: " in line), text
    assert contents(tmp_path) == before


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


# Runs


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Exit status, output and results of one round of a case of each kind."""
    folder = tmp_path_factory.mktemp("quick")
    gaussian = "(gaussian_kl and 8x16 and float32 and forward-host)"
    chosen = f"{gaussian} or (16x64x28x28 and float32-forward]) or test_sampling or pythae-sample_and_kl"
    rivals = ("--rival", "eager", "--rival", "eager_cache")
    ((code, text),) = sessions(
        ("--quick", "--rounds", "1", "--unverified", *rivals, "--results", folder, "-k", chosen),
    )
    return code, text, folder


def test_every_kind_of_case_is_timed(quick_run, modules):
    """One round has quantiles too: all of them are that sample."""
    import rows

    code, text, folder = quick_run
    assert code == 0, text
    found = {path.name: rows.read(path) for path in folder.iterdir()}
    kernels = {"cpu", "eager"}
    formats = {name + suffix for name in kernels for suffix in ("", "_channels_last")}
    contestants = {name: {row.contestant for row in of_file} for name, of_file in found.items()}
    assert contestants == {
        "cpu.csv": {*kernels, "copy"},
        "conv_cpu.csv": formats,
        "sampling_cpu.csv": {"cpu", "eager_cache"},
        "dropins_cpu.csv": kernels,
    }
    for row in itertools.chain(*found.values()):
        assert row.rounds == 1 and row.verified == "no" and row.threads >= 1 and row.isa
        assert row.min_us == row.p20_us == row.median_us == row.p80_us > 0
    for name, row in (("masked_conv2d 64-64 k7 B", "16x64x28x28"), ("sampling GatedPixelCNN", "1x1x28x28")):
        assert any(line.startswith(name) and row in line and "UNVERIFIED" in line for line in text.splitlines())
    assert " PASSED after " in text and " left" in text


def test_ratios_are_of_the_fastest_form(quick_run, modules):
    import rows

    _, _, folder = quick_run
    found = {row.contestant: row for row in rows.read(folder / "conv_cpu.csv")}
    eager = min(found["eager"].min_us, found["eager_channels_last"].min_us)
    assert found["cpu"].over_eager == pytest.approx(eager / found["cpu"].min_us, rel=1e-3)
    assert found["eager"].over_eager is None
    assert found["cpu"].bytes == 4 * (2 * 16 * 64 * 28 * 28 + 64 * 64 * 25)  # input and output, and a 7 x 7 B's taps


def test_drop_ins_are_timed(quick_run, modules):
    import rows

    _, _, folder = quick_run
    ours, theirs = rows.read(folder / "dropins_cpu.csv")
    assert ours.over_eager == pytest.approx(theirs.min_us / ours.min_us, rel=1e-3) and theirs.over_eager is None
    assert (ours.op, ours.shape, ours.pass_, ours.verified) == ("compat.pythae", "100x16", "forward_backward", "no")
    # two inputs, z and kl; in the backward the same, and two gradients
    assert ours.bytes == 4 * (2 * (2 * 1600 + 1600 + 100) + 2 * 1600)


def test_an_interrupt_keeps_what_was_timed(modules, tmp_path):
    import rows

    command = (sys.executable, "-m", "pytest", "benchmarks", *TINY, "--rounds", "40", "--results", tmp_path)
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    path, deadline = tmp_path / "cpu.csv", time.monotonic() + 200
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 2, text
    found = rows.read(path)
    assert 0 < len(found) < 4 * 3 and len(found) % 3 == 0  # four cases of three contestants each
    assert "KeyboardInterrupt" in text and "gaussian_kl standard normal" in text


def test_cases_whose_tests_fail_are_not_timed(tmp_path):
    verdict = tmp_path / "verdict.xml"
    verdict.write_text("<testsuites/>")
    options = ("--rounds", "2", "--verdict", verdict, "--results", tmp_path / "none", "-q")
    chosen = (("--op", "compat.pythae"), ("--op", "sampling"), ("--op", "masked_conv2d", "--quick"), TINY[:8])
    for code, text in sessions(*((*options, *some) for some in chosen)):
        assert code == 1 and "none of its tests ran" in text and "passed" not in text
    assert not (tmp_path / "none").exists()


def test_saved_bytes_counts_storages_once(modules):
    """Of three kept tensors, one is an input, and two lie in one storage."""
    import test_memory

    torch = test_memory.torch
    x = torch.ones(4, requires_grad=True)

    def call(x):
        y = torch.exp(x)
        return y[:2] * y[2:] * x[:2]

    # exp keeps its result y, of 16 bytes; the products keep halves of y, x, and y[:2] * y[2:], of 8 bytes
    assert test_memory.saved_bytes(call, (x,)) == 16 + 8


def test_every_op_has_a_case_with_rivals(modules):
    import cases

    for op in {case.op for case in cases.CASES}:
        assert any(case.lines and case.op == op for case in cases.CASES)


# Comparison


def made_row(rows, **changed):
    """A row of ours that took 100 to 130 us."""
    common = {"machine": "M", "threads": 2, "isa": "AVX2", "torch": "2", "fastelbo": "0", "python": "3", "commit": "a"}
    common |= {"verified": "yes", "timestamp": "2026-01-01T00:00:00Z", "op": "gaussian_kl", "case": "", "bytes": 1}
    common |= {"pass_": "forward", "contestant": "cpu", "shape": "8x16", "dtype": "float32", "rounds": 30}
    common |= {"min_us": 100.0, "p20_us": 105.0, "median_us": 110.0, "p80_us": 130.0}
    return rows.Row(**common | changed)


def scaled(row, factor):
    return dataclasses.replace(row, **{name: factor * getattr(row, name) for name in TIMES})


TIMES = ("min_us", "p20_us", "median_us", "p80_us")


@pytest.mark.parametrize(
    ("factor", "changed", "mark"),
    [
        (1.05, {}, ""),
        (1.25, {}, ""),  # the fastest, 125 us, is no slower than one in five of the older ones
        (1.35, {}, "SLOWER"),
        (1.35, {"p80_us": 500.0}, "SLOWER"),  # noise of the new run alone is no excuse
        (0.95, {}, ""),
        (0.8, {}, ""),  # 104 us at the 80th percentile
        (0.7, {}, "faster"),
        (0.7, {"p80_us": 500.0}, ""),
        (9.0, {"machine": "N"}, "another machine"),
        (9.0, {"threads": 1}, "another machine"),
        (9.0, {"shape": "9x9"}, "no older row"),
        (9.0, {"timing": "graph"}, "no older row"),
    ],
)
def test_what_counts_as_slower(factor, changed, mark, modules):
    import compare
    import rows

    then = made_row(rows)
    now = dataclasses.replace(scaled(then, factor), timestamp="2026-02-01T00:00:00Z", **changed)
    found = compare.changes([now], [then])
    assert compare.line(found[0])[-1] == mark
    assert ("ANOTHER MACHINE" in compare.table(found)) == (mark == "another machine")
    assert bool(compare.failure(found, 1.1)) == (mark in ("SLOWER", "another machine", "no older row"))
    assert bool(compare.failure(found, 1.5)) == (mark in ("another machine", "no older row"))


@pytest.mark.parametrize(
    ("ours", "theirs", "mark"), [(1.5, 1.3, "SLOWER"), (1.5, 1.4, ""), (0.6, 0.7, "faster"), (0.6, 0.6, "")]
)
def test_a_machine_that_has_changed_is_no_mark(ours, theirs, mark, modules):
    """Slower or faster is what differs from before by more than the rivals do."""
    import compare
    import rows

    then = [made_row(rows), made_row(rows, contestant="eager")]
    now = [scaled(then[0], ours), scaled(then[1], theirs)]
    (change,) = compare.changes(now, then)
    assert compare.line(change)[-1] == mark


def test_narrow_times_need_a_tenth(modules):
    import compare
    import rows

    then = made_row(rows, p20_us=100.1, median_us=100.2, p80_us=100.3)
    marks = [compare.line(compare.changes([scaled(then, factor)], [then])[0])[-1] for factor in (1.09, 1.11)]
    assert marks == ["", "SLOWER"]


def test_the_newest_older_row_of_this_machine_counts(modules):
    import compare
    import rows

    old = made_row(rows)
    newer = dataclasses.replace(scaled(old, 2), commit="b", timestamp="2026-02-01T00:00:00Z")
    elsewhere = dataclasses.replace(scaled(old, 3), machine="N", timestamp="2026-03-01T00:00:00Z")
    rivals = [dataclasses.replace(old, contestant=name, op="gaussian_kl") for name in ("eager", "copy", "compile")]
    now = [scaled(old, 2.1), *(scaled(row, factor) for row, factor in zip(rivals, (1.5, 2.0, 9.0), strict=True))]
    (change,) = compare.changes(now, [newer, elsewhere, old, *rivals])
    assert not change.slower
    assert change.then == newer and change.ratio == pytest.approx(1.05) and change.rivals == pytest.approx(2)
    assert compare.newest(old, [elsewhere]) == elsewhere


def test_rows_to_compare_with(modules, tmp_path):
    """Of a file, a folder in which there is something else too, or a commit."""
    import compare
    import rows

    first, second = made_row(rows, commit="abc1"), made_row(rows, commit="def2", op="sampling")
    rows.append(tmp_path / "cpu.csv", [first])
    rows.append(tmp_path / "sampling_cpu.csv", [second])
    shutil.copy(BENCHMARKS / "results" / "memory_cpu.csv", tmp_path)
    shutil.copy(BENCHMARKS / "results" / "bounds.csv", tmp_path)
    assert compare.baseline(str(tmp_path), Path()) == [first, second]
    assert compare.baseline(str(tmp_path / "cpu.csv"), Path()) == [first]
    assert compare.baseline("def", tmp_path) == [second]
    with pytest.raises(ValueError, match="no row of such a commit"):
        compare.baseline("123", tmp_path)


def test_comparison_of_a_run(quick_run, modules, tmp_path):
    """With rows of the same case and machine that are made a hundred times as fast or slow, or are elsewhere's."""
    import rows

    _, _, folder = quick_run
    (stored,) = {
        row for row in rows.read(folder / "cpu.csv") if row.contestant == "cpu" and row.case == "standard normal"
    }
    cases = {
        "fast": scaled(stored, 0.01),
        "slow": scaled(stored, 100),
        "elsewhere": dataclasses.replace(stored, machine="Elsewhere"),
    }
    for name, row in cases.items():
        rows.append(tmp_path / f"{name}.csv", [row])
    options = (*TINY, "-k", "standard and forward-host", "--rounds", "2", "--no-save", "--results", folder)
    found = sessions(
        *((*options, "--compare", tmp_path / f"{name}.csv", "--fail-slower", "2") for name in cases),
        (*options, "--compare", tmp_path / "fast.csv"),
        (*options, "--compare", stored.commit[:6]),
        (*options, "--compare", STORED),
    )
    fast, slow, elsewhere, shown, commit, older = found
    assert fast[0] == 1 and "SLOWER" in fast[1] and "FAILED: 1 of 1 are slower by more than 2x" in fast[1]
    assert slow[0] == 0 and " faster\n" in slow[1] and "0 slower, 1 faster" in slow[1]
    assert elsewhere[0] == 1 and "ANOTHER MACHINE" in elsewhere[1] and "no row from this machine" in elsewhere[1]
    assert "0 neither, 1 of another machine, 0 without" in elsewhere[1]
    assert shown[0] == 0 and "SLOWER" in shown[1] and "FAILED" not in shown[1]
    assert commit[0] == 0 and "0 without an older row" in commit[1]
    assert older[0] == 0 and "commit 79c34fc" in older[1]  # a file of fewer columns


# Rows


def make_rows(rows, cases):
    """A row of every GPU case, with figures that are made up."""
    made = []
    for one in cases.timed("cuda"):
        shape = f"{one.shape[0]}x{one.shape[1]}"
        ratios = {f"over_{name}": 3.0 for name in one.rivals if name != "copy"}
        for contestant, taken in (("triton", 2.0), ("cuda", 1.0), ("copy", 0.5)):
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
                    **{f"{name}_us": taken for name in ("min", "p20", "median", "p80")},
                    bytes=1,
                    fraction_of_copy=0.5 / taken,
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
    return [text.get_text() for axis in figure.axes for text in axis.texts]


@pytest.fixture
def drawn(modules, monkeypatch):
    """The figure of a stored file, and its lines as text."""
    import plot

    figures = []

    def make(name):
        path = BENCHMARKS / "results" / name
        ((title, found),) = plot.rows_of([path]).items()
        figures.append(plot.DRAW[title.split("_")[0]](found))
        with path.open(newline="") as file:
            return figures[-1], list(csv.DictReader(file))

    yield make
    for figure in figures:
        plot.style.pyplot.close(figure)


def assert_headed(figure, line):
    heading = " ".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))
    for part in (line["machine"], f"torch {line['torch']}", f"commit {line['commit']}", line["timestamp"][:10]):
        assert part in heading


def test_figure_of_speed(drawn):
    figure, lines = drawn("cpu.csv")
    newest = max(lines, key=lambda line: line["timestamp"])
    assert_headed(figure, newest)
    ours = {}
    for line in lines:
        if (line["commit"], line["contestant"]) == (newest["commit"], "cpu") and line["case"] != "normals":
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
    assert_headed(figure, lines[0])
    expected = [int(line["saved_bytes"]) / (512 * 256) for line in lines]
    bars = [bar.get_width() for axis in figure.axes for container in axis.containers for bar in container]
    assert sorted(bars) == pytest.approx(sorted(expected))
    shown = [f"{line['saved_bytes']} bytes in all" if line["saved_bytes"] == "8" else f"{value:.3g}"
             for line, value in zip(lines, expected, strict=True)]  # fmt: skip
    assert sorted(texts(figure)) == sorted(shown)


def test_figure_of_convolutions(drawn):
    figure, lines = drawn("conv_cpu.csv")
    assert_headed(figure, lines[0])
    times, expected, shown = {}, [], []
    for line in lines:
        times.setdefault((line["case"], line["shape"], line["pass"]), {})[line["contestant"]] = float(line["min_us"])
    for of_case in times.values():
        for rival in ("eager", "crop", "compile"):
            best = min(time for name, time in of_case.items() if name.startswith(rival))
            expected += [best / of_case["cpu"], best / of_case["cpu_channels_last"]]
            shown.append(f"{best / of_case['cpu']:.2f}\N{MULTIPLICATION SIGN}")
    assert points(figure) == pytest.approx(sorted(expected))
    assert sorted(texts(figure)) == sorted(shown)


def test_figure_of_sampling(drawn):
    figure, lines = drawn("sampling_cpu.csv")
    assert_headed(figure, lines[0])
    seconds = {(line["shape"], line["contestant"]): 1e-6 * float(line["min_us"]) for line in lines}
    assert points(figure) == pytest.approx(sorted(seconds.values()))
    assert "0.0283 s" in texts(figure) and "569 s, 652\N{MULTIPLICATION SIGN}" in texts(figure)
    for axis, shape in zip(figure.axes, dict.fromkeys(shape for shape, _ in seconds), strict=True):
        (ours,) = (line for line in axis.get_lines() if len(line.get_xdata()) == 2)
        assert ours.get_xdata()[0] == pytest.approx(seconds[shape, "cpu"])


def test_figure_of_drop_ins(drawn):
    """Those that are slower lie where the axis says so, in another colour."""
    figure, lines = drawn("dropins_cpu.csv")
    assert_headed(figure, lines[0])
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
    assert {f"{ratio:.2f}\N{MULTIPLICATION SIGN}" for ratio in expected} < set(texts(figure))


def test_all_figures_are_drawn_and_small(tmp_path):
    done = tool("plot.py", "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    drawn = {path.name: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    kinds = {"": "speed", "memory_": "memory", "conv_": "convolutions", "sampling_": "sampling", "dropins_": "dropins"}
    stored = {path.name for path in (BENCHMARKS / "results").iterdir()}
    of_rows = (
        (f"{prefix}{device}.csv", f"{kind}_{device}") for prefix, kind in kinds.items() for device in ("cpu", "cuda")
    )
    expected = {figure for rows, figure in of_rows if rows in stored}
    assert {f"{kind}_cpu" for kind in kinds.values()} <= expected
    plain = {name.removesuffix(".png") for name in drawn if name.count("_") == 1}  # further ones name an older machine
    assert plain == expected
    assert max(drawn.values()) < 150_000
    assert drawn.keys() == {path.name for path in (ROOT / "docs" / "figures").iterdir()}


def test_figures_of_several_machines(modules):
    """The newest has the plain name."""
    import plot
    import rows

    old, new = made_row(rows, machine="An old one"), made_row(rows, timestamp="2026-02-01T00:00:00Z")
    gpu = made_row(rows, machine="A GPU", cuda="13.0", contestant="triton")
    assert {name: [row.machine for row in found] for name, found in plot.figures_of([old, new, gpu]).items()} == {
        "speed_cpu": ["M"],
        "speed_cpu_an-old-one": ["An old one"],
        "speed_cuda": ["A GPU"],
    }


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
    calls, _ = dropins.calls(right)
    assert list(calls) == ["cpu", "eager"]
    wrong = dataclasses.replace(right, op="compat.wrong", theirs=mistaken(part))
    with pytest.raises(AssertionError, match=r"^compat\.wrong sample_and_kl: .*output"):
        dropins.calls(wrong)


@pytest.mark.parametrize("name", ["eager_channels_last", "crop", "compile"])
def test_a_convolution_that_computes_something_else_is_not_timed(name, modules, monkeypatch):
    import convolutions

    torch = convolutions.torch
    layer = convolutions.Layer(2, 3, 4, 5, 3, "B", "nobody")
    case = convolutions.Timed(layer, "float32", "forward_backward")
    right = convolutions.contestants

    def contestants(*arguments):
        found = right(*arguments)
        found = {key: found[key.replace("compile", "crop")] for key in found}  # compiling takes long
        function, memory_format = found[name]
        return found | {name: (lambda *inputs: 1.01 * function(*inputs), memory_format)}

    device = torch.device("cpu")
    monkeypatch.setattr(convolutions, "contestants", contestants)
    assert set(convolutions.calls(case, device, ["cpu"], [])) == {"cpu", "cpu_channels_last"}
    with pytest.raises(AssertionError, match=f"^{name} computes something else"):
        convolutions.calls(case, device, ["cpu"], convolutions.RIVALS)
