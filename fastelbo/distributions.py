"""torch.distributions' Normal, Independent and kl_divergence on the fused ops: one changed import line.

Replaces ``from torch.distributions import Normal, Independent, kl_divergence``. The classes are subclasses of torch's:
isinstance checks, transforms and other libraries take them for what they are, and torch's own kl_divergence computes
theirs with gaussian_kl, against each other and against torch's.

What differs from the originals:

* the noise is that of gaussian_rsample: a function of a seed, which torch.manual_seed decides or a ``generator=``;
* validation follows ``validate_args`` and torch's process-wide default, which is read and never set, and raises torch's
  errors for tensors in host memory; the values of any other tensor are asserted on its device, and nobody waits for it;
* KL and log-densities of half-precision distributions are computed and returned in float32;
* KL divergences near 0 keep their digits (docs/numerics.md).

All other names are torch.distributions' own, so that ``import fastelbo.distributions as td`` takes its place.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributions.utils import broadcast_all

from fastelbo import _checks
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_log_prob
from fastelbo.ops.gaussian_rsample import gaussian_rsample

__all__ = ["Independent", "Normal", "kl_divergence"]

# torch's, whatever compat.patch puts in their place
_Normal, _Independent = torch.distributions.Normal, torch.distributions.Independent
_kl_divergence = torch.distributions.kl_divergence


def __getattr__(name: str) -> Any:
    """torch.distributions' own, of what is not here."""
    if not name.startswith("_") and hasattr(torch.distributions, name):
        return getattr(torch.distributions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Normal(torch.distributions.Normal):
    """torch.distributions.Normal on the fused ops.

    Args:
        loc: the mean, a tensor or a number.
        scale: the standard deviation, a tensor or a number that broadcasts with loc.
        validate_args: whether to check values; torch's process-wide default where None.

    Raises:
        ValueError: a scale that is not positive, or a loc or value that is NaN, in host memory.

    Source:
        torch/distributions/normal.py.

    Example:
        >>> q = fastelbo.distributions.Normal(torch.zeros(2, 3), 1.0)
        >>> q.rsample((5,), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self, loc: "torch.Tensor | float", scale: "torch.Tensor | float", validate_args: "bool | None" = None
    ) -> None:
        self.loc, self.scale = _parameters(*broadcast_all(loc, scale))
        validate = self._validate_args if validate_args is None else validate_args
        readable = _checks.readable(self.loc)
        # past torch's Normal, whose constructor is what stands above
        super(_Normal, self).__init__(self.loc.shape, validate_args=validate and readable)
        self._validate_args = validate
        if validate and not readable:
            for name, constraint in self.arg_constraints.items():
                valid = constraint.check(getattr(self, name))
                _checks.check_values(valid, f"Expected parameter {name} to satisfy the constraint {constraint!r}")

    def expand(self, batch_shape: "Sequence[int]", _instance: Any = None) -> "Normal":
        """The same distribution with its batch dimensions expanded to batch_shape; _instance as in torch."""
        return super().expand(batch_shape, self._get_checked_instance(Normal, _instance))

    def sample(self, sample_shape: "Sequence[int]" = (), generator: "torch.Generator | None" = None) -> torch.Tensor:
        """rsample without gradients; sample_shape and generator as there."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    @_checks.calls(mean="loc", s="scale", num_samples="sample_shape")
    def rsample(self, sample_shape: "Sequence[int]" = (), generator: "torch.Generator | None" = None) -> torch.Tensor:
        """Draws of shape sample_shape + batch_shape, through which gradients reach loc and scale.

        Args:
            sample_shape: of the draws, in front.
            generator: a torch.Generator of loc's device to draw the seed from; torch's default one where None.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        if len(shape) == len(self._batch_shape):
            return gaussian_rsample(self.loc, self.scale, scale="std", generator=generator)
        num_samples = math.prod(shape[: len(shape) - len(self._batch_shape)])
        if num_samples == 0:
            return (self.loc + self.scale).expand(shape)
        z = gaussian_rsample(self.loc, self.scale, scale="std", num_samples=num_samples, generator=generator)
        return z.reshape(shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density of value, elementwise."""
        return self._log_prob(value, event_ndim=0)

    @_checks.calls(x="value", mean="loc", s="scale")
    def _log_prob(self, value, event_ndim):
        if self._validate_args:
            self._validate_sample(value)
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            value = value.to(self.loc.dtype)
        return gaussian_log_prob(value, self.loc, self.scale, scale="std", event_ndim=event_ndim)

    def _validate_sample(self, value):
        if isinstance(value, torch.Tensor) and not _checks.readable(value):
            _checks.check_values(self.support.check(value), f"Expected value to be within the support {self.support!r}")
        else:
            super()._validate_sample(value)


class Independent(torch.distributions.Independent):
    """torch.distributions.Independent, whose log-density of a Normal is summed where it is computed.

    Args:
        base_distribution: any distribution; those other than this module's Normal behave as under torch's class.
        reinterpreted_batch_ndims: how many trailing batch dimensions are one event.
        validate_args: as in torch.

    Raises:
        ValueError: more dimensions than the base has batch dimensions.

    Source:
        torch/distributions/independent.py.

    Example:
        >>> q = fastelbo.distributions.Normal(torch.zeros(2, 3), torch.ones(2, 3))
        >>> fastelbo.distributions.Independent(q, 1).log_prob(torch.zeros(2, 3))
        tensor([-2.7568, -2.7568])
    """

    def sample(self, sample_shape: "Sequence[int]" = (), generator: "torch.Generator | None" = None) -> torch.Tensor:
        """Draws of shape sample_shape + batch_shape + event_shape without gradients; generator only for a base that
        takes one."""
        return self.base_dist.sample(sample_shape, **({} if generator is None else {"generator": generator}))

    def rsample(self, sample_shape: "Sequence[int]" = (), generator: "torch.Generator | None" = None) -> torch.Tensor:
        """The same draws with gradients; sample_shape and generator as in sample."""
        return self.base_dist.rsample(sample_shape, **({} if generator is None else {"generator": generator}))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        """Log-density of value, summed over each event."""
        if isinstance(self.base_dist, Normal):
            return self.base_dist._log_prob(value, self.reinterpreted_batch_ndims)
        return super().log_prob(value)


def kl_divergence(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> torch.Tensor:
    r"""KL(p || q), with gaussian_kl where p and q are (Independent) Normals; torch's for anything else.

    It computes what torch.distributions.kl_divergence does of the same two, and can be traced in full by torch.compile.

    Args:
        p, q: distributions.

    Returns:
        KL in nats, of the shape to which the batches broadcast.

    Raises:
        NotImplementedError: a pair of types for which no KL is registered.

    Source:
        torch/distributions/kl.py.

    Example:
        >>> p, q = fastelbo.distributions.Normal(torch.ones(3), 1.0), torch.distributions.Normal(torch.zeros(3), 1.0)
        >>> fastelbo.distributions.kl_divergence(p, q)
        tensor([0.5000, 0.5000, 0.5000])
    """
    function = _KL.get((type(p), type(q)), _kl_divergence)
    return function(p, q)


def _parameters(loc, scale):
    """Both as they are, or in place of integers what torch's arithmetic makes of them."""
    if loc.dtype.is_floating_point and scale.dtype.is_floating_point:
        return loc, scale
    dtype = torch.result_type(loc, scale)
    if not (dtype.is_floating_point or dtype.is_complex):
        dtype = torch.get_default_dtype()
    return loc.to(dtype), scale.to(dtype)


@_checks.calls(mean_q="p.loc", s_q="p.scale", mean_p="q.loc", s_p="q.scale")
def _kl_normal(p, q, event_ndim=0):
    return gaussian_kl(*_parameters(p.loc, p.scale), *_parameters(q.loc, q.scale), scale="std", event_ndim=event_ndim)


def _kl_independent(p, q):
    bases, ndims = (p.base_dist, q.base_dist), (p.reinterpreted_batch_ndims, q.reinterpreted_batch_ndims)
    if ndims[0] == ndims[1] and all(isinstance(base, _Normal) for base in bases):
        return _kl_normal(*bases, ndims[0])
    plain = (_Independent(base, n) for base, n in zip(bases, ndims, strict=True))
    return _kl_divergence(*plain)


_KL: dict[Any, Any] = {}
for _ours, _theirs, _function in (
    (Normal, _Normal, _kl_normal),
    (Independent, _Independent, _kl_independent),
):
    for _pair in ((_ours, _ours), (_ours, _theirs), (_theirs, _ours)):
        _KL[_pair] = torch.distributions.register_kl(*_pair)(_function)
