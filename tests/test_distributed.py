"""1, 2 and 4 processes on one machine: sharded tensors, seeds of a group, training and its checkpoints.

What the ranks of a group do, case after case, is in distributed_cases.py; here are one test for each and torchrun.
"""

import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh_python
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ops import GAUSSIAN
from torch import distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import fastelbo
import train_distributed

ROOT = Path(__file__).parents[1]
CASES_FILE = Path(__file__).with_name("distributed_cases.py")
EXAMPLE = ROOT / "examples" / "train_distributed.py"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLE.parent)))}
TIMEOUT = 240  # seconds for a group of processes, which take a tenth of it where nothing else runs

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.usefixtures("one_thread"),
]


def case_names():
    """The names of the cases, without the import of the examples that they need."""
    lines = CASES_FILE.read_text().splitlines()
    names = {"@op": [], "@case": []}
    for line, following in itertools.pairwise(lines):
        if line in names:
            names[line].append(following.split("(")[0].removeprefix("def "))
    return [*(f"gaussian_{name}" for name in dict.fromkeys((*GAUSSIAN, *names["@op"]))), *names["@case"]]


TRAINING = ["vae_trains_as_one_process", "pixelcnn_trains_as_one_process"]
COMPILED = ["compiled_ops", "compiled_replicas_and_shards"]  # for seconds, on each rank
GROUPS = {  # what a group of so many ranks runs, quickly and slowly
    (1, "quick"): [*TRAINING, "compiled_replicas_and_shards"],
    (2, "quick"): case_names(),
    (4, "quick"): [name for name in case_names() if name not in (*COMPILED, *TRAINING)],
    (4, "slow"): [*COMPILED, *TRAINING],  # test_four_ranks_resume_from_two trains on four, too
}


def forked(ranks, directory, *what):
    """The exit status, output and errors of ranks forked of one process, for each would import for seconds."""
    directory.mkdir(exist_ok=True)
    code = "import distributed_cases; distributed_cases.start()"
    done = fresh_python.run(code, ranks, directory, *what, imported="distributed_cases", check=False, **ENVIRONMENT)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case of each rank came to, by the group; it runs once."""

    @functools.cache
    def run(ranks, pace):
        directory = tmp_path_factory.mktemp(f"ranks{ranks}")
        _, _, err = forked(ranks, directory, "cases", *GROUPS[ranks, pace])
        for rank in range(ranks):
            assert (directory / f"{rank}.json").exists(), err[-2000:]
        return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]

    return run


@pytest.mark.parametrize(
    "ranks, pace, case",
    [
        pytest.param(*group, name, marks=[pytest.mark.slow] if group[1] == "slow" else [], id=f"{group[0]}-{name}")
        for group, names in GROUPS.items()
        for name in names
    ],
)
def test_case(outcomes, ranks, pace, case):
    for rank, outcome in enumerate(outcomes(ranks, pace)):
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"


# torchrun


def torchrun(ranks, output, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, EXAMPLE, "--output", output, "--batch-size", "128", *map(str, options)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process, timeout=TIMEOUT):
    """The output of a job, which is killed with all its ranks when its time is over."""
    try:
        return process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def history(output):
    """The history in the checkpoint of a finished job."""
    (directory,) = (output / "checkpoint").iterdir()
    notes = {"notes": ""}
    dcp.load(notes, checkpoint_id=directory, no_dist=True)
    return json.loads(notes["notes"])[1]


def alone(output, epochs):
    """The history of one process."""
    return train_distributed.main(["--output", str(output), "--batch-size", "128", "--epochs", str(epochs)])


def test_killed_rank_ends_the_job_and_a_restart_continues_the_curve(tmp_path):
    process = torchrun(2, tmp_path / "job", "--epochs", 100000)
    end = time.monotonic() + TIMEOUT
    while not list(tmp_path.glob("job/checkpoint/*/checksums.json")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in ranks if EXAMPLE.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, err = finished(process, 60)
    assert process.returncode != 0
    assert f"{EXAMPLE.name} FAILED" in err and "SIGKILL" in err
    epochs = max(int(path.parent.name) for path in tmp_path.glob("job/checkpoint/*/checksums.json")) + 2
    options = ("--output", tmp_path / "job", "--batch-size", 128, "--epochs", epochs, "--resume")
    code, out, err = forked(2, tmp_path / "ranks", "example", *options)
    assert code == 0, err
    assert out.count("ELBO of test images") == 1  # the first rank alone prints
    # In three epochs, which end near 1 nat, rounding makes 5e-7; a machine that saves more before the kill has more.
    want = torch.tensor(alone(tmp_path / "alone", epochs))
    torch.testing.assert_close(torch.tensor(history(tmp_path / "job")), want, rtol=0, atol=1e-3)


def test_four_ranks_resume_from_two(tmp_path):
    for ranks, epochs, more in ((2, 1, ["--parallel", "fsdp"]), (4, 2, ["--parallel", "fsdp", "--resume"])):
        options = ("--output", tmp_path / "job", "--batch-size", 128, "--epochs", epochs, *more)
        code, _, err = forked(ranks, tmp_path / f"ranks{ranks}", "example", *options)
        assert code == 0, err
    want = torch.tensor(alone(tmp_path / "alone", 2))
    torch.testing.assert_close(torch.tensor(history(tmp_path / "job")), want, rtol=0, atol=1e-4)


def test_ranks_refuse_with_one_sentence(tmp_path):
    code, _, err = forked(2, tmp_path / "ranks", "example", "--output", tmp_path / "job", "--resume")
    assert code != 0
    assert err.count(f"{EXAMPLE.name}: --resume: there is no checkpoint in {tmp_path / 'job' / 'checkpoint'}") == 1


# One process


@pytest.fixture
def job(tmp_path):
    """Runs the example in this process; returns its history."""

    def run(*options):
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # whatever state a new process would be in
        try:
            return train_distributed.main(["--batch-size", "256", "--output", str(tmp_path), *map(str, options)])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return run


def contents(directory):
    """The bytes of all files."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(capsys, directory, run, *expected):
    """A run ends with code 2 and one sentence that names the argument, and changes nothing."""
    before = contents(directory)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run()
    assert exit_info.value.code == 2 and contents(directory) == before
    (sentence,) = capsys.readouterr().err.splitlines()
    for part in expected:
        assert part in sentence


def checkpoint(directory, tmp_path):
    """All that a checkpoint holds."""
    dcp_to_torch_save(directory, tmp_path / "whole.pt")
    return torch.load(tmp_path / "whole.pt")


def test_resumed_run_is_bit_identical(tmp_path):
    def run(name, *options):
        return train_distributed.main(["--batch-size", "256", "--output", str(tmp_path / name), *options])

    straight = run("straight", "--epochs", "4")
    assert run("halves", "--epochs", "2") == straight[:2]
    torch.manual_seed(12345)  # whatever state a new process would be in
    assert run("halves", "--epochs", "4", "--resume") == straight
    want, got = (checkpoint(tmp_path / name / "checkpoint" / "4", tmp_path) for name in ("straight", "halves"))
    assert got["notes"] == want["notes"] and torch.equal(got["generator"], want["generator"])
    states = [(parts["model"], parts["optimizer"]["state"]) for parts in (got, want)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert len(want["model"]) == len(want["optimizer"]["state"]) == 13


def test_resume_of_a_finished_run_trains_no_further(job, tmp_path):
    first = job("--epochs", 1)
    before = contents(tmp_path / "checkpoint")
    assert job("--epochs", 1, "--resume") == first and contents(tmp_path / "checkpoint") == before


def test_interrupted_run_goes_on_exactly(job, tmp_path, monkeypatch, capsys):
    steps, take = itertools.count(1), torch.optim.Adam.step

    def interrupted_step(optimizer):
        if next(steps) == 8:  # of five in an epoch
            raise KeyboardInterrupt
        take(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted_step)
        with pytest.raises(SystemExit) as exit_info:
            job("--epochs", 2)
    assert exit_info.value.code == 130
    assert f"--resume goes on from what is in {tmp_path / 'checkpoint'}" in capsys.readouterr().err
    resumed = job("--epochs", 2, "--resume")
    assert resumed == train_distributed.main(
        ["--batch-size", "256", "--epochs", "2", "--output", str(tmp_path / "straight")]
    )


def test_full_disk_leaves_the_last_checkpoint(job, tmp_path, capsys):
    job("--epochs", 1)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, former[1]))
    try:
        with pytest.raises(SystemExit) as exit_info:
            job("--epochs", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert exit_info.value.code == 2 and f"cannot write to {tmp_path}" in capsys.readouterr().err
    assert len(job("--epochs", 2, "--resume")) == 2


def damaged(case, raw):
    half = len(raw) // 2
    flipped = raw[:half] + bytes(255 - byte for byte in raw[half : half + 64]) + raw[half + 64 :]
    return {"truncated": raw[:half], "bit flips": flipped, "garbage": b"x" * 99, "empty": b""}[case]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "checksums.json"])
@pytest.mark.parametrize("case", ["truncated", "bit flips", "garbage", "empty"])
def test_damaged_checkpoint_is_refused(job, tmp_path, capsys, case, file):
    job("--epochs", 1)
    path = tmp_path / "checkpoint" / "1" / file
    path.write_bytes(damaged(case, path.read_bytes()))
    refused(capsys, tmp_path, lambda: job("--epochs", 2, "--resume"), "--resume", str(path.parent), "damaged")


@pytest.mark.parametrize(
    "history", [{"train": 1.0}, "12", None, 3, [1.0, 2.0], [(1.0,)], [(1.0, "x")], [(1.0, 2.0), {}]]
)
def test_checkpoint_without_a_history_is_refused(job, tmp_path, capsys, monkeypatch, history):
    """Once it would have been resumed, and have failed after hours of training, when the curve is drawn."""
    with monkeypatch.context() as patch:
        dumps = json.dumps
        patch.setattr(json, "dumps", lambda what: dumps([what[0], history] if isinstance(what, list) else what))
        job("--epochs", 1)
    refused(capsys, tmp_path, lambda: job("--epochs", 3, "--resume"), "--resume", "1 is damaged")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "1"], ("--resume", "'seed': 0", "'seed': 1")),
        (["--batch-size", "8"], ("--resume", "'batch_size': 256", "'batch_size': 8")),
        (["--epochs", "1"], ("--epochs", "2")),
    ],
)
def test_resume_of_another_run_is_refused(job, tmp_path, capsys, options, expected):
    job("--epochs", 2)
    refused(capsys, tmp_path, lambda: job("--epochs", 2, *options, "--resume"), *expected)


def test_resume_without_a_checkpoint_is_refused(job, tmp_path, capsys):
    refused(capsys, tmp_path, lambda: job("--resume"), "--resume: there is no checkpoint in", str(tmp_path))


# Alone


@pytest.mark.parametrize("function", ["same_seed", "independent_seed"])
def test_seed_without_a_process_group_says_what_to_do(function):
    with pytest.raises(RuntimeError, match=r"got none: start the script with torchrun"):
        getattr(fastelbo.distributed, function)(3)


def test_noise_offset_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"init_process_group"):
        fastelbo.distributed.noise_offset(torch.zeros(4, 3))
    assert fastelbo.distributed.noise_offset(torch.zeros(4, 3, 2), first=5) == 30


def test_import_does_not_pay_for_sharded_tensors():
    code = "import sys, torch, fastelbo; fastelbo.gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3));"
    code += "sys.exit('torch.distributed.tensor' in sys.modules)"
    fresh_python.run(code)
