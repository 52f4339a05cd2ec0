"""Writes what a finished comparison came to: figures, Markdown and a page with curves and tokens of the first seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from nextquill.comparison.arms import BASE, BASE_LABEL
from nextquill.comparison.folder import run_folder
from nextquill.comparison.running import Setup
from nextquill.report.comparison.collecting import collect
from nextquill.report.comparison.figures import Comparison
from nextquill.report.comparison.findings import find
from nextquill.report.comparison.presentation import markdown, page, tables
from nextquill.report.curves import training_charts
from nextquill.report.examples import example_views
from nextquill.report.html import render_page
from nextquill.report.runs import Run, read_run
from nextquill.storage.atomic_files import write_whole

__all__ = ["MARKDOWN_FILE", "PAGE_FILE", "RESULT_FILE", "find", "report", "tables"]

RESULT_FILE, MARKDOWN_FILE, PAGE_FILE = "comparison.json", "comparison.md", "report.html"


def report(setup: Setup, *, model: str, baseline: str, level: float, resamples: int, examples: int) -> Comparison:
    """Compare the finished runs and write the three files.

    Args:
        setup: the comparison; all its runs are finished.
        model: its name as given.
        baseline: the arm that the others are compared with.
        level, resamples: of the intervals.
        examples: responses on the page.

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
    findings = find(comparison)
    runs = _runs(setup)
    charts = training_charts(runs[1:])
    if charts is not None and len(setup.seeds) > 1:
        charts = dataclasses.replace(charts, lead=f"The runs of seed {setup.seeds[0]}. {charts.lead}")
    whole = dataclasses.replace(
        page(comparison, findings),
        charts=charts,
        responses=example_views(runs, examples) if examples else (),
    )
    write_whole(setup.folder / MARKDOWN_FILE, markdown(comparison, findings))
    write_whole(setup.folder / PAGE_FILE, render_page(whole))
    write_whole(setup.folder / RESULT_FILE, comparison.to_json())
    return comparison


def _runs(setup: Setup) -> Sequence[Run]:
    """The base and every arm of the first seed."""
    seed = setup.seeds[0]
    labels = {BASE: BASE_LABEL, **{arm.name: arm.label for arm in setup.arms}}
    return [read_run(run_folder(setup.folder, name, seed), label) for name, label in labels.items()]
