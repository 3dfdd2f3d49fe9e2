"""Disentangled factors and their score: digits that are turned, scaled and moved, coded by VAEs with several betas.

All combinations of a digit, an angle, a size and two places occur once. The mutual information gap (Chen et al. 2018,
"Isolating sources of disentanglement in variational autoencoders") asks how much more the latent that tells most of a
factor tells than the next, as a share of its entropy: 1 where each has a latent of its own, 0 where two tell the same.
A linear probe asks what can be read at all, and does not see a rotation of the code.

    python examples/disentanglement.py --output demo/course/disentanglement
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

BETAS, LATENTS, HIDDEN, STD, BINS = (0.0, 1.0, 4.0, 16.0), 6, 128, 0.2, 20
FACTORS, SIDE = {"digit": 3, "angle": 5, "size": 4, "across": 5, "down": 5}, 14


def turned_digits() -> tuple[Tensor, Tensor]:
    """Images [1500, 196] of all combinations, and their factors [1500, 5] as whole numbers."""
    factors = torch.cartesian_prod(*[torch.arange(size) for size in FACTORS.values()])
    _, angle, size, *places = (factors / (torch.tensor(list(FACTORS.values())) - 1)).unbind(1)  # from 0 to 1
    angle, zoom, (across, down) = (angle - 0.5) * 1.6, 2.1 - 0.8 * size, [(place - 0.5) * 0.7 for place in places]
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack((cos, -sin, sin * down - cos * across, sin, cos, -sin * across - cos * down), dim=1)
    images = torch.tensor(load_digits().images[1:4, None]).float()[factors[:, 0]] / 16
    grid = F.affine_grid((rows * zoom[:, None]).view(-1, 2, 3), [len(factors), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).flatten(1), factors


class VAE(nn.Module):
    """An encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        first, second = ((nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU()) for _ in range(2))
        self.encoder = nn.Sequential(nn.Linear(SIDE**2, HIDDEN), *first, nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), *second, nn.Linear(HIDDEN, SIDE**2))

    def forward(self, x: Tensor, beta: float) -> Tensor:
        """Distortion + beta rate of each image."""
        z, kl = fastelbo.gaussian_rsample_kl(*self.encoder(x).chunk(2, dim=1))
        return fastelbo.gaussian_nll(x, self.decoder(z), STD, scale="std") + beta * kl


def train(x: Tensor, beta: float, epochs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Means and log-variances of the codes of a VAE that minimises distortion + beta rate."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam((model := VAE()).parameters(), 2e-3, fused=True)
    for _ in tqdm(range(epochs), f"beta {beta}", unit="epoch", disable=None):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            model(x[batch], beta).mean().backward()
            optimizer.step()
    return model.requires_grad_(False).encoder(x).double().chunk(2, dim=1)


def binned(codes: Tensor) -> Tensor:
    """Which of BINS bins of equal width each number of a column falls into."""
    low, high = codes.amin(0), codes.amax(0)
    return ((codes - low) / (high - low).clamp(min=1e-12) * BINS).long().clamp(max=BINS - 1)


def mutual_information(a: Tensor, b: Tensor) -> Tensor:
    """Of two columns of whole numbers below BINS, in nats."""
    p = torch.bincount(a * BINS + b, minlength=BINS**2).view(BINS, BINS).double() / len(a)
    return torch.special.xlogy(p, p / (p.sum(1, keepdim=True) * p.sum(0)).clamp(min=1e-300)).sum()


def table(codes: Tensor, factors: Tensor) -> Tensor:
    """Share of each factor's entropy that each code's bins tell, [factors, codes]."""
    told = [[mutual_information(factor, bins) for bins in binned(codes).T] for factor in factors.T]
    return torch.tensor(told).double() / torch.tensor([[mutual_information(f, f)] for f in factors.T])


def gap(codes: Tensor, factors: Tensor) -> float:
    """The mutual information gap, a mean over factors."""
    first, second = table(codes, factors).topk(2, dim=1).values.T
    return (first - second).mean().item()


def probe(codes: Tensor, factors: Tensor) -> Tensor:
    """Share of the variance of each factor, and of what digit it is, that least squares read from the codes."""
    codes, y = F.pad(codes, (0, 1), value=1.0), torch.cat((F.one_hot(factors[:, 0]), factors[:, 1:]), dim=1).double()
    return 1 - (y - codes @ torch.linalg.lstsq(codes, y).solution).var(0) / y.var(0)


def save_picture(path: Path, x: Tensor, tables: dict[str, Tensor]) -> None:
    """Some images, and what each code tells of each factor."""
    panels = Figure(figsize=(14, 3), layout="constrained").subplots(1, 1 + len(tables))
    panels[0].imshow(x[::62][:25].view(5, 5, SIDE, SIDE).transpose(1, 2).reshape(5 * SIDE, -1), cmap="gray")
    for axes, (title, shares) in zip(panels[1:], tables.items(), strict=True):
        axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
        axes.set(title=title, xlabel="code", xticks=range(LATENTS), yticks=range(5), yticklabels=FACTORS)
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Scores codes that are known, trains, scores; returns the claims."""
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    a, b = (pair := torch.cartesian_prod(torch.arange(8), torch.arange(8))).T
    known = [torch.stack(codes, dim=1).double() for codes in ((a, b, 0 * a), (a + b, a - b), (a % 2, b % 2, 0 * a))]
    own, turned, parity = (gap(codes, pair) for codes in known)
    x, factors = turned_digits()
    codes = {beta: train(x, beta, args.epochs, args.seed) for beta in BETAS}
    tables = {f"beta {beta}": table(mean, factors) for beta, (mean, _) in codes.items()}
    mean, logvar = codes[4.0]
    pca = torch.tensor(PCA(LATENTS).fit_transform(x.double().numpy()))
    pairs = [(factor, code) for factor in factors.T for code in binned(mean).T]
    off = max(abs(mutual_information(*two).item() - mutual_info_score(*two)) for two in pairs)
    places, score = factors[:, 3:].double(), probe(mean, factors)
    by_sklearn = LinearRegression().fit(mean.numpy(), places.numpy()).score(mean.numpy(), places.numpy())
    turns = [mean @ torch.linalg.qr(torch.randn(LATENTS, LATENTS).double())[0] for _ in range(10)]
    moved, mean_gap = (probe(turns[0], factors) - score).abs().max().item(), sum(gap(z, factors) for z in turns) / 10
    drawn = binned(fastelbo.gaussian_rsample(mean, logvar, num_samples=40, seed=args.seed).flatten(0, 1))
    told = [[mutual_information(f.repeat(40), z).item() for z in drawn.T] for f in factors.T]
    over = (torch.tensor(told) - fastelbo.gaussian_kl(mean, logvar, event_ndim=0).mean(0)).max().item()
    save_picture(args.output / "disentanglement.png", x, {**tables, "PCA": table(pca, factors)})
    print(f"The picture is {args.output / 'disentanglement.png'}")
    return [
        ("gap of a code that is the factors", own, 1, 1e-12),
        ("of that code turned by 45 degrees", turned, 0, 1e-12),
        ("of one that tells if each of eight values is even", parity, 1 / 3, 1e-12),
        ("largest difference of an information from scikit-learn's", off, 0, 1e-12),
        ("beta = 4: largest excess of what a drawn latent tells over its KL", over, 0.001, "at most"),
        ("beta = 4: gap; mean gap of ten turns of it", gap(mean, factors), mean_gap, "at least"),
        ("what turning changes for a linear probe", moved, 0, 1e-9),
        ("share of the places that the probe reads; scikit-learn's", score[-2:].mean().item(), by_sklearn, 1e-9),
        ("beta = 4: gap; of as many principal components", gap(mean, factors), gap(pca, factors), 0.1),
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
    add("--epochs", type=int, default=50, help="of each VAE (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/disentanglement", help="for the picture (default: %(default)s)")
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
