"""Trains a VAE with several levels of latents, whose priors are learned, and shows what free bits are for.

From the top down, each level's prior is a network's output from the level above it, and so is its posterior, which also
reads features of the image. The evidence lower bound (ELBO) is -(nll + the KLs of all levels). A level that the decoder
can do without may be left unused: the price of its noise comes before its use. With free bits a latent whose KL (mean
over the batch) lies below a floor costs the floor, and so may as well be of use (Kingma et al. 2016, "Improving
Variational Inference with Inverse Autoregressive Flow"). The table has log p(x) by importance sampling beside the ELBO.

    python examples/hierarchical_vae.py --latents 8 4 2 --output demo/hierarchical_vae
"""

import argparse
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

LEVELS, HIDDEN = 17, 128
SCALE = fastelbo.Scale("log_std", soft_clamp=5.0)  # NVAE's: without limits two Gaussians can push a KL to infinity


def load_digits(seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Levels [N, 64] of the images to train on and to test; a sixth, drawn by the seed, is to test."""
    images = torch.tensor(sklearn.datasets.load_digits().data, dtype=torch.float32)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))].to(device)
    return images[len(images) // 6 :], images[: len(images) // 6]


def dequantise(images: Tensor, seed: int | None = None) -> Tensor:
    """Pixels in [0, 1): each grey level spread evenly over its share of the unit interval, anew or by a seed."""
    generator = None if seed is None else torch.Generator(images.device).manual_seed(seed)
    return (images + torch.rand(images.shape, device=images.device, generator=generator)) / LEVELS


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    first, second, last = nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, outputs)
    return nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)


class HierarchicalVAE(nn.Module):
    """A VAE of len(latents) levels, from the image up, with a Gaussian decoder that reads the lowest."""

    def __init__(self, latents: list[int]) -> None:
        super().__init__()
        self.features = nn.ModuleList(mlp(HIDDEN if level else 64, HIDDEN) for level in range(len(latents)))
        self.posteriors = nn.ModuleList(mlp(HIDDEN + above, 2 * n) for n, above in pairwise([*latents, 0]))
        self.priors = nn.ModuleList(mlp(above, 2 * n) for n, above in pairwise(latents))
        self.decoder = nn.Sequential(mlp(latents[0], 64), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def forward(self, x: Tensor, samples: int = 1, seed: int | None = None, free_bits: float | None = None) -> tuple:
        """NLL [K, N] of x [N, 64], and of each level, the top first, draws z [K, N, latents], KL, and parameters."""
        features, levels = [], []
        for network in self.features:
            features.append(network(features[-1] if features else x))
        for index in reversed(range(len(features))):
            read, p, draws = features[index], (0.0, 0.0), samples
            if levels:
                above, draws = levels[-1][0], None
                read = torch.cat((read.expand(*above.shape[:-1], -1), above), dim=-1)
                p = self.priors[index](above).chunk(2, dim=-1)
            q, seed = self.posteriors[index](read).chunk(2, dim=-1), seed and seed + 1
            options = {"scale": SCALE, "num_samples": draws, "event_ndim": 1, "free_bits": free_bits, "seed": seed}
            levels.append((*fastelbo.gaussian_rsample_kl(*q, *p, **options), q, p))
        return fastelbo.gaussian_nll(x, self.decoder(levels[-1][0]), self.x_logvar, event_ndim=1), levels


@torch.no_grad()
def evaluate(model: HierarchicalVAE, images: Tensor) -> list[float]:
    """NLL, and KL of each level from the image up; all in the mean over images and 16 draws, without free bits."""
    nll, levels = model(dequantise(images, seed=1), samples=16, seed=1)
    return [nll.mean().item(), *(kl.mean().item() for _, kl, _, _ in reversed(levels))]


@torch.no_grad()
def importance_sampled(model: HierarchicalVAE, images: Tensor, rounds: int = 16, samples: int = 16) -> float:
    """Log p(x), in the mean over images, from rounds of draws weighted by p(x, z) / q(z | x)."""
    log_weights = []
    for seed in range(rounds):
        nll, levels = model(dequantise(images, seed=1), samples, seed=1000 * (1 + seed))
        log_weights.append(-nll)
        for z, _, q, p in levels:
            log_weights[-1] += fastelbo.gaussian_log_prob(z, *p, scale=SCALE, event_ndim=1)
            log_weights[-1] -= fastelbo.gaussian_log_prob(z, *q, scale=SCALE, event_ndim=1)
    return fastelbo.importance_weighted_log_likelihood(log_weights).mean().item()


@torch.no_grad()
def save_pictures(args: argparse.Namespace, models: nn.ModuleDict, images: Tensor) -> None:
    """What each level decides in the model with free bits; KL of each latent with and without them."""
    z = torch.randn(8, 1, args.latents[-1], generator=torch.Generator().manual_seed(1)).expand(-1, 10, -1)
    for seed, prior in enumerate(reversed(models["free bits"].priors)):
        z = fastelbo.gaussian_rsample(*prior(z.to(images)).chunk(2, dim=-1), scale=SCALE, seed=seed)
    samples = nn.functional.pad(models["free bits"].decoder(z).unflatten(-1, (8, 8)), (1, 1, 1, 1), value=0.35)
    axes = Figure(figsize=(8, 6.4)).subplots()
    axes.imshow(samples.transpose(1, 2).flatten(2).flatten(0, 1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title="Samples: each row one draw of the top level, levels below drawn anew", xticks=[], yticks=[])
    axes.figure.savefig(args.output / "samples.png", dpi=150, bbox_inches="tight")
    axes = Figure(figsize=(8, 4)).subplots()
    for shift, name in ((-0.2, "levels"), (0.2, "free bits")):
        _, levels = models[name](dequantise(images, seed=1), samples=16, seed=1)
        kls = [fastelbo.gaussian_kl(*q, *p, scale=SCALE, event_ndim=0).flatten(0, -2).mean(0) for *_, q, p in levels]
        heights = torch.cat([kl.sort(descending=True).values for kl in reversed(kls)]).tolist()
        axes.bar([index + shift for index in range(len(heights))], heights, width=0.4, label=name)
    axes.axhline(args.free_bits, color="gray", linestyle="--", label="floor")
    axes.set(title="KL of each latent, test images", xlabel="latents, level by level from the image up", ylabel="nats")
    axes.legend()
    axes.figure.savefig(args.output / "kl.png", dpi=150, bbox_inches="tight")


def run(args: argparse.Namespace) -> list[float]:
    """Trains; returns the ELBO of the test images after each epoch, with free bits in training."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of images so small more threads gain little
    images, test_images = load_digits(args.seed, args.device)
    latents = {"one level": args.latents[:1], "levels": args.latents, "free bits": args.latents}
    models, history = nn.ModuleDict({name: HierarchicalVAE(n) for name, n in latents.items()}).to(args.device), []
    models["free bits"].load_state_dict(models["levels"].state_dict())  # free bits are all that differs
    optimizer = torch.optim.Adam(models.parameters(), 3e-3, fused=True)
    try:
        for _ in (bar := tqdm(range(args.epochs), unit="epoch", disable=None)):
            for batch in torch.randperm(len(images), device=images.device).split(args.batch_size):
                x, losses = dequantise(images[batch]), []
                for name, model in models.items():
                    nll, levels = model(x, free_bits=args.free_bits if name == "free bits" else None)
                    losses.append(nll.mean() + sum(kl.mean() for _, kl, _, _ in levels))
                optimizer.zero_grad()
                sum(losses).backward()  # the models share nothing but batches: each learns from its own
                optimizer.step()
            history.append(-sum(evaluate(models["free bits"], test_images)))
            bar.set_postfix_str(f"with free bits: ELBO of test images {history[-1]:.1f} nats")
    finally:  # of what there is, after Ctrl-C
        if history:
            print(f"\n{'nats per test image':<20}{'NLL':>9}{'ELBO':>9}{'log p(x)':>10}   KL of each level")
            for name, model in models.items():
                nll, *kls = evaluate(model, test_images)
                bounds = f"{-nll - sum(kls):>9.2f}{importance_sampled(model, test_images):>10.2f}"
                print(f"{name:<20}{nll:>9.2f}{bounds}   " + "".join(f"{kl:<8.3f}" for kl in kls))
            save_pictures(args, models, test_images)
            print(f"Pictures are in {args.output}")
    return history


def main(argv: list[str] | None = None) -> list[float]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--latents", type=int, nargs="+", default=[8, 3], help="of each level, from the image up (default: 8 3)")
    add("--free-bits", type=float, default=0.5, help="floor of each latent's KL in nats (default: %(default)s)")
    add("--epochs", type=int, default=45, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="images per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/hierarchical_vae", help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, *args.latents) < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs, --batch-size and --latents must be 1 or more, --seed from 0 to 2**63 - 1")
    if len(args.latents) < 2 or not 0 <= args.free_bits < math.inf:
        parser.error("--latents must be two numbers or more, --free-bits 0 or more")
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
