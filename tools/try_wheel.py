"""Installs dist/'s wheel into fresh environments, one for each Python and torch, and runs tests/smoke.py there.

    python tools/try_wheel.py --pythons python3.10 python3.13 --torches 2.10.0 newest

An environment takes up to 8 GB, for torch comes with CUDA; it is deleted before the next one is made.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def only_wheel() -> Path:
    """The one in dist/."""
    wheels = list((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        sys.exit(f"dist/ must hold one wheel; it holds {len(wheels)}: run make wheel first")
    return wheels[0]


def try_in(folder: Path, python: str, torch: str, wheel: Path) -> None:
    """Raises CalledProcessError where anything fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bin = folder / "environment" / "bin"
    torch = "torch" if torch == "newest" else f"torch=={torch}"
    for name in ("smoke.py", "ops.py"):
        shutil.copy(ROOT / "tests" / name, folder)
    for command in (
        [python, "-m", "venv", folder / "environment"],
        [bin / "pip", "install", "--quiet", "--disable-pip-version-check", torch, wheel],
        [bin / "python", "smoke.py"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True)


def main() -> None:
    """Tries all; ends with status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pythons", nargs="+", required=True)
    parser.add_argument("--torches", nargs="+", required=True, help='versions, or "newest"')
    arguments = parser.parse_args()
    wheel, failed = only_wheel(), []
    for python in arguments.pythons:
        for torch in arguments.torches:
            print(f"fastelbo: {wheel.name} with {python} and torch {torch}", flush=True)
            start = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="fastelbo-") as folder:
                try:
                    try_in(Path(folder), python, torch, wheel)
                except (OSError, subprocess.CalledProcessError) as error:
                    print(f"fastelbo: failed: {error}", flush=True)
                    failed.append(f"{python} with torch {torch}")
                else:
                    print(f"fastelbo: passed, in {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"fastelbo: the wheel failed in {', '.join(failed)}")
    print("fastelbo: the wheel passed everywhere")


if __name__ == "__main__":
    main()
