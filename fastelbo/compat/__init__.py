"""Other projects' lines on the fused ops, one file per project.

Each file's docstring says what it replaces, and where the original is wrong. A file imports the project it is named
after only where it must: pyro, and diffusers and CompressAI in their patch().
"""

import contextlib
import importlib
import sys

import torch

from fastelbo import _seed
from fastelbo.ops.gaussian_rsample import gaussian_rsample

__all__ = ["PROJECTS", "patch"]

PROJECTS = (
    "bayesian",
    "compressai",
    "diffusers",
    "dreamer",
    "guided_diffusion",
    "nvae",
    "pyro",
    "pythae",
    "vdvae",
    "vits",
)


def __getattr__(name):
    """Imports a project's file when it is first asked for."""
    if name in PROJECTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Derived:
    """An attribute that is computed when it is first asked for, and kept. Whoever assigns it, or writes to it, changes
    what methods compute, as of an attribute that is there from the start: those ask `changed`, and go past it where
    nobody has.

    Args:
        compute: takes the object.
    """

    def __init__(self, compute):
        self.compute, self.__doc__ = compute, compute.__doc__

    def __set_name__(self, cls, name):
        self.place = f"_{name}"

    def __get__(self, instance, cls=None):
        if instance is None:
            return self
        kept = vars(instance).get(self.place)
        if kept is not None:
            return kept[0]
        value = self.compute(instance)
        # what is traced, and inference tensors, have no version that is a number: they count as changed
        known = not (torch.compiler.is_compiling() or value.is_inference())
        self._keep(instance, value, value._version if known else None)
        return value

    def __set__(self, instance, value):
        self._keep(instance, value, None)

    def _keep(self, instance, value, version):
        names = instance.__dict__
        names[self.place] = value, version
        names["_derived"] = True


def changed(instance, *names):
    """Whether one of an object's derived attributes was assigned or written to."""
    own = instance.__dict__
    if "_derived" not in own:
        return False
    for name in names:
        kept = own.get(f"_{name}")
        if kept is not None and (kept[1] is None or kept[0]._version != kept[1]):
            return True
    return False


def sample_and_noise(mean, s, scale):
    """(z, noise) for lines that return both. The noise is drawn twice rather than kept for the backward."""
    seed = _seed.as_seed(None, None, mean.device)
    noise = gaussian_rsample(mean.new_zeros(()).expand_as(mean), 1.0, scale="std", seed=seed)
    return gaussian_rsample(mean, s, scale=scale, seed=seed), noise


def patch(ours, *modules):
    """Puts what a drop-in has in the place of what modules have under the same names, for code that reaches these under
    an alias (``import torch.distributions as td``), and wherever these modules have the same under other names.

    A module of a package is that one alone: what its inner modules hold stays. Objects that were made before keep the
    class that they had.

    Args:
        ours: fastelbo.distributions, or one of the files here.
        modules: one or more, as of another project or of a user.

    Returns:
        A context manager: leaving it, or calling its close(), puts theirs back.

    Raises:
        ValueError: modules that have none of the names.

    Example:
        >>> import torch.distributions as td
        >>> with fastelbo.compat.patch(fastelbo.distributions, td):
        ...     td.Normal(torch.zeros(2), 1.0).__module__
        'fastelbo.distributions'
        >>> td.Normal.__module__
        'torch.distributions.normal'
    """
    names = [name for name in ours.__all__ if name != "patch"]
    theirs = {}
    for module in modules:
        for name in names:
            if name in vars(module) and vars(module)[name] is not getattr(ours, name):
                theirs[id(vars(module)[name])] = getattr(ours, name)
    if not theirs and not any(name in vars(module) for module in modules for name in names):
        given = ", ".join(module.__name__ for module in modules) or "no module"
        raise ValueError(f"modules must have one of {', '.join(names)}; got {given}")
    return _undoing(modules, theirs)


def replaced(package, replacements, modules=()):
    """Puts objects in the place of others.

    Args:
        package: its name; objects are replaced wherever one of its loaded modules has them.
        replacements: ours by theirs.
        modules: further modules, in which objects are replaced under whatever name.

    Returns:
        A contextlib.ExitStack: leaving or closing it puts theirs back, in the package's modules that were loaded since,
        too.
    """
    undo = _undoing(modules, {id(theirs): ours for theirs, ours in replacements.items()})
    _replace_all(package, {id(theirs): ours for theirs, ours in replacements.items()})
    undo.callback(_replace_all, package, {id(ours): theirs for theirs, ours in replacements.items()})
    return undo


def _undoing(modules, replacements):
    """Replaces in modules; what undoes that."""
    undo = contextlib.ExitStack()
    for module in modules:
        undo.callback(vars(module).update, dict(_replace(vars(module), replacements)))
    return undo


def _replace_all(package, replacements):
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            _replace(vars(module), replacements)


def _replace(names, replacements):
    """Replaces in a module's names, by identity; what they stood for before."""
    found = [(name, value) for name, value in list(names.items()) if id(value) in replacements]
    names.update((name, replacements[id(value)]) for name, value in found)
    return found
