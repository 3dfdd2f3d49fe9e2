"""A GAN beside its theory: the best discriminator, the game's value, both generators' gradients, and a ring of modes.

Trained to tell p from q, D ends at p / (p + q), and its value V = E_p[ln D] + E_q[ln(1 - D)] at 2 JSD(p, q) - ln 4
(Goodfellow et al. 2014, "Generative adversarial nets"). On a line all of it is integrals. A generator of the loss
ln(1 - D) gets the gradient of 2 JSD, which vanishes where it is far away; of -ln D that of KL(q || p) - 2 JSD
(Arjovsky and Bottou 2017, "Towards principled methods for training GANs"). Then both networks play on a ring.

    python examples/gan.py --output demo/course/gan
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

MODES, WIDTH, DRAWS, SHIFTS = 8, 0.1, 4000, (0.5, 2.0, 4.0, 6.0)


def network(*sizes: int) -> nn.Sequential:
    """A multilayer perceptron."""
    layers = [part for n, m in itertools.pairwise(sizes) for part in (nn.Linear(n, m), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers[:-1])


def densities(shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A grid, the width of its cells, p, a mixture, and q, a normal moved by shift, both in double precision."""
    x = torch.linspace(-12, 12, 1601, dtype=torch.float64)
    normals = ((-1.5, 0.7), (1.0, 0.5), (shift, 1.2))
    left, right, q = (fastelbo.gaussian_log_prob(x, *n, scale="std", event_ndim=0).exp() for n in normals)
    return x, x[1] - x[0], (left + right) / 2, q


def value(logits: Tensor, p: Tensor, q: Tensor, cell: Tensor) -> Tensor:
    """V of a discriminator of those logits, integrated."""
    return (p * F.logsigmoid(logits) + q * F.logsigmoid(-logits)).sum() * cell


def train_discriminator(x: Tensor, p: Tensor, q: Tensor, cell: Tensor) -> tuple[Tensor, float]:
    """A network's D on the grid, and its V."""
    model = network(1, 32, 32, 1).double()
    optimizer = torch.optim.LBFGS(model.parameters(), 1, 150, None, 1e-9, 0, 50, "strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (negative := -value(model(x[:, None])[:, 0], p, q, cell)).backward()
        bar.update()
        return negative

    with tqdm(desc="discriminator", disable=None) as bar:
        optimizer.step(loss)
    logits = model(x[:, None])[:, 0].detach()
    return logits.sigmoid(), value(logits, p, q, cell).item()


def divergences(shift: float) -> tuple[float, float]:
    """2 JSD(p, q) and KL(q || p), integrated."""
    _, cell, p, q = densities(shift)
    middle = (p + q) / 2
    kl = [(a * (a / b).log()).sum() * cell for a, b in ((p, middle), (q, middle), (q, p))]
    return (kl[0] + kl[1]).item(), kl[2].item()


def generator_gradients(shift: float) -> tuple[float, float]:
    """Of ln(1 - D) and of -ln D, D the best there is and held, by the shift of q's draws."""
    x, cell, p, q = densities(shift)
    logits = (p / q).log()
    (slope,) = torch.gradient(logits, spacing=(x,), edge_order=2)
    return tuple((-q * part * slope).sum().item() * cell.item() for part in (logits.sigmoid(), (-logits).sigmoid()))


def play(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two networks on a ring of Gaussians; its centres, and draws of the data and of the generator."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = 2 * torch.stack((angles.cos(), angles.sin()), dim=1)
    generator, discriminator = network(8, 64, 64, 2), network(2, 64, 64, 1)
    players = [torch.optim.Adam(part.parameters(), 1e-3, (0.5, 0.9)) for part in (generator, discriminator)]

    def data(count: int) -> Tensor:
        return fastelbo.gaussian_rsample(centres[torch.randint(MODES, (count,))], WIDTH, scale="std")

    for _ in tqdm(range(steps), "ring", unit="step", disable=None):
        real, fake = data(256), generator(torch.randn(256, 8))
        players[1].zero_grad()
        (F.softplus(-discriminator(real)) + F.softplus(discriminator(fake.detach()))).mean().backward()
        players[1].step()
        players[0].zero_grad()
        F.softplus(-discriminator(generator(torch.randn(256, 8)))).mean().backward()
        players[0].step()
    with torch.no_grad():
        return centres, data(DRAWS), generator(torch.randn(DRAWS, 8))


def save_picture(path: Path, curves: dict[str, Tensor], x: Tensor, gradients: list, draws: tuple) -> None:
    """The discriminator beside the best, the generators' gradients, and the ring."""
    panels = Figure(figsize=(13, 4), layout="constrained").subplots(1, 3)
    for (name, curve), style in zip(curves.items(), ("C0", "C1", "k", "C3--"), strict=True):
        panels[0].plot(x, curve, style, label=name)
    panels[0].set(title="On a line", xlim=(-5, 5), xlabel="x")
    for column, name in enumerate(("ln(1 - D)", "-ln D")):
        panels[1].semilogy(SHIFTS, [abs(pair[column]) for pair in gradients], "o-", label=f"gradient of {name}")
    panels[1].set(title="What moves the generator", xlabel="its distance")
    for z, name in zip(draws, ("data", "generator"), strict=True):
        panels[2].plot(*z[:1000].T, ".", markersize=3, label=name)
    panels[2].set(title="On a ring", aspect="equal")
    for axes, place in zip(panels, ("upper right", "center left", "upper right"), strict=True):
        axes.legend(loc=place)
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains, integrates, counts; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x, cell, p, q = densities(0.5)
    d, v = train_discriminator(x, p, q, cell)
    _, even = train_discriminator(x, p, p, cell)
    gradients = [generator_gradients(shift) for shift in SHIFTS]
    after, before = divergences(SHIFTS[1] + 1e-4), divergences(SHIFTS[1] - 1e-4)
    jsd_slope, kl_slope = ((a - b) / 2e-4 for a, b in zip(after, before, strict=True))
    centres, data, drawn = play(args.steps)
    near_modes, near_drawn = ((torch.cdist(z, centres) < 3 * WIDTH).double().mean(0) for z in (data, drawn))
    curves = {"p": p, "q": q, "p / (p + q)": p / (p + q), "D": d}
    save_picture(args.output / "gan.png", curves, x, gradients, (data, drawn))
    print(f"The picture is {args.output / 'gan.png'}")
    return [
        ("largest distance of D from p / (p + q)", (d - p / (p + q))[p + q > 1e-3].abs().max().item(), 0, 0.02),
        ("value of the game; 2 JSD - ln 4", v, divergences(0.5)[0] - math.log(4), 1e-3),
        ("value where q is p; -ln 4", even, -math.log(4), 1e-4),
        ("gradient of ln(1 - D); of 2 JSD", gradients[1][0], jsd_slope, 1e-3),
        ("gradient of -ln D; of KL(q to p) - 2 JSD", gradients[1][1], kl_slope - jsd_slope, 1e-3),
        ("far away: gradient of -ln D over that of ln(1 - D)", gradients[-1][1] / gradients[-1][0], 100, "at least"),
        ("ring: share of the data within three deviations", near_modes.sum().item(), 1 - math.exp(-4.5), 0.01),
        ("ring: modes reached by the generator; all but one", (near_drawn > 0.005).sum().item(), MODES - 1, "at least"),
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
    add("--steps", type=int, default=3000, help="of both players on the ring (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/gan", help="for the picture (default: %(default)s)")
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
