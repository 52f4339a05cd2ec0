"""The folder of a run of POPI: its settings and models."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError
from nextquill.evaluation.identity import model_digest
from nextquill.popi.config import POPIConfig
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import ROLES_FILE, Roles, check_roles
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.input_files import real_path


class SavedRun:
    """A run of POPI with its models, frozen.

    Args:
        folder: the folder that `POPITrainer` wrote, or a checkpoint in it.
        loading: how models are loaded; see `load_model`.

    Raises:
        ArgumentError: an argument of loading that this run or this machine cannot take.
        CheckpointError: the folder is not from POPI, an adapter is missing, or the settings are damaged.
        UnsupportedModelError: a model cannot be loaded.
    """

    def __init__(self, folder: str | Path, **loading: Any) -> None:
        self.folder = Path(folder)
        self.config, self.templates = saved_settings(folder)
        self.roles = Roles.load(folder, **loading)

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
        """Name the writer of summaries: the folder's name, and a digest of everything that decides their text.

        The digest covers the weights, the prompt, the longest summary (by default as in training) and, for sampling,
        the temperature and the seed.
        """
        settings = {
            "weights": self._weights,
            "instruction": self.templates.instruction,
            "template": asdict(self.templates.inference),
            "max_prompt_tokens": self.config.max_signal_tokens,
            "max_new_tokens": max_new_tokens or self.config.max_summary_tokens,
            "sampling": [temperature, seed] if temperature else None,
            **({"opening": self.templates.opening} if self.templates.opening else {}),
        }
        return f"{real_path(self.folder).name}@{fingerprint([json.dumps(settings, sort_keys=True)])}"

    @cached_property
    def _weights(self) -> str:
        return model_digest(self.roles.inference.model)


def saved_settings(folder: str | Path) -> tuple[POPIConfig, PopiTemplates]:
    """Read the settings of training and the wording of the prompts of a run, without loading its models.

    CheckpointError if the folder is not from POPI, an adapter is missing, or the settings are damaged.
    """
    settings = check_roles(Path(folder))["settings"]
    try:
        return POPIConfig(**settings["config"]), PopiTemplates.from_dict(settings["templates"])
    except (KeyError, TypeError, ArgumentError, ArgumentTypeError) as error:
        raise CheckpointError(f"{Path(folder) / ROLES_FILE}: not the settings of POPI: {error}") from error
