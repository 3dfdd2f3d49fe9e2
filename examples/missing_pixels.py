"""What hidden pixels may be, by a PixelCNN: the posterior by counting all fillings, draws, and a bound with its q.

Of twelve hidden black or white pixels there are 4096 fillings, so that ln p(seen), the posterior and what the sampler
draws are sums. The sampler draws pixels in raster order, p(pixel | those before it), and does not look ahead; weighted
by p(seen pixel | those before it) its draws are of the posterior. A bound has a q: here one Bernoulli for each hidden
pixel, with exact gradients or by the score function (Williams 1992, "Simple statistical gradient-following algorithms
for connectionist reinforcement learning").

    python examples/missing_pixels.py --output demo/course/missing_pixels
"""

import argparse
import copy
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler

HIDDEN = torch.zeros(8, 8, dtype=torch.bool)
HIDDEN[3:6, 2:6] = True  # pixels below them are seen
FILLINGS = torch.cartesian_prod(*[torch.tensor([0, 1])] * 12)  # a filling a row
ONES, PLACES, DRAWS = FILLINGS.double(), 2 ** torch.arange(11, -1, -1), 20000


def pixelcnn(channels: int = 16) -> nn.Sequential:
    """From images [N, 1, 8, 8] of 0 and 1 to the logit of each pixel's being white, given those before it."""
    first = MaskedConv2d(1, channels, 7, mask_type="A", activation="elu")
    layers = [MaskedConv2d(channels, channels, 3, mask_type="B", activation="elu") for _ in range(2)]
    return nn.Sequential(first, *layers, MaskedConv2d(channels, 1, 1, mask_type="B"))


def log_probs(model: nn.Module, images: Tensor) -> Tensor:
    """ln p(pixel | those before it), [N, 8, 8], in double precision."""
    return -F.binary_cross_entropy_with_logits(model(images), images, reduction="none")[:, 0].double()


def train(images: Tensor, epochs: int) -> nn.Module:
    """Maximises the likelihood of images."""
    optimizer = torch.optim.Adam((model := pixelcnn()).parameters(), 1e-2, fused=True)
    for _ in tqdm(range(epochs), unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            (-log_probs(model, images[batch]).mean()).backward()
            optimizer.step()
    return model.requires_grad_(False)


def log_bernoullis(logits: Tensor) -> Tensor:
    """ln q of every filling, its pixels independent."""
    return (ONES * logits - F.softplus(logits)).sum(1)


def bound(log_joint: Tensor, logits: Tensor) -> Tensor:
    """ELBO of independent pixels, summed over all fillings."""
    log_q = log_bernoullis(logits)
    return (log_q.exp() * (log_joint - log_q)).sum()


def best_bernoullis(log_joint: Tensor, sweeps: int) -> Tensor:
    """Logits of the q each of whose pixels is the best there is, given the others."""
    logits = torch.zeros(12, dtype=log_joint.dtype)
    for _ in range(sweeps):
        for pixel in range(12):
            logits[pixel] = 0  # q is even there
            logits[pixel] = 2 * (log_bernoullis(logits).exp() * log_joint * (2 * ONES[:, pixel] - 1)).sum()
    return logits


def score_function(log_joint: Tensor, logits: Tensor, draws: int, tries: int) -> tuple[Tensor, Tensor]:
    """Estimates of the bound's gradient, [tries, 12], without a baseline, and with the other draws' mean as one."""
    h = torch.bernoulli(logits.sigmoid().expand(tries, draws, -1))
    number = (h.long() * PLACES).sum(-1)
    value, score = (log_joint - log_bernoullis(logits))[number][..., None], h - logits.sigmoid()
    others = (value.sum(1, keepdim=True) - value) / (draws - 1)
    return (value * score).mean(1), ((value - others) * score).mean(1)


def save_picture(path: Path, image: Tensor, beliefs: dict[str, Tensor]) -> None:
    """The image, and what is thought of its hidden pixels."""
    panels = Figure(figsize=(11, 2.6), layout="constrained").subplots(1, len(beliefs))
    for axes, (title, belief) in zip(panels, beliefs.items(), strict=True):
        axes.imshow(image.double().masked_scatter(HIDDEN, belief.double()), cmap="gray", vmin=0, vmax=1)
        axes.set(title=title, xticks=[], yticks=[])
    panels[0].figure.savefig(path, dpi=100)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains, counts, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    images = torch.tensor(sklearn.datasets.load_digits().images)[torch.randperm(1797), None].gt(8).float()
    model, image = train(images[1:], args.epochs), images[:1]
    fillings = image.repeat(4096, 1, 1, 1)
    fillings[:, 0, HIDDEN] = FILLINGS.float()
    of_pixels = log_probs(model, fillings)
    log_joint, drawn = of_pixels.sum((1, 2)), of_pixels[:, HIDDEN].sum(1).exp()
    log_seen, posterior = log_joint.logsumexp(0), log_joint.softmax(0)
    in_double = log_probs(copy.deepcopy(model).double(), fillings.double()).sum((1, 2)).softmax(0)
    init = image.long().expand(DRAWS, -1, -1, -1)
    draws = IncrementalSampler(model, (1, 8, 8), levels=2).sample(DRAWS, seed=args.seed, init=init, mask=~HIDDEN)
    number = (draws[:, 0, HIDDEN] * PLACES).sum(1)
    count, often = torch.bincount(number, minlength=4096).double(), drawn * DRAWS >= 5
    found, expected = (torch.cat((n[often], n[~often].sum()[None])) for n in (count, drawn * DRAWS))  # rare ones as one
    chi_squared, half = ((found - expected).square() / expected).sum(), torch.tensor((len(found) - 1) / 2)
    p_value = torch.special.gammaincc(half.double(), chi_squared / 2).item()
    weights = of_pixels[:, ~HIDDEN].sum(1).exp()[number]
    off = (weights.mean() - log_seen.exp()).abs() / (weights.std() / DRAWS**0.5)
    logits = best_bernoullis(log_joint, 100)
    log_q = log_bernoullis(logits)
    best, kl = bound(log_joint, logits), (log_q.exp() * (log_q - posterior.log())).sum()
    even = torch.zeros_like(logits)
    slope, steep = (torch.func.grad(bound, 1)(log_joint, at) for at in (logits, even))
    plain, less = score_function(log_joint, even, 4, 20000)
    apart = [((g.mean(0) - steep) / (g.std(0) / len(g) ** 0.5)).abs().max().item() for g in (plain, less)]
    ratio = less.var(0).sum() / plain.var(0).sum()
    beliefs = {"the image": image[0, 0, HIDDEN], "what is seen": torch.full((12,), 0.5)}
    beliefs |= {"p(white | seen)": posterior @ ONES, "the sampler's": drawn @ ONES, "best Bernoullis": logits.sigmoid()}
    save_picture(args.output / "missing_pixels.png", image[0, 0], beliefs)
    print(f"The picture is {args.output / 'missing_pixels.png'}")
    return [
        ("posteriors of fillings in float32 beside float64", (posterior - in_double).abs().max().item(), 0, 1e-6),
        ("sum of the sampler's probabilities of all fillings", drawn.sum().item(), 1, 1e-6),
        ("its frequencies: p-value of chi-squared", p_value, 0.001, "at least"),
        ("p(seen) by its weighted draws: standard errors off", off.item(), 4, "at most"),
        ("gap of the best Bernoullis; their KL to the posterior", (log_seen - best).item(), kl.item(), 1e-6),
        ("largest slope of the bound where they are", slope.abs().max().item(), 0, 1e-6),
        ("their bound; that of all pixels at 0.5", best.item(), bound(log_joint, even).item(), "at least"),
        ("their bound; that of all white", best.item(), log_joint[-1].item(), "at least"),
        ("score function: standard errors off the exact gradient", apart[0], 4.5, "at most"),
        ("with the other draws' mean as its baseline", apart[1], 4.5, "at most"),
        ("variance with the baseline over that without", ratio.item(), 0.5, "at most"),
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
    add("--epochs", type=int, default=15, help="of the PixelCNN (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/missing_pixels", help="for the picture (default: %(default)s)")
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
