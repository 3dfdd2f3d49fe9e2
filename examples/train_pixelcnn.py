"""Trains a Gated PixelCNN on handwritten digits or on patches of photographs, and draws images with it.

The network is a probability of the image, the product of a softmax over the levels of each pixel and colour: in raster
order, and within a pixel red, then green, then blue. Bits per dimension are -log2 of it over the number of pixels and
colours: what an ideal code spends on one of them. A code of independent pixels knows the histogram of each.

    python examples/train_pixelcnn.py --compare --output demo/pixelcnn
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
from torch.utils.benchmark import Timer
from tqdm import tqdm

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, MaskedConv2d


def load_data(name: str, seed: int, device: str) -> tuple[Tensor, Tensor, int]:
    """Training and test images, uint8 [N, colours, H, W], and the number of their levels."""
    if name == "digits":  # a sixth, drawn by the seed, is the test set
        images = torch.tensor(sklearn.datasets.load_digits().images, dtype=torch.uint8)[:, None]
        images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))].to(device)
        return images[len(images) // 6 :], images[: len(images) // 6], 17
    train, test = [], []
    for photograph in map(torch.tensor, sklearn.datasets.load_sample_images().images):
        parts = photograph.tensor_split([photograph.shape[1] * 4 // 5], dim=1)  # the right-hand fifth is the test set
        for part, stride, patches in zip(parts, (16, 32), (train, test), strict=True):
            patches.append(part.unfold(0, 32, stride).unfold(1, 32, stride).flatten(0, 1))
    return torch.cat(train).to(device), torch.cat(test).to(device), 256


class PixelCNN(nn.Module):
    """Gated blocks, and a small network from each pixel's features to its logits."""

    def __init__(self, colours: int, levels: int, channels: int = 32, blocks: int = 4) -> None:
        super().__init__()
        self.colours, self.levels, groups = colours, levels, {"channel_groups": colours}
        gated = {"link": "mask-first-layer", **groups}
        self.first = GatedMaskedConv2d(colours, channels, 7, mask_type="A", **gated)  # a pixel does not see itself
        self.blocks = nn.ModuleList(GatedMaskedConv2d(channels, channels, 3, **gated) for _ in range(blocks))
        self.hidden = MaskedConv2d(channels, channels, 1, mask_type="B", activation="relu", **groups)
        self.logits = MaskedConv2d(channels, levels * colours, 1, mask_type="B", **groups)

    def forward(self, images: Tensor) -> Tensor:
        """From grey levels [N, colours, H, W] to logits [N, levels * colours, H, W], the colours innermost."""
        x = images * (2 / (self.levels - 1)) - 1  # so that black is not the 0 that surrounds the image
        v, h = self.first(x, x)
        for block in self.blocks:
            v, h = block(v, h)  # v has read the rows above each pixel, h those and what lies left of it
        return self.logits(self.hidden(h))

    def bits(self, images: Tensor) -> Tensor:
        """Bits per dimension of images, on average."""
        logits = self(images).unflatten(1, (self.levels, self.colours))
        return F.cross_entropy(logits, images.long()) / math.log(2)


@torch.no_grad()
def evaluate(model: PixelCNN, images: Tensor) -> float:
    """Bits per dimension, on average."""
    return sum(model.bits(part).item() * len(part) for part in images.split(16)) / len(images)


def independent_pixels(train: Tensor, test: Tensor, levels: int) -> float:
    """Bits per dimension of the test images if each pixel followed its own histogram over the training images."""
    train, test = (images.flatten(1).T.long().cpu() for images in (train, test))
    counts = torch.ones(len(train), levels).scatter_add_(1, train, torch.ones(train.shape))
    return -(counts / counts.sum(1, keepdim=True)).log2().gather(1, test).mean().item()


def mask_in_place(layer: nn.Conv2d, mask: Tensor, x: Tensor) -> Tensor:
    """The gated layer of most PixelCNN code: multiplies its weight by a mask in place, then computes all taps."""
    layer.weight.data *= mask
    a, b = layer(x).chunk(2, dim=1)
    return a.tanh() * b.sigmoid()


def compare(images: Tensor, channels: int = 64, k: int = 5) -> None:
    """Prints the time that a layer's forward and backward take in either way."""
    with images.device:
        x = torch.randn(len(images), channels, *images.shape[2:], requires_grad=True)
        ours = MaskedConv2d(channels, 2 * channels, k, mask_type="B", activation="tanh_sigmoid")
        usual = nn.Conv2d(channels, 2 * channels, k, padding=k // 2)
        mask = fastelbo.conv_mask2d(2 * channels, channels, k, "B")
    print(f"\nGated {k}x{k} layer of {channels} channels and {len(x)} images, forward and backward, one thread")
    for name, way in (("fastelbo", lambda: ours(x)), ("mask in place", lambda: mask_in_place(usual, mask, x))):
        timer = Timer("way().sum().backward()", globals={"way": way})
        print(f"  {name:<16}{1e3 * timer.blocked_autorange(min_run_time=2).median:>8.2f} ms")


def save_grid(path: Path, images: Tensor, title: str) -> None:
    """Draws images [rows, columns, colours, H, W], values in [0, 1], as one picture."""
    sheet = F.pad(images, (1, 1, 1, 1), value=0.35).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).squeeze(2)
    axes = Figure(figsize=(0.8 * images.shape[1], 0.8 * images.shape[0])).subplots()
    axes.imshow(sheet.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set(title=title, xticks=[], yticks=[])
    axes.figure.savefig(path, dpi=150, bbox_inches="tight")


def save_pictures(output: Path, model: PixelCNN, images: Tensor, history: list, independent: float) -> None:
    """Samples, test images, completions (their upper halves, then lower halves drawn for these), training curve."""
    rows, columns = (8, 12) if model.colours == 1 else (2, 4)
    sampler = fastelbo.sampling.IncrementalSampler(model, images.shape[1:], levels=model.levels)
    grids = {"samples": sampler.sample(rows * columns, seed=1), "test_images": images[: rows * columns]}
    shown, upper = images[:columns].long(), torch.zeros(images.shape[2:], dtype=torch.bool, device=images.device)
    upper[: len(upper) // 2] = True
    drawn = sampler.sample(4 * columns, seed=1, init=shown.repeat(4, 1, 1, 1), mask=upper)
    for name, grid in {**grids, "completions": torch.cat((shown, shown * upper, drawn))}.items():
        save_grid(output / f"{name}.png", grid.unflatten(0, (-1, columns)) / (model.levels - 1), name)
    axes = Figure().subplots()
    axes.plot(range(1, len(history) + 1), history, label=["train, mean over the epoch", "test, after the epoch"])
    axes.axhline(independent, color="gray", linestyle="--", label="test, independent pixels")
    axes.set(title="Gated PixelCNN during training", xlabel="epoch", ylabel="bits per dimension")
    axes.legend()
    axes.figure.savefig(output / "training_curve.png", dpi=150)


def run(args: argparse.Namespace) -> list[tuple[float, float]]:
    """Trains; returns the bits per dimension of each epoch in training, and those of the test images after it."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(1 if args.data == "digits" else torch.get_num_threads())  # for 8x8 pixels more gain little
    images, test_images, levels = load_data(args.data, args.seed, args.device)
    model, history = PixelCNN(images.shape[1], levels).to(args.device), []
    optimizer = torch.optim.Adam(model.parameters(), 5e-3, fused=True)
    try:
        for epoch in range(1, args.epochs + 1):
            losses, order = [], torch.randperm(len(images), device=images.device).split(args.batch_size)
            for batch in tqdm(order, f"epoch {epoch}", unit="step", leave=False, disable=None):
                loss = model.bits(images[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            history.append((torch.stack(losses).mean().item(), evaluate(model, test_images)))
            print("Bits per dimension after epoch {}: train {:.3f}, test {:.3f}".format(epoch, *history[-1]))
    finally:  # of what there is, after Ctrl-C
        if history:
            independent = independent_pixels(images, test_images, levels)
            save_pictures(args.output, model, test_images, history, independent)
            print(f"Independent pixels: {independent:.3f}; a uniform guess: {math.log2(levels):.3f}. See {args.output}")
    if args.compare:
        compare(images[: args.batch_size])
    return history


def main(argv: list[str] | None = None) -> list[tuple[float, float]]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, devices = parser.add_argument, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    add("--data", choices=["digits", "photographs"], default="digits", help="(default: %(default)s)")
    add("--epochs", type=int, default=10, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=int, default=32, help="images per step (default: %(default)s)")
    add("--seed", type=int, default=0, help="decides all that is random (default: %(default)s)")
    add("--device", choices=devices, default=devices[-1], help="(default: %(default)s)")
    add("--output", type=Path, default="demo/pixelcnn", help="folder for the pictures (default: %(default)s)")
    add("--compare", action="store_true", help="also time a layer beside one that multiplies a mask in place")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.batch_size < 1 or not 0 <= args.seed < 2**63:
        parser.error("--epochs and --batch-size must be 1 or more, --seed from 0 to 2**63 - 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output).close()  # now rather than after the training
        return run(args)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")


if __name__ == "__main__":
    main()
