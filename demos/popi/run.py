"""`run_demo`: train POPI on artificial users with hidden preferences, and measure it on others, in minutes.

The results are tables and curves for `nextquill.report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean

from demos.kit.figures import curve, picture
from demos.kit.run import DemoReport, run_seeds
from demos.popi.findings import find
from demos.popi.measuring import BEFORE, SUMMARY, PopiFigures, PopiRun, Share, figures, measure
from demos.popi.recipe import PopiRecipe
from nextquill.report.data import Cell, Column, Page, Panel, Picture, Table

SHOWN_USERS = 6
# A point of a curve is the mean of so many steps, because a single step has only a few users.
_WINDOW = 5

_COLUMNS = (
    Column("context"),
    Column("right", "pairs", "Share of unseen users' pairs judged rightly, with its interval of 95%"),
    Column("by seed", "pairs", "The same in each seed"),
    Column("tokens", explanation="Mean tokens that the context adds to a prompt"),
    Column("stated", "preferences", "Share of the user's hidden preferences that the summary states"),
    Column("by seed", "preferences", "The same in each seed", secondary=True),
)
TABLE_NOTE = (
    "All users, and all their combinations of preferences, are unseen in training. Intervals of 95% draw whole users, "
    "of all seeds together. raw signals: by a generator that was trained on them; all others by the generator that "
    "POPI trained, which was given no raw signals in training. Another user's summary is the placebo. "
    "true preferences: the most that a summary of these words can say."
)


def results_table(measured: PopiFigures, recipe: PopiRecipe) -> Table:
    """A row for each context."""
    rows = []
    for name, each in measured.contexts.items():
        right, right_by_seed = _cells(each.accuracy, marked=name == SUMMARY)
        stated = _cells(measured.stated.get(name), marked=name == SUMMARY)
        rows.append([Cell(name), right, right_by_seed, Cell(f"{each.context_tokens:.1f}"), *stated])
    seeds = "1 seed" if recipe.seeds == 1 else f"{recipe.seeds} seeds"
    return Table(f"{recipe.test_users * recipe.seeds} unseen users, {seeds}", _COLUMNS, rows)


def _cells(share: Share | None, *, marked: bool) -> tuple[Cell, Cell]:
    """A share with its interval, and by seed."""
    if share is None:
        return Cell(""), Cell("")
    by_seed = " ".join(f"{value:.2f}" for value in share.by_seed)
    return Cell(f"{share.value:.2f}", f"{share.low:.2f} to {share.high:.2f}", marked), Cell(by_seed)


def examples_table(run: PopiRun) -> Table:
    """The first test users of a seed, whoever they are, and what is said of them."""
    columns = (Column("hidden preferences"), Column("summary before training"), Column("summary"))
    users = run.users[:SHOWN_USERS]
    texts = [(", ".join(user.preferences), user.summaries[BEFORE], user.summaries[SUMMARY]) for user in users]
    return Table(
        f"The first {len(users)} test users of seed {run.seed}", columns, [list(map(Cell, row)) for row in texts]
    )


def _curves(runs: Sequence[PopiRun]) -> Picture:
    """The figures that training logged: mean and range over the seeds."""
    starts = range(0, len(runs[0].history), _WINDOW)

    def panel(title: str, hint: str, key: str) -> Panel:
        values = [[fmean(e.get(key, 0.0) for e in run.history[at : at + _WINDOW]) for run in runs] for at in starts]
        ends = [min(start + _WINDOW, len(runs[0].history)) for start in starts]
        label = "training" if len(runs) == 1 else f"mean and range of {len(runs)} seeds"
        return Panel(title, hint, [curve(label, ends, values, colour=2)])

    panels = [
        panel("Reward of a summary", "minus the loss of the user's pairs, nats; higher is better", "reward"),
        panel("What summaries say of choices", "informativeness, nats per pair; higher is better", "informativeness"),
    ]
    ends = "; ".join(
        f"{each.title}: {each.series[0].y[0]:.2f} at first, {each.series[0].y[-1]:.2f} at the end" for each in panels
    )
    return picture(
        panels,
        "steps of POPI",
        alt=f"Two plots over the steps of training. {ends}.",
        caption=f"On the training users, as training logs it; a point is the mean of {_WINDOW} steps.",
    )


def page(recipe: PopiRecipe, measured: PopiFigures, runs: Sequence[PopiRun]) -> Page:
    """The page of a run: the curves, and the tables."""
    return Page(
        title="nextquill popi demo: what a summary of a user is worth",
        lead=(
            "Artificial users with two hidden preferences each, pairs of answers that depend on them, and a small "
            "model that learns, from pairs alone, to sum up a user in four words and to go by them. "
            "All sentences below follow from this run's figures."
        ),
        picture=_curves(runs),
        tables=[results_table(measured, recipe), examples_table(runs[0])],
        table_notes=(TABLE_NOTE,),
        footer=(
            f"{recipe.base_steps} steps of the base, {recipe.steps} of POPI with {recipe.batch_users} users, "
            f"{recipe.group_size} summaries and {recipe.pairs_per_user} pairs of each; {recipe.signals} signals of a "
            "user."
        ),
    )


def report(recipe: PopiRecipe, runs: Sequence[PopiRun]) -> DemoReport:
    """Draw the conclusions from all seeds; with each seed's summaries of users and training log."""
    measured = figures(runs)
    seeds = [
        {"seed": run.seed, "users": [asdict(user) for user in run.users], "history": list(run.history)} for run in runs
    ]
    record = {**asdict(measured), "seeds": seeds}
    return DemoReport(find(measured, recipe), page(recipe, measured, runs), record, printed=1)


#: `seed` and `seeds` are its settings.
run_demo = partial(run_seeds, PopiRecipe, measure, report, packages=("torch", "transformers", "peft"))
