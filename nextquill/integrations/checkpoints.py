"""Checkpoints that exist completely or not at all, and the identity of a run.

A checkpoint is written into `<output_dir>/.incomplete/` and renamed to its place when everything is in it; a process
killed while saving leaves nothing that a resume would pick up. `nextquill_run.json` in every checkpoint says which
model and loss it belongs to; the same file beside them marks the folder as a run's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from nextquill.errors import CheckpointError

STAGING = ".incomplete"
RUN_FILE = "nextquill_run.json"

_CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SAMPLE = 16
#: What an adapter's weights mean depends on these.
_SCALING = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


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


def find_checkpoint(given: str | os.PathLike[str] | bool | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: the one named, or `folder`'s last for True; None to start anew.

    Raises:
        CheckpointError: it is not there, or not complete.
    """
    if given is None or given is False:
        return None
    if given is True:
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if last is None:
            raise CheckpointError(f"resume_from_checkpoint: expected a checkpoint in {folder}, found none")
        path = Path(last)
    else:
        path = Path(given)
    if not (path / "trainer_state.json").is_file():
        raise CheckpointError(f"resume_from_checkpoint: {path} is no complete checkpoint: no trainer_state.json in it")
    return path


def rotate(folder: Path, limit: int | None, newest: str, best: str | None) -> None:
    """Delete the oldest checkpoints until `limit` are left, but never the newest or the best."""
    if limit is None or limit <= 0:
        return
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: (path.stat().st_mtime_ns, int(path.name.partition("-")[2])))
    protected = {newest} if best is None else {newest, Path(best).name}
    spare = [path for path in found if path.name not in protected]
    for path in spare[: max(0, len(found) - max(limit, len(protected)))]:
        shutil.rmtree(path, ignore_errors=True)


# ---- identity --------------------------------------------------------------------------------------


def run_identity(model: Any, loss: Any) -> dict[str, Any]:
    """What must agree between a run and a checkpoint it resumes from, as JSON holds it.

    The model's shape, its adapters, a fingerprint of its frozen weights (which no checkpoint of an adapter holds) and
    the loss.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {
        "model": {name: getattr(config, name, None) for name in _CONFIG_FIELDS},
        "adapters": {name: _describe(adapter) for name, adapter in sorted(getattr(model, "peft_config", {}).items())},
        "frozen_weights": _fingerprint(model),
        # A function's address is another one in every process.
        "loss": re.sub(r" at 0x[0-9a-f]+", "", repr(loss)),
    }


def check_identity(checkpoint: Path, identity: dict[str, Any]) -> None:
    """Raise CheckpointError where a checkpoint was written by another model or loss."""
    path = checkpoint / RUN_FILE
    if not path.is_file():
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was not written by NextQuillTrainer (no {RUN_FILE} in it); "
            "its model can be loaded with from_pretrained and trained anew"
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in identity if saved.get(key) != identity[key]]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"resume_from_checkpoint: {path} is not a run's description: {error}") from error
    if different:
        key = different[0]
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} was written with another {key.replace('_', ' ')}: "
            f"there {saved.get(key)}, here {identity[key]}"
        )


def _describe(adapter: Any) -> str:
    targets = getattr(adapter, "target_modules", None)
    targets = sorted(targets) if isinstance(targets, (set, list, tuple)) else targets
    scaling = {name: value for name in _SCALING if (value := getattr(adapter, name, None))}
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    return f"{kind}, r={getattr(adapter, 'r', None)}, {scaling}, {targets}"


def _fingerprint(model: torch.nn.Module) -> str | None:
    """A hash over the first values of every frozen parameter; None where nothing is frozen."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad and not p.is_meta]
    if not frozen:
        return None
    digest = hashlib.sha256()
    for name, parameter in frozen:
        sample = parameter.detach().reshape(-1)[:_SAMPLE]
        sample = sample.float() if sample.is_floating_point() else sample
        digest.update(name.encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
