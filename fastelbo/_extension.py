"""The compiled libraries: loaded once, and why one could not be."""

import os
import struct
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
        if _cut_short(path):
            return f"{path.name} is cut short, as by an interrupted copy: install fastelbo again"
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]  # torch says that it failed, the linker why
        return f"{path.name} does not load with torch {torch.__version__}: {reason}"
    return None


def _cut_short(path: Path) -> bool:
    """Whether an ELF file ends before what it wants in memory: reading that would kill the process with SIGBUS."""
    with open(path, "rb") as file:
        size, header = os.fstat(file.fileno()).st_size, file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False  # something else, which the linker refuses
        file.seek(struct.unpack_from("Q", header, 32)[0])
        entry_size, entries = struct.unpack_from("HH", header, 54)
        table = file.read(entry_size * entries)
    if len(table) < entry_size * entries:
        return True
    segments = (struct.unpack_from("IIQQQQ", table, start) for start in range(0, len(table), entry_size))
    return any(kind == 1 and offset + length > size for kind, _, offset, _, _, length in segments)  # 1: PT_LOAD
