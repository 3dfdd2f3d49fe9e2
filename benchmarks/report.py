"""Prints the tables of `pytest benchmarks` from stored rows: of each machine's last commit, the newest of each case."""

import argparse
from pathlib import Path

import rows
import tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--slower", action="store_true", help="only the cases in which a rival is faster")
    options = parser.parse_args()
    try:
        stored = rows.stored_in(options.path or rows.result_files())
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    all_tables = (rows.Row, tables.speed), (rows.MemoryRow, tables.memory)
    for kind, table in [(rows.Row, tables.slower)] if options.slower else all_tables:
        for _, of_run in rows.grouped((row for row in stored if isinstance(row, kind)), lambda row: row.run):
            print(of_run[0].origin, table(of_run), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
