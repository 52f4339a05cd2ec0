"""Load models and tokenizers by name, and the prompt settings of a model that this library trained."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nextquill.data import PromptTemplate, Record
from nextquill.errors import CheckpointError, NextQuillError, UnsupportedModelError
from nextquill.models.tiny_models import SCRATCH_SIZES, build_model, build_tokenizer, training_texts

PROMPT_FILE = "nextquill_prompt.json"
_ADAPTER_FILE = "adapter_config.json"
_HUB_TIMEOUT_SECONDS = 5


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """The template and the token budgets of a model's prompts."""

    template: PromptTemplate
    max_length: int
    max_response_length: int | None = None

    def to_json(self) -> str:
        """Return the text of the settings' file."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def load_prompt_settings(folder: str | Path) -> PromptSettings | None:
    """The prompt settings stored in a model folder, or in the run folder of a checkpoint; None if there are none.

    Raises:
        CheckpointError: the file exists and cannot be read.
    """
    folder = Path(folder)
    places = [folder / PROMPT_FILE]
    if re.fullmatch(r"checkpoint-\d+", folder.name):
        places.append(folder.parent / PROMPT_FILE)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        lengths = (raw["max_length"], raw.get("max_response_length"))
        for name, length in zip(("max_length", "max_response_length"), lengths, strict=True):
            if type(length) is not int and not (length is None and name == "max_response_length"):
                raise TypeError(f"{name}: expected an integer, got {length!r}")
        return PromptSettings(PromptTemplate(**raw["template"]), *lengths)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the prompt settings of a nextquill model: {error}") from error


def load_model(
    name_or_path: str, *, dtype: str = "auto", records: Callable[[], Sequence[Record]] | None = None, seed: int = 0
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name_or_path: a folder, a name on the Hugging Face hub, or "tiny" / "small" for a new model whose tokenizer is
            made from `records`. A folder with a PEFT adapter loads its base model and the adapter, trainable.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        records: the training records, for a new model.
        seed: initialisation of a new model.

    Raises:
        UnsupportedModelError: the model cannot be loaded, or some of its weights are missing.
    """
    if name_or_path in SCRATCH_SIZES:
        return _new_model(name_or_path, records, seed)
    place, cached_only = _locate(name_or_path)
    try:
        if (Path(place) / _ADAPTER_FILE).is_file():
            return _load_adapter(place, dtype)
        return _load_base(place, dtype, cached_only), load_tokenizer(place, cached_only)
    except NextQuillError:
        raise
    # A damaged folder can fail anywhere: in JSON, safetensors, pickle, shapes, or an architecture's own code.
    except Exception as error:
        reason = _first_sentence(error)
        if cached_only:
            reason = "it is not a folder here, the hub cannot be reached, and it is not in the hub's cache"
        raise UnsupportedModelError(f"model_name_or_path: cannot load {name_or_path!r}: {reason}") from error


def _new_model(name: str, records: Callable[[], Sequence[Record]] | None, seed: int) -> tuple[Any, Any]:
    if records is None:
        raise UnsupportedModelError(
            f"model_name_or_path: a new {name!r} model can only be trained; for a folder of that name write ./{name}"
        )
    size = SCRATCH_SIZES[name]
    tokenizer = build_tokenizer(training_texts(records()), size.vocabulary)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return build_model(size, seed, vocabulary=len(tokenizer), **ids), tokenizer


def _locate(name_or_path: str) -> tuple[str, bool]:
    """The absolute path of a folder, or the hub name; and whether to load from the hub's cache alone.

    The path is absolute so that an adapter saved later still finds its base model. Without the cache alone, the hub's
    client would retry each file for a minute while the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        _check_folder(path)
        return str(path.resolve()), False
    if _looks_local(name_or_path):
        raise UnsupportedModelError(f"model_name_or_path: there is no folder {name_or_path}")
    return name_or_path, not _hub_answers()


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise UnsupportedModelError(f"model_name_or_path: expected a model folder, got the file {path}")
    if (path / "config.json").is_file() or (path / _ADAPTER_FILE).is_file():
        return
    checkpoints = sorted(path.glob("checkpoint-*"))
    hint = f"; its run has not finished; its last checkpoint is {checkpoints[-1]}" if checkpoints else ""
    raise UnsupportedModelError(f"model_name_or_path: no model in {path}: no config.json or {_ADAPTER_FILE}{hint}")


def _looks_local(name: str) -> bool:
    """Whether a name was meant as a path that does not exist: a hub name has at most one slash, in the middle."""
    first, _, rest = name.replace(os.sep, "/").partition("/")
    return name.startswith((".", "/", "~", os.sep)) or "/" in rest or (bool(rest) and Path(first).is_dir())


def _hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    # The client's exceptions differ between its versions, and offline mode has its own.
    except Exception:  # noqa: BLE001
        return False
    return True


def load_tokenizer(place: str, cached_only: bool = False) -> Any:
    """The tokenizer of a folder or a hub name.

    Raises:
        UnsupportedModelError: the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=cached_only)
    # The file formats of tokenizers raise errors of many types, some from Rust.
    except Exception as error:
        raise UnsupportedModelError(
            f"model_name_or_path: cannot load the tokenizer of {place}: {_first_sentence(error)}"
        ) from error


def find_tokenizer(name_or_path: str) -> Any:
    """The tokenizer that `load_model` would return, without loading weights; a folder with only a tokenizer works too.

    Raises:
        UnsupportedModelError: the tokenizer cannot be loaded.
    """
    folder = Path(name_or_path).expanduser()
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    place, cached_only = _locate(name_or_path)
    if (Path(place) / _ADAPTER_FILE).is_file():
        return find_tokenizer(_base_name(place))
    return load_tokenizer(place, cached_only)


def _load_base(place: str, dtype: str, cached_only: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    cached = {"local_files_only": cached_only}  # the search for an adapter does not read the model's own setting
    model, info = load(place, dtype=dtype, adapter_kwargs=cached, **cached, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers initialises them at random, and only logs it
        raise UnsupportedModelError(
            f"model_name_or_path: {place} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        )
    return model


def _load_adapter(place: str, dtype: str) -> tuple[Any, Any]:
    """The base model with the adapter of a folder. PEFT's auto class is not used: it resizes the base's embeddings."""
    from peft import PeftModel

    base_name = _base_name(place)
    try:
        base, tokenizer = load_model(base_name, dtype=dtype)
    except UnsupportedModelError as error:
        message = f"model_name_or_path: the adapter in {place} needs its base model: {error.message}"
        raise UnsupportedModelError(message) from error
    if (Path(place) / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(place)
    return PeftModel.from_pretrained(base, place, is_trainable=True), tokenizer


def _base_name(place: str) -> str:
    """The name of an adapter's base model."""
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(place).base_model_name_or_path
    if not name:
        raise UnsupportedModelError(f"model_name_or_path: the adapter in {place} does not name its base model")
    return str(name)


def _first_sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
