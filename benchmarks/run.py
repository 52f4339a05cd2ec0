"""Run benchmark suites and write their figures: `python -m benchmarks.run [--suite NAME]`, or `nextquill bench`."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Row

#: Modules with a function `run(options)`, imported on use because `step` needs transformers and `head` only torch.
SUITES = {
    "step": "benchmarks.step",
    "head": "benchmarks.head",
    "native": "benchmarks.native",
    "prepare": "benchmarks.prepare",
    "popi": "benchmarks.popi",
    "mirror": "benchmarks.mirror",
    "generate": "benchmarks.generate",
}


def make_parser(prog: str = "python -m benchmarks.run") -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(prog=prog, description="Check, then time, the losses.", allow_abbrev=False)
    parser.add_argument("--suite", choices=sorted(SUITES), action="append", help="suites to run; all by default")
    parser.add_argument("--rounds", type=_positive(int), default=7, help="the most turns that each provider takes")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, as a test run")
    parser.add_argument("--full", action="store_true", help="the largest size, if a suite has one (prepare)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default a GPU if there is one")
    parser.add_argument("--model", help="a model by name or folder, if a suite takes one (generate, step)")
    parser.add_argument(
        "--budget", type=_positive(float), default=330.0, help="seconds per suite; fewer rounds run if time is short"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the CSV files")
    parser.add_argument("--csv", type=Path, help="the CSV file itself, with one --suite")
    return parser


def main(arguments: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Parse the flags, then run, print and write the suites; return 1 if a result was wrong or no model was loaded."""
    parser = parser or make_parser()
    chosen = parser.parse_args(arguments)
    names = chosen.suite or sorted(SUITES)
    if chosen.csv and len(names) != 1:
        parser.error("--csv: expected exactly one --suite")
    from benchmarks.measure import GateError, Options, default_device, write_csv  # imports torch
    from nextquill.errors import UnsupportedModelError

    code = 0
    for name in names:
        kind = "real-step" if name == "step" and chosen.model else name
        path = chosen.csv or chosen.out / file_name(kind, chosen.device or default_device())
        saved: list[Row] = []

        def save(rows: list[Row], path: Path = path, saved: list[Row] = saved) -> None:
            saved[:] = rows
            write_csv(rows, path)

        options = Options(chosen.rounds, chosen.quick, chosen.device, chosen.budget, save, chosen.full, chosen.model)
        try:
            save(importlib.import_module(SUITES[name]).run(options))
        except GateError as error:
            print(error, file=sys.stderr)
            code = 1
        except UnsupportedModelError as error:
            if not chosen.model:
                raise
            print(f"--model: {str(error).removeprefix('model_name_or_path: ')}", file=sys.stderr)
            code = 1
        if saved:
            show(saved)
            print(f"wrote {path}\n")
    return code


#: Suites whose ratios to other code depend on the processor, so that each processor has its own file.
_PER_PROCESSOR = ("step", "real-step")


def file_name(suite: str, device: str) -> str:
    """The CSV's name: `head.csv` for all CPUs, `step-cpu-amd-epyc.csv` for one, `head-nvidia-h200.csv` for a GPU."""
    from benchmarks.measure import device_name, short_name

    if device != "cuda" and suite not in _PER_PROCESSOR:
        return f"{suite}.csv"
    slug = re.sub(r"[^a-z0-9]+", "-", short_name(device_name(device)).lower()).strip("-")
    return f"{suite}-{slug}.csv" if device == "cuda" else f"{suite}-cpu-{slug}.csv"


def show(rows: list[Row]) -> None:
    """Print the figures, case by case, and the reasons for missing ones."""
    group = None
    for row in rows:
        if (row.case, row.loss, row.mode, row.head) != group:
            group = row.case, row.loss, row.mode, row.head
            print(f"\n{', '.join(filter(None, group))}  ({row.device}, {row.threads} threads, torch {row.torch})")
        if row.metric == "status":
            print(f"  {row.provider or 'everything':<28} {row.note}")
            continue
        against = f" of {row.baseline}" if row.baseline else ""
        spread = f"  [{row.p20:.4g}, {row.p80:.4g}]" if row.rounds > 1 else ""
        note = f"  {row.note}" if row.note else ""
        print(f"  {row.provider:<28} {row.metric:<18} {row.value:10.4g} {row.unit}{against}{spread}{note}")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse shows this name if `kind` itself fails
    return convert


if __name__ == "__main__":
    sys.exit(main())
