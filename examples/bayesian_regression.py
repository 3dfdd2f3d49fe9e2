"""Bayes by backprop on a regression in one dimension: a linear model beside its exact posterior, and a network.

Every weight has an independent normal posterior, N(mean, softplus(rho)^2), trained to maximise the evidence lower bound
(ELBO) of all observations (Blundell et al. 2015, "Weight Uncertainty in Neural Networks"). The linear model has an
exact posterior of precision A = F'F / noise^2 + 1, for features F of the observations. Of all independent normals, the
closest to it in KL(q || posterior) has the same mean, and the diagonal of A for precisions (Bishop 2006, "Pattern
Recognition and Machine Learning", 10.1.2): each weight seems more certain than it is. What the ELBO lacks of the
log-evidence is that KL. The network's ELBO bounds the log-evidence of another model for the same observations.

    python examples/bayesian_regression.py --output demo/bayesian_regression
"""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from tqdm import tqdm

import fastelbo

NOISE, CENTRES, HIDDEN = 0.15, torch.linspace(-4, 4, 13), 6
BAND, COLOURS = 1.96, {"exact": "C1", "learned": "C0"}  # 95 % of a normal lie within that many standard deviations


def truth(x: Tensor) -> Tensor:
    """The function that is observed with noise."""
    return torch.sin(1.2 * x)


def make_observations(count: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """x and y, both [count]: none between -0.5 and 1, nor beyond 3."""
    x = torch.rand(count) * 4.5 - 3
    x = torch.where(x > -0.5, x + 1.5, x)
    return x.to(device), (truth(x) + NOISE * torch.randn(count)).to(device)


class Weights(nn.Module):
    """Independent normal posteriors of all weights of a model, kept as one vector, and their priors N(0, std^2)."""

    def __init__(self, shapes: list[tuple[int, ...]], prior_std: list[float]) -> None:
        super().__init__()
        self.shapes, self.sizes = shapes, [math.prod(shape) for shape in shapes]
        self.register_buffer("prior_std", torch.tensor(prior_std).repeat_interleave(torch.tensor(self.sizes)))
        self.mean = nn.Parameter(self.prior_std * torch.randn(sum(self.sizes)))
        self.rho = nn.Parameter(torch.full_like(self.mean, -4.0))

    def sample(self, count: int) -> tuple[list[Tensor], Tensor]:
        """Draws of each tensor, [count, *shape], and the KL divergence of the posteriors from the priors."""
        flat, kl = fastelbo.gaussian_rsample_kl(
            self.mean, self.rho, 0.0, self.prior_std, scale="softplus", scale_p="std", num_samples=count, event_ndim=1
        )
        parts = zip(flat.split(self.sizes, dim=1), self.shapes, strict=True)
        return [part.unflatten(1, shape) for part, shape in parts], kl


def features(x: Tensor) -> Tensor:
    """Bumps at the centres, a little narrower than their distance: [..., centres]."""
    return torch.exp(-0.5 * ((x[..., None] - CENTRES.to(x)) / 0.47).square())


def linear(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The linear model's mean of y, [K, N], for x [N] and K draws of the weights."""
    return weights[0] @ features(x).T


def network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """The network's mean of y, [K, N], for x [N] and K draws of the weights."""
    w1, b1, w2, b2 = weights
    return (torch.tanh(x[:, None] * w1[:, None] + b1[:, None]) @ w2[..., None]).squeeze(2) + b2


PRIORS = {  # the shapes of a model's tensors, and the standard deviations of their priors
    linear: ([(len(CENTRES),)], [1.0]),
    network: ([(HIDDEN,), (HIDDEN,), (HIDDEN,), (1,)], [2.0, 2.0, 1.0, 1.0]),
}


def elbo(model: Callable, weights: Weights, x: Tensor, y: Tensor, samples: int) -> Tensor:
    """Evidence lower bound of all observations in nats, estimated from draws of the weights."""
    drawn, kl = weights.sample(samples)
    return -fastelbo.gaussian_nll(y, model(x, drawn), NOISE, scale="std", event_ndim=1).mean() - kl


def fit(model: Callable, x: Tensor, y: Tensor, steps: int, samples: int = 8) -> tuple[Weights, list[float]]:
    """Maximises the bound; returns the posteriors, and the bound in each step."""
    weights, bounds = Weights(*PRIORS[model]).to(x.device), []
    optimizer = torch.optim.Adam(weights.parameters(), 0.1, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)  # to 0, and the noise of q with it
    for _ in tqdm(range(steps), model.__name__, unit="step", disable=None):
        bound = elbo(model, weights, x, y, samples)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
        decay.step()
        bounds.append(bound.detach())
    return weights, torch.stack(bounds).tolist()


def solve(x: Tensor, y: Tensor) -> tuple[MultivariateNormal, MultivariateNormal, float]:
    """Of the linear model the exact posterior, the best of all with independent weights, and the log-evidence."""
    f, y = features(x.double().cpu()), y.double().cpu()
    precision = f.T @ f / NOISE**2 + torch.eye(len(CENTRES), dtype=f.dtype)
    mean = torch.linalg.solve(precision, f.T @ y / NOISE**2)
    evidence = MultivariateNormal(torch.zeros_like(y), f @ f.T + NOISE**2 * torch.eye(len(y), dtype=f.dtype))
    independent = MultivariateNormal(mean, (1 / precision.diagonal()).diag())
    return MultivariateNormal(mean, precision_matrix=precision), independent, evidence.log_prob(y).item()


def learned(weights: Weights) -> MultivariateNormal:
    """The posteriors that were learned, in double precision on the CPU."""
    mean, std = weights.mean.detach(), nn.functional.softplus(weights.rho.detach())
    return MultivariateNormal(mean.double().cpu(), std.double().cpu().square().diag())


def save_picture(path: Path, x_y: tuple[Tensor, Tensor], posteriors: dict, weights: Weights) -> None:
    """What was learned of the function."""
    f = features(x := torch.linspace(-4, 4, 401, dtype=torch.float64))
    known = {name: (f @ q.mean, ((f @ q.covariance_matrix) * f).sum(1).sqrt()) for name, q in posteriors.items()}
    with torch.no_grad():
        y = network(x.to(weights.mean), weights.sample(1000)[0]).double().cpu()
    panels = {"linear": {name: known[name] for name in COLOURS}, "network": {"learned": (y.mean(0), y.std(0))}}
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, (model, predictions) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for name, (mean, std) in predictions.items():
            axes.plot(x, mean, color=COLOURS[name], label=f"{name}: mean and 95 % band")
            axes.fill_between(x, mean - BAND * std, mean + BAND * std, color=COLOURS[name], alpha=0.3, linewidth=0)
        axes.plot(x, truth(x), "k--", linewidth=1, label="the function")
        axes.plot(*(values.cpu() for values in x_y), "k.", label="observations")
        axes.set(title=model, xlabel="x", ylabel="y", ylim=(-3, 4))
        axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def run(args: argparse.Namespace) -> list[list[float]]:
    """Fits both models, and reports beside what is exact; returns their bounds in each step."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x_y = make_observations(60, args.device)
    (weights, bounds), (network_weights, network_bounds) = (fit(model, *x_y, args.steps) for model in PRIORS)
    exact, independent, log_evidence = solve(*x_y)
    posteriors = {"learned": learned(weights), "best independent": independent, "exact": exact}
    print(f"\n{'Linear model':<20}{'std / exact':>12}{'ELBO':>10}{'KL(q||posterior)':>20}")
    for name, q in posteriors.items():
        kl, std = kl_divergence(q, exact), (q.stddev / exact.stddev).mean()
        print(f"  {name:<18}{std:>12.3f}{log_evidence - kl:>10.3f}{kl:>20.3f}")
    print(f"{'Network':<32}{torch.tensor(network_bounds[-100:]).mean():>10.3f}   (mean of the last steps)")
    save_picture(args.output / "predictions.png", x_y, posteriors, network_weights)
    print(f"The picture is {args.output / 'predictions.png'}")
    return [bounds, network_bounds]


def main(argv: list[str] | None = None) -> list[list[float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--steps", type=int, default=2000, help="of each model (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/bayesian_regression", help="for the pictures (default: %(default)s)")
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
