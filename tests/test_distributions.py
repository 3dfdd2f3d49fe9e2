"""Normal, Independent and kl_divergence against torch.distributions, and in Pyro."""

import copy
import pickle
import re
import warnings

import fresh_python
import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td

import fastelbo
from fastelbo import distributions as fd
from fastelbo.testing import assert_within_budget

NAN = float("nan")


def parameters(shape=(4, 3), scale_shape=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(shape if scale_shape is None else scale_shape, generator=generator, dtype=torch.float64) + 0.2
    return loc.to(dtype).requires_grad_(), scale.to(dtype).requires_grad_()


def assert_same(actual, expected, inputs):
    """Equal values, and equal gradients under one upstream."""
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    options = {"allow_unused": True, "retain_graph": True}
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, upstream, **options),
        torch.autograd.grad(expected, inputs, upstream, **options),
    )


@pytest.fixture
def validation():
    """Validation as torch has it by default, whatever torch.compile did to it before; restored afterwards."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(True)
    yield
    td.Distribution.set_default_validate_args(before)


# What torch's classes promise


def test_are_torchs():
    normal = fd.Normal(torch.zeros(4, 3), 1.0)
    assert isinstance(normal, td.Normal)
    assert isinstance(fd.Independent(normal, 1), td.Independent)
    assert repr(normal) == repr(td.Normal(torch.zeros(4, 3), 1.0))
    assert (normal.batch_shape, normal.event_shape, normal.has_rsample) == ((4, 3), (), True)
    assert fd.Independent(normal, 1).event_shape == (3,)


@pytest.mark.parametrize(
    ("loc", "scale"),
    [(0.0, 1.0), (0, 2), (torch.zeros(3), 1), (1.0, torch.ones(2, 1)), (torch.zeros(4, 1), torch.ones(3))],
    ids=["numbers", "ints", "scalar-scale", "scalar-loc", "broadcast"],
)
def test_parameters_broadcast_as_in_torch(loc, scale):
    ours, theirs = fd.Normal(loc, scale), td.Normal(loc, scale)
    assert torch.equal(ours.loc, theirs.loc) and torch.equal(ours.scale, theirs.scale)
    assert ours.batch_shape == theirs.batch_shape
    assert ours.rsample().shape == theirs.rsample().shape
    assert ours.rsample().dtype == theirs.rsample().dtype


@pytest.mark.parametrize("name", ["mean", "mode", "stddev", "variance"])
def test_properties(name):
    arguments = parameters()
    torch.testing.assert_close(getattr(fd.Normal(*arguments), name), getattr(td.Normal(*arguments), name))


@pytest.mark.parametrize("name", ["log_prob", "cdf", "icdf"])
def test_functions_of_a_value(name):
    arguments = parameters()
    value = torch.rand(5, 4, 3, dtype=torch.float64)
    assert_same(getattr(fd.Normal(*arguments), name)(value), getattr(td.Normal(*arguments), name)(value), arguments)


@pytest.mark.parametrize("value", [0.5, 2, torch.tensor([1, -2, 3]), torch.tensor(0.25)], ids=str)
def test_log_prob_of_values_of_other_types(value):
    arguments = (*parameters(), False)
    torch.testing.assert_close(fd.Normal(*arguments).log_prob(value), td.Normal(*arguments).log_prob(value))


def test_entropy_and_cross_check_by_kl():
    arguments = parameters()
    assert_same(fd.Normal(*arguments).entropy(), td.Normal(*arguments).entropy(), arguments)
    ours, theirs = (m.Independent(m.Normal(*arguments), 1).entropy() for m in (fd, td))
    assert_same(ours, theirs, arguments)


@pytest.mark.parametrize("ndim", [0, 1, 2])
def test_independent_log_prob(ndim):
    arguments = parameters((2, 4, 3))
    value = torch.randn(5, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    ours, theirs = (m.Independent(m.Normal(*arguments), ndim).log_prob(value) for m in (fd, td))
    assert_same(ours, theirs, (*arguments, value))


def test_independent_of_other_bases():
    loc, scale = parameters((2, 4, 3))
    value = torch.randn(2, 4, 3, dtype=torch.float64)
    nested = fd.Independent(fd.Independent(fd.Normal(loc, scale), 1), 1)
    torch.testing.assert_close(nested.log_prob(value), td.Independent(td.Normal(loc, scale), 2).log_prob(value))
    laplace = fd.Independent(td.Laplace(loc, scale), 1)
    torch.testing.assert_close(laplace.log_prob(value), td.Independent(td.Laplace(loc, scale), 1).log_prob(value))
    assert laplace.rsample().shape == laplace.sample((2,)).shape[1:] == (2, 4, 3)
    with pytest.raises(TypeError, match="generator"):
        laplace.rsample(generator=torch.Generator())
    with pytest.raises(ValueError, match="Expected reinterpreted_batch_ndims <= len"):
        fd.Independent(fd.Normal(loc, scale), 4)


def test_expand():
    loc, scale = parameters((4, 1))
    ours, theirs = (m.Independent(m.Normal(loc, scale), 1).expand((2, 4)) for m in (fd, td))
    assert type(ours) is fd.Independent and type(ours.base_dist) is fd.Normal
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    value = torch.randn(2, 4, 1, dtype=torch.float64)
    assert_same(ours.log_prob(value), theirs.log_prob(value), (loc, scale))
    assert ours.rsample((3,)).shape == (3, 2, 4, 1)
    with pytest.raises(RuntimeError, match="expand"):
        fd.Normal(loc, scale).expand((3, 2))


def test_copies():
    loc, scale = (x.detach() for x in parameters())
    for dist in (fd.Normal(loc, scale), fd.Independent(fd.Normal(loc, scale), 1)):
        for other in (copy.deepcopy(dist), pickle.loads(pickle.dumps(dist))):
            assert type(other) is type(dist)
            assert torch.equal(other.log_prob(loc), dist.log_prob(loc))


def test_inside_other_distributions():
    loc, scale = parameters()
    value = torch.rand(4, 3, dtype=torch.float64)

    def everything(m):
        base = m.Normal(loc, scale)
        weights = td.Categorical(torch.ones(4, 3, dtype=torch.float64))
        yield td.TransformedDistribution(base, [td.ExpTransform()]).log_prob(value)
        yield td.MixtureSameFamily(weights, base).log_prob(value[:, 0])
        yield td.Independent(base, 1).log_prob(value)

    for ours, theirs in zip(everything(fd), everything(td), strict=True):
        assert_same(ours, theirs, (loc, scale))


# Draws


def test_draws_are_gaussian_rsamples():
    loc, scale = parameters()
    for shape, num_samples in (((), None), ((5,), 5), ((2, 3), 6), ([4], 4), (torch.Size((1,)), 1)):
        actual = fd.Normal(loc, scale).rsample(shape, generator=torch.Generator().manual_seed(3))
        expected = fastelbo.gaussian_rsample(
            loc, scale, scale="std", num_samples=num_samples, generator=torch.Generator().manual_seed(3)
        )
        assert_same(actual, expected.reshape(*shape, 4, 3), (loc, scale))


def test_independent_draws_what_its_base_does():
    base = fd.Normal(*parameters())
    for name in ("sample", "rsample"):
        ours, bases = (
            getattr(dist, name)((2,), generator=torch.Generator().manual_seed(0))
            for dist in (fd.Independent(base, 1), base)
        )
        assert torch.equal(ours, bases)


def test_draws_have_the_distribution():
    z = fd.Normal(2.0, 0.5).sample((100_000,))
    assert not z.requires_grad
    assert scipy.stats.kstest(z.numpy(), scipy.stats.norm(2.0, 0.5).cdf).pvalue > 1e-3


def test_manual_seed_decides_and_draws_differ():
    normal = fd.Normal(*parameters())
    torch.manual_seed(1)
    first, second = normal.rsample(), normal.rsample()
    torch.manual_seed(1)
    assert torch.equal(first, normal.rsample())
    assert not torch.equal(first, second)


def test_sample_has_no_gradient_and_rsample_has():
    loc, scale = parameters()
    assert not fd.Normal(loc, scale).sample((2,)).requires_grad
    (d_loc,) = torch.autograd.grad(fd.Normal(loc, scale).rsample((5,)).sum(), loc)
    torch.testing.assert_close(d_loc, torch.full_like(loc, 5.0))


def test_no_draws_at_all():
    normal = fd.Normal(*parameters())
    assert normal.rsample((0,)).shape == normal.sample((2, 0)).shape[1:] == (0, 4, 3)
    assert fd.Normal(torch.zeros(0, 3), 1.0).rsample((2,)).shape == (2, 0, 3)


def test_generator_of_another_type():
    with pytest.raises(TypeError, match="generator must be a torch\\.Generator; got int"):
        fd.Normal(0.0, 1.0).rsample(generator=0)


# KL


def pair(p_module, q_module, event=None):
    inputs = (*parameters(seed=0), *parameters(seed=1))
    p, q = p_module.Normal(*inputs[:2]), q_module.Normal(*inputs[2:])
    if event is not None:
        p, q = p_module.Independent(p, event), q_module.Independent(q, event)
    return p, q, inputs


@pytest.mark.parametrize("function", [fd.kl_divergence, td.kl_divergence], ids=["ours", "torch"])
@pytest.mark.parametrize("event", [None, 0, 1, 2])
@pytest.mark.parametrize("modules", [(fd, fd), (fd, td), (td, fd), (td, td)], ids=["oo", "ot", "to", "tt"])
def test_kl_of_every_pair(function, event, modules):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an ambiguous pair
        p, q, inputs = pair(*modules, event)
        actual = function(p, q)
    expected = td.kl_divergence(*(td.Normal(*inputs[i : i + 2]) for i in (0, 2)))
    assert_same(actual, expected.sum(tuple(range(2 - (event or 0), 2))) if event else expected, inputs)


@pytest.mark.parametrize("event", [None, 1])
@pytest.mark.parametrize("modules", [(fd, fd), (fd, td), (td, fd)], ids=["oo", "ot", "to"])
def test_torchs_kl_runs_on_gaussian_kl(modules, event):
    """It keeps the digits that torch's own formula loses near 0."""
    mean, offset = torch.zeros(4, 3), torch.full((4, 3), 1e-4)
    p, q = modules[0].Normal(mean + offset, 1 + offset), modules[1].Normal(mean, torch.ones(4, 3))
    exact = td.kl_divergence(*(td.Normal(x.loc.double(), x.scale.double()) for x in (p, q)))
    if event is not None:
        p, q, exact = modules[0].Independent(p, event), modules[1].Independent(q, event), exact.sum(-1)
    torch.testing.assert_close(td.kl_divergence(p, q).double(), exact, rtol=1e-6, atol=0)


def test_kl_broadcasts():
    inputs = (*parameters((4, 1, 3)), *parameters((2, 3), seed=1))
    for event in (0, 1):
        ours, theirs = (
            m.kl_divergence(*(m.Independent(m.Normal(*inputs[i : i + 2]), event) for i in (0, 2))) for m in (fd, td)
        )
        assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("name", ["Gumbel", "Laplace", "Uniform", "Exponential", "Gamma", "Beta", "Cauchy", "Poisson"])
def test_kl_with_other_distributions(name):
    """As torch has it, NotImplementedError included."""
    loc, scale = (x.detach() for x in parameters())
    other = getattr(td, name)(*((scale,) if name in ("Exponential", "Poisson") else (scale, scale + 1)))

    def both_ways(m):
        for p, q in ((m.Normal(loc, scale), other), (other, m.Normal(loc, scale))):
            try:
                yield m.kl_divergence(p, q)
            except NotImplementedError as error:
                yield str(error)

    for ours, theirs in zip(both_ways(fd), both_ways(td), strict=True):
        assert ours == theirs if isinstance(theirs, str) else torch.equal(ours, theirs)


def test_kl_of_independents_that_are_not_alike():
    """As torch has it, or Pyro, which puts an implementation of its own in the place of torch's."""
    base = fd.Normal(*parameters())
    p, q = fd.Independent(base, 1), fd.Independent(base, 2)
    plain = td.Independent(base, 1), td.Independent(base, 2)
    try:
        expected = td.kl_divergence(*plain)
    except NotImplementedError:
        with pytest.raises(NotImplementedError):
            fd.kl_divergence(p, q)
    else:
        assert torch.equal(fd.kl_divergence(p, q), expected)
    laplace = td.Laplace(*parameters())
    torch.testing.assert_close(
        fd.kl_divergence(fd.Independent(laplace, 1), fd.Independent(laplace, 1)), torch.zeros(4, dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype):
    inputs = (*parameters((64, 48), dtype=dtype), *parameters((64, 48), seed=1, dtype=dtype))
    value = torch.randn(64, 48).to(dtype)

    def run(m, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        p, q = m.Normal(*leaves[:2]), m.Normal(*leaves[2:])
        for result in (m.kl_divergence(p, q), p.log_prob(value.to(dtype))):
            yield result.detach()
            yield from (g for g in torch.autograd.grad(result.sum(), leaves, allow_unused=True) if g is not None)

    actual = list(run(fd, dtype))
    assert actual[0].dtype == actual[5].dtype == torch.float32
    for three in zip(actual, run(td, torch.float64), run(td, dtype), strict=True):
        assert_within_budget(*three)


# Bad values


BAD = {
    "negative-scale": lambda m, v: m.Normal(torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), v),
    "zero-scale": lambda m, v: m.Normal(0.0, 0.0, v),
    "nan-scale": lambda m, v: m.Normal(torch.zeros(2), torch.tensor([NAN, 1.0]), v),
    "nan-loc": lambda m, v: m.Normal(torch.tensor([NAN, 0.0]), 1.0, v),
    "nan-value": lambda m, v: m.Normal(torch.zeros(2), 1.0, v).log_prob(torch.tensor([NAN, 0.0])),
    "nan-value-cdf": lambda m, v: m.Normal(torch.zeros(2), 1.0, v).cdf(torch.tensor([NAN, 0.0])),
    "nan-value-event": lambda m, v: m.Independent(m.Normal(torch.zeros(2), 1.0, v), 1).log_prob(torch.full((2,), NAN)),
}
WRONG = {
    "value-shape": lambda m, v: m.Normal(torch.zeros(2, 3), 1.0, v).log_prob(torch.zeros(2)),
    "value-type": lambda m, v: m.Normal(torch.zeros(2, 3), 1.0, v).log_prob([0.0]),
    "loc-type": lambda m, v: m.Normal("0", 1.0, v),
    "shapes": lambda m, v: m.Normal(torch.zeros(2), torch.ones(3), v),
}


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("case", [*BAD.values(), *WRONG.values()], ids=[*BAD, *WRONG])
def test_raises_what_torch_raises(case):
    for validate in (None, True):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            case(td, validate)
        with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
            case(fd, validate)


@pytest.mark.usefixtures("validation")
@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_validation_can_be_turned_off(case):
    case(fd, False)
    td.Distribution.set_default_validate_args(False)
    case(fd, None)
    with pytest.raises(ValueError, match="invalid values"):
        case(fd, True)


@pytest.mark.usefixtures("validation")
def test_process_wide_flags_stay():
    for default in (True, False):
        td.Distribution.set_default_validate_args(default)
        for validate in (None, True, False):
            normal = fd.Independent(fd.Normal(torch.zeros(2), 1.0, validate), 1, validate)
            normal.log_prob(normal.rsample())
            assert normal.base_dist._validate_args is (default if validate is None else validate)
        assert td.Distribution._validate_args is default
        assert td.Normal._validate_args is default


@pytest.mark.usefixtures("validation")
def test_never_waits_for_a_device():
    """Tensors without values stand for those on a device: looking at them is an error, and torch's Normal looks."""

    def use(m, **keywords):
        loc, scale = torch.empty(4, 3, device="meta"), torch.empty(4, 3, device="meta")
        q = m.Independent(m.Normal(loc, scale, **keywords), 1)
        return q.rsample((2,)), q.log_prob(loc), q.entropy(), q.base_dist.cdf(loc), m.kl_divergence(q, q)

    with pytest.raises(RuntimeError, match="meta"):
        use(td)
    for keywords in ({}, {"validate_args": True}, {"validate_args": False}):
        assert [tuple(out.shape) for out in use(fd, **keywords)] == [(2, 4, 3), (4,), (4,), (4, 3), (4,)]


# torch.compile, torch.func, double backward


def test_compiles_without_a_break(validation):
    def use(loc, scale, value):
        q, p = fd.Independent(fd.Normal(loc, scale), 1), fd.Independent(fd.Normal(torch.zeros_like(loc), 1.0), 1)
        return q.rsample((2,)), q.log_prob(value), fd.kl_divergence(q, p), fd.kl_divergence(q.base_dist, p.base_dist)

    arguments = (*parameters(), torch.randn(4, 3, dtype=torch.float64))
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = use(*arguments)
    torch.manual_seed(0)
    for ours, theirs in zip(compiled(*arguments), expected, strict=True):
        assert_same(ours, theirs, arguments[:2])


def test_a_check_that_is_asked_for_is_compiled():
    compiled = torch.compile(
        lambda *arguments: fd.Normal(*arguments, validate_args=True).rsample(), fullgraph=True, backend="aot_eager"
    )
    assert compiled(torch.zeros(3), torch.ones(3)).shape == (3,)
    with pytest.raises(RuntimeError, match="Expected parameter scale to satisfy the constraint"):
        compiled(torch.zeros(3), -torch.ones(3))


@pytest.mark.usefixtures("validation")
def test_torch_func():
    loc, scale = (x.detach() for x in parameters())
    rows = torch.func.vmap(lambda loc, scale: fd.Independent(fd.Normal(loc, scale), 1).log_prob(loc + 1))(loc, scale)
    torch.testing.assert_close(rows, td.Independent(td.Normal(loc, scale), 1).log_prob(loc + 1))
    gradient = torch.func.grad(lambda loc: fd.kl_divergence(fd.Normal(loc, scale), fd.Normal(0.0, 1.0)).sum())(loc)
    torch.testing.assert_close(gradient, loc)


def test_gradgradcheck():
    inputs = (*parameters((2, 2)), *parameters((2, 2), seed=1))

    def use(*inputs):
        return fd.kl_divergence(fd.Normal(*inputs[:2], False), fd.Normal(*inputs[2:], False))

    assert torch.autograd.gradcheck(use, inputs)
    assert torch.autograd.gradgradcheck(use, inputs)


# Pyro


class Conjugate:
    """N(x; z, 0.7^2) under N(z; 0, 2^2), whose posterior and evidence are known."""

    def __init__(self):
        import pyro
        from pyro.distributions import constraints

        from fastelbo.compat.pyro import Normal

        self.x = torch.randn(20, 3, dtype=torch.float64) * 0.7 + torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        self.zeros, self.scale, self.noise = torch.zeros(3, dtype=torch.float64), 2.0, 0.7
        precision = self.scale**-2 + len(self.x) * self.noise**-2
        self.mean, self.std = (
            self.x.sum(0) * self.noise**-2 / precision,
            torch.full((3,), precision**-0.5, dtype=torch.float64),
        )
        covariance = self.noise**2 * np.eye(len(self.x)) + self.scale**2
        self.evidence = scipy.stats.multivariate_normal(cov=covariance).logpdf(self.x.T.numpy()).sum()

        def model():
            z = pyro.sample("z", Normal(self.zeros, self.scale).to_event(1))
            with pyro.plate("data", len(self.x)):
                pyro.sample("x", Normal(z, self.noise).to_event(1), obs=self.x)

        def guide(start=None):
            mean, std = (self.zeros.clone(), self.zeros + 1) if start is None else start
            mean = pyro.param("mean", mean)
            std = pyro.param("std", std, constraint=constraints.positive)
            pyro.sample("z", Normal(mean, std).to_event(1))

        pyro.clear_param_store()
        self.pyro, self.model, self.guide, self.Normal = pyro, model, guide, Normal


@pytest.fixture
def conjugate():
    return Conjugate()


@pytest.mark.parametrize("elbo", ["Trace_ELBO", "TraceMeanField_ELBO"])
def test_pyros_svi_finds_the_exact_posterior(conjugate, elbo):
    pyro = conjugate.pyro
    optimizer = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.99})
    loss = getattr(pyro.infer, elbo)(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(conjugate.model, conjugate.guide, optimizer, loss)
    for _ in range(600):
        svi.step()
    error = (pyro.param("mean") - conjugate.mean) / conjugate.std
    assert error.abs().max() < 0.05
    assert (pyro.param("std") / conjugate.std - 1).abs().max() < 0.05


def test_pyros_elbo_at_the_posterior_is_the_evidence(conjugate):
    """Of every single draw, because there the importance weight is constant."""

    def guide():
        conjugate.guide((conjugate.mean, conjugate.std))

    for _ in range(3):
        loss = conjugate.pyro.infer.Trace_ELBO().loss(conjugate.model, guide)
        torch.testing.assert_close(-loss, float(conjugate.evidence))


def test_pyro_keeps_our_classes(conjugate):
    from fastelbo.compat.pyro import Independent

    nodes = conjugate.pyro.poutine.trace(conjugate.model).get_trace().nodes
    for site in ("z", "x"):
        assert type(nodes[site]["fn"]) is Independent
        assert type(nodes[site]["fn"].base_dist) is conjugate.Normal
    normal = conjugate.Normal(torch.zeros(2, 4, 3), 1.0)
    assert type(normal.to_event(0)) is conjugate.Normal
    assert normal.to_event().event_shape == (2, 4, 3)
    event = normal.to_event(1)
    assert event.to_event(1).event_shape == (4, 3) and type(event.to_event(1)) is Independent
    assert type(event.to_event(-1)) is conjugate.Normal
    assert type(event.expand_by((5,))) is Independent
    assert event.mask(torch.tensor([[True]])).log_prob(torch.zeros(2, 4, 3)).shape == (2, 4)


def test_pyros_own_normal_meets_ours(conjugate):
    import pyro.distributions

    inputs = (*parameters(seed=0), *parameters(seed=1))
    ours, theirs = conjugate.Normal(*inputs[:2]), pyro.distributions.Normal(*inputs[2:])
    expected = td.kl_divergence(td.Normal(*inputs[:2]), td.Normal(*inputs[2:]))
    assert_same(td.kl_divergence(ours, theirs), expected, inputs)
    assert_same(td.kl_divergence(ours.to_event(1), theirs.to_event(1)), expected.sum(-1), inputs)


def test_importing_fastelbo_imports_no_drop_in():
    program = """
import sys, torch
before = set(sys.modules)
import fastelbo
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"pyro", "diffusers", "torchbnn"}, new
assert not {"fastelbo.distributions", "fastelbo.compat"} & set(sys.modules)
assert fastelbo.distributions.Normal and fastelbo.compat.vdvae.gaussian_analytical_kl
assert not {name.split(".")[0] for name in sys.modules} & {"pyro", "diffusers", "torchbnn"}
try:
    fastelbo.compat.nobody
except AttributeError as error:
    assert "fastelbo.compat" in str(error) and "nobody" in str(error)
else:
    raise AssertionError
"""
    fresh_python.run(program)


@pytest.mark.parametrize(
    "kinds", [(int, int), (int, torch.float32), (int, torch.float64), (torch.float64, int), (torch.int32, int)], ids=str
)
def test_integers_are_computed_as_torch_does(kinds):
    loc, scale = torch.tensor([0, 1]), torch.tensor([1, 2])
    loc, scale = (x if kind is int else x.to(kind) for x, kind in zip((loc, scale), kinds, strict=True))
    q, theirs = fd.Normal(loc, scale), torch.distributions.Normal(loc, scale)
    other = torch.distributions.Normal(torch.tensor([1, 1]), torch.tensor([3, 1]))
    for value in (torch.tensor([1, 2]), torch.tensor([0.5, 2.0])):
        torch.testing.assert_close(q.log_prob(value), theirs.log_prob(value))
    torch.testing.assert_close(fd.kl_divergence(q, q), torch.distributions.kl_divergence(theirs, theirs))
    torch.testing.assert_close(fd.kl_divergence(q, other), torch.distributions.kl_divergence(theirs, other))
    torch.testing.assert_close(fd.kl_divergence(other, q), torch.distributions.kl_divergence(other, theirs))
    assert q.rsample((3,)).dtype == torch.result_type(loc.float() if not loc.is_floating_point() else loc, scale)
    assert q.sample().shape == (2,)


def test_errors_name_what_the_caller_named():
    q = fd.Normal(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"^q.loc must broadcast with p.loc of shape \(2,\); got \(3,\)"):
        fd.kl_divergence(q, fd.Normal(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match=r"^sample_shape must make no more than 64 dimensions; got 2 in front of 64"):
        fd.Normal(torch.zeros([1] * 64), 1.0).rsample((2,))
    with pytest.raises(TypeError, match=r"^value must be float32"):
        fd.Normal(torch.zeros(2), 1.0, validate_args=False).log_prob(torch.zeros(2, dtype=torch.complex64))


def test_other_names_are_torchs():
    assert {name for name in td.__all__ if getattr(fd, name) is not getattr(td, name)} == set(fd.__all__)
    assert fd.constraints is td.constraints
    with pytest.raises(AttributeError, match=r"^module 'fastelbo.distributions' has no attribute 'Gaussian'$"):
        fd.Gaussian  # noqa: B018
