"""What holds for every call: properties of the cpu backend, on generated shapes, strides, dtypes and options."""

import inspect
import itertools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ops import KERNELS, OPS
from rounding import convolution_errors

import fastelbo
from fastelbo.reference.noise import philox_normal
from fastelbo.testing import assert_within_budget

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
GATES = ("tanh_sigmoid", "glu")


def cases(some):
    """Checks a property on so many generated calls, the same ones every time, and on eight times as many new ones.

    A sanitizer, under which they take several times as long, sees every second one."""

    def decorate(check):
        @pytest.mark.parametrize("factor", [1, pytest.param(8, marks=pytest.mark.slow)], ids=["some", "many"])
        @pytest.mark.usefixtures("one_thread")
        def test(factor):
            settings(
                max_examples=some * factor // (2 if "libasan" in os.environ.get("LD_PRELOAD", "") else 1),
                derandomize=factor == 1,
                database=None,
                deadline=None,
                print_blob=True,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )(given(st.data())(check))()

        test.__doc__, test.check = check.__doc__, check
        return test

    return decorate


# What calls are made of


def normal(data, shape):
    """Standard normals in float64."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6), "values"))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def strided(data, values):
    """The values as a view: dimensions in any order, with steps, a slice of a larger tensor, from any address, or with
    stride 0 (then the first value along a dimension counts). What lies between them in memory is NaN."""
    rank, shape = values.dim(), values.shape
    plain, expanded = data.draw(st.tuples(st.booleans(), st.integers(0, 7)), "plain, expanded")
    if plain:
        return values
    if expanded < rank and shape[expanded] > 1:
        values = values.narrow(expanded, 0, 1)
    order = data.draw(st.permutations(range(rank)), "order")
    margin = st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2, 3]), st.integers(0, 2))
    margins = data.draw(st.lists(margin, min_size=rank, max_size=rank), "margins")
    sizes = [before + size * step + after for size, (before, step, after) in zip(values.shape, margins, strict=True)]
    address = data.draw(st.integers(0, 5), "address")
    filler = True if values.dtype == torch.bool else NAN
    memory = torch.full((address + math.prod(sizes),), filler, dtype=values.dtype)[address:]
    view = memory.reshape([sizes[d] for d in order]).permute([order.index(d) for d in range(rank)])
    for d, (before, step, _) in enumerate(margins):
        view = view.narrow(d, before, values.shape[d] * step).unflatten(d, (-1, step)).select(d + 1, 0)
    return view.copy_(values).expand(shape)


def shapes(data, most=3000):
    """Of up to five dimensions; some are empty, some longer than the 1024 elements that a loop takes at a time."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 8, 17, 33, 257, 1025, 0]), max_size=5), "shape")
    while math.prod(max(size, 1) for size in sizes) > most:
        sizes[sizes.index(max(sizes))] = 3
    return tuple(sizes)


def operands(data, kinds, dtypes, *, numbers=True, whole=False):
    """Tensors, and numbers, that broadcast with each other.

    Args:
        kinds: None for a mean, else the kind of a raw scale.
        dtypes: to choose from.
        numbers: whether Python numbers may be among them.
        whole: whether all have the full shape.
    """
    shape = shapes(data)
    anchor = data.draw(st.integers(0, len(kinds) - 1), "anchor")
    made = []
    for position, kind in enumerate(kinds):
        own = shape
        if not whole and position != anchor and data.draw(st.booleans(), "broadcasts"):
            ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)), "ones")
            own = tuple(1 if one else size for size, one in zip(shape, ones, strict=True))
            own = own[data.draw(st.integers(0, len(shape)), "leading dimensions dropped") :]
        values = normal(data, own) * data.draw(st.sampled_from([1.0, 0.01, 3.0]), "magnitude")
        if kind in ("std", "var"):
            values = torch.exp(0.5 * values)
        if numbers and position != anchor and own == () and data.draw(st.booleans(), "number"):
            made.append(values.item())
        else:
            made.append(strided(data, values.to(data.draw(st.sampled_from(dtypes), "dtype"))))
    return made


def scales(data):
    kind = data.draw(st.sampled_from(fastelbo.scale.KINDS), "kind")
    least = 0.1 if kind in ("std", "var") else -INF
    clamps = [None, (-1.0, 1.5), (0.5, INF), (least, 0.7), (0.9, 1.0)]
    clamp = data.draw(st.sampled_from(clamps), "clamp")
    if clamp is not None and clamp[0] < least:
        clamp = (least, clamp[1])
    return fastelbo.Scale(
        kind,
        clamp=clamp,
        clamp_grad=data.draw(st.sampled_from(fastelbo.scale.CLAMP_GRADS), "clamp_grad"),
        soft_clamp=data.draw(st.sampled_from([None, None, 0.5, 2.0, 5.0]), "soft_clamp"),
        min_std=data.draw(st.sampled_from([0.0, 0.0, 1e-4, 0.3]), "min_std"),
        var_eps=data.draw(st.sampled_from([0.0, 0.0, 1e-6, 0.2]), "var_eps"),
        beta=data.draw(st.sampled_from([1.0, 0.5, 3.0]), "beta"),
    )


def shape_of(tensors):
    return torch.broadcast_shapes(*(x.shape for x in tensors if isinstance(x, torch.Tensor)))


def masks(data, shape):
    ones = data.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)), "ones of the mask")
    own = tuple(1 if one else size for size, one in zip(shape, ones, strict=True))
    own = own[data.draw(st.integers(0, len(shape)), "dimensions dropped of the mask") :]
    return strided(data, normal(data, own) > data.draw(st.sampled_from([-0.5, 0.5, 9.0]), "density"))


def reductions(data, shape, *, masked=None):
    """event_ndim, reduction and mask."""
    options = {
        "event_ndim": data.draw(st.none() | st.integers(0, len(shape)), "event_ndim"),
        "reduction": data.draw(st.sampled_from(["none", "sum", "mean"]), "reduction"),
    }
    if data.draw(st.booleans(), "masked") if masked is None else masked:
        options["mask"] = masks(data, shape)
    return options


def objectives(data, shape, prior):
    options = reductions(data, shape)
    if data.draw(st.booleans(), "free_bits"):
        floor = data.draw(st.sampled_from([0.0, 0.1, 1.0, 20.0]), "floor")
        options["free_bits"] = torch.tensor(floor) if data.draw(st.booleans(), "0-d") else floor
        options["free_bits_per"] = data.draw(st.sampled_from(["dim", "example", "batch"]), "free_bits_per")
        event_ndim = len(shape) - 1 if options["event_ndim"] is None else options["event_ndim"]
        assume(event_ndim > 0 or options["free_bits_per"] != "dim")
    if prior and data.draw(st.booleans(), "balanced"):
        options["balance"] = data.draw(st.sampled_from([0.0, 0.3, 1.0]), "balance")
    return options


def draws(data):
    """seed, noise_offset, num_samples and temperature."""
    seed = data.draw(st.integers(-(2**63), 2**64 - 1), "seed")
    return {
        "seed": seed if data.draw(st.booleans(), "int") else torch.tensor((seed + 2**63) % 2**64 - 2**63),
        "noise_offset": data.draw(st.integers(0, 9) | st.integers(0, 2**62), "noise_offset"),
        "num_samples": data.draw(st.sampled_from([None, None, 1, 3]), "num_samples"),
        "temperature": data.draw(st.sampled_from([1.0, 0.0, 0.7]), "temperature"),
    }


def given_noise(options, shape):
    """The same draw with its noise given: the normals of different backends differ in their last places."""
    rest = {name: value for name, value in options.items() if name not in ("seed", "noise_offset")}
    rest["noise"] = fastelbo.gaussian_rsample(
        torch.zeros(shape, dtype=torch.float64), 1.0, scale="std", backend="cpu", **{**options, "temperature": 1.0}
    )
    return rest


# How results are compared


def results(call, tensors, wanted, upstream):
    """The outputs of a call, and the gradients of those tensors that want one."""
    inputs = [
        x.detach().requires_grad_(want) if isinstance(x, torch.Tensor) else x
        for x, want in zip(tensors, wanted, strict=True)
    ]
    outputs = call(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    used = [(y, u) for y, u in zip(outputs, upstream, strict=True) if y.requires_grad]
    if not leaves:
        return list(outputs)
    ys, us = zip(*used, strict=True)
    grads = torch.autograd.grad(ys, leaves, us, allow_unused=True, materialize_grads=True)
    for grad, leaf in zip(grads, leaves, strict=True):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
    return [*(output.detach() for output in outputs), *grads]


def assert_agree(data, function, tensors, options, *, reference_options=None):
    """In float64, where a mistake in what is computed is larger than any rounding: 1e-9 of the largest number."""
    wanted = data.draw(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)), "wanted")
    shaped = function(*tensors, **options, backend="cpu")
    shaped = shaped if isinstance(shaped, tuple) else (shaped,)
    upstream = [strided(data, normal(data, y.shape).to(y.dtype)) for y in shaped]
    got = results(lambda *x: function(*x, **options, backend="cpu"), tensors, wanted, upstream)
    options = options if reference_options is None else reference_options
    want = results(lambda *x: function(*x, **options, backend="reference"), tensors, wanted, upstream)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-9 * (1 + largest), equal_nan=True, msg=lambda m, index=index: f"{index}: {m}"
        )


def bits(tensor):
    """As integers, so that NaN equals NaN and 0 differs from -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(got, want):
    assert got.dtype == want.dtype
    assert torch.equal(bits(got), bits(want)), (got, want)


# The Gaussian ops


@cases(250)
def test_kl_agrees_with_the_reference(data):
    scale, scale_p = scales(data), scales(data)
    prior = data.draw(st.booleans(), "prior")
    tensors = operands(data, [None, scale.kind, None, scale_p.kind][: 4 if prior else 2], [torch.float64])
    options = {"scale": scale, **({"scale_p": scale_p} if prior else {}), **objectives(data, shape_of(tensors), prior)}
    assert_agree(data, fastelbo.gaussian_kl, tensors, options)


@cases(150)
def test_rsample_agrees_with_the_reference(data):
    scale, draw = scales(data), draws(data)
    tensors = operands(data, [None, scale.kind], [torch.float64])
    given_too = given_noise(draw, shape_of(tensors))
    assert_agree(
        data,
        fastelbo.gaussian_rsample,
        tensors,
        {"scale": scale, **draw},
        reference_options={"scale": scale, **given_too},
    )


@cases(200)
def test_rsample_kl_agrees_with_the_reference(data):
    scale, scale_p, draw = scales(data), scales(data), draws(data)
    prior = data.draw(st.booleans(), "prior")
    tensors = operands(data, [None, scale.kind, None, scale_p.kind][: 4 if prior else 2], [torch.float64])
    shape = shape_of(tensors)
    options = {"scale": scale, **({"scale_p": scale_p} if prior else {}), **objectives(data, shape, prior)}
    assert_agree(
        data,
        fastelbo.gaussian_rsample_kl,
        tensors,
        {**options, **draw},
        reference_options={**options, **given_noise(draw, shape)},
    )


@cases(200)
def test_log_prob_agrees_with_the_reference(data):
    scale = scales(data)
    tensors = operands(data, [None, None, scale.kind], [torch.float64])
    options = {"scale": scale, **reductions(data, shape_of(tensors))}
    function = data.draw(st.sampled_from([fastelbo.gaussian_log_prob, fastelbo.gaussian_nll]), "function")
    if function is fastelbo.gaussian_nll:
        options["beta_nll"] = data.draw(st.sampled_from([0.0, 0.5, 1.0]), "beta_nll")
    assert_agree(data, function, tensors, options)


def some_gaussian_op(data):
    """A function of tensors, the kinds of these, and the op."""
    scale, draw = scales(data), draws(data)
    op = data.draw(st.sampled_from(list(KERNELS.values())), "op")
    kinds = [scale.kind if name.startswith("s") else None for name in op.tensors]
    options = draw if op.drawn else {}
    return lambda *x, **more: op.function(*x, scale=scale, **options, **more, backend="cpu"), kinds, op


@cases(250)
def test_neither_layout_nor_dtype_changes_a_bit_of_the_arithmetic(data):
    """Whatever comes is widened, and a result is rounded once: as for contiguous tensors of the arithmetic's type."""
    call, kinds, op = some_gaussian_op(data)
    tensors = operands(data, kinds, data.draw(st.sampled_from([DTYPES[:1], DTYPES[2:], DTYPES]), "dtypes"))
    shape = shape_of(tensors)
    options = reductions(data, shape) if op.terms else {}
    given = [x for x in tensors if isinstance(x, torch.Tensor)]
    dtypes = {x.dtype for x in given if x.dim() > 0} or {x.dtype for x in given}
    arithmetic = torch.float64 if torch.float64 in dtypes else torch.float32
    plain = [torch.as_tensor(x, dtype=arithmetic).expand(shape).contiguous() for x in tensors]
    whole = [isinstance(x, torch.Tensor) and x.shape == shape for x in tensors]
    outputs = call(*tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(data, y.shape).to(y.dtype) for y in outputs]
    got = results(lambda *x: call(*x, **options), tensors, whole, [strided_copy(data, u) for u in upstream])
    want = results(lambda *x: call(*x, **options), plain, whole, [u.to(arithmetic) for u in upstream])
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b.to(a.dtype))


def strided_copy(data, values):
    """Strided without a stride of 0, which would change the values."""
    laid_out = strided(data, values)
    return laid_out if torch.equal(laid_out, values) else values


@cases(60)
def test_kl_is_never_negative_and_nothing_to_itself(data):
    scale = scales(data)
    magnitude = data.draw(st.sampled_from([1e-38, 1e-6, 1.0, 30.0, 1e4, 1e38]), "magnitude")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    shape = shapes(data)
    mean, s, mean_p, s_p = ((normal(data, shape) * magnitude).to(dtype) for _ in range(4))
    if scale.kind in ("std", "var"):
        s, s_p = s.abs(), s_p.abs()
    std = fastelbo.reference.scale.log_std_and_std(s.to(fastelbo.reference.scale.arithmetic_dtype(s)), scale)
    sane = mean.isfinite() & std[0].isfinite() & (std[1] > 0) & std[1].isfinite()
    same = fastelbo.gaussian_kl(mean, s, mean.clone(), s.clone(), scale=scale, event_ndim=0, backend="cpu")
    assert not same[sane].any(), same
    kl = fastelbo.gaussian_kl(mean, s, mean_p, s_p, scale=scale, event_ndim=0, backend="cpu")
    assert not (kl < 0).any(), kl
    alone = fastelbo.gaussian_kl(mean, s, scale=scale, event_ndim=0, backend="cpu")
    assert not (alone < 0).any(), alone


@cases(80)
def test_masked_elements_are_nothing_whatever_they_hold(data):
    call, kinds, op = some_gaussian_op(data)
    if not op.terms:
        return
    tensors = operands(data, kinds, [data.draw(st.sampled_from(DTYPES), "dtype")], numbers=False, whole=True)
    shape = shape_of(tensors)
    options = reductions(data, shape, masked=True)
    dead = ~options["mask"].expand(shape)
    bad = st.sampled_from([NAN, INF, -INF, 6e4, 0.0])
    poisoned = [x.clone().masked_fill_(dead, data.draw(bad, "bad")) for x in tensors]
    outputs = call(*poisoned, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [normal(data, y.shape).to(y.dtype) for y in outputs]
    got, want = (results(lambda *x: call(*x, **options), x, [True] * len(x), upstream) for x in (poisoned, tensors))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    for grad in got[len(outputs) :]:
        assert not grad[dead].any()


@cases(80)
def test_sums_add_up(data):
    """What is reduced is the sum of what is not."""
    call, kinds, op = some_gaussian_op(data)
    if not op.terms:
        return
    tensors = operands(data, kinds, [data.draw(st.sampled_from(DTYPES), "dtype")])
    shape = shape_of(tensors)
    options = reductions(data, shape)
    last = lambda result: result[1] if isinstance(result, tuple) else result  # noqa: E731
    terms = last(call(*tensors, event_ndim=0, **({"mask": options["mask"]} if "mask" in options else {})))
    event_ndim = max(len(shape) - 1, 0) if options["event_ndim"] is None else options["event_ndim"]
    events = shape[: len(shape) - event_ndim]
    want = terms.double().reshape(*events, -1).sum(-1) if math.prod(shape) else torch.zeros(events).double()
    size = terms.double().abs().sum().item()
    if options["reduction"] == "mean":
        counted = options.get("mask", torch.ones((), dtype=torch.bool)).expand(shape)
        counted = counted.reshape(*events, -1).any(-1) if math.prod(shape) else torch.zeros(events).bool()
        if "mask" not in options:
            counted = torch.ones(events)
        want = want.sum() / counted.sum()
    elif options["reduction"] == "sum":
        want = want.sum()
    got = last(call(*tensors, **options))
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * eps * size, equal_nan=True)


@cases(60)
def test_noise_of_a_shard_is_that_of_the_whole(data):
    draw = draws(data)
    size = data.draw(st.integers(1, 3000), "size")
    cut = sorted(data.draw(st.lists(st.integers(0, size), max_size=3), "cuts"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")

    def noise(start, stop):
        options = {**draw, "noise_offset": draw["noise_offset"] + start}
        mean = strided(data, torch.zeros(stop - start, dtype=dtype))
        return fastelbo.gaussian_rsample(mean, 1.0, scale="std", **options, backend="cpu")

    whole = noise(0, size)
    parts = [noise(start, stop) for start, stop in zip([0, *cut], [*cut, size], strict=True)]
    assert_same_bits(torch.cat(parts, -1), whole)
    if dtype == torch.float64:
        seed = torch.as_tensor((int(draw["seed"]) + 2**63) % 2**64 - 2**63)
        options = {"num_samples": draw["num_samples"], "noise_offset": draw["noise_offset"]}
        defined = draw["temperature"] * philox_normal(seed, (size,), **options).double()
        torch.testing.assert_close(whole, defined, rtol=1e-6, atol=1e-6)


@cases(10)
def test_the_number_of_threads_changes_no_bit(data):
    call, kinds, _ = some_gaussian_op(data)
    shape = data.draw(st.sampled_from([(40_000,), (3, 20_001), (20_001, 3), (1, 50_000), (50_000, 1)]), "shape")
    tensors = [normal(data, shape).exp().float() for _ in kinds]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            outputs = call(*tensors)
            upstream = [torch.ones_like(y) for y in (outputs if isinstance(outputs, tuple) else (outputs,))]
            found.append(results(call, tensors, [True] * len(tensors), upstream))
        finally:
            torch.set_num_threads(1)
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


# Convolutions


def convolutions(data, dtype):
    """The tensors of a convolution (input, weight, bias, cond, residual) and its options; square, or a stack's."""
    count = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 17, 33])
    n, c, o, h, w = (
        data.draw(s, name)
        for s, name in (
            (st.integers(0, 3), "n"),
            (count, "c"),
            (count, "o"),
            (st.integers(1, 9), "h"),
            (st.integers(1, 9) | st.sampled_from([16, 19, 33]), "w"),
        )
    )
    k = data.draw(st.sampled_from([1, 3, 5, 7]), "k")
    activation = data.draw(st.sampled_from([None, "relu", "elu", *GATES]), "activation")
    gate = 2 if activation in GATES else 1
    stack = data.draw(st.sampled_from([None, None, None, "vertical", "horizontal"]), "stack")
    groups = 1 if stack == "vertical" else data.draw(st.integers(1, 4), "channel_groups")
    order = data.draw(st.sampled_from(["interleaved", "contiguous"]), "group_order")
    if order == "contiguous":
        c, o = -(-c // groups) * groups, -(-o // groups) * groups
    z = o * gate
    kernel = {None: (k, k), "vertical": (k // 2 + 1, k), "horizontal": (1, k // 2 + 1)}[stack]
    leading = (n,) if data.draw(st.integers(0, 4), "unbatched") else ()
    cond = data.draw(st.sampled_from([None, (*leading, z), (*leading, z, h, w)]), "cond")
    own = [(*leading, c, h, w), (z, c, *kernel), (z,), cond, (*leading, o, h, w)]
    if stack or data.draw(st.booleans(), "no residual"):
        own[4] = None
    if data.draw(st.booleans(), "no bias"):
        own[2] = None
    tensors = [shape if shape is None else strided(data, normal(data, shape).to(dtype)) for shape in own]
    options = {
        "mask_type": data.draw(st.sampled_from("AB"), "mask_type"),
        "dilation": data.draw(st.sampled_from([1, 1, 2, 3, 5]), "dilation"),
        "channel_groups": groups,
        "group_order": order,
        "activation": activation,
        **({"stack": stack} if stack else {}),
    }
    return tensors, options


def convolve(input, weight, bias, cond, residual, **options):
    if "stack" in options:
        return fastelbo.causal_conv2d(input, weight, bias, cond=cond, **options)
    return fastelbo.masked_conv2d(input, weight, bias, cond=cond, residual=residual, **options)


@cases(200)
def test_convolutions_agree_with_the_reference(data):
    tensors, options = convolutions(data, torch.float64)
    assert_agree(data, convolve, tensors, options)


@cases(60)
def test_convolutions_within_the_budget(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    tensors, options = convolutions(data, dtype)
    y = convolve(*tensors, **options, backend="cpu")
    upstream = normal(data, y.shape).to(dtype)

    def run(dtype, backend):
        cast = [t if t is None else t.to(dtype) for t in tensors]
        return results(
            lambda *x: convolve(*x, **options, backend=backend), cast, [True] * len(cast), [upstream.to(dtype)]
        )

    found = list(zip(run(dtype, "cpu"), run(torch.float64, "reference"), run(dtype, "reference"), strict=True))
    promised = [0.0] * len(found)
    if dtype == torch.float32:  # as if every channel read every other, as some may
        dense = {**options, "activation": None, "channel_groups": 1, "mask_type": "B"}

        def before(*x):
            return convolve(*x, None, **dense, backend="reference")

        with torch.no_grad():
            most = before(*(t if t is None else t.double().abs() for t in tensors[:4]))
        slope = max(1.5, most.max().item() / 4) if most.numel() else 1.5  # that of a sigmoid(b) in b, at the most
        greatest = upstream.abs().max().item() if upstream.numel() else 0.0
        promised[: len(found)] = [*convolution_errors(before, tensors[:4], greatest, slope), 0.0][: len(found)]
    for index, ((actual, exact, plain), error) in enumerate(zip(found, promised, strict=True)):
        if actual.numel():
            assert_within_budget(actual, exact, plain, name=f"result {index}", promised=error)


@cases(100)
def test_nothing_reads_the_future_nor_a_dead_tap(data):
    (input, weight, *rest), options = convolutions(data, data.draw(st.sampled_from(DTYPES), "dtype"))
    assume(input.dim() == 4 and "stack" not in options)
    h, w = input.shape[2:]
    pixel = data.draw(st.integers(0, h * w - 1), "pixel")
    position = torch.arange(h * w).reshape(h, w)
    later = position >= pixel if options["mask_type"] == "A" and options["channel_groups"] == 1 else position > pixel
    past = position <= pixel
    live = fastelbo.conv_mask2d(
        *weight.shape[:3],
        options["mask_type"],
        channel_groups=options["channel_groups"],
        group_order=options["group_order"],
        gated=options["activation"] in GATES,
    )
    bad = data.draw(st.sampled_from([NAN, INF, -INF]), "bad")
    poisoned = input.masked_fill(later, bad), weight.masked_fill(~live, bad)
    call = lambda *x: convolve(*x, *rest, **options, backend="cpu")  # noqa: E731
    y, clean = call(*poisoned), call(input.clone(), weight.clone())
    assert_same_bits(y[:, :, past], clean[:, :, past])
    upstream = torch.where(past, normal(data, y.shape).to(y.dtype), 0)
    d_input, d_weight = results(call, (input, poisoned[1]), [True, True], [upstream])[1:]
    assert not d_input[:, :, later].any()
    assert not d_weight[~live].any()
    assert d_input.isfinite().all() and d_weight.isfinite().all()


# Arguments that make no sense

M, IMAGE, WEIGHT = torch.zeros(4, 6), torch.zeros(2, 3, 5, 4), torch.zeros(6, 3, 3, 3)
CALLS = {op.name: (tuple(map(torch.zeros, op.shapes().values())), op.keywords) for op in OPS.values()}
CALLS |= {"conv_mask2d": ((6, 3, 3, "A"), {})}
JUNK = [
    None,
    True,
    -1,
    0,
    2,
    7,
    2**70,
    -0.5,
    2.5,
    NAN,
    INF,
    "x",
    "",
    b"A",
    [],
    [1.0, 2.0],
    (3, 3),
    {},
    object(),
    M.long(),
    M.bool(),
    M.to(torch.complex64),
    M.to("meta"),
    M[:, :5],
    M[None],
    M[:0],
    torch.zeros(()),
    torch.zeros((), dtype=torch.int64),
    torch.zeros(16 * (1,)),
    IMAGE,
    IMAGE[..., 0],
    IMAGE.double(),
    WEIGHT[:, :, :2],
    WEIGHT[:, :0],
    torch.float32,
    torch.int32,
    torch.device("cpu"),
    torch.Generator(),
]


@pytest.mark.parametrize("op", CALLS)
def test_junk_is_refused_by_name(op):
    """An argument that the op cannot take raises an error that names it, and nothing crashes."""
    function, (arguments, keywords) = getattr(fastelbo, op), CALLS[op]
    parameters = inspect.signature(function).parameters
    wrong = []
    for name, junk in itertools.product(parameters, JUNK):
        bound = inspect.signature(function).bind(*arguments, **keywords)
        bound.arguments[name] = junk
        try:
            function(*bound.args, **bound.kwargs)
        except Exception as error:
            named = name in str(error) or (name == "mean_p" and "mean_q" in str(error))
            if not (named and isinstance(error, (TypeError, ValueError))):
                wrong.append(f"{name}={str(junk)[:60]}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)
