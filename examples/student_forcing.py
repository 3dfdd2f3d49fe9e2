"""Student forcing: an autoregressive model that is fed its own predictions in training learns pixels one by one.

Teacher forcing feeds the pixels of the data, and its best model is the data's distribution. Student forcing feeds what
the model draws, scheduled sampling the data's pixel with probability epsilon (Bengio et al. 2015, "Scheduled sampling
for sequence prediction with recurrent neural networks"). A fed pixel that says nothing of the data teaches how often
the next is white, no more. For a Markov chain the end is known, and all its images are summed over.

    python examples/student_forcing.py --output demo/course/student_forcing
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler

WIDTH, DRAWS, EPSILONS = 8, 20000, (1.0, 0.5, 0.0)
IMAGES = torch.cartesian_prod(*[torch.tensor([0, 1])] * WIDTH)  # of the chain, one a row
AFTER, WHITE = torch.tensor([0.1, 0.8], dtype=torch.float64), 1 / 3  # p(white | last pixel), and p(white) of any pixel
P = (1 - IMAGES - F.pad(AFTER[IMAGES[:, :-1]], (1, 0), value=WHITE)).abs().prod(1)  # of every image


class PixelCNN(nn.Module):
    """From images of 0 and 1 to the logit of each pixel's being white, given those before it."""

    def __init__(self, height: int, width: int, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.places = nn.Sequential(*layers), nn.Parameter(torch.zeros(1, 1, height, width))
        self.scales = nn.Parameter(torch.ones(1, 1, height, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.layers(x) * self.scales + self.places


@torch.no_grad()
def fed(model: nn.Module, epsilon: float) -> Tensor:
    """p(image, what is fed in its place), [fed, images]: each pixel is the data's or the model's draw."""
    white = model(IMAGES.double().view(-1, 1, 1, WIDTH)).sigmoid().view(-1, 1, WIDTH)
    drawn = torch.where(IMAGES[:, None] == 1, white, 1 - white)
    return P * (epsilon * (IMAGES[:, None] == IMAGES) + (1 - epsilon) * drawn).prod(2)


def fit_chain(epsilon: float) -> tuple[nn.Module, float]:
    """The network to which scheduled sampling converges, with all sums exact, and its KL(p || q)."""
    model, x = PixelCNN(1, WIDTH, MaskedConv2d(1, 1, 3, mask_type="A")).double(), IMAGES.double().view(-1, 1, 1, WIDTH)
    for _ in range(WIDTH):  # a pixel's best answer depends on those before it
        often, white = (weights := fed(model, epsilon)).sum(1)[:, None], weights @ x.view(-1, WIDTH)
        optimizer = torch.optim.LBFGS(model.parameters(), 1, 300, None, 1e-10, 0, line_search_fn="strong_wolfe")

        def loss(optimizer=optimizer, often: Tensor = often, white: Tensor = white) -> Tensor:
            optimizer.zero_grad()
            logits = model(x).view(-1, WIDTH)
            (total := (often * F.softplus(logits) - white * logits).sum()).backward()
            return total

        optimizer.step(loss)
    log_q = -F.binary_cross_entropy_with_logits(model.requires_grad_(False)(x), x, reduction="none").sum((1, 2, 3))
    return model, (P * (P.log() - log_q)).sum().item()


def kl_of_the_limit(epsilon: float) -> float:
    """KL(p || q) where a fed pixel has the correlation r with the data's: q(white | a) = p(white) + slope r (a - p)."""
    r, total, slope = epsilon, 0.0, AFTER[1] - AFTER[0]
    for _ in range(WIDTH - 1):
        q = WHITE + slope * r * (torch.arange(2).double() - WHITE)
        each = AFTER * (AFTER / q).log() + (1 - AFTER) * ((1 - AFTER) / (1 - q)).log()
        total, r = total + (1 - WHITE) * each[0] + WHITE * each[1], epsilon + (1 - epsilon) * (slope * r) ** 2
    return float(total)


def bits(model: nn.Module, given: Tensor, images: Tensor) -> Tensor:
    """Per pixel of images, the network being fed with other ones or the same."""
    return F.binary_cross_entropy_with_logits(model(given.float()), images.float()) / math.log(2)


def train(images: Tensor, epsilon: float, epochs: int, seed: int) -> tuple[nn.Module, Tensor]:
    """On digits, each fed pixel being the data's with probability epsilon, or a draw; and draws of what comes out."""
    torch.manual_seed(seed)
    middle = [MaskedConv2d(16, 16, 3, mask_type="B", activation="elu") for _ in range(2)]
    model = PixelCNN(8, 8, MaskedConv2d(1, 16, 7, activation="elu"), *middle, MaskedConv2d(16, 1, 1, mask_type="B"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
    for epoch in tqdm(range(epochs), f"epsilon {epsilon}", unit="epoch", disable=None):
        sampler = IncrementalSampler(model, (1, 8, 8), levels=2, check=epoch == 0)
        given = sampler.sample(len(images), seed=epoch, init=images, mask=torch.rand(images.shape) < epsilon)
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            bits(model, given[batch], images[batch]).backward()
            optimizer.step()
    model.requires_grad_(False)
    return model, IncrementalSampler(model, (1, 8, 8), levels=2).sample(2000, seed=seed)


def save_picture(path: Path, fits: dict[float, tuple], drawn: tuple[Tensor, ...]) -> None:
    """KL against epsilon, and digits drawn."""
    panels = Figure(figsize=(13, 3.4), layout="constrained").subplots(1, 4)
    panels[0].plot(line := [k / 50 for k in range(51)], [kl_of_the_limit(epsilon) for epsilon in line])
    panels[0].plot(list(fits), [kl for _, kl in fits.values()], "ko")
    panels[0].set(title="A chain: line by the formula", xlabel="epsilon", ylabel="KL(p || q), nats")
    for axes, epsilon, images in zip(panels[1:], EPSILONS, drawn, strict=True):
        axes.imshow(F.pad(images[:20, 0], (1, 1, 1, 1)).view(4, 5, 10, 10).transpose(1, 2).reshape(40, 50), cmap="gray")
        axes.set(title=f"drawn, epsilon {epsilon}", xticks=[], yticks=[])
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Fits the chain by sums, digits by draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    fits = {epsilon: fit_chain(epsilon) for epsilon in EPSILONS}
    known = IMAGES[torch.multinomial(P, DRAWS, replacement=True)].view(-1, 1, 1, WIDTH)
    sampler, mask = IncrementalSampler(fits[0.5][0], (1, 1, WIDTH), levels=2), torch.rand(known.shape) < 0.5
    chain = sampler.sample(DRAWS, seed=args.seed, init=known, mask=mask).view(-1, WIDTH)
    count = torch.bincount((chain * 2 ** torch.arange(WIDTH - 1, -1, -1)).sum(1), minlength=len(IMAGES))
    expected = DRAWS * fed(fits[0.5][0], 0.5).sum(1)
    off = ((count - expected) / (expected * (1 - expected / DRAWS)).sqrt())[expected > 5].abs().max().item()
    test, images = torch.tensor(load_digits().images)[torch.randperm(1797), None].gt(8).long().split([300, 1497])
    networks, drawn = zip(*(train(images, epsilon, args.epochs, args.seed) for epsilon in EPSILONS), strict=True)
    found = [bits(model, test, test).item() for model in networks]
    blind = [bits(model, own[:300], test).item() for model, own in zip(networks, drawn, strict=True)]
    alone = F.binary_cross_entropy(((images.sum(0) + 1) / 1499).expand(test.shape), test.float()).item() / math.log(2)
    apart = drawn[2].double() - drawn[2].double().mean(0)
    save_picture(args.output / "student_forcing.png", fits, drawn)
    print(f"The picture is {args.output / 'student_forcing.png'}")
    return [
        ("chain, teacher forcing: KL of p to the model, nats", fits[1.0][1], 0, 1e-9),
        ("chain, student forcing: KL; of independent pixels", fits[0.0][1], kl_of_the_limit(0), 1e-6),
        ("chain, epsilon 0.5: KL; by correlations", fits[0.5][1], kl_of_the_limit(0.5), 1e-6),
        ("what the sampler feeds: standard errors off, of all images", off, 4.5, "at most"),
        ("digits, teacher forcing: bits per pixel; epsilon 0.5", found[0], found[1], "at most"),
        ("epsilon 0.5; student forcing", found[1], found[2], "at most"),
        ("student forcing; independent pixels", found[2], alone, 0.02),
        ("fed with own draws, which it was trained for; teacher forcing", blind[2], blind[0], "at most"),
        ("covariance of neighbours in its draws", (apart[..., 1:] * apart[..., :-1]).mean().item(), 0, 0.003),
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
    add("--epochs", type=int, default=20, help="of each network of digits (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/student_forcing", help="for the picture (default: %(default)s)")
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
