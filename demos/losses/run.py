"""`run_demo`: six losses from the same start, on artificial users with known personal tokens, in about two minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from demos.kit.run import Demo, DemoReport, as_records
from demos.losses.findings import find, timing_note
from demos.losses.measuring import BASE, LossRow, LossRun, RowTable, UnseenUsers, step_times
from demos.losses.presentation import SHOWN_METHODS, page, response_views
from demos.losses.recipe import LossRecipe
from demos.losses.training import SFT, make_contestants, phase_c_steps, train_base
from demos.losses.world import LossWorld
from nextquill.report.progress import Progress

BEFORE_C = ("seed", "reading_steps", "reading_accuracy")


def measure(recipe: LossRecipe, seed: int, progress: Progress) -> LossRun:
    """Train the base, and from it every contestant; all are measured at every checkpoint."""
    world = LossWorld(seed, dev_users=recipe.dev_users, test_users=recipe.test_users)
    base, reading_steps, reading_accuracy = train_base(world, recipe, seed, progress)
    unseen, contestants = UnseenUsers(world.test), make_contestants(base, recipe.learning_rate)
    rows = [LossRow(seed, BASE, None, 0, **unseen.measure(base)[0])]
    probabilities = {}
    for step in phase_c_steps(contestants, world, world.new_items, recipe):
        progress("C: six losses", step, recipe.long_steps)
        if step not in recipe.checkpoints:
            continue
        sft_seconds = next(each.seconds for each in contestants if each.name == SFT)
        for each in contestants:
            figures, probabilities[each.name] = unseen.measure(each.model)
            times = step_times(each.seconds, sft_seconds)
            rows.append(LossRow(seed, each.name, each.learning_rate, step, **figures, **times))
    shown = response_views(world.test, {method: probabilities[method] for method in SHOWN_METHODS})
    return LossRun(seed, reading_steps, reading_accuracy, rows, shown)


def report(recipe: LossRecipe, runs: Sequence[LossRun]) -> DemoReport:
    """What all seeds come to."""
    rows = [row for run in runs for row in run.rows]
    table = RowTable(rows)
    findings, timing = find(table, recipe, runs), timing_note(table, recipe)
    record = {
        "seed_runs": [{name: getattr(run, name) for name in BEFORE_C} for run in runs],
        "findings": as_records(findings),
        "rows": [asdict(row) for row in rows],
        "timing": timing,
    }
    whole = page(recipe, table, runs, timing)
    return DemoReport(findings, whole, record, printed=len(whole.tables))


#: `seed`, `seeds`, `steps` and `long_steps` are its settings; the losses are compared after both numbers of steps.
run_demo = Demo(LossRecipe, measure, report).run
