"""`nextquill demo`: the comparison of losses on synthetic users, with its picture and page."""

from __future__ import annotations

from collections.abc import Sequence

from nextquill.cli.main import OK
from nextquill.cli.options import DemoOptions
from nextquill.cli.parsing import parse

DESCRIPTION = (
    "Train a small model of synthetic users whose personal tokens are known, with each loss from the same start, and "
    "compare. Writes demo.png, demo.html, results.json and results.csv."
)


def run(arguments: Sequence[str]) -> int:
    (options,) = parse("demo", DESCRIPTION, (DemoOptions,), arguments)
    from nextquill.demo import run_demo

    run_demo(options.output_dir, seed=options.seed, seeds=options.seeds, quick=options.quick)
    return OK
