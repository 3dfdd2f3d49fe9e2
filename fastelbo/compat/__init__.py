"""Other projects' lines on the fused ops, one file per project.

Each file's docstring says what it replaces, and where the original is wrong. A file imports the project it is named
after only where it must: pyro, and diffusers in patch().
"""

import importlib

from fastelbo import _seed
from fastelbo.ops.gaussian_rsample import gaussian_rsample

PROJECTS = ("bayesian", "diffusers", "dreamer", "guided_diffusion", "nvae", "pyro", "pythae", "vdvae", "vits")


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
