"""How a network's raw output becomes a standard deviation."""

import decimal
import functools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from fastelbo import _checks

KINDS = ("logvar", "log_std", "std", "var", "softplus")
CLAMP_GRADS = ("zero", "straight_through", "inward")

_TINY, _HUGE = 2.0**-126, 2.0**126


@functools.cache
def _find_unit(kind, soft_clamp, min_std, var_eps, beta):
    with decimal.localcontext(prec=80):
        minimum, eps, beta = (decimal.Decimal(number) for number in (min_std, var_eps, beta))
        own = (1 - eps).sqrt() - minimum if eps < 1 else decimal.Decimal(0)
        if own <= 0:
            return None
        raw = {
            "logvar": lambda: 2 * own.ln(),
            "log_std": own.ln,
            "std": lambda: own,
            "var": lambda: own * own,
            "softplus": lambda: own + (1 - (-beta * own).exp()).ln() / beta,
        }[kind]()
        if soft_clamp is not None:
            ratio = raw / decimal.Decimal(soft_clamp)
            if abs(ratio) >= 1:
                return None
            raw = decimal.Decimal(soft_clamp) * ((1 + ratio) / (1 - ratio)).ln() / 2
        return float(raw), float(raw - decimal.Decimal(float(raw)))


def _unit(kind, soft_clamp, min_std, var_eps, beta):
    """The raw value whose sigma is 1, as a sum of two numbers: ln sigma keeps its digits near it through the distance
    from it. None where no value has that sigma, or where the logarithm is as good."""
    if kind != "softplus" and min_std == 0 and var_eps == 0:
        return None
    return _find_unit(kind, soft_clamp, min_std, var_eps, beta)


_unit._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Scale:
    r"""The map from a raw value s to the standard deviation of a Gaussian.

    ==============  =================================
    kind            standard deviation
    ==============  =================================
    ``"logvar"``    :math:`\exp(s / 2)`
    ``"log_std"``   :math:`\exp(s)`
    ``"std"``       :math:`s`
    ``"var"``       :math:`\sqrt{s}`
    ``"softplus"``  :math:`\ln(1 + \exp(\beta s)) / \beta`
    ==============  =================================

    The raw value is limited by ``clamp`` first and ``soft_clamp`` second; ``min_std`` is then added to the standard
    deviation, and ``var_eps`` to the variance that results.

    Args:
        kind: one of the kinds above.
        clamp: limits ``(lo, hi)`` of the raw value; either may be infinite.
        clamp_grad: the gradient that a raw value outside the limits gets: ``"zero"`` (as in diffusers),
            ``"straight_through"`` (all of it, as in ``nn.GaussianNLLLoss``) or ``"inward"`` (only what moves the value
            back inside under gradient descent, as in CompressAI).
        soft_clamp: c in :math:`c \tanh(s / c)`, a smooth limit to (-c, c) (as in NVAE).
        min_std: added to the standard deviation, at least 0.
        var_eps: added to the variance, at least 0.
        beta: sharpness of the softplus, above 0; only kind ``"softplus"`` reads it.

    Raises:
        ValueError: for an unknown kind or clamp_grad, limits out of order, or a number out of its range.
        TypeError: for a number that is not one.

    Example:
        >>> fastelbo.Scale("softplus", min_std=1e-4).kind
        'softplus'
    """

    kind: str
    _: KW_ONLY
    clamp: "tuple[float, float] | None" = None
    clamp_grad: str = "zero"
    soft_clamp: "float | None" = None
    min_std: float = 0.0
    var_eps: float = 0.0
    beta: float = 1.0

    def __post_init__(self):
        _checks.check_one_of("scale", self.kind, KINDS)
        _checks.check_one_of("clamp_grad", self.clamp_grad, CLAMP_GRADS)
        lo, hi = -math.inf, math.inf
        if self.clamp is not None:
            try:
                lo, hi = (float(limit) for limit in self.clamp)
            except (TypeError, ValueError, OverflowError):
                raise TypeError(f"clamp must be a pair of numbers (lo, hi); got {self.clamp!r}") from None
            if not lo < hi:
                raise ValueError(f"clamp must have lo < hi; got {self.clamp!r}")
            object.__setattr__(self, "clamp", (lo, hi))
        for name, least in (("soft_clamp", _TINY), ("min_std", 0.0), ("var_eps", 0.0), ("beta", _TINY)):
            value = getattr(self, name)
            if value is None and name == "soft_clamp":
                continue
            value = _checks.check_number(name, value)
            object.__setattr__(self, name, value)
            if not least <= value <= _HUGE:  # in float32, too, as its inverse where it has one
                rule = "at least 0 and finite" if least == 0 else "positive and finite"
                where = " in float32" if 0 < value < math.inf else ""
                raise ValueError(f"{name} must be {rule}{where}; got {value!r}")
        unit = _unit(self.kind, self.soft_clamp, self.min_std, self.var_eps, self.beta)
        object.__setattr__(self, "unit", unit)
        object.__setattr__(self, "numbers", self._numbers(lo, hi, unit))
        object.__setattr__(self, "text", " ".join(map(repr, self.numbers)))

    def _numbers(self, lo: float, hi: float, unit: "tuple[float, float] | None") -> "list[float]":
        """The parameters as the compiled ops take them (csrc/common/host.cpp, parse_scale), trailing defaults left out:
        every number costs a call 50 ns."""
        numbers = [KINDS.index(self.kind), CLAMP_GRADS.index(self.clamp_grad), lo, hi]
        numbers += [self.soft_clamp or 0.0, self.min_std, self.var_eps, self.beta, *(unit or (math.inf, 0.0))]
        defaults = [None, 0, -math.inf, math.inf, 0.0, 0.0, 0.0, 1.0, math.inf, 0.0]
        while numbers[-1] == defaults[len(numbers) - 1]:
            numbers.pop()
        return [float(number) for number in numbers]

    @classmethod
    def diffusers(cls) -> "Scale":
        """The log-variance clamped to (-30, 20), as diffusers' DiagonalGaussianDistribution has it.

        Example:
            >>> fastelbo.Scale.diffusers().clamp
            (-30.0, 20.0)
        """
        return cls("logvar", clamp=(-30.0, 20.0))

    @classmethod
    def softplus(cls, min_std: float = 1e-4, beta: float = 1.0) -> "Scale":
        """softplus(s) + min_std, as the Oobleck audio autoencoder and RSSM world models have it.

        Args:
            min_std: added to the standard deviation, at least 0.
            beta: sharpness of the softplus, above 0.

        Example:
            >>> fastelbo.Scale.softplus().min_std
            0.0001
        """
        return cls("softplus", min_std=min_std, beta=beta)

    @classmethod
    def softclip(cls, minimum: float = -6.0, kind: str = "log_std") -> "Scale":
        r"""A raw value t softly clipped from below, minimum + softplus(s - minimum), as optimal sigma-VAEs have it.

        No softplus is left in it: :math:`\exp(m + \ln(1 + \exp(s - m))) = \exp(s) + \exp(m)`, so that a logarithm of
        the standard deviation has a min_std, and one of the variance a var_eps.

        Args:
            minimum: m, which the clipped raw value never reaches.
            kind: "log_std", or "logvar".

        Source:
            Rybkin et al. 2021, "Simple and Effective VAE Training with Calibrated Decoders".

        Example:
            >>> log_sigma, scale = torch.tensor([-9.0, -6.0, 0.0]), fastelbo.Scale.softclip()
            >>> z = fastelbo.gaussian_rsample(torch.zeros(3), log_sigma, scale=scale, noise=torch.ones(3))
            >>> torch.allclose(z, (-6 + torch.nn.functional.softplus(log_sigma + 6)).exp())
            True
        """
        _checks.check_one_of("kind", kind, ("log_std", "logvar"))
        minimum = _checks.check_number("minimum", minimum)
        try:
            least = math.exp(minimum)
        except OverflowError:
            least = math.inf
        if not least <= _HUGE:
            raise ValueError(f"minimum must be one whose exponential is finite in float32; got {minimum!r}")
        return cls(kind, min_std=least) if kind == "log_std" else cls(kind, var_eps=least)

    @classmethod
    def nvae(cls) -> "Scale":
        """exp(5 tanh(s / 5)) + 0.01, as NVAE has it (which limits its means in the same way).

        Example:
            >>> fastelbo.Scale.nvae().soft_clamp
            5.0
        """
        return cls("log_std", soft_clamp=5.0, min_std=1e-2)

    @classmethod
    def gaussian_nll_loss(cls, eps: float = 1e-6) -> "Scale":
        """A variance of at least eps whose gradient ignores the limit, as nn.GaussianNLLLoss has it.

        Args:
            eps: the least variance.

        Example:
            >>> fastelbo.gaussian_nll(torch.zeros(1), 0.0, 0.0, scale=fastelbo.Scale.gaussian_nll_loss(), event_ndim=0)
            tensor([-5.9888])
        """
        return cls("var", clamp=(eps, math.inf), clamp_grad="straight_through")


def numbers(scale: "Scale | None") -> "list[float] | None":
    """A Scale or None as the compiled ops take it."""
    if scale is None:
        return None
    if torch.compiler.is_compiling():  # with dynamic shapes a float would become an unknown, which no op takes
        return [float(number) for number in scale.text.split()]  # type: ignore[attr-defined]
    return scale.numbers  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=1024)
def _of_numbers(values):
    kind, clamp_grad, lo, hi, soft_clamp, min_std, var_eps, beta = _checks.check_scale_numbers(values)
    limits: dict[str, Any] = {"clamp": (lo, hi), "clamp_grad": CLAMP_GRADS[int(clamp_grad)]}
    limits = {} if (lo, hi) == (-math.inf, math.inf) else limits
    return Scale(KINDS[int(kind)], **limits, soft_clamp=soft_clamp or None, min_std=min_std, var_eps=var_eps, beta=beta)


def of_numbers(values: "Sequence[float] | None") -> "Scale | None":
    """The Scale or None that numbers made these of."""
    return None if values is None else _of_numbers(tuple(values))


_SCALES = {kind: Scale(kind) for kind in KINDS}


def as_scale(scale: "str | Scale", name: str = "scale") -> Scale:
    """The Scale itself, or that of a kind; name: what an error calls it."""
    if isinstance(scale, Scale):
        return scale
    if not isinstance(scale, str):
        raise TypeError(f"{name} must be a Scale or one of {', '.join(KINDS)}; got {type(scale).__name__}")
    if scale not in _SCALES:
        _checks.check_one_of(name, scale, KINDS)
    return _SCALES[scale]
