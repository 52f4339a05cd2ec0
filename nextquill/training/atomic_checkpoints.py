"""Checkpoints of a Trainer that are complete or absent. A resume checks that they belong to the same run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor

from nextquill.errors import CheckpointError
from nextquill.models.architectures import random_rate, random_rates
from nextquill.models.border import reading
from nextquill.models.configs import text_config
from nextquill.ranks import check_agreement
from nextquill.storage import checkpoints
from nextquill.storage.atomic_files import move_into_place, write_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.json_files import json_object
from nextquill.storage.locks import LOCK_FILE, held
from nextquill.storage.manifests import write_manifest
from nextquill.storage.sample_log import SampleLog
from nextquill.training.checks import check_saves_whole

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

_CONFIG_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
#: Fields of an adapter's config that change the effect of its weights.
_SCALING = ("lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
#: Training arguments that each process has for itself.
_OF_A_PROCESS = ("local_rank", "logging_dir", "run_name", "output_dir")
#: Training arguments that decide which weights a run ends with, besides its length. Another value is refused.
_ARGUMENTS = (
    "learning_rate", "weight_decay", "max_grad_norm", "optim", "optim_args", "optim_target_modules", "adam_beta1",
    "adam_beta2", "adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "bf16",
    "fp16", "neftune_noise_alpha", "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
#: The fields of a Trainer's log that a resume takes over, and their types.
_STATE = {
    "global_step": int,
    "train_batch_size": int,
    "epoch": int | float,
    "total_flos": int | float,
    "num_input_tokens_seen": int,
    "log_history": list,
    "stateful_callbacks": dict,
    "best_metric": int | float | None,
    "best_global_step": int | None,
    "best_model_checkpoint": str | None,
}
#: Values of each frozen parameter that enter the fingerprint.
_SAMPLE = 16


class AtomicCheckpoints(_Base):
    """A mixin that writes a Trainer's checkpoints atomically; it precedes the Trainer among the bases of a class.

    The class defines `run_identity`, which a run and its checkpoints must share, and `_starting_point`.
    """

    _identity: dict[str, Any] | None = None
    _trained_users: list[str] | None = None
    _checked: Path | None = None
    _is_staging = False
    _sample_log: SampleLog | None = None  # of a trainer that samples texts; a resume cuts it to the checkpoint

    def run_identity(self) -> dict[str, Any]:
        """The values that a checkpoint must share with a run that resumes from it, as JSON holds them."""
        raise NotImplementedError

    def _starting_point(self) -> tuple[Iterable[str], Sequence[Any]]:
        """The ids of the users in the training data, and the models that the training starts from."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, damaged, or belongs to another run.
            OutputExistsError: another process is training in the output folder.
            ArgumentError: a setting of FSDP leaves no model to write.
        """
        check_saves_whole(self)
        folder = Path(str(self.args.output_dir))
        with ExitStack() as hold:
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                hold.enter_context(held(folder / LOCK_FILE, folder, "args.output_dir"))
            checkpoint = self._begun(resume_from_checkpoint, folder)
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _begun(self, resume_from_checkpoint: str | bool | None, folder: Path) -> Path | None:
        """Check the checkpoint to resume from, which is returned, and prepare the run's folder."""
        checkpoint = checkpoints.find_checkpoint(resume_from_checkpoint, folder)
        check_agreement(self._shared_settings())
        if checkpoint is not None:
            self.check_resume(checkpoint)
        if self.args.should_save:
            checkpoints.remove_staging(folder)
            if checkpoint is not None and checkpoint == checkpoints.last_checkpoint(folder):
                # A process may have been killed between a checkpoint and the deletion of older ones.
                best = json_object(checkpoint / checkpoints.STATE_FILE).get("best_model_checkpoint")
                checkpoints.rotate(folder, self.args.save_total_limit, checkpoint.name, best)
            self._trained_users = self._all_users(checkpoint)
            self._write_identity(folder)
        if self._sample_log is not None:
            self._sample_log.resume(checkpoint)
        self._checked = None  # the next call may find other files
        return checkpoint

    def _shared_settings(self) -> dict[str, Any]:
        """What all processes of a run share, as JSON holds it."""
        shared = {name: value for name, value in self.args.to_dict().items() if name not in _OF_A_PROCESS}
        shared |= {"version of " + name: version(name) for name in ("torch", "transformers", "accelerate")}
        shared |= self._own_identity()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            del shared["frozen_weights"]  # only one process may have loaded them
        else:
            model: Any = self.model
            shared["initial weights"] = _fingerprint(model.named_parameters())
        return shared

    def check_resume(self, checkpoint: Path) -> None:
        """Check a checkpoint before anything is changed; all ranks call it, and one reads the files.

        Raises:
            CheckpointError: it belongs to another run, or a file is missing or differs from what was written.
        """
        if checkpoint == self._checked:
            return
        found: list[str | None] = [None]
        if self.is_world_process_zero():
            try:
                _check_state(checkpoint)
                checkpoints.check_identity(checkpoint, self._own_identity())
                if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # their states have other names
                    checkpoints.check_resumable(checkpoint)
                checkpoints.check_whole(checkpoint)
            except CheckpointError as error:
                found = [str(error)]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if found[0] is not None:
            raise CheckpointError(found[0])
        self._checked = checkpoint

    def _own_identity(self) -> dict[str, Any]:
        if self._identity is None:  # once: the engine may shard the parameters afterwards
            self._identity = self.run_identity()
        return self._identity

    # What the Trainer reads of a checkpoint: every error becomes one that names the file.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _resuming(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _resuming(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        # The settings came with the state; torch looks for none of them before it makes a step.
        optimizer: Any = self.optimizer
        missing = optimizer.defaults.keys() - optimizer.param_groups[0].keys()
        if missing:
            raise CheckpointError(
                f"resume_from_checkpoint: {Path(checkpoint) / 'optimizer.pt'} was written by another optimiser than "
                f"args.optim asks for: it lacks the setting {min(missing)!r}"
            )

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _resuming(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / checkpoints.STAGING) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save under a temporary name; rename the folder once every rank has written its part."""
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        staging = folder / checkpoints.STAGING / name
        self._is_staging = True
        try:
            with checkpoints.full_disk_named(folder):
                super()._save_checkpoint(model, trial)
                best = f"checkpoint-{self.state.best_global_step}"
                if best == name or (folder / best).is_dir():
                    self.state.best_model_checkpoint = str(folder / best)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self.state.save_to_json(str(staging / checkpoints.STATE_FILE))
                    self._write_identity(staging)
                    write_manifest(staging, {checkpoints.STATE_FILE: checkpoints.SHOWN_STATE})
                    move_into_place(staging, folder / name)
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
        if not self._is_staging:  # the upload runs in the background and needs a folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def _all_users(self, checkpoint: Path | None) -> list[str] | None:
        """The digests of the users of this run and of the runs before it; None if those of an earlier run are lost."""
        ids, models = self._starting_point()
        users = set(map(checkpoints.user_digest, ids))
        places = [*(getattr(model, "name_or_path", None) for model in models), checkpoint]
        for place in map(Path, filter(None, places)):
            earlier = checkpoints.trained_users(place)
            if earlier is None and (place / checkpoints.RUN_FILE).is_file():
                return None
            users |= earlier or set()
        return sorted(users)

    def _write_identity(self, folder: Path) -> None:
        known = {} if self._trained_users is None else {checkpoints.TRAINED_USERS: self._trained_users}
        write_whole(folder / checkpoints.RUN_FILE, checkpoints.as_json({**self._own_identity(), **known}))


def _resuming(checkpoint: str | Path | None) -> AbstractContextManager[None]:
    return reading(checkpoint, f"resume_from_checkpoint: cannot resume from {checkpoint}", CheckpointError)


def _check_state(checkpoint: Path) -> None:
    """Raise CheckpointError where the Trainer's log is damaged, on which it would fail in the middle of its set-up."""
    from transformers import TrainerState

    path = checkpoint / checkpoints.STATE_FILE
    with _resuming(checkpoint):
        state: Any = TrainerState.load_from_json(str(path))
    wrong = next((name for name, kinds in _STATE.items() if not isinstance(getattr(state, name), kinds)), None)
    if wrong is None and not all(isinstance(entry, dict) for entry in state.log_history):
        wrong = "log_history"
    if wrong is None and state.global_step < 1:
        wrong = "global_step"
    if wrong is not None:
        raise CheckpointError(
            f"resume_from_checkpoint: {path}: damaged, field {wrong!r} is {getattr(state, wrong)!r:.80}"
        )


def run_identity(model: Any, loss: Any) -> dict[str, Any]:
    """The values that a checkpoint must share with a run that resumes from it, as JSON holds them.

    They are the model's shape, its adapters, a fingerprint of its frozen weights, and the loss. A checkpoint of an
    adapter does not hold the frozen weights.
    """
    config = text_config(model)
    frozen = ((name, each) for name, each in model.named_parameters() if not each.requires_grad)
    return {
        "model": {name: getattr(config, name, None) for name in _CONFIG_FIELDS},
        "adapters": {name: _describe(adapter) for name, adapter in sorted(getattr(model, "peft_config", {}).items())},
        "frozen_weights": _fingerprint(frozen),
        # The address of a function differs between processes.
        "loss": re.sub(r" at 0x[0-9a-f]+", "", repr(loss)),
    }


def training_identity(args: Any, models: Iterable[nn.Module]) -> dict[str, Any]:
    """How these models are trained: training arguments by their flags, and the models' precision and dropout."""
    models = list(models)
    trained = {p.dtype for model in models for p in model.parameters() if p.requires_grad}
    rates = {random_rate(module, name) for model in models for _, module, name in random_rates(model)}
    known = {name: getattr(args, name) for name in _ARGUMENTS if name in vars(args)}  # versions of transformers differ
    return {
        **{f"--{name}": value for name, value in known.items()},
        "dtype": sorted(str(dtype).removeprefix("torch.") for dtype in trained),
        "dropout": sorted(filter(None, rates)),
    }


def _describe(adapter: Any) -> str:
    targets = getattr(adapter, "target_modules", None)
    targets = sorted(targets) if isinstance(targets, (set, list, tuple)) else targets
    scaling = {name: value for name in _SCALING if (value := getattr(adapter, name, None))}
    kind = getattr(adapter.peft_type, "value", adapter.peft_type)
    return f"{kind}, r={getattr(adapter, 'r', None)}, {scaling}, {targets}"


def _fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """A hash of the first values of each parameter; None if there is none.

    Parameters that processes divide are left out: each process has other values.
    """
    parts = list[bytes]()
    for name, parameter in parameters:
        if not (parameter.is_meta or isinstance(parameter, DTensor)):
            sample = parameter.detach().reshape(-1)[:_SAMPLE]
            sample = sample.float() if sample.is_floating_point() else sample
            parts.append(name.encode() + sample.cpu().numpy().tobytes())
    return fingerprint(parts) if parts else None
