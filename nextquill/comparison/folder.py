"""A comparison's folder, and which of its runs are finished.

nextquill_comparison.json    the settings of all runs; a comparison with other settings is refused
<arm>/seed-<k>/              a run's folder: checkpoints while it trains, then metrics.json, and the model if asked for
<arm>/seed-<k>/evaluation/   its evaluation
<arm>/seed-<k>/run.json      a `RunRecord`, written last: the run is finished
comparison.json, comparison.md, report.html
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nextquill.errors import CheckpointError, OutputExistsError
from nextquill.evaluation.results import EVALUATION_FILE, EVALUATION_FOLDER
from nextquill.storage.atomic_files import temporary, write_whole
from nextquill.storage.json_files import first_difference, read_json
from nextquill.storage.locks import LOCK_FILE, held

SETTINGS_FILE = "nextquill_comparison.json"
RECORD_FILE = "run.json"
_RUN_LOCK = ".lock"


@dataclass(frozen=True)
class RunRecord:
    """A finished run and its costs.

    Args:
        arm, seed: the run's arm and seed.
        start: digest of the weights it started from.
        order: digest of the examples of its steps, in their order; None if nothing was trained. For an arm that matches
            another's time it covers as many steps as the arm of its own pace has.
        loss: the loss with its arguments.
        learning_rate: the highest learning rate.
        steps, examples: optimiser steps, and examples in them.
        seconds: seconds of training, without evaluations and checkpoints; see `RunMeter`.
        wall_seconds: seconds of training and evaluation in this process, for estimates of the time left.
        peak_memory: bytes, or None if the system does not say.
        sessions: the number of processes it took; 1 unless it was interrupted.
        machine: the machine that the times depend on.
        processes: the most processes that made runs of the comparison while this one was made.
        matched: for an arm that matches another's time: `reference`, its `seconds`, and the `ratio` of steps.
    """

    arm: str
    seed: int
    start: str
    order: str | None = None
    loss: str | None = None
    learning_rate: float | None = None
    steps: int = 0
    examples: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0
    peak_memory: int | None = None
    sessions: int = 1
    machine: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    matched: Mapping[str, Any] | None = None


def run_folder(folder: Path, arm: str, seed: int) -> Path:
    """The folder of one run of the comparison in `folder`."""
    return folder / arm / f"seed-{seed}"


def held_run(folder: Path, arm: str, seed: int) -> AbstractContextManager[Any]:
    """Hold one run of the comparison in `folder` for a block; OutputExistsError if another process does."""
    run = run_folder(folder, arm, seed)
    run.parent.mkdir(parents=True, exist_ok=True)
    return held(run.with_name(f".{run.name}{_RUN_LOCK}"), run, "folder")  # the run's own files lock its folder


def read_record(folder: Path) -> RunRecord | None:
    """The record in a run's folder, None if the run is not finished; CheckpointError if the file is damaged."""
    path = folder / RECORD_FILE
    if not path.is_file() or not (folder / EVALUATION_FOLDER / EVALUATION_FILE).is_file():
        return None
    try:
        return RunRecord(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a run's record: {error}; delete the folder to repeat the run") from error


def write_record(folder: Path, record: RunRecord) -> None:
    """Write the record that marks a run as finished."""
    write_whole(folder / RECORD_FILE, json.dumps(dataclasses.asdict(record), indent=2) + "\n")


def check_settings(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Check, before anything is changed, that a comparison with these settings (JSON, by flag) may use a folder.

    OutputExistsError unless it is new, empty, or of a comparison with the same settings. `overwrite` allows others.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"folder: {folder} is a file")
    path = folder / SETTINGS_FILE
    unfinished = {LOCK_FILE, temporary(path).name}  # of a comparison that was killed at its start
    if not folder.is_dir() or all(each.name in unfinished for each in folder.iterdir()):
        return
    if not path.is_file():
        raise OutputExistsError(f"folder: {folder} holds files, but not a comparison; choose another folder")
    if overwrite:
        return
    try:
        saved: dict[str, Any] = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise OutputExistsError(f"folder: {path} is damaged: {error}; choose another folder") from error
    difference = first_difference(saved, json.loads(json.dumps(dict(settings))))
    if difference is not None:
        raise OutputExistsError(
            f"folder: {folder} holds a comparison with another {difference}; choose another folder, or replace it with "
            "overwrite=True"
        )


@contextmanager
def opened(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Claim `folder` for this comparison, and keep other processes out of it while the block runs.

    OutputExistsError if another process is comparing in it, or is making one of its runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK_FILE, folder, "folder"):
        for lock in folder.glob(f"*/.seed-*{_RUN_LOCK}"):  # perhaps of a process whose launcher was killed
            with held(lock, lock.parent, "folder"):
                pass
        if overwrite:
            empty_folder(folder, keep=SETTINGS_FILE)
        write_whole(folder / SETTINGS_FILE, json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n")
        yield


def empty_folder(folder: Path, keep: str | None = None) -> None:
    """Delete the contents of a folder but its lock; the folder itself stays, as it may be a mount or a link."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name in (LOCK_FILE, keep):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
