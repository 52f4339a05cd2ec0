"""`nextquill bench`: the benchmark suites of a source checkout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NoReturn

from nextquill.cli.checkout import checkout_module
from nextquill.cli.flags import UsageError
from nextquill.cli.known_flags import unknown_flag


def run(arguments: Sequence[str]) -> int:
    """Run `benchmarks.run` of the checkout that this package belongs to."""
    suites = checkout_module("bench", "benchmarks.run")
    parser = suites.make_parser("nextquill bench")
    parser.error = partial(_refuse, {name.strip("-"): name.strip("-") for name in parser._option_string_actions})
    code: int = suites.main(arguments, parser)
    return code


def _refuse(known: Mapping[str, str], message: str) -> NoReturn:
    kind, _, words = message.partition(": ")
    flag = next((word for word in words.split() if word.startswith("-")), None)
    raise UsageError(unknown_flag(flag, known) if flag and kind == "unrecognized arguments" else message)
