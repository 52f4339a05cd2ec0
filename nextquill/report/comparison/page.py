"""A finished comparison as a page, as Markdown, and as the files that both are written to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nextquill.comparison.folder import run_folder
from nextquill.evaluation.results import MetricValue
from nextquill.report.comparison.collect import collect
from nextquill.report.comparison.figures import Comparison
from nextquill.report.comparison.findings import Finding, find
from nextquill.report.comparison.tables import machine_text, notes, tables
from nextquill.report.data import Page, Table
from nextquill.report.examples import example_views
from nextquill.report.headline import Change, Subject, comparison_verdict, few_people, forest, of_people
from nextquill.report.html import render_page
from nextquill.report.numbers import counted
from nextquill.report.run_page import training_charts
from nextquill.report.runs import read_run
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from nextquill.comparison.running import Setup

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE = "comparison.json", "comparison.md", "report.html"

_RESPONSES = (
    "Some of the evaluated records, as every model of the first seed sees them. A blue token was more likely with the "
    "user's history than without, an orange, dotted one less. Hover, tap or use Tab and the arrow keys."
)
_READING = {
    "The controls": (
        "A loss may beat SFT only because it took larger steps, or more time. Two controls show how far that alone "
        "goes: SFT at twice the learning rate, and SFT for as long as a causal loss took. A gain that they reach too "
        "is not due to the loss."
    ),
    "An effect is the model's own": (
        "It is the difference of two predictions of one model: with the user's history and without. A model that got "
        "worse without a history shows large effects that are no gain. The placebo, another user's history, tells the "
        "two apart."
    ),
    "Intervals and p-values": (
        "An interval shows what other users like these might have given, and with several seeds also what other seeds "
        "might have. With few users it is too narrow. With two or three seeds it is wide, because they tell little of "
        "other seeds. With one seed it is about these trained models alone. p-values are corrected for the number of "
        "arms, not of measures."
    ),
}


def write_report(setup: Setup, *, model: str, baseline: str, level: float, resamples: int, examples: int) -> Comparison:
    """Compare the finished runs of `setup` and write three files: figures, Markdown, and a page.

    The page shows the curves of the first seed's runs, and `examples` responses as these see them; `collect` describes
    the other options.

    Raises:
        CheckpointError, RecordError: a run is missing or damaged, or was evaluated on other records.
    """
    comparison = collect(
        setup.folder,
        setup.arms,
        setup.seeds,
        baseline=baseline,
        model=model,
        num_train_examples=len(setup.train_dataset),
        level=level,
        resamples=resamples,
    )
    findings, seed = find(comparison), setup.seeds[0]
    runs = [read_run(run_folder(setup.folder, arm.name, seed), arm.label) for arm in comparison.arms]
    charts = training_charts(runs[1:])
    if charts is not None and len(setup.seeds) > 1:
        charts = dataclasses.replace(charts, lead=f"The runs of seed {seed}. {charts.lead}")
    whole = dataclasses.replace(page(comparison, findings), charts=charts, responses=example_views(runs, examples))
    write_whole(setup.folder / MARKDOWN_FILE, markdown(whole, findings))
    write_whole(setup.folder / PAGE_FILE, render_page(whole))
    write_whole(setup.folder / RESULT_FILE, comparison.to_json())
    return comparison


def page(comparison: Comparison, findings: Sequence[Finding]) -> Page:
    """The comparison as one page, without the runs' curves and responses."""
    machine = machine_text(comparison.machines[0]) if comparison.machines else ""
    count, one = len(comparison.arms) - 1, len(comparison.seeds) == 1
    subjects, baseline = _subjects(comparison), comparison.arm(comparison.baseline).label
    responses = counted(comparison.num_examples, "response")
    on = of_people(responses, comparison.num_users, comparison.num_new_users)
    return Page(
        title=f"Losses compared: {comparison.model}",
        lead=(
            f"{counted(count, 'way')} of training {comparison.model} on the same "
            f"{comparison.num_train_examples} records, from the same start and in the same order, and the model before "
            f"training. Compared with {baseline}."
        ),
        findings=[(each.heading, each.text) for each in findings if not each.is_warning],
        notices=few_people(comparison.num_users)
        + [f"{each.heading}. {each.text}" for each in findings if each.is_warning],
        folded=tables(comparison),
        verdict=[comparison_verdict(subjects, baseline, on)],
        measures=forest(subjects, baseline),
        measures_lead=f"Dots with {comparison.level:.0%} intervals over {'people' if one else 'people and seeds'}.",
        table_notes=notes(comparison),
        responses_lead=_RESPONSES,
        reading=tuple(_READING.items()),
        footer="All sentences follow from the figures of these runs. "
        f"Evaluated records {comparison.records}; machine: {machine}.",
    )


def _subjects(comparison: Comparison) -> list[Subject]:
    """The arms; their colours are those of the curves, which the untrained base has not."""
    subjects = []
    for place, arm in enumerate(comparison.arms, start=-1):
        metrics = {
            name: MetricValue(measure.label, its.value, its.low, its.high, measure.unit, measure.higher_is_better)
            for name, measure in comparison.measures.items()
            if (its := arm.estimates.get(name)) is not None
        }
        changes = {
            name: Change(each.value, each.low, each.high, each.p_adjusted, each.is_clear(comparison.level))
            for name, each in arm.against.get(comparison.baseline, {}).items()
        }
        subjects.append(Subject(arm.label, metrics, changes, place=place))
    return subjects


def markdown(whole: Page, findings: Sequence[Finding]) -> str:
    """The page's title, tables and notes, and the findings in reading order, as Markdown."""
    parts = [f"# {_escaped(whole.title)}", *map(_escaped, whole.verdict), _escaped(whole.lead)]
    parts.append("\n".join(f"- **{_escaped(each.heading)}.** {_escaped(each.text)}" for each in findings))
    for table in whole.folded:
        parts += [f"## {_escaped(table.title)}", _markdown_table(table)]
    return "\n\n".join([*parts, *map(_escaped, whole.table_notes)]) + "\n"


def _markdown_table(table: Table) -> str:
    head = [_escaped(column.heading) for column in table.columns]
    rule = ["---", *("---:" for _ in head[1:])]
    rows = [[_escaped(f"{cell.text} {cell.detail}".strip()) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _escaped(text: str) -> str:
    """Text whose stars, bars and the like are themselves in Markdown."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
