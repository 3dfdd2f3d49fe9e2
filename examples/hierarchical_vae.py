"""Trains a VAE with several levels of latents, whose priors are learned, and shows what free bits are for.

From the top level L down to level 1, each level's prior is a network's output from the level above it, and so is its
posterior, which also reads features of the image x::

    p(x, z) = p(x | z_1) p(z_1 | z_2) ... p(z_L)        q(z | x) = q(z_L | x) ... q(z_1 | z_2, x)

    z, kl = fastelbo.gaussian_rsample_kl(*posterior(features, above), *prior(above), free_bits=0.5)

The evidence lower bound (ELBO) is -(nll + the KLs of all levels). A level that the decoder can do without may be left
unused, its posterior close to its prior and its KL to 0: the price of its noise comes before its use. With free bits a
latent whose KL (mean over the batch) lies at or below a floor costs the floor, whatever it does, and so may as well be
of use. What is trained then is no bound, but a bound is what the tables have, for the test images and all models: one
level of latents, and several, without and with free bits.

Beside each KL by the formula stands the mean of ln q(z) - ln p(z) over the same draws, with the standard error of their
difference; beside the ELBO, log p(x) by importance sampling, which it may not exceed. What a level knows is measured
from outside: logistic regression, trained on a draw of its latents for each training image, names the class of test
images from such a draw.

The log standard deviation of all latents stays between -5 and 5, as NVAE's: two learned Gaussians with scales that
nothing limits can push each other's KL to infinity. The data and their units are those of
conditional_vae.py; ELBO, NLL, KL and log p(x) in nats per image.

    python examples/hierarchical_vae.py --latents 8 4 2 --output demo/hierarchical_vae

Sources: Sønderby et al. 2016, "Ladder Variational Autoencoders" (posteriors from the top down); Kingma et al. 2016,
"Improving Variational Inference with Inverse Autoregressive Flow" (free bits); Burda et al. 2015, "Importance Weighted
Autoencoders" (log p(x)); Vahdat and Kautz 2020, "NVAE: A Deep Hierarchical Variational Autoencoder".
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import common
import fastelbo
from common import CHECKPOINT, InputError, Training

HIDDEN = 128
LEARNING_RATE = 3e-3
EVALUATION_SEED = 1
EVALUATION_SAMPLES = 16
IMPORTANCE_SAMPLES = 256  # a multiple of the number above
STANDARD_NORMAL = (0.0, 0.0)
SCALE = fastelbo.Scale("log_std", soft_clamp=5.0)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_training_parser(
        "Train VAEs with several levels of latents and learned priors on handwritten digits, with and without free "
        "bits, beside one of a single level.",
        output="demo/hierarchical_vae",
        epochs=45,
        batch_size=64,
    )
    latents = f"of each level, from the image up {common.DEFAULT}"
    parser.add_argument("--latents", type=int, nargs="+", default=[8, 3], metavar="N", help=latents)
    free_bits = f"floor of each latent's KL in nats, mean over a batch {common.DEFAULT}"
    parser.add_argument("--free-bits", type=float, default=0.5, metavar="NATS", help=free_bits)
    return parser.parse_args(argv)


class Level(NamedTuple):
    """A level's draw z [K, N, latents], its KL [N] or [K, N], and mean and raw scale of posterior and prior."""

    z: Tensor
    kl: Tensor
    q: tuple[Tensor, Tensor]
    p: tuple[Tensor | float, Tensor | float]


class HierarchicalVAE(nn.Module):
    """A VAE of len(latents) levels, with a Gaussian decoder that reads the lowest."""

    def __init__(self, size: int, latents: list[int]) -> None:
        super().__init__()
        above = [*latents[1:], 0]
        inputs = [size] + [HIDDEN] * (len(latents) - 1)
        self.features = nn.ModuleList(common.mlp(n, HIDDEN, HIDDEN) for n in inputs)
        self.posteriors = nn.ModuleList(
            common.mlp(HIDDEN + n_above, HIDDEN, 2 * n) for n, n_above in zip(latents, above, strict=True)
        )
        self.priors = nn.ModuleList(common.mlp(n_above, HIDDEN, 2 * n) for n, n_above in itertools.pairwise(latents))
        self.decoder = common.mlp(latents[0], HIDDEN, size)
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))
        self.top = latents[-1]

    def infer(
        self, x: Tensor, backend: str | None, free_bits: float | None = None, samples: int = 1, seed: int | None = None
    ) -> list[Level]:
        """Draws of the latents of x [N, size], from the top level down."""
        features = [self.features[0](x)]
        for network in self.features[1:]:
            features.append(network(features[-1]))
        levels = []
        for index in reversed(range(len(features))):
            if not levels:
                q, p, draws = self.posteriors[index](features[index]).chunk(2, dim=-1), STANDARD_NORMAL, samples
            else:
                above = levels[-1].z
                both = torch.cat((features[index].expand(*above.shape[:-1], -1), above), dim=-1)
                q, p, draws = self.posteriors[index](both).chunk(2, dim=-1), self.prior(index, above), None
            z, kl = fastelbo.gaussian_rsample_kl(
                *q,
                *p,
                scale=SCALE,
                num_samples=draws,
                seed=None if seed is None else seed + index,
                event_ndim=1,
                free_bits=free_bits,
                backend=backend,
            )
            levels.append(Level(z, kl, q, p))
        return levels

    def prior(self, index: int, above: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and raw scale of the prior of a level below the top, given the one above it."""
        return self.priors[index](above).chunk(2, dim=-1)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of each pixel, from the lowest level."""
        return self.decoder(z).sigmoid()

    def nll(self, x: Tensor, levels: list[Level], backend: str | None) -> Tensor:
        """Negative log-likelihood [K, N] of x."""
        return fastelbo.gaussian_nll(x, self.decode(levels[-1].z), self.x_logvar, event_ndim=1, backend=backend)

    def sample_below(self, z: Tensor, generator: torch.Generator, backend: str | None) -> Tensor:
        """From the top level's latents to decoder means, the levels between drawn from their priors."""
        for index in reversed(range(len(self.priors))):
            z = fastelbo.gaussian_rsample(*self.prior(index, z), scale=SCALE, generator=generator, backend=backend)
        return self.decode(z)


MODELS = ("one level", "levels", "levels, free bits")


def start_training(args: argparse.Namespace, device: torch.device) -> Training:
    """Fresh models, or those of the checkpoint; they share nothing but batches."""
    torch.manual_seed(args.seed)
    flat, *levels = (HierarchicalVAE(64, latents) for latents in (args.latents[:1], args.latents, args.latents))
    levels[1].load_state_dict(levels[0].state_dict())  # free bits are all that differs
    models = nn.ModuleList([flat, *levels]).to(device)
    optimizer = torch.optim.Adam(models.parameters(), LEARNING_RATE, fused=True)
    settings = {name: getattr(args, name) for name in ("seed", "batch_size", "latents", "free_bits")}
    training = Training(models, optimizer, torch.Generator().manual_seed(args.seed), settings)
    training.resume(args)
    return training


def pixels(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels [N, 64] in [0, 1)."""
    return common.dequantise(images, common.DIGIT_LEVELS, generator)


def train_epoch(
    training: Training, images: Tensor, backend: str, free_bits: float, on_step: Callable[[], object] = lambda: None
) -> Tensor:
    """One pass in a new order; returns the loss of each step and model, [steps, 3]."""
    losses = []
    for batch in training.batches(images):
        x, terms = pixels(batch), []
        for model, floor in zip(training.model, (None, None, free_bits), strict=True):
            levels = model.infer(x, backend, floor)
            terms.append(model.nll(x, levels, backend).mean() + sum(level.kl.mean() for level in levels))
        loss = torch.stack(terms)
        training.step(loss.sum())
        losses.append(loss.detach())
        on_step()
    return torch.stack(losses)


def fixed_pixels(images: Tensor) -> Tensor:
    """Always with the same noise."""
    return pixels(images, torch.Generator(images.device).manual_seed(EVALUATION_SEED))


@torch.no_grad()
def evaluate(model: HierarchicalVAE, images: Tensor, backend: str) -> tuple[float, list[float]]:
    """NLL, and KL of each level from the image up; both in the mean over test images, without free bits."""
    x = fixed_pixels(images)
    levels = model.infer(x, backend, samples=EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    return model.nll(x, levels, backend).mean().item(), [level.kl.mean().item() for level in reversed(levels)]


def log_densities(level: Level, backend: str) -> tuple[Tensor, Tensor]:
    """ln q(z) and ln p(z) of a level's draws, [K, N]."""
    q, p = (
        fastelbo.gaussian_log_prob(level.z, *each, scale=SCALE, event_ndim=1, backend=backend)
        for each in (level.q, level.p)
    )
    return q, p


@torch.no_grad()
def importance_sampled(model: HierarchicalVAE, images: Tensor, backend: str) -> tuple[float, list[list[float]]]:
    """Log p(x); of each level, from the image up, KL by formula, KL by draws, standard error of their difference."""
    x, kls, ratios = fixed_pixels(images), [], []

    def log_weights() -> Iterator[Tensor]:
        for seed in range(IMPORTANCE_SAMPLES // EVALUATION_SAMPLES):
            levels = model.infer(x, backend, samples=EVALUATION_SAMPLES, seed=EVALUATION_SEED + 1000 * (1 + seed))
            drawn = [log_q - log_p for log_q, log_p in (log_densities(level, backend) for level in levels)]
            kls.append(torch.stack([level.kl.expand_as(each) for level, each in zip(levels, drawn, strict=True)]))
            ratios.append(torch.stack(drawn))
            yield -model.nll(x, levels, backend) - sum(drawn)

    log_p_x = fastelbo.importance_weighted_log_likelihood(log_weights()).mean().item()
    kl, ratio = (torch.cat(each, dim=1).flip(0).double().mean(2) for each in (kls, ratios))  # over images: [L, draws]
    error = (ratio - kl).std(1) / math.sqrt(kl.shape[1])
    return log_p_x, torch.stack((kl.mean(1), ratio.mean(1), error), dim=1).tolist()


@torch.no_grad()
def kl_per_latent(model: HierarchicalVAE, images: Tensor, backend: str) -> list[Tensor]:
    """KL of each latent in the mean over test images, of each level from the image up."""
    levels = model.infer(fixed_pixels(images), backend, samples=EVALUATION_SAMPLES, seed=EVALUATION_SEED)
    elementwise = (
        fastelbo.gaussian_kl(*level.q, *level.p, scale=SCALE, event_ndim=0, backend=backend) for level in levels
    )
    return [kl.flatten(0, -2).mean(0).cpu() for kl in elementwise][::-1]


def train(training: Training, images: tuple[Tensor, Tensor], args: argparse.Namespace, backend: str) -> None:
    """Trains up to the given epoch, and saves a checkpoint after each."""
    train_images, test_images = images

    def run_epoch(on_step: Callable[[], object]) -> tuple[tuple[float, float], str]:
        losses = train_epoch(training, train_images, backend, args.free_bits, on_step)
        nll, kls = evaluate(training.model[2], test_images, backend)
        figures = -losses[:, 2].mean().item(), -nll - sum(kls)
        return figures, f"with free bits: objective {figures[0]:.1f}, ELBO of test images {figures[1]:.1f} nats"

    training.run(args.epochs, training.steps(train_images), run_epoch, args.output / CHECKPOINT)


@torch.no_grad()
def class_accuracy(model: HierarchicalVAE, images: tuple[Tensor, Tensor], seed: int, backend: str) -> list[float]:
    """How often a draw of each level's latents tells the class of a test image, from the image up."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = common.split(common.load_digit_classes(), seed, torch.device("cpu"))
    each = [model.infer(fixed_pixels(part), backend, seed=EVALUATION_SEED)[::-1] for part in images]
    accuracies = []
    for train, test in zip(*each, strict=True):
        judge = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        judge.fit(train.z[0].cpu(), classes[0])
        accuracies.append(judge.score(test.z[0].cpu(), classes[1]))
    return accuracies


def report(training: Training, images: tuple[Tensor, Tensor], seed: int, backend: str) -> dict[str, float]:
    """Prints the test results; returns the ELBO of each model."""
    print(f"\nTest set: {len(images[1])} images; {len(training.history)} epochs, backend {backend}; nats per image")
    print(f"  {'':<20}{'NLL':>9}{'KL':>9}{'ELBO':>9}{'log p(x)':>11}")
    rows, elbos = [], {}
    for name, model in zip(MODELS, training.model, strict=True):
        nll, kls = evaluate(model, images[1], backend)
        log_p_x, drawn = importance_sampled(model, images[1], backend)
        elbos[name] = -nll - sum(kls)
        print(f"  {name:<20}{nll:>9.2f}{sum(kls):>9.2f}{elbos[name]:>9.2f}{log_p_x:>11.2f}")
        accuracies = class_accuracy(model, images, seed, backend)
        for index, ((kl, mean, error), accuracy) in enumerate(zip(drawn, accuracies, strict=True), start=1):
            rows.append(f"  {name:<20}{f'z{index}':>5}{kl:>13.3f}{mean:>12.3f} +- {error:.3f}{100 * accuracy:>14.1f} %")
    print(f"  log p(x) by {IMPORTANCE_SAMPLES} importance-weighted draws of each image's latents")
    print(f"\n  {'':<20}{'level':>5}{'KL, formula':>13}{'KL, draws':>21}{'class told':>16}")
    print("\n".join(rows))
    print(f"  {'a guess':<20}{10:>52.1f} %")
    return elbos


@torch.no_grad()
def save_pictures(
    output: Path, training: Training, images: Tensor, elbos: dict, free_bits: float, backend: str
) -> None:
    """What each level decides in the model with free bits; KL of each latent with and without them; training curve."""
    _, without, model = training.model
    device, size = images.device, images.shape[1:]
    generator = torch.Generator(device).manual_seed(EVALUATION_SEED)
    top = torch.randn(8, 1, model.top, generator=torch.Generator().manual_seed(EVALUATION_SEED)).to(device)
    samples = model.sample_below(top.expand(-1, 10, -1), generator, backend).unflatten(-1, size)
    title = "Samples: each row one draw of the top level"
    common.save_grid(output / "samples.png", samples, title, x_label="levels below drawn anew")

    x, shown = fixed_pixels(images)[:8], images[:8, None] / (common.DIGIT_LEVELS - 1)
    levels = model.infer(x, backend, seed=EVALUATION_SEED)
    kept = levels[0].z[0][:, None]
    again = model.sample_below(kept.expand(-1, 8, -1), generator, backend)
    rows = torch.cat((model.decode(levels[-1].z[0])[:, None], again), dim=1).unflatten(-1, size)
    title, ticks = "Test images: all levels kept, then the top alone", ["test", "all", *["top"] * 8]
    common.save_grid(output / "reconstructions.png", torch.cat((shown, rows), dim=1), title, ticks=ticks)

    save_kl(output / "kl.png", {"without": without, "with free bits": model}, images, free_bits, backend)
    title = "With free bits: objective in training, ELBO of test images"
    levels = {f"test, {name}": elbos[name] for name in MODELS[:2]}
    common.save_curves(output / "training_curve.png", training.curves(), title, "epoch", "nats per image", levels)


def save_kl(path: Path, models: dict[str, HierarchicalVAE], images: Tensor, free_bits: float, backend: str) -> None:
    """Draws the KL of each latent, the largest first in each level."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4)).subplots()
    for shift, (label, model) in zip((-0.2, 0.2), models.items(), strict=True):
        per_latent = kl_per_latent(model, images, backend)
        heights = torch.cat([kl.sort(descending=True).values for kl in per_latent])
        axes.bar([index + shift for index in range(len(heights))], heights.tolist(), width=0.4, label=label)
    names = [f"$z_{level}$" if index == 0 else "" for level, kl in enumerate(per_latent, 1) for index in range(len(kl))]
    axes.axhline(free_bits, color="gray", linestyle="--", label="floor")
    axes.set(title="KL of each latent, test images", ylabel="nats")
    axes.set_xticks(range(len(names)), names)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def check(args: argparse.Namespace) -> None:
    """The options that are this example's own."""
    common.check_whole_numbers(args, epochs=1, batch_size=1, seed=0)
    if len(args.latents) < 2 or not all(1 <= n <= 1024 for n in args.latents):
        raise InputError(f"--latents must be two or more numbers from 1 to 1024; got {args.latents}")
    if not 0 <= args.free_bits < math.inf:
        raise InputError(f"--free-bits must be 0 or more; got {args.free_bits}")


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then trains and reports."""
    check(args)
    device, backend = common.choose_device_and_backend(args)
    images = common.split(common.load_digits(), args.seed, device)
    training = start_training(args, device)
    common.make_output(args.output)
    with common.one_thread(True):
        train(training, images, args, backend)
        elbos = report(training, images, args.seed, backend)
        save_pictures(args.output, training, images[1], elbos, args.free_bits, backend)
    print(f"\nPictures and checkpoint are in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
