"""From a line sketch to a digit: a PixelCNN that is told the edges, beside one that is not.

The sketch marks pixels of ink that touch paper. It follows from the image, so that telling it saves as many bits as its
entropy, H(x) = H(s) + H(x | s), and the sketch's bits with those of the image given it are the image's. Images of
3x3 pixels of three greys are few enough to count: the density that is learned sums to 1 for every sketch, and
saves the sketch's entropy less a KL to p(x | s). Larger digits are drawn for given sketches, and must have them.

    python examples/sketch_to_digit.py --output demo/course/sketch_to_digit
"""

import argparse
import itertools
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

LEVELS, CHANNELS, DRAWS = 3, 16, 4000
PLACES = LEVELS ** torch.arange(8, -1, -1)
ALL = (torch.arange(LEVELS**9)[:, None] // PLACES % LEVELS).view(-1, 1, 3, 3)


def sketch(images: Tensor) -> Tensor:
    """1 where a pixel has ink and one of its four neighbours, or the rim, has none: [N, 1, H, W]."""
    ink = F.pad((images > 0).float(), (1, 1, 1, 1))
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    return ink[..., 1:-1, 1:-1] * (F.conv2d(ink, cross) < 4)


class PixelCNN(nn.Module):
    """From images [N, 1, H, W] of whole numbers and what `look` made of a sketch to logits [N, levels, H, W]."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        middle = [MaskedConv2d(CHANNELS, CHANNELS, 3, mask_type="B") for _ in range(2)]
        last = MaskedConv2d(CHANNELS, levels, 1, mask_type="B")
        self.layers = nn.ModuleList([MaskedConv2d(1, CHANNELS, 7), *middle, last])
        wide = nn.Conv2d(1, CHANNELS, 5, padding=2), nn.ELU(), nn.Conv2d(CHANNELS, 3 * CHANNELS, 3, padding=1)
        self.look = nn.Sequential(*wide)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:  # noqa: D102
        for layer, part in zip(self.layers, seen.chunk(3, dim=1), strict=False):
            x = F.elu(layer(x, part))
        return self.layers[-1](x)

    def bits(self, images: Tensor, cond: Tensor) -> Tensor:
        """-log2 p(image | condition) of each image, in double precision."""
        logits = self(images.float(), self.look(cond).expand(len(images), -1, -1, -1)).double()
        return F.cross_entropy(logits, images[:, 0], reduction="none").sum((1, 2)) / math.log(2)


def train(levels: int, images: Tensor, cond: Tensor, epochs: int, name: str) -> PixelCNN:
    """Maximises the likelihood."""
    optimizer = torch.optim.Adam((model := PixelCNN(levels)).parameters(), 5e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in tqdm(range(epochs), name, unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            model.bits(images[batch], cond[batch]).mean().backward()
            optimizer.step()
        decay.step()
    return model.requires_grad_(False)


def entropy(p: Tensor) -> float:
    """In bits."""
    return -torch.special.xlogy(p, p).sum().item() / math.log(2)


def count(model: PixelCNN, conditions: Tensor) -> Tensor:
    """ln q(image | condition) of every image, each with its condition or all with the same."""
    parts = zip(ALL.split(4000), itertools.cycle(conditions.split(4000)), strict=False)
    return -math.log(2) * torch.cat([model.bits(*part) for part in parts])


def save_picture(path: Path, images: Tensor, draws: Tensor) -> None:
    """Digits, their sketches, and draws for these."""
    rows = [images[:14] / 2, sketch(images[:14]), *(draws[:, :14] / 2)]
    axes = Figure(figsize=(9, 3.4), layout="constrained").subplots()
    sheet = F.pad(torch.stack(rows)[:, :, 0], (1, 1, 1, 1), value=0.5)
    axes.imshow(sheet.transpose(1, 2).reshape(-1, 140), cmap="gray")
    axes.set(xticks=[], yticks=range(5, 50, 10), yticklabels=["digits", "sketches", *["draws"] * 3])
    axes.figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Counts, trains, draws; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    digits = torch.tensor(load_digits().images)[torch.randperm(1797), None]
    small = (F.interpolate(digits[..., 1:7], size=(3, 3), mode="area") / 5.4).long().clamp(max=2)
    p = torch.bincount((small.flatten(1) * PLACES).sum(1), minlength=len(ALL)).double() + 0.02
    p, sketches = p / p.sum(), sketch(ALL)
    which = (sketches.flatten(1).long() * 2 ** torch.arange(9)).sum(1)
    of_sketch = torch.zeros(512).double().index_add(0, which, p)
    drawn = ALL[torch.multinomial(p, 3000, replacement=True)]
    model = train(LEVELS, drawn, sketch(drawn), args.epochs, "3x3")
    log_q, given = count(model, sketches), p / of_sketch[which]
    saved, kl = entropy(p) + (p @ log_q).item() / math.log(2), (p @ (given.log() - log_q)).item() / math.log(2)
    often = [(number, sketches[which == number][:1]) for number in of_sketch.topk(4).indices]
    of_often = [(number, one, count(model, one).exp()) for number, one in often]
    number, one, q = of_often[1]
    right, sampler = q[which == number].sum().item(), IncrementalSampler(model, (1, 3, 3), levels=3, conditional=True)
    draws = sketch(sampler.sample(DRAWS, model.look(one).expand(DRAWS, -1, -1, -1), seed=args.seed))
    off = abs((draws == one).flatten(1).all(1).double().mean().item() - right) / (right * (1 - right) / DRAWS) ** 0.5

    test, images = (digits / 5.4).long().clamp(max=2).split([300, 1497])
    lines, seen = sketch(images), sketch(test)
    told, alone = (train(LEVELS, images, lines * on, args.epochs, name) for on, name in ((1, "told"), (0, "not told")))
    of_lines = train(2, lines.long(), 0 * lines, args.epochs, "sketches")
    bits = [told.bits(test, seen), alone.bits(test, 0 * seen), told.bits(test, seen.roll(1, 0))]
    with_sketch, without, wrong, two = (
        value.mean().item() for value in (*bits, of_lines.bits(seen.long(), 0 * seen) + bits[0])
    )
    sampler = IncrementalSampler(told, (1, 8, 8), levels=3, conditional=True)
    draws = torch.stack([sampler.sample(300, told.look(seen), seed=args.seed + k) for k in range(3)])
    alike = [(sketch(draws[0]) == other).double().mean().item() for other in (seen, seen.roll(1, 0))]
    save_picture(args.output / "sketch_to_digit.png", test, draws)
    print(f"The picture is {args.output / 'sketch_to_digit.png'}")
    return [
        (
            "3x3: furthest from 1 of sums given four sketches",
            max(abs(q.sum().item() - 1) for *_, q in of_often),
            0,
            1e-6,
        ),
        ("bits that the sketch saves; its entropy", saved, entropy(of_sketch), "at most"),
        ("what is lacking; KL to the exact conditional", entropy(of_sketch) - saved, kl, 1e-9),
        ("draws that have the given sketch: standard errors from the sum", off, 4, "at most"),
        ("8x8: bits of a digit given its sketch; without", with_sketch, without, "at most"),
        ("bits of a sketch and of the digit given it; of the digit", two, without, 8),
        ("bits given another digit's sketch; without", wrong, without, "at least"),
        ("pixels of draws' sketches as given; as another digit's", *alike, "at least"),
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
    add("--epochs", type=int, default=15, help="of each network (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/sketch_to_digit", help="for the picture (default: %(default)s)")
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
