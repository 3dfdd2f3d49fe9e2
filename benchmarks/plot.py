"""Draws the rows of benchmarks/results: a figure for each kind of case and device, of the newest rows of each machine's
last commit, to docs/figures: speed, memory, convolutions, sampling and dropins.
"""

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import rows
from figures import convolutions, dropins, memory, sampling, speed, style

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
DRAW = {kind.__name__.split(".")[1]: kind.draw for kind in (convolutions, dropins, memory, sampling, speed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR", help="default: docs/figures")
    options = parser.parse_args()
    try:
        figures = rows_of(options.path or rows.result_files())
        options.output.mkdir(parents=True, exist_ok=True)
        style.use()
        for name, of_machine in figures.items():
            path = options.output / f"{name}.png"
            style.save(DRAW[name.split("_")[0]](of_machine), path)
            print(path)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def rows_of(paths: Iterable[Path]) -> dict[str, list]:
    return figures_of(rows.stored_in(paths))


def figures_of(found: list) -> dict[str, list]:
    """Rows by the name of the figure that they make."""
    figures = {}
    for name, group in grouped(found, lambda row: f"{rows.topic(row)}_{'cuda' if row.on_gpu else 'cpu'}"):
        machines = [of_machine for _, of_machine in grouped(group, lambda row: row.run)]
        newest = max(machines, key=lambda of_machine: max(row.timestamp for row in of_machine))
        for of_machine in machines:
            machine = "".join(c if c.isalnum() else "-" for c in of_machine[0].machine.lower())
            figures[name if of_machine is newest else f"{name}_{machine}"] = of_machine
    return figures


def grouped(found: list, key) -> list[tuple]:
    return [(name, list(group)) for name, group in groupby(sorted(found, key=key), key=key)]


if __name__ == "__main__":
    main()
