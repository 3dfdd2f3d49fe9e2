"""Trains a VAE that is told which digit it sees, beside one that is not.

Encoder and decoder of the first read the class y beside their input. Its ELBO bounds log p(x | y), and its latents keep
what the class does not say: slant, width, weight of the stroke. With the price of the class, ln 10, it bounds log p(x)
as the other's does. From outside, logistic regression on pixels names the class of images drawn for each class; and the
class of the highest ELBO is a classifier. The digits are scikit-learn's, made continuous by uniform noise; all is in
nats per image. Source: Kingma et al. 2014, "Semi-Supervised Learning with Deep Generative Models" (its model M2).

    python examples/conditional_vae.py --output demo/conditional_vae
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

CLASSES, LEVELS, LATENTS, HIDDEN = 10, 17, 8, 256


def load_digits(seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Levels [N, 64] and classes [N, 10], one-hot, to train on and to test; a sixth, drawn by the seed, is to test."""
    digits = sklearn.datasets.load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.data, dtype=torch.float32)[order].to(device)
    classes = F.one_hot(torch.tensor(digits.target), CLASSES).float()[order].to(device)
    test = len(images) // 6
    return images[test:], classes[test:], images[:test], classes[:test]


def dequantise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels in [0, 1): each grey level spread evenly over its share of the unit interval."""
    return (images + torch.rand(images.shape, device=images.device, generator=generator)) / LEVELS


class VAE(nn.Module):
    """A VAE with a Gaussian decoder, whose networks also read the first `told` elements of the class: all or none."""

    def __init__(self, told: int) -> None:
        super().__init__()
        self.told = told
        layers = [[nn.Linear(n + told, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()] for n in (64, LATENTS)]
        self.encoder = nn.Sequential(*layers[0], nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(*layers[1], nn.Linear(HIDDEN, 64), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, both [N, latents]."""
        return self.encoder(torch.cat((x, y[:, : self.told]), dim=1)).chunk(2, dim=1)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """The mean of each pixel, [..., N, 64], for z [..., N, latents] and y [N, 10]."""
        return self.decoder(torch.cat((z, y[:, : self.told].expand(*z.shape[:-1], -1)), dim=-1))

    def forward(self, x: Tensor, y: Tensor, samples: int = 1, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """NLL [samples, N] of x under draws of the posterior, and KL [N]."""
        z, kl = fastelbo.gaussian_rsample_kl(*self.encode(x, y), num_samples=samples, seed=seed)
        return fastelbo.gaussian_nll(x, self.decode(z, y), self.x_logvar, event_ndim=1), kl


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """NLL and KL of each image, both [N]; always with the same noise, and 16 draws of the latents."""
    nll, kl = model(dequantise(images, torch.Generator(images.device).manual_seed(1)), classes, samples=16, seed=1)
    return nll.mean(0), kl


def classify(model: VAE, images: Tensor) -> Tensor:
    """The class of the highest ELBO: all are alike before the image is seen."""
    every = torch.eye(CLASSES, device=images.device)[:, None].expand(-1, len(images), -1)
    return torch.stack([-sum(evaluate(model, images, classes)) for classes in every]).argmax(0)


@torch.no_grad()
def sample(model: VAE, rows: int) -> Tensor:
    """Means of the decoder, [rows, 10, 64]: each row is one draw from the prior, in all ten classes."""
    z = torch.randn(rows, 1, LATENTS, generator=torch.Generator().manual_seed(1)).to(model.x_logvar.device)
    return model.decode(z.expand(-1, CLASSES, -1), torch.eye(CLASSES, device=z.device))


def report(told: VAE, not_told: VAE, images: Tensor, classes: Tensor, *test: Tensor) -> float:
    """Prints the test results; returns the ELBO of the model that is not told the class."""
    print(f"\n{'nats per test image':<20}{'NLL':>9}{'KL':>9}{'ELBO':>9}{'log p(x) >=':>14}")
    for name, model in (("told the class", told), ("not told", not_told)):
        nll, kl = (term.mean().item() for term in evaluate(model, *test))
        bound = -nll - kl - (math.log(CLASSES) if model.told else 0)
        print(f"{name:<20}{nll:>9.2f}{kl:>9.2f}{-nll - kl:>9.2f}{bound:>14.2f}")
    judge = LogisticRegression(max_iter=1000).fit(images.cpu() / LEVELS, classes.cpu().argmax(1))
    on_test = judge.score(test[0].cpu() / LEVELS, test[1].cpu().argmax(1))
    on_samples = judge.score(sample(told, 100).flatten(0, 1).cpu(), [*range(CLASSES)] * 100)
    by_elbo = (classify(told, test[0]) == test[1].argmax(1)).float().mean().item()
    print(f"Classes named right by logistic regression: {on_test:.1%} of test images, {on_samples:.1%} of samples;")
    print(f"by the highest ELBO: {by_elbo:.1%} of test images; a guess: 10 %")
    return bound


def save_grid(path: Path, images: Tensor, title: str) -> None:
    """Draws images [rows, columns, 64], values in [0, 1], as one picture."""
    sheet = F.pad(images.unflatten(-1, (8, 8)), (1, 1, 1, 1), value=0.35).transpose(1, 2).flatten(2).flatten(0, 1)
    axes = Figure(figsize=(0.08 * sheet.shape[1], 0.08 * sheet.shape[0])).subplots()
    axes.imshow(sheet.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title=title, xticks=[], yticks=[])
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


@torch.no_grad()
def save_pictures(output: Path, model: VAE, images: Tensor, classes: Tensor, history: list, not_told: float) -> None:
    """Samples of all classes, test images carried over to all classes, and the training curve."""
    save_grid(output / "samples.png", sample(model, 8), "Samples: each row one latent, in every class")
    mean, _ = model.encode((images[:8] + 0.5) / LEVELS, classes[:8])
    carried = model.decode(mean[:, None].expand(-1, CLASSES, -1), torch.eye(CLASSES, device=mean.device))
    rows = torch.cat((images[:8, None] / (LEVELS - 1), carried), dim=1)
    save_grid(output / "analogies.png", rows, "The latent of a test image (first column), in every class")
    axes = Figure().subplots()
    axes.plot(range(1, len(history) + 1), history, label=["train, mean over the epoch", "test, after the epoch"])
    axes.axhline(not_told, color="gray", linestyle="--", label="test, not told the class")
    axes.set(title="Evidence lower bound given the class", xlabel="epoch", ylabel="nats per image")
    axes.legend()
    axes.figure.savefig(output / "training_curve.png", dpi=150)


def run(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Trains; returns the ELBO given the class, of each epoch in training and of the test images after it."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of images so small more threads gain little
    images, classes, *test = load_digits(args.seed, args.device)
    models, history = nn.ModuleList([VAE(told=CLASSES), VAE(told=0)]).to(args.device), []
    optimizer = torch.optim.Adam(models.parameters(), 2e-3, fused=True)
    try:
        for _ in (bar := tqdm(range(args.epochs), unit="epoch", disable=None)):
            losses = []
            for batch in torch.randperm(len(images), device=args.device).split(args.batch_size):
                x, y = dequantise(images[batch]), classes[batch]
                loss = torch.stack([nll.mean() + kl.mean() for nll, kl in (model(x, y) for model in models)])
                optimizer.zero_grad()
                loss.sum().backward()  # the models share nothing but batches: each learns from its own
                optimizer.step()
                losses.append(loss[0].detach())
            history.append((-torch.stack(losses).mean().item(), -sum(evaluate(models[0], *test)).mean().item()))
            bar.set_postfix_str("ELBO given the class: train {:.1f}, test {:.1f} nats".format(*history[-1]))
    finally:  # of what there is, after Ctrl-C
        if history:
            save_pictures(args.output, models[0], *test, history, report(*models, images, classes, *test))
            print(f"Pictures are in {args.output}")
    return history


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=int, default=40, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/conditional_vae", help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs and --batch-size must be 1 or more, --seed from 0 to 2**63 - 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # now rather than after the training
        return run(args)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")


if __name__ == "__main__":
    main()
