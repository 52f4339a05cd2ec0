"""`run_demo`: train POPI on artificial users with hidden preferences, and measure it on others, in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from demos.kit.run import Demo, DemoReport, as_records
from demos.popi.findings import find
from demos.popi.measuring import PopiRun, figures, measure
from demos.popi.presentation import page
from demos.popi.recipe import PopiRecipe


def report(recipe: PopiRecipe, runs: Sequence[PopiRun]) -> DemoReport:
    """What all seeds come to; of each seed, its users' summaries and what training logged."""
    measured = figures(runs)
    findings = find(measured, recipe)
    seeds = [
        {"seed": run.seed, "users": [asdict(user) for user in run.users], "history": list(run.history)} for run in runs
    ]
    record = {"findings": as_records(findings), **asdict(measured), "seeds": seeds}
    return DemoReport(findings, page(recipe, measured, runs), record, printed=1)


#: `seed` and `seeds` are its settings.
run_demo = Demo(PopiRecipe, measure, report, packages=("torch", "transformers", "peft")).run
