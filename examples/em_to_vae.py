"""From EM to the VAE: one bound, climbed by closed forms, by gradients with one q an image, and with an encoder.

For any q the evidence is a bound and a gap, ln p(x) = ELBO(q) + KL(q || p(z | x)). EM makes the gap 0, then climbs in
the model's parameters; a VAE does both at once by gradients, and an encoder puts out its q. Where all is linear and
Gaussian (probabilistic PCA) the best likelihood has a closed form in eigenvalues of the data's covariance (Tipping and
Bishop 1999, "Probabilistic principal component analysis"), and every way must end there. With a
q that is exact one draw of it tells p(x); draws of the prior fail. The data are handwritten digits of 64 pixels.

    python examples/em_to_vae.py --output demo/course/em_to_vae
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence
from tqdm import tqdm

import fastelbo

LATENTS = 4


def exact_ppca(x: Tensor) -> tuple[float, LowRankMultivariateNormal]:
    """The greatest mean log-likelihood there is, from eigenvalues, and the model that has it."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    kept, noise, size = values[-LATENTS:], values[:-LATENTS].mean(), len(values)
    best = -0.5 * (kept.log().sum() + (size - LATENTS) * noise.log() + size * (1 + math.log(2 * math.pi)))
    return best.item(), ppca(vectors[:, -LATENTS:] * (kept - noise).sqrt(), x.mean(0), noise.log())


def ppca(weight: Tensor, centre: Tensor, x_logvar: Tensor) -> LowRankMultivariateNormal:
    """x = centre + weight z + noise, for z of a standard normal."""
    return LowRankMultivariateNormal(centre, weight, x_logvar.exp().expand(len(centre)))


def posteriors(x: Tensor, weight: Tensor, centre: Tensor, x_logvar: Tensor) -> MultivariateNormal:
    """p(z | x) of each x."""
    precision = torch.eye(LATENTS, dtype=x.dtype) + weight.T @ weight * torch.exp(-x_logvar)
    mean = torch.linalg.solve(precision, weight.T @ (x - centre).T * torch.exp(-x_logvar)).T
    return MultivariateNormal(mean, precision_matrix=precision)


def ppca_by_em(x: Tensor, weight: Tensor, steps: int) -> list[float]:
    """Mean log-likelihood before each step of EM."""
    covariance, variance, curve = torch.cov(x.T, correction=0), torch.tensor(1.0, dtype=x.dtype), []
    for _ in range(steps):
        curve.append(ppca(weight, x.mean(0), variance.log()).log_prob(x).mean().item())
        inverse = torch.linalg.inv(weight.T @ weight + variance * torch.eye(LATENTS, dtype=x.dtype))
        s_w = covariance @ weight
        new = s_w @ torch.linalg.inv(variance * torch.eye(LATENTS, dtype=x.dtype) + inverse @ weight.T @ s_w)
        variance = (covariance.trace() - (s_w @ inverse * new).sum()) / len(covariance)
        weight = new
    return curve


def elbo(x: Tensor, mean: Tensor, logvar: Tensor, weight: Tensor, centre: Tensor, x_logvar: Tensor) -> Tensor:
    """The bound of each x under a linear decoder: of z's variance the expected square needs no draws."""
    spread = (logvar.exp() * weight.square().sum(0)).sum(-1) * torch.exp(-x_logvar) / 2
    nll = fastelbo.gaussian_nll(x, mean @ weight.T + centre, x_logvar)
    return -nll - spread - fastelbo.gaussian_kl(mean, logvar.expand_as(mean))


def linear_vae(x: Tensor, weight: Tensor, steps: int, amortised: bool) -> tuple[list[Tensor], list[float]]:
    """Climbs in the model and in q at once; q's means are a linear encoder's, or free for each image."""
    shapes = [(LATENTS, x.shape[1]), (LATENTS,)] if amortised else [(len(x), LATENTS)]
    q = [x.new_zeros(shape) for shape in shapes]
    leaves = [part.requires_grad_() for part in (*q, x.new_zeros(LATENTS), weight.clone(), x.mean(0), x.new_zeros(()))]
    curve: list[float] = []
    optimizer = torch.optim.LBFGS(leaves, 1, steps, steps * 5 // 4, 1e-9, 0, 50, "strong_wolfe")

    def found() -> list[Tensor]:
        return [x @ q[0].T + q[1] if amortised else q[0], *leaves[len(q) :]]

    def loss() -> Tensor:
        optimizer.zero_grad()
        loss = -elbo(x, *found()).mean()
        loss.backward()
        curve.append(-loss.item())
        bar.update()
        return loss

    with tqdm(total=steps * 5 // 4, desc="encoder" if amortised else "one q an image", disable=None) as bar:
        optimizer.step(loss)
    return [part.detach() for part in found()], curve


def monte_carlo(x: Tensor, q: MultivariateNormal, model: tuple, draws: int) -> Tensor:
    """ln p(x) as the logarithm of a mean of weights p(x, z) / q(z), z drawn from q."""
    z, (weight, centre, x_logvar) = q.sample((draws,)), model
    log_p_x = fastelbo.gaussian_log_prob(x, z @ weight.T + centre, x_logvar, event_ndim=1)
    log_weights = log_p_x + fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1) - q.log_prob(z)
    return fastelbo.importance_weighted_log_likelihood(log_weights)


def save_picture(path: Path, curves: dict[str, list[float]], best: float) -> None:
    """How the ways climb."""
    axes = Figure(figsize=(7, 4.5), layout="constrained").subplots()
    for name, curve in curves.items():
        so_far = itertools.accumulate(curve, max)  # a line search also looks where it does not go
        axes.loglog(range(1, len(curve) + 1), [max(best - value, 1e-8) for value in so_far], label=name)
    axes.set(
        title="Four latents of digits", xlabel="evaluations", ylabel="nats an image below the best", ylim=(1e-6, 100)
    )
    axes.legend()
    axes.figure.savefig(path, dpi=100)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Climbs in all ways, draws the picture; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    x = torch.tensor(sklearn.datasets.load_digits().data) / 16
    best, exact = exact_ppca(x)
    first = 0.1 * torch.randn(x.shape[1], LATENTS, dtype=x.dtype)
    curves = {"EM": ppca_by_em(x, first, args.steps)}
    _, curves["one q an image"] = linear_vae(x, first, args.steps, False)
    (mean, logvar, *model), curves["a VAE"] = linear_vae(x, first, args.steps, True)
    save_picture(args.output / "em_to_vae.png", curves, best)
    evidence, posterior = ppca(*model).log_prob(x), posteriors(x, *model)
    worse = MultivariateNormal(mean + 0.1, (logvar + 0.5).exp().diag())
    gap = evidence - elbo(x, worse.mean, logvar + 0.5, *model)
    kl = kl_divergence(worse, posterior)
    prior = MultivariateNormal(torch.zeros(LATENTS, dtype=x.dtype), torch.eye(LATENTS, dtype=x.dtype))
    off = [(monte_carlo(x, q.expand([len(x)]), model, 100) - evidence).mean().item() for q in (prior, posterior)]
    print(f"The picture is {args.output / 'em_to_vae.png'}")
    return [
        ("nats an image of the best model; the formula", exact.log_prob(x).mean().item(), best, 1e-9),
        ("nats an image by EM; the formula", curves["EM"][-1], best, 1e-4),
        ("nats an image by a linear VAE; the formula", curves["a VAE"][-1], best, 1e-4),
        ("nats an image with one q an image, which climbs slowly", curves["one q an image"][-1], best, 0.01),
        ("gap of a worse q, nats an image; mean KL to the posterior", gap.mean().item(), kl.mean().item(), 1e-9),
        ("largest difference of the two for an image", (gap - kl).abs().max().item(), 0, 1e-9),
        ("ln p(x) by 100 draws of the prior, less the exact", off[0], -1, "at most"),
        ("ln p(x) by 100 draws of the posterior, less the exact", off[1], 0, 1e-9),
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
    add("--steps", type=int, default=400, help="of each way to climb (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/em_to_vae", help="for the picture (default: %(default)s)")
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
