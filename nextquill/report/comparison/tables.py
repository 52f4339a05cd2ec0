"""The tables of a comparison, and the notes below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nextquill.report.comparison.figures import Comparison, Cost, Difference, Measure
from nextquill.report.data import Cell, Column, Table
from nextquill.report.numbers import p_text, rounded

# Short headings of the measures that every evaluation has; the others keep their labels.
_HEADINGS = {
    "nll_factual": "nll",
    "nll_counterfactual": "nll, no history",
    "nll_placebo": "nll, another's history",
    "effect_logprob": "effect of history",
    "effect_placebo": "effect vs placebo",
    "top1": "predicted first",
}
# A terminal of 80 columns has room for these, and for the first measure of generated texts or preferences.
_FIRST = ("nll_factual", "nll_counterfactual", "effect_placebo")
# In the file of figures only.
_UNSHOWN = ("effect_prob", "share_above_threshold")


def tables(comparison: Comparison) -> list[Table]:
    """The arms' measures, their differences from the baseline, and their costs."""
    return [_measures(comparison), _differences(comparison), _costs(comparison)]


def notes(comparison: Comparison) -> list[str]:
    """Notes on how the tables' figures were computed."""
    several = len(comparison.seeds) > 1
    over = "users and seeds" if several else "users alone"
    seeds = f"Means over seeds {', '.join(map(str, comparison.seeds))}" if several else f"Seed {comparison.seeds[0]}"
    drawn = "users (bootstrap) and seeds (t distribution)" if several else f"{over} (bootstrap)"
    what = (
        f"{seeds}, on {comparison.num_examples} records of {comparison.num_users} users. Brackets: "
        f"{comparison.level:.0%} interval over {drawn}."
    )
    effects = (
        "NLLs and effects in nats per token. Effect of the history: nll without it minus nll with it. Effect against "
        "placebo: nll under another user's history minus nll under the user's own, which no loss trains on."
    )
    if comparison.counterfactual == "placebo":
        effects += " Without history: under another user's history, which these prompts put in its place."
    tests = (
        f"Differences are paired: the same records{' and seeds' if several else ''}. p: over {over}, Holm's correction "
        f"over the arms. *: a clear difference, better or worse: p is below {1 - comparison.level:.2g} and the "
        "interval excludes 0; bold: clearly better. Near 0, or with few users, interval and p may disagree; then "
        "nothing is marked."
    )
    if not several:
        tests += " The marks hold for these trained models; another seed may give others."
    on_cpu = any(machine.get("device") == "cpu" for machine in comparison.machines)
    costs = (
        "Time: the training steps and the making of their batches, without evaluations and checkpoints. The first step "
        "of a process, in which kernels are compiled, counts as the mean of the others. Peak memory: "
        f"{'of the whole process.' if on_cpu else 'allocated on the device.'}"
    )
    found = [what, effects, tests, costs]
    if len(comparison.machines) > 1:
        machines = "; ".join(map(machine_text, comparison.machines))
        found.append(f"The runs were made on different machines, so their times do not compare: {machines}.")
    if comparison.resumed:
        resumed = ", ".join(comparison.resumed)
        found.append(f"These runs were interrupted and resumed, so their times are sums of parts: {resumed}.")
    if comparison.processes > 1:
        found.append(_side_by_side(comparison.processes, on_cpu=on_cpu))
    return found


def _side_by_side(processes: int, *, on_cpu: bool) -> str:
    """A note on times of runs that were made at the same time."""
    shared = "They shared the processor" if on_cpu else "They shared the machine, each with a device of its own"
    return (
        f"Up to {processes} runs were made at the same time. {shared}, so a run's time also depends on how many ran "
        "beside it."
    )


def machine_text(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _shown(comparison: Comparison) -> list[Measure]:
    known = [measure for measure in comparison.measures.values() if measure.name not in _UNSHOWN]
    return [each for each in known if each.name in _HEADINGS or each.higher_is_better is not None]


def _columns(measures: Sequence[Measure]) -> list[Column]:
    others = [measure.name for measure in measures if measure.name not in _HEADINGS]
    first = (*_FIRST, *others[:1])
    return [Column("arm"), *(_column(measure, is_first=measure.name in first) for measure in measures)]


def _column(measure: Measure, *, is_first: bool) -> Column:
    unit = f", {measure.unit}" if measure.unit else ""
    ways = {True: (" ↑", "; higher is better"), False: (" ↓", "; lower is better"), None: ("", "")}
    arrow, better = ways[measure.higher_is_better]
    heading = _HEADINGS.get(measure.name, measure.short_label)
    return Column(f"{heading}{arrow}", explanation=f"{measure.label}{unit}{better}", secondary=not is_first)


def _measures(comparison: Comparison) -> Table:
    shown = _shown(comparison)
    rows = []
    for arm in comparison.arms:
        estimates = [arm.estimates[measure.name] for measure in shown]
        cells = [Cell(*rounded(each.value, each.low, each.high)) for each in estimates]
        rows.append([Cell(arm.label), *cells])
    return Table("What they reach", _columns(shown), rows)


def _differences(comparison: Comparison) -> Table:
    baseline = comparison.arm(comparison.baseline)
    shown = [measure for measure in _shown(comparison) if comparison.differences(measure.name)]
    rows = [
        [Cell(arm.label), *(_difference(comparison, m, arm.against[baseline.name].get(m.name)) for m in shown)]
        for arm in comparison.arms
        if baseline.name in arm.against
    ]
    return Table(f"Difference from {baseline.label}", _columns(shown), rows)


def _difference(comparison: Comparison, measure: Measure, difference: Difference | None) -> Cell:
    if difference is None:
        return Cell("")
    is_clear = difference.is_clear(comparison.level)
    figure, bounds = rounded(difference.value, difference.low, difference.high, sign="+")
    return Cell(
        f"{figure}{'*' if is_clear else ''}",
        f"{bounds} {p_text(difference.p_adjusted)}".strip(),
        is_clear and (difference.value > 0) == measure.higher_is_better,
    )


def _costs(comparison: Comparison) -> Table:
    columns = (
        Column("arm"),
        Column("LR", explanation="highest learning rate"),
        Column("steps", explanation="optimiser steps"),
        Column("s", explanation="seconds of training"),
        Column("× s", explanation="time of training as a multiple of the baseline's"),
        Column("ms/step"),
        Column("examples/s"),
        Column("peak MiB", explanation="peak memory"),
    )
    base = comparison.arm(comparison.baseline).cost
    baseline_seconds = base.seconds if base is not None else math.nan
    rows = [_cost_row(arm.label, arm.cost, baseline_seconds) for arm in comparison.arms if arm.cost is not None]
    return Table("What they cost", columns, rows)


def _cost_row(label: str, cost: Cost, baseline_seconds: float) -> list[Cell]:
    wanted = "" if cost.reference_seconds is None else f"to match {cost.reference_seconds:.1f}"
    return [
        Cell(label),
        Cell(f"{cost.learning_rate:.3g}"),
        Cell(f"{cost.steps:g}"),
        Cell(f"{cost.seconds:.1f}", wanted),
        Cell(f"{cost.seconds / baseline_seconds:.2f}" if baseline_seconds else ""),
        Cell(f"{1000 * cost.seconds_per_step:.0f}"),
        Cell(f"{cost.examples_per_second:.3g}"),
        Cell("" if cost.peak_memory is None else f"{cost.peak_memory / 2**20:.0f}"),
    ]
