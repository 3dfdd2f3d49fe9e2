"""Fits a diagonal Gaussian q to a density p in the plane, by either KL divergence, beside the Laplace approximation.

The targets are a correlated Gaussian and a mixture of two Gaussians. KL(q || p) asks for p's log-density, punishes q
where p has no mass, and so seeks a mode; its best q for a Gaussian p has the diagonal of p's precision matrix. In its
gradient ln q is evaluated at parameters that are held: what is left out has expectation 0, and noise that does not
vanish as q comes to fit p (Roeder et al. 2017, "Sticking the Landing"). KL(p || q) asks for samples of p, punishes q
where it lacks p's mass, and so covers all modes; its best q has p's means and variances. The Laplace approximation has
the curvature of ln p at a mode. Divergences in the table are integrated over a grid, which training never sees.

    python examples/variational_fit.py --output demo/variational_fit
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal
from tqdm import tqdm

import fastelbo

STARTS = {"correlated Gaussian": [(-2.0, 2.0)], "two modes": [(-3.0, 1.0), (3.0, -1.0)]}


def targets(device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, Distribution]:
    """The densities to fit, by name."""

    def gaussian(mean: list, covariance: list) -> MultivariateNormal:
        return MultivariateNormal(*(torch.tensor(v, device=device, dtype=dtype) for v in (mean, covariance)))

    modes = gaussian([[-2.0, -0.5], [2.0, 0.5]], [[[0.6, 0.3], [0.3, 0.6]], [[0.5, -0.2], [-0.2, 0.9]]])
    weights = Categorical(torch.tensor([0.35, 0.65], device=device, dtype=dtype))
    correlated = gaussian([0.5, -0.5], [[1.0, 1.08], [1.08, 1.44]])  # a correlation of 0.9
    return {"correlated Gaussian": correlated, "two modes": MixtureSameFamily(weights, modes)}


def reverse_kl(p: Distribution, mean: Tensor, logvar: Tensor, samples: int) -> Tensor:
    """KL(q || p), estimated from reparameterised draws of q."""
    z = fastelbo.gaussian_rsample(mean, logvar, num_samples=samples)
    log_q = fastelbo.gaussian_log_prob(z, mean.detach(), logvar.detach(), event_ndim=1)
    return (log_q - p.log_prob(z)).mean()


def forward_kl(p: Distribution, mean: Tensor, logvar: Tensor, samples: int) -> Tensor:
    """KL(p || q) plus the entropy of p, which q cannot change, estimated from draws of p."""
    return fastelbo.gaussian_nll(p.sample((samples,)), mean, logvar, event_ndim=1).mean()


def fit(objective: Callable, p: Distribution, start: tuple, steps: int, samples: int = 64) -> tuple[Distribution, list]:
    """Minimises one of the two objectives; returns q, and the loss of each step."""
    mean = torch.tensor(start, device=p.mean.device, requires_grad=True)
    logvar, losses = torch.zeros_like(mean, requires_grad=True), []
    optimizer = torch.optim.Adam([mean, logvar], 0.05, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # to 0, and the noise of q with it
    for _ in tqdm(range(steps), objective.__name__, unit="step", disable=None):
        loss = objective(p, mean, logvar, samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.detach())
    return diagonal(mean.detach(), logvar.detach().exp()), torch.stack(losses).tolist()


def diagonal(mean: Tensor, variance: Tensor) -> MultivariateNormal:
    """In double precision, on the CPU: what all comparisons are made of."""
    return MultivariateNormal(mean.double().cpu(), variance.double().cpu().diag())


def minimum(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a smooth function is least, in the valley of the start."""
    x = start.double().requires_grad_()
    optimizer = torch.optim.LBFGS([x], 1, 200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def value() -> Tensor:
        optimizer.zero_grad()
        y = function(x)
        y.backward()
        return y

    optimizer.step(value)
    return x.detach()


def laplace(p: Distribution, start: tuple[float, float]) -> MultivariateNormal:
    """The Gaussian that has a mode's position and curvature."""
    mode = minimum(lambda z: -p.log_prob(z), torch.tensor(start))
    return MultivariateNormal(mode, precision_matrix=torch.autograd.functional.hessian(lambda z: -p.log_prob(z), mode))


def integrated(p: Distribution, q: Distribution, points: int = 241) -> tuple[Tensor, Tensor]:
    """KL(q || p) and KL(p || q), summed over a grid that reaches ten standard deviations from p's mean."""
    reach, lines = 10 * p.variance.sqrt(), torch.linspace(-1, 1, points, dtype=torch.float64)
    grid, cell = p.mean + reach * torch.cartesian_prod(lines, lines), (reach * (lines[1] - lines[0])).prod()
    log_p, log_q = p.log_prob(grid), q.log_prob(grid)
    return (log_q.exp() * (log_q - log_p)).sum() * cell, (log_p.exp() * (log_p - log_q)).sum() * cell


def best_by_reverse_kl(p: Distribution, start: MultivariateNormal) -> MultivariateNormal:
    """The diagonal Gaussian of least KL(q || p): in closed form, or by descent on the integral."""
    if isinstance(p, MultivariateNormal):
        return diagonal(p.mean, 1 / p.precision_matrix.diagonal())
    begin = torch.stack((start.mean, start.variance.log()))
    mean, logvar = minimum(lambda x: integrated(p, diagonal(x[0], x[1].exp()))[0], begin)
    return diagonal(mean, logvar.exp())


def ellipse(q: MultivariateNormal, deviations: float) -> tuple[Tensor, Tensor]:
    """Points at that many standard deviations from the mean."""
    angle = torch.linspace(0, 2 * math.pi, 200, dtype=torch.float64)
    return (q.mean + deviations * torch.stack((angle.cos(), angle.sin()), dim=1) @ q.scale_tril.T).unbind(1)


def save_picture(path: Path, fits: dict[str, list[tuple[str, MultivariateNormal]]]) -> None:
    """Draws each target, and over it the ellipses of its approximations at one and two standard deviations."""
    rows = Figure(figsize=(13, 8), layout="constrained").subplots(2, 3, sharex=True, sharey=True)
    lines = [torch.linspace(-reach, reach, 200, dtype=torch.float64) for reach in (5, 4)]
    for row, (target, p) in zip(rows, targets().items(), strict=True):
        density = p.log_prob(torch.cartesian_prod(*lines)).exp().view(200, 200).T
        for axes, method in zip(row, ("KL(q||p)", "KL(p||q)", "Laplace"), strict=True):
            axes.contourf(*lines, density, levels=12, cmap="Greys")
            for color, q in zip(("C0", "C1"), (q for name, q in fits[target] if name == method), strict=False):
                for deviations in (1, 2):
                    axes.plot(*ellipse(q, deviations), color=color)
            axes.set(title=f"{target}: {method}", aspect="equal")
    rows[0, 0].figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> list[list[float]]:
    """Fits every target in every way, and reports; returns the losses of each fit."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    fits, history, exact = {}, [], targets()
    for target, p in targets(args.device, torch.float32).items():
        fits[target] = []
        for objective, start in [(reverse_kl, start) for start in STARTS[target]] + [(forward_kl, (0.0, 0.0))]:
            q, losses = fit(objective, p, start, args.steps)
            reverse = objective is reverse_kl
            best = best_by_reverse_kl(exact[target], q) if reverse else diagonal(p.mean, p.variance)
            fits[target] += [("KL(q||p)" if reverse else "KL(p||q)", q), ("  its exact optimum", best)]
            history.append(losses)
        fits[target] += [("Laplace", laplace(exact[target], start)) for start in STARTS[target]]
        print(f"\n{target:<22}{'mean':>16}{'std':>16}{'correlation':>13}{'KL(q||p)':>10}{'KL(p||q)':>10}")
        for name, q in fits[target]:
            correlation, divergences = q.covariance_matrix[0, 1] / q.stddev.prod(), integrated(exact[target], q)
            moments = "".join(f"{number:>8.3f}" for number in (*q.mean, *q.stddev))
            print(f"{name:<22}{moments}{correlation:>13.3f}" + "".join(f"{kl.relu():>10.4f}" for kl in divergences))
    save_picture(args.output / "fits.png", fits)
    print(f"\nThe picture is {args.output / 'fits.png'}")
    return history


def main(argv: list[str] | None = None) -> list[list[float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--steps", type=int, default=1000, help="of each fit (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/variational_fit", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 1 or not 0 <= args.seed < 2**63:
        parser.error("--steps must be 1 or more, --seed from 0 to 2**63 - 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # now rather than after the fits
        return run(args)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")


if __name__ == "__main__":
    main()
