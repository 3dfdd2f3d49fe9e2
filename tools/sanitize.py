"""Calls every op forward and backward on small, odd and shifted inputs: short enough for compute-sanitizer.

A result that is off is an error too, because a tool that watches memory sees no wrong index within an allocation.
"""

import argparse
import sys
from pathlib import Path

import torch

import fastelbo

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import ops

SHAPES = [(0, 5), (7, 1), (5, 3), (3, 31), (2, 1024), (3, 257), (1, 20_011)]
LAYERS = [  # sizes of images, and how many channels
    *((layer, (5, 7), {}) for layer in ops.CONVOLUTIONS.values()),
    (
        ops.Convolution(fastelbo.masked_conv2d, (7, 7), {"mask_type": "A"}),
        (7, 9),
        {"channels": 1, "outputs": 16},
    ),
    (
        ops.Convolution(fastelbo.masked_conv2d, (3, 3), {"mask_type": "B", "activation": "glu", "channel_groups": 3}),
        (5, 3),
        {"images": 1, "channels": 17, "outputs": 30},
    ),
    (
        ops.Convolution(fastelbo.masked_conv2d, (5, 5), {"mask_type": "B", "activation": "relu", "dilation": 2}),
        (6, 11),
        {"images": 3, "channels": 32, "outputs": 64},
    ),
]
FEW, FEW_LAYERS = (2, 5), (4, 5)  # an even and an odd place each: that chooses the type
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def shifted(x, offset: int) -> torch.Tensor:
    """A leaf with x's values, in an allocation that ends with the last of them."""
    room = torch.zeros(offset + x.numel(), dtype=x.dtype, device=x.device)
    return room[offset:].view(x.shape).copy_(x.detach()).requires_grad_()


def results(op, inputs, backend, number: int):
    outputs = op(*inputs, backend=backend, noise_offset=number)
    grads = torch.autograd.grad([output.float().sum() for output in outputs], inputs)
    return [tensor.detach().float() for tensor in (*outputs, *grads)]


def compare(got, want, dtype, what):
    error = (got - want).abs().max() / want.abs().max() if want.numel() else 0.0
    assert error < TOLERANCE[dtype], f"{what}: off by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="two shapes of each op and two layers: within a minute")
    options = parser.parse_args()
    device = torch.device(options.device)
    names = [name for name in fastelbo.backends.BACKENDS if fastelbo.backends.why_not(name, device) is None]
    backends = [name for name in names if name != "reference"]
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # of ours, too
    calls = 0
    shapes, layers = (FEW, FEW_LAYERS) if options.few else (range(len(SHAPES)), range(len(LAYERS)))
    many = [(op, k, SHAPES[k], {}) for op in ops.KERNELS.values() for k in shapes]
    many += [(LAYERS[k][0], k, *LAYERS[k][1:]) for k in layers]
    for op, number, size, counts in many:
        dtype = torch.bfloat16 if number % 2 else torch.float32
        made = op.inputs(size, dtype, device="cpu", **counts)
        expected = results(op, made, "reference", number)  # on a CPU: nothing of torch's own has to be watched
        inputs = [shifted(x.to(device), (number + k) % 4) for k, x in enumerate(made)]
        for backend in backends:
            for got, want in zip(results(op, inputs, backend, number), expected, strict=True):
                compare(got.cpu(), want, dtype, f"{op.name} on {backend}, {tuple(inputs[0].shape)}, {dtype}")
            calls += 1
    print(f"{calls} calls on {', '.join(backends)} agree with the reference")


if __name__ == "__main__":
    main()
