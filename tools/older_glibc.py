"""What to link against ahead of glibc, so that what comes out runs on an older glibc than this machine's.

    python tools/older_glibc.py 2.28 FOLDER

A linker binds a function to its newest version: exp to that of glibc 2.29, pthread_create to that of 2.34, though every
glibc still has the ones before. FOLDER/libc_older.so and FOLDER/libm_older.so take the places and names of glibc's own
libraries. They hold the same symbols, each of its newest version that is not too new. What an older glibc lacks
altogether keeps its version, for auditwheel to find.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

COMPILER = shlex.split(os.environ.get("CXX") or "c++")


def number(version: str) -> "tuple[int, ...]":
    """So that versions compare."""
    return tuple(int(part) for part in version.split("."))


def versions(library: str, newest: str) -> "dict[str, tuple[str, str]]":
    """The kind of each symbol that can be linked against, and the version to bind it to."""
    symbols = subprocess.check_output(["readelf", "--dyn-syms", "-W", library], text=True)
    chosen, older = {}, {}
    for kind, symbol, default, version in re.findall(r"(FUNC|OBJECT) .* (\w+)@(@?)GLIBC_([\d.]+)$", symbols, re.M):
        if default:
            chosen[symbol] = kind, version
        if number(version) <= number(newest):
            older.setdefault(symbol, []).append(version)
    for symbol, (kind, _) in chosen.items():
        # totalorder's arguments became pointers in 2.31: what is compiled for one version must not call another
        if symbol in older and not symbol.startswith("totalorder"):
            chosen[symbol] = kind, max(older[symbol], key=number)
    return chosen


def write(library: Path, soname: str, symbols: "dict[str, tuple[str, str]]") -> None:
    """A shared library of nothing but symbols with their versions."""
    source, script = library.with_suffix(".s"), library.with_suffix(".map")
    kinds = {"FUNC": "%function", "OBJECT": "%object"}
    lines = [f".globl {name}\n.type {name}, {kinds[kind]}\n{name}:\n" for name, (kind, _) in symbols.items()]
    source.write_text(".text\n" + "".join(lines) + '.byte 0\n.section .note.GNU-stack,"",%progbits\n')
    nodes = {}
    for name, (_, version) in symbols.items():
        nodes.setdefault(version, []).append(name)
    script.write_text("".join(f"GLIBC_{version} {{ {'; '.join(names)}; }};\n" for version, names in nodes.items()))
    options = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", f"-Wl,--version-script,{script}"]
    subprocess.run([*COMPILER, *options, str(source), "-o", str(library)], check=True)


def main(newest: str, folder: Path) -> None:
    """Writes both libraries."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libc", "libm"):
        command = [*COMPILER, f"-print-file-name={name}.so.6"]
        own = subprocess.check_output(command, text=True).strip()
        write(folder / f"{name}_older.so", f"{name}.so.6", versions(own, newest))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
