"""tools/gpu.sh and tools/sanitize.py, as far as a machine without a GPU can tell: what they refuse, that they run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_gpu_script_without_a_gpu(results, tmp_path):
    """From any folder, and where the folder of results does not exist yet."""
    before = contents(results)
    for out in (results, tmp_path / "none"):
        done = run("bash", SCRIPT, "--out", out, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
        assert_refused(done, "no GPU", results, before)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("arguments", [["--fast"], ["--out"], ["--wheel", "none.whl"]], ids=str)
def test_gpu_script_with_wrong_arguments(arguments, results):
    done = run("bash", SCRIPT, *arguments, CUDA_VISIBLE_DEVICES="")
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


def test_the_calls_for_compute_sanitizer_agree_with_the_reference():
    done = run(sys.executable, ROOT / "tools" / "sanitize.py", "--device", "cpu", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "calls on cpu agree with the reference on cpu" in done.stdout
