"""What the phases share: a file of figures that is complete after every figure, and the flags of a phase's process."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row, default_device, make_row, write_csv


class Sheet:
    """Rows in a CSV file, which is rewritten with every new row. Rows of other suites in the file stay."""

    def __init__(self, path: Path, suite: str) -> None:
        self.path, self.suite = path, suite
        self.rows = [row for row in read_rows(path) if row.suite != suite]

    def add(self, row: Row) -> None:
        """Add a figure."""
        self.rows.append(row)
        write_csv(self.rows, self.path)
        value = f"{row.value:.5g} {row.unit}" if row.value == row.value else ""
        print(" ".join(filter(None, (row.suite, row.case, row.provider, row.metric, value, row.note))), flush=True)

    def note(self, what: str, reason: str) -> None:
        """Say why something has no figure."""
        self.add(make_row(self.suite, what, "", "status", "", [], note=f"not measured: {reason}"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a file (none if it is not there)."""
    if not path.is_file():
        return []
    numbers: dict[str, Callable[[str], Any]] = {"value": float, "p20": float, "p80": float, "rounds": int}
    numbers["threads"] = int
    with path.open(newline="", encoding="utf-8") as stream:
        return [
            Row(**{field.name: numbers.get(field.name, str)(record[field.name]) for field in fields(Row)})
            for record in csv.DictReader(stream)
        ]


Run = Callable[[Sheet, torch.device, bool, float], None]


def phase_main(suite: str, run: Run, arguments: Sequence[str] | None) -> int:
    """Run a phase with the flags of its process.

    Args:
        suite: the phase's name in its rows.
        run: gets the sheet, the device, whether sizes are tiny, and the deadline on `time.monotonic`.
        arguments: the flags; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.gpu.{suite}", description=sys.modules[run.__module__].__doc__
    )
    parser.add_argument("--csv", type=Path, required=True, help="file of the figures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=120, help="nothing new is started after this time")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    run(Sheet(options.csv, suite), torch.device(options.device), options.quick, deadline)
    return 0
