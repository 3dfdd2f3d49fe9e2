"""The ops themselves, as torch.ops has them: programs call them that have no checks in front (exported ones, other
languages), so that no argument may read beyond a tensor or end the process. The words are those of the functions."""

import math

import pytest
import torch
from ops import GAUSSIAN

import fastelbo
from fastelbo import Scale, sampling
from fastelbo.scale import numbers

assert fastelbo.backends.usable("cpu") is None  # and loads the library

F32 = torch.float32
M = torch.linspace(-1, 1, 12).reshape(3, 4)
S = M.flip(0).contiguous() / 2
SEED = torch.tensor([7])
META = M.to("meta")
PLAIN = [0.0]
#: Arguments that each op takes, by name and in order.
GOOD = {
    "gaussian_rsample_fwd": {
        "mean": M, "s": S, "seed": SEED, "noise": None, "noise_offset": 0, "num_samples": None, "temperature": 1.0,
        "scale": PLAIN, "out_dtype": F32,
    },
    "gaussian_rsample_bwd": {
        "d_z": M, "s": S, "seed": SEED, "noise": None, "noise_offset": 0, "num_samples": None, "temperature": 1.0,
        "scale": PLAIN,
    },
    "gaussian_kl_fwd": {
        "mean_q": M, "s_q": S, "mean_p": S, "s_p": M, "scale": PLAIN, "scale_p": PLAIN, "event_ndim": 1, "mask": M > 0,
        "balance": 0.5,
    },
    "gaussian_kl_bwd": {
        "d_kl": M[:, 0], "mean_q": M, "s_q": S, "mean_p": S, "s_p": M, "scale": PLAIN, "scale_p": PLAIN,
        "event_ndim": 1, "balance": 0.5, "mask": M > 0, "prior_grad": True,
    },
    "gaussian_rsample_kl_fwd": {
        "mean_q": M, "s_q": S, "mean_p": S, "s_p": M, "seed": SEED, "noise": None, "noise_offset": 0,
        "num_samples": None, "temperature": 1.0, "scale": PLAIN, "scale_p": PLAIN, "event_ndim": 1, "mask": M > 0,
        "out_dtype": F32, "balance": 0.5,
    },
    "gaussian_rsample_kl_bwd": {
        "d_z": M, "d_kl": M[:, 0], "mean_q": M, "s_q": S, "mean_p": S, "s_p": M, "seed": SEED, "noise": None,
        "noise_offset": 0, "num_samples": None, "temperature": 1.0, "scale": PLAIN, "scale_p": PLAIN, "event_ndim": 1,
        "balance": 0.5, "mask": M > 0, "prior_grad": True,
    },
    "gaussian_log_prob_fwd": {
        "x": M, "mean": S, "s": S, "scale": PLAIN, "event_ndim": 1, "negative": True, "mask": M > 0,
        "full": False,
    },
    "gaussian_log_prob_bwd": {
        "d_out": M[:, 0], "x": M, "mean": S, "s": S, "scale": PLAIN, "event_ndim": 1, "negative": True, "mask": M > 0,
        "x_grad": True,
    },
}  # fmt: skip
assert {op.rpartition("_")[0] for op in GOOD} == {op.file for op in GAUSSIAN.values()}
KL, RSAMPLE, LOG_PROB = ([op for op in GOOD if name in op] for name in ("kl", "rsample_fwd", "log_prob"))
DRAWS = [op for op in GOOD if "rsample" in op]
KL_BWD = [op for op in KL if "bwd" in op]
EVENTS = [op for op in GOOD if "event_ndim" in GOOD[op]]
FLOATS = "must be float32, float64, bfloat16 or float16; got"
NAN = math.nan

BAD = [
    (EVENTS, {"event_ndim": 9}, "event_ndim must be between 0 and 2 for shape (3, 4); got 9"),
    (EVENTS, {"event_ndim": -1}, "event_ndim must be between 0 and 2 for shape (3, 4); got -1"),
    # the prior
    (KL, {"s_p": None}, "mean_p and s_p must both be given, or neither; got no s_p"),
    (KL, {"mean_p": None}, "mean_p and s_p must both be given, or neither; got no mean_p"),
    (KL, {"scale_p": None}, "scale_p must come with mean_p and s_p; got none"),
    (KL, {"mean_p": None, "s_p": None}, "scale_p must come with mean_p and s_p; got it alone"),
    (["gaussian_kl_bwd"], {"mean_p": None, "s_p": None, "scale_p": None}, "prior_grad must come with mean_p and s_p"),
    (KL_BWD, {"balance": 1.5}, "balance must be between 0 and 1; got 1.5"),
    (KL_BWD, {"balance": NAN}, "balance must be between 0 and 1; got nan"),
    # operands
    (KL, {"s_q": torch.zeros(3, 5)}, "s_q must broadcast with mean_q of shape (3, 4); got (3, 5)"),
    (KL, {"mean_p": torch.zeros(2, 1)}, "mean_p must broadcast with mean_q of shape (3, 4); got (2, 1)"),
    (KL, {"s_q": M.long()}, f"s_q {FLOATS} torch.int64"),
    (KL, {"mean_q": M > 0}, f"mean_q {FLOATS} torch.bool"),
    (KL, {"s_p": M.to(torch.complex64)}, f"s_p {FLOATS} torch.complex64"),
    (KL, {"s_q": META}, "s_q must be on the device of mean_q, cpu; got meta"),
    (KL, {"s_q": torch.zeros([1] * 16)}, "s_q must have at most 15 dimensions; got 16"),
    (LOG_PROB, {"x": torch.zeros(7)}, "mean must broadcast with x of shape (7,); got (3, 4)"),
    (LOG_PROB, {"s": M.to(torch.uint8)}, f"s {FLOATS} torch.uint8"),
    (LOG_PROB, {"mean": META}, "mean must be on the device of x, cpu; got meta"),
    (RSAMPLE, {"s": torch.zeros(5)}, "s must broadcast with mean of shape (3, 4); got (5,)"),
    (["gaussian_rsample_bwd"], {"s": torch.zeros(5)}, "s must broadcast to shape (3, 4); got (5,)"),
    (["gaussian_rsample_bwd"], {"s": torch.zeros(2, 3, 4)}, "s must broadcast to shape (3, 4); got (2, 3, 4)"),
    # masks
    (EVENTS, {"mask": M}, "mask must be a tensor of bool; got torch.float32"),
    (EVENTS, {"mask": M[0, :3] > 0}, "mask must broadcast to shape (3, 4); got (3,)"),
    (EVENTS, {"mask": (M > 0).expand(5, 3, 4)}, "mask must broadcast to shape (3, 4); got (5, 3, 4)"),
    (EVENTS, {"mask": META > 0}, "mask must be on the device of the other tensors, cpu; got meta"),
    # draws
    (DRAWS, {"seed": torch.zeros(0).long()}, "seed must have one element; got shape (0,)"),
    (DRAWS, {"seed": torch.zeros(2).long()}, "seed must have one element; got shape (2,)"),
    (DRAWS, {"seed": SEED.int()}, "seed must be an int or an int64 tensor; got torch.int32"),
    (DRAWS, {"seed": SEED.to("meta")}, "seed must be on the device of mean, cpu; got meta"),
    (DRAWS, {"seed": None}, "seed or noise must be given, and not both; got neither"),
    (DRAWS, {"noise": M}, "seed or noise must be given, and not both; got both"),
    (DRAWS, {"seed": None, "noise": torch.zeros(3)}, "noise must broadcast to the sample's shape (3, 4); got (3,)"),
    (DRAWS, {"seed": None, "noise": torch.zeros(2, 3, 4)}, "noise must broadcast to the sample's shape (3, 4)"),
    (DRAWS, {"seed": None, "noise": M.int()}, "noise must be a tensor of float32, float64, bfloat16 or float16; got"),
    (DRAWS, {"seed": None, "noise": META}, "noise must be on the device of mean, cpu; got meta"),
    (DRAWS, {"noise_offset": -1}, "noise_offset must be at least 0; got -1"),
    (DRAWS, {"temperature": NAN}, "temperature must be finite; got nan"),
    (DRAWS, {"temperature": math.inf}, "temperature must be finite; got inf"),
    ([op for op in DRAWS if "fwd" in op], {"num_samples": 0}, "num_samples must be at least 1; got 0"),
    ([op for op in DRAWS if "fwd" in op], {"num_samples": -2}, "num_samples must be at least 1; got -2"),
    ([op for op in DRAWS if "fwd" in op], {"num_samples": 2**32}, "num_samples must be below 2**32"),
    ([op for op in DRAWS if "fwd" in op], {"out_dtype": torch.int64}, f"out_dtype {FLOATS} torch.int64"),
    ([op for op in DRAWS if "fwd" in op], {"out_dtype": torch.bool}, f"out_dtype {FLOATS} torch.bool"),
    # upstream gradients
    (KL_BWD, {"d_kl": M}, "d_kl must be of shape (3,); got (3, 4)"),
    (KL_BWD, {"d_kl": M[0, 0]}, "d_kl must be of shape (3,); got ()"),
    (KL_BWD, {"d_kl": M[:, 0] > 0}, f"d_kl {FLOATS} torch.bool"),
    (["gaussian_kl_bwd"], {"d_kl": META[:, 0]}, "d_kl must be on the device of the other tensors, cpu; got meta"),
    (["gaussian_rsample_kl_bwd"], {"d_z": M[:2]}, "d_z must be of shape (3, 4); got (2, 4)"),
    (["gaussian_rsample_kl_bwd"], {"num_samples": 2}, "d_z must be of shape (2, 3, 4); got (3, 4)"),
    (["gaussian_rsample_bwd"], {"num_samples": 2}, "d_z must have num_samples in front, 2; got shape (3, 4)"),
    (["gaussian_rsample_bwd"], {"d_z": M[0, 0], "num_samples": 1}, "d_z must have num_samples in front, 1; got"),
    (["gaussian_rsample_bwd"], {"d_z": M.int()}, f"d_z {FLOATS} torch.int32"),
    (["gaussian_log_prob_bwd"], {"d_out": M[0]}, "d_out must be of shape (3,); got (4,)"),
    # the numbers of a Scale
    *(
        (list(GOOD), {"scale": values}, message)
        for values, message in [
            ([], "scale must be of 1 to 10 numbers; got 0"),
            ([0.0] * 7 + [1.0] * 4, "scale must be of 1 to 10 numbers; got 11"),
            ([5.0], "scale must have a kind that is 0, 1, 2, 3 or 4; got 5"),
            ([0.5], "scale must have a kind that is 0, 1, 2, 3 or 4; got 0.5"),
            ([NAN], "scale must have a kind that is 0, 1, 2, 3 or 4; got nan"),
            ([0.0, 3.0], "scale must have a clamp_grad that is 0, 1 or 2; got 3"),
            ([0.0, 0.0, 1.0, 0.0], "scale must have a clamp that is a lower limit below a higher one; got 0"),
            ([0.0, 0.0, NAN, 0.0], "scale must have a clamp that is a lower limit below a higher one; got 0"),
            ([0.0, 0.0, 0.0, 1.0, math.inf], "scale must have a soft_clamp that is at least 0 and finite; got inf"),
            ([0.0, 0.0, 0.0, 1.0, 0.0, NAN], "scale must have a min_std that is at least 0 and finite; got nan"),
            ([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1.0], "scale must have a var_eps that is at least 0 and finite; got -1"),
            ([4.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "scale must have a beta that is positive and finite; got 0"),
        ]
    ),
    (KL, {"scale_p": [7.0]}, "scale must have a kind that is 0, 1, 2, 3 or 4; got 7"),
]  # fmt: skip
CASES = [
    pytest.param(op, changed, message, id=f"{op}-{'-'.join(changed)}-{index}")
    for index, (ops, changed, message) in enumerate(BAD)
    for op in ops
]


def raw(backend, op, overload="default"):
    return getattr(getattr(getattr(torch.ops, "fastelbo_triton" if backend == "triton" else "fastelbo"), op), overload)


def at_home(arguments):
    """The arguments with their tensors on the backend's device; those on another one stay there."""
    home = torch.get_default_device()
    return [x.to(home) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x for x in arguments.values()]


@pytest.mark.parametrize(("op", "changed", "message"), CASES)
def test_bad_arguments(kernels, op, changed, message):
    """Also where a tensor wants a gradient, which Python looks after, and of tensors without memory."""
    device = str(torch.get_default_device())
    message = message.replace("cpu", device)
    arguments = at_home(GOOD[op] | changed)
    elsewhere = any(isinstance(x, torch.Tensor) and x.is_meta for x in arguments)
    wanting = [
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    ]
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    for given in (arguments, wanting) if elsewhere else (arguments, wanting, meta):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            raw(kernels, op)(*given)
        assert (message.replace(f", {device}", ", meta") if given is meta else message) in str(caught.value)


@pytest.mark.parametrize("op", GOOD)
def test_good_arguments(kernels, op):
    arguments = at_home(GOOD[op])
    for overload in ("default", "kernel"):
        returned = raw(kernels, op, overload)(*arguments)
        for tensor in returned if isinstance(returned, tuple) else (returned,):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("name", ["gaussian_kl_fwd", "gaussian_rsample_bwd", "masked_conv2d_fwd"])
def test_both_overloads_are_of_one_schema(name):
    for library in ("fastelbo", "fastelbo_triton"):
        default, kernel = (str(raw(library[9:], name, overload)._schema) for overload in ("default", "kernel"))
        assert kernel.replace(".kernel", "") == default


def test_the_numbers_of_a_scale_are_those_that_it_was_made_of():
    scales = [
        *(Scale(kind) for kind in fastelbo.scale.KINDS),
        Scale.diffusers(),
        Scale.softplus(0.1, beta=2.5),
        Scale.nvae(),
        Scale.gaussian_nll_loss(),
        Scale("var", clamp=(-math.inf, 3.0), clamp_grad="inward", var_eps=0.3),
    ]
    for scale in scales:
        assert numbers(fastelbo.scale.of_numbers(numbers(scale))) == numbers(scale)
    assert fastelbo.scale.of_numbers(None) is None


# The sampler's


@pytest.fixture(scope="module")
def draw():
    """The arguments of sampler_draw for two images, as a sampler makes them."""
    network = fastelbo.nn.MaskedConv2d(1, 3, 3, mask_type="A")
    sampler = sampling.IncrementalSampler(network, (1, 4, 5), levels=3, backend="cpu")
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.fastelbo.sampler_draw.default:
                calls.append([x.clone() if isinstance(x, torch.Tensor) else x for x in args])
            return function(*args, **(kwargs or {}))

    with Recorder():
        sampler.sample(2, seed=0)
    names = ("program", "weights", "workspace", "image", "known", "uniforms", "values", "temperature", "first", "end")
    return dict(zip((*names, "seen"), [*calls[-1], None][:11], strict=True))


SAMPLER = [
    ({"program": lambda x: x.int()}, "program must be torch.int64; got torch.int32"),
    ({"program": lambda x: x[:5]}, "program must have a header of "),
    ({"weights": lambda x: x.double()}, "weights must be torch.float32; got torch.float64"),
    ({"workspace": lambda x: x[0]}, "workspace must be contiguous, of 2 dimensions; got shape"),
    ({"workspace": lambda x: x.T}, "workspace must be contiguous, of 2 dimensions; got shape"),
    ({"workspace": lambda x: x[:, 1:].contiguous()}, "workspace must have the program's "),
    ({"image": lambda x: x.int()}, "image must be torch.int64; got torch.int32"),
    ({"image": lambda x: x[:1]}, "image must be of the 2 images of workspace; got shape (1, 1, 4, 5)"),
    ({"image": lambda x: x[..., :3].clone(), "uniforms": lambda x: x[..., :3].clone()}, "image must be of the program"),
    ({"known": lambda _: torch.zeros(2, 1, 4, 4).bool()}, "known must be of the shape of image, (2, 1, 4, 5);"),
    ({"known": lambda _: torch.zeros(2, 1, 4, 5)}, "known must be torch.bool; got torch.float32"),
    ({"uniforms": lambda x: x[0]}, "uniforms must be contiguous, of 4 dimensions; got shape (1, 4, 5)"),
    ({"values": lambda x: x[:2]}, "values must be the program's 3 numbers; got 2"),
    ({"seen": lambda _: torch.zeros(2, 1, 4, 5, 2)}, "seen must have the program's 3 outputs; got shape (2, 1"),
    ({"seen": lambda _: torch.zeros(2, 1, 4, 4, 3)}, "seen must be of the shape of image, (2, 1, 4, 5); got"),
    ({"temperature": lambda _: NAN}, "temperature must be at least 0; got nan"),
    ({"end": lambda _: 10**6}, "end must be at most the program's 20 steps; got 1000000"),
    ({"first": lambda _: -1}, "first and end must be steps in order; got -1 and "),
]  # fmt: skip


@pytest.mark.parametrize("change", SAMPLER, ids=lambda change: change[1][:20])
def test_bad_arguments_of_the_sampler(draw, change):
    changes, message = change
    arguments = draw | {name: make(draw[name]) for name, make in changes.items()}
    with pytest.raises(RuntimeError) as caught:
        torch.ops.fastelbo.sampler_draw(*arguments.values())
    assert message in str(caught.value)
    if not {*changes} - {"program", "weights", "workspace", "first", "end"}:
        with pytest.raises(RuntimeError) as caught:
            names = ("program", "weights", "workspace", "first", "end")
            torch.ops.fastelbo.sampler_advance(*(arguments[name] for name in names))
        assert message in str(caught.value)
