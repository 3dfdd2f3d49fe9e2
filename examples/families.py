"""What a larger family of q buys: isotropic, diagonal, full and mixed Gaussians, fitted to two densities by KL(q || p).

Expectations under q are sums over a grid that q carries along, so that a fit has no noise and many run side by side.
For a Gaussian p of precision L and covariance S the optima are known: isotropic q has the variance 2 / tr(L) by
KL(q || p) and tr(S) / 2 by KL(p || q), diagonal q has 1 / L_ii; every start ends there. For a p of two modes the start
decides. What q misses is the share of its draws outside of p's 99 % region, and of p's outside of its own.

    python examples/families.py --output demo/course/families
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

FAMILIES, EDGE, DRAWS = ("isotropic", "diagonal", "full", "mixture"), 2 * math.log(100), 200_000  # chi-squared's 99 %
Density = tuple[
    Tensor, Tensor, Tensor
]  # B mixtures: means [B, K, 2], Cholesky factors [B, K, 2, 2], log-weights [B, K]


def mixture(means: list, covariances: list, weights: list) -> Density:
    """One mixture, in double precision."""
    m, c, w = (torch.tensor(values, dtype=torch.float64)[None] for values in (means, covariances, weights))
    return m, torch.linalg.cholesky(c), w.log()


CORRELATED = mixture([[0.5, -0.5]], [[[1.0, 1.08], [1.08, 1.44]]], [1.0])
COVARIANCES = [[[0.6, 0.3], [0.3, 0.6]], [[0.5, -0.2], [-0.2, 0.9]]]
TWO_MODES = mixture([[-2.0, -0.5], [2.0, 0.5]], COVARIANCES, [0.35, 0.65])


def log_density(z: Tensor, p: Density) -> Tensor:
    """Of z [B, N, 2] under each mixture: [B, N]."""
    away = (z[:, None] - p[0][:, :, None]) @ torch.linalg.inv(p[1]).mT
    constant = p[2] - p[1].diagonal(dim1=-2, dim2=-1).log().sum(-1) - math.log(2 * math.pi)
    return (constant[..., None] - away.square().sum(-1) / 2).logsumexp(1)


def kl(q: Density, p: Density, count: int) -> Tensor:
    """KL(q || p) of each q: sums over a grid that each Gaussian of q carries along, with a normal's weights."""
    line = torch.linspace(-6, 6, count, dtype=torch.float64)
    noise = torch.cartesian_prod(line, line)
    weights = (q[2][..., None] - noise.square().sum(1) / 2).flatten(1).softmax(1)
    z = (q[0][:, :, None] + noise @ q[1].mT).flatten(1, 2)
    return (weights * (log_density(z, q) - log_density(z, p))).sum(1)


def parts(x: Tensor, family: str) -> Density:
    """A family's q of free numbers [B, K, 6]."""
    first, second, below = x[..., 2], x[..., 3], x[..., 4]
    if family in ("isotropic", "diagonal"):
        second, below = first if family == "isotropic" else second, below * 0
    rows = torch.stack((first.exp(), first * 0, below, second.exp()), dim=-1)
    return x[..., :2], rows.unflatten(-1, (2, 2)), x[..., 5].log_softmax(-1)


def fit(divergence, p: Density, start: Tensor, family: str, steps: int = 200) -> tuple[Density, Tensor]:
    """Descends from starts [B, K, 6]; returns the q and their divergences."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([x], 1, steps, None, 1e-12, 0, 50, "strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (loss := divergence(parts(x, family), p, 25).sum()).backward()
        bar.update()
        return loss

    with tqdm(desc=f"{family}, {len(x)} starts", disable=None) as bar:
        optimizer.step(loss)
    q = tuple(part.detach() for part in parts(x, family))
    return q, divergence(q, p, 81)


def outside(own: Tensor, region: Tensor) -> tuple[float, float]:
    """The share of one Gaussian outside of another's 99 % region, by draws and by an integral over the angle."""
    draws = torch.linalg.solve(region, own @ torch.randn(2, DRAWS, dtype=torch.float64))
    angle = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)[1:]
    rays = torch.linalg.solve(region, own @ torch.stack((angle.cos(), angle.sin())))  # radii are Rayleigh's
    share = (draws.square().sum(0) > EDGE).double().mean()
    return share.item(), torch.exp(-EDGE / (2 * rays.square().sum(0))).mean().item()


def save_picture(path: Path, fits: dict, starts: Tensor, right: Tensor) -> None:
    """Both densities with each family's q at two standard deviations, and where each start ends."""
    panels = Figure(figsize=(13, 3.8), layout="constrained").subplots(1, 3)
    x, y = (torch.linspace(-reach, reach, 200, dtype=torch.float64) for reach in (5, 4))
    angle = torch.linspace(0, 2 * math.pi, 100, dtype=torch.float64)
    circle, plane = 2 * torch.stack((angle.cos(), angle.sin())), torch.cartesian_prod(x, y)[None]
    for axes, (title, p) in zip(panels, (("correlated", CORRELATED), ("two modes", TWO_MODES)), strict=False):
        axes.contourf(x, y, log_density(plane, p).exp().view(200, 200).T, levels=12, cmap="Greys")
        for colour, (family, ((means, lower, _), _)) in enumerate(fits[title].items()):
            for mean, c, label in zip(means[0], lower[0], (family, None), strict=False):
                axes.plot(*(mean[:, None] + c @ circle), color=f"C{colour}", label=label)
        axes.set(title=f"{title}: best q by KL(q||p)", aspect="equal", xlim=(-5, 5), ylim=(-4, 4))
        axes.legend(loc="upper left")
    panels[2].scatter(*starts.T, c=right, s=200, marker="s", cmap="coolwarm")
    panels[2].set(title="two modes: where a start ends", aspect="equal")
    panels[0].figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Fits, counts, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    precision = torch.cholesky_inverse(lower := CORRELATED[1][0, 0])
    starts = torch.cartesian_prod(*[torch.linspace(-4, 4, args.starts, dtype=torch.float64)] * 2)
    many = torch.cat((starts, torch.zeros(len(starts), 4)), dim=1)[:, None].double()
    one = torch.tensor([[[2.0, 0, 0, 0, 0, 0]]], dtype=torch.float64)
    fits = {"correlated": {family: fit(kl, CORRELATED, one, family) for family in FAMILIES[:3]}, "two modes": {}}
    for family in FAMILIES:
        start = torch.cat((one, -one), dim=1) if family == "mixture" else one
        fits["two modes"][family] = fit(kl, TWO_MODES, start, family)
    isotropic, diagonal = (fits["correlated"][family][0][1][0, 0] for family in FAMILIES[:2])
    (_, (covering,), _), _ = fit(lambda q, p, count: kl(p, q, count), CORRELATED, one, "isotropic")
    (everywhere, _), (ends, _) = (fit(kl, p, many, "diagonal") for p in (CORRELATED, TWO_MODES))
    found = torch.cat([part.flatten(1) for part in ends[:2]], dim=1).round(decimals=3)
    save_picture(args.output / "families.png", fits, starts, ends[0][:, 0, 0] > 0)
    print(f"The picture is {args.output / 'families.png'}")
    formula = torch.log(lower.diagonal().prod() * precision.trace() / 2)
    spread = torch.cat([part.flatten(1) for part in everywhere[:2]], dim=1).std(0).max()
    least, steps = ([value for _, value in fits[title].values()] for title in fits)
    off = (diagonal.diagonal().square() - 1 / precision.diagonal()).abs().max()
    claims = [
        ("isotropic variance by KL(q to p); 2 / tr(L)", isotropic[0, 0] ** 2, 2 / precision.trace(), 1e-6),
        ("isotropic variance by KL(p to q); tr(S) / 2", covering[0, 0, 0] ** 2, lower.square().sum() / 2, 1e-6),
        ("diagonal variances less 1 / L_ii", off, 0, 1e-6),
        ("isotropic q: its KL; the formula", least[0], formula, 1e-6),
        ("full q: its KL to a Gaussian", least[2], 0, 1e-9),
        ("spread of the ends of all starts, for a Gaussian", spread, 0, 1e-6),
        ("different ends for two modes", len(found.unique(dim=0)), 2, 0),
        ("two modes: KL of isotropic less that of diagonal q", steps[0] - steps[1], 0, "at least"),
        ("two modes: KL of diagonal less that of full q", steps[1] - steps[2], 0, "at least"),
        ("two modes: KL of a mixture of two", steps[3], 0, 1e-4),
        ("share of isotropic q's draws outside of p's 99 % region; integral", *outside(isotropic, lower), 0.001),
        ("share of p's draws outside of isotropic q's 99 % region; integral", *outside(lower, isotropic), 0.005),
    ]
    return [(what, float(found), float(true), within) for what, found, true, within in claims]


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
    add("--starts", type=int, default=7, help="of the map on a side (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/families", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.starts < 2 or not 0 <= args.seed < 2**63:
        parser.error("--starts must be 2 or more, --seed from 0 to 2**63 - 1")
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
