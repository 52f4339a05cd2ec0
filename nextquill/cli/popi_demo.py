"""`nextquill popi demo`: synthetic users with hidden preferences, and what summaries of them are worth."""

from __future__ import annotations

from collections.abc import Sequence

from nextquill.cli.demo import run_demo

DESCRIPTION = (
    "Train a small model of synthetic users, whose preferences are known, to write summaries and to read them, and "
    "measure both on users it has not seen."
)


def run(arguments: Sequence[str]) -> int:
    return run_demo("popi demo", "demos.popi.run", DESCRIPTION, arguments, "popi-demo")
