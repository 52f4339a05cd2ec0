"""The demo: which loss moves a user's personal tokens soonest, on a world where they are known.

`run_demo` trains a small model on one core in about two minutes, compares six losses from the same starting point, and
writes a picture, a page and the figures. Importing this package imports nothing else; torch and transformers come with
the first use of a name below.

    world.py         users, histories, reviews, and which of their tokens are personal
    training.py      the model and the three phases, as a plain PyTorch loop
    evaluation.py    what is measured on unseen users
    results.py       rows, their summary over seeds, CSV and JSON
    findings.py      the sentences that follow from a run's figures
    presentation.py  the run as tables, curves and coloured responses for `nextquill.report`
    run.py           all of it in order
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextquill.demo.results import DemoResult as DemoResult
    from nextquill.demo.run import run_demo as run_demo

__all__ = ["DemoResult", "run_demo"]

_HOMES = {"DemoResult": "nextquill.demo.results", "run_demo": "nextquill.demo.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
