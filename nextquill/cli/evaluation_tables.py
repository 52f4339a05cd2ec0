"""An evaluation, and its differences to another, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.results import Evaluation, MetricValue, finite

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {"responses": "the records' responses", "pairs": "pairs", "texts": "generated texts"}
# With more columns than this, intervals go below their values, to fit 80 characters.
_MOST_BESIDE = 1
# Settings that change no score, or only which scores there are.
_NO_MATTER = ("resamples", "level", "batch_size", "max_tokens", "attention", "item_effects", "metrics", "task")


def print_evaluation(evaluation: Evaluation) -> None:
    """Print every measure with its interval, for responses, pairs and generated texts."""
    from nextquill.evaluation.measures import place_of

    tables: dict[str, dict[str, dict[str, MetricValue]]] = {}
    for name, metric in evaluation.metrics.items():
        place = place_of(name)
        if place is not None:
            tables.setdefault(place.table, {}).setdefault(place.row, {})[place.column] = metric
    for kind, rows in tables.items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        table = new_table(_HEADINGS[kind], *columns)
        between = " " if len(columns) <= _MOST_BESIDE else "\n"
        for label, row in rows.items():
            table.add_row(label, *(_measured(row.get(column), between) for column in columns))
        show(table)
    counts = {name: f"{evaluation.metrics[name].value:.0f}" for name in ("examples", "users", "tokens")}
    show(f"{counts['examples']} examples of {counts['users']} users, {counts['tokens']} response tokens.")
    show(f"[low, high]: {evaluation.level:.0%} intervals over users. NLLs and effects are in nats per token.")
    show("Effect of the history: nll without it minus nll with it.")
    if (evaluation.settings.get("template") or {}).get("counterfactual") == "placebo":
        show("Without history: with another user's history, which these prompts put in its place.")
    if "effect_placebo" in evaluation.metrics:
        show("Effect against the placebo: nll with another user's history minus nll with the user's own.")


def print_differences(
    differences: Mapping[str, PairedResult], evaluation: Evaluation, baseline: Evaluation, folder: str
) -> None:
    """Print the paired differences to a baseline, and the settings that differ between the two."""
    from nextquill.evaluation.measures import place_of

    table = new_table(f"this - {folder}", "difference", "p")
    for name, found in differences.items():
        if place_of(name) is not None:
            label = evaluation.metrics[name].label
            table.add_row(
                label,
                bounded(found.difference, found.low, found.high, sign="+"),
                "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}",
            )
    show(table)
    show("Paired, on the examples that both have. p: permutation within users, not corrected for several measures.")
    own, theirs = _comparable(evaluation), _comparable(baseline)
    unlike = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    if unlike:
        named = "; ".join(f"{name} {own.get(name)!r:.40}, there {theirs.get(name)!r:.40}" for name in unlike)
        show(f"These settings differ too, and add to the differences: {named}.")


def _comparable(evaluation: Evaluation) -> dict[str, Any]:
    """The settings that decide what the examples' scores are."""
    settings = {name: value for name, value in evaluation.settings.items() if name not in _NO_MATTER}
    template = settings.pop("template", None) or {}
    return {**settings, **{f"template {name}": value for name, value in template.items()}}


def _measured(metric: MetricValue | None, between: str) -> str:
    return "" if metric is None else bounded(metric.value, metric.low, metric.high, between)


def bounded(
    value: float, low: float | None, high: float | None, between: str = " ", sign: str = "", digits: int = 4
) -> str:
    """A number with its interval, if that is known."""
    number = f"{_rounded(value, digits):{sign}.{digits}f}"
    known = [f"{_rounded(bound, digits):.{digits}f}" for bound in (finite(low), finite(high)) if bound is not None]
    return f"{number}{between}[{known[0]}, {known[1]}]" if len(known) == 2 else number


def _rounded(value: float, digits: int) -> float:
    return round(value, digits) + 0.0  # never -0.0000


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
