import gzip
import importlib.util
import itertools
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

SCRIPT = Path(__file__).parents[1] / "examples" / "train_vae.py"
CPU = torch.device("cpu")
PICTURES = ("samples.png", "reconstructions.png", "traversal.png", "training_curve.png")


@pytest.fixture(scope="module")
def vae():
    spec = importlib.util.spec_from_file_location("train_vae", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: on a busy machine, threads mostly wait for each other
    yield module
    torch.set_num_threads(threads)
    del sys.modules[spec.name]


@pytest.fixture
def no_pictures(vae, monkeypatch):
    monkeypatch.setattr(vae, "save_pictures", lambda *args: None)


def idx_bytes(images, magic=0x803):
    return struct.pack(f">{1 + images.ndim}I", magic, *images.shape) + images.tobytes()


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)  # neither square nor of one batch


@pytest.fixture
def idx(tmp_path, images):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(idx_bytes(images))
    return path


def training_on_digits(vae, *options):
    args = vae.parse_args(options)
    data = vae.load_data(None, args.seed, CPU)
    return vae.start_training(data, args, CPU), data


def contents(directory):
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def assert_same(a, b):
    """Equal to the last bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_resumed_run_is_bit_identical(vae, tmp_path, no_pictures):
    def run(directory, epochs, *options):
        torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # whatever state a new process would be in
        output = tmp_path / directory
        args = ["--output", str(output), "--epochs", str(epochs), "--batch-size", "256", *options]
        assert vae.main(args) == 0
        return torch.load(output / "checkpoint.pt")

    straight = run("straight", 4)
    half = run("halves", 2)
    assert not torch.equal(half["model"]["x_logvar"], straight["model"]["x_logvar"])
    assert_same(run("halves", 4, "--resume"), straight)
    assert len(straight["history"]) == 4


def test_resume_of_a_finished_run_trains_no_further(vae, tmp_path, idx, no_pictures):
    args = ["--output", str(tmp_path / "out"), "--data", str(idx), "--epochs", "2"]
    assert vae.main(args) == 0
    before = contents(tmp_path)
    assert vae.main([*args, "--resume"]) == 0
    assert contents(tmp_path) == before


def test_failed_save_leaves_the_last_checkpoint(vae, tmp_path, monkeypatch):
    training, _ = training_on_digits(vae)
    path = tmp_path / "checkpoint.pt"
    training.save(path)
    before = contents(tmp_path)

    def break_off(path, contents):
        with path.open("wb") as file:
            file.write(contents[:14])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", break_off)
    with pytest.raises(KeyboardInterrupt):
        training.save(path)
    assert contents(tmp_path) == before


def test_loss_decreases(vae):
    training, data = training_on_digits(vae)
    before = sum(vae.evaluate(training.model, data, "reference"))
    losses = [vae.train_epoch(training, data, "reference").mean().item() for _ in range(5)]
    after = sum(vae.evaluate(training.model, data, "reference"))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert after < before - 50  # from some 67 nats at the first step to below 0


def test_reference_and_cpu_give_the_same_loss_curve(vae):
    def curve(backend, *options):
        training, data = training_on_digits(vae, *options)
        return torch.cat([vae.train_epoch(training, data, backend) for _ in range(5)])[:100]

    reference, cpu = curve("reference"), curve("cpu")
    assert len(cpu) == 100
    # Both draw the same noise, so only rounding differs. Over 100 steps and seeds 0 to 4 the curves, which fall from 65
    # to about -5, part by 1.9e-5 at most: two to three units in the last place of a loss of 64. The loss crosses zero
    # on the way, so the bound is absolute: five times that, for other vector widths and matrix libraries. A gradient of
    # the KL wrong by one part in 10000 exceeds it sixfold.
    torch.testing.assert_close(cpu, reference, rtol=0, atol=1e-4)
    assert (curve("cpu", "--seed", "1") - cpu).abs().max() > 1


def test_the_three_ways_compared_are_the_same_loss(vae):
    torch.manual_seed(0)
    mean, logvar, x_logvar = torch.randn(8, 3), torch.randn(8, 3), torch.tensor(-1.0)
    x, x_mean = torch.rand(2, 8, 5)
    inputs = [tensor.requires_grad_() for tensor in (mean, logvar, x_mean, x_logvar)]
    results = []
    for way in (lambda *tensors: vae.fused(*tensors, "reference"), vae.eager, vae.distributions):
        z, loss = way(mean, logvar, x, x_mean, x_logvar)
        assert z.shape == mean.shape and z.requires_grad
        results.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_comparison_prints_the_ratios(vae, monkeypatch, capsys):
    monkeypatch.setattr(vae, "time_ways", lambda *args: [1e-3, 2e-3, 4.5e-3])
    vae.compare(64, 64, "reference", CPU)
    *_, small, large = capsys.readouterr().out.splitlines()
    assert small.split() == ["64x12", "64x64", "1000", "(1.00x)", "2000", "(2.00x)", "4500", "(4.50x)"]
    assert large.split()[:2] == ["4096x256", "4096x784"]


@pytest.mark.parametrize("name", ["a-idx3-ubyte", "a-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"])
def test_idx_images_are_those_written(vae, tmp_path, images, name):
    raw = idx_bytes(images)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    path = tmp_path if name.startswith("train") else tmp_path / name
    read = vae.read_idx_images(path)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, images)


def test_split_and_dequantisation(vae, idx, images):
    data = vae.load_data(idx, 3, CPU)
    assert data.levels == 256 and len(data.test) == len(images) // 6
    both = torch.cat([data.train, data.test]).numpy()
    np.testing.assert_array_equal(
        np.sort(both.reshape(len(images), -1), 0), np.sort(images.reshape(len(images), -1), 0)
    )
    assert_same(vae.load_data(idx, 3, CPU).test, data.test)
    assert not torch.equal(vae.load_data(idx, 4, CPU).test, data.test)
    x = vae.common.dequantise(data.test, data.levels, torch.Generator().manual_seed(0))
    assert x.min() >= 0 and x.max() < 1
    assert torch.equal((x * 256).floor().byte(), data.test.flatten(1))


def test_report_in_its_units(vae, monkeypatch, capsys):
    training, data = training_on_digits(vae)
    # A uniform density on the unit cube: 0 nats, and the code that spends log2 17 bits on every pixel.
    monkeypatch.setattr(vae, "evaluate", lambda *args: (-64 * math.log(2), 64 * math.log(2)))
    vae.report(training, data, "reference")
    out = capsys.readouterr().out
    assert "bits per dimension      4.087 (a uniform guess: 4.087)" in out


def test_tiny_run_draws_valid_pictures(vae, tmp_path, idx, capsys):
    output = tmp_path / "new" / "out"
    assert vae.main(["--data", str(idx), "--output", str(output), "--epochs", "2"]) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted([*PICTURES, "checkpoint.pt"])
    for name in PICTURES:
        picture = imread(output / name)
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.01
    assert "ELBO" in capsys.readouterr().out


LABELS = struct.pack(">2I", 0x801, 4) + bytes(4)
BAD_DATA = {
    "truncated": lambda good: good[:-1],
    "longer than its header says": lambda good: good + b"\0",
    "truncated header": lambda good: good[:9],
    "truncated gzip": lambda good: gzip.compress(good)[:-20],
    "damaged gzip": lambda good: b"\x1f\x8b" + good,
    "empty": lambda good: b"",
    "not IDX": lambda good: b"\x89PNG\r\n\x1a\n" + good,
    "labels": lambda good: LABELS,
    "labels, gzipped": lambda good: gzip.compress(LABELS),
    "zero images": lambda good: idx_bytes(np.zeros((0, 6, 5), np.uint8)),
    "one image": lambda good: idx_bytes(np.zeros((1, 6, 5), np.uint8)),
    "no pixels": lambda good: idx_bytes(np.zeros((4, 0, 5), np.uint8)),
}


def assert_refused(vae, capsys, directory, args, *expected):
    """Exit code 2, one sentence on stderr that names the argument, nothing written."""
    before = contents(directory)
    capsys.readouterr()
    assert vae.main([str(arg) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert contents(directory) == before
    assert out == "" and len(err.splitlines()) == 1
    for part in expected:
        assert part in err


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused(vae, tmp_path, images, capsys, case):
    path = tmp_path / "bad-idx3-ubyte"
    path.write_bytes(BAD_DATA[case](idx_bytes(images)))
    expected = "labels" if case.startswith("labels") else str(path)
    assert_refused(vae, capsys, tmp_path, ["--data", path, "--output", tmp_path / "out"], "--data", expected)


@pytest.mark.parametrize("name", ["missing", "missing/either", "."])
def test_missing_data_is_refused(vae, tmp_path, capsys, name):
    assert_refused(vae, capsys, tmp_path, ["--data", tmp_path / name, "--output", tmp_path / "out"], "--data")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--device", "gpu"),
        ("--device", "cuda:99"),
        ("--device", "meta"),
        ("--epochs", "0"),
        ("--epochs", "-3"),
        ("--batch-size", "0"),
        ("--seed", "-1"),
        ("--seed", str(2**70)),
    ],
)
def test_bad_option_is_refused(vae, tmp_path, capsys, option, value):
    assert_refused(vae, capsys, tmp_path, [option, value, "--output", tmp_path / "out"], option, value)


def test_backend_that_cannot_run_is_refused(vae, tmp_path, capsys):
    args = ["--backend", "cuda", "--device", "cpu", "--output", tmp_path / "out"]
    assert_refused(vae, capsys, tmp_path, args, "--backend", "backend 'cuda' cannot run")


@pytest.mark.parametrize("args", [["--backend", "numpy"], ["--epochs", "many"], ["--colour"]])
def test_argparse_refuses_with_the_same_exit_code(vae, tmp_path, capsys, args):
    with pytest.raises(SystemExit) as exit_info:
        vae.main([*args, "--output", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert args[0] in capsys.readouterr().err and not contents(tmp_path)


def test_help(vae, capsys):
    with pytest.raises(SystemExit) as exit_info:
        vae.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for option in ("backend", "data", "device", "epochs", "batch-size", "seed", "output", "compare", "resume"):
        assert f"--{option}" in out


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_output_with_a_file_in_the_way_is_refused(vae, tmp_path, idx, capsys, inside):
    (tmp_path / "out").write_text("in the way")
    args = ["--data", idx, "--output", tmp_path / "out" / inside]
    assert_refused(vae, capsys, tmp_path, args, "--output", str(tmp_path / "out"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_without_permission_is_refused(vae, tmp_path, idx, capsys):
    output = tmp_path / "out"
    output.mkdir(mode=0o500)
    assert_refused(vae, capsys, tmp_path, ["--data", idx, "--output", output], "--output", "Permission denied")


def test_resume_without_a_checkpoint_is_refused(vae, tmp_path, idx, capsys):
    args = ["--data", idx, "--output", tmp_path / "out", "--resume"]
    assert_refused(vae, capsys, tmp_path, args, "--resume", "checkpoint.pt")


@pytest.mark.parametrize("case", ["truncated", "bit flips", "garbage", "empty", "another file of torch"])
def test_damaged_checkpoint_is_refused(vae, tmp_path, idx, capsys, no_pictures, case):
    args = ["--data", idx, "--output", tmp_path / "out", "--epochs", "1"]
    assert vae.main([str(arg) for arg in args]) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    raw = path.read_bytes()
    if case == "another file of torch":
        torch.save([1, 2], path)
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 64]) + raw[middle + 64 :]
        path.write_bytes({"truncated": raw[:middle], "bit flips": flipped, "garbage": b"x" * 99, "empty": b""}[case])
    assert_refused(vae, capsys, tmp_path, [*args, "--resume"], "--resume", str(path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seed", "1"], ("--resume", "'seed': 0", "'seed': 1")),
        (["--batch-size", "8"], ("--resume", "'batch_size': 64", "'batch_size': 8")),
        (["--epochs", "1"], ("--epochs", "2")),
    ],
)
def test_resume_of_another_run_is_refused(vae, tmp_path, idx, capsys, no_pictures, options, expected):
    args = ["--data", idx, "--output", tmp_path / "out", "--epochs", "2"]
    assert vae.main([str(arg) for arg in args]) == 0
    assert_refused(vae, capsys, tmp_path, [*args, *options, "--resume"], *expected)


def test_resume_on_other_images_is_refused(vae, tmp_path, idx, images, capsys, no_pictures):
    args = ["--data", idx, "--output", tmp_path / "out", "--epochs", "1"]
    assert vae.main([str(arg) for arg in args]) == 0
    idx.write_bytes(idx_bytes(255 - images))
    assert_refused(vae, capsys, tmp_path, [*args, "--resume"], "--resume", "data_checksum")


def test_exit_code_of_the_process(tmp_path):
    args = [sys.executable, SCRIPT, "--output", tmp_path / "out", "--data", tmp_path / "none"]
    done = subprocess.run(args, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("train_vae.py: --data: ") and len(done.stderr.splitlines()) == 1
    assert not contents(tmp_path)


def test_interrupted_run_goes_on(vae, tmp_path, idx, no_pictures):
    output = tmp_path / "out"
    checkpoint = output / "checkpoint.pt"
    args = ["--data", str(idx), "--output", str(output)]
    # A child ignores SIGINT where its parent does, as the jobs of a non-interactive shell do.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *args, "--epochs", "1000000"], stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, former)
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.strip().startswith("Interrupted; the same command with --resume") and str(checkpoint) in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in output.iterdir()] == ["checkpoint.pt"]
    done = len(torch.load(checkpoint)["history"])
    assert vae.main([*args, "--epochs", str(done + 1), "--resume"]) == 0
    assert len(torch.load(checkpoint)["history"]) == done + 1


@pytest.mark.parametrize(
    "history",
    [{"train": 1.0}, "12", None, [1.0, 2.0], [(1.0,)], [(1.0, "2")], [(1.0, 2.0), {}]],
    ids=lambda history: str(history),
)
def test_checkpoint_without_a_history_is_refused(vae, tmp_path, idx, capsys, no_pictures, history):
    """Once it would have been resumed, and have failed after hours of training, when the curves are drawn."""
    args = ["--data", idx, "--output", tmp_path / "out", "--epochs", "3"]
    assert vae.main([str(arg) for arg in [*args[:-1], "1"]]) == 0
    path = tmp_path / "out" / "checkpoint.pt"
    torch.save({**torch.load(path), "history": history}, path)
    assert_refused(vae, capsys, tmp_path, [*args, "--resume"], "--resume", str(path), "history must be")


FULL = """
import os, resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python has it: a write beyond the limit is then an error
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a script
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "script",
    ["train_vae", "train_pixelcnn", "conditional_vae", "hierarchical_vae", "variational_fit", "bayesian_regression"],
)
def test_a_disk_that_takes_no_more_ends_in_a_sentence(tmp_path, script):
    """Files limited to a few kilobytes: a checkpoint or a picture does not fit."""
    options = {"variational_fit": ["--steps", "3"], "bayesian_regression": ["--steps", "3"]}
    options = options.get(script, ["--epochs", "1", "--batch-size", "500"])
    done = subprocess.run(
        [sys.executable, "-c", FULL, "5000", SCRIPT.with_name(f"{script}.py"), "--output", tmp_path / "out", *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith(f"{script}.py: "))
    assert done.returncode == 2, done.stderr
    assert sentence == f"{script}.py: --output: cannot write to {tmp_path / 'out'}: File too large"
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("out/*.tmp"))
