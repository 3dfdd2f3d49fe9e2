"""Trains a VAE that is told which digit it sees, and shows what its latents are then free to mean.

Encoder and decoder of the conditional VAE read the class y beside their input::

    z, kl = fastelbo.gaussian_rsample_kl(*encoder(x, y))
    nll = fastelbo.gaussian_nll(x, decoder(z, y), decoder.logvar)

so that -(nll + kl) is a lower bound (ELBO) of log p(x | y), and z, whose prior is the same for all classes, keeps what
the class does not say: slant, width and weight of the stroke. Beside it trains a VAE of the same size that is not told
the class. A bound of log p(x | y) is higher by what the class tells; with the price of the class, ln 10 for ten alike,

    log p(x) >= log p(x | y) + log p(y) >= ELBO(x | y) - ln 10

it bounds log p(x) as the other model's does, and the two may be compared. Two more checks come from outside: logistic
regression, trained on the pixels of the training images, names the class of images drawn for each class; and the
conditional model itself classifies the test images, by the class of the highest ELBO.

The data are the 1797 digits of 8x8 pixels and 17 grey levels in scikit-learn, a sixth of them held out. Levels become
pixels in [0, 1) by uniform noise, as in train_vae.py. ELBO, NLL and KL in nats per image.

    python examples/conditional_vae.py --output demo/conditional_vae

Sources: Kingma et al. 2014, "Semi-Supervised Learning with Deep Generative Models" (its model M2, labels all given);
Sohn et al. 2015, "Learning Structured Output Representation using Deep Conditional Generative Models".
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import common
import fastelbo
from common import CHECKPOINT, Training

CLASSES = 10
LATENT = 8
HIDDEN = 256
LEARNING_RATE = 2e-3
EVALUATION_SEED = 1
EVALUATION_SAMPLES = 16


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_training_parser(
        "Train a class-conditional VAE on handwritten digits beside one that is not told the class.",
        output="demo/conditional_vae",
        epochs=40,
        batch_size=64,
    )
    return parser.parse_args(argv)


@dataclass
class Data:
    """Grey levels, uint8 [N, 8, 8], and classes, uint8 [N], split into training and test images."""

    train: Tensor
    test: Tensor
    train_classes: Tensor
    test_classes: Tensor

    @staticmethod
    def load(seed: int, device: torch.device) -> "Data":
        """The digits, split by the seed."""
        images = common.split(common.load_digits(), seed, device)
        return Data(*images, *common.split(common.load_digit_classes(), seed, device))


def pixels(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels [N, 64] in [0, 1)."""
    return common.dequantise(images, common.DIGIT_LEVELS, generator)


def middles(images: Tensor) -> Tensor:
    """Pixels [N, 64] in the middle of their levels."""
    return (images.flatten(1) + 0.5) / common.DIGIT_LEVELS


def one_hot(classes: Tensor) -> Tensor:
    """[N, 10]."""
    return F.one_hot(classes.long(), CLASSES).float()


class VAE(nn.Module):
    """A VAE with a Gaussian decoder, whose networks also read the first `told` elements of the class: all or none."""

    def __init__(self, size: int, told: int) -> None:
        super().__init__()
        self.told = told
        self.encoder = common.mlp(size + told, HIDDEN, 2 * LATENT)
        self.decoder = common.mlp(LATENT + told, HIDDEN, size)
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, both [N, latent]."""
        return self.encoder(torch.cat((x, y[:, : self.told]), dim=1)).chunk(2, dim=1)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean of each pixel, [..., N, size], for z [..., N, latent] and y [N, 10]."""
        y = y[:, : self.told].expand(*z.shape[:-1], self.told)
        return self.decoder(torch.cat((z, y), dim=-1)).sigmoid()

    def forward(self, x: Tensor, y: Tensor, backend: str | None, samples: int = 1, seed: int | None = None) -> tuple:
        """NLL [samples, N] of x [N, size] under draws of the posterior, and KL [N]."""
        z, kl = fastelbo.gaussian_rsample_kl(*self.encode(x, y), num_samples=samples, seed=seed, backend=backend)
        nll = fastelbo.gaussian_nll(x, self.decode(z, y), self.x_logvar, event_ndim=1, backend=backend)
        return nll, kl


class Pair(nn.Module):
    """The two models, which share nothing but batches: the sum of their losses trains each by its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conditional = VAE(size, told=CLASSES)
        self.unconditional = VAE(size, told=0)


def start_training(data: Data, args: argparse.Namespace, device: torch.device) -> Training:
    """Fresh models, or those of the checkpoint."""
    torch.manual_seed(args.seed)
    pair = Pair(data.train[0].numel()).to(device)
    optimizer = torch.optim.Adam(pair.parameters(), LEARNING_RATE, fused=True)
    settings = {"seed": args.seed, "batch_size": args.batch_size}
    training = Training(pair, optimizer, torch.Generator().manual_seed(args.seed), settings)
    training.resume(args)
    return training


def train_epoch(training: Training, data: Data, backend: str, on_step: Callable[[], object] = lambda: None) -> Tensor:
    """One pass in a new order; returns the loss of each step and model, [steps, 2]."""
    losses = []
    for batch in training.batches(torch.arange(len(data.train), device=data.train.device)):
        x, y = pixels(data.train[batch]), one_hot(data.train_classes[batch])
        pair = training.model
        terms = (model(x, y, backend) for model in (pair.conditional, pair.unconditional))
        loss = torch.stack([nll.mean() + kl.mean() for nll, kl in terms])
        training.step(loss.sum())
        losses.append(loss.detach())
        on_step()
    return torch.stack(losses)


@torch.no_grad()
def evaluate(model: VAE, data: Data, backend: str, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """NLL and KL of each test image, both [N], as of its class or of those given; always with the same noise."""
    x = pixels(data.test, torch.Generator(data.test.device).manual_seed(EVALUATION_SEED))
    y = one_hot(data.test_classes if classes is None else classes)
    nll, kl = model(x, y, backend, EVALUATION_SAMPLES, EVALUATION_SEED)
    return nll.mean(0), kl


def train(training: Training, data: Data, epochs: int, backend: str, checkpoint: Path) -> None:
    """Trains up to the given epoch, and saves a checkpoint after each."""

    def run_epoch(on_step: Callable[[], object]) -> tuple[tuple[float, float], str]:
        train_elbo = -train_epoch(training, data, backend, on_step)[:, 0].mean().item()
        test_elbo = -sum(evaluate(training.model.conditional, data, backend)).mean().item()
        return (train_elbo, test_elbo), f"ELBO given the class: train {train_elbo:.1f}, test {test_elbo:.1f} nats"

    training.run(epochs, training.steps(data.train), run_epoch, checkpoint)


@torch.no_grad()
def classify(model: VAE, data: Data, backend: str) -> Tensor:
    """The class of the highest ELBO of each test image: all are alike before the image is seen."""
    every = (torch.full_like(data.test_classes, c) for c in range(CLASSES))
    return torch.stack([-sum(evaluate(model, data, backend, c)) for c in every]).argmax(0)


@torch.no_grad()
def sample(model: VAE, rows: int, device: torch.device) -> Tensor:
    """Means of the decoder, [rows, 10, size]: each row is one draw from the prior, in all ten classes."""
    z = torch.randn(rows, 1, LATENT, generator=torch.Generator().manual_seed(EVALUATION_SEED)).to(device)
    return model.decode(z.expand(-1, CLASSES, -1), torch.eye(CLASSES, device=device))


def external_accuracy(data: Data, samples: Tensor) -> tuple[float, float]:
    """How often logistic regression on pixels, trained on the training images, is right on test images and samples."""
    from sklearn.linear_model import LogisticRegression

    classes = torch.arange(CLASSES).repeat(len(samples))
    images = (middles(data.train), middles(data.test), samples.flatten(0, 1))
    labels = (data.train_classes, data.test_classes, classes)
    train, *others = [(x.cpu().numpy(), y.cpu().numpy()) for x, y in zip(images, labels, strict=True)]
    judge = LogisticRegression(max_iter=1000).fit(*train)
    return tuple(judge.score(*other) for other in others)


def report(training: Training, data: Data, backend: str) -> float:
    """Prints the test results; returns the unconditional model's ELBO."""
    pair = training.model
    print(f"\nTest set: {len(data.test)} images; {len(training.history)} epochs, backend {backend}")
    print(f"  {'nats per image':<34}{'NLL':>9}{'KL':>9}{'ELBO':>9}")
    elbos = {}
    for name, model in (("told the class, log p(x | y)", pair.conditional), ("not told, log p(x)", pair.unconditional)):
        nll, kl = (term.mean().item() for term in evaluate(model, data, backend))
        elbos[name] = -nll - kl
        print(f"  {name:<34}{nll:>9.2f}{kl:>9.2f}{-nll - kl:>9.2f}")
    told, unconditional = elbos.values()
    print(f"  {'told, less ln 10: log p(x)':<34}{'':>18}{told - math.log(CLASSES):>9.2f}")

    on_test, on_samples = external_accuracy(data, sample(pair.conditional, 100, data.test.device))
    by_elbo = (classify(pair.conditional, data, backend) == data.test_classes).float().mean().item()
    print("Classes named right (a guess: 10 %)")
    print(f"  logistic regression, test images  {100 * on_test:>8.1f} %")
    print(f"  logistic regression, samples      {100 * on_samples:>8.1f} %   (decoder means, 100 of each class)")
    print(f"  highest ELBO, test images         {100 * by_elbo:>8.1f} %")
    return unconditional


@torch.no_grad()
def save_pictures(output: Path, training: Training, data: Data, unconditional_elbo: float) -> None:
    """Samples of all classes, test images carried over to all classes, and the training curve."""
    model, size, device = training.model.conditional, data.test.shape[1:], data.test.device
    digits = [str(digit) for digit in range(CLASSES)]
    title = "Samples: each row one latent, in every class"
    samples = sample(model, 8, device).unflatten(-1, size)
    common.save_grid(output / "samples.png", samples, title, ticks=digits, x_label="class given to the decoder")

    shown = data.test[:8]
    mean, _ = model.encode(middles(shown), one_hot(data.test_classes[:8]))
    carried = model.decode(mean[:, None].expand(-1, CLASSES, -1), torch.eye(CLASSES, device=device))
    rows = torch.cat((shown[:, None] / (common.DIGIT_LEVELS - 1), carried.unflatten(-1, size)), dim=1)
    title, x_label = "Analogies: the latent of a test image, in every class", "class given to the decoder"
    common.save_grid(output / "analogies.png", rows, title, ticks=["test", *digits], x_label=x_label)

    levels = {
        "test, not told the class": unconditional_elbo,
        "the same + ln 10": unconditional_elbo + math.log(CLASSES),
    }
    title, y_label = "Evidence lower bound given the class", "ELBO (nats per image)"
    common.save_curves(output / "training_curve.png", training.curves(), title, "epoch", y_label, levels)


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then trains and reports."""
    common.check_whole_numbers(args, epochs=1, batch_size=1, seed=0)
    device, backend = common.choose_device_and_backend(args)
    data = Data.load(args.seed, device)
    training = start_training(data, args, device)
    common.make_output(args.output)
    with common.one_thread(True):
        train(training, data, args.epochs, backend, args.output / CHECKPOINT)
        unconditional_elbo = report(training, data, backend)
    save_pictures(args.output, training, data, unconditional_elbo)
    print(f"\nPictures and checkpoint are in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
