"""What a more flexible q buys: masked layers, mixtures and stacks of layers, each beside the exact evidence.

A layer of an inverse autoregressive flow (Kingma et al. 2016), z_i = m_i(e_<i) + s_i(e_<i) e_i, is of masked linear
layers: MaskedConv2d on images of one pixel, whose colours are the latents. On a grid every bound and KL is a sum.

    python examples/flexible_posterior.py --output demo/course/flexible_posterior
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from fastelbo.nn import MaskedConv2d

LINE, SEEN = torch.linspace(-7, 7, 201, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.5, -1.0]).double()
PLANE, CELL, NOISE, HIDDEN = torch.cartesian_prod(LINE, LINE), (LINE[1] - LINE[0]).item(), 0.4, 2
SLOPES = torch.tensor([[1.0], [0.75]]).double()
DECODERS = lambda z: z @ SLOPES, lambda z: z[:, 1:] - z[:, :1] ** 2, torch.square, lambda z: z[:, :1] - z[:, 1:] ** 2


def log_joint(z: Tensor, kind: int) -> Tensor:
    """ln p(x, z) of the x that is seen and z [N, 2]."""
    mean = DECODERS[kind](z)
    log_p = fastelbo.gaussian_log_prob(SEEN[kind].expand_as(mean), mean, NOISE, scale="std", event_ndim=1)
    return log_p + fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1)


def masked(inputs: int, outputs: int, mask_type: str) -> MaskedConv2d:
    """A masked linear layer."""
    return MaskedConv2d(inputs, outputs, 1, mask_type=mask_type, channel_groups=2, dtype=torch.float64)


def curved() -> nn.Module:
    """Two around hidden units: means and log-scales of two latents."""
    return nn.Sequential(masked(2, 2 * HIDDEN, "B"), nn.Tanh(), masked(2 * HIDDEN, 4, "A"))


class Layers(nn.ModuleList):
    """One after the other, the latents in reverse order from one to the next."""

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z of noise [N, 2], ln q(z), and how much each counts."""
        log_q = fastelbo.gaussian_log_prob(e, 0.0, 0.0, event_ndim=1)
        for layer in self:
            mean, log_scale = layer((e := e.flip(1))[..., None, None])[..., 0, 0].chunk(2, dim=1)
            e, log_q = mean + log_scale.exp() * e, log_q - log_scale.sum(1)
        return e, log_q, torch.ones_like(log_q)


class Mixture(nn.Module):
    """Diagonal Gaussians: means, log-deviations, and log-weights before they are normalised."""

    def __init__(self, components: int) -> None:
        super().__init__()
        angle = torch.arange(components).double() * (2 * math.pi / components) + math.pi / 4
        self.numbers = nn.Parameter(nn.functional.pad(torch.stack((angle.cos(), angle.sin()), dim=1), (0, 3)))

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z of noise [N, 2] for each component, ln q(z), and how much each counts."""
        mean, log_scale, weight = self.numbers[:, None].split([2, 2, 1], dim=2)
        z = (mean + log_scale.exp() * e).flatten(0, 1)
        return z, self.log_prob(z), weight.softmax(0).expand(-1, len(e), 1).flatten()

    def log_prob(self, z: Tensor) -> Tensor:
        """ln q(z)."""
        mean, log_scale, weight = self.numbers.split([2, 2, 1], dim=1)
        log_each = fastelbo.gaussian_log_prob(z[:, None], mean, log_scale, scale="log_std", event_ndim=1)
        return (log_each + weight[:, 0].log_softmax(0)).logsumexp(1)


EVIDENCE = [log_joint(PLANE, kind).logsumexp(0) + 2 * math.log(CELL) for kind in range(4)]
STARTS = {f"{count} G": lambda count=count: Mixture(count) for count in (1, 4, 7)}
STARTS |= {f"{n} layer{'s' * (n > 1)}": lambda n=n: Layers(curved() for _ in range(n)) for n in (1, 2)}


def bound(q: nn.Module, kind: int, points: int) -> Tensor:
    """By noise on a grid, with a normal's weights."""
    e = torch.cartesian_prod(*[torch.linspace(-6, 6, points, dtype=torch.float64)] * 2)
    share = (-e.square().sum(1) / 2).softmax(0)
    z, log_q, weight = q(e)
    return (share * (weight * (log_joint(z, kind) - log_q)).view(-1, len(e))).sum()


def climb(q: nn.Module, kind: int, steps: int) -> tuple[float, nn.Module]:
    """Climbs the bound without noise; returns the nats that it loses, on a finer grid, and q."""
    optimizer = torch.optim.LBFGS(q.parameters(), 1, steps, None, 1e-10, 0, 20, "strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (loss := -bound(q, kind, 25)).backward()
        return loss

    optimizer.step(loss)
    return (EVIDENCE[kind] - bound(q.requires_grad_(False), kind, 121)).item(), q


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Climbs, adds up, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    panels = (figure := Figure(figsize=(13, 5.6), layout="constrained")).subplots(2, 5).flat
    lost, found = {}, {}
    for axes, (kind, name) in tqdm(list(zip(panels, itertools.product((1, 2), STARTS), strict=True)), disable=None):
        ends = [climb(STARTS[name](), kind, args.steps) for _ in range(3 if name == "2 layers" else 1)]
        lost[kind, name], found[kind, name] = min(ends, key=lambda end: end[0])
        z, _, weight = found[kind, name](torch.randn(500, 2).double())
        axes.imshow(log_joint(PLANE, kind).exp().view(201, -1).T.numpy(), "Greys", origin="lower", extent=(-7, 7) * 2)
        axes.plot(*z[weight.multinomial(300)].T, ".", markersize=2)
        axes.set(title=f"{name}: {lost[kind, name]:.3f} nats lost", xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
    figure.savefig(args.output / "flexible_posterior.png", dpi=70)
    print(f"The picture is {args.output / 'flexible_posterior.png'}")
    more = (Mixture(1), 0), (Mixture(4), 0), (Layers([masked(2, 4, "A")]), 0), (Layers([curved()]), 3)
    *linear, turned = (climb(q, kind, args.steps)[0] for q, kind in more)
    layers, e, of_z = found[1, "2 layers"], torch.randn(100, 2).double(), found[1, "7 G"].log_prob(PLANE)
    kl = (of_z.exp() * (of_z - log_joint(PLANE, 1) + EVIDENCE[1])).sum() * CELL**2
    volumes = torch.autograd.functional.jacobian(lambda e: layers(e)[0].sum(0), e).permute(1, 0, 2).det().abs().log()
    off = (layers(e)[1] - fastelbo.gaussian_log_prob(e, 0.0, 0.0, event_ndim=1) + volumes).abs().max()
    known = SLOPES.square() / NOISE**2  # the posterior's precision is I + w w' / NOISE^2
    apart = (known.log1p().sum() - known.sum().log1p()) / 2
    exact = fastelbo.gaussian_log_prob(SEEN[0], 0.0, NOISE**2 * (1 + known.sum()), scale="var")
    one = fastelbo.gaussian_log_prob(SEEN[1], -(LINE**2), 1 + NOISE**2, scale="var") - LINE**2 / 2
    one = one.logsumexp(0) + math.log(CELL / math.sqrt(2 * math.pi))
    return [
        ("linear: ln p(x) over the plane; the formula", EVIDENCE[0].item(), exact.item(), 1e-9),
        ("linear: nats lost by independent latents; the formula", linear[0], apart.item(), 1e-6),
        ("linear: nats lost by four Gaussians; by one", linear[1], linear[0], "at most"),
        ("linear: nats lost by a masked linear layer", linear[2], 0, 1e-6),
        ("banana: ln p(x) over the plane; over one latent", EVIDENCE[1].item(), one.item(), 1e-9),
        ("banana: nats lost by a layer; in the other order", lost[1, "1 layer"], turned, "at most"),
        ("banana: nats lost by seven Gaussians; KL over the plane", lost[1, "7 G"], kl.item(), 1e-4),
        ("banana: nats lost by two layers; by seven Gaussians", lost[1, "2 layers"], lost[1, "7 G"], "at most"),
        ("two layers' ln q, furthest from noise less change of volume", off.item(), 0, 1e-9),
        ("four modes: nats lost by one Gaussian less four; ln 4", lost[2, "1 G"] - lost[2, "4 G"], math.log(4), 1e-3),
        ("four modes: nats lost by seven Gaussians; by two layers", lost[2, "7 G"], lost[2, "2 layers"], "at most"),
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
    add("--steps", type=int, default=200, help="of each climb (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/flexible_posterior", help="for the picture (default: %(default)s)")
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
