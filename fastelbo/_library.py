"""The one place that talks to torch.library: schemas are written once, in Python; compiled code implements them."""

import math

import torch

_library = torch.library.Library("fastelbo", "DEF")


def define(name: str, schema: str, fake, tags=()) -> "dict[str, torch._ops.OpOverload]":
    """Defines the op fastelbo::<name>; returns what each backend calls.

    Args:
        name: the op's name.
        schema: its arguments and returns, without the name.
        fake: what it returns on tensors without data; the same argument names as the schema.
        tags: torch.Tag values.
    """
    _library.define(f"{name}{schema}", tags=tags)
    torch.library.register_fake(f"fastelbo::{name}", fake, lib=_library)
    return {"cpu": getattr(torch.ops.fastelbo, name).default}


def implement(name: str, function) -> None:
    """Implements an op of ours in Python, for every device."""
    _library.impl(name, function, "CompositeExplicitAutograd")


def empty(shape, dtype, like):
    """A fake result: the memory order of `like` where that has the full shape, else contiguous (csrc: allocate)."""
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype)
    return like.new_empty(shape, dtype=dtype)


def empty_sample(mean, shape, num_samples, dtype):
    """A fake sample."""
    if num_samples is None:
        return empty(shape, dtype, mean)
    return mean.new_empty((num_samples, *shape), dtype=dtype)


def arithmetic(*inputs):
    """The precision that the ops compute in, and return KL and log-densities in."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in inputs)
    return torch.float64 if double else torch.float32


def empty_terms(shape, event_ndim, like, inputs):
    """A fake KL or log-density."""
    dtype = arithmetic(*inputs)
    if event_ndim == 0:
        return empty(shape, dtype, like)
    return like.new_empty(shape[: len(shape) - event_ndim], dtype=dtype)


def kernel_event_ndim(event_ndim, reduction, shape):
    """An elementwise term that is reduced afterwards is summed in the kernel, which then need not write it out."""
    return len(shape) if event_ndim == 0 and reduction != "none" else event_ndim


def reduce(value, reduction, shape, event_ndim):
    """Reduces what the kernel returned for kernel_event_ndim."""
    if reduction == "none":
        return value
    total = value.sum()
    if reduction == "sum":
        return total
    return total / math.prod(shape[: len(shape) - event_ndim])


def input_gradients(grads, inputs, wanted):
    """Gradients of the broadcast shape as those of the inputs; None where none is wanted."""
    return tuple(
        sum_to(grad, tensor) if want else None for grad, tensor, want in zip(grads, inputs, wanted, strict=False)
    )


def sum_to(grad, tensor):
    """A gradient of the broadcast shape as the gradient of `tensor`."""
    if grad.shape != tensor.shape:
        grad = grad.sum_to_size(tensor.shape)
    return grad if grad.dtype == tensor.dtype else grad.to(tensor.dtype)


@torch.compiler.assume_constant_result
def transformed() -> bool:
    """Whether a torch.func transform is under way; in a traced function too, whose guards cover it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


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
