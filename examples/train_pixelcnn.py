"""Trains a Gated PixelCNN on handwritten digits or on patches of photographs, and shows what masks in place cost.

The network is fastelbo's gated block, repeated::

    v, h = self.first(x, x)      # GatedMaskedConv2d(..., mask_type="A"): a pixel does not see itself
    for block in self.blocks:    # GatedMaskedConv2d(...)
        v, h = block(v, h)

v has read the rows above a pixel, h those and what lies left of it. From h come the logits of a softmax over the grey
levels of each colour, so that the network is a probability of the image, the product of one factor for each pixel and
colour: in raster order, and within a pixel red, then green given red, then blue given both.

Images are drawn, and half-hidden ones completed, by fastelbo.sampling.IncrementalSampler, which computes each feature
once.

The data are the 1797 digits of 8x8 pixels and 17 grey levels that ship inside scikit-learn, a sixth of which is held
out, or 32x32 patches of its two photographs, in colour and 256 levels. Patches to train on overlap one another; those
to test on are tiles of the right-hand fifth of each photograph, which no other patch reaches into.

Bits per dimension are -log2 of the probability of an image over its number of pixels and colours: the bits that an
ideal code spends on one of them. A uniform guess takes log2 of the number of levels. Beside them stands the code that
knows the distribution of each pixel, from the training images' histogram with one added to every count, but takes the
pixels to be independent.

    python examples/train_pixelcnn.py --compare --output demo/pixelcnn
"""

import argparse
import copy
import math
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import common
from common import CHECKPOINT, InputError, Training
from fastelbo.nn import GatedMaskedConv2d, MaskedConv2d
from fastelbo.sampling import IncrementalSampler
from parallel import Ranks

LEARNING_RATE = 5e-3
PATCH = 32
SAMPLE_SEED = 1
COMPLETIONS = 4  # of each half-hidden image
GRID = {1: (8, 12), 3: (2, 4)}  # rows and columns of samples, by the number of colours


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = common.new_training_parser(
        "Train a Gated PixelCNN on handwritten digits or on patches of photographs, with fastelbo's causal "
        "convolutions; its bits per dimension on held-out images, samples and training curve.",
        output="demo/pixelcnn",
        epochs=10,
        batch_size=32,
    )
    common.add_parallel_options(parser)
    add = parser.add_argument
    data = "8x8 digits in 17 grey levels or 32x32 patches of two photographs in colour (default: %(default)s)"
    add("--data", choices=["digits", "photographs"], default="digits", help=data)
    add("--binary", action="store_true", help="digits in black and white: levels of 8 and more count as white")
    add("--channels", type=int, default=32, help="of each of the two stacks (default: %(default)s)")
    add("--blocks", type=int, default=4, help="gated blocks after the first (default: %(default)s)")
    add("--compare", action="store_true", help="also time a training step beside that of masks multiplied in place")
    return parser.parse_args(argv)


@dataclass
class Data:
    """Grey levels, uint8 [N, colours, H, W], split into training and test images."""

    train: Tensor
    test: Tensor
    levels: int

    def checksum(self) -> int:
        """Of all pixels."""
        return zlib.crc32(self.test.cpu().numpy(), zlib.crc32(self.train.cpu().numpy()))


def load_data(name: str, binary: bool, seed: int, device: torch.device) -> Data:
    """The digits, split by the seed, or the photographs, whose split is always the same."""
    if name == "photographs":
        return load_photographs(device)
    images, levels = common.load_digits()[:, None], common.DIGIT_LEVELS
    if binary:
        images, levels = (images >= 8).astype(images.dtype), 2
    return Data(*common.split(images, seed, device), levels)


def load_photographs(device: torch.device) -> Data:
    """Patches of scikit-learn's two photographs; their right-hand fifth is the test set."""
    from sklearn.datasets import load_sample_images

    train, test = [], []
    for photograph in load_sample_images().images:
        border = photograph.shape[1] * 4 // 5
        train.append(patches(torch.tensor(photograph[:, :border]), stride=PATCH // 2))
        test.append(patches(torch.tensor(photograph[:, border:]), stride=PATCH))
    return Data(torch.cat(train).to(device), torch.cat(test).to(device), levels=256)


def patches(photograph: Tensor, stride: int) -> Tensor:
    """The square patches of a photograph [H, W, colours] at multiples of the stride: [N, colours, PATCH, PATCH]."""
    return photograph.unfold(0, PATCH, stride).unfold(1, PATCH, stride).flatten(0, 1).contiguous()


class PixelCNN(nn.Module):
    """Gated blocks, and a small network from each pixel's features to its logits."""

    def __init__(self, colours: int, levels: int, channels: int, blocks: int, backend: str | None = None) -> None:
        super().__init__()
        self.colours, self.levels = colours, levels
        options = {"channel_groups": colours, "backend": backend}
        gated = {"link": "mask-first-layer", **options}
        self.first = GatedMaskedConv2d(colours, channels, 7, mask_type="A", **gated)
        self.blocks = nn.ModuleList(GatedMaskedConv2d(channels, channels, 3, **gated) for _ in range(blocks))
        self.hidden = MaskedConv2d(channels, channels, 1, mask_type="B", activation="relu", **options)
        self.logits = MaskedConv2d(channels, levels * colours, 1, mask_type="B", **options)

    def features(self, images: Tensor) -> Tensor:
        """From grey levels [N, colours, H, W] to what each pixel knows of those before it, [N, channels, H, W]."""
        x = images * (2 / (self.levels - 1)) - 1  # so that black is not the 0 that surrounds the image
        v, h = self.first(x, x)
        for block in self.blocks:
            v, h = block(v, h)
        return h

    def forward(self, images: Tensor) -> Tensor:
        """From grey levels [N, colours, H, W] to logits [N, levels * colours, H, W], the colours innermost."""
        return self.logits(self.hidden(self.features(images)))

    def bits(self, images: Tensor) -> Tensor:
        """Bits per dimension of images, on average."""
        logits = self(images).unflatten(1, (self.levels, self.colours))
        return F.cross_entropy(logits, images.long()) / math.log(2)


def start_training(data: Data, args: argparse.Namespace, device: torch.device, ranks: Ranks | None = None) -> Training:
    """A fresh network, or the one of the checkpoint."""
    torch.manual_seed(args.seed)
    ranks = ranks or Ranks()
    model = PixelCNN(data.train.shape[1], data.levels, args.channels, args.blocks, args.backend).to(device)
    ranks.wrap(model, "bits")
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    names = ("data", "binary", "channels", "blocks", "batch_size", "seed")
    settings = {name: getattr(args, name) for name in names} | {"data_checksum": data.checksum()}
    training = Training(model, optimizer, torch.Generator().manual_seed(args.seed), settings, ranks)
    training.resume(args)
    return training


def train_epoch(training: Training, data: Data, on_step: Callable[[], object] = lambda: None) -> Tensor:
    """One pass in a new order; returns the bits per dimension of each step."""
    losses = []
    for images in training.batches(data.train):

        def loss(rows: slice, images: Tensor = images) -> Tensor:
            return training.ranks.call(training.model, "bits", images[rows])

        losses.append(training.descend(len(images), loss))
        on_step()
    return training.ranks.mean(torch.stack(losses))


@torch.no_grad()
def evaluate(model: PixelCNN, data: Data, ranks: Ranks | None = None) -> float:
    """Bits per dimension of the test images."""
    ranks, parts = ranks or Ranks(), data.test.split(16)
    total = torch.zeros((), dtype=torch.float64, device=data.test.device)
    for start in range(0, len(parts), ranks.count):  # all ranks call the model as often, since all hold parts of it
        part = start + ranks.rank
        images = parts[min(part, len(parts) - 1)]
        total += model.bits(images) * len(images) * (part < len(parts))
    return ranks.sum(total)[0] / len(data.test)


def independent_pixels(data: Data) -> float:
    """Bits per dimension of the test images if each pixel followed its own histogram over the training images."""
    train, test = (images.flatten(1).T.long() for images in (data.train, data.test))
    counts = torch.ones(len(train), data.levels, device=train.device)
    counts.scatter_add_(1, train, torch.ones_like(train, dtype=counts.dtype))
    return -(counts / counts.sum(1, keepdim=True)).log2().gather(1, test).mean().item()


def train(training: Training, data: Data, epochs: int, checkpoint: Path) -> None:
    """Trains up to the given epoch, and saves a checkpoint after each."""

    def run_epoch(on_step: Callable[[], object]) -> tuple[tuple[float, float], str]:
        train_bits = train_epoch(training, data, on_step).mean().item()
        test_bits = evaluate(training.model, data, training.ranks)
        return (train_bits, test_bits), f"bits per dimension: train {train_bits:.3f}, test {test_bits:.3f}"

    training.run(epochs, training.steps(data.train), run_epoch, checkpoint)


def report(training: Training, data: Data, backend: str) -> None:
    """Prints the test results."""
    count, colours, height, width = data.test.shape
    print(f"\nTest set: {count} images of {height}x{width} pixels, {colours} colour(s), {data.levels} levels")
    print(f"Bits per dimension after {len(training.history)} epochs, backend {backend}")
    print(f"  Gated PixelCNN      {evaluate(training.model, data):9.3f}")
    print(f"  independent pixels  {independent_pixels(data):9.3f}")
    print(f"  a uniform guess     {math.log2(data.levels):9.3f}")


class InPlaceMaskedConv2d(nn.Conv2d):
    """The layer of most PixelCNN code: multiplies its weight by a mask in place, then computes all taps."""

    def __init__(self, ours: nn.Conv2d, rows: int, columns: int) -> None:
        super().__init__(ours.in_channels, ours.out_channels, (rows, columns), padding=(rows // 2, columns // 2))
        self.to(ours.weight)
        kept = tuple(map(slice, ours.weight.shape))  # ours does not store the rows below and the columns to the right
        self.register_buffer("mask", torch.zeros_like(self.weight))
        self.mask[kept] = ours.live_taps().to(self.mask)
        self.weight.data[kept] = ours.weight.data
        self.bias.data.copy_(ours.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """Masks the weight, and convolves."""
        self.weight.data *= self.mask
        return super().forward(x)


class InPlaceBlock(nn.Module):
    """GatedMaskedConv2d by masks in place: k x k taps in the vertical stack, 1 x k in the horizontal."""

    def __init__(self, ours: GatedMaskedConv2d) -> None:
        super().__init__()
        k = ours.vertical.k
        self.vertical = InPlaceMaskedConv2d(ours.vertical, k, k)
        self.horizontal = InPlaceMaskedConv2d(ours.horizontal, 1, k)
        self.link = copy.deepcopy(ours.link)
        self.out = InPlaceMaskedConv2d(ours.out, 1, 1)
        self.residual = ours.residual

    @staticmethod
    def gate(z: Tensor) -> Tensor:
        """The gate over the halves of the channels."""
        a, b = z.chunk(2, dim=1)
        return torch.tanh(a) * torch.sigmoid(b)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks to both stacks."""
        z = self.vertical(v)
        out = self.out(self.gate(self.horizontal(h) + self.link(z)))
        return self.gate(z), out + h if self.residual else out


def with_masks_in_place(model: PixelCNN) -> PixelCNN:
    """The same function with the same weights, written as most PixelCNN code is."""
    model = copy.deepcopy(model)
    model.first = InPlaceBlock(model.first)
    model.blocks = nn.ModuleList(InPlaceBlock(block) for block in model.blocks)
    model.hidden = nn.Sequential(InPlaceMaskedConv2d(model.hidden, 1, 1), nn.ReLU())
    model.logits = InPlaceMaskedConv2d(model.logits, 1, 1)
    return model


def compare(model: PixelCNN, images: Tensor, backend: str) -> None:
    """Prints the time of a training step of the network and of its version with masks in place."""
    ways = {"fastelbo": copy.deepcopy(model), "masks in place": with_masks_in_place(model)}
    ours, theirs = (way.bits(images) for way in ways.values())
    torch.testing.assert_close(ours, theirs)

    def step(way: PixelCNN, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        way.bits(images).backward()
        optimizer.step()

    steps = [partial(step, way, torch.optim.Adam(way.parameters(), LEARNING_RATE)) for way in ways.values()]
    best = common.fastest_calls(steps, images.device)
    threads = f"{torch.get_num_threads()} thread(s)" if images.device.type == "cpu" else images.device
    print(f"\nTraining step of {len(images)} images; backend {backend}, {threads}, torch {torch.__version__}")
    print("Milliseconds, fastest of ten or more interleaved steps; in brackets, how many times fastelbo's")
    print("  " + "".join(f"{name:>22}" for name in ways))
    print("  " + "".join(f"{seconds * 1e3:>14.1f} ({seconds / best[0]:4.2f}x)" for seconds in best))


def sample(model: PixelCNN, count: int, height: int, width: int, known: Tensor | None = None) -> Tensor:
    """Images drawn from the model, uint8 [count, colours, H, W]; with the upper half of known images, if any."""
    sampler = IncrementalSampler(model, (model.colours, height, width), levels=model.levels)
    options = {}
    if known is not None:
        upper = torch.zeros(height, width, dtype=torch.bool)
        upper[: height // 2] = True
        options = {"init": known, "mask": upper}
    return sampler.sample(count, seed=SAMPLE_SEED, progress=sys.stderr.isatty(), **options).byte()


def save_pictures(output: Path, training: Training, data: Data) -> None:
    """Samples, test images of the same number, completions of their upper halves, and the training curve."""
    _, colours, height, width = data.test.shape
    rows, columns = GRID[colours]
    images = data.test[: rows * columns]
    samples = sample(training.model, rows * columns, height, width)
    for name, grid, title in (("samples.png", samples, "Samples"), ("test_images.png", images, "Test images")):
        common.save_grid(output / name, grid.unflatten(0, (rows, columns)) / (data.levels - 1), title)
    some = data.test[:columns].repeat_interleave(COMPLETIONS, 0)
    completed = sample(training.model, len(some), height, width, some).unflatten(0, (-1, COMPLETIONS))
    shown = data.test[:columns, None].to(completed)
    hidden = shown.clone()
    hidden[..., height // 2 :, :] = 0
    grid = torch.cat([shown, hidden, completed], 1).transpose(0, 1) / (data.levels - 1)
    labels = ("test image", "upper half", *["drawn"] * COMPLETIONS)
    common.save_grid(output / "completions.png", grid, "Lower halves drawn, given the upper ones", labels)
    title, levels = "Gated PixelCNN during training", {"test, independent pixels": independent_pixels(data)}
    common.save_curves(output / "training_curve.png", training.curves(), title, "epoch", "bits per dimension", levels)


def run(args: argparse.Namespace) -> None:
    """Checks everything the user gave, before anything is written; then trains and reports."""
    common.check_whole_numbers(args, channels=1, blocks=0)
    if args.binary and args.data != "digits":
        raise InputError(f"--binary goes with --data digits; got --data {args.data}")
    ranks, device, _ = common.start_ranks(args)
    data = load_data(args.data, args.binary, args.seed, device)
    training = start_training(data, args, device, ranks)
    common.make_output(args.output)
    with common.one_thread(args.data == "digits"):
        train(training, data, args.epochs, args.output / CHECKPOINT)
        training.model = ranks.whole(training.model)
        ranks.stop()
        if not ranks.first:
            return
        backend = args.backend or "chosen by each op"
        report(training, data, backend)
        if args.compare:
            compare(training.model, data.train[: args.batch_size], backend)
        save_pictures(args.output, training, data)
    print(f"\nPictures and checkpoint are in {args.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return common.exit_code(run, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
