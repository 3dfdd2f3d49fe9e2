"""The compiled libraries: loaded once, and why one could not be."""

from pathlib import Path

import torch

_FAILURES: "dict[str, str | None]" = {}


def load(name: str) -> "str | None":
    """Loads fastelbo/_<name>.so on the first call; returns None, or in one sentence why it cannot be used."""
    if name not in _FAILURES:
        _FAILURES[name] = _load(Path(__file__).with_name(f"_{name}.so"))
    return _FAILURES[name]


def _load(path: Path) -> "str | None":
    needs = "nvcc" if path.name == "_cuda.so" else "a C++ compiler"
    if not path.exists():
        return f"{path.name} was not built: install fastelbo with {needs} present (pip install .)"
    if path.name == "_cuda.so" and torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path.name} does not load with torch {torch.__version__}: {str(error).splitlines()[0]}"
    return None
