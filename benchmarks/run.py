"""Run benchmark suites and write their figures: `python -m benchmarks.run [--suite NAME]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import head, step
from benchmarks.measure import RESULTS, Row, write_csv

SUITES = {"step": step.run, "head": head.run}


def main() -> None:
    """Parse the flags, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="which to run; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="turns that each provider takes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: expected a positive number, got {options.rounds}")
    for name in options.suite or sorted(SUITES):
        rows = SUITES[name](options.rounds, options.quick)
        show(rows)
        path = options.out / f"{name}.csv"
        write_csv(rows, path)
        print(f"wrote {path}\n")


def show(rows: list[Row]) -> None:
    """Print the figures, a case at a time."""
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            print(f"\n{row.suite}: {case}  ({row.device}, {row.threads} threads, torch {row.torch})")
        against = f" of {row.baseline}" if row.baseline else ""
        print(
            f"  {row.provider:<28} {row.metric:<8} {row.value:9.3f} {row.unit}{against}  [{row.p20:.3f}, {row.p80:.3f}]"
        )


if __name__ == "__main__":
    main()
