"""`run_demo`: six losses from the same start, on artificial users with known personal tokens, in about two minutes.

The results are tables, curves and coloured responses for `nextquill.report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from torch import Tensor

from demos.kit.figures import Spread, curve, picture
from demos.kit.progress import Progress
from demos.kit.run import DemoReport, run_seeds
from demos.losses.findings import find, timing_note
from demos.losses.measuring import BASE, LossRow, LossRun, RowTable, UnseenUsers, step_times
from demos.losses.recipe import LossRecipe
from demos.losses.training import DETACHED, OFFICIAL, SFT, SFT_FAST, make_contestants, phase_c_steps, train_base
from demos.losses.world import Example, LossWorld
from nextquill.report.data import Cell, Column, Page, Panel, Picture, ResponseVariant, ResponseView, Table, TokenEffect

# The first test users of the first seed, whoever they are, under three of the losses.
SHOWN_RESPONSES = 3
SHOWN_METHODS = (SFT, OFFICIAL, DETACHED)

# The columns between learning rate and time of a step: metric, digits shown, column.
_METRICS = (
    ("personal_nll", 3, Column("own", "personal", "Nll of personal tokens with the user's history; lower is better")),
    ("personal_nll_other", 2, Column("other", "personal", "The same under another user's history (placebo)")),
    ("personal_nll_none", 2, Column("none", "personal", "The same without a history")),
    ("generic_nll", 3, Column("own", "generic", "Nll of all other tokens with the user's history; lower is better")),
    (
        "generic_nll_other",
        3,
        Column("other", "generic", "The same under another user's history; the true difference is 0", secondary=True),
    ),
    ("generic_nll_none", 3, Column("none", "generic", "The same without a history; the true difference is 0")),
    ("f1", 2, Column("F1", explanation="F1 of effect_prob > 0.05 against the true personal tokens")),
    ("exact_match", 2, Column("exact", explanation="Responses that greedy decoding reproduces word for word")),
)
_COLUMNS = (
    Column("method"),
    Column("LR", explanation="Learning rate of phase C"),
    *(column for _, _, column in _METRICS),
    Column("ms", "step", "Milliseconds per step, median", secondary=True),
    Column("× SFT", "step", "Median ratio to an SFT step on the same batch"),
)

TABLE_NOTE = (
    "Nll in nats per token, on users whose combinations of habits were not trained on. own, other, none: the response "
    "scored under the user's own history, under another user's (the placebo, which no loss trains on), and under none. "
    "F1: effect_prob > 0.05 against the true personal tokens. "
    "exact: share of responses that greedy decoding reproduces word for word."
)


def measure(recipe: LossRecipe, seed: int, progress: Progress) -> LossRun:
    """Train the base, and from it every contestant; all are measured at every checkpoint."""
    world = LossWorld(seed, dev_users=recipe.dev_users, test_users=recipe.test_users)
    base, reading_steps, reading_accuracy = train_base(world, recipe, seed, progress)
    unseen, contestants = UnseenUsers(world.test), make_contestants(base, recipe.learning_rate)
    rows = [LossRow(seed, BASE, None, 0, **unseen.measure(base)[0])]
    probabilities = {}
    for step in phase_c_steps(contestants, world, recipe):
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


def results_tables(table: RowTable, recipe: LossRecipe) -> list[Table]:
    """One table for each of the two checkpoints that are reported."""
    seeds = "1 seed" if recipe.seeds == 1 else f"mean of {recipe.seeds} seeds"
    return [
        Table(
            f"After {step} steps of phase C ({recipe.test_users} unseen users, {seeds})",
            _COLUMNS,
            [_table_row(table, BASE, 0), *(_table_row(table, method, step) for method in table.methods)],
        )
        for step in dict.fromkeys((recipe.steps, recipe.long_steps))
    ]


def _table_row(table: RowTable, method: str, step: int) -> list[Cell]:
    rate = table.values(method, step, "learning_rate")[0]
    cells = [Cell(method), Cell("" if rate is None else f"{rate:.0e}".replace("e-0", "e-"))]
    cells += [_cell(table.spread(method, step, metric), digits) for metric, digits, _ in _METRICS]
    if method == BASE:
        return [*cells, Cell(""), Cell("")]
    milliseconds = 1000 * table.spread(method, step, "seconds_per_step").mean
    return [*cells, Cell(f"{milliseconds:.0f}"), _cell(table.spread(method, step, "time_vs_sft"), 2)]


def _cell(spread: Spread, digits: int) -> Cell:
    is_range = spread.low != spread.high
    return Cell(f"{spread.mean:.{digits}f}", f"{spread.low:.{digits}f}–{spread.high:.{digits}f}" if is_range else "")


def _curves(table: RowTable, recipe: LossRecipe) -> Picture:
    """Above, what the training is for; below, generic tokens with and without the history, on one scale."""
    steps = recipe.checkpoints

    def values(method: str, metric: str) -> list[list[float]]:
        return [table.values(method if step else BASE, step, metric) for step in steps]

    def panel(title: str, hint: str, metric: str, limits: tuple[float, float] | None = None) -> Panel:
        curves = [curve(each, steps, values(each, metric), dashed=each == SFT_FAST) for each in table.methods]
        return Panel(title, hint, curves, log_scale=metric != "f1", y_limits=limits, x_ticks=steps)

    own, none = "generic_nll", "generic_nll_none"
    generic = [v for method in table.methods for metric in (own, none) for each in values(method, metric) for v in each]
    limits = min(generic) * 0.9, max(generic) * 1.1  # with a little room
    hint = "nll under the user's own history, lower is better"
    reached = "; ".join(
        f"{method} {table.spread(method, steps[-1], 'personal_nll').mean:.2f} and "
        f"{table.spread(method, steps[-1], 'f1').mean:.2f}"
        for method in table.methods
    )
    seeds = f"Bands span {recipe.seeds} seeds." if recipe.seeds > 1 else "One seed: one draw."
    return picture(
        [
            panel("Personal tokens", hint, "personal_nll"),
            panel("Finding the personal tokens", "F1 of effect > 0.05, higher is better", "f1", (0.0, 1.02)),
            panel("Generic tokens", hint, own, limits),
            panel("Generic tokens, history removed", "nll, should be that of the panel on the left", none, limits),
        ],
        "steps of phase C",
        alt=f"Four plots over the steps of phase C. Personal-token nll and F1 after {steps[-1]} steps: {reached}.",
        caption=f"All start from the same base and see the same batches; SFT also at twice the learning rate. {seeds}",
    )


def response_views(examples: Sequence[Example], probabilities: Mapping[str, Tensor]) -> list[ResponseView]:
    """The first examples with their tokens' effects.

    Args:
        examples: the test users'.
        probabilities: by method, of `UnseenUsers.measure`; those of all examples follow each other in one row.
    """
    views, start = list[ResponseView](), 0
    for number, example in enumerate(examples[:SHOWN_RESPONSES], start=1):
        end = start + len(example.response)
        past = " ".join(example.history).rstrip("; ").split(" ; ")
        variants = []
        for method, columns in probabilities.items():
            tokens = zip(example.response, *columns[:, start:end].tolist(), example.personal, strict=True)
            variants.append(ResponseVariant(method, [TokenEffect(*token) for token in tokens]))
        context = [(f"Past review {index}", text) for index, text in enumerate(past, start=1)]
        views.append(ResponseView(f"Test user {number} reviews a {example.item.name}", context, variants))
        start = end
    return views


def page(recipe: LossRecipe, table: RowTable, runs: Sequence[LossRun], timing: str) -> Page:
    """The page of a run: the picture, the tables, and a few responses."""
    reading = ", ".join(f"{run.reading_steps} steps to {run.reading_accuracy:.2f}" for run in runs)
    return Page(
        title="nextquill demo: which loss moves personal tokens",
        lead=(
            "Artificial users with known habits, a small model that can read their histories and makes little use of "
            f"them, and six ways of training it further from the same point, {recipe.long_steps} steps each. "
            "All sentences below follow from this run's figures."
        ),
        picture=_curves(table, recipe),
        tables=results_tables(table, recipe),
        table_notes=(TABLE_NOTE, timing),
        responses=runs[0].responses,
        responses_lead=(
            f"The first {len(runs[0].responses)} test users of seed {recipe.seed}, after {recipe.long_steps} steps. A "
            "good model colours the underlined tokens and no others. Hover, tap or use Tab and the arrow keys for "
            "probabilities."
        ),
        footer=(
            f"Phase A: {reading} accuracy on personal tokens of dev users. Phase B: {recipe.bland_steps} steps with "
            f"habits followed one time in {1 / recipe.bland_habit_probability:g}. "
            f"Phase C: batches of {recipe.batch_size}."
        ),
    )


def report(recipe: LossRecipe, runs: Sequence[LossRun]) -> DemoReport:
    """Draw the conclusions from all seeds."""
    rows = [row for run in runs for row in run.rows]
    table = RowTable(rows)
    timing = timing_note(table, recipe)
    before_c = ("seed", "reading_steps", "reading_accuracy")
    record = {
        "seed_runs": [{name: getattr(run, name) for name in before_c} for run in runs],
        "rows": [asdict(row) for row in rows],
        "timing": timing,
    }
    shown = page(recipe, table, runs, timing)
    return DemoReport(find(table, recipe, runs), shown, record, printed=len(shown.tables))


#: `seed` and `seeds` are its settings.
run_demo = partial(run_seeds, LossRecipe, measure, report)
