"""Checks of a training run's output folder, and of the checkpoint it resumes from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nextquill.comparison.folder import empty_folder
from nextquill.errors import CheckpointError, OutputExistsError, UnsupportedModelError
from nextquill.models.loading import load_tokenizer
from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import temporary, write_whole
from nextquill.storage.input_files import real_path
from nextquill.storage.locks import LOCK_FILE, claim, held


def resume_point(folder: Path, given: str | None) -> Path | None:
    """The checkpoint folder to resume from, or None."""
    word = "false" if given is None else given.lower()
    if word in ("false", "no", "0", ""):
        return None
    return checkpoints.find_checkpoint(True if word in ("true", "yes", "1") else given, folder)


def check_output_dir(folder: Path, resume: Path | None, *, overwrite: bool, inputs: Iterable[str | None]) -> None:
    """Make sure that a run may use `folder`; nothing is changed yet.

    Args:
        folder: where the run writes.
        resume: the checkpoint it resumes from, which may be in this folder.
        overwrite: replace an earlier run there.
        inputs: files and folders the run reads, which must not be replaced.
    """
    place = next(path for path in (folder, *real_path(folder).parents) if path.exists())
    if not place.is_dir():
        raise OutputExistsError(f"output_dir: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputExistsError(f"output_dir: {place} is not writable")
    if (folder / LOCK_FILE).exists():
        with held(folder / LOCK_FILE, folder, "output_dir"):
            pass  # no process is writing there; the lock was left by a killed one
    unfinished = {LOCK_FILE, temporary(folder / checkpoints.RUN_FILE).name}  # of a run that was killed at its start
    if not folder.exists() or all(path.name in unfinished for path in folder.iterdir()):
        return
    if resume is not None and real_path(resume).parent == real_path(folder):
        return
    if not (folder / checkpoints.RUN_FILE).is_file():
        raise OutputExistsError(f"output_dir: {folder} holds files, but not a nextquill run; choose another folder")
    if not overwrite:
        raise OutputExistsError(
            f"output_dir: {folder} holds another run; resume it with --resume_from_checkpoint true, replace it with "
            "--overwrite, or choose another folder"
        )
    check_inputs_stay(folder, [*inputs, None if resume is None else str(resume)])


def check_inputs_stay(folder: Path, inputs: Iterable[str | None]) -> None:
    """Raise OutputExistsError where replacing what `folder` holds would delete an input."""
    for path in inputs:
        if path is not None and Path(path).exists() and real_path(folder) in (p := real_path(path), *p.parents):
            raise OutputExistsError(f"overwrite: {folder} holds {path}, which this run reads")


def open_output_dir(folder: Path, resume: Path | None) -> None:
    """Make `folder`, keep other processes from it, and empty it unless its own run is resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / LOCK_FILE, folder, "output_dir")
    if resume is None or real_path(resume).parent != real_path(folder):
        empty_folder(folder, keep=checkpoints.RUN_FILE)  # which marks it as a run's, whenever this process is killed
        write_whole(folder / checkpoints.RUN_FILE, "{}\n")


def check_tokenizer(resume: Path, tokenizer: Any) -> None:
    """Raise CheckpointError where a checkpoint was trained with another vocabulary.

    The vocabulary of a new model is built from the training text: with another text, the same embedding would stand for
    another token.
    """
    try:
        trained = load_tokenizer(str(resume))
    except UnsupportedModelError as error:
        raise CheckpointError(f"resume_from_checkpoint: {resume} is not a complete checkpoint: {error}") from error
    if trained.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"resume_from_checkpoint: {resume} was trained with another vocabulary than this model has; a new 'tiny' "
            "or 'small' model builds its vocabulary from --train_file"
        )
