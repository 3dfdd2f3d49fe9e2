"""Times the cases of tests/drop_in_cases.py; both sides must compute the same, of the same noise, or are not timed."""

from collections.abc import Callable
from contextlib import nullcontext

import cases
import torch
from drop_in_cases import DROP_INS, DropIn
from torch.utils._python_dispatch import TorchDispatchMode

import fastelbo

TOLERANCE = 1e-4  # of the largest value
SEED = 5
BOTH = "forward_backward"


class OurNoise(TorchDispatchMode):
    """Whoever draws normal numbers within gets the noise that ours draw after torch.manual_seed(SEED)."""

    def __init__(self, num_samples):
        super().__init__()
        self.drawn, self.num_samples = 0, num_samples

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op.overloadpacket in (torch.ops.aten.randn, torch.ops.aten.randn_like, torch.ops.aten.normal_):
            zeros = torch.zeros_like(result[0] if self.num_samples else result)
            torch.manual_seed(SEED)
            noise = {"num_samples": self.num_samples, "noise_offset": self.drawn}
            result.copy_(fastelbo.gaussian_rsample(zeros, 0.0, **noise))
            self.drawn += result.numel()
        return result


def results(function: Callable, inputs, noise=None) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    call = cases.bind(function, inputs, BOTH)
    torch.manual_seed(SEED)
    with noise or nullcontext():
        return [tensor.detach() for tensor in cases.flat(call())]


def check(drop_in: DropIn, inputs) -> list[torch.Tensor]:
    """Raises AssertionError unless ours agrees with theirs; outputs and gradients."""
    ours, theirs = drop_in.contestants().values()
    found = results(ours, inputs)
    expected = results(theirs, inputs, OurNoise(drop_in.num_samples))
    cases.compare(f"{drop_in.op} {drop_in.case}", found, expected, TOLERANCE)
    return found


def timed(option) -> list[DropIn]:
    """What is to be timed, as cases.timed; nothing on a GPU, and nothing by its shape."""
    if option.device != "cpu" or option.shape or not cases.chosen(option.dtype, "float32"):
        return []
    return [one for one in DROP_INS if cases.chosen(option.op, one.op) and cases.chosen(option.rival, one.rival)]


def calls(drop_in: DropIn) -> tuple[dict[str, Callable], dict]:
    """Calls without arguments of both sides, which agree, and the fields that their rows have in common.

    Raises:
        AssertionError: if they do not agree.
    """
    torch.manual_seed(0)
    inputs = drop_in.inputs()
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    found = check(drop_in, inputs)
    # inputs and outputs once; in the backward the inputs again, and the gradients of both
    moved = sum(tensor.nbytes for tensor in (*inputs, *inputs, *found, *found[: len(found) - len(leaves)]))
    shape = drop_in.shape or cases.named(inputs[0].shape)
    common = {"op": drop_in.op, "case": drop_in.case, "pass_": BOTH, "shape": shape, "dtype": "float32"}
    made = {name: cases.bind(function, inputs, BOTH) for name, function in drop_in.contestants().items()}
    return made, common | {"bytes": moved}
