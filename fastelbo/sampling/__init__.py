"""Drawing images from PixelCNNs, at the cost of each pixel's new work only."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastelbo import _checks, _seed
from fastelbo.reference.noise import philox_uniform
from fastelbo.reference.sampling import draw
from fastelbo.sampling import arguments, check, trace
from fastelbo.sampling.run import Plan, Run, progress_bar, without_autocast

__all__ = ["IncrementalSampler"]

METHODS = ("cached", "naive", "fixed_point")
ORDERS = ("raster", "wavefront")


class IncrementalSampler:
    r"""Draws images of a causal network pixel after pixel, each feature once; or gives logits to an entropy coder.

    A plain loop runs the whole network for every pixel. Here what depends on the rows above a pixel only (the vertical
    stack of a Gated PixelCNN) is computed a row at a time, the rest when its pixel or colour comes, and kept as long as
    other pixels read it. The values are those of the full forward, up to the order of additions.

    The network's own forward runs once, on tensors that know which number each of their elements is: shapes and
    Python's control flow are its own, hooks and masks that its author applies at a call are followed. It may compute
    with convolutions of stride 1 (the layers of fastelbo.nn, nn.Conv2d and nn.Linear, weighed and masked as it likes),
    torch's pointwise functions, +, -, \*, / and powers, BatchNorm2d, embeddings and one-hots of the image; dropout is
    not applied. Whatever moves elements may stand between: slices, pads, crops, reshapes, cat, stack, writes in place.
    It is causal if its taps are, where they end up. What depends on the condition alone may be anything, and what the
    logits do not depend on, too. The network is copied, in evaluation mode: what is trained afterwards does not show.

    What a run does not show (its own autocast, state that a forward changes, code that tells tensors from ours) makes
    other images than the network's own. So the first draw, or the first reset, takes two random images through the
    steps and through the network itself: logits that differ by more than rounding are an error.

    The caches take n times

    .. math:: 4 \sum_v \text{width}_v \, (W + \text{left}_v + \text{right}_v)\, (\text{up}_v + 1) \text{ bytes},

    the sum being over features v that are read at other pixels than their own, as far as `left`, `right` and `up`, or
    are computed by rows, with channels padded to a multiple of 16 for each colour; others take width_v alone, a spatial
    condition width_v H W, and the wavefront needs up_v + H rows of all. `cache_bytes` has the exact number.

    Args:
        model: a module, from images [N, C, H, W] to logits [N, K C, H, W] with the colours innermost: channel
            k C + c belongs to colour c, so that logits.unflatten(1, (K, C)) is [N, K, C, H, W]; or to [N, K, C, H, W],
            [N, C, K, H, W] or [N, C, H, W, K]. A log_softmax over the levels may be the last step. Images may be taken
            as integers, and those of one colour as [N, H, W].
        image_shape: (C, H, W).
        levels: K, where the outputs are logits of a softmax over grey levels; 2 also for a network of one output, the
            logit of level 1, beside which level 0 has 0. None for other outputs, which step and commit work with.
        values: what the network takes for each level, K numbers; 0 to K - 1 where None.
        conditional: whether the model takes a second argument, the condition. It is followed for each shape and dtype
            of one image's condition; until one was given, for a label or a vector that it may take.
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
        shape = arguments.checked_shape(image_shape)
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        levels = arguments.checked_levels(levels)
        self.image_shape, self.order, self.conditional, self.check = shape, order, conditional, check
        floats = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.device = floats[0].device if floats else torch.device("cpu")
        self.dtype = torch.float64 if any(t.dtype == torch.float64 for t in floats) else torch.float32
        self.backend = arguments.choose(self.device, self.dtype, backend)
        trace.check_signature(model, conditional)
        self.model = arguments.copied(model, self.dtype)
        self.levels = levels
        self.values: Any = None  # until the network has been followed
        self._given_values = values
        self._plans: dict[Any, Plan] = {}
        self._run: Run | None = None
        self._settle()

    def _settle(self):
        """Follows the network once, with a condition that it may take if it takes one."""
        if not self.conditional:
            self._plan_of(None).compiled  # noqa: B018
            return
        refused = []
        for guess in arguments.guesses(self.model, self.image_shape[1:], self.dtype, self.device):
            try:
                self._plan_of(guess)
            except (NotImplementedError, ValueError) as error:
                refused.append(error)
            else:
                return
        if refused and len({str(error) for error in refused}) == 1:
            raise refused[0]

    @torch.no_grad()  # as it is drawn from
    def _plan_of(self, cond, small=True):
        """How images are drawn with a condition of this kind."""
        key = None if cond is None else (cond.shape[1:], cond.dtype)
        if small and key in self._plans:
            return self._plans[key]
        # Of a copy that shares the parameters alone, since a forward may keep what it meets.
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        network, form = trace.network_of(
            arguments.replica(self.model, parameters),
            self.image_shape,
            None if cond is None else cond[:1],
            order=self.order,
            bernoulli=self.levels == 2,
            small=small and self.check,
            dtype=self.dtype,
            device=self.device,
        )
        outputs = len(network.logits.channels) // self.image_shape[0]
        if self.levels is not None and self.levels != outputs:
            raise ValueError(
                f"levels must be {max(outputs, 2)}: the model has {outputs * self.image_shape[0]} outputs for "
                f"{self.image_shape[0]} colour(s); got {self.levels}"
            )
        if form.integers and self.levels is None:
            raise ValueError("levels must be given for a model that takes integers; got None")
        values = arguments.checked_values(self._given_values, self.levels, outputs, self.dtype, self.device)
        if form.integers and not torch.equal(values, values.round()):
            raise ValueError("values must be integers, as the model takes them")
        plan = Plan(network, form, self.image_shape, self.order, self.dtype, self.device, self.backend)
        self.values, self._plans[key] = values, plan
        return plan

    @property
    def _plan(self):
        """That of the last kind of condition that was met."""
        if not self._plans:
            raise RuntimeError("the steps must follow a sample or a reset: they depend on the condition")
        return next(reversed(self._plans.values()))

    # What the network is

    @property
    def lag(self) -> int:
        """Columns by which the wavefront has a row follow the one above it."""
        return self._plan.lag

    @property
    def stages(self) -> list[list[int]]:
        """The colours of a pixel that are drawn together, in order."""
        return [list(stage) for stage in self._plan.network.stages]

    @property
    def steps(self) -> int:
        """How many draws an image takes, and how often step and commit are called."""
        return self._plan.steps

    def cache_bytes(self, n: int = 1) -> int:
        """Bytes that the caches of n images take, as the class's formula has it, with the last kind of condition."""
        return n * self._plan.compiled.program.size * self.dtype.itemsize

    def __getstate__(self):
        """All but the plans, which are made anew, and a run's numbers."""
        state = {name: value for name, value in vars(self).items() if name not in ("_plans", "_run")}
        size = self.image_shape[1:]
        state["kinds"] = [(key, plan.form.size != size, plan.compiled.checked) for key, plan in self._plans.items()]
        if (run := self._run) is not None:
            key = next(key for key, plan in self._plans.items() if plan is run.plan)
            state["run"] = key, run.n, run.workspace, run.step, run.advanced
        return state

    def __setstate__(self, state):
        kinds, run = state.pop("kinds"), state.pop("run", None)
        vars(self).update(state, _plans={}, _run=None)
        for key, small, checked in kinds:
            cond = None if key is None else torch.zeros(1, *key[0], dtype=key[1], device=self.device)
            self._plan_of(cond, small).compiled.checked = checked
        if run is not None:
            key, n, workspace, step, advanced = run
            self._run = Run.resumed(self._plans[key], n, workspace, step, advanced)

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
        n = arguments.check_count("n", n)
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
        shape = (n, *self.image_shape)
        noise_offset, _, temperature = _checks.noise_arguments(
            None, seed, generator, noise_offset, None, temperature, shape, self.device
        )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be finite and at least 0; got {temperature}")
        image, known = arguments.completion(init, mask, shape, self.levels, self.device)
        cond = self._condition(n, cond)
        uniforms = philox_uniform(_seed.as_seed(seed, generator, self.device), image.shape, noise_offset=noise_offset)
        with without_autocast(self.device):
            plan = self._plan_for(cond)
            draw_all = {"cached": self._cached, "naive": self._naive, "fixed_point": self._fixed_point}[method]
            draw_all(plan, image, known, cond, uniforms, abs(float(temperature)), progress)  # -0.0 is 0
        if bool((image < 0).any()):
            raise ValueError("model must return logits that make a distribution; got NaN or infinity in some")
        return image

    def _cached(self, plan, image, known, cond, uniforms, temperature, progress):
        run = self._started_run(plan, len(image), cond)
        for steps in progress_bar(plan.rows_of_steps(), progress):
            run.draw(image, known, uniforms, self.values, temperature, steps)

    def _naive(self, plan, image, known, cond, uniforms, temperature, progress):
        for step in progress_bar(range(plan.steps), progress):
            logits, where = self._logits(plan, image, cond), plan.where(step)
            drawn = draw(logits.movedim(1, -1)[where].movedim(-1, 1), uniforms[where], temperature)
            image[where] = drawn if known is None else torch.where(known[where], image[where], drawn)

    def _fixed_point(self, plan, image, known, cond, uniforms, temperature, progress):
        for _ in progress_bar(range(plan.steps + 1), progress):
            drawn = draw(self._logits(plan, image, cond), uniforms, temperature)
            if known is not None:
                drawn = torch.where(known, image, drawn)
            if torch.equal(drawn, image):
                return
            image.copy_(drawn)

    def _logits(self, plan, image, cond):
        """The model's own, [n, K, C, H, W]."""
        return self._outputs(plan, self.model, self.values[image.clamp(min=0)], cond)

    def _outputs(self, plan, model, x, cond):
        """A model's, [n, K, C, H, W]."""
        x = plan.form.image(x)
        size = x.shape[-2:]  # which may be the first rows alone
        outputs = plan.form.arranged(model(x, cond) if self.conditional else model(x), (self.image_shape[0], *size))
        if self.levels == 2 and outputs.shape[1] == 1:
            return torch.cat([torch.zeros_like(outputs), outputs], 1)
        return outputs

    def _plan_for(self, cond):
        """How images are drawn with a condition that is given."""
        try:
            return self._plan_of(cond)
        except trace.RaisedError as error:
            raise ValueError(f"cond must be what the model takes; got shape {tuple(cond.shape)}: {error}") from error

    def _started_run(self, plan, n, cond):
        """A run of n images, of a program that is checked."""
        run = Run(plan, n, cond)
        if not self.check or plan.compiled.checked:
            return run
        rows = check.rows_to_compare(run)
        part = plan if rows == self.image_shape[1] else plan.of_rows(rows)
        outputs = functools.partial(self._outputs, plan)
        try:
            check.compare(part, self.model, outputs, self.levels, self.values, cond)
        except NotImplementedError:
            if plan.form.size == self.image_shape[1:]:
                raise
            return self._started_run(self._plan_of(cond, small=False), n, cond)  # of an image as large as they are
        plan.compiled.checked = True
        return run

    def _condition(self, n, cond):
        return arguments.condition(cond, self.conditional, n, self.dtype, self.device)

    # Pixel after pixel

    @torch.no_grad()
    def reset(self, n: int, cond: "torch.Tensor | None" = None) -> "IncrementalSampler":
        """Starts n images, for step and commit.

        Args:
            n: the number of images.
            cond: the condition, as the model takes it.
        """
        n = arguments.check_count("n", n)
        with without_autocast(self.device):
            cond = self._condition(n, cond)
            self._run = self._started_run(self._plan_for(cond), n, cond)
        return self

    @property
    def pixels(self) -> list[tuple[int, int]]:
        """Rows and columns that the next step is about: one pixel in raster order."""
        run = self._started()
        return run.plan.pixels(run.step)

    @property
    def colours(self) -> list[int]:
        """The colours of these pixels that the next step is about."""
        run = self._started()
        return run.plan.colours(run.step)

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
        with without_autocast(self.device):
            outputs = run.advance(run.step, alone=True)
            return outputs.log_softmax(1) if run.plan.network.normalised else outputs.clone()

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
        if self._run.step == self._run.plan.steps:
            raise RuntimeError(f"all {self._run.step} steps are done: reset starts other images")
        return self._run
