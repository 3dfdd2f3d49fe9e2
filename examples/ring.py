"""A normal through a decoder becomes a ring: z / 10 + z / |z|, whose density is known, and a VAE that learns it.

The radius of z / 10 + z / |z| is 1 + |z| / 10, and |z| follows Rayleigh's law, so that the ring has the density
p(r) = 100 (r - 1) exp(-50 (r - 1)^2) over radii and p(r) / 2 pi r in the plane. A VAE of two latents sees draws of it
alone. Its p(x) is an infinite mixture, of one Gaussian for every z: a sum over a grid of z, or importance weights of q.

    python examples/ring.py --output demo/course/ring
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

DRAWS, HIDDEN = 20000, 64


def ring(z: Tensor) -> Tensor:
    """The map of the plane."""
    return z / 10 + z / z.norm(dim=-1, keepdim=True)


def log_density(x: Tensor) -> Tensor:
    """ln p of points in the plane, [..., 2], outside of the unit circle; nothing is inside."""
    r = x.norm(dim=-1).clamp(min=1e-6)
    above = (r - 1).clamp(min=0)
    return (100 * above).log() - 50 * above.square() - (2 * math.pi * r).log()


class VAE(nn.Module):
    """Two latents, and one learned log-variance."""

    def __init__(self) -> None:
        super().__init__()
        hidden = [(nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(2)]
        self.encoder = nn.Sequential(*hidden[0], nn.Linear(HIDDEN, 4))
        self.decoder = nn.Sequential(*hidden[1], nn.Linear(HIDDEN, 2))
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def forward(self, x: Tensor) -> Tensor:
        """The bound of each point."""
        z, kl = fastelbo.gaussian_rsample_kl(*self.encoder(x).chunk(2, dim=1))
        return -fastelbo.gaussian_nll(x, self.decoder(z), self.x_logvar) - kl


def train(steps: int) -> VAE:
    """Maximises the bound of new draws in every step."""
    optimizer = torch.optim.Adam((model := VAE()).parameters(), 3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), unit="step", disable=None):
        optimizer.zero_grad()
        (-model(ring(torch.randn(256, 2))).mean()).backward()
        optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def by_quadrature(model: VAE, x: Tensor, points: int = 121) -> Tensor:
    """ln p(x) as a sum over a grid of z."""
    line = torch.linspace(-5, 5, points)
    z = torch.cartesian_prod(line, line)
    log_share = fastelbo.gaussian_log_prob(z, 0.0, 0.0) + 2 * (line[1] - line[0]).log()
    mean, parts = model.decoder(z), []
    for part in x.split(500):
        log_p = fastelbo.gaussian_log_prob(part[:, None], mean, model.x_logvar, event_ndim=1)
        parts.append((log_p + log_share).logsumexp(1))
    return torch.cat(parts)


def by_importance(model: VAE, x: Tensor, draws: int = 500) -> tuple[Tensor, Tensor]:
    """ln p(x) from draws of q, and the bound, of each point."""
    mean, logvar = model.encoder(x).chunk(2, dim=1)
    z = fastelbo.gaussian_rsample(mean, logvar, num_samples=draws)
    log_p_x = fastelbo.gaussian_log_prob(x, model.decoder(z), model.x_logvar, event_ndim=1)
    log_p_z, log_q = (fastelbo.gaussian_log_prob(z, *p, event_ndim=1) for p in ((0.0, 0.0), (mean, logvar)))
    log_weights = log_p_x + log_p_z - log_q
    return fastelbo.importance_weighted_log_likelihood(log_weights), log_weights.mean(0)


def save_picture(path: Path, z: Tensor, x: Tensor, drawn: Tensor, lines: Tensor, densities: list[Tensor]) -> None:
    """Draws of z coloured by angle, where they go, both densities, and draws of the VAE."""
    panels = Figure(figsize=(13, 3.4), layout="constrained").subplots(1, 4)
    angle = torch.atan2(z[:, 1], z[:, 0])
    for axes, points, title in ((panels[0], z, "z"), (panels[1], x, "z / 10 + z / |z|")):
        axes.scatter(*points.T, c=angle, s=3, cmap="hsv")
        axes.set(title=title, aspect="equal")
    for axes, density, title in zip(panels[2:], densities, ("density of the ring", "of the VAE"), strict=True):
        axes.contourf(lines, lines, density.view(len(lines), -1).T, levels=20)
        axes.set(title=title, aspect="equal")
    panels[3].plot(*drawn[:300].T, "w.", markersize=2)
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains, integrates, counts; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    z = torch.randn(DRAWS, 2, dtype=torch.float64)
    x = ring(z)
    radius = x.norm(dim=1)
    law = -torch.expm1(-50 * (radius.sort().values - 1).square())
    furthest = (law - torch.linspace(0, 1, DRAWS, dtype=torch.float64)).abs().max().item()
    volumes = torch.func.vmap(torch.func.jacrev(ring))(z[:500]).det().abs().log()
    off = (log_density(x[:500]) - fastelbo.gaussian_log_prob(z[:500], 0.0, 0.0) + volumes).abs().max().item()

    model = train(args.steps)
    lines = torch.linspace(-2.1, 2.1, 51)
    plane, cell = torch.cartesian_prod(lines, lines), (lines[1] - lines[0]).square()
    everywhere = by_quadrature(model, plane).exp()
    seen = x[:1000].float()
    exact, evidence, (weighted, bound) = log_density(seen), by_quadrature(model, seen), by_importance(model, seen)
    entropy = -log_density(x).mean()
    spread = 1 + 0.1 * math.sqrt(2 * math.pi) + 0.02  # the mean of the radius's square
    gaussian = (1 + math.log(math.pi * spread) - entropy).item()
    drawn = fastelbo.gaussian_rsample(model.decoder(torch.randn(1000, 2)), model.x_logvar)
    save_picture(args.output / "ring.png", z[:1500], x[:1500], drawn, lines, [log_density(plane).exp(), everywhere])
    print(f"The picture is {args.output / 'ring.png'}")
    return [
        ("mean radius; 1 + sqrt(pi / 2) / 10", radius.mean().item(), 1 + math.sqrt(math.pi / 2) / 10, 0.002),
        ("largest distance of the radii's shares from Rayleigh's law", furthest, 0, 0.014),  # one time in 1000
        ("largest distance of ln p(x) from ln p(z) less the change of volume", off, 0, 1e-9),
        ("the VAE's density, summed over the plane", (everywhere.sum() * cell).item(), 1, 1e-3),
        ("its ln p(x) by 500 draws of q; by a sum over z", weighted.mean().item(), evidence.mean().item(), 0.1),
        ("its bound; its ln p(x)", bound.mean().item(), evidence.mean().item(), "at most"),
        ("KL from the ring to the VAE; to the best Gaussian", (exact - evidence).mean().item(), gaussian, "at most"),
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
    add("--steps", type=int, default=4000, help="of the VAE (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/ring", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 <= args.seed < 2**63:
        parser.error("--steps must be 1 or more, --seed from 0 to 2**63 - 1")
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
