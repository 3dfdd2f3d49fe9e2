"""Bayes by backprop on a regression in one dimension: a linear model beside its exact posterior, and a network.

Every weight has an independent normal posterior, N(mean, softplus(rho)^2), trained to maximise the evidence lower bound
(ELBO) of all observations, from a few draws of all weights in each step::

    weights, kl = fastelbo.gaussian_rsample_kl(
        mean, rho, 0.0, prior_std, scale="softplus", scale_p="std", num_samples=8, event_ndim=1
    )
    nll = fastelbo.gaussian_nll(y, predict(x, weights), NOISE, scale="std", event_ndim=1)
    loss = nll.mean() + kl

The linear model, y = w . features(x) + noise, has an exact posterior, of precision A = F'F / noise^2 + 1 / prior^2 for
the features F of the observations, and of mean A^-1 F'y / noise^2. Of all independent normals, the one closest to it in
KL(q || posterior) has the same mean, and the diagonal of A for precisions: each weight seems more certain than it is,
for its marginal variance is the diagonal of A^-1. The predictions lose what correlations would tell: their bands are
too narrow where nothing was observed, and may be too wide where much was. What the ELBO lacks of the log-evidence is
KL(q || posterior). The tables and pictures compare what was learned with both, which training never sees.

The network, of one hidden layer, has no such exact posterior. Its predictions are compared with the function that was
observed: where observations lie, between them, and beyond them. Its ELBO bounds the log-evidence of another model for
the same observations.

    python examples/bayesian_regression.py --output demo/bayesian_regression

Sources: Blundell et al. 2015, "Weight Uncertainty in Neural Networks"; Bishop 2006, "Pattern Recognition and Machine
Learning", sections 3.3, 3.5 and 10.1.2.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from tqdm import tqdm

import common
import fastelbo

LEARNING_RATE = 0.1
NOISE = 0.15
PRIOR_STD = 1.0
CENTRES = torch.linspace(-4, 4, 13)
HIDDEN = 6
BAND = 1.96  # standard deviations that hold 95 % of a normal
MANY_DRAWS = 1000


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_parser(
        "Bayes by backprop on a regression in one dimension: a linear model beside its exact posterior, and a network.",
        output="demo/bayesian_regression",
    )
    add = parser.add_argument
    add("--observations", type=int, default=60, help=f"to make {common.DEFAULT}")
    add("--steps", type=int, default=2000, help=f"of each model {common.DEFAULT}")
    add("--samples", type=int, default=8, help=f"draws of the weights in each step {common.DEFAULT}")
    return parser.parse_args(argv)


def truth(x: Tensor) -> Tensor:
    """The function that is observed with noise."""
    return torch.sin(1.2 * x)


def make_observations(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x and y, both [count]: none between -0.5 and 1, nor beyond 3."""
    x = torch.rand(count) * 4.5 - 3
    x = torch.where(x > -0.5, x + 1.5, x)
    return x.to(device), (truth(x) + NOISE * torch.randn(count)).to(device)


REGIONS = {"observed": ((-3, -0.5), (1, 3)), "between": ((-0.5, 1),), "beyond": ((-4, -3), (3, 4))}


class Weights(nn.Module):
    """Independent normal posteriors of all weights of a model, kept as one vector, and their priors.

    Args:
        shapes: of the model's tensors.
        prior_std: of each tensor's elements.
    """

    def __init__(self, shapes: list[tuple[int, ...]], prior_std: list[float]) -> None:
        super().__init__()
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes]
        self.register_buffer("prior_std", torch.tensor(prior_std).repeat_interleave(torch.tensor(self.sizes)))
        self.mean = nn.Parameter(self.prior_std * torch.randn(sum(self.sizes)))
        self.rho = nn.Parameter(torch.full_like(self.mean, -4.0))

    def sample(self, count: int, backend: str | None) -> tuple[list[Tensor], Tensor]:
        """Draws of each tensor, [count, *shape], and the KL divergence of the posteriors from the priors."""
        prior = {"mean_p": 0.0, "s_p": self.prior_std, "scale_p": "std"}
        flat, kl = fastelbo.gaussian_rsample_kl(
            self.mean, self.rho, **prior, scale="softplus", num_samples=count, event_ndim=1, backend=backend
        )
        parts = flat.split(self.sizes, dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)], kl


def features(x: Tensor) -> Tensor:
    """Bumps at the centres, a little narrower than their distance: [..., centres]."""
    centres = CENTRES.to(x)
    return torch.exp(-0.5 * ((x[..., None] - centres) / (0.7 * (centres[1] - centres[0]))).square())


def linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The linear model's mean of y, [K, N], for x [N] and K draws of the weights."""
    return weights[0] @ features(x).T


def network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The network's mean of y, [K, N], for x [N] and K draws of the weights."""
    w1, b1, w2, b2 = weights
    hidden = torch.tanh(x[:, None] * w1[:, None] + b1[:, None])
    return (hidden @ w2[..., None]).squeeze(2) + b2


PRIORS = {  # the shapes of a model's tensors, and the standard deviations of their priors
    linear: ([(len(CENTRES),)], [PRIOR_STD]),
    network: ([(HIDDEN,), (HIDDEN,), (HIDDEN,), (1,)], [2.0, 2.0, 1.0, 1.0]),
}


def elbo(model: Callable, weights: Weights, x: Tensor, y: Tensor, samples: int, backend: str | None) -> Tensor:
    """Evidence lower bound of all observations in nats, estimated from draws of the weights."""
    drawn, kl = weights.sample(samples, backend)
    nll = fastelbo.gaussian_nll(y, model(x, drawn), NOISE, scale="std", event_ndim=1, backend=backend)
    return -(nll.mean() + kl)


def fit(
    model: Callable, x: Tensor, y: Tensor, args: argparse.Namespace, on_step: Callable[[], object] = lambda: None
) -> tuple[Weights, list[float]]:
    """Maximises the bound; returns the posteriors, and the bound in each step."""
    weights = Weights(*PRIORS[model]).to(x.device)
    optimizer = torch.optim.Adam(weights.parameters(), LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)  # to 0, and the noise of q with it
    elbos = []
    for _ in range(args.steps):
        bound = elbo(model, weights, x, y, args.samples, args.backend)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        decay.step()
        elbos.append(bound.detach())
        on_step()
    return weights, torch.stack(elbos).tolist()


@dataclass
class Exact:
    """What is known of the linear model, in double precision on the CPU."""

    posterior: MultivariateNormal
    mean_field: MultivariateNormal
    log_evidence: float

    def elbo(self, q: MultivariateNormal) -> float:
        """The bound on the log-evidence that a posterior q gives."""
        return self.log_evidence - kl_divergence(q, self.posterior).item()


def solve(x: Tensor, y: Tensor) -> Exact:
    """The exact posterior of the linear model, the best of all with independent weights, and the log-evidence."""
    x, y = x.double().cpu(), y.double().cpu()
    f = features(x)
    precision = f.T @ f / NOISE**2 + torch.eye(len(CENTRES), dtype=f.dtype) / PRIOR_STD**2
    mean = torch.linalg.solve(precision, f.T @ y / NOISE**2)
    covariance = PRIOR_STD**2 * f @ f.T + NOISE**2 * torch.eye(len(y), dtype=f.dtype)
    return Exact(
        posterior=MultivariateNormal(mean, precision_matrix=precision),
        mean_field=MultivariateNormal(mean, (1 / precision.diagonal()).diag()),
        log_evidence=MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y).item(),
    )


def learned(weights: Weights) -> MultivariateNormal:
    """The posteriors that were learned, in double precision on the CPU."""
    mean, std = weights.mean.detach(), nn.functional.softplus(weights.rho.detach())
    return MultivariateNormal(mean.double().cpu(), std.double().cpu().square().diag())


def linear_prediction(q: MultivariateNormal, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the linear model's function at x, in closed form."""
    f = features(x.double())
    return f @ q.mean, ((f @ q.covariance_matrix) * f).sum(1).sqrt()


@torch.no_grad()
def network_prediction(weights: Weights, x: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the network's function at x, from draws of the weights."""
    drawn, _ = weights.sample(MANY_DRAWS, backend)
    y = network(x.to(weights.mean), drawn).double().cpu()
    return y.mean(0), y.std(0)


def region(x: Tensor, name: str) -> Tensor:
    """Which x lie in it."""
    return torch.stack([(low <= x) & (x <= high) for low, high in REGIONS[name]]).any(0)


def report(exact: Exact, q: MultivariateNormal, network_elbo: float) -> None:
    """Prints the linear model's weights and all bounds."""
    print(f"\n{'Linear model':<22}{'error of mean':>15}{'std':>10}{'ELBO':>12}{'KL(q||posterior)':>20}")
    for label, shown in (
        ("Bayes by backprop", q),
        ("best independent", exact.mean_field),
        ("exact posterior", exact.posterior),
    ):
        error = ((shown.mean - exact.posterior.mean) / exact.mean_field.stddev).square().mean().sqrt()
        std = (shown.stddev / exact.posterior.stddev).mean()
        bound = exact.elbo(shown)
        print(f"  {label:<20}{error:>15.3f}{std:>10.3f}{bound:>12.3f}{exact.log_evidence - bound:>20.3f}")
    print(f"{'Network':<22}{'':>25}{network_elbo:>12.3f}")
    print("  Error of the weights' means: root mean square, in standard deviations of the best independent posterior.")
    print("  std: mean over weights, in standard deviations of the exact posterior. ELBO and KL in nats; the exact")
    print(f"  posterior's ELBO is the log-evidence; the network's is estimated from {MANY_DRAWS} draws.")


def report_predictions(x: Tensor, predictions: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Prints what each model says of the function, region by region."""
    print(f"\n{'Function where it is':<30}" + "".join(f"{name:>23} " for name in REGIONS))
    print(f"{'':<30}" + f"{'error':>8}{'std':>8}{'inside':>8}" * len(REGIONS))
    for label, (mean, std) in predictions.items():
        row = ""
        for name in REGIONS:
            here = region(x, name)
            error = (mean - truth(x))[here]
            inside = (error.abs() <= BAND * std[here]).double().mean()
            row += f"{error.square().mean().sqrt():>8.3f}{std[here].mean():>8.3f}{100 * inside:>6.0f} %"
        print(f"  {label:<28}{row}")
    print("  Root-mean-square error of the mean; mean standard deviation; share of the function inside the 95 % band.")


def save_predictions(path: Path, x: Tensor, x_y: tuple[Tensor, Tensor], predictions: dict) -> None:
    """Draws what was learned of the function, the linear model's beside that of its exact posterior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = (("linear, exact posterior", "linear, Bayes by backprop"), ("network, Bayes by backprop",))
    for axes, names in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for name in names:
            color, (mean, std) = "C1" if "exact" in name else "C0", predictions[name]
            axes.plot(x, mean, color=color, label=f"{name}: mean and 95 % band")
            axes.fill_between(x, mean - BAND * std, mean + BAND * std, color=color, alpha=0.3, linewidth=0)
        axes.plot(x, truth(x), "k--", linewidth=1, label="the function")
        axes.plot(*(values.cpu() for values in x_y), "k.", label="observations")
        axes.set(xlabel="x", ylabel="y", ylim=(-3, 4))
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def save_weights(path: Path, posteriors: dict[str, MultivariateNormal]) -> None:
    """Draws the linear model's weights under each posterior."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4.5)).subplots()
    for shift, (label, q) in zip((-0.2, 0, 0.2), posteriors.items(), strict=True):
        index = np.arange(len(q.mean))
        axes.errorbar(index + shift, q.mean.numpy(), BAND * q.stddev.numpy(), fmt="o", capsize=3, label=label)
    axes.set(title="Weights of the linear model: means and 95 % intervals", xlabel="weight", xticks=index)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then fits and reports."""
    common.check_whole_numbers(args, seed=0, observations=1, steps=1, samples=1)
    device, args.backend = common.choose_device_and_backend(args)
    common.make_output(args.output)
    torch.manual_seed(args.seed)
    x_y = make_observations(args.observations, device)
    exact, x = solve(*x_y), torch.linspace(-4, 4, 401, dtype=torch.float64)
    with common.one_thread(True), tqdm(total=2 * args.steps, unit="step", desc="fitting", disable=None) as bar:
        (linear_weights, _), (network_weights, _) = (fit(model, *x_y, args, bar.update) for model in PRIORS)
    with torch.no_grad():
        network_elbo = elbo(network, network_weights, *x_y, MANY_DRAWS, args.backend).item()
    q = learned(linear_weights)
    predictions = {
        "linear, Bayes by backprop": linear_prediction(q, x),
        "linear, best independent": linear_prediction(exact.mean_field, x),
        "linear, exact posterior": linear_prediction(exact.posterior, x),
        "network, Bayes by backprop": network_prediction(network_weights, x, args.backend),
    }
    report(exact, q, network_elbo)
    report_predictions(x, predictions)
    save_predictions(args.output / "predictions.png", x, x_y, predictions)
    posteriors = {"Bayes by backprop": q, "best independent": exact.mean_field, "exact posterior": exact.posterior}
    save_weights(args.output / "weights.png", posteriors)
    print(f"\nPictures are in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
