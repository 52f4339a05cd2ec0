"""An evaluation, and its differences to another, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.measures import COUNTS, place_of, text_metric
from nextquill.evaluation.results import Evaluation, MetricValue
from nextquill.report.numbers import p_value, with_interval

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    "responses": "the records' responses", "pairs": "pairs", "texts": "generated texts", "calibration": "calibration",
    "personal": "tokens of --personal_from", "known": "known personal tokens",
}  # fmt: skip
#: Below this number of users, bootstrap intervals are clearly too narrow.
ENOUGH_USERS = 20
# With more columns than this, an interval goes below its value, to fit 80 characters.
_MOST_BESIDE = 1
# Settings that change no score, or only which scores there are.
_IRRELEVANT = ("resamples", "level", "batch_size", "max_tokens", "attention", "item_effects", "metrics", "task")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print every measure with its interval: of the records' responses, of pairs, of generated texts."""
    tables: dict[str, dict[str, dict[str, MetricValue]]] = {}
    for name, metric in evaluation.metrics.items():
        place = place_of(name)
        if place is not None:
            label = f"{place.row} ({metric.unit})" if metric.unit and text_metric(name) else place.row
            tables.setdefault(place.table, {}).setdefault(label, {})[place.column] = metric
    for kind, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = new_table(_HEADINGS[kind], *columns)
        between = " " if len(columns) <= _MOST_BESIDE else "\n"
        for label, row in rows.items():
            cells = [row.get(column) for column in columns]
            table.add_row(label, *("" if m is None else with_interval(m.value, m.low, m.high, between) for m in cells))
        show(table)
    examples, users, tokens = (int(evaluation.metrics[name].value) for name in COUNTS)
    show(f"{examples} examples of {users} user{'s' * (users != 1)}, {tokens} response tokens.")
    if "texts" in tables:
        texts = min(examples, evaluation.settings.get("generate_limit") or examples)
        show(f"Texts were generated for {texts} of them. Their measures without a unit lie between 0 and 1.")
    show(f"[low, high]: {evaluation.level:.0%} intervals over users. NLLs and effects are in nats per token.")
    show("Effect of the history: nll without it minus nll with it.")
    if evaluation.template.get("counterfactual") == "placebo":
        show("Without history: under another user's history, which these prompts put in its place.")
    if "effect_placebo" in evaluation.metrics:
        show("Effect against the placebo: nll with another user's history minus nll with the user's own.")
    if "calibration" in tables and evaluation.settings.get("score_temperature") is None:
        show("The best temperature is that of these records: --score_temperature takes one that others chose.")
    warn_of_few(users)


def warn_of_few(users: int) -> None:
    """Print a warning where intervals over this number of users promise too much."""
    if users < ENOUGH_USERS:
        whose = "1 user has no interval" if users == 1 else f"{users} users are few: the intervals are too narrow"
        show(f"Warning: {whose}. Evaluate at least {ENOUGH_USERS} users before you conclude anything.")


def print_differences(
    differences: Mapping[str, PairedResult], evaluation: Evaluation, baseline: Evaluation, folder: str
) -> None:
    """Print an evaluation's paired differences to its baseline, and in which settings the two differ."""
    table = new_table(f"this - {folder}", "difference", "p", "clear")
    for name, found in differences.items():
        if place_of(name) is not None:
            metric = evaluation.metrics[name]
            bounded = with_interval(found.difference, found.low, found.high, sign="+", digits=3)
            label = metric.label.replace(", generated with", " with").replace("mean of examples", "per example")
            table.add_row(label, bounded, p_value(found.p_value), _verdict(found, metric, evaluation.level))
    show(table)
    show(
        "Paired, on the examples that both have. [low, high]: bootstrap over users; p: permutation within users, not "
        "corrected for several measures. A difference is clear, that is better, worse, higher or lower than the "
        f"baseline, if the interval excludes 0 and p is below {1 - evaluation.level:.2g}. Near 0, or with few users, "
        "the two may disagree, as they ask differently; then nothing is claimed."
    )
    own, theirs = _comparable(evaluation), _comparable(baseline)
    unlike = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if None in (own.get("personal_from"), theirs.get("personal_from")):  # then no measure of both depends on it
        unlike = [name for name in unlike if name != "personal_from"]
    if unlike:
        named = "; ".join(f"{name} {own.get(name)!r:.40}, there {theirs.get(name)!r:.40}" for name in unlike)
        show(f"These settings differ too, and add to the differences: {named}.")


def _verdict(found: PairedResult, metric: MetricValue, level: float) -> str:
    """How this evaluation differs from the baseline, in a word; empty where that is not clear."""
    if not found.is_clear(level):
        return ""
    if metric.higher_is_better is None:
        return "higher" if found.difference > 0 else "lower"
    return "better" if (found.difference > 0) == metric.higher_is_better else "worse"


def _comparable(evaluation: Evaluation) -> dict[str, Any]:
    """The settings that decide the examples' scores."""
    ignored = (*_IRRELEVANT, "template")
    settings = {name: value for name, value in evaluation.settings.items() if name not in ignored}
    return {**settings, **{f"template {name}": value for name, value in evaluation.template.items()}}


def new_table(first: str, *others: str) -> Table:
    """An empty table: a column of labels, and columns of figures."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(first))
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(what: Table | str) -> None:
    """Print to stdout, a text as it is, without markup."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(what)
