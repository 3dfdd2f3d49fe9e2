"""What the ops and their autograd.Functions share: what torch is doing with a call, and gradients."""

import functools

import torch


def transformed() -> bool:
    """Whether a torch.func transform is under way; in a traced function too, whose guards cover it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What torch.compiler.assume_constant_result does, which would also import torch._dynamo and Triton.
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced() -> bool:
    """Whether what runs is being recorded, or runs on tensors that stand for others."""
    return torch.compiler.is_compiling() or transformed() or torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def recorded(tensors) -> bool:
    """Whether autograd records what is computed from these tensors, of which any may be None."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def exported_to_onnx() -> bool:
    """Whether what runs is on its way to ONNX, which knows no op of ours."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def recordable(function):
    """A decorator for an autograd.Function: it gets `record`, which is apply less what torch.func, which the reference
    serves, wants of it, and a fifth of a small op's time. Its backward is called as directly."""
    function.record = super(torch.autograd.Function, function).apply  # torch's C function, of this class
    function._backward_cls.apply = function.backward  # which torch would look for at every call
    return function


def record(function, tensors, options, backend):
    """What a recordable Function computes of tensors, and what is recorded of it."""
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(tensors), options, backend)
    return function.record(*tensors, options, backend)


def at_once(function, tensors, options, backend):
    """`record` of a call that nobody traces; what it computes alone where nothing is to be recorded."""
    if recorded(tensors):
        return function.record(*tensors, options, backend)
    return function.compute(*tensors, options, backend)


def _distinct(tensors):
    """The tensors; a view in place of one that comes again, because torch.compile traces no Function that gets a tensor
    twice (a sigma that two Gaussians share)."""
    return tuple(
        tensor.view_as(tensor)
        if tensor is not None and any(tensor is other for other in tensors[:position])
        else tensor
        for position, tensor in enumerate(tensors)
    )


def under_autograd(op, differentiable=None):
    """What runs where an op may be called with tensors that want a gradient.

    Args:
        op: an op of ours, with kernels.
        differentiable: takes the op's arguments, and computes it so that gradients pass; as in _library.define.
    """

    def below_autograd(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*arguments)

    if differentiable is None:
        differentiable = functools.partial(_WithoutDerivative.apply, below_autograd, op.__name__.partition(".")[0])

    def run(*arguments):
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arguments):
            return differentiable(*arguments)
        return below_autograd(*arguments)

    return run


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, name, *arguments):
        ctx.name = name
        return call(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(f"{ctx.name} must not be differentiated; got a gradient for what it returned")


def input_gradients(grads, inputs, wanted):
    """Gradients of the broadcast shape as those of the inputs; None where none is wanted."""
    return tuple(
        summed(grad, tensor.shape, tensor.dtype) if want else None
        for grad, tensor, want in zip(grads, inputs, wanted, strict=False)
    )


def summed(grad, shape, dtype):
    """A gradient summed to what has broadcast, samples in front included: rounded once, after the sum."""
    if grad.shape != shape:
        ahead = grad.dim() - len(shape)
        dims = [*range(ahead), *(d for d in range(ahead, grad.dim()) if shape[d - ahead] != grad.shape[d])]
        wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
        grad = grad.sum(dims, keepdim=True, dtype=wide).reshape(shape)
    return grad if grad.dtype == dtype else grad.to(dtype)


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
