"""diffusers: the posteriors of its autoencoders.

Replaces::

    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

and, in models and pipelines as they are, with ``fastelbo.compat.diffusers.patch()``.

Both read the network's output in place, and compute std, var and logvar only for those who ask. Whoever assigns these,
or writes to them, changes what follows as there: a draw is of mean and std; kl and nll are of mean, var and logvar. The
output itself, parameters, must not be written to, but through mean. A draw follows from the generator's state, as
there, but is another one.

Where the originals (diffusers 0.42) are wrong:

* kl and nll sum dimensions 1, 2 and 3 whatever the rank: of a video's [B, C, T, H, W] the width is left, and audio's
  [B, C, T] raises IndexError. Here all but the first are summed.
* Close to the prior the KL loses its digits, and its sign; in float16 it is infinite for log-variances from 11.1 on.
  Here it is right, and float32 for half inputs.
* The KL and NLL of a deterministic distribution, a 0, lie in host memory wherever the parameters are; the KL from a
  deterministic distribution may be NaN. Here the former lie with the parameters, and the latter is infinite.
* The Oobleck distribution adds ln var_q - ln var_p in kl(other), instead of subtracting it, and draws at random even if
  deterministic.

Kept: the Oobleck distribution's kl is twice the KL divergence, summed over channels and averaged over batch and time.
"""

import importlib
import math

import torch

from fastelbo import _checks, _seed, compat
from fastelbo.compat import Derived, changed
from fastelbo.ops.gaussian_kl import gaussian_kl
from fastelbo.ops.gaussian_log_prob import gaussian_nll
from fastelbo.ops.gaussian_rsample import gaussian_rsample
from fastelbo.reference.gaussian_kl import event_sum
from fastelbo.reference.scale import arithmetic
from fastelbo.scale import Scale

__all__ = ["DiagonalGaussianDistribution", "OobleckDiagonalGaussianDistribution", "patch"]


class _Posterior:
    _scale: "Scale | None" = None

    def __init__(self, parameters, deterministic=False):
        self.parameters = parameters
        self.mean, self._s = torch.chunk(parameters, 2, dim=1)
        self.deterministic = self._narrow = deterministic  # the latter for good

    def sample(self, generator=None):
        """A draw.

        Args:
            generator: a torch.Generator, of the CPU or of the parameters' device, or a list of one for each example.
        """
        s, scale, temperature = self._s, self._scale, 0.0 if self._narrow else 1.0
        if changed(self, "std"):
            s, scale, temperature = self.std, "std", 1.0
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        if not isinstance(generator, list):
            return _draw(self.mean, s, scale, temperature, generator)
        s = torch.as_tensor(s, device=self.mean.device).expand_as(self.mean)
        return torch.cat(
            [_draw(self.mean[i : i + 1], s[i : i + 1], scale, temperature, generator[i]) for i in range(len(self.mean))]
        )

    def mode(self):
        """The mean."""
        return self.mean

    def _zero(self):
        return self.parameters.new_zeros(1, dtype=torch.float32)

    @_checks.calls(mean_q="parameters", s_q="parameters", mean_p="other.parameters", s_p="other.parameters")
    def _kl(self, other, **options):
        alone, plain = other is None, not changed(self, "var", "logvar")
        if alone and plain:
            return gaussian_kl(self.mean, self._s, scale=self._scale, **options)
        if plain and isinstance(other, _Posterior) and not changed(other, "var", "logvar"):
            kl = gaussian_kl(self.mean, self._s, other.mean, other._s, scale=self._scale, **options)
        else:
            mean, var, logvar = _moments(self)
            mean_p, var_p, logvar_p = (0.0, 1.0, 0.0) if alone else _moments(other)
            kl = 0.5 * ((mean - mean_p) ** 2 / var_p + var / var_p - 1 - logvar + logvar_p)
            kl = kl.mean() if options else event_sum(kl, kl.dim() - 1)
        if alone or changed(other, "var", "logvar"):
            return kl
        narrow = other._narrow if isinstance(other, _Posterior) else other.deterministic
        return torch.full_like(kl, torch.inf) if narrow else kl


def _moments(q):
    tensors = (torch.as_tensor(value, device=q.mean.device) for value in (q.mean, q.var, q.logvar))
    return arithmetic(*tensors)


def _draw(mean, s, scale, temperature, generator):
    seed, device = None, mean.device.type
    if generator is not None and generator.device.type != device:
        if generator.device.type != "cpu":
            raise ValueError(f"Cannot generate a {device} tensor from a generator of type {generator.device.type}.")
        seed, generator = int(_seed.as_seed(None, generator, generator.device)), None
    return gaussian_rsample(mean, s, scale=scale, temperature=temperature, seed=seed, generator=generator)


class DiagonalGaussianDistribution(_Posterior):
    """A diagonal Gaussian with its log-variance clamped to [-30, 20].

    Args:
        parameters: [B, 2C, ...], means before log-variances.
        deterministic: whether the standard deviation is 0.

    Attributes:
        parameters: as given.
        deterministic: as given.
        mean: [B, C, ...], as are logvar, std and var, which are computed when asked for; any may be assigned.

    Raises:
        ValueError, TypeError: in a method, as the op that computes it.

    Source:
        diffusers/models/autoencoders/vae.py.

    Example:
        >>> q = fastelbo.compat.diffusers.DiagonalGaussianDistribution(torch.zeros(2, 8, 3, 4, 4))
        >>> q.sample(torch.Generator().manual_seed(0)).shape, q.kl()
        (torch.Size([2, 4, 3, 4, 4]), tensor([0., 0.]))
    """

    _scale = Scale.diffusers()

    @Derived
    def logvar(self):
        """The clamped log-variance."""
        return self._clamped()

    def _clamped(self):
        return torch.clamp(self._s, *self._scale.clamp)

    @Derived
    def std(self):
        """The standard deviation."""
        return torch.zeros_like(self.mean) if self._narrow else torch.exp(0.5 * self._clamped())

    @Derived
    def var(self):
        """The variance."""
        return torch.zeros_like(self.mean) if self._narrow else torch.exp(self._clamped())

    def kl(self, other=None):
        """KL from another such distribution, other, or from the standard normal: [B]."""
        return self._zero() if self.deterministic else self._kl(other)

    @_checks.calls(x="sample")
    def nll(self, sample, dims=None):
        """Negative log-likelihood of a sample, summed over dims, or over all but the first dimension: [B]."""
        if self.deterministic:
            return self._zero()
        if changed(self, "var", "logvar"):
            mean, var, logvar = _moments(self)
            nll = 0.5 * (math.log(2 * math.pi) + logvar + (sample - mean) ** 2 / var)
            return event_sum(nll, nll.dim() - 1) if dims is None else nll.sum(dim=dims)
        if dims is None:
            return gaussian_nll(sample, self.mean, self._s, scale=self._scale)
        return gaussian_nll(sample, self.mean, self._s, scale=self._scale, event_ndim=0).sum(dim=dims)


class OobleckDiagonalGaussianDistribution(_Posterior):
    """A diagonal Gaussian with standard deviation softplus(scale) + 0.0001.

    Args:
        parameters: [B, 2C, T], means before scales.
        deterministic: whether a draw is the mean, and the KL 0.

    Attributes:
        parameters: as given.
        deterministic: as given.
        mean: [B, C, T], as are scale, and std, var and logvar, which are computed when asked for; any may be
            assigned.

    Raises:
        ValueError, TypeError: in a method, as the op that computes it.

    Source:
        diffusers/models/autoencoders/autoencoder_oobleck.py.

    Example:
        >>> q = fastelbo.compat.diffusers.OobleckDiagonalGaussianDistribution(torch.zeros(2, 8, 16))
        >>> q.kl()
        tensor(0.8533)
    """

    _scale = Scale.softplus(1e-4)

    @property
    def scale(self):
        """The network's output. What is written to it changes none of the others, which are kept from now on."""
        for name in ("std", "var", "logvar"):
            setattr(self, name, getattr(self, name))
        return self._s

    @scale.setter
    def scale(self, value):
        """Nothing is computed from it any more."""
        _ = self.scale
        self._s = value

    @Derived
    def std(self):
        """The standard deviation."""
        return torch.nn.functional.softplus(self._s) + self._scale.min_std

    @Derived
    def var(self):
        """The variance."""
        return type(self).std.compute(self) ** 2

    @Derived
    def logvar(self):
        """The log-variance."""
        return torch.log(type(self).var.compute(self))

    def kl(self, other=None):
        """Twice the KL from another such distribution, other, or the standard normal; nats per example and time."""
        if self.deterministic:
            return self._zero()
        return 2 * self.mean.shape[1] * self._kl(other, event_ndim=0, reduction="mean")


def patch(*modules):
    """Puts these classes in the place of diffusers' own in all of its modules, those imported later included.

    Args:
        modules: further ones, as of a user, that hold diffusers' classes under any name.

    Returns:
        A context manager: leaving it, or calling its close(), puts diffusers' classes back.

    Raises:
        ImportError: diffusers is not installed.

    Example:
        >>> from diffusers.models.autoencoders import vae
        >>> with fastelbo.compat.diffusers.patch():
        ...     vae.DiagonalGaussianDistribution.__module__
        'fastelbo.compat.diffusers'
        >>> vae.DiagonalGaussianDistribution.__module__
        'diffusers.models.autoencoders.vae'
    """
    homes = {"vae": DiagonalGaussianDistribution, "autoencoder_oobleck": OobleckDiagonalGaussianDistribution}
    theirs = {}
    for home, ours in homes.items():
        module = importlib.import_module(f"diffusers.models.autoencoders.{home}")
        theirs[getattr(module, ours.__name__)] = ours
    return compat.replaced("diffusers", theirs, modules)
