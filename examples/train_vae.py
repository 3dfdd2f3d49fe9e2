"""Trains a VAE whose Gaussian decoder learns its sigma, on handwritten digits, and shows what the fused ops save.

The data are the 1797 digits of 8x8 pixels that ship inside scikit-learn, or any IDX file of images (MNIST). The loss of
a batch is two fused calls::

    z, kl = fastelbo.gaussian_rsample_kl(mean, logvar)
    nll = fastelbo.gaussian_nll(x, decoder(z), decoder.logvar)    # logvar: one learned number

Units. A grey level k of L (17 in the digits, 256 in MNIST) becomes a pixel x = (k + u) / L in [0, 1), with u uniform on
[0, 1): fresh in every training batch, fixed for the test set. Without u a density on discrete values has no upper
limit. With it, -log2 p(x) + log2 L averages to no less than the bits that the grey level itself costs under the model,
so the bits per dimension printed here bound a code for the original image; a uniform guess takes log2 L, 4.09 for the
digits. ELBO and NLL in nats are of the density of x, all pixels of an image summed, one posterior sample per image.

    python examples/train_vae.py --compare --output demo
"""

import argparse
import gzip
import math
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import common
import fastelbo
from common import CHECKPOINT, InputError, Training
from parallel import Ranks

LATENT = 12
HIDDEN = 512
LEARNING_RATE = 1e-3
EVALUATION_SEED = 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_training_parser(
        "Train a VAE with a learned decoder sigma on handwritten digits, using the fused ops of fastelbo.",
        output="demo",
        epochs=80,
        batch_size=64,
    )
    idx = "IDX file of images, plain or .gz, or a directory with train-images-idx3-ubyte[.gz]; a sixth is held out"
    common.add_parallel_options(parser)
    parser.add_argument("--data", type=Path, metavar="PATH", help=f"{idx} (default: the digits of scikit-learn)")
    compare = "also time the fused ops against eager torch and torch.distributions"
    parser.add_argument("--compare", action="store_true", help=compare)
    return parser.parse_args(argv)


def read_idx_images(path: Path) -> np.ndarray:
    """The images of an IDX file, plain or gzipped, or of MNIST's in a directory, as uint8 [N, H, W]."""
    if os.path.isdir(path):
        path = path / "train-images-idx3-ubyte"
        path = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"--data: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if raw[:4] == b"\0\0\x08\x01":
        raise InputError(f"--data: {path} holds labels; give the IDX file of the images")
    if raw[:4] != b"\0\0\x08\x03":
        raise InputError(f"--data: {path} is not an IDX file of images (unsigned bytes, three dimensions)")
    count, height, width = np.frombuffer(raw[4:16].ljust(12, b"\0"), ">u4").tolist()
    promised = f"{count} images of {height}x{width} pixels"
    if len(raw) != 16 + count * height * width:
        raise InputError(f"--data: {path} is truncated or damaged: it has {len(raw)} bytes for {promised}")
    if count < 2 or height * width == 0:
        raise InputError(f"--data: {path} must hold at least 2 images; it has {promised}")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width)


@dataclass
class Data:
    """Grey levels, uint8 [N, H, W], split into training and test images."""

    train: Tensor
    test: Tensor
    levels: int
    checksum: int


def load_data(path: Path | None, seed: int, device: torch.device) -> Data:
    """The digits of scikit-learn, or the images of an IDX file; a sixth, drawn by the seed, is the test set."""
    images, levels = (common.load_digits(), common.DIGIT_LEVELS) if path is None else (read_idx_images(path), 256)
    return Data(*common.split(images, seed, device), levels, zlib.crc32(images))


class VAE(nn.Module):
    """A multilayer perceptron on either side of a Gaussian bottleneck, and one learned log-variance for all pixels."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = common.mlp(pixels, HIDDEN, 2 * LATENT)
        self.decoder = common.mlp(LATENT, HIDDEN, pixels)
        self.x_logvar = nn.Parameter(torch.full((1,), -3.0))  # not 0-d, which FSDP cannot shard

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, both [N, latent]: halves of one tensor, which the ops read as is."""
        return self.encoder(x).chunk(2, dim=1)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of each pixel."""
        return self.decoder(z).sigmoid()

    def forward(
        self, x: Tensor, backend: str | None = None, seed: int | Tensor | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and KL of each image, in nats; their sum is minus the ELBO.

        first is the row in its batch of the first image: rows draw the same whoever computes them.
        """
        mean, logvar = self.encode(x)
        offset = fastelbo.distributed.noise_offset(mean, first)
        z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=seed, noise_offset=offset, backend=backend)
        nll = fastelbo.gaussian_nll(x, self.decode(z), self.x_logvar, backend=backend)
        return nll, kl


def start_training(data: Data, args: argparse.Namespace, device: torch.device, ranks: Ranks | None = None) -> Training:
    """A fresh model, or the one of the checkpoint."""
    torch.manual_seed(args.seed)
    ranks = ranks or Ranks()
    model = VAE(pixels=data.train[0].numel()).to(device)
    ranks.wrap(model)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    settings = {"seed": args.seed, "batch_size": args.batch_size, "data_checksum": data.checksum}
    training = Training(model, optimizer, torch.Generator().manual_seed(args.seed), settings, ranks)
    training.resume(args)
    return training


def train_epoch(training: Training, data: Data, backend: str, on_step: Callable[[], object] = lambda: None) -> Tensor:
    """One pass in a new order; returns the loss of each step."""
    losses = []
    for images in training.batches(data.train):
        x, seed = common.dequantise(images, data.levels), torch.randint(2**63 - 1, (1,), device=images.device)

        def loss(rows: slice, x: Tensor = x, seed: Tensor = seed) -> Tensor:
            nll, kl = training.ranks.call(training.model, "forward", x[rows], backend, seed, rows.start)
            return (nll + kl).mean()

        losses.append(training.descend(len(images), loss))
        on_step()
    return training.ranks.mean(torch.stack(losses))


@torch.no_grad()
def evaluate(model: VAE, data: Data, backend: str, ranks: Ranks | None = None) -> tuple[float, float]:
    """Test NLL and KL in nats per image, always with the same dequantisation and the same posterior noise."""
    ranks, generator = ranks or Ranks(), torch.Generator(data.test.device).manual_seed(EVALUATION_SEED)
    rows, x = ranks.share(len(data.test)), common.dequantise(data.test, data.levels, generator)
    nll, kl = ranks.sum(*(terms.sum() for terms in model(x[rows], backend, EVALUATION_SEED, rows.start)))
    return nll / len(x), kl / len(x)


def train(training: Training, data: Data, epochs: int, backend: str, checkpoint: Path) -> None:
    """Trains up to the given epoch, and saves a checkpoint after each."""

    def run_epoch(on_step: Callable[[], object]) -> tuple[tuple[float, float], str]:
        train_elbo = -train_epoch(training, data, backend, on_step).mean().item()
        test_elbo = -sum(evaluate(training.model, data, backend, training.ranks))
        return (train_elbo, test_elbo), f"ELBO train {train_elbo:.1f}, test {test_elbo:.1f} nats"

    training.run(epochs, training.steps(data.train), run_epoch, checkpoint)


def report(training: Training, data: Data, backend: str) -> None:
    """Prints the test results."""
    nll, kl = evaluate(training.model, data, backend)
    pixels = data.test[0].numel()
    bits = (nll + kl) / (pixels * math.log(2)) + math.log2(data.levels)
    print(f"\nTest set: {len(data.test)} images, {pixels} pixels; {len(training.history)} epochs, backend {backend}")
    print(f"  ELBO                {-nll - kl:9.2f} nats per image")
    print(f"  NLL                 {nll:9.2f} nats per image")
    print(f"  KL                  {kl:9.2f} nats per image")
    print(f"  bits per dimension  {bits:9.3f} (a uniform guess: {math.log2(data.levels):.3f})")
    print(f"  learned sigma       {math.exp(training.model.x_logvar.item() / 2):9.4f} of the grey scale")


def fused(mean: Tensor, logvar: Tensor, x: Tensor, x_mean: Tensor, x_logvar: Tensor, backend: str) -> tuple:
    """Sample and loss by fastelbo."""
    z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, backend=backend)
    return z, (fastelbo.gaussian_nll(x, x_mean, x_logvar, backend=backend) + kl).mean()


def eager(mean: Tensor, logvar: Tensor, x: Tensor, x_mean: Tensor, x_logvar: Tensor) -> tuple:
    """Sample and loss in the lines that most training scripts have."""
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
    nll = 0.5 * ((x - x_mean).square() * torch.exp(-x_logvar) + x_logvar + math.log(2 * math.pi)).sum(1)
    return z, (nll + kl).mean()


def distributions(mean: Tensor, logvar: Tensor, x: Tensor, x_mean: Tensor, x_logvar: Tensor) -> tuple:
    """Sample and loss by torch.distributions."""
    q = Normal(mean, torch.exp(0.5 * logvar))
    z, kl = q.rsample(), kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)
    nll = -Normal(x_mean, torch.exp(0.5 * x_logvar)).log_prob(x).sum(1)
    return z, (nll + kl).mean()


def time_ways(ways: list[Callable], rows: int, latent: int, pixels: int, device: torch.device) -> list[float]:
    """Seconds per forward and backward of each way: the fastest of at least ten interleaved calls."""
    mean, logvar = torch.randn(rows, 2 * latent, device=device).chunk(2, dim=1)
    x, x_mean = torch.rand(2, rows, pixels, device=device)
    inputs = [tensor.requires_grad_() for tensor in (mean, logvar, x_mean, torch.tensor(-3.0, device=device))]
    d_z = torch.randn(rows, latent, device=device)

    def forward_and_backward(way: Callable) -> None:
        torch.autograd.grad(way(inputs[0], inputs[1], x, *inputs[2:]), inputs, (d_z, None))

    return common.fastest_calls([partial(forward_and_backward, way) for way in ways], device)


def compare(batch_size: int, pixels: int, backend: str, device: torch.device) -> None:
    """Prints the times of the three ways on the tensors of this model and on larger ones."""
    ways = {"fastelbo": partial(fused, backend=backend), "eager torch": eager, "torch.distributions": distributions}
    print(f"\nBottleneck and loss, forward and backward; backend {backend} on {device}, torch {torch.__version__}")
    print("Microseconds, fastest of ten or more interleaved calls; in brackets, how many times fastelbo's")
    print(f"  {'latents':<10}{'pixels':<10}" + "".join(f"{name:>22}" for name in ways))
    for rows, latent, width in ((batch_size, LATENT, pixels), (4096, 256, 784)):
        best = time_ways(list(ways.values()), rows, latent, width, device)
        columns = "".join(f"{seconds * 1e6:>14.0f} ({seconds / best[0]:4.2f}x)" for seconds in best)
        print(f"  {f'{rows}x{latent}':<10}{f'{rows}x{width}':<10}{columns}")


@torch.no_grad()
def save_pictures(output: Path, training: Training, data: Data, backend: str) -> None:
    """Samples, reconstructions, latent traversal and training curve."""
    model, size, device = training.model, data.test.shape[1:], data.test.device
    z = torch.randn(8, 12, LATENT, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    samples = model.decode(z.to(device)).unflatten(-1, size)
    common.save_grid(output / "samples.png", samples, "Samples: decoder means of latents drawn from the prior")

    columns = min(12, len(data.test))
    shown = data.test[: columns * min(3, len(data.test) // columns)]
    mean, logvar = model.encode((shown.flatten(1) + 0.5) / data.levels)
    both = torch.stack((shown / (data.levels - 1), model.decode(mean).view_as(shown)))
    rows = both.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 1)
    labels = ["original", "reconstruction"] * (len(rows) // 2)
    common.save_grid(output / "reconstructions.png", rows, "Test images and their reconstructions", labels)

    kl = fastelbo.gaussian_kl(mean, logvar, event_ndim=0, backend=backend).mean(0)
    values = torch.arange(-3, 3.5, 0.5)
    used = kl.argsort(descending=True)[:8].tolist()
    z = mean[:1].cpu().repeat(len(used), len(values), 1)
    for row, dimension in zip(z, used, strict=True):
        row[:, dimension] = values
    labels = [f"$z_{{{dimension}}}$, KL {kl[dimension]:.1f} nats" for dimension in used]
    ticks = [f"{value:g}" for value in values.tolist()]
    rows = model.decode(z.to(device)).unflatten(-1, size)
    title = "Traversal: one latent at a time, the others as in the first test image"
    common.save_grid(output / "traversal.png", rows, title, labels, ticks, "value of the latent")
    title, y_label = "Evidence lower bound during training", "ELBO (nats per image)"
    common.save_curves(output / "training_curve.png", training.curves(), title, "epoch", y_label)


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then trains and reports."""
    ranks, device, backend = common.start_ranks(args)
    data = load_data(args.data, args.seed, device)
    training = start_training(data, args, device, ranks)
    common.make_output(args.output)
    with common.one_thread(args.data is None):
        train(training, data, args.epochs, backend, args.output / CHECKPOINT)
    training.model = ranks.whole(training.model)
    ranks.stop()
    if not ranks.first:
        return
    report(training, data, backend)
    if args.compare:
        compare(args.batch_size, data.test[0].numel(), backend, device)
    save_pictures(args.output, training, data, backend)
    print(f"\nPictures and checkpoint are in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
