"""A density of images that can be counted out: PixelCNNs of all 65,536 black and white images of 4x4 pixels, by class.

All images compete for a mass of 1, which the sum over every one of them must be, for each class. Bayes' rule makes of
p(image | class) a classifier; the entropy of the model is a sum, too, and the sampler's draws must have as many bits.
Images that are too unlikely can be rejected: digits on their side, and noise. The images are shrunken digits.

    python examples/density.py --output demo/course/density
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import sklearn.metrics
import sklearn.naive_bayes
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler

PLACES, CHANNELS, DRAWS = 2 ** torch.arange(15, -1, -1), 12, 20000


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [N, 1, 4, 4] of 0 and 1, in a random order, and their classes."""
    digits = sklearn.datasets.load_digits()
    order = torch.randperm(len(digits.target))
    small = F.interpolate(torch.tensor(digits.images[:, None, :, 1:7]), size=(4, 4), mode="area")[order]
    return (small > 8).float(), torch.tensor(digits.target)[order]


class PixelCNN(nn.Module):
    """The logit of each pixel's being white, given those before it and the class."""

    def __init__(self) -> None:
        super().__init__()
        first = MaskedConv2d(1, CHANNELS, 5, mask_type="A", activation="elu")
        second = MaskedConv2d(CHANNELS, CHANNELS, 3, mask_type="B", activation="elu")
        self.layers = nn.ModuleList([first, second, MaskedConv2d(CHANNELS, 1, 1, mask_type="B")])
        self.classes = nn.ModuleList(nn.Linear(10, size, bias=False) for size in (CHANNELS, CHANNELS, 1))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """From images [N, 1, 4, 4] and one-hot classes [N, 10] to logits [N, 1, 4, 4]."""
        for layer, embedded in zip(self.layers, self.classes, strict=True):
            images = layer(images, embedded(classes))
        return images

    def log_prob(self, images: Tensor, classes: Tensor) -> Tensor:
        """ln p(image | class), [N], its terms in double precision."""
        logits = self(images, F.one_hot(classes, 10).float()).double()
        return -F.binary_cross_entropy_with_logits(logits, images.double(), reduction="none").sum((1, 2, 3))


def train(images: Tensor, classes: Tensor, epochs: int) -> PixelCNN:
    """Maximises the likelihood."""
    model = PixelCNN()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            (-model.log_prob(images[batch], classes[batch]).mean()).backward()
            optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def count_all(model: PixelCNN, classes: int = 10) -> Tensor:
    """ln p(image | class) of every image, [65536, classes]."""
    parts, table = (torch.arange(2**16)[:, None] // PLACES % 2).float().view(-1, 1, 4, 4).split(4096), []
    for label in tqdm(range(classes), "all images", unit="class", disable=None):
        table.append(torch.cat([model.log_prob(part, torch.full((len(part),), label)) for part in parts]))
    return torch.stack(table, dim=1)


def save_picture(path: Path, log_p: Tensor, bits: dict[str, Tensor]) -> None:
    """The likeliest images of each class, and how likely test images and outliers are."""
    left, right = Figure(figsize=(12, 4), layout="constrained").subplots(1, 2)
    images = (log_p.topk(8, dim=0).indices.T[..., None] // PLACES % 2).view(10, 8, 4, 4).float()
    left.imshow(F.pad(images, (0, 1, 0, 1), value=0.5).permute(1, 2, 0, 3).reshape(40, 50), cmap="gray")
    left.set(title="The likeliest images of each class", xticks=range(2, 50, 5), xticklabels=range(10), yticks=[])
    for name, of_images in bits.items():
        right.hist(of_images.tolist(), bins=range(0, 40), density=True, alpha=0.5, label=name)
    right.set(title="Bits of an image", xlabel="-log2 p(image)")
    right.legend()
    left.figure.savefig(path, dpi=90)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains, counts, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    images, classes = load_digits()
    train_images, train_classes, test, test_classes = images[300:], classes[300:], images[:300], classes[:300]
    model = train(train_images, train_classes, args.epochs)
    log_p = count_all(model)
    joint = log_p + torch.bincount(train_classes).div(len(train_classes)).log()
    all_bits = -joint.logsumexp(1) / math.log(2)  # of p(image)
    entropy = (torch.exp2(-all_bits) * all_bits).sum()

    known = F.one_hot(torch.multinomial(joint.exp().sum(0), DRAWS, replacement=True), 10).float()
    draws = IncrementalSampler(model, (1, 4, 4), levels=2, conditional=True).sample(DRAWS, known, seed=args.seed)
    strange = {"test images": test, "on their side": test.rot90(1, (2, 3)), "noise": torch.rand_like(test).round()}
    places = {name: (images.long().flatten(1) * PLACES).sum(1) for name, images in {**strange, "draws": draws}.items()}
    bits = {name: all_bits[place] for name, place in places.items()}
    off = (bits["draws"].mean() - entropy).abs() / (bits["draws"].std() / DRAWS**0.5)
    named = joint[places["test images"]].softmax(1)
    right = (named.argmax(1) == test_classes).double().mean().item()
    bayes = sklearn.naive_bayes.BernoulliNB().fit(train_images.flatten(1).numpy(), train_classes.numpy())
    theirs = bayes.score(test.flatten(1).numpy(), test_classes.numpy())
    is_strange = [0] * len(test) + [1] * len(test)
    side, noise = (
        sklearn.metrics.roc_auc_score(is_strange, torch.cat((bits["test images"], bits[name])).numpy())
        for name in ("on their side", "noise")
    )
    alone = F.binary_cross_entropy(train_images.mean(0).expand_as(test), test).item() * 16 / math.log(2)
    save_picture(args.output / "density.png", log_p, bits)
    print(f"The picture is {args.output / 'density.png'}")
    size = sum(parameter.numel() for parameter in model.parameters())
    return [
        ("furthest from 1 of ten sums over all images", (log_p.exp().sum(0) - 1).abs().max().item(), 0, 1e-6),
        ("numbers in the network; in a table of all images by class", size, 10 * (2**16 - 1), "at most"),
        ("entropy in bits; of 16 pixels by chance", entropy.item(), 16, "at most"),
        ("bits of the sampler's draws: standard errors from the entropy", off.item(), 4, "at most"),
        ("bits of a test image; with independent pixels", bits["test images"].mean().item(), alone, "at most"),
        ("right classes by Bayes' rule; scikit-learn's naive Bayes", right, theirs, 0.1),
        ("mean probability of the named class; right classes", named.amax(1).mean().item(), right, 0.06),
        ("area under the curve: digits on their side", side, 0.75, "at least"),
        ("area under the curve: noise", noise, 0.9, "at least"),
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
    add("--epochs", type=int, default=40, help="passes over the images (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/density", help="for the picture (default: %(default)s)")
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
