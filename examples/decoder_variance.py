"""How wide is a VAE's decoder: unit, fixed, learned, the best for its errors, or one deviation a pixel.

A unit variance is half the square error and a constant, which weighs likelihood against KL as nobody chose. The best
single variance is the mean square error, and a learned one ends there. One a pixel has the best bound, and draws of it
are as noisy. Grey levels have no density but probabilities, the decoder's mass between two half levels; those are worth
no fewer nats than the density of pixels with noise as wide as a level, by Jensen's inequality.

    python examples/decoder_variance.py --output demo/course/decoder_variance
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

KINDS, LEVELS, LATENTS, HIDDEN = ("unit", "fixed at 0.2", "learned", "best", "one a pixel"), 17, 8, 128


def dequantise(images: Tensor, seed: int | None = None) -> Tensor:
    """Pixels from 0 to 1, with noise as wide as a level."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return (images + torch.rand(images.shape, generator=generator)) / LEVELS


class VAE(nn.Module):
    """A multilayer perceptron on either side, and a decoder's log-variance of one of the kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, outputs = kind, 2 if kind == "one a pixel" else 1
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 64 * outputs))
        self.logvar = nn.Parameter(torch.tensor(2 * math.log(0.2) if kind == "fixed at 0.2" else 0.0))
        self.logvar.requires_grad_(kind == "learned")

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances, the latter one number for all but the last kind."""
        mean, *logvar = self.decoder(z).split(64, dim=-1)
        return mean.sigmoid(), logvar[0].clamp(-9, 2) if logvar else self.logvar

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and KL of each image."""
        z, kl = fastelbo.gaussian_rsample_kl(*self.encoder(x).chunk(2, dim=1), seed=seed)
        mean, logvar = self.decode(z)
        if self.kind == "best" and self.training:
            sigma = fastelbo.optimal_sigma(x, mean)
            with torch.no_grad():  # kept for those who draw and test
                self.logvar += 0.05 * (2 * sigma.log().mean() - self.logvar)
            return fastelbo.gaussian_nll(x, mean, sigma, scale="std"), kl
        return fastelbo.gaussian_nll(x, mean, logvar), kl


def train(kind: str, images: Tensor, epochs: int) -> VAE:
    """Maximises the bound."""
    model = VAE(kind)
    groups = [{"params": [*model.encoder.parameters(), *model.decoder.parameters()]}, {"params": [model.logvar]}]
    groups[1]["lr"] = 0.03  # one number has a long way to go
    optimizer = torch.optim.Adam(groups, 2e-3, fused=True)
    for _ in tqdm(range(epochs), kind, unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            sum(model(dequantise(images[batch]))).mean().backward()
            optimizer.step()
    return model.requires_grad_(False).eval()


def log_levels(images: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """ln of the decoder's mass of each grey level: up to the next ones, and beyond at the ends."""
    std = logvar.double().div(2).exp()
    low, high = ((images.double() + edge) / LEVELS - mean.double() for edge in (0, 1))
    low, high = low.masked_fill(images == 0, -math.inf) / std, high.masked_fill(images == LEVELS - 1, math.inf) / std
    low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)  # the lower tail
    low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return high + torch.log1p(-torch.exp(low - high))


def save_picture(path: Path, models: dict[str, VAE]) -> None:
    """Means and draws of each decoder for the same latents."""
    panels = Figure(figsize=(12, 3.4), layout="constrained").subplots(1, len(models))
    z = torch.randn(8, LATENTS, generator=torch.Generator().manual_seed(1))
    for axes, (kind, model) in zip(panels, models.items(), strict=True):
        mean, logvar = model.decode(z)
        both = torch.stack((mean, fastelbo.gaussian_rsample(mean, logvar, seed=1)), dim=1).view(4, 4, 8, 8)
        axes.imshow(both.transpose(1, 2).reshape(32, 32), cmap="gray", vmin=0, vmax=1)
        axes.set(title=kind, xticks=[], yticks=[])
    panels[0].figure.suptitle("Columns in turn: a decoder's mean, and a draw of it")
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains all kinds, compares; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    images = torch.tensor(sklearn.datasets.load_digits().data, dtype=torch.float32)[torch.randperm(1797)]
    test, images = images.split([300, 1497])
    models = {kind: train(kind, images, args.epochs) for kind in KINDS}
    save_picture(args.output / "decoder_variance.png", models)
    print(f"The picture is {args.output / 'decoder_variance.png'}")
    x = dequantise(test, seed=1)
    bounds = {kind: -sum(model(x, seed=1)).mean().item() for kind, model in models.items()}
    mean = torch.rand_like(x).requires_grad_()
    unit, half_square = fastelbo.gaussian_nll(x, mean, 0.0), (x - mean).square().sum(1) / 2
    slopes = [torch.autograd.grad(value.sum(), mean)[0] for value in (unit, half_square)]
    learned, seen = models["learned"], dequantise(images, seed=2)
    z = fastelbo.gaussian_rsample(*learned.encoder(seen).chunk(2, dim=1), seed=2)
    error = (seen - learned.decode(z)[0]).square().mean()
    sigma = fastelbo.optimal_sigma(seen, learned.decode(z)[0]).square().mean()
    z = fastelbo.gaussian_rsample(*learned.encoder(x).chunk(2, dim=1), seed=1)
    mass = -log_levels(test, *learned.decode(z)).sum(1).mean().item()
    density = fastelbo.gaussian_nll(x, *learned.decode(z)).mean().item() + 64 * math.log(LEVELS)
    every = torch.arange(LEVELS, dtype=torch.float32)[:, None].expand(-1, 64)
    total = log_levels(every, *learned.decode(z[:1])).exp().sum(0)
    return [
        (
            "unit: nats less half the square error; 32 ln 2 pi",
            (unit - half_square).mean().item(),
            32 * math.log(2 * math.pi),
            1e-4,
        ),
        ("unit: largest difference of their gradients", (slopes[0] - slopes[1]).abs().max().item(), 0, 1e-6),
        ("best: its variance; the mean square error", sigma.item(), error.item(), 1e-6),
        (
            "learned deviation; the root of the mean square error",
            learned.logvar.div(2).exp().item(),
            error.sqrt().item(),
            0.005,
        ),
        ("bound of test images: learned; unit", bounds["learned"], bounds["unit"], "at least"),
        ("learned; fixed at 0.2", bounds["learned"], bounds["fixed at 0.2"], "at least"),
        ("best; learned", bounds["best"], bounds["learned"], 5.0),
        ("one a pixel; learned", bounds["one a pixel"], bounds["learned"], "at least"),
        ("mass of all grey levels of a pixel: furthest from 1", (total - 1).abs().max().item(), 0, 1e-12),
        ("nats of levels; of their density", mass, density, "at most"),
    ]


def report(claims: list[tuple[str, float, float, float | str]]) -> list[str]:
    """Prints what was found beside what is true, a claim a row; returns those that fail."""
    print("\n| what | found | exact or independent | within |\n|:--|--:|--:|--:|")
    failed, side = [], {"at least": 1, "at most": -1}
    for what, found, true, within in claims:
        print(f"| {what:<66} | {found:>12.7g} | {true:>12.7g} | {within:>8} |")
        good = side[within] * (found - true) >= 0 if within in side else abs(found - true) <= within
        failed += [] if good else [what]
    return failed


def main(argv: list[str] | None = None) -> list[tuple[str, float, float, float | str]]:
    """The command line."""
    add = (parser := argparse.ArgumentParser(description=__doc__.partition("\n")[0])).add_argument
    add("--epochs", type=int, default=40, help="of each kind (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/decoder_variance", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs must be 1 or more, --seed from 0 to 2**63 - 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # now rather than after the work
        claims = run(args)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")
    if failed := report(claims):
        parser.exit(1, f"{parser.prog}: not as it must be: {'; '.join(failed)}\n")
    return claims


if __name__ == "__main__":
    main()
