"""Three posteriors of the same weights, exact, by Laplace and by backprop: of a line, and of a network of two weights.

Laplace's approximation has the mode's place and curvature, the Hessian of -ln p(y, w). Bayes by backprop is the
diagonal Gaussian of the greatest evidence lower bound. A line's posterior is Gaussian, of precision A = F'F / noise^2 +
1 / prior^2: Laplace finds it; backprop has its mean, and variances 1 / diag A, which lacks half of ln (prod A_ii / |A|)
nats. The network v tanh(w x) is a line in v: its evidence is one integral over w.

    python examples/posterior_of_weights.py --output demo/course/posterior_of_weights
"""

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal
from tqdm import tqdm

import fastelbo

NOISE, PRIOR = 0.2, 2.0
W, V = (torch.linspace(-16, 16, count, dtype=torch.float64) for count in (1601, 801))  # a grid of both weights
X = torch.linspace(0, 4, 81, dtype=torch.float64)  # where the function is predicted; up to 1 it is observed
NODES = torch.cartesian_prod(*[torch.linspace(-7, 7, 41, dtype=torch.float64)] * 2)  # for expectations under Gaussians
SHARES = (-NODES.square().sum(1) / 2).softmax(0)


def line(x: Tensor, w: Tensor) -> Tensor:
    """Values [..., N] at x [N] for weights [..., 2]."""
    return w[..., :1] + w[..., 1:] * x


def network(x: Tensor, w: Tensor) -> Tensor:
    """The same of one hidden unit; (w, v) and (-w, -v) make one function."""
    return w[..., 1:] * torch.tanh(w[..., :1] * x)


def log_joint(model, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """ln p(y, w) for weights [..., 2]."""
    log_prior = fastelbo.gaussian_log_prob(w, 0.0, PRIOR, scale="std", event_ndim=1)
    return log_prior - fastelbo.gaussian_nll(y, model(x, w), NOISE, scale="std", event_ndim=1)


def laplace(model, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mode next to w by Newton's steps, the precision there, and ln p(y) if all mass is at that mode."""
    density = partial(log_joint, model, x=x, y=y)
    for _ in range(10):
        w = w - torch.linalg.solve(torch.func.hessian(density)(w), torch.func.grad(density)(w))
    precision = -torch.func.hessian(density)(w)
    return w, precision, density(w) + math.log(2 * math.pi) - precision.logdet() / 2


def backprop(model, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each weight, by the bound's gradient from 16 draws a step."""
    q = torch.tensor([[1.0, 1.0], [-4.0, -4.0]], dtype=y.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([q], 0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # to 0, and the noise of q with it
    for _ in tqdm(range(steps), model.__name__, unit="step", disable=None):
        w, kl = fastelbo.gaussian_rsample_kl(*q, 0.0, PRIOR, scale_p="std", num_samples=16, event_ndim=1)
        optimizer.zero_grad()
        (fastelbo.gaussian_nll(y, model(x, w), NOISE, scale="std", event_ndim=1).mean() + kl).backward()
        optimizer.step()
        decay.step()
    return q[0].detach(), q[1].detach().div(2).exp()


def bound(model, mean: Tensor, std: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A diagonal Gaussian's bound on ln p(y), its expectation a sum over nodes."""
    return SHARES @ log_joint(model, mean + std * NODES, x, y) + std.log().sum() + 1 + math.log(2 * math.pi)


def save_picture(path: Path, share: Tensor, fits: dict, functions: dict, seen: tuple[Tensor, Tensor]) -> None:
    """The network's weights at one and two deviations, and 95 % bands of its function."""
    left, right = Figure(figsize=(12, 4.5), layout="constrained").subplots(1, 2)
    circle = torch.stack([f(torch.linspace(0, 2 * math.pi, 100, dtype=X.dtype)) for f in (torch.cos, torch.sin)])
    left.contourf(W, V, share.view(len(W), -1).T, levels=12, cmap="Greys")
    for colour, (mean, factor) in fits.items():
        left.plot(*(mean[:, None, None] + (factor @ circle)[..., None] * torch.tensor([1, 2])), colour)
    for colour, (name, (mean, std)) in zip(("k", "C0", "C1", "C2"), functions.items(), strict=True):
        right.plot(X, torch.stack((mean - 1.96 * std, mean + 1.96 * std), 1), colour, label=(name, None))
    right.plot(*seen, "k.")
    left.set(title="Weights of a network, one and two deviations", xlabel="w", ylabel="v", xlim=(0, 4), ylim=(0, 4))
    right.set(title="Its function, bands of 95 %", xlabel="x", ylim=(-0.5, 4))
    right.legend(loc="upper left")
    left.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Observes, approximates, integrates; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    seen = x, y = x, 1.5 * torch.tanh(x) + NOISE * torch.randn_like(x)
    linear = partial(LowRankMultivariateNormal, torch.zeros_like(y), cov_diag=torch.full_like(y, NOISE**2))  # p(y)
    features = torch.stack((torch.ones_like(x), x), dim=1)
    a = features.T @ features / NOISE**2 + torch.eye(2, dtype=x.dtype) / PRIOR**2
    best, exact = torch.linalg.solve(a, features.T @ y / NOISE**2), linear(PRIOR * features).log_prob(y)
    mode, precision, of_line = laplace(line, torch.ones_like(best), *seen)
    far = max((mode - best).abs().max().item(), (torch.linalg.inv(precision) - torch.linalg.inv(a)).abs().max().item())
    mean, std = backprop(line, *seen, args.steps)
    gaps = [(exact - bound(line, *q, *seen)).item() for q in ((best, a.diagonal().rsqrt()), (mean, std))]
    off = (std.square() * a.diagonal() - 1).abs().max().item()
    grid, log_cell = torch.cartesian_prod(W, V), ((W[1] - W[0]) * (V[1] - V[0])).log()
    log_p = torch.cat([log_joint(network, part, *seen) for part in grid.split(20000)])
    evidence, share, kept = log_p.logsumexp(0) + log_cell, log_p.softmax(0), log_p > log_p.max() - 40
    fine = torch.linspace(-16, 16, 5001, dtype=x.dtype)  # for the integral over w
    lines = linear(PRIOR * torch.tanh(fine[:, None] * x)[..., None]).log_prob(y) + (fine[1] - fine[0]).log()
    by_lines = (lines + fastelbo.gaussian_log_prob(fine, 0.0, PRIOR, scale="std", event_ndim=0)).logsumexp(0).item()
    mode, precision, of_network = laplace(network, grid[log_p.argmax()].abs(), *seen)
    (mean, std), covariance = backprop(network, *seen, args.steps), torch.linalg.inv(precision)
    log_q, gap = fastelbo.gaussian_log_prob(grid, mean, std, scale="std"), evidence - bound(network, mean, std, *seen)
    kl = ((log_q + log_cell).exp() * (log_q - log_p + evidence)).sum().item()
    factor, slopes = torch.linalg.cholesky(covariance), torch.func.jacrev(partial(network, X))(mode)
    draws = {"exact": (grid[kept], share[kept]), "backprop": (mean + std * NODES, SHARES)}
    draws["Laplace, drawn"] = mode + NODES @ factor.T, SHARES
    values = {name: (network(X, w), p) for name, (w, p) in draws.items()}
    functions = {name: (p @ f, (p @ (f - p @ f).square()).sqrt()) for name, (f, p) in values.items()}
    functions["Laplace, linearised"] = network(X, mode), (slopes @ covariance * slopes).sum(1).sqrt()
    fits = {"C0": (mean, std.diag()), "C1": (mode, factor)}
    save_picture(args.output / "posterior_of_weights.png", share, fits, functions, seen)
    print(f"The picture is {args.output / 'posterior_of_weights.png'}")
    inside, outside = ([std[place].item() for _, std in functions.values()] for place in (10, 60))  # x = 0.5 and 3
    lacks, other = ((p.diagonal().log().sum() - p.logdet()).item() / 2 for p in (a, precision))
    return [
        ("line: Laplace's mean and covariance, furthest from the exact", far, 0, 1e-10),
        ("line: ln p(y) by Laplace; exact", of_line.item(), exact.item(), 1e-9),
        ("line: nats that the best independent weights lack; the formula", gaps[0], lacks, 1e-9),
        ("line: nats that backprop's weights lack; the same", gaps[1], lacks, 0.02),
        ("line: variances by backprop times diag A, furthest from 1", off, 0, 0.15),
        ("network: ln p(y) by a grid; by one integral of lines", evidence.item(), by_lines, 1e-9),
        ("network: ln p(y) by Laplace in both modes; exact", of_network.item() + math.log(2), evidence.item(), 0.2),
        ("network: nats that backprop's weights lack; their KL on the grid", gap.item(), kl, 1e-6),
        ("network: the same; ln 2 and the formula by Laplace's precision", gap.item(), math.log(2) + other, 0.2),
        ("network: deviation at 0.5 by Laplace, linearised; exact", inside[3], inside[0], 0.01),
        ("network: deviation at 0.5 by draws of Laplace; exact", inside[2], inside[0], "at least"),
        ("network: deviation at 3 by backprop; a third of the exact", outside[1], outside[0] / 3, "at most"),
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
    add("--steps", type=int, default=1000, help="of backprop for each model (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add(
        "--output", type=Path, default="demo/course/posterior_of_weights", help="for the picture (default: %(default)s)"
    )
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
