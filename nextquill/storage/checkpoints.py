"""Checkpoints that exist completely or not at all, and the identity of the run they belong to.

A checkpoint is written into `<output_dir>/.incomplete/` and renamed when it is complete. A process that is killed while
it saves leaves nothing that a resume would pick up. `nextquill_run.json` in every checkpoint names its model and loss,
and holds digests of the users it was trained on. The same file beside the checkpoints marks the folder as a run's. A
manifest in every checkpoint says whether its files are still as they were written.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextquill.errors import CheckpointError, RecordError
from nextquill.storage.atomic_files import move_into_place
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object
from nextquill.storage.manifests import damage, has_manifest

#: Errors of a system that has no room: on the device, in a file, or for this user.
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
#: What torch says in that case. Python and safetensors repeat the system's words.
_TORCH_CANNOT_WRITE = re.compile(r"file write failed|unexpected pos \d+ vs \d+")
STAGING = ".incomplete"
RUN_FILE = "nextquill_run.json"
#: The field of that file with the digests of the users in the training data.
TRAINED_USERS = "trained_users"
#: The trainer's log in a checkpoint, and in the folder of a finished run.
STATE_FILE, METRICS_FILE = "trainer_state.json", "metrics.json"
#: Fields of the first that are only shown.
SHOWN_STATE = ("log_history", "stateful_callbacks")


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are renamed into `folder` when the block ends without an exception.

    CheckpointError if the disk is full.
    """
    staging = folder / STAGING / "files"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        with full_disk_named(folder):
            yield staging
            for path in sorted(staging.iterdir()):
                if path.is_dir():
                    move_into_place(path, folder / path.name)
                else:
                    os.replace(path, folder / path.name)
    finally:
        remove_staging(folder)


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Raise CheckpointError where the block cannot write below `folder`; libraries have an error each for that."""
    try:
        yield
    except Exception as error:
        system = next((text for text in map(os.strerror, _FULL) if text in str(error)), None)
        if system is None and not _TORCH_CANNOT_WRITE.search(str(error)):
            raise
        last = last_checkpoint(folder)
        kept = "it holds no checkpoint yet" if last is None else f"{last.name} is whole, so resume when there is room"
        raise CheckpointError(f"{folder} cannot be written: {system or 'is the disk full?'}; {kept}") from error


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
    return next(reversed(found_checkpoints(folder)), None)


def found_checkpoints(folder: Path) -> list[Path]:
    """The folder's `checkpoint-N`, the largest N last."""
    found = folder.glob("checkpoint-*")
    return sorted((path for path in found if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def rotate(folder: Path, limit: int | None, newest: str, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but never the newest or the best."""
    if limit is None or limit <= 0:
        return
    found = sorted(found_checkpoints(folder), key=lambda path: (path.stat().st_mtime_ns, _step(path)))
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
    """Raise CheckpointError if another run wrote the checkpoint; the message names what differs, with both values.

    Fields that the checkpoint does not have, as those of earlier versions, are not compared.
    """
    path = checkpoint / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was not written by NextQuillTrainer (it has no {RUN_FILE}); "
            "load its model with from_pretrained and start a new training"
        )
    here = json.loads(as_json(identity))
    try:
        saved = json_object(path)
    except RecordError as error:
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a run's description: {error}") from error
    different = [key for key in here if key in saved and saved[key] != here[key]]
    if different:
        key = different[0]
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was written with another "
            f"{key if '--' in key else key.replace('_', ' ')}: there {saved[key]}, here {here[key]}"
        )


def as_json(identity: dict[str, Any]) -> str:
    """The text of a run's description."""
    return json.dumps(identity, indent=2, default=str) + "\n"


def check_resumable(checkpoint: Path) -> None:
    """Raise CheckpointError if a checkpoint lacks the optimizer's state, which would be reset without a warning."""
    for name in ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} has no {name}, as with save_only_model=True; start a new run "
                "from its model"
            )


def check_whole(checkpoint: Path) -> None:
    """Raise CheckpointError if a file is missing or differs; it names the newest whole checkpoint beside this one.

    A checkpoint of an earlier version has no manifest, and passes.
    """
    if not has_manifest(checkpoint) or (wrong := damage(checkpoint)) is None:
        return
    others = [path for path in reversed(found_checkpoints(checkpoint.parent)) if path.name != checkpoint.name]
    whole = next((path for path in others if has_manifest(path) and damage(path) is None), None)
    raise CheckpointError(
        f"resume_from_checkpoint: {checkpoint}: {wrong}; "
        + (f"{whole} is the newest checkpoint that is whole" if whole else "no other checkpoint there is whole")
    )
