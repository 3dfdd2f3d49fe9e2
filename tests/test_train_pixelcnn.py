"""What train_pixelcnn.py computes; test_examples.py runs it as a program."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch
from torch import nn

import fastelbo
import train_pixelcnn as example
from fastelbo.sampling import IncrementalSampler
from fastelbo.testing import assert_causal

pytestmark = pytest.mark.usefixtures("one_thread")


def descend(model, optimizer, batches):
    for images in batches:
        optimizer.zero_grad()
        model.bits(images).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained():
    """A network after four epochs, training and test images."""
    torch.manual_seed(0)
    images, test_images, levels = example.load_data("digits", 0, "cpu")
    model = example.PixelCNN(1, levels, channels=16, blocks=1)
    descend(model, torch.optim.Adam(model.parameters(), 5e-3), images.split(32) * 4)
    return model, images, test_images


@pytest.fixture
def grids(monkeypatch):
    """What is drawn, by the picture's name."""
    drawn = {}
    monkeypatch.setattr(example, "save_grid", lambda path, images, title: drawn.update({path.stem: images}))
    return drawn


def all_images(levels, shape):
    """Every image of a shape, int64 [levels ** pixels, *shape]."""
    pixels = itertools.product(range(levels), repeat=math.prod(shape))
    return torch.tensor(list(pixels)).reshape(-1, *shape)


def test_beats_independent_pixels(trained):
    model, images, test_images = trained
    independent = example.independent_pixels(images, test_images, 17)
    assert example.evaluate(model, test_images) < independent - 0.3  # 2.05 and 2.43; the example's network gets to 1.8
    assert independent < math.log2(17) - 1


def test_independent_pixels_is_the_histogram_with_one_added(trained):
    train, test = trained[1][:50], trained[2][:7]
    bits = []
    for row, column in itertools.product(range(8), range(8)):
        counts = np.bincount(train[:, 0, row, column], minlength=17) + 1
        bits += [-math.log2(counts[level] / (50 + 17)) for level in test[:, 0, row, column]]
    assert example.independent_pixels(train, test, 17) == pytest.approx(np.mean(bits), rel=1e-5)


@pytest.mark.parametrize("colours, shape", [(1, (2, 3)), (3, (1, 2))])
def test_probabilities_of_all_images_sum_to_one(colours, shape):
    model = example.PixelCNN(colours, levels=2, channels=6, blocks=2).double()
    images = all_images(2, (colours, *shape)).double()
    total = sum(2 ** (-model.bits(image[None]).item() * images[0].numel()) for image in images)
    assert total == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_stays_causal_while_it_trains(colours, optimizer):
    model = example.PixelCNN(colours, levels=4, channels=7, blocks=2)
    if optimizer == "sgd":
        steps = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    else:
        steps = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    images = torch.randint(4, (8, colours, 6, 5))
    before = model.bits(images).item()
    descend(model, steps, [images] * 5)
    assert model.bits(images).item() < before
    assert_causal(model, (colours, 6, 5), channel_groups=colours)
    for module in model.modules():
        if hasattr(module, "live_taps"):
            assert (module.weight[~module.live_taps()] == 0).all()


def test_mask_in_place_is_the_same_function():
    ours = fastelbo.nn.MaskedConv2d(4, 8, 5, mask_type="B", activation="tanh_sigmoid").double()
    usual, mask = nn.Conv2d(4, 8, 5, padding=2).double(), fastelbo.conv_mask2d(8, 4, 5, "B")
    kept = tuple(map(slice, ours.weight.shape))
    with torch.no_grad():
        ours.weight.copy_(usual.weight[kept] * ours.live_taps())
        ours.bias.copy_(usual.bias)
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    outputs = ours(x), example.mask_in_place(usual, mask, x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.sum().backward()
    torch.testing.assert_close(usual.weight.grad[kept][ours.live_taps()], ours.weight.grad[ours.live_taps()])


def test_comparison_prints_times(monkeypatch, capsys):
    timer = SimpleNamespace(blocked_autorange=lambda min_run_time: SimpleNamespace(median=2.5e-3))
    monkeypatch.setattr(example, "Timer", lambda *args, **keywords: timer)
    example.compare(torch.zeros(4, 1, 8, 8))
    *_, ours, theirs = capsys.readouterr().out.splitlines()
    assert ours.split() == ["fastelbo", "2.50", "ms"] and theirs.split() == ["mask", "in", "place", "2.50", "ms"]


def test_samples_follow_the_probabilities():
    torch.manual_seed(3)
    model = example.PixelCNN(1, levels=2, channels=6, blocks=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from a fair coin in every pixel
    images = all_images(2, (1, 2, 2))
    expected = torch.tensor([2 ** (-4 * model.bits(image[None]).item()) for image in images], dtype=torch.float64)
    assert expected.max() > 3 * expected.min()
    count = 4000
    drawn = IncrementalSampler(model, (1, 2, 2), levels=2).sample(count, seed=1)
    observed = torch.stack([(drawn == image).flatten(1).all(1).sum() for image in images])
    assert observed.sum() == count
    chi2 = ((observed - count * expected) ** 2 / (count * expected)).sum()
    assert chi2 < 37.7  # the 0.999 quantile at 15 degrees of freedom


def test_samples_have_the_levels_of_their_colour(grids, tmp_path):
    model = example.PixelCNN(3, levels=5, channels=6, blocks=1)
    with torch.no_grad():
        model.logits.weight.zero_()
        model.logits.bias.zero_().view(5, 3)[[4, 0, 2], [0, 1, 2]] = 100  # red 4, green 0, blue 2
    example.save_pictures(tmp_path, model, torch.zeros(8, 3, 3, 4, dtype=torch.uint8), [(1.0, 1.0)], 1.0)
    levels = torch.tensor([1, 0, 0.5])[:, None, None]
    assert torch.equal(grids["samples"], levels.expand(2, 4, 3, 3, 4))


def test_completions_keep_the_upper_half(trained, grids, tmp_path):
    model, _, images = trained
    example.save_pictures(tmp_path, model, images, [(1.0, 1.0)], 1.0)
    assert torch.equal(grids["test_images"], images[:96].unflatten(0, (8, 12)) / 16)
    assert grids["samples"].shape == (8, 12, 1, 8, 8) and len(grids["samples"].unique()) > 5
    shown, upper, *drawn = grids["completions"]
    assert torch.equal(shown, images[:12] / 16)
    assert torch.equal(upper[..., :4, :], shown[..., :4, :]) and not upper[..., 4:, :].any()
    drawn = torch.stack(drawn)
    assert torch.equal(drawn[..., :4, :], shown[..., :4, :].expand(4, -1, -1, -1, -1))
    assert len(drawn.flatten(0, 1).unique(dim=0)) > 36
    # the lower halves are likelier under their digits' upper halves than under others'
    other = torch.cat((drawn.roll(1, dims=1)[..., :4, :], drawn[..., 4:, :]), dim=-2)
    assert model.bits(drawn.flatten(0, 1) * 16) < model.bits(other.flatten(0, 1) * 16)


def test_no_test_patch_overlaps_a_training_patch(monkeypatch):
    count = 427 * 640 * 3
    photographs = [np.arange(count, dtype=np.int32).reshape(427, 640, 3) + at * count for at in range(2)]
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: SimpleNamespace(images=photographs))
    train, test, _ = example.load_data("photographs", 0, "cpu")
    assert not np.intersect1d(train.numpy(), test.numpy()).size
    assert test.unique().numel() == test.numel()  # tiles
    reds = {int(patch[0, 0, 0]) for patch in (*train, *test)}
    assert all(red % 3 == 0 for red in reds) and max(reds) > count > min(reds)


def test_photographs_are_patches_of_three_colours_and_train():
    train, test, levels = example.load_data("photographs", 0, "cpu")
    assert levels == 256 and train.dtype == test.dtype == torch.uint8
    assert train.shape[1:] == test.shape[1:] == (3, 32, 32) and len(train) > 1000 and len(test) > 100
    china = sklearn.datasets.load_sample_images().images[0]
    np.testing.assert_array_equal(train[0].numpy(), china[:32, :32].transpose(2, 0, 1))
    model = example.PixelCNN(3, 256, channels=9, blocks=1)
    before = example.evaluate(model, test[::40])
    descend(model, torch.optim.Adam(model.parameters(), 5e-3), train[::96].split(4) * 4)
    assert example.evaluate(model, test[::40]) < before


def test_tiny_run_on_photographs_draws_in_colour(tmp_path, grids, monkeypatch):
    red = np.zeros((32, 160, 3), dtype=np.uint8)
    red[..., 0] = np.random.default_rng(0).integers(200, 256, red.shape[:2])
    monkeypatch.setattr(sklearn.datasets, "load_sample_images", lambda: SimpleNamespace(images=[red] * 8))
    assert len(example.main(["--data", "photographs", "--epochs", "1", "--output", str(tmp_path)])) == 1
    assert grids["test_images"].shape == (2, 4, 3, 32, 32) and grids["completions"].shape == (6, 4, 3, 32, 32)
    assert grids["test_images"][:, :, 0].min() > 0.7 and not grids["test_images"][:, :, 1:].any()
