"""`nextquill demo`: the comparison of losses on synthetic users, with its picture and page, in a source checkout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextquill.cli.checkout import checkout_module, require_checkout
from nextquill.cli.flags import option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse

DESCRIPTION = (
    "Train a small model of synthetic users whose personal tokens are known, with each loss from the same start, and "
    "compare. Writes demo.png, demo.html, results.json and results.csv."
)


@dataclass
class DemoOptions:
    """A demonstration."""

    output_dir: str = option("Where the picture, the page and the figures go.", "demo", metavar="DIR")
    seed: int = option("Users, models and data order follow from it.", 0)
    seeds: int | None = option("Runs, each with its own users and models (3).", None)
    quick: bool = option("A few seconds' run that shows the machinery, not the result.", False)


OPTIONS = (DemoOptions,)


def run(arguments: Sequence[str]) -> int:
    return run_demo("demo", "demos.losses.run", DESCRIPTION, arguments, "demo")


def run_demo(command: str, module: str, description: str, arguments: Sequence[str], output_dir: str) -> int:
    """Run a demo of the checkout that this package belongs to; `output_dir` is the flag's default."""
    require_checkout(command, "demos")  # before --help, which would promise what a wheel does not hold
    (options,) = parse(command, description, OPTIONS, arguments, defaults={"output_dir": output_dir})
    demo = checkout_module(command, module)
    demo.run_demo(options.output_dir, seed=options.seed, seeds=options.seeds, quick=options.quick)
    return OK
