"""`nextquill compare`: trains several losses from the same start on the same data, and reports how they differ."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from nextquill.cli.compare_options import (
    EVALUATION_SEED,
    CompareEvaluation,
    CompareFiles,
    CompareOptions,
    check_seeds,
    check_training,
)
from nextquill.cli.evaluation_tables import show, warn_of_few
from nextquill.cli.load_and_score import read_records
from nextquill.cli.main import INTERRUPTED, OK
from nextquill.cli.options import BatchOptions, LoraOptions, PromptOptions, TrainModelOptions
from nextquill.cli.parsing import parse, refusals
from nextquill.cli.run_folder import check_inputs_stay
from nextquill.cli.terminal import bar, duration, say
from nextquill.cli.train import DEFAULTS, datasets, load, quieten
from nextquill.cli.training_checks import check_optimizer
from nextquill.comparison.arms import choose_arms
from nextquill.comparison.claiming import check_shared, next_run
from nextquill.comparison.folder import RunRecord, check_settings, opened
from nextquill.comparison.running import (
    PlannedRun,
    Setup,
    check_all_alike,
    check_trainable,
    finished,
    perform,
    planned_runs,
    recorded,
    remaining_seconds,
)  # fmt: skip
from nextquill.evaluation.evaluate import TaskTexts, evaluate_model
from nextquill.evaluation.identity import model_digest, records_digest
from nextquill.models.loading import PromptSettings
from nextquill.models.tiny_models import is_new
from nextquill.ranks import launch
from nextquill.report.comparison.findings import find
from nextquill.report.comparison.page import MARKDOWN_FILE, PAGE_FILE, RESULT_FILE, write_report
from nextquill.report.comparison.tables import notes, tables
from nextquill.report.numbers import counted
from nextquill.report.terminal import results_table
from nextquill.storage.checkpoints import trained_users

DESCRIPTION = (
    "Train several losses from the same start on the same records in the same order, evaluate each, and report paired "
    "differences. A loss may win merely by larger steps or more time, so SFT at twice the learning rate and SFT for as "
    "long as a causal loss took are arms too. Every field of transformers' TrainingArguments is a flag too. The same "
    "command resumes a stopped comparison; arms and seeds may be added."
)
# Fields of TrainingArguments that do not change what is learnt, or that differ between runs.
_NO_SETTINGS = (
    "output_dir", "run_name", "seed", "data_seed", "disable_tqdm", "report_to", "debug", "project", "trackio",
    "log", "save", "hub", "push", "dataloader",
)  # fmt: skip
_brief_bar = partial(bar, leave=False)
#: Seconds between two looks for a run that other processes leave.
_POLL_SECONDS = 0.2


OPTIONS = (
    TrainModelOptions, CompareFiles, CompareOptions, CompareEvaluation, PromptOptions, BatchOptions, LoraOptions,
    TrainingArguments,
)  # fmt: skip
FLAGS = {"names": "arms", "folder": "output_dir", "records": "eval_file"}


def run(arguments: Sequence[str]) -> int:
    """Run the command; its exit code."""
    defaults = {**DEFAULTS, "seed": None}
    parsed = parse("compare", DESCRIPTION, OPTIONS, arguments, defaults=defaults, required=["output_dir"])
    model_options, files, options, evaluation, prompts, batches, lora, args = parsed
    from nextquill.cli.progress import shown

    arms = choose_arms(options.arms, options.baseline, options.time_reference)
    check_seeds(options.seeds)
    loss_options = options.loss_options()
    lora.check(model_options.model)
    lora.set_learning_rate(args)
    batches.check()
    check_training(args)
    measured = evaluation.options(batches, args.per_device_eval_batch_size)
    records = {"train": read_records("train_file", files.train_file)}
    records["eval"] = read_records("eval_file", files.eval_file)[: evaluation.eval_limit]
    TaskTexts.of(records["eval"], measured)  # refuses records without what the task scores
    quieten(args)

    def loaded(seed: int) -> tuple[Any, Any, PromptSettings]:
        set_seed(seed)  # new adapters are drawn from it
        return load(model_options, prompts, records["train"], seed)

    def start(seed: int) -> tuple[Any, Any]:
        model, tokenizer, _ = loaded(seed)
        return lora.apply(model, model_options.revision), tokenizer

    model, tokenizer, settings = loaded(options.seeds[0])
    new = is_new(model_options.model)
    weights = None if new else model_digest(model)
    model = lora.apply(model, model_options.revision)
    lora.set_learning_rate(args, model)
    check_optimizer(args, model)
    folder, own = Path(args.output_dir), launch()
    shared = {
        "model_name_or_path": model_options.model,
        "model": weights,
        "dtype": model_options.dtype,
        "train_file": records_digest(records["train"]),
        "eval_file": records_digest(records["eval"]),
        "time_reference": options.time_reference,
        "save_models": options.save_models,
        "prompt": dataclasses.asdict(settings),
        "loss": loss_options,
        "batches": dataclasses.asdict(batches),
        "lora": dataclasses.asdict(lora),
        "evaluation": {k: v for k, v in measured.identity().items() if k not in ("level", "resamples")},
        **{k: v for k, v in args.to_dict().items() if not k.startswith(_NO_SETTINGS)},
    }
    if own.rank == 0:
        check_settings(folder, shared, overwrite=files.overwrite)
        if files.overwrite:
            check_inputs_stay(folder, (files.train_file, files.eval_file, model_options.model))
    data = datasets(tokenizer, settings, records, args, EVALUATION_SEED)
    if args.eval_strategy == "no" and not args.eval_on_start:
        data["eval_dataset"] = None  # encoded only to find a record that does not fit before the training
    setup = Setup(
        folder=folder,
        arms=arms,
        seeds=options.seeds,
        start=start,
        shares_start=not new,
        args=args,
        settings=settings,
        evaluate=lambda model, tokenizer, settings, folder, name: evaluate_model(
            model,
            tokenizer,
            records["eval"],
            settings,
            measured,
            folder,
            model_name=name,
            trained_users=trained_users(folder.parent),
            progress=_brief_bar,
        ),
        attend=shown,
        loss_options=loss_options,
        trainer_options=dataclasses.asdict(batches),
        time_reference=options.time_reference,
        save_models=options.save_models,
        processes=own.size,
        **data,
    )
    with refusals():
        check_trainable(setup, model, tokenizer)
    del model
    with opened(folder, shared, overwrite=files.overwrite) if own.rank == 0 else nullcontext():
        if own.rank == 0:
            check_finished(setup)
        own.begin(shared)
        if own.rank > 0:
            check_shared(setup)
        if not run_all(setup):
            return INTERRUPTED
        if own.rank > 0:
            return OK
        check_all_alike(setup)
        comparison = write_report(
            setup,
            model=model_options.model,
            baseline=options.baseline,
            level=evaluation.level,
            resamples=evaluation.resamples,
            examples=evaluation.report_examples,
        )
    texts = min(comparison.num_examples, measured.generate_limit or comparison.num_examples)
    show_comparison(comparison, folder, texts if evaluation.generate else 0)
    return OK


def check_finished(setup: Setup) -> None:
    """Refuse finished runs that are damaged or something else; say how many need not be repeated."""
    runs = planned_runs(setup)
    left = [each for each in runs if finished(setup, each) is None]
    if len(left) < len(runs):
        say(f"{len(runs) - len(left)} of {len(runs)} runs are finished in {setup.folder}")
    if 0 < len(left) < setup.processes:
        say(f"{setup.processes} processes for {counted(len(left), 'run')}; the others wait")


def run_all(setup: Setup) -> bool:
    """Make the runs that no other process makes, until all are finished; return False if one was stopped."""
    runs, is_waiting = planned_runs(setup), False
    while left := [each for each in runs if recorded(setup, each) is None]:
        with next_run(setup, left) as planned:
            if planned is None:
                if not is_waiting and launch().rank == 0:
                    say(f"waiting for {', '.join(map(title, left))}")
                is_waiting = True
                time.sleep(_POLL_SECONDS)
                continue
            is_waiting = False
            if not run_one(setup, planned, left):
                return False
    return True


def run_one(setup: Setup, planned: PlannedRun, left: Sequence[PlannedRun]) -> bool:
    """Make one of the runs that are left, and say so; return False if it was stopped."""
    runs = planned_runs(setup)
    done = [record for each in runs if (record := recorded(setup, each)) is not None]
    seconds = remaining_seconds(done, left)
    rest = "" if seconds is None else f" (about {duration(seconds / setup.processes)} left)"
    place = f"run {runs.index(planned) + 1} of {len(runs)}"
    say(f"{place}: {title(planned)}{rest}")
    record = perform(setup, planned)
    if record is None:
        if launch().rank == 0:
            say("stopped; the same command resumes")
        return False
    say(f"{' ' if setup.processes == 1 else f'{place} is finished:'} {outcome(record)}")
    return True


def title(planned: PlannedRun) -> str:
    """The name and the seed of a run."""
    return f"{'the model before training' if planned.arm is None else planned.arm.label}, seed {planned.seed}"


def outcome(record: RunRecord) -> str:
    """The steps and the time of a run."""
    took = f"{counted(record.steps, 'step')} in {duration(record.seconds)}, "
    steps = "" if record.order is None and not record.steps else took
    return f"{steps}{duration(record.wall_seconds)} in total"


def show_comparison(comparison: Any, folder: Path, texts: int) -> None:
    """Print the tables, their notes, the findings, and the names of the files; each run has `texts` texts."""
    for table in tables(comparison):
        show(results_table(table))
        show("")
    for note in notes(comparison):
        show(note)
    if texts:
        show(f"Texts were generated for {texts} records by every run.")
    warn_of_few(comparison.num_users)
    show("")
    for finding in find(comparison):
        show(f"- {finding.heading}")
    names = (RESULT_FILE, MARKDOWN_FILE, PAGE_FILE)
    say(f"wrote {', '.join(str(folder / name) for name in names)}")
