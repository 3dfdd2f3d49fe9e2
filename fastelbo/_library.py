"""The one place that talks to torch.library: schemas are written once, in Python; compiled code implements them."""

import functools
import importlib
import math
import os

import torch

from fastelbo.reference.scale import arithmetic_dtype

_OLDEST_TORCH = (2, 10)

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _OLDEST_TORCH:
    raise ImportError(f"fastelbo needs torch {'.'.join(map(str, _OLDEST_TORCH))} or newer; got {torch.__version__}")

# Two namespaces, so that Triton and CUDA C++ can both run tensors of one device.
_library = torch.library.Library("fastelbo", "DEF")
_triton_library = torch.library.Library("fastelbo_triton", "DEF")

#: Triton's interpreter runs the Triton kernels on the CPU, slowly: for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def define(name: str, schema: str, fake, check=None, differentiable=None) -> "dict[str, torch._ops.OpOverload]":
    """Defines an op with a kernel per backend; returns what each backend calls.

    Two overloads of one schema share the kernels: "kernel", which the op's autograd.Function calls and is returned, and
    the default one, by whose name exported programs and other callers call it, which checks what it is given and passes
    gradients on.

    The Triton kernel of <op>_fwd is the function of that name in fastelbo.kernels.<op>: it takes the results to fill,
    which `fake` has allocated, and the op's arguments.

    Args:
        name: <op>_fwd or <op>_bwd.
        schema: its arguments and returns, without the name.
        fake: allocates what it returns; the same argument names as the schema.
        check: raises for arguments that no kernel can take. (Compiled kernels check theirs, too.)
        differentiable: takes the backend and the op's arguments, and computes the op so that gradients pass. Without it
            the op has no derivative, and a backward through it says so.
    """
    kernels = {}
    checked = fake if check is None else functools.partial(_checked, check, fake)
    for library, backend in ((_library, "cpu"), (_triton_library, "triton")):
        kernels[backend] = _define(library, f"{name}.kernel", schema, fake)
        op = _define(library, name, schema, checked)
        differentiate(op, differentiable and functools.partial(differentiable, backend), check, library)
    device = "CPU" if INTERPRETED else "CUDA"
    _triton_library.impl(f"{name}.kernel", functools.partial(_run_triton, name, fake), device)
    _triton_library.impl(name, functools.partial(_run_triton, name, checked), device)
    return {"cuda": kernels["cpu"], **kernels}


def by_name(op):
    """The default overload of what define returned: what an exported program is to hold."""
    return op.overloadpacket.default


def _checked(check, fake, *arguments, **keywords):
    check(*arguments, **keywords)
    return fake(*arguments, **keywords)


def define_helper(name: str, schema: str, fake, tags=()) -> "torch._ops.OpOverload":
    """Defines an op that is the same for every backend.

    Args:
        name, schema, fake: as in define.
        tags: torch.Tag values.
    """
    return _define(_library, name, schema, fake, tags)


def _define(library, name, schema, fake, tags=()):
    library.define(f"{name}{schema}", tags=tags)
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    name, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, library.ns), name), overload or "default")


def differentiate(op, differentiable=None, check=None, library=_library) -> None:
    """Says what runs where an op is called with tensors that want a gradient.

    Args:
        op: of this library.
        differentiable, check: take the op's arguments; as in define.
        library: that defined the op.
    """

    def below_autograd(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    if differentiable is None:
        differentiable = functools.partial(_WithoutDerivative.apply, below_autograd, op.__name__.partition(".")[0])

    def run(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
            if check is not None:
                check(*arguments)
            return differentiable(*arguments)
        return below_autograd(*arguments)

    library.impl(op, run, "Autograd")


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, name, *arguments):
        ctx.name = name
        return call(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name} must not be differentiated; got a gradient for what it returned")


@functools.cache
def _triton_kernel(name):
    return getattr(importlib.import_module(f"fastelbo.kernels.{name.rpartition('_')[0]}"), name)


def _run_triton(name, fake, *arguments):
    results = fake(*arguments)
    device = (results if isinstance(results, torch.Tensor) else results[0]).device
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                _triton_kernel(name)(results, *arguments)
        else:
            _triton_kernel(name)(results, *arguments)
    except Exception as error:
        raise RuntimeError(f"{name} failed in Triton on {device}: {error}") from error
    return results


def implement(name: str, function) -> None:
    """Implements an op of ours in Python, for every device."""
    _library.impl(name, function, "CompositeExplicitAutograd")


def empty(shape, dtype, like):
    """A fake result: the memory order of `like` where that has the full shape, else contiguous (csrc: allocate)."""
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def empty_gradient(shape, like, *inputs):
    """A fake gradient of `like`: in the arithmetic's precision where it has yet to be summed (allocate_gradient)."""
    same = like.numel() == math.prod(shape)
    return empty(shape, like.dtype if same else arithmetic_dtype(*inputs), like)


def empty_sample(mean, shape, num_samples, dtype):
    """A fake sample."""
    if num_samples is None:
        return empty(shape, dtype, mean)
    return mean.new_empty((num_samples, *shape), dtype=dtype)


def empty_terms(shape, event_ndim, like, inputs):
    """A fake KL or log-density."""
    dtype = arithmetic_dtype(*inputs)
    if event_ndim == 0:
        return empty(shape, dtype, like)
    return like.new_empty(shape[: len(shape) - event_ndim], dtype=dtype)


def kernel_event_ndim(event_ndim, reduction, shape):
    """An elementwise term that is reduced afterwards is summed in the kernel, which then need not write it out."""
    return len(shape) if event_ndim == 0 and reduction != "none" else event_ndim


def reduce(value, reduction, shape, event_ndim, mask=None):
    """Reduces what the kernel returned for kernel_event_ndim; a mean is over the events that count."""
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    if mask is not None:
        return total / counted_events(mask, shape, event_ndim).sum()
    return total / math.prod(shape[: len(shape) - event_ndim])


def counted_events(mask, shape, event_ndim):
    """The events of which the mask lets an element count: bool, of the shape less the event's dimensions."""
    mask = mask.reshape((1,) * (len(shape) - mask.dim()) + mask.shape)
    if event_ndim > 0:
        if 0 in shape[len(shape) - event_ndim :]:
            mask = mask.expand(shape)  # a mask that broadcasts has elements where the event has none
        mask = mask.sum(dim=tuple(range(-event_ndim, 0))) > 0  # any() of a DTensor is wrong over a sharded dimension
    return mask.expand(shape[: len(shape) - event_ndim])


def input_gradients(grads, inputs, wanted):
    """Gradients of the broadcast shape as those of the inputs; None where none is wanted."""
    return tuple(
        sum_to(grad, tensor) if want else None for grad, tensor, want in zip(grads, inputs, wanted, strict=False)
    )


def sum_to(grad, tensor):
    """A gradient of the broadcast shape as the gradient of `tensor`."""
    return summed(grad, tensor.shape, tensor.dtype)


def summed(grad, shape, dtype):
    """A gradient summed to what has broadcast, samples in front included: rounded once, after the sum."""
    if grad.shape != shape:
        ahead = grad.dim() - len(shape)
        dims = [*range(ahead), *(d for d in range(ahead, grad.dim()) if shape[d - ahead] != grad.shape[d])]
        wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
        grad = grad.sum(dims, keepdim=True, dtype=wide).reshape(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)


def transformed() -> bool:
    """Whether a torch.func transform is under way; in a traced function too, whose guards cover it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, which would also import torch._dynamo and Triton.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced() -> bool:
    """Whether what runs is being recorded, or runs on tensors that stand for others."""
    return torch.compiler.is_compiling() or transformed() or torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def distinct(*tensors):
    """The tensors; a view in place of one that comes again, because torch.compile traces no Function that gets a tensor
    twice (a sigma that two Gaussians share)."""
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(
        tensor.view_as(tensor)
        if tensor is not None and any(tensor is other for other in tensors[:position])
        else tensor
        for position, tensor in enumerate(tensors)
    )


def differentiable_backward() -> bool:
    """Whether this backward must itself be differentiable (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def reference_gradients(function, inputs, wanted, upstream):
    """Gradients of function(*inputs), differentiable themselves; None for an input that wants none.

    Args:
        function: plain torch, from the inputs to a tensor or a tuple of tensors.
        inputs: tensors or None.
        wanted: a flag for each input.
        upstream: the gradient of each output, or None.
    """
    with torch.enable_grad():
        outputs = function(*inputs)
        if isinstance(outputs, torch.Tensor):
            outputs = (outputs,)
        used = [(out, grad) for out, grad in zip(outputs, upstream, strict=True) if grad is not None]
        targets = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
        if not used or not targets:
            return tuple(None for _ in inputs)
        found = iter(
            torch.autograd.grad(
                [out for out, _ in used], targets, [grad for _, grad in used], create_graph=True, allow_unused=True
            )
        )
    return tuple(next(found) if want else None for want in wanted)
