"""Tries an installed fastelbo: python smoke.py, beside ops.py, in an environment of torch, fastelbo and nothing else.

Every op on every backend that runs here against the reference, the compiler, a network with its sampler, and the report
of python -m fastelbo. `make wheel-test` runs it; the test suite tests the same in depth.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

if not torch.cuda.is_available():  # Triton's interpreter runs the kernels on the CPU; read when they are imported
    os.environ["TRITON_INTERPRET"] = "1"

from ops import CONVOLUTIONS, OPS

import fastelbo
from fastelbo.testing import assert_within_budget, gaussian


def run(op, dtype, inputs_dtype, backend, device):
    """The op's results and gradients by name, for values of inputs_dtype computed in dtype."""
    convolved = {"size": (9, 8), "images": 3, "channels": 24, "outputs": 16}
    shapes = op.shapes(**convolved) if op in CONVOLUTIONS.values() else op.shapes((5, 37))
    if op.drawn:
        shapes["noise"] = (5, 37)
    inputs = {
        name: gaussian(shape, seed=seed)[0].to(device, inputs_dtype).to(dtype).requires_grad_(name != "noise")
        for seed, (name, shape) in enumerate(shapes.items())
    }
    results = op(**inputs, backend=backend)
    wanted = {name: tensor for name, tensor in inputs.items() if name != "noise"}
    upstream = [gaussian(result.shape, seed=9)[0].to(result) for result in results]
    gradients = torch.autograd.grad(results, list(wanted.values()), upstream)
    found = {f"result {index}": result.detach() for index, result in enumerate(results)}
    return found | {f"d_{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def try_ops(backend, device):
    for case, op in OPS.items():
        for dtype in (torch.float32, torch.bfloat16):
            exact = run(op, torch.float64, dtype, "reference", device)
            plain = run(op, dtype, dtype, "reference", device)
            for name, actual in run(op, dtype, dtype, backend, device).items():
                assert actual.dtype == plain[name].dtype, (case, name)
                assert_within_budget(actual, exact[name], plain[name], f"{case} on {backend}, {dtype}, {name}")


def try_noise(backend, device):
    mean, s = gaussian((5, 37))
    z, _ = fastelbo.gaussian_rsample_kl(mean.to(device), s.to(device), seed=7, backend=backend)
    reference = fastelbo.gaussian_rsample(mean, s, seed=7, backend="reference")
    torch.testing.assert_close(z.cpu(), reference, rtol=0, atol=1e-5)


def try_compiler():
    def loss(mean, s, x):
        z, kl = fastelbo.gaussian_rsample_kl(mean, s, seed=1)
        return (fastelbo.gaussian_nll(x, z, 0.0) + kl).mean()

    inputs = [tensor.requires_grad_() for tensor in (*gaussian((4, 9)), gaussian((4, 9), seed=1)[0])]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs), rtol=1e-6, atol=1e-7
    )


class PixelCNN(nn.Module):
    """Two gated blocks over grey images of 4 levels."""

    def __init__(self):
        super().__init__()
        self.first = fastelbo.nn.GatedMaskedConv2d(1, 8, 5, mask_type="A")
        self.second = fastelbo.nn.GatedMaskedConv2d(8, 8, 3)
        self.last = fastelbo.nn.MaskedConv2d(8, 4, 1, mask_type="B")

    def forward(self, x):
        v, h = self.first(x, x)
        v, h = self.second(v, h)
        return self.last(h)


def try_network():
    torch.manual_seed(0)
    model = PixelCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    levels = torch.randint(4, (16, 1, 1, 1)).expand(-1, 1, 6, 6)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(levels / 3.0), levels[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    images = [
        fastelbo.sampling.IncrementalSampler(model.eval(), (1, 6, 6), levels=4, backend=backend).sample(3, seed=0)
        for backend in ("reference", "cpu")
    ]
    assert images[0].shape == (3, 1, 6, 6) and torch.equal(*images)


def try_report():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    report = subprocess.run(
        [sys.executable, "-m", "fastelbo"], env=environment, capture_output=True, text=True, check=True
    )
    assert not report.stderr, report.stderr
    if torch.version.cuda and not torch.cuda.is_available() and Path(fastelbo.__file__).with_name("_cuda.so").exists():
        assert "cuda      not usable: torch sees no GPU" in report.stdout, report.stdout  # so the library has loaded
    return report.stdout


def main():
    package = Path(fastelbo.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not what was installed in {sys.prefix}"
    assert (package / "py.typed").exists()
    print(try_report())
    names = [name for name in fastelbo.backends.BACKENDS if fastelbo.backends.usable(name) is None]
    names = [name for name in names if fastelbo.backends.no_device(name) is None]
    assert {"reference", "cpu"} <= set(names), fastelbo.backends.usable("cpu")
    for backend in names[1:]:
        device = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
        try_ops(backend, device)
        try_noise(backend, device)
        print(f"{backend}: {len(OPS)} calls in float32 and bfloat16, with gradients, and the noise: as the reference")
    try_compiler()
    print("torch.compile, aot_eager, fullgraph: as eager")
    try_network()
    print("a PixelCNN learns; its sampler draws the same on cpu and reference")


if __name__ == "__main__":
    main()
