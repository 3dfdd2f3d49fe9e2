"""The first draw finds what a network does that no trace sees, and takes rounding for what it is."""

import pytest
import torch
from sampling_networks import (
    SAMPLERS,
    WRONG,
    Between,
    Gated,
    Wild,
    assert_draws_as_the_naive_loop,
    at_home,
    lively,
)
from torch import nn

from fastelbo.nn import MaskedConv2d
from fastelbo.sampling import IncrementalSampler, check

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=SAMPLERS)
def backend(request):
    with at_home(request.param):
        yield request.param


class Scaled(Between):
    """A network whose forward does what its trace does not show."""

    def __init__(self, scale):
        super().__init__(None)
        self.scale = scale
        self.register_buffer("buffer", torch.ones(1))

    def forward(self, x):
        return self.b(self.scale(self, self.a(x)))


def _counted(self, h):
    self.count = getattr(self, "count", 0) + 1
    return h * self.count


def _autocast(self, h):
    with torch.autocast(next(self.parameters()).device.type, dtype=torch.bfloat16):
        return torch.cat([self.b(h), self.b(h)], 1).float()


def _buffered(self, h):
    self.buffer.add_(1)
    return h * self.buffer


UNSEEN = {
    "buffer": _buffered,
    "type": lambda self, h: h * 2 if type(h) is torch.Tensor else h,
    "count": _counted,
    "autocast": _autocast,
    "noise": lambda self, h: h + torch.randn(1, device=next(self.parameters()).device),
    "slight": lambda self, h: h * 1.001 if type(h) is torch.Tensor else h,
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_trace_sees_is_found_before_a_draw(name, backend):
    model = lively(Scaled(UNSEEN[name]))
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    expected = (
        r"model must compute what its layers' steps show; got a forward whose logits differ .* by up to \S+ \(row \d, "
        r'column \d, colour 0, output \d\), where rounding explains \S+: .*method="naive" draws by the network itself'
    )
    if name in ("buffer", "count", "noise"):
        expected = r'model must compute the same at each call; got a forward .* differ by .*method="naive" draws'
    for draw in (lambda: sampler.sample(2, seed=0), lambda: sampler.reset(2)):
        with pytest.raises(NotImplementedError, match=expected):
            draw()
    assert sampler.sample(2, seed=0, method="naive").shape == (2, 1, 4, 5)
    unchecked = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend, check=False)
    assert unchecked.sample(2, seed=0).shape == (2, 1, 4, 5)
    unchecked.reset(2).step()


@pytest.mark.parametrize(
    "scale",
    [
        lambda self, h: h if torch.is_grad_enabled() else h * 2,
        lambda self, h: h if self.training else h * 2,
        lambda self, h: _Doubled.apply(h),
    ],
)
def test_what_a_trace_sees_in_a_draws_own_state(scale, backend):
    with torch.no_grad():
        assert_draws_as_the_naive_loop(lively(Scaled(scale), 3), (1, 4, 5), backend)
    with torch.enable_grad():
        assert_draws_as_the_naive_loop(lively(Scaled(scale), 3), (1, 4, 5), backend)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2


def test_hooks_of_all_modules_are_found(backend):
    from torch.nn.modules.module import register_module_forward_hook

    model = lively(Gated(dilations=()))
    handle = register_module_forward_hook(
        lambda module, inputs, out: 2 * out if isinstance(module, MaskedConv2d) else None
    )
    try:
        doubled = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    finally:
        handle.remove()
    doubled.check = True
    for plan in doubled._plans.values():
        plan.compiled.checked = False
    with pytest.raises(NotImplementedError, match="got a forward whose logits differ"):
        doubled.sample(1, seed=0)


def test_the_check_takes_the_condition_and_each_of_its_kinds(backend):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Gated(cond_channels=5, dilations=())

        def forward(self, x, cond):
            logits = self.net(x, cond)
            return logits * 2 if type(cond) is torch.Tensor and cond.dim() == 4 else logits

    sampler = IncrementalSampler(lively(Odd()), (1, 3, 4), levels=4, conditional=True, backend=backend)
    assert torch.equal(*(sampler.sample(3, torch.ones(3, 5), seed=0, method=m) for m in ("cached", "naive")))
    with pytest.raises(NotImplementedError, match="got a forward whose logits differ"):
        sampler.sample(3, torch.ones(3, 5, 3, 4), seed=0)


def test_the_check_runs_once_and_disturbs_nothing(backend, monkeypatch):
    model = lively(Gated())
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    runs = []
    monkeypatch.setattr(check, "compare", lambda *given, own=check.compare: runs.append(own(*given)))
    torch.manual_seed(1)
    first = sampler.sample(2)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(sampler.sample(2), first) and torch.equal(torch.get_rng_state(), state)
    sampler.reset(2).step()
    assert len(runs) == 1
    with pytest.raises(TypeError, match="check must be a bool; got int"):
        IncrementalSampler(model, (1, 4, 5), check=1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (1, 2, 2), (1, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_alone_fails_no_check(seed, scale, shape, dtype, backend):
    if (backend, dtype) in WRONG:
        return
    torch.manual_seed(seed)
    for model in (Gated(), nn.Sequential(MaskedConv2d(1, 4, 3, mask_type="A")), Gated(k=7)):
        model = lively(model, 3).to(dtype)
        values = torch.randn(4) * scale
        IncrementalSampler(model, shape, levels=4, values=values, backend=backend).sample(1, seed=0)


def test_logits_of_minus_infinity_pass_the_check(backend):
    model = lively(Gated(dilations=()))
    with torch.no_grad():
        model.last.bias[2] = -float("inf")
    sampler = assert_draws_as_the_naive_loop(model, (1, 4, 5), backend)
    assert not (sampler.sample(4, seed=0) == 2).any()


class Narrow(Gated):
    """Runs its last layer in half precision, where it is not in float64."""

    def forward(self, x):
        _, h = self.first(x, x)
        with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
            return self.last(h).float()


def test_a_forward_that_narrows_float32_alone_is_found(backend):
    """In float64 it computes what its steps do."""
    model = lively(Narrow(dilations=(), last=nn.Conv2d(12, 4, 1)))
    sampler = IncrementalSampler(model, (1, 4, 5), levels=4, backend=backend)
    with pytest.raises(NotImplementedError, match="model must compute what its layers' steps show"):
        sampler.sample(2, seed=0)


def test_settings_of_precision_come_back():
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    IncrementalSampler(lively(Gated()), (1, 4, 5), levels=4).sample(1)
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before


@pytest.mark.parametrize("order", ["raster", "wavefront"])
def test_large_images_are_checked_in_their_first_rows(order, backend, monkeypatch):
    seen = []
    compare = check.compare
    monkeypatch.setattr(check, "compare", lambda plan, *given: seen.append(plan.image_shape) or compare(plan, *given))
    monkeypatch.setattr(check, "SEEN", 40)
    model = lively(nn.Sequential(MaskedConv2d(1, 6, 5, mask_type="A"), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    sampler = IncrementalSampler(model, (1, 30, 7), levels=4, backend=backend, order=order)
    assert torch.equal(sampler.sample(2, seed=0), sampler.sample(2, seed=0, method="naive"))
    assert seen == [(1, 6, 7)] and sampler.image_shape == (1, 30, 7)
    wrong = lively(Wild(lambda x: 2 * x if type(x) is torch.Tensor else x))
    with pytest.raises(NotImplementedError, match="model must compute"):
        IncrementalSampler(wrong, (1, 30, 7), levels=4, backend=backend).sample(1)
