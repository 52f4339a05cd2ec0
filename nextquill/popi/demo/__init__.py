"""The demo: what a summary of a user is worth, in a world where what users prefer is known.

`run_demo` pretrains a small model, trains it as `POPITrainer` trains any, and compares on users and preferences that
training has not seen: no context, the raw signals, and summaries before and after. Importing this package imports
nothing else; torch and transformers come with the first use of a name below.

    world.py         users with hidden preferences, and pairs of answers that show them
    recipe.py        the settings of a run
    training.py      the base model, POPI, and the generator that reads raw signals instead
    measuring.py     what is measured on unseen users
    findings.py      the sentences that follow from a run's figures
    presentation.py  the run as table, curves and page
    run.py           all of it in order
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nextquill.lazy import on_first_use

if TYPE_CHECKING:
    from nextquill.popi.demo.run import DemoResult, run_demo
else:
    __getattr__, __dir__ = on_first_use(__name__, ("run",))

__all__ = ["DemoResult", "run_demo"]
