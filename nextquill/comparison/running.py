"""Runs one arm from one seed: trains, evaluates, and keeps the results.

A finished run says so in its folder and is left alone. A stopped run resumes from its last checkpoint; if it was
trained but not yet evaluated, that is its final checkpoint. A run without a checkpoint starts again.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from nextquill.comparison.arms import BASE, Arm, in_running_order, own_pace
from nextquill.comparison.folder import RunRecord, empty_folder, read_record, run_folder, write_record
from nextquill.data import EncodedDataset
from nextquill.errors import CheckpointError
from nextquill.evaluation.identity import model_digest
from nextquill.evaluation.results import EVALUATION_FILE, EVALUATION_FOLDER, Evaluation, changed_file
from nextquill.models.loading import PROMPT_FILE, PromptSettings
from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import write_whole

if TYPE_CHECKING:
    from nextquill.comparison.measuring import ComparedTrainer


#: What all runs of a seed have in common, and what is wrong where one differs.
_ALIKE = {"start": "started from other weights", "order": "saw other examples, or in another order,"}


@dataclass(frozen=True)
class Setup:
    """The settings that all runs of a comparison share.

    Args:
        folder: the comparison's folder.
        arms, seeds: every arm is run from every seed.
        start: seed → the model and its tokenizer; the same weights for the same seed.
        shares_start: whether all seeds start from one model, apart from new adapters, so that one base stands for all.
        args: TrainingArguments; output folder, seed, learning rate and, to match times, steps are set for each run.
        train_dataset, eval_dataset: encoded; the second for evaluations while training, or None.
        settings: how prompts are made.
        evaluate: model, tokenizer, settings, folder, name → its `Evaluation`, which is written into the folder.
        attend: trainer → a context in which it trains; its value's `requested` says whether to stop there.
        loss_options: options of every loss, such as `reduction`.
        trainer_options: options of `NextQuillTrainer`, such as `max_tokens`.
        time_reference: the arm whose time an arm with `matches_time` gets.
        save_models: keep the trained models.
        processes: the number of processes that make the runs, each some of them.
    """

    folder: Path
    arms: Sequence[Arm]
    seeds: Sequence[int]
    start: Callable[[int], tuple[Any, Any]]
    shares_start: bool
    args: TrainingArguments
    train_dataset: EncodedDataset
    settings: PromptSettings
    evaluate: Callable[[Any, Any, PromptSettings, Path, str], Evaluation]
    attend: Callable[[Any], AbstractContextManager[Any]]
    eval_dataset: EncodedDataset | None = None
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    trainer_options: Mapping[str, Any] = field(default_factory=dict)
    time_reference: str = ""
    save_models: bool = False
    processes: int = 1


@dataclass(frozen=True)
class PlannedRun:
    """A run of a comparison, made or not; `arm` is None for the model before training."""

    arm: Arm | None
    seed: int

    @property
    def name(self) -> str:
        """The arm's name, or that of the base model."""
        return BASE if self.arm is None else self.arm.name


def planned_runs(setup: Setup) -> list[PlannedRun]:
    """All runs in their order: seed by seed, so that a stopped comparison has whole seeds."""
    found = []
    for seed in setup.seeds:
        if seed == setup.seeds[0] or not setup.shares_start:
            found.append(PlannedRun(None, seed))
        found += [PlannedRun(arm, seed) for arm in in_running_order(setup.arms)]
    return found


def recorded(setup: Setup, planned: PlannedRun) -> RunRecord | None:
    """The record of a finished run; None if it is not finished."""
    return read_record(run_folder(setup.folder, planned.name, planned.seed))


def finished(setup: Setup, planned: PlannedRun) -> RunRecord | None:
    """The record of a run that need not be repeated, without its checkpoints; None if it is not finished.

    CheckpointError if the folder holds another run, or a damaged one. No other process may be making the run.
    """
    folder, record = run_folder(setup.folder, planned.name, planned.seed), recorded(setup, planned)
    if record is None:
        return None
    expected: dict[str, Any] = {"arm": planned.name, "seed": planned.seed}
    if planned.arm is not None:
        expected["loss"] = repr(planned.arm.loss(**setup.loss_options))
        expected["learning_rate"] = setup.args.learning_rate * planned.arm.learning_rate_factor
    for name, value in expected.items():
        if getattr(record, name) != value:
            raise CheckpointError(
                f"folder: the run in {folder} has another {name.replace('_', ' ')}: there "
                f"{getattr(record, name)!r}, here {value!r}; choose another folder, or replace it with overwrite=True"
            )
    _check_evaluation(folder)
    _delete_checkpoints(folder)
    return record


def _check_evaluation(folder: Path) -> None:
    """Raise CheckpointError if a file of a run's evaluation is missing or was changed."""
    if (wrong := changed_file(folder / EVALUATION_FOLDER)) is not None:
        raise CheckpointError(
            f"folder: {folder / EVALUATION_FOLDER}: {wrong}; restore the file, or delete {folder} to repeat the run"
        )


def _delete_checkpoints(folder: Path) -> None:
    """Delete what a finished run never resumes from."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)


def remaining_seconds(done: Sequence[RunRecord], left: Sequence[PlannedRun]) -> float | None:
    """An estimate of the time left, from finished runs of the same arm or else of all; None before the first run."""
    known: dict[str, list[float]] = {}
    for record in done:
        known.setdefault(record.arm, []).append(record.wall_seconds)
    trained = [seconds for name, each in known.items() if name != BASE for seconds in each]
    if not trained:
        return None
    return sum(statistics.mean(known.get(planned.name, trained)) for planned in left)


def perform(setup: Setup, planned: PlannedRun) -> RunRecord | None:
    """Make a run, or resume it; None if it was asked to stop, after a checkpoint.

    CheckpointError if it started from other weights, or saw other examples, than the earlier runs of its seed.
    """
    from nextquill.comparison.measuring import machine

    began = time.perf_counter()
    _release_memory()  # the last run's
    folder = run_folder(setup.folder, planned.name, planned.seed)
    model, tokenizer = setup.start(planned.seed)
    record = RunRecord(planned.name, planned.seed, model_digest(model), machine=machine(), processes=setup.processes)
    _check_alike(setup, record)
    if planned.arm is None:
        folder.mkdir(parents=True, exist_ok=True)
        model.to(setup.args.device)
    else:
        trained = _train(setup, planned.arm, planned.seed, folder, model, tokenizer, record)
        if trained is None:
            return None
        record = trained
        _check_alike(setup, record)
    _release_memory()  # the optimiser's
    place = folder / EVALUATION_FOLDER
    if (place / EVALUATION_FILE).is_file():  # the run was stopped between its last two files
        _check_evaluation(folder)
    else:
        setup.evaluate(model, tokenizer, setup.settings, place, f"{planned.name}/seed-{planned.seed}")
    for path in place.glob("*.partial"):  # left by a process that was killed just after the evaluation's last file
        path.unlink()
    record = dataclasses.replace(record, wall_seconds=time.perf_counter() - began)
    write_record(folder, record)
    _delete_checkpoints(folder)
    return record


def run_arguments(setup: Setup, arm: Arm, seed: int, folder: Path, matched: Mapping[str, Any] | None) -> Any:
    """The TrainingArguments of a run: those of the comparison, with the run's own folder, seed, rate and steps."""
    args = copy.deepcopy(setup.args)
    args.output_dir = str(folder)
    args.run_name = f"{arm.name}-seed-{seed}"
    args.seed = seed
    args.learning_rate = setup.args.learning_rate * arm.learning_rate_factor
    if matched is not None:
        args.max_steps = matched["steps"]
        if args.warmup_steps >= 1:  # below 1 it is a share of the steps
            args.warmup_steps = math.ceil(args.warmup_steps * matched["ratio"])
    return args


def can_begin(setup: Setup, planned: PlannedRun) -> bool:
    """Whether all runs whose times decide this one's number of steps are finished."""
    arm = planned.arm
    return arm is None or not arm.matches_time or None not in _timed(setup, arm, planned.seed)


def _timed(setup: Setup, arm: Arm, seed: int) -> list[RunRecord | None]:
    """The records of the runs whose time and pace decide the number of steps of an arm that matches a time."""
    return [read_record(run_folder(setup.folder, name, seed)) for name in (setup.time_reference, own_pace(arm).name)]


def match_time(setup: Setup, arm: Arm, seed: int) -> dict[str, Any]:
    """The number of steps that takes an arm as long as the reference took.

        ratio = seconds of the reference / seconds of the arm at its own pace

    The result has `reference`, its `seconds`, the `ratio`, `steps` = ceil(ratio · steps), over which the schedule is
    stretched, and `order_after`, the steps at the arm's own pace. CheckpointError if one of these runs is not finished.
    """
    reference, pace = _timed(setup, arm, seed)
    if reference is None or pace is None:
        names = f"{setup.time_reference} and {own_pace(arm).name}"
        raise CheckpointError(f"{arm.name}: expected the runs of {names} with seed {seed}")
    ratio = reference.seconds / pace.seconds
    return {
        "reference": reference.arm,
        "seconds": reference.seconds,
        "ratio": ratio,
        "steps": max(1, math.ceil(ratio * pace.steps)),
        "order_after": pace.steps,
    }


def check_trainable(setup: Setup, model: Any, tokenizer: Any) -> None:
    """Make the trainer of every arm once, so that a refusal by it or by transformers is known before the first run."""
    with tempfile.TemporaryDirectory() as folder:  # a trainer makes its output folder
        for arm in setup.arms:
            _trainer(setup, arm, setup.seeds[0], Path(folder), model, tokenizer, None)


def _trainer(
    setup: Setup, arm: Arm, seed: int, folder: Path, model: Any, tokenizer: Any, matched: Mapping[str, Any] | None
) -> ComparedTrainer:
    from nextquill.comparison.measuring import ComparedTrainer, RunMeter

    return ComparedTrainer(
        model,
        run_arguments(setup, arm, seed, folder, matched),
        train_dataset=setup.train_dataset,
        eval_dataset=setup.eval_dataset,
        processing_class=tokenizer,
        loss=arm.loss(**setup.loss_options),
        **vars(setup.settings),
        callbacks=[RunMeter(None if matched is None else matched["order_after"], processes=setup.processes)],
        **setup.trainer_options,
    )


def _train(
    setup: Setup, arm: Arm, seed: int, folder: Path, model: Any, tokenizer: Any, record: RunRecord
) -> RunRecord | None:
    last = checkpoints.last_checkpoint(folder)
    if last is None:
        empty_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    matched = match_time(setup, arm, seed) if arm.matches_time else None
    trainer = _trainer(setup, arm, seed, folder, model, tokenizer, matched)
    write_whole(folder / PROMPT_FILE, setup.settings.with_chat(trainer.encoder.renderer.uses_chat).to_json())
    with setup.attend(trainer) as attention:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if attention.requested:
            return None
    _keep(trainer, folder, save_model=setup.save_models)
    meter, steps = trainer.run_meter, trainer.state.global_step
    return dataclasses.replace(
        record,
        order=meter.order if matched is None or steps >= matched["order_after"] else None,
        loss=repr(arm.loss(**setup.loss_options)),
        learning_rate=trainer.args.learning_rate,
        steps=steps,
        matched=matched,
        **{name: getattr(meter, name) for name in ("examples", "seconds", "peak_memory", "sessions", "processes")},
    )


def _keep(trainer: ComparedTrainer, folder: Path, *, save_model: bool) -> None:
    """Write the files of a trained run, each complete or absent."""
    last = next((log for log in reversed(trainer.state.log_history) if "eval_loss" in log), {})
    evaluated = {name: value for name, value in last.items() if name.startswith("eval_")}
    log = {"log_history": trainer.state.log_history, "eval": evaluated}
    with checkpoints.staged_files(folder) as staging:
        if save_model:
            trainer.save_model(str(staging))
        (staging / checkpoints.METRICS_FILE).write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")


def check_all_alike(setup: Setup) -> None:
    """Raise CheckpointError if finished runs of one seed had different starts or examples.

    Processes that finish two runs at once see neither beside the other.
    """
    for planned in planned_runs(setup):
        if (record := recorded(setup, planned)) is not None:
            _check_alike(setup, record)


def _check_alike(setup: Setup, record: RunRecord) -> None:
    """Raise CheckpointError if a run had another start, or other examples, than the finished runs of its seed."""
    for planned in planned_runs(setup):
        other = recorded(setup, planned) if planned.seed == record.seed else None
        for name, what in _ALIKE.items() if other is not None else ():
            value, theirs = getattr(record, name), getattr(other, name)
            if value is not None and theirs is not None and theirs != value:
                raise CheckpointError(
                    f"folder: {record.arm} with seed {record.seed} {what} than {planned.name} with seed "
                    f"{planned.seed}, which is finished in {setup.folder}; compare in another folder"
                )


def _release_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
