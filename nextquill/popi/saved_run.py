"""What a run of POPI has left: both models, how they are prompted, and the settings they were trained with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError
from nextquill.evaluation.identity import model_digest
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import ROLES_FILE, Roles, check_roles
from nextquill.popi.sample_log import SAMPLES_FILE
from nextquill.storage.fingerprints import fingerprint

_LOGS = Path(SAMPLES_FILE).stem


@dataclass(frozen=True)
class SavedSettings:
    """How a run was trained.

    Args:
        config: its settings.
        templates: its wording.
    """

    config: POPIConfig
    templates: PopiTemplates


class SavedRun:
    """A run's folder, or a checkpoint in it, with its models frozen.

    Args:
        folder: what `POPITrainer` has saved.
        dtype: as `load_model`'s.

    Raises:
        CheckpointError: it is no folder of POPI, an adapter is missing, or the settings are none.
        UnsupportedModelError: a model cannot be loaded.
    """

    def __init__(self, folder: str | Path, *, dtype: str = "auto") -> None:
        settings = saved_settings(folder)
        self.folder, self.config, self.templates = Path(folder), settings.config, settings.templates
        self.roles = Roles.load(folder, dtype=dtype)

    @cached_property
    def inference_prompts(self) -> InferencePrompts:
        """The prompts that summaries are written for."""
        return InferencePrompts(
            self.roles.inference.tokenizer, self.templates, max_prompt_tokens=self.config.max_signal_tokens
        )

    @cached_property
    def generator_prompts(self) -> GeneratorPrompts:
        """The prompts that pairs are scored under."""
        return GeneratorPrompts(self.roles.generator.tokenizer, self.templates, max_length=self.config.max_length)

    def writer(self, *, max_new_tokens: int | None = None, temperature: float = 0.0, seed: int = 0) -> str:
        """What summaries call what wrote them: the folder's name, and a digest of all that decides their text.

        That is the weights, the prompt, the longest summary and, of samples, the temperature and the seed; arguments
        as `summarize` takes them, the longest summary being that of training where none is given.
        """
        settings = {
            "weights": self._weights,
            "instruction": self.templates.instruction,
            "template": asdict(self.templates.inference),
            "max_prompt_tokens": self.config.max_signal_tokens,
            "max_new_tokens": max_new_tokens or self.config.max_summary_tokens,
            "sampling": [temperature, seed] if temperature else None,
        }
        return f"{self.folder.resolve().name}@{fingerprint([json.dumps(settings, sort_keys=True)])}"

    @cached_property
    def _weights(self) -> str:
        return model_digest(self.roles.inference.model)


def saved_settings(folder: str | Path) -> SavedSettings:
    """How the run in a folder was trained, without loading its models.

    Raises:
        CheckpointError: it is no folder of POPI, an adapter is missing, or the settings are none.
    """
    settings = check_roles(Path(folder))["settings"]
    try:
        return SavedSettings(POPIConfig(**settings["config"]), PopiTemplates.from_dict(settings["templates"]))
    except (KeyError, TypeError, ArgumentError, ArgumentTypeError) as error:
        raise CheckpointError(f"{Path(folder) / ROLES_FILE}: not the settings of POPI: {error}") from error


def trained_users(folder: str | Path) -> set[str]:
    """The ids of the users that a run has sampled summaries of, as far as its log is there.

    Args:
        folder: the run's, or of a checkpoint in it.
    """
    run = Path(folder).resolve()
    places = [run, run.parent] if run.name.startswith("checkpoint-") else [run]
    logs = [log for place in places for log in place.glob(f"{_LOGS}*.jsonl")]
    found: set[str] = set()
    for log in logs:
        with log.open(encoding="utf-8", errors="replace") as lines:
            found.update(user for line in lines if (user := _user_of(line)) is not None)
    return found


def _user_of(line: str) -> str | None:
    """None for a line that was cut short."""
    try:
        return str(json.loads(line)["user_id"])
    except (ValueError, KeyError, TypeError):
        return None
