"""Checkpoints that exist completely or not at all, and the identity of a run.

A checkpoint is written into `<output_dir>/.incomplete/` and renamed to its place when everything is in it; a process
killed while saving leaves nothing that a resume would pick up. `nextquill_run.json` beside the checkpoints says which
model and loss they belong to.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nextquill.errors import CheckpointError

STAGING = ".incomplete"
RUN_FILE = "nextquill_run.json"


def write_text(path: Path, text: str) -> None:
    """Write a file through a temporary name in the same folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def move_into_place(source: Path, target: Path) -> None:
    """Rename a finished folder to `target`, replacing an older folder of that name."""
    if target.exists():
        retired = source.with_name(f"{target.name}.old")
        shutil.rmtree(retired, ignore_errors=True)
        os.replace(target, retired)
        os.replace(source, target)
        shutil.rmtree(retired)
    else:
        os.replace(source, target)


@contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder whose files are renamed into `folder` when the block ends without an exception."""
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
    """Delete what an interrupted save left."""
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def run_identity(model: Any, loss: Any) -> dict[str, Any]:
    """What must agree between a run and a checkpoint it resumes from: the model's shape and the loss."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    return {
        "model": {name: getattr(config, name, None) for name in names},
        "adapters": sorted(getattr(model, "peft_config", {})),
        "loss": repr(loss),
    }


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Raise CheckpointError where `folder`'s checkpoints were written by another model or loss."""
    path = folder / RUN_FILE
    if not path.is_file():
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: not a run description: {error}") from error
    different = [key for key in identity if saved.get(key) != identity[key]]
    if different:
        key = different[0]
        raise CheckpointError(
            f"resume_from_checkpoint: {folder} was written by another {key}: there {saved.get(key)}, here {identity[key]}"
        )
