"""`nextquill popi demo`: synthetic users with hidden preferences, and what summaries of them are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.cli.flags import option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse

DESCRIPTION = (
    "Train a small model of synthetic users, whose preferences are known, to write summaries and to read them, and "
    "measure both on users it has not seen."
)


@dataclass
class PopiDemoOptions:
    """The demonstration."""

    output_dir: str = option("Where the page and the figures go.", "popi-demo", metavar="DIR")
    seed: int = option("Users, models and data order follow from it.", 0)
    seeds: int | None = option("Runs, each with its own users and models (3).", None)
    quick: bool = option("A few seconds' run that shows the machinery, not the result.", False)


def run(arguments: Sequence[str]) -> int:
    (options,) = parse("popi demo", DESCRIPTION, (PopiDemoOptions,), arguments)
    from nextquill.popi.demo import run_demo

    run_demo(options.output_dir, seed=options.seed, seeds=options.seeds, quick=options.quick)
    return OK
