"""What the ranks of a group run for test_distributed.py: every case against the unsharded call, in one process group.

Of the arguments RANKS DIRECTORY cases CASE... start() writes of each rank DIRECTORY/RANK.json, from each case to its
traceback or None; of ... example OPTION... it runs examples/train_distributed.py as torchrun does.
"""

import argparse
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from ops import GAUSSIAN
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

import fastelbo
import train_distributed
import train_pixelcnn
from fastelbo.testing import gaussian

ONE = [(placement,) for placement in (Replicate(), Shard(0), Shard(1), Shard(2), Partial())]
TWO = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Replicate(), Shard(2)), (Shard(0), Partial())]
SHAPE = (5, 3, 4)  # uneven on 2 and 4 ranks, and of the 4 some have nothing
CASES = {}
TIMEOUT = 240  # seconds, of which a rank takes a tenth where nothing else runs
CPU = torch.device("cpu")


def plain(name, op):
    """The plain call of an op, from mean and raw scale of q, and x and p."""

    def function(mean, s, x, p):
        return op(*op.of((mean, s), (x, p)))

    function.__name__ = name
    return function


OPS = {name: plain(name, op) for name, op in GAUSSIAN.items()}  # and further calls, below


def op(function):
    OPS[function.__name__] = function
    return function


@op
def rsample(mean, s, x, p):
    return fastelbo.gaussian_rsample(mean, s, seed=7, noise_offset=3)


@op
def rsample_float32(mean, s, x, p):
    return fastelbo.gaussian_rsample(mean.float(), s.float(), seed=torch.tensor(-9), backend="cpu")


@op
def rsample_samples(mean, s, x, p):
    return fastelbo.gaussian_rsample(mean, s, seed=7, num_samples=3, temperature=0.5)


@op
def rsample_broadcast(mean, s, x, p):
    return fastelbo.gaussian_rsample(mean, s[:, :1], seed=7)


@op
def rsample_inward(mean, s, x, p):
    scale = fastelbo.Scale("logvar", clamp=(-0.2, 0.2), clamp_grad="inward")
    return fastelbo.gaussian_rsample(mean, s[0, 0], scale=scale, seed=7)


@op
def rsample_noise(mean, s, x, p):
    return fastelbo.gaussian_rsample(mean, s, noise=x.detach())


@op
def kl_reference(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, event_ndim=1, backend="reference")


@op
def kl_prior(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, p, 0.3, event_ndim=1, balance=0.8)


@op
def kl_mean(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, reduction="mean")


@op
def kl_free_bits(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, free_bits=0.4)


@op
def kl_free_bits_example(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, free_bits=4.0, free_bits_per="example")


@op
def kl_mask(mean, s, x, p):
    return fastelbo.gaussian_kl(mean, s, mask=x > 0, event_ndim=1, reduction="mean")


@op
def rsample_kl(mean, s, x, p):
    return fastelbo.gaussian_rsample_kl(mean, s, p, p, seed=11)


@op
def rsample_kl_elementwise(mean, s, x, p):
    return fastelbo.gaussian_rsample_kl(mean, s, seed=11, event_ndim=0, num_samples=2)


@op
def nll_one_sigma(mean, s, x, p):
    return fastelbo.gaussian_nll(x, mean, s[0, 0, 0], event_ndim=1)


@op
def nll_number(mean, s, x, p):
    return fastelbo.gaussian_nll(x, mean, 0.3, reduction="sum")


@op
def nll_mask(mean, s, x, p):
    return fastelbo.gaussian_nll(x, mean, s[:, :, :1], mask=p > 0)


@op
def nll_beta(mean, s, x, p):
    return fastelbo.gaussian_nll(x, mean, s, beta_nll=0.5)


@op
def elbo(mean, s, x, p):
    return tuple(fastelbo.gaussian_elbo(x, p, 0.0, mean, s, beta=0.5))


@op
def rsample_log_prob(mean, s, x, p):
    return fastelbo.gaussian_rsample_log_prob(mean, s, seed=5)


def case(function):
    CASES[function.__name__] = function
    return function


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(function, inputs, whole=lambda tensor: tensor):
    """Outputs and gradients, whole, of a sum with weights that differ from element to element."""
    outputs = [whole(out) for out in as_tuple(function(*inputs))]
    weights = [torch.arange(1.0, 1 + out.numel(), dtype=out.dtype).cos().reshape(out.shape) for out in outputs]
    sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    return [out.detach() for out in outputs], [whole(x.grad) for x in inputs if x.grad is not None]


def full(tensor):
    return tensor.full_tensor()


def leaves(tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def pending(tensor, mesh, placements):
    """A DTensor of these placements, Partial among them: the ranks' terms differ, and add up to the tensor."""
    made = distribute_tensor(tensor, mesh, [Replicate() if p.is_partial() else p for p in placements])
    local = made.to_local()
    for position, placement in enumerate(placements):
        if placement.is_partial():
            index, size = mesh.get_coordinate()[position], mesh.size(position)
            local = local * (2.0 * (index + 1) / (size * (size + 1)))
    return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False)


def check(function, tensors, placed, mesh):
    want, want_grads = results(function, leaves(tensors))
    inputs = [pending(t, mesh, p).detach().requires_grad_() for t, p in zip(tensors, placed, strict=True)]
    got, got_grads = results(function, inputs, full)
    rounding = 1e-12 if want[0].dtype == torch.float64 else 1e-6  # some roundings of numbers of order 1
    tolerance = {"rtol": rounding, "atol": rounding}
    exact = not any(p.is_partial() for placements in placed for p in placements)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    if exact and "rsample" in function.__name__:
        assert torch.equal(got[0], want[0])
    assert len(got_grads) == len(want_grads) > 0
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def meshes():
    ranks = dist.get_world_size()
    yield init_device_mesh("cpu", (ranks,))
    if ranks == 4:
        yield init_device_mesh("cpu", (2, 2))


def gaussian_inputs():
    (mean, s), (x, p) = (gaussian(SHAPE, seed=seed, dtype=torch.float64) for seed in (0, 1))
    return [mean, s, x, p]


def gaussian_case(function):
    def run():
        for mesh in meshes():
            for placements in ONE if mesh.ndim == 1 else TWO:
                try:
                    check(function, gaussian_inputs(), [placements] * 4, mesh)
                except Exception as error:
                    raise AssertionError(f"{placements} on {mesh}: {error}") from error

    return run


CASES |= {f"gaussian_{name}": gaussian_case(function) for name, function in OPS.items()}


@case
def mixed_placements():
    for mesh in meshes():
        if mesh.ndim == 1:
            placed = [[Shard(0)], [Replicate()], [Shard(1)], [Partial()]]
        else:
            placed = [[Shard(0), Shard(0)], [Replicate(), Shard(2)], [Shard(0), Replicate()], [Partial(), Shard(1)]]
        for name in ("rsample_kl", "log_prob", "kl_prior", "rsample_samples"):
            check(OPS[name], gaussian_inputs(), placed, mesh)


@case
def partial_sums_stay_partial():
    mesh = next(meshes())
    mean, s, *_ = (distribute_tensor(t, mesh, [Shard(1)]) for t in gaussian_inputs())
    assert fastelbo.gaussian_kl(mean, s).placements == (Partial(),)
    z, terms = fastelbo.gaussian_rsample_kl(mean, s, event_ndim=1, num_samples=2)
    assert z.placements == (Shard(2),) and terms.placements == (Shard(1),)
    assert z.shape == (2, *SHAPE) and terms.shape == SHAPE[:2]


@case
def drawn_seeds_are_the_first_ranks():
    for mesh in meshes():
        placements = [Shard(0), Replicate()][: mesh.ndim]
        mean, s = (distribute_tensor(t, mesh, placements) for t in gaussian_inputs()[:2])
        torch.manual_seed(3 + dist.get_rank())
        got = fastelbo.gaussian_rsample(mean, s).full_tensor()
        torch.manual_seed(3)
        assert torch.equal(got, fastelbo.gaussian_rsample(*gaussian_inputs()[:2]))


def image_inputs(n=5, c_in=3, c_out=8, gate=False, k=3, cond_ndim=4):
    torch.manual_seed(1)
    size = (4, 6)
    y = c_out // 2 if gate else c_out
    shapes = [(n, c_in, *size), (c_out, c_in, k, k), (c_out,), (n, c_out, *size)[:cond_ndim], (n, y, *size)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def conv(**options):
    def conv(input, weight, bias, cond, residual):
        return fastelbo.masked_conv2d(input, weight, bias, cond=cond, residual=residual, **options)

    return conv


IMAGES = (Shard(0), Replicate(), Replicate(), Shard(0), Shard(0))
CHANNELS = (Replicate(), Shard(0), Shard(0), Shard(1), Shard(1))
WHOLE = (Replicate(),) * 5
LAZY = (Shard(0), Replicate(), Replicate(), Replicate(), Partial())  # what does not fit is moved
LAYOUTS = {"images": IMAGES, "channels": CHANNELS, "replicated": WHOLE, "moved": LAZY}


def conv_placements(mesh):
    pairs = [("images", "channels"), ("channels", "images"), ("images", "images"), ("replicated", "channels")]
    for names in [(name,) for name in LAYOUTS] if mesh.ndim == 1 else pairs:
        yield names, list(zip(*(LAYOUTS[name] for name in names), strict=True))


@case
def convolution():
    variants = [
        ({"mask_type": "A", "activation": "relu"}, {}),
        ({"mask_type": "B"}, {"cond_ndim": 2}),
        ({"mask_type": "B", "activation": "elu", "backend": "reference"}, {}),
        ({"mask_type": "B", "activation": "tanh_sigmoid"}, {"gate": True}),
        ({"mask_type": "B", "channel_groups": 2, "dilation": 2}, {"c_in": 4}),
        ({"mask_type": "A", "channel_groups": 2, "group_order": "contiguous"}, {"c_in": 4}),
    ]
    for mesh in meshes():
        for options, sizes in variants:
            for names, placed in conv_placements(mesh):
                refused = "gate" in sizes or "group_order" in options
                refused = refused or ("channel_groups" in options and 8 % (2 * 2 ** names.count("channels")))
                if "channels" in names and (refused or (options.get("channel_groups") and mesh.size() == 4)):
                    continue
                try:
                    check(conv(**options), image_inputs(**sizes), placed, mesh)
                except Exception as error:
                    raise AssertionError(f"{options}, {names} on {mesh}: {error}") from error


@case
def causal_convolution():
    for mesh in meshes():
        for stack, kernel in (("vertical", (2, 3)), ("horizontal", (1, 2))):

            def causal(input, weight, bias, cond, residual, stack=stack, kernel=kernel):
                weight = weight[:, :, : kernel[0], : kernel[1]]
                return fastelbo.causal_conv2d(input, weight, bias, stack=stack, cond=cond, activation="relu")

            for layout in ("images", "channels"):
                check(causal, image_inputs(), [[p] * mesh.ndim for p in LAYOUTS[layout]], mesh)


@case
def refused_placements():
    mesh = next(meshes())

    def refused(message, function, tensors, placed):
        pairs = zip(tensors, placed, strict=True)
        inputs = [tensor if p is None else distribute_tensor(tensor, mesh, [p]) for tensor, p in pairs]
        try:
            function(*inputs)
        except ValueError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error that says {message!r}")

    plain, gated = conv(mask_type="B"), conv(mask_type="B", activation="glu")
    for dim in (1, 2, 3):
        refused("must be Shard(0) and replicated (images)", plain, image_inputs(), (Shard(dim), *WHOLE[1:]))
        refused("both replicated", plain, image_inputs(), (Replicate(), Shard(dim), *WHOLE[2:]))
    refused("(output channels)", plain, image_inputs(), (Shard(0), Shard(0), *WHOLE[2:]))
    refused("under a gate", gated, image_inputs(gate=True), CHANNELS)
    grouped = conv(mask_type="B", channel_groups=3)
    refused("channel groups", grouped, image_inputs(c_in=3), CHANNELS)
    refused("divide; got 7", plain, image_inputs(c_out=7), CHANNELS)
    refused("bias must be a DTensor as input is", plain, image_inputs(), (*IMAGES[:2], None, *IMAGES[3:]))
    noise = (OPS["rsample_noise"], gaussian_inputs())
    refused("noise must be a DTensor as mean is", *noise, (Shard(0), Shard(0), None, None))
    refused("noise must be a plain tensor", *noise, (None, None, Shard(0), None))
    refused("s must be a DTensor as mean is", OPS["rsample"], gaussian_inputs(), (Shard(0), None, None, None))
    refused("mean must be a DTensor as x is", OPS["log_prob"], gaussian_inputs(), (None, Shard(0), Shard(0), None))
    mean, s, *_ = gaussian_inputs()
    other = init_device_mesh("cpu", (1, mesh.size()))
    try:
        fastelbo.gaussian_kl(distribute_tensor(mean, mesh), distribute_tensor(s, other))
    except ValueError as error:
        assert "s_q must be on the mesh of mean_q" in str(error)
    else:
        raise AssertionError("two meshes passed")


@case
def strided_shards_are_refused():
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh = next(meshes())
    mean = DTensor.from_local(torch.zeros(2, 3), mesh, [_StridedShard(0, split_factor=2)], run_check=False)
    try:
        fastelbo.gaussian_kl(mean, mean)
    except ValueError as error:
        assert "by Shard, Replicate or Partial" in str(error)
    else:
        raise AssertionError("a strided shard passed")


@case
def compiled_ops():
    mesh = next(meshes())
    for name in ("rsample_kl", "log_prob", "nll_one_sigma"):
        function = torch.compile(OPS[name], fullgraph=True, dynamic=False, backend="aot_eager")
        function.__name__ = name
        for placement in (Shard(0), Shard(1)):
            check(function, gaussian_inputs(), [[placement]] * 4, mesh)
    function = torch.compile(conv(mask_type="B", activation="relu"), fullgraph=True, dynamic=False, backend="aot_eager")
    function.__name__ = "conv"
    for layout in ("images", "channels"):
        check(function, image_inputs(), [[p] for p in LAYOUTS[layout]], mesh)


@case
def double_backward():
    mesh = next(meshes())

    def penalty(mean, s, x, p):
        terms = fastelbo.gaussian_kl(mean, s, event_ndim=1)
        (d_mean,) = torch.autograd.grad(terms.sum(), mean, create_graph=True)
        return d_mean.square() * 3

    check(penalty, gaussian_inputs(), [[Shard(0)]] * 4, mesh)


@case
def same_draw():
    """Each rank's rows, drawn with same_seed and noise_offset, are those of one device's draw, bit for bit."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mean, s = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(100 + rank)
    seed = fastelbo.distributed.same_seed()
    torch.manual_seed(100)
    want = fastelbo.gaussian_rsample(mean, s)
    rows = slice(8 // ranks * rank, 8 // ranks * (rank + 1))
    offset = fastelbo.distributed.noise_offset(mean[rows])
    assert torch.equal(fastelbo.gaussian_rsample(mean[rows], s[rows], seed=seed, noise_offset=offset), want[rows])
    uneven = slice(0, 3) if rank == 0 else slice(3, 8)
    offset = fastelbo.distributed.noise_offset(mean[uneven], first=uneven.start)
    assert torch.equal(fastelbo.gaussian_rsample(mean[uneven], s[uneven], seed=seed, noise_offset=offset), want[uneven])
    group = dist.new_group(list(range(1, ranks)))
    if rank > 0:
        assert fastelbo.distributed.same_seed(5 + rank, group=group).item() == 6
        assert fastelbo.distributed.noise_offset(mean, group=group) == (rank - 1) * 48


def gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


@case
def independent_draws():
    """Noise of different ranks, and of neighbouring seeds, is uncorrelated at every small shift."""
    count = 1 << 16
    zeros = torch.zeros(count)
    draws = []
    for seed in (0, 1):
        own = fastelbo.distributed.independent_seed(seed)
        draws.append(gathered(fastelbo.gaussian_rsample(zeros, 1.0, scale="std", seed=own)))
        draws.append(fastelbo.gaussian_rsample(zeros, 1.0, scale="std", seed=seed)[None])
    draws = torch.cat(draws).double()
    assert (draws.mean(1).abs() < 5 / count**0.5).all() and ((draws.var(1) - 1).abs() < 5 * (2 / count) ** 0.5).all()
    for shift in range(8):
        products = draws @ draws.roll(shift, 1).T / count
        if shift == 0:
            products -= torch.diag(products.diag())
        assert (products.abs() < 5 / count**0.5).all(), shift  # some 1000 products of standard deviation count^-1/2
    seeds = gathered(torch.cat([fastelbo.distributed.independent_seed(seed) for seed in range(200)]))
    assert seeds.unique().numel() == seeds.numel()
    for rank, (seed,) in enumerate(gathered(fastelbo.distributed.independent_seed(-3)).tolist()):
        words = fastelbo.reference.noise.philox4x32(
            tuple(torch.tensor(word) for word in (rank, 0, 0, 1)),
            (torch.tensor(-3 & 0xFFFFFFFF), torch.tensor((-3 >> 32) & 0xFFFFFFFF)),
        )
        low, high = (int(word) for word in words[:2])
        assert seed % 2**64 == low + (high << 32)


# Training

STEPS = 8


def descent(model, losses, learning_rate):
    """The losses of some steps."""
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    curve = []
    for loss in losses:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach())
    return torch.stack(curve)


@case
def vae_trains_as_one_process():
    def training(**options):
        defaults = {"batch_size": 64, "seed": 0, "accumulate": 1, "parallel": "ddp"}
        training = train_distributed.Training(argparse.Namespace(**defaults | options), CPU)
        training.images = training.images[: 64 * STEPS]
        return training

    def curve(**options):
        own = training(**options)
        losses = own.train_epoch()
        return torch.cat((losses, torch.tensor([own.evaluate()])))

    data, generator = training(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = train_distributed.VAE()
    order = torch.randperm(len(data.images), generator=generator).split(64)
    losses = (model(*data.draw(data.images[batch], generator), 0).mean() for batch in order)
    losses = descent(model, losses, 1e-3)
    with torch.no_grad():
        test = model(*data.draw(data.test_images, torch.Generator().manual_seed(1)), 0).mean()
    want = torch.cat((losses, test[None]))
    assert len(losses) == STEPS and losses[-1] < losses[0]
    for kind in ("ddp", "fsdp"):
        for accumulate in (1, 2) if dist.get_world_size() == 2 else (2,):
            got = curve(parallel=kind, accumulate=accumulate)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # as in test_examples.py, which has the reason
    assert (curve(seed=1) - want).abs().max() > 1e-2


@case
def pixelcnn_trains_as_one_process():
    images, *_ = train_pixelcnn.load_data("digits", 0, "cpu")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def curve(kind, seed=0):
        torch.manual_seed(seed)
        model = forward = train_pixelcnn.PixelCNN(1, 17, channels=8, blocks=1)
        if kind == "ddp":
            forward = torch.nn.parallel.DistributedDataParallel(model)
        if kind == "fsdp":
            for module in (model.first, *model.blocks, model.hidden, model.logits, model):
                fully_shard(module)
        batches = images[: 64 * STEPS].split(64)
        shares = batches if kind == "alone" else [batch.chunk(ranks)[rank] for batch in batches]
        losses = (F.cross_entropy(forward(share), share[:, 0].long()) for share in shares)
        losses = descent(model, losses, 5e-3)
        if kind != "alone":
            dist.all_reduce(losses)
            losses /= ranks
        return losses

    want = curve("alone")
    assert want[-1] < want[0]
    for kind in ("ddp", "fsdp"):
        torch.testing.assert_close(curve(kind), want, rtol=0, atol=4e-6)  # as in test_examples.py
    assert (curve("ddp", seed=1) - want).abs().max() > 4e-4


@case
def compiled_replicas_and_shards():
    """The gradients of a compiled DDP and of a compiled FSDP2 model are those of one process on the whole batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    rows = slice(8 // ranks * rank, 8 // ranks * (rank + 1))
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(train_distributed.VAE())
    whole, replica, shards = models
    seed = torch.tensor([5])
    whole(x, seed, 0).mean().backward()
    options = {"dynamic": False, "backend": "aot_eager"}
    replica_forward = torch.compile(torch.nn.parallel.DistributedDataParallel(replica), **options)
    fully_shard(shards)
    shards.compile(**options)
    for model, forward in ((replica, replica_forward), (shards, shards)):
        forward(x[rows], seed, rows.start).mean().backward()
        for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            grad = full(parameter.grad) if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def run_cases(rank, directory, names):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    outcomes = {}
    for name in names:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            CASES[name]()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        print(f"{time.perf_counter() - start:6.2f} s  {name}")
    Path(directory, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


def main(rank, ranks, directory, what, *arguments):
    signal.alarm(TIMEOUT)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    known = {"init_method": f"file://{directory}/rendezvous", "rank": rank, "world_size": ranks}
    dist.init_process_group = functools.partial(dist.init_process_group, **known)
    if what == "cases":
        run_cases(rank, directory, arguments)
    else:
        sys.argv[0] = train_distributed.__file__
        train_distributed.main(arguments)


def start():
    """Forks the ranks: a process does as it is while it has no other thread, and imports take it seconds."""
    count, *given = sys.argv[1:]
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=main, args=(rank, int(count), *given)) for rank in range(int(count))]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(max(abs(rank.exitcode) for rank in ranks))


torch.set_num_threads(1)
torch.compile(abs, backend="aot_eager")  # imports the compiler
