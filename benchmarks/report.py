"""Prints the tables of `pytest benchmarks` from stored rows: of each machine's last commit, the newest of each case."""

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument(
        "--goals",
        action="store_true",
        help="a line for each goal, with the row furthest off it, in place of all rows that have goals",
    )
    options = parser.parse_args()
    try:
        stored = rows.stored_in(options.path or rows.result_files())
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    found = [row for row in stored if isinstance(row, rows.Row)]
    counted = [row for row in stored if isinstance(row, rows.MemoryRow)]
    for run, group in by_run(found):
        machine, threads, isa, torch, fastelbo, python, commit = run
        group = list(group)
        print(f"{machine}, {device(group[0], threads, isa)}; {versions(torch, fastelbo, python, commit)}")
        if options.goals and any(rows.topic(row) == "speed" for row in group):
            print(rows.goals_table(group), end="\n\n")
            group = [row for row in group if rows.topic(row) != "speed"]
        if group:
            print(rows.table(group), end="\n\n")
    for run, group in by_run(counted):
        machine, torch, _, _, *others = run
        print(f"{machine}, memory; {versions(torch, *others)}")
        print(rows.memory_table(group), end="\n\n")


def by_run(found: list) -> Iterable:
    return groupby(sorted(found, key=lambda row: row.run), key=lambda row: row.run)


def device(row: rows.Row, threads: int, isa: str) -> str:
    return f"CUDA {row.cuda}, Triton {row.triton or 'none'}" if row.on_gpu else f"{threads} threads, {isa}"


def versions(torch: str, fastelbo: str, python: str, commit: str) -> str:
    return f"torch {torch}, fastelbo {fastelbo}, Python {python}; commit {commit}"


if __name__ == "__main__":
    main()
