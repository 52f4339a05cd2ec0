"""A comparison as tables for a page, a terminal and Markdown, and the page itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nextquill.comparison.arms import BASE
from nextquill.report.comparison.figures import ArmFigures, Comparison, Difference, Measure
from nextquill.report.comparison.findings import Finding, is_clear, number, signed
from nextquill.report.data import Cell, Column, Page, Table

# Short headings of the measures every evaluation has; the others keep their labels.
_HEADINGS = {
    "nll_factual": "nll",
    "nll_counterfactual": "nll, no history",
    "nll_placebo": "nll, another's history",
    "effect_logprob": "effect of history",
    "effect_placebo": "effect vs placebo",
}
# In a terminal of 80 columns there is room for these, and the first measure of generated texts or preferences.
_FIRST = ("nll_factual", "nll_counterfactual", "effect_placebo")
#: In the figures' file only.
_UNSHOWN = ("effect_prob", "share_above_threshold")
_NOTHING = Cell("")

_RESPONSES = (
    "Some of the evaluated records, as every model of the first seed sees them. A blue token was more likely with the "
    "user's history than without, an orange, dotted one less. Hover, tap or use Tab and the arrow keys."
)
_READING = {
    "The controls": (
        "A loss that beats SFT may have taken larger steps, or more time. SFT at twice the learning rate and SFT for "
        "as long as a causal loss took show what these alone do; a gain that they reach too is not the loss's own."
    ),
    "An effect is the model's own": (
        "It is the difference of two predictions of one model, with the user's history and without. A model that got "
        "worse without a history shows large effects that are no gain; the placebo, another user's history, tells."
    ),
    "What is not clear": (
        "An interval says what other users like these might have given and, of several seeds, other seeds. With few "
        "users it is too narrow; with two or three seeds it is wide, as they tell little of others; with one "
        "it is of these trained models alone. p-values are corrected for the number of arms, not of measures."
    ),
}


def tables(comparison: Comparison) -> list[Table]:
    """What the arms reach, how that differs from the baseline, and what they cost."""
    return [_measures(comparison), _differences(comparison), _costs(comparison)]


def notes(comparison: Comparison) -> list[str]:
    """What the tables' figures are."""
    share = f"{comparison.level:.0%}"
    several = len(comparison.seeds) > 1
    over = "users and seeds" if several else "users alone"
    seeds = f"Means over seeds {', '.join(map(str, comparison.seeds))}" if several else f"Seed {comparison.seeds[0]}"
    level = f"{1 - comparison.level:.2g}"
    what = (
        f"{seeds}, on {comparison.num_examples} records of {comparison.num_users} users. Brackets: {share} "
        f"interval over {'users (bootstrap) and seeds (t distribution)' if several else f'{over} (bootstrap)'}."
    )
    effects = (
        "Nll and effects in nats per token. Effect of the history: nll without it minus nll with it. Effect against "
        "placebo: nll under another user's history minus nll under the own, which no loss trains on."
    )
    if comparison.counterfactual == "placebo":
        effects += " Without history: under another user's history, which these prompts put in its place."
    tests = (
        f"Differences are paired: the same records{' and seeds' if several else ''}. p: over {over}, Holm's correction "
        f"over the arms. *: p below {level} and the interval excludes 0"
        f"{'.' if several else ', for these trained models; another seed may give other ones.'}"
    )
    costs = (
        "Time: of the training steps with the making of their batches, without evaluations and checkpoints; the first "
        f"step of a process, in which kernels are compiled, counts as the mean of the others. Peak memory: "
        f"{_memory_note(comparison)}"
    )
    found = [what, effects, tests, costs]
    if len(comparison.machines) > 1:
        machines = "; ".join(
            ", ".join(f"{name} {value}" for name, value in each.items()) for each in comparison.machines
        )
        found.append(f"The runs were made on different machines, so their times do not compare: {machines}.")
    if comparison.resumed:
        found.append(f"Interrupted and gone on with, their times are sums of parts: {', '.join(comparison.resumed)}.")
    return found


def markdown(comparison: Comparison, findings: Sequence[Finding]) -> str:
    """Tables and findings, to be pasted."""
    parts = [f"# {_escaped(title(comparison))}", _escaped(lead(comparison))]
    parts += [f"- **{_escaped(each.heading)}.** {_escaped(each.text)}" for each in findings]
    for table in tables(comparison):
        parts += [f"## {_escaped(table.title)}", _markdown_table(table)]
    return "\n\n".join([*_joined_items(parts), *map(_escaped, notes(comparison))]) + "\n"


def page(comparison: Comparison, findings: Sequence[Finding]) -> Page:
    """The comparison as one page."""
    return Page(
        title=title(comparison),
        lead=lead(comparison),
        findings=[(each.heading, each.text) for each in findings if not each.is_warning],
        notices=[f"{each.heading}. {each.text}" for each in findings if each.is_warning],
        tables=tables(comparison),
        table_notes=notes(comparison),
        responses_lead=_RESPONSES,
        reading=tuple(_READING.items()),
        footer="All sentences follow from the figures of these runs. "
        f"Evaluated records {comparison.records}; machine: {_machine(comparison)}.",
    )


def title(comparison: Comparison) -> str:
    """One line that names what was compared."""
    return f"Losses compared: {comparison.model}"


def lead(comparison: Comparison) -> str:
    """What was done."""
    count = len(comparison.arms) - 1
    return (
        f"{count} {'way' if count == 1 else 'ways'} of training {comparison.model} on the same "
        f"{comparison.num_train_examples} records, from the same start and in the same order, and the model before "
        f"training. Compared with {comparison.arm(comparison.baseline).label}."
    )


def _shown(comparison: Comparison) -> list[Measure]:
    known = [measure for measure in comparison.measures.values() if measure.name not in _UNSHOWN]
    return [each for each in known if each.name in _HEADINGS or each.higher_is_better is not None]


def _columns(measures: Sequence[Measure]) -> list[Column]:
    others = [measure.name for measure in measures if measure.name not in _HEADINGS]
    first = (*_FIRST, *others[:1])
    return [Column("arm"), *(_column(measure, is_first=measure.name in first) for measure in measures)]


def _column(measure: Measure, *, is_first: bool) -> Column:
    unit = f", {measure.unit}" if measure.unit else ""
    better = {True: "; higher is better", False: "; lower is better", None: ""}[measure.higher_is_better]
    arrow = {True: " ↑", False: " ↓", None: ""}[measure.higher_is_better]
    heading = _HEADINGS.get(measure.name, measure.short_label)
    return Column(f"{heading}{arrow}", explanation=f"{measure.label}{unit}{better}", secondary=not is_first)


def _measures(comparison: Comparison) -> Table:
    shown = _shown(comparison)
    rows = []
    for arm in comparison.arms:
        cells = [Cell(arm.label)]
        for measure in shown:
            estimate = arm.estimates[measure.name]
            cells.append(Cell(number(estimate.value), _interval(estimate.low, estimate.high)))
        rows.append(cells)
    return Table("What they reach", _columns(shown), rows)


def _differences(comparison: Comparison) -> Table:
    baseline = comparison.arm(comparison.baseline)
    shown = [m for m in _shown(comparison) if any(m.name in a.against.get(baseline.name, {}) for a in comparison.arms)]
    rows = [
        [Cell(arm.label), *(_difference(comparison, arm.against[baseline.name].get(m.name)) for m in shown)]
        for arm in comparison.arms
        if baseline.name in arm.against
    ]
    return Table(f"Difference from {baseline.label}", _columns(shown), rows)


def _difference(comparison: Comparison, difference: Difference | None) -> Cell:
    if difference is None:
        return _NOTHING
    marked = is_clear(comparison, difference)
    p = "p < 0.001" if difference.p_adjusted < 0.001 else f"p {difference.p_adjusted:.3f}"
    return Cell(
        f"{signed(difference.value)}{'*' if marked else ''}",
        f"{_interval(difference.low, difference.high)} {p}".strip(),
        marked,
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
    rows = [
        _cost_row(arm, base.seconds if base is not None else math.nan) for arm in comparison.arms if arm.name != BASE
    ]
    return Table("What they cost", columns, rows)


def _cost_row(arm: ArmFigures, baseline_seconds: float) -> list[Cell]:
    cost = arm.cost
    if cost is None:
        return [Cell(arm.label), *[_NOTHING] * 7]
    wanted = "" if cost.reference_seconds is None else f"to match {cost.reference_seconds:.1f}"
    return [
        Cell(arm.label),
        Cell(f"{cost.learning_rate:.3g}"),
        Cell(f"{cost.steps:g}"),
        Cell(f"{cost.seconds:.1f}", wanted),
        Cell(f"{cost.seconds / baseline_seconds:.2f}" if baseline_seconds else ""),
        Cell(f"{1000 * cost.seconds_per_step:.0f}"),
        Cell(f"{cost.examples_per_second:.3g}"),
        Cell("" if cost.peak_memory is None else f"{cost.peak_memory / 2**20:.0f}"),
    ]


def _memory_note(comparison: Comparison) -> str:
    on_cpu = any(machine.get("device") == "cpu" for machine in comparison.machines)
    return "of the whole process." if on_cpu else "allocated on the device."


def _machine(comparison: Comparison) -> str:
    return ", ".join(f"{name} {value}" for name, value in comparison.machines[0].items()) if comparison.machines else ""


def _interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{number(low)}, {number(high)}]"


def _markdown_table(table: Table) -> str:
    head = [_escaped(column.heading) for column in table.columns]
    rule = ["---", *("---:" for _ in head[1:])]
    rows = [[_escaped(f"{cell.text} {cell.detail}".strip()) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _joined_items(parts: Sequence[str]) -> list[str]:
    """Paragraphs, with list items that follow each other as one."""
    found: list[str] = []
    for part in parts:
        if part.startswith("- ") and found and found[-1].startswith("- "):
            found[-1] += f"\n{part}"
        else:
            found.append(part)
    return found


def _escaped(text: str) -> str:
    """Text whose stars, bars and the like are themselves in Markdown."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
