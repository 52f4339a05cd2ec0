"""What a run of POPI has left: both models, how they are prompted, and the settings they were trained with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError
from nextquill.integrations.identity import model_digest
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import ROLES_FILE, Roles, check_roles


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

    @cached_property
    def name(self) -> str:
        """What summaries call the model that wrote them: the folder's name, and a digest of the weights."""
        return f"{self.folder.resolve().name}@{model_digest(self.roles.inference.model)}"


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
