"""A run from its settings to its files: train and measure each seed, say what follows, and write it down."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from demos.kit.progress import Progress, phase_bars
from demos.kit.training import one_thread
from nextquill.errors import ArgumentError, ArgumentTypeError, OutputExistsError
from nextquill.report.comparison.findings import Finding
from nextquill.report.data import Page
from nextquill.report.html import render_page
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

R = TypeVar("R", bound="DemoRecipe")
S = TypeVar("S")


@dataclass(frozen=True)
class DemoRecipe:
    """The settings of every demo; each demo adds its own.

    Args:
        seed: The first seed.
        seeds: How many seeds, each with its own users and models.
        quick: Whether this is the smoke test of a few seconds, whose figures mean nothing.
    """

    #: The smoke test's settings.
    QUICK: ClassVar[dict[str, Any]] = {}

    seed: int = 0
    seeds: int = 3
    quick: bool = False

    def __post_init__(self) -> None:
        for name, value, least in (("seed", self.seed, 0), ("seeds", self.seeds, 1)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name}: expected an int, got {value!r}")
            if value < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {value}")

    @classmethod
    def of(cls: type[R], *, quick: bool = False, **given: int | None) -> R:
        """The recipe with the settings that are given; None stands for the default, which `quick` makes small."""
        settings = {name: value for name, value in given.items() if value is not None}
        return cls(**{"quick": quick, **(cls.QUICK if quick else {}), **settings})

    @property
    def seed_values(self) -> range:
        """The seeds of the run."""
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class DemoReport:
    """The conclusions from the runs of all seeds.

    Args:
        findings: The sentences, in reading order.
        page: The page; the findings come to it, and seeds and versions to its footer.
        record: What `results.json` holds between the findings and the versions. Its `rows`, if it has any, are the
            lines of `results.csv`.
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


def run_seeds(
    kind: type[R],
    measure: Callable[[R, int, Progress], S],
    conclude: Callable[[R, Sequence[S]], DemoReport],
    output_dir: str | Path,
    *,
    packages: Sequence[str] = ("torch", "transformers"),
    quick: bool = False,
    progress: Progress | None = None,
    console: Console | None = None,
    **settings: int | None,
) -> DemoResult[R, S]:
    """Run a demo on one core, which takes minutes.

    Args:
        kind: Its recipe's class.
        measure: Trains and measures one seed.
        conclude: Says what follows from all of them.
        output_dir: Receives `demo.png`, `demo.html`, `results.json` and, where there are rows, `results.csv`, which
            replace files of these names at the end of the run. Made if absent.
        packages: The packages whose versions are noted.
        quick: A smoke test of a few seconds; its figures mean nothing, and its text says so.
        progress: Called as `progress(what, done, at_most)`. Default: a tqdm bar on a terminal's stderr.
        console: Where the results are printed. Default: stdout.
        settings: Settings of the recipe; None stands for the default. The same settings give the same figures, seconds
            excepted.

    Raises:
        ArgumentError, ArgumentTypeError: A setting is out of range or not an integer.
        OutputExistsError: `output_dir` is a file.
    """
    recipe = kind.of(quick=quick, **settings)
    folder = make_folder(output_dir)
    start = time.perf_counter()
    with one_thread(), phase_bars(progress) as shown:
        runs = tuple(measure(recipe, seed, _of_seed(seed, shown)) for seed in recipe.seed_values)
    seconds = time.perf_counter() - start
    report = conclude(recipe, runs)
    # All is rendered before anything is written, so that a failure leaves the files of an earlier run together.
    contents = _contents(recipe, report, {name: version(name) for name in packages}, seconds)
    result = DemoResult(recipe, runs, report, seconds, {name: folder / name for name in contents})
    for name, content in contents.items():
        write_whole(result.paths[name], content)
    _print(result, console)
    return result


def make_folder(output_dir: str | Path) -> Path:
    """The folder of a run's files, made before any work is done, so that one that cannot be made costs no run."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output_dir: expected a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _contents(
    recipe: DemoRecipe, report: DemoReport, versions: Mapping[str, str], seconds: float
) -> dict[str, bytes | str]:
    """The contents of the files, by file name."""
    assert report.page.picture is not None
    seeds = ", ".join(map(str, recipe.seed_values))
    installed = ", ".join(f"{name} {number}" for name, number in versions.items())
    said = [{"heading": each.heading, "text": each.text} for each in report.findings]
    findings = [(each.heading, each.text) for each in report.findings]
    page = replace(report.page, findings=findings, footer=f"Seeds {seeds}. {report.page.footer} {installed}.")
    shared = {"versions": versions, "seconds": seconds}
    record = {"recipe": asdict(recipe), "findings": said, **report.record, **shared}
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
