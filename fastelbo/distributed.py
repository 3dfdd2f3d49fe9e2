"""Draws split over ranks: their seeds and offsets. docs/distributed.md has the tour, _sharding.py what the ops do."""

import math

import torch
from torch import distributed as dist

from fastelbo import _seed
from fastelbo.reference.noise import philox4x32

__all__ = ["independent_seed", "noise_offset", "same_seed"]

# Third and fourth counter words of the block that independent_seed reads: noise has 0 in the fourth.
_SEED_BLOCK = (0, 1)


def same_seed(
    seed: "int | torch.Tensor | None" = None,
    *,
    generator: "torch.Generator | None" = None,
    device: "torch.device | str" = "cpu",
    group: "dist.ProcessGroup | None" = None,
) -> torch.Tensor:
    """One seed for all ranks of a group, that of its first rank: the same draw as on one device.

    With it, and with the noise_offset of its rows, each rank draws its part of what one device would draw for the whole
    batch.

    Args:
        seed: an int or an int64 tensor of one element; drawn from the generator where None.
        generator: a torch.Generator; torch's default one of the device where None.
        device: of the seed, where that is not a tensor; the one that the draw is on.
        group: the ranks; all where None.

    Returns:
        int64 tensor of one element. Nothing waits for a GPU.

    Raises:
        RuntimeError: without a process group.
        ValueError, TypeError: a seed that is none, or a generator of another device.

    Example:
        >>> import tempfile
        >>> options = {"init_method": f"file://{tempfile.mktemp()}", "rank": 0, "world_size": 1}
        >>> torch.distributed.init_process_group("gloo", **options)
        >>> mean, logvar = torch.zeros(4, 3), torch.zeros(4, 3)  # this rank's rows
        >>> draw = {"seed": fastelbo.distributed.same_seed(7), "noise_offset": fastelbo.distributed.noise_offset(mean)}
        >>> z = fastelbo.gaussian_rsample(mean, logvar, **draw)
        >>> torch.distributed.destroy_process_group()
    """
    _rank(group)
    shared = _as_tensor(seed, generator, device).clone()
    first = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast(shared, first, group=group)
    return shared


def independent_seed(
    seed: "int | torch.Tensor | None" = None,
    *,
    generator: "torch.Generator | None" = None,
    device: "torch.device | str" = "cpu",
    group: "dist.ProcessGroup | None" = None,
) -> torch.Tensor:
    r"""A seed of its own for each rank of a group: independent draws.

    .. math:: \text{Philox}_{\text{seed}}(\text{rank}, 0, 0, 1)

    The generator that makes the noise also makes the seed, from a block that no noise is made of. (Seeds such as
    seed + rank collide: rank 1 of run 0 is rank 0 of run 1.)

    Args:
        seed, generator, device, group: as in same_seed. All ranks give the same seed, or draw one from generators in
            the same state; this is not checked and nothing is sent.

    Returns:
        int64 tensor of one element; ``torch.manual_seed(independent_seed(0).item())`` gives each rank's torch noise of
        its own too.

    Raises:
        RuntimeError: without a process group.
        ValueError, TypeError: a seed that is none, or a generator of another device.

    Source:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": parallel streams by counter.

    Example:
        >>> import tempfile
        >>> options = {"init_method": f"file://{tempfile.mktemp()}", "rank": 0, "world_size": 1}
        >>> torch.distributed.init_process_group("gloo", **options)
        >>> z = fastelbo.gaussian_rsample(
        ...     torch.zeros(4, 3), torch.zeros(4, 3), seed=fastelbo.distributed.independent_seed(7)
        ... )
        >>> torch.distributed.destroy_process_group()
    """
    rank = _rank(group)
    key = _as_tensor(seed, generator, device)
    low = 0xFFFFFFFF
    counter = (torch.full_like(key, word) for word in (rank, 0, *_SEED_BLOCK))
    words = philox4x32(tuple(counter), (key & low, (key >> 32) & low))
    return words[0] | (words[1] << 32)


def noise_offset(shard: torch.Tensor, first: "int | None" = None, *, group: "dist.ProcessGroup | None" = None) -> int:
    """The noise_offset of a rank's rows of a batch.

    Args:
        shard: this rank's rows, [B, ...]: the mean of the draw.
        first: index of the first of them in the whole batch; rank times B where None, for shards of one size.
        group: the ranks that share the batch; all where None.

    Returns:
        int: the row-major index of the shard's first element in the whole tensor.

    Raises:
        RuntimeError: without a process group, where first is None.

    Example:
        >>> fastelbo.distributed.noise_offset(torch.zeros(4, 3), first=8)
        24
    """
    if first is None:
        first = _rank(group) * shard.shape[0]
    return first * math.prod(shard.shape[1:])


def _rank(group):
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "group must be of an initialised process group; got none: start the script with torchrun, and call "
            "torch.distributed.init_process_group() before"
        )
    return dist.get_rank(group)


def _as_tensor(seed, generator, device):
    if isinstance(seed, torch.Tensor):
        device = seed.device
    return _seed.as_seed(seed, generator, torch.device(device)).reshape(1)
