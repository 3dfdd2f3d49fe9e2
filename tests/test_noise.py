"""The noise: Philox's integers, Box-Muller's normals, what they must not depend on, and their statistics."""

import functools
import math
import random
from types import SimpleNamespace

import fresh_python
import numpy
import pytest
import scipy.stats
import torch
from ops import PLAIN
from tqdm import tqdm

import fastelbo
from fastelbo import _seed
from fastelbo.reference.noise import philox4x32
from fastelbo.testing import assert_within_budget, gaussian

MASK = 0xFFFFFFFF
SEEDS = [0, 1, 42, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
OFFSETS = [0, 1, 2, 3, 4, 1021, 2**33 + 7, 2**34 - 4098, 2**34 - 2, 2**34 + 5, 2**40 + 3, 2**62 + 1]


def sampler(op):
    """An op as a function that returns z."""
    (position,) = op.drawn
    return lambda *tensors, seed=None, **keywords: op(*tensors, seed=seed, **keywords)[position]


SAMPLERS = {name: sampler(op) for name, op in PLAIN.items() if op.drawn}

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def philox(counter, key):
    """Philox4x32-10 as published, on Python ints or on uint64 arrays: a product of two words fits in 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def definition(seed, n, *, first=0, sample=0):
    """Normals of elements first .. first + n - 1 as docs/noise.md defines them, in float64 from the float32 uniform."""
    blocks = range(first // 4, (first + n - 1) // 4 + 1)
    block = blocks.start + numpy.arange(len(blocks), dtype=numpy.uint64)
    zero = numpy.zeros_like(block)
    words = philox((block & MASK, block >> 32, zero + sample, zero), (seed & MASK, (seed >> 32) & MASK))
    # float32(x) 2^-32 + 2^-33 is exact in float64, so that this rounds once, as the fma does
    u0, u1, u2, u3 = (
        (x.astype(numpy.float32).astype(numpy.float64) * 2**-32 + 2**-33).astype(numpy.float32).astype(numpy.float64)
        for x in words
    )
    columns = []
    for u, angle in ((u0, 2 * math.pi * u1), (u2, 2 * math.pi * u3)):
        r = numpy.sqrt(numpy.maximum(0.0, -2 * numpy.log(u)))
        columns += [r * numpy.cos(angle), r * numpy.sin(angle)]
    return torch.from_numpy(numpy.stack(columns, 1).reshape(-1)[first % 4 :][:n].copy())


def draw(n, seed, *, dtype=torch.float32, **keywords):
    """The noise itself: mean 0, standard deviation 1."""
    shape = n if isinstance(n, tuple) else (n,)
    zeros, ones = torch.zeros(shape, dtype=dtype), torch.ones(shape, dtype=dtype)
    return fastelbo.gaussian_rsample(zeros, ones, scale="std", seed=seed, **keywords)


def rng_state():
    """Of the generator that seeds are drawn from."""
    return torch.cuda.get_rng_state() if torch.get_default_device().type == "cuda" else torch.get_rng_state()


def ulp(exact):
    """The spacing of float32 at each number."""
    return torch.from_numpy(numpy.spacing(exact.abs().float().numpy())).double()


def assert_few_ulp(actual, exact):
    """log, sin and cos differ between implementations: docs/noise.md promises a few ulp, and no more. The absolute part
    is for normals near 0, where sin and cos of a rounded angle lose relative accuracy."""
    error = (actual.double().cpu() - exact).abs()
    assert (error <= (8 * ulp(exact)).clamp(min=1e-6)).all(), error.max()


# The integers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter, key, words):
    """Random123's kat_vectors."""
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    assert list(philox(counter, key)) == words
    got = philox4x32([torch.tensor(word) for word in counter], [torch.tensor(word) for word in key])
    assert [word.item() for word in got] == words


def test_philox_equals_python_integers():
    draws = random.Random(0)
    special = [0, 1, 2**31 - 1, 2**31, MASK]
    rows = [[draws.choice([draws.getrandbits(32), draws.choice(special)]) for _ in range(6)] for _ in range(2000)]
    *counter, k0, k1 = torch.tensor(rows).unbind(1)
    got = torch.stack(philox4x32(counter, (k0, k1)), 1).tolist()
    assert got == [list(philox(row[:4], row[4:])) for row in rows]


# The normals


@pytest.mark.parametrize("seed", SEEDS)
def test_normals_equal_the_definition(backend, seed):
    for offset in OFFSETS:
        exact = definition(seed, 4099, first=offset)
        got = draw(4099, seed, noise_offset=offset, backend=backend)
        if backend != "reference":
            assert_few_ulp(got, exact)
        else:  # it too rounds once from float64, whose log, sin and cos may differ in their last bit
            assert ((got.double() - exact).abs() <= ulp(exact)).all(), offset


def test_sample_index_is_the_third_counter_word(backend):
    seed, offset, n = -7, 2**34 - 6, 1030
    z = draw(n, seed, num_samples=5, noise_offset=offset, backend=backend)
    assert torch.equal(z[0], draw(n, seed, noise_offset=offset, backend=backend))
    for k in range(5):
        assert_few_ulp(z[k], definition(seed, n, first=offset, sample=k))
    fewer = draw(n, seed, num_samples=2, noise_offset=offset, backend=backend)
    assert torch.equal(fewer, z[:2])


def test_normals_at_the_ends_of_the_uniform():
    """Words next to 0 and 2^32, where ln u is largest and smallest, and angles next to multiples of pi / 2."""
    n = 2**22
    blocks = numpy.arange(n // 4, dtype=numpy.uint64)
    zero = numpy.zeros_like(blocks)
    radius, angle = (word.astype(numpy.int64) for word in philox((blocks, zero, zero, zero), (3, 0))[:2])
    z, exact = (tensor.reshape(-1, 4)[:, :2] for tensor in (draw(n, 3, backend="cpu"), definition(3, n)))
    for word, end in ((radius, 0), (radius, 2**32), *((angle, quarter * 2**30) for quarter in range(5))):
        near = numpy.abs(word - end) < 2**16
        assert near.any()
        assert_few_ulp(z[near], exact[near])


# What the noise does not depend on


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 63, 1023, 1024, 1025, 4097])
def test_size(backend, size):
    whole = draw(5000, 11, backend=backend)
    assert torch.equal(draw(size, 11, backend=backend), whole[:size])
    assert torch.equal(draw((size, 1), 11, backend=backend)[:, 0], whole[:size])


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "packed-first": lambda x: torch.cat([x, -x], 1).chunk(2, 1)[0],
    "packed-second": lambda x: torch.cat([-x, x], 1).chunk(2, 1)[1],
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "channels-last-packed": lambda x: (
        torch.cat([x, -x], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[0]
    ),
}


def inputs(shape=(3, 5, 6, 37), dtype=torch.float32):
    return gaussian(shape, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("of", ["mean", "s", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, dtype, layout, of):
    mean, s = inputs(dtype=dtype)
    laid_out = [LAYOUTS[layout](x) if of in (name, "both") else x for name, x in (("mean", mean), ("s", s))]
    for op in SAMPLERS.values():
        want = op(mean, s, seed=9, noise_offset=3, backend=backend)
        assert torch.equal(op(*laid_out, seed=9, noise_offset=3, backend=backend), want)


def test_expanded(backend):
    mean, s = inputs()
    rows, column = mean[:1].expand(3, -1, -1, -1), s[:, :1].expand(-1, 5, -1, -1)
    want = fastelbo.gaussian_rsample(rows.contiguous(), column.contiguous(), seed=9, backend=backend)
    assert torch.equal(fastelbo.gaussian_rsample(rows, column, seed=9, backend=backend), want)
    assert torch.equal(fastelbo.gaussian_rsample(mean[:1], s[:, :1], seed=9, backend=backend), want)
    number = fastelbo.gaussian_rsample(0.0, torch.ones(3, 7), scale="std", seed=9, backend=backend)
    assert torch.equal(number, draw((3, 7), 9, backend=backend))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_thread_count(threads, num_samples):
    """Bitwise, forward and backward: d_s comes from noise that each thread draws anew."""
    mean, s = (tensor.requires_grad_() for tensor in gaussian((97, 4099)))
    upstream = gaussian((97, 4099) if num_samples is None else (num_samples, 97, 4099), seed=1)[0]
    results = []
    for count in (1, 2, 3):
        threads(count)
        z = fastelbo.gaussian_rsample(mean, s, seed=2, num_samples=num_samples, backend="cpu")
        z2, kl = fastelbo.gaussian_rsample_kl(mean, s, seed=2, num_samples=num_samples, backend="cpu")
        grads = *torch.autograd.grad(z, (mean, s), upstream), *torch.autograd.grad([z2], (mean, s), upstream)
        results.append((z, z2, kl, *grads))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("start", [0, 2**34 - 2049], ids=["0", "across-2^34"])
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("sizes", [(1, 2, 3, 5, 7, 1006, 1024, 2049), (4096,), (1,) * 9, (2047, 2, 0, 999)], ids=str)
def test_shards_make_the_whole(backend, start, num_samples, sizes):
    keywords = {"num_samples": num_samples, "backend": backend}
    whole = draw(sum(sizes), 5, noise_offset=start, **keywords)
    shards, offset = [], start
    for size in sizes:
        shards.append(draw(size, 5, noise_offset=offset, **keywords))
        offset += size
    assert torch.equal(torch.cat(shards, -1), whole)


@every_dtype
def test_dtype(backend, dtype):
    """One stream for all: float64 is the float32 normal widened, a half result is the float32 result rounded."""
    noise = draw(1000, 3, backend=backend)
    drawn = draw(1000, 3, dtype=dtype, backend=backend)
    if dtype.itemsize > 2 or drawn.device.type == "cpu":
        assert torch.equal(drawn, noise.to(dtype))
    mean, s = inputs(dtype=dtype)
    z = fastelbo.gaussian_rsample(mean, s, seed=3, backend=backend)
    assert z.dtype == dtype
    if dtype.itemsize == 2:
        in_float = fastelbo.gaussian_rsample(mean.float(), s.float(), seed=3, backend=backend)
        if z.device.type == "cpu":
            assert torch.equal(z, in_float.to(dtype))
        else:  # GPUs draw it by approximate functions, so that the rounding may go the other way
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(z, in_float.to(dtype), rtol=unit, atol=unit)
        kept = fastelbo.gaussian_rsample(mean, s, seed=3, out_dtype=torch.float32, backend=backend)
        assert torch.equal(kept, in_float)


@pytest.mark.parametrize("seed", SEEDS)
def test_ways_to_write_a_seed(backend, seed):
    want = draw(100, seed, backend=backend)
    signed = (seed + 2**63) % 2**64 - 2**63
    for same in (signed, signed % 2**64, torch.tensor(signed), torch.tensor([signed]), torch.tensor([[signed]])):
        assert torch.equal(draw(100, same, backend=backend), want)
    assert not torch.equal(draw(100, signed ^ 1, backend=backend), want)
    assert not torch.equal(draw(100, signed ^ 2**40, backend=backend), want)


@pytest.mark.parametrize("kind", fastelbo.scale.KINDS)
@pytest.mark.parametrize("prior", [False, True], ids=["standard-normal", "learned-prior"])
def test_the_fused_op_gives_the_same_numbers(backend, kind, prior):
    q, p = (gaussian((3, 5, 333), kind=kind, seed=seed) for seed in (0, 1))
    p = p if prior else ()
    draw = {"seed": 3, "num_samples": 2, "noise_offset": 77, "temperature": 0.7}
    z, kl = fastelbo.gaussian_rsample_kl(*q, *p, scale=kind, backend=backend, **draw)
    assert torch.equal(z, fastelbo.gaussian_rsample(*q, scale=kind, backend=backend, **draw))
    kl_alone = fastelbo.gaussian_kl(*q, *p, scale=kind, backend=backend)
    if backend in ("reference", "cpu"):
        assert torch.equal(kl, kl_alone)
    else:  # rows that start inside a block of four normals are summed from the block's start: in another order
        torch.testing.assert_close(kl, kl_alone, rtol=4 * torch.finfo(kl.dtype).eps, atol=0)


ISA_SCRIPT = """
import sys, torch, fastelbo
from fastelbo.testing import gaussian
assert fastelbo.backends.usable("cpu") is None
results = []
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for shape, samples in (((33, 1027), None), ((5, 7), 3)):
        mean, s = (x.requires_grad_() for x in gaussian(shape, dtype=dtype))
        keywords = dict(seed=-5, num_samples=samples, noise_offset=2**34 - 3, backend="cpu")
        z = fastelbo.gaussian_rsample(mean, s, **keywords)
        z2, kl = fastelbo.gaussian_rsample_kl(mean, s, **keywords)
        grads = *torch.autograd.grad(z.sum(), (mean, s)), *torch.autograd.grad(z2.sum() + kl.sum(), (mean, s))
        results += [x.detach() for x in (z, z2, kl, *grads)]
torch.save((fastelbo.backends.cpu_isa(), results), sys.argv[1])
"""


@pytest.fixture(scope="module")
def run_on_isa(tmp_path_factory):
    """What the script computes on an instruction set, in a process of its own: the choice is made once."""
    folder = tmp_path_factory.mktemp("isa")

    @functools.cache
    def run(isa):
        path = folder / isa
        fresh_python.run(ISA_SCRIPT, path, cwd=folder, FASTELBO_CPU_ISA=isa)
        return torch.load(path)

    return run


def test_avx2_and_avx512_give_the_same_bits(run_on_isa):
    (narrow_isa, narrow), (wide_isa, wide) = run_on_isa("avx2"), run_on_isa("avx512")
    if (narrow_isa, wide_isa) != ("AVX2", "AVX-512"):
        pytest.skip(f"this processor has {wide_isa} at most")
    for position, (a, b) in enumerate(zip(narrow, wide, strict=True)):
        assert torch.equal(a, b), f"result {position}: {(a.double() - b.double()).abs().max()}"


def test_portable_agrees_with_vectors(run_on_isa):
    (isa, portable), (_, best) = run_on_isa("portable"), run_on_isa("avx512")
    assert isa == "portable"
    for a, b in zip(portable, best, strict=True):
        # a few float32 ulp of noise whatever the dtype, times a factor of order 1, then one rounding to a half
        unit = torch.finfo(a.dtype).eps if a.dtype.itemsize == 2 else 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(a, b, rtol=unit, atol=unit)


# The backward draws the same noise again


@every_dtype
@pytest.mark.parametrize("size", [1, 1023, 4101])
def test_backward_draws_the_same_noise(backend, dtype, size):
    """With sigma 1 and upstream 1 the gradient of sigma is the noise, bit by bit."""
    mean, std = torch.zeros(size, dtype=dtype), torch.ones(size, dtype=dtype, requires_grad=True)
    for op in SAMPLERS.values():
        z = op(mean, std, scale="std", seed=8, noise_offset=1, backend=backend)
        (d_std,) = torch.autograd.grad(z.sum(), std)
        assert torch.equal(d_std, z)


def test_backward_sums_the_samples():
    std = torch.ones(1027, requires_grad=True)
    z = fastelbo.gaussian_rsample(torch.zeros(1027), std, scale="std", seed=8, num_samples=7, backend="cpu")
    (d_std,) = torch.autograd.grad(z.sum(), std)
    assert torch.equal(d_std, z.detach().double().sum(0).float())  # seven float32 numbers add up exactly enough


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_logvar(backend, dtype):
    mean, logvar = gaussian((33, 129), dtype=dtype)
    upstream = gaussian((33, 129), dtype=dtype, seed=1)[0]
    logvar.requires_grad_()
    z = fastelbo.gaussian_rsample(mean, logvar, seed=8, backend=backend)
    (d_logvar,) = torch.autograd.grad(z, logvar, upstream)
    noise = draw((33, 129), 8, backend=backend).to(dtype)
    exact_z = fastelbo.gaussian_rsample(mean.double(), logvar.detach().double(), seed=8, backend=backend)
    exact = 0.5 * (exact_z - mean.double()) * upstream.double()
    plain = 0.5 * torch.exp(0.5 * logvar.detach()) * noise * upstream
    assert_within_budget(d_logvar, exact, plain, name="d_logvar")


# Temperature, noise of the caller, and where the seed comes from


@every_dtype
def test_temperature(backend, dtype):
    mean, s = inputs(dtype=dtype)
    assert torch.equal(fastelbo.gaussian_rsample(mean, s, temperature=0.0, backend=backend), mean)
    assert torch.equal(fastelbo.gaussian_rsample(mean, s, temperature=0, backend=backend), mean)
    half = draw(100, 3, dtype=dtype, temperature=0.5, backend=backend)
    assert torch.equal(half, draw(100, 3, dtype=dtype, backend=backend) / 2)  # a power of two: exact
    std = torch.ones(100, dtype=dtype, requires_grad=True)
    z = fastelbo.gaussian_rsample(torch.zeros_like(std), std, scale="std", seed=3, temperature=0.5, backend=backend)
    assert torch.equal(torch.autograd.grad(z.sum(), std)[0], z)


@pytest.mark.parametrize("num_samples", [None, 3])
def test_given_noise_is_used_and_nothing_drawn(backend, num_samples):
    mean, s = (tensor.requires_grad_() for tensor in inputs())
    noise = draw(tuple(mean.shape), 6, num_samples=num_samples, backend=backend)
    state = rng_state()
    for op in SAMPLERS.values():
        results = []
        for way in ({"noise": noise}, {"noise": LAYOUTS["channels-last"](noise)} if num_samples is None else {}, {}):
            z = op(mean, s, num_samples=num_samples, backend=backend, **(way or {"seed": 6}))
            results.append((z, *torch.autograd.grad(z.sum(), (mean, s))))
        for result in results[1:]:
            assert all(map(torch.equal, result, results[0]))
    assert torch.equal(rng_state(), state)


@pytest.mark.parametrize("op", SAMPLERS)
def test_seed_from_torch_generator(backend, op):
    call = functools.partial(SAMPLERS[op], *inputs(), backend=backend)

    torch.manual_seed(1)
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    with torch.random.fork_rng():
        call()
    assert torch.equal(call(), second)

    state = rng_state()
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    from_generator = call(generator=generator)
    assert torch.equal(from_generator, first)  # seeded alike, the default generator gave the same
    assert torch.equal(call(generator=generator), second)
    call(seed=5)
    assert torch.equal(rng_state(), state)


class StateOnTheHost:
    """What a GPU's generator keeps on the host: a seed and an offset."""

    def __init__(self, seed, offset=0, device="cuda:0"):
        self.seed, self.offset, self.device = seed, offset, torch.device(device)

    def initial_seed(self):
        return self.seed

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


def test_seeds_reserved_on_the_host():
    """Decided by seed and offset, which advances by a block as for torch's own ops; even bits, and no seed twice."""
    assert _seed._reserve(StateOnTheHost(7, 8)) == _seed._reserve(StateOnTheHost(7, 8))
    generators = [StateOnTheHost(seed) for seed in (0, 1, 2**64 - 1, 67280421310721)]
    seeds = numpy.array([_seed._reserve(g) for g in generators for _ in range(5000)], dtype=numpy.uint64)
    assert all(generator.offset == 4 * 5000 for generator in generators)
    assert len(set(seeds.tolist())) == len(seeds)
    bits = numpy.unpackbits(seeds.view(numpy.uint8).reshape(-1, 8), axis=1).astype(float) - 0.5
    deviation = 0.5 * len(seeds) ** 0.5
    assert abs(bits.sum(0)).max() < 5 * deviation
    assert abs((2 * bits[1:] * bits[:-1]).sum(0)).max() < 5 * deviation  # nor of one draw and the next


def test_seeds_of_gpus_lie_on_the_host(monkeypatch):
    default = StateOnTheHost(3)
    monkeypatch.setattr(torch.cuda, "default_generators", [default])
    device = torch.device("cuda:0")
    drawn = _seed.as_seed(None, None, device, on_cpu=True)
    assert (drawn.device.type, drawn.dtype, drawn.shape, default.offset) == ("cpu", torch.int64, (1,), 4)
    assert drawn.item() % 2**64 == _seed._reserve(StateOnTheHost(3))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    like = SimpleNamespace(is_cpu=False, device=device)  # a tensor of the GPU, whose later calls of a kind draw so
    assert _seed.drawn(like, "cuda").item() % 2**64 == _seed._reserve(StateOnTheHost(3, 4)) and default.offset == 8
    assert _seed.as_seed(2**64 - 1, None, device, on_cpu=True).tolist() == [-1]
    with pytest.raises(ValueError, match="generator must be on the device of mean, cuda:0; got cuda:1"):
        _seed._draw(device, StateOnTheHost(3, device="cuda:1"), on_cpu=True)


# Statistics over 10^8 draws

CHUNK = 2**22
CHUNKS = 24
FIVE_SIGMA = 2 * scipy.stats.norm.sf(5)

# What two neighbouring chunks differ in.
STREAMS = {
    "offsets": lambda chunk: draw(CHUNK, 2024, noise_offset=chunk * CHUNK, backend="cpu"),
    "seeds": lambda chunk: draw(CHUNK, 2024 + chunk, backend="cpu"),
    "high-seed-bits": lambda chunk: draw(CHUNK, 2024 + (chunk << 32), backend="cpu"),
    "samples": lambda chunk: draw(CHUNK // 64, 2024 + (chunk << 48), num_samples=64, backend="cpu").flatten(),
    "far-offsets": lambda chunk: draw(CHUNK, 2024, noise_offset=2**34 + (chunk * CHUNK << 8) + 1, backend="cpu"),
}


def progress(stream):
    return tqdm(range(CHUNKS), desc=f"draws, {stream}", unit="chunk", mininterval=2)


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_moments_tails_and_distribution(stream):
    n, sums, tails, p_values = CHUNK * CHUNKS, numpy.zeros(4), numpy.zeros((5, 2), dtype=int), []
    for chunk in progress(stream):
        x = STREAMS[stream](chunk).numpy().astype(numpy.float64)
        sums += [x.sum(), (x * x).sum(), (x**3).sum(), (x**4).sum()]
        tails += [[(x < -t).sum(), (x > t).sum()] for t in range(2, 7)]
        p_values.append(scipy.stats.kstest(x, "norm").pvalue)
    m1, m2, m3, m4 = sums / n
    variance = m2 - m1**2
    skewness = (m3 - 3 * m1 * m2 + 2 * m1**3) / variance**1.5
    kurtosis = (m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4) / variance**2
    # in standard errors of a normal sample
    errors = m1 * n**0.5, (variance - 1) * (n / 2) ** 0.5, skewness * (n / 6) ** 0.5, (kurtosis - 3) * (n / 24) ** 0.5
    assert max(map(abs, errors)) < 5, errors
    for t, counts in zip(range(2, 7), tails, strict=True):
        for count in counts:  # exact, because beyond 6 sigma a tenth of a draw is expected
            p = scipy.stats.binomtest(int(count), n, scipy.stats.norm.sf(t)).pvalue
            assert p > FIVE_SIGMA, f"{count} draws beyond {t} sigma, {n * scipy.stats.norm.sf(t):.1f} expected"
    assert min(p_values) > FIVE_SIGMA / CHUNKS, p_values
    assert scipy.stats.kstest(p_values, "uniform").pvalue > FIVE_SIGMA, p_values


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_independence(stream):
    """Correlations of the normals and of their squares: between neighbours in a stream, and between neighbouring
    streams (which for "samples" are the samples of one draw)."""
    lags = {"stream": None, **{f"lag {lag}": lag for lag in (1, 2, 3, 4, 5, 8, 16, 1024, CHUNK // 64)}}
    sums, counts, before = dict.fromkeys(lags, numpy.zeros(4)), dict.fromkeys(lags, 0), None
    for chunk in progress(stream):
        x = STREAMS[stream](chunk).double()
        for name, lag in lags.items():
            a, b = (before, x) if lag is None else (x[:-lag], x[lag:])
            if a is None:
                continue
            a2, b2 = (a * a - 1) / 2**0.5, (b * b - 1) / 2**0.5  # of variance 1
            sums[name] = sums[name] + [(u @ v).item() for u, v in ((a, b), (a2, b2), (a, b2), (a2, b))]
            counts[name] += len(a)
        before = x
    for name in lags:
        errors = sums[name] / counts[name] ** 0.5  # in standard errors
        assert numpy.abs(errors).max() < 5, f"{name}: {errors}"
