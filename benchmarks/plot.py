"""Draws benchmarks/results into docs/figures: the ops, memory, masked convolutions, drawing images, drop-ins.

One figure for each kind of rows and device, of the newest rows of each machine's last commit.
"""

import argparse
from itertools import groupby
from pathlib import Path

import plot_rivals
import plot_speed
import plot_style
import rows

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
DRAWN = {  # by the prefix of a file of rows
    "": ("speed", plot_speed.draw),
    "memory_": ("memory", plot_rivals.memory),
    "conv_": ("convolutions", plot_rivals.convolutions),
    "sampling_": ("sampling", plot_rivals.sampling),
    "dropins_": ("dropins", plot_rivals.dropins),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR", help="default: docs/figures")
    options = parser.parse_args()
    paths = options.path or rows.result_files(*rows.PREFIXES)
    try:
        found = rows.by_prefix(paths)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{rows.sentence(error)}\n")
    if not any(found.values()):
        parser.exit(1, f"no rows in {', '.join(map(str, paths)) or rows.RESULTS}: run pytest benchmarks\n")
    plot_style.use()
    options.output.mkdir(parents=True, exist_ok=True)
    for prefix, of_kind in found.items():
        name, draw = DRAWN[prefix]
        for path, group in figures(of_kind, name):
            plot_style.save(draw(group), options.output / path)
            print(options.output / path)


def figures(found: list, name: str):
    """Names of files and the rows of each; the machine measured last has the plain name of its device."""
    for on_gpu in sorted({row.on_gpu for row in found}):
        of_device = sorted((row for row in found if row.on_gpu == on_gpu), key=by_run)
        machines = [list(group) for _, group in groupby(of_device, key=by_run)]
        newest = max(machines, key=lambda group: max(row.timestamp for row in group))
        for group in machines:
            suffix = ""
            if group is not newest:
                suffix = "_" + "".join(c if c.isalnum() else "-" for c in group[0].machine.lower())
            yield f"{name}_{'cuda' if on_gpu else 'cpu'}{suffix}.png", group


def by_run(row) -> tuple:
    return row.run


if __name__ == "__main__":
    main()
