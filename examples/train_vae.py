"""Trains a VAE whose Gaussian decoder learns its sigma, on handwritten digits: its loss is two fused calls.

The data are scikit-learn's 1797 digits of 8x8 pixels. A grey level k of 17 becomes a pixel x = (k + u) / 17, with u
uniform on [0, 1), since a density on discrete values has no upper limit. With it -log2 p(x) + log2 17 averages to no
less than the bits that the level costs under the model: the bits per dimension printed here bound a code for the
original image. ELBO, NLL and KL are of an image, in nats.

    python examples/train_vae.py --compare --output demo
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

import fastelbo

LEVELS, LATENTS, HIDDEN = 17, 12, 512


def load_digits(seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Levels [N, 64] of the images to train on and to test; a sixth, drawn by the seed, is to test."""
    images = torch.tensor(sklearn.datasets.load_digits().data, dtype=torch.float32)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))].to(device)
    return images[len(images) // 6 :], images[: len(images) // 6]


def dequantise(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels in [0, 1): each grey level spread evenly over its share of the unit interval."""
    return (images + torch.rand(images.shape, device=images.device, generator=generator)) / LEVELS


class VAE(nn.Module):
    """A multilayer perceptron on either side of a Gaussian bottleneck, and one learned log-variance for all pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers = [[nn.Linear(n, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()] for n in (64, LATENTS)]
        self.encoder = nn.Sequential(*layers[0], nn.Linear(HIDDEN, 2 * LATENTS), nn.Unflatten(1, (2, LATENTS)))
        self.decoder = nn.Sequential(*layers[1], nn.Linear(HIDDEN, 64), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood and KL of each image; their sum is minus the ELBO."""
        mean, logvar = self.encoder(x).unbind(1)  # two views of one tensor, which the ops read where they are
        z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=seed)
        return fastelbo.gaussian_nll(x, self.decoder(z), self.x_logvar), kl


@torch.no_grad()
def evaluate(model: VAE, images: Tensor) -> tuple[float, float]:
    """Mean NLL and KL, always with the same dequantisation and the same posterior noise."""
    x = dequantise(images, torch.Generator(images.device).manual_seed(1))
    return torch.stack(model(x, seed=1)).mean(1).tolist()


def fused(x: Tensor, mean: Tensor, logvar: Tensor, x_logvar: Tensor) -> Tensor:
    """The loss with a decoder that hands z on, by fastelbo."""
    z, kl = fastelbo.gaussian_rsample_kl(mean, logvar)
    return fastelbo.gaussian_nll(x, z, x_logvar) + kl


def eager(x: Tensor, mean: Tensor, logvar: Tensor, x_logvar: Tensor) -> Tensor:
    """The same in the lines that most training scripts have."""
    z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
    return 0.5 * ((x - z).square() * torch.exp(-x_logvar) + x_logvar + math.log(2 * math.pi)).sum(1) + kl


def compare(rows: int, size: int, device: str) -> None:
    """Prints what the loss takes in either way: time of forward and backward, and memory that is kept between them."""
    x, mean, logvar = torch.randn(3, rows, size, device=device)
    inputs = x, mean.requires_grad_(), logvar.requires_grad_(), torch.tensor(-3.0, device=device, requires_grad=True)
    print(f"\nLoss of {rows} images of {size} latents and pixels, forward and backward on {device} in one thread")
    for way in (fused, eager):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # noqa: B023
            way(*inputs)
        megabytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in kept}.values()) / 1e6
        timer = Timer("way(*inputs).mean().backward()", globals={"way": way, "inputs": inputs})
        milliseconds = timer.blocked_autorange(min_run_time=1).median * 1e3
        print(f"  {way.__name__:<10}{milliseconds:>10.3f} ms{megabytes:>12.3f} MB kept for the backward")


def save_grid(path: Path, images: Tensor, title: str, labels: list[str] = ()) -> None:
    """Draws images [rows, columns, 64], values in [0, 1], as one picture; labels are of the rows."""
    sheet = nn.functional.pad(images.unflatten(-1, (8, 8)), (1, 1, 1, 1), value=0.35).transpose(1, 2)
    sheet = sheet.flatten(2).flatten(0, 1)
    axes = Figure(figsize=(0.08 * sheet.shape[1], 0.08 * sheet.shape[0])).subplots()
    axes.imshow(sheet.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title=title, xticks=[], yticks=range(5, 10 * len(labels), 10), yticklabels=labels)
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


@torch.no_grad()
def save_pictures(output: Path, model: VAE, images: Tensor, history: list[tuple[float, float]]) -> None:
    """Samples, reconstructions, latent traversal and training curve."""
    z = torch.randn(8, 12, LATENTS, generator=torch.Generator().manual_seed(1)).to(images)
    save_grid(output / "samples.png", model.decoder(z), "Samples: latents drawn from the prior")
    mean, logvar = model.encoder((images + 0.5) / LEVELS).unbind(1)
    pairs = torch.stack((images / (LEVELS - 1), model.decoder(mean)))[:, :12]
    save_grid(output / "reconstructions.png", pairs, "Test images", ["original", "reconstruction"])
    kl = fastelbo.gaussian_kl(mean, logvar, event_ndim=0).mean(0)
    used = kl.argsort(descending=True)[:8].tolist()
    z = mean[0].repeat(len(used), 13, 1)
    z[range(len(used)), :, used] = torch.linspace(-3, 3, 13).to(z)
    labels = [f"$z_{{{index}}}$, KL {kl[index]:.1f} nats" for index in used]
    save_grid(output / "traversal.png", model.decoder(z), "One latent from -3 to 3, the others of a test image", labels)
    axes = Figure().subplots()
    axes.plot(range(1, len(history) + 1), history, label=["train, mean over the epoch", "test, after the epoch"])
    axes.set(title="Evidence lower bound during training", xlabel="epoch", ylabel="nats per image")
    axes.legend()
    axes.figure.savefig(output / "training_curve.png", dpi=150)


def run(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Trains; returns the ELBO of each epoch in training, and that of the test images after it."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of images so small more threads gain little
    images, test_images = load_digits(args.seed, args.device)
    model, history = VAE().to(args.device), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    try:
        for _ in (bar := tqdm(range(args.epochs), unit="epoch", disable=None)):
            losses = []
            for batch in torch.randperm(len(images), device=images.device).split(args.batch_size):
                nll, kl = model(dequantise(images[batch]))
                loss = (nll + kl).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            history.append((-torch.stack(losses).mean().item(), -sum(evaluate(model, test_images))))
            bar.set_postfix_str("ELBO train {:.1f}, test {:.1f} nats".format(*history[-1]))
    finally:  # of what there is, after Ctrl-C
        if history:
            nll, kl = evaluate(model, test_images)
            bits = (nll + kl) / (64 * math.log(2)) + math.log2(LEVELS)
            print(f"\nTest set, nats per image: ELBO {-nll - kl:.2f}, NLL {nll:.2f}, KL {kl:.2f}")
            print(f"Bits per dimension: {bits:.3f} (a uniform guess: {math.log2(LEVELS):.3f})")
            save_pictures(args.output, model, test_images, history)
            print(f"Learned sigma: {model.x_logvar.mul(0.5).exp():.4f} of the grey scale. Pictures: {args.output}")
    if args.compare:
        compare(args.batch_size, 64, args.device)
        compare(4096, 784, args.device)
    return history


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=int, default=80, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo", help="folder for the pictures (default: %(default)s)")
    add("--compare", action="store_true", help="also show what the fused ops save beside eager torch")
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
