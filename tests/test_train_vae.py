"""What train_vae.py computes; test_examples.py runs it as a program."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import fastelbo
import train_vae

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loss_decreases(tmp_path):
    torch.manual_seed(0)
    before = -sum(train_vae.evaluate(train_vae.VAE(), train_vae.load_digits(0, "cpu")[1]))
    history = train_vae.main(["--epochs", "5", "--output", str(tmp_path)])
    train, test = zip(*history, strict=True)
    assert all(later > earlier for earlier, later in itertools.pairwise(train))
    assert test[-1] > before + 50  # from some -67 nats at the first step to above 0


def test_eager_lines_are_the_same_loss(monkeypatch):
    x, mean, logvar = torch.randn(3, 8, 5)
    inputs = [mean.requires_grad_(), logvar.requires_grad_(), torch.tensor(-1.0, requires_grad=True)]

    def outcome(way):
        loss = way(x, *inputs)
        return loss, *torch.autograd.grad(loss.sum(), inputs)

    torch.manual_seed(3)
    fused = outcome(train_vae.fused)
    torch.manual_seed(3)
    noise = fastelbo.gaussian_rsample(torch.zeros(8, 5), 1.0, scale="std")  # of the seed that fused drew
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    torch.testing.assert_close(outcome(train_vae.eager), fused)


def test_comparison_prints_time_and_memory(monkeypatch, capsys):
    timer = SimpleNamespace(blocked_autorange=lambda min_run_time: SimpleNamespace(median=2.5e-3))
    monkeypatch.setattr(train_vae, "Timer", lambda *args, **keywords: timer)
    train_vae.compare(1000, 100, "cpu")
    *_, fused, eager = (line.split() for line in capsys.readouterr().out.splitlines())
    assert fused[:3] == ["fused", "2.500", "ms"] and eager[:3] == ["eager", "2.500", "ms"]
    assert float(fused[3]) == pytest.approx(1.6, abs=0.001)  # x, mean, logvar and z: four of 0.4 MB
    assert float(eager[3]) >= 2


def test_report_in_its_units(monkeypatch, tmp_path, capsys):
    # A uniform density on the unit cube: 0 nats, and the code that spends log2 17 bits on every pixel.
    monkeypatch.setattr(train_vae, "evaluate", lambda *args: (-64 * math.log(2), 64 * math.log(2)))
    train_vae.main(["--epochs", "1", "--batch-size", "500", "--output", str(tmp_path)])
    assert "Bits per dimension: 4.087 (a uniform guess: 4.087)" in capsys.readouterr().out
