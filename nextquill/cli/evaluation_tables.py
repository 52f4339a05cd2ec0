"""An evaluation, and its differences to another, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nextquill.data.templates import BRANCHES
from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.measures import NEW_USERS, PAIRS, TOKENS, place_of
from nextquill.evaluation.results import Evaluation, MetricValue, unlike_settings
from nextquill.report.headline import few_people
from nextquill.report.numbers import counted, in_words, p_value
from nextquill.report.text import plain

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "responses": "the records' responses", "calibration": "calibration", "personal": "tokens of --personal_from",
    "known": "known personal tokens", "pairs": "pairs", "texts": "generated texts", "prose": "general prose",
}  # fmt: skip
# With more columns than this, an interval goes below its value, to fit 80 characters.
_MOST_BESIDE = 1
# More columns than this take a table of their own.
_MOST_COLUMNS = 3


def print_evaluation(evaluation: Evaluation) -> None:
    """Print every measure with its interval: of the records' responses, of pairs, of generated texts."""
    tables: dict[str, dict[str, dict[str, MetricValue]]] = {}
    for name, metric in evaluation.metrics.items():
        place = place_of(name)
        if place is not None:
            label = f"{place.row} ({metric.unit})" if metric.unit and place.table == "texts" else place.row
            tables.setdefault(place.table, {}).setdefault(label, {})[place.column] = metric
    for kind, rows in tables.items():
        found = list(dict.fromkeys(column for row in rows.values() for column in row))
        for columns in (found[at : at + _MOST_COLUMNS] for at in range(0, len(found), _MOST_COLUMNS)):
            table = new_table(_HEADINGS[kind], *columns)
            gap = " " if len(columns) <= _MOST_BESIDE else "\n"
            for label, row in rows.items():
                cells = [row.get(column) for column in columns]
                if any(cells):
                    table.add_row(
                        label, *("" if m is None else in_words(m.value, m.low, m.high, gap=gap) for m in cells)
                    )
            show(table)
    counts = {name: int(metric.value) for name, metric in evaluation.metrics.items() if place_of(name) is None}
    examples, users = counts["examples"], counts["users"]
    new = f" ({counts[NEW_USERS]:,} never trained on)" if NEW_USERS in counts else ""
    show(f"{counted(examples, 'example')} of {counted(users, 'user')}{new}, {counts[TOKENS]:,} response tokens.")
    if PAIRS in counts:
        show(f"{counted(counts[PAIRS], 'pair')} of a chosen and a rejected response.")
    if "texts" in tables:
        shown = min(examples, evaluation.settings.get("generate_limit") or examples)
        texts = shown * len(evaluation.settings.get("generate_branches", BRANCHES[:1]))
        show(f"{counted(texts, 'text')} generated, for {counted(shown, 'example')}.")
    show(f"[low, high]: {evaluation.level:.0%} intervals over users. NLLs and effects are in nats per token.")
    if "prose" in tables:
        show("The interval of general prose is over its windows of text, not over users.")
    show("Effect of the history: nll without it minus nll with it.")
    if evaluation.template.get("counterfactual") == "placebo":
        show("Without history: under another user's history, which these prompts put in its place.")
    if "effect_placebo" in evaluation.metrics:
        show("Effect against the placebo: nll with another user's history minus nll with the user's own.")
    if "calibration" in tables and evaluation.settings.get("score_temperature") is None:
        show("The best temperature was chosen on these records; --score_temperature takes one chosen on others.")
    warn_of_few(users)


def warn_of_few(users: int) -> None:
    """Print a warning where intervals over this number of users promise too much."""
    for text in few_people(users):
        show(f"Warning: {text}")


def print_differences(
    differences: Mapping[str, PairedResult], evaluation: Evaluation, baseline: Evaluation, folder: str
) -> None:
    """Print an evaluation's paired differences to its baseline, and in which settings the two differ."""
    table = new_table(f"this - {folder}", "difference", "p", "clear")
    for name, found in differences.items():
        if place_of(name) is not None:
            metric = evaluation.metrics[name]
            bounded = in_words(found.difference, found.low, found.high, sign="+")
            label = metric.label.replace(", generated with", " with").replace("mean of examples", "per example")
            table.add_row(label, bounded, p_value(found.p_value), _verdict(found, metric, evaluation.level))
    show(table)
    show(
        "Paired, on the examples that both have. [low, high]: bootstrap over users; p: permutation within users, not "
        "corrected for several measures. A difference is called better, worse, higher or lower only if its interval "
        f"excludes 0 and p is below {1 - evaluation.level:.2g}. Near 0, or with few users, the two may disagree; then "
        "nothing is claimed."
    )
    if unlike := unlike_settings(evaluation, baseline):
        show(f"These settings differ too, and add to the differences: {unlike}.")


def _verdict(found: PairedResult, metric: MetricValue, level: float) -> str:
    """The difference of this evaluation from the baseline in a word; empty where it is not clear."""
    if not found.is_clear(level):
        return ""
    if metric.higher_is_better is None:
        return "higher" if found.difference > 0 else "lower"
    return "better" if (found.difference > 0) == metric.higher_is_better else "worse"


def new_table(first: str, *others: str) -> Table:
    """An empty table: a column of labels, and columns of figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(plain(first)))
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(what: Table | str) -> None:
    """Print to stdout; a text is printed as it is, without markup."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(plain(what) if isinstance(what, str) else what)
