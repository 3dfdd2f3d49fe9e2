"""Drawing images from PixelCNNs, at the cost of each pixel's new work only."""

import contextlib
import copy
import math
import operator
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fastelbo import _checks, _library, _seed, backends
from fastelbo.reference.noise import philox_uniform
from fastelbo.reference.sampling import Line, Scattered, Section, draw
from fastelbo.sampling.network import PIXEL, Const, Conv
from fastelbo.sampling.program import Program
from fastelbo.sampling.trace import trace

__all__ = ["IncrementalSampler"]

METHODS = ("cached", "naive", "fixed_point")
ORDERS = ("raster", "wavefront")
_SEEN = 4096  # pixels of a large image that the check computes


class IncrementalSampler:
    r"""Draws images of a causal network pixel after pixel, each feature once; or gives logits to an entropy coder.

    A plain loop runs the whole network for every pixel. Here what depends on the rows above a pixel only (the vertical
    stack of a Gated PixelCNN) is computed a row at a time, the rest when its pixel or colour comes, and kept as long as
    other pixels read it. The values are those of the full forward, up to the order of additions.

    The network may consist of the layers of fastelbo.nn, nn.Conv2d with 1 x 1 kernels, torch's pointwise layers and
    functions, BatchNorm2d, dropout (none is applied), +, -, * and /, cat, chunk, split and slices of channels, a pad
    above or to the left with the slice that undoes it, and of any containers, residual and skip links. What depends on
    the condition alone may be anything. The network is copied, in evaluation mode: what is trained afterwards does not
    show.

    What a network does in Python that these steps do not show (its own autocast, a global hook, state that a forward
    changes) makes other images than its own. So the first draw, or the first reset, takes two random images through the
    steps and through the network itself: logits that differ by more than rounding are an error.

    The caches take n times

    .. math:: 4 \sum_v \text{width}_v \, (W + \text{left}_v + \text{right}_v)\, (\text{up}_v + 1) \text{ bytes},

    the sum being over features v that are read at other pixels than their own, as far as `left`, `right` and `up`, or
    are computed by rows, with channels padded to a multiple of 16 for each colour; others take width_v alone, a spatial
    condition width_v H W, and the wavefront needs up_v + H rows of all. `cache_bytes` has the exact number.

    Args:
        model: a module, from images [N, C, H, W] to logits [N, K C, H, W] with the colours innermost: channel
            k C + c belongs to colour c, so that logits.unflatten(1, (K, C)) is [N, K, C, H, W].
        image_shape: (C, H, W).
        levels: K, where the outputs are logits of a softmax over grey levels; 2 also for a network of one output, the
            logit of level 1, beside which level 0 has 0. None for other outputs, which step and commit work with.
        values: what the network takes for each level, K numbers; 0 to K - 1 where None.
        conditional: whether the model takes a second argument, the condition.
        order: "raster", or "wavefront": pixels of several rows together, each row a few columns behind the one above,
            which takes W + L (H - 1) steps in place of H W, with L = k//2 + 1 for kernels of k x k (W at most). For
            networks without a vertical stack.
        backend: "reference" (plain torch, any device), or in float32 "cpu" (C++) or "cuda" (CUDA C++, a launch for each
            row of pixels); the fastest that can run the model where None.
        check: whether the first draw compares the steps with the network's own forward, which takes the steps of two
            images and two forwards, of large images the first rows alone; more where rounding is in doubt.

    Attributes:
        steps: how many draws an image takes: pixels, or fronts of pixels, times the groups of colours.

    Raises:
        ValueError: a network that is not causal, or whose outputs do not fit C and levels; shapes and names.
        NotImplementedError: a layer that the sampler does not know, naming it; a backend that cannot run the model. At
            the first draw or reset, steps whose logits are not the network's own.

    Source:
        Ramachandran et al. 2017, "Fast Generation for Convolutional Autoregressive Models"; Song et al. 2021,
        "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving" (fixed_point).

    Example:
        >>> conv = fastelbo.nn.MaskedConv2d(1, 16, 5, mask_type="A", activation="relu")
        >>> model = torch.nn.Sequential(conv, torch.nn.Conv2d(16, 4, 1))
        >>> sampler = fastelbo.sampling.IncrementalSampler(model, (1, 6, 7), levels=4)
        >>> sampler.sample(2, seed=0).shape
        torch.Size([2, 1, 6, 7])
        >>> sampler.steps
        42
    """

    def __init__(
        self,
        model: nn.Module,
        image_shape: "Sequence[int]",
        *,
        levels: "int | None" = None,
        values: "torch.Tensor | Sequence[float] | None" = None,
        conditional: bool = False,
        order: str = "raster",
        backend: "str | None" = None,
        check: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module; got {type(model).__name__}")
        if not isinstance(check, bool):
            raise TypeError(f"check must be a bool; got {type(check).__name__}")
        if not isinstance(image_shape, Sequence):
            raise TypeError(f"image_shape must be (C, H, W), all at least 1; got {image_shape!r}")
        shape = tuple(image_shape)
        if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"image_shape must be (C, H, W), all at least 1; got {shape}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        if levels is not None:
            if isinstance(levels, bool) or not hasattr(levels, "__index__"):
                raise TypeError(f"levels must be an int or None; got {type(levels).__name__}")
            levels = operator.index(levels)
            if levels < 2:
                raise ValueError(
                    f"levels must be at least 2 (a network with one output for each colour has 2); got {levels}"
                )
        self.image_shape, self.order, self.conditional, self.check = shape, order, conditional, check
        tensors = [*model.parameters(), *model.buffers()]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32
        self.backend = _choose(self.device, self.dtype, backend)
        self.model = _copied(model, self.dtype)
        # Of a copy that shares the parameters alone, since a forward may keep what it meets.
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        with torch.no_grad():  # as it is drawn from
            self._network = trace(copy.deepcopy(self.model, parameters), shape[0], conditional, bernoulli=levels == 2)
        outputs = len(self._network.logits.channels) // shape[0]
        if levels is not None and levels != outputs:
            raise ValueError(
                f"levels must be {max(outputs, 2)}: the model has {outputs * shape[0]} outputs for {shape[0]} "
                f"colour(s); got {levels}"
            )
        self.levels = levels
        if levels is None and values is not None:
            raise ValueError("values must come with levels; got them alone")
        self.values = torch.as_tensor(
            range(outputs) if values is None else values, dtype=self.dtype, device=self.device
        )
        if self.values.shape != (outputs,):
            raise ValueError(
                f"values must be one number for each of {outputs} levels; got shape {tuple(self.values.shape)}"
            )
        if order == "wavefront" and (rowwise := [s for s in self._network.steps if s.out.phase != PIXEL]):
            raise ValueError(
                "order must be raster for a network whose features depend on whole rows above, as those of a vertical "
                f"stack do ({len(rowwise)} of its {len(self._network.steps)} steps); got {order!r}"
            )
        self._programs: dict[tuple, _Compiled] = {}
        self._run: _Run | None = None
        self._lag: int | None = None
        if not conditional:
            with torch.no_grad():
                self._compiled(self._constants(None))

    # What the network is

    @property
    def lag(self) -> int:
        """Columns by which the wavefront has a row follow the one above it."""
        if self._lag is None:
            self._lag = self._any_program().lag
        return self._lag

    @property
    def stages(self) -> list[list[int]]:
        """The colours of a pixel that are drawn together, in order."""
        return [list(stage) for stage in self._network.stages]

    @property
    def steps(self) -> int:
        """How many draws an image takes, and how often step and commit are called."""
        _, rows, columns = self.image_shape
        fronts = columns + self.lag * (rows - 1) if self.order == "wavefront" else rows * columns
        return fronts * len(self._network.stages)

    def cache_bytes(self, n: int = 1) -> int:
        """Bytes that the caches of n images take, as the class's formula has it.

        A condition counts as one of a class until a spatial one has been given.
        """
        return n * self._any_program().size * self.dtype.itemsize

    def __repr__(self):
        return (
            f"IncrementalSampler({type(self.model).__name__}, {self.image_shape}, levels={self.levels}, "
            f"order={self.order!r}, backend={self.backend!r})"
        )

    # Whole images

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: "torch.Tensor | None" = None,
        *,
        init: "torch.Tensor | None" = None,
        mask: "torch.Tensor | None" = None,
        temperature: float = 1.0,
        seed: "int | torch.Tensor | None" = None,
        generator: "torch.Generator | None" = None,
        noise_offset: int = 0,
        method: str = "cached",
        progress: bool = False,
    ) -> torch.Tensor:
        """Draws images, or completes some that are known in part.

        The draw of a colour of a pixel depends on the seed, on the index of that element in the sample and on the
        probabilities alone: level k is the first whose cumulative probability exceeds element e's uniform number
        (docs/noise.md). One image does not depend on the others of its batch, bit for bit on the compiled backends, and
        all methods and backends give the same images, as long as no uniform number falls between two roundings of a
        probability, which differ in the sixth digit.

        Args:
            n: the number of images.
            cond: the condition, as the model takes it, of n images.
            init: integers [n, C, H, W], the levels of known pixels; with mask.
            mask: bool, broadcasts to [n, C, H, W]: True where init is known, and kept.
            temperature: the logits are divided by it; 0 for the likeliest level.
            seed: an int, or an int64 tensor of one element.
            generator: a torch.Generator to draw the seed from. Without either it comes from torch's default one.
            noise_offset: global index of the first image's first element, for a batch that is part of a larger one: i C
                H W where i images come before it.
            method: "cached"; "naive", a full forward for every draw; or "fixed_point", full forwards of all pixels with
                the same noise until nothing changes, which is exact and at most one more than there are steps.
            progress: whether to show a bar (of tqdm).

        Returns:
            levels, int64 [n, C, H, W].

        Raises:
            ValueError: a shape, value or name; levels=None; logits that make no distribution.
            ImportError: progress without tqdm.
        """
        if self.levels is None:
            raise ValueError("levels must be given to sample; without them there are step and commit")
        _count("n", n)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        shape = (n, *self.image_shape)
        _checks.noise_arguments(None, seed, generator, noise_offset, None, temperature, shape, self.device)
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0; got {temperature}")
        image, known = self._completion(n, init, mask)
        cond = self._condition(n, cond)
        uniforms = philox_uniform(_seed.as_seed(seed, generator, self.device), image.shape, noise_offset=noise_offset)
        with _without_autocast(self.device):
            draw_all = {"cached": self._cached, "naive": self._naive, "fixed_point": self._fixed_point}[method]
            draw_all(image, known, cond, uniforms, abs(float(temperature)), progress)  # -0.0 is 0
        if bool((image < 0).any()):
            raise ValueError("model must return logits that make a distribution; got NaN or infinity in some")
        return image

    def _cached(self, image, known, cond, uniforms, temperature, progress):
        self._draw(self._started_run(len(image), cond), image, known, uniforms, self.values, temperature, progress)

    def _draw(self, run, image, known, uniforms, values, temperature, progress=False, seen=None):
        """Draws what is not known; seen [n, C, H, W, K] receives the logits."""
        chunk = self.image_shape[2] * len(self._network.stages)
        for first in _progress(range(0, self.steps, chunk), progress):
            end = min(first + chunk, self.steps)
            if self.backend != "reference":
                run.draw(image, known, uniforms, values, temperature, first, end, seen)
                continue
            for step in range(first, end):
                logits, where = run.advance(step), self._where(step)
                if seen is not None:
                    seen[where] = logits.movedim(1, -1)
                drawn = draw(logits, uniforms[where], temperature)
                if known is not None:
                    drawn = torch.where(known[where], image[where], drawn)
                image[where] = drawn
                run.commit(step, values[drawn.clamp(min=0)])

    def _naive(self, image, known, cond, uniforms, temperature, progress):
        for step in _progress(range(self.steps), progress):
            logits, where = self._logits(image, cond), self._where(step)
            drawn = draw(logits.movedim(1, -1)[where].movedim(-1, 1), uniforms[where], temperature)
            image[where] = drawn if known is None else torch.where(known[where], image[where], drawn)

    def _fixed_point(self, image, known, cond, uniforms, temperature, progress):
        for _ in _progress(range(self.steps + 1), progress):
            drawn = draw(self._logits(image, cond), uniforms, temperature)
            if known is not None:
                drawn = torch.where(known, image, drawn)
            if torch.equal(drawn, image):
                return
            image.copy_(drawn)

    def _logits(self, image, cond):
        """The model's own, [n, K, C, H, W]."""
        x = self.values[image.clamp(min=0)]
        return self._outputs(self.model, x, cond)

    def _outputs(self, model, x, cond):
        """A model's, [n, K, C, H, W]."""
        outputs = (model(x, cond) if self.conditional else model(x)).unflatten(1, (-1, self.image_shape[0]))
        if self.levels == 2 and outputs.shape[1] == 1:
            return torch.cat([torch.zeros_like(outputs), outputs], 1)
        return outputs

    # Which colours of which pixels a step is about

    def _colours(self, step):
        return self._network.stages[step % len(self._network.stages)]

    def _pixels(self, step):
        front = step // len(self._network.stages)
        _, rows, columns = self.image_shape
        if self.order == "raster":
            return [divmod(front, columns)]
        return [(row, front - self.lag * row) for row in range(rows) if 0 <= front - self.lag * row < columns]

    def _where(self, step):
        rows, columns = zip(*self._pixels(step), strict=True)
        colours, rows, columns = (torch.tensor(i, device="cpu") for i in (self._colours(step), rows, columns))
        return slice(None), colours[:, None], rows, columns

    # What is checked once

    def _started_run(self, n, cond) -> "_Run":
        """A run of n images, of a program that is checked."""
        run = _Run(self, n, cond)
        if self.check and not run.compiled.checked:
            self._lower(run.compiled)._compare(cond)
            run.compiled.checked = True
        return run

    def _lower(self, compiled):
        """A sampler of the first rows of large images, whose program is the same but for their number."""
        _, rows, columns = self.image_shape
        deepest = max(reads.up for reads in compiled.program.reads.values())
        seen = min(rows, max(deepest + 2, -(-_SEEN // columns)))  # until all rows that are kept have been reused
        if seen == rows or any(compiled.program.spatial.values()):
            return self
        lower = copy.copy(self)
        lower.image_shape = self.image_shape[0], seen, columns
        lower._programs, lower._lag = {}, None
        return lower

    def _compare(self, cond):
        """Raises unless the steps give the network's own logits on two random images.

        Both sum in an order of their own. What is rounded K times, in chains of sums and from layer to layer, goes
        astray by about the root of K units. Where that does not explain a difference, the network runs in float64, and
        there once more with every parameter moved by about a unit in its last place at random, which moves the logits
        as far as rounding each product once does.
        """
        shape = (2, *self.image_shape)
        cond = None if cond is None else cond[torch.arange(2, device=cond.device) % len(cond)]
        generator = torch.Generator(device="cpu").manual_seed(0)
        outputs = len(self._network.logits.channels) // self.image_shape[0]
        if self.levels is None:
            pixels = math.prod(shape)
            values = torch.randn(max(pixels, outputs), generator=generator, dtype=self.dtype, device="cpu")
            values, image = values.to(self.device), torch.arange(pixels, device=self.device).reshape(shape)
        else:
            values = self.values
            image = torch.randint(self.levels, shape, generator=generator, dtype=torch.int64, device="cpu")
            image = image.to(self.device)
        run = _Run(self, 2, cond)
        got = torch.empty(*shape, outputs, dtype=self.dtype, device=self.device)
        known = torch.ones(shape, dtype=torch.bool, device=self.device)
        uniforms = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._draw(run, image, known, uniforms, values, 1.0, seen=got)
        got = got.movedim(-1, 1)

        # In two calls, of one image and of two: state and batch must make no difference.
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        own, x = copy.deepcopy(self.model, parameters), values[image]
        with _full_precision():  # so that what narrows a product is the network's own doing
            one, two = (self._own(own, x[:n], None if cond is None else cond[:n]) for n in (1, 2))
        rounded = sum(i.inputs + 1 for section in run.program.sections for i in section)
        unit, root = torch.finfo(self.dtype).eps, math.sqrt(max(rounded, 1))
        bound = root * unit * _largest(two)
        if bool(_close(got, two, bound).all() and _close(got[:1], one, bound).all()):
            return
        exact, again, moved = (logits.double() for logits in self._own_exactly(x, cond, generator))
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
        if bool(equal.all()):
            return
        exact = torch.where(_close(got, exact, bound), two, exact)
        off = (got - exact).abs().masked_fill(equal, -1).nan_to_num(math.inf)
        _, level, colour, row, column = (int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        raise NotImplementedError(
            "model must compute what its layers' steps show; got a forward whose logits differ from theirs on random "
            f"images, in {int((~equal).sum())} of {equal.numel()}, by up to {float(off.max()):.3g} (row {row}, column "
            f"{column}, colour {colour}, output {level}), where rounding explains {float(bound):.3g}: "
            "it does something that a trace does not see, as a hook of all modules, autocast, or state that a forward "
            'changes; method="naive" draws by the network itself'
        )

    def _own(self, model, x, cond):
        """What a copy of the network computes from images, whatever it does to them."""
        return self._outputs(model, x.clone(), None if cond is None else cond.clone())

    def _own_exactly(self, x, cond, generator):
        """In float64 (or in the network's dtype, if it does not run in that): twice, and with parameters a unit off."""
        unit = torch.finfo(self.dtype).eps
        for dtype in (torch.float64, self.dtype):
            model, x = copy.deepcopy(self.model).to(dtype), x.to(dtype)
            cond = cond.to(dtype) if cond is not None and cond.is_floating_point() else cond
            try:
                exact, again = (self._own(model, x, cond) for _ in range(2))
            except (RuntimeError, TypeError, ValueError):
                if dtype == self.dtype:
                    raise
                continue  # tensors that are no buffers keep their dtype
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    signs = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8, device="cpu")
                    tensor.mul_(1 + unit * (2 * signs.to(tensor.device, dtype) - 1))
            return exact, again, self._own(model, x, cond)
        raise AssertionError

    def _completion(self, n, init, mask):
        """The image to draw into, and which of it is known."""
        shape = (n, *self.image_shape)
        if (init is None) != (mask is None):
            raise ValueError(
                f"init and mask must both be given, or neither; got no {'init' if init is None else 'mask'}"
            )
        if init is None:
            return torch.zeros(shape, dtype=torch.int64, device=self.device), None
        if not isinstance(init, Tensor) or init.is_floating_point() or init.dtype == torch.bool:
            raise TypeError(f"init must be a tensor of integers; got {getattr(init, 'dtype', type(init).__name__)}")
        if init.shape != shape:
            raise ValueError(f"init must be of shape {shape}; got {tuple(init.shape)}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask must be a tensor of bool; got {getattr(mask, 'dtype', type(mask).__name__)}")
        try:
            known = mask.to(self.device).expand(shape).contiguous()
        except RuntimeError:
            raise ValueError(f"mask must broadcast to shape {shape}; got {tuple(mask.shape)}") from None
        image = torch.where(known, init.to(self.device, torch.int64), 0).contiguous()
        if bool(((image < 0) | (image >= self.levels)).any()):
            raise ValueError(f"init must be between 0 and {self.levels - 1} where mask is True")
        return image, known

    # Pixel after pixel

    @torch.no_grad()
    def reset(self, n: int, cond: "torch.Tensor | None" = None) -> "IncrementalSampler":
        """Starts n images, for step and commit.

        Args:
            n: the number of images.
            cond: the condition, as the model takes it.
        """
        _count("n", n)
        with _without_autocast(self.device):
            self._run = self._started_run(n, self._condition(n, cond))
        return self

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """Rows and columns that the next step is about: one pixel in raster order."""
        return self._pixels(self._started().step)

    @property
    def colours(self) -> list[int]:
        """The colours of these pixels that the next step is about."""
        return self._colours(self._started().step)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """The outputs for `colours` at `pixels`, given all that was committed.

        An image's are the same bits whatever the batch that it is in and the number of threads, as a decoder needs.

        Returns:
            [n, K, colours, pixels]: logits, where the model's outputs are such.

        Raises:
            RuntimeError: before reset, or after the last step.
        """
        run = self._started()
        with _without_autocast(self.device):
            return run.advance(run.step, alone=True).clone()

    @torch.no_grad()
    def commit(self, values: torch.Tensor) -> None:
        """Tells what `colours` at `pixels` are, and goes on to the next step.

        Args:
            values: [n, colours, pixels]: levels, or with levels=None what the network takes.

        Raises:
            ValueError: a wrong shape, or a level out of range.
            TypeError: levels that are not integers, or values that are not a tensor.
            RuntimeError: before reset, or without a step.
        """
        run = self._started()
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a tensor; got {type(values).__name__}")
        shape = (run.n, len(self.colours), len(self.pixels))
        if values.shape != shape:
            raise ValueError(f"values must be of shape {shape}; got {tuple(values.shape)}")
        if run.advanced != run.step:
            raise RuntimeError("commit must follow a step")
        values = values.to(self.device)
        if self.levels is not None:
            if values.is_floating_point():
                raise TypeError(f"values must be integers, levels; got {values.dtype}")
            if bool(((values < 0) | (values >= self.levels)).any()):
                raise ValueError(f"values must be between 0 and {self.levels - 1}")
            values = self.values[values.long()]
        run.commit(run.step, values.to(self.dtype))
        run.step += 1

    def _started(self):
        if self._run is None:
            raise RuntimeError("step and commit must follow reset")
        if self._run.step == self.steps:
            raise RuntimeError(f"all {self.steps} steps are done: reset starts other images")
        return self._run

    # Conditions and programs

    def _condition(self, n, cond):
        if (cond is not None) != self.conditional:
            raise ValueError(f"cond must {'' if self.conditional else 'not '}be given: conditional={self.conditional}")
        if cond is None:
            return None
        if not isinstance(cond, Tensor):
            raise TypeError(f"cond must be a tensor; got {type(cond).__name__}")
        if cond.dim() == 0 or len(cond) != n:
            raise ValueError(f"cond must be of {n} images; got shape {tuple(cond.shape)}")
        return cond.to(self.device, self.dtype) if cond.is_floating_point() else cond.to(self.device)

    def _constants(self, cond):
        """The values of all constants, each [n or 1, C or 1, H, W] or with 1 for both H and W."""
        operands = self._operands()
        known = {}
        fixed = {c: self._constant(c, known, layer) for c, layer in operands.items() if not c.of_image}
        if cond is None or len(fixed) == len(operands):
            return fixed
        own = [const for const in operands if const not in fixed]
        with _one_thread(self.device):  # image by image: libraries' sums depend on the batch
            images = [{**known, "cond": image.clone(), "all": cond} for image in cond.split(1)]
            found = {const: [self._constant(const, image, operands[const]) for image in images] for const in own}
        return {const: fixed[const] if const in fixed else torch.cat(found[const]) for const in operands}

    def _operands(self):
        """All constants, with whether they are a layer's cond, which may be [n, C]."""
        found = {}
        for step in self._network.steps:
            layer = isinstance(step, Conv)
            for operand in (step.cond, step.residual) if layer else getattr(step, "operands", ()):
                if isinstance(operand, Const):
                    found[operand] = layer
        return found

    def _constant(self, const, known, layer):
        try:
            value = const(known)
        except (RuntimeError, IndexError, ValueError, AttributeError) as error:
            if "cond" not in known:
                raise
            shape = tuple(known["all"].shape)
            raise ValueError(f"cond must be what the model takes; got shape {shape}: {error}") from error
        if isinstance(value, int | float):
            value = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        if layer and value.dim() == 2:
            value = value[:, :, None, None]
        if const.of_image and value.dim() == 4 and len(value) != 1:
            raise ValueError(f"cond must lead to features of one image from that of one; got {len(value)}")
        value = value.reshape((1,) * (4 - value.dim()) + value.shape)
        size, image = value.shape[2:], self.image_shape[1:]
        if any(own not in (1, whole) for own, whole in zip(size, image, strict=True)):
            raise ValueError(
                f"cond must lead to features of {image[0]} x {image[1]} pixels or of one; got {size[0]} x {size[1]}"
            )
        return value if size == (1, 1) else value.expand(*value.shape[:2], *image)

    def _compiled(self, constants):
        spatial = {const: value.shape[2:] != (1, 1) for const, value in constants.items()}
        key = tuple(spatial.values())
        if key not in self._programs:
            self._programs[key] = _Compiled(self, spatial)
        return self._programs[key]

    def _any_program(self) -> Program:
        if not self._programs:
            spatial = dict.fromkeys(self._operands(), False)
            return Program(self._network, self.image_shape, self.order == "wavefront", spatial, self.dtype)
        return next(reversed(self._programs.values())).program


class _Compiled:
    """A program, as its backend takes it."""

    def __init__(self, sampler, spatial):
        program = Program(sampler._network, sampler.image_shape, sampler.order == "wavefront", spatial, sampler.dtype)
        self.program, self.weights, self.checked = program, program.weights.to(sampler.device), False
        if sampler.backend != "reference":
            self.encoded = program.encode().to(sampler.device)
        else:
            self.sections = [Section(section, self.weights) for section in program.sections]


class _Run:
    """n images being drawn: their caches, and how far they are."""

    def __init__(self, sampler, n, cond):
        self.sampler, self.n, self.step, self.advanced = sampler, n, 0, -1
        constants = sampler._constants(cond)
        self.compiled = sampler._compiled(constants)
        self.program = program = self.compiled.program
        self.workspace = torch.zeros(n, program.size, dtype=sampler.dtype, device=sampler.device)
        for const, channels, buffer in program.constants.values():
            self._store(constants[const], channels, buffer)

    def _store(self, value, channels, buffer):
        """A constant's channels, as the buffer has them."""
        channels = torch.tensor(channels, device=value.device)
        if value.shape[1] == 1:
            channels = torch.zeros_like(channels)
        elif int(channels.max()) >= value.shape[1]:
            raise ValueError(f"cond must lead to {int(channels.max()) + 1} channels or more; got {value.shape[1]}")
        ref = buffer.ref
        rows, columns = value.shape[2:]
        view = self.workspace.as_strided(
            (self.n, rows, columns, buffer.width),
            (self.program.size, ref.row_stride, ref.column_stride, 1),
            ref.offset,
        )
        view[..., torch.tensor(buffer.positions, device="cpu")] = value[:, channels].permute(0, 2, 3, 1).to(view)

    def _place(self, step, workspace):
        pixels = self.sampler._pixels(step)
        return Line(workspace, *pixels[0], 1) if len(pixels) == 1 else Scattered(workspace, pixels)

    def advance(self, step, alone=False):
        """Computes the outputs of a step, if that has not been done: [n, K, colours, pixels].

        On the reference each image alone, or all together, which is faster, and whose sums depend on the batch.
        """
        if self.advanced != step:
            if self.sampler.backend != "reference":
                _ADVANCE(self.compiled.encoded, self.compiled.weights, self.workspace, step, step + 1)
            elif alone:
                with _one_thread(self.sampler.device):
                    for image in self.workspace.split(1):
                        self._advance(step, image)
            else:
                self._advance(step, self.workspace)
            self.advanced = step
        program = self.program
        positions = torch.tensor(program.logit_positions, device=self.workspace.device)
        positions = positions.reshape(-1, program.colours)[:, self.sampler._colours(step)]
        first, last = int(positions.min()), int(positions.max())
        read = self._place(step, self.workspace).read(program.logits, last - first + 1, offset=first)
        return read[:, :, positions - first].movedim(1, 3)

    def _advance(self, step, workspace):
        stages = len(self.sampler._network.stages)
        front, stage = divmod(step, stages)
        start, *levels, end = self.compiled.sections
        columns = self.sampler.image_shape[2]
        if stage == 0:
            if front:
                levels[-1].run(self._place(step - 1, workspace))
            if self.sampler.order == "raster" and front % columns == 0:
                row = front // columns
                if row:
                    end.run(Line(workspace, row - 1, 0, columns))
                start.run(Line(workspace, row, 0, columns))
        levels[stage].run(self._place(step, workspace))

    def commit(self, step, values):
        """What the network takes for the colours of a step: [n, colours, pixels]."""
        place, ref = self._place(step, self.workspace), self.program.image.ref
        for index, colour in enumerate(self.sampler._colours(step)):
            place.write(ref, values[:, index, :, None], self.program.image.positions[colour])

    def draw(self, image, known, uniforms, values, temperature, first, end, seen=None):
        """Draws steps first to end - 1 in compiled code; seen [n, C, H, W, K] receives the logits."""
        compiled, draw = self.compiled, (image, known, uniforms, values, temperature, first, end, seen)
        _DRAW(compiled.encoded, compiled.weights, self.workspace, *draw)


def _choose(device, dtype, backend):
    wanted = backends.OVERRIDE if backend is None else backend
    reasons = {"reference": None, "triton": "it has no sampler"}
    for name in ("cpu", "cuda"):
        reasons[name] = backends.why_not(name, device)
        if reasons[name] is None and dtype != torch.float32:
            reasons[name] = f"it computes in float32, and the model is in {dtype}"
    if wanted is None:
        return next(name for name in ("cpu", "cuda", "reference") if reasons[name] is None)
    if not isinstance(wanted, str) or wanted not in backends.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(backends.BACKENDS)}; got {wanted!r}")
    if reasons[wanted] is None:
        return wanted
    why = "; ".join(f"{name}: {reason or 'can run it'}" for name, reason in reasons.items())
    raise NotImplementedError(f"backend {wanted!r} cannot run this sampler ({why})")


def _count(name, value):
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _copied(model, dtype):
    """A copy of a module for evaluation, without the hooks that only set a weight."""
    # of tensors in a graph, as those hooks leave them, there is no deepcopy
    held = [t for part in model.modules() for t in vars(part).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in held})
        for part in copied.modules():
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
                    hook.remove(part)
                    del part._forward_pre_hooks[key]
        return copied.to(dtype).eval().requires_grad_(False)
    except Exception as error:  # of any kind: it is the user's code
        raise TypeError(f"model must be one that copy.deepcopy copies; got {type(model).__name__}: {error}") from error


def _largest(numbers):
    return numbers.nan_to_num(0, 0, 0).abs().max()


def _close(a, b, bound):
    """Where numbers, or what is none, are the same within a bound."""
    return (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= bound)


_ONE = threading.Lock()


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


@contextlib.contextmanager
def _one_thread(device):
    """Runs on one thread of a CPU: libraries divide sums among threads."""
    if device.type != "cpu":
        yield
        return
    with _ONE:
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


def _without_autocast(device):
    return torch.autocast(device.type, enabled=False)


def _progress(steps, wanted):
    if not wanted:
        return steps
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(steps, desc="sampling")


_ADVANCE = _library.define_helper(
    "sampler_advance",
    "(Tensor program, Tensor weights, Tensor(a!) workspace, int first, int end) -> ()",
    lambda program, weights, workspace, first, end: None,
)
_DRAW = _library.define_helper(
    "sampler_draw",
    "(Tensor program, Tensor weights, Tensor(a!) workspace, Tensor(b!) image, Tensor? known, Tensor uniforms,"
    " Tensor values, float temperature, int first, int end, Tensor(c!)? seen=None) -> ()",
    lambda program, weights, workspace, image, known, uniforms, values, temperature, first, end, seen=None: None,
)
