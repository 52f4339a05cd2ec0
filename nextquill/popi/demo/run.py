"""`run_demo`: train, measure, say what follows, and write page, picture and figures."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextquill.errors import OutputExistsError
from nextquill.popi.demo.findings import Finding, find
from nextquill.popi.demo.measuring import Measured, SeedRun, measure, measure_seed
from nextquill.popi.demo.presentation import TABLE_NOTE, demo_page, demo_picture, results_table
from nextquill.popi.demo.recipe import Recipe, make_recipe
from nextquill.popi.demo.training import (
    Prompts,
    one_thread,
    train_base,
    train_on_signals,
    train_popi,
    without_peft_warning,
)
from nextquill.popi.demo.world import World
from nextquill.report.html import render_page
from nextquill.report.progress import Progress, phase_bars
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

FILES = ("demo.png", "demo.html", "results.json")


@dataclass(frozen=True)
class DemoResult:
    """Everything a run measured, what follows from it, and where it was written."""

    recipe: Recipe
    runs: tuple[SeedRun, ...]
    measured: Measured
    findings: tuple[Finding, ...]
    versions: dict[str, str]
    seconds: float
    paths: dict[str, Path]

    def to_json(self) -> str:
        """Settings, findings, measures, and of each seed its users' summaries and what training logged."""
        record: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "findings": [asdict(finding) for finding in self.findings],
            **self.measured.to_dict(),
            "seeds": [
                {"seed": run.seed, "users": [asdict(user) for user in run.users], "history": list(run.history)}
                for run in self.runs
            ],
            "versions": self.versions,
            "seconds": self.seconds,
        }
        return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    seeds: int | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> DemoResult:
    """Train POPI on artificial users with hidden preferences, and measure it on others, on one core in minutes.

    Args:
        output_dir: receives `demo.png`, `demo.html` and `results.json`. Made if absent; files of these names are
            replaced, each in one step at the end of the run, others are left alone.
        seed: the first seed. Two runs with the same arguments give the same figures, seconds excepted.
        seeds: how many seeds, each with its own users and models. Default 3.
        quick: a smoke test of a few seconds; its figures mean nothing, and its text says so.
        progress: called as `progress(what, done, at_most)`. Default: a tqdm bar on a terminal's stderr.
        console: where the results are printed. Default: stdout.
        quiet: print nothing and show no progress.

    Returns:
        The measures, the findings, and the paths of what was written.

    Raises:
        ArgumentError, ArgumentTypeError: a number is out of range or no number.
        OutputExistsError: `output_dir` is a file.
    """
    recipe = make_recipe(seed=seed, seeds=seeds, quick=quick)
    folder = _make_folder(output_dir)
    start = time.perf_counter()
    with one_thread(), without_peft_warning(), phase_bars(progress, quiet) as report:
        runs = tuple(_run_seed(recipe, each, report) for each in recipe.seed_values)
    measured = measure(runs)
    result = DemoResult(
        recipe=recipe,
        runs=runs,
        measured=measured,
        findings=find(measured, recipe),
        versions={name: version(name) for name in ("torch", "transformers", "peft")},
        seconds=time.perf_counter() - start,
        paths={name: folder / name for name in FILES},
    )
    _write(result)
    if not quiet:
        _print(result, console)
    return result


def _run_seed(recipe: Recipe, seed: int, progress: Progress) -> SeedRun:
    def report(what: str, done: int, at_most: int) -> None:
        progress(f"seed {seed}, {what}", done, at_most)

    world = World(
        seed,
        train_users=recipe.train_users,
        test_users=recipe.test_users,
        train_pairs=recipe.train_pairs,
        test_pairs=recipe.test_pairs,
    )
    prompts = Prompts()
    base = train_base(world, prompts, recipe, seed, report)
    with tempfile.TemporaryDirectory() as folder:
        popi = train_popi(base, world, prompts, recipe, seed, Path(folder), report)
    on_signals = train_on_signals(base, world, prompts, recipe, seed, report)
    return measure_seed(seed, world.test, prompts, recipe, base, popi.roles, on_signals, popi.history)


def _make_folder(output_dir: str | Path) -> Path:
    """Made before any work is done, so that a folder that cannot be made costs no run."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output_dir: expected a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(result: DemoResult) -> None:
    """Render everything first, then write, so that a failure leaves the files of an earlier run together."""
    picture = demo_picture(result.runs)
    page = demo_page(result.recipe, result.findings, result.measured, result.runs, picture, _footer(result))
    contents: dict[str, bytes | str] = {
        "demo.png": picture.png,
        "demo.html": render_page(page),
        "results.json": result.to_json(),
    }
    for name in FILES:
        write_whole(result.paths[name], contents[name])


def _footer(result: DemoResult) -> str:
    recipe = result.recipe
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return (
        f"Seeds {', '.join(map(str, recipe.seed_values))}. {recipe.base_steps} steps of the base, {recipe.steps} of "
        f"POPI with {recipe.batch_users} users, {recipe.group_size} summaries and {recipe.pairs_per_user} pairs of "
        f"each; {recipe.signals} signals of a user. {versions}."
    )


def _print(result: DemoResult, console: Console | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from nextquill.report import terminal

    out = console or Console()
    out.print(terminal.results_table(results_table(result.measured, result.recipe)), "")
    out.print(Text(TABLE_NOTE, style="dim"))
    for finding in result.findings:
        out.print(Text.assemble("\n", (finding.heading, "bold"), "\n", finding.text))
    out.print(Text(f"\nThe run took {result.seconds:.0f} s."))
    out.print(Text("\nWritten: " + ", ".join(str(path) for path in result.paths.values())), soft_wrap=True)
