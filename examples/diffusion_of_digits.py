"""A diffusion of digits, in bits: its bound beside independent pixels, and beside a denoiser that knows all by heart.

Where x_t is a_t x_0 and noise, a denoiser has shares of the 17 levels of each pixel. Their mean stands for x_0 in
q(x_t-1 | x_t, x_0), and the true level's share is the likelihood of the last step back. The bound is L_0 + sum_t
KL(q(x_t-1 | x_t, x_0) || p(x_t-1 | x_t)) + L_T (Ho et al. 2020, "Denoising diffusion probabilistic models"). Two
denoisers are closed forms: pixel by pixel, which must come to histograms' bits, and by heart, a softmax over N training
images, which is the best for them and must come to ln N.

    python examples/diffusion_of_digits.py --output demo/course/diffusion_of_digits
"""

import argparse
import math
import tempfile
from functools import partial
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo

GREYS, STEPS = torch.arange(17) / 8 - 1, 100  # values of the levels
BIT = 64 * math.log(2)  # nats of an image for a bit each pixel


def schedule(steps: int) -> tuple[list[float], list[float]]:
    """a_t and variance 1 - a_t^2 for t from 0, where there is no noise; a_t^2 / variance falls by even factors."""
    log_snr = torch.linspace(6, -6, steps, dtype=torch.float64)
    return [1.0, *log_snr.sigmoid().sqrt().tolist()], [0.0, *(-log_snr).sigmoid().tolist()]


def by_pixel(log_share: Tensor, x: Tensor, a: float, var: float) -> Tensor:
    """ln p of each level given noisy images x, [N, 64, 17], from shares of levels [64, 17]."""
    return (log_share - (x[..., None] - a * GREYS).square() / (2 * var)).log_softmax(-1)


def by_heart(levels: Tensor, x: Tensor, a: float, var: float) -> Tensor:
    """The same if only certain images can be, of levels as one-hots [M, 64, 17]."""
    known = levels @ GREYS
    share = ((x @ known.T - a * known.square().sum(1) / 2) * a / var).softmax(1)
    return (share @ levels.flatten(1)).unflatten(1, (64, 17)).log()


def by_network(network: nn.Module, log_share: Tensor, x: Tensor, a: float, var: float) -> Tensor:
    """The same as pixel by pixel, and what a network adds."""
    log_p = by_pixel(log_share, x, a, var)
    seen = torch.cat((x, log_p.exp() @ GREYS, x.new_full((len(x), 1), math.log(a**2 / var) / 6)), dim=1)
    return (log_p + network(seen).unflatten(1, (64, 17))).log_softmax(-1)


def back(t: int, x_t: Tensor, x_0: Tensor, a: list[float], var: list[float]) -> tuple[Tensor, float]:
    """Mean and variance of q(x_t-1 | x_t, x_0)."""
    r = a[t] / a[t - 1]
    return (r * var[t - 1] * x_t + a[t - 1] * (1 - r**2) * x_0) / var[t], var[t - 1] * (1 - r**2) / var[t]


def term(denoiser, t: int, x_t: Tensor, images: Tensor, a: list[float], var: list[float]) -> tuple[Tensor, Tensor]:
    """L_t-1 of each image, and x_0 as the denoiser guesses it."""
    guess = (log_p := denoiser(x_t, a[t], var[t])).exp() @ GREYS
    if t == 1:
        return -log_p.gather(2, images[..., None]).sum((1, 2)), guess
    q, p = back(t, x_t, GREYS[images], a, var), back(t, x_t, guess, a, var)
    return fastelbo.gaussian_kl(*q, *p, scale="var", scale_p="var", event_ndim=1), guess


def bound(denoiser, images: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Terms L_0 to L_T [T + 1, N]; log-ratios of the same chains, whose mean is theirs; guesses of x_0 [T, N, 64]."""
    (a, var), below, terms, guesses, ratio = schedule(steps), GREYS[images], [], [], torch.zeros(len(images))
    for t in range(1, steps + 1):
        r = a[t] / a[t - 1]
        x_t, log_q = fastelbo.gaussian_rsample_log_prob(r * below, 1 - r**2, scale="var", seed=t)
        nll, guess = term(denoiser, t, x_t, images, a, var)
        ratio += log_q + (nll if t == 1 else fastelbo.gaussian_nll(below, *back(t, x_t, guess, a, var), scale="var"))
        below, terms, guesses = x_t, [*terms, nll], [*guesses, guess]
    terms.append(fastelbo.gaussian_kl(a[-1] * GREYS[images], var[-1], scale="var"))
    return torch.stack(terms), ratio - fastelbo.gaussian_log_prob(below, 0.0, 0.0), torch.stack(guesses)


def train(denoiser, network: nn.Module, images: Tensor, epochs: int) -> None:
    """Minimises the bound, a random step for each batch."""
    (a, var), optimizer = schedule(STEPS), torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    for _ in tqdm(range(epochs), "network", unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(32):
            t = int(torch.randint(1, STEPS + 1, ()))
            x_t = fastelbo.gaussian_rsample(a[t] * GREYS[images[batch]], var[t], scale="var")
            optimizer.zero_grad()
            term(denoiser, t, x_t, images[batch], a, var)[0].mean().backward()
            optimizer.step()
    network.requires_grad_(False)


def draw(denoiser, count: int) -> Tensor:
    """Images, [count, 64], by the way back."""
    (a, var), x = schedule(STEPS), torch.randn(count, 64)
    for t in range(STEPS, 1, -1):
        x = fastelbo.gaussian_rsample(*back(t, x, denoiser(x, a[t], var[t]).exp() @ GREYS, a, var), scale="var")
    return torch.distributions.Categorical(logits=denoiser(x, a[1], var[1])).sample()


def save_picture(path: Path, terms: tuple[Tensor, ...], images: Tensor) -> None:
    """What each step adds to the bound, and images drawn."""
    left, right = Figure(figsize=(12, 4.5), layout="constrained").subplots(1, 2)
    for name, bits in zip(("independent pixels", "network", "by heart, of images known"), terms, strict=True):
        left.plot(bits.mean(1) / BIT, label=f"{name}: {bits.sum(0).mean() / BIT:.2f}")
    left.set(title="Bits per pixel of each step, and in all", xlabel="t", ylim=(0, 0.06))
    left.legend()
    right.imshow(F.pad(images.view(6, 12, 8, 8), (1, 1, 1, 1), value=5).transpose(1, 2).reshape(60, 120), cmap="gray")
    right.set(title="Images drawn by the way back", xticks=[], yticks=[])
    left.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains a denoiser, adds up the bounds of three; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    test, images = torch.tensor(sklearn.datasets.load_digits().data).long()[torch.randperm(1797)].split([300, 1497])
    levels, some, snr = F.one_hot(images, 17).float(), images[:200], torch.linspace(6, -6, STEPS).exp()
    log_share = torch.log((levels.sum(0) + 1 / 17) / (len(images) + 1))
    network = nn.Sequential(nn.Linear(129, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1088))
    train(learned := partial(by_network, network, log_share), network, images, args.epochs)
    exact = -log_share.gather(1, test.T).sum(0).mean().item() / BIT
    (once, *_), (twice, *_) = (bound(partial(by_pixel, log_share), test, steps) for steps in (STEPS, 2 * STEPS))
    seen, ratio, _ = bound(learned, test, STEPS)
    (terms, _, guesses), (least, _, best) = (bound(one, some, STEPS) for one in (learned, partial(by_heart, levels)))
    off = (terms - least)[1:-1].sum(0) - (snr[:-1] - snr[1:]) / 2 @ (guesses - best)[1:].square().sum(2)
    apart = [(d.mean().abs() / d.std() * len(d) ** 0.5).item() for d in (seen.sum(0) - ratio, off)]  # standard errors
    save_picture(args.output / "diffusion_of_digits.png", (once, seen, least), draw(learned, 72))
    print(f"The picture is {args.output / 'diffusion_of_digits.png'}")
    nats = [each.sum(0).mean().item() for each in (once, twice, seen, least, terms)]
    return [
        ("independent pixels: bits per pixel of test images; uniform", exact, math.log2(17), "at most"),
        ("their diffusion, from 100 and 200 steps to endless; the same", (2 * nats[1] - nats[0]) / BIT, exact, 0.05),
        ("network in 100 steps; independent pixels", nats[2] / BIT, exact, "at most"),
        ("its bound by KLs; by log-ratios: standard errors apart", apart[0], 4, "at most"),
        ("by heart: nats of training images; ln 1497, the least there is", nats[3], math.log(1497), 1.5),
        ("network: nats of training images; by heart", nats[4], nats[3], "at least"),
        ("what it loses; its guesses' distance: standard errors apart", apart[1], 4, "at most"),
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
    add("--epochs", type=int, default=60, help="of the network (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/diffusion_of_digits", help="for the picture (default: %(default)s)")
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
