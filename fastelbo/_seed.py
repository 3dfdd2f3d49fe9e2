"""The seed of a draw: an int64 tensor of one element, on the device of the sample."""

from typing import Any

import torch

from fastelbo import _library

_LOW, _HIGH = -(2**63), 2**63 - 1


def _draw(device: torch.device, generator=None) -> torch.Tensor:
    if generator is None:
        return torch.randint(_LOW, _HIGH, (1,), dtype=torch.int64, device=device)
    return torch.randint(_LOW, _HIGH, (1,), dtype=torch.int64, device=device, generator=generator)


# What a traced function calls. Tagged, so that torch.compile does not repeat a draw in the backward. The argument is an
# uninitialised tensor that nothing reads: torch.compile merges equal calls, tagged or not, but never two torch.empty.
_DRAW = _library.define_helper(
    "draw_seed",
    "(Tensor fresh) -> Tensor",
    lambda fresh: fresh.new_empty((1,), dtype=torch.int64),
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.implement("draw_seed", lambda fresh: _draw(fresh.device))


def as_seed(seed: Any, generator: Any, device: torch.device) -> torch.Tensor:
    """The seed as a tensor; drawn from the generator, or torch's default one, where there is none.

    Raises:
        ValueError: for a tensor of more than one element or on another device, an int outside 64 bits, or a generator
            of another device.
        TypeError: for anything that is not an int, an int64 tensor or a torch.Generator.
    """
    if seed is None:
        if generator is None:
            if torch.compiler.is_compiling() and not _library.transformed():
                return _DRAW(torch.empty((), device=device))
            return _draw(device)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
        if generator.device.type != device.type:
            raise ValueError(f"generator must be on the device of mean, {device}; got {generator.device}")
        return _draw(device, generator)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor; got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element; got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the device of mean, {device}; got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed must be an int or an int64 tensor; got {type(seed).__name__}")
    if not _LOW <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits; got {seed}")
    signed: Any = seed - 2**64 if seed > _HIGH else seed  # torch.full says nothing of SymInt
    return torch.full((1,), signed, dtype=torch.int64, device=device)
