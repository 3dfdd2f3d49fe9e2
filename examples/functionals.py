"""Functionals of densities: entropy, cross-entropy, KL and Wasserstein's distance, and where the first is greatest.

Varied by a dp of sum 0, the entropy H(p) = -sum p ln p changes by sum -(ln p + 1) dp. A normal's is greatest at a fixed
variance, an exponential's on the half line at a fixed mean: H less the logarithm of the deviation (of the mean) is the
same at every scale, and a density of free steps climbs it from the uniform one.

    python examples/functionals.py --output demo/course/functionals
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import sklearn.metrics
import sklearn.naive_bayes
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastelbo
from fastelbo.distributions import Categorical, Normal, kl_divergence

LINE = torch.linspace(-12, 12, 4001, dtype=torch.float64)
CELL, X, NOISE, THROWS, DRAWS = (LINE[1] - LINE[0]).item(), 1.3, 0.5, 10**6, 200_000
GRIDS = {"normal": LINE[::10], "exponential": torch.arange(0.005, 12, 0.01, dtype=torch.float64)}
TRUE = {"normal": lambda x: fastelbo.gaussian_log_prob(x, 0.0, 0.0), "exponential": lambda x: -x}


def normal(mean: float, deviation: float) -> Normal:
    """In double precision."""
    return Normal(*torch.tensor([mean, deviation], dtype=torch.float64))


def entropy(p: Tensor, cell: float | Tensor = CELL) -> Tensor:
    """-sum p ln p of densities over the last dimension."""
    return -torch.special.xlogy(p, p).sum(-1) * cell


def cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-sum p ln q over the line."""
    return -(p * log_q).sum(-1) * CELL


def slope(p: Tensor, ways: Tensor) -> Tensor:
    """How H changes from p along each of ways, by differences."""
    return (entropy(p + 1e-4 * ways) - entropy(p - 1e-4 * ways)) / 2e-4


def forms_of_the_bound(q: Normal) -> Tensor:
    """For z of a standard normal and x of N(sin(2 z) + z, NOISE): three ways to write the bound of X by q(z)."""
    likelihood = fastelbo.gaussian_log_prob(LINE.new_tensor(X), torch.sin(2 * LINE) + LINE, NOISE, scale="std")
    joint = likelihood + fastelbo.gaussian_log_prob(LINE, 0.0, 0.0)
    evidence, log_q = joint.logsumexp(0) + math.log(CELL), q.log_prob(LINE)
    density = log_q.exp()
    evidence_less_gap = evidence - cross_entropy(density, joint - evidence) + entropy(density)
    usual = -cross_entropy(density, likelihood) - kl_divergence(q, normal(0.0, 1.0))
    return torch.stack((q.entropy() - cross_entropy(density, joint), usual, evidence_less_gap))


def typical(share: float) -> tuple[float, float]:
    """Bits a throw of the count of the likeliest sequences of THROWS throws that hold 99 %; a throw's entropy."""
    heads, of = torch.arange(THROWS + 1).double(), torch.tensor(THROWS + 1).double()
    sequences = torch.lgamma(of) - torch.lgamma(heads + 1) - torch.lgamma(of - heads)
    mass = (sequences + heads * math.log(share) + (THROWS - heads) * math.log1p(-share)).exp().cumsum(0)
    bits = sequences[: int((mass < 0.99).sum()) + 1].logsumexp(0) / (THROWS * math.log(2))
    return bits.item(), -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def scale_of(x: Tensor, p: Tensor, kind: str) -> Tensor:
    """The deviation of a density of steps around x, or its mean."""
    mean = (p * x).sum() * (cell := x[1] - x[0])
    return mean if kind == "exponential" else ((p * (x - mean).square()).sum() * cell + cell**2 / 12).sqrt()


def most_entropy(x: Tensor, kind: str, steps: int) -> tuple[Tensor, Tensor]:
    """Climbs H - ln scale over all densities of steps around x; returns x and the density at a scale of 1."""
    logits, cell = torch.zeros_like(x).requires_grad_(), (x[1] - x[0]).item()
    optimizer = torch.optim.LBFGS([logits], 1, steps, None, 1e-12, 0, 50, "strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        (loss := scale_of(x, p := logits.softmax(0) / cell, kind).log() - entropy(p, cell)).backward()
        return loss

    optimizer.step(loss)
    p = logits.detach().softmax(0) / cell
    return x / (scale := scale_of(x, p, kind)), p * scale


def save_picture(path: Path, found: dict[str, tuple[Tensor, Tensor]], apart: Tensor, far: Tensor) -> None:
    """The densities of most entropy, and functionals of two normals that move apart."""
    *panels, last = Figure(figsize=(12, 3.4), layout="constrained").subplots(1, 3)
    for axes, (kind, (x, p)), fixed in zip(panels, found.items(), ("variance", "mean"), strict=True):
        axes.plot(x, TRUE[kind](x).exp(), "-", x[::3], p[::3], "k.", markersize=4)
        axes.set(title=f"{kind}: most entropy at a fixed {fixed}", xlim=(-4, 5))
    last.plot(apart, far, "-", apart, apart.square(), "-")
    last.set(title="two normals of deviation 0.1", xlabel="distance of their means", ylim=(0, 9))
    last.legend(["KL", "squared Wasserstein distance"])
    last.figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Adds up, climbs, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    first, second = normal(0.3, 0.8), normal(-0.5, 1.4)
    density, log_q = first.log_prob(LINE).exp(), second.log_prob(LINE)
    x, labels = sklearn.datasets.load_digits(return_X_y=True)
    guess = sklearn.naive_bayes.BernoulliNB(binarize=8).fit(x, labels).predict_proba(x)
    classes = Categorical((told := torch.eye(10).double()[labels]).mean(0))
    losses = [sklearn.metrics.log_loss(labels, by) for by in (guess, classes.probs.expand(told.shape))]
    kl_of_labels = kl_divergence(Categorical(told), Categorical(torch.tensor(guess))).mean()
    forms, kl = forms_of_the_bound(normal(0.7, 0.4)), kl_divergence(first, second)
    noise, mixed, u = torch.randn(20, len(LINE)).double(), (density + log_q.exp()) / 2, (LINE - 0.3) / 0.8
    ways = mixed * (noise - (noise @ mixed * CELL)[:, None])  # of sum 0
    off = (slope(mixed, ways) - ways @ -(mixed.log() + 1) * CELL).abs().max()
    fixed = torch.stack((u**0, u, (u**2 - 1) / math.sqrt(2)))  # sum, mean and variance, orthonormal for p
    level = slope(density, density * (noise - (noise * density) @ fixed.T @ fixed * CELL)).abs().max()
    found = {kind: most_entropy(x, kind, args.steps) for kind, x in GRIDS.items()}
    ends = [(entropy(p, x[1] - x[0]), (p - TRUE[kind](x).exp()).abs().max()) for kind, (x, p) in found.items()]
    drawn = [one.rsample((DRAWS,)).sort().values for one in (first, second)]
    far = kl_divergence(normal(0.0, 0.1), Normal(apart := torch.linspace(0, 3, 61).double(), 0.1))
    save_picture(args.output / "functionals.png", found, apart, far)
    print(f"The picture is {args.output / 'functionals.png'}")
    claims = [
        ("entropy of a normal by a sum; by fastelbo.distributions", entropy(density), first.entropy(), 1e-9),
        ("cross-entropy by a sum; gaussian_kl and entropy", cross_entropy(density, log_q), kl + first.entropy(), 1e-9),
        ("a classifier's log loss by scikit-learn; KL from the labels", losses[0], kl_of_labels, 1e-9),
        ("three forms of a bound, furthest apart", forms.max() - forms.min(), 0, 1e-9),
        ("digits that a constant guess is between; exp(entropy)", math.exp(losses[1]), classes.perplexity(), 1e-5),
        ("bits a throw to number 99 % of a million throws; entropy", *typical(0.1), 0.003),
        ("slopes of H, furthest from those of -(ln p + 1)", off, 0, 1e-6),
        ("steepest slope at a normal, its sum, mean and variance fixed", level, 0, 1e-6),
        ("most entropy at variance 1; a normal's", ends[0][0], normal(0.0, 1.0).entropy(), 1e-4),
        ("its density, furthest from a normal's", ends[0][1], 0, 1e-3),
        ("most entropy on the half line at mean 1; an exponential's", ends[1][0], 1, 1e-4),
        ("its density, furthest from an exponential's", ends[1][1], 0, 1e-3),
        ("squared Wasserstein distance by sorted draws; 0.8^2 + 0.6^2", (drawn[0] - drawn[1]).square().mean(), 1, 0.02),
        ("KL of two normals of deviation 0.1, 3 apart; 3^2 / 0.02", far[-1], 450, 1e-9),
    ]
    return [(what, float(found), float(true), within) for what, found, true, within in claims]


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
    add("--steps", type=int, default=300, help="of each climb (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/functionals", help="for the picture (default: %(default)s)")
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
