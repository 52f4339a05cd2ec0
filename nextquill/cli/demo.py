"""`nextquill demo`: losses on synthetic users, or a real model on real texts, with picture and page, in a checkout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nextquill.cli.checkout import checkout_module, require_checkout
from nextquill.cli.flags import option
from nextquill.cli.load_and_score import quieten_transformers
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.errors import ArgumentError

DESCRIPTION = (
    "Train a small model on synthetic users whose personal tokens are known, with each loss from the same start, and "
    "compare. Writes demo.png, demo.html, results.json and results.csv. With --model a real model reads real people's "
    "texts instead, in minutes and without training. This shows which words a person's own history makes more likely, "
    "on which past text they depend, and one question answered for two people. It writes demo.html, people.svg and "
    "results.json."
)


@dataclass
class DemoOptions:
    """A demonstration."""

    output_dir: str = option("Where the picture, the page and the figures go.", "demo", metavar="DIR")
    seed: int = option("Seed of the users, the models and the data order.", 0)
    seeds: int | None = option("Number of runs, each with its own users and models (default: 3).", None)
    quick: bool = option("A run of a few seconds, which shows that it works, not the result.", False)


@dataclass
class PeopleOptions:
    """A real model."""

    model: str | None = option(
        "The model that reads the shipped real texts: a model folder, a run's folder, or a name on the hub.", None,
        ["model_name_or_path"], metavar="MODEL",
    )  # fmt: skip


OPTIONS = (DemoOptions, PeopleOptions)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    options, people = parsed("demo", DESCRIPTION, OPTIONS, arguments, "demo")
    if people.model is None:
        return run_demo("demo", "demos.losses.run", options)
    for name, given in (("seed", options.seed != 0), ("seeds", options.seeds is not None)):
        if given:
            raise ArgumentError(f"{name}: expected none with --model, as that demo draws nothing")
    demo = checkout_module("demo", "demos.people.run")
    quieten_transformers()
    demo.run_demo(options.output_dir, people.model, quick=options.quick)
    return OK


def parsed(
    command: str, description: str, kinds: Sequence[type], arguments: Sequence[str], output_dir: str
) -> tuple[Any, ...]:
    """The options of a demo of the checkout that this package belongs to; `output_dir` is the flag's default."""
    require_checkout(command, "demos")  # before --help, which would promise what a wheel does not hold
    return parse(command, description, kinds, arguments, defaults={"output_dir": output_dir})


def run_demo(command: str, module: str, options: DemoOptions) -> int:
    """Run a demo of artificial users."""
    demo = checkout_module(command, module)
    demo.run_demo(options.output_dir, seed=options.seed, seeds=options.seeds, quick=options.quick)
    return OK
