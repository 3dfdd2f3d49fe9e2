"""tools/gpu.sh and tools/sanitize.py, as far as a machine without a GPU can tell: what they refuse, that they run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fresh_python
import pytest
from ops import GAUSSIAN

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "gpu.sh"


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


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def results(tmp_path):
    """A folder of results that holds something."""
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "cuda.csv").write_text("what was measured before\n")
    return folder


def assert_refused(done, sentence, folder, before):
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("gpu.sh: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr
    assert contents(folder) == before


def test_gpu_script_explains_itself():
    done = run("bash", SCRIPT, "--help")
    assert done.returncode == 0
    for option in ("--quick", "--skip-build", "--skip-tests", "--skip-benchmarks", "--wheel", "--out", "Exit status"):
        assert option in done.stdout
    assert "--convolutions" not in done.stdout


def test_gpu_script_without_a_gpu(results, pretended_gpu, tmp_path):
    """From any folder, and where the folder of results does not exist yet."""
    before = contents(results)
    done = run("bash", SCRIPT, "--out", results, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert_refused(done, "no GPU", results, before)
    done = run("bash", SCRIPT, "--out", tmp_path / "none", cwd=tmp_path, **pretended_gpu(None))
    assert_refused(done, "no GPU", results, before)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments", [["--fast"], ["--out"], ["--wheel", "none.whl"]], ids=str)
def test_gpu_script_with_wrong_arguments(arguments, results):
    done = run("bash", SCRIPT, *arguments, CUDA_VISIBLE_DEVICES="")
    assert_refused(done, arguments[-1], results, contents(results))


@pytest.fixture
def pretended_gpu(tmp_path):
    """A torch that finds a GPU with so much memory free, or none."""

    def make(gib):
        text = f"""
class cuda:
    is_available = staticmethod(lambda: {gib is not None})
    mem_get_info = staticmethod(lambda: ({gib} * 2**30, 80 * 2**30))
"""
        (tmp_path / "torch.py").write_text(text)
        return {"PYTHONPATH": str(tmp_path)}

    return make


def test_gpu_script_with_too_little_memory(pretended_gpu, results):
    done = run("bash", SCRIPT, "--out", results, **pretended_gpu(3))
    assert_refused(done, "3.0 GiB of 80.0 GiB free", results, contents(results))


def test_gpu_script_without_nvcc(pretended_gpu, results, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    environment = {**pretended_gpu(40), "PATH": str(tools), "CUDA_HOME": ""}
    done = run("bash", SCRIPT, "--out", results, **environment)
    assert_refused(done, "no nvcc", results, contents(results))


PYTHON = """# stands in for Python with a GPU: writes down what it is called for, and for how long others ran beside it
echo "$*" >>"$CALLS"
case "$*" in
*--no-save*--shape*large*) exec sleep 300 ;;
*--junitxml*)
    while [ "$1" != --junitxml ]; do shift; done
    echo '<testsuites/>' >"$2"
    [ "$FASTELBO_TESTS_END" -gt "$(date +%s)" ] || exit 9
    exit 1
    ;;
*benchmarks/test_convolutions.py*--results*) echo 'op,case' >"$OUT/conv_cuda.csv" ;;
*sanitize.py*) [ -z "${WATCHED:-}" ] || exit 9 ;;
*report.py*--slower*) echo "a rival is faster in 0 of 1 cases" ;;
esac
"""


@pytest.fixture
def stubs(tmp_path):
    """An environment whose Python and tools write down how they are called, and the file that they write to."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    sanitizer = '[ "$2" = memcheck ] || export WATCHED=1\nexec "${@:5}"\n'
    sleep = f'[ "$1" = 3 ] || exec {shutil.which("sleep")} "$@"\n'  # no tool here needs a port of its own
    tools = {"python": PYTHON, "compute-sanitizer": sanitizer, "nvidia-smi": "", "sleep": sleep}
    for name, text in tools.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {"PYTHON": str(folder / "python"), "PATH": path, "CUDA_HOME": "", "CALLS": str(calls)}, calls


def test_gpu_script_runs_every_stage(stubs, tmp_path):
    """Tests once, with memory and compilers beside them; then the timings; a stage that fails stops nothing."""
    (wheel := tmp_path / "fastelbo.whl").touch()
    environment, calls = stubs
    out = tmp_path / "out"
    done = run("bash", SCRIPT, "--wheel", wheel, "--out", out, "--commit", "abc", OUT=str(out), **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    verdicts = dict(line.split(maxsplit=1) for line in done.stdout.replace("timings of ", "").splitlines()[-9:-1])
    assert list(verdicts) == ["install", "backends", "tests", "memory", "the", "convolutions", "memcheck", "racecheck"]
    failed = {name for name, verdict in verdicts.items() if "FAILED" in verdict}
    assert failed == {"tests", "racecheck"} and "exit status 9" in verdicts["racecheck"]
    assert "a rival is faster" in done.stdout.splitlines()[-10]
    assert "compiling for large tensors: exit status 143" in next(out.glob("*.log")).read_text()
    called = calls.read_text().splitlines()
    (tests,) = (k for k, line in enumerate(called) if "--junitxml" in line)
    for name in ("test_gpu.py", "test_masked_conv2d.py", "test_gaussian_kl.py"):
        assert f" tests/{name}" in called[tests]
    assert not any(name in called[tests] for name in ("build", "wheel", "cuda_on_cpu", "distributed", "layout"))
    timed = [line for line in called if "--verdict" in line]
    assert ["test_speed.py" in timed[0], "test_convolutions.py" in timed[1], len(timed)] == [True, True, 2]
    assert all("--unverified" in line and called.index(line) > tests for line in timed)
    assert sum("sanitize.py --few" in line for line in called) == 3
    assert sum("--no-save" in line for line in called) == 4


def test_gpu_script_skips_stages(stubs, tmp_path):
    environment, calls = stubs
    skipped = ("--skip-build", "--skip-tests", "--skip-sanitizer")
    done = run("bash", SCRIPT, *skipped, "--quick", "--out", tmp_path, OUT=str(tmp_path), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    called = calls.read_text()
    assert "test_speed.py" in called and "--quick" in called and "test_memory.py" in called
    assert not any(word in called for word in ("--junitxml", "--verdict", "sanitize", "pip", "--no-save", "--shape"))


RUN_PYTEST = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
ALONE = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # others' plugins take as long as everything else
RUN_SCRIPT = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def test_every_second_case_of_triton_runs_on_a_gpu():
    """Of a product of three parameters: any two values of two of them meet. None runs when the time is up."""
    pretended = "import torch; torch.cuda.is_available = lambda: True"
    options = ("-q", "-p", "no:cacheprovider", "--collect-only", "-m", "not slow")
    chosen = ("tests/test_gpu.py", "-k", "test_rows_of_any_length and triton")
    done = fresh_python.run(f"{pretended}; {RUN_PYTEST}", *options, *chosen, cwd=ROOT, **ALONE)
    pattern = r"\[triton-(\d+)-torch\.(\w+)-([\w-]+)\]"
    found = re.findall(pattern, done.stdout)
    columns, dtypes, names = ([one[k] for one in found] for k in range(3))
    assert len(found) == len(set(found)) == 5 * 2 * len(GAUSSIAN) / 2
    assert len(set(zip(columns, dtypes, strict=True))) == 5 * 2
    assert len(set(zip(columns, names, strict=True))) == 5 * len(GAUSSIAN)
    assert len(set(zip(dtypes, names, strict=True))) == 2 * len(GAUSSIAN)
    late = ("-q", "-p", "no:cacheprovider", "tests/test_gpu_script.py", "-k", "explains")
    done = fresh_python.run(RUN_PYTEST, *late, cwd=ROOT, check=False, FASTELBO_TESTS_END="1", **ALONE)
    assert done.returncode == 1 and "there was no time left to run it" in done.stdout


def test_the_calls_for_compute_sanitizer_agree_with_the_reference():
    for few, calls in (((), 50), (("--few",), 14)):
        arguments = (ROOT / "tools" / "sanitize.py", "--device", "cpu", *few)
        done = fresh_python.run(RUN_SCRIPT, *arguments, TRITON_INTERPRET="0")
        assert f"{calls} calls on cpu agree with the reference" in done.stdout
