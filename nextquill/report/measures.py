"""Tables of measures: runs side by side with their intervals, and paired differences to one of them.

Figures stand out only where examples seen by both runs say so: a run's value is marked where its difference to every
other run is `clear`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextquill.evaluation.bootstrap import PairedResult
from nextquill.evaluation.compare import TOKENS, compare_evaluations
from nextquill.evaluation.metrics import METRICS
from nextquill.evaluation.results import EvaluatedExample, MetricValue
from nextquill.report.data import Cell, Column, Table
from nextquill.report.runs import Run

# The prompts that texts are generated under.
_BRANCHES = ("factual", "counterfactual", "placebo")
# Stand among an evaluation's measures, and here in the table of the runs.
_COUNTS = ("examples", "users", TOKENS)
# What the trainer's own last evaluation is worth showing for; `nextquill evaluate` gives the same with intervals.
_FINAL = (
    ("eval_nll_factual", "nll with the user's history, nats per token"),
    ("eval_nll_counterfactual", "nll without history, nats per token"),
    ("eval_nll_placebo", "nll under another user's history, nats per token"),
    ("eval_effect_placebo", "effect against the placebo, nats per token"),
    ("eval_share_above_threshold", "share of tokens with an effect above the threshold"),
)


class Pairing:
    """Paired differences between runs, each pair of them computed once.

    Intervals and p-values are drawn as the first run's evaluation was, and the baseline, where there is one, comes
    second: so a difference to it has the figures that `nextquill evaluate --baseline` printed.
    """

    def __init__(self, baseline: Run | None = None) -> None:
        self._baseline = baseline
        self._found: dict[tuple[Path, Path], dict[str, PairedResult]] = {}

    def __call__(self, run: Run, other: Run) -> Mapping[str, PairedResult]:
        """`run` minus `other` in every measure that both can be paired in; none where they saw other records."""
        first, second = run.evaluation_folder, other.evaluation_folder
        if first is None or second is None or not same_records(run, other) or not (run.examples and other.examples):
            return {}
        if run is self._baseline and other is not run:
            return {name: _negated(result) for name, result in self(other, run).items()}
        if (first, second) not in self._found:
            found = compare_evaluations(first, second, **_draws(run))
            self._found[first, second] = found
            self._found[second, first] = {name: _negated(result) for name, result in found.items()}
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


def metrics_of(runs: Sequence[Run]) -> dict[str, MetricValue]:
    """Every measure of any run but for counts, in the order of the first that has it."""
    found: dict[str, MetricValue] = {}
    for run in runs:
        if run.evaluation is not None:
            for name, metric in run.evaluation.metrics.items():
                found.setdefault(name, metric)
    return {name: metric for name, metric in found.items() if name not in _COUNTS}


def clear(result: PairedResult, level: float) -> bool:
    """Whether the interval excludes 0 and the p-value agrees, which with few users it may not."""
    return result.excludes_zero and result.p_value < 1 - level


def measures_tables(runs: Sequence[Run], baseline: Run | None) -> list[Table]:
    """What the runs are, their measures, and the differences to the baseline, as far as there is something to say."""
    found, pairing = evaluated(runs), Pairing(baseline)
    tables = [_runs_table(runs)]
    if any(run.training is not None and run.training.final and run.evaluation is None for run in runs):
        tables.append(_final_table(runs))
    if found:
        tables.append(_metrics_table(found, pairing))
    if baseline is not None:
        tables += _differences_table(found, baseline, pairing)
    return tables


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
        return [Cell("–")] * 3
    log = run.training.log
    steps = max((entry["step"] for entry in log), default=0)
    epoch = max((entry["epoch"] for entry in log if "epoch" in entry), default=math.nan)
    seconds = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), math.nan)
    unfinished = "" if run.training.is_finished else "not finished"
    return [Cell(f"{steps:,}", unfinished), Cell(_text(epoch, 2)), Cell(_text(seconds / 60, 1))]


def _evaluation_cells(run: Run) -> list[Cell]:
    if run.evaluation is None:
        return [Cell("–")] * 4
    known = run.evaluation.metrics
    counts = [known[name].value if name in known else math.nan for name in ("users", TOKENS)]
    return [
        Cell(run.evaluation.task or "–"),
        Cell(f"{run.evaluation.num_examples:,}"),
        *(Cell(f"{count:,.0f}" if math.isfinite(count) else "–") for count in counts),
    ]


def _final_table(runs: Sequence[Run]) -> Table:
    trained = [run for run in runs if run.training is not None and run.training.final]
    rows = [
        [Cell(label), *(Cell(_text(run.training.final.get(name, math.nan), 4)) for run in trained if run.training)]
        for name, label in _FINAL
        if any(run.training is not None and name in run.training.final for run in trained)
    ]
    return Table("At the end of training, by the trainer", [Column("measure"), *_columns(trained)], rows)


def _metrics_table(runs: Sequence[Run], pairing: Pairing) -> Table:
    rows = []
    for name, metric in metrics_of(runs).items():
        best = _best(runs, name, metric, pairing)
        cells = [_value_cell(run, name, is_best=run is best) for run in runs]
        rows.append([_name_cell(metric), *cells])
    levels = " and ".join(f"{100 * level:g}%" for level in sorted({_level(run) for run in runs}))
    title = f"Measures on the evaluated records, with {levels} intervals"
    return Table(title, [Column("measure"), *_columns(runs)], rows)


def _best(runs: Sequence[Run], name: str, metric: MetricValue, pairing: Pairing) -> Run | None:
    """The best run, if it beats each other one in a paired interval; None where that is not shown."""
    known = [run for run in runs if run.evaluation is not None and name in run.evaluation.metrics]
    if metric.higher_is_better is None or len(known) < 2 or len(known) < len(runs):
        return None
    sign = 1 if metric.higher_is_better else -1

    def value(run: Run) -> float:
        assert run.evaluation is not None
        return sign * run.evaluation.metrics[name].value

    best = max(known, key=value)
    for other in known:
        if other is not best:
            result = pairing(best, other).get(name)
            if result is None or not clear(result, _level(best)) or sign * result.difference < 0:
                return None
    return best


def _differences_table(runs: Sequence[Run], baseline: Run, pairing: Pairing) -> list[Table]:
    others = [run for run in runs if run is not baseline and same_records(run, baseline)]
    rows = []
    for name, metric in metrics_of([baseline]).items():
        results = [pairing(run, baseline).get(name) for run in others]
        if any(results):
            rows.append([_name_cell(metric), *(_difference_cell(each, _level(baseline)) for each in results)])
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
    assert run.evaluation is not None
    metric = run.evaluation.metrics.get(name)
    if metric is None:
        return Cell("–")
    detail = [interval_text(metric.low, metric.high), _fewer(run, name)]
    return Cell(_figure(metric.value), "; ".join(filter(None, detail)), is_best)


def _fewer(run: Run, name: str) -> str:
    """How many examples a measure of generated texts is of, where not all were generated for."""
    branch = next((each for each in _BRANCHES if name.endswith(f"_{each}")), "factual")
    metric = METRICS.get(name.removesuffix(f"_{branch}"))
    if metric is None or metric.score is None or not run.examples:
        return ""
    count = sum(branch in example.generated for example in run.examples)
    return f"n {count}" if count < len(run.examples) else ""


def _difference_cell(result: PairedResult | None, level: float) -> Cell:
    if result is None:
        return Cell("–")
    interval = interval_text(result.low, result.high) or "no interval"
    detail = f"{interval}; p {_p(result.p_value)}; n {result.num}"
    return Cell(_figure(result.difference, "+"), detail, clear(result, level))


def interval_text(low: float | None, high: float | None) -> str:
    """An interval in words, empty where there is none."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{_figure(low)} to {_figure(high)}"


def _figure(value: float, sign: str = "") -> str:
    """Four decimals, two from 10 on; two digits below a thousandth, where four decimals would show next to nothing."""
    if 1e-9 < abs(value) < 0.001:
        return f"{value:{sign}.2g}"
    digits = 2 if abs(value) >= 10 else 4
    return f"{round(value, digits) + 0.0:{sign},.{digits}f}"  # never -0.0000


def _level(run: Run) -> float:
    return 0.95 if run.evaluation is None else run.evaluation.level


def _draws(run: Run) -> dict[str, Any]:
    """How the intervals of a run's evaluation were drawn, as far as it says."""
    settings = run.evaluation.settings if run.evaluation is not None else {}
    known = {name: settings.get(name) for name in ("seed", "resamples")}
    drawn = {name: value for name, value in known.items() if isinstance(value, int) and value > 0}
    return {"level": _level(run), **drawn}


def _text(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _p(value: float) -> str:
    return "< .001" if value < 0.001 else f"= {value:.3f}".replace("0.", ".", 1)


def scores_text(example: EvaluatedExample, branch: str) -> str:
    """The scores of an example's text that was generated under one prompt, in a few words."""
    suffix = "" if branch == "factual" else f"_{branch}"
    own = [(metric.label, example.scores.get(name + suffix)) for name, metric in METRICS.items() if metric.score]
    return ", ".join(f"{label} {score:.2f}" for label, score in own if score is not None)
