"""How Triton kernels get their tiles: only those that compute the right thing may win."""

import pytest
import torch

from fastelbo.kernels import tune


def configurations(result, **found):
    """Run and timer of configurations by name: what each writes, and the seconds that it takes."""

    def run(name):
        ran.append(name)
        result.copy_(found[name][0])

    def time(call):
        call()
        return found[ran[-1]][1]

    ran = []
    return run, time


def test_the_fastest_that_is_right_wins():
    exact = torch.linspace(-1, 1, 100)
    result = torch.empty(100)
    wrong, nan = exact.clone(), exact.clone()
    wrong[7] += 0.1
    nan[7] = float("nan")
    run, time = configurations(
        result, default=(exact, 3.0), better=(exact * (1 + 1e-6), 2.0), wrong=(wrong, 1.0), nan=(nan, 0.5)
    )
    names = ["default", "wrong", "better", "nan"]
    assert tune.fastest(names, run, result, exact, time) == "better"


def test_one_that_writes_nothing_is_wrong():
    exact = torch.ones(3)
    result = exact.clone()
    with pytest.raises(RuntimeError, match="no configuration of the kernel computes what plain torch does"):
        tune.fastest(["idle"], lambda name: None, result, exact, lambda call: 1.0)


def test_the_default_unless_asked(monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)  # the interpreter has no times to compare
    assert tune.choose(("key",), ["default", "other"], fail, torch.empty(1), fail) == "default"
