"""`nextquill report`: runs side by side on one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from nextquill.cli.flags import UsageError, claim_output_file, option
from nextquill.cli.main import OK
from nextquill.cli.parsing import parse
from nextquill.errors import ArgumentError
from nextquill.report.data import Page
from nextquill.report.html import render_page
from nextquill.report.run_page import DEFAULT_EXAMPLES, runs_page
from nextquill.report.runs import Run, labels, read_run
from nextquill.report.text import plain
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.input_files import real_path

DESCRIPTION = (
    "Put runs side by side on one HTML page that needs no network: a verdict, the measures that matter with intervals "
    "and paired differences, texts, response tokens coloured by effect and the history items they depend on, training "
    "curves, all measures. Or draw measures and curves as one PNG or SVG. Runs may come first, without --runs: "
    "nextquill report runs/a runs/b --output_file report.html"
)


FORMATS = ("html", "png", "svg")


@dataclass
class ReportOptions:
    """Runs and output."""

    runs: list[str] = option(
        "Output folders of train, popi train or evaluate; evaluations inside are read too.", metavar="RUN ..."
    )
    output_file: str | None = option("Where to write the report; by default report.FORMAT.", None, metavar="FILE")
    format: str | None = option(
        "html: the whole page; png or svg: only its measures and curves, as a picture. By default the ending of the "
        "file's name decides.", None, choices=list(FORMATS),
    )  # fmt: skip
    overwrite: bool = option("Replace an existing output file.", False)
    title: str | None = option("The page's title; by default the runs' names.", None)
    examples: int = option(
        "Examples to show: a third with the largest effects, a third near the median, a third with the smallest.",
        DEFAULT_EXAMPLES,
    )
    index: list[int] | None = option("Show the examples with these indices instead.", None, metavar="INDEX ...")
    baseline: str | None = option(
        "The run to compare the others with; by default the first that was evaluated.", None, metavar="RUN"
    )

    def output(self) -> tuple[str, str]:
        """The file's name and its format."""
        name = self.output_file or f"report.{self.format or FORMATS[0]}"
        ending = Path(name).suffix.removeprefix(".").lower()
        if self.format is not None and ending in FORMATS and ending != self.format:
            raise ArgumentError(
                f"format: expected {ending}, the ending of {Path(name).name}, or another output_file, got {self.format}"
            )
        return name, self.format or (ending if ending in FORMATS else FORMATS[0])


OPTIONS = (ReportOptions,)


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    (options,) = parse("report", DESCRIPTION, OPTIONS, with_runs_flag(arguments))
    if options.examples < 0:
        raise ArgumentError(f"examples: expected 0 or more, got {options.examples}")
    name, form = options.output()
    target = claim_output_file(name, overwrite=options.overwrite)
    runs, baseline = read_runs(options.runs, options.baseline)
    page = runs_page(runs, title=options.title, baseline=baseline, examples=options.examples, indices=options.index)
    content = render_page(page).encode() if form == "html" else _picture(page, form)
    write_whole(target, content)
    print(plain(f"Written to {target} ({len(content) / 1e6:.1f} MB)"), file=sys.stderr)
    return OK


def _picture(page: Page, form: str) -> bytes:
    from nextquill.report.plots import draw_report

    if not page.measures and page.charts is None:
        raise ArgumentError(f"format: expected html, as there is neither a measure nor a curve to draw, got {form}")
    return draw_report(page.title, page.measures, page.charts, "png" if form == "png" else "svg")


def with_runs_flag(arguments: Sequence[str]) -> list[str]:
    """The words, with `--runs` in front if they begin without a flag."""
    first = list(takewhile(lambda word: not word.startswith("-"), arguments))
    if first and any(word == "--runs" or word.startswith("--runs=") for word in arguments):
        raise UsageError("runs: expected all runs in one place, got some before the flags and some here")
    return ["--runs", *arguments] if first else list(arguments)


def read_runs(folders: Sequence[str], baseline: str | None) -> tuple[list[Run], Run | None]:
    """The runs, each with its own label, and the one of them that is the baseline."""
    paths = [Path(folder) for folder in folders]
    places = [real_path(path) for path in paths]
    for position, place in enumerate(places):
        if place in places[:position]:
            raise ArgumentError(f"runs: {paths[position]} is given twice")
    names = labels(paths)
    if baseline is not None:
        place = real_path(baseline)
        if place not in places and baseline not in names:
            raise ArgumentError(f"baseline: expected one of the runs, {', '.join(folders)}, got {baseline}")
        chosen = places.index(place) if place in places else names.index(baseline)
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    return runs, None if baseline is None else runs[chosen]
