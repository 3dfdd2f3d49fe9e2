"""Other projects' lines on the fused ops, one file per project.

Each file's docstring says what it replaces, and where the original is wrong. A file imports the project it is named
after only where it must: pyro, and diffusers and CompressAI in their patch().
"""

import contextlib
import importlib
import sys

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
