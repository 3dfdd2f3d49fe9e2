"""What a sampler is given: checks of it, and what it means."""

import copy
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastelbo import _checks, backends
from fastelbo import nn as ours


def checked_shape(image_shape: Any) -> tuple[int, int, int]:
    """(C, H, W)."""
    if not isinstance(image_shape, Sequence):
        raise TypeError(f"image_shape must be (C, H, W), all at least 1; got {image_shape!r}")
    shape = tuple(image_shape)
    try:
        sizes = tuple(0 if isinstance(size, bool) else operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(f"image_shape must be (C, H, W), all at least 1; got {shape}")
    return sizes


def checked_levels(levels: Any) -> int | None:
    """An int, or None."""
    if levels is None:
        return None
    if isinstance(levels, bool) or not hasattr(levels, "__index__"):
        raise TypeError(f"levels must be an int or None; got {type(levels).__name__}")
    levels = operator.index(levels)
    if levels < 2:
        raise ValueError(f"levels must be at least 2 (a network with one output for each colour has 2); got {levels}")
    return levels


def checked_values(values: Any, levels: int | None, outputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the network takes for each level: [outputs]."""
    if levels is None and values is not None:
        raise ValueError("values must come with levels; got them alone")
    found = torch.as_tensor(range(outputs) if values is None else values, dtype=dtype, device=device)
    if found.shape != (outputs,):
        raise ValueError(f"values must be one number for each of {outputs} levels; got shape {tuple(found.shape)}")
    return found


def check_count(name: str, value: Any) -> int:
    """A number of things, of which there is at least one; the value."""
    return _checks.check_positive_int(name, value)


def completion(
    init: Any, mask: Any, shape: tuple[int, ...], levels: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The image to draw into, and which of it is known."""
    if (init is None) != (mask is None):
        raise ValueError(f"init and mask must both be given, or neither; got no {'init' if init is None else 'mask'}")
    if init is None:
        return torch.zeros(shape, dtype=torch.int64, device=device), None
    if not isinstance(init, Tensor) or init.is_floating_point() or init.dtype == torch.bool:
        raise TypeError(f"init must be a tensor of integers; got {getattr(init, 'dtype', type(init).__name__)}")
    if init.shape != shape:
        raise ValueError(f"init must be of shape {shape}; got {tuple(init.shape)}")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a tensor of bool; got {getattr(mask, 'dtype', type(mask).__name__)}")
    try:
        known = mask.to(device).expand(shape).contiguous()
    except RuntimeError:
        raise ValueError(f"mask must broadcast to shape {shape}; got {tuple(mask.shape)}") from None
    image = torch.where(known, init.to(device, torch.int64), 0).contiguous()
    if bool(((image < 0) | (image >= levels)).any()):
        raise ValueError(f"init must be between 0 and {levels - 1} where mask is True")
    return image, known


def condition(cond: Any, conditional: bool, n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The condition of n images, on the network's device and in its dtype."""
    if (cond is not None) != conditional:
        raise ValueError(f"cond must {'' if conditional else 'not '}be given: conditional={conditional}")
    if cond is None:
        return None
    if not isinstance(cond, Tensor):
        raise TypeError(f"cond must be a tensor; got {type(cond).__name__}")
    if cond.dim() == 0 or len(cond) != n:
        raise ValueError(f"cond must be of {n} images; got shape {tuple(cond.shape)}")
    return cond.to(device, dtype) if cond.is_floating_point() else cond.to(device)


def choose(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    """The backend; the fastest that can run a model of this dtype where None."""
    wanted = backends.OVERRIDE if backend is None else backend
    reasons: dict[str, str | None] = {"reference": None, "triton": "it has no sampler"}
    for name in ("cpu", "cuda"):
        reasons[name] = backends.why_not(name, device)
        if reasons[name] is None and dtype != torch.float32:
            reasons[name] = f"it computes in float32, and the model is in {dtype}"
    if wanted is None:
        return next(name for name in ("cpu", "cuda", "reference") if reasons[name] is None)
    if not isinstance(wanted, str) or wanted not in backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}; got {wanted!r}")
    if reasons[wanted] is None:
        return wanted
    why = "; ".join(f"{name}: {reason or 'can run it'}" for name, reason in reasons.items())
    raise NotImplementedError(f"backend {wanted!r} cannot run this sampler ({why})")


def guesses(model: nn.Module, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Conditions of one image that a model may take: until one is given, its steps are those with such a one."""
    shapes: list[tuple[int, ...]] = []
    for part in model.modules():
        if isinstance(part, ours.GatedMaskedConv2d) and part.cond is not None:
            shapes.append((1, part.cond.in_channels))
        elif isinstance(part, nn.Linear):
            shapes.append((1, part.in_features))
        elif isinstance(part, nn.Conv2d):
            shapes += [(1, part.in_channels, *size), (1, part.in_channels)]
    label = torch.zeros(1, dtype=torch.int64, device=device)
    others = [torch.zeros(shape, dtype=dtype, device=device) for shape in dict.fromkeys(shapes)]
    return [label, *others] if any(isinstance(part, nn.Embedding) for part in model.modules()) else [*others, label]


def unwrapped(model: nn.Module) -> nn.Module:
    """A module without what compiles it or runs it on several devices."""
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while isinstance(model, parallel) or "_orig_mod" in model._modules:  # torch.compile's, whose import takes seconds
        model = model.get_submodule("module" if isinstance(model, parallel) else "_orig_mod")
    for part in model.modules():
        for name, child in part.named_children():
            if (own := unwrapped(child)) is not child:
                setattr(part, name, own)
    return model


def replica(model: nn.Module, known: dict[int, Any]) -> nn.Module:
    """A deep copy of a module, as copy.deepcopy makes it, in half its time.

    Args:
        model: the module.
        known: what stands for objects, by their ids.
    """
    empty = {
        id(own): type(own)()
        for part in model.modules()
        for own in vars(part).values()
        if type(own) in (dict, OrderedDict, set) and not own
    }
    return copy.deepcopy(model, {**empty, **known})


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module for evaluation."""
    # of tensors in a graph, as those hooks leave them, there is no deepcopy
    held = [t for part in model.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        own = replica(model, {id(tensor): tensor.detach().clone() for tensor in held})
        return unwrapped(own).to(dtype).eval().requires_grad_(False)
    except Exception as error:  # of any kind: it is the user's code
        raise TypeError(f"model must be one that copy.deepcopy copies; got {type(model).__name__}: {error}") from error
