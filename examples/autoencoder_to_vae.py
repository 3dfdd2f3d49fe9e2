"""From the autoencoder to the VAE: one network, its KL weighted by beta from 0 to 8, with two latents that one can see.

With beta = 0 and no noise it is an autoencoder. As beta grows the code costs more: the rate, E[KL(q(z | x) || p(z))] in
nats, falls and the distortion rises. The rate is what z tells of x and what the codes together miss of the prior,
E[KL(q(z | x) || q(z))] + KL(q(z) || p(z)), where q(z) is the mean of all images' q: integrals over a plane. An
autoencoder's codes need not bear noise, nor lie where the prior is; a VAE's must.

    python examples/autoencoder_to_vae.py --output demo/course/autoencoder_to_vae
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import sklearn.decomposition
import sklearn.neighbors
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

BETAS, HIDDEN, STD = (0.0, 0.1, 0.5, 1.0, 2.0, 8.0), 128, 0.2  # STD: of a pixel from 0 to 1, kept


class Model(nn.Module):
    """An encoder to two latents and a decoder; without noise an autoencoder."""

    def __init__(self, beta: float | None) -> None:
        super().__init__()
        self.beta = beta
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 4))
        hidden = nn.Linear(2, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()
        self.decoder = nn.Sequential(*hidden, nn.Linear(HIDDEN, 64), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q, the latter no less than -12."""
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        return mean, logvar.clamp(min=-12)

    def forward(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Distortion and rate of each image in nats; no rate for an autoencoder."""
        mean, logvar = self.encode(x)
        if self.beta is None:
            return fastelbo.gaussian_nll(x, self.decoder(mean), STD, scale="std"), torch.zeros(len(x))
        z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=seed)
        return fastelbo.gaussian_nll(x, self.decoder(z), STD, scale="std"), kl


def train(x: Tensor, beta: float | None, epochs: int, seed: int) -> tuple[Model, list[list[float]]]:
    """Minimises distortion + beta rate; also what happened to both, to q's deviations and to the means' spread."""
    torch.manual_seed(seed)
    model, history = Model(beta), []
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    for _ in tqdm(range(epochs), "autoencoder" if beta is None else f"beta {beta}", unit="epoch", disable=None):
        for batch in torch.randperm(len(x)).split(64):
            distortion, rate = model(x[batch])
            optimizer.zero_grad()
            (distortion + (beta or 0) * rate).mean().backward()
            optimizer.step()
        with torch.no_grad():
            (distortion, rate), (mean, logvar) = model(x), model.encode(x)
        numbers = distortion.mean(), rate.mean(), logvar.div(2).exp().mean(), mean.std(0).mean()
        history.append([number.item() for number in numbers])
    return model.requires_grad_(False), history


def parts_of_the_rate(mean: Tensor, logvar: Tensor, points: int = 250) -> tuple[float, float, float]:
    """What z tells of x, the KL of the mean q from the prior, and that q's whole mass: sums over a plane."""
    reach = (mean.abs() + 6 * logvar.div(2).exp()).max().item()
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    cell, z = (line[1] - line[0]).square(), torch.cartesian_prod(line, line)
    log_p = fastelbo.gaussian_log_prob(z, 0.0, 0.0)
    each = [fastelbo.gaussian_log_prob(part[:, None], mean, logvar, event_ndim=1) for part in z.split(4000)]
    log_all = torch.cat([part.logsumexp(1) for part in each]) - math.log(len(mean))
    share = log_all.exp() * cell
    tells = -(share * log_all).sum() - (logvar.sum(1) / 2 + 1 + math.log(2 * math.pi)).mean()
    return tells.item(), (share * (log_all - log_p)).sum().item(), share.sum().item()


@torch.no_grad()
def save_picture(path: Path, models: dict, test: Tensor, classes: Tensor) -> None:
    """Rate and distortion, how they fight, where the codes lie, and what the decoder makes of a grid of them."""
    panels = Figure(figsize=(15, 4), layout="constrained").subplots(1, 4)
    model, history = models[1.0]
    panels[0].plot(*zip(*((models[beta][1][-1][1], models[beta][1][-1][0]) for beta in BETAS[1:]), strict=True), "o-")
    panels[0].set(title="beta from 0.1 to 8", xlabel="rate, nats", ylabel="distortion, nats")
    panels[1].plot(history, label=["distortion", "rate", "deviation of q", "spread of means"])
    panels[1].set(title="beta = 1 in training", xlabel="epoch", yscale="symlog")
    panels[1].legend()
    panels[2].scatter(*model.encode(test)[0].T, c=classes, s=8, cmap="tab10")
    panels[2].set(title="beta = 1: codes of test digits by class", aspect="equal")
    line = torch.linspace(2, -2, 12)
    grid = torch.stack(torch.meshgrid(line, -line, indexing="ij"), dim=-1).flip(-1)
    panels[3].imshow(model.decoder(grid).view(12, 12, 8, 8).transpose(1, 2).reshape(96, 96), cmap="gray")
    panels[3].set(title="what a grid of codes becomes", xticks=[], yticks=[])
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains all, integrates; returns the claims."""
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    digits = sklearn.datasets.load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(args.seed))
    x, classes = torch.tensor(digits.data, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]
    (test, x), (test_classes, classes) = x.split([300, 1497]), classes.split([300, 1497])
    models = {beta: train(x, beta, args.epochs, args.seed) for beta in (None, *BETAS)}
    save_picture(args.output / "autoencoder_to_vae.png", models, test, test_classes)
    print(f"The picture is {args.output / 'autoencoder_to_vae.png'}")
    ends = [models[beta][1][-1] for beta in BETAS]
    plain, vae = models[None][0], models[1.0][0]
    codes = [part[:500].double() for part in vae.encode(x)]
    (tells, misses, whole), rate = parts_of_the_rate(*codes), fastelbo.gaussian_kl(*codes).mean().item()
    worse = []
    for model in (plain, vae):  # noise of a third of the means' spread
        mean, _ = model.encode(x)
        noisy = fastelbo.gaussian_rsample(mean, mean.std(0) / 3, scale="std", seed=args.seed)
        errors = [(model.decoder(z) - x).square().sum(1).mean().item() for z in (mean, noisy)]
        worse.append(errors[1] / errors[0])
    pca, right = sklearn.decomposition.PCA(2).fit(x.numpy()), []
    for seen, unseen in ((vae.encode(x)[0], vae.encode(test)[0]), (pca.transform(x), pca.transform(test))):
        judge = sklearn.neighbors.KNeighborsClassifier(5).fit(seen, classes.numpy())
        right.append(judge.score(unseen, test_classes.numpy()))
    falls, rises = (
        [a[1] - b[1] for a, b in itertools.pairwise(ends)],
        [b[0] - a[0] for a, b in itertools.pairwise(ends[1:])],
    )
    return [
        ("beta = 1: rate; what z tells of x and what q(z) misses", rate, tells + misses, 1e-4),
        ("mass of q(z) in the plane", whole, 1, 1e-5),
        ("what z tells of 500 images; ln 500", tells, math.log(500), "at most"),
        ("beta = 0: distortion; an autoencoder's", ends[0][0], models[None][1][-1][0], 1.5),
        ("beta = 0: mean deviation of q", ends[0][2], 0.05, "at most"),
        ("smallest fall of the rate from one beta to the next", min(falls), 0, "at least"),
        ("smallest rise of the distortion, from beta = 0.1 on", min(rises), 0, "at least"),
        ("how many times the error with noisy codes: autoencoder; VAE", worse[0], worse[1], "at least"),
        ("digits named right by 5 neighbours: VAE's codes; scikit-learn's PCA", right[0], right[1], "at least"),
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
    add("--epochs", type=int, default=60, help="of each model (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/autoencoder_to_vae", help="for the picture (default: %(default)s)")
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
