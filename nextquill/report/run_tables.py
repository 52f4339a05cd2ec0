"""Tables of runs: their measures side by side with intervals, and paired differences to one of them.

A run's value stands out only if its paired difference to every other run `is_clear`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.compare import compare_evaluations
from nextquill.evaluation.measures import COUNTS, TOKENS, kind_and_branch, measure_name, text_metric
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.results import EvaluatedExample, MetricValue
from nextquill.report.data import Cell, Column, Table
from nextquill.report.numbers import p_text, rounded
from nextquill.report.runs import Run

_ABSENT = Cell("–")


class Pairing:
    """Paired differences between runs, each pair of them computed once.

    Intervals and p-values are drawn with the settings of the first run's evaluation, and the baseline, if there is one,
    comes second: so a difference to it has the figures that `nextquill evaluate --baseline` printed.
    """

    def __init__(self, baseline: Run | None = None) -> None:
        self._baseline = baseline
        self._found: dict[tuple[Path, Path], dict[str, PairedResult]] = {}

    def __call__(self, run: Run, other: Run) -> Mapping[str, PairedResult]:
        """`run` minus `other` in every measure that can be paired; nothing if they saw different records."""
        first, second = run.evaluation_folder, other.evaluation_folder
        if first is None or second is None or not same_records(run, other) or not (run.examples and other.examples):
            return {}
        if (first, second) not in self._found:
            is_turned = run is self._baseline or (second, first) in self._found
            self._found[first, second] = (
                {name: _negated(result) for name, result in self(other, run).items()}
                if is_turned
                else compare_evaluations(first, second, **_draws(run))
            )
        return self._found[first, second]


def _negated(result: PairedResult) -> PairedResult:
    return dataclasses.replace(result, difference=-result.difference, low=-result.high, high=-result.low)


def evaluated(runs: Sequence[Run]) -> list[Run]:
    """The runs that have been evaluated."""
    return [run for run in runs if run.evaluation is not None]


def same_records(first: Run, second: Run) -> bool:
    """Whether both runs were evaluated on the same records."""
    a, b = first.evaluation, second.evaluation
    return a is not None and b is not None and a.records == b.records


def measures_tables(runs: Sequence[Run], baseline: Run | None, pairing: Pairing | None = None) -> list[Table]:
    """The runs, their measures, and their differences to the baseline; tables without rows are left out."""
    found, pairing = evaluated(runs), pairing or Pairing(baseline)
    tables = [_runs_table(runs)]
    if found:
        tables.append(_metrics_table(found, pairing))
    if baseline is not None:
        tables += _differences_table(found, baseline, pairing)
    return tables


def _metrics_of(runs: Sequence[Run]) -> dict[str, MetricValue]:
    """The measures of all runs by name, without counts; their values are those of one run."""
    return {name: metric for run in runs for name, metric in run.metrics.items() if name not in COUNTS}


def _runs_table(runs: Sequence[Run]) -> Table:
    rows = [[Cell(run.label), *_training_cells(run), *_evaluation_cells(run)] for run in runs]
    columns = [
        Column("run"),
        Column("steps", "training", "Optimiser steps"),
        Column("epochs", "training"),
        Column("minutes", "training", "Wall-clock of the training loop"),
        Column("task", "evaluation"),
        Column("examples", "evaluation"),
        Column("users", "evaluation"),
        Column("tokens", "evaluation", "Tokens of the records' responses"),
    ]
    return Table("Runs", columns, rows)


def _training_cells(run: Run) -> list[Cell]:
    if run.training is None:
        return [_ABSENT] * 3
    log = run.training.log
    steps = max((entry["step"] for entry in log), default=0)
    epoch = max((entry["epoch"] for entry in log if "epoch" in entry), default=math.nan)
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), math.nan)
    unfinished = "" if run.training.is_finished else "not finished"
    return [Cell(f"{steps:,}", unfinished), _fixed(epoch, 2), _fixed(seconds / 60, 1)]


def _evaluation_cells(run: Run) -> list[Cell]:
    if run.evaluation is None:
        return [_ABSENT] * 4
    counts = [run.metrics[name].value if name in run.metrics else math.nan for name in ("users", TOKENS)]
    examples = run.evaluation.num_examples
    return [Cell(run.evaluation.task or "–"), _fixed(examples, 0), *(_fixed(count, 0) for count in counts)]


def _metrics_table(runs: Sequence[Run], pairing: Pairing) -> Table:
    rows = []
    for name, metric in _metrics_of(runs).items():
        best = _best(runs, name, metric, pairing)
        rows.append([_name_cell(metric), *(_value_cell(run, name, is_best=run is best) for run in runs)])
    levels = " and ".join(f"{100 * level:g}%" for level in sorted({level_of(run) for run in runs}))
    title = f"Measures on the evaluated records, with {levels} intervals"
    return Table(title, [Column("measure"), *_columns(runs)], rows)


def _best(runs: Sequence[Run], name: str, metric: MetricValue, pairing: Pairing) -> Run | None:
    """The best run if it clearly beats every other one; None if that is not shown."""
    if metric.higher_is_better is None or len(runs) < 2 or not all(name in run.metrics for run in runs):
        return None
    sign = 1 if metric.higher_is_better else -1
    best = max(runs, key=lambda run: sign * run.metrics[name].value)
    level = level_of(best)
    results = (pairing(best, other).get(name) for other in runs if other is not best)
    is_best = all(each is not None and each.is_clear(level) and sign * each.difference > 0 for each in results)
    return best if is_best else None


def _differences_table(runs: Sequence[Run], baseline: Run, pairing: Pairing) -> list[Table]:
    others = [run for run in runs if run is not baseline and same_records(run, baseline)]
    rows = []
    for name, metric in _metrics_of([baseline]).items():
        results = [pairing(run, baseline).get(name) for run in others]
        if any(results):
            rows.append([_name_cell(metric), *(_difference_cell(each, level_of(baseline), metric) for each in results)])
    if not rows:
        return []
    title = f"Difference to {baseline.label} (run minus {baseline.label}), paired by example, users drawn whole"
    return [Table(title, [Column("measure"), *_columns(others)], rows)]


def _columns(runs: Sequence[Run]) -> list[Column]:
    return [Column(run.label, explanation=str(run.folder)) for run in runs]


def _name_cell(metric: MetricValue) -> Cell:
    way = {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better]
    return Cell(metric.label, ", ".join(filter(None, (metric.unit, way))))


def _value_cell(run: Run, name: str, *, is_best: bool) -> Cell:
    metric = run.metrics.get(name)
    if metric is None:
        return _ABSENT
    figure, bounds = rounded(metric.value, metric.low, metric.high)
    return Cell(figure, "; ".join(filter(None, (bounds, _fewer(run, name)))), is_best)


def _fewer(run: Run, name: str) -> str:
    """The number of examples behind a measure of generated texts, if texts were generated for only some."""
    if text_metric(name) is None or not run.examples:
        return ""
    own = run.metrics[name].per_example
    count = generated(run, kind_and_branch(name)[1])
    if own is not None:  # some measures are defined for only some texts
        count = sum(own in example.scores for example in run.examples)
    return f"n {count}" if count < len(run.examples) else ""


def generated(run: Run, branch: str = "factual") -> int:
    """The number of texts that a run generated from one prompt."""
    return sum(branch in example.generated for example in run.examples)


def _difference_cell(result: PairedResult | None, level: float, metric: MetricValue) -> Cell:
    if result is None:
        return _ABSENT
    figure, bounds = rounded(result.difference, result.low, result.high, sign="+")
    detail = f"{bounds or 'no interval'}; {p_text(result.p_value)}; n {result.num}"
    is_better = metric.higher_is_better is None or (result.difference > 0) == metric.higher_is_better
    is_clear = result.is_clear(level)
    return Cell(figure, detail if is_better or not is_clear else f"{detail}; worse", is_clear and is_better)


def level_of(run: Run) -> float:
    """The confidence level of a run's intervals."""
    return 0.95 if run.evaluation is None else run.evaluation.level


def _draws(run: Run) -> dict[str, Any]:
    """The settings that the intervals of a run's evaluation were drawn with, as far as it names them."""
    settings = run.evaluation.settings if run.evaluation is not None else {}
    return {"level": level_of(run), **{name: settings[name] for name in ("seed", "resamples") if name in settings}}


def _fixed(value: float, digits: int) -> Cell:
    return Cell(f"{value:,.{digits}f}") if math.isfinite(value) else _ABSENT


def scores_text(example: EvaluatedExample, branch: str) -> str:
    """The scores of an example's text that was generated from one prompt, in a few words."""
    own = {
        metric.label: example.scores.get(measure_name(name, branch)) for name, metric in METRICS.items() if metric.score
    }
    return ", ".join(f"{label} {score:.2f}" for label, score in own.items() if score is not None)
