"""What the ops keep, allocate and copy."""

import ctypes

import ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo
from fastelbo import Scale, _library
from fastelbo.testing import gaussian


class Op(ops.Gaussian):
    """An op on the backend under test, with a seed that is there already."""

    def __call__(self, *inputs, **keywords):
        if "noise" not in keywords:
            keywords.setdefault("seed", Op.seed)
        return super().__call__(*inputs, backend=Op.backend, **keywords)

    def inputs(self, lay_out=lambda x: [x[:, 0], x[:, 1]], shape=(2, 3, 16, 40), dtype=torch.float32):
        """Mean and scale of each Gaussian from one tensor [B, 2, C, H, W], by a function of it."""
        q, p = (lay_out(torch.stack(gaussian(shape, seed=seed, dtype=dtype), 1)) for seed in (0, 1))
        return [x.detach().requires_grad_() for x in self.of(q, p)]


@pytest.fixture(autouse=True)
def on_kernels(kernels):
    Op.backend, Op.seed = kernels, torch.tensor([7])


OPS = {name: Op(*op) for name, op in ops.GAUSSIAN.items()}
DRAWING = {name: op for name, op in OPS.items() if op.drawn}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_drawing_op = pytest.mark.parametrize("op", DRAWING.values(), ids=DRAWING)

# From one tensor [B, 2, C, H, W] to mean and scale.
LAYOUTS = {
    "contiguous": lambda x: [half.contiguous() for half in x.unbind(1)],
    "packed": lambda x: x.flatten(1, 2).chunk(2, 1),
    "packed-last": lambda x: x.movedim(1, -1).flatten(-2).contiguous().unflatten(-1, (-1, 2)).unbind(-1),
    "transposed": lambda x: [half.mT.contiguous().mT for half in x.unbind(1)],
    "channels_last": lambda x: [half.contiguous(memory_format=torch.channels_last) for half in x.unbind(1)],
    "packed-channels_last": lambda x: x.flatten(1, 2).contiguous(memory_format=torch.channels_last).chunk(2, 1),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Recorder(TorchDispatchMode):
    """The names of all ops that run and return tensors, but for views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default and isinstance(out, (torch.Tensor, tuple)):
            self.names.append(str(function).removesuffix(".default"))
        return out


def upstream(outputs):
    """Gradients that lie in memory as the outputs do."""
    return [torch.empty_like(out).copy_(torch.arange(1.0, 1 + out.numel()).cos().reshape(out.shape)) for out in outputs]


# torch's profiler sees what the CPU allocates, and an interpreted kernel allocates as it likes. tests/test_gpu.py has
# the same for GPUs.
allocations_of_the_cpu = pytest.mark.parametrize("kernels", ["cpu"], indirect=True)


def allocated(function):
    """What a call returns, and the sizes of all blocks that torch gave out meanwhile, to the C++ op too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = function()
    events = profile.profiler.kineto_results.events()
    return out, sorted(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


# What is kept


def saved(op, inputs, **keywords):
    """The tensors that autograd keeps, and the outputs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = op(*inputs, **keywords)
    return kept, outputs


@every_op
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_kept_but_inputs_and_seed(op, layout, dtype):
    inputs = op.inputs(LAYOUTS[layout], dtype=dtype)
    variants = [{}, {"scale": Scale.softplus()}, {"scale": Scale.diffusers()}]
    if op.terms:
        variants += [{"event_ndim": 0}, {"reduction": "mean"}]
    if op.drawn:
        variants += [{"num_samples": 3}, {"out_dtype": torch.float32}]
    for keywords in variants:
        kept, outputs = saved(op, inputs, **keywords)
        for tensor in kept:
            known = [x for x in (*inputs, *outputs) if x.data_ptr() == tensor.data_ptr()]
            assert known or tensor.data_ptr() == Op.seed.data_ptr(), tuple(tensor.shape)
            assert not known or (tensor.shape, tensor.stride()) == (known[0].shape, known[0].stride())


@every_drawing_op
@pytest.mark.parametrize("source", ["int", "default-generator", "given-noise"])
def test_what_a_draw_keeps(op, source):
    inputs = op.inputs()
    noise = torch.randn(inputs[0].shape)
    keywords = {"int": {"seed": 5}, "default-generator": {"seed": None}, "given-noise": {"noise": noise}}[source]
    kept, _ = saved(op, inputs, **keywords)
    others = [x for x in kept if x.data_ptr() not in [y.data_ptr() for y in inputs]]
    if source == "given-noise":
        assert [x.data_ptr() for x in others] == [noise.data_ptr()]
    else:
        assert [(x.numel(), x.dtype) for x in others] == [(1, torch.int64)]


OBJECTIVES = {
    "mask": {"mask": torch.ones(2, 1, 16, 1, dtype=torch.bool)},
    "balance": {"balance": 0.8},
    "batch": {"free_bits": 0.1, "free_bits_per": "batch"},
}


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        *((name, objective) for name in ("kl-prior", "rsample_kl-prior") for objective in OBJECTIVES),
        ("log_prob", "mask"),
    ],
)
def test_an_objective_keeps_its_mask(name, objective):
    """No copy of an input, and of free bits a number for each example."""
    op, keywords = OPS[name], dict(OBJECTIVES[objective])
    inputs = op.inputs()
    if "mask" in keywords:
        keywords["mask"] = keywords["mask"].to(inputs[0].device)
    kept, outputs = saved(op, inputs, **keywords)
    known = [x.data_ptr() for x in (*inputs, *outputs, Op.seed, *keywords.values()) if isinstance(x, torch.Tensor)]
    others = [x for x in kept if x.data_ptr() not in known]
    assert all(x.numel() <= 3 for x in others), [tuple(x.shape) for x in others]


# What is run and allocated


def run_names(op):
    namespace = "fastelbo_triton" if Op.backend == "triton" else "fastelbo"
    name = f"{namespace}.{op.file}"
    return f"{name}_fwd.kernel", f"{name}_bwd.kernel"


@every_op
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_kernel_each_way(op, layout, dtype):
    """No copy, cast or fill beside our op, whatever the strides."""
    inputs = op.inputs(LAYOUTS[layout], dtype=dtype)
    with Recorder() as recorder:
        outputs = op(*inputs)
    assert recorder.names == [run_names(op)[0]]
    weights = upstream(outputs)
    with Recorder() as recorder:
        torch.autograd.grad(outputs, inputs, weights)
    assert recorder.names == [run_names(op)[1]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, ["balance", *mask]) for name in ("kl-prior", "rsample_kl-prior") for mask in ([], ["mask"])),
        *((name, ["mask"]) for name in ("kl", "rsample_kl", "log_prob", "nll")),
    ],
)
def test_balance_and_mask_are_in_the_kernels(name, options):
    op, values = OPS[name], {"balance": 0.8, "mask": torch.arange(40) % 3 > 0}
    inputs, keywords = op.inputs(), {option: values[option] for option in options}
    with Recorder() as recorder:
        outputs = op(*inputs, **keywords)
    assert recorder.names == [run_names(op)[0]]
    weights = upstream(outputs)
    with Recorder() as recorder:
        torch.autograd.grad(outputs, inputs, weights)
    assert recorder.names == [run_names(op)[1]]


@allocations_of_the_cpu
@every_op
@every_layout
def test_allocates_its_results_and_nothing_else(op, layout):
    inputs = op.inputs(LAYOUTS[layout])
    op(*inputs)  # what is allocated once
    outputs, blocks = allocated(lambda: op(*inputs))
    assert blocks == sorted(out.nbytes for out in outputs)
    weights = upstream(outputs)
    grads, blocks = allocated(lambda: torch.autograd.grad(outputs, inputs, weights))
    fresh = [x.nbytes for x in grads if x.data_ptr() not in [w.data_ptr() for w in weights]]
    assert blocks == sorted(fresh)


@allocations_of_the_cpu
@every_drawing_op
def test_samples_do_not_repeat_mean_and_scale(op):
    inputs = op.inputs()
    op(*inputs, num_samples=5)
    outputs, blocks = allocated(lambda: op(*inputs, num_samples=5))
    assert blocks == sorted(out.nbytes for out in outputs)


def same_number(got, want):
    """Bit by bit, but for the order of a sum where Triton's compiler chooses it by how its terms are read."""
    if Op.backend == "triton" and not _library.INTERPRETED and got.dim() < 2:
        return torch.allclose(got, want, rtol=11 * torch.finfo(got.dtype).eps, atol=0)  # trees of 1920 terms
    return torch.equal(got, want)


@every_op
@every_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [40, 33])
def test_layout_changes_no_number(op, layout, dtype, columns):
    """Bit by bit, forward and backward: the same elements in the same order, read from other places."""
    want = None
    for name in ("contiguous", layout):
        inputs = op.inputs(LAYOUTS[name], shape=(2, 3, 16, columns), dtype=dtype)
        outputs = op(*inputs)
        got = *outputs, *torch.autograd.grad(outputs, inputs, upstream(outputs))
        want = want or got
        assert all(map(same_number, got, want))


@every_layout
@pytest.mark.parametrize("columns", [40, 33])
def test_layout_changes_no_number_of_the_gradient_of_one_sigma(layout, columns):
    want = None
    for name in ("contiguous", layout):
        x, mean = OPS["rsample"].inputs(LAYOUTS[name], shape=(2, 3, 16, columns))
        s = torch.full((), 0.5, requires_grad=True)
        (got,) = torch.autograd.grad(fastelbo.gaussian_log_prob(x, mean, s, backend=Op.backend).sum(), [s])
        want = got if want is None else want
        assert same_number(got, want)


@every_op
@every_layout
def test_results_lie_in_memory_as_the_inputs_do(op, layout):
    """As torch.empty_like would have them: dense, dimensions in the same order."""
    inputs = op.inputs(LAYOUTS[layout])
    keywords = {"event_ndim": 0} if op.terms else {}
    outputs = op(*inputs, **keywords)
    for out in outputs:
        assert out.stride() == torch.empty_like(inputs[0]).stride()
    for grad, x in zip(torch.autograd.grad(outputs, inputs, upstream(outputs)), inputs, strict=True):
        assert grad.stride() == torch.empty_like(x).stride()


class HeapUse(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def test_calls_leave_nothing_behind(kernels):
    """A few bytes that a call leaves would also keep its freed results from being used again."""
    if kernels != "cpu" or not hasattr(libc := ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("counts the heap of glibc, which no interpreter shares")
    libc.mallinfo2.restype = HeapUse
    mean, s = gaussian((4, 4))
    image, weight, bias = torch.randn(1, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(4)
    calls = {
        "rsample_kl": lambda: fastelbo.gaussian_rsample_kl(mean, s, seed=Op.seed, backend="cpu"),
        "log_prob": lambda: fastelbo.gaussian_log_prob(mean, mean, s, backend="cpu"),
        "conv": lambda: fastelbo.masked_conv2d(
            image, weight, bias, mask_type="B", activation="tanh_sigmoid", backend="cpu"
        ),
    }
    for name, call in calls.items():
        for _ in range(50):
            call()
        before = libc.mallinfo2().uordblks
        for _ in range(2000):
            call()
        assert libc.mallinfo2().uordblks - before < 8 * 2000, name
