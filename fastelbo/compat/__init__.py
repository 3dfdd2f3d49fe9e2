"""Other projects' lines on the fused ops, one file per project. Each file's docstring says what it replaces, and where
the original is wrong.

A file imports the project that it is named after only where it must have it: pyro, and diffusers.patch().
"""

import importlib

_PROJECTS = ("bayesian", "diffusers", "dreamer", "guided_diffusion", "nvae", "pyro", "pythae", "vdvae", "vits")


def __getattr__(name):
    """Imports a project's file when it is first asked for."""
    if name in _PROJECTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
