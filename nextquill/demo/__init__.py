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

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.demo.results import DemoResult
    from nextquill.demo.run import run_demo
else:
    __getattr__, __dir__ = on_first_use(__name__, ("results", "run"))

__all__ = ["DemoResult", "run_demo"]
