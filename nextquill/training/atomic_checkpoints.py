"""Checkpoints of a Trainer that exist completely or not at all, and a resume that checks whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import move_into_place, write_whole

if TYPE_CHECKING:
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object


class StagedCheckpoints(_Base):
    """Before a Trainer among the bases of a class, which says in `run_identity` what a resumed run must agree in."""

    _identity: dict[str, Any] | None = None
    _is_staging = False

    def run_identity(self) -> dict[str, Any]:
        """What must agree between this run and a checkpoint it resumes from; JSON."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, or of another run.
        """
        folder = Path(str(self.args.output_dir))
        checkpoint = checkpoints.find_checkpoint(resume_from_checkpoint, folder)
        if self._identity is None:  # once: the engine may shard the parameters afterwards
            self._identity = self.run_identity()
        if checkpoint is not None and self.is_world_process_zero():
            checkpoints.check_identity(checkpoint, self._identity)
        if self.args.should_save:
            checkpoints.remove_staging(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._write_identity(folder)
        return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's, but written under another name and renamed when every rank's part is in it."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staged = folder / checkpoints.STAGING / name
        self._is_staging = True
        try:
            super()._save_checkpoint(model, trial)
            best = f"checkpoint-{self.state.best_global_step}"
            if best == name or (folder / best).is_dir():
                self.state.best_model_checkpoint = str(folder / best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                self._write_identity(staged)
                move_into_place(staged, folder / name)
        finally:
            self._is_staging = False
            if self.args.should_save:
                checkpoints.remove_staging(folder)
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, name, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_staging:  # the upload goes on in the background and needs a folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _write_identity(self, folder: Path) -> None:
        write_whole(folder / checkpoints.RUN_FILE, json.dumps(self._identity, indent=2) + "\n")
