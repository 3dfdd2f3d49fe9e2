"""Whether a network's steps compute what it computes itself: a trace does not see all that Python does."""

import contextlib
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastelbo.sampling.run import Plan, Run

SEEN = 4096  # pixels of a large image that the check computes


def rows_to_compare(run: Run) -> int:
    """How many rows of large images the check computes, whose program is the same but for their number."""
    _, rows, columns = run.plan.image_shape
    if any(const.spatial for const in run.plan.network.constants()):
        return rows
    deepest = max(reads.up for reads in run.program.reads.values())
    wanted = max(deepest + 2, -(-SEEN // columns))  # until all rows that are kept have been reused
    return min(rows, wanted + (wanted == run.plan.form.size[0]))  # what depends on the size shows


def compare(
    plan: Plan,
    model: nn.Module,
    outputs: "Callable[[nn.Module, Tensor, Tensor | None], Tensor]",
    levels: "int | None",
    values: Tensor,
    cond: "Tensor | None",
) -> None:
    """Raises unless the steps give the network's own logits on two random images.

    Both sum in an order of their own. What is rounded K times, in chains of sums and from layer to layer, goes astray
    by about the root of K units. Where that does not explain a difference, the network runs in float64, and there once
    more with every parameter moved by about a unit in its last place at random, which moves the logits as far as
    rounding each product once does.

    Args:
        plan: of the images to compare.
        model: the network, which nothing here changes.
        outputs: from a copy of it, images and their conditions to logits [n, K, C, H, W].
        levels, values: the sampler's.
        cond: conditions of any number of images.
    """
    cond = None if cond is None else cond[torch.arange(2, device=cond.device) % len(cond)]
    generator = torch.Generator(device="cpu").manual_seed(0)
    values, image = _random_images(plan, levels, values, generator)
    run = Run(plan, 2, cond)
    got = _logits_of_steps(run, image, values)

    def own(network, x, cond):
        """What a copy of the network computes from images, whatever it does to them."""
        return outputs(network, x.clone(), None if cond is None else cond.clone())

    # In two calls, of one image and of two: state and batch must make no difference.
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    copied, x = copy.deepcopy(model, parameters), values[image]
    try:
        with _full_precision():  # so that what narrows a product is the network's own doing
            one, two = (own(copied, x[:n], None if cond is None else cond[:n]) for n in (1, 2))
    except Exception as error:  # of any kind: it is the user's code
        raised = f"{type(error).__name__}: {error}"
        raise NotImplementedError(f"model must take any number of images; got {raised}") from error
    rounded = sum(i.inputs + 1 for section in run.program.sections for i in section)
    unit, root = torch.finfo(plan.dtype).eps, math.sqrt(max(rounded, 1))
    bound = root * unit * _largest(two)
    if bool(_close(got, two, bound).all() and _close(got[:1], one, bound).all()):
        return
    exact, again, moved = (logits.double() for logits in _exactly(model, own, x, cond, generator))
    unit *= _largest(exact)
    if not bool(_close(again, exact, unit).all()):
        raise NotImplementedError(
            "model must compute the same at each call; got a forward whose logits for the same images differ by "
            f"{float(_largest(again - exact)):.3g} at its second call: it draws numbers of its own, or changes its "
            'state; method="naive" draws by the network itself'
        )
    bound = root * (_largest(moved - exact) + unit)
    # The naive loop draws by the forward in its own dtype, and what that does (autocast) float64 does not show.
    equal = _close(got, exact, bound) & _close(got, two, 2 * bound) & _close(got[:1], one, 2 * bound)
    if not bool(equal.all()):
        raise _difference(got, torch.where(_close(got, exact, bound), two, exact), equal, bound)


def _random_images(plan, levels, values, generator):
    """What the network takes for each level, and the levels of two images."""
    shape = (2, *plan.image_shape)
    if levels is None:
        pixels = math.prod(shape)
        values = torch.randn(max(pixels, len(values)), generator=generator, dtype=plan.dtype, device="cpu")
        return values.to(plan.device), torch.arange(pixels, device=plan.device).reshape(shape)
    image = torch.randint(levels, shape, generator=generator, dtype=torch.int64, device="cpu")
    return values, image.to(plan.device)


def _logits_of_steps(run, image, values):
    """[n, K, C, H, W] of images that are known."""
    known = torch.ones(image.shape, dtype=torch.bool, device=image.device)
    uniforms = torch.zeros(image.shape, dtype=torch.float32, device=image.device)
    colours = run.program.colours
    seen = run.workspace.new_empty(*image.shape, len(run.program.logit_positions) // colours)
    for steps in run.plan.rows_of_steps():
        run.draw(image, known, uniforms, values, 1.0, steps, seen)
    logits = seen.movedim(-1, 1)
    return logits.log_softmax(1) if run.plan.network.normalised else logits


def _exactly(model, own, x, cond, generator):
    """In float64 (or in the network's dtype, if it does not run in that): twice, and with parameters a unit off."""
    own_dtype = x.dtype
    unit = torch.finfo(own_dtype).eps
    for dtype in (torch.float64, own_dtype):
        copied, x = copy.deepcopy(model).to(dtype), x.to(dtype)
        cond = cond.to(dtype) if cond is not None and cond.is_floating_point() else cond
        try:
            exact, again = (own(copied, x, cond) for _ in range(2))
        except (RuntimeError, TypeError, ValueError):
            if dtype == own_dtype:
                raise
            continue  # tensors that are no buffers keep their dtype
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8, device="cpu")
                tensor.mul_(1 + unit * (2 * signs.to(tensor.device, dtype) - 1))
        return exact, again, own(copied, x, cond)
    raise AssertionError


def _difference(got, exact, equal, bound):
    """The error for logits that are not the network's own."""
    off = (got - exact).abs().masked_fill(equal, -1).nan_to_num(math.inf)
    _, level, colour, row, column = (int(i) for i in torch.unravel_index(off.argmax(), off.shape))
    return NotImplementedError(
        "model must compute what its layers' steps show; got a forward whose logits differ from theirs on random "
        f"images, in {int((~equal).sum())} of {equal.numel()}, by up to {float(off.max()):.3g} (row {row}, column "
        f"{column}, colour {colour}, output {level}), where rounding explains {float(bound):.3g}: "
        "it does something that a trace does not see, as a hook of all modules, autocast, or state that a forward "
        'changes; method="naive" draws by the network itself'
    )


def _largest(numbers):
    return numbers.nan_to_num(0, 0, 0).abs().max()


def _close(a, b, bound):
    """Where numbers, or what is none, are the same within a bound."""
    return (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= bound)


@contextlib.contextmanager
def _full_precision():
    """Has torch round no operands of float32 products, as it may to TF32 or bfloat16."""
    settings = [getattr(torch.backends, name) for name in ("cudnn", "mkldnn")]
    settings = [setting.conv for setting in settings] + [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
