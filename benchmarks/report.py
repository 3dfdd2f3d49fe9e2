"""Prints the tables of `pytest benchmarks` from stored rows: of each machine's last commit, the newest of each case."""

import argparse
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    parser.add_argument("--goals", action="store_true", help="only a line for each goal, with the row furthest off it")
    options = parser.parse_args()
    for path in options.path:
        if not path.exists():
            parser.exit(1, f"{path} does not exist\n")
    speed, memory = (
        [path for path in options.path if path.name.startswith("memory_") == (kind is rows.MemoryRow)]
        if options.path
        else rows.result_files(kind)
        for kind in (rows.Row, rows.MemoryRow)
    )
    found, counted = rows.stored(speed), rows.stored(memory, rows.MemoryRow)
    if not found and not counted:
        parser.exit(1, f"no rows in {', '.join(map(str, options.path or [rows.RESULTS]))}: run pytest benchmarks\n")
    for run, group in by_run(found):
        machine, threads, isa, torch, fastelbo, python, commit = run
        group = list(group)
        print(f"{machine}, {device(group[0], threads, isa)}; {versions(torch, fastelbo, python, commit)}")
        print(rows.goals_table(group) if options.goals else rows.table(group), end="\n\n")
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
