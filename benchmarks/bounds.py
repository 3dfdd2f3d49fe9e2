"""What our GPU kernels can reach on an H200, predicted: needs no GPU, measures nothing.

    python benchmarks/bounds.py                 of the Gaussian ops' machine code, which takes minutes to compile
    python benchmarks/bounds.py --convolutions  of the convolutions' bytes and products

A kernel takes as long as the longer of two things: moving the op's bytes, and issuing its instructions. Writes
benchmarks/results/bounds.csv or conv_bounds.csv.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import convolutions
import rows
import torch

ROOT = Path(__file__).parent.parent

CAPABILITY = 90
COPY = 4.3e12  # bytes a second, read and written: a device-to-device copy through torch on an H200
TENSOR_CORES = 7.9e14  # multiplications and additions a second in bfloat16 that matrix products reach
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
    found = []
    for op, floor in FLOOR.items():
        for direction, elements in zip(("fwd", "bwd"), floor, strict=True):
            for dtype, size in BYTES.items():
                kernel = kernels[f"{op}_{direction}-{dtype}"]
                instructions = len(kernel["code"]) / kernel["elements"]
                moved = elements * size
                fraction = min(1.0, ISSUE / instructions * moved / COPY)
                found.append(
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
    return found


def compiled_kernels() -> dict:
    script = ROOT / "tests" / "compile_triton.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    print(f"compiling for sm_{CAPABILITY}, some minutes", file=sys.stderr)
    done = subprocess.run(
        [sys.executable, script, str(CAPABILITY)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def of_convolutions() -> "list[dict]":
    """What a bfloat16 forward can reach, and how many times as long rivals take that are as efficient."""
    found = []
    for layer in convolutions.LAYERS:
        pixels = layer.n * layer.size**2
        moved = convolutions.bytes_moved(layer, torch.bfloat16, with_backward=False) / COPY

        def seconds(taps, pixels=pixels, layer=layer, moved=moved):
            return max(2 * pixels * layer.c_in * layer.c_out * taps / TENSOR_CORES, moved)

        ours = seconds(layer.live)
        found.append(
            {
                "layer": layer.name,
                "shape": layer.shape,
                "predicted_us": f"{1e6 * ours:.1f}",
                "bound_by": "bytes" if ours == moved else "products",
                "over_eager_at_most": f"{seconds(layer.k**2) / ours:.2f}",
                "over_crop_at_most": f"{seconds(layer.k * (layer.k // 2 + 1)) / ours:.2f}",
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--convolutions", action="store_true", help="those of the convolutions, in place of the others")
    if parser.parse_args().convolutions:
        found, name = of_convolutions(), "conv_bounds.csv"
    else:
        import triton

        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        common = {"target": f"sm_{CAPABILITY}", "triton": triton.__version__, "commit": commit.stdout.strip()}
        found, name = [common | row for row in predictions(compiled_kernels())], "bounds.csv"
    with (rows.RESULTS / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    print(rows.aligned([tuple(found[0]), *(tuple(map(str, row.values())) for row in found)]))


if __name__ == "__main__":
    main()
