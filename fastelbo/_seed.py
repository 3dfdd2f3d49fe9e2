"""The seed of a draw: an int64 tensor of one element, on the device of the sample, or on the CPU for kernels that take
its value."""

import threading
from typing import Any

import torch

from fastelbo import _autograd, _checks, _library

_LOW, _HIGH = -(2**63), 2**63 - 1

_RESERVING = threading.Lock()
_64_BITS = 2**64 - 1


def _mixed(x: int) -> int:
    """Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators": a bijection of 64 bits."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64_BITS
    return x ^ x >> 31


def _reserve(generator) -> int:
    """A seed from the state of a GPU's generator, which lies on the host, as torch's own ops reserve their numbers
    there: no kernel runs."""
    with _RESERVING:
        offset = generator.get_offset()
        generator.set_offset(offset + 4)
    return _mixed((_mixed(generator.initial_seed()) + (offset // 4 + 1) * 0x9E3779B97F4A7C15) & _64_BITS)


def by_value(device: torch.device) -> bool:
    """Whether a seed may be drawn on the host, and lie there for kernels that take its value.

    Not on a CPU, which has no such state, nor where a call is recorded, as by a CUDA graph, to be run again: there
    every run draws anew. torch.func decides itself what a draw means.
    """
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and not _autograd.transformed()
        and not torch.cuda.is_current_stream_capturing()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _draw(device: torch.device, generator=None, on_cpu=False) -> torch.Tensor:
    if on_cpu or by_value(device):
        index = torch.cuda.current_device() if device.index is None else device.index
        if generator is None:
            generator = torch.cuda.default_generators[index]
        elif generator.device.index != index:
            raise ValueError(f"generator must be on the device of mean, {device}; got {generator.device}")
        return _filled(_reserve(generator), torch.device("cpu") if on_cpu else device)
    if generator is None:
        return torch.randint(_LOW, _HIGH, (1,), device=device)
    return torch.randint(_LOW, _HIGH, (1,), device=device, generator=generator)


_LIKE = torch.empty((1,), dtype=torch.int64)


def drawn_on_cpu() -> torch.Tensor:
    """What as_seed draws on a CPU where nothing is given or traced, through fewer of torch's layers."""
    return torch.randint_like(_LIKE, _LOW, _HIGH)


def drawn(like: Any, backend: str) -> torch.Tensor:
    """What as_seed draws, for a sample like a tensor, where nothing is given or traced."""
    return drawn_on_cpu() if like.is_cpu else _draw(like.device, None, backend == "cuda" and by_value(like.device))


def _filled(seed: Any, device: torch.device) -> torch.Tensor:
    signed = seed - 2**64 if seed > _HIGH else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)


# What a traced function calls. Tagged, so that torch.compile does not repeat a draw in the backward. The argument is an
# uninitialised tensor that nothing reads: torch.compile merges equal calls, tagged or not, but never two torch.empty.
_DRAW = _library.define_helper(
    "draw_seed",
    "(Tensor fresh) -> Tensor",
    lambda fresh: fresh.new_empty((1,), dtype=torch.int64),
    lambda fresh: _draw(fresh.device),
    (torch.Tag.nondeterministic_seeded,),
)


def _drawn_by_onnx(device):
    """Of 46 bits: ONNX draws integers as float32 numbers."""
    high, low = (torch.randint(0, 2**23, (1,), device=device) for _ in range(2))
    return high * 2**23 + low


def at(seed: "torch.Tensor | None", device: torch.device) -> "torch.Tensor | None":
    """A seed on a device."""
    return None if seed is None else seed.to(device)


def as_seed(seed: Any, generator: Any, device: torch.device, on_cpu: bool = False) -> torch.Tensor:
    """The seed as a tensor; drawn from the generator, or torch's default one, where there is none.

    Args:
        seed, generator: the caller's.
        device: of the sample.
        on_cpu: by_value(device), where the seed may lie on the CPU unless it comes as a tensor.

    Raises:
        ValueError: for a tensor of more than one element or on another device, an int outside 64 bits, or a generator
            of another device.
        TypeError: for anything that is not an int, an int64 tensor or a torch.Generator.
    """
    if seed is None:
        if generator is None:
            if torch.compiler.is_compiling() and not _autograd.transformed():
                onnx = _autograd.exported_to_onnx()
                return _drawn_by_onnx(device) if onnx else _DRAW(torch.empty((), device=device))
            return _draw(device, None, on_cpu)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
        if generator.device.type != device.type:
            raise ValueError(f"generator must be on the device of mean, {device}; got {generator.device}")
        return _draw(device, generator, on_cpu)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int or an int64 tensor; got {seed.dtype}")
        if seed.numel() != 1:
            raise ValueError(f"seed must have one element; got shape {tuple(seed.shape)}")
        if seed.device != device:
            raise ValueError(f"seed must be on the device of mean, {device}; got {seed.device}")
        return seed
    seed = _checks.check_int("seed", seed, "an int or an int64 tensor", symbolic=True)
    if not _LOW <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits; got {seed}")
    return _filled(seed, torch.device("cpu") if on_cpu else device)
