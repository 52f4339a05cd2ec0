"""`run_demo`: train, compare, say what follows, and write picture, page and figures."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from nextquill.demo.evaluation import TestSet, TokenProbabilities
from nextquill.demo.findings import SFT, find, timing_note
from nextquill.demo.presentation import (
    SHOWN_METHODS,
    TABLE_NOTE,
    ShownResponse,
    demo_page,
    demo_picture,
    results_tables,
    shown_responses,
)
from nextquill.demo.recipe import Recipe, make_recipe
from nextquill.demo.results import BASE, DemoResult, DemoRow, RowTable, SeedRun, Timing
from nextquill.demo.training import (
    Base,
    make_contestants,
    one_thread,
    phase_c_steps,
    train_base,
)
from nextquill.demo.world import World
from nextquill.errors import OutputExistsError
from nextquill.report.html import render_page
from nextquill.report.progress import Progress, phase_bars
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

FILES = ("demo.png", "demo.html", "results.json", "results.csv")


def run_demo(
    output_dir: str | Path,
    *,
    seed: int = 0,
    seeds: int | None = None,
    steps: int | None = None,
    long_steps: int | None = None,
    quick: bool = False,
    progress: Progress | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> DemoResult:
    """Compare six losses on artificial users with known personal tokens, on one core in about two minutes.

    Args:
        output_dir: Receives `demo.png`, `demo.html`, `results.json` and `results.csv`. Made if absent; files of these
            names are replaced, each in one step at the end of the run, others are left alone.
        seed: The first seed. Two runs with the same arguments give the same figures, seconds excepted.
        seeds: How many seeds, each with its own world, model and data. Default 3.
        steps: Steps of phase C after which the losses are compared. Default 16.
        long_steps: Steps after which they are compared again. Default 28.
        quick: A smoke test of a few seconds; its figures mean nothing, and its text says so.
        progress: Called as `progress(what, done, at_most)`. Default: a tqdm bar on a terminal's stderr.
        console: Where the results are printed. Default: stdout.
        quiet: Print nothing and show no progress.

    Returns:
        The rows of every method, seed and checkpoint, the findings, and the paths of what was written.

    Raises:
        ArgumentError, ArgumentTypeError: A number is out of range or no number.
        OutputExistsError: `output_dir` is a file.
    """
    recipe = make_recipe(seed=seed, seeds=seeds, steps=steps, long_steps=long_steps, quick=quick)
    folder = _make_folder(output_dir)
    start = time.perf_counter()
    rows: list[DemoRow] = []
    seed_runs: list[SeedRun] = []
    shown: tuple[ShownResponse, ...] = ()
    with one_thread(), phase_bars(progress, quiet) as report:
        for each in recipe.seed_values:
            seed_run, seed_rows, seed_shown = _run_seed(recipe, each, report)
            seed_runs.append(seed_run)
            rows += seed_rows
            shown = shown or seed_shown
    table = RowTable(rows)
    result = DemoResult(
        recipe=recipe,
        seed_runs=tuple(seed_runs),
        rows=tuple(rows),
        findings=find(table, recipe, seed_runs),
        timing=timing_note(table, recipe),
        versions={name: version(name) for name in ("torch", "transformers")},
        seconds=time.perf_counter() - start,
        paths={name: folder / name for name in FILES},
    )
    _write(result, table, shown)
    if not quiet:
        _print(result, table, console)
    return result


def _run_seed(
    recipe: Recipe, seed: int, progress: Progress
) -> tuple[SeedRun, list[DemoRow], tuple[ShownResponse, ...]]:
    def report(what: str, done: int, at_most: int) -> None:
        progress(f"seed {seed}, {what}", done, at_most)

    world = World(seed, dev_users=recipe.dev_users, test_users=recipe.test_users)
    base = train_base(world, recipe, seed, report)
    rows, probabilities = _compare(recipe, seed, world, base, report)
    shown = shown_responses(world.test, {method: probabilities[method] for method in SHOWN_METHODS})
    return SeedRun(seed, base.reading_steps, base.reading_accuracy), rows, shown


def _compare(
    recipe: Recipe, seed: int, world: World, base: Base, progress: Progress
) -> tuple[list[DemoRow], dict[str, TokenProbabilities]]:
    """Phase C: every contestant evaluated at every checkpoint, and the tokens' probabilities at the last."""
    test = TestSet(world)
    contestants = make_contestants(base.model, recipe.learning_rate)
    metrics, _ = test.evaluate(base.model)
    rows = [DemoRow.of(metrics, seed=seed, method=BASE, learning_rate=None, step=0)]
    probabilities: dict[str, TokenProbabilities] = {}
    for step in phase_c_steps(contestants, world, world.new_items, recipe):
        progress("C: six losses", step, recipe.long_steps)
        if step not in recipe.checkpoints:
            continue
        sft_seconds = next(each.seconds for each in contestants if each.name == SFT)
        for each in contestants:
            metrics, probabilities[each.name] = test.evaluate(each.model)
            timing = Timing.of(each.seconds, sft_seconds)
            rate = each.learning_rate
            row = DemoRow.of(metrics, seed=seed, method=each.name, learning_rate=rate, step=step, timing=timing)
            rows.append(row)
    return rows, probabilities


def _make_folder(output_dir: str | Path) -> Path:
    """Made before any work is done, so that a folder that cannot be made costs no run."""
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output_dir: expected a folder, {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(result: DemoResult, table: RowTable, shown: tuple[ShownResponse, ...]) -> None:
    """Render everything first, then write, so that a failure leaves the files of an earlier run together."""
    picture = demo_picture(table, result.recipe)
    contents: dict[str, bytes | str] = {
        "demo.png": picture.png,
        "demo.html": render_page(demo_page(result, table, picture, shown)),
        "results.json": result.to_json(),
        "results.csv": result.to_csv(),
    }
    for name in FILES:
        write_whole(result.paths[name], contents[name])


def _print(result: DemoResult, table: RowTable, console: Console | None) -> None:
    from rich.console import Console
    from rich.text import Text

    from nextquill.report.terminal import results_table

    out = console or Console()
    for each in results_tables(table, result.recipe):
        out.print(results_table(each), "")
    out.print(Text(TABLE_NOTE, style="dim"))
    for finding in result.findings:
        out.print(Text.assemble("\n", (finding.heading, "bold"), "\n", finding.text))
    out.print(Text(f"\n{result.timing} The run took {result.seconds:.0f} s."))
    out.print(Text("\nWritten: " + ", ".join(str(path) for path in result.paths.values())), soft_wrap=True)
