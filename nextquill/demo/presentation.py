"""The demo's results as tables, curves and coloured responses for `nextquill.report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nextquill.demo.findings import DETACHED, OFFICIAL, SFT, SFT_FAST
from nextquill.demo.recipe import Recipe
from nextquill.demo.results import BASE, DemoResult, RowTable, Spread
from nextquill.report.data import (
    Cell,
    Column,
    Page,
    Panel,
    Picture,
    ResponseVariant,
    ResponseView,
    Series,
    Table,
    TokenEffect,
)

if TYPE_CHECKING:
    from nextquill.demo.evaluation import TokenProbabilities
    from nextquill.demo.world import Example

# The first test users of the first seed, whoever they are, under three of the losses.
SHOWN_RESPONSES = 3
SHOWN_METHODS = (SFT, OFFICIAL, DETACHED)

TITLE = "nextquill demo: which loss moves personal tokens"

_COLUMNS = (
    Column("method"),
    Column("LR", explanation="Learning rate of phase C"),
    Column("own", "personal", "Nll of personal tokens under the user's own history; lower is better"),
    Column("other", "personal", "The same under another user's history (placebo)"),
    Column("none", "personal", "The same without a history"),
    Column("own", "generic", "Nll of all other tokens under the user's own history; lower is better"),
    Column("other", "generic", "The same under another user's history; the true difference is 0", secondary=True),
    Column("none", "generic", "The same without a history; the true difference is 0"),
    Column("F1", explanation="F1 of effect_prob > 0.05 against the true personal tokens"),
    Column("exact", explanation="Responses that greedy decoding reproduces word for word"),
    Column("ms", "step", "Milliseconds per step, median", secondary=True),
    Column("× SFT", "step", "Median ratio to an SFT step on the same batch"),
)

# In the order of the columns between LR and step, with the digits shown.
_METRICS = (
    ("personal_nll", 3),
    ("personal_nll_other", 2),
    ("personal_nll_none", 2),
    ("generic_nll", 3),
    ("generic_nll_other", 3),
    ("generic_nll_none", 3),
    ("f1", 2),
    ("exact_match", 2),
)

TABLE_NOTE = (
    "Nll in nats per token, on users whose combinations of habits were not trained on. own, other, none: the response "
    "scored under the user's own history, under another user's (the placebo, which no loss trains on), and under none. "
    "F1: effect_prob > 0.05 against the true personal tokens. "
    "exact: share of responses that greedy decoding reproduces word for word."
)


def results_tables(table: RowTable, recipe: Recipe) -> list[Table]:
    """One table for each of the two checkpoints that are reported."""
    return [_results_table(table, recipe, step) for step in dict.fromkeys((recipe.steps, recipe.long_steps))]


def _results_table(table: RowTable, recipe: Recipe, step: int) -> Table:
    rows = [_table_row(table, BASE, 0), *(_table_row(table, method, step) for method in table.methods)]
    seeds = "1 seed" if recipe.seeds == 1 else f"mean of {recipe.seeds} seeds"
    return Table(f"After {step} steps of phase C ({recipe.test_users} unseen users, {seeds})", _COLUMNS, rows)


def _table_row(table: RowTable, method: str, step: int) -> list[Cell]:
    learning_rate = table.rows(method, step)[0].learning_rate
    cells = [Cell(method), Cell("" if learning_rate is None else f"{learning_rate:.0e}".replace("e-0", "e-"))]
    cells += [_cell(table.spread(method, step, metric), digits) for metric, digits in _METRICS]
    if method == BASE:
        return [*cells, Cell(""), Cell("")]
    milliseconds = 1000 * table.spread(method, step, "seconds_per_step").mean
    return [*cells, Cell(f"{milliseconds:.0f}"), _cell(table.spread(method, step, "time_vs_sft"), 2)]


def _cell(spread: Spread, digits: int) -> Cell:
    is_range = spread.low != spread.high
    return Cell(f"{spread.mean:.{digits}f}", f"{spread.low:.{digits}f}–{spread.high:.{digits}f}" if is_range else "")


def curve_panels(table: RowTable, recipe: Recipe) -> list[Panel]:
    """Above, what the training is for; below, generic tokens with and without the history, on one scale."""
    generic = _limits(table, recipe, ("generic_nll", "generic_nll_none"))
    wanted: tuple[tuple[str, str, str, tuple[float, float] | None], ...] = (
        ("Personal tokens", "nll under the user's own history, lower is better", "personal_nll", None),
        ("Finding the personal tokens", "F1 of effect > 0.05, higher is better", "f1", (0.0, 1.02)),
        ("Generic tokens", "nll under the user's own history, lower is better", "generic_nll", generic),
        (
            "Generic tokens, history removed",
            "nll, should be that of the panel on the left",
            "generic_nll_none",
            generic,
        ),
    )
    return [
        Panel(
            title,
            hint,
            [_series(table, recipe, method, metric) for method in table.methods],
            log_scale=metric != "f1",
            y_limits=limits,
            x_ticks=recipe.checkpoints,
        )
        for title, hint, metric, limits in wanted
    ]


def _limits(table: RowTable, recipe: Recipe, metrics: Sequence[str]) -> tuple[float, float]:
    """One range for several metrics, on a logarithmic scale, with a little room."""
    reached = [(BASE, 0), *((method, step) for method in table.methods for step in recipe.checkpoints if step)]
    values = [value for method, step in reached for metric in metrics for value in table.values(method, step, metric)]
    return min(values) * 0.9, max(values) * 1.1


def _series(table: RowTable, recipe: Recipe, method: str, metric: str) -> Series:
    steps = recipe.checkpoints
    spreads = [table.spread(BASE if step == 0 else method, step, metric) for step in steps]
    is_band = recipe.seeds > 1
    return Series(
        label=method,
        x=steps,
        y=[spread.mean for spread in spreads],
        low=[spread.low for spread in spreads] if is_band else None,
        high=[spread.high for spread in spreads] if is_band else None,
        dashed=method == SFT_FAST,
    )


@dataclass(frozen=True)
class ShownResponse:
    """A test user's response and its tokens' probabilities under each of the shown methods."""

    example: Example
    tokens: dict[str, list[TokenEffect]]


def shown_responses(
    examples: Sequence[Example], probabilities: dict[str, TokenProbabilities]
) -> tuple[ShownResponse, ...]:
    """The first examples with their tokens' effects; the probabilities of all examples follow each other in one row."""
    shown = []
    start = 0
    for example in examples[:SHOWN_RESPONSES]:
        rows = slice(start, start + len(example.response))
        shown.append(ShownResponse(example, {m: _tokens(example, p, rows) for m, p in probabilities.items()}))
        start = rows.stop
    return tuple(shown)


def _tokens(example: Example, probabilities: TokenProbabilities, rows: slice) -> list[TokenEffect]:
    columns = (probabilities.own[rows], probabilities.none[rows], probabilities.other[rows])
    values = zip(example.response, example.personal, *(column.tolist() for column in columns), strict=True)
    return [TokenEffect(word, own, none, other, personal) for word, personal, own, none, other in values]


def demo_page(result: DemoResult, table: RowTable, picture: Picture, shown: Sequence[ShownResponse]) -> Page:
    """The page of a run: what follows, the picture, the tables, and a few responses."""
    recipe = result.recipe
    return Page(
        title=TITLE,
        lead=(
            "Artificial users with known habits, a small model that can read their histories and makes little use of "
            f"them, and six ways of training it further from the same point, {recipe.long_steps} steps each. "
            "All sentences below follow from this run's figures."
        ),
        findings=[(finding.heading, finding.text) for finding in result.findings],
        picture=picture,
        tables=results_tables(table, recipe),
        table_notes=(TABLE_NOTE, result.timing),
        responses=[_response_view(index, each) for index, each in enumerate(shown, start=1)],
        responses_lead=(
            f"The first {len(shown)} test users of seed {recipe.seed}, after {recipe.long_steps} steps. A good model "
            "colours the underlined tokens and no others. Hover, tap or use Tab and the arrow keys for probabilities."
        ),
        footer=_footer(result),
    )


def _response_view(number: int, shown: ShownResponse) -> ResponseView:
    past = " ".join(shown.example.history).rstrip("; ").split(" ; ")
    return ResponseView(
        title=f"Test user {number} reviews a {shown.example.item.name}",
        context=[(f"Past review {index}", text) for index, text in enumerate(past, start=1)],
        variants=[ResponseVariant(method, tokens) for method, tokens in shown.tokens.items()],
    )


def _footer(result: DemoResult) -> str:
    recipe = result.recipe
    reading = ", ".join(f"{run.reading_steps} steps to {run.reading_accuracy:.2f}" for run in result.seed_runs)
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"Seeds {', '.join(map(str, recipe.seed_values))}. "
        f"Phase A: {reading} accuracy on personal tokens of dev users. "
        f"Phase B: {recipe.bland_steps} steps with habits followed one time in {1 / recipe.bland_habit_probability:g}. "
        f"Phase C: batches of {recipe.batch_size}. {versions}."
    )


def demo_picture(table: RowTable, recipe: Recipe) -> Picture:
    """The curves as a picture, light and dark, with a text that stands for it."""
    from nextquill.report.plots import draw_panels

    panels = curve_panels(table, recipe)
    last = recipe.long_steps
    reached = {m: (table.spread(m, last, "personal_nll"), table.spread(m, last, "f1")) for m in table.methods}
    figures = "; ".join(f"{method} {nll.mean:.2f} and {f1.mean:.2f}" for method, (nll, f1) in reached.items())
    seeds = f" Bands span {recipe.seeds} seeds." if recipe.seeds > 1 else " One seed: one draw."
    return Picture(
        png=draw_panels(panels, x_label="steps of phase C"),
        dark_png=draw_panels(panels, x_label="steps of phase C", theme="dark"),
        alt=f"Four plots over the steps of phase C. Personal-token nll and F1 after {last} steps: {figures}.",
        caption=f"All start from the same base and see the same batches; SFT also at twice the learning rate.{seeds}",
    )
