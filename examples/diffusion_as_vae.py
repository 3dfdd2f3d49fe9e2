"""A diffusion model is a VAE of many levels: for normal data its bound is the evidence, and a linear way back finds it.

Each level adds noise, q(x_t | x_0) = N(a_t x_0, 1 - a_t^2), and what is learned leads back. The bound is a sum over
levels, -ln p(x_0 | x_1) + sum_t KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) + KL(q(x_T | x_0) || p(x_T)) (Ho et al. 2020,
"Denoising diffusion probabilistic models"). Where images are normal the best way back is linear, and known in the
directions of their principal components: with it nothing is lost, whatever the number of levels. The images are
handwritten digits, with noise as wide as a grey level.

    python examples/diffusion_as_vae.py --output demo/course/diffusion_as_vae
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import MultivariateNormal
from tqdm import tqdm

import fastelbo

LEARNED = 8  # components whose way back is learned


def schedule(steps: int) -> tuple[Tensor, Tensor]:
    """a_t, for t from 0 to the number of steps, and the variance 1 - a_t^2: a quarter of a circle."""
    angle = torch.linspace(0, 0.98 * math.pi / 2, steps + 1, dtype=torch.float64)
    return angle.cos(), angle.sin().square()


def back(a: Tensor, var: Tensor, t: int, x_t: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_t-1 | x_t, x_0)."""
    r = a[t] / a[t - 1]
    mean = (r * var[t - 1] * x_t + a[t - 1] * (1 - r**2) * x_0) / var[t]
    return mean, var[t - 1] * (1 - r**2) / var[t]


def bound(x: Tensor, gains: Tensor, logvars: Tensor, prior_logvar: Tensor) -> Tensor:
    """-ELBO of each x [N, D], with p(x_t-1 | x_t) of means gain x_t; gains and log-variances [T, D].

    Expectations of squares under a normal are means over its two points at one deviation: nothing is drawn.
    """
    (a, var), signs = schedule(len(gains)), x.new_tensor([[[1.0]], [[-1.0]]])
    total = fastelbo.gaussian_kl(a[-1] * x, var[-1], 0.0, prior_logvar, scale="var", scale_p="logvar")
    for t in range(1, len(gains) + 1):
        x_t = fastelbo.gaussian_rsample(a[t] * x, var[t], scale="var", num_samples=2, noise=signs)
        p = gains[t - 1] * x_t, logvars[t - 1]
        if t == 1:
            term = fastelbo.gaussian_nll(x, *p, event_ndim=1)
        else:
            mean, variance = back(a, var, t, x_t, x)
            term = fastelbo.gaussian_kl(mean, variance, *p, scale="var", scale_p="logvar", event_ndim=1)
        total = total + term.mean(0)
    return total


def way_back(spread: Tensor, steps: int) -> list[Tensor]:
    """Gains, log-variances and the prior's log-variance with which the bound of normal data is exact."""
    a, var = schedule(steps)
    v = a[:, None].square() * spread + var[:, None]  # of x_t
    r = (a[1:] / a[:-1])[:, None]
    return [r * v[:-1] / v[1:], (v[:-1] * (1 - r**2) / v[1:]).log(), v[-1].log()]


def learn_way_back(x: Tensor, levels: int, iterations: int) -> list[float]:
    """The mean ELBO in each step of learning a way back, from gains and variances of 1."""
    shapes = (levels, x.shape[1]), (levels, x.shape[1]), (x.shape[1],)
    leaves = [x.new_full(shape, start).requires_grad_() for shape, start in zip(shapes, (1, 0, 0), strict=True)]
    curve: list[float] = []
    optimizer = torch.optim.LBFGS(leaves, 1, iterations, None, 1e-9, 0, 50, "strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (value := bound(x, *leaves).mean()).backward()
        curve.append(-value.item())
        bar.update()
        return value

    with tqdm(desc="linear way back", disable=None) as bar:
        optimizer.step(loss)
    return curve


def draw(gains: Tensor, logvars: Tensor, prior_logvar: Tensor, count: int, seed: int) -> Tensor:
    """Data from the way back, [count, D]."""
    x = fastelbo.gaussian_rsample(torch.zeros_like(prior_logvar), prior_logvar, num_samples=count, seed=seed)
    for t in range(len(gains) - 1, -1, -1):
        x = fastelbo.gaussian_rsample(gains[t] * x, logvars[t], seed=seed + t + 1)
    return x


def save_picture(path: Path, curve: list[float], best: float, images: Tensor) -> None:
    """How a way back is learned, and images drawn."""
    left, right = Figure(figsize=(11, 4), layout="constrained").subplots(1, 2)
    left.loglog(range(1, len(curve) + 1), [max(best - value, 1e-9) for value in curve])
    left.set(title="A way back is learned", xlabel="evaluations", ylabel="nats below ln p(x)")
    sheet = images[:32].clamp(0, 1).view(4, 8, 8, 8).transpose(1, 2).reshape(32, 64)
    right.imshow(sheet, cmap="gray")
    right.set(title="Draws of the linear way back: normal images", xticks=[], yticks=[])
    left.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Adds up bounds, learns, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    pixels = torch.tensor(sklearn.datasets.load_digits().data)
    pixels = (pixels + torch.rand_like(pixels)) / 17
    mean, covariance = pixels.mean(0), torch.cov(pixels.T, correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    scale = values[-LEARNED:].mean().sqrt()  # so that the first components have variances about 1
    x, spread = (pixels - mean) @ vectors / scale, values / scale**2
    evidence = MultivariateNormal(mean, covariance).log_prob(pixels) + 64 * scale.log()
    exact = [(-bound(x, *way_back(spread, levels)) - evidence).abs().max().item() for levels in (5, 20)]
    gains, logvars, prior = way_back(spread, 10)
    standard = (evidence + bound(x, gains, logvars, torch.zeros_like(prior))).mean().item()
    kl = fastelbo.gaussian_kl(torch.zeros_like(prior), prior, event_ndim=1).item()
    whole = -bound(x, gains, logvars, prior).mean().item()
    few, few_spread = x[:, -LEARNED:], spread[-LEARNED:]
    learned = learn_way_back(few, 10, args.steps)
    formula = -0.5 * (few_spread.log() + 1 + math.log(2 * math.pi)).sum().item()
    draws = draw(gains, logvars, prior, 20000, args.seed)
    images = mean + scale * draws @ vectors.T
    length = draws.square().sum(1)
    off = (length.mean() - spread.sum()).abs() / (length.std() / len(draws) ** 0.5)
    save_picture(args.output / "diffusion_as_vae.png", learned, formula, images)
    print(f"The picture is {args.output / 'diffusion_as_vae.png'}")
    return [
        ("5 levels: largest distance of an image's bound from ln p(x)", exact[0], 0, 1e-8),
        ("20 levels: the same", exact[1], 0, 1e-8),
        ("gap with a standard normal as the last level; KL to it", standard, kl, 1e-8),
        ("learned way back, nats of 8 components; the formula", learned[-1], formula, 1e-4),
        ("nats of all 64 by the known way back; of a normal of full covariance", whole, evidence.mean().item(), 1e-8),
        ("squared length of draws: standard errors from the trace", off.item(), 4, "at most"),
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
    add("--steps", type=int, default=150, help="of learning the way back (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/diffusion_as_vae", help="for the picture (default: %(default)s)")
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
