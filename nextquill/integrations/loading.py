"""Models and tokenizers by name, and the prompt that belongs to a model this library trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextquill.data import PromptTemplate, Record
from nextquill.errors import CheckpointError, UnsupportedModelError
from nextquill.integrations.scratch import SCRATCH_SIZES, build_model, build_tokenizer, training_texts

PROMPT_FILE = "nextquill_prompt.json"


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How a model's prompts are made: the template and the token budgets."""

    template: PromptTemplate
    max_length: int
    max_response_length: int | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_prompt_settings(folder: str | Path) -> PromptSettings | None:
    """The settings a model folder, or the run folder of a checkpoint, was trained with; None where it says nothing.

    Raises:
        CheckpointError: the file is there and unreadable.
    """
    places = (Path(folder) / PROMPT_FILE, Path(folder).parent / PROMPT_FILE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return PromptSettings(PromptTemplate(**raw["template"]), raw["max_length"], raw["max_response_length"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the prompt settings of a nextquill model: {error}") from error


def load_model(
    name_or_path: str, *, dtype: str = "auto", records: Callable[[], Sequence[Record]] | None = None, seed: int = 0
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a folder, a name on the Hugging Face hub, or "tiny" / "small" for a new model whose tokenizer is
            made from `records`. A folder with a PEFT adapter loads its base model and the adapter.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        records: the training records, for a new model.
        seed: initialisation of a new model.

    Raises:
        UnsupportedModelError: nothing loadable is there.
    """
    if name_or_path in SCRATCH_SIZES:
        if records is None:
            raise UnsupportedModelError(f"model_name_or_path: a new {name_or_path!r} model can only be trained")
        size = SCRATCH_SIZES[name_or_path]
        tokenizer = build_tokenizer(training_texts(records()), size.vocabulary)
        return build_model(size, tokenizer, seed), tokenizer

    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(name_or_path)
    if path.exists() and not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        raise UnsupportedModelError(f"model_name_or_path: no model in {name_or_path}: no config.json or adapter_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        if (path / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, is_trainable=True), tokenizer
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype), tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"model_name_or_path: cannot load {name_or_path!r}: {reason}") from error
