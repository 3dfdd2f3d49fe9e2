"""What the examples share: command line, training loop with checkpoints, the digits, timing and pictures."""

import argparse
import contextlib
import io
import math
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from parallel import Ranks, check_history

CHECKPOINT = "checkpoint.pt"
DEFAULT = "(default: %(default)s)"
DIGIT_LEVELS = 17


class InputError(Exception):
    """Something the user gave cannot be used; main prints the sentence and returns 2."""


def new_parser(description: str, output: str) -> argparse.ArgumentParser:
    """A parser with the options of every example."""
    parser = argparse.ArgumentParser(description=description)
    device, backends = "cuda" if torch.cuda.is_available() else "cpu", list(fastelbo.backends.BACKENDS)
    add = parser.add_argument
    add("--output", type=Path, default=output, metavar="DIR", help=f"for all that is written {DEFAULT}")
    add("--seed", type=int, default=0, help=f"decides all that is random {DEFAULT}")
    add("--device", default=device, help=f"torch device {DEFAULT}")
    add("--backend", choices=backends, help="implementation of the fused ops (default: the fastest that can run)")
    return parser


def new_training_parser(description: str, output: str, epochs: int, batch_size: int) -> argparse.ArgumentParser:
    """A parser with the options of every example that keeps a checkpoint; the arguments are the defaults."""
    parser = new_parser(description, output)
    parser.epilog = "Ctrl-C keeps the checkpoint of the last full epoch; the same command with --resume goes on."
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help=f"passes over the training set in all {DEFAULT}")
    add("--batch-size", type=int, default=batch_size, help=f"images per step {DEFAULT}")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    return parser


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    """The options of an example that runs on the ranks of torchrun."""
    add = parser.add_argument
    add("--parallel", choices=["ddp", "fsdp"], help="under torchrun: whole replicas or sharded weights (default: ddp)")
    add("--accumulate", type=int, default=1, help=f"parts in which each rank takes its share of a batch {DEFAULT}")


def check_whole_numbers(args: argparse.Namespace, **lowest: int) -> None:
    """Checks options of whole numbers against their lowest values."""
    for name, least in lowest.items():
        value = getattr(args, name)
        if not least <= value < 2**31:
            raise InputError(f"--{name.replace('_', '-')} must be from {least} to {2**31 - 1}; got {value}")


def choose_device_and_backend(args: argparse.Namespace) -> tuple[torch.device, str]:
    """The device, if tensors can live on it and be read back; the backend asked for, or the fastest that runs there."""
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device: {args.device!r} cannot be used: {reason}") from None
    try:
        return device, fastelbo.backends.choose(device, args.backend)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"--backend: {error}") from None


def make_output(directory: Path) -> None:
    """Creates the directory, and makes sure that files can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"--output: cannot write to {directory}: {error.strerror}") from None


def exit_code(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Runs an example; 0, or 2 after a sentence on bad input or a full disk, or 130 after Ctrl-C."""
    checkpoint = args.output / CHECKPOINT
    if "RANK" in os.environ:  # there a directory
        checkpoint = checkpoint.with_suffix("")
    try:
        run(args)
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            error = f"--output: cannot write to {args.output}: {error.strerror or error}"
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        sentence = "\nInterrupted"
        if "resume" in args:
            saved = checkpoint.exists()
            advice = "the same command with --resume goes on from" if saved else "there is no checkpoint yet in"
            sentence += f"; {advice} {checkpoint}"
        print(sentence, file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """For 8x8 pixels: a second thread gains little there, and waits long for its turn on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_digits() -> np.ndarray:
    """The 1797 digits of scikit-learn: grey levels from 0 to 16, uint8 [N, 8, 8]."""
    import sklearn.datasets

    return sklearn.datasets.load_digits().images.astype(np.uint8)


def load_digit_classes() -> np.ndarray:
    """Which digit each of them is: uint8 [N]."""
    import sklearn.datasets

    return sklearn.datasets.load_digits().target.astype(np.uint8)


def split(images: np.ndarray, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Training and test images, or their classes; a sixth, drawn by the seed, is the test set."""
    order = torch.randperm(len(images), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    shuffled = torch.from_numpy(images[order.numpy()]).to(device)
    held_out = max(1, len(images) // 6)
    return shuffled[held_out:], shuffled[:held_out]


def dequantise(images: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Pixels [N, H * W] in [0, 1): each grey level spread evenly over its share of the unit interval."""
    x = images.flatten(1)
    return (x + torch.rand(x.shape, device=x.device, generator=generator)) / levels


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    first, second, last = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


@dataclass
class Training:
    """Everything that a checkpoint keeps, so that a resumed run is bit for bit the run that was never interrupted."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    order: torch.Generator
    settings: dict[str, int | float | str | list]  # what a resumed run must share; with batch_size
    ranks: Ranks = field(default_factory=Ranks)
    history: list[tuple[float, float]] = field(default_factory=list)  # a training and a test figure of each epoch

    def curves(self) -> dict[str, Sequence[float]]:
        """The history, labelled for a picture."""
        train, test = zip(*self.history, strict=True)
        return {"train, mean over the epoch": train, "test, after the epoch": test}

    def steps(self, images: Tensor) -> int:
        """Steps in an epoch. A last, incomplete batch is left out."""
        return max(1, len(images) // self.settings["batch_size"])

    def batches(self, images: Tensor) -> Iterator[Tensor]:
        """The batches of an epoch, in a new order: whole ones, the same on all ranks."""
        batch_size = min(self.settings["batch_size"], len(images))
        order = torch.randperm(len(images), generator=self.order, device="cpu").to(images.device)
        for batch in order[: len(order) - len(order) % batch_size].split(batch_size):
            yield images[batch]

    def step(self, loss: Tensor) -> None:
        """Moves the weights against the gradient, and what has been accumulated before."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def descend(self, images: int, loss: Callable[[slice], Tensor]) -> Tensor:
        """A step against the gradient of a batch's mean loss; returns the mean over this rank's images.

        Args:
            images: in the batch of all ranks.
            loss: the mean loss of a slice of them.
        """
        total = 0
        for rows, last in self.ranks.parts(images):
            with self.ranks.synchronised(self.model, last):
                part = loss(rows) / self.ranks.accumulate
                total = total + part.detach()
                if last:
                    self.step(part)
                else:
                    part.backward()
        return total

    def run(
        self,
        epochs: int,
        steps: int,
        run_epoch: Callable[[Callable[[], object]], tuple[tuple[float, float], str]],
        checkpoint: Path,
    ) -> None:
        """Trains up to the given epoch, and saves a checkpoint after each.

        Args:
            epochs: in all, those of the checkpoint included.
            steps: in an epoch.
            run_epoch: trains for one epoch, and calls its argument after each step; returns what enters the history,
                and a sentence on it for the progress bar.
            checkpoint: where to save.
        """
        done = len(self.history)
        hidden = None if self.ranks.first else True  # None: where there is no terminal
        with tqdm(total=epochs * steps, initial=done * steps, unit="step", desc="training", disable=hidden) as bar:
            for _ in range(done, epochs):
                figures, sentence = run_epoch(bar.update)
                self.history.append(figures)
                self.save(checkpoint)
                bar.set_postfix_str(sentence)

    def save(self, path: Path) -> None:
        """Writes the checkpoint aside and moves it into place, so that no half-written one is ever under its name."""
        if self.ranks.torchrun:
            self.ranks.save(path, self)
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self.order.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
            "settings": self.settings,
            "history": self.history,
        }
        temporary, contents = path.with_suffix(".tmp"), io.BytesIO()
        torch.save(state, contents)  # to a full disk it would fail without saying so
        try:
            temporary.write_bytes(contents.getbuffer())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Restores what save wrote, if its settings are those of this run."""
        try:
            settings = self.ranks.load(path, self) if self.ranks.torchrun else self._load_file(path)
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"--resume: there is no checkpoint {path}") from None
        except Exception as error:  # a damaged file can make torch.load raise nearly anything
            reason = str(error).partition("\n")[0]
            raise InputError(f"--resume: {path} is damaged, or not of this script: {reason}") from None
        if settings != self.settings:
            raise InputError(f"--resume: {path} was made with {settings}; this run has {self.settings}")

    def _load_file(self, path: Path) -> dict:
        """Restores from a file, if its settings fit, which are returned; the random states last, so that nothing after
        them draws."""
        if (broken := zipfile.ZipFile(path).testzip()) is not None:  # torch.load does not look at the checksums
            raise ValueError(f"wrong checksum of {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        settings = dict(state["settings"])
        if settings == self.settings:
            check_history(state["history"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.history = state["history"]
            self.order.set_state(state["order"])
            torch.set_rng_state(state["rng"])
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        return settings

    def resume(self, args: argparse.Namespace) -> None:
        """Loads the checkpoint in --output, if --resume asks for it."""
        if args.resume:
            self.load(args.output / CHECKPOINT)
            if len(self.history) > args.epochs:
                raise InputError(f"--epochs: the checkpoint has {len(self.history)} already; got {args.epochs}")


def start_ranks(args: argparse.Namespace) -> tuple[Ranks, torch.device, str]:
    """This process among those of torchrun, its device and its backend; alone without torchrun."""
    check_whole_numbers(args, epochs=1, batch_size=1, seed=0, accumulate=1)
    if args.parallel and "RANK" not in os.environ:
        raise InputError(
            f"--parallel {args.parallel} goes with torchrun: torchrun --nproc-per-node 2 {sys.argv[0]} ..."
        )
    ranks = Ranks(args.parallel or "ddp", args.accumulate, torchrun="RANK" in os.environ)
    if args.batch_size % (ranks.count * args.accumulate):
        raise InputError(
            f"--batch-size must be a multiple of the {ranks.count} rank(s) times --accumulate {args.accumulate}; "
            f"got {args.batch_size}"
        )
    args.device = ranks.device(args.device)
    device, backend = choose_device_and_backend(args)
    ranks.start(device)
    return ranks, device, backend


def fastest_calls(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 4) -> list[float]:
    """Seconds that each call takes: the fastest of at least ten, interleaved so that all meet the same machine."""
    best = [math.inf] * len(calls)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 10 or time.perf_counter() < end:
        rounds += 1
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def save_grid(
    path: Path, images: Tensor, title: str, labels: Sequence[str] = (), ticks: Sequence[str] = (), x_label: str = ""
) -> None:
    """Draws images [rows, columns, H, W] or [rows, columns, 3, H, W], values in [0, 1], as one labelled picture."""
    from matplotlib.figure import Figure

    framed = nn.functional.pad(images, (1, 1, 1, 1), value=0.35)
    rows, columns, *_, height, width = framed.shape
    sheet = framed.reshape(rows, columns, -1, height, width).permute(0, 3, 1, 4, 2)
    sheet = sheet.reshape(rows * height, columns * width, -1).squeeze(2).cpu().numpy()
    axes = Figure(figsize=(0.8 * columns, 0.8 * rows * height / width)).subplots()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_xticks([(index + 0.5) * width - 0.5 for index in range(len(ticks))], ticks)
    axes.set_yticks([(index + 0.5) * height - 0.5 for index in range(len(labels))], labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def save_curves(
    path: Path,
    curves: dict[str, Sequence[float]],
    title: str,
    x_label: str,
    y_label: str,
    levels: dict[str, float] | None = None,
) -> None:
    """Draws curves over 1, 2, ..., and levels to compare them with; all by their labels."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7, 4)).subplots()
    for label, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=label, marker="o" if len(curve) < 10 else None)
    for style, (label, level) in zip(("--", ":", "-."), (levels or {}).items(), strict=False):
        axes.axhline(level, color="gray", linestyle=style, label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")
