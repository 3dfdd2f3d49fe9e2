"""The ops inside torch: opcheck, compile, export, checkpointing, autocast, torch.func, double backward and threads."""

import copy
import functools
import io
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ops import GAUSSIAN as OPS
from ops import OPS as EVERY
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastelbo
from fastelbo import Scale

assert fastelbo.backends.usable("cpu") is None  # and loads the library


DRAWING = {name: op for name, op in OPS.items() if op.drawn}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_drawing_op = pytest.mark.parametrize("op", DRAWING.values(), ids=DRAWING)

LAYOUTS = {
    "contiguous": lambda i, x: x,
    "transposed": lambda i, x: x.mT.contiguous().mT,
    "packed": lambda i, x: torch.cat([x, -x], 1).chunk(2, 1)[i % 2],
    "channels_last": lambda i, x: x.contiguous(memory_format=torch.channels_last),
    "packed-channels_last": lambda i, x: (
        torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[i % 2]
    ),
    "mixed": lambda i, x: x.contiguous(memory_format=torch.channels_last) if i % 2 else x,
    "broadcast": lambda i, x: (x, x[:1, :, :1, :1], x[:, :1], x[0, 0, 0, 0])[i],
    "expanded": lambda i, x: x[:1].expand_as(x),
}
IMAGE = (2, 3, 4, 5)

SCALES = {
    **{kind: Scale(kind) for kind in fastelbo.scale.KINDS},
    "softplus-beta": Scale("softplus", beta=2.5),
    "min_std": Scale("log_std", min_std=0.1),
    "var_eps": Scale("var", var_eps=0.1),
    "min_std-var_eps": Scale("softplus", min_std=0.1, var_eps=0.2),
    "soft_clamp": Scale("logvar", soft_clamp=2.0),
    "nvae": Scale.nvae(),
    # away_from_limits keeps values at least 0.1 off; numerical derivatives are blind to the other two outside them
    "clamp-zero": Scale("logvar", clamp=(-0.5, 0.5)),
    "clamp-straight_through": Scale("logvar", clamp=(-9.0, 9.0), clamp_grad="straight_through"),
    "clamp-inward": Scale("logvar", clamp=(-9.0, 9.0), clamp_grad="inward"),
}
every_scale = pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)


def away_from_limits(i, x):
    return torch.where(((x.abs() - 0.5).abs() < 0.1) & (x.abs() < 0.6), x * 1.6, x)


def gradients(outputs, inputs, **keywords):
    """Gradients of a sum with weights that differ from element to element and lie in memory as the outputs do."""
    weights = [
        torch.empty_like(out).copy_(torch.arange(1.0, 1 + out.numel()).cos().reshape(out.shape)) for out in outputs
    ]
    return torch.autograd.grad(outputs, inputs, weights, **keywords)


def results(function, inputs):
    """Outputs and gradients."""
    outputs = function(*inputs)
    return [*(out.detach() for out in outputs), *gradients(outputs, inputs)]


def assert_equal(got, want):
    """The same kernels on the same inputs: the same bits, in tensors of the same strides."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype == b.dtype


def assert_close(got, want):
    """The same float64 arithmetic in another order: a few dozen roundings of numbers of order 1."""
    got, want = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


# The raw ops

VARIANTS = {
    "plain": {},
    "elementwise": {"event_ndim": 0, "dtype": torch.bfloat16},
    "samples": {"num_samples": 3, "dtype": torch.float64, "scale": Scale.nvae()},
}
every_op_and_variant = pytest.mark.parametrize(
    ("op", "variant"),
    [
        pytest.param(op, variant, id=f"{name}-{variant}")
        for name, op in OPS.items()
        for variant in VARIANTS
        if op.terms or variant != "elementwise"  # else it has no events
    ],
)


class Recorder(TorchDispatchMode):
    """Records the calls of our ops, but for the question whether the CUDA library can run, asked once a process."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        ours = function.namespace in ("fastelbo", "fastelbo_triton")
        if ours and function is not torch.ops.fastelbo.cuda_error.default:
            detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            self.calls.append((function, detached))
        return function(*args, **(kwargs or {}))


def raw_calls(op, layout, variant, backend):
    """The forward's call and the backward's, as the public op makes them."""
    keywords = {**VARIANTS[variant], "backend": backend}
    dtype = keywords.pop("dtype", torch.float32)
    inputs = op.inputs(IMAGE, lay_out=LAYOUTS[layout], dtype=dtype)
    with Recorder() as recorder:
        results(lambda *inputs: op(*inputs, **keywords), inputs)
    assert len(recorder.calls) == 2
    return recorder.calls


@pytest.mark.dispatch
@every_op_and_variant
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_strides_of_real_ones(op, variant, layout, kernels):
    for function, args in raw_calls(op, layout, variant, kernels):
        real = function(*args)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
        if isinstance(real, torch.Tensor):
            real, fake = (real,), (fake,)
        for a, b in zip(fake, real, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), function


@pytest.mark.dispatch
@every_op_and_variant
def test_opcheck(op, variant, kernels):
    layout = {"plain": "contiguous", "elementwise": "packed-channels_last", "samples": "broadcast"}[variant]
    for function, args in raw_calls(op, layout, variant, kernels):
        torch.library.opcheck(function, args)


def test_opcheck_of_the_seed():
    """It draws, so that only what does not compare two calls can be checked."""
    op = torch.ops.fastelbo.draw_seed.default
    program = torch.export.export(Module(OPS["rsample"], seed=None), tuple(OPS["rsample"].inputs()))
    assert op in [node.target for node in program.graph.nodes]
    assert torch.Tag.nondeterministic_seeded in op.tags
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (torch.empty(()),), test_utils=tests)


# torch.compile


def compiled(function, backend="aot_eager", **keywords):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **keywords)


@every_op_and_variant
def test_compile_equals_eager(op, variant):
    keywords = dict(VARIANTS[variant])
    inputs = op.inputs(IMAGE, lay_out=LAYOUTS["packed"], dtype=keywords.pop("dtype", torch.float32))

    def function(*inputs):
        return op(*inputs, **keywords)

    assert_equal(results(compiled(function), inputs), results(function, inputs))


@every_op
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "broadcast", "expanded"])
def test_compile_layout(op, layout):
    inputs = op.inputs(IMAGE, lay_out=LAYOUTS[layout])
    assert_equal(results(compiled(op), inputs), results(op, inputs))


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["rsample_kl-prior", "nll"])
def test_inductor_equals_eager(name):
    op = OPS[name]
    inputs = op.inputs(IMAGE, lay_out=LAYOUTS["channels_last"])
    assert_equal(results(compiled(op, backend="inductor"), inputs), results(op, inputs))


@every_op
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_compile_dynamic_shapes(op, dynamic):
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(op, backend=counter, dynamic=dynamic)
    counts = []
    for batch in (4, 7, 9, 12):
        inputs = op.inputs((batch, 6))
        assert_equal(results(function, inputs), results(op, inputs))
        counts.append(counter.frame_count)
    assert counts[0 if dynamic else 1] == counts[-1]  # a first batch size may be compiled for alone, a second not


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_compile_dynamic_shapes_of_several_ops(backend):
    """The numbers of a Scale stay constants, and another Scale is compiled for anew."""

    def objective(mean, s, scale):
        z, kl = fastelbo.gaussian_rsample_kl(mean, s, scale=scale, seed=7)
        nll = fastelbo.gaussian_nll(z, mean, s, scale=scale)
        return (kl + nll + fastelbo.gaussian_kl(mean, s, z.detach(), s, scale=scale),)

    function = compiled(objective, backend=backend, dynamic=True)
    for scale in (Scale.softplus(min_std=1e-3), Scale.softplus(min_std=1e-2), Scale.nvae(), "logvar"):
        for batch in (4, 7):
            inputs = OPS["kl"].inputs((batch, 6))
            got, want = (results(functools.partial(f, scale=scale), inputs) for f in (function, objective))
            torch.testing.assert_close(got, want)


CHANGING = {
    "temperature": [0.5, 0.7, 1.0],
    "noise_offset": [0, 5, 2**34 + 1, 8],
    "seed": [0, 5, -1, 2**62],
    "num_samples": [2, 3, 5],
}


@pytest.mark.parametrize("name", CHANGING)
@every_drawing_op
def test_compile_with_changing_numbers(op, name):

    def function(value):
        return lambda *inputs: op(*inputs, **{name: value})

    compiled_function = compiled(lambda value, *inputs: function(value)(*inputs))
    inputs = op.inputs()
    for value in CHANGING[name]:
        got = results(functools.partial(compiled_function, value), inputs)
        assert_equal(got, results(function(value), inputs))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("name", ["rsample", "rsample_kl"])
def test_compile_draws_anew(name, backend):
    """The noise of the backward is that of the forward: with sigma 1 the gradient of sigma is the noise."""
    op = OPS[name]
    function = compiled(lambda *inputs: op(*inputs, seed=None, scale="std")[0], backend=backend)
    mean, std = torch.zeros(30, 7), torch.ones(30, 7, requires_grad=True)
    draws = []
    for seed in (1, None, 1):
        if seed is not None:
            torch.manual_seed(seed)
        z = function(mean, std)
        assert torch.equal(torch.autograd.grad(z.sum(), std)[0], z)
        draws.append(z.detach())
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert abs(torch.cat(draws[:2]).std() - 1) < 5 / (2 * 420) ** 0.5  # five standard errors


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_compile_merges_no_two_draws(backend, requires_grad):
    """As in two layers, or two samples, of one model."""

    def function(*inputs):
        return [fastelbo.gaussian_rsample(*inputs) for _ in range(2)]

    a, b = compiled(function, backend=backend)(*OPS["rsample"].inputs(requires_grad=requires_grad))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("use", ["z", "kl"])
@pytest.mark.parametrize("name", ["rsample_kl", "rsample_kl-prior"])
def test_unused_output(name, use):
    """The gradient is that of the op alone, and the prior's of z is 0."""
    op, alone = OPS[name], OPS["rsample"] if use == "z" else OPS[name.removeprefix("rsample_")]
    inputs = op.inputs()
    want = results(alone, inputs[: alone.arity])
    for way in (op, compiled(op)):
        out = way(*inputs)[0 if use == "z" else 1]
        got = [out.detach(), *gradients([out], inputs, allow_unused=True)]
        assert_equal(got[: len(want)], want)
        assert all(zero is None or not zero.any() for zero in got[len(want) :])


@every_op
def test_some_inputs_without_gradient(op):
    full = results(op, op.inputs())[-op.arity :]
    for index in range(op.arity):
        for wanted in ([index], [i for i in range(op.arity) if i != index]):
            inputs = op.inputs(requires_grad=False)
            for i in wanted:
                inputs[i].requires_grad_()
            for way in (op, compiled(op)) if len(wanted) == 1 else (op,):
                got = gradients(way(*inputs), [inputs[i] for i in wanted])
                assert_equal(got, [full[i] for i in wanted])


@every_op
def test_no_gradient_at_all(op):
    inputs = op.inputs()
    want = [out.detach() for out in op(*inputs)]
    with torch.no_grad():
        assert_equal(op(*inputs), want)
        assert_equal(compiled(op)(*inputs), want)
    with torch.inference_mode():
        assert_equal(op(*inputs), want)
    assert not any(out.requires_grad for out in op(*op.inputs(requires_grad=False)))


@every_op
def test_compile_inward_clamp(op):
    """Its gradient is known only once a broadcast scale's gradient is summed, so plain torch has a part in it."""
    scale = Scale("logvar", clamp=(-0.5, 0.5), clamp_grad="inward")
    for layout in ("contiguous", "broadcast"):
        inputs = op.inputs(IMAGE, lay_out=LAYOUTS[layout])

        def function(*inputs):
            return op(*inputs, scale=scale)

        assert_equal(results(compiled(function), inputs), results(function, inputs))


RECOMPUTE = {
    "default": (None, {}),
    "budget-0.5": (None, {"activation_memory_budget": 0.5}),
    # these two draw anything anew in the backward, torch.randn too: where they are set the seed must come from outside
    "budget-0": (torch.tensor(5), {"activation_memory_budget": 0.0}),
    "aggressive": (torch.tensor(5), {"aggressive_recomputation": True}),
}


@every_drawing_op
@pytest.mark.parametrize("setting", RECOMPUTE)
def test_compile_that_recomputes(op, setting):
    """The backward may compute again what lies between: z is still the sample whose gradient it takes."""
    seed, config = RECOMPUTE[setting]

    def function(x, seed):
        std = 1 + x.tanh() ** 2
        zeros = torch.zeros_like(std)
        return op(zeros, std, *[zeros + 1, std + 1][: op.arity - 2], seed=seed, scale="std")[0], std

    x = torch.randn(30, 7, requires_grad=True)
    with torch._functorch.config.patch(config):
        z, std = compiled(function)(x, seed)
        (d_x,) = torch.autograd.grad(z.sum(), x, retain_graph=True)
    exact = ((z / std) * torch.autograd.grad(std.sum(), x)[0]).detach()
    # at most three roundings of each side
    torch.testing.assert_close(d_x, exact, rtol=6 * torch.finfo(torch.float32).eps, atol=1e-30)


@pytest.mark.parametrize("way", [lambda op: op, compiled], ids=["eager", "compiled"])
@every_op
def test_one_tensor_for_several_arguments(op, way):
    """As in the KL of Gaussians that share a sigma: its gradients add up."""
    a, b, c = torch.arange(72.0).cos().reshape(3, 4, 6).unbind()
    shared = {2: (a, a), 3: (a, b, b), 4: (a, b, c, b)}[op.arity]
    unique = [x.requires_grad_() for x in dict.fromkeys(shared)]
    copies = [x.detach().clone().requires_grad_() for x in shared]
    outputs = op(*copies)
    grads = gradients(outputs, copies)
    sums = [sum(grad for grad, x in zip(grads, shared, strict=True) if x is this) for this in unique]
    assert_equal(results(lambda *_: way(op)(*shared), unique), [*(out.detach() for out in outputs), *sums])


@every_drawing_op
def test_compile_with_noise_that_is_another_argument(op):
    inputs = op.inputs()
    noise = inputs[1].detach()

    def function(mean, *rest):
        return op(mean, noise, *rest, noise=noise)

    rest = inputs[:1] + inputs[2:]
    assert_equal(results(lambda *rest: compiled(function)(*rest), rest), results(function, rest))


TRANSFORMS = {
    "grad": lambda f, arity: grad(lambda *inputs: f(*inputs).square().sum(), argnums=tuple(range(arity))),
    "vmap-grad": lambda f, arity: vmap(grad(lambda *row: f(*row).square().sum(), argnums=tuple(range(arity)))),
    "jvp": lambda f, arity: lambda *inputs: jvp(f, inputs, inputs),
}


@pytest.mark.parametrize("name", ["rsample", "kl-prior", "rsample_kl", "nll"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_compile_of_a_transform(name, transform):
    op = OPS[name]
    transformed = TRANSFORMS[transform](lambda *inputs: op(*inputs)[0], op.arity)
    inputs = op.inputs((5, 4, 6), dtype=torch.float64, requires_grad=False)
    assert_close(compiled(transformed)(*inputs), transformed(*inputs))


def test_compile_of_vmap_randomness():
    zeros, ones = torch.zeros(5, 6), torch.ones(5, 6)

    def sample(mean, std):
        return fastelbo.gaussian_rsample(mean, std, scale="std")

    different = compiled(vmap(sample, randomness="different"))(zeros, ones)
    assert different.unique().numel() == 30
    same = compiled(vmap(sample, randomness="same"))(zeros, ones)
    assert torch.equal(same, same[:1].expand(5, 6))
    with pytest.raises(RuntimeError, match="randomness"):
        compiled(vmap(sample))(zeros, ones)


# torch.export


class Module(torch.nn.Module):
    def __init__(self, op, **keywords):
        super().__init__()
        self.op, self.keywords = op, keywords

    def forward(self, *inputs):
        return self.op(*inputs, **self.keywords)


@every_op
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(op, dynamic):
    shapes = ((({0: torch.export.Dim("batch")},) * op.arity),) if dynamic else None
    inputs = op.inputs(requires_grad=False)
    program = torch.export.export(Module(op), tuple(inputs), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for exported in (program.module(), torch.export.load(buffer).module()):
        for batch in (4, 9) if dynamic else (4,):
            inputs = op.inputs((batch, 6), requires_grad=False)
            assert_equal(exported(*inputs), op(*inputs))


def test_exported_program_draws_anew():
    op = OPS["rsample_kl"]
    module = torch.export.export(Module(op, seed=None), tuple(op.inputs(requires_grad=False))).module()
    z, again = (module(*op.inputs(requires_grad=False))[0] for _ in range(2))
    assert not torch.equal(z, again)


# Checkpointing and autocast


@every_drawing_op
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant", "compiled"])
def test_checkpoint(op, way):
    """Noise drawn inside: the recomputation draws it again."""

    def function(*inputs):
        hidden = [3 * x.tanh() for x in inputs]
        return op(*hidden, seed=None)

    def checkpointed(*inputs):
        return checkpoint(function, *inputs, use_reentrant=way == "reentrant")

    plain = function
    if way == "compiled":
        checkpointed, plain = compiled(checkpointed), compiled(function)
    outcomes = []
    for run in (plain, checkpointed):
        inputs = op.inputs()
        torch.manual_seed(3)
        outputs = run(*inputs)
        sum(out.cos().sum() for out in outputs).backward()
        outcomes.append([*outputs, *(x.grad for x in inputs), torch.rand(())])
    assert_equal(outcomes[1], outcomes[0])


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_dtypes_alone(op, dtype):
    inputs = op.inputs(dtype=dtype)
    want = results(op, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for way in (op, compiled(op)) if dtype == torch.float32 else (op,):
            assert_equal(results(way, inputs), want)
    z_and_rest = want[: len(op(*inputs))]
    for position, out in enumerate(z_and_rest):
        assert out.dtype == (dtype if position in op.drawn else torch.float32)


# torch.func and forward-mode


def reference(op):
    """torch.func runs on the reference: it is what results must equal, noise included."""
    return lambda *inputs, **keywords: op(*inputs, backend="reference", **keywords)


@every_op
def test_vmap(op):
    inputs = op.inputs((5, 4, 6), dtype=torch.float64, requires_grad=False)
    got = vmap(op)(*inputs)
    assert_close(got, map(torch.stack, zip(*(reference(op)(*row) for row in zip(*inputs, strict=True)), strict=True)))
    first_only = vmap(op, in_dims=(1, *(None,) * (op.arity - 1)), out_dims=1)(inputs[0], *(x[:, 0] for x in inputs[1:]))
    loop = [reference(op)(inputs[0][:, i], *(x[:, 0] for x in inputs[1:])) for i in range(4)]
    assert_close(first_only, (torch.stack(rows, 1) for rows in zip(*loop, strict=True)))


@every_drawing_op
def test_vmap_over_seeds(op):
    inputs = op.inputs(requires_grad=False, dtype=torch.float64)
    seeds = torch.tensor([3, -4, 2**62])
    z = vmap(lambda seed: op(*inputs, seed=seed)[0])(seeds)
    assert_close(z, torch.stack([reference(op)(*inputs, seed=seed)[0] for seed in seeds]))


@every_drawing_op
@pytest.mark.parametrize("num_samples", [None, 3])
def test_vmap_randomness(op, num_samples):
    rows = [x[:1].expand(5, -1, -1) for x in op.inputs((5, 4, 6), requires_grad=False)]

    def sample(*row):
        return op(*row, seed=None, num_samples=num_samples)[0]

    different = vmap(sample, randomness="different")(*rows)
    assert len({tuple(z.flatten().tolist()) for z in different}) == 5
    same = vmap(sample, randomness="same")(*rows)
    assert all(torch.equal(z, same[0]) for z in same)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(sample, randomness="error")(*rows)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(sample)(*rows)


@every_op
@every_scale
def test_grad_and_jvp(op, scale):
    inputs = op.inputs(dtype=torch.float64, kind=scale.kind, lay_out=away_from_limits)
    tangents = tuple(
        torch.arange(float(i), i + x.numel()).reshape(x.shape).sin().double() for i, x in enumerate(inputs)
    )

    def loss(*inputs):
        return sum((out * out).sum() for out in op(*inputs, scale=scale))

    value = sum((out * out).sum() for out in reference(op)(*inputs, scale=scale))
    want = torch.autograd.grad(value, inputs)
    detached = [x.detach() for x in inputs]
    assert_close(grad(loss, argnums=tuple(range(op.arity)))(*detached), want)
    slope = sum((g * t).sum() for g, t in zip(want, tangents, strict=True))
    assert_close(jvp(loss, tuple(detached), tangents), (value.detach(), slope))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(detached, tangents, strict=True)]
        assert_close(forward_ad.unpack_dual(loss(*duals)), (value.detach(), slope))


@every_op
def test_vmap_of_grad(op):
    inputs = op.inputs((5, 4, 6), dtype=torch.float64)

    def loss(*row):
        return sum(out.square().sum() for out in op(*row))

    per_example = vmap(grad(loss, argnums=tuple(range(op.arity))))(*(x.detach() for x in inputs))
    value = sum(out.square().sum() for row in zip(*inputs, strict=True) for out in reference(op)(*row))
    assert_close(per_example, torch.autograd.grad(value, inputs))


class Encoder(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op, self.linear = op, torch.nn.Linear(3, 6 * op.arity)

    def forward(self, x):
        return self.op(*self.linear(x).chunk(self.op.arity, -1))


@every_op
def test_functional_call(op):
    encoder, x = Encoder(op).double(), torch.randn(4, 3, dtype=torch.float64)
    parameters = dict(encoder.named_parameters())

    def loss(parameters):
        return sum(out.sum() for out in functional_call(encoder, parameters, (x,)))

    encoder.op = reference(op)
    encoder.op.arity = op.arity
    want = torch.autograd.grad(loss(parameters), tuple(parameters.values()))
    encoder.op = op
    got = grad(loss)({name: p.detach() for name, p in parameters.items()})
    assert_close(got.values(), want)


# Derivatives in float64

CALLS = {
    "plain": ((2, 3), {}),
    "event_ndim-0": ((2, 3), {"event_ndim": 0}),
    "event_ndim-1": ((2, 3, 2), {"event_ndim": 1}),
    "mean": ((2, 3), {"reduction": "mean"}),
    "elementwise-sum": ((2, 3), {"event_ndim": 0, "reduction": "sum"}),
    "num_samples": ((2, 3), {"num_samples": 3, "temperature": 0.7, "noise_offset": 5}),
}
OPS_AND_CALLS = [
    pytest.param(op, call, id=f"{name}-{call}")
    for name, op in OPS.items()
    for call in CALLS
    if (call == "num_samples" if not op.terms else call != "num_samples" or op.drawn)
]
both_orders = pytest.mark.parametrize(
    "checker", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"]
)


def check(checker, op, shape, lay_out=lambda i, x: x, scale=SCALES["logvar"], **keywords):
    inputs = op.inputs(shape, lay_out=lay_out, dtype=torch.float64, kind=scale.kind)
    assert checker(lambda *inputs: op(*inputs, scale=scale, **keywords), inputs)


@every_op
@every_scale
@both_orders
def test_gradcheck_scale(op, scale, checker):
    check(checker, op, (2, 3), away_from_limits, scale=scale)


@pytest.mark.parametrize(("op", "call"), OPS_AND_CALLS)
@both_orders
def test_gradcheck_arguments(op, call, checker):
    shape, keywords = CALLS[call]
    check(checker, op, shape, **keywords)


@every_op
@both_orders
@pytest.mark.parametrize("layout", ["transposed", "broadcast"])
def test_gradcheck_layout(op, layout, checker):
    check(checker, op, (2, 2, 1, 2), LAYOUTS[layout])


@both_orders
@pytest.mark.parametrize("name", ["kl-prior", "rsample_kl-prior"])
def test_gradcheck_two_scales(name, checker):
    check(checker, OPS[name], (2, 3), scale=Scale("log_std"), scale_p=Scale("softplus", min_std=0.1))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_second_derivatives_by_formula(backend):
    """Two derivatives with respect to logvar: of KL exp(logvar) / 2, of z a quarter of z - mean."""
    mean, logvar = OPS["kl"].inputs(dtype=torch.float64)
    z, kl = fastelbo.gaussian_rsample_kl(mean, logvar, seed=1, backend=backend)
    for out, want in ((z, 0.25 * (z - mean)), (kl, 0.5 * logvar.exp())):
        (first,) = torch.autograd.grad(out.sum(), logvar, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), logvar)
        # the differentiable backward draws the reference's noise, which is a few float32 ulp from the kernel's
        rounding = 1e-6 if out is z and backend == "cpu" else 1e-13
        torch.testing.assert_close(second, want.detach(), rtol=rounding, atol=rounding)


@every_op
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_differentiable_backward_gives_the_same_gradient(op, layout, dtype):
    for num_samples in (None, 3) if op.drawn else (None,):
        inputs = op.inputs(IMAGE, lay_out=LAYOUTS[layout], dtype=dtype)
        outputs = op(*inputs, num_samples=num_samples)
        want = gradients(outputs, inputs, retain_graph=True)
        got = gradients(outputs, inputs, create_graph=True)
        for a, b in zip(got, want, strict=True):
            assert a.requires_grad or not op.terms
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            # both are right to a few roundings, of each term where a broadcast input's gradient is their sum
            scale = max(1.0, b.abs().max().item()) * max(1, outputs[0].numel() // a.numel())
            assert (a - b).abs().max() <= 8 * torch.finfo(dtype).eps * scale


# The objectives

MASK = torch.arange(24).reshape(4, 6) % 5 > 0
FREE_BITS = [
    {"free_bits": floor, "free_bits_per": per} for per, floor in (("dim", 0.8), ("example", 6.0), ("batch", 5.0))
]
OBJECTIVES = {
    "kl-mask": ("kl-prior", {"mask": MASK}),
    "rsample_kl-mask": ("rsample_kl-prior", {"mask": MASK}),
    "log_prob-mask": ("log_prob", {"mask": MASK}),
    "nll-mask-mean": ("nll", {"mask": MASK[:, :1], "reduction": "mean"}),
    **{f"kl-{o['free_bits_per']}": ("kl-prior", o) for o in FREE_BITS},
    **{f"rsample_kl-{o['free_bits_per']}-mask": ("rsample_kl-prior", {**o, "mask": MASK}) for o in FREE_BITS},
    # these hold a gradient, so that they are not the derivatives of their value
    "kl-balance": ("kl-prior", {"balance": 0.8}),
    "rsample_kl-all": ("rsample_kl-prior", {"balance": 0.8, "free_bits": 0.8, "mask": MASK, "reduction": "mean"}),
    "nll-beta": ("nll", {"beta_nll": 0.5, "mask": MASK}),
}
HOLDING = ("kl-balance", "rsample_kl-all", "nll-beta")
every_objective = pytest.mark.parametrize(
    ("op", "keywords"), [(OPS[name], keywords) for name, keywords in OBJECTIVES.values()], ids=OBJECTIVES
)


@every_objective
def test_objectives_compile(op, keywords):
    inputs = op.inputs()

    def function(*inputs):
        return op(*inputs, **keywords)

    got, want = results(compiled(function), inputs), results(function, inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_annealing_compiles_once():
    op, inputs = OPS["kl-prior"], OPS["kl-prior"].inputs()

    def function(value, *inputs):
        return op(*inputs, free_bits=value)

    counter = CompileCounterWithBackend("aot_eager")
    compiled_function = compiled(function, backend=counter)
    for value in map(torch.tensor, (0.1, 0.5, 0.9, 1.1)):
        got = results(functools.partial(compiled_function, value), inputs)
        assert_equal(got, results(functools.partial(function, value), inputs))
    assert counter.frame_count == 1


@every_objective
def test_objectives_under_vmap(op, keywords):
    """With noise that is given: drawn in float32, it may differ in the last bit from shape to shape."""
    inputs = op.inputs((5, 4, 6), dtype=torch.float64)
    if op.drawn:
        keywords = {**keywords, "noise": torch.randn(4, 6, dtype=torch.float64), "seed": None}
    masks = torch.stack([keywords["mask"].roll(i, 0) for i in range(5)]) if "mask" in keywords else None

    def row(mask, *row):
        return op(*row, **{**keywords, **({} if mask is None else {"mask": mask})})

    def loss(mask, *inputs):
        return sum(out.square().sum() for out in row(mask, *inputs))

    axes = (None if masks is None else 0, *(0,) * op.arity)
    rows = list(zip([None] * 5 if masks is None else masks, *inputs, strict=True))
    detached = [x.detach() for x in inputs]
    got = vmap(row, in_dims=axes)(masks, *detached)
    assert_close(
        got,
        map(
            torch.stack,
            zip(
                *(
                    reference(op)(*one[1:], **{**keywords, **({} if masks is None else {"mask": one[0]})})
                    for one in rows
                ),
                strict=True,
            ),
        ),
    )
    per_example = vmap(grad(loss, argnums=tuple(range(1, 1 + op.arity))), in_dims=axes)(masks, *detached)
    assert_close(per_example, torch.autograd.grad(sum(loss(*one) for one in rows), inputs))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in HOLDING])
@both_orders
def test_gradcheck_objectives(name, checker):
    op, keywords = OBJECTIVES[name]
    check(checker, OPS[op], (4, 6), **keywords)


@pytest.mark.parametrize("side", [(0, 1), (2, 3)], ids=["q", "p"])
def test_gradgradcheck_balance(side):
    """Of one side, whose gradient is a multiple of the KL's."""
    inputs = OPS["kl-prior"].inputs((2, 3), dtype=torch.float64, requires_grad=False)
    for i in side:
        inputs[i].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *inputs: fastelbo.gaussian_kl(*inputs, balance=0.8), inputs)


# Modules and threads


@every_op
def test_deepcopy_of_a_module_that_ran(op):
    encoder, x = Encoder(op), torch.randn(4, 3)
    sum(out.sum() for out in encoder(x)).backward()
    twin = copy.deepcopy(encoder)
    assert_equal(
        results(lambda *_: twin(x), list(twin.parameters())), results(lambda *_: encoder(x), list(encoder.parameters()))
    )


@pytest.mark.parametrize("name", ["rsample_kl-prior", "log_prob"])
def test_python_threads(name):
    op = OPS[name]

    def job(seed):
        inputs = op.inputs((17 + seed, 1001))
        return results(lambda *inputs: op(*inputs, seed=seed), inputs)

    want = list(map(job, range(24)))
    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(job, range(24)), want, strict=True):
            assert_equal(got, expected)


# Gradients through exported programs


def exported(op, inputs, strict, **keywords):
    return torch.export.export(Module(op, **keywords), tuple(inputs), strict=strict)


both_exports = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
EXPORTED_CALLS = {
    **{f"plain-{name}": (op, {}) for name, op in OPS.items()},
    **{f"mean-{name}": (op, {"reduction": "mean"}) for name, op in OPS.items() if op.terms},
    **{f"samples-{name}": (op, {"num_samples": 3, "temperature": 0.7}) for name, op in DRAWING.items()},
    **{name: (OPS[op], keywords) for name, (op, keywords) in OBJECTIVES.items()},
    "noise": (OPS["rsample_kl-prior"], {"noise": torch.arange(24.0).reshape(4, 6).sin(), "seed": None}),
    "two-scales": (OPS["kl-prior"], {"scale": Scale.nvae(), "scale_p": Scale("softplus", min_std=0.1, beta=2.5)}),
    "clamp": (OPS["nll"], {"scale": Scale("logvar", clamp=(-0.5, 0.5))}),
    "clamp-inward": (OPS["rsample_kl"], {"scale": Scale("logvar", clamp=(-0.5, 0.5), clamp_grad="inward")}),
    "clamp-inward-reference": (
        OPS["kl-prior"],
        {"scale": Scale("log_std", clamp=(-0.5, 0.5), clamp_grad="inward"), "backend": "reference"},
    ),
}


@both_exports
@pytest.mark.parametrize("call", EXPORTED_CALLS)
def test_gradients_through_exported_programs(call, strict):
    """Those of the ops themselves, to the last bit, also of a program that was exported for inference."""
    op, keywords = EXPORTED_CALLS[call]
    inputs = op.inputs()
    want = results(lambda *inputs: op(*inputs, **keywords), inputs)
    for example in (inputs, op.inputs(requires_grad=False)):
        assert_equal(results(exported(op, example, strict, **keywords).module(), inputs), want)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["broadcast", "packed-channels_last"])
def test_gradients_through_exported_programs_of_layouts(op, dtype, layout):
    inputs = op.inputs(IMAGE, lay_out=LAYOUTS[layout], dtype=dtype)
    assert_equal(results(exported(op, inputs, False).module(), inputs), results(op, inputs))


@every_op
def test_gradients_through_programs_made_of_exported_ones(op):
    """Saved and loaded, decomposed, with another batch size, compiled, and differentiated twice."""
    inputs = op.inputs()
    shapes = ((({0: torch.export.Dim("batch")},) * op.arity),)
    program = torch.export.export(Module(op), tuple(inputs), dynamic_shapes=shapes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    modules = [program.module(), torch.export.load(buffer).module(), program.run_decompositions({}).module()]
    for module in modules:
        for batch in (4, 9):
            inputs = op.inputs((batch, 6))
            assert_equal(results(module, inputs), results(op, inputs))
    inputs = op.inputs()
    assert_equal(results(compiled(modules[0]), inputs), results(op, inputs))
    twice = [gradients(way(*inputs), inputs, create_graph=True) for way in (op, modules[0])]
    if twice[0][-1].requires_grad:
        assert_equal(*(torch.autograd.grad(grads[-1].sum(), inputs, allow_unused=True)[-1:] for grads in twice))


@both_exports
def test_an_exported_model_trains(strict):
    """The parameters of a module, which the program holds; three steps of a VAE and a PixelCNN in one."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = torch.nn.Linear(20, 12), torch.nn.Linear(6, 20)
            self.x_logvar = torch.nn.Parameter(torch.zeros(()))
            self.first = fastelbo.nn.GatedMaskedConv2d(1, 4, 5, mask_type="A")
            self.last = fastelbo.nn.MaskedConv2d(4, 2, 1, mask_type="B", activation="elu")

        def forward(self, x):
            z, kl = fastelbo.gaussian_rsample_kl(*self.encoder(x).chunk(2, 1), seed=3, free_bits=0.1)
            image = x.reshape(-1, 1, 5, 4)
            logits = self.last(self.first(image, image)[1], residual=image.expand(-1, 2, -1, -1))
            nll = fastelbo.gaussian_nll(x, self.decoder(z), self.x_logvar)
            return (kl + nll).mean() + logits.square().mean()

    x, histories = torch.randn(8, 20), []
    torch.manual_seed(1)
    model = Model()
    for network in (torch.export.export(copy.deepcopy(model), (x,), strict=strict).module(), model):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        losses = []
        for _ in range(3):
            loss = network(x)
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in network.parameters())
            optimizer.step()
            losses.append(loss.detach())
        histories.append([*losses, *(p.detach() for _, p in sorted(network.named_parameters()))])
    assert_equal(*histories)


CONVOLUTIONS = [
    {"mask_type": "A"},
    {"mask_type": "B", "activation": "elu", "dilation": 2, "residual": True},
    {"mask_type": "B", "activation": "glu", "channel_groups": 2, "cond": 4},
    {"mask_type": "A", "activation": "tanh_sigmoid", "channel_groups": 2, "group_order": "contiguous", "cond": 2},
]


def convolution(activation=None, residual=False, cond=None, **keywords):
    outputs = 4 if activation in ("glu", "tanh_sigmoid") else 2
    shapes = {"input": (3, 2, 5, 4), "weight": (outputs, 2, 3, 3), "bias": (outputs,)}
    if cond:
        shapes["cond"] = (3, outputs, 5, 4)[:cond]
    if residual:
        shapes["residual"] = (3, 2, 5, 4)
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes.values()]

    def call(*inputs):
        return (fastelbo.masked_conv2d(**dict(zip(shapes, inputs, strict=True)), activation=activation, **keywords),)

    return call, inputs


@both_exports
@pytest.mark.parametrize("keywords", CONVOLUTIONS, ids=lambda keywords: str(keywords.get("activation")))
def test_gradients_through_exported_convolutions(keywords, strict):
    call, inputs = convolution(**keywords)
    want = results(call, inputs)
    program = exported(call, inputs, strict)
    assert [node.target.namespace for node in program.graph.nodes if "masked_conv2d" in node.name] == ["fastelbo"]
    assert_equal(results(program.module(), inputs), want)
    assert_equal(results(compiled(program.module()), inputs), want)


# The raw ops themselves


@pytest.mark.dispatch
@every_op_and_variant
def test_raw_ops_pass_gradients_on(op, variant, kernels):
    """A forward that is called by name; its backward, which nobody differentiates, says so where somebody does."""
    calls = raw_calls(op, "broadcast", variant, kernels)
    (forward, args), (backward, backward_args) = ((call.overloadpacket.default, args) for call, args in calls)
    tensors = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
    leaves = {id(x): x.clone().requires_grad_() for x in tensors}

    def call(*inputs):
        given = iter(inputs)
        out = forward(*(next(given) if id(x) in leaves else x for x in args))
        return out if isinstance(out, tuple) else (out,)

    inputs = list(leaves.values())
    keywords = {**VARIANTS[variant], "backend": kernels}
    keywords.pop("dtype", None)
    assert_equal(results(call, inputs), results(lambda *inputs: op(*inputs, **keywords), inputs))
    torch.library.opcheck(forward, tuple(leaves.get(id(x), x) for x in args))
    wanted = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in backward_args
    ]
    grads = backward(*wanted)
    with pytest.raises(NotImplementedError, match=f"{backward.name().split('::')[1]} must not be differentiated"):
        sum(grad.sum() for grad in (grads if isinstance(grads, tuple) else (grads,))).backward()


def test_noise_that_wants_a_gradient_is_refused_by_the_raw_ops():
    mean, noise = torch.zeros(3), torch.zeros(3, requires_grad=True)
    program = exported(lambda noise: (fastelbo.gaussian_rsample(mean, mean, noise=noise),), (noise.detach(),), False)
    with pytest.raises(NotImplementedError, match="noise must not want a gradient, which only the reference passes on"):
        program.module()(noise)


@pytest.mark.parametrize("name", EVERY)
def test_what_nothing_records_makes_no_function(name, kernels, monkeypatch):
    """An autograd.Function takes half of a small call's time."""
    op = EVERY[name]
    inputs = op.inputs((3, 4))

    def apply(*args):
        raise AssertionError("a Function was made")

    monkeypatch.setattr("fastelbo._autograd.record", apply)
    with pytest.raises(AssertionError, match="a Function was made"):
        op(*inputs, backend=kernels)
    with torch.no_grad():
        op(*inputs, backend=kernels)
    op(*(x.detach() for x in inputs), backend=kernels)
