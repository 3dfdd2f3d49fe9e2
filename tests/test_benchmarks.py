"""The benchmarks' own tools, as far as a machine without a GPU can tell: gpu.sh, collection, rows, report and plot."""

import dataclasses
import os
import shutil
import subprocess
import sys
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


def test_plot_of_stored_rows(tmp_path):
    done = tool("plot.py", STORED, "--output", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["speed_cpu.png"]


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


def test_drop_ins_are_timed(modules, tmp_path):
    import rows

    done = tool("dropins.py", "--op", "compat.pythae", "--rounds", "2", "--unverified", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compat.pythae sample_and_kl" in done.stdout and "UNVERIFIED" in done.stdout
    found = rows.read(tmp_path / "dropins_cpu.csv")
    assert [row.contestant for row in found] == ["cpu", "eager"] * 2
    ours, theirs, *_ = found
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
def test_a_drop_in_that_computes_something_else_is_not_timed(part, modules, monkeypatch, capsys, tmp_path):
    import dropins
    import rows

    right = next(drop_in for drop_in in dropins.DROP_INS if drop_in.case == "sample_and_kl")
    wrong = dataclasses.replace(right, op="compat.wrong", theirs=mistaken(part))
    options = ("--rounds", "2", "--unverified", "--results", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dropins.py", *options])
    monkeypatch.setattr(dropins.host_clock, "keep_freed_memory", lambda: None)  # for good, in this process
    with pytest.raises(SystemExit, match=r"^not timed: compat\.wrong sample_and_kl: ") as stopped:
        dropins.main([wrong, right])
    assert "output" in stopped.value.code
    assert {row.op for row in rows.read(tmp_path / "dropins_cpu.csv")} == {"compat.pythae"}
    assert "compat.wrong" not in capsys.readouterr().out


def test_drop_ins_whose_tests_fail_are_not_timed(tmp_path):
    verdict = tmp_path / "verdict.xml"
    verdict.write_text("<testsuites/>")
    options = ("--op", "compat.pythae", "--rounds", "2", "--verdict", verdict, "--results", tmp_path / "none")
    done = tool("dropins.py", *options)
    assert done.returncode == 1 and "none of its tests ran" in done.stderr
    assert not (tmp_path / "none").exists()
