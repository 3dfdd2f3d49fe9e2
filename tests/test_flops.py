"""What torch.utils.flop_counter counts: of a masked convolution the live share of what it counts of the full one."""

import fresh_python
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from ops import GAUSSIAN
from torch.utils.flop_counter import FlopCounterMode

import fastelbo

CASES = {
    "A": {"mask_type": "A"},
    "B": {"mask_type": "B", "dilation": 2, "activation": "elu"},
    "colours-A": {"mask_type": "A", "channel_groups": 3},
    "colours-B": {"mask_type": "B", "channel_groups": 3, "group_order": "contiguous"},
    "gate": {"mask_type": "B", "channel_groups": 3, "activation": "tanh_sigmoid"},
    "more groups than channels": {"mask_type": "A", "channel_groups": 7, "activation": "glu"},
    "taps": {"taps": [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1], [0, 0, 0, 1, 0]], "dilation": 3},
    "vertical": {"stack": "vertical"},
    "vertical-A": {"stack": "vertical", "mask_type": "A", "activation": "glu"},
    "horizontal": {"stack": "horizontal", "channel_groups": 3},
    "horizontal-A": {"stack": "horizontal", "mask_type": "A"},
}


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def layer(stack=None, mask_type="B", **keywords):
    """A convolution of 6 channels to 12, its weight and its live taps."""
    k, activation = 5, keywords.pop("activation", None)
    groups = {key: keywords[key] for key in ("channel_groups", "group_order") if key in keywords}
    mask = fastelbo.conv_mask2d(12, 6, k, mask_type, gated=activation in ("glu", "tanh_sigmoid"), **groups)
    if stack == "horizontal":
        mask = mask[:, :, k // 2 : k // 2 + 1, : k // 2 + 1]
    if stack == "vertical":
        mask = mask[:, :, : k // 2 + 1].clone()
        mask[:, :, -1] = mask_type == "B"
    if "taps" in keywords:
        mask, mask_type = torch.tensor(keywords["taps"], dtype=torch.bool).expand(12, 6, -1, -1), None
    weight = torch.randn(mask.shape, requires_grad=True)

    def run(x, backend):
        options = {"mask_type": mask_type, "activation": activation, "backend": backend, **keywords}
        if stack is None:
            return fastelbo.masked_conv2d(x, weight, **options)
        return fastelbo.causal_conv2d(x, weight, stack=stack, **options)

    return run, weight, mask


def plain(x, weight):
    """The full convolution, with the output of the image's size."""
    rows, columns = weight.shape[2:]
    return F.conv2d(F.pad(x, (0, columns - 1, 0, rows - 1)), weight)


@pytest.mark.parametrize("case", CASES)
def test_counts_live_taps(backend, case):
    """Of the reference torch counts the convolutions that it is made of, which comes to the same."""
    run, weight, mask = layer(**CASES[case])
    shape = (2, 6, 7, 9)
    full, share = counted(lambda: plain(torch.zeros(shape), weight)), mask.double().mean().item()
    x = torch.randn(shape)
    assert counted(lambda: run(x, backend)) == pytest.approx(full * share, rel=1e-12)
    for inputs in ([x, weight], [x], [weight]):
        for tensor in (x, weight):
            tensor.requires_grad_(any(tensor is wanted for wanted in inputs))
        y, plain_y = run(x, backend), plain(x, weight)
        got, want = (counted(lambda y=y, inputs=inputs: torch.autograd.grad(y.sum(), inputs)) for y in (y, plain_y))
        assert got == pytest.approx(want * share, rel=1e-12)


def test_counts_no_taps_outside_of_every_image(backend):
    """Of 5 x 5 taps on 2 rows of 3 pixels none reads more than a row up."""
    run, _, mask = layer(mask_type="B")
    assert counted(lambda: run(torch.zeros(2, 6, 2, 3), backend)) == 2 * 2 * 6 * mask[:, :, 1:].sum()


def test_counts_by_module():
    network = torch.nn.Sequential(fastelbo.nn.MaskedConv2d(3, 8, 3), fastelbo.nn.MaskedConv2d(8, 4, 1, mask_type="B"))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, 3, 5, 4)).sum().backward()
    counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
    # 4 live taps and 1; 2 FLOPs each, and again for the weight's gradient, and for the input's but for the first layer
    assert counts["Sequential.0"] == 2 * 2 * (2 * 20 * 4 * 3 * 8)
    assert counts["Sequential.1"] == 3 * 2 * (2 * 20 * 8 * 4)


def test_elementwise_ops_count_nothing():
    for name, op in GAUSSIAN.items():
        inputs = op.inputs()
        assert counted(lambda op=op, inputs=inputs: sum(out.sum() for out in op(*inputs)).backward()) == 0, name


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "fastelbo"])
def test_order_of_imports(first):
    """torch's counter is not imported for it, which would import Triton."""
    code = f"""
import sys, torch, {first}, fastelbo
assert {first!r} != "fastelbo" or "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    fastelbo.masked_conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3), mask_type="A")
print(counter.get_total_flops())
"""
    done = fresh_python.run(code)
    assert (done.stdout, done.stderr) == ("32\n", "")
