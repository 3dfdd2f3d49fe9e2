"""Prints the tables of `pytest benchmarks` from stored rows: of each machine's last commit, the newest of each case."""

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import rows
import tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--goals", action="store_true", help="only a line for each goal, with the row furthest off it")
    options = parser.parse_args()
    paths = options.path or rows.result_files(*rows.PREFIXES)
    try:
        found = rows.by_prefix(paths)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{rows.sentence(error)}\n")
    if not any(found.values()):
        parser.exit(1, f"no rows in {', '.join(map(str, paths)) or rows.RESULTS}: run pytest benchmarks\n")
    for prefix, of_kind in found.items():
        title, table = tables.TABLES[prefix]
        if options.goals and not prefix:
            title, table = "goals", rows.goals_table
        for _, group in by_run(of_kind):
            group = list(group)
            print(f"{head(group[0])}\n{title}:\n{table(group)}", end="\n\n")


def by_run(found: list) -> Iterable:
    return groupby(sorted(found, key=lambda row: row.run), key=lambda row: row.run)


def head(row: "rows.Row | rows.MemoryRow") -> str:
    """The machine, versions and commit."""
    threads = f"{row.threads} threads, {row.isa}" if isinstance(row, rows.Row) else ""
    device = f"CUDA {row.cuda}, Triton {row.triton or 'none'}" if row.on_gpu else threads
    versions = f"torch {row.torch}, fastelbo {row.fastelbo}, Python {row.python}; commit {row.commit}"
    return f"{', '.join(filter(None, (row.machine, device)))}; {versions}"


if __name__ == "__main__":
    main()
