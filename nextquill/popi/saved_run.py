"""The folder of a run of POPI: its settings and models, and the log of the summaries that training samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from nextquill.errors import ArgumentError, ArgumentTypeError, CheckpointError
from nextquill.evaluation.identity import model_digest
from nextquill.popi.config import SAMPLES_FILE, POPIConfig
from nextquill.popi.prompts import GeneratorPrompts, InferencePrompts, PopiTemplates
from nextquill.popi.roles import ROLES_FILE, Roles, check_roles
from nextquill.storage.atomic_files import write_whole
from nextquill.storage.fingerprints import fingerprint
from nextquill.storage.input_files import real_path
from nextquill.storage.json_files import line_fields

_STEM, _SUFFIX = Path(SAMPLES_FILE).stem, Path(SAMPLES_FILE).suffix


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


# ---- the log of sampled summaries --------------------------------------------------------------------


class SampleLog:
    """The file `sampled_summaries.jsonl` in a run's folder. Each process except rank 0 has its own file beside it."""

    def __init__(self, folder: Path, rank: int = 0, processes: int = 1) -> None:
        self._folder, self._rank, self._processes = folder, rank, processes
        self.path = folder / _name(rank)

    def append(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Add lines, each with its `step`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def restart(self, step: int) -> None:
        """Keep only the lines of the steps before this one, as a resumed run writes the others again."""
        paths = [self.path]
        if self._rank == 0:  # also the files of processes that this run no longer has
            known = {_name(rank) for rank in range(self._processes)}
            paths += [path for path in self._folder.glob(_name("*")) if path.name not in known]
        for path in paths:
            if path.is_file():
                # Not `splitlines`: JSON leaves other line breaks as they are, and a summary may hold some.
                lines = path.read_text(encoding="utf-8").split("\n")
                kept = [line for line in lines if line_fields(line).get("step", math.inf) < step]
                write_whole(path, "".join(f"{line}\n" for line in kept))


def _name(rank: int | str) -> str:
    return SAMPLES_FILE if rank == 0 else f"{_STEM}.rank{rank}{_SUFFIX}"
