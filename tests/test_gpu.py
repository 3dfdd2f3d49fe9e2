"""What only a GPU can show: both backends on it, streams, graphs, synchronisation, memory, and tensors beyond 2^31."""

import contextlib
import fcntl
import gc
import importlib
import math
import tempfile
from pathlib import Path

import pytest
import torch
from ops import CONVOLUTIONS
from ops import GAUSSIAN as OPS
from test_gated_block import both_ways, make, taken  # noqa: F401 (a fixture)
from test_gated_block import lines as lines_of_block
from test_masked_conv2d import NAMES, lines, operands, outputs_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastelbo
from fastelbo import Scale
from fastelbo.reference.noise import philox_normal
from fastelbo.sampling import IncrementalSampler
from fastelbo.testing import assert_within_budget

if not torch.cuda.is_available():
    pytest.skip("these tests need a GPU, and torch finds none", allow_module_level=True)

DEVICE = torch.device("cuda")
BACKENDS = ["triton", "cuda"]
GIB = 2**30


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that is installed; that both are is for `python -m fastelbo` and tools/gpu.sh to say."""
    reason = fastelbo.backends.why_not(request.param, DEVICE)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def installed():
    """All backends that can run here."""
    return [name for name in BACKENDS if fastelbo.backends.why_not(name, DEVICE) is None]


def inputs_of(op, shape, dtype=torch.float32, device=DEVICE):
    """Leaves on the GPU; of a convolution whose images have that shape."""
    return op.inputs(shape, dtype, device=device)


LAUNCHED = {**OPS, "masked_conv2d": CONVOLUTIONS["masked_conv2d-gate"]}
DRAWING = {name: op for name, op in OPS.items() if op.drawn}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_launched_op = pytest.mark.parametrize("op", LAUNCHED.values(), ids=LAUNCHED)
every_drawing_op = pytest.mark.parametrize("op", DRAWING.values(), ids=DRAWING)
halves_too = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def seed_tensor(value, device=None):
    return torch.tensor([value], dtype=torch.int64, device=device or DEVICE)


def upstream(outputs):
    """Gradients that differ from element to element, of order 1."""
    return [torch.arange(out.numel(), device=out.device).cos().reshape(out.shape).to(out.dtype) for out in outputs]


def results(op, inputs, weights=None, **keywords):
    """Outputs and gradients."""
    outputs = op(*inputs, **keywords)
    grads = torch.autograd.grad(outputs, inputs, upstream(outputs) if weights is None else weights)
    return [*(out.detach() for out in outputs), *grads]


def assert_right(op, got, inputs, seed, noise_offset=0):
    """Against the reference in float64 on the CPU, with the noise that the definition says."""
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    outputs = op(*exact, seed=seed, noise_offset=noise_offset, backend="reference")
    # the gradient that came in was rounded to the result's dtype
    weights = [w.to(g.dtype).double().cpu() for w, g in zip(upstream(outputs), got, strict=False)]
    want = [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, exact, weights)]
    for position, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape
        a = a.cpu().double()
        assert torch.isfinite(a).all(), position
        if not a.numel():
            continue
        # a sum in float32 is off by some ulp of what its terms add up to, of order 1 each; a half is rounded once
        terms = math.sqrt(max(1, inputs[0].numel() / a.numel()))
        unit = 2**-8 if got[position].dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(
            a, b, rtol=2 * unit, atol=2 * unit * terms, msg=lambda text, p=position: f"{p}: {text}"
        )


def assert_same(got, want):
    for position, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), position


@pytest.fixture
def needs_memory():
    """A function that skips a test where so many GiB are not free; such tests run one at a time on a machine."""
    with open(Path(tempfile.gettempdir(), "fastelbo_gpu_memory"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def check(gib):
            free = torch.cuda.mem_get_info()[0] / GIB
            if free < gib:
                pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")

        yield check
        gc.collect()
        torch.cuda.empty_cache()


# Values


@every_op
@halves_too
@pytest.mark.parametrize("columns", [1, 3, 31, 257, 100_000])
def test_rows_of_any_length(op, dtype, columns, backend):
    inputs = inputs_of(op, (3 if columns > 1000 else 70, columns), dtype)
    assert_right(op, results(op, inputs, seed=7, backend=backend), inputs, 7)


@every_op
@pytest.mark.parametrize("shape", [(1, 1), (4096, 1), (1, 4099), (2, 3, 16, 40), (0, 5), (3, 0), (0, 0)], ids=str)
def test_shapes(op, shape, backend):
    inputs = inputs_of(op, shape)
    assert_right(op, results(op, inputs, seed=7, noise_offset=5, backend=backend), inputs, 7, noise_offset=5)


@every_op
@halves_too
def test_backends_agree_on_one_tensor(op, dtype, installed):
    if len(installed) < 2:
        pytest.skip(f"only {', '.join(installed) or 'none'} of {', '.join(BACKENDS)} can run here")
    inputs = inputs_of(op, (37, 1030), dtype)
    first, second = (results(op, inputs, seed=seed_tensor(7), backend=name) for name in installed)
    for a, b in zip(first, second, strict=True):
        unit = 2**-7 if a.dtype == torch.bfloat16 else 4e-6
        torch.testing.assert_close(a, b, rtol=unit, atol=unit * (40 if a.dim() == 1 else 1))


@every_op
@halves_too
def test_unaligned_views(op, dtype, backend):
    """Views that begin at any element of a buffer, which is NaN beyond them: reading there would show, and what the
    results' memory held before is NaN too, so that an element that is not written shows."""
    shape, pad = (5, 67), 16
    count = math.prod(shape)
    want = None
    for offset in range(8):
        inputs, buffers = [], []
        for k, x in enumerate(inputs_of(op, shape, dtype)):
            buffer = torch.full((count + 2 * pad,), math.nan, dtype=dtype, device=DEVICE)
            start = pad + (offset + k) % 8
            buffer[start : start + count] = x.detach().flatten()
            buffers.append((buffer, buffer.clone()))
            inputs.append(buffer[start : start + count].view(shape).requires_grad_())
        outputs = op(*inputs, seed=7, backend=backend)
        weights = upstream(outputs)
        # the allocator gives out again what was freed last
        stale = [torch.full_like(x, math.nan) for x in (*outputs, *inputs)]
        del outputs, stale
        got = results(op, inputs, weights, seed=7, backend=backend)
        want = want or got
        if offset == 0:
            assert_right(op, got, inputs, 7)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # loads of another width may sum in another order
        for buffer, before in buffers:
            torch.testing.assert_close(buffer, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, 3, 2**33 + 7, 2**34 - 2, 2**62 + 1])
def test_normals_are_those_of_every_other_device(seed, offset, installed):
    count = 10_007
    exact = philox_normal(torch.tensor(seed), (count,), noise_offset=offset).double()
    runs = [("cpu", torch.device("cpu")), *((name, DEVICE) for name in installed)]
    for name, device in runs:
        mean, std = torch.zeros(count, device=device), torch.ones(count, device=device)
        z = fastelbo.gaussian_rsample(mean, std, scale="std", seed=seed, noise_offset=offset, backend=name)
        # the spacing of float32 at each number: frexp's mantissa lies in [0.5, 1)
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
        error = (z.cpu().double() - exact).abs()
        assert (error <= (8 * ulp).clamp(min=1e-6)).all(), f"{name}: {error.max()}"


@every_drawing_op
@halves_too
@pytest.mark.parametrize("size", [1, 1023, 4101, 2**20 + 3])
def test_backward_draws_the_same_noise(op, dtype, size, backend):
    """With mean 0, standard deviation 1 and upstream d, the sample is the noise and the gradient of s is d times it."""
    zeros, ones = (torch.full((size,), value, dtype=dtype, device=DEVICE) for value in (0.0, 1.0))
    inputs = [zeros, ones.requires_grad_(), zeros, ones.detach()][: op.arity]
    z = op(*inputs, scale="std", seed=8, noise_offset=1, backend=backend)[0]
    assert size == 1 or z.unique().numel() > min(size, 500) / 2
    for d in (1.0, 2.0):  # powers of two: exact products
        (d_s,) = torch.autograd.grad(z, inputs[1], torch.full_like(z, d), retain_graph=True)
        assert torch.equal(d_s, d * z)


# Where it runs


def sleep():
    """Some 100 ms of the current stream: longer than a host that does much else needs to launch an op."""
    torch.cuda._sleep(200_000_000)


@every_launched_op
def test_runs_on_the_current_stream(op, backend):
    """What a stream writes late is what the op reads, forward and backward; it would read zeros on any other stream."""
    values = inputs_of(op, (64, 300))
    seed = seed_tensor(7)
    want = results(op, values, seed=seed, backend=backend)  # and compiles what has to be
    weights = upstream(op(*values, seed=seed, backend=backend))
    inputs = [torch.zeros_like(x).requires_grad_() for x in values]
    late = [torch.zeros_like(w) for w in weights]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        sleep()
        for x, value in zip(inputs, values, strict=True):
            x.data.copy_(value.detach())
        outputs = op(*inputs, seed=seed, backend=backend)
        sleep()
        for w, value in zip(late, weights, strict=True):
            w.copy_(value)
        grads = torch.autograd.grad(outputs, inputs, late)
    assert not side.query()  # else the pause was too short to show anything
    side.synchronize()
    assert_same([*outputs, *grads], want)


@every_launched_op
def test_streams_at_the_same_time(op, backend):
    """Long rows too: their partial sums must not be shared between launches."""
    cases = [inputs_of(op, shape) for shape in ((300, 257), (3, 100_000), (5000, 3), (2, 65_536))]
    want = [results(op, inputs, seed=k, backend=backend) for k, inputs in enumerate(cases)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(5):
        got = []
        for k, (stream, inputs) in enumerate(zip(streams, cases, strict=True)):
            with torch.cuda.stream(stream):
                got.append(results(op, inputs, seed=k, backend=backend))
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


@every_launched_op
def test_other_than_the_current_device(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    want = results(op, inputs_of(op, (37, 129)), seed=7, backend=backend)
    got = results(op, inputs_of(op, (37, 129), device=other), seed=7, backend=backend)
    assert all(x.device == other for x in got)
    assert torch.cuda.current_device() == 0
    assert_same([x.cpu() for x in got], [x.cpu() for x in want])


@contextlib.contextmanager
def no_synchronisation():
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


VARIANTS = {
    "seed-tensor": {},
    "seed-int": {"seed": 5},
    "seed-drawn": {"seed": None},
    "mean": {"reduction": "mean"},
    "clamped": {"scale": Scale.diffusers()},
    "samples": {"num_samples": 3},
}


@every_launched_op
@pytest.mark.parametrize("variant", VARIANTS)
def test_never_waits_for_the_gpu(op, variant, backend):
    keywords = {"seed": seed_tensor(7), "backend": backend, **VARIANTS[variant]}
    if not op.terms:
        keywords.pop("reduction", None)
    if op not in OPS.values():
        keywords.pop("scale", None)
    for shape in ((64, 300), (2, 65_536), (5, 3)):
        inputs = inputs_of(op, shape)
        weights = upstream(op(*inputs, **keywords))
        results(op, inputs, weights, **keywords)  # what is compiled and loaded once
        with no_synchronisation():
            results(op, inputs, weights, **keywords)


def test_numbers_as_arguments_do_not_wait(backend):
    mean, s = inputs_of(OPS["kl"], (64, 300))
    with no_synchronisation():
        fastelbo.gaussian_kl(mean, s, 0.5, 1.0, backend=backend)
        fastelbo.gaussian_log_prob(mean, 0.0, s, backend=backend)


# CUDA graphs


def captured(op, inputs, weights, before=None, **keywords):
    """A graph of both passes and its results; `before` is captured in front of them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            results(op, inputs, weights, **keywords)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if before is not None:
            before()
        found = results(op, inputs, weights, **keywords)
    return graph, found


@every_launched_op
@pytest.mark.parametrize("shape", [(64, 300), (2, 65_536)], ids=str)
def test_graph_of_both_passes(op, shape, backend):
    """A replay computes from what the inputs and the seed hold then."""
    inputs, seed = inputs_of(op, shape), seed_tensor(0)
    weights = upstream(op(*inputs, seed=seed, backend=backend))
    graph, found = captured(op, inputs, weights, seed=seed, backend=backend)
    for value in (1, 2, 1):
        seed.fill_(value)
        for x in inputs:
            x.data.mul_(0.5)
        graph.replay()
        assert_same(found, results(op, inputs, weights, seed=seed, backend=backend))


@every_drawing_op
@pytest.mark.parametrize("source", ["seed-changed-between", "seed-incremented-within", "seed-drawn"])
def test_replays_draw_fresh_noise(op, source, backend):
    """And each replay's backward draws what its forward did: the gradient of s, with standard deviation 1, is z."""
    zeros, ones = torch.zeros(64, 300, device=DEVICE), torch.ones(64, 300, device=DEVICE)
    inputs = [zeros.clone().requires_grad_(), ones.clone().requires_grad_(), zeros, ones][: op.arity]
    leaves, seed = inputs[:2], seed_tensor(3)
    drawn = {"seed": None if source == "seed-drawn" else seed}
    before = (lambda: seed.add_(1)) if source == "seed-incremented-within" else None

    def sample(mean, std, **keywords):
        return op(mean, std, *inputs[2:], scale="std", **keywords)[:1]

    graph, (z, _, d_s) = captured(sample, leaves, [ones], before, backend=backend, **drawn)
    seen = []
    for step in range(4):
        if source == "seed-changed-between":
            seed.fill_(100 + step)
        graph.replay()
        assert torch.equal(d_s, z)
        assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
        assert not any(torch.equal(z, earlier) for earlier in seen)
        if source != "seed-drawn":
            assert torch.equal(z, sample(*leaves, seed=seed, backend=backend)[0])
        seen.append(z.clone())


def test_replays_follow_manual_seed(backend):
    """A seed that is drawn within a graph comes from torch's generator, which the graph knows."""
    mean, std = torch.zeros(1000, device=DEVICE), torch.ones(1000, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    fastelbo.gaussian_rsample(mean, std, scale="std", backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        z = fastelbo.gaussian_rsample(mean, std, scale="std", backend=backend)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        for _ in range(2):
            graph.replay()
            runs.append(z.clone())
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


# torch.compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    return torch.compile


@every_op
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(op, mode, compiled, backend):
    inputs, seed = inputs_of(op, (64, 300)), seed_tensor(7)
    weights = upstream(op(*inputs, seed=seed, backend=backend))
    want = results(op, inputs, weights, seed=seed, backend=backend)

    def plain(*inputs):
        return op(*inputs, seed=seed, backend=backend)

    function = compiled(plain, fullgraph=True, mode=None if mode == "default" else mode)
    for _ in range(4):  # graphs are recorded at the second call, and replayed from the third on
        torch.compiler.cudagraph_mark_step_begin()
        outputs = function(*inputs)
        grads = torch.autograd.grad(outputs, inputs, weights)
        assert_same([x.clone() for x in (*outputs, *grads)], want)
        del outputs, grads


@every_drawing_op
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpoint"])
def test_compiled_draws(op, mode, recompute, compiled, backend):
    """Every call draws anew, and the backward, also one that recomputes the forward, draws the noise of its forward."""
    zeros, ones = torch.zeros(64, 300, device=DEVICE), torch.ones(64, 300, device=DEVICE)
    mean, std = zeros.clone().requires_grad_(), ones.clone().requires_grad_()
    prior = [zeros, ones][: op.arity - 2]

    def sample(mean, std):
        return op(mean, std, *prior, scale="std", seed=None, backend=backend)[0] * 1.0

    def plain(mean, std):
        return checkpoint(sample, mean, std, use_reentrant=False) if recompute else sample(mean, std)

    function = compiled(plain, mode=None if mode == "default" else mode)
    seen = []
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        z = function(mean, std)
        (d_std,) = torch.autograd.grad(z, std, ones)
        assert torch.equal(d_std, z)
        assert not any(torch.equal(z, earlier) for earlier in seen)
        seen.append(z.detach().clone())
        del z, d_std


@every_drawing_op
def test_checkpoint(op, backend):
    zeros, std = torch.zeros(64, 300, device=DEVICE), torch.ones(64, 300, device=DEVICE, requires_grad=True)
    prior = [zeros, std.detach()][: op.arity - 2]
    z = checkpoint(lambda std: op(zeros, std, *prior, scale="std", backend=backend)[0], std, use_reentrant=False)
    torch.rand(3, device=DEVICE)  # the recomputation must restore the generator
    assert torch.equal(torch.autograd.grad(z.sum(), std)[0], z)


class OnTheGPU(TorchDispatchMode):
    """The names of all ops whose results lie there."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor)]
        if function is not torch.ops.aten.detach.default and any(x.is_cuda for x in tensors):
            self.names.append(str(function))
        return out


@every_drawing_op
@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "int"])
def test_a_seed_launches_nothing(op, seed):
    """CUDA C++ takes its value; second derivatives, by plain torch, want it on the GPU."""
    inputs = inputs_of(op, (64, 300))
    with OnTheGPU() as ran:
        outputs = op(*inputs, seed=seed, backend="cuda")
    assert len(ran.names) == 1, ran.names
    (grad,) = torch.autograd.grad(outputs[0].sum(), inputs[1], create_graph=True)
    assert torch.autograd.grad(grad.sum(), inputs[1])[0].isfinite().all()


def test_backends_draw_the_same_seeds(installed):
    zeros, ones = torch.zeros(1000, device=DEVICE), torch.ones(1000, device=DEVICE)
    drawn = []
    for backend in ("reference", *installed):
        torch.manual_seed(5)
        drawn.append([fastelbo.gaussian_rsample(zeros, ones, scale="std", backend=backend) for _ in range(2)])
    for first, second in drawn[1:]:
        torch.testing.assert_close([first, second], drawn[0], rtol=1e-5, atol=1e-5)


# Memory


@every_op
@halves_too
def test_keeps_nothing_but_inputs_and_seed(op, dtype, backend):
    inputs = inputs_of(op, (64, 300), dtype)
    for seed in (seed_tensor(7), None):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            op(*inputs, seed=seed, backend=backend)
        mine = {x.data_ptr() for x in inputs}
        others = [x for x in kept if x.data_ptr() not in mine]
        assert [(x.numel(), x.dtype) for x in others] == ([(1, torch.int64)] if op.drawn else [])


def peak_of(function):
    """What a call returns, and how many bytes it asked of the allocator at most, beyond what was there."""
    gc.collect()  # what earlier tests left in cycles would be freed in between
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    out = function()
    torch.cuda.synchronize()
    return out, torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@every_op
@halves_too
def test_peak_memory_is_the_results(op, dtype, backend):
    inputs, seed = inputs_of(op, (4096, 1024), dtype), seed_tensor(7)
    weights = upstream(op(*inputs, seed=seed, backend=backend))
    results(op, inputs, weights, seed=seed, backend=backend)
    outputs, forward = peak_of(lambda: op(*inputs, seed=seed, backend=backend))
    assert forward == sum(out.nbytes for out in outputs)
    grads, backward = peak_of(lambda: torch.autograd.grad(outputs, inputs, weights))
    shared = {w.data_ptr() for w in weights}  # the gradient of a mean may be the upstream gradient itself
    assert backward == sum(grad.nbytes for grad in grads if grad.data_ptr() not in shared)


# Beyond 2^31 elements


@every_drawing_op
def test_more_than_2_to_the_31_elements(op, backend, needs_memory):
    """The last rows against the reference at their offset, in all results; and that rows before 2^31 are theirs."""
    rows, columns, last = 2**21 + 3, 1024, 5
    needs_memory((op.arity + 1 + op.arity) * rows * columns * 2 / GIB + 2)
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator).requires_grad_()
        for _ in range(op.arity)
    ]
    outputs = op(*inputs, seed=7, backend=backend)
    # one number for all: an upstream gradient of full size would be another 4 GiB
    weights = [torch.ones((), dtype=out.dtype, device=DEVICE).expand(out.shape) for out in outputs]
    grads = torch.autograd.grad(outputs, inputs, weights)
    for start in (0, 2**20 - 2, rows - last):  # elements around 0, 2^30 and 2^31
        # in float32: plain torch rounds the two terms of a bfloat16 gradient apart
        part = [x.detach()[start : start + last].float().requires_grad_() for x in inputs]
        offset = start * columns
        found = op(*part, seed=7, noise_offset=offset, backend="reference")
        part_grads = torch.autograd.grad(found, part, [torch.ones_like(out) for out in found])
        for got, want in zip((*outputs, *grads), (*found, *part_grads), strict=True):
            got = got.detach()[start : start + last]
            unit = 2**-8 if got.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got.float(), want, rtol=unit, atol=1e-5)


@pytest.mark.parametrize("op", [OPS["kl"], OPS["log_prob"]], ids=["kl", "log_prob"])
def test_a_sum_of_more_than_2_to_the_31_elements(op, backend, needs_memory):
    """One event of all elements: its sum is that of the sums of its parts."""
    rows, columns = 2**21 + 3, 1024
    needs_memory(2 * op.arity * rows * columns * 2 / GIB + 2)
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = [
        torch.empty(rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(generator=generator).requires_grad_()
        for _ in range(op.arity)
    ]
    parts = op(*inputs, backend=backend)[0].double().sum()
    total = op(*inputs, event_ndim=2, backend=backend)[0]
    torch.testing.assert_close(total.double(), parts, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(total, inputs)
    tails = [x.detach()[-2:].float().requires_grad_() for x in inputs]
    wants = torch.autograd.grad(op(*tails, event_ndim=2, backend="reference")[0], tails)
    for got, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(got[-2:].float(), want, rtol=2**-8, atol=1e-5)


# Masked convolutions


def test_a_convolution_of_more_than_2_to_the_31_elements(backend, needs_memory):
    """The first and the last image against a convolution of their own."""
    images, channels, size = 2**17 + 1, 16, 32
    needs_memory(5 * images * channels * size**2 * 2 / GIB + 2)
    x = torch.empty(images, channels, size, size, dtype=torch.bfloat16, device=DEVICE).normal_().requires_grad_()
    weight = (torch.randn(channels, channels, 3, 3, device=DEVICE) / 8).bfloat16()
    y = fastelbo.masked_conv2d(x, weight, mask_type="B", backend=backend)
    (d_x,) = torch.autograd.grad(y, x, torch.ones((), dtype=y.dtype, device=DEVICE).expand(y.shape))
    for image in (0, images - 1):
        part = x.detach()[image : image + 1].requires_grad_()
        want = fastelbo.masked_conv2d(part, weight, mask_type="B", backend="reference")
        (d_part,) = torch.autograd.grad(want, part, torch.ones_like(want))
        for got, expected in ((y, want), (d_x, d_part)):
            torch.testing.assert_close(got[image : image + 1], expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [(1, 64), (64, 128), (60, 60)], ids=str)
def test_tuned_tiles_compute_the_same(channels, dtype, backend, monkeypatch):
    """torch.backends.cudnn.benchmark lets the fastest tiles win, as with torch's convolutions, if they are right."""
    inputs, outputs = channels
    x = torch.randn(8, inputs, 28, 28, device=DEVICE).to(dtype, memory_format=torch.channels_last).requires_grad_()
    weight = (torch.randn(outputs, inputs, 5, 5, device=DEVICE) / (13 * inputs) ** 0.5).to(dtype).requires_grad_()
    found = []
    for benchmark in (False, True, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
        y = fastelbo.masked_conv2d(x, weight, mask_type="B", activation="glu", backend=backend)
        found.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    for plain, tuned, again in zip(*found, strict=True):
        torch.testing.assert_close(tuned, plain, rtol=1e-2, atol=1e-2 * plain.abs().max().item())
        assert torch.equal(tuned, again)


def test_sampler_draws_what_a_cpu_draws():
    """As on a CPU: no uniform number of these seeds falls between two roundings of a probability."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = fastelbo.nn.GatedMaskedConv2d(3, 12, 5, mask_type="A", channel_groups=3)
            self.block = fastelbo.nn.GatedMaskedConv2d(12, 12, 3, channel_groups=3)
            self.last = fastelbo.nn.MaskedConv2d(12, 12, 1, mask_type="B", channel_groups=3)

        def forward(self, x):
            return self.last(self.block(*self.first(x, x))[1])

    torch.manual_seed(0)
    model = Network()
    context = torch.nn.Sequential(fastelbo.nn.MaskedConv2d(1, 16, 5), torch.nn.ReLU(), torch.nn.Conv2d(16, 4, 1))
    for network, colours, order in ((model, 3, "raster"), (context, 1, "wavefront")):
        shape, options = (colours, 6, 7), {"levels": 4, "order": order}
        want = IncrementalSampler(network.cpu(), shape, **options).sample(200, seed=5)
        sampler = IncrementalSampler(network.cuda(), shape, **options)
        assert sampler.backend == "cuda"
        assert torch.equal(sampler.sample(200, seed=5).cpu(), want)
        assert torch.equal(sampler.sample(200, seed=5, method="naive").cpu(), want)


# Convolutions over TMA boxes


@pytest.fixture
def over_boxes(monkeypatch):
    """As FASTELBO_CONV=tma has it: the names of these kernels' launches."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these kernels are for GPUs of capability 9.0")
    boxes = importlib.import_module("fastelbo.kernels.masked_conv2d_tma")
    names = []

    class Recorded(boxes.Launch):
        def __call__(self, *tensors):
            names.append(self._kernel.__name__)
            super().__call__(*tensors)

    monkeypatch.setattr(boxes, "Launch", Recorded)
    monkeypatch.setattr(fastelbo._library, "_FOUND", {})
    monkeypatch.setattr(importlib.import_module("fastelbo.kernels.masked_conv2d"), "boxes", boxes)
    before = torch.backends.cudnn.conv.fp32_precision  # no attribute that monkeypatch could give back
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with torch.device(DEVICE):
        yield names
    torch.backends.cudnn.conv.fp32_precision = before


def boxed_layer(n, c, o, size, k, dtype, activation=None):
    """Operands in channels last."""
    tensors = operands(n, c, o, *size, k, activation=activation, dtype=dtype)
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]


BOXED = {
    "64 k7": (16, 64, 64, (28, 28), 7),
    "64 k7, rows": (64, 64, 64, (28, 28), 7),
    "128 k5, rows": (48, 128, 128, (28, 28), 5),
    "128 k3, waves": (80, 128, 128, (16, 16), 3),
    "128 k3": (32, 128, 128, (16, 16), 3),
    "64-128 k5": (128, 64, 128, (7, 7), 5),
    "128-64 k3": (8, 128, 64, (7, 7), 3),
    "192 k3": (32, 192, 192, (16, 16), 3),
    "24-128 k5": (48, 24, 128, (14, 14), 5),
    "320 k3": (4, 320, 320, (32, 32), 3),
}


@pytest.mark.parametrize(
    ("layer", "activation", "dtype"),
    [
        *((layer, activation, torch.bfloat16) for layer in BOXED for activation in (None, "tanh_sigmoid")),
        *((layer, None, torch.float16) for layer in list(BOXED)[::3]),  # of whose tiles the type is no part
        *((layer, name, torch.bfloat16) for layer in list(BOXED)[:2] for name in ("relu", "elu", "glu")),
    ],
)
def test_error_budget_over_boxes(over_boxes, layer, activation, dtype):
    n, c, o, size, k = layer = BOXED[layer]
    tensors = boxed_layer(*layer, dtype, activation)
    mask = fastelbo.conv_mask2d(o, c, k, "B").to(DEVICE)
    options = {"mask_type": "B", "activation": activation, "backend": "triton"}
    actual = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **options)
    whole = size != (7, 7) or n == 128  # boxes of one pixel of 64 images
    gradients = ["weight_shares", "add_shares"] if whole and n * size[0] * size[1] > 4096 else []
    assert [name.removesuffix("_rows") for name in over_boxes] == ["convolve", "convolve", *gradients]
    exact = outputs_and_gradients(lines, [t.double() for t in tensors], mask=mask.double(), activation=activation)
    plain = outputs_and_gradients(lines, tensors, mask=mask.to(dtype), activation=activation)
    for name, *three in zip((*NAMES, "d_residual"), actual, exact, plain, strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name=name)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(
    "layer", [BOXED["64 k7, rows"], BOXED["128 k5, rows"], BOXED["128 k3"], BOXED["64-128 k5"]], ids=str
)
def test_nan_in_dead_taps_and_unread_pixels_over_boxes(over_boxes, layer, mask_type):
    _, c, o, _, k = layer
    x, weight, bias, *_ = boxed_layer(*layer, torch.bfloat16)
    live = fastelbo.conv_mask2d(o, c, k, mask_type).to(DEVICE)

    def run(x, weight):
        return outputs_and_gradients(
            fastelbo.masked_conv2d, [x, weight, bias, None, None], mask_type=mask_type, backend="triton"
        )

    clean, poisoned = run(x, weight), run(x, weight.masked_fill(~live, float("nan")))
    assert over_boxes
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))
    assert (poisoned[2][~live] == 0).all()
    if mask_type == "A":
        x = x.clone(memory_format=torch.preserve_format)
        x[:, :, -1, -1] = float("nan")
        assert all(torch.equal(a, b) for a, b in zip(run(x, weight), clean, strict=True))


@pytest.mark.parametrize(
    ("layer", "activation"),
    [((128, 64, 64, (28, 28), 7), None), ((64, 64, 128, (28, 28), 7), "tanh_sigmoid"), (BOXED["128 k3, waves"], "elu")],
    ids=str,
)
def test_fifty_runs_over_boxes_are_bitwise_equal(over_boxes, layer, activation):
    tensors = boxed_layer(*layer, torch.bfloat16, activation)
    options = {"mask_type": "B", "activation": activation, "backend": "triton"}
    first = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **options)
    differing = torch.zeros((), dtype=torch.int64)
    for _ in range(49):
        again = outputs_and_gradients(fastelbo.masked_conv2d, tensors, **options)
        for a, b in zip(again, first, strict=True):
            differing += (a.view(torch.int16) != b.view(torch.int16)).any()
    assert differing.item() == 0
    assert len(over_boxes) == 50 * 4


def test_a_graph_replays_convolutions_over_boxes(over_boxes):
    x, weight, bias, cond, residual = boxed_layer(16, 64, 64, (28, 28), 7, torch.bfloat16)

    def run():
        return fastelbo.masked_conv2d(x, weight, bias, cond=cond, residual=residual, mask_type="B", backend="triton")

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn(x.shape))
    graph.replay()
    assert torch.equal(y, run())


# Blocks of a Gated PixelCNN in two launches

GATED = {
    "64": ((64, 64, (28, 28)), {"n": 16}),
    "128": ((128, 128, (16, 16)), {"k": 5, "link": "pad-first", "cond": "class", "n": 16}),
    "colours": ((60, 60, (13, 9)), {"channel_groups": 3, "cond": "image", "n": 8}),
    "first": ((3, 96, (32, 32)), {"mask_type": "A", "k": 7, "channel_groups": 3, "n": 8}),
    "three launches": ((160, 160, (16, 16)), {"link": "mask-first-layer", "activation": "glu", "n": 8}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GATED)
def test_blocks_in_two_launches(name, dtype, taken):  # noqa: F811
    """Within the error budget, and fifty times the same bits; float32 in TF32, as torch's own lines."""
    arguments, options = GATED[name]
    with torch.device(DEVICE):
        block, images = make(*arguments, layout=torch.channels_last, backend="triton", **options)
        exact = both_ways(lambda *x: lines_of_block(block, *x), block, images)
        block, images = block.to(dtype), [x.to(dtype) for x in images]
        plain = both_ways(lambda *x: lines_of_block(block, *x), block, images)
        first = both_ways(block, block, images)
        for part, three in enumerate(zip(first, exact, plain, strict=True)):
            assert_within_budget(*three, name=str(part))
        differing = sum(
            (a != b).any() for _ in range(49) for a, b in zip(both_ways(block, block, images), first, strict=True)
        )
        assert differing.item() == 0 and taken == [True] * 50
