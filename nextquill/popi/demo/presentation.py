"""The demo's results as tables, curves and a page for `nextquill.report`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from nextquill.evaluation.bootstrap import Interval
from nextquill.popi.demo.findings import Finding
from nextquill.popi.demo.measuring import BEFORE, CONTEXTS, SUMMARY, Measured, SeedRun
from nextquill.popi.demo.recipe import Recipe
from nextquill.report.data import Cell, Column, Page, Panel, Picture, Series, Table

TITLE = "nextquill popi demo: what a summary of a user is worth"
SHOWN_USERS = 6
# Steps that a point of a curve is the mean of: single steps are of a few users each.
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


def results_table(measured: Measured, recipe: Recipe) -> Table:
    """A row for each context."""
    rows = []
    for name in CONTEXTS:
        each, stated = measured.contexts[name], measured.stated.get(name)
        rows.append(
            [
                Cell(name),
                _interval(each.accuracy.all, marked=name == SUMMARY),
                Cell(" ".join(f"{value:.2f}" for value in each.accuracy.by_seed)),
                Cell(f"{each.context_tokens:.1f}"),
                Cell("") if stated is None else _interval(stated.all, marked=name == SUMMARY),
                Cell(" ".join(f"{value:.2f}" for value in (() if stated is None else stated.by_seed))),
            ]
        )
    seeds = "1 seed" if recipe.seeds == 1 else f"{recipe.seeds} seeds"
    return Table(f"{recipe.test_users * recipe.seeds} unseen users, {seeds}", _COLUMNS, rows)


def _interval(value: Interval, *, marked: bool) -> Cell:
    return Cell(f"{value.value:.2f}", f"{value.low:.2f} to {value.high:.2f}", marked)


def examples_table(runs: Sequence[SeedRun]) -> Table:
    """The first test users of the first seed, whoever they are, and what is said of them."""
    columns = (Column("hidden preferences"), Column("summary before training"), Column("summary"))
    users = runs[0].users[:SHOWN_USERS]
    rows = [
        [Cell(text) for text in (", ".join(user.preferences), user.summaries[BEFORE], user.summaries[SUMMARY])]
        for user in users
    ]
    return Table(f"The first {len(users)} test users of seed {runs[0].seed}", columns, rows)


def curve_panels(runs: Sequence[SeedRun]) -> list[Panel]:
    """What training logged, mean and range over the seeds."""
    wanted = (
        ("Reward of a summary", "minus the loss of the user's pairs, nats; higher is better", "reward"),
        ("What summaries say of choices", "informativeness, nats per pair; higher is better", "informativeness"),
    )
    return [Panel(title, hint, [_series([run.history for run in runs], key)]) for title, hint, key in wanted]


def _series(histories: Sequence[Sequence[Mapping[str, float]]], key: str) -> Series:
    curves = [_windows([entry.get(key, 0.0) for entry in history]) for history in histories]
    points = list(zip(*curves, strict=True))
    return Series(
        label="training" if len(curves) == 1 else f"mean and range of {len(curves)} seeds",
        x=[min((place + 1) * _WINDOW, len(histories[0])) for place in range(len(points))],
        y=[statistics.fmean(values) for values in points],
        low=[min(values) for values in points] if len(curves) > 1 else None,
        high=[max(values) for values in points] if len(curves) > 1 else None,
        colour=2,
    )


def _windows(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[start : start + _WINDOW]) for start in range(0, len(values), _WINDOW)]


def demo_picture(runs: Sequence[SeedRun]) -> Picture:
    """The curves as a picture, light and dark, with a text that stands for it."""
    from nextquill.report.plots import draw_panels

    panels = curve_panels(runs)
    ends = "; ".join(f"{panel.title}: {panel.series[0].y[0]:.2f} at first, {panel.series[0].y[-1]:.2f} at the end"
                     for panel in panels)  # fmt: skip
    return Picture(
        png=draw_panels(panels, x_label="steps of POPI"),
        dark_png=draw_panels(panels, x_label="steps of POPI", theme="dark"),
        alt=f"Two plots over the steps of training. {ends}.",
        caption=f"On the training users, as training logs it; a point is the mean of {_WINDOW} steps.",
    )


def demo_page(
    recipe: Recipe,
    findings: Sequence[Finding],
    measured: Measured,
    runs: Sequence[SeedRun],
    picture: Picture,
    footer: str,
) -> Page:
    """The page of a run: what follows, the curves, and the tables."""
    return Page(
        title=TITLE,
        lead=(
            "Artificial users with two hidden preferences each, pairs of answers that depend on them, and a small "
            "model that learns, from pairs alone, to sum up a user in four words and to go by them. "
            "All sentences below follow from this run's figures."
        ),
        findings=[(finding.heading, finding.text) for finding in findings],
        picture=picture,
        tables=[results_table(measured, recipe), examples_table(runs)],
        table_notes=(TABLE_NOTE,),
        footer=footer,
    )
