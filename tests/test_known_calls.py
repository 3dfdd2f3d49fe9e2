"""A call like an earlier one goes past checks and choices: it must come to what these would have made of it."""

import itertools

import pytest
import torch
from ops import GAUSSIAN

import fastelbo
from fastelbo.ops import _gaussian

SCALES = ["logvar", "std", fastelbo.Scale.softplus(), fastelbo.Scale("logvar", clamp=(-0.5, 0.5), clamp_grad="inward")]
EVENTS = [{}, {"event_ndim": 0}, {"event_ndim": 2, "reduction": "mean"}, {"reduction": "sum"}]
DRAWS = [{}, {"num_samples": 2}, {"temperature": 0.5, "noise_offset": 4}, {"out_dtype": torch.float64}]
FREE = [{}, {"free_bits": 0.5, "free_bits_per": "example"}, {"free_bits": torch.tensor(0.5), "free_bits_per": "batch"}]
SHAPES = [((3, 5), (3, 5)), ((3, 5), (5,)), ((3, 1), ()), ((2, 3, 4), (1, 3, 1))]


def options(op):
    """Every way to call it that is not plain, one after the other."""
    for scale, events, draw, free in itertools.product(SCALES, EVENTS, DRAWS, FREE):
        given = {"scale": scale} | (events if op.terms else {}) | (draw if op.drawn else {})
        yield given | (free if "free_bits" in op.function.__kwdefaults__ else {})


def calls(op):
    """Tensors and options of each."""
    for dtype, shapes in itertools.product([torch.float32, torch.bfloat16, torch.float64], SHAPES):
        a, b = (op.inputs(shape, dtype, kind="std") for shape in shapes)
        yield [x if i % 2 == 0 else y for i, (x, y) in enumerate(zip(a, b, strict=True))], {}
    tensors = op.inputs((3, 5), kind="std")
    yield from ((tensors, given) for given in options(op))
    if "mask" in op.function.__kwdefaults__:
        yield from ((tensors, {"mask": torch.arange(n) > 0}) for n in (5, 1))


def results(op, tensors, given):
    torch.manual_seed(0)
    out = op.function(*tensors, **given)
    out = out if isinstance(out, tuple) else (out,)
    return [*out, *torch.autograd.grad([x.sum() for x in out], tensors, materialize_grads=True), torch.rand(())]


@pytest.mark.parametrize("name", GAUSSIAN)
def test_second_call_is_what_checks_make_of_it(name, monkeypatch):
    op, find, planned = GAUSSIAN[name], _gaussian.Known.find, []

    def watched(*arguments):
        plan, kind = find(*arguments)
        planned.append(plan is not None)
        return plan, kind

    for tensors, given in calls(op):
        monkeypatch.setattr(_gaussian.Known, "find", lambda *_: (None, None))
        checked = results(op, tensors, given)
        monkeypatch.setattr(_gaussian.Known, "find", watched)
        for _ in range(2):
            for a, b in zip(results(op, tensors, given), checked, strict=True):
                assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    assert sum(planned) >= len(planned) / 4  # a second call of each kind but for those that no plan can be kept of


def test_a_number_in_a_tensor_may_change():
    mean, s, temperature = torch.ones(3), torch.zeros(3), torch.tensor(1.0)
    for _ in range(2):
        assert not torch.equal(fastelbo.gaussian_rsample(mean, s, temperature=temperature.fill_(1)), mean)
        assert torch.equal(fastelbo.gaussian_rsample(mean, s, temperature=temperature.fill_(0)), mean)


def test_transforms_after_a_plain_call():
    mean, s = torch.randn(3), torch.randn(3)
    for _ in range(2):
        plain = fastelbo.gaussian_kl(mean, s, event_ndim=1)
        d_mean = torch.func.grad(lambda mean: fastelbo.gaussian_kl(mean, s, event_ndim=1))(mean)
        torch.testing.assert_close(d_mean, mean)
        _, forward = torch.func.jvp(lambda mean: fastelbo.gaussian_kl(mean, s, event_ndim=1), (mean,), (mean,))
        torch.testing.assert_close(forward, (mean * mean).sum())
    assert plain.grad_fn is None


def test_no_more_plans_than_fit_are_kept():
    known = _gaussian.Known()
    mean, s = torch.zeros(2), torch.zeros(2)
    for number in range(1, 4100):
        plan, kind = known.find(mean, s, None, number, int)
        assert plan is None
        known.keep(kind, (number,), (mean, s), (mean, s))
    assert known.find(mean, s, None, 4099, int)[0] == (4099,)
    assert known.find(mean, s, None, 1, int)[0] is None
