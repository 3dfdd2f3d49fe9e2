"""Fits a diagonal Gaussian q to a density p in the plane, by either KL divergence, beside the Laplace approximation.

The targets are a correlated Gaussian and a mixture of two Gaussians. There are two divergences to minimise::

    KL(q || p) = E_q[ln q(z) - ln p(z)]        z = mean + std * noise, drawn by fastelbo.gaussian_rsample
    KL(p || q) = E_p[-ln q(x)] - H(p)          x drawn from p; -ln q by fastelbo.gaussian_nll

KL(q || p) asks for p's log-density only, up to a constant, and punishes q where p has no mass: it seeks a mode, and is
too narrow. Its best q for a Gaussian p has the diagonal of p's precision matrix as its precisions. KL(p || q) asks for
samples of p, and punishes q where it lacks p's mass: it covers all modes. Its best q has the means and variances of p,
whatever p is. The Laplace approximation knows one point: the mode, and the curvature of ln p there, whose inverse is
the covariance.

In the gradient of KL(q || p), ln q is evaluated at parameters that are held: what is left out has expectation 0, and
noise that does not vanish as q comes to fit p ("sticking the landing").

The table compares each fit with the exact optimum: in closed form, or for KL(q || p) from the mixture by descent on the
divergence integrated over a grid. All divergences that it shows are such integrals, in double precision; training never
sees them.

    python examples/variational_fit.py --output demo/variational_fit

Sources: Bishop 2006, "Pattern Recognition and Machine Learning", sections 4.4 and 10.1.2; Kingma and Welling 2013,
"Auto-Encoding Variational Bayes"; Roeder et al. 2017, "Sticking the Landing".
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal
from tqdm import tqdm

import common
import fastelbo

LEARNING_RATE = 0.05
GRID_POINTS = 321


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser(
        "Fit a diagonal Gaussian to a correlated and to a two-mode target by KL(q||p) and by KL(p||q), beside the "
        "Laplace approximation and the exact optima.",
        output="demo/variational_fit",
    )
    parser.add_argument("--steps", type=int, default=1000, help=f"of each fit {common.DEFAULT}")
    parser.add_argument("--samples", type=int, default=64, help=f"draws in each step {common.DEFAULT}")
    return parser.parse_args(argv)


def targets(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Distribution]:
    """The densities to fit, by name."""

    def gaussian(mean: list, covariance: list) -> MultivariateNormal:
        return MultivariateNormal(*(torch.tensor(v, device=device, dtype=dtype) for v in (mean, covariance)))

    modes = gaussian([[-2.0, -0.5], [2.0, 0.5]], [[[0.6, 0.3], [0.3, 0.6]], [[0.5, -0.2], [-0.2, 0.9]]])
    weights = Categorical(torch.tensor([0.35, 0.65], device=device, dtype=dtype))
    return {
        "correlated Gaussian": gaussian([0.5, -0.5], [[1.0, 1.08], [1.08, 1.44]]),  # a correlation of 0.9
        "two modes": MixtureSameFamily(weights, modes),
    }


STARTS = {
    "correlated Gaussian": {"": (-2.0, 2.0)},
    "two modes": {"from the left": (-3.0, 1.0), "from the right": (3.0, -1.0)},
}


def reverse_kl(p: Distribution, mean: Tensor, logvar: Tensor, samples: int, backend: str | None) -> Tensor:
    """KL(q || p), estimated from reparameterised draws of q."""
    z = fastelbo.gaussian_rsample(mean, logvar, num_samples=samples, backend=backend)
    log_q = fastelbo.gaussian_log_prob(z, mean.detach(), logvar.detach(), event_ndim=1, backend=backend)
    return (log_q - p.log_prob(z)).mean()


def forward_kl(p: Distribution, mean: Tensor, logvar: Tensor, samples: int, backend: str | None) -> Tensor:
    """KL(p || q) plus the entropy of p, which q cannot change, estimated from draws of p."""
    return fastelbo.gaussian_nll(p.sample((samples,)), mean, logvar, event_ndim=1, backend=backend).mean()


def fit(
    objective: Callable[..., Tensor],
    p: Distribution,
    start: tuple[float, float],
    args: argparse.Namespace,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[MultivariateNormal, list[float]]:
    """Minimises one of the two objectives; returns q, and the loss of each step."""
    mean = torch.tensor(start, device=p.mean.device, requires_grad=True)
    logvar = torch.zeros_like(mean, requires_grad=True)
    optimizer = torch.optim.Adam([mean, logvar], LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)  # to 0, and the noise of q with it
    losses = []
    for _ in range(args.steps):
        loss = objective(p, mean, logvar, args.samples, args.backend)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.detach())
        on_step()
    return diagonal(mean.detach(), logvar.detach().exp()), torch.stack(losses).tolist()


def diagonal(mean: Tensor, variance: Tensor) -> MultivariateNormal:
    """In double precision, on the CPU: what all comparisons are made of."""
    return MultivariateNormal(mean.double().cpu(), variance.double().cpu().diag())


def minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a smooth function is least, in the valley of the start."""
    x = start.double().requires_grad_()
    options = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([x], max_iter=200, **options)

    def value() -> Tensor:
        optimizer.zero_grad()
        y = function(x)
        y.backward()
        return y

    optimizer.step(value)
    return x.detach()


def laplace(p: Distribution, start: tuple[float, float]) -> MultivariateNormal:
    """The Gaussian that has a mode's position and curvature."""

    def energy(z: Tensor) -> Tensor:
        return -p.log_prob(z)

    mode = minimum(energy, torch.tensor(start))
    return MultivariateNormal(mode, precision_matrix=torch.autograd.functional.hessian(energy, mode))


class Grid:
    """Integrals over the plane, as sums over points that reach ten standard deviations from p's mean."""

    def __init__(self, p: Distribution) -> None:
        reach = 10 * p.variance.sqrt()
        lines = torch.linspace(-1, 1, GRID_POINTS, dtype=torch.float64)
        self.points = p.mean + reach * torch.cartesian_prod(lines, lines)
        self.cell = (reach * (lines[1] - lines[0])).prod()
        self.p = p
        self.log_p = p.log_prob(self.points)

    def kl(self, log_a: Tensor, log_b: Tensor) -> Tensor:
        """KL(a || b) of two log-densities at the points."""
        return (log_a.exp() * (log_a - log_b)).sum() * self.cell

    def reverse_kl(self, q: Distribution) -> Tensor:
        """KL(q || p)."""
        return self.kl(q.log_prob(self.points), self.log_p)

    def forward_kl(self, q: Distribution) -> Tensor:
        """KL(p || q)."""
        return self.kl(self.log_p, q.log_prob(self.points))


def best_by_reverse_kl(grid: Grid, start: MultivariateNormal) -> MultivariateNormal:
    """The diagonal Gaussian of least KL(q || p): in closed form, or by descent on the integral."""
    if isinstance(grid.p, MultivariateNormal):
        return diagonal(grid.p.mean, 1 / grid.p.precision_matrix.diagonal())

    def q(mean_and_logvar: Tensor) -> MultivariateNormal:
        mean, logvar = mean_and_logvar
        return MultivariateNormal(mean, logvar.exp().diag())

    mean_and_logvar = torch.stack((start.mean, start.variance.log()))
    return q(minimum(lambda x: grid.reverse_kl(q(x)), mean_and_logvar))


def best_by_forward_kl(grid: Grid) -> MultivariateNormal:
    """The diagonal Gaussian of least KL(p || q): that of p's moments."""
    return diagonal(grid.p.mean, grid.p.variance)


@dataclass
class Fit:
    """One approximation of a target, and the exact optimum that it should have found, if it is a search."""

    target: str
    method: str
    start: str
    q: MultivariateNormal
    exact: MultivariateNormal | None = None


def fit_all(args: argparse.Namespace, device: torch.device) -> list[Fit]:
    """Every approximation of every target."""
    torch.manual_seed(args.seed)
    exact_targets = targets(torch.device("cpu"), torch.float64)
    fits = []
    number = sum(len(starts) + 1 for starts in STARTS.values())
    with tqdm(total=number * args.steps, unit="step", desc="fitting", disable=None) as bar:
        for target, p in targets(device).items():
            grid = Grid(exact_targets[target])
            for name, start in STARTS[target].items():
                q, _ = fit(reverse_kl, p, start, args, bar.update)
                fits.append(Fit(target, "KL(q||p)", name, q, best_by_reverse_kl(grid, q)))
            q, _ = fit(forward_kl, p, (0.0, 0.0), args, bar.update)
            fits.append(Fit(target, "KL(p||q)", "", q, best_by_forward_kl(grid)))
            fits += [Fit(target, "Laplace", name, laplace(grid.p, start)) for name, start in STARTS[target].items()]
    return fits


def report(fits: list[Fit], args: argparse.Namespace) -> None:
    """Prints each approximation with its exact optimum and both of its divergences."""
    print(f"\nDiagonal Gaussians after {args.steps} steps of {args.samples} draws; divergences in nats, integrated")
    for target, p in targets(torch.device("cpu"), torch.float64).items():
        grid = Grid(p)
        print(f"\n  {target:<26}{'mean':>15}{'std':>15}{'correlation':>13}{'KL(q||p)':>10}{'KL(p||q)':>10}")
        for approximation in fits:
            if approximation.target == target:
                print_row(f"{approximation.method} {approximation.start}", approximation.q, grid)
                if approximation.exact is not None:
                    print_row("  its exact optimum", approximation.exact, grid)
    left, right = -p.mixture_distribution.probs.log()
    print(f"\n  KL(q||p) of a mode alone, were it far from the other: {left:.4f} left, {right:.4f} right (-ln weight)")


def print_row(label: str, q: MultivariateNormal, grid: Grid) -> None:
    """A line of the table."""
    std = q.variance.sqrt()
    pairs = "".join(f"{a:>8.3f}{b:>7.3f}" for a, b in (q.mean.tolist(), std.tolist()))
    correlation = q.covariance_matrix[0, 1] / std.prod()
    divergences = (round(kl.item(), 4) + 0.0 for kl in (grid.reverse_kl(q), grid.forward_kl(q)))  # no -0.0000
    print(f"  {label:<26}{pairs}{correlation:>13.3f}" + "".join(f"{kl:>10.4f}" for kl in divergences))


def ellipse(q: MultivariateNormal, deviations: float) -> tuple[Tensor, Tensor]:
    """Points at that many standard deviations from the mean."""
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    circle = torch.stack((angle.cos(), angle.sin()), dim=1)
    return (q.mean + deviations * circle @ q.scale_tril.T).unbind(1)


def save_picture(path: Path, fits: list[Fit]) -> None:
    """Draws each target, and over it the ellipses of its approximations at one and two standard deviations."""
    from matplotlib.figure import Figure

    columns = {
        "KL(q||p)": "least KL(q||p): seeks a mode",
        "KL(p||q)": "least KL(p||q): covers the mass",
        "Laplace": "Laplace: curvature at a mode",
    }
    rows = Figure(figsize=(13, 8), layout="constrained").subplots(2, 3, sharex=True, sharey=True)
    lines = [torch.linspace(low, high, 200, dtype=torch.float64) for low, high in ((-5, 5), (-4, 4))]
    for row, (target, p) in zip(rows, targets(torch.device("cpu"), torch.float64).items(), strict=True):
        density = p.log_prob(torch.cartesian_prod(*lines)).exp().view(200, 200).T
        row[0].set_ylabel(target, fontsize="large")
        for axes, (method, title) in zip(row, columns.items(), strict=True):
            axes.contourf(*lines, density, levels=12, cmap="Greys")
            shown = [fit for fit in fits if (fit.target, fit.method) == (target, method)]
            for color, approximation in zip(("C0", "C1"), shown, strict=False):
                for deviations in (1, 2):
                    label = approximation.start if deviations == 1 else None
                    axes.plot(*ellipse(approximation.q, deviations), color=color, label=label)
            axes.set_aspect("equal")
            if target == fits[0].target:
                axes.set_title(title)
            if len(shown) > 1:
                axes.legend(loc="upper left")
    rows[0, 0].figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then fits and reports."""
    common.check_whole_numbers(args, seed=0, steps=1, samples=1)
    device, args.backend = common.choose_device_and_backend(args)
    common.make_output(args.output)
    with common.one_thread(True):
        fits = fit_all(args, device)
        report(fits, args)
        save_picture(args.output / "fits.png", fits)
    print(f"\nThe picture is {args.output / 'fits.png'}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
