"""The benchmarks' own tools, as far as a machine without a GPU can tell: options, runs, comparison, rows."""

import argparse
import dataclasses
import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import cases
import compare
import fresh_python
import machine
import pytest
import rows
import torch
from ops import FILES

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
STORED, ON_GPU = BENCHMARKS / "results" / "cpu.csv", BENCHMARKS / "results" / "cuda.csv"


def sessions(*many, before="", folder="benchmarks", cwd=ROOT, **environment):
    """Exit status and output of several runs of pytest, all in one process: importing takes the longest.

    Args:
        many: the options of each.
        before: a program that the process runs first.
        folder: of tests.
        cwd, environment: of the process.
    """
    script = """
import contextlib, io, json, sys
import pytest
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = int(pytest.main([*arguments, "-p", "no:cacheprovider"]))
    found.append((code, out.getvalue()))
print(json.dumps(found))
"""
    arguments = json.dumps([[folder, *map(str, arguments)] for arguments in many])
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others' plugins take as long as everything else
    done = fresh_python.run(before + script, arguments, cwd=cwd, **environment)
    return json.loads(done.stdout.splitlines()[-1])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    sizes = "-8x16-float32-forward-graph", "-65536x1024-bfloat16-backward-events", "-671x100000-"
    for expected in (*sizes, "test_memory", "128-128 k3 B-16x128x32x32-bfloat16-d_input]"):
        assert expected in found
    assert "test_sampling" not in found and "test_dropins" not in found
    assert quick_found.count("test_convolutions[") == 4 * 3 - 1  # a first layer's input gets no gradient


def test_options_choose_among_all_cases():
    """Pyro, which changes what torch.distributions does, comes last."""
    chosen = {  # with how many cases, and what the names of all of them hold
        "--op sampling": (3, "test_sampling"),
        "--op masked_conv2d --quick": (6, "test_convolutions"),
        "--op compat.pyro --op gaussian_kl --shape 3x4": (8, "gaussian_kl-.*-3x4-"),
        "--op compat.pythae --op distributions --rival distributions": (2, r"\[distributions-"),
        "--shape 16x1x28x28 --shape 8x192x16x16": (3, "test_convolutions.*8x192x16x16|test_sampling"),
        "--dtype float16 --shape 8x192x16x16": (2, "float16"),
    }
    found = sessions(*(("--collect-only", "-q", *some.split()) for some in ("", *chosen)))
    (code, names), *found = ((code, [line for line in text.splitlines() if "::" in line]) for code, text in found)
    files = [file for file, _ in itertools.groupby(name.split("::")[0].removeprefix("benchmarks/") for name in names)]
    assert files == [f"test_{name}.py" for name in ("speed", "convolutions", "sampling", "memory", "dropins")]
    assert code == 0 and "pyro" in names[-1]
    for (options, (count, pattern)), (code, names) in zip(chosen.items(), found, strict=True):
        assert code == 0 and len(names) == count and all(re.search(pattern, name) for name in names), options
    assert sum("test_sampling" in name for name in found[4][1]) == 1


def test_bad_input_gives_one_sentence_and_loses_nothing(tmp_path):
    """Before anything is timed or written."""
    header, first, *_ = STORED.read_text().splitlines()
    texts = {
        "file": "",
        "empty.csv": header + "\n",
        "other.csv": "a,b\n1,2\n",
        "word.csv": f"{header}\n{first.replace(',30,', ',thirty,')}\n",
        "short.csv": f"{header}\n{first[: len(first) // 2]}\n",
        "binary.csv": "\0\1\udcff",
        "columns/conv_cpu.csv": "a,b\n1,2\n",
        "cut/conv_cpu.csv": f"{header}\n{first[:40]}",
        "cut.xml": "<testsuites>",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, errors="surrogateescape")
    at_least_1 = "must be a number of at least 1, got"
    refused = [
        ("--op gaussian", "argument --op: invalid choice: 'gaussian'"),
        ("--device tpu", "argument --device: invalid choice"),
        ("--shape huge", "--shape must be one of tiny, medium, large or as 4096x256, got huge"),
        ("--shape 0x16", "or as 4096x256, got 0x16"),
        ("--rounds -3", f"argument --rounds: {at_least_1} -3"),
        ("--rounds 0", "got 0"),
        ("--rounds 1.5", "got 1.5"),
        ("--threads two", f"argument --threads: {at_least_1} two"),
        ("--results DIR/file", f"no rows can be written to {tmp_path}/file (--results DIR, or --no-save)"),
        ("--results DIR/file/below", "no rows can be written to"),
        ("--results DIR/columns", "conv_cpu.csv has other columns than this version writes"),
        ("--results DIR/cut", "conv_cpu.csv ends within a line"),
        ("--compare DIR/none.csv", "there is no such file, and no row of such a commit"),
        ("--compare DIR/empty.csv", "there are no rows of times in it"),
        ("--compare DIR/other.csv", "other.csv holds no rows of this benchmark: it has no column machine, "),
        ("--compare DIR/word.csv", "word.csv, line 2: rounds is 'thirty', no number"),
        ("--compare DIR/short.csv", "short.csv, line 2: not as many values as columns"),
        ("--compare DIR/binary.csv", "binary.csv "),
        ("--compare benchmarks/results/memory_cpu.csv", "it has no column"),
        ("--fail-slower 2", "--fail-slower needs --compare"),
        (f"--compare {STORED} --fail-slower 0.5", f"argument --fail-slower: {at_least_1} 0.5"),
        (f"--compare {STORED} --fail-slower nan", "got nan"),
        ("--verdict DIR/none.xml", "none.xml"),
        ("--verdict DIR/cut.xml", "--verdict must be what pytest --junitxml writes"),
    ]
    before = contents(tmp_path)
    common = (*TINY, "--results", tmp_path / "results")
    found = sessions(*((*common, *options.replace("DIR", str(tmp_path)).split()) for options, _ in refused))
    for (options, sentence), (code, text) in zip(refused, found, strict=True):
        assert code == 4 and text.count("ERROR: ") == 1 and "Traceback" not in text, (options, text)
        assert any(sentence in line for line in text.splitlines() if "ERROR: " in line or " error: " in line), text
    assert contents(tmp_path) == before


def test_every_size_says_what_it_times():
    """On each device some case of every op, which has rivals."""

    def options(device, **chosen):
        none = dict.fromkeys(("shape", "op", "dtype", "rival", "quick"))
        return argparse.Namespace(device=device, **none | chosen)

    for device in ("cpu", "cuda"):
        timed = cases.timed(options(device))
        assert len(set(map(str, timed))) == len(timed)
        files = {one.case.entry.file for one in timed if one.case.lines}
        assert files | {"masked_conv2d"} == set(FILES)
        quick = cases.timed(options(device, quick=True))
        assert quick and all(one.shape[0] * one.shape[1] <= 2**20 for one in quick)
    assert {one.shape for one in cases.timed(options("cuda", shape=["12x34"], op=["gaussian_kl"]))} == {(12, 34)}


def test_verdict_of_tests_that_ran_before(tmp_path):
    """What pytest --junitxml writes decides whether an op may be timed."""
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
    sessions(("--import-mode=importlib", "-q", "--junitxml", verdict), folder="tests", cwd=tmp_path)
    fails = f"1 of its 2 tests fail in {verdict}, first test_b"
    none = f"none of its tests ran in {verdict}"
    expected = {"right": "", "wrong": fails, "broken": fails, "skipped": none, "unknown": none}
    assert {op: machine.recorded_failure(op, verdict) for op in expected} == expected


# Runs


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Exit status, output and rows by file of one round of a case of each kind, and the folder."""
    folder = tmp_path_factory.mktemp("quick")
    gaussian = "(gaussian_kl and 8x16 and float32 and forward-host)"
    chosen = f"{gaussian} or (16x64x28x28 and float32-forward]) or test_sampling or pythae-sample_and_kl"
    rivals = ("--rival", "eager", "--rival", "eager_cache")
    options = ("--quick", "--rounds", "1", "--unverified", *rivals, "--results", folder, "-k", chosen)
    ((code, text),) = sessions(options)
    return code, text, {path.name: rows.read(path) for path in folder.iterdir()}, folder


def test_every_kind_of_case_is_timed(quick_run):
    """One round has quantiles too: all of them are that sample."""
    code, text, found, _ = quick_run
    assert code == 0, text
    kernels = {"cpu", "eager"}
    assert {name: {row.contestant for row in of_file} for name, of_file in found.items()} == {
        "cpu.csv": {*kernels, "copy"},
        "conv_cpu.csv": {name + suffix for name in kernels for suffix in ("", "_channels_last")},
        "sampling_cpu.csv": {"cpu", "eager_cache"},
        "dropins_cpu.csv": kernels,
    }
    for row in itertools.chain(*found.values()):
        assert row.rounds == 1 and row.verified == "no" and row.threads >= 1 and row.isa
        assert row.min_us == row.p20_us == row.median_us == row.p80_us > 0
    for name, row in (("masked_conv2d 64-64 k7 B", "16x64x28x28"), ("sampling GatedPixelCNN", "1x1x28x28")):
        assert any(line.startswith(name) and row in line and "UNVERIFIED" in line for line in text.splitlines())
    assert " PASSED after " in text and " left" in text


def test_ratios_are_of_the_fastest_form_and_bytes_of_what_must_move(quick_run):
    layer = {row.contestant: row for row in quick_run[2]["conv_cpu.csv"]}
    eager = min(layer["eager"].min_us, layer["eager_channels_last"].min_us)
    assert layer["cpu"].over_eager == pytest.approx(eager / layer["cpu"].min_us, rel=1e-3)
    assert layer["cpu"].bytes == 4 * (2 * 16 * 64 * 28 * 28 + 64 * 64 * 25)  # input and output, and a 7 x 7 B's taps
    ours, theirs = quick_run[2]["dropins_cpu.csv"]
    assert ours.over_eager == pytest.approx(theirs.min_us / ours.min_us, rel=1e-3)
    assert theirs.over_eager is None and layer["eager"].over_eager is None
    assert (ours.op, ours.shape, ours.pass_, ours.verified) == ("compat.pythae", "100x16", "forward_backward", "no")
    # two inputs, z and kl; in the backward the same, and two gradients
    assert ours.bytes == 4 * (2 * (2 * 1600 + 1600 + 100) + 2 * 1600)


def test_an_interrupt_keeps_what_was_timed(tmp_path):
    path = tmp_path / "cpu.csv"
    before = f"""
import os, pathlib, signal, threading, time

def interrupt(path=pathlib.Path({str(path)!r})):
    while not (path.exists() and path.stat().st_size):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Thread(target=interrupt, daemon=True).start()
"""
    ((code, text),) = sessions((*TINY, "--rounds", "100", "--results", tmp_path), before=before)
    assert code == 2, text
    found = rows.read(path)
    assert 0 < len(found) < 4 * 3 and len(found) % 3 == 0  # four cases of three contestants each
    assert "KeyboardInterrupt" in text and "gaussian_kl standard normal" in text


def test_a_full_disk_ends_a_run_with_a_sentence(tmp_path):
    path = shutil.copy(STORED, tmp_path / "cpu.csv")
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))"
    ((code, text),) = sessions((*TINY, "--rounds", "1", "--results", tmp_path), before=limited)
    assert code == 1 and f"no rows can be written to {path}: File too large" in text, text
    assert "gaussian_kl standard normal" in text and path.read_bytes() == STORED.read_bytes()


def test_cases_whose_tests_fail_are_not_timed(tmp_path):
    """Unless so wanted, and then the rows say it."""
    verdict, passed = tmp_path / "verdict.xml", tmp_path / "passed.xml"
    verdict.write_text("<testsuites/>")
    passed.write_text('<testcase classname="tests.test_gaussian_kl" name="test_a" />')
    options = ("--rounds", "2", "-q", "--results")
    chosen = (("--op", "compat.pythae"), ("--op", "sampling"), ("--op", "masked_conv2d", "--quick"), TINY[:8])
    *refused, no, yes = sessions(
        *((*options, tmp_path / "none", "--verdict", verdict, *some) for some in chosen),
        *((*options, path.with_suffix(""), "--verdict", path, *TINY) for path in (verdict, passed)),
    )
    for code, text in refused:
        assert code == 1 and "none of its tests ran" in text and "passed" not in text
    assert not (tmp_path / "none").exists()
    for (code, text), name in ((no, "verdict"), (yes, "passed")):
        found = {row.verified for row in rows.read(tmp_path / name / "cpu.csv")}
        assert code == 0 and found == {"yes" if name == "passed" else "no"}, text


def test_saved_bytes_counts_storages_once():
    """Of three kept tensors, one is an input, and two lie in one storage."""
    x = torch.ones(4, requires_grad=True)

    def call(x):
        y = torch.exp(x)
        return y[:2] * y[2:] * x[:2]

    # exp keeps its result y, of 16 bytes; the products keep halves of y, x, and y[:2] * y[2:], of 8 bytes
    assert runpy.run_path(BENCHMARKS / "test_memory.py")["saved_bytes"](call, (x,)) == 16 + 8


# Comparison


def made_row(**changed):
    """A row of ours that took 100 to 130 us."""
    common = {"machine": "M", "threads": 2, "isa": "AVX2", "torch": "2", "fastelbo": "0", "python": "3", "commit": "a"}
    common |= {"verified": "yes", "timestamp": "2026-01-01T00:00:00Z", "op": "gaussian_kl", "case": "", "bytes": 1}
    common |= {"pass_": "forward", "contestant": "cpu", "shape": "8x16", "dtype": "float32", "rounds": 30}
    common |= {"min_us": 100.0, "p20_us": 105.0, "median_us": 110.0, "p80_us": 130.0}
    return rows.Row(**common | changed)


def scaled(row, factor, **changed):
    times = ("min_us", "p20_us", "median_us", "p80_us")
    return dataclasses.replace(row, **{name: factor * getattr(row, name) for name in times} | changed)


@pytest.mark.parametrize(
    ("factor", "changed", "of_rivals", "mark"),
    [
        (1.05, {}, 1.0, ""),
        (1.25, {}, 1.0, ""),  # the fastest, 125 us, is no slower than one in five of the older ones
        (1.35, {}, 1.0, "SLOWER"),
        (1.35, {"p80_us": 500.0}, 1.0, "SLOWER"),  # noise of the new run alone is no excuse
        (0.95, {}, 1.0, ""),
        (0.8, {}, 1.0, ""),  # 104 us at the 80th percentile
        (0.7, {}, 1.0, "faster"),
        (0.7, {"p80_us": 500.0}, 1.0, ""),
        (9.0, {"machine": "N"}, 1.0, "another machine"),
        (9.0, {"threads": 1}, 1.0, "another machine"),
        (9.0, {"shape": "9x9"}, 1.0, "no older row"),
        (9.0, {"timing": "graph"}, 1.0, "no older row"),
        (1.5, {}, 1.3, "SLOWER"),  # by more than the rivals, which tell how the machine has changed
        (1.5, {}, 1.4, ""),
        (0.6, {}, 0.7, "faster"),
        (0.6, {}, 0.6, ""),
    ],
)
def test_what_counts_as_slower(factor, changed, of_rivals, mark):
    then = [made_row(), made_row(contestant="eager")]
    now = [scaled(then[0], factor, timestamp="2026-02-01T00:00:00Z", **changed), scaled(then[1], of_rivals)]
    found = compare.changes(now, then)
    assert [compare.line(change)[-1] for change in found] == [mark]
    assert ("ANOTHER MACHINE" in compare.table(found)) == (mark == "another machine")
    assert bool(compare.failure(found, 1.1)) == (mark in ("SLOWER", "another machine", "no older row"))
    assert bool(compare.failure(found, 1.5)) == (mark in ("another machine", "no older row"))


def test_times_that_do_not_spread_need_a_tenth():
    then = made_row(p20_us=100.1, median_us=100.2, p80_us=100.3)
    marks = [compare.line(compare.changes([scaled(then, factor)], [then])[0])[-1] for factor in (1.09, 1.11)]
    assert marks == ["", "SLOWER"]


def test_the_newest_older_row_of_this_machine_counts():
    old = made_row()
    newer = scaled(old, 2, commit="b", timestamp="2026-02-01T00:00:00Z")
    elsewhere = scaled(old, 3, machine="N", timestamp="2026-03-01T00:00:00Z")
    rivals = [made_row(contestant=name) for name in ("eager", "copy", "compile")]
    now = [scaled(old, 2.1), *(scaled(row, factor) for row, factor in zip(rivals, (1.5, 2.0, 9.0), strict=True))]
    (change,) = compare.changes(now, [newer, elsewhere, old, *rivals])
    assert change.mark == ""
    assert change.then == newer and change.ratio == pytest.approx(1.05) and change.rivals == pytest.approx(2)
    assert compare.newest(old, [elsewhere]) == elsewhere


def test_rows_to_compare_with(tmp_path):
    """Of a file, a folder in which there is something else too, or a commit."""
    first, second = made_row(commit="abc1"), made_row(commit="def2", op="sampling")
    rows.append(tmp_path / "cpu.csv", [first])
    rows.append(tmp_path / "sampling_cpu.csv", [second])
    for other in ("memory_cpu.csv", "conv_candidates_h100.csv"):
        shutil.copy(BENCHMARKS / "results" / other, tmp_path)
    assert compare.baseline(str(tmp_path), Path()) == [first, second]
    assert compare.baseline(str(tmp_path / "cpu.csv"), Path()) == [first]
    assert compare.baseline("def", tmp_path) == [second]
    with pytest.raises(ValueError, match="no row of such a commit"):
        compare.baseline("123", tmp_path)


def test_comparison_of_a_run(quick_run, tmp_path):
    """With rows of the same case and machine that are made a hundred times as fast or slow, or are elsewhere's."""
    *_, found, folder = quick_run
    (stored,) = (row for row in found["cpu.csv"] if row.contestant == "cpu" and row.case == "standard normal")
    made = {"fast": scaled(stored, 0.01), "slow": scaled(stored, 100), "elsewhere": scaled(stored, 1, machine="Else")}
    for name, row in made.items():
        rows.append(tmp_path / f"{name}.csv", [row])
    options = (*TINY, "-k", "standard and forward-host", "--rounds", "2", "--no-save", "--results", folder)
    fast, slow, elsewhere, shown, commit, older = sessions(
        *((*options, "--compare", tmp_path / f"{name}.csv", "--fail-slower", "2") for name in made),
        *((*options, "--compare", where) for where in (tmp_path / "fast.csv", stored.commit[:6], STORED)),
    )
    assert fast[0] == 1 and "SLOWER" in fast[1] and "FAILED: 1 of 1 are slower by more than 2x" in fast[1]
    assert slow[0] == 0 and " faster\n" in slow[1] and "0 slower, 1 faster" in slow[1]
    assert elsewhere[0] == 1 and "ANOTHER MACHINE" in elsewhere[1] and "no row from this machine" in elsewhere[1]
    assert "0 neither, 1 of another machine, 0 without" in elsewhere[1]
    assert shown[0] == 0 and "SLOWER" in shown[1] and "FAILED" not in shown[1]
    assert commit[0] == 0 and "0 without an older row" in commit[1]
    assert older[0] == 0 and "commit 4b0188b" in older[1]  # a file of fewer columns


# Rows


def test_rows_come_back(tmp_path):
    """Those of a GPU, which have something in every column."""
    made, path = rows.read(ON_GPU), tmp_path / "cuda.csv"
    rows.append(path, made)
    assert rows.read(path) == made
    rows.append(path, made[:1])
    assert len(path.read_text().splitlines()) == 1 + len(made) + 1


def test_files_with_fewer_columns(tmp_path):
    """They are read, and take rows that have nothing in the columns they lack; no other."""
    path = shutil.copy(STORED, tmp_path / "cpu.csv")
    before = path.read_text()
    stored = rows.read(path)
    assert stored and all(row.timing == "host" and not row.on_gpu for row in stored)
    rows.append(path, stored[:2])
    assert path.read_text().startswith(before)
    assert rows.read(path) == rows.read(STORED)
    with pytest.raises(ValueError, match="has other columns"):
        rows.append(path, rows.read(ON_GPU)[:1])
    assert rows.read(path) == rows.read(STORED)
