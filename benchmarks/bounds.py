"""What the Triton kernels can reach on an H200, predicted from their machine code: needs no GPU, measures nothing.

    python benchmarks/bounds.py

A kernel takes as long as the longer of two things: moving the op's bytes, and issuing its instructions. Writes
benchmarks/results/bounds.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "bounds.csv"

CAPABILITY = 90
COPY = 4.3e12  # bytes a second, read and written: a device-to-device copy through torch on an H200
ISSUE = 132 * 4 * 32 * 1.98e9  # instructions of threads a second: multiprocessors, schedulers, lanes, clock

# Elements read and written, forward and backward.
FLOOR = {
    "gaussian_rsample": (3, 3),
    "gaussian_kl": (2, 4),
    "gaussian_kl-prior": (4, 8),
    "gaussian_rsample_kl": (3, 5),
    "gaussian_rsample_kl-prior": (5, 9),
    "gaussian_log_prob": (3, 6),
}
BYTES = {"float32": 4, "bfloat16": 2}


def predictions(kernels: dict) -> "list[dict]":
    """A row for each op, direction and dtype."""
    rows = []
    for op, floor in FLOOR.items():
        for direction, elements in zip(("fwd", "bwd"), floor, strict=True):
            for dtype, size in BYTES.items():
                kernel = kernels[f"{op}_{direction}-{dtype}"]
                instructions = len(kernel["code"]) / kernel["elements"]
                moved = elements * size
                fraction = min(1.0, ISSUE / instructions * moved / COPY)
                rows.append(
                    {
                        "op": op,
                        "pass": {"fwd": "forward", "bwd": "backward"}[direction],
                        "dtype": dtype,
                        "registers": kernel["reg"],
                        "instructions_per_element": round(instructions, 1),
                        "bytes_per_element": moved,
                        "predicted_fraction_of_copy": round(fraction, 2),
                    }
                )
    return rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    script = ROOT / "tests" / "compile_triton.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    print(f"compiling for sm_{CAPABILITY}, some minutes", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, script, str(CAPABILITY)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    common = {"target": f"sm_{CAPABILITY}", "triton": triton.__version__, "commit": commit.stdout.strip()}
    rows = [common | row for row in predictions(json.loads(done.stdout))]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(f"{value}" for value in list(row.values())[3:]), sep="\t")


if __name__ == "__main__":
    main()
