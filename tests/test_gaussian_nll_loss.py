"""GaussianNLLLoss against nn.GaussianNLLLoss, on the inputs that torch tests its own with."""

import re

import fresh_python
import pytest
import torch
from torch import nn

from fastelbo.nn import GaussianNLLLoss
from fastelbo.testing import assert_within_budget

# In a process of its own: importing torch's test inputs changes flags and the environment of the whole process.
COLLECT = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

(op,) = (op for op in op_db if op.name == "nn.functional.gaussian_nll_loss")
(module,) = (module for module in module_db if module.module_cls is torch.nn.GaussianNLLLoss)
samples = [((s.input, *s.args), s.kwargs) for s in op.sample_inputs("cpu", torch.float64)]
for s in module.module_inputs_func(module, "cpu", torch.float64, False, True):
    samples.append((s.forward_input.args, s.constructor_input.kwargs))
errors = [
    ((e.sample_input.input, *e.sample_input.args), e.sample_input.kwargs, e.error_type, e.error_regex)
    for e in op.error_inputs("cpu")
]
torch.save((samples, errors), sys.argv[1])
"""


@pytest.fixture(scope="module")
def torchs_own(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    fresh_python.run(COLLECT, path)
    return torch.load(path, weights_only=False)


def evaluate(loss, arguments):
    leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    value = loss(*leaves)
    upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return value.detach(), *torch.autograd.grad(value, wanted, upstream.to(value.dtype))


def test_torchs_sample_inputs(torchs_own):
    samples, _ = torchs_own
    assert len(samples) > 100
    for arguments, keywords in samples:
        actual = evaluate(GaussianNLLLoss(**keywords), arguments)
        expected = evaluate(nn.GaussianNLLLoss(**keywords), arguments)
        torch.testing.assert_close(actual, expected)


def test_torchs_error_inputs(torchs_own):
    _, errors = torchs_own
    assert len(errors) >= 3
    for arguments, keywords, error, message in errors:
        with pytest.raises(error, match=message):
            GaussianNLLLoss(**keywords)(*arguments)


def test_is_nn_gaussian_nll_loss():
    loss = GaussianNLLLoss(full=True, eps=1e-3, reduction="sum")
    assert isinstance(loss, nn.GaussianNLLLoss)
    assert (loss.full, loss.eps, loss.reduction) == (True, 1e-3, "sum")
    with pytest.raises(TypeError, match="positional argument"):
        GaussianNLLLoss(True)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_budget(dtype, reduction, full):
    input, target = torch.randn(2, 64, 48).to(dtype)
    var = torch.rand(64, 48).add(0.05).to(dtype)
    keywords = {"reduction": reduction, "full": full}
    exact = evaluate(nn.GaussianNLLLoss(**keywords), [x.double() for x in (input, target, var)])
    plain = evaluate(nn.GaussianNLLLoss(**keywords), [input, target, var])
    actual = evaluate(GaussianNLLLoss(**keywords), [input, target, var])
    assert actual[0].dtype == torch.float32
    for name, *three in zip(("loss", "d_input", "d_target", "d_var"), actual, exact, plain, strict=True):
        assert_within_budget(*three, name=name)


@pytest.mark.parametrize("var", [0.0, 1e-9, 1e-6, 1e-3], ids=str)
def test_gradient_ignores_the_limit(var):
    """As torch has it: the gradient of a variance below eps is that at eps."""
    arguments = [torch.randn(5, dtype=torch.float64), torch.zeros(5), torch.full((5,), var, dtype=torch.float64)]
    actual = evaluate(GaussianNLLLoss(reduction="sum"), arguments)
    torch.testing.assert_close(actual, evaluate(nn.GaussianNLLLoss(reduction="sum"), arguments))


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (4,), (1, 3)], ids=str)
@pytest.mark.parametrize("target_shape", [(4, 3), (1, 3), (4, 1), (2, 4, 3)], ids=str)
def test_broadcasts(shape, target_shape):
    arguments = [torch.randn(4, 3), torch.randn(target_shape), torch.rand(shape) + 0.1]
    for reduction in ("none", "mean", "sum"):
        actual = evaluate(GaussianNLLLoss(reduction=reduction), arguments)
        torch.testing.assert_close(actual, evaluate(nn.GaussianNLLLoss(reduction=reduction), arguments))


def test_one_variance_for_all():
    input, target = torch.randn(2, 4, 3)
    torch.testing.assert_close(GaussianNLLLoss()(input, target, 0.3), nn.GaussianNLLLoss()(input, target, 0.3))


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[1.0, -1.0, 1.0]] * 2)), {}),
        ((torch.zeros(2, 3), torch.zeros(2, 3), -0.5), {}),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)), {}),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3, 3)), {}),
        ((torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(2, 3)), {}),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3)), {"reduction": "batchmean"}),
    ],
    ids=["negative", "negative-number", "too-few-dims", "wrong-size", "target", "reduction"],
)
def test_raises_what_torch_raises(arguments, keywords):
    with pytest.raises((ValueError, RuntimeError)) as expected:
        nn.GaussianNLLLoss(**keywords)(*arguments)
    with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
        GaussianNLLLoss(**keywords)(*arguments)


def test_nan_reaches_the_loss():
    ones = torch.ones(2, 3)
    assert GaussianNLLLoss()(ones, ones, torch.full((2, 3), float("nan"))).isnan()


def test_never_waits_for_a_device():
    """Tensors without values stand for those on a device: looking at them is an error, and torch's loss looks."""
    arguments = [torch.empty(4, 3, device="meta") for _ in range(3)]
    with pytest.raises(RuntimeError, match="meta"):
        nn.GaussianNLLLoss()(*arguments)
    assert GaussianNLLLoss()(*arguments).shape == ()


def test_compiles_without_a_break():
    arguments = [torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3)]
    compiled = torch.compile(GaussianNLLLoss(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, arguments), evaluate(nn.GaussianNLLLoss(), arguments))
    with pytest.raises(RuntimeError, match="negative"):
        compiled(*arguments[:2], -arguments[2])


def test_gradcheck():
    arguments = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    var = (torch.rand(4, 1, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(GaussianNLLLoss(), (*arguments, var))
    assert torch.autograd.gradgradcheck(GaussianNLLLoss(), (*arguments, var))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_small_losses_keep_their_digits(reduction):
    """The constant is left out, not taken off."""
    x = torch.zeros(10**6 if reduction == "mean" else 10**3)
    loss = GaussianNLLLoss(reduction=reduction)(x, x + 1e-3, x + 1)
    exact = 0.5 * float(torch.tensor(1e-3)) ** 2 * (len(x) if reduction == "sum" else 1)
    torch.testing.assert_close(loss.double(), torch.full_like(loss, exact, dtype=torch.float64), rtol=2e-7, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_targets_may_be_integers(full):
    target = torch.randint(0, 256, (4, 3), dtype=torch.uint8)
    mean, var = torch.randn(4, 3), torch.rand(4, 3) + 0.1
    want = torch.nn.GaussianNLLLoss(full=full)(mean.double(), target, var.double())
    torch.testing.assert_close(GaussianNLLLoss(full=full)(mean, target, var).double(), want, rtol=1e-6, atol=0)


def test_errors_name_the_modules_arguments():
    ones = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"^target must be float32"):
        GaussianNLLLoss()(ones, ones.bool(), ones)
    with pytest.raises(TypeError, match=r"^var must be float32"):
        GaussianNLLLoss()(ones, ones, ones.long())
