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
    undo = contextlib.ExitStack()
    for module in modules:
        undo.callback(vars(module).update, dict(_replace(vars(module), replacements)))
    _replace_all(package, replacements)
    undo.callback(_replace_all, package, {ours: theirs for theirs, ours in replacements.items()})
    return undo


def _replace_all(package, replacements):
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            _replace(vars(module), replacements)


def _replace(names, replacements):
    """Replaces in a module's names; what they stood for before."""
    found = [(name, value) for name, value in names.items() if isinstance(value, type) and value in replacements]
    names.update((name, replacements[value]) for name, value in found)
    return found
