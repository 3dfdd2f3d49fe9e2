"""A VAE fills in what is hidden, and rejects what it does not know: its bounds beside a linear model's exact answers.

With a mask the likelihood is that of the seen pixels, and a q of an image that climbs its bound knows what the rest may
be. For a linear decoder (probabilistic PCA) all is Gaussian: what is hidden given what is seen, the gap of the best
diagonal q; an encoder loses nothing. A nonlinear one does, its amortisation gap. What is strange has a low bound.

    python examples/completion.py --output demo/course/completion
"""

import argparse
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from tqdm import tqdm

import fastelbo

LATENTS, HIDDEN, TESTS = 12, 128, 200
ALL, SEEN = torch.ones(64, dtype=torch.bool), torch.arange(64) < 32  # the upper half


class Linear:
    """The best linear decoder of data, from eigenvalues, and the best encoder for it, both in closed form."""

    def __init__(self, x: Tensor) -> None:
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        noise = values[:-LATENTS].mean()
        self.weight, self.centre = vectors[:, -LATENTS:] * (values[-LATENTS:] - noise).sqrt(), x.mean(0)
        self.x_logvar, self.covariance = noise.log(), self.weight @ self.weight.T + noise * torch.eye(64).double()

    def best(self, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The best diagonal q, [2, N, latents], and the gap that it leaves."""
        weight = self.weight[seen]
        precision = torch.eye(LATENTS).double() + weight.T @ weight * torch.exp(-self.x_logvar)
        mean = torch.linalg.solve(precision, weight.T @ (x - self.centre)[:, seen].T * torch.exp(-self.x_logvar)).T
        log_diagonal = precision.diag().log()
        return torch.stack((mean, -log_diagonal.expand_as(mean))), (log_diagonal.sum() - precision.logdet()) / 2

    def bound(self, x: Tensor, q: Tensor, seen: Tensor) -> Tensor:
        """Of each image's seen pixels, without draws."""
        spread = q[1].exp() @ self.weight[seen].square().sum(0) * torch.exp(-self.x_logvar) / 2
        nll = fastelbo.gaussian_nll(x, q[0] @ self.weight.T + self.centre, self.x_logvar, mask=seen)
        return -nll - spread - fastelbo.gaussian_kl(*q)


class VAE(nn.Module):
    """An encoder and a decoder with a hidden layer each, and one deviation for all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 64), nn.Sigmoid())
        self.x_logvar = nn.Parameter(torch.tensor(-3.0))

    def encode(self, x: Tensor) -> Tensor:
        """Means and log-variances of q, [2, N, latents]."""
        return self.encoder(x).view(-1, 2, LATENTS).transpose(0, 1)

    def log_weights(self, x: Tensor, q: Tensor, seen: Tensor, seed, draws: int = 1) -> Tensor:
        """ln p(seen pixels, z) / q(z) of draws of z, [draws, N]; their mean is the bound."""
        z, log_q = fastelbo.gaussian_rsample_log_prob(*q, num_samples=draws, seed=seed, event_ndim=1)
        log_p = fastelbo.gaussian_log_prob(x, self.decoder(z), self.x_logvar, mask=seen, event_ndim=1)
        return log_p + fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1) - log_q


def train(x: Tensor, epochs: int) -> VAE:
    """Maximises the bound."""
    optimizer = torch.optim.Adam((model := VAE()).parameters(), 2e-3, fused=True)
    for _ in tqdm(range(epochs), "VAE", unit="epoch", disable=None):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            (-model.log_weights(x[batch], model.encode(x[batch]), ALL, torch.randint(2**62, (1,))).mean()).backward()
            optimizer.step()
    return model.requires_grad_(False)


def infer(bound, start: Tensor, steps: int, rate: float = 0.1) -> Tensor:
    """A q for each image, from where it starts to where bound(q, step) is greatest."""
    optimizer = torch.optim.Adam([q := start.clone().requires_grad_()], fused=True)
    for step in tqdm(range(steps), "one q an image", unit="step", disable=None):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) ** 2
        (-bound(q, step).sum()).backward()
        optimizer.step()
    return q.detach()


def save_picture(path: Path, rows: list[Tensor]) -> None:
    """Images, what is seen of them, and fillings."""
    axes = Figure(figsize=(9, 4), layout="constrained").subplots()
    sheet = torch.stack([row[:14].view(14, 8, 8).clamp(0, 1) for row in rows])
    axes.imshow(nn.functional.pad(sheet, (1, 1, 1, 1), value=0.5).transpose(1, 2).reshape(-1, 140), cmap="gray")
    axes.set(xticks=[], yticks=range(4, 50, 10), yticklabels=["digits", "seen", "linear", "VAE", "a draw"])
    axes.figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Fits, fills, rejects; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    test, x = (torch.tensor(load_digits().data)[torch.randperm(1797)] / 16).split([TESTS, 1797 - TESTS])
    linear, vae, test32 = Linear(x), train(x.float(), args.epochs), test.float()
    centre, normal = linear.centre, MultivariateNormal(linear.centre, linear.covariance)
    few = infer(lambda q, _: linear.bound(test, q, SEEN), torch.zeros(2, TESTS, LATENTS).double(), 500, 0.2)
    rows = linear.covariance[SEEN]
    exact = centre + (test - centre)[:, SEEN] @ torch.linalg.solve(rows[:, SEEN], rows)
    wrong = (few[0] @ linear.weight.T + centre - exact)[:, ~SEEN].abs().max().item()
    gap = MultivariateNormal(centre[SEEN], rows[:, SEEN]).log_prob(test[:, SEEN]) - linear.bound(test, few, SEEN)
    slope = torch.func.grad(lambda q: linear.bound(test, q, ALL).sum())(linear.best(test, ALL)[0]).abs().max().item()
    seen = infer(lambda q, step: vae.log_weights(test32, q, SEEN, step, 4).mean(0), torch.zeros_like(few).float(), 250)
    draws = vae.decoder(fastelbo.gaussian_rsample(*seen, num_samples=200, seed=args.seed))
    fillings = [torch.where(SEEN, test, y) for y in (exact, draws.mean(0), draws[0])]
    errors = [(y - test)[:, ~SEEN].square().mean().sqrt().item() for y in fillings]
    save_picture(args.output / "completion.png", [test, torch.where(SEEN, test, 0.5), *fillings])
    best = infer(lambda q, step: vae.log_weights(test32, q, ALL, step, 4).mean(0), vae.encode(test32), 250)
    coded, weights = (vae.log_weights(test32, q, ALL, args.seed, 300) for q in (vae.encode(test32), best))
    gap, nats = gap.mean().item(), [part.mean().item() for part in (coded, weights)]
    tightest = fastelbo.importance_weighted_log_likelihood(weights).mean().item()
    photograph, areas = torch.tensor(load_sample_image("china.jpg")).double().mean(2) / 255, []
    patches = photograph.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64)[:: 4240 // TESTS][:TESTS]
    for strange in (patches, test.view(-1, 8, 8).flip(2).flatten(1)):
        y = torch.cat((test, strange))
        weights = vae.log_weights(y.float(), vae.encode(y.float()), ALL, args.seed, 100)
        of_y = linear.bound(y, linear.best(y, ALL)[0], ALL), normal.log_prob(y), weights.mean(0), weights.logsumexp(0)
        areas.append([roc_auc_score([0] * TESTS + [1] * TESTS, -score) for score in of_y])
    print(f"The picture is {args.output / 'completion.png'}")
    return [
        ("linear: hidden pixels by one q an image, less the exact means", wrong, 0, 1e-6),
        ("linear: gap of the best diagonal q of what is seen; formula", gap, linear.best(test, SEEN)[1].item(), 1e-8),
        ("linear: largest slope of the bound where its encoder is", slope, 0, 1e-8),
        ("error of hidden pixels, root of mean square: VAE; linear", errors[1], errors[0], "at most"),
        ("VAE, nats an image: by its encoder; by one q an image", *nats, "at most"),
        ("by one q an image; importance-weighted", nats[1], tightest, "at most"),
        ("linear: area under the curve, photograph: bound; evidence", areas[0][0], areas[0][1], 1e-9),
        ("mirrored digits: VAE, by its bound; linear", areas[1][2], areas[1][1], "at least"),
        ("VAE, importance-weighted; linear", areas[1][3], areas[1][1], "at least"),
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
    add("--epochs", type=int, default=60, help="of the VAE (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/completion", help="for the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.epochs < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs must be 1 or more, --seed from 0 to 2**63 - 1")
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
