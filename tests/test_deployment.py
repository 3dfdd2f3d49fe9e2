"""Programs that leave Python: ONNX, exported and compiled programs, TorchScript."""

import io
import itertools
import warnings

import fresh_python
import numpy as np
import onnxruntime
import pytest
import torch

import fastelbo
from fastelbo.nn import GatedMaskedConv2d, GaussianNLLLoss, HorizontalStackConv2d, MaskedConv2d, VerticalStackConv2d


class Calls(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


M, S, X = (randn(4, 6, seed=i) for i in range(3))
NEAR = 1e-4 * M  # where differences of numbers near 1 would have no digits
IMAGE = randn(2, 3, 6, 5)
BLOCK = GatedMaskedConv2d(3, 6, 3, cond_channels=4)

CASES = {
    "kl": (fastelbo.gaussian_kl, (M, S)),
    "kl near the prior": (fastelbo.gaussian_kl, (NEAR, NEAR)),
    "kl of diffusers' scale": (lambda m, s: fastelbo.gaussian_kl(m, s, scale=fastelbo.Scale.diffusers()), (M, 20 * S)),
    "kl with a prior and free bits": (
        lambda m, s, p: fastelbo.gaussian_kl(m, s, p, s, scale=fastelbo.Scale.softplus(), free_bits=0.1), (M, S, X),
    ),
    "kl under a mask": (lambda m, s, x: fastelbo.gaussian_kl(m, s, mask=x > 0, reduction="mean"), (M, S, X)),
    "log_prob": (fastelbo.gaussian_log_prob, (X, M, S)),
    "nll": (lambda x, m: fastelbo.gaussian_nll(x, m, 0.0, beta_nll=0.5), (X, M)),
    "rsample of noise": (lambda m, s, n: fastelbo.gaussian_rsample(m, s, noise=n), (M, S, X)),
    "rsample of a seed": (lambda m, s, k: fastelbo.gaussian_rsample(m, s, seed=k), (M, S, torch.tensor([5]))),
    "samples of a seed": (
        lambda m, s, k: fastelbo.gaussian_rsample_kl(m, s, seed=k, num_samples=3, temperature=0.5),
        (M, S, torch.tensor([2**40 + 7])),
    ),
    "elbo": (lambda x, m, s: fastelbo.gaussian_elbo(x, m, 0.0, m, s), (X, M, S)),
    "posterior of diffusers": (
        lambda p: fastelbo.compat.diffusers.DiagonalGaussianDistribution(p).kl(), (randn(2, 6, 4, 4),),
    ),
    "Normal": (lambda x, m, s: fastelbo.distributions.Normal(m, s.exp(), validate_args=False).log_prob(x), (X, M, S)),
    "GaussianNLLLoss": (GaussianNLLLoss(), (M, X, S.exp())),
    "mask A with groups": (MaskedConv2d(3, 6, 3, channel_groups=3), (IMAGE,)),
    "mask B with a gate": (MaskedConv2d(3, 6, 5, mask_type="B", activation="tanh_sigmoid", dilation=2), (IMAGE,)),
    "vertical stack": (VerticalStackConv2d(3, 6, 3), (IMAGE,)),
    "horizontal stack": (HorizontalStackConv2d(3, 6, 3, mask_type="A", activation="glu"), (IMAGE,)),
    "gated block": (BLOCK, (IMAGE, IMAGE, randn(2, 4))),
}  # fmt: skip


def to_onnx(function, inputs):
    """A function as ONNX Runtime has it."""
    module = (function if isinstance(function, torch.nn.Module) else Calls(function)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*values):
        values = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(np.asarray(found)) for found in session.run(None, values)]

    return run


class EveryCase(torch.nn.Module):
    """All of them as one program, for an export takes a second."""

    def __init__(self):
        super().__init__()
        functions = [function for function, _ in CASES.values()]
        self.cases = torch.nn.ModuleList([f if isinstance(f, torch.nn.Module) else Calls(f) for f in functions])

    def forward(self, *inputs):
        given, found = iter(inputs), []
        for case, (_, own) in zip(self.cases, CASES.values(), strict=True):
            outputs = case(*itertools.islice(given, len(own)))
            found.append(outputs if isinstance(outputs, tuple) else (outputs,))
        return found


@pytest.fixture(scope="module")
def computed():
    """What the program computes of what it has not seen, others of the same shapes; and what the functions do."""
    inputs = [x.clone() for _, inputs in CASES.values() for x in inputs]
    run = to_onnx(EveryCase(), tuple(inputs))
    others = [x if x.dtype == torch.int64 else x.flip(0) for x in inputs]
    with torch.no_grad():
        want = EveryCase().eval()(*others)
    found = iter(run(*others))
    return {case: ([next(found) for _ in outputs], list(outputs)) for case, outputs in zip(CASES, want, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_onnx_computes_what_the_kernels_do(case, computed):
    near = "near" in case
    torch.testing.assert_close(*computed[case], rtol=1e-5 if near else 1e-4, atol=0 if near else 1e-5)


def test_onnx_draws_anew_in_every_run():
    zeros = torch.zeros(4, 500)
    run = to_onnx(lambda m, s: fastelbo.gaussian_rsample(m, s, num_samples=50), (zeros, zeros.clone()))
    first, second = (run(zeros + 2, zeros)[0] for _ in range(2))
    assert first.shape == (50, 4, 500) and not torch.equal(first, second)
    for z in (first, second):
        assert abs(z.mean() - 2) < 0.02 and abs(z.std() - 1) < 0.02 and abs(((z - 2) ** 4).mean() - 3) < 0.2


def test_an_explicit_backend_has_no_onnx():
    """The first of torch's two tries hears from us, the second one has the last word."""
    with pytest.raises(
        torch.onnx.errors.OnnxExporterError, match=r"No ONNX function found for .*op='fastelbo.gaussian_kl_fwd'"
    ):
        to_onnx(lambda m, s: fastelbo.gaussian_kl(m, s, backend="cpu"), (M, S))


LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
print(program(torch.ones(4, 6), torch.zeros(4, 6)).tolist(), "fastelbo" in sys.modules)
"""


def loaded(path):
    """What a process that does not know of fastelbo makes of a program: its words."""
    done = fresh_python.run(LOAD, path, check=False)
    return done.stdout + done.stderr


def test_a_program_of_the_reference_is_plain_torch(tmp_path):
    program = torch.export.export(Calls(lambda m, s: fastelbo.gaussian_kl(m, s, backend="reference")), (M, S))
    assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    torch.export.save(program, tmp_path / "program.pt2")
    assert "[3.0, 3.0, 3.0, 3.0] False" in loaded(tmp_path / "program.pt2")


def test_a_program_of_kernels_asks_for_them(tmp_path):
    """In torch's own words, which docs/deployment.md quotes."""
    program = torch.export.export(Calls(fastelbo.gaussian_kl), (M, S))
    torch.export.save(program, tmp_path / "program.pt2")
    words = loaded(tmp_path / "program.pt2")
    assert "failed to resolve torch.ops.fastelbo.gaussian_kl_fwd.default" in words
    assert "Please import the custom op to register it" in words
    assert torch.equal(torch.export.load(tmp_path / "program.pt2").module()(M, S), fastelbo.gaussian_kl(M, S))


def test_traces_of_the_reference_are_torchscript():
    for function, inputs in (
        (Calls(lambda m, s: fastelbo.gaussian_kl(m, s, backend="reference")), (M, S)),
        (MaskedConv2d(3, 6, 3, backend="reference"), (IMAGE,)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced, file = torch.jit.trace(function, inputs), io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            again = torch.jit.load(file)
        others = tuple(x.flip(0) for x in inputs)
        torch.testing.assert_close(again(*others), function(*others))


@pytest.mark.slow
@pytest.mark.inductor
def test_a_compiled_package_of_kernels_asks_for_them(tmp_path):
    """In torch's own words, which docs/deployment.md quotes."""
    program, path = torch.export.export(Calls(fastelbo.gaussian_kl), (M, S)), str(tmp_path / "package.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(M, S), fastelbo.gaussian_kl(M, S))
    code = "import sys, torch; torch._inductor.aoti_load_package(sys.argv[1])"
    done = fresh_python.run(code, path, check=False)
    assert "Could not find schema for fastelbo::gaussian_kl_fwd" in done.stderr
