"""Prints the table of `pytest benchmarks` from stored rows: of each machine's last commit, the newest of each case."""

import argparse
from itertools import groupby
from pathlib import Path

import rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="*", type=Path, help="CSV files of rows; default: all of benchmarks/results")
    paths = parser.parse_args().path or sorted(rows.RESULTS.glob("*.csv"))
    if not paths:
        parser.exit(1, f"no rows in {rows.RESULTS}: run pytest benchmarks\n")
    found = sorted((row for path in paths for row in rows.read(path)), key=lambda row: row.timestamp)
    last = {row.run[:-1]: row.commit for row in found}
    found = [row for row in found if row.commit == last[row.run[:-1]]]
    for run, group in groupby(sorted(found, key=lambda row: row.run), key=lambda row: row.run):
        print("{}, {} threads, {}; torch {}, fastelbo {}, Python {}; commit {}".format(*run))
        print(rows.table(group), end="\n\n")


if __name__ == "__main__":
    main()
