"""PixelRNN beside the PixelCNN: the Row LSTM and the Diagonal BiLSTM, no pixel of which sees the future.

All three begin with a masked convolution and end with two of 1x1. Between them the Row LSTM goes down the rows, and a
pixel's state reads three of the row above; the Diagonal BiLSTM goes along the diagonals, from the left and from the
right, the latter moved down by a row (van den Oord et al. 2016, "Pixel Recurrent Neural Networks"); the PixelCNN has
masked convolutions. No gradient leads from a later pixel to a logit, and all images of 2x3 pixels sum to 1.

    python examples/pixelrnn.py --output demo/course/pixelrnn
"""

import argparse
import math
import tempfile
from pathlib import Path

import sklearn.datasets
import torch
import torch.nn.functional as F  # noqa: N812
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import fastelbo
from fastelbo.nn import MaskedConv2d

CHANNELS, LAYERS = 16, ("Row LSTM", "Diagonal BiLSTM", "PixelCNN")


def scan(inputs: tuple[Tensor, ...], of_state: nn.Conv1d) -> list[Tensor]:
    """An LSTM over vectors of positions, [N, 4 C, positions], whose states a convolution reads."""
    outputs, cell = [], (h := torch.zeros_like(inputs[0][:, :CHANNELS]))
    for gates in inputs:
        out, forget, new, content = (gates + of_state(h)[..., : h.shape[2]]).chunk(4, dim=1)
        cell = forget.sigmoid() * cell + new.sigmoid() * content.tanh()
        outputs.append(h := out.sigmoid() * cell.tanh())
    return outputs


class RowLSTM(nn.Module):
    """Down the rows of an image [N, C, H, W]; of its own row a pixel reads itself and its left neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input = nn.Parameter(torch.randn(4 * CHANNELS, CHANNELS, 1, 2) / math.sqrt(2 * CHANNELS))
        self.of_state = nn.Conv1d(CHANNELS, 4 * CHANNELS, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        rows = fastelbo.causal_conv2d(x, self.of_input, stack="horizontal").unbind(2)
        return x + torch.stack(scan(rows, self.of_state), dim=2)


class DiagonalBiLSTM(nn.Module):
    """Along the diagonals of an image, from the left and from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input = nn.ModuleList(nn.Conv2d(CHANNELS, 4 * CHANNELS, 1) for _ in range(2))
        states = [nn.Conv1d(CHANNELS, 4 * CHANNELS, 2, padding=1, bias=False) for _ in range(2)]
        self.of_state = nn.ModuleList(states)  # without a bias states outside of the image stay 0

    def along(self, x: Tensor, way: int) -> Tensor:
        """A pixel's state comes from those of its left neighbour and the one above."""
        gates, (height, width) = self.of_input[way](x), x.shape[2:]
        # Row r moves to the right by r, so that a diagonal becomes a column.
        skewed = torch.stack([F.pad(gates[:, :, r], (r, height - 1 - r)) for r in range(height)], dim=2)
        columns = torch.stack(scan(skewed.unbind(3), self.of_state[way]), dim=3)
        return torch.stack([columns[:, :, r, r : r + width] for r in range(height)], dim=2)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        from_right = self.along(x.flip(3), 1).flip(3)
        return x + self.along(x, 0) + F.pad(from_right, (0, 0, 1, 0))[:, :, :-1]  # which must not see its own row


def network(layer: str) -> nn.Sequential:
    """From images of 0 and 1 to the logit of each pixel's being white, given those before it."""
    *masked, last = (MaskedConv2d(CHANNELS, CHANNELS, k, mask_type="B", activation="relu") for k in (3, 3, 1))
    middle = masked if layer == "PixelCNN" else [RowLSTM() if layer == "Row LSTM" else DiagonalBiLSTM()]
    first, logit = MaskedConv2d(1, CHANNELS, 5, mask_type="A"), MaskedConv2d(CHANNELS, 1, 1, mask_type="B")
    return nn.Sequential(first, *middle, last, logit)


def bits(model: nn.Module, images: Tensor) -> Tensor:
    """Of each image."""
    return F.binary_cross_entropy_with_logits(model(images), images, reduction="none").sum((1, 2, 3)) / math.log(2)


def train(layer: str, images: Tensor, test: Tensor, epochs: int) -> tuple[nn.Module, list[float]]:
    """Maximises the likelihood; also the bits per pixel of the test images after each epoch."""
    optimizer = torch.optim.Adam((model := network(layer)).parameters(), 1e-2, fused=True)
    decay, curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), []
    for _ in tqdm(range(epochs), layer, unit="epoch", disable=None):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            bits(model, images[batch]).mean().backward()
            optimizer.step()
        decay.step()
        curve.append(bits(model, test).mean().item() / 64)
    return model.requires_grad_(False), curve


def reads(model: nn.Module) -> Tensor:
    """Largest size of the gradient of each pixel's logit by each pixel, over three random images: [64, 64]."""
    slopes = [torch.autograd.functional.jacobian(model, torch.rand(1, 1, 8, 8)).view(64, 64) for _ in range(3)]
    return torch.stack(slopes).abs().amax(0)


def save_picture(path: Path, curves: dict[str, list[float]], alone: float, slopes: dict[str, Tensor]) -> None:
    """Bits in training, and which pixels the logit of one depends on."""
    panels = Figure(figsize=(12, 3.6), layout="constrained").subplots(1, 4)
    panels[0].plot(list(zip(*curves.values(), strict=True)), label=list(curves))
    panels[0].axhline(alone, color="grey", linestyle="--", label="independent pixels")
    panels[0].set(title="test images", xlabel="epoch", ylabel="bits per pixel", ylim=(0.4, 0.8))
    panels[0].legend()
    for axes, (name, slope) in zip(panels[1:], slopes.items(), strict=True):
        axes.imshow(slope[37].view(8, 8) > 0, cmap="Blues", vmax=2)
        axes.plot(5, 4, "ks")
        axes.set(title=f"{name}: reads", xticks=[], yticks=[])
    panels[0].figure.savefig(path, dpi=80)


def run(args: argparse.Namespace) -> list[tuple[str, float, float, float | str]]:
    """Trains all alike, takes their gradients, counts; returns the claims."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # of tensors so small more threads gain little
    images = torch.tensor(sklearn.datasets.load_digits().images)[torch.randperm(1797), None].gt(8).float()
    test, images = images.split([300, 1497])
    trained = {name: train(name, images, test, args.epochs) for name in LAYERS}
    small = (torch.arange(64)[:, None] // 2 ** torch.arange(6) % 2).float().view(64, 1, 2, 3)
    sums = {name: torch.exp2(-bits(model, small).double()).sum().item() for name, (model, _) in trained.items()}
    slopes = {name: reads(model) for name, (model, _) in trained.items()}
    curves = {name: curve for name, (_, curve) in trained.items()}
    alone = F.binary_cross_entropy(images.mean(0).expand_as(test), test).item() / math.log(2)
    save_picture(args.output / "pixelrnn.png", curves, alone, slopes)
    print(f"The picture is {args.output / 'pixelrnn.png'}")
    ours, theirs = [curves[name][-1] for name in LAYERS[:2]], curves["PixelCNN"][-1]
    return [
        *((f"{name}: largest gradient from a later pixel", slopes[name].triu().max().item(), 0, 0) for name in LAYERS),
        *((f"{name}: sum over all images of 2x3", sums[name], 1, 1e-6) for name in LAYERS),
        ("Diagonal BiLSTM: pixels that the last one reads", (slopes["Diagonal BiLSTM"][63] > 0).sum().item(), 63, 0),
        ("Row LSTM: bits per pixel; PixelCNN", ours[0], theirs, 0.06),
        ("Diagonal BiLSTM: bits per pixel; PixelCNN", ours[1], theirs, 0.06),
        ("the most of the three; independent pixels", max(*ours, theirs), alone, "at most"),
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
    add("--epochs", type=int, default=12, help="of each network (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--output", type=Path, default="demo/course/pixelrnn", help="for the picture (default: %(default)s)")
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
