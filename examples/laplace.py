"""Laplace's approximation against exact integrals: its error falls as 1 / n, and what variational fits make better.

An integral over exp(-n L) is nearly that over a Gaussian at the least L, of the covariance L''^-1 / n. For
L = x - ln x it is Gamma(n + 1) / n^(n + 1), and the approximation is Stirling's. The second L is the mean loss of a
logistic regression that tells threes from eights by two principal components, with a prior: evidence and expectations
are sums over a grid. Its posterior is skewed, and the diagonal Gaussian of least KL(q || p) comes closer to it.

    python examples/laplace.py --output demo/course/laplace
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import fastelbo

SIZES = [10 * 2**k for k in range(7)]


def stirling(n: float) -> tuple[float, float]:
    """Relative error of the normaliser, and error of E[x] = 1 + 1 / n by the mode 1, for L = x - ln x."""
    exact = math.lgamma(n + 1) - (n + 1) * math.log(n)
    return math.expm1(-n + 0.5 * math.log(2 * math.pi / n) - exact), 1 / n


def threes_and_eights() -> Tensor:
    """Two principal components of threes and eights, of variance 1 and turned round for eights: [N, 2]."""
    digits = sklearn.datasets.load_digits()
    x, label = (
        torch.tensor(part[(digits.target == 3) | (digits.target == 8)]) for part in (digits.data, digits.target)
    )
    x = x.double() - x.double().mean(0)
    plane = x @ torch.linalg.svd(x, full_matrices=False)[2][:2].T
    return plane / plane.std(0) * torch.where(label == 8, 1.0, -1.0).double()[:, None]


def loss(w: Tensor, signed: Tensor) -> Tensor:
    """L of weights [..., 2]: mean loss of a logistic regression, and a prior's part."""
    return F.softplus(-w @ signed.T).mean(-1) + 0.05 * w.square().sum(-1)


def laplace(function, start: Tensor) -> tuple[Tensor, Tensor]:
    """Where a function of a vector is least, by Newton's steps, and its second derivatives there."""
    for _ in range(30):
        slope, curvature = torch.func.grad(function)(start), torch.func.hessian(function)(start)
        start = start - torch.linalg.solve(curvature, slope)
    return start, torch.func.hessian(function)(start)


def integrate(signed: Tensor, n: int, mode: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of weights, ln of each cell's share of exp(-n L), and ln of the whole integral."""
    line = torch.linspace(-12, 12, 61, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(n * curvature))  # so that a cell is a share of a deviation
    grid = mode + torch.cartesian_prod(line, line) @ factor.T
    log_cell = 2 * (line[1] - line[0]).log() + factor.logdet()
    log_p = torch.cat([-n * loss(part, signed) for part in grid.split(2000)])
    return grid, log_p.log_softmax(0), log_p.logsumexp(0) + log_cell


def bound(signed: Tensor, n: int, mean: Tensor, logvar: Tensor) -> Tensor:
    """A diagonal Gaussian's bound on ln of the integral, its expectation a sum over nodes that move with it."""
    line = torch.linspace(-6, 6, 19, dtype=torch.float64)
    noise = torch.cartesian_prod(line, line)
    w = fastelbo.gaussian_rsample(mean, logvar, num_samples=len(noise), noise=noise)
    weights = (-noise.square().sum(1) / 2).softmax(0)
    return -n * weights @ loss(w, signed) + logvar.sum() / 2 + 1 + math.log(2 * math.pi)


def fit(signed: Tensor, n: int, start: Tensor, steps: int) -> Tensor:
    """Mean and log-variance, [2, 2], of the diagonal Gaussian of least KL(q || p)."""
    q = torch.stack((start, torch.full_like(start, -math.log(n)))).requires_grad_()
    optimizer = torch.optim.LBFGS([q], 1, steps, None, 1e-9, 0, line_search_fn="strong_wolfe")

    def negative_bound() -> Tensor:
        optimizer.zero_grad()
        (value := -bound(signed, n, *q)).backward()
        return value

    optimizer.step(negative_bound)
    return q.detach()


def slope(errors: list[float]) -> float:
    """Of a line through the logarithms of errors and sizes."""
    x, y = torch.tensor(SIZES).log(), torch.tensor(errors).abs().log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def save_picture(path: Path, errors: dict[str, list[float]], grid: Tensor, log_p: Tensor, fits: dict) -> None:
    """Errors against n, and the smallest n's posterior with its approximations at one and two deviations."""
    left, right = Figure(figsize=(12, 4.5), layout="constrained").subplots(1, 2)
    for name, error in errors.items():
        left.loglog(SIZES, [abs(value) for value in error], "o-", label=name)
    left.set(title="Errors of Laplace's approximation", xlabel="n", ylabel="error")
    circle = torch.stack([f(torch.linspace(0, 2 * math.pi, 100).double()) for f in (torch.cos, torch.sin)])
    right.contourf(*grid.T.reshape(2, 61, 61), log_p.exp().view(61, 61), levels=12, cmap="Greys")
    for colour, (name, (mean, factor)) in enumerate(fits.items()):
        for deviations, label in ((1, name), (2, None)):
            right.plot(*(mean[:, None] + deviations * factor @ circle), color=f"C{colour}", label=label)
    right.set(title=f"Posterior of the weights at n = {SIZES[0]}", xlim=(-1, 4.5), ylim=(-3, 2))
    left.legend(), right.legend()
    left.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Approximates and integrates; returns the claims."""
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    signed, few = threes_and_eights(), SIZES[0]
    mode, curvature = laplace(lambda w: loss(w, signed), torch.zeros(2, dtype=torch.float64))
    errors = {"normaliser of the regression": [], "mean of its first weight": []}
    for n in tqdm(SIZES, disable=None):
        grid, log_p, whole = integrate(signed, n, mode, curvature)
        by_laplace = -n * loss(mode, signed) + math.log(2 * math.pi / n) - curvature.logdet() / 2
        errors["normaliser of the regression"].append(torch.expm1(by_laplace - whole).item())
        errors["mean of its first weight"].append((mode - log_p.exp() @ grid)[0].item())
    errors["Gamma function"], errors["mean of its density"] = zip(*map(stirling, SIZES), strict=True)
    grid, log_p, whole = integrate(signed, few, mode, curvature)
    narrow, (mean, logvar) = -torch.log(few * curvature.diagonal()), fit(signed, few, mode, args.steps)
    slope_there = torch.func.grad(bound, (2, 3))(signed, few, mean, logvar)
    log_q = fastelbo.gaussian_log_prob(grid, mean, logvar)
    cell = whole - torch.logsumexp(-few * loss(grid, signed), 0)  # ln of a cell's area
    kl = ((log_q + cell).exp() * (log_q + cell - log_p)).sum()
    fits = {"Laplace": (mode, torch.linalg.cholesky(torch.linalg.inv(few * curvature)))}
    fits["diagonal of Laplace's precision"] = mode, narrow.div(2).exp().diag()
    fits["diagonal, least KL(q || p)"] = mean, logvar.div(2).exp().diag()
    save_picture(args.output / "laplace.png", errors, grid, log_p, fits)
    print(f"The picture is {args.output / 'laplace.png'}")
    best, theirs = bound(signed, few, mean, logvar).item(), bound(signed, few, mode, narrow).item()
    return [
        *((f"slope of the error: {name}", slope(error), -1, 0.05) for name, error in errors.items()),
        ("Stirling's first error term at n = 640, times n; 1 / 12", -SIZES[-1] * stirling(SIZES[-1])[0], 1 / 12, 1e-4),
        ("gap of the diagonal q at n = 10; its KL on the grid", (whole - best).item(), kl.item(), 1e-6),
        ("steepest slope of its bound", max(part.abs().max().item() for part in slope_there), 0, 1e-3),
        ("its bound; that of the diagonal of Laplace's", best, theirs, "at least"),
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
    add("--steps", type=int, default=50, help="of the variational fit (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/laplace", help="for the picture (default: %(default)s)")
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
