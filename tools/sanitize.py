"""Calls every op forward and backward on small, odd and shifted inputs: short enough for compute-sanitizer.

A result that is off is an error too, because a tool that watches memory sees no wrong index within an allocation.
"""

import argparse
import math

import torch

import fastelbo

OPS = {  # with how many tensors each takes
    "gaussian_rsample": (2,),
    "gaussian_kl": (2, 4),
    "gaussian_rsample_kl": (2, 4),
    "gaussian_log_prob": (3,),
}
SHAPES = [(0, 5), (7, 1), (5, 3), (3, 31), (2, 1024), (3, 257), (1, 20_011)]
LAYERS = [  # images, channels of input and output, rows, columns, size of the kernel, keywords
    (2, 1, 16, 7, 9, 7, {"mask_type": "A"}),
    (1, 17, 30, 5, 3, 3, {"mask_type": "B", "activation": "glu", "channel_groups": 3}),
    (3, 32, 64, 6, 11, 5, {"mask_type": "B", "activation": "relu", "dilation": 2}),
]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def view(shape, dtype, offset: int, device, seed: int) -> torch.Tensor:
    """Elements offset .. of an allocation that ends with the last of them."""
    count = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(offset + count, generator=generator).to(device, dtype)
    return values[offset:].view(shape).requires_grad_()


def results(op, inputs, backend, **keywords):
    outputs = getattr(fastelbo, op)(*inputs, backend=backend, **keywords)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad([output.float().sum() for output in outputs], inputs)
    return [tensor.detach().float() for tensor in (*outputs, *grads)]


def compare(got, want, dtype, what):
    error = (got - want).abs().max() / want.abs().max() if want.numel() else 0.0
    assert error < TOLERANCE[dtype], f"{what}: off by {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    names = [name for name in fastelbo.backends.BACKENDS if fastelbo.backends.why_not(name, device) is None]
    backends = [name for name in names if name != "reference"]
    calls = 0
    for op, arities in OPS.items():
        for arity in arities:
            for number, shape in enumerate(SHAPES):
                dtype = torch.bfloat16 if number % 2 else torch.float32
                inputs = [view(shape, dtype, (number + k) % 4, device, k) for k in range(arity)]
                keywords = {"seed": 5, "noise_offset": number} if "rsample" in op else {}
                expected = results(op, inputs, "reference", **keywords)
                for backend in backends:
                    for got, want in zip(results(op, inputs, backend, **keywords), expected, strict=True):
                        compare(got, want, dtype, f"{op} on {backend}, {shape}, {dtype}")
                    calls += 1
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for number, (images, inputs, outputs, rows, columns, size, keywords) in enumerate(LAYERS):
        dtype = torch.bfloat16 if number % 2 else torch.float32
        shapes = (images, inputs, rows, columns), (outputs, inputs, size, size), (1, outputs)
        x, weight, bias = (
            view((1, math.prod(shape)), dtype, number + k, device, k).reshape(shape) for k, shape in enumerate(shapes)
        )
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias[0])]
        expected = results("masked_conv2d", leaves, "reference", **keywords)
        for backend in backends:
            found = results("masked_conv2d", leaves, backend, **keywords)
            for got, want in zip(found, expected, strict=True):
                compare(got, want, dtype, f"masked_conv2d on {backend}, layer {number}, {dtype}")
            calls += 1
    print(f"{calls} calls on {', '.join(backends)} agree with the reference on {device}")


if __name__ == "__main__":
    main()
