"""`nextquill bench`: the benchmark suites of a source checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import nextquill
from nextquill.errors import ArgumentError


def run(arguments: Sequence[str]) -> int:
    """Run `benchmarks.run` of the checkout that this package belongs to."""
    suites = importlib.import_module(f"{_checkout().name}.run")
    parser = suites.make_parser("nextquill bench")
    parser.error = _refuse
    code: int = suites.main(arguments, parser)
    return code


def _checkout() -> Path:
    """The `benchmarks` folder beside this package, made importable; a package of that name elsewhere is not ours.

    Raises:
        ArgumentError: nextquill was installed from a wheel, which has no benchmarks.
    """
    root = Path(nextquill.__file__).resolve().parent.parent
    folder = root / "benchmarks"
    if not (folder / "run.py").is_file():
        raise ArgumentError(
            f"bench: the benchmarks are part of the source tree, not of an installed package ({root} has none); "
            "run it from a checkout"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return folder


def _refuse(message: str) -> NoReturn:
    from nextquill.cli.parsing import UsageError

    raise UsageError(message)
