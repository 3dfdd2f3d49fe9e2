"""EM: a mixture of Gaussians and k-means by two closed steps, and the picture of bounds beneath a likelihood.

For any q(z) the log-likelihood is a bound and a gap, ln p(x; theta) = ELBO(theta, q) + KL(q || p(z | x; theta)). The
E-step closes the gap, the M-step climbs in theta. A mixture's steps are held beside scikit-learn's, and beside its
k-means where all Gaussians are points. The toy x = theta z + noise has one parameter, so that its bounds can be drawn,
each a parabola; its best theta is known. Where q is off, a step up in the bound may be one down in the likelihood.

    python examples/em.py --output demo/course/em
"""

import argparse
import itertools
import math
import tempfile
import warnings
from pathlib import Path

import sklearn.cluster
import sklearn.datasets
import sklearn.exceptions
import sklearn.mixture
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastelbo

COMPONENTS, NOISE = 5, 0.7
SEEN = torch.tensor([0.4, 1.5, -2.2], dtype=torch.float64)  # of the toy


def mixture_by_em(x: Tensor, means: Tensor, variance: float | None, steps: int) -> tuple[Tensor, Tensor, list[float]]:
    """EM for diagonal Gaussians, which a given variance keeps as they are and of equal weights.

    Returns means, p(component | x), and the mean log-likelihood before each step.
    """
    logvar, log_weights, curve = x.var(0).log().expand_as(means), torch.full((len(means),), -math.log(len(means))), []
    logvar = logvar if variance is None else torch.full_like(logvar, math.log(variance))
    for _ in range(steps):
        log_joint = log_weights + fastelbo.gaussian_log_prob(x[:, None], means, logvar, event_ndim=1)
        curve.append(log_joint.logsumexp(1).mean().item())
        r = log_joint.softmax(1)  # E: the tightest bound
        means = r.T @ x / r.sum(0)[:, None]  # M
        if variance is None:
            logvar = (r.T @ x.square() / r.sum(0)[:, None] - means.square()).log()
            log_weights = r.mean(0).log()
    return means, r, curve


def toy_log_likelihood(theta: Tensor) -> Tensor:
    """Of what was seen, for every theta of a vector."""
    return fastelbo.gaussian_log_prob(SEEN, 0.0, theta[:, None].square() + NOISE**2, scale="var", event_ndim=1)


def toy_bound(theta: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """The bound for every theta, with q the posterior that another theta has, and the theta where it is greatest."""
    mean, var = at * SEEN / (at**2 + NOISE**2), (NOISE**2 / (at**2 + NOISE**2)).expand(len(SEEN))
    nll = fastelbo.gaussian_nll(SEEN, theta[:, None] * mean, NOISE, scale="std", event_ndim=1)
    kl = fastelbo.gaussian_kl(mean, var, scale="var", event_ndim=1)
    return -nll - theta.square() * var.sum() / (2 * NOISE**2) - kl, (SEEN @ mean) / (mean.square() + var).sum()


def save_picture(path: Path, plane: Tensor, means: Tensor, belongs: Tensor) -> None:
    """The mixture's components, and the toy's family of bounds under its log-likelihood."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(*plane.T, c=belongs, s=4, cmap="tab10", vmax=9)
    left.plot(*means.T, "k+", markersize=14, markeredgewidth=3)
    left.set(title="Digits in a plane: who belongs to which Gaussian", xlabel="first component", ylabel="second")
    theta = torch.linspace(0.3, 3, 300, dtype=torch.float64)
    right.plot(theta, toy_log_likelihood(theta), "k", linewidth=2, label="ln p(x; θ)")
    for at in (0.6, 1.0, 1.6, 2.4):
        right.plot(theta, toy_bound(theta, torch.tensor(at, dtype=torch.float64))[0], label=f"q exact at θ = {at}")
    right.set(title="A family of bounds", xlabel="θ", ylabel="nats", ylim=(-9, -3.8))
    right.legend()
    figure.savefig(path, dpi=100)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Runs EM, draws the picture; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x = torch.tensor(sklearn.datasets.load_digits().data) / 16
    plane = x @ torch.linalg.eigh(torch.cov(x.T))[1][:, -2:]
    start = plane[torch.randperm(len(x))[:COMPONENTS]]
    means, belongs, mixture = mixture_by_em(plane, start, None, args.steps + 1)
    points, _, _ = mixture_by_em(plane, start, 1e-9, 100)  # so narrow that each image belongs to its nearest
    precisions = (1 / plane.var(0)).expand(COMPONENTS, 2).numpy()
    theirs = sklearn.mixture.GaussianMixture(
        COMPONENTS,
        covariance_type="diag",
        reg_covar=0,
        tol=0,
        max_iter=args.steps,
        weights_init=[1 / COMPONENTS] * COMPONENTS,
        means_init=start.numpy(),
        precisions_init=precisions,
    )
    with warnings.catch_warnings(action="ignore", category=sklearn.exceptions.ConvergenceWarning):
        theirs.fit(plane.numpy())
    k_means = sklearn.cluster.KMeans(COMPONENTS, init=start.numpy(), n_init=1, tol=0).fit(plane.numpy())

    top = (SEEN.square().mean() - NOISE**2).sqrt()[None]  # where the toy's likelihood is greatest
    bound, there = toy_bound(top, 2 * top)
    rise = toy_bound(there[None], 2 * top)[0] - bound
    fall = toy_log_likelihood(there[None]) - toy_log_likelihood(top)
    thetas = torch.linspace(0.05, 4, 300, dtype=torch.float64)
    over = max((toy_bound(thetas, at)[0] - toy_log_likelihood(thetas)).max().item() for at in thetas)
    theta = top / 3
    for _ in range(100):
        theta = toy_bound(theta, theta)[1][None]
    save_picture(args.output / "em.png", plane, means, belongs.argmax(1))
    print(f"The picture is {args.output / 'em.png'}")
    centres = torch.tensor(k_means.cluster_centers_)
    return [
        ("log-likelihood by EM, nats an image; scikit-learn's", mixture[-1], theirs.score(plane), 1e-9),
        ("smallest rise in a step", min(b - a for a, b in itertools.pairwise(mixture)), 0, "at least"),
        ("means of points, less those of scikit-learn's k-means", (points - centres).abs().max().item(), 0, 1e-9),
        ("toy: theta after 100 steps of EM; where the likelihood is greatest", theta.item(), top.item(), 1e-9),
        ("toy: most that any bound is above the likelihood", over, 0, 1e-12),
        ("toy, q off: rise of the bound in a step", rise.item(), 0.01, "at least"),
        ("toy, q off: what the likelihood does in that step", fall.item(), -0.01, "at most"),
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
    add("--steps", type=int, default=30, help="of EM for the mixture (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/em", help="for the picture (default: %(default)s)")
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
