"""Times the cases of tests/drop_in_cases.py; both sides must compute the same, of the same noise, or are not timed."""

from collections.abc import Callable

import cases
import torch
from drop_in_cases import DROP_INS, DropIn


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
    found = drop_in.check(inputs)
    outputs = found[: len(found) - sum(tensor.requires_grad for tensor in inputs)]
    # inputs and outputs once; in the backward the inputs again, and the gradients of both
    moved = sum(tensor.nbytes for tensor in (*inputs, *inputs, *found, *outputs))
    common = {"op": drop_in.op, "case": drop_in.case, "shape": drop_in.shape or cases.named(inputs[0].shape)}
    common |= {"pass_": "forward_backward", "dtype": "float32", "bytes": moved}
    functions = drop_in.contestants().items()
    return {name: cases.bind(function, inputs, "forward_backward") for name, function in functions}, common
