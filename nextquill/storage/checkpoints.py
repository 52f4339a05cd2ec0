"""Checkpoints that exist completely or not at all, and the identity of the run they belong to.

A checkpoint is written into `<output_dir>/.incomplete/` and renamed when it is complete. A process that is killed while
it saves leaves nothing that a resume would pick up. `nextquill_run.json` in every checkpoint names its model and loss,
and holds digests of the users it was trained on. The same file beside the checkpoints marks the folder as a run's.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextquill.errors import CheckpointError
from nextquill.storage.atomic_files import move_into_place
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object, read_json

STAGING = ".incomplete"
RUN_FILE = "nextquill_run.json"
#: The field of that file with the digests of the users in the training data.
TRAINED_USERS = "trained_users"
#: The trainer's log in a checkpoint, and in the folder of a finished run.
STATE_FILE, METRICS_FILE = "trainer_state.json", "metrics.json"


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are renamed into `folder` when the block ends without an exception."""
    staging = folder / STAGING / "files"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            if path.is_dir():
                move_into_place(path, folder / path.name)
            else:
                os.replace(path, folder / path.name)
    finally:
        remove_staging(folder)


def remove_staging(folder: Path) -> None:
    """Delete the files that an interrupted save left."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def find_checkpoint(given: str | os.PathLike[str] | bool | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: the named one, the last in `folder` for True, or None to start from the beginning.

    CheckpointError if it is missing or incomplete.
    """
    if given is None or given is False:
        return None
    path = last_checkpoint(folder) if given is True else Path(given)
    if path is None:
        raise CheckpointError(f"resume_from_checkpoint: expected a checkpoint in {folder}, found none")
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a complete checkpoint: it has no {STATE_FILE}")
    return path


def last_checkpoint(folder: Path) -> Path | None:
    """The folder's `checkpoint-N` with the largest N."""
    return max(_checkpoints(folder), key=_step, default=None)


def _checkpoints(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()
    ]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def rotate(folder: Path, limit: int | None, newest: str, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but never the newest or the best."""
    if limit is None or limit <= 0:
        return
    found = sorted(_checkpoints(folder), key=lambda path: (path.stat().st_mtime_ns, _step(path)))
    protected = {newest} if best is None else {newest, Path(best).name}
    spare = [path for path in found if path.name not in protected]
    for path in spare[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


def user_digest(user_id: str) -> str:
    """A user in the list of those that a run was trained on."""
    return fingerprint([user_id])


def trained_users(folder: str | os.PathLike[str]) -> frozenset[str] | None:
    """The digests of all users in the training data of a run, by its folder or a checkpoint; None if not known."""
    path = Path(folder) / RUN_FILE
    users = json_object(path).get(TRAINED_USERS) if path.is_file() else None
    return None if users is None else frozenset(users)


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise CheckpointError if another model or loss wrote the checkpoint."""
    path = checkpoint / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was not written by NextQuillTrainer (it has no {RUN_FILE}); "
            "load its model with from_pretrained and start a new training"
        )
    try:
        saved = read_json(path)
        different = [key for key in identity if saved.get(key) != identity[key]]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a run's description: {error}") from error
    if different:
        key = different[0]
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was written with another {key.replace('_', ' ')}: "
            f"there {saved.get(key)}, here {identity[key]}"
        )
