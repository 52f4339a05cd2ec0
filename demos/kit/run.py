"""A run from its arguments to its files: train and measure each seed, say what follows, and write it down."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from demos.kit.recipe import DemoRecipe
from demos.kit.training import one_thread
from nextquill.errors import OutputExistsError
from nextquill.report.comparison.findings import Finding
from nextquill.report.data import Page
from nextquill.report.html import render_page
from nextquill.report.progress import Progress, phase_bars
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R", bound=DemoRecipe)
S = TypeVar("S")


@dataclass(frozen=True)
class DemoReport:
    """What follows from the runs of all seeds.

    Args:
        findings: The sentences, in reading order.
        page: The page; the findings come to it, and seeds and versions to its footer.
        record: What `results.json` holds between the recipe and the versions, the findings among it. Its `rows`, if it
            has any, are the lines of `results.csv`.
        printed: How many of the page's tables are printed too.
    """

    findings: Sequence[Finding]
    page: Page
    record: Mapping[str, Any]
    printed: int


@dataclass(frozen=True)
class DemoResult(Generic[R, S]):
    """Everything a run measured, what follows from it, and where it was written."""

    recipe: R
    runs: tuple[S, ...]
    report: DemoReport
    seconds: float
    paths: dict[str, Path]


@dataclass(frozen=True)
class Demo(Generic[R, S]):
    """A demo.

    Args:
        recipe: The kind of its settings.
        measure: Trains and measures one seed.
        report: Says what follows from all of them.
        packages: Those whose versions are noted.
    """

    recipe: type[R]
    measure: Callable[[R, int, Progress], S]
    report: Callable[[R, Sequence[S]], DemoReport]
    packages: Sequence[str] = ("torch", "transformers")

    def run(
        self,
        output_dir: str | Path,
        *,
        quick: bool = False,
        progress: Progress | None = None,
        console: Console | None = None,
        quiet: bool = False,
        **settings: int | None,
    ) -> DemoResult[R, S]:
        """Run the demo on one core, which takes minutes.

        Args:
            output_dir: Receives `demo.png`, `demo.html`, `results.json` and, where there are rows, `results.csv`. Made
                if absent; files of these names are replaced, each in one step at the end of the run, others are left
                alone.
            quick: A smoke test of a few seconds; its figures mean nothing, and its text says so.
            progress: Called as `progress(what, done, at_most)`. Default: a tqdm bar on a terminal's stderr.
            console: Where the results are printed. Default: stdout.
            quiet: Print nothing and show no progress.
            settings: Of the recipe, `seed` and `seeds` above all; None stands for the default. Two runs with the same
                settings give the same figures, seconds excepted.

        Raises:
            ArgumentError, ArgumentTypeError: A setting is out of range or not an integer.
            OutputExistsError: `output_dir` is a file.
        """
        recipe, folder = self.recipe.of(quick=quick, **settings), Path(output_dir)
        # Before any work is done, so that a folder that cannot be made costs no run.
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"output_dir: expected a folder, {folder} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with one_thread(), phase_bars(progress, quiet) as shown:
            runs = tuple(self.measure(recipe, seed, _of_seed(seed, shown)) for seed in recipe.seed_values)
        seconds = time.perf_counter() - start
        report = self.report(recipe, runs)
        # All is rendered before anything is written, so that a failure leaves the files of an earlier run together.
        contents = _contents(recipe, report, {name: version(name) for name in self.packages}, seconds)
        result = DemoResult(recipe, runs, report, seconds, {name: folder / name for name in contents})
        for name, content in contents.items():
            write_whole(result.paths[name], content)
        if not quiet:
            _print(result, console)
        return result


def as_records(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """The findings for JSON."""
    return [{"heading": each.heading, "text": each.text} for each in findings]


def _contents(
    recipe: DemoRecipe, report: DemoReport, versions: Mapping[str, str], seconds: float
) -> dict[str, bytes | str]:
    """What is written, by file name."""
    assert report.page.picture is not None
    seeds = ", ".join(map(str, recipe.seed_values))
    installed = ", ".join(f"{name} {number}" for name, number in versions.items())
    findings = [(each.heading, each.text) for each in report.findings]
    page = replace(report.page, findings=findings, footer=f"Seeds {seeds}. {report.page.footer} {installed}.")
    record = {"recipe": asdict(recipe), **report.record, "versions": versions, "seconds": seconds}
    found: dict[str, bytes | str] = {
        "demo.png": report.page.picture.png,
        "demo.html": render_page(page),
        "results.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
    }
    if rows := report.record.get("rows"):
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        found["results.csv"] = buffer.getvalue()
    return found


def _of_seed(seed: int, progress: Progress) -> Progress:
    return lambda what, done, at_most: progress(f"seed {seed}, {what}", done, at_most)


def _print(result: DemoResult[Any, Any], console: Console | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from nextquill.report.terminal import results_table

    out, page = console or Console(), result.report.page
    note, *remarks = page.table_notes
    for table in page.tables[: result.report.printed]:
        out.print(results_table(table), "")
    out.print(Text(note, style="dim"))
    for finding in result.report.findings:
        out.print(Text.assemble("\n", (finding.heading, "bold"), "\n", finding.text))
    out.print(Text("\n" + " ".join([*remarks, f"The run took {result.seconds:.0f} s."])))
    out.print(Text("\nWritten: " + ", ".join(map(str, result.paths.values()))), soft_wrap=True)
