"""Draws the rows of benchmarks/results: a figure for each kind of case and device, of the newest rows of each machine's
last commit, to docs/figures: speed, memory, convolutions, sampling and dropins."""

import argparse
from pathlib import Path

import rows
from figures import convolutions, dropins, memory, sampling, speed, style
from matplotlib import pyplot

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
KINDS = {"convolutions": convolutions, "dropins": dropins, "memory": memory, "sampling": sampling, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--output", type=Path, default=FIGURES, metavar="DIR", help="default: docs/figures")
    options = parser.parse_args()
    try:
        figures = figures_of(rows.stored_in(options.path or rows.result_files()))
        options.output.mkdir(parents=True, exist_ok=True)
        pyplot.style.use(style.SHEET)
        for name, of_machine in figures.items():
            path = options.output / f"{name}.png"
            style.save(KINDS[name.split("_")[0]].draw(of_machine), path)
            print(path)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")


def figures_of(found: list) -> dict[str, list]:
    """Rows by the name of the figure that they make."""
    figures = {}
    for name, group in rows.grouped(found, lambda row: f"{rows.topic(row)}_{'cuda' if row.on_gpu else 'cpu'}"):
        machines = [of_machine for _, of_machine in rows.grouped(group, lambda row: row.run)]
        newest = max(machines, key=lambda of_machine: max(row.timestamp for row in of_machine))
        for of_machine in machines:
            machine = "".join(c if c.isalnum() else "-" for c in of_machine[0].machine.lower())
            figures[name if of_machine is newest else f"{name}_{machine}"] = of_machine
    return figures


if __name__ == "__main__":
    main()
