"""1, 2 and 4 processes on one machine: sharded tensors, seeds of a group, training and its checkpoints.

What the ranks of a group do, case after case, is in distributed_cases.py; here are one test for each and torchrun.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ops import GAUSSIAN
from torch import distributed as dist

import fastelbo

ROOT = Path(__file__).parents[1]
CASES_FILE = Path(__file__).with_name("distributed_cases.py")
EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), str(EXAMPLES)))}
TIMEOUT = 240  # seconds for a group of processes, which take a tenth of it where nothing else runs

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


def case_names():
    """The names of the cases, without the import of the examples that they need."""
    lines = CASES_FILE.read_text().splitlines()
    names = {"@op": [], "@case": []}
    for line, following in itertools.pairwise(lines):
        if line in names:
            names[line].append(following.split("(")[0].removeprefix("def "))
    return [*(f"gaussian_{name}" for name in dict.fromkeys((*GAUSSIAN, *names["@op"]))), *names["@case"]]


TRAINING = ["vae_trains_as_one_process", "pixelcnn_trains_as_one_process", "compiled_replicas_and_shards"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each case of each rank came to, by the number of ranks; a group runs once."""
    known = {}

    def run(ranks):
        if ranks not in known:
            directory = tmp_path_factory.mktemp(f"ranks{ranks}")
            processes = [
                subprocess.Popen(
                    [sys.executable, CASES_FILE, str(rank), str(ranks), str(directory)],
                    env=ENVIRONMENT,
                    stdout=subprocess.DEVNULL,
                    stderr=(directory / f"{rank}.err").open("w"),
                )
                for rank in range(ranks)
            ]
            end = time.monotonic() + TIMEOUT
            try:
                for process in processes:
                    process.wait(max(1, end - time.monotonic()))
            finally:
                for process in processes:
                    process.kill()
                    process.wait(10)
            for rank in range(ranks):
                assert (directory / f"{rank}.json").exists(), (directory / f"{rank}.err").read_text()[-2000:]
            known[ranks] = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(ranks)]
        return known[ranks]

    return run


FOUR_RANKS = [name for name in case_names() if name != "compiled_ops"]
CASES = [(ranks, name) for ranks, names in ((1, TRAINING), (2, case_names()), (4, FOUR_RANKS)) for name in names]


@pytest.mark.parametrize("ranks, case", CASES)
def test_case(outcomes, ranks, case):
    for rank, outcome in enumerate(outcomes(ranks)):
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"


# torchrun


def torchrun(ranks, script, output, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.Popen(
        [*command, EXAMPLES / script, "--output", output, *map(str, options)],
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
    import torch.distributed.checkpoint as dcp

    (directory,) = (output / "checkpoint").iterdir()
    notes = {"notes": ""}
    dcp.load(notes, checkpoint_id=directory, no_dist=True)
    return json.loads(notes["notes"])[1]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Runs an example in this process, without pictures; returns its history."""

    def run(script, *options):
        example, output = __import__(script), tmp_path / "alone"
        monkeypatch.setattr(example, "save_pictures", lambda *args: None)
        assert example.main(["--output", str(output), *map(str, options)]) == 0
        return torch.load(output / "checkpoint.pt")["history"]

    return run


def test_killed_rank_ends_the_job_and_a_restart_continues_the_curve(tmp_path, alone):
    options = ("--batch-size", 128)
    process = torchrun(2, "train_vae.py", tmp_path / "job", *options, "--epochs", 100000)
    end = time.monotonic() + TIMEOUT
    while not list(tmp_path.glob("job/checkpoint/*/.metadata")) and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in ranks if b"train_vae.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    _, err = finished(process, 60)
    assert process.returncode != 0
    assert "train_vae.py FAILED" in err and "SIGKILL" in err
    epochs = max(int(path.parent.name) for path in tmp_path.glob("job/checkpoint/*/.metadata")) + 2
    process = torchrun(2, "train_vae.py", tmp_path / "job", *options, "--epochs", epochs, "--resume")
    out, err = finished(process)
    assert process.returncode == 0, err
    assert out.count("ELBO  ") == 1  # the first rank alone prints
    want = alone("train_vae", *options, "--epochs", epochs)
    # In three epochs, which end near 1 nat, rounding makes 5e-7; a machine that saves more before the kill has more.
    torch.testing.assert_close(torch.tensor(history(tmp_path / "job")), torch.tensor(want), rtol=0, atol=1e-3)


def test_four_ranks_resume_from_two(tmp_path, alone):
    options = ("--batch-size", 128, "--channels", 8, "--blocks", 1, "--binary")
    for ranks, epochs, more in ((2, 1, ["--parallel", "fsdp"]), (4, 2, ["--parallel", "fsdp", "--resume"])):
        process = torchrun(ranks, "train_pixelcnn.py", tmp_path / "job", *options, "--epochs", epochs, *more)
        _, err = finished(process)
        assert process.returncode == 0, err
    want = alone("train_pixelcnn", *options, "--epochs", 2)
    torch.testing.assert_close(torch.tensor(history(tmp_path / "job")), torch.tensor(want), rtol=0, atol=1e-5)


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
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--parallel", "fsdp"), "--parallel fsdp goes with torchrun"),
        (("--accumulate", "0"), "--accumulate must be from 1"),
        (("--accumulate", "5", "--batch-size", "64"), "--batch-size must be a multiple of the 1 rank(s) times"),
    ],
)
@pytest.mark.parametrize("script", ["train_vae", "train_pixelcnn"])
def test_bad_option_is_refused(tmp_path, capsys, script, options, expected):
    example = __import__(script)
    assert example.main(["--output", str(tmp_path / "out"), *options]) == 2
    assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())
