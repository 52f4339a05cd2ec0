"""`nextquill bench`: the benchmark suites of a source checkout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from nextquill.cli.checkout import checkout_module


def run(arguments: Sequence[str]) -> int:
    """Run `benchmarks.run` of the checkout that this package belongs to."""
    suites = checkout_module("bench", "benchmarks.run")
    parser = suites.make_parser("nextquill bench")
    parser.error = _refuse
    code: int = suites.main(arguments, parser)
    return code


def _refuse(message: str) -> NoReturn:
    from nextquill.cli.parsing import UsageError

    raise UsageError(message)
