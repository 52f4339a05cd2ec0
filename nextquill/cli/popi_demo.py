"""`nextquill popi demo`: trains on synthetic users with hidden preferences and measures the effect of summaries."""

from __future__ import annotations

from collections.abc import Sequence

from nextquill.cli.demo import DemoOptions, parsed, run_demo

DESCRIPTION = (
    "Train a small model to write summaries of synthetic users whose preferences are known, and to read them; measure "
    "both on unseen users."
)
OPTIONS = (DemoOptions,)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    (options,) = parsed("popi demo", DESCRIPTION, OPTIONS, arguments, "popi-demo")
    return run_demo("popi demo", "demos.popi.run", options)
