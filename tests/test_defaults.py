"""What is computed from given tensors does not depend on torch's default device and dtype; what is made from nothing,
as modules are, follows them."""

import contextlib
import functools

import pytest
import torch
from ops import GAUSSIAN
from torch import nn

import fastelbo
import fastelbo.testing
from fastelbo import Scale, compat, distributions

CPU = torch.device("cpu")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def foreign(what):
    """Under a default device that has no numbers, or a default dtype that nobody chose, or both."""
    with contextlib.ExitStack() as stack:
        if "device" in what:
            stack.enter_context(torch.device("meta"))
        if "dtype" in what:
            stack.enter_context(default_dtype(torch.float64))
        yield


def values(seed, *shape, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def tensors(count, shape=(4, 6), dtype=torch.float32):
    """Leaves that want gradients, the same at each call."""
    return [values(seed, *shape, dtype=dtype).requires_grad_() for seed in range(count)]


def outcome(function, inputs, module=None):
    """What a function returns, and the gradients of its inputs and of a module's parameters."""
    torch.manual_seed(3)
    returned = function(*inputs)
    returned = [x for x in (returned if isinstance(returned, (tuple, list)) else (returned,))]
    wanted = [x for x in (*inputs, *(module.parameters() if module else ())) if x.requires_grad]
    differentiable = [x for x in returned if isinstance(x, torch.Tensor) and x.requires_grad]
    if not differentiable:
        return returned
    weights = [values(50 + i, *x.shape).to(x) for i, x in enumerate(differentiable)]
    return [*returned, *torch.autograd.grad(differentiable, wanted, weights, allow_unused=True)]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())
            assert torch.equal(a, b)
        else:
            assert a == b


MASK, NOISE, K_NOISE, SEED = values(9, 4, 6) > -0.5, values(8, 4, 6), values(8, 3, 4, 6), torch.tensor([5])
IMAGE = (2, 6, 5, 4)
KEYWORDS = {  # of the plain call of each op
    "kl-prior": {"balance": 0.8, "mask": MASK, "scale_p": Scale.nvae()},
    "rsample_kl": {"num_samples": 2},
    "rsample_kl-prior": {"mask": MASK, "balance": 0.5, "noise": NOISE},
    "log_prob": {"mask": MASK},
    "nll": {"beta_nll": 0.5, "mask": MASK, "reduction": "mean"},
}
OPS = {
    name: (op.function, functools.partial(tensors, op.arity), KEYWORDS.get(name, {})) for name, op in GAUSSIAN.items()
}
q, q_and_p, x_and_q = (OPS[name][1] for name in ("kl", "kl-prior", "log_prob"))
half_q = functools.partial(q, dtype=torch.bfloat16)
OPS |= {
    "rsample-half": (fastelbo.gaussian_rsample, half_q, {"num_samples": 3}),
    "rsample-seed": (fastelbo.gaussian_rsample, q, {"seed": 2**63 + 1, "noise_offset": 3, "temperature": 0.7}),
    "rsample-noise": (fastelbo.gaussian_rsample, q, {"noise": K_NOISE, "num_samples": 3, "out_dtype": torch.float16}),
    "rsample-number": (lambda m, **k: fastelbo.gaussian_rsample(m, 0.1, **k), lambda: tensors(1), {}),
    "rsample-inward": (
        lambda m, s, **k: fastelbo.gaussian_rsample(m, s[:1], **k),
        q,
        {"scale": Scale("logvar", clamp=(-0.5, 0.5), clamp_grad="inward")},
    ),
    "kl-half": (fastelbo.gaussian_kl, half_q, {"scale": Scale.softplus(), "reduction": "mean"}),
    "kl-numbers": (lambda m, s, **k: fastelbo.gaussian_kl(m, s, 0.1, 0.3, **k), q, {"scale_p": "var"}),
    **{
        f"kl-{per}": (fastelbo.gaussian_kl, q_and_p, {"free_bits": 0.1, "free_bits_per": per, "mask": MASK})
        for per in ("dim", "example", "batch")
    },
    "kl-mean": (fastelbo.gaussian_kl, q, {"mask": MASK, "reduction": "mean", "event_ndim": 0}),
    "rsample_kl-z": (lambda *x, **k: fastelbo.gaussian_rsample_kl(*x, **k)[0], q_and_p, {"seed": SEED}),
    "rsample_kl-kl": (lambda *x, **k: fastelbo.gaussian_rsample_kl(*x, **k)[1], q_and_p, {"free_bits": 1.0}),
    "log_prob-one_s": (lambda x, m, s, **k: fastelbo.gaussian_log_prob(x, m, s[0, 0], **k), x_and_q, {}),
    "nll-numbers": (lambda x, **k: fastelbo.gaussian_nll(x, 0.1, 0.2, **k), lambda: tensors(1), {}),
}
GROUPS = {"channel_groups": 3, "group_order": "interleaved"}


def convolution(x, weight, bias, cond, **keywords):
    return fastelbo.masked_conv2d(x, weight, bias, cond=cond, **keywords)


def parts(outputs):
    def make():
        return [
            values(i, *shape).requires_grad_()
            for i, shape in enumerate((IMAGE, (outputs, 6, 3, 3), (outputs,), (2, outputs, 5, 4)))
        ]

    return make


OPS |= {
    "masked_conv2d": (convolution, parts(6), {"mask_type": "A", "activation": "elu", **GROUPS}),
    "masked_conv2d-gate": (convolution, parts(12), {"mask_type": "B", "activation": "glu", "dilation": 2, **GROUPS}),
    "causal_conv2d": (
        lambda x, w, b, c, **k: fastelbo.causal_conv2d(x, w[:, :, :2], b, **k),
        parts(6),
        {"stack": "vertical", "mask_type": "A"},
    ),
}
everywhere = pytest.mark.parametrize("what", ["device", "dtype", "device and dtype"])


@pytest.mark.dispatch
@everywhere
@pytest.mark.parametrize("name", OPS)
def test_ops(backend, name, what):
    function, make, keywords = OPS[name]
    home = torch.get_default_device()
    keywords = {key: x.to(home) if isinstance(x, torch.Tensor) else x for key, x in keywords.items()}
    function = functools.partial(function, **keywords, backend=backend)
    inputs = [x.detach().to(home).requires_grad_() for x in make()]
    want = outcome(function, inputs)
    with foreign(what):
        assert_same(outcome(function, inputs), want)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@everywhere
@pytest.mark.parametrize("name", ["rsample", "rsample_kl-prior", "kl-numbers", "masked_conv2d-gate"])
def test_compiled_ops(name, what):
    function, make, keywords = OPS[name]
    function = functools.partial(function, **keywords)
    want = outcome(function, make())
    with foreign(what):
        assert_same(outcome(compiled(function), make()), want)


def one_sample_bound(x, x_mean, x_s, mean, s):
    z, log_q = fastelbo.gaussian_rsample_log_prob(mean.detach(), s.detach(), num_samples=3)
    terms = fastelbo.gaussian_log_prob(x, x_mean, x_s), fastelbo.gaussian_log_prob(z, 0.0, 0.0, event_ndim=1)
    return fastelbo.iwae_bound(*terms, log_q), fastelbo.importance_weighted_log_likelihood(terms[1] - log_q)


def normal(loc, s):
    p = distributions.Independent(distributions.Normal(loc, s.exp()), 1)
    value = p.rsample((2,))
    return value, p.log_prob(value), distributions.kl_divergence(p.base_dist, distributions.Normal(loc, 1.0))


def diffusers(mean, s):
    posterior = compat.diffusers.DiagonalGaussianDistribution(torch.cat([mean, s], 1), deterministic=False)
    certain = compat.diffusers.OobleckDiagonalGaussianDistribution(torch.cat([mean, s], 1), deterministic=True)
    generator = torch.Generator("cpu").manual_seed(4)
    return posterior.sample(generator), posterior.kl(), posterior.nll(mean), certain.sample(), certain.kl()


def nvae(mean, s):
    p = compat.nvae.Normal(mean, s, temp=0.7)
    return *p.sample(), p.log_p(mean), p.kl(compat.nvae.Normal(s, mean))


def bayesian(mean, s):
    weights, kl = compat.bayesian.sample_weights([mean, mean[0]], [s, s[0]], [0.1, MASK[0].float()], [0.3, 0.7])
    return *weights, kl, compat.bayesian.kl_div(mean, s.exp(), 0.0, 0.1)


def vits(m, logs, logs_q):
    mask = MASK[None, :1].expand(4, 1, 6)
    m, logs, logs_q = (x[:, None].expand(4, 5, 6) for x in (m, logs, logs_q))
    z = compat.vits.posterior_sample(m, logs, mask)
    return z, compat.vits.kl_loss(z, logs_q, m, logs, mask)


OBJECTIVES = {
    "elbo": (
        lambda x, x_mean, mean, s: fastelbo.gaussian_elbo(
            x, x_mean, 0.1, mean, s, beta=0.3, free_bits=0.1, x_mask=MASK
        ),
        4,
    ),
    "rsample_log_prob": (fastelbo.gaussian_rsample_log_prob, 2),
    "rsample_log_prob-noise": (lambda *x: fastelbo.gaussian_rsample_log_prob(*x, noise=NOISE, scale="softplus"), 2),
    "one_sample_kl": (fastelbo.gaussian_one_sample_kl, 2),
    "one_sample_kl-prior": (fastelbo.gaussian_one_sample_kl, 4),
    "iwae": (one_sample_bound, 5),
    "optimal_sigma": (lambda *x: (fastelbo.optimal_sigma(*x), fastelbo.optimal_sigma(*x, dim=0, mask=MASK)), 2),
    "distributions": (normal, 2),
    "diffusers": (diffusers, 2),
    "nvae": (nvae, 2),
    "bayesian": (bayesian, 2),
    "vits": (vits, 3),
    "pythae": (lambda *x: (*compat.pythae.sample_gauss(*x), *compat.pythae.sample_and_kl(*x)), 2),
    "vdvae": (lambda a, b: compat.vdvae.draw_gaussian_diag_samples(a, b), 2),
    "guided_diffusion": (lambda a, b: compat.guided_diffusion.normal_kl(a, b, 0.1, -0.2), 2),
    "dreamer": (lambda a, b, c, d: compat.dreamer.kl_loss_v3(a, b.exp(), c, d.exp()), 4),
    "nll_loss": (lambda *x: fastelbo.nn.GaussianNLLLoss(full=True)(*x[:2], x[2].exp()), 3),
    "nll_loss-number": (lambda *x: fastelbo.nn.GaussianNLLLoss(reduction="sum")(*x, 0.3), 2),
}


@everywhere
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_and_drop_ins(name, what):
    function, count = OBJECTIVES[name]
    want = outcome(function, tensors(count))
    with foreign(what):
        assert_same(outcome(function, tensors(count)), want)


class Colours(nn.Module):
    def __init__(self):
        super().__init__()
        options = {"channel_groups": 3, "group_order": "contiguous"}
        self.first = fastelbo.nn.GatedMaskedConv2d(3, 6, 5, mask_type="A", cond_channels=2, **options)
        self.block = fastelbo.nn.GatedMaskedConv2d(6, 6, 3, link="mask-first-layer")
        self.last = fastelbo.nn.MaskedConv2d(6, 9, 1, mask_type="B", activation="relu", **options)

    def forward(self, x, cond):
        return self.last(self.block(*self.first(x, x, cond))[1])


@everywhere
def test_modules(what):
    torch.manual_seed(1)
    network = Colours()
    inputs = values(0, 2, 3, 5, 4).requires_grad_(), values(1, 2, 2).requires_grad_()
    want = outcome(network, inputs, network)
    with foreign(what):
        assert_same(outcome(network, inputs, network), want)


def weights_of_others():
    """state_dicts of other projects: with a mask buffer, with k x k kernels for a stack, with weights at dead taps."""
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :2, :] = mask[..., 2, :3] = 1
    rows = (torch.arange(5) < 3).float()[:, None].expand(4, 2, 5, 5)
    return [
        (fastelbo.nn.MaskedConv2d, {"mask_type": "B"}, {"weight": values(0, 4, 2, 5, 5), "mask": mask}),
        (fastelbo.nn.VerticalStackConv2d, {}, {"weight": values(0, 4, 2, 5, 5) * rows, "mask": rows}),
        (fastelbo.nn.HorizontalStackConv2d, {}, {"weight": values(0, 4, 2, 1, 3)}),
    ]


@everywhere
@pytest.mark.filterwarnings("ignore:.*not 0 at dead taps")
@pytest.mark.parametrize("index", range(3))
def test_masks_and_loading(what, index):
    """Of a module that is there, and of one that is made under the default device and takes the weights over."""
    cls, keywords, state = weights_of_others()[index]

    def load(module, **keywords):
        module.load_state_dict({"bias": values(1, 4), **state}, **keywords)
        return module

    module, want = cls(2, 4, 5, **keywords), load(cls(2, 4, 5, **keywords))
    with foreign(what):
        load(module)
        assert_same([module.weight, module.live_taps()], [want.weight, want.live_taps()])
        fresh = load(cls(2, 4, 5, **keywords), assign=True)
    assert_same([fresh.weight.detach(), fresh.live_taps()], [want.weight.detach(), want.live_taps()])


def test_what_is_made_from_nothing_follows_the_defaults():
    for device in (CPU, torch.device("meta")):
        with device, default_dtype(torch.float64):
            module = fastelbo.nn.MaskedConv2d(2, 4, 3)
            assert module.weight.device == module.live_taps().device == device
            assert module.weight.dtype == torch.float64
            assert fastelbo.conv_mask2d(4, 2, 3, "A").device == device
            assert distributions.Normal(0.0, 1.0).loc.device == device
            assert fastelbo.testing.gaussian((2, 3))[0].device == device


@everywhere
def test_seeds_of_ranks(what, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:

        def seeds():
            torch.manual_seed(2)
            ways = fastelbo.distributed.same_seed, fastelbo.distributed.independent_seed
            return [way(seed, device=CPU) for way in ways for seed in (None, -3)]

        want = seeds()
        with foreign(what):
            assert_same(seeds(), want)
    finally:
        torch.distributed.destroy_process_group()
