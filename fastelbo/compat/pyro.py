"""Pyro: Normal and Independent for pyro.sample, with all that Pyro adds to a distribution.

Replaces ``from pyro.distributions import Normal, Independent``, and ``import pyro.distributions as dist``, whose other
names are Pyro's own. fastelbo.distributions says what differs.

Where the original is wrong: no digits are left of KLs near 0, which TraceMeanField_ELBO takes.
"""

import pyro.distributions
from pyro.distributions.torch_distribution import TorchDistributionMixin

from fastelbo import distributions

__all__ = ["Independent", "Normal"]

_Independent = pyro.distributions.Independent  # Pyro's, whatever patch puts in its place


def __getattr__(name):
    """Pyro's own, of what is not here."""
    if not name.startswith("_") and hasattr(pyro.distributions, name):
        return getattr(pyro.distributions, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Normal(distributions.Normal, TorchDistributionMixin):
    """fastelbo.distributions.Normal for Pyro.

    Args:
        loc, scale, validate_args: as there.

    Raises:
        ValueError: as there.

    Source:
        pyro/distributions/torch.py.

    Example:
        >>> fastelbo.compat.pyro.Normal(torch.zeros(2, 3), 1.0).to_event(1).log_prob(torch.zeros(2, 3))
        tensor([-2.7568, -2.7568])
    """

    def to_event(self, reinterpreted_batch_ndims=None):
        """The Normal with its last reinterpreted_batch_ndims batch dimensions, or all, as one event."""
        return _ours(super().to_event(reinterpreted_batch_ndims))


class Independent(distributions.Independent, _Independent):
    """fastelbo.distributions.Independent for Pyro; what Normal.to_event returns.

    Args:
        base_distribution, reinterpreted_batch_ndims, validate_args: as there.

    Raises:
        ValueError: as there.

    Source:
        pyro/distributions/torch.py.

    Example:
        >>> base = fastelbo.compat.pyro.Normal(torch.zeros(2, 3), 1.0)
        >>> fastelbo.compat.pyro.Independent(base, 1).event_shape
        torch.Size([3])
    """

    def to_event(self, reinterpreted_batch_ndims=None):
        """The distribution with reinterpreted_batch_ndims more of its last batch dimensions, or all, in the event."""
        return _ours(super().to_event(reinterpreted_batch_ndims))


def _ours(distribution):
    """Pyro's Independent as ours."""
    if type(distribution) is _Independent:
        return Independent(distribution.base_dist, distribution.reinterpreted_batch_ndims)
    return distribution
